"""KEY-6: the issuer's keys as a client should hold them."""

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import formatdate
from typing import Any

import httpx2
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from identity_service.verifier import Claims, TokenRejected, Verifier, jws
from identity_service.verifier.http import FetchFailed
from identity_service.verifier.jws import encode_base64url
from identity_service.verifier.keys import ALGORITHMS, parse
from identity_service.verifier.testing import TestIssuer, _number, _public_jwk
from tests.verifier.conftest import AUDIENCE, Clock, Issuer, until


@pytest.fixture
async def quiet(issuer: Issuer) -> Verifier:
    """A verifier that asks for keys only."""
    return issuer.verifier(follow_revocations=False)


async def test_keys_are_fetched_once(issuer: Issuer, quiet: Verifier) -> None:
    assert quiet.status().keys_age is None
    for _ in range(5):
        await quiet.verify(issuer.token())
    assert issuer.keys_asked == 1
    assert quiet.status().keys_age == 0
    assert quiet.status().keys == (issuer.kit.key_id,)


async def test_a_hundred_first_requests_share_one_fetch(issuer: Issuer, quiet: Verifier) -> None:
    issuer.delay = 0.02
    await asyncio.gather(*(quiet.verify(issuer.token()) for _ in range(100)))
    assert issuer.keys_asked == 1


async def test_a_caller_who_gives_up_does_not_take_the_fetch_with_it(issuer: Issuer, quiet: Verifier) -> None:
    issuer.delay = 0.05
    impatient = asyncio.create_task(quiet.verify(issuer.token()))
    patient = asyncio.create_task(quiet.verify(issuer.token()))
    await asyncio.sleep(0.01)
    impatient.cancel()
    assert (await patient).subject
    assert issuer.keys_asked == 1


async def test_keys_are_renewed_before_max_age_without_anyone_waiting(
    issuer: Issuer, quiet: Verifier, now: Clock
) -> None:
    token = issuer.token()
    await quiet.verify(token)
    now.advance(241)
    issuer.delay = 0.5
    await asyncio.wait_for(quiet.verify(token), 0.4)
    await quiet.verify(token)
    await until(lambda: quiet.status().keys_age == 0)
    assert issuer.keys_asked == 2


async def test_after_a_pause_the_first_request_waits_for_the_issuers_word(
    issuer: Issuer, quiet: Verifier, now: Clock, other_key: rsa.RSAPrivateKey
) -> None:
    """A key revoked during a quiet night does not verify in the morning."""
    token = issuer.token(lifetime=80_000)
    await quiet.verify(token)
    issuer.keys = [_public_jwk(other_key)]
    now.advance(40_000)
    with pytest.raises(TokenRejected, match="unknown_key"):
        await quiet.verify(token)
    assert quiet.status().cached_tokens == 0


async def test_cache_ends_when_its_key_is_removed_or_replaced(
    issuer: Issuer, quiet: Verifier, now: Clock, other_key: rsa.RSAPrivateKey
) -> None:
    token = issuer.token(lifetime=3600)
    await quiet.verify(token)
    issuer.keys.append(_public_jwk(other_key))
    now.advance(301)
    await quiet.verify(token)
    assert quiet.status().cached_tokens == 1, "a key more ends nothing"
    issuer.keys[0] = _public_jwk(other_key) | {"kid": issuer.kit.key_id}
    now.advance(301)
    with pytest.raises(TokenRejected, match="bad_signature"):
        await quiet.verify(token)


async def test_cache_ends_when_its_key_is_found_gone_while_another_is_looked_for(
    issuer: Issuer, quiet: Verifier, other_key: rsa.RSAPrivateKey
) -> None:
    token = issuer.token()
    await quiet.verify(token)
    issuer.keys = [_public_jwk(other_key)]
    with pytest.raises(TokenRejected, match="unknown_key"):
        await quiet.verify(issuer.kit.sign({}, kid="another"))
    with pytest.raises(TokenRejected, match="unknown_key"):
        await quiet.verify(token)


async def test_f3_cache_ends_when_its_key_is_for_another_algorithm_now(issuer: Issuer, now: Clock) -> None:
    verifier = issuer.verifier(algorithms=("RS256", "PS256"), follow_revocations=False)
    token = issuer.token(lifetime=3600)
    await verifier.verify(token)
    issuer.keys[0] = issuer.keys[0] | {"alg": "PS256"}
    now.advance(301)
    with pytest.raises(TokenRejected, match="wrong_algorithm"):
        await verifier.verify(token)


@pytest.mark.parametrize(
    ("headers", "lifetime"),
    [
        ({"Cache-Control": "public, max-age=100"}, 100),
        ({"Cache-Control": 'Max-Age="100"'}, 100),
        ({"Cache-Control": "max-age=100", "Age": "60"}, 40),
        ({"Cache-Control": "max-age=100", "Age": "soon"}, 100),
        ({"Cache-Control": "max-age=1"}, 30),
        ({"Cache-Control": "s-maxage=9, max-age=99999999"}, 86_400),
        ({"Cache-Control": "no-store"}, 30),
        ({}, 300),
    ],
)
async def test_max_age_is_honoured_between_floor_and_ceiling(
    issuer: Issuer, now: Clock, headers: dict[str, str], lifetime: float
) -> None:
    issuer.keys_headers = headers
    quiet = issuer.verifier(follow_revocations=False, max_key_age=1e9)
    token = issuer.token(lifetime=86_400)
    await quiet.verify(token)
    now.advance(lifetime * 0.79)
    await quiet.verify(token)
    await asyncio.sleep(0.01)
    assert issuer.keys_asked == 1
    now.advance(lifetime * 0.02)
    await quiet.verify(issuer.token())
    await asyncio.sleep(0.01)
    assert issuer.keys_asked == 2


async def test_issuer_down_for_an_hour_refuses_no_valid_token(issuer: Issuer, quiet: Verifier, now: Clock) -> None:
    await quiet.verify(issuer.token())
    issuer.down = True
    for _ in range(360):
        now.advance(10)
        await quiet.verify(issuer.token())
        await asyncio.sleep(0)
    assert issuer.keys_asked <= 1 + 3600 / 30 + 10
    issuer.down = False
    now.advance(31)
    await quiet.verify(issuer.token())
    await until(lambda: quiet.status().keys_age == 0)


async def test_keys_that_were_not_confirmed_for_a_day_are_not_used(issuer: Issuer, quiet: Verifier, now: Clock) -> None:
    await quiet.verify(issuer.token())
    issuer.down = True
    now.advance(86_399)
    token = issuer.token()
    await quiet.verify(token)
    now.advance(2)
    for unverified_token in (token, issuer.token()):
        with pytest.raises(TokenRejected, match="keys_unavailable"):
            await quiet.verify(unverified_token)
    issuer.down = False
    now.advance(60)
    assert await quiet.verify(token)


async def test_a_failed_first_fetch_is_tried_again_after_a_pause_and_does_not_stampede(
    issuer: Issuer, quiet: Verifier, now: Clock
) -> None:
    issuer.down = True
    outcomes = await asyncio.gather(*(quiet.verify(issuer.token()) for _ in range(50)), return_exceptions=True)
    assert {getattr(outcome, "reason", None) for outcome in outcomes} == {"keys_unavailable"}
    with pytest.raises(TokenRejected, match="keys_unavailable"):
        await quiet.verify(issuer.token())
    assert issuer.keys_asked == 1
    issuer.down = False
    now.advance(1.1)
    assert await quiet.verify(issuer.token())
    assert issuer.keys_asked == 2


async def test_an_answer_of_304_confirms_no_keys_that_were_never_had(issuer: Issuer, verifier: Verifier) -> None:
    issuer.keys_answer = lambda request: httpx2.Response(304)
    with pytest.raises(TokenRejected, match="keys_unavailable"):
        await verifier.verify(issuer.token())


BROKEN: dict[str, Any] = {
    "500": lambda request: httpx2.Response(500),
    "404": lambda request: httpx2.Response(404),
    "garbage": lambda request: httpx2.Response(200, content=b"<html>"),
    "not_an_object": lambda request: httpx2.Response(200, content=b"[]"),
    "no_keys": lambda request: httpx2.Response(200, json={"keys": []}),
    "keys_not_an_array": lambda request: httpx2.Response(200, json={"keys": {}}),
    "too_long": lambda request: httpx2.Response(200, content=b" " * 300_000),
    "timeout": lambda request: httpx2.ReadTimeout("slow"),
    "F12_redirect": lambda request: httpx2.Response(302, headers={"Location": "https://evil.example/jwks.json"}),
    "F12_redirect_to_a_file": lambda request: httpx2.Response(302, headers={"Location": "file:///etc/passwd"}),
    "compressed": lambda request: httpx2.Response(
        200, headers={"Content-Encoding": "br"}, stream=httpx2.ByteStream(b"")
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
async def test_f13_a_broken_answer_takes_no_key_away(issuer: Issuer, quiet: Verifier, now: Clock, broken: str) -> None:
    await quiet.verify(issuer.token())
    issuer.keys_answer = BROKEN[broken]
    for _ in range(4):
        now.advance(400)
        await quiet.verify(issuer.token())
        await asyncio.sleep(0.005)
    assert issuer.keys_asked > 1
    assert {request.url.host for request in issuer.requests} == {"id.example.com"}


@pytest.mark.parametrize("broken", BROKEN)
async def test_a_broken_first_answer_is_keys_unavailable(issuer: Issuer, quiet: Verifier, broken: str) -> None:
    issuer.keys_answer = BROKEN[broken]
    with pytest.raises(TokenRejected, match="keys_unavailable"):
        await quiet.verify(issuer.token())


async def test_an_answer_that_trickles_in_is_given_up(
    issuer: Issuer, quiet: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("identity_service.verifier.http.TIMEOUT", 0.02)
    issuer.delay = 1
    with pytest.raises(TokenRejected, match="keys_unavailable"):
        await quiet.verify(issuer.token())


async def test_unchanged_keys_are_confirmed_by_304(issuer: Issuer, quiet: Verifier, now: Clock) -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.headers.get("if-none-match") == '"1"':
            return httpx2.Response(304, headers=issuer.keys_headers)
        return httpx2.Response(200, json={"keys": issuer.keys}, headers=issuer.keys_headers | {"ETag": '"1"'})

    issuer.keys_answer = answer
    await quiet.verify(issuer.token())
    now.advance(301)
    await quiet.verify(issuer.token())
    assert issuer.keys_asked == 2
    assert quiet.status().keys_age == 0


async def test_a_new_key_is_found_at_once(
    issuer: Issuer, quiet: Verifier, now: Clock, other_key: rsa.RSAPrivateKey
) -> None:
    """Even when keys were fetched a moment ago: the cooldown is between refetches, not after any fetch."""
    await quiet.verify(issuer.token())
    issuer.kit._key, issuer.kit._jwk = other_key, _public_jwk(other_key)
    issuer.keys.append(issuer.kit._jwk)
    assert await quiet.verify(issuer.token())
    assert issuer.keys_asked == 2


async def test_p16_f11_ten_thousand_random_kids_cause_one_fetch_per_cooldown(
    issuer: Issuer, quiet: Verifier, now: Clock, other_key: rsa.RSAPrivateKey
) -> None:
    good = issuer.token()
    await quiet.verify(good)
    payload, signature = good.split(".")[1:]

    async def flood(start: int) -> None:
        async def one(number: int) -> None:
            head = json.dumps({"alg": "RS256", "typ": "at+jwt", "kid": f"k{number}"}).encode()
            with pytest.raises(TokenRejected, match="unknown_key"):
                await quiet.verify(f"{encode_base64url(head)}.{payload}.{signature}")

        await asyncio.gather(*(one(number) for number in range(start, start + 5000)))
        await quiet.verify(good)
        await quiet.verify(issuer.token())

    await flood(0)
    assert issuer.keys_asked == 2
    now.advance(29)
    await flood(5000)
    assert issuer.keys_asked == 2
    now.advance(2)
    await flood(10_000)
    assert issuer.keys_asked == 3
    issuer.kit._key, issuer.kit._jwk = other_key, _public_jwk(other_key)
    issuer.keys.append(issuer.kit._jwk)
    now.advance(31)
    assert await quiet.verify(issuer.token()), "a real new key is found in spite of it"


async def test_unknown_kids_while_the_issuer_is_down_harm_nobody(
    issuer: Issuer, quiet: Verifier, now: Clock, other_key: rsa.RSAPrivateKey
) -> None:
    await quiet.verify(issuer.token())
    issuer.down = True
    known = issuer.kit._key, issuer.kit._jwk
    for _ in range(40):
        issuer.kit._jwk = issuer.kit._jwk | {"kid": f"unknown{int(now())}"}
        with pytest.raises(TokenRejected, match="unknown_key"):
            await quiet.verify(issuer.token())
        issuer.kit._key, issuer.kit._jwk = known
        assert await quiet.verify(issuer.token())
        now.advance(5)
    assert issuer.keys_asked <= 1 + 200 / 30 + 1


async def test_a_kid_that_was_unknown_is_asked_for_once_in_a_cooldown(
    issuer: Issuer, quiet: Verifier, now: Clock, other_key: rsa.RSAPrivateKey
) -> None:
    """F11: also when it was asked for before it was published, nothing but its tokens come, and nobody says so."""
    issuer.keys_headers = {"Cache-Control": "max-age=86400"}
    await quiet.verify(issuer.token())
    issuer.kit._key, issuer.kit._jwk = other_key, _public_jwk(other_key)
    for asked, wait in ((2, 29), (2, 2), (3, 0), (3, 31)):
        with pytest.raises(TokenRejected, match="unknown_key"):
            await quiet.verify(issuer.token())
        assert issuer.keys_asked == asked
        now.advance(wait)
    issuer.keys.append(issuer.kit._jwk)
    assert await quiet.verify(issuer.token())


def jwk(issuer: Issuer, **members: Any) -> dict[str, Any]:
    return {name: value for name, value in (issuer.kit._jwk | members).items() if value is not None}


@pytest.mark.parametrize(
    "members",
    [
        {"use": "enc"},
        {"use": None},
        {"alg": None},
        {"alg": "RS512"},
        {"alg": ["RS256"]},
        {"kid": None},
        {"kid": 7},
        {"kid": "../x"},
        {"kty": "oct", "k": "c2VjcmV0"},
        {"kty": "EC"},
        {"kty": None},
        {"d": "AQAB"},
        {"p": "AQAB"},
        {"n": None},
        {"n": 7},
        {"n": "====="},
        {"n": "AQAB"},
        {"n": "_" * 1400},
        {"e": "AQ"},
        {"e": "Ag"},
        {"e": "_" * 64},
        {"n": _number((1 << 2047) + 2)},
        {"n": _number((1 << 1024) + 1)},
    ],
)
async def test_a_bad_entry_is_passed_over(issuer: Issuer, quiet: Verifier, members: dict[str, Any]) -> None:
    issuer.keys = [jwk(issuer, **({"kid": "bad"} | members)), "nonsense", None, issuer.kit._jwk]  # type: ignore[list-item]
    assert await quiet.verify(issuer.token())
    assert quiet.status().keys == (issuer.kit.key_id,)


def test_the_first_of_two_keys_with_one_id_counts(issuer: Issuer, other_key: rsa.RSAPrivateKey) -> None:
    second = _public_jwk(other_key) | {"kid": issuer.kit.key_id}
    keys = parse(json.dumps({"keys": [issuer.kit._jwk, second]}).encode(), {"RS256"})
    assert keys[issuer.kit.key_id].public == issuer.kit._key.public_key()


def test_more_keys_than_anyone_needs_are_not_looked_at(issuer: Issuer) -> None:
    with pytest.raises(FetchFailed):
        parse(json.dumps({"keys": [{}] * 100 + [issuer.kit._jwk]}).encode(), {"RS256"})


def elliptic(curve: ec.EllipticCurve, name: str) -> tuple[Any, dict[str, str]]:
    key = ec.generate_private_key(curve)
    numbers = key.public_key().public_numbers()
    size = (curve.key_size + 7) // 8
    return key, {
        "kty": "EC",
        "crv": name,
        "x": encode_base64url(numbers.x.to_bytes(size)),
        "y": encode_base64url(numbers.y.to_bytes(size)),
    }


def edwards() -> tuple[Any, dict[str, str]]:
    key = ed25519.Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return key, {"kty": "OKP", "crv": "Ed25519", "x": encode_base64url(public)}


@pytest.mark.parametrize(
    ("algorithm", "make"),
    [
        ("ES256", lambda: elliptic(ec.SECP256R1(), "P-256")),
        ("ES384", lambda: elliptic(ec.SECP384R1(), "P-384")),
        ("ES512", lambda: elliptic(ec.SECP521R1(), "P-521")),
        ("EdDSA", edwards),
        ("Ed25519", edwards),
    ],
)
async def test_other_algorithms_by_name(issuer: Issuer, algorithm: str, make: Any) -> None:
    key, members = make()
    entry = members | {"kid": "other", "use": "sig", "alg": algorithm}
    issuer.keys.append(entry)
    signing_input = ".".join(
        encode_base64url(json.dumps(part).encode())
        for part in (
            {"alg": algorithm, "typ": "at+jwt", "kid": "other"},
            jws.parse_object(jws.take_apart(issuer.token().encode()).payload()),
        )
    )
    signature = encode_base64url(ALGORITHMS[algorithm].sign(signing_input.encode(), key))
    token = f"{signing_input}.{signature}"
    assert await issuer.verifier(algorithms=("RS256", algorithm), follow_revocations=False).verify(token)
    with pytest.raises(TokenRejected, match="wrong_algorithm"):
        await issuer.verifier(follow_revocations=False).verify(token)
    for wrong in ({"crv": "secp256k1"}, {"kty": "RSA"}, {"x": "AA"}):
        issuer.keys = [entry | wrong, issuer.kit._jwk]
        with pytest.raises(TokenRejected, match="unknown_key"):
            await issuer.verifier(algorithms=("RS256", algorithm), follow_revocations=False).verify(token)


async def test_pss_by_name(issuer: Issuer) -> None:
    issuer.keys = [issuer.kit._jwk | {"alg": "PS256"}]
    start = issuer.kit.sign(jws.parse_object(jws.take_apart(issuer.token().encode()).payload()), alg="PS256")
    signing_input = start.rpartition(".")[0].encode()
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    signature = issuer.kit._key.sign(signing_input, pss, hashes.SHA256())
    token = f"{signing_input.decode()}.{encode_base64url(signature)}"
    assert await issuer.verifier(algorithms=("PS256",), follow_revocations=False).verify(token)


@pytest.mark.parametrize(
    ("headers", "skew"),
    [
        ({"Date": formatdate(1_795_000_100, usegmt=True)}, 100),
        ({"Date": formatdate(1_795_000_000 - 100, usegmt=True), "Age": "95"}, -5),
        ({"Date": "yesterday"}, None),
        ({}, None),
    ],
)
async def test_clock_skew_is_measured_and_logged_when_it_matters(
    issuer: Issuer,
    quiet: Verifier,
    caplog: pytest.LogCaptureFixture,
    headers: dict[str, str],
    skew: float | None,
) -> None:
    issuer.keys_headers = headers
    with caplog.at_level(logging.WARNING, "identity_service.verifier"):
        await quiet.verify(issuer.token())
    assert quiet.status().clock_skew == skew
    assert ("clock_skew" in caplog.text) == (skew == 100)


def test_one_verifier_serves_one_event_loop_after_another(issuer: Issuer) -> None:
    verifier = issuer.verifier()
    for _ in range(3):
        assert asyncio.run(verifier.verify(issuer.token())).subject
        issuer.clock.advance(301)
    assert issuer.keys_asked == 3


def test_a_fetch_of_a_loop_that_ended_is_started_again(issuer: Issuer) -> None:
    verifier = issuer.verifier(follow_revocations=False)

    async def give_up() -> None:
        issuer.delay = 10
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(verifier.verify(issuer.token()), 0.01)

    asyncio.run(give_up())
    issuer.delay = 0
    assert asyncio.run(verifier.verify(issuer.token()))


async def test_a_key_that_goes_while_its_token_is_put_aside_leaves_none_behind(
    issuer: Issuer, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may take it away at any moment."""
    put, token = verifier._cache.put, issuer.token()

    def overtaken(digest: bytes, claims: Claims) -> None:
        put(digest, claims)
        monkeypatch.setattr(verifier._keys, "_keys", {})

    monkeypatch.setattr(verifier._cache, "put", overtaken)
    await verifier.verify(token)
    assert len(verifier._cache) == 0
    assert verifier._known_key(token.partition(".")[0].encode()) is None


@asynccontextmanager
async def at_a_socket(tls: ssl.SSLContext | None = None) -> AsyncIterator[TestIssuer]:
    """Let an issuer that has keys and nothing else answer on this machine."""
    kit = TestIssuer("http://127.0.0.1", AUDIENCE)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = json.dumps({"keys": [kit._jwk]}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=tls)
    async with server:
        scheme = "http" if tls is None else "https"
        kit.issuer = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield kit


async def test_a_real_issuer_on_this_machine_is_asked_over_http() -> None:
    """Without a transport handed in: a socket, and no proxy between us."""
    async with (
        at_a_socket() as kit,
        Verifier(kit.issuer, audience=AUDIENCE, follow_revocations=False) as verifier,
    ):
        assert (await verifier.verify(kit.token())).audience == (AUDIENCE,)
        assert await verifier.verify(kit.token(status=None))


async def test_keys_from_whoever_nobody_vouches_for_are_not_taken(
    impostor: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        at_a_socket(impostor) as kit,
        Verifier(kit.issuer, audience=AUDIENCE, follow_revocations=False) as verifier,
    ):
        with pytest.raises(TokenRejected, match="keys_unavailable"):
            await verifier.verify(kit.token())
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text
