"""Refreshing a session: one row, one statement. Starting and ending sessions is next door in `lifecycle`."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from identity_service.audit import Actor
from identity_service.database import Connection
from identity_service.errors import RefreshTokenReused, ScopeRejected, SessionEnded
from identity_service.revocation.revoking import Reason
from identity_service.sessions import Session, SessionLimits, lifecycle, store
from identity_service.tokens.refresh import RefreshClaims


async def rotate(
    db: Connection, presented: RefreshClaims, *, scope: Sequence[str], by: Actor, now: datetime, limits: SessionLimits
) -> Session:
    """Advance the session to its next refresh token and return it.

    Asking again with the token just spent returns the same successor (RFC 9700 4.14.2 allows no second family); asking
    with an older one ends the session.

    Args:
        db: a connection outside of any transaction: what is found out here must outlive the refusal.
        by: who presents the token; an end of the session is recorded in their name and that of the token's client.
        scope: what is asked for this time; nothing is spent when it exceeds what the login was granted.

    Raises:
        SessionEnded: expired, revoked, or its user is no longer welcome.
        RefreshTokenReused: the token had been spent before; the session has been ended.
        ScopeRejected: the scope exceeds the session's.
    """
    assert not db.is_in_transaction(), "a refusal would undo the end of the session"
    idle_since = now - limits.idle
    until = limits.access_expires_at(now)
    if session := await store.claim_generation(
        db, presented, scope=scope, now=now, idle_since=idle_since, access_expires_at=until
    ):
        return session
    current = await store.find_live(db, presented, now=now, idle_since=idle_since)
    if current is None:
        raise SessionEnded(detail="the session is over, or its user is not welcome")
    return await _answer_retry_or_end(db, presented, current, scope=scope, by=by, now=now, limits=limits)


async def _answer_retry_or_end(
    db: Connection,
    presented: RefreshClaims,
    current: Session,
    *,
    scope: Sequence[str],
    by: Actor,
    now: datetime,
    limits: SessionLimits,
) -> Session:
    just_spent = presented.generation + 1 == current.generation
    retried = just_spent and now - current.rotated_at <= limits.retry_window
    if presented.generation < current.generation and not retried:
        # Committed before refusing: raising inside the transaction would bring the family back.
        by = replace(by, client_id=presented.client_id)
        async with db.transaction():
            await lifecycle.end(db, current.id, reason=Reason.REUSE, by=by, now=now)
        raise RefreshTokenReused(
            detail=f"session {current.id}: generation {presented.generation} came back at {current.generation}"
        )
    if not set(scope) <= set(current.scope):
        raise ScopeRejected
    if retried:
        return current
    # The current one after all: its account was being changed while the first attempt waited for the row.
    session = await store.claim_generation(
        db,
        presented,
        scope=scope,
        now=now,
        idle_since=now - limits.idle,
        access_expires_at=limits.access_expires_at(now),
    )
    if session is None:
        # Signed by us, yet never handed out as far as this database knows: it was restored from a backup.
        raise SessionEnded(
            detail=f"generation {presented.generation} is unknown, the session is at {current.generation}"
        )
    return session
