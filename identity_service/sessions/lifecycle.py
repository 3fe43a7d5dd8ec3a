"""Starting, listing and ending sessions. Refreshing is next door in `rotation`."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import groupby
from uuid import UUID

from identity_service import audit
from identity_service.audit import Actor, Event, Subject
from identity_service.database import Connection, delete_expired
from identity_service.errors import InvalidCredentials
from identity_service.revocation import revoking
from identity_service.revocation.revoking import Reason
from identity_service.sessions import EndedSession, Login, Session, SessionSummary, store
from identity_service.throttling import UNCOUNTED, Attempt


async def start(db: Connection, login: Login) -> Session:
    """Begin a session. Call within the transaction that admitted the password; see `throttling.admit`.

    Raises:
        InvalidCredentials: the account or the client was disabled or deleted, or the password changed, in the meantime.
    """
    session = await start_unless_counted(db, login, UNCOUNTED)
    if session is None:
        raise InvalidCredentials(detail="account_changed")
    return session


async def start_unless_counted(db: Connection, login: Login, attempt: Attempt) -> Session | None:
    """Begin a session, and admit the password that opens it, in one statement: if no failure counts against it.

    None means that `start` has to be used: there are failures to forgive, or the account has changed.
    """
    entry = audit.entry_of(
        Event.USER_LOGIN,
        Subject("user", str(login.user_id)),
        by=login.by.proved_user(login.user_id, client_id=login.client_id, session_id=login.session_id),
        now=login.now,
        details={"scope": list(login.scope)},
    )
    session = await store.insert(db, login, entry, attempt)
    if session is not None:
        audit.tell(entry)
    return session


async def list_live(
    db: Connection,
    user_id: UUID,
    *,
    current: UUID | None = None,
    after: tuple[bool, datetime, UUID] | None = None,
    limit: int,
    now: datetime,
    idle: timedelta,
) -> list[SessionSummary]:
    """Return a user's sessions that can still be refreshed, the current one first, then those used last.

    Args:
        after: of the session that the page before ended with: whether it was the current one, its last use, its id.
        idle: longest pause between two refreshes.
    """
    return await store.list_live(db, user_id, current=current, after=after, limit=limit, now=now, idle_since=now - idle)


async def end(
    db: Connection, session_id: UUID, *, reason: Reason, by: Actor, now: datetime, owner: UUID | None = None
) -> bool:
    """End one session; return whether it was still alive. Call within a transaction.

    Args:
        owner: the user who must have it; None for whoever does.
    """
    ended = await store.revoke(db, session_id, owner=owner, now=now)
    await _revoke_tokens(db, ended, reason=reason, by=by, now=now)
    return bool(ended)


async def end_all(
    db: Connection, user_id: UUID, *, reason: Reason, by: Actor, now: datetime, keep: UUID | None = None
) -> int:
    """End a user's sessions, all but `keep`; return how many. Call within a transaction.

    Sessions that are over are ended too, for as long as they are remembered: a connection that was opened with a token
    of one may still be there, and hears of it.
    """
    ended = await store.revoke_all(db, user_id, keep=keep, now=now)
    await _revoke_tokens(db, ended, reason=reason, by=by, now=now)
    return len(ended)


async def end_all_of_client(db: Connection, client_id: str, *, reason: Reason, by: Actor, now: datetime) -> None:
    """End the sessions that a client began, whoever's they are. Call within a transaction."""
    ended = await store.revoke_all_of_client(db, client_id, now=now)
    await _revoke_tokens(db, ended, reason=reason, by=by, now=now)


async def end_all_of_role(db: Connection, role: str, *, reason: Reason, by: Actor, now: datetime) -> None:
    """End the sessions of everybody who has a role. Call within a transaction."""
    ended = await store.revoke_all_of_role(db, role, now=now)
    await _revoke_tokens(db, ended, reason=reason, by=by, now=now)


async def _revoke_tokens(
    db: Connection, ended: Sequence[EndedSession], *, reason: Reason, by: Actor, now: datetime
) -> None:
    """Revoke what the sessions' tokens carry, and record the end of each with the user it is about."""
    if not ended:
        return
    await revoking.revoke(db, [session.revocable for session in ended], reason=reason, now=now)
    by_user = sorted(ended, key=lambda session: session.user_id)
    for user_id, sessions in groupby(by_user, key=lambda session: session.user_id):
        await audit.record(
            db,
            Event.SESSION_ENDED,
            Subject("user", str(user_id)),
            by=by,
            now=now,
            reason=reason.value,
            session_ids=tuple(session.id for session in sessions),
        )


async def prune(db: Connection, *, now: datetime) -> int:
    """Delete a batch of sessions and revoked ids that no token can name any more; return how many rows went."""
    sessions = await delete_expired(db, "sessions", "id", before=now)
    return sessions + await delete_expired(db, "revoked_tokens", "jti", before=now)
