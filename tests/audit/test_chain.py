"""The chain shows whatever was done to the record afterwards, and no login waits for it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity_service import audit
from identity_service.audit import Event, Subject, chain, store
from identity_service.audit.events import Chained, RecordedEvent
from identity_service.database import Database, StatementFailed, open_database
from tests.conftest import START, TESTER

_numbers = count()


@pytest.fixture
async def database(new_database: Callable[..., str], migrated: str) -> AsyncIterator[Database]:
    """One of the test's own: nothing else writes to it or links what is there."""
    name = f"chain_{next(_numbers)}"
    url = await asyncio.to_thread(new_database, name, "pristine")
    async with open_database(url, pool_size=8) as opened:
        yield opened


async def write(database: Database, events: int, *, now: datetime = START) -> None:
    async def unit(db):
        for number in range(events):
            subject = Subject("user", f"user-{number}")
            await audit.record(
                db, Event.USER_UPDATED, subject, by=TESTER, now=now, details={"number": number, "é": "ü"}
            )

    await database.transact(unit)


async def link(database: Database) -> int:
    return await database.transact(chain.lengthen)


async def look(database: Database, **more) -> chain.Verification:
    return await database.transact(lambda db: chain.verify(db, now=START, **more))


async def drop(database: Database, older_than: datetime, now: datetime) -> list[str]:
    return await database.transact(lambda db: chain.drop_partitions(db, older_than=older_than, by=TESTER, now=now))


async def value(database: Database, sql: str) -> Any:
    async with database.connection() as db:
        return await db.fetchval(sql)


async def tamper(database: Database, sql: str, *arguments: Any) -> None:
    """Do what nobody but the owner of the database can."""
    async with database.connection() as db, db.transaction():
        await db.execute("SET LOCAL session_replication_role = replica")
        await db.execute(sql, *arguments)


async def test_what_was_written_is_linked_and_whole(database):
    assert (await look(database)).problems == ()
    await write(database, 10)
    assert await link(database) == 10
    assert await link(database) == 0
    await write(database, 3)
    assert await link(database) == 3
    found = await look(database)
    assert (found.events, found.position, found.unchained, found.problems) == (13, 13, 0, ())


@pytest.mark.parametrize(
    ("sql", "problem"),
    [
        ("UPDATE audit_events SET outcome = 'failure' WHERE position = 3", "is not what was recorded"),
        ("UPDATE audit_events SET details = '{}' WHERE position = 3", "is not what was recorded"),
        ("UPDATE audit_events SET actor_id = NULL WHERE position = 3", "is not what was recorded"),
        ("UPDATE audit_events SET id = 1000 WHERE position = 3", "is not what was recorded"),
        (
            "UPDATE audit_events SET occurred_at = occurred_at + interval '1 us' WHERE position = 3",
            "is not what was recorded",
        ),
        ("DELETE FROM audit_events WHERE position = 1", "events are missing"),
        ("DELETE FROM audit_events WHERE position = 3", "events are missing"),
        ("DELETE FROM audit_events WHERE position = 5", "should end at position 5 and ends at 4"),
        ("UPDATE audit_events SET position = 30 WHERE position = 3", "events are missing"),
        pytest.param(
            "INSERT INTO audit_events (occurred_at, event, outcome, actor_kind, position, previous_hash, hash)"
            " SELECT occurred_at, event, outcome, actor_kind, 6, hash, hash FROM audit_events WHERE position = 5",
            "is not what was recorded",
            id="inserted",
        ),
        ("UPDATE audit_chain SET position = 4", "should end at position 4"),
    ],
)
async def test_a_change_of_the_past_shows(database, sql, problem):
    await write(database, 5)
    await link(database)
    await tamper(database, sql)
    assert any(problem in said for said in (await look(database)).problems)


async def test_a_chain_written_anew_is_found_out_by_the_end_that_was_noted(database):
    await write(database, 5)
    await link(database)
    noted = await look(database)
    expected = (noted.position, noted.hash)
    assert (await look(database, expected=expected)).problems == ()
    await tamper(database, "UPDATE audit_events SET outcome = 'failure' WHERE position = 3")
    await tamper(database, "UPDATE audit_events SET position = NULL, hash = NULL, previous_hash = NULL")
    await tamper(database, "UPDATE audit_chain SET position = 0, hash = dropped_hash")
    await link(database)
    assert (await look(database)).problems == ()
    assert (await look(database, expected=expected)).problems == ("The hash at position 5 is not the one expected.",)


async def test_replicas_that_link_at_once_make_one_chain(database):
    await write(database, 40)
    for _ in range(10):
        await asyncio.gather(write(database, 5), *(link(database) for _ in range(4)))
    await link(database)
    found = await look(database)
    assert (found.position, found.problems) == (90, ())


async def test_an_event_that_is_committed_late_gets_its_place_then(database):
    """Ids are drawn before the commit: the chain follows what became visible, and misses nothing."""
    async with database.connection() as slow:
        transaction = slow.transaction()
        await transaction.start()
        await audit.record(slow, Event.USER_UPDATED, None, by=TESTER, now=START)
        await write(database, 2)
        assert await link(database) == 2
        await transaction.commit()
    assert await link(database) == 1
    found = await look(database)
    assert (found.position, found.problems) == (3, ())


async def test_linking_does_not_wait_for_a_login_nor_a_login_for_linking(database):
    await write(database, 1)
    async with database.connection() as linking, linking.transaction():
        assert await chain.lengthen(linking) == 1
        await asyncio.wait_for(write(database, 1), 8)
        async with database.connection() as other, other.transaction():
            assert await asyncio.wait_for(chain.lengthen(other), 8) == 0, "somebody else has the chain"


async def test_events_that_nobody_links_are_counted(database):
    await write(database, 4, now=START - timedelta(hours=1))
    assert (await look(database)).unchained == 4


async def test_a_batch_is_bounded_and_the_next_one_goes_on(database):
    await write(database, chain.BATCH + 1)
    assert [await link(database) for _ in range(3)] == [chain.BATCH, 1, 0]
    assert (await look(database)).problems == ()


async def test_old_months_go_and_the_chain_goes_on_from_there(database):
    async def tend(now: datetime) -> list[str]:
        async with database.connection() as db:
            assert await chain.add_partitions(db, now=now)
        older_than = now - timedelta(days=60)
        return await drop(database, older_than, now)

    first = datetime(2031, 1, 15, tzinfo=UTC)
    for days in (0, 31, 59):
        await tend(first + timedelta(days=days))
        await write(database, 3, now=first + timedelta(days=days))
        await link(database)
    assert await tend(first + timedelta(days=74)) == [], "until then January is not over for long enough"
    noted = await look(database)
    early = (5, await value(database, "SELECT hash FROM audit_events WHERE position = 5"))
    assert (await look(database, expected=early)).problems == ()
    dropped = await tend(first + timedelta(days=110))
    assert [name for name in dropped if "2031" in name] == ["audit_events_2031_01", "audit_events_2031_02"]
    found = await look(database, expected=(noted.position, noted.hash))
    assert (found.events, found.dropped, found.position, found.problems) == (3, 8, 11, ())
    (problem,) = (await look(database, expected=early)).problems
    assert problem == "The hash at position 5 was dropped by retention and cannot be compared."
    told = "SELECT array_agg(details->>'partition' ORDER BY id) FROM audit_events WHERE event = 'audit.dropped'"
    assert (await value(database, told))[-2:] == ["audit_events_2031_01", "audit_events_2031_02"]
    await tamper(database, "DELETE FROM audit_events WHERE position = 9")
    assert (await look(database)).problems


async def test_nothing_is_emptied_by_a_slip_and_old_months_go_all_the_same(database):
    """TRUNCATE asks no trigger that looks at rows. The partitions of the migration, and those that were made later."""
    then = datetime(2031, 1, 15, tzinfo=UTC)
    async with database.connection() as db:
        await chain.add_partitions(db, now=then)
        partitions = await store.list_partitions(db)
    assert {"audit_events_default", "audit_events_2031_01", "audit_events_2031_02"} < set(partitions)
    for table in ("audit_events", *partitions):
        with pytest.raises(StatementFailed, match="append-only"):
            await value(database, f"TRUNCATE {table}")
    later = then + timedelta(days=90)
    assert "audit_events_2031_01" in await drop(database, later, later)


async def test_a_month_with_events_outside_of_the_chain_is_kept(database):
    then = datetime(2031, 1, 15, tzinfo=UTC)
    async with database.connection() as db:
        await chain.add_partitions(db, now=then)
    late = datetime(2031, 2, 2, tzinfo=UTC)
    await drop(database, then, then)  # empty months, whose going is an event
    await link(database)
    await write(database, 1, now=then)
    assert "audit_events_2031_01" not in await drop(database, late, late)
    await link(database)
    assert "audit_events_2031_01" not in await drop(database, late, late), "the chain ends in it"
    await write(database, 1, now=late)
    await link(database)
    assert "audit_events_2031_01" in await drop(database, late, late)


async def test_a_month_that_began_without_a_partition_is_not_lost(database):
    """The default partition holds its events; adding one for that month is refused, and nothing fails because of it."""
    then = datetime(2031, 5, 15, tzinfo=UTC)
    await write(database, 2, now=then)
    async with database.connection() as db:
        assert not await chain.add_partitions(db, now=then)
        assert "audit_events_2031_06" in await store.list_partitions(db)
    await write(database, 2, now=then)
    await link(database)
    assert (await look(database)).problems == ()


texts = st.none() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)


@given(st.lists(texts, min_size=2, max_size=2, unique=True), st.binary(min_size=32, max_size=32))
def test_two_events_that_differ_have_different_hashes(pair, previous):
    nothing: dict[str, Any] = dict.fromkeys(RecordedEvent.__slots__)
    least = nothing | {"id": 1, "occurred_at": START, "event": "user.login", "details": {}}

    def event(**changed: str | None) -> RecordedEvent:
        return RecordedEvent(**least | changed)

    for field in ("reason", "actor_id", "subject_kind", "subject_id", "client_id", "address", "user_agent"):
        first, second = (chain.digest(event(**{field: text}), previous) for text in pair)
        assert first != second
    assert chain.digest(event(reason="a", actor_id=None), previous) != chain.digest(
        event(reason=None, actor_id="a"), previous
    )


async def test_nobody_can_insert_a_link_by_hand_without_showing(database):
    await write(database, 2)
    await link(database)
    with pytest.raises(StatementFailed, match="append-only"):
        async with database.connection() as db:
            await db.execute("UPDATE audit_events SET position = position + 1")


async def test_what_is_said_to_have_been_dropped_does_not_hide_what_was_rewritten(database):
    """Whoever owns the database can say that retention dropped everything; the end that was noted says otherwise."""
    await write(database, 22)
    await link(database)
    noted = await look(database)
    await tamper(database, "DELETE FROM audit_events WHERE position = 7")
    await tamper(database, "UPDATE audit_chain SET dropped_position = position, dropped_hash = hash")
    assert "Where the dropped events end has been changed" in (await look(database)).problems[0]
    await tamper(database, "UPDATE audit_events SET address = '203.0.113.1' WHERE position = 20")
    rewritten = [link async for link in links(database)]
    previous = bytes(32)
    for event in rewritten:
        own = chain.digest(event.event, previous)
        sql = "UPDATE audit_events SET previous_hash = $1, hash = $2 WHERE id = $3"
        await tamper(database, sql, previous, own, event.event.id)
        previous = own
    sql = "UPDATE audit_chain SET hash = $1, dropped_position = 10, dropped_hash = $2"
    await tamper(database, sql, previous, bytes(32))
    assert (await look(database, expected=(noted.position, noted.hash))).problems[-1] == (
        "The hash at position 22 is not the one expected."
    )


async def links(database: Database) -> AsyncIterator[Chained]:
    async with database.connection() as db, db.transaction():
        async for link in store.iterate_chained(db):
            yield link


async def test_events_are_kept_by_the_clock_that_lets_go_of_less(database):
    """A machine that resumed with a wrong clock must not cost the record."""
    async with database.connection() as db:
        year = timedelta(days=365)
        ahead = await chain.oldest_kept(db, year, now=datetime(2099, 1, 1, tzinfo=UTC))
        assert abs(ahead + year - datetime.now(UTC)) < timedelta(minutes=5)
        behind = await chain.oldest_kept(db, year, now=datetime(2001, 1, 1, tzinfo=UTC))
        assert behind == datetime(2001, 1, 1, tzinfo=UTC) - year


async def test_a_month_that_is_in_use_is_dropped_another_time(database):
    february = datetime(2031, 2, 2, tzinfo=UTC)
    async with database.connection() as db:
        await chain.add_partitions(db, now=datetime(2031, 1, 15, tzinfo=UTC))
    async with database.connection() as reading, reading.transaction():
        await reading.fetchval("SELECT count(*) FROM audit_events_2031_01")
        assert "audit_events_2031_01" not in await drop(database, february, february)
    assert "audit_events_2031_01" in await drop(database, february, february)
