"""What routes depend on: the runtime, and who is asking. A route shows its protection by `public`, by
`SignedIn` or by `Administrator`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, TypeVar

from fastapi import Depends, Request, Security
from fastapi.security import OAuth2PasswordBearer

from identity_service.accounts import User, authentication, roles
from identity_service.accounts.roles import ADMIN_SCOPE
from identity_service.audit import Actor
from identity_service.runtime import Runtime
from identity_service.tokens import access
from identity_service.tokens.access import AccessClaims
from identity_service.web.problems import BadRequest

Endpoint = TypeVar("Endpoint", bound=Callable[..., object])
PUBLIC = "identity_public"
ADMIN_MAX_AGE = timedelta(hours=12)
_TOO_LONG_AGO = "Log in again: this takes a login of the last 12 hours."
_USER_AGENT_LENGTH = 256


def public(endpoint: Endpoint) -> Endpoint:
    """Mark a route that anyone may call. A test fails on routes that have neither this mark nor a guard."""
    setattr(endpoint, PUBLIC, True)
    return endpoint


def runtime_of(request: Request) -> Runtime:
    runtime: Runtime = request.app.state.runtime
    return runtime


def actor_of(request: Request) -> Actor:
    """Return who asks, as far as anybody knows before a credential was proved."""
    scope = request.scope
    return Actor(
        "anonymous",
        address=scope["identity.address"],
        user_agent=_clean(scope["identity.headers"].get(b"user-agent", b"").decode("latin-1")),
        request_id=scope["identity.request_id"],
    )


def _clean(unverified_user_agent: str) -> str | None:
    agent = unverified_user_agent[:_USER_AGENT_LENGTH]
    if not agent.isprintable():
        agent = "".join(character if character.isprintable() else "?" for character in agent)
    return agent or None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is asking, and when: the account as it stands `now`, what the presented access token claims, from where."""

    user: User
    claims: AccessClaims
    actor: Actor
    now: datetime


# Only declares the scheme for OpenAPI, so that Swagger UI's Authorize button logs in; reading it is done below.
_declared = OAuth2PasswordBearer(tokenUrl="token", scopes={ADMIN_SCOPE: "Administer this service"}, auto_error=False)


async def signed_in(request: Request, _declared_token: Annotated[str | None, Depends(_declared)]) -> Caller:
    """Let in whoever presents an access token for this service, of a session that lives at this moment.

    Raises:
        BadRequest: 401 with a bare challenge, or 400 for two credentials (RFC 6750 3.1).
        TokenRejected: not valid, or revoked.
    """
    runtime = runtime_of(request)
    now = runtime.now()
    claims = access.read(bearer_token(request), runtime.keys.current, issuer=runtime.settings.issuer_url, now=now)
    async with runtime.database.connection() as db:
        user = await authentication.find_caller(db, claims)
    actor = actor_of(request).proved_user(user.id, client_id=claims.client_id, session_id=claims.session_id)
    return Caller(user, claims, actor, now)


SignedIn = Annotated[Caller, Depends(signed_in)]


async def administrator(caller: SignedIn) -> Caller:
    """Let in an administrator: by the token's scope, by the role at this moment, and by a login of today.

    Raises:
        BadRequest: 403 without the scope or the role (RFC 6750 3.1), 401 when the login is too old (RFC 9470 3).
    """
    if ADMIN_SCOPE not in caller.claims.scope or roles.ADMIN not in caller.user.roles:
        challenge = f'Bearer realm="identity", error="insufficient_scope", scope="{ADMIN_SCOPE}"'
        raise BadRequest(
            403, "insufficient_scope", f"This takes the scope {ADMIN_SCOPE}.", {"WWW-Authenticate": challenge}
        )
    if caller.now - caller.claims.authenticated_at > ADMIN_MAX_AGE:
        challenge = 'Bearer realm="identity", error="insufficient_user_authentication", '
        challenge += f'error_description="{_TOO_LONG_AGO}", max_age="{int(ADMIN_MAX_AGE.total_seconds())}"'
        raise BadRequest(401, "insufficient_user_authentication", _TOO_LONG_AGO, {"WWW-Authenticate": challenge})
    return caller


Administrator = Annotated[Caller, Security(administrator, scopes=[ADMIN_SCOPE])]


def bearer_token(request: Request) -> str:
    """Return the token of the Authorization header; tokens anywhere else are not looked at (RFC 6750 2.1)."""
    values = request.headers.getlist("authorization")
    if len(values) > 1:
        raise BadRequest(
            400,
            "invalid_request",
            "More than one Authorization header.",
            {"WWW-Authenticate": 'Bearer realm="identity", error="invalid_request"'},
        )
    scheme, _, token = (values[0] if values else "").partition(" ")
    token = token.strip(" ")
    if scheme.lower() != "bearer" or not token:
        raise BadRequest(
            401,
            "authentication_required",
            "Present an access token as a bearer token.",
            {"WWW-Authenticate": 'Bearer realm="identity"'},
        )
    return token
