"""Probes, and what the service says while something it depends on is away (contract section 6, FPS-4, F76)."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any

import asyncpg
import httpx2
import pytest

from identity_service.cli.migrate import upgrade
from identity_service.database import Connection
from identity_service.errors import DatabaseUnavailable
from identity_service.housekeeping import prune_in_step, repeating
from identity_service.signing.keyring import CLOCK_SKEW
from tests.conftest import PASSWORD, Api, StartApi, bearer
from tests.web.answers import problem, seen

APP = "https://app.example.com"
OK = (200, {"status": "ok"})
READY = (200, {"status": "ok", "missing": []})
UNAVAILABLE = "The service cannot answer this at the moment; try again shortly."
PROBLEM = problem(503, "temporarily_unavailable", UNAVAILABLE)
OAUTH_ERROR = {"error": "temporarily_unavailable", "error_description": UNAVAILABLE}

NewDatabase = Callable[..., str]
Outage = Callable[[str], AbstractAsyncContextManager[None]]


@pytest.fixture(scope="session")
def template(new_database: NewDatabase) -> str:
    """The name of a database with our schema that nobody is connected to."""
    upgrade(new_database("health_template"))
    return "health_template"


@pytest.fixture
async def empty_url(new_database: NewDatabase) -> str:
    """A database of the test's own, without our schema."""
    return await asyncio.to_thread(new_database, f"health_{token_hex(4)}")


@pytest.fixture
async def own_url(new_database: NewDatabase, template: str) -> str:
    """A database of the test's own, which it may take away."""
    return await asyncio.to_thread(new_database, f"health_{token_hex(4)}", template)


async def ready(api: Api) -> tuple[int, Any]:
    answer = await api.http.get("/readyz")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers.get("retry-after") == ("2" if answer.status_code == 503 else None)
    return answer.status_code, answer.json()


def missing(*what: str) -> tuple[int, dict[str, Any]]:
    return 503, {"status": "unavailable", "missing": list(what)}


async def alive(api: Api, path: str = "/health") -> tuple[int, Any]:
    answer = await api.http.get(path)
    return answer.status_code, answer.json()


async def ready_soon(api: Api) -> bool:
    """The revocations are read again a second after they could not be."""
    for _ in range(100):
        if await ready(api) == READY:
            return True
        await asyncio.sleep(0.1)
    return False


@asynccontextmanager
async def administering(url: str) -> AsyncIterator[tuple[Connection, str]]:
    """A connection beside the database, and the database's name."""
    place, _, options = url.partition("?")
    server, _, name = place.rpartition("/")
    connection = await asyncpg.connect(f"{server}/postgres?{options}")
    try:
        yield connection, name
    finally:
        await connection.close()


@asynccontextmanager
async def gone(url: str) -> AsyncIterator[None]:
    """The database is not there, as while a failover is under way."""
    async with administering(url) as (server, name):
        await server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        await server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
        await server.execute(f'ALTER DATABASE "{name}" RENAME TO "{name}_away"')
        try:
            yield
        finally:
            await server.execute(f'ALTER DATABASE "{name}_away" RENAME TO "{name}"')
            await server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')


@asynccontextmanager
async def closed(url: str) -> AsyncIterator[None]:
    """The database takes no connections, as while it is restored or moved."""
    async with administering(url) as (server, name):
        await server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        await server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
        try:
            yield
        finally:
            await server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')


@asynccontextmanager
async def without_tables(url: str) -> AsyncIterator[None]:
    """The schema is not there, as in the middle of a restore."""
    connection = await asyncpg.connect(url)
    await connection.execute("ALTER SCHEMA public RENAME TO elsewhere; CREATE SCHEMA public")
    try:
        yield
    finally:
        await connection.execute("DROP SCHEMA public; ALTER SCHEMA elsewhere RENAME TO public")
        await connection.close()


@asynccontextmanager
async def stranger(url: str) -> AsyncIterator[str]:
    """The address of the database for a role that may connect and do nothing more."""
    role = f"stranger_{token_hex(4)}"
    async with administering(url) as (server, _):
        await server.execute(f"CREATE ROLE {role} LOGIN")
        try:
            yield url.replace("//identity@", f"//{role}@")
        finally:
            await server.execute(f"DROP ROLE {role}")


# Probes


@pytest.mark.parametrize("path", ["/health", "/livez"])
async def test_a_process_that_turns_says_so_and_nothing_else(api, path):
    """FPS-4"""
    assert await alive(api, path) == OK
    assert (await api.http.head(path)).status_code == 200


async def test_a_service_that_lacks_nothing_is_ready(api):
    assert await ready(api) == READY
    assert (await api.http.head("/readyz")).status_code == 200


@pytest.mark.parametrize("outage", [gone, closed])
async def test_without_its_database_it_is_alive_and_not_ready(start_api: StartApi, own_url, outage: Outage):
    """The body names what is missing and says nothing of where it is or what it said."""
    async with start_api(database_url=own_url) as api:
        assert await ready(api) == READY
        async with outage(own_url):
            for _ in range(2):
                assert await ready(api) == missing("database")
            for path in ("/health", "/livez"):
                assert await alive(api, path) == OK
            for path in ("/", "/.well-known/jwks.json", "/.well-known/oauth-authorization-server", "/docs"):
                assert (await api.http.get(path)).status_code == 200
        assert await ready(api) == READY


async def test_a_database_that_does_not_answer_is_not_waited_for(start_api: StartApi, own_url):
    """An orchestrator's probe has a second or so."""
    async with start_api(database_url=own_url) as api:
        blocker = await asyncpg.connect(own_url)
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE alembic_version IN ACCESS EXCLUSIVE MODE")
            started = time.monotonic()
            assert await ready(api) == missing("database")
            assert time.monotonic() - started < 8  # a statement has ten seconds
            assert await alive(api) == OK
        await blocker.close()
        assert await ready(api) == READY


async def test_a_fresh_database_has_no_schema(start_api: StartApi, empty_url):
    async with start_api(database_url=empty_url) as api:
        assert await ready(api) == missing("schema")
        assert await alive(api) == OK
        answer = await api.http.post("/users", json={"username": "alice", "password": PASSWORD})
        assert seen(answer) == PROBLEM
        await asyncio.to_thread(upgrade, empty_url)
        assert await ready_soon(api)
        await api.sign_up("alice")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("UPDATE alembic_version SET version_num = '0000'", missing("schema")),
        ("DELETE FROM alembic_version", missing("schema")),
        ("DROP TABLE alembic_version", missing("schema")),
        ("UPDATE alembic_version SET version_num = '9999'", READY),
    ],
    ids=["behind", "unmarked", "unmanaged", "ahead"],
)
async def test_the_schema_must_be_at_least_this_releases(start_api: StartApi, own_url, change, expected):
    """A newer schema serves an older release too, since migrations expand before they contract."""
    async with start_api(database_url=own_url) as api:
        connection = await asyncpg.connect(own_url)
        await connection.execute(change)
        await connection.close()
        assert await ready(api) == expected


async def test_a_schema_that_we_may_not_look_at_is_as_good_as_none(start_api: StartApi, own_url):
    """Contract section 6: not ready is always 503 with a name, also when the grants of our role were forgotten."""
    async with stranger(own_url) as url, start_api(database_url=url) as api:
        assert await ready(api) == missing("schema")
        assert await alive(api) == OK


async def test_without_a_key_that_signs_it_is_not_ready_and_issues_nothing(api, alice):
    """KEY-5, F76: here the clock stands before the first key's turn."""
    tokens = await alice.log_in()
    api.clock.advance(days=-1)
    assert await ready(api) == missing("keys")
    assert await alive(api) == OK
    form = {"grant_type": "password", "username": "alice", "password": PASSWORD}
    refused = [await api.token(**form), await api.refresh(tokens["refresh_token"])]
    assert {answer.status_code for answer in refused} <= {400, 503}
    assert (refused[0].status_code, refused[0].headers["retry-after"]) == (503, "2")
    assert refused[0].json() == OAUTH_ERROR
    login = await api.http.post("/login", json={"username": "alice", "password": PASSWORD}, headers={"Origin": APP})
    assert seen(login) == PROBLEM
    assert await api.scalar("SELECT count(*) FROM sessions") == 1
    assert await api.scalar("SELECT generation FROM sessions") == 0
    api.clock.advance(days=1)
    assert await ready(api) == READY
    assert (await api.refresh(tokens["refresh_token"])).status_code == 200


async def test_a_service_that_is_about_to_stop_sends_the_next_request_elsewhere_and_answers_this_one(api, alice):
    api.app.state.draining = True
    assert await ready(api) == missing("draining")
    assert await alive(api) == OK
    assert (await api.me((await alice.log_in())["access_token"])).status_code == 200


async def test_who_is_answered_by_a_service_that_is_about_to_stop_connects_anew(api, alice):
    """Or the next request on the connection would meet its end."""
    jwks = "/.well-known/jwks.json"
    assert "connection" not in (await api.http.get(jwks)).headers
    api.app.state.draining = True
    assert (await api.http.get(jwks)).headers["connection"] == "close"
    assert (await api.refresh((await alice.log_in())["refresh_token"])).headers["connection"] == "close"


async def test_a_database_that_takes_no_writes_is_missing_until_it_does(start_api: StartApi, own_url):
    """A standby, or a primary that was made one: every login would fail. Its connections are not kept afterwards."""
    async with start_api(database_url=own_url) as api, administering(own_url) as (server, name):
        alice = await api.sign_up("alice")
        await server.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
        await server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
        assert await ready(api) == missing("database")
        assert (await api.token(grant_type="password", username="alice", password=PASSWORD)).status_code == 503
        await server.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')
        await asyncio.gather(*(api.token(grant_type="password", username="alice", password=PASSWORD) for _ in range(3)))
        assert await ready(api) == READY
        assert await alice.log_in()


async def test_a_service_that_cannot_read_the_revocations_is_not_ready(api, monkeypatch):
    monkeypatch.setattr("identity_service.revocation.feed.VOUCHED_SECONDS", 0)
    assert await ready(api) == missing("database")


async def test_everything_that_is_missing_is_named_at_once(start_api: StartApi, own_url):
    async with start_api(database_url=own_url) as api:
        api.app.state.draining = True
        api.clock.advance(days=-1)
        async with gone(own_url):
            assert await ready(api) == missing("database", "keys", "draining")


# Everybody else, meanwhile


async def requests_that_need_the_database(api: Api) -> list[httpx2.Request]:
    """Return one request of each kind, all of which would succeed."""
    alice = await api.sign_up("alice")
    tokens = await alice.log_in()
    login = await api.http.post("/login", json={"username": "alice", "password": PASSWORD}, headers={"Origin": APP})
    own = {"Origin": APP, "Cookie": login.headers["set-cookie"].partition(";")[0]}
    api.http.cookies.clear()
    me = bearer(tokens["access_token"])
    change = {"current_password": PASSWORD, "new_password": "purple elephants dance at dusk"}
    build = api.http.build_request
    return [
        build("GET", "/users/me", headers=me),
        build("PATCH", "/users/me", json={"email": None}, headers=me),
        build("POST", "/refresh", json={}, headers=own),
        build("POST", "/token", data={"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]}),
        build("POST", "/token", data={"grant_type": "password", "username": "alice", "password": PASSWORD}),
        build("POST", "/login", json={"username": "alice", "password": PASSWORD}, headers={"Origin": APP}),
        build("POST", "/users", json={"username": "bob", "password": PASSWORD}),
        build("PUT", "/users/me/password", json=change, headers=me),
        build("POST", "/logout", json={}, headers=own),
        build("DELETE", "/users/me", json={"current_password": change["new_password"]}, headers=me),
        build("POST", "/revoke", data={"token": tokens["refresh_token"]}),
    ]


@pytest.mark.parametrize("outage", [gone, closed, without_tables])
async def test_without_its_database_it_asks_everyone_to_come_back_and_then_goes_on(
    start_api: StartApi, own_url, outage: Outage
):
    """F76: refused, not guessed; nobody is logged out by an outage, and nothing has to be restarted after it."""
    async with start_api(database_url=own_url) as api:
        requests = await requests_that_need_the_database(api)
        api.clock.advance(seconds=1)
        async with outage(own_url):
            for request in requests:
                answer = await api.http.send(request)
                where = f"{request.method} {request.url.path}"
                assert (where, answer.status_code) == (where, 503)
                assert answer.headers["retry-after"] == "2"
                assert answer.headers["cache-control"] == "no-store"
                assert "set-cookie" not in answer.headers
                assert "www-authenticate" not in answer.headers
                if request.url.path in ("/token", "/revoke"):
                    assert answer.json() == OAUTH_ERROR
                else:
                    assert seen(answer) == PROBLEM
        statuses = [(await api.http.send(request)).status_code for request in requests]
        assert statuses == [200, 200, 200, 200, 200, 200, 201, 204, 204, 204, 200]


async def test_a_database_that_only_reads_is_one_to_come_back_for(start_api: StartApi, own_url):
    """What a standby is until it has been promoted."""
    async with start_api(database_url=own_url) as api:
        tokens = await (await api.sign_up("alice")).log_in()
    async with administering(own_url) as (server, name):
        await server.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    async with start_api(database_url=own_url) as api:
        assert (await api.me(tokens["access_token"])).status_code == 200
        assert seen(await api.http.post("/users", json={"username": "bob", "password": PASSWORD})) == PROBLEM
        for answer in (
            await api.refresh(tokens["refresh_token"]),
            await api.token(grant_type="password", username="alice", password=PASSWORD),
            await api.http.post("/revoke", data={"token": tokens["refresh_token"]}),
        ):
            assert (answer.status_code, answer.json()) == (503, OAUTH_ERROR)


async def test_housekeeping_that_cannot_go_on_says_why_once_until_it_can(monkeypatch, caplog):
    """What lasts, such as a privilege that is missing, must be heard of, and must not fill the log."""
    reasons = iter(["no privilege", "no privilege", "gone", "", "gone"])
    done = asyncio.Event()

    async def work() -> None:
        reason = next(reasons, None)
        if reason is None:
            done.set()
        elif reason:
            raise DatabaseUnavailable(detail=reason)

    monkeypatch.setattr("identity_service.housekeeping.AGAIN_SECONDS", 0)
    async with repeating("pruning", 0, work, lambda *_: None):
        await asyncio.wait_for(done.wait(), 5)
    told = [(record.levelname, record.what, record.detail) for record in caplog.records]
    assert told == [("WARNING", "pruning", detail) for detail in ("no privilege", "gone", "gone")]


async def test_work_that_swallows_its_cancellation_is_not_begun_anew_and_holds_up_no_stop():
    """As what waits for a connection does on Python 3.11, when both come in the same moment."""
    begun = []

    async def work() -> None:
        begun.append(asyncio.get_running_loop().time())
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)

    async with repeating("pruning", 3600, work, lambda *_: None):
        await asyncio.sleep(0.01)
        stopped = asyncio.get_running_loop().time()
    assert len(begun) == 1
    assert asyncio.get_running_loop().time() - stopped < 0.9


@pytest.mark.parametrize(("ahead", "left"), [(0, 0), (50, 0), (120, 1), (-120, 1)])
async def test_a_clock_that_differs_from_the_databases_prunes_nothing(api, monkeypatch, caplog, ahead, left):
    """F76: what one process deletes is gone for all of them, and a revoked token may have minutes to live."""
    monkeypatch.setattr("identity_service.housekeeping.CLOCK_SKEW", CLOCK_SKEW)
    async with api.database.connection() as db:
        await db.execute(
            "INSERT INTO revoked_tokens (jti, status_index, reason, revoked_at, expires_at)"
            " VALUES ('a', 1, 'logout', now(), now() - interval '10 minutes')"
        )
    await prune_in_step(replace(api.runtime, now=lambda: datetime.now(UTC) + timedelta(seconds=ahead)))
    assert await api.scalar("SELECT count(*) FROM revoked_tokens") == left
    told = [record.seconds_ahead for record in caplog.records if record.message == "pruning.clock_differs"]
    assert (ahead in told) == bool(left)


async def test_a_process_that_starts_while_the_database_is_away_is_there_and_not_ready(start_api: StartApi, own_url):
    """As a worker does in the place of one that died: its end would be the end of the others too."""
    async with AsyncExitStack() as stack:
        async with gone(own_url):
            api = await stack.enter_async_context(start_api(database_url=own_url))
            assert await ready(api) == missing("database")
            assert (await api.http.get("/.well-known/jwks.json")).status_code == 200
        for _ in range(200):
            if (await ready(api))[0] == 200:
                break
            await asyncio.sleep(0.05)
        await api.sign_up()


async def test_a_clock_that_is_wrong_is_named(api, monkeypatch):
    """F76: the service fails closed while its clock, or the database's, is wrong. Here ours stands still."""
    assert (await ready(api))[0] == 200
    monkeypatch.setattr("identity_service.web.health.CLOCK_SKEW", CLOCK_SKEW)
    assert await ready(api) == missing("clock")


async def test_a_keys_folder_that_is_lost_logs_nobody_out_and_is_named_in_time(api, alice, monkeypatch):
    """A replica that cannot read it may sign with a key that was revoked, and does not know the newest."""
    known = api.keys.current
    for _ in range(2):
        api.clock.advance(hours=1)
        now = api.clock()
        api.keys.rotate(now=now, at_once=True)
    newer = await alice.log_in()
    ring = api.keys.folder.path / "keyring.json"
    whole = ring.read_bytes()
    ring.write_bytes(b"{")
    api.keys.current = known  # as one that has not heard of it
    monkeypatch.setattr("identity_service.signing.live.MOST_FAILED_LOOKS", 30)
    api.keys.tend(now)
    assert (await ready(api))[0] == 200, "for a while what is held is good enough"
    answer = await api.refresh(newer["refresh_token"])
    assert (answer.status_code, answer.json()["error"]) == (503, "temporarily_unavailable")
    for _ in range(30):
        api.keys.tend(now)
    assert await ready(api) == missing("keys")
    ring.write_bytes(whole)
    api.keys.tend(now)
    assert (await ready(api))[0] == 200
    assert (await api.refresh(newer["refresh_token"])).status_code == 200
