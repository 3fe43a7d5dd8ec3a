"""Status lists and their events: what was revoked, for whoever verifies tokens elsewhere (TSL-1 to TSL-6)."""

import asyncio
import json
import threading
import time
import zlib
from base64 import urlsafe_b64decode
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, Literal, Self

import httpx2
import jwt
import pytest

from identity_service.database import Database
from identity_service.errors import DatabaseUnavailable
from identity_service.housekeeping import LOOK_SECONDS, hear_revocations, prune
from identity_service.revocation import CHANNEL, MANY, RevokedIndex
from identity_service.revocation.feed import (
    FOLLOWER_QUEUE,
    LOOKS_PER_FULL_ONE,
    LOOKS_PER_LONG_ONE,
    TAKEN_AT_ONCE,
    Batch,
    News,
    RevocationFeed,
)
from identity_service.revocation.status_lists import StatusListDocument, StatusLists
from identity_service.web.status_lists import REPLAY_BATCH, _events
from tests.conftest import ISSUER, START, Api, StartApi, bearer
from tests.sessions.test_endings import COPY_SESSIONS
from tests.verifier.conftest import until

SOMETHING = Batch((RevokedIndex(0, START, START),))


def status_of(tokens: dict[str, str]) -> dict[str, Any]:
    claims = jwt.decode(tokens["access_token"], options={"verify_signature": False})
    assert claims["status"].keys() == {"status_list"}
    reference: dict[str, Any] = claims["status"]["status_list"]
    assert reference.keys() == {"idx", "uri"}
    return reference


async def read_list(api: Api, number: int = 0) -> tuple[dict[str, Any], bytes]:
    """Fetch a list as a stock client would, and return its claims and its bits."""
    answer = await api.http.get(f"/status-lists/{number}")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/statuslist+jwt"
    header = jwt.get_unverified_header(answer.text)
    keys = jwt.PyJWKSet.from_dict((await api.http.get("/.well-known/jwks.json")).json())
    assert header == {"alg": "RS256", "typ": "statuslist+jwt", "kid": header["kid"]}
    options: Any = {"verify_exp": False, "verify_iat": False}
    claims = jwt.decode(answer.text, keys[header["kid"]], algorithms=["RS256"], options=options)
    encoded = claims["status_list"]["lst"]
    return claims, zlib.decompress(urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))


def bit(bits: bytes, reference: dict[str, Any]) -> int:
    index: int = reference["idx"]
    return bits[index >> 3] >> (index & 7) & 1


async def heard(api: Api) -> None:
    await api.runtime.revocations.look(api.clock())


@pytest.fixture
def nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that starts from here on takes up revocations when the test says so, and never by itself."""

    async def wait(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("identity_service.housekeeping.hear_revocations", wait)


async def test_a_token_names_its_entry_and_the_list_says_valid(api, alice):
    reference = status_of(await alice.log_in())
    assert reference["uri"] == f"{ISSUER}/status-lists/0"
    claims, bits = await read_list(api)
    assert claims["sub"] == reference["uri"]
    assert claims["iss"] == ISSUER
    assert claims["status_list"]["bits"] == 1
    assert claims["iat"] == int(START.timestamp())
    assert claims["exp"] > claims["iat"]
    assert claims["ttl"] > 0
    assert len(bits) == 2**20 // 8
    assert bit(bits, reference) == 0


async def test_a_session_keeps_its_entry_and_no_two_share_one(api, alice, bob):
    first, second, third = await alice.log_in(), await alice.log_in(), await bob.log_in()
    renewed = (await api.refresh(first["refresh_token"])).json()
    assert status_of(renewed) == status_of(first)
    assert len({status_of(tokens)["idx"] for tokens in (first, second, third)}) == 3


async def revoke(api, alice, tokens):
    await api.http.post("/revoke", data={"token": tokens["refresh_token"]})


async def replay(api, alice, tokens):
    second = (await api.refresh(tokens["refresh_token"])).json()
    await api.refresh(second["refresh_token"])
    await api.refresh(tokens["refresh_token"])


async def change_password_elsewhere(api, alice, tokens):
    other = await alice.log_in()
    body = {"current_password": alice.password, "new_password": "wise old owls never sleep"}
    api.clock.advance(seconds=1)
    await api.http.put("/users/me/password", json=body, headers=bearer(other["access_token"]))


async def delete_account(api, alice, tokens):
    body = {"current_password": alice.password}
    await api.http.request("DELETE", "/users/me", json=body, headers=bearer(tokens["access_token"]))


@pytest.mark.parametrize("end", [revoke, replay, change_password_elsewhere, delete_account])
async def test_whatever_ends_a_session_sets_its_bit_and_no_other(api, alice, bob, end):
    others = [status_of(await bob.log_in()) for _ in range(3)]
    tokens = await alice.log_in()
    await end(api, alice, tokens)
    await heard(api)
    _, bits = await read_list(api)
    assert bit(bits, status_of(tokens)) == 1
    assert [bit(bits, other) for other in others] == [0, 0, 0]
    assert sum(byte.bit_count() for byte in bits) == 1


async def test_a_replica_hears_of_it(alice, api, start_api: StartApi):
    tokens = await alice.log_in()
    async with start_api() as replica:
        await heard(replica)
        await revoke(api, alice, tokens)
        await shows(replica, tokens, within=10)


async def test_a_replica_that_is_notified_of_nothing_hears_of_it_all_the_same(
    alice, api, start_api: StartApi, monkeypatch
):
    """The table is the truth: a pooler in transaction mode swallows every notification."""

    async def deaf(_database: Database, _channel: str, _hear: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Database, "listen", deaf)
    tokens = await alice.log_in()
    async with start_api() as replica:
        await revoke(api, alice, tokens)
        await shows(replica, tokens, within=10)


async def test_a_replica_that_is_notified_does_not_wait_for_its_next_look(alice, api, start_api: StartApi, monkeypatch):
    monkeypatch.setattr("identity_service.housekeeping.LOOK_SECONDS", 60)
    tokens = await alice.log_in()
    async with start_api() as replica:
        listening = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND datname = current_database()"
        deadline = asyncio.get_running_loop().time() + 5
        while await api.scalar(listening) < 2:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # the look that the start began
        await revoke(api, alice, tokens)
        await shows(replica, tokens, within=10)


async def shows(api: Api, tokens: dict[str, str], *, within: float) -> None:
    deadline = asyncio.get_running_loop().time() + within
    while bit((await read_list(api))[1], status_of(tokens)) == 0:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.02)


async def test_a_service_that_starts_knows_what_was_revoked_before(alice, api, start_api: StartApi):
    tokens = await alice.log_in()
    await revoke(api, alice, tokens)
    async with start_api() as restarted:
        await heard(restarted)
        assert bit((await read_list(restarted))[1], status_of(tokens)) == 1


@pytest.mark.usefixtures("nobody_looks")
async def test_an_entry_is_forgotten_when_no_token_can_name_it(api, alice, clock):
    await revoke(api, alice, await alice.log_in())
    await heard(api)
    clock.advance(seconds=749)
    api.runtime.revocations.forget_expired(clock())
    assert sum((await read_list(api))[1]) != 0
    clock.advance(seconds=1)
    api.runtime.revocations.forget_expired(clock())
    assert sum((await read_list(api))[1]) == 0


@pytest.mark.usefixtures("nobody_looks")
async def test_housekeeping_forgets_what_no_token_can_name(api, alice, clock):
    await revoke(api, alice, await alice.log_in())
    await heard(api)
    clock.advance(seconds=750)
    await prune(api.runtime)
    assert api.runtime.revocations.revoked_in(0) == []


async def test_a_list_is_served_from_memory_until_something_changes(api, alice, clock):
    await heard(api)
    first = await api.http.get("/status-lists/0")
    clock.advance(minutes=5)
    second = await api.http.get("/status-lists/0", headers={"If-None-Match": first.headers["etag"]})
    assert (second.status_code, second.content) == (304, b"")
    assert second.headers["etag"] == first.headers["etag"]
    await revoke(api, alice, await alice.log_in())
    await heard(api)
    third = await api.http.get("/status-lists/0", headers={"If-None-Match": first.headers["etag"]})
    assert third.status_code == 200
    assert third.headers["cache-control"] == "public, max-age=15"
    assert third.headers["access-control-allow-origin"] == "*"


async def test_a_list_is_signed_anew_long_before_it_expires(api, clock):
    await heard(api)
    before, _ = await read_list(api)
    clock.advance(hours=12)
    after, _ = await read_list(api)
    assert after["iat"] == int(clock().timestamp())
    assert after["exp"] > before["exp"]


async def test_a_list_is_signed_anew_when_the_key_changes(api, clock):
    await heard(api)
    before = jwt.get_unverified_header((await api.http.get("/status-lists/0")).text)["kid"]
    clock.advance(hours=1)
    api.keys.folder.rotate(requested_at=clock(), now=clock(), publish_window=timedelta(0), at_once=True)
    api.keys.tend(clock())
    assert jwt.get_unverified_header((await api.http.get("/status-lists/0")).text)["kid"] != before


async def test_many_who_ask_at_once_cause_one_rendering(api, monkeypatch):
    await heard(api)
    render, rendered = StatusLists._render, []

    def counted(*arguments: Any) -> StatusListDocument:
        rendered.append(arguments)
        return render(*arguments)

    monkeypatch.setattr(StatusLists, "_render", counted)
    answers = await asyncio.gather(*(api.http.get("/status-lists/0") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert len(rendered) == 1


async def test_what_is_revoked_while_a_list_is_rendered_is_in_the_next_one(api, alice, monkeypatch):
    tokens = await alice.log_in()
    await heard(api)
    render, begun, go_on = StatusLists._render, threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> StatusListDocument:
        begun.set()
        assert go_on.wait(30)
        return render(*arguments)

    monkeypatch.setattr(StatusLists, "_render", slowly)
    first = asyncio.create_task(api.http.get("/status-lists/0"))
    assert await asyncio.to_thread(begun.wait, 30)
    await revoke(api, alice, tokens)
    await heard(api)
    go_on.set()
    await first
    assert bit((await read_list(api))[1], status_of(tokens)) == 1


async def test_the_aggregation_lists_every_list_that_tokens_may_name(api, alice):
    await alice.log_in()
    answer = await api.http.get("/status-lists")
    assert answer.json() == {"status_lists": [f"{ISSUER}/status-lists/0"]}
    metadata = (await api.http.get("/.well-known/oauth-authorization-server")).json()
    assert metadata["status_list_aggregation_endpoint"] == f"{ISSUER}/status-lists"


async def test_lists_go_on_where_the_first_is_full(api, alice):
    before = await api.scalar("SELECT last_value FROM status_index_seq")
    await api.scalar("SELECT setval('status_index_seq', 1048575)")
    try:
        reference = status_of(await alice.log_in())
        assert reference["uri"] == f"{ISSUER}/status-lists/1"
        await heard(api)
        await read_list(api, 1)
        api.runtime.revocations._looks = 0  # some looks later
        await heard(api)
        assert (await api.http.get("/status-lists")).json()["status_lists"] == [reference["uri"]]
    finally:
        await api.scalar("SELECT setval('status_index_seq', $1)", before)


@pytest.mark.parametrize("number", ["2", "-1", "01", "x", "99999999999", "0.0", "%30x", "..%2f0", "%D9%A0", "0%00"])
async def test_a_list_that_does_not_exist_is_not_found(api, number):
    answer = await api.http.get(f"/status-lists/{number}")
    assert answer.status_code == 404
    assert answer.json()["code"] == "not_found"


async def test_the_past_is_not_kept(api):
    answer = await api.http.get("/status-lists/0?time=1686925000")
    assert (answer.status_code, answer.json()["code"]) == (400, "time_not_supported")


class Stream:
    """Reads server-sent events from the application, as a client does.

    `replayed` are the events that came before the block with the stream's first id, `id`.
    """

    def __init__(self, api: Api, last_event_id: str | None = None, *, client: str = "127.0.0.1") -> None:
        self.headers = [(b"host", b"id.example.com")]
        if last_event_id is not None:
            self.headers.append((b"last-event-id", last_event_id.encode()))
        self.app, self.clock = api.app, api.clock
        self.client = client
        self.replayed: list[bytes] = []
        self.id = ""
        self.sent = 0
        self.chunks: asyncio.Queue[bytes] = asyncio.Queue()
        self.start: dict[str, Any] = {}
        self.task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        scope = {
            "type": "http", "method": "GET", "path": "/status-lists/events", "raw_path": b"/status-lists/events",
            "query_string": b"", "headers": self.headers, "client": (self.client, 1), "server": ("x", 1),
            "scheme": "https", "root_path": "", "http_version": "1.1", "asgi": {"version": "3.0"},
        }  # fmt: skip
        gone = asyncio.Event()

        async def receive() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.start = message
            else:
                self.sent += 1
                for block in message.get("body", b"").split(b"\n\n")[:-1]:
                    self.chunks.put_nowait(block + b"\n\n")
                if not message.get("more_body", False):
                    self.chunks.put_nowait(b"")

        await self.app.state.runtime.revocations.look(self.clock())
        self.task = asyncio.create_task(self.app(scope, receive, send))
        while not (block := await self.chunk()).startswith(b":"):
            self.replayed.append(block)
        self.id = block.decode().removeprefix(": follow\nid: ").strip()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def chunk(self, within: float = 3) -> bytes:
        return await asyncio.wait_for(self.chunks.get(), within)

    async def event(self) -> tuple[str, dict[str, Any]]:
        return event_of(await self.chunk())


def event_of(block: bytes) -> tuple[str, dict[str, Any]]:
    fields = dict(line.split(": ", 1) for line in block.decode().strip().split("\n"))
    assert fields["event"] == "revoked"
    return fields["id"], json.loads(fields["data"])


async def test_an_event_tells_of_a_revocation_at_once(api, alice):
    tokens = await alice.log_in()
    async with Stream(api) as stream:
        headers = dict(stream.start["headers"])
        assert headers[b"content-type"].startswith(b"text/event-stream")
        assert headers[b"cache-control"] == b"no-store"
        await revoke(api, alice, tokens)
        _, data = await stream.event()
    assert data == {**status_of(tokens), "exp": int((START + timedelta(seconds=750)).timestamp())}


async def test_a_stream_resumes_after_its_last_event(api, alice):
    first, second = await alice.log_in(), await alice.log_in()
    async with Stream(api) as stream:
        await revoke(api, alice, first)
        last, _ = await stream.event()
    await revoke(api, alice, second)
    await heard(api)
    async with Stream(api, last) as stream:
        told = [event_of(block) for block in stream.replayed]
    assert [data["idx"] for _, data in told] == [status_of(first)["idx"], status_of(second)["idx"]]
    assert [event_id for event_id, _ in told] == [last, stream.id], "the id of what has been said, never a later one"


async def test_who_has_heard_no_event_yet_resumes_from_where_it_connected(api, alice):
    async with Stream(api) as stream:
        assert stream.id == "0", "nothing was ever revoked here"
    await revoke(api, alice, await alice.log_in())
    async with Stream(api) as stream:
        connected_at = stream.id
        assert stream.replayed == []
    missed = await alice.log_in()
    await revoke(api, alice, missed)
    for resumed_from in ("0", connected_at):
        async with Stream(api, resumed_from) as stream:
            assert event_of(stream.replayed[-1])[1]["idx"] == status_of(missed)["idx"]


async def record(api: Api, numbers: range, *, ago: timedelta = timedelta(0)) -> None:
    """Revoke many that nobody holds."""
    async with api.database.connection() as db:
        await db.execute(
            "INSERT INTO revoked_tokens (jti, status_index, reason, revoked_at, expires_at, recorded_at)"
            " SELECT 'token ' || n, n, 'logout', $1, $2, clock_timestamp() - $3::interval FROM unnest($4::int[]) AS n",
            START,
            START + timedelta(minutes=11),
            ago,
            list(numbers),
        )


async def test_an_id_of_long_ago_does_not_make_the_service_say_everything_it_knows(api):
    """A stranger could have it write a hundred thousand events, as often as it liked."""
    await record(api, range(FOLLOWER_QUEUE))
    async with Stream(api, "0") as stream:
        assert len(stream.replayed) == FOLLOWER_QUEUE
        assert stream.sent == FOLLOWER_QUEUE / REPLAY_BATCH + 1
    await record(api, range(FOLLOWER_QUEUE, FOLLOWER_QUEUE + 1))
    async with Stream(api, "0") as stream:
        assert stream.replayed == [], "some of them would be a gap that nobody notices"
        assert stream.sent == 1


async def test_older_revocations_do_not_keep_anybody_from_resuming(api):
    await record(api, range(FOLLOWER_QUEUE), ago=timedelta(minutes=5))
    async with Stream(api) as stream:
        resume_from = str(int(stream.id) + 61_000_000)
    await record(api, range(FOLLOWER_QUEUE, FOLLOWER_QUEUE + 3))
    async with Stream(api, resume_from) as stream:
        assert len(stream.replayed) == 3


async def test_what_no_token_can_name_any_more_is_not_replayed(api, clock):
    await record(api, range(3))
    await heard(api)
    clock.advance(minutes=11)
    api.runtime.revocations.forget_expired(clock())
    async with Stream(api, "0") as stream:
        assert stream.replayed == []


async def test_others_are_served_while_a_thousand_events_are_replayed(api):
    await record(api, range(FOLLOWER_QUEUE))
    stream, turns = Stream(api, "0"), []

    async def others() -> None:
        while True:
            turns.append(stream.sent)
            await asyncio.sleep(0)

    serving = asyncio.create_task(others())
    async with stream:
        serving.cancel()
    assert set(range(FOLLOWER_QUEUE // REPLAY_BATCH)) <= set(turns)


@pytest.mark.parametrize("unknown", ["", "x", "1" * 30, "-5"])
async def test_an_id_that_is_none_of_ours_is_ignored(api, alice, unknown):
    await revoke(api, alice, await alice.log_in())
    await heard(api)
    async with Stream(api, unknown) as stream:
        assert stream.replayed == []
        with pytest.raises(TimeoutError):
            await stream.chunk(0.2)


async def test_an_event_tells_of_other_keys(api, clock):
    """A key that was stolen is revoked; nobody should go on with a copy of the JWKS for as long as it is fresh."""
    async with Stream(api) as stream:
        clock.advance(hours=1)
        api.keys.folder.rotate(requested_at=clock(), now=clock(), publish_window=timedelta(0), at_once=True)
        assert await stream.chunk(5) == b"event: keys\ndata: {}\n\n"


async def test_silence_is_broken_by_comments(api, monkeypatch):
    monkeypatch.setattr("identity_service.web.status_lists.HEARTBEAT_SECONDS", 0.05)
    async with Stream(api) as stream:
        assert await stream.chunk() == b": still here\n\n"


async def test_a_service_that_stops_ends_its_streams(api):
    async with Stream(api) as stream:
        api.runtime.revocations.close()
        assert await stream.chunk() == b""
    async with Stream(api) as late:
        assert await late.chunk() == b""


async def test_a_follower_that_does_not_keep_up_is_let_go(api, alice):
    """Its queue is bounded; what it missed is in the list."""
    with api.runtime.revocations.follow() as follower:
        for _ in range(FOLLOWER_QUEUE):
            follower.tell(SOMETHING)
        await revoke(api, alice, await alice.log_in())
        await heard(api)
        assert await follower.next(within=10) is News.END


async def test_a_follower_may_be_behind_by_so_many_and_who_keeps_up_is_never_let_go(api):
    """Counted in revocations, however they are told."""
    half = Batch((RevokedIndex(0, START, START),) * (FOLLOWER_QUEUE // 2))
    with api.runtime.revocations.follow() as follower:
        assert follower.tell(half)
        assert follower.tell(half)
        assert not follower.tell(SOMETHING)
        for _ in range(2):
            assert await follower.next(within=1) is half
        for _ in range(5):
            assert follower.tell(half)
            assert await follower.next(within=1) is half


REVOKE_MANY = """
    INSERT INTO revoked_tokens (jti, status_index, reason, revoked_at, expires_at)
    SELECT gen_random_uuid()::text, n, 'revoked', $1, $1::timestamptz + interval '10 minutes'
      FROM generate_series(1, $2::integer) AS n
"""


async def test_others_are_served_while_many_streams_are_told_of_many_revocations(api, clock):
    """P5: each follower was told of each in one breath, and nobody was answered for seconds."""
    await heard(api)
    told, longest = 0, 0.0

    async def follow() -> None:
        nonlocal told
        async for chunk in _events(api.runtime, None, None):
            told += chunk.count("event: revoked")

    async def watch() -> None:
        nonlocal longest
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0)
            longest = max(longest, time.perf_counter() - before)

    following = [asyncio.create_task(follow()) for _ in range(400)]
    await until(lambda: api.runtime.revocations.followers == 400)
    watching = asyncio.create_task(watch())
    async with api.database.connection() as db:
        await db.execute(REVOKE_MANY, clock(), 1000)
    await until(lambda: told == 400 * 1000, within=60)
    for task in (watching, *following):
        task.cancel()
    await asyncio.wait([watching, *following])
    assert longest < 1  # it was ten


async def test_much_that_was_recorded_long_before_its_end_is_looked_for_at_once(api, clock):
    """P14: most looks read two seconds, and it took longer than that to write it."""
    await heard(api)
    feed = api.runtime.revocations
    async with api.database.connection() as db:
        await db.execute(REVOKE_MANY, clock(), 1)
    await until(lambda: feed.revoked_in(0) != [])
    before = feed._looks
    async with api.database.connection() as db, db.transaction():
        await db.execute(REVOKE_MANY, clock(), 2)
        await db.execute("UPDATE revoked_tokens SET recorded_at = recorded_at - interval '10 minutes'")
        await db.execute(f"SELECT pg_notify('{CHANNEL}', '{MANY}')")
    await until(lambda: len(feed.revoked_in(0)) == 2)
    assert feed._looks < before + LOOKS_PER_FULL_ONE // 2


async def test_a_look_that_was_to_read_everything_and_failed_is_made_again(api, clock):
    feed = RevocationFeed(api.database)
    for _ in range(2):
        await feed.look(clock())
    feed.doubt()
    await api.scalar("ALTER TABLE revoked_tokens RENAME TO away")
    with pytest.raises(DatabaseUnavailable):
        await feed.look(clock())
    await api.scalar("ALTER TABLE away RENAME TO revoked_tokens")
    async with api.database.connection() as db:
        await db.execute(REVOKE_MANY, clock(), 1)
        await db.execute("UPDATE revoked_tokens SET recorded_at = recorded_at - interval '10 minutes'")
    feed.newest_at = datetime.now(UTC)
    await feed.look(clock())
    assert feed.revoked_in(0) == [1]


@pytest.mark.parametrize(("sessions", "told"), [(1, ""), (1002, MANY)])
async def test_listeners_are_told_whether_it_was_much(api, alice, sessions, told):
    tokens = await alice.log_in()
    async with api.database.connection() as db:
        await db.execute(COPY_SESSIONS, sessions)
    heard_of: list[str] = []
    listening = asyncio.create_task(api.database.listen(CHANNEL, heard_of.append))
    while "ready" not in heard_of:
        await api.scalar("SELECT pg_notify($1, 'ready')", CHANNEL)
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    heard_of.clear()
    answer = await api.http.delete("/users/me/sessions", headers=bearer(tokens["access_token"]))
    assert answer.status_code == 204
    await revoke(api, alice, tokens)
    await until(lambda: heard_of[-1:] == [""])
    listening.cancel()
    await asyncio.wait([listening])
    assert heard_of == ([told, ""] if told else [""])


async def test_nothing_is_said_while_the_table_cannot_be_read(api, alice, monkeypatch):
    """F76: a list that is empty because nobody looked would call every revoked token valid."""
    await heard(api)
    async with Stream(api) as stream:
        monkeypatch.setattr("identity_service.revocation.feed.VOUCHED_SECONDS", 0)
        for path in ("/status-lists/0", "/status-lists/events"):
            answer = await api.http.get(path)
            assert (answer.status_code, answer.json()["code"]) == (503, "temporarily_unavailable")
            assert answer.headers["retry-after"]
        api.runtime.revocations._followers.pop().tell(SOMETHING)
        await stream.chunk()
        assert await stream.chunk() == b""


async def test_a_list_in_memory_is_not_served_either_while_the_table_cannot_be_read(api, monkeypatch):
    await heard(api)
    await read_list(api)
    monkeypatch.setattr("identity_service.revocation.feed.VOUCHED_SECONDS", 0)
    assert (await api.http.get("/status-lists/0")).status_code == 503


async def test_a_look_is_as_old_as_its_beginning(api, monkeypatch):
    """One that was held up for too long may have missed what was revoked meanwhile."""
    monkeypatch.setattr("identity_service.revocation.feed.VOUCHED_SECONDS", 0.2)
    feed = RevocationFeed(api.database)
    async with api.database.connection() as other, other.transaction():
        await other.execute("LOCK TABLE revoked_tokens")
        look = asyncio.create_task(feed.look(api.clock()))
        await asyncio.sleep(0.3)
        assert not look.done()
    await look
    assert not feed.is_current


async def test_a_process_serves_no_more_streams_than_it_can_bear(api, monkeypatch):
    await heard(api)
    monkeypatch.setattr("identity_service.revocation.feed.MAX_FOLLOWERS", 1)
    async with Stream(api):
        answer = await api.http.get("/status-lists/events")
        assert (answer.status_code, answer.json()["code"]) == (503, "temporarily_unavailable")
        assert answer.headers["retry-after"] == "30"
        assert (await api.http.get("/status-lists/0")).status_code == 200
    async with Stream(api):
        pass


async def status_for(api: Api, client: str) -> int:
    """Ask for the events as some client, without staying."""
    transport = httpx2.ASGITransport(app=api.app, client=(client, 1))
    async with httpx2.AsyncClient(transport=transport, base_url=ISSUER) as http:
        return (await http.head("/status-lists/events")).status_code


@pytest.mark.parametrize(
    ("holder", "neighbour", "stranger"),
    [
        ("8.8.8.8", "8.8.8.8", "8.8.4.4"),
        ("::ffff:8.8.8.8", "8.8.8.8", "::ffff:8.8.4.4"),
        ("2606:4700::1", "2606:4700::ffff:1:2:3", "2606:4700:0:1::1"),
    ],
)
async def test_one_place_of_the_network_cannot_take_the_stream_from_everybody(
    api, monkeypatch, holder, neighbour, stranger
):
    await heard(api)
    monkeypatch.setattr("identity_service.revocation.feed.MAX_FOLLOWERS_OF_ONE", 2)
    async with Stream(api, client=holder), Stream(api, client=neighbour):
        assert [await status_for(api, client) for client in (holder, neighbour, stranger)] == [503, 503, 200]
    assert await status_for(api, holder) == 200, "a place is given back"


@pytest.mark.parametrize("proxy", ["127.0.0.1", "::1", "10.1.2.3", "192.168.0.1", "fd00::1", "100.64.0.1", "unix", ""])
async def test_a_proxy_does_not_count_as_one_client(api, monkeypatch, proxy):
    await heard(api)
    monkeypatch.setattr("identity_service.revocation.feed.MAX_FOLLOWERS_OF_ONE", 0)
    assert await status_for(api, proxy) == 200


async def test_of_those_who_come_at_once_for_the_last_place_one_gets_it(api, monkeypatch):
    """They have all been let in before the first of them is counted."""
    monkeypatch.setattr("identity_service.revocation.feed.MAX_FOLLOWERS_OF_ONE", 1)
    await heard(api)
    feed = api.runtime.revocations
    with feed.follow("8.8.8.8") as first, feed.follow("8.8.8.8") as second:
        assert await second.next(within=10) is News.END
        with pytest.raises(TimeoutError):
            await first.next(within=0.01)


async def test_a_stream_ends_by_itself_so_that_nobody_holds_a_place_for_ever(api, monkeypatch):
    monkeypatch.setattr("identity_service.web.status_lists.STREAM_SECONDS", (0.1, 0.2))
    async with Stream(api) as stream:
        assert await stream.chunk() == b": still here\n\n"
        assert await stream.chunk() == b""
        assert stream.task is not None
        await stream.task
    assert api.runtime.revocations.has_room(None)


async def committed_late(api: Api, *, by: timedelta) -> None:
    """Let the one living session be revoked by somebody whose transaction took so long."""
    async with api.database.connection() as db:
        await db.execute(
            "INSERT INTO revoked_tokens (jti, status_index, reason, revoked_at, expires_at, recorded_at)"
            " SELECT 'late', status_index, 'logout', now(), $1, clock_timestamp() - $2::interval"
            " FROM sessions WHERE revoked_at IS NULL",
            START + timedelta(minutes=11),
            by,
        )


FULL_LOOK = int(timedelta(minutes=5).total_seconds() / LOOK_SECONDS)
"""How many looks there are in five minutes, after which one reads everything."""


@pytest.mark.usefixtures("nobody_looks")
@pytest.mark.parametrize(("late", "first", "looks"), [(1, 1, 1), (30, 1, LOOKS_PER_LONG_ONE), (120, FULL_LOOK - 1, 2)])
async def test_a_revocation_that_was_committed_late_is_found(api, alice, late, first, looks):
    """Written before the newest that was seen: each look goes back a little, some go back far, few read everything."""
    tokens = await alice.log_in()
    await revoke(api, alice, await alice.log_in())
    await heard(api)
    api.runtime.revocations._looks = first
    await committed_late(api, by=timedelta(seconds=late))
    for _ in range(looks):
        assert bit((await read_list(api))[1], status_of(tokens)) == 0
        await heard(api)
    assert bit((await read_list(api))[1], status_of(tokens)) == 1


async def test_a_stream_that_resumes_hears_what_was_committed_late(api, alice):
    """It is dated before the event that the stream heard last."""
    tokens, late = await alice.log_in(), await alice.log_in()
    async with Stream(api) as stream:
        await revoke(api, alice, tokens)
        last, _ = await stream.event()
    await committed_late(api, by=timedelta(seconds=30))
    api.runtime.revocations._looks = 0  # the next one reads everything
    await heard(api)
    async with Stream(api, last) as stream:
        told = [event_of(block)[1]["idx"] for block in stream.replayed]
    assert status_of(late)["idx"] in told


async def test_others_are_served_while_very_many_revocations_are_taken_up(api):
    """A full look at a hundred thousand once kept every request waiting for a tenth of a second, every five minutes."""
    many = TAKEN_AT_ONCE * 4 + 1
    await record(api, range(many))
    feed = RevocationFeed(api.database)
    held = [0]

    async def others() -> None:
        while True:
            held.append(len(feed.revoked_in(0)))
            await asyncio.sleep(0)

    serving = asyncio.create_task(others())
    await feed.look(api.clock())
    serving.cancel()
    held.append(len(feed.revoked_in(0)))
    assert held[-1] == many
    assert max(after - before for before, after in pairwise(held)) <= TAKEN_AT_ONCE


async def test_nothing_is_vouched_for_before_all_of_it_has_been_taken_up(api):
    many = TAKEN_AT_ONCE * 4
    await record(api, range(many))
    feed = RevocationFeed(api.database)
    look = asyncio.create_task(feed.look(api.clock()))
    while not feed.revoked_in(0):  # noqa: ASYNC110 - it is a value, nobody announces it
        await asyncio.sleep(0)
    look.cancel()
    await asyncio.gather(look, return_exceptions=True)
    assert 0 < len(feed.revoked_in(0)) < many
    assert not feed.is_current
    await feed.look(api.clock())
    assert len(feed.revoked_in(0)) == many
    assert feed.is_current


class Heard(asyncio.Event):
    """Tells when somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.awaited = asyncio.Event()

    async def wait(self) -> Literal[True]:
        self.awaited.set()
        return await super().wait()


async def test_a_notification_at_the_moment_of_stopping_does_not_keep_the_service_from_stopping(api):
    """`asyncio.wait_for` of Python 3.11 forgets that it was cancelled when what it waits for has just happened."""
    heard = Heard()
    look = asyncio.create_task(hear_revocations(api.runtime, heard))
    await heard.awaited.wait()
    heard.set()
    look.cancel()
    with pytest.raises(asyncio.CancelledError):
        await look
