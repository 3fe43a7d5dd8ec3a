"""`POST /introspect` (RFC 7662): what a token is worth at this moment, for those whose business it is."""

from typing import Annotated, Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from identity_service import errors
from identity_service.accounts import authentication
from identity_service.clients import Client
from identity_service.clients import store as clients
from identity_service.database import Connection
from identity_service.errors import TokenRejected
from identity_service.runtime import Runtime
from identity_service.sessions import store as sessions
from identity_service.tokens.access import AccessClaims, ClientClaims
from identity_service.tokens.refresh import RefreshClaims
from identity_service.web import oauth
from identity_service.web.dependencies import public, runtime_of
from identity_service.web.problems import Router
from identity_service.web.revocation import read_token

router = Router(route_class=oauth.OAuthRoute, tags=["OAuth"])


class Introspection(BaseModel):
    """RFC 7662 2.2. A token that is not active has no other member."""

    active: bool
    scope: Annotated[str, Field("", examples=["orders:read"])]
    client_id: Annotated[str, Field("", examples=["billing"])]
    username: Annotated[str, Field("", description="Of a user's token.")]
    token_type: Annotated[str, Field("", description="`Bearer`, of an access token.")]
    sub: str = ""
    aud: str | list[str] = ""
    iss: str = ""
    jti: str = ""
    sid: Annotated[str, Field("", description="Of a user's token.")]
    iat: int = 0
    exp: int = 0


@router.post(
    "/introspect",
    response_model=Introspection,
    responses=oauth.described(errors.ClientRejected, errors.Throttled, errors.Unavailable),
    openapi_extra=oauth.form_schema("token", "token_type_hint"),
)
@public
async def introspect(request: Request) -> JSONResponse:
    """Tell a confidential client about a token that concerns it. Anything else is `{"active": false}`."""
    runtime = runtime_of(request)
    form = await oauth.read_form(request)
    unverified_token = oauth.require(form, "token")
    caller = await oauth.identify_confidential_client(request, form)
    claims = read_token(runtime, unverified_token)
    told = await _look(runtime, claims) if claims is not None and _concerns(runtime, caller, claims) else None
    return JSONResponse({"active": False} if told is None else {"active": True, **told}, headers=oauth.NO_STORE)


def _concerns(runtime: Runtime, caller: Client, claims: AccessClaims | ClientClaims | RefreshClaims) -> bool:
    """Whether a token was issued to the caller or is meant for it.

    A token that is for this service itself was issued to a first-party client: those that share its audience may ask.
    """
    if claims.client_id == caller.client_id:
        return True
    if isinstance(claims, RefreshClaims):
        return False
    if caller.client_id in claims.audience:
        return True
    issuer = runtime.settings.issuer_url
    return issuer in claims.audience and bool((set(claims.audience) - {issuer}).intersection(runtime.audience(caller)))


async def _look(runtime: Runtime, claims: AccessClaims | ClientClaims | RefreshClaims) -> dict[str, Any] | None:
    """Return what to tell of a token, None when it is not good at this moment. One statement, whatever it is."""
    async with runtime.database.connection() as db:
        if isinstance(claims, ClientClaims):
            live = await clients.is_live_token(db, claims.token_id, claims.client_id)
            return _access(claims) if live else None
        if isinstance(claims, RefreshClaims):
            return await _refresh(runtime, db, claims)
        try:
            user = await authentication.find_caller(db, claims)
        except TokenRejected:
            return None
        return _access(claims) | {"username": user.username, "sid": str(claims.session_id)}


async def _refresh(runtime: Runtime, db: Connection, claims: RefreshClaims) -> dict[str, Any] | None:
    """Only the newest token of a session counts: whoever asks holds one that was not spent."""
    now = runtime.now()
    found = await sessions.find_current(db, claims, now=now, idle_since=now - runtime.settings.refresh_lifetime)
    if found is None:
        return None
    session, username = found
    return {
        **_common(claims),
        "scope": " ".join(session.scope),
        "aud": claims.issuer,
        "jti": f"{claims.session_id}.{claims.generation}",
        "username": username,
        "sid": str(claims.session_id),
    }


def _access(claims: AccessClaims | ClientClaims) -> dict[str, Any]:
    return {
        **_common(claims),
        "scope": " ".join(claims.scope),
        "aud": list(claims.audience),
        "jti": claims.token_id,
        "token_type": "Bearer",
    }


def _common(claims: AccessClaims | ClientClaims | RefreshClaims) -> dict[str, Any]:
    return {
        "iss": claims.issuer,
        "sub": str(claims.subject),
        "client_id": claims.client_id,
        "iat": int(claims.issued_at.timestamp()),
        "exp": int(claims.expires_at.timestamp()),
    }
