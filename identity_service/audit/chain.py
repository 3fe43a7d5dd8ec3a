"""The chain of hashes through the audit events, and the partitions that hold them.

An act only inserts its event. A moment later whichever replica gets to it first links what was committed: each event's
hash covers its content and the hash before it. So no login waits for another, and an event that is changed, removed or
put in between afterwards breaks the chain. Whoever can write to the database can also write the chain anew from any
place on; against them, keep what `verify` reports elsewhere and have it looked for the next time.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from identity_service.audit import Actor, Event, record, store
from identity_service.audit.events import Chained, ChainState, RecordedEvent
from identity_service.database import Connection

BATCH = 500
OVERDUE = timedelta(minutes=5)
"""An event that has no place in the chain for so long has been overlooked: no service is running."""

_MOST_PROBLEMS = 20
_PREFIX = "audit_events_"


@dataclass(frozen=True, slots=True)
class Verification:
    """What the chain looks like.

    Args:
        events: how many were looked at.
        dropped: up to which position retention has dropped events; one of those can still be there.
        position, hash: the chain's end; keep them elsewhere, and ask later whether they are still part of it.
        unchained: events that should have a place in the chain by now and have none.
        problems: what is wrong, in words; the first twenty of it.
    """

    events: int
    dropped: int
    position: int
    hash: bytes
    unchained: int
    problems: tuple[str, ...]


def digest(event: RecordedEvent, previous_hash: bytes) -> bytes:
    """Return the hash of an event: SHA-256 of the hash before it and of the event's content as canonical JSON."""
    content = [
        event.id,
        event.occurred_at.astimezone(UTC).isoformat(timespec="microseconds"),
        event.event,
        event.outcome,
        event.reason,
        event.actor_kind,
        event.actor_id,
        event.subject_kind,
        event.subject_id,
        event.client_id,
        str(event.session_id) if event.session_id is not None else None,
        event.address,
        event.user_agent,
        event.request_id,
        dict(event.details),
    ]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(previous_hash + canonical.encode()).digest()


async def lengthen(db: Connection) -> int:
    """Link a batch of events that were committed since; return how many. Call within a transaction."""
    if not await store.is_any_unchained(db):
        return 0
    state = await store.claim_chain(db)
    if state is None:  # another replica is at it
        return 0
    links: list[Chained] = []
    position, previous = state.position, state.hash
    for event in await store.list_unchained(db, limit=BATCH):
        position += 1
        links.append(Chained(event, position, previous, digest(event, previous)))
        previous = links[-1].hash
    if links:
        await store.update_chain(db, links)
    return len(links)


async def verify(db: Connection, *, now: datetime, expected: tuple[int, bytes] | None = None) -> Verification:
    """Look at every event of the chain. Call within a transaction that sees one moment (repeatable read).

    Args:
        expected: a position and the hash there, as an earlier look reported them.
    """
    state = await store.find_chain(db)
    problems: list[str] = []
    events = 0
    position, previous = 0, bytes(32)
    hashes = {state.dropped_position: state.dropped_hash}
    async for link in store.iterate_chained(db):
        events += 1
        if digest(link.event, link.previous_hash) != link.hash:
            problems.append(f"Event {link.event.id} at position {link.position} is not what was recorded.")
        if position < state.dropped_position < link.position:  # the rest of what was dropped ends here
            position, previous = state.dropped_position, state.dropped_hash
        if link.position != position + 1:
            if link.position > state.dropped_position:
                problems.append(f"After position {position} comes {link.position}: events are missing.")
        elif link.previous_hash != previous:
            problems.append(f"The link from position {position} to {link.position} is broken.")
        position, previous = link.position, link.hash
        if expected is not None and expected[0] == position:
            hashes[position] = previous
    if (position, previous) != (state.position, state.hash) and state.position != state.dropped_position:
        problems.append(f"The chain should end at position {state.position} and ends at {position}.")
    if 0 < state.position <= state.dropped_position:
        problems.append("Where the dropped events end has been changed: the end of the chain is never dropped.")
    problems += _unmet(expected, hashes, state)
    unchained = await store.count_unchained(db, before=now - OVERDUE)
    return Verification(
        events, state.dropped_position, state.position, state.hash, unchained, tuple(problems[:_MOST_PROBLEMS])
    )


def _unmet(expected: tuple[int, bytes] | None, hashes: Mapping[int, bytes], state: ChainState) -> list[str]:
    """Return what is wrong with the hash that was noted, if one was."""
    if expected is None or hashes.get(expected[0]) == expected[1]:
        return []
    gone = expected[0] < state.dropped_position and expected[0] not in hashes
    why = "was dropped by retention and cannot be compared" if gone else "is not the one expected"
    return [f"The hash at position {expected[0]} {why}."]


async def add_partitions(db: Connection, *, now: datetime) -> bool:
    """See to it that this month and the next have a partition; return False when one cannot be had at the moment."""
    there = await store.list_partitions(db)
    start = now.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    had = True
    for _ in range(2):
        end = _next_month(start)
        if (name := f"{_PREFIX}{start:%Y_%m}") not in there:
            had = await store.add_partition(db, name, start=start, end=end) and had
        start = end
    return had


async def oldest_kept(db: Connection, retention: timedelta, *, now: datetime) -> datetime:
    """Return from when on events are kept, by our clock or by the database's, whichever lets go of less.

    One clock alone that was wrong for an hour would cost the whole record.
    """
    return min(now, await store.clock(db)) - retention


async def drop_partitions(db: Connection, *, older_than: datetime, by: Actor, now: datetime) -> list[str]:
    """Drop the partitions whose events are all older, and record each; return their names.

    Call within a transaction. The one in which the chain ends stays, and one that is in use at the moment.
    """
    dropped = []
    for name in await store.list_partitions(db):
        try:
            start = datetime.strptime(name.removeprefix(_PREFIX), "%Y_%m").replace(tzinfo=UTC)
        except ValueError:  # the default one, or somebody's own
            continue
        if _next_month(start) <= older_than and await store.drop_partition(db, name):
            dropped.append(name)
            await record(db, Event.AUDIT_DROPPED, None, by=by, now=now, details={"partition": name})
    return dropped


def _next_month(start: datetime) -> datetime:
    return (start + timedelta(days=31)).replace(day=1)
