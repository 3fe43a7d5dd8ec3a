"""Argon2id off the event loop: what is stored, how many wait, and who does not have to (PWD-5, PWD-6, F56)."""

import asyncio
import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import argon2
import pytest

from identity_service.accounts import hashing as hashing_module
from identity_service.accounts.argon2id import Argon2Cost, Argon2id
from identity_service.accounts.hashing import PasswordHashing
from identity_service.errors import HashingOverloaded
from tests.conftest import PASSWORD, Account, Api, StartApi
from tests.web.answers import problem, seen

APP = "https://app.example.com"
CHEAP = Argon2Cost(8, 1, 1)
PHC = re.compile(r"\$argon2id\$v=19\$m=(\d+),t=(\d+),p=(\d+)\$[A-Za-z0-9+/]{22}\$[A-Za-z0-9+/]{43}")
UNAVAILABLE = "The service cannot answer this at the moment; try again shortly."

Verify = Callable[..., object]


def niceness() -> int:
    """How far this thread stands back; elsewhere than on Linux, the whole process."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id() if sys.platform == "linux" else 0)


@dataclass
class Library:
    """Argon2 as the service sees it, with a gate that a test can shut and a record of what went through it."""

    gate: threading.Event = field(default_factory=threading.Event)
    verified: list[str] = field(default_factory=list)
    hashed: int = 0
    threads: list[tuple[int, int]] = field(default_factory=list)
    says_yes: bool = False

    def note(self) -> None:
        self.threads.append((threading.get_native_id(), niceness()))
        self.gate.wait(30)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    watched = Library()
    watched.gate.set()
    hash_ = Argon2id.hash

    def watching(verify: Callable[[Any, str, str], bool]) -> Callable[[Any, str, str], bool]:
        def watched_verify(self: Any, password_hash: str, password: str) -> bool:
            watched.verified.append(password_hash)
            watched.note()
            return True if watched.says_yes else verify(self, password_hash, password)

        return watched_verify

    def watched_hash(self: Argon2id, password: str, salt: bytes) -> str:
        watched.hashed += 1
        return hash_(self, password, salt)

    monkeypatch.setattr(argon2.PasswordHasher, "verify", watching(argon2.PasswordHasher.verify))
    monkeypatch.setattr(Argon2id, "verify", watching(Argon2id.verify))
    monkeypatch.setattr(Argon2id, "hash", watched_hash)
    yield watched
    watched.gate.set()


async def log_in(api: Api, username: str, password: str = PASSWORD) -> int:
    answer = await api.token(grant_type="password", username=username, password=password)
    return int(answer.status_code)


async def stored(api: Api) -> str:
    value: str = await api.scalar("SELECT password_hash FROM users")
    return value


# What is stored


async def test_a_password_is_stored_as_argon2id_of_the_configured_cost_with_a_salt_of_its_own(start_api: StartApi):
    """PWD-5"""
    async with start_api(argon2_memory_kib=64, argon2_time_cost=3, argon2_parallelism=2) as api:
        for name in ("alice", "bob"):
            await api.sign_up(name)
        hashes = await api.scalar("SELECT array_agg(password_hash) FROM users")
    assert [match.groups() for value in hashes if (match := PHC.fullmatch(value))] == [("64", "3", "2")] * 2
    assert len({value.split("$")[4] for value in hashes}) == 2
    assert len({value.split("$")[5] for value in hashes}) == 2


async def test_a_login_brings_a_weaker_hash_up_to_todays_cost_once(start_api: StartApi, library: Library):
    """PWD-5: and changes nothing else: sessions live on, and the password counts as old as it is."""
    async with start_api() as api:
        alice = await api.sign_up("alice")
        tokens = await alice.log_in()
        weak = await stored(api)
    async with start_api(argon2_memory_kib=128, argon2_time_cost=2) as api:
        alice.api = api
        api.clock.advance(seconds=60)
        assert await log_in(api, "alice", "not the password of alice") == 400
        assert await stored(api) == weak
        await alice.log_in()
        strong = await stored(api)
        assert [match.groups() for match in [PHC.fullmatch(strong)] if match] == [("128", "2", "1")]
        hashed = library.hashed
        me = await api.me((await alice.log_in())["access_token"])
        assert library.hashed == hashed
        assert await stored(api) == strong
        assert me.json()["password_changed_at"] == "2026-11-22T12:00:00Z"
        assert (await api.refresh(tokens["refresh_token"])).status_code == 200
        assert await log_in(api, "alice", "not the password of alice") == 400


async def test_the_rehash_of_a_login_does_not_undo_a_password_change_that_overtook_it(
    start_api: StartApi, library: Library
):
    """A login that proved the old password must not write it back."""
    async with start_api() as api:
        await api.sign_up("alice")
    async with start_api(argon2_memory_kib=128) as api:
        library.gate.clear()
        login = asyncio.create_task(log_in(api, "alice"))
        await until(lambda: api.runtime.passwords.waiting == 1)
        async with api.database.connection() as db:
            await db.execute("UPDATE users SET password_hash = 'changed', password_changed_at = now()")
        library.gate.set()
        assert await login == 400
        assert await stored(api) == "changed"


@pytest.mark.parametrize(
    "damaged",
    ["", "x", "$argon2id$", "$argon2id$v=19$m=8,t=1,p=1$$", "$argon2i$v=19$m=8,t=1,p=1$YWJj$YWJj", "\U0001f989", "!"],
)
async def test_a_damaged_hash_matches_nothing_and_fails_nothing(api, alice, damaged):
    async with api.database.connection() as db:
        await db.execute("UPDATE users SET password_hash = $1", damaged)
    for password in (PASSWORD, damaged or "x"):
        answer = await api.token(grant_type="password", username="alice", password=password)
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_grant")


# The hash of nobody


async def test_nobodys_hash_is_another_one_at_every_start_and_costs_what_a_real_one_does(
    start_api: StartApi, library: Library
):
    """F56: a constant one would have a password, and somebody would find it."""
    for _ in range(3):
        async with start_api(argon2_memory_kib=32, argon2_time_cost=2) as api:
            assert await log_in(api, "nobody") == 400
            assert await log_in(api, "nobody-else") == 400
    assert [match.groups() for value in library.verified if (match := PHC.fullmatch(value))] == [("32", "2", "1")] * 6
    assert len(set(library.verified)) == 3


@pytest.mark.parametrize("password", ["hunter2hunter2hunter2", "dummy", "password", "nobody", "x", "changeme", " "])
async def test_no_password_logs_nobody_in(api, password):
    """F56"""
    for username in ("nobody", "", "not a name", "\U0001f989"):
        assert await log_in(api, username, password) == 400
        body = {"username": username, "password": password}
        answer = await api.http.post("/login", json=body, headers={"Origin": APP})
        assert answer.status_code == 401


async def test_even_a_match_of_nobodys_hash_logs_nobody_in(api, alice, library: Library):
    """F56: the work is done for its duration; its result is not looked at."""
    library.says_yes = True
    assert await log_in(api, "nobody", "whatever it may be") == 400
    assert await log_in(api, "not a name", "whatever it may be") == 400
    assert await log_in(api, "alice", "whatever it may be") == 200  # so that the gate is seen to be open


# Off the loop, at low priority, bounded


async def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came to that")


async def test_the_service_goes_on_while_passwords_are_hashed(api, alice, library: Library):
    """PWD-6: here every hashing thread stands still."""
    tokens = await alice.log_in()
    library.gate.clear()
    logins = [asyncio.create_task(log_in(api, "alice")) for _ in range(20)]
    await until(lambda: len(library.verified) > 0)
    for path in ("/health", "/readyz", "/.well-known/jwks.json"):
        assert (await api.http.get(path)).status_code == 200
    assert (await api.refresh(tokens["refresh_token"])).status_code == 200
    assert (await api.me(tokens["access_token"])).status_code == 200
    assert not any(login.done() for login in logins)
    library.gate.set()
    assert await asyncio.gather(*logins) == [200] * 20


async def test_the_loop_turns_during_a_costly_hash():
    """PWD-6: with the real Argon2, whose C code must let go of the interpreter's lock."""
    hashing = PasswordHashing(Argon2Cost(65536, 3, 1), threads=1)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.001)
            turns += 1

    counting = asyncio.create_task(count())
    started = time.monotonic()
    await hashing.hash(PASSWORD)
    elapsed = time.monotonic() - started
    counting.cancel()
    hashing.close()
    assert elapsed > 0.02
    assert turns >= 2  # with the lock held there is none


async def test_hashing_threads_are_few_and_nicer_than_the_loop(api, alice, library: Library):
    """PWD-6: a flood of logins leaves refreshes their latency."""
    own = niceness()
    await asyncio.gather(*(log_in(api, "alice") for _ in range(40)))
    assert len(library.threads) == 40
    assert len({thread for thread, _ in library.threads}) <= (os.cpu_count() or 1)
    assert threading.get_native_id() not in {thread for thread, _ in library.threads}
    assert {nice for _, nice in library.threads} == {max(own, 10) if sys.platform == "linux" else own}
    assert niceness() == own


async def test_more_logins_than_can_be_answered_in_time_are_turned_away_at_once(api, alice, library: Library):
    """PWD-6: with `Retry-After`, in the words of each endpoint; everything else goes on, and so do logins after it."""
    tokens = await alice.log_in()
    library.gate.clear()
    waiting: list[asyncio.Task[int]] = []
    while not any(login.done() for login in waiting):
        waiting += [asyncio.create_task(log_in(api, "alice")) for _ in range(50)]
        await asyncio.sleep(0.1)
    assert {login.result() for login in waiting if login.done()} == {503}
    assert sum(not login.done() for login in waiting) >= 100
    started = time.monotonic()
    form = {"grant_type": "password", "username": "nobody", "password": "whatever it may be"}
    token = await api.http.post("/token", data=form)
    login = await api.http.post("/login", json={"username": "alice", "password": PASSWORD}, headers={"Origin": APP})
    assert time.monotonic() - started < 5
    assert (token.status_code, token.json()) == (
        503,
        {"error": "temporarily_unavailable", "error_description": UNAVAILABLE},
    )
    assert seen(login) == problem(503, "temporarily_unavailable", UNAVAILABLE)
    assert token.headers["retry-after"] == login.headers["retry-after"] == "8"
    assert "set-cookie" not in login.headers
    assert (await api.refresh(tokens["refresh_token"])).status_code == 200
    assert (await api.http.get("/.well-known/jwks.json")).status_code == 200
    library.gate.set()
    assert set(await asyncio.gather(*waiting)) <= {200, 503}
    assert await log_in(api, "alice") == 200


async def test_a_full_queue_refuses_at_once_and_is_empty_again_afterwards(library: Library):
    hashing = PasswordHashing(CHEAP, threads=1)
    known = await hashing.hash(PASSWORD)
    for _ in range(2):
        library.gate.clear()
        waiting = [asyncio.create_task(hashing.verify(known, PASSWORD)) for _ in range(100)]
        await asyncio.sleep(0)
        started = time.monotonic()
        with pytest.raises(HashingOverloaded) as refused:
            await hashing.verify(known, PASSWORD)
        assert time.monotonic() - started < 4
        assert refused.value.retry_after == 8
        library.gate.set()
        assert all(verdict.matched for verdict in await asyncio.gather(*waiting))
    hashing.close()


async def test_no_more_are_let_in_than_are_done_in_time_at_the_speed_of_late(monkeypatch):
    """PWD-6: a slow machine, a full core or the pace leave fewer places than there are; nobody waits in vain."""

    def hash_slowly(*_: object) -> str:
        time.sleep(0.1)
        return "hash"

    monkeypatch.setattr(Argon2id, "hash", hash_slowly)
    hashing = PasswordHashing(CHEAP, threads=2, deadline=3.0)

    async def hash_at_once(passwords: int) -> list[object]:
        return await asyncio.gather(*(hashing.hash(PASSWORD) for _ in range(passwords)), return_exceptions=True)

    before = asyncio.create_task(hash_at_once(20))
    await until(lambda: hashing.waiting == 20)
    await until(lambda: hashing.waiting <= 10)
    results = [*await hash_at_once(100), *await before]
    refused = [str(result.detail) for result in results if isinstance(result, HashingOverloaded)]
    assert set(refused) == {"the queue is full"}
    assert 20 + 15 <= results.count("hash") <= 20 + 45  # twenty a second, and not for the whole of the deadline

    after = asyncio.create_task(hash_at_once(150))
    for _ in range(5):  # all of them begin
        await asyncio.sleep(0)
    assert hashing.waiting == 150  # there was a rest; what was before it says nothing
    hashing.close()
    after.cancel()


async def test_whoever_waited_past_the_deadline_is_told_and_their_place_is_free_again(library: Library):
    hashing = PasswordHashing(CHEAP, threads=1, deadline=0.05)
    known = await hashing.hash(PASSWORD)
    library.gate.clear()
    results = await asyncio.gather(*(hashing.verify(known, PASSWORD) for _ in range(100)), return_exceptions=True)
    assert {type(result) for result in results} == {HashingOverloaded}
    library.gate.set()
    await until(lambda: len(library.verified) >= 1)
    patient = PasswordHashing(CHEAP, threads=1)
    assert (await patient.verify(known, PASSWORD)).matched
    for _ in range(200):  # twice as many as there are places
        try:
            assert (await hashing.verify(known, PASSWORD)).matched
        except HashingOverloaded:
            await asyncio.sleep(0.05)
    assert (await hashing.verify(known, PASSWORD)).matched
    hashing.close()
    patient.close()


async def test_a_login_that_is_hung_up_on_gives_its_place_back(library: Library):
    hashing = PasswordHashing(CHEAP, threads=1)
    known = await hashing.hash(PASSWORD)
    for _ in range(3):
        library.gate.clear()
        waiting = [asyncio.create_task(hashing.verify(known, PASSWORD)) for _ in range(100)]
        await asyncio.sleep(0.01)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        library.gate.set()
        await asyncio.sleep(0.05)
    assert (await hashing.verify(known, PASSWORD)).matched
    hashing.close()


async def test_a_stop_does_not_wait_for_those_who_still_queue(start_api: StartApi, library: Library):
    """A service that is told to stop has seconds."""
    async with start_api() as api:
        await api.sign_up("alice")
        library.gate.clear()
        waiting = [asyncio.create_task(log_in(api, "alice")) for _ in range(50)]
        await until(lambda: len(library.verified) > 0)
        started = time.monotonic()
    assert time.monotonic() - started < 6
    library.gate.set()
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_hundred_logins_at_once_are_all_answered(api, alice):
    """PWD-6: the promise of the queue's length is kept."""
    account = Account(api, alice.id, "alice", PASSWORD)
    answers = await asyncio.gather(*(account.log_in() for _ in range(100)))
    assert len({answer["access_token"] for answer in answers}) == len(answers)


async def hashed_beside(*, spinning: bool, passwords: int, cost: Argon2Cost = CHEAP) -> float:
    """Hash some passwords at once with two threads, beside an event loop that has no rest or does nothing else.

    Returns:
        The seconds it took.
    """
    hashing = PasswordHashing(cost, threads=2)
    over = asyncio.Event()

    async def spin() -> None:
        while not over.is_set():
            hashlib.sha256(bytes(1 << 20))  # without the interpreter's lock, which those threads need
            await asyncio.sleep(0)

    spinner = asyncio.create_task(spin()) if spinning else None
    await asyncio.sleep(0.3)
    started = time.monotonic()
    await asyncio.gather(*(hashing.hash(PASSWORD) for _ in range(passwords)))
    took = time.monotonic() - started
    over.set()
    if spinner is not None:
        await spinner
    hashing.close()
    return took


@pytest.mark.skipif(sys.platform != "linux", reason="2026-11-29: elsewhere nobody knows whether a thread has rest")
async def test_while_the_loop_has_no_rest_a_flood_of_logins_goes_through_at_a_pace(monkeypatch):
    """Each costs the loop as much as two or three refreshes. Some go faster: a machine that stands still is at rest.

    How long a thread has waited is only said once it runs, so that on a full machine a look may miss half of it.
    """
    monkeypatch.setattr(hashing_module, "PACE_SECONDS", 0.5)
    monkeypatch.setattr(hashing_module, "NO_REST", 0.4)
    assert await hashed_beside(spinning=True, passwords=10) > 2 * 0.5


@pytest.mark.parametrize(("spinning", "passwords"), [(False, 10), (True, 2)], ids=["a loop at rest", "no flood"])
async def test_other_logins_do_not_wait_for_the_loop(monkeypatch, spinning, passwords):
    monkeypatch.setattr(hashing_module, "PACE_SECONDS", 10.0)
    assert await hashed_beside(spinning=spinning, passwords=passwords) < 8.0


async def test_where_nobody_knows_whether_the_loop_has_rest_no_login_waits_for_it(monkeypatch):
    monkeypatch.setattr(hashing_module, "PACE_SECONDS", 10.0)
    monkeypatch.setattr(threading, "get_native_id", lambda: 0)  # of no thread
    assert await hashed_beside(spinning=True, passwords=10) < 8.0


@pytest.mark.skipif(sys.platform != "linux", reason="2026-11-29: elsewhere a process cannot be kept on one core")
async def test_on_a_core_that_the_loop_fills_logins_go_through_all_the_same():
    """PWD-6: at the lowest priority that there is they would run into the deadline."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        await hashed_beside(spinning=True, passwords=8, cost=Argon2Cost(19456, 2, 1))  # or the deadline passes
    finally:
        os.sched_setaffinity(0, allowed)
