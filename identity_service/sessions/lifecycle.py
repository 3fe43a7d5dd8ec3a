"""Starting, listing and ending sessions. Refreshing is next door in `rotation`."""

from datetime import datetime, timedelta
from uuid import UUID

from identity_service import audit
from identity_service.audit import Actor, Event, Subject
from identity_service.audit.store import Entry
from identity_service.database import Connection, delete_expired
from identity_service.errors import InvalidCredentials
from identity_service.revocation import Reason
from identity_service.sessions import Login, Session, SessionSummary, store
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
    entry = _entry(reason, by=by, now=now)
    return _tell(entry, await store.end(db, session_id, owner=owner, reason=reason, entry=entry)) == 1


async def end_all(
    db: Connection, user_id: UUID, *, reason: Reason, by: Actor, now: datetime, keep: UUID | None = None
) -> int:
    """End a user's sessions, all but `keep`; return how many. Call within a transaction.

    Sessions that are over are ended too, for as long as they are remembered: a connection that was opened with a token
    of one may still be there, and hears of it.
    """
    entry = _entry(reason, by=by, now=now)
    return _tell(entry, await store.end_all(db, user_id, keep=keep, reason=reason, entry=entry))


async def end_all_of_client(db: Connection, client_id: str, *, reason: Reason, by: Actor, now: datetime) -> None:
    """End the sessions that a client began, whoever's they are. Call within a transaction."""
    entry = _entry(reason, by=by, now=now)
    _tell(entry, await store.end_all_of_client(db, client_id, reason=reason, entry=entry))


async def end_all_of_role(db: Connection, role: str, *, reason: Reason, by: Actor, now: datetime) -> None:
    """End the sessions of everybody who has a role. Call within a transaction."""
    entry = _entry(reason, by=by, now=now)
    _tell(entry, await store.end_all_of_role(db, role, reason=reason, entry=entry))


def _entry(reason: Reason, *, by: Actor, now: datetime) -> Entry:
    """Return what is recorded of each session that ends, but for the user it is about."""
    entry = audit.entry_of(Event.SESSION_ENDED, None, by=by, now=now, reason=reason)
    return entry._replace(subject_kind="user")


def _tell(entry: Entry, count: int) -> int:
    if count:
        audit.tell(entry, count)
    return count


async def prune(db: Connection, *, now: datetime) -> int:
    """Delete a batch of sessions and revoked ids that no token can name any more; return how many rows went."""
    sessions = await delete_expired(db, "sessions", "id", before=now)
    return sessions + await delete_expired(db, "revoked_tokens", "jti", before=now)
