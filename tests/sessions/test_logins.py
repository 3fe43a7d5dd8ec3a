"""A login looks before its password is hashed, and once more in the statement that begins the session.

What happens in between must not be overtaken (F49), and neither what is under way at the second look.
"""

import asyncio
import threading
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from uuid import UUID

import httpx2
import pytest

from identity_service import audit, grants, throttling
from identity_service.accounts import registration as accounts
from identity_service.accounts import resets
from identity_service.clients import FIRST_PARTY
from identity_service.clients import registration as clients
from identity_service.database import Connection
from identity_service.errors import InvalidCredentials
from identity_service.sessions import CLIENT_GATES
from identity_service.throttling import ACCOUNT, ADDRESS, Attempt, password_attempt, token_attempt
from tests.conftest import PASSWORD, TESTER, Account, Api, register
from tests.throttling.conftest import asking_from, with_failures

ADDRESS_OF_ALICE = "203.0.113.7"
RESET_TOKEN = "the only one there is"
SECOND = timedelta(seconds=1)
SESSIONS = "SELECT count(*) FROM sessions"
LOGINS = "SELECT array_agg(concat_ws(' ', outcome, reason) ORDER BY id) FROM audit_events WHERE event = 'user.login'"
TALLIES = "SELECT array_agg(failures ORDER BY failures) FROM throttles"


def at_account(alice: Account) -> Attempt:
    return password_attempt(UUID(alice.id), alice.username, None, exempt=())


async def by_token(http: httpx2.AsyncClient, username: str = "alice") -> httpx2.Response:
    return await http.post("/token", data={"grant_type": "password", "username": username, "password": PASSWORD})


@contextmanager
def hashing_stopped(api: Api) -> Iterator[None]:
    """Keep every thread that hashes busy until the end: whoever logs in has the first look behind them, and waits."""
    go_on = threading.Event()
    threads = api.runtime.passwords._hashes._threads
    for _ in range(threads._max_workers):
        threads.submit(go_on.wait, 30)
    try:
        yield
    finally:
        go_on.set()


async def hashing_waits(api: Api) -> None:
    """Return once somebody's password waits to be hashed."""
    for _ in range(2000):
        if api.runtime.passwords.waiting:
            return
        await asyncio.sleep(0.005)
    pytest.fail("nobody waits")


async def log_in_overtaken_by(api: Api, act: Awaitable[object]) -> httpx2.Response:
    """Log in, with something that happens from beginning to end while the password is hashed."""
    async with asking_from(api.app, ADDRESS_OF_ALICE) as http:
        with hashing_stopped(api):
            login = asyncio.create_task(by_token(http))
            await hashing_waits(api)
            await act
        return await login


# Failures


@pytest.mark.parametrize("where", ["account", "name", "address"])
async def test_a_block_that_is_there_is_seen_before_a_password_is_hashed(api, alice, monkeypatch, where):
    """In one look at the account and at everything that counts against it, whether there is one or not."""
    attempts = {
        "account": at_account(alice),
        "name": password_attempt(None, "nobody", None, exempt=()),
        "address": token_attempt(ADDRESS_OF_ALICE, exempt=()),
    }
    await with_failures(api.database, attempts[where], 200, blocked_for=SECOND)
    monkeypatch.setattr(type(api.runtime.passwords), "verify", None)
    username = "nobody" if where == "name" else "alice"
    async with asking_from(api.app, ADDRESS_OF_ALICE) as http:
        assert (await by_token(http, username)).status_code == 429


@pytest.mark.parametrize("where", ["account", "address"])
async def test_a_block_that_begins_while_the_password_is_hashed_refuses_it(api, alice, where):
    attempt = at_account(alice) if where == "account" else token_attempt(ADDRESS_OF_ALICE, exempt=())
    most = (ACCOUNT if where == "account" else ADDRESS).free + 1
    answer = await log_in_overtaken_by(api, with_failures(api.database, attempt, most, blocked_for=SECOND))
    assert (answer.status_code, answer.json()["error"], answer.headers["retry-after"]) == (429, "slow_down", "1")
    assert await api.scalar(SESSIONS) == 0
    assert await api.scalar(LOGINS) is None, "right or wrong, it leaves no trace"
    assert await api.scalar(TALLIES) == [most]


async def test_failures_while_the_password_is_hashed_are_forgiven_to_the_account_and_not_to_the_address(api, alice):
    async def fail() -> None:
        await with_failures(api.database, at_account(alice), 5)
        await with_failures(api.database, token_attempt(ADDRESS_OF_ALICE, exempt=()), 7)

    answer = await log_in_overtaken_by(api, fail())
    assert answer.status_code == 200
    assert await api.scalar(TALLIES) == [7]
    assert await api.scalar(LOGINS) == ["success"]


async def test_a_login_waits_for_the_failure_that_is_being_counted(api, alice):
    """It is the sixth, and the tally that the login found before says five."""
    await with_failures(api.database, at_account(alice), 5)
    async with api.database.connection() as db, db.transaction():
        await throttling.count_failure(db, at_account(alice), by=TESTER, subject=None, now=api.clock())
        login = asyncio.create_task(by_token(api.http))
        done, _ = await asyncio.wait([login], timeout=0.3)
        assert not done
    assert (await login).status_code == 429
    assert await api.scalar(SESSIONS) == 0


# The account


async def change_password(db: Connection, api: Api, alice: Account) -> None:
    user_id, now = UUID(alice.id), api.clock() + SECOND
    await resets.start(db, user_id, RESET_TOKEN, by=TESTER, now=now)
    await resets.finish(db, user_id, RESET_TOKEN, password_hash="!", by=TESTER, now=now)


async def disable(db: Connection, api: Api, alice: Account) -> None:
    await accounts.disable(db, UUID(alice.id), by=TESTER, now=api.clock())


async def delete(db: Connection, api: Api, alice: Account) -> None:
    await accounts.delete(db, UUID(alice.id), by=TESTER, now=api.clock())


CHANGES = pytest.mark.parametrize("change", [change_password, disable, delete])


@CHANGES
async def test_a_change_of_the_account_while_the_password_is_hashed_refuses_it(api, alice, change):
    answer = await log_in_overtaken_by(api, api.database.transact(lambda db: change(db, api, alice)))
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_grant")
    assert await api.scalar(SESSIONS) == 0
    assert await api.scalar(LOGINS) == ["failure account_changed"]
    assert await api.scalar(TALLIES) is None, "the password was right, so that this was no guess"


@CHANGES
async def test_a_login_waits_for_a_change_of_the_account_and_then_sees_it(api, alice, change):
    """The password is proved, then the account changes before the session's row is written."""
    async with api.database.connection() as db, db.transaction():
        await change(db, api, alice)
        login = asyncio.create_task(by_token(api.http))
        done, _ = await asyncio.wait([login], timeout=0.3)
        assert not done, "the login waits for the account's row"
    assert (await login).json()["error"] == "invalid_grant"
    assert await api.scalar(SESSIONS) == 0
    assert await api.scalar(LOGINS) == ["failure account_changed"]


async def test_a_login_that_is_chosen_to_end_a_deadlock_tries_again(api, alice):
    """Of two that wait for each other Postgres ends the one that is impatient, and the other one goes on."""
    await register(api, "backend", grants=["password", "refresh_token"], first_party=True)
    async with api.database.connection() as db:
        client = await clients.find(db, "backend")
        async with db.transaction():
            await db.execute("SET LOCAL deadlock_timeout = '1min'")
            await db.execute("SELECT FROM users FOR UPDATE")
            login = asyncio.create_task(
                grants.password(api.runtime, client, username="alice", password=PASSWORD, scope="", by=TESTER)
            )
            await somebody_waits(api)
            await db.execute("SELECT pg_advisory_xact_lock($1, hashtext('backend'))", CLIENT_GATES)
            assert not login.done()
    assert (await login).refresh_token
    assert await api.scalar(SESSIONS) == 1
    assert await api.scalar(LOGINS) == ["success"]


async def somebody_waits(api: Api) -> None:
    """Return once somebody waits for a lock."""
    for _ in range(2000):
        if await api.scalar("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            return
        await asyncio.sleep(0.005)
    pytest.fail("nobody waits")


# The record


async def test_no_session_begins_without_its_record(api, alice):
    """Not even where nothing else is wrong: both are in one statement."""
    async with api.database.connection() as db:
        await db.execute("ALTER TABLE audit_events ADD CONSTRAINT no_logins CHECK (event <> 'user.login') NOT VALID")
        try:
            assert (await by_token(api.http)).status_code == 500
        finally:
            await db.execute("ALTER TABLE audit_events DROP CONSTRAINT no_logins")
    assert await api.scalar(SESSIONS) == 0
    assert (await by_token(api.http)).status_code == 200


async def test_a_login_that_was_overtaken_is_not_told_as_one_that_succeeded(api, alice):
    told: list[tuple[str, str | None]] = []
    audit.listener.set(lambda _, outcome, reason, __: told.append((outcome, reason)))
    with hashing_stopped(api):
        login = asyncio.create_task(
            grants.password(api.runtime, FIRST_PARTY, username="alice", password=PASSWORD, scope="", by=TESTER)
        )
        await hashing_waits(api)
        async with api.database.connection() as db:
            await db.execute("UPDATE users SET disabled_at = now()")
    with pytest.raises(InvalidCredentials):
        await login
    assert told == [("failure", "account_changed")]
