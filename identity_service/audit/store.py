"""SQL of the audit events and of the chain that links them."""

import json
from collections.abc import AsyncIterator, Collection, Sequence
from datetime import datetime
from itertools import count
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg

from identity_service.audit.events import Chained, ChainState, EventFilter, RecordedEvent
from identity_service.database import HOURS, Connection, Record, affected

_EVENT = """
    id, occurred_at, event, outcome, reason, actor_kind, actor_id, subject_kind, subject_id, client_id, session_id,
    address, user_agent, request_id, details::text AS details, position
"""
_MATCHES = """
        ($1::text IS NULL OR event = $1) AND ($2::text IS NULL OR outcome = $2)
    AND ($3::text IS NULL OR subject_id = $3) AND ($4::text IS NULL OR actor_id = $4)
    AND ($5::text IS NULL OR client_id = $5)
    AND ($6::timestamptz IS NULL OR occurred_at >= $6) AND ($7::timestamptz IS NULL OR occurred_at < $7)
"""


class Entry(NamedTuple):
    """An event on its way into the table, in the order of the parameters."""

    occurred_at: datetime
    event: str
    outcome: str
    reason: str | None
    actor_kind: str
    actor_id: str | None
    subject_kind: str | None
    subject_id: str | None
    client_id: str | None
    address: str | None
    user_agent: str | None
    request_id: str | None
    details: str


def insert_from(source: str, *, first: int, given: Collection[str] = ()) -> str:
    """Return a statement that inserts an event for each row of a source. It can be a part of another one.

    Args:
        source: has a `session_id`, and those columns of an `Entry` that `given` names.
        first: the number of the first of its parameters, which are the rest of an `Entry`.
    """
    numbers = count(first)
    values = [name if name in given else f"${next(numbers)}{_CASTS.get(name, '')}" for name in Entry._fields]
    return f"""
        INSERT INTO audit_events (session_id, {", ".join(Entry._fields)})
        SELECT session_id, {", ".join(values)} FROM {source}
    """


def parameters_of(entry: Entry, *, given: Collection[str]) -> list[Any]:
    """Return the parameters of a statement of `insert_from` whose source has some of the columns."""
    return [value for name, value in entry._asdict().items() if name not in given]


_CASTS = {"details": "::text::jsonb"}
_OF_EACH = ("subject_id", "details")
INSERT = insert_from("unnest($1::uuid[]) AS given (session_id)", first=2)
LIST = f"""
    SELECT {_EVENT} FROM audit_events
     WHERE {_MATCHES} AND ($8::bigint IS NULL OR id < $8)
     ORDER BY id DESC LIMIT $9
"""
LIST_ALL = f"SELECT {_EVENT} FROM audit_events WHERE {_MATCHES} ORDER BY id"
LIST_CHAINED = f"""
    SELECT {_EVENT}, previous_hash, hash FROM audit_events WHERE position IS NOT NULL ORDER BY position
"""
IS_ANY_UNCHAINED = "SELECT EXISTS (SELECT FROM audit_events WHERE position IS NULL)"
COUNT_UNCHAINED = "SELECT count(*) FROM audit_events WHERE position IS NULL AND occurred_at < $1"
LIST_UNCHAINED = f"SELECT {_EVENT} FROM audit_events WHERE position IS NULL ORDER BY id LIMIT $1"
CLOCK = "SELECT clock_timestamp()"
FIND_CHAIN = "SELECT position, hash, dropped_position, dropped_hash FROM audit_chain"
CLAIM_CHAIN = f"{FIND_CHAIN} FOR UPDATE SKIP LOCKED"
LOCK_CHAIN = f"{FIND_CHAIN} FOR UPDATE"
UPDATE_CHAINED = """
    UPDATE audit_events AS e SET position = given.position, previous_hash = given.previous_hash, hash = given.hash
      FROM unnest($1::bigint[], $2::timestamptz[], $3::bigint[], $4::bytea[], $5::bytea[])
           AS given (id, occurred_at, position, previous_hash, hash)
     WHERE e.id = given.id AND e.occurred_at = given.occurred_at AND e.position IS NULL
"""
UPDATE_CHAIN = "UPDATE audit_chain SET position = $1, hash = $2"
UPDATE_DROPPED = "UPDATE audit_chain SET dropped_position = $1, dropped_hash = $2 WHERE dropped_position < $1"
LIST_PARTITIONS = """
    SELECT c.relname FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
     WHERE i.inhparent = 'audit_events'::regclass ORDER BY c.relname
"""


async def insert(db: Connection, session_ids: Sequence[UUID | None], entry: Entry) -> None:
    """Insert an event for each of the sessions."""
    await db.execute(INSERT, list(session_ids), *entry)


async def insert_each(db: Connection, selected: str, session_id: UUID | None, entry: Entry) -> int:
    """Insert an event for each row of a query, with the row's subject and details; return how many."""
    source = f"(SELECT $1::uuid AS session_id, subject_id, details FROM ({selected}) AS selected) AS each"
    statement = insert_from(source, first=2, given=_OF_EACH)
    parameters = parameters_of(entry, given=_OF_EACH)
    return affected(await db.execute(statement, session_id, *parameters, timeout=HOURS))


async def list_before(db: Connection, wanted: EventFilter, *, before_id: int | None, limit: int) -> list[RecordedEvent]:
    """Return the newest events that match, newest first."""
    return [_event(row) for row in await db.fetch(LIST, *_parameters(wanted), before_id, limit)]


async def iterate(db: Connection, wanted: EventFilter) -> AsyncIterator[RecordedEvent]:
    """Yield the events that match, oldest first, however many there are. Call within a transaction."""
    async for row in db.cursor(LIST_ALL, *_parameters(wanted), prefetch=500):
        yield _event(row)


async def iterate_chained(db: Connection) -> AsyncIterator[Chained]:
    """Yield the events of the chain in its order. Call within a transaction."""
    async for row in db.cursor(LIST_CHAINED, prefetch=500):
        yield Chained(_event(row), row["position"], row["previous_hash"], row["hash"])


async def is_any_unchained(db: Connection) -> bool:
    found: bool = await db.fetchval(IS_ANY_UNCHAINED)
    return found


async def count_unchained(db: Connection, *, before: datetime) -> int:
    count: int = await db.fetchval(COUNT_UNCHAINED, before)
    return count


async def list_unchained(db: Connection, *, limit: int) -> list[RecordedEvent]:
    return [_event(row) for row in await db.fetch(LIST_UNCHAINED, limit)]


async def find_chain(db: Connection) -> ChainState:
    state = await db.fetchrow(FIND_CHAIN)
    assert state is not None, "the migration makes the row"
    return _state(state)


async def claim_chain(db: Connection) -> ChainState | None:
    """Lock the chain until the transaction ends; return None when somebody else has."""
    state = await db.fetchrow(CLAIM_CHAIN)
    return _state(state) if state is not None else None


async def update_chain(db: Connection, links: Sequence[Chained]) -> None:
    """Write down the links, of which the last is the chain's new end."""
    await db.execute(
        UPDATE_CHAINED,
        [link.event.id for link in links],
        [link.event.occurred_at for link in links],
        [link.position for link in links],
        [link.previous_hash for link in links],
        [link.hash for link in links],
    )
    await db.execute(UPDATE_CHAIN, links[-1].position, links[-1].hash)


async def list_partitions(db: Connection) -> list[str]:
    return [row["relname"] for row in await db.fetch(LIST_PARTITIONS)]


async def add_partition(db: Connection, name: str, *, start: datetime, end: datetime) -> bool:
    """Add a partition for a span of time; return False when the default one already holds events of that time.

    Args:
        name: made by `chain`, never by anybody else: it goes into the statement as it is.
    """
    try:
        async with db.transaction():
            # Whoever inserts waits for this lock; if it cannot be had at once, an hour later will do.
            await db.execute("SET LOCAL lock_timeout = '500ms'")
            await db.execute(
                f"CREATE TABLE {name} PARTITION OF audit_events"
                f" FOR VALUES FROM ('{start.isoformat()}') TO ('{end.isoformat()}')"
            )
            await db.execute(
                f"CREATE TRIGGER audit_events_no_truncate BEFORE TRUNCATE ON {name}"
                " FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_truncate()"
            )
    except (asyncpg.CheckViolationError, asyncpg.LockNotAvailableError):
        return False
    except asyncpg.DuplicateTableError:  # another replica was faster
        return True
    return True


async def drop_partition(db: Connection, name: str) -> bool:
    """Drop a partition, remembering where the chain went on; return False when it has to stay for now.

    Call within a transaction.

    Args:
        name: one of `list_partitions`.
    """
    chain = await db.fetchrow(LOCK_CHAIN)
    assert chain is not None, "the migration makes the row"
    if await db.fetchval(f"SELECT EXISTS (SELECT FROM {name} WHERE position IS NULL)"):
        return False
    last = await db.fetchrow(f"SELECT position, hash FROM {name} ORDER BY position DESC LIMIT 1")
    if last is not None and last["position"] == chain["position"]:
        return False
    try:
        async with db.transaction():
            await db.execute("SET LOCAL lock_timeout = '500ms'")
            await db.execute(f"DROP TABLE {name}")
    except asyncpg.LockNotAvailableError:
        return False
    if last is not None:
        await db.execute(UPDATE_DROPPED, last["position"], last["hash"])
    return True


async def clock(db: Connection) -> datetime:
    """Return the time by the database's clock."""
    time: datetime = await db.fetchval(CLOCK)
    return time


def _parameters(wanted: EventFilter) -> tuple[Any, ...]:
    return (
        wanted.event,
        wanted.outcome,
        wanted.subject_id,
        wanted.actor_id,
        wanted.client_id,
        wanted.since,
        wanted.until,
    )


def _state(row: Record) -> ChainState:
    return ChainState(row["position"], row["hash"], row["dropped_position"], row["dropped_hash"])


def _event(row: Record) -> RecordedEvent:
    return RecordedEvent(
        id=row["id"],
        occurred_at=row["occurred_at"],
        event=row["event"],
        outcome=row["outcome"],
        reason=row["reason"],
        actor_kind=row["actor_kind"],
        actor_id=row["actor_id"],
        subject_kind=row["subject_kind"],
        subject_id=row["subject_id"],
        client_id=row["client_id"],
        session_id=row["session_id"],
        address=row["address"],
        user_agent=row["user_agent"],
        request_id=row["request_id"],
        details=json.loads(row["details"]),
        position=row["position"],
    )
