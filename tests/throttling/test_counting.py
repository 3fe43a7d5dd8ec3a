"""The tallies in Postgres: replicas agree on them, races lose nothing, and a burst of guesses wins nothing."""

import asyncio
from datetime import datetime, timedelta
from uuid import UUID

import pytest

from identity_service import throttling
from identity_service.audit import Event, Subject
from identity_service.database import Connection, Database
from identity_service.errors import Throttled
from identity_service.throttling import (
    ACCOUNT,
    Attempt,
    client_attempt,
    password_attempt,
    token_attempt,
)
from identity_service.throttling.store import key_of_account
from tests.conftest import START, TESTER
from tests.throttling.conftest import with_failures

ALICE = UUID(int=1)
SECOND = timedelta(seconds=1)


def attempt_of(user_id: UUID | None = ALICE, username: str = "alice", address: str | None = None) -> Attempt:
    return password_attempt(user_id, username, address, exempt=())


async def fail(database: Database, attempt: Attempt, now: datetime = START) -> None:
    async def unit(db: Connection) -> None:
        await throttling.count_failure(db, attempt, by=TESTER, subject=Subject("user", str(ALICE)), now=now)

    await database.transact(unit)


async def admit(database: Database, attempt: Attempt, now: datetime = START) -> None:
    await database.transact(lambda db: throttling.admit(db, attempt, now=now))


async def check(database: Database, attempt: Attempt, now: datetime = START) -> None:
    async with database.connection() as db:
        await throttling.check(db, attempt, now=now)


async def fail_patiently(database: Database, attempt: Attempt, times: int) -> datetime:
    """Fail so often, waiting each time exactly as long as told; return when the next attempt is looked at."""
    now = START
    for _ in range(times):
        await fail(database, attempt, now)
        try:
            await check(database, attempt, now)
        except Throttled as refused:
            now += refused.retry_after * SECOND
    return now


@pytest.mark.parametrize(
    "attempt",
    [
        attempt_of(),
        attempt_of(None, "nobody"),
        attempt_of(None, "not a name \ud800"),
        client_attempt("orders", "203.0.113.7", exempt=()),
        client_attempt("orders", None, exempt=()),
    ],
)
async def test_waiting_exactly_as_long_as_told_is_enough_and_a_second_less_is_not(api, attempt):
    now = await fail_patiently(api.database, attempt, 9)
    await check(api.database, attempt, now)
    with pytest.raises(Throttled) as refused:
        await check(api.database, attempt, now - SECOND)
    assert refused.value.retry_after == 1
    with pytest.raises(Throttled) as refused:
        await check(api.database, attempt, now - timedelta(seconds=1.5))
    assert refused.value.retry_after == 2, "rounded up"


async def test_of_many_failures_at_once_those_that_find_a_block_are_not_counted(api):
    """They have told their sender nothing, and cannot be used to lock somebody out within a second."""
    outcomes = await asyncio.gather(*(fail(api.database, attempt_of()) for _ in range(200)), return_exceptions=True)
    assert [outcome for outcome in outcomes if outcome is None] == [None] * (ACCOUNT.free + 1)
    assert {type(outcome) for outcome in outcomes} == {type(None), Throttled}
    async with api.database.connection() as db:
        standing = await throttling.standing(db, ALICE, now=START)
    assert (standing.failures, standing.locked_until) == (6, START + SECOND)


async def test_two_keys_are_locked_in_one_order_whoever_comes(api):
    """Otherwise two failures could wait for each other, and one would come back as 503."""
    attempts = [attempt_of(UUID(int=number % 5 + 1), address=f"192.0.2.{number % 7}") for number in range(35)]
    outcomes = await asyncio.gather(*(fail(api.database, attempt) for attempt in attempts), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {type(None), Throttled}


async def test_a_right_guess_that_was_let_in_before_the_block_began_does_not_win_after_it(api):
    """F49: every one of them passed the first look."""
    await check(api.database, attempt_of())
    await fail_patiently(api.database, attempt_of(), 6)
    with pytest.raises(Throttled) as refused:
        await admit(api.database, attempt_of())
    assert (refused.value.retry_after, refused.value.detail) == (1, "account")
    await admit(api.database, attempt_of(), START + SECOND)


async def test_a_right_guess_that_finds_a_block_asks_for_nothing_else(api):
    """A wrong one does not either: how long the answer takes should not tell them apart."""
    await fail_patiently(api.database, attempt_of(), 6)
    asked: list[str] = []
    async with api.database.connection() as db:
        await throttling.check(db, attempt_of(), now=START + SECOND)  # the connection learns the types
        with db.query_logger(lambda record: asked.append(record.query)):
            with pytest.raises(Throttled):
                await throttling.admit(db, attempt_of(), now=START)
            await asyncio.sleep(0)  # loggers are called a turn later
    assert asked == [throttling.store.FIND]


async def test_a_success_waits_for_the_failure_that_is_being_counted(api):
    await fail_patiently(api.database, attempt_of(), 5)
    counted, decided = asyncio.Event(), asyncio.Event()

    async def slowly(db: Connection) -> None:
        await throttling.count_failure(db, attempt_of(), by=TESTER, subject=None, now=START)
        counted.set()
        await decided.wait()

    failing = asyncio.create_task(api.database.transact(slowly))
    await counted.wait()
    succeeding = asyncio.create_task(admit(api.database, attempt_of()))
    await asyncio.sleep(0.05)
    assert not succeeding.done()
    decided.set()
    await failing
    with pytest.raises(Throttled):
        await succeeding


async def test_successes_at_once_neither_wait_nor_refuse_each_other(api):
    """Correct parallel logins cause no failures; the first forgets those there were."""
    await fail_patiently(api.database, attempt_of(address="192.0.2.1"), 5)
    await asyncio.gather(*(admit(api.database, attempt_of(address="192.0.2.1")) for _ in range(50)))
    await admit(api.database, attempt_of(UUID(int=2), address="192.0.2.1"))
    assert await api.scalar("SELECT failures FROM throttles") == 5, "of the address, which a success does not forgive"
    assert await api.scalar("SELECT count(*) FROM throttles") == 1


async def test_a_success_elsewhere_is_no_forgiveness_for_an_address(api):
    """An attacker has an account too."""
    own = attempt_of(UUID(int=2), address="192.0.2.1")
    await with_failures(api.database, token_attempt("192.0.2.1", exempt=()), 98)
    for number in range(3):
        await admit(api.database, own)
        await fail(api.database, attempt_of(UUID(int=10 + number), address="192.0.2.1"))
    with pytest.raises(Throttled) as refused:
        await admit(api.database, own)
    assert refused.value.detail == "address"


async def test_a_neighbour_in_the_same_64_is_the_same_address_and_one_beyond_is_not(api):
    await with_failures(api.database, token_attempt("2001:db8::1", exempt=()), 98)
    for number in range(3):
        await fail(api.database, token_attempt(f"2001:db8::{number:x}", exempt=()))
    with pytest.raises(Throttled):
        await check(api.database, token_attempt("2001:db8::ffff:1", exempt=()))
    await check(api.database, token_attempt("2001:db8:0:1::1", exempt=()))


async def test_a_client_is_not_locked_out_by_a_stranger_elsewhere(api):
    for number in range(20):
        await fail(api.database, client_attempt("orders", "203.0.113.7", exempt=()), START + number * 61 * SECOND)
    later = START + 19 * 61 * SECOND
    with pytest.raises(Throttled) as refused:
        await check(api.database, client_attempt("orders", "203.0.113.7", exempt=()), later)
    assert (refused.value.retry_after, refused.value.detail) == (60, "client")
    await check(api.database, client_attempt("orders", "198.51.100.1", exempt=()), later)


async def test_a_client_that_got_the_right_secret_starts_anew(api):
    attempt = client_attempt("orders", "203.0.113.7", exempt=())
    now = await fail_patiently(api.database, attempt, 8)
    await admit(api.database, attempt, now)
    for _ in range(5):
        await fail(api.database, attempt, now)
    await check(api.database, attempt, now)


async def test_the_hundredth_failure_locks_for_a_day_and_is_recorded_once(api):
    await with_failures(api.database, attempt_of(), 98)
    now = await fail_patiently(api.database, attempt_of(), 2)
    locked_at = START + timedelta(minutes=15)
    assert now == locked_at + timedelta(days=1)
    with pytest.raises(Throttled) as refused:
        await check(api.database, attempt_of(), locked_at)
    assert refused.value.retry_after == 86400
    async with api.database.connection() as db:
        rows = await db.fetch("SELECT event, subject_id, details->>'failures' AS failures FROM audit_events")
    assert [tuple(row) for row in rows] == [(Event.USER_LOCKED, str(ALICE), "100")]
    await check(api.database, attempt_of(), now)
    await fail(api.database, attempt_of(), now)
    with pytest.raises(Throttled):
        await admit(api.database, attempt_of(), now + timedelta(hours=23))


async def test_unlocking_forgets_and_is_recorded(api):
    await with_failures(api.database, attempt_of(), 19)
    await fail(api.database, attempt_of())
    await api.database.transact(lambda db: throttling.unlock(db, ALICE, by=TESTER, now=START))
    await check(api.database, attempt_of())
    assert await api.scalar("SELECT details->>'failures' FROM audit_events WHERE event = 'user.unlocked'") == "20"
    async with api.database.connection() as db:
        assert await throttling.standing(db, ALICE, now=START) == throttling.Standing()


async def test_postgres_knows_the_key_of_an_account(api):
    key = await api.scalar(f"SELECT {key_of_account('$1::uuid')}", ALICE)
    assert key == attempt_of().target_key
    assert key == attempt_of(None, "alice").at_account(ALICE).target_key
    assert attempt_of(None, "alice").target_key != key


async def test_what_was_typed_is_nowhere_to_be_read(api):
    """People type passwords where usernames belong."""
    await fail(api.database, attempt_of(None, "correct horse", "203.0.113.7"))
    rows = await api.scalar("SELECT string_agg(t::text, '') FROM throttles AS t")
    assert "correct" not in rows
    assert b"correct horse".hex() not in rows
    assert await api.scalar("SELECT min(length(key)) FROM throttles") == 32


async def test_rows_that_say_nothing_any_more_go_in_batches_and_others_stay(api, monkeypatch):
    monkeypatch.setattr("identity_service.database.PRUNE_BATCH", 40)
    async with api.database.connection() as db:
        await db.execute(
            "INSERT INTO throttles SELECT sha256(n::text::bytea), 1, $1, $1 FROM generate_series(1, 200) AS n", START
        )
    await with_failures(api.database, attempt_of(), 99)
    opens_at = await fail_patiently(api.database, attempt_of(), 1)
    async with api.database.connection() as db, db.transaction():
        # As Postgres may plan it by itself when its figures of the table are old: what is within is run for every row.
        for way in ("hashjoin", "mergejoin", "hashagg", "sort", "material"):
            await db.execute(f"SET LOCAL enable_{way} = off")
        assert await throttling.prune(db, now=START + timedelta(hours=23)) == 0
        gone = [await throttling.prune(db, now=opens_at + timedelta(hours=23)) for _ in range(6)]
        assert gone == [40, 40, 40, 40, 40, 0]
        standing = await throttling.standing(db, ALICE, now=opens_at)
        assert standing.failures == 100
        assert await throttling.prune(db, now=opens_at + timedelta(hours=25)) == 1
        assert (await throttling.standing(db, ALICE, now=opens_at + timedelta(hours=25))) == throttling.Standing()


async def test_another_password_forgets_failures_and_is_recorded_if_there_were_any(api):
    for failures in (0, 3):
        await fail_patiently(api.database, attempt_of(), failures)
        await api.database.transact(lambda db: throttling.forgive(db, ALICE, by=TESTER, now=START))
    assert await api.scalar("SELECT count(*) FROM throttles") == 0
    told = "SELECT array_agg(details->>'failures') FROM audit_events WHERE event = 'user.unlocked'"
    assert await api.scalar(told) == ["3"]
