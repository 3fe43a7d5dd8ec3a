"""Guessing from outside: every route that takes a secret slows down, alike for everybody, and nothing else does."""

import asyncio
import statistics
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import bcrypt
import httpx2
import pytest

from identity_service.accounts import resets
from identity_service.accounts.hashing import STEP
from identity_service.errors import Throttled
from identity_service.housekeeping import prune
from identity_service.throttling import ACCOUNT, ADDRESS, CLIENT, password_attempt, session_attempt, token_attempt
from tests.conftest import PASSWORD, TESTER, Account, Api, StartApi, bearer, register, run_api
from tests.throttling.conftest import asking_from, with_failures

APP = "https://app.example.com"
WRONG = "not the password of anybody"
NEW = "purple elephants dance at dusk"

Try = Callable[[httpx2.AsyncClient, str, str], Awaitable[httpx2.Response]]


async def by_token(http: httpx2.AsyncClient, username: str, password: str) -> httpx2.Response:
    return await http.post("/token", data={"grant_type": "password", "username": username, "password": password})


async def by_login(http: httpx2.AsyncClient, username: str, password: str) -> httpx2.Response:
    return await http.post("/login", json={"username": username, "password": password}, headers={"Origin": APP})


async def by_client_at_token(http: httpx2.AsyncClient, client_id: str, secret: str) -> httpx2.Response:
    form = {"grant_type": "refresh_token", "refresh_token": "x", "client_id": client_id, "client_secret": secret}
    return await http.post("/token", data=form)


async def by_client_at_revoke(http: httpx2.AsyncClient, client_id: str, secret: str) -> httpx2.Response:
    return await http.post("/revoke", data={"token": "x"}, auth=(client_id, secret))


async def by_client_at_introspect(http: httpx2.AsyncClient, client_id: str, secret: str) -> httpx2.Response:
    return await http.post("/introspect", data={"token": "x"}, auth=(client_id, secret))


LOGINS: dict[str, Try] = {"POST /token": by_token, "POST /login": by_login}
CLIENTS: dict[str, Try] = {
    "POST /token": by_client_at_token,
    "POST /revoke": by_client_at_revoke,
    "POST /introspect": by_client_at_introspect,
}
SIGNED_IN: dict[str, Callable[[str], dict[str, str]]] = {
    "PUT /users/me/password": lambda password: {"current_password": password, "new_password": NEW},
    "DELETE /users/me": lambda password: {"current_password": password},
}
# Takes a password, but one that is not held against anything.
MAKES_ONE = {"POST /users", "POST /admin/users"}


async def fail(http: httpx2.AsyncClient, attempt: Try, name: str, times: int = ACCOUNT.free + 1) -> list[int]:
    return [(await attempt(http, name, WRONG)).status_code for _ in range(times)]


async def signed_in(http: httpx2.AsyncClient, route: str, token: str, password: str) -> httpx2.Response:
    method, path = route.split()
    return await http.request(method, path, json=SIGNED_IN[route](password), headers=bearer(token))


def assert_throttled(answer: httpx2.Response, retry_after: int) -> None:
    assert (answer.status_code, answer.headers.get("retry-after")) == (429, str(retry_after)), answer.text
    body = answer.json()
    assert (body.get("code") or body["error"]) in ("too_many_attempts", "slow_down")
    assert "too many" in (body.get("detail") or body["error_description"])
    assert answer.headers["cache-control"] == "no-store"


async def test_every_route_that_takes_a_secret_is_named_here(api):
    """F50: whoever adds one finds out."""
    description = (await api.http.get("/openapi.json")).json()
    secrets = {"password", "current_password", "client_secret", "reset_token"}

    def members(content: Any) -> set[str]:
        schema = content["schema"]
        if "$ref" in schema:
            schema = description["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        return set(schema.get("properties", {}))

    takes_one = {
        f"{method.upper()} {path}"
        for path, item in description["paths"].items()
        for method, operation in item.items()
        for content in operation.get("requestBody", {}).get("content", {}).values()
        if members(content) & secrets
    }
    assert takes_one == set(LOGINS) | set(CLIENTS) | set(SIGNED_IN) | MAKES_ONE
    slows_down = {
        f"{method.upper()} {path}"
        for path, item in description["paths"].items()
        for method, operation in item.items()
        if "429" in operation["responses"]
    }
    assert slows_down == (takes_one - MAKES_ONE) | {"POST /password-reset"}


@pytest.mark.parametrize("route", LOGINS)
async def test_a_login_is_slowed_after_five_failures_and_goes_on_when_told(api, alice, stranger, route):
    attempt = LOGINS[route]
    assert 429 not in await fail(stranger, attempt, "alice")
    for password in (WRONG, PASSWORD):
        assert_throttled(await attempt(stranger, "alice", password), 1)
    api.clock.advance(seconds=1)
    assert (await attempt(stranger, "alice", WRONG)).status_code != 429
    assert_throttled(await attempt(stranger, "alice", PASSWORD), 2)
    api.clock.advance(seconds=2)
    assert (await attempt(stranger, "alice", PASSWORD)).status_code == 200


@pytest.mark.parametrize("route", SIGNED_IN)
async def test_a_stolen_access_token_is_no_place_to_guess_the_password(api, alice, stranger, route):
    """From wherever it is used, and with whatever token of the same session."""
    tokens = await alice.log_in()
    assert [(await signed_in(stranger, route, tokens["access_token"], WRONG)).status_code for _ in range(6)] == [
        403
    ] * 6
    refreshed = (await api.refresh(tokens["refresh_token"])).json()["access_token"]
    async with asking_from(api.app, "198.51.100.1") as elsewhere:
        for http, token in (
            (stranger, tokens["access_token"]),
            (elsewhere, tokens["access_token"]),
            (stranger, refreshed),
        ):
            for password in (WRONG, PASSWORD):
                assert_throttled(await signed_in(http, route, token, password), 1)
    api.clock.advance(seconds=1)
    assert (await signed_in(stranger, route, refreshed, WRONG)).status_code == 403
    assert_throttled(await signed_in(stranger, route, refreshed, PASSWORD), 2)
    api.clock.advance(seconds=2)
    assert (await signed_in(stranger, route, refreshed, PASSWORD)).status_code == 204


@pytest.mark.parametrize("route", SIGNED_IN)
async def test_whoever_guesses_with_a_stolen_token_does_not_keep_the_owner_out(api, alice, stranger, route):
    """Neither at the login, nor in any session but the one that it was stolen from."""
    stolen, own = (await alice.log_in())["access_token"], (await alice.log_in())["access_token"]
    for _ in range(6):
        await signed_in(stranger, route, stolen, WRONG)
    assert_throttled(await signed_in(stranger, route, stolen, PASSWORD), 1)
    assert (await by_token(stranger, "alice", PASSWORD)).status_code == 200
    assert (await signed_in(stranger, route, own, PASSWORD)).status_code == 204


@pytest.mark.parametrize("route", SIGNED_IN)
async def test_whoever_guesses_at_the_login_does_not_keep_the_owner_from_changing_the_password(
    api, alice, stranger, route
):
    """Nor from the same address: a session that lives goes on."""
    token = (await alice.log_in())["access_token"]
    await fail(stranger, by_token, "alice")
    await with_failures(api.database, token_attempt("203.0.113.7", exempt=()), 200, blocked_for=timedelta(minutes=1))
    assert_throttled(await by_token(stranger, "alice", PASSWORD), 60)
    assert (await signed_in(stranger, route, token, WRONG)).status_code == 403
    assert (await signed_in(stranger, route, token, PASSWORD)).status_code == 204


async def test_a_new_password_opens_a_login_that_was_guessed_at(api, alice, stranger):
    """What was counted were guesses at the old one. It is recorded, as an administrator's unlocking is."""
    token = (await alice.log_in())["access_token"]
    await fail(stranger, by_token, "alice")
    assert (await signed_in(stranger, "PUT /users/me/password", token, PASSWORD)).status_code == 204
    assert (await by_token(stranger, "alice", NEW)).status_code == 200
    assert await api.scalar("SELECT details->>'failures' FROM audit_events WHERE event = 'user.unlocked'") == "6"


DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"


@pytest.mark.parametrize("way", ["change", "reset"])
async def test_a_new_password_and_a_login_at_the_same_moment_do_not_wait_for_each_other(api, alice, stranger, way):
    """Both take the tally, then the user. Neither runs into a deadlock, which would hold both up for a second."""
    access_token = (await alice.log_in())["access_token"]
    counted = password_attempt(UUID(alice.id), "alice", None, exempt=())
    await with_failures(api.database, counted, 3)
    reset = "t" * 43
    async with api.database.connection() as db:
        await resets.start(db, UUID(alice.id), reset, by=TESTER, now=api.clock())

    async def set_password() -> httpx2.Response:
        if way == "reset":
            answer: httpx2.Response = await stranger.post("/password-reset", json={"token": reset, "new_password": NEW})
            return answer
        return await signed_in(stranger, "PUT /users/me/password", access_token, PASSWORD)

    async def until_waiting(number: int) -> None:
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        for _ in range(200):
            if await api.scalar(waiting) >= number:
                return
            await asyncio.sleep(0.01)
        pytest.fail("nobody waits")

    async with api.database.connection() as db, db.transaction():
        await db.execute("SELECT FROM throttles WHERE key = $1 FOR UPDATE", counted.counters[0].key)
        logging_in = asyncio.create_task(by_token(stranger, "alice", PASSWORD))
        await until_waiting(1)
        setting = asyncio.create_task(set_password())
        await until_waiting(2)
    started, before = time.monotonic(), await api.scalar(DEADLOCKS)
    assert (await setting).status_code == 204
    assert (await logging_in).status_code in (200, 400)
    if time.monotonic() - started > 0.9:  # the machine is slow, or Postgres waited for a second and broke a deadlock
        await asyncio.sleep(11)  # what each connection counted has been added up then
        assert await api.scalar(DEADLOCKS) == before


async def test_another_username_does_not_make_an_account_a_new_one(api, alice, stranger):
    """A stolen access token can change the name; the failures stay with the account, and with the session."""
    token = (await alice.log_in())["access_token"]
    for name in ("bertha", "carla", "alice", "dora", "emma", "flora"):
        await stranger.patch("/users/me", json={"username": name}, headers=bearer(token))
        await signed_in(stranger, "DELETE /users/me", token, WRONG)
        await by_token(stranger, name, WRONG)
    assert_throttled(await signed_in(stranger, "DELETE /users/me", token, PASSWORD), 1)
    assert_throttled(await by_token(stranger, "flora", PASSWORD), 1)


async def test_a_refused_new_password_does_not_tell_more_about_the_old_one_than_a_login(api, alice, stranger):
    token = (await alice.log_in())["access_token"]
    for _ in range(6):
        await signed_in(stranger, "PUT /users/me/password", token, WRONG)
    body = {"current_password": PASSWORD, "new_password": "short"}
    assert_throttled(await stranger.put("/users/me/password", json=body, headers=bearer(token)), 1)


STORED = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()


def slowed(seconds: float) -> Callable[[bytes, bytes], bool]:
    """Return bcrypt's verification, for a hash that takes longer."""
    checkpw = bcrypt.checkpw

    def check(password: bytes, known: bytes) -> bool:
        time.sleep(seconds)
        return checkpw(password, known)

    return check


async def by_password_change(api: Api, account: Account) -> Try:
    token = (await account.log_in())["access_token"]
    return lambda http, _, password: signed_in(http, "PUT /users/me/password", token, password)


@pytest.mark.parametrize("route", [*LOGINS, "PUT /users/me/password"])
async def test_a_refusal_is_counted_before_it_is_held_back(api, alice, stranger, route, monkeypatch):
    """While hashes of other systems are stored; else all guesses sent at once pass before the first one counts."""
    attempt = LOGINS[route] if route in LOGINS else await by_password_change(api, alice)
    with monkeypatch.context() as patch:
        patch.setattr(bcrypt, "checkpw", slowed(0.4))
        await api.runtime.passwords.learn([STORED])
    guesses = [asyncio.ensure_future(attempt(stranger, "alice", f"{WRONG} {number}")) for number in range(20)]
    for _ in range(1000):
        if (await api.scalar("SELECT max(failures) FROM throttles") or 0) > ACCOUNT.free:
            break
        await asyncio.sleep(0.01)
    else:
        pytest.fail("nothing is counted")
    assert not any(guess.done() and guess.result().status_code != 429 for guess in guesses), "they are held back"
    assert (await attempt(stranger, "alice", PASSWORD)).status_code == 429
    statuses = [answer.status_code for answer in await asyncio.gather(*guesses)]
    assert statuses.count(429) == 20 - ACCOUNT.free - 1


@pytest.mark.parametrize("password", [PASSWORD, WRONG])
@pytest.mark.parametrize("route", [*LOGINS, "PUT /users/me/password"])
async def test_a_guess_that_meets_a_block_is_answered_at_the_same_moment_right_or_wrong(
    api, alice, stranger, route, password, monkeypatch
):
    """The right one would else stand out of a burst by its time, with all of it refused."""
    attempt = LOGINS[route] if route in LOGINS else await by_password_change(api, alice)
    gate, verifying, checkpw = threading.Event(), threading.Event(), bcrypt.checkpw

    def slow(password: bytes, known: bytes) -> bool:
        verifying.set()
        gate.wait(30)
        time.sleep(0.2)
        return checkpw(password, known)

    async with api.database.connection() as db:
        await db.execute("UPDATE users SET password_hash = $1", STORED)
    monkeypatch.setattr(bcrypt, "checkpw", slow)
    gate.set()
    await api.runtime.passwords.learn([STORED])
    gate.clear()
    verifying.clear()
    started = time.monotonic()
    guess = asyncio.ensure_future(attempt(stranger, "alice", password))
    await asyncio.to_thread(verifying.wait, 30)
    counted = password_attempt(UUID(alice.id), "alice", "203.0.113.7", exempt=())
    if route not in LOGINS:
        counted = session_attempt(await api.scalar("SELECT id FROM sessions"))
    await with_failures(api.database, counted, 50, blocked_for=timedelta(minutes=1))
    gate.set()
    assert_throttled(await guess, 60)
    assert time.monotonic() - started >= STEP * 0.2


@pytest.mark.parametrize("route", CLIENTS)
async def test_client_secrets_are_slowed_as_well_and_only_for_those_who_guess(api, stranger, route):
    attempt = CLIENTS[route]
    assert await fail(stranger, attempt, "orders") == [401] * 6
    assert_throttled(await attempt(stranger, "orders", WRONG), 1)
    async with asking_from(api.app, "198.51.100.1") as elsewhere:
        assert (await attempt(elsewhere, "orders", WRONG)).status_code == 401
    assert (await stranger.post("/revoke", data={"token": "x"})).status_code == 200, "without a secret"


async def test_a_right_secret_forgives_the_wrong_ones(api, stranger):
    orders = await register(api, "orders")
    for wrong in (CLIENT.free, 1):
        assert await fail(stranger, by_client_at_revoke, "orders", wrong) == [401] * wrong
        assert (await by_client_at_revoke(stranger, "orders", orders.secret)).status_code == 200


@pytest.mark.parametrize("route", CLIENTS)
async def test_whoever_guesses_from_an_address_does_not_keep_out_the_services_beside_them(api, stranger, route):
    """Their secrets cannot be guessed; a wrong one is slowed all the same."""
    orders = await register(api, "orders", grants=["client_credentials", "password", "refresh_token"], first_party=True)
    for number in range(ADDRESS.free + 1):
        await by_token(stranger, f"nobody{number}", WRONG)
    assert_throttled(await by_token(stranger, "somebody", WRONG), 1)
    right = await CLIENTS[route](stranger, "orders", orders.secret)
    assert right.status_code != 429
    assert right.status_code == 200 or right.json()["error"] == "invalid_grant", "the client was let in"
    assert_throttled(await CLIENTS[route](stranger, "orders", WRONG), 1)


@pytest.mark.parametrize("route", CLIENTS)
async def test_a_blocked_address_is_no_place_to_guess_a_clients_secret(api, stranger, route):
    """The right one is let in from there: the wrong ones must count, and are recorded until the client waits."""
    orders = await register(api, "orders", grants=["client_credentials", "password", "refresh_token"], first_party=True)
    elsewhere = await register(api, "invoices")
    place = token_attempt("203.0.113.7", exempt=())
    await with_failures(api.database, place, ADDRESS.free + 6, blocked_for=timedelta(seconds=32))
    for _ in range(20):
        assert_throttled(await CLIENTS[route](stranger, "orders", WRONG), 32)
    recorded = "SELECT count(*) FROM audit_events WHERE event = 'client.login' AND subject_id = 'orders'"
    assert await api.scalar(recorded) == CLIENT.free + 1
    assert_throttled(await CLIENTS[route](stranger, "orders", orders.secret), 32)  # which does not tell it apart
    assert (await by_client_at_revoke(stranger, "invoices", elsewhere.secret)).status_code == 200, "a client beside it"
    async with asking_from(api.app, "198.51.100.1") as other_place:
        assert (await by_client_at_revoke(other_place, "orders", orders.secret)).status_code == 200
    api.clock.advance(seconds=1)
    assert (await by_client_at_revoke(stranger, "orders", orders.secret)).status_code == 200
    tally = await api.scalar("SELECT failures FROM throttles WHERE key = $1", place.counters[0].key)
    assert tally == ADDRESS.free + 6, "what meets a block does not make it longer"


async def test_a_blocked_address_fills_no_table_with_clients_that_nobody_has(api, stranger):
    await with_failures(api.database, token_attempt("203.0.113.7", exempt=()), 200, blocked_for=timedelta(minutes=1))
    before = await api.scalar("SELECT count(*) FROM audit_events")
    for number in range(10):
        assert_throttled(await by_client_at_revoke(stranger, f"client{number}", WRONG), 60)
    assert await api.scalar("SELECT count(*) FROM throttles") == 1
    assert await api.scalar("SELECT count(*) FROM audit_events") == before


async def test_of_many_secrets_at_once_from_a_blocked_address_six_are_looked_at(api, stranger):
    await register(api, "orders")
    await with_failures(api.database, token_attempt("203.0.113.7", exempt=()), 200, blocked_for=timedelta(minutes=1))
    answers = await asyncio.gather(*(by_client_at_revoke(stranger, "orders", WRONG) for _ in range(60)))
    assert {answer.status_code for answer in answers} <= {429, 503}
    assert await api.scalar("SELECT failures FROM throttles ORDER BY failures LIMIT 1") == CLIENT.free + 1


async def test_every_route_that_takes_a_clients_secret_says_in_its_description_how_it_slows_down(api, stranger):
    identifying = {
        f"{method.upper()} {path}": operation["responses"]
        for path, item in (await api.http.get("/openapi.json")).json()["paths"].items()
        for method, operation in item.items()
        if "invalid_client" in str(operation["responses"].get("401"))
    }
    assert identifying.keys() == CLIENTS.keys()
    for route, described in identifying.items():
        await api.forget_failures()
        await fail(stranger, CLIENTS[route], "orders")
        answer = await CLIENTS[route](stranger, "orders", WRONG)
        assert_throttled(answer, 1)
        schema = described["429"]["content"][answer.headers["content-type"]]["schema"]
        assert answer.json()["error"] in schema["properties"]["error"]["enum"]


@pytest.mark.parametrize("route", LOGINS)
async def test_two_replicas_agree(api, alice, settings, clock, route):
    async with run_api(settings, clock) as replica, asking_from(api.app) as one, asking_from(replica.app) as two:
        for http in (one, two, one, two, one, two):
            assert (await LOGINS[route](http, "alice", WRONG)).status_code != 429
        for http in (one, two):
            assert_throttled(await LOGINS[route](http, "alice", PASSWORD), 1)


async def test_a_burst_of_guesses_with_the_right_one_among_them_is_refused_once_the_block_began(api, alice):
    """F49: at once, over two processes' worth of connections, and each passed the first look."""
    async with asking_from(api.app) as http:
        guesses = [WRONG] * 150 + [PASSWORD] + [WRONG] * 49
        answers = await asyncio.gather(*(by_token(http, "alice", guess) for guess in guesses))
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(400) == ACCOUNT.free + 1
    assert statuses.count(200) == 0
    assert statuses.count(429) + statuses.count(503) == 194
    assert await api.scalar("SELECT count(*) FROM sessions") == 0
    assert await api.scalar("SELECT max(failures) FROM throttles") == ACCOUNT.free + 1


async def test_a_throttled_attempt_leaves_no_trace_and_costs_no_hash(api, alice, stranger, monkeypatch):
    """A flood must neither fill the audit nor the queue for hashing."""
    await fail(stranger, by_token, "alice")
    count = "SELECT count(*) FROM audit_events"
    before, tallies = await api.scalar(count), await api.scalar("SELECT array_agg(t::text) FROM throttles AS t")
    monkeypatch.setattr(type(api.runtime.passwords), "verify", None)
    for _ in range(20):
        assert_throttled(await by_token(stranger, "alice", WRONG), 1)
    assert await api.scalar(count) == before
    assert await api.scalar("SELECT array_agg(t::text) FROM throttles AS t") == tallies


async def test_many_right_logins_at_once_are_never_slowed_by_each_other(api, alice, stranger):
    await fail(stranger, by_token, "alice", 5)
    answers = await asyncio.gather(*(by_token(stranger, "alice", PASSWORD) for _ in range(60)))
    assert {answer.status_code for answer in answers} == {200}


async def test_a_success_resets_the_account(api, alice, stranger):
    for _ in range(4):
        assert await fail(stranger, by_token, "alice", 5) == [400] * 5
        assert (await by_token(stranger, "alice", PASSWORD)).status_code == 200


async def test_live_sessions_go_on_while_the_account_is_blocked(api, alice, stranger):
    """PWD-7: nobody can be locked out of what they have open."""
    tokens = await alice.log_in()
    body = {"username": "alice", "password": PASSWORD}
    browser = await stranger.post("/login", json=body, headers={"Origin": APP})
    cookie = {"Cookie": browser.headers["set-cookie"].partition(";")[0], "Origin": APP}
    for _ in range(40):
        await fail(stranger, by_token, "alice", 1)
        api.clock.advance(minutes=15)
    tokens = (await api.refresh(tokens["refresh_token"])).json()
    await fail(stranger, by_token, "alice", 1)
    assert_throttled(await by_token(stranger, "alice", PASSWORD), 900)
    assert (await stranger.get("/users/me", headers=bearer(tokens["access_token"]))).status_code == 200
    assert (await stranger.post("/refresh", json={}, headers=cookie)).status_code == 200
    assert (await stranger.post("/revoke", data={"token": tokens["refresh_token"]})).status_code == 200


VARIANTS = ["alice", "ALICE", "Alice", "\uff41\uff4c\uff49\uff43\uff45", " alice", "alice ", "ali ce", "alice\u200d"]


async def test_all_spellings_of_a_name_share_one_counter(api, alice, stranger):
    """F52"""
    for variant in VARIANTS[:6]:
        assert (await by_token(stranger, variant, WRONG)).status_code == 400
    for variant in VARIANTS:
        assert_throttled(await by_token(stranger, variant, PASSWORD), 1)


async def test_a_name_that_is_impossible_opens_no_account_however_near_it_is(api, alice, stranger):
    for variant in VARIANTS[4:]:
        assert (await by_token(stranger, variant, PASSWORD)).status_code == 400
        await api.forget_failures()


@pytest.mark.parametrize("name", ["X-Forwarded-For", "X-Real-IP", "Forwarded", "CF-Connecting-IP", "True-Client-IP"])
async def test_no_header_makes_another_address_of_whoever_asks(api, stranger, name):
    """F51: without a trusted proxy none of them is believed."""
    await with_failures(api.database, token_attempt("203.0.113.7", exempt=()), 95)
    statuses = set()
    for number in range(6):
        address = f"198.51.100.{number}"
        headers = {name: f"for={address}" if name == "Forwarded" else address}
        form = {"grant_type": "password", "username": f"user{number}", "password": WRONG}
        statuses.add((await stranger.post("/token", data=form, headers=headers)).status_code)
    assert statuses == {400}
    assert_throttled(await stranger.post("/token", data=form | {"username": "new"}, headers={name: "8.8.8.8"}), 1)


async def spray(http: httpx2.AsyncClient, names: int) -> set[int]:
    return {(await by_token(http, f"user{number}", WRONG)).status_code for number in range(names)}


async def test_many_names_from_one_address_are_slowed_and_those_who_are_elsewhere_are_not(api, alice, stranger):
    assert await spray(stranger, 101) == {400}
    assert_throttled(await by_token(stranger, "alice", PASSWORD), 1)
    async with asking_from(api.app, "198.51.100.1") as elsewhere:
        assert (await by_token(elsewhere, "alice", PASSWORD)).status_code == 200
    api.clock.advance(seconds=1)
    assert (await by_token(stranger, "alice", PASSWORD)).status_code == 200


async def test_an_address_that_is_exempt_is_not_slowed_and_its_accounts_are(start_api: StartApi):
    async with start_api(throttle_exempt="203.0.113.0/24") as api, asking_from(api.app) as office:
        await api.sign_up()
        await with_failures(api.database, token_attempt("203.0.113.7", exempt=()), 200)
        assert await spray(office, 10) == {400}
        await fail(office, by_token, "alice")
        assert_throttled(await by_token(office, "alice", PASSWORD), 1)


def shown(answer: httpx2.Response) -> tuple[int, Any, list[tuple[str, str]]]:
    body = answer.json()
    body.pop("request_id", None)
    return answer.status_code, body, [pair for pair in answer.headers.multi_items() if pair[0] != "x-request-id"]


@pytest.mark.parametrize("route", LOGINS)
async def test_the_limiter_does_not_tell_unknown_users_apart(api, alice, bob, stranger, route):
    """PWD-8: known, disabled, unknown and impossible names, over a long history: body, headers and delays."""
    await api.scalar("UPDATE users SET disabled_at = now() WHERE username = 'bob'")
    names = ("alice", "bob", "nobody", "not a name", "x" * 900)
    for pause in (0, 0, 0, 0, 0, 0, 0, 1, 0, 2, 1, 3, 8, 16, 31, 1, 32, 64, 128, 256, 512, 900):
        api.clock.advance(seconds=pause)
        answers = {name: shown(await LOGINS[route](stranger, name, WRONG)) for name in names}
        assert {name: answer for name, answer in answers.items() if answer != answers["alice"]} == {}


@pytest.mark.parametrize("route", LOGINS)
async def test_a_throttled_answer_takes_as_long_for_nobody_as_for_somebody(
    api, alice, bob, stranger, route, pytestconfig
):
    await api.scalar("UPDATE users SET disabled_at = now() WHERE username = 'bob'")
    names = ("alice", "bob", "nobody", "not a name")
    for name in names:
        await fail(stranger, LOGINS[route], name)
    durations: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(200 if pytestconfig.getoption("--soak") else 60):
        for name in names:
            started = time.perf_counter()
            assert (await LOGINS[route](stranger, name, WRONG)).status_code == 429
            durations[name].append(time.perf_counter() - started)
    typical = {name: statistics.quantiles(values, n=10)[0] for name, values in durations.items()}
    assert max(typical.values()) < 2 * min(typical.values()), typical


async def test_the_log_says_which_of_the_counters_it_was(api, alice, stranger, caplog):
    await fail(stranger, by_token, "alice")
    caplog.set_level("INFO", logger="identity_service.request")
    await by_token(stranger, "alice", WRONG)
    facts = vars(caplog.records[-1])
    assert (facts["error"], facts["detail"], facts["status"]) == ("Throttled", "account", 429)


async def test_an_oauth_client_is_told_with_the_name_of_the_standard(api, alice, stranger):
    await fail(stranger, by_token, "alice")
    answer = await by_token(stranger, "alice", WRONG)
    assert answer.json() == {"error": "slow_down", "error_description": Throttled.default_text}


async def test_housekeeping_forgets_old_failures(api, alice, stranger):
    await fail(stranger, by_token, "alice")
    api.clock.advance(days=2)
    await prune(api.runtime)
    assert await api.scalar("SELECT count(*) FROM throttles") == 0
