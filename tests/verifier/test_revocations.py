"""TSL-1 to TSL-6 and the event stream: how a logout reaches a verifier, and what happens when it cannot."""

import asyncio
import logging
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from identity_service.verifier import TokenRejected, Verifier, status_list
from identity_service.verifier import revocations as revocations_module
from identity_service.verifier.claims import StatusReference
from identity_service.verifier.events import Event, EventReader
from identity_service.verifier.revocations import OnStale
from identity_service.verifier.testing import TestIssuer, _public_jwk
from tests.verifier.conftest import AUDIENCE, ISSUER, LIST, Clock, Issuer, until

request_id: ContextVar[str] = ContextVar("request_id")


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that waits by itself waits less."""
    monkeypatch.setattr(revocations_module, "TICK", 0.005)
    monkeypatch.setattr(revocations_module, "_RECONNECT", (0.005, 0.02))


def indexed(issuer: Issuer, idx: int, uri: str = LIST, **claims: Any) -> str:
    return issuer.token(status={"status_list": {"idx": idx, "uri": uri}}, **claims)


async def refused(verifier: Verifier, token: str, reason: str) -> None:
    with pytest.raises(TokenRejected) as error:
        await verifier.verify(token)
    assert error.value.reason == reason


async def connected(verifier: Verifier) -> None:
    await until(lambda: verifier.status().stream_connected)


# Status lists


def test_tsl2_the_drafts_own_vectors() -> None:
    assert status_list.encode(bytes.fromhex("b9a3")) == "eNrbuRgAAhcBXQ"
    assert status_list.encode(bytes.fromhex("c944f9")) == "eNo76fITAAPfAgc"
    one = status_list.decode("eNrbuRgAAhcBXQ", 1)
    assert [one.status(i) for i in range(len(one))] == [1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0, 1]
    two = status_list.decode("eNo76fITAAPfAgc", 2)
    assert [two.status(i) for i in range(len(two))] == [1, 2, 0, 3, 0, 1, 0, 1, 1, 2, 3, 3]
    assert status_list.decode(status_list.build([0, 3, 4, 5, 7, 8, 9, 13, 15], 16), 1) == one


@given(st.sets(st.integers(0, 8191)))
def test_tsl2_what_is_built_is_read(positions: set[int]) -> None:
    read = status_list.decode(status_list.build(positions, 8192), 1)
    assert {i for i in range(8192) if read.status(i)} == positions
    with pytest.raises(IndexError):
        read.status(8192)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_tsl2_statuses_of_several_bits(bits: int) -> None:
    read = status_list.decode(status_list.encode(b"\xe4\x1b"), bits)
    value = int.from_bytes(b"\xe4\x1b", "little")
    assert [read.status(i) for i in range(len(read))] == [
        value >> (i * bits) & ((1 << bits) - 1) for i in range(16 // bits)
    ]


def test_a_list_is_made_of_whole_bytes() -> None:
    with pytest.raises(ValueError):
        status_list.build([], 7)


@pytest.mark.parametrize(
    ("packed", "bits"),
    [
        ("eNrbuRgAAhcBXQ", 3),
        ("eNrbuRgAAhcBXQ", 0),
        ("eNrbuRgAAhcBXQ==", 1),
        ("eNrbuRgAAhcB", 1),
        ("AAAA", 1),
        ("", 1),
        (status_list.encode(b"x") + "AAAA", 1),
        (status_list.encode(bytes((1 << 20) + 1)), 1),
        (status_list.encode(bytes(1 << 28)), 1),
    ],
)
def test_tsl5_what_is_not_a_list_or_a_zip_bomb_is_refused(packed: str, bits: int) -> None:
    with pytest.raises(ValueError):
        status_list.decode(packed, bits)


def test_the_largest_list_is_read() -> None:
    assert len(status_list.decode(status_list.encode(bytes(1 << 20)), 1)) == 1 << 23


# What a token's status decides


async def test_a_revoked_token_is_refused_and_another_is_not(issuer: Issuer, verifier: Verifier) -> None:
    issuer.revoked = {7}
    await refused(verifier, indexed(issuer, 7), "revoked")
    assert await verifier.verify(indexed(issuer, 8))
    assert verifier.status().cached_tokens == 1


async def test_tsl5_an_invalid_token_makes_us_fetch_no_list(issuer: Issuer, verifier: Verifier) -> None:
    await refused(verifier, indexed(issuer, 1, expired=True), "expired")
    await refused(verifier, indexed(issuer, 1, aud=["billing"]), "wrong_audience")
    assert issuer.asked("/status-lists/1") == 0
    assert not verifier.status().lists


async def test_many_first_tokens_share_one_fetch_of_the_list(issuer: Issuer, verifier: Verifier) -> None:
    issuer.offers_stream = False
    issuer.delay = 0.01
    await asyncio.gather(*(verifier.verify(indexed(issuer, idx)) for idx in range(50)))
    assert issuer.asked("/status-lists/1") == 1
    assert verifier.status().lists == {LIST: 0}


async def test_tsl5_an_index_beyond_the_list_is_refused(issuer: Issuer, verifier: Verifier) -> None:
    await refused(verifier, indexed(issuer, 1024), "malformed")


async def test_tsl1_any_status_but_valid_refuses(issuer: Issuer, verifier: Verifier) -> None:
    issuer.list_claims = {"status_list": {"bits": 2, "lst": "eNo76fITAAPfAgc"}}
    for idx, refuses in enumerate([1, 2, 0, 3]):
        if refuses:
            await refused(verifier, indexed(issuer, idx), "revoked")
        else:
            assert await verifier.verify(indexed(issuer, idx))


async def test_an_issuer_without_lists_has_its_tokens_simply_verified(issuer: Issuer, now: Clock) -> None:
    issuer.list_answer = lambda request: httpx2.Response(404)
    issuer.offers_stream = False
    async with issuer.verifier() as verifier:
        assert await verifier.verify(indexed(issuer, 1))
        assert await verifier.verify(issuer.token(status=None))
        issuer.list_answer = None
        issuer.revoked = {1}
        now.advance(61)
        await until(lambda: issuer.asked("/status-lists/1") >= 2)
        await refused(verifier, indexed(issuer, 1), "revoked")


async def test_on_stale_reject_takes_no_absence_for_an_answer(issuer: Issuer) -> None:
    """A route that an ingress has forgotten says of every token that nobody has revoked it."""
    issuer.list_answer = lambda request: httpx2.Response(404)
    async with issuer.verifier(on_stale="reject") as verifier:
        await refused(verifier, indexed(issuer, 1), "keys_unavailable")
        assert await verifier.verify(issuer.token(status=None))


async def test_a_list_that_is_retired_keeps_what_it_said(issuer: Issuer, verifier: Verifier, now: Clock) -> None:
    issuer.revoked = {1}
    await refused(verifier, indexed(issuer, 1), "revoked")
    asked = issuer.asked("/status-lists/1")
    issuer.list_answer = lambda request: httpx2.Response(404)
    now.advance(301)
    await until(lambda: issuer.asked("/status-lists/1") > asked)
    await refused(verifier, indexed(issuer, 1), "revoked")


async def test_not_following_asks_for_no_list(issuer: Issuer) -> None:
    verifier = issuer.verifier(follow_revocations=False)
    issuer.revoked = {1}
    assert await verifier.verify(indexed(issuer, 1))
    assert not verifier.status().stream_connected
    assert {request.url.path for request in issuer.requests} == {"/.well-known/jwks.json"}


WRONG_LISTS: dict[str, dict[str, Any]] = {
    "TSL-3_typ": {"list_typ": "at+jwt"},
    "TSL-3_sub": {"list_claims": {"sub": LIST + "2"}},
    "TSL-3_sub_missing": {"list_claims": {"sub": None}},
    "TSL-3_iat_missing": {"list_claims": {"iat": None}},
    "TSL-5_expired": {"list_claims": {"exp": 1_794_999_900}},
    "exp_a_string": {"list_claims": {"exp": "1795000100"}},
    "ttl_a_string": {"list_claims": {"ttl": "1"}},
    "status_list_missing": {"list_claims": {"status_list": None}},
    "bits_missing": {"list_claims": {"status_list": {"lst": "eNrbuRgAAhcBXQ"}}},
    "lst_missing": {"list_claims": {"status_list": {"bits": 1}}},
    "lst_garbage": {"list_claims": {"status_list": {"bits": 1, "lst": "AAAA"}}},
    "TSL-5_zip_bomb": {"list_claims": {"status_list": {"bits": 1, "lst": status_list.encode(bytes(1 << 24))}}},
    "unknown_key": {"list_header": {"kid": "unknown"}},
    "another_algorithm": {"list_header": {"alg": "RS512"}},
    "garbage": {"list_answer": lambda request: httpx2.Response(200, content=b"<html>")},
    "500": {"list_answer": lambda request: httpx2.Response(500)},
    "304_for_nothing": {"list_answer": lambda request: httpx2.Response(304)},
    "redirect": {"list_answer": lambda request: httpx2.Response(302, headers={"Location": "https://evil.example/"})},
    "too_long": {"list_answer": lambda request: httpx2.Response(200, content=b"A" * (3 << 20))},
}


@pytest.mark.parametrize("wrong", WRONG_LISTS)
async def test_a_wrong_list_is_no_list(issuer: Issuer, wrong: str) -> None:
    """Refused by those who want to be sure; by the others accepted, as while the issuer cannot be reached."""
    issuer.revoked = {1}
    for name, value in WRONG_LISTS[wrong].items():
        setattr(issuer, name, value)
    async with issuer.verifier(on_stale="reject") as strict, issuer.verifier() as lenient:
        await refused(strict, indexed(issuer, 1), "keys_unavailable")
        assert await lenient.verify(indexed(issuer, 1))
        assert strict.status().lists == {LIST: None}
    assert {request.url.host for request in issuer.requests} == {"id.example.com"}


async def test_a_list_signed_by_somebody_else_is_no_list(
    issuer: Issuer, verifier: Verifier, other_key: rsa.RSAPrivateKey
) -> None:
    forger = TestIssuer(ISSUER, AUDIENCE, now=issuer.clock)
    forger._key = other_key
    own = issuer.kit
    token = indexed(issuer, 1)
    issuer.kit, issuer.revoked = forger, {1}
    assert await verifier.verify(token)
    issuer.kit = own


async def test_when_a_list_cannot_be_had_only_the_first_requests_wait(issuer: Issuer, now: Clock) -> None:
    issuer.offers_stream = False
    issuer.list_answer = lambda request: httpx2.Response(500)
    async with issuer.verifier() as verifier:
        await verifier.verify(indexed(issuer, 1))
        issuer.delay = 5
        now.advance(2)
        await asyncio.wait_for(verifier.verify(indexed(issuer, 1)), 3)


async def test_an_older_list_does_not_bring_a_token_back(issuer: Issuer, verifier: Verifier, now: Clock) -> None:
    issuer.revoked = {1}
    await refused(verifier, indexed(issuer, 1), "revoked")
    issuer.revoked = set()
    issuer.list_claims = {"iat": int(now()) - 1}
    asked = issuer.asked("/status-lists/1")
    now.advance(301)
    await until(lambda: issuer.asked("/status-lists/1") > asked)
    await asyncio.sleep(0.02)
    await refused(verifier, indexed(issuer, 1), "revoked")


async def test_an_older_list_adds_what_it_says(issuer: Issuer, verifier: Verifier, now: Clock) -> None:
    """Of a replica whose clock is behind, or of one issuer whose clock was set back: it is the truth all the same."""
    issuer.list_claims = {"iat": int(now()) + 20}
    await verifier.verify(indexed(issuer, 1))
    issuer.revoked, issuer.list_claims = {1}, {"iat": int(now())}
    now.advance(301)
    await until(lambda: verifier.status().lists == {LIST: 0})
    await refused(verifier, indexed(issuer, 1), "revoked")


@pytest.mark.parametrize(
    "shape", [{"bits": 2, "lst": status_list.encode(bytes(256))}, {"bits": 1, "lst": "eJwDAAAAAAE"}]
)
async def test_an_older_list_of_another_shape_takes_nothing_back(
    issuer: Issuer, verifier: Verifier, now: Clock, shape: dict[str, Any]
) -> None:
    issuer.revoked = {1}
    await refused(verifier, indexed(issuer, 1), "revoked")
    issuer.revoked, issuer.list_claims = set(), {"iat": int(now()) - 1, "status_list": shape}
    asked = issuer.asked("/status-lists/1")
    now.advance(301)
    await until(lambda: issuer.asked("/status-lists/1") > asked)
    await asyncio.sleep(0.02)
    await refused(verifier, indexed(issuer, 1), "revoked")


async def test_a_replica_that_lags_does_not_bring_a_token_back(issuer: Issuer, verifier: Verifier, now: Clock) -> None:
    """Its list is newer by the clock, and came a moment after that of one which knew more."""
    issuer.revoked, issuer.ttl, issuer.offers_stream = {1}, 5, False
    await refused(verifier, indexed(issuer, 1), "revoked")
    issuer.revoked = set()
    for moment, says in ((5, True), (13, False)):
        now.advance(moment)
        await until(lambda: verifier.status().lists == {LIST: 0})
        assert verifier._revocations._lists[LIST].says_revoked(1) == says


async def test_on_stale_reject_trusts_another_replicas_older_list(issuer: Issuer, now: Clock) -> None:
    """It was rendered a minute earlier and says the same; refusing it would refuse every valid token after a while."""
    async with issuer.verifier(on_stale="reject") as verifier:
        token = indexed(issuer, 1, lifetime=7200)
        await verifier.verify(token)
        await connected(verifier)
        issuer.list_claims = {"iat": int(now()) - 60}
        issuer.streams[0].end()
        await until(lambda: len(issuer.streams) == 2 and verifier.status().stream_connected)
        for _ in range(40):
            now.advance(10)
            issuer.streams[-1].say(": still here\n\n")
            await until(lambda: verifier.status().lists == {LIST: 0})
        assert await verifier.verify(token)


async def test_a_program_that_makes_a_loop_for_each_call_hears_of_revocations(issuer: Issuer, now: Clock) -> None:
    """As synchronous frameworks do: no task lives long enough to fetch a list that is due."""
    issuer.ttl, issuer.offers_stream = 15, False
    verifier, token = issuer.verifier(), indexed(issuer, 1)

    def call() -> str:
        try:
            return asyncio.run(verifier.verify(token)).subject
        except TokenRejected as error:
            return error.reason

    assert await asyncio.to_thread(call)
    issuer.list_answer = lambda request: httpx2.Response(500)
    now.advance(21)
    assert await asyncio.to_thread(call) != "revoked", "nothing is known of it, and nothing can be"
    issuer.list_answer, issuer.revoked = None, {1}
    now.advance(21)
    assert await asyncio.to_thread(call) == "revoked"


async def test_a_revocation_is_known_to_the_next_loop_where_each_call_has_one(issuer: Issuer, now: Clock) -> None:
    """As under a TestClient without `with`: also for a token that was seen often, and one that was never seen."""
    verifier, often, never = issuer.verifier(), indexed(issuer, 1), indexed(issuer, 2)

    def call(token: str) -> str:
        try:
            return asyncio.run(verifier.verify(token)).token_id and "accepted"
        except TokenRejected as error:
            return error.reason

    for _ in range(4):
        assert await asyncio.to_thread(call, often) == "accepted"
    issuer.revoked = {1, 2}
    now.advance(1)
    assert await asyncio.to_thread(call, often) == "revoked"
    assert await asyncio.to_thread(call, never) == "revoked"
    issuer.down = True
    other = indexed(issuer, 3)
    assert await asyncio.to_thread(call, other) == "accepted", "nothing is known of it, and nothing can be"
    assert await asyncio.to_thread(call, often) == "revoked"


async def test_each_list_is_asked_for_where_each_call_has_a_loop(issuer: Issuer, now: Clock) -> None:
    """What was heard of one list says nothing about another."""
    verifier, second_list = issuer.verifier(), LIST[:-1] + "2"
    issuer.lists = ("/status-lists/1", "/status-lists/2")
    one, other = indexed(issuer, 1), indexed(issuer, 2, second_list)

    async def both() -> list[str]:
        outcomes = []
        for token in (one, other):
            try:
                await verifier.verify(token)
                outcomes.append("accepted")
            except TokenRejected as error:
                outcomes.append(error.reason)
        return outcomes

    assert await asyncio.to_thread(asyncio.run, both()) == ["accepted", "accepted"]
    issuer.revoked = {2}
    for _ in range(3):
        now.advance(1)
        assert await asyncio.to_thread(asyncio.run, both()) == ["accepted", "revoked"]


# The stream


async def test_a_revocation_arrives_by_the_stream(issuer: Issuer, verifier: Verifier, now: Clock) -> None:
    token = indexed(issuer, 5)
    await verifier.verify(token)
    await connected(verifier)
    issuer.streams[0].say(": hello\n\nevent: other\ndata: {}\n\n")
    issuer.streams[0].revoked(5, exp=int(now()) + 600)
    await until(lambda: bool(verifier._revocations._overlay))
    await refused(verifier, token, "revoked")
    assert await verifier.verify(indexed(issuer, 6))


@pytest.mark.parametrize(
    "data",
    [
        "nothing",
        "[]",
        "{}",
        '{"uri": 1, "idx": 1}',
        f'{{"uri": "{LIST}", "idx": -1}}',
        '{"uri": "https://evil.example/1", "idx": 1}',
    ],
)
async def test_an_event_that_makes_no_sense_is_ignored(
    issuer: Issuer, verifier: Verifier, data: str, caplog: pytest.LogCaptureFixture
) -> None:
    await verifier.verify(indexed(issuer, 1))
    await connected(verifier)
    with caplog.at_level(logging.WARNING):
        issuer.streams[0].say(f"event: revoked\ndata: {data}\n\n")
        await until(lambda: "event_ignored" in caplog.text)
    assert verifier.status().stream_connected
    assert not verifier._revocations._overlay


async def test_an_event_of_other_keys_has_them_fetched_now_and_again_when_every_replica_knows(
    issuer: Issuer, verifier: Verifier, now: Clock, other_key: rsa.RSAPrivateKey
) -> None:
    """The key that was stolen is not used for as long as the JWKS says that it may be kept."""
    token = indexed(issuer, 1)
    await verifier.verify(token)
    await connected(verifier)
    issuer.streams[0].say("event: keys\ndata: {}\n\n")
    await until(lambda: issuer.keys_asked == 2)
    assert issuer.requests[-1].headers["cache-control"] == "no-cache"
    issuer.keys = [_public_jwk(other_key)]
    now.advance(3)
    await verifier.verify(token)
    await until(lambda: issuer.keys_asked == 3)
    await refused(verifier, token, "unknown_key")
    now.advance(60)
    await refused(verifier, token, "unknown_key")
    for_keys = [request for request in issuer.requests if request.url.path.endswith("jwks.json")]
    assert for_keys[-1].headers.get("cache-control") is None


async def test_what_follows_a_connection_is_asked_of_the_issuer_and_not_of_a_cache(
    issuer: Issuer, verifier: Verifier, now: Clock
) -> None:
    """What was revoked between two connections may be in no copy of the list that a cache has."""
    await verifier.verify(indexed(issuer, 1))
    await connected(verifier)
    await until(lambda: verifier._revocations._lists[LIST].connection == 1)
    asked = [request for request in issuer.requests if request.url.path.endswith("/1")]
    assert asked[-1].headers["cache-control"] == "no-cache"


async def test_the_keys_are_asked_for_after_a_reconnection(
    issuer: Issuer, verifier: Verifier, now: Clock, other_key: rsa.RSAPrivateKey
) -> None:
    """That one was revoked may have been said while nobody here was listening."""
    token = indexed(issuer, 1)
    await verifier.verify(token)
    await connected(verifier)
    issuer.keys = [_public_jwk(other_key)]
    now.advance(10)
    issuer.streams[0].end()
    await until(lambda: len(issuer.streams) == 2 and issuer.kit.key_id not in verifier.status().keys)
    await refused(verifier, token, "unknown_key")


async def test_other_keys_that_could_not_be_fetched_are_asked_for_again(
    issuer: Issuer, verifier: Verifier, now: Clock, other_key: rsa.RSAPrivateKey
) -> None:
    token = indexed(issuer, 1)
    await verifier.verify(token)
    await connected(verifier)
    issuer.keys_answer = lambda request: httpx2.Response(503)
    issuer.streams[0].say("event: keys\ndata: {}\n\n")
    await until(lambda: issuer.keys_asked == 2)
    for pause in (1, 2, 4):
        now.advance(pause)
        await verifier.verify(token)
        await until(lambda: issuer.keys_asked >= 3)
    issuer.keys_answer, issuer.keys = None, [_public_jwk(other_key)]
    now.advance(8)
    await verifier.verify(token)
    await until(lambda: issuer.kit.key_id not in verifier.status().keys)
    assert issuer.requests[-1].headers["cache-control"] == "no-cache"
    await refused(verifier, token, "unknown_key")


async def test_the_time_of_day_may_leap_and_come_back(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In between, what the stream said looks expired and is forgotten; the list still has it."""
    monkeypatch.setattr(revocations_module, "_PRUNE_INTERVAL", 0)
    async with issuer.verifier() as verifier:
        steady = issuer.clock()
        verifier._revocations._clock = verifier._keys._clock = verifier._clock = lambda: steady
        token = indexed(issuer, 1)
        await verifier.verify(token)
        await connected(verifier)
        issuer.streams[0].revoked(1, exp=int(steady) + 600)
        issuer.revoked = {1}
        await until(lambda: bool(verifier._revocations._overlay))
        issuer.clock.advance(3600)
        await until(lambda: not verifier._revocations._overlay)
        issuer.clock.advance(-3600)
        await until(lambda: verifier._revocations._lists[LIST].says_revoked(1))
        await refused(verifier, token, "revoked")


async def test_an_event_without_an_end_holds_for_a_day(issuer: Issuer, verifier: Verifier, now: Clock) -> None:
    await verifier.verify(indexed(issuer, 1))
    await connected(verifier)
    issuer.streams[0].say(f'event: revoked\ndata: {{"uri": "{LIST}", "idx": 1}}\n\n')
    await until(lambda: bool(verifier._revocations._overlay))
    assert list(verifier._revocations._overlay.values()) == [now() + 86_400 + 30]


async def test_it_resumes_by_the_last_event_id(issuer: Issuer, verifier: Verifier, now: Clock) -> None:
    await verifier.verify(indexed(issuer, 1))
    await connected(verifier)
    issuer.streams[0].revoked(9, exp=int(now()) + 600, event_id="41")
    issuer.streams[0].end()
    await until(lambda: len(issuer.streams) == 2)
    events = [request for request in issuer.requests if request.url.path.endswith("/events")]
    assert "last-event-id" not in events[0].headers
    assert events[1].headers["last-event-id"] == "41"


async def test_what_was_revoked_between_two_connections_is_found_in_the_list(
    issuer: Issuer, verifier: Verifier
) -> None:
    token = indexed(issuer, 3)
    await verifier.verify(token)
    await connected(verifier)
    await until(lambda: verifier._revocations._lists[LIST].connection == 1)
    issuer.revoked = {3}
    issuer.streams[0].parts.put_nowait(httpx2.ReadError("cut"))
    await until(lambda: verifier._revocations._lists[LIST].connection == 2)
    await refused(verifier, token, "revoked")


async def test_a_list_fetched_while_the_stream_connects_is_fetched_again(issuer: Issuer) -> None:
    issuer.delay = 0.03
    async with issuer.verifier() as verifier:
        await verifier.verify(indexed(issuer, 1))
        await until(lambda: verifier._revocations._lists[LIST].connection == 1)
        assert issuer.asked("/status-lists/1") >= 2


async def test_what_only_a_replica_that_lags_behind_did_not_list_is_found_a_moment_later(
    issuer: Issuer, verifier: Verifier, now: Clock
) -> None:
    """Another replica told its followers just before we became one; the list we fetched then did not have it yet."""
    token = indexed(issuer, 3)
    await verifier.verify(token)
    await connected(verifier)
    await until(lambda: verifier._revocations._lists[LIST].connection == 1)
    issuer.revoked = {3}
    now.advance(2)
    await until(lambda: verifier._revocations._lists[LIST].says_revoked(3))
    await refused(verifier, token, "revoked")
    now.advance(10)
    await until(lambda: verifier._revocations._lists[LIST].looks == 3)
    asked = issuer.asked("/status-lists/1")
    now.advance(250)
    await asyncio.sleep(0.03)
    assert issuer.asked("/status-lists/1") == asked, "from here on the stream is enough"


async def test_after_an_outage_the_issuer_is_asked_again_within_the_ttl(issuer: Issuer, now: Clock) -> None:
    issuer.ttl = 15
    issuer.offers_stream = False
    token = indexed(issuer, 1)
    asked: list[int] = []
    async with issuer.verifier() as verifier:
        await verifier.verify(token)
        issuer.down = True
        for _ in range(12):
            now.advance(15)
            asked.append(issuer.asked("/status-lists/1"))
            await until(lambda: issuer.asked("/status-lists/1") > asked[-1])
        await asyncio.sleep(0.01)
        issuer.down, issuer.revoked = False, {1}
        now.advance(15)
        await until(lambda: verifier._revocations._lists[LIST].says_revoked(1))
        await refused(verifier, token, "revoked")


async def test_a_silent_stream_is_dead(issuer: Issuer, verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocations_module, "SILENCE", 0.03)
    await verifier.verify(indexed(issuer, 1))
    await until(lambda: len(issuer.streams) >= 3)


async def test_comments_keep_a_stream_alive(
    issuer: Issuer, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocations_module, "SILENCE", 1)
    await verifier.verify(indexed(issuer, 1))
    await connected(verifier)
    for _ in range(15):
        issuer.streams[0].say(":\n\n")
        await asyncio.sleep(0.1)
    assert len(issuer.streams) == 1


async def test_a_stream_that_floods_is_dropped(issuer: Issuer, verifier: Verifier) -> None:
    await verifier.verify(indexed(issuer, 1))
    await connected(verifier)
    issuer.streams[0].say("data: " + "x" * 70_000)
    await until(lambda: len(issuer.streams) == 2)


@pytest.mark.parametrize("answer", [httpx2.Response(200, content=b"x"), httpx2.Response(503)])
async def test_without_a_stream_the_lists_are_fetched_by_their_ttl(
    issuer: Issuer, verifier: Verifier, now: Clock, answer: httpx2.Response
) -> None:
    issuer.offers_stream = False
    issuer.ttl = 10
    token = indexed(issuer, 2)
    await verifier.verify(token)
    issuer.revoked = {2}
    now.advance(9)
    await asyncio.sleep(0.03)
    assert await verifier.verify(token)
    now.advance(2)
    await until(lambda: verifier._revocations._lists[LIST].says_revoked(2))
    assert issuer.asked("/status-lists/1") == 2
    await refused(verifier, token, "revoked")


@pytest.mark.parametrize(("ttl", "kept"), [(0, 1), (-5, 1), (10**9, 43_200), (None, 300), (60, 60)])
async def test_tsl5_ttl_is_clamped(issuer: Issuer, verifier: Verifier, ttl: int | None, kept: int) -> None:
    issuer.list_claims = {"ttl": ttl, "exp": None}
    await verifier.verify(indexed(issuer, 1))
    token = verifier._revocations._lists[LIST].token
    assert token is not None
    assert token.ttl == kept


async def test_an_unchanged_list_is_confirmed_by_304(issuer: Issuer, verifier: Verifier, now: Clock) -> None:
    issuer.offers_stream = False
    await verifier.verify(indexed(issuer, 1))
    now.advance(301)
    await until(lambda: issuer.asked("/status-lists/1") == 2)
    await until(lambda: verifier.status().lists == {LIST: 0})
    (_, second) = [request for request in issuer.requests if request.url.path == "/status-lists/1"]
    assert second.headers["if-none-match"] == '"[]"'


# When nothing is heard


@pytest.fixture
async def strict(issuer: Issuer) -> AsyncIterator[Verifier]:
    async with issuer.verifier(on_stale="reject", max_staleness=300) as verifier:
        yield verifier


async def test_on_stale_accept_takes_tokens_while_the_issuer_is_away(
    issuer: Issuer, verifier: Verifier, now: Clock
) -> None:
    await verifier.verify(indexed(issuer, 1))
    issuer.down = True
    for _ in range(6):
        now.advance(600)
        assert await verifier.verify(indexed(issuer, 1))
    age = verifier.status().lists[LIST]
    assert age is not None
    assert age >= 3600


@pytest.mark.parametrize("on_stale", ["accept", "reject"])
async def test_an_hour_without_the_issuer_refuses_no_valid_token_and_brings_none_back(
    issuer: Issuer, now: Clock, on_stale: OnStale
) -> None:
    """Keys, lists and the stream are gone together; tokens come from a replica that only we cannot reach."""
    issuer.revoked = {1}
    async with issuer.verifier(on_stale=on_stale, max_staleness=3700) as verifier:
        known, listed, told, later = (indexed(issuer, idx, lifetime=80_000) for idx in range(4))
        for token in (known, told, later):
            await verifier.verify(token)
        await connected(verifier)
        await until(lambda: verifier._revocations._lists[LIST].connection == 1)
        issuer.streams[0].revoked(2, exp=int(now()) + 80_000)
        await until(lambda: bool(verifier._revocations._overlay))
        issuer.down = True
        issuer.streams[0].parts.put_nowait(httpx2.ReadError("killed"))
        await until(lambda: not verifier.status().stream_connected)
        for _ in range(120):
            now.advance(30)
            for token in (known, later, indexed(issuer, 0), issuer.token(status=None)):
                assert await verifier.verify(token)
            for token in (listed, told):
                await refused(verifier, token, "revoked")
            await asyncio.sleep(0)
        issuer.down, issuer.revoked = False, {1, 2, 3}
        now.advance(31)
        await verifier.verify(known)
        await connected(verifier)
        await until(lambda: verifier.status().lists == {LIST: 0} and verifier.status().keys_age == 0)
        assert await verifier.verify(known)
        for token in (listed, told, later):
            await refused(verifier, token, "revoked")


async def test_on_stale_reject_refuses_after_max_staleness(issuer: Issuer, strict: Verifier, now: Clock) -> None:
    issuer.offers_stream = False
    token = indexed(issuer, 1, lifetime=3600)
    await strict.verify(token)
    issuer.down = True
    now.advance(299)
    assert await strict.verify(token)
    now.advance(2)
    await refused(strict, token, "keys_unavailable")
    await refused(strict, indexed(issuer, 2), "keys_unavailable")
    assert await strict.verify(issuer.token(status=None))
    issuer.down = False
    now.advance(31)
    await until(lambda: strict.status().lists == {LIST: 0})
    assert await strict.verify(token)


async def test_on_stale_reject_trusts_a_living_stream(issuer: Issuer, strict: Verifier, now: Clock) -> None:
    token = indexed(issuer, 1, lifetime=80_000)
    await strict.verify(token)
    await connected(strict)
    await until(lambda: strict._revocations._lists[LIST].connection == 1)
    issuer.list_answer = lambda request: httpx2.Response(500)
    for _ in range(10):
        now.advance(200)
        issuer.streams[0].say(":\n\n")
        await until(lambda: strict.status().lists == {LIST: 0})
        assert await strict.verify(token)
    # The stream ends: what it vouched for stays good for a while, not for ever.
    issuer.down = True
    issuer.streams[0].end()
    await until(lambda: not strict.status().stream_connected)
    assert await strict.verify(token)
    now.advance(301)
    await refused(strict, token, "keys_unavailable")


# Bounds


async def test_overlays_end_when_their_tokens_have_expired(issuer: Issuer, verifier: Verifier, now: Clock) -> None:
    await verifier.verify(indexed(issuer, 1))
    verifier.hear_revoked(StatusReference(LIST, 4), now() + 60)
    now.advance(89)
    await asyncio.sleep(0.02)
    assert verifier._revocations._overlay
    now.advance(31)
    await until(lambda: not verifier._revocations._overlay)


async def test_of_two_revocations_of_one_reference_the_later_end_counts(
    issuer: Issuer, verifier: Verifier, now: Clock
) -> None:
    """A session has several tokens, and a revocation names the end of one."""
    long = indexed(issuer, 4, lifetime=3600)
    await verifier.verify(long)
    for end in (3600, 60):
        verifier.hear_revoked(StatusReference(LIST, 4), now() + end)
    assert verifier._revocations._overlay[StatusReference(LIST, 4)] >= now() + 3600
    now.advance(200)
    verifier._revocations._prune_overlay()
    await refused(verifier, long, "revoked")


async def test_overlays_are_bounded(
    issuer: Issuer, verifier: Verifier, now: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocations_module, "MAX_OVERLAY", 10)
    await verifier.verify(indexed(issuer, 1))
    for idx in range(20):
        verifier.hear_revoked(StatusReference(LIST, idx), now() + 60)
        verifier.hear_revoked(StatusReference(LIST + "0", idx), now() + 60)
    assert len(verifier._revocations._overlay) <= 10


async def test_what_other_threads_add_while_overlays_are_pruned_is_not_lost(issuer: Issuer) -> None:
    verifier = issuer.verifier()
    revocations = verifier._revocations
    until_long = issuer.clock() + 60

    def hear(first: int) -> None:
        for idx in range(first, first + 20_000):
            verifier.hear_revoked(StatusReference(LIST, idx), until_long)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as threads:
            hearing = [threads.submit(hear, first) for first in (0, 20_000)]
            while not all(each.done() for each in hearing):
                revocations._prune_overlay()
    finally:
        sys.setswitchinterval(interval)
    assert len(revocations._overlay) == 40_000


async def test_lists_are_bounded_and_those_nobody_names_are_let_go(
    issuer: Issuer, verifier: Verifier, now: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocations_module, "MAX_LISTS", 3)
    monkeypatch.setattr(revocations_module, "_MISSED", 1e9)  # the clock's leaps below are no outages
    for number in range(10, 15):
        token = indexed(issuer, 1, f"{ISSUER}/status-lists/{number}", lifetime=80_000)
        await verifier.verify(token)
    assert len(verifier.status().lists) == 3
    first = indexed(issuer, 1, f"{ISSUER}/status-lists/10")
    await verifier.verify(first)
    waiter = asyncio.create_task(verifier.wait_revoked(await verifier.verify(first)))
    await asyncio.sleep(0)
    now.advance(86_401)
    await asyncio.sleep(0.3)
    now.advance(86_401)
    await until(lambda: list(verifier.status().lists) == [f"{ISSUER}/status-lists/10"])
    waiter.cancel()


async def test_a_new_list_takes_the_place_of_one_that_nobody_has_named_of_late(
    issuer: Issuer, verifier: Verifier, now: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocations_module, "MAX_LISTS", 2)
    monkeypatch.setattr(revocations_module, "_MISSED", 1e9)  # the clock's leap below is no outage
    lists = [f"{ISSUER}/status-lists/{number}" for number in (10, 11, 12)]
    for uri in lists[:2]:
        await verifier.verify(indexed(issuer, 1, uri))
    now.advance(86_401)
    await until(lambda: not any(held.used for held in verifier._revocations._lists.values()))
    for uri in (lists[0], lists[2]):
        await verifier.verify(indexed(issuer, 1, uri))
    assert list(verifier.status().lists) == [lists[0], lists[2]]


async def test_a_cached_token_whose_list_was_let_go_fetches_it_again(issuer: Issuer, verifier: Verifier) -> None:
    token = indexed(issuer, 1)
    await verifier.verify(token)
    verifier._revocations._lists.clear()
    issuer.revoked = {1}
    await refused(verifier, token, "revoked")


# Waiting for it


async def test_wait_revoked_by_the_stream_and_by_the_list(issuer: Issuer, verifier: Verifier, now: Clock) -> None:
    first, second, third = [await verifier.verify(indexed(issuer, idx)) for idx in (1, 2, 3)]
    await connected(verifier)
    waits = [asyncio.create_task(verifier.wait_revoked(claims)) for claims in (first, first, second, third)]
    await asyncio.sleep(0.01)
    issuer.streams[0].revoked(1, exp=int(now()) + 60)
    await asyncio.wait_for(asyncio.gather(*waits[:2]), 5)
    issuer.revoked = {2}
    issuer.streams[0].end()
    await asyncio.wait_for(waits[2], 5)
    assert not waits[3].done()
    waits[3].cancel()
    await asyncio.wait(waits)
    assert not verifier._revocations._waiters
    await asyncio.wait_for(verifier.wait_revoked(first), 5)
    await asyncio.wait_for(verifier.wait_revoked(second), 5)


@pytest.mark.parametrize("status", [{"status_list": {"idx": 1, "uri": LIST}}, None], ids=["with a status", "without"])
async def test_wait_revoked_by_the_end_of_the_key(
    issuer: Issuer, verifier: Verifier, now: Clock, other_key: rsa.RSAPrivateKey, status: Any
) -> None:
    """Whoever has stolen a key opens sockets with tokens of their own making, which no list names."""
    issuer.keys = [issuer.kit._jwk, _public_jwk(other_key)]
    claims = await verifier.verify(issuer.token(status=status))
    assert claims.key_id == issuer.kit._jwk["kid"]
    over = await verifier.verify(issuer.token(status=status, lifetime=60))
    now.advance(61)
    waits = [asyncio.create_task(verifier.wait_revoked(each)) for each in (claims, over)]
    await asyncio.sleep(0)
    issuer.keys = [_public_jwk(other_key)]
    verifier._keys.hear_changed()
    await asyncio.wait_for(asyncio.gather(*waits), 5)
    await asyncio.wait_for(verifier.wait_revoked(claims), 5)


async def test_a_key_that_goes_when_its_tokens_are_over_ends_nothing(
    issuer: Issuer, verifier: Verifier, now: Clock, other_key: rsa.RSAPrivateKey
) -> None:
    """Rotation retires it, and sockets live longer than tokens."""
    issuer.keys = [issuer.kit._jwk, _public_jwk(other_key)]
    claims = await verifier.verify(issuer.token())
    waiting = asyncio.create_task(verifier.wait_revoked(claims))
    await asyncio.sleep(0)
    now.advance(claims.expires - now() + 1)
    issuer.keys = [_public_jwk(other_key)]
    verifier._keys.hear_changed()
    await until(lambda: verifier._keys.has_lost(claims.key_id))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(waiting, 0.02)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(verifier.wait_revoked(claims), 0.02)


async def test_with_reject_nobody_waits_longer_than_others_are_let_in(issuer: Issuer, now: Clock) -> None:
    """And not until the issuer is back."""
    issuer.offers_stream = False
    async with issuer.verifier(on_stale="reject", max_staleness=300) as strict, issuer.verifier() as lenient:
        waits = [
            asyncio.create_task(each.wait_revoked(await each.verify(indexed(issuer, 1)))) for each in (strict, lenient)
        ]
        await asyncio.sleep(0.01)
        issuer.down = True
        now.advance(299)
        await asyncio.sleep(0.05)
        assert [wait.done() for wait in waits] == [False, False]
        now.advance(2)
        await asyncio.wait_for(waits[0], 5)
        assert not waits[1].done()
        waits[1].cancel()


async def test_everybody_is_woken_though_somebody_leaves_at_that_moment(
    issuer: Issuer, verifier: Verifier, now: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A revocation may be heard in another thread than theirs."""
    claims = await verifier.verify(indexed(issuer, 1))
    waiting = [asyncio.create_task(verifier.wait_revoked(claims)) for _ in range(3)]
    await asyncio.sleep(0)
    (waiters,) = verifier._revocations._waiters.values()
    loop = asyncio.get_running_loop()
    wake = loop.call_soon_threadsafe

    def leave(*call: Any) -> Any:
        if len(waiters) == 3:
            waiters.popitem()
        return wake(*call)

    monkeypatch.setattr(loop, "call_soon_threadsafe", leave)
    verifier.hear_revoked(StatusReference(LIST, 1), now() + 60)
    await asyncio.wait_for(asyncio.gather(*waiting), 5)


@pytest.mark.parametrize(("outage", "let_go"), [(99, [False, False]), (101, [True, False])])
async def test_who_waits_beyond_the_tokens_end_is_let_go_when_a_revocation_may_have_been_missed(
    issuer: Issuer, now: Clock, outage: int, let_go: list[bool]
) -> None:
    """The issuer keeps an entry for two minutes after the last token's end: nobody would ever hear of it again."""
    issuer.offers_stream = False
    issuer.ttl = 15
    async with issuer.verifier() as verifier:
        short, long = [await verifier.verify(indexed(issuer, idx, lifetime=60 + 7200 * (idx - 1))) for idx in (1, 2)]
        waits = [asyncio.create_task(verifier.wait_revoked(each)) for each in (short, long)]
        for _ in range(20):
            now.advance(15)
            await until(lambda: verifier.status().lists == {LIST: 0})
        now.advance(outage)
        await until(lambda: verifier.status().lists == {LIST: 0})
        await asyncio.sleep(0.01)
        assert [wait.done() for wait in waits] == let_go
        for wait in waits:
            wait.cancel()


async def test_two_wait_and_one_gives_up(issuer: Issuer, verifier: Verifier) -> None:
    claims = await verifier.verify(indexed(issuer, 1))
    waits = [asyncio.create_task(verifier.wait_revoked(claims)) for _ in range(2)]
    await asyncio.sleep(0)
    waits[0].cancel()
    await asyncio.wait(waits[:1])
    assert len(verifier._revocations._waiters) == 1
    # One that gives up in the very moment it is woken.
    verifier.hear_revoked(StatusReference(LIST, 1), issuer.clock() + 60)
    waits[1].cancel()
    await asyncio.sleep(0.01)
    assert waits[1].cancelled()


async def test_who_waits_with_a_token_of_another_key_goes_on_waiting(
    issuer: Issuer, verifier: Verifier, other_key: rsa.RSAPrivateKey
) -> None:
    issuer.keys = [issuer.kit._jwk, _public_jwk(other_key)]
    claims = await verifier.verify(issuer.token())
    waiting = asyncio.create_task(verifier.wait_revoked(claims))
    await asyncio.sleep(0)
    verifier._revocations.wake_those_of_keys({"another"})
    await asyncio.sleep(0.02)
    assert not waiting.done()
    for _ in range(2):  # the stream and the list may say so in the same moment
        verifier._revocations.wake_those_of_keys({claims.key_id})
    await asyncio.wait_for(waiting, 5)


async def test_an_index_that_is_no_longer_in_the_list_counts_as_revoked(issuer: Issuer, verifier: Verifier) -> None:
    claims = await verifier.verify(indexed(issuer, 1000))
    verifier._revocations._lists[LIST].statuses = status_list.StatusList(1, b"")
    await asyncio.wait_for(verifier.wait_revoked(claims), 1)


async def test_a_token_without_status_is_waited_for_in_vain(issuer: Issuer, verifier: Verifier) -> None:
    claims = await verifier.verify(issuer.token(status=None))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(verifier.wait_revoked(claims), 0.02)


def test_waking_a_loop_that_has_ended_is_nothing(issuer: Issuer) -> None:
    verifier = issuer.kit.verifier()
    token = issuer.token()

    async def wait() -> None:
        claims = await verifier.verify(token)
        reference = claims.status
        assert reference is not None
        waiter = asyncio.get_running_loop().create_future()
        verifier._revocations._waiters[reference] = {waiter: claims}

    asyncio.run(wait())
    issuer.kit.revoke(token)


async def test_a_list_from_the_future_says_what_was_revoked_all_the_same(issuer: Issuer) -> None:
    """Our clock may be behind by more than the leeway: nothing else would speak against the token."""
    issuer.revoked = {1}
    issuer.list_claims = {"iat": int(issuer.clock()) + 100}
    async with issuer.verifier() as verifier:
        await refused(verifier, indexed(issuer, 1), "revoked")


async def test_a_stream_that_is_cut_again_and_again_is_a_failure_each_time(
    issuer: Issuer, verifier: Verifier, now: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """By a proxy, say: each time every list is asked for, so that it must become rarer. Said once, until it lasted."""

    async def cut(times: int, *, after: float) -> None:
        for _ in range(times):
            opened = len(issuer.streams)
            await connected(verifier)
            now.advance(after)
            issuer.streams[-1].say(": still here\n\n")
            issuer.streams[-1].end()
            await until(lambda: len(issuer.streams) > opened)  # noqa: B023 - waited for at once

    def told() -> int:
        return [record.message.partition(":")[0] for record in caplog.records].count("verifier.stream_unsteady")

    await verifier.verify(indexed(issuer, 1))
    await cut(2, after=9)
    assert told() == 0
    await cut(5, after=9)
    assert told() == 1
    await cut(7, after=11)
    assert told() == 1
    await cut(5, after=0)
    assert told() == 2


def test_a_call_in_a_thread_follows_nothing_of_its_own(issuer: Issuer) -> None:
    """A route that is no coroutine may verify in a loop of its own, beside the one in which the issuer is followed."""
    verifier = issuer.verifier()

    async def main() -> None:
        await verifier.verify(indexed(issuer, 1))
        await connected(verifier)
        tasks = len(asyncio.all_tasks())
        for _ in range(5):
            await asyncio.to_thread(lambda: asyncio.run(_verify_another(verifier, issuer)))
            await verifier.verify(indexed(issuer, 3))
        assert len(issuer.streams) == 1
        assert len(asyncio.all_tasks()) == tasks
        await asyncio.to_thread(lambda: asyncio.run(verifier.aclose()))
        await until(lambda: len(asyncio.all_tasks()) == 1)

    asyncio.run(main())


async def _verify_another(verifier: Verifier, issuer: Issuer) -> None:
    await verifier.verify(indexed(issuer, 2))


async def test_a_stream_of_which_nothing_comes_is_a_failure_however_long_it_lasts(
    issuer: Issuer, verifier: Verifier, now: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A proxy holds it back."""
    await verifier.verify(indexed(issuer, 1))
    for number in range(1, 5):
        await until(lambda number=number: len(issuer.streams) == number and verifier.status().stream_connected)  # type: ignore[misc]
        now.advance(16)
        issuer.streams[-1].end()
    await until(lambda: "verifier.stream_unsteady" in caplog.text)


def test_whoever_waits_in_a_second_loop_is_told_after_the_first_has_ended(
    issuer: Issuer, now: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which followed the issuer for both."""
    monkeypatch.setattr(revocations_module, "_WATCH", 0.5)
    verifier = issuer.verifier()
    first = asyncio.new_event_loop()
    first.run_until_complete(verifier.verify(indexed(issuer, 1)))
    running = threading.Thread(target=first.run_forever)
    running.start()

    async def second() -> None:
        claims = await verifier.verify(indexed(issuer, 2))
        waiting = asyncio.create_task(verifier.wait_revoked(claims))
        await asyncio.sleep(0.1)
        assert len(issuer.streams) == 1
        first.call_soon_threadsafe(first.stop)
        await asyncio.to_thread(running.join)
        await until(lambda: len(issuer.streams) == 2)
        issuer.streams[-1].revoked(2, exp=int(now()) + 60)
        await asyncio.wait_for(waiting, 5)
        await verifier.aclose()

    asyncio.run(second())
    first.run_until_complete(asyncio.sleep(0.05))  # what it had begun is cancelled
    assert not asyncio.all_tasks(first)
    first.run_until_complete(verifier.aclose())
    first.close()


async def test_however_many_wait_they_are_looked_after_together_and_nobody_once_they_have_gone(
    issuer: Issuer, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten thousand sockets with a timer each would hold up the loop for a quarter of a second every two seconds."""
    monkeypatch.setattr(revocations_module, "_WATCH", 0.02)
    claims, silent = await verifier.verify(indexed(issuer, 1)), await verifier.verify(issuer.token(status=None))
    revocations, looks = verifier._revocations, 0

    def look() -> None:
        nonlocal looks
        looks += 1

    monkeypatch.setattr(revocations, "keep_following", look)
    lasting = asyncio.create_task(verifier.wait_revoked(silent))
    waiting = [asyncio.create_task(verifier.wait_revoked(claims)) for _ in range(1000)]
    await until(lambda: looks >= 3)
    await asyncio.sleep(0)
    assert looks < 20
    for each in waiting:
        each.cancel()
    await asyncio.wait(waiting)
    await until(lambda: not revocations._watching)
    looked = looks
    await asyncio.sleep(0.1)
    assert looks == looked
    waiting = [asyncio.create_task(verifier.wait_revoked(claims))]
    await until(lambda: looks > looked + 1)
    for each in (*waiting, lasting):
        each.cancel()
    await asyncio.wait((*waiting, lasting))


async def test_a_token_without_status_is_waited_for_without_following_anybody(
    issuer: Issuer, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocations_module, "_WATCH", 0.005)
    claims = await verifier.verify(issuer.token(status=None))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(verifier.wait_revoked(claims), 0.05)
    assert not issuer.streams


def test_two_loops_that_begin_at_once_start_one_listener(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = issuer.verifier()
    revocations = verifier._revocations
    is_followed, both = revocations._is_followed, threading.Barrier(2)

    def look_at_once() -> bool:
        answer = is_followed()
        if not revocations._starting.locked():
            both.wait(10)
        return answer

    async def begin() -> None:
        revocations.keep_following()
        started.append(revocations._tasks[0])
        both.wait(10)
        await verifier.aclose()

    started: list[Any] = []
    monkeypatch.setattr(revocations, "_is_followed", look_at_once)
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(asyncio.run, begin()) for _ in range(2)]:
            future.result()
    assert len(set(started)) == 1


def test_a_loop_that_stands_still_follows_for_nobody(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocations_module, "_WATCH", 0.05)
    verifier = issuer.verifier()
    over = threading.Event()

    async def first() -> None:
        await verifier.verify(indexed(issuer, 1))
        await connected(verifier)
        over.wait(10)  # in the way of everything else in this loop
        await asyncio.sleep(0.05)

    async def second() -> None:
        await until(lambda: verifier.status().stream_connected)
        await asyncio.sleep(0.1)
        await verifier.verify(indexed(issuer, 2))
        await until(lambda: len(issuer.streams) == 2)
        over.set()
        await asyncio.to_thread(blocked.join)
        assert verifier.status().stream_connected, "the end of the first loop's stream says nothing of this one's"
        await verifier.aclose()

    blocked = threading.Thread(target=lambda: asyncio.run(first()))
    blocked.start()
    asyncio.run(second())


async def test_what_asks_the_issuer_has_nothing_of_the_request_that_began_it(issuer: Issuer) -> None:
    """Its log lines would bear that request's id for ever."""
    seen = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request_id.get(""))
        return (
            issuer._list(request) if "lists" in request.url.path else httpx2.Response(200, json={"keys": issuer.keys})
        )

    issuer.keys_answer = issuer.list_answer = answer
    request_id.set("of the first request")
    async with issuer.verifier() as verifier:
        await verifier.verify(indexed(issuer, 1))
        await connected(verifier)
        await until(lambda: len(seen) >= 2)
    assert set(seen) == {""}


def test_following_goes_on_in_another_loop(issuer: Issuer) -> None:
    verifier = issuer.verifier()

    async def once(*, revoked: bool) -> None:
        if revoked:
            await refused(verifier, token, "revoked")
            return
        await verifier.verify(token)
        await connected(verifier)

    token = indexed(issuer, 1)
    asyncio.run(once(revoked=False))
    issuer.revoked = {1}
    issuer.clock.advance(250)

    async def again() -> None:
        await verifier.verify(indexed(issuer, 2))
        await until(lambda: verifier._revocations._lists[LIST].connection == 2)
        await refused(verifier, token, "revoked")
        await verifier.aclose()
        assert not verifier.status().stream_connected

    asyncio.run(again())
    asyncio.run(verifier.aclose())


# Events


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_events_arrive_in_any_pieces(size: int) -> None:
    text = (
        b": comment\nid: 1\nevent: revoked\r\ndata: a\rdata:b\n\n"
        b"data\n\nid: \x01\nid: 2\n\nretry: 5\nunknown: x\ndata: c\n\n"
    )
    reader = EventReader("0")
    events = [event for start in range(0, len(text), size) for event in reader.feed(text[start : start + size])]
    assert events == [Event("revoked", "a\nb", "1"), Event("message", "", "1"), Event("message", "c", "2")]
    assert reader.last_id == "2"


@pytest.mark.parametrize(
    "parts", [[b"data: " + b"x" * 70_000], [b"data: xxxxxxxxxx\n"] * 7000, [b"data: \xff\n"], [b"x" * 40_000] * 2]
)
def test_events_that_are_too_long_or_not_text_end_the_stream(parts: list[bytes]) -> None:
    reader = EventReader()
    with pytest.raises(ValueError):
        _ = [reader.feed(part) for part in parts]
