"""What happened: who did what to whom, from where, and what came of it. Append-only.

`record` is called within the transaction that does what it records, by the rule that does it; `list_events` reads
`events`. `chain` links what was committed by hashes, so that a change of the past shows. Logs are something else: they
may be lost.
"""

import json
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, NamedTuple, TypeAlias
from uuid import UUID

from identity_service.audit import store
from identity_service.audit.events import EventFilter, RecordedEvent
from identity_service.audit.store import Entry
from identity_service.database import Connection


class Event(StrEnum):
    """The names of what is recorded: `noun.verb`. They are stable."""

    USER_CREATED = "user.created"
    USER_UPDATED = "user.updated"
    USER_DISABLED = "user.disabled"
    USER_ENABLED = "user.enabled"
    USER_DELETED = "user.deleted"
    USER_ROLES_CHANGED = "user.roles_changed"
    USER_LOCKED = "user.locked"
    USER_UNLOCKED = "user.unlocked"
    USER_LOGIN = "user.login"
    USER_PASSWORD_CHANGED = "user.password_changed"  # noqa: S105 - a name, not a secret
    USER_PASSWORD_REJECTED = "user.password_rejected"  # noqa: S105
    USER_PASSWORD_RESET_STARTED = "user.password_reset_started"  # noqa: S105
    USER_PASSWORD_RESET = "user.password_reset"  # noqa: S105
    USERS_IMPORTED = "users.imported"
    USERS_EXPORTED = "users.exported"
    SESSION_ENDED = "session.ended"
    ROLE_CREATED = "role.created"
    ROLE_UPDATED = "role.updated"
    ROLE_DELETED = "role.deleted"
    CLIENT_CREATED = "client.created"
    CLIENT_UPDATED = "client.updated"
    CLIENT_SECRET_ROTATED = "client.secret_rotated"  # noqa: S105
    CLIENT_DISABLED = "client.disabled"
    CLIENT_ENABLED = "client.enabled"
    CLIENT_DELETED = "client.deleted"
    CLIENT_LOGIN = "client.login"
    CLIENT_TOKEN_REVOKED = "client.token_revoked"  # noqa: S105
    AUDIT_DROPPED = "audit.dropped"
    AUDIT_EXPORTED = "audit.exported"
    KEY_ROTATED = "key.rotated"
    KEY_REVOKED = "key.revoked"


class Actor(NamedTuple):
    """Who does something, and from where.

    Args:
        kind: `anonymous` until a credential was proved; `operator` is whoever has the command line; `service` is this
            service by itself.
        id: of the user (a UUID), the client, or the operator's account on their machine.
        address: of the other end, as far as proxies that we trust tell it.
    """

    kind: Literal["anonymous", "user", "client", "operator", "service"]
    id: str | None = None
    client_id: str | None = None
    session_id: UUID | None = None
    address: str | None = None
    user_agent: str | None = None
    request_id: str | None = None

    def proved_user(self, user_id: UUID, *, client_id: str, session_id: UUID | None = None) -> "Actor":
        """Return the same at the moment when it turned out to be a user."""
        return self._replace(kind="user", id=str(user_id), client_id=client_id, session_id=session_id)

    def proved_client(self, client_id: str) -> "Actor":
        return self._replace(kind="client", id=client_id, client_id=client_id)


SubjectKind: TypeAlias = Literal["user", "client", "role", "key"]


@dataclass(frozen=True, slots=True)
class Subject:
    """Who or what it was done to."""

    kind: SubjectKind
    id: str


Listener = Callable[[Event, str, str | None, int], None]
"""Takes the event, its outcome, its reason, and how many there were."""

listener: ContextVar[Listener | None] = ContextVar("audit_listener", default=None)
"""Is told, for counting, what is recorded in a context, even when the transaction is rolled back afterwards."""


async def record(
    db: Connection,
    event: Event,
    subject: Subject | None,
    *,
    by: Actor,
    now: datetime,
    outcome: Literal["success", "failure"] = "success",
    reason: str | None = None,
    session_ids: tuple[UUID, ...] = (),
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write down what is being done. Call within the transaction that does it.

    Args:
        reason: a stable word, when the event alone does not say why.
        session_ids: one event for each of these sessions; without any, one event with the actor's own.
        details: values of JSON that say what changed. Never a secret, and never text that nobody has checked: people
            type passwords where usernames belong.
    """
    entry = entry_of(event, subject, by=by, now=now, outcome=outcome, reason=reason, details=details)
    await store.insert(db, session_ids or (by.session_id,), entry)
    tell(entry, len(session_ids) or 1)


def entry_of(
    event: Event,
    subject: Subject | None,
    *,
    by: Actor,
    now: datetime,
    outcome: Literal["success", "failure"] = "success",
    reason: str | None = None,
    details: Mapping[str, Any] | None = None,
) -> Entry:
    """Return what `record` writes down, for a statement that does so by itself with `store.insert_from`.

    Whoever asks for it has to `tell` of it when it was written.
    """
    return Entry(
        occurred_at=now,
        event=event.value,
        outcome=outcome,
        reason=reason,
        actor_kind=by.kind,
        actor_id=by.id,
        subject_kind=subject.kind if subject is not None else None,
        subject_id=subject.id if subject is not None else None,
        client_id=by.client_id,
        address=by.address,
        user_agent=by.user_agent,
        request_id=by.request_id,
        details=json.dumps(dict(details or {})),
    )


def tell(entry: Entry, times: int = 1) -> None:
    """Tell whoever listens that an entry was written, so many times."""
    if (listening := listener.get()) is not None:
        listening(Event(entry.event), entry.outcome, entry.reason, times)


async def record_each(
    db: Connection,
    event: Event,
    kind: SubjectKind,
    selected: str,
    *,
    by: Actor,
    now: datetime,
) -> None:
    """Write down what is being done to many at once: an event for each, in one statement that may take long.

    Args:
        kind: of the subjects.
        selected: a query without parameters that returns `subject_id` (text) and `details` (jsonb) of each.
    """
    entry = entry_of(event, None, by=by, now=now)._replace(subject_kind=kind)
    if count := await store.insert_each(db, selected, by.session_id, entry):
        tell(entry, count)


async def list_events(
    db: Connection, wanted: EventFilter, *, before_id: int | None = None, limit: int
) -> list[RecordedEvent]:
    """Return the newest events that match, newest first.

    Args:
        before_id: only events older than this one.
    """
    return await store.list_before(db, wanted, before_id=before_id, limit=limit)
