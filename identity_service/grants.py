"""One function per grant: it proves what the grant asks for, then issues the tokens.

What every grant needs done before (strict form, client authentication) is done once by the caller, in `web/token.py` or
`web/login.py`. The signing key is asked for first: without one, nothing is spent and nothing begun.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from identity_service import audit, scopes, throttling
from identity_service.accounts import Credentials, authentication, roles
from identity_service.accounts import store as accounts
from identity_service.accounts.hashing import Verdict
from identity_service.audit import Actor, Event, Subject
from identity_service.clients import Client, own_tokens
from identity_service.database import Connection
from identity_service.errors import (
    ClocksDiffer,
    IdentityError,
    InvalidCredentials,
    KeysUnavailable,
    RefreshTokenReused,
    ScopeRejected,
    SessionEnded,
    TokenRejected,
)
from identity_service.runtime import Runtime
from identity_service.sessions import Claim, Login, Session, SessionLimits, lifecycle, rotation
from identity_service.shell import token_id, uuid7
from identity_service.signing.keyring import Key
from identity_service.throttling import Attempt
from identity_service.tokens import access, refresh


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """An access token; lifetimes in whole seconds from now."""

    access_token: str
    expires_in: int
    scope: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class IssuedTokens(IssuedToken):
    """An access token and the refresh token beside it."""

    refresh_token: str
    refresh_token_expires_in: int


async def password(
    runtime: Runtime, client: Client, *, username: str, password: str, scope: str, by: Actor
) -> IssuedTokens:
    """Log a user in (RFC 6749 4.3).

    Raises:
        InvalidCredentials: whatever the reason.
        Throttled: too many failures before this one.
        ScopeRejected: the scope is malformed.
        HashingOverloaded: too many logins at once.
    """
    requested = scopes.parse(scope)
    key = runtime.keys.current.signer(runtime.now())
    runtime.passwords.refuse_when_full()
    async with runtime.database.connection() as db:
        identified = await authentication.identify(
            db, username, by.address, exempt=runtime.settings.throttle_exempt, now=runtime.now()
        )
    credentials, attempt = identified.credentials, identified.attempt
    subject = Subject("user", str(credentials.user.id)) if credentials is not None else None
    asking = by._replace(client_id=client.client_id)
    verdict = await authentication.prove(
        credentials,
        password,
        runtime.passwords,
        count=lambda error: count_failure(runtime, attempt, Event.USER_LOGIN, subject, error, by=asking),
    )
    assert credentials is not None, "an unknown user is never proved"
    user, now = credentials.user, runtime.now()
    login = Login(
        session_id=uuid7(now),
        user_id=user.id,
        client_id=client.client_id,
        scope=roles.granted(requested, roles.given(user.roles, credentials.role_scopes)),
        amr=("pwd",),
        password_changed_at=user.password_changed_at,
        by=by,
        now=now,
        limits=runtime.session_limits(client),
    )
    async with runtime.passwords.holding_back(verdict):
        try:
            session = await _start(runtime, login, attempt, credentials, verdict)
        except InvalidCredentials as error:
            # Overtaken by a change of the account. The password was right, so that this was no guess.
            async with runtime.database.connection() as db:
                await audit.record(
                    db, Event.USER_LOGIN, subject, by=asking, now=now, outcome="failure", reason=error.detail
                )
            raise
    return await _issue(runtime, client, key, session, scope=session.scope, now=now, limits=login.limits)


async def _start(
    runtime: Runtime, login: Login, attempt: Attempt, credentials: Credentials, verdict: Verdict
) -> Session:
    """Begin the session: in one statement, unless something is to be forgiven or replaced besides."""
    if verdict.replacement is None:
        session = await runtime.database.transact(
            lambda db: lifecycle.start_unless_counted(db, login, attempt), one_statement=True
        )
        if session is not None:
            return session

    async def start(db: Connection) -> Session:
        await throttling.admit(db, attempt, now=login.now)
        if verdict.replacement is not None:
            await accounts.update_hash(db, login.user_id, old=credentials.password_hash, new=verdict.replacement)
        return await lifecycle.start(db, login)

    return await runtime.database.transact(start)


async def count_failure(
    runtime: Runtime, attempt: Attempt, event: Event, subject: Subject | None, error: IdentityError, *, by: Actor
) -> None:
    """Count a password or a client's secret that was wrong, and record the event.

    Raises:
        Throttled: it was one of too many at once; see `throttling.count_failure`.
    """
    now = runtime.now()

    async def count(db: Connection) -> None:
        await throttling.count_failure(db, attempt, by=by, subject=subject, now=now)
        await audit.record(db, event, subject, by=by, now=now, outcome="failure", reason=error.detail)

    await runtime.database.transact(count)


async def refresh_token(
    runtime: Runtime, client: Client, *, unverified_token: str, scope: str, by: Actor
) -> IssuedTokens:
    """Go on with a session (RFC 6749 6). The scope may be narrowed for the access token, never widened.

    Raises:
        SessionEnded: the token is not one of this client's, or its session is over.
        RefreshTokenReused: the token had been spent before; its session has been ended.
        ScopeRejected: the scope is malformed, or holds more than the login was granted.
    """
    requested = scopes.parse(scope)
    now, limits = runtime.now(), runtime.session_limits(client)
    key = runtime.keys.current.signer(now)
    try:
        session = await _rotate(runtime, client, unverified_token, requested, by=by, now=now, limits=limits)
    except SessionEnded as error:
        runtime.metrics.refreshed("reused" if isinstance(error, RefreshTokenReused) else "ended")
        raise
    runtime.metrics.refreshed("rotated" if session.rotated_at == now else "retried")
    return await _issue(runtime, client, key, session, scope=requested or session.scope, now=now, limits=limits)


async def _rotate(
    runtime: Runtime,
    client: Client,
    unverified_token: str,
    scope: Sequence[str],
    *,
    by: Actor,
    now: datetime,
    limits: SessionLimits,
) -> Session:
    try:
        presented = refresh.read(unverified_token, runtime.keys.current, issuer=runtime.settings.issuer_url, now=now)
    except TokenRejected as error:
        # Nobody is logged out because a disk or a clock of ours is wrong.
        if error.reason == "unknown_key" and runtime.keys.is_troubled:
            raise KeysUnavailable(detail="the keys folder cannot be read, and may have this key") from None
        if error.reason == "not_yet_valid":
            raise ClocksDiffer(detail=error.detail) from None
        raise SessionEnded(detail=error.detail) from None
    if presented.client_id != client.client_id:
        raise SessionEnded(detail="issued to another client")
    claim = Claim(presented, now, limits)
    # A scope has to be looked at together with the session's own, which takes a statement of its own.
    if not scope and (session := await runtime.rotations.claim(claim)) is not None:
        return session
    async with runtime.database.connection() as db:
        return await rotation.rotate(db, claim, scope=scope, by=by)


async def client_credentials(runtime: Runtime, client: Client, *, scope: str, by: Actor) -> IssuedToken:
    """Give a confidential client a token for itself (RFC 6749 4.4). None requested: all its scopes.

    Raises:
        ScopeRejected: the scope is malformed, or holds what the client does not have.
        ClientRejected: it was disabled in the meantime.
    """
    requested = scopes.parse(scope)
    if not set(requested) <= set(client.scopes):
        raise ScopeRejected(detail="more than the client has")
    now = runtime.now()
    key = runtime.keys.current.signer(now)
    claims = access.ClientClaims(
        issuer=runtime.settings.issuer_url,
        audience=runtime.audience(client),
        client_id=client.client_id,
        token_id=str(uuid7(now)),
        issued_at=now,
        expires_at=now + runtime.access_lifetime(client),
        scope=requested or client.scopes,
    )
    status_index = await runtime.database.transact(
        lambda db: own_tokens.issue(
            db, client, claims.token_id, scope=claims.scope, expires_at=claims.expires_at, by=by, now=now
        )
    )
    return IssuedToken(
        access_token=access.mint(key, claims, runtime.status_lists.reference(status_index)),
        expires_in=int((claims.expires_at - now).total_seconds()),
        scope=claims.scope,
    )


async def _issue(
    runtime: Runtime,
    client: Client,
    key: Key,
    session: Session,
    *,
    scope: Sequence[str],
    now: datetime,
    limits: SessionLimits,
) -> IssuedTokens:
    """Sign the two tokens of a session. Scopes of a role that was taken away since the login are left out."""
    settings = runtime.settings
    given = roles.given(session.roles, session.role_scopes)
    scope = tuple(name for name in scope if name in given)
    # A retry's token ends no later than its generation was said to: the end of a session is remembered for so long.
    expires_at = min(now + limits.access, session.expires_at, session.access_expires_at)
    refresh_expires_at = session.refresh_expires_at(limits)
    unsigned_access = access.unsigned(
        key,
        access.AccessClaims(
            issuer=settings.issuer_url,
            subject=session.user_id,
            audience=runtime.audience(client),
            client_id=session.client_id,
            session_id=session.id,
            token_id=token_id(),
            issued_at=now,
            expires_at=expires_at,
            authenticated_at=session.authenticated_at,
            amr=session.amr,
            scope=scope,
            roles=session.roles,
        ),
        runtime.status_lists.reference(session.status_index),
    )
    unsigned_refresh = refresh.unsigned(
        key,
        refresh.RefreshClaims(
            issuer=settings.issuer_url,
            subject=session.user_id,
            client_id=session.client_id,
            session_id=session.id,
            generation=session.generation,
            issued_at=session.rotated_at,
            expires_at=refresh_expires_at,
        ),
    )
    access_token, refresh_token = await runtime.signing.sign(unsigned_access, unsigned_refresh)
    return IssuedTokens(
        access_token=access_token,
        expires_in=int((expires_at - now).total_seconds()),
        scope=scope,
        refresh_token=refresh_token,
        refresh_token_expires_in=int((refresh_expires_at - now).total_seconds()),
    )
