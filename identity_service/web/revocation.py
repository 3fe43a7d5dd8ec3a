"""`POST /revoke` (RFC 7009): a token of a session ends the session, a client's own token is revoked by itself."""

from contextlib import suppress

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from identity_service import errors
from identity_service.audit import Actor
from identity_service.clients import own_tokens
from identity_service.errors import TokenRejected
from identity_service.revocation import Reason
from identity_service.runtime import Runtime
from identity_service.sessions import lifecycle
from identity_service.tokens import access, refresh
from identity_service.tokens.access import AccessClaims, ClientClaims
from identity_service.tokens.refresh import RefreshClaims
from identity_service.web import oauth
from identity_service.web.dependencies import actor_of, public, runtime_of
from identity_service.web.problems import Router

router = Router(route_class=oauth.OAuthRoute, tags=["OAuth"])


class Nothing(BaseModel):
    """An empty object."""


@router.post(
    "/revoke",
    response_model=Nothing,
    responses=oauth.described(errors.ClientRejected, errors.Throttled, errors.Unavailable),
    openapi_extra=oauth.form_schema("token", "token_type_hint"),
)
@public
async def revoke(request: Request) -> JSONResponse:
    """Revoke a token, with its session. Unknown, expired and malformed tokens, and others' tokens, answer 200 too."""
    runtime = runtime_of(request)
    form = await oauth.read_form(request)
    unverified_token = oauth.require(form, "token")
    client = await oauth.identify_client(request, form)
    claims = read_token(runtime, unverified_token)
    if claims is not None and claims.client_id == client.client_id:
        if isinstance(claims, ClientClaims):
            await _revoke_own(runtime, claims, by=actor_of(request))
        else:
            await end_session_of(runtime, claims, Reason.REVOKED, by=actor_of(request))
    return JSONResponse({}, headers=oauth.NO_STORE)


async def end_session_of(runtime: Runtime, claims: AccessClaims | RefreshClaims, reason: Reason, *, by: Actor) -> None:
    """End the session that a verified token names, whatever its generation."""
    by = by.proved_user(claims.subject, client_id=claims.client_id, session_id=claims.session_id)
    await runtime.database.transact(
        lambda db: lifecycle.end(db, claims.session_id, reason=reason, by=by, now=runtime.now())
    )


async def _revoke_own(runtime: Runtime, claims: ClientClaims, *, by: Actor) -> None:
    by = by.proved_client(claims.client_id)
    await runtime.database.transact(
        lambda db: own_tokens.revoke(db, claims.client_id, claims.token_id, by=by, now=runtime.now())
    )


def read_token(runtime: Runtime, unverified_token: str) -> AccessClaims | ClientClaims | RefreshClaims | None:
    """Return the claims of whichever kind the token is; the hint of RFC 7009 2.1 could only mislead."""
    ring, issuer, now = runtime.keys.current, runtime.settings.issuer_url, runtime.now()
    with suppress(TokenRejected):
        return refresh.read(unverified_token, ring, issuer=issuer, now=now)
    with suppress(TokenRejected):
        return access.read_any(unverified_token, ring, issuer=issuer, now=now)
    return None
