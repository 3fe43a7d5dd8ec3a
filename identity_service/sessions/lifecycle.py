"""Starting and ending sessions. Refreshing is next door in `rotation`."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from identity_service.database import Connection
from identity_service.errors import InvalidCredentials
from identity_service.revocation import Revocable, revoking
from identity_service.revocation import store as revoked
from identity_service.revocation.revoking import Reason
from identity_service.sessions import Session, SessionLimits, store

PRUNE_BATCH = 1000


async def start(
    db: Connection,
    session_id: UUID,
    user_id: UUID,
    *,
    client_id: str,
    scope: Sequence[str],
    amr: Sequence[str],
    password_changed_at: datetime,
    now: datetime,
    limits: SessionLimits,
) -> Session:
    """Begin a session for a user who has just proved a password.

    Args:
        password_changed_at: when the proved password was set, so that a change or a disabling that happened while it
            was being hashed is not overtaken by this login.

    Raises:
        InvalidCredentials: the account was disabled or deleted, or its password changed, in the meantime.
    """
    session = await store.insert(
        db,
        session_id,
        user_id,
        client_id=client_id,
        scope=scope,
        amr=amr,
        password_changed_at=password_changed_at,
        now=now,
        expires_at=now + limits.absolute,
        access_expires_at=limits.access_expires_at(now),
    )
    if session is None:
        raise InvalidCredentials(detail="the account changed during the login")
    return session


async def end(db: Connection, session_id: UUID, *, reason: Reason, now: datetime) -> bool:
    """End one session; return whether it was still alive. Call within a transaction."""
    ended = await store.revoke(db, session_id, now=now)
    await _revoke_tokens(db, ended, reason=reason, now=now)
    return bool(ended)


async def end_all(db: Connection, user_id: UUID, *, reason: Reason, now: datetime, keep: UUID | None = None) -> int:
    """End a user's sessions, all but `keep`; return how many. Call within a transaction.

    Sessions that are over are ended too, for as long as they are remembered: a connection that was opened with a token
    of one may still be there, and hears of it.
    """
    ended = await store.revoke_all(db, user_id, keep=keep, now=now)
    await _revoke_tokens(db, ended, reason=reason, now=now)
    return len(ended)


async def _revoke_tokens(db: Connection, ended: Sequence[Revocable], *, reason: Reason, now: datetime) -> None:
    if ended:
        await revoking.revoke(db, ended, reason=reason, now=now)


async def prune(db: Connection, *, now: datetime) -> int:
    """Delete a batch of sessions and revoked ids that no token can name any more; return how many rows went."""
    sessions = await store.delete_expired(db, now=now, limit=PRUNE_BATCH)
    return sessions + await revoked.delete_expired(db, now=now, limit=PRUNE_BATCH)
