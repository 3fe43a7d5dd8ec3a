"""What verifying costs other services: P11 to P16 of the goals."""

import asyncio
import json
import random
import secrets
import time
import tracemalloc
import zlib
from base64 import urlsafe_b64encode
from collections.abc import Callable, Coroutine, MutableMapping
from contextlib import suppress
from importlib.util import find_spec
from typing import Annotated, Any

import httpx2
import jwt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from fastapi import Depends, FastAPI
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from bench.deployment import CHEAP_HASHES, installation
from bench.frame import Contestant, Measurement, each, each_awaited, finish, in_turns, percentile
from bench.issuer import AUDIENCE, ISSUER, Issuer
from identity_service.revocation import LIST_SIZE
from identity_service.verifier import Claims, TokenRejected, Verifier, status_list
from identity_service.verifier import jws as envelope
from identity_service.verifier.fastapi import Bearer
from identity_service.verifier.keys import COOLDOWN

_CLAIMS = ["exp", "iat", "sub", "jti", "client_id"]
_REVOCATIONS = 100


async def uncached() -> list[Measurement]:
    """P11. A small cache always misses, so that remembering is paid for; the limit is the signature alone."""
    issuer = Issuer()
    tokens = issuer.tokens(25)
    verifier = issuer.verifier(cache_size=8)
    apart = [envelope.take_apart(token.encode()) for token in tokens]
    verify, scheme, digest = issuer.key.public.verify, padding.PKCS1v15(), hashes.SHA256()
    contestants = {
        "raw RSA-2048 verify": each(lambda one: verify(one.signature, one.signing_input, scheme, digest), apart),
        "verifier": each_awaited(verifier.verify, tokens),
    }
    key = jwt.PyJWK(json.loads(issuer.jwks)["keys"][0])
    contestants["PyJWT, key prepared"] = each(lambda token: _pyjwt(token, key), tokens)
    client = _KeysAtHand(issuer.jwks)
    contestants["PyJWT with PyJWKClient"] = each(
        lambda token: _pyjwt(token, client.get_signing_key_from_jwt(token)), tokens
    )
    if joserfc := _joserfc(issuer.jwks):
        contestants["joserfc"] = each(joserfc, tokens)
    async with verifier:
        await verifier.verify(tokens[0])
        taken = in_turns(contestants, seconds=5)
    limit = taken.pop("raw RSA-2048 verify")
    ours = taken.pop("verifier")
    beside = {"raw RSA-2048 verify": f"{limit * 1e6:.1f} us", "verifier": f"{ours * 1e6:.1f} us"}
    beside |= {name: f"{seconds / limit:.2f} x" for name, seconds in taken.items()}
    if joserfc is None:
        beside["joserfc"] = "skipped: make bench-peers measures it"
    return [Measurement("P11", "verifier, token seen for the first time / raw verify", ours / limit, "x", 1.5, beside)]


async def cached() -> list[Measurement]:
    """P12. A few tokens in turn, as a service sees them; `on_stale="reject"` has to look closer each time."""
    issuer = Issuer()
    tokens = issuer.tokens(25)
    verifier, strict = issuer.verifier(), issuer.verifier(on_stale="reject")

    async def nothing(_token: str) -> None:
        pass

    contestants = {
        "the loop around it": each_awaited(nothing, tokens),
        "verifier": each_awaited(verifier.verify, tokens),
        "strict": each_awaited(strict.verify, tokens),
        "many": each_awaited(verifier.verify, [token.encode() for token in tokens]),  # only text is kept as text
    }
    async with verifier, strict:
        for token in tokens:
            await verifier.verify(token)
            await strict.verify(token)
        taken = in_turns(contestants, seconds=2)
    beside = {
        "of which the loop around it": f"{taken['the loop around it'] * 1e6:.2f} us",
        "not among the few used most": f"{taken['many'] * 1e6:.2f} us",
        'with on_stale="reject"': f"{taken['strict'] * 1e6:.2f} us",
    }
    return [Measurement("P12", "verifier, token seen before", taken["verifier"] * 1e6, "us", 1.5, beside)]


async def route() -> list[Measurement]:
    """P12. The application is called as a server would call it, without a server."""
    issuer = Issuer()
    (token,) = issuer.tokens(1)
    verifier = issuer.verifier()
    key = jwt.PyJWK(json.loads(issuer.jwks)["keys"][0])
    auth = Bearer(verifier)
    app = FastAPI()

    @app.get("/open")
    async def unprotected() -> dict[str, str]:
        return {"subject": "somebody"}

    @app.get("/protected")
    async def protected(caller: Annotated[Claims, Depends(auth)]) -> dict[str, str]:
        return {"subject": caller.subject}

    @app.get("/scoped")
    async def scoped(caller: Annotated[Claims, Depends(auth.require(scope="orders:read"))]) -> dict[str, str]:
        return {"subject": caller.subject}

    @app.get("/pyjwt")
    async def idiom(given: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]) -> dict[str, str]:
        subject: str = _pyjwt(given.credentials, key)["sub"]
        return {"subject": subject}

    contestants = {
        path: Contestant(_request(app, path, token)) for path in ("/open", "/protected", "/scoped", "/pyjwt")
    }
    async with verifier:
        await verifier.verify(token)
        taken = in_turns(contestants, seconds=4)
    unguarded = taken["/open"]
    beside = {
        "the route itself": f"{unguarded * 1e6:.1f} us",
        "with a scope": f"+{(taken['/scoped'] - unguarded) * 1e6:.1f} us",
        "HTTPBearer and PyJWT, key prepared": f"+{(taken['/pyjwt'] - unguarded) * 1e6:.1f} us",
    }
    added = (taken["/protected"] - unguarded) * 1e6
    return [Measurement("P12", "what protecting a FastAPI route adds", added, "us", 20, beside)]


async def memory() -> list[Measurement]:
    """P13. The tokens come and go as bytes of requests do; what stays is the cache's."""
    issuer = Issuer()
    first, *tokens = [token.encode() for token in issuer.tokens(3001)]
    verifier = issuer.verifier()
    async with verifier:
        await verifier.verify(first)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for token in tokens:
            text = token.decode()
            await verifier.verify(text)
            await verifier.verify(text)  # some are kept by their text from now on
        held = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    beside = {"length of a token": f"{len(first)} bytes"}
    return [Measurement("P13", "memory for each cached token", held / len(tokens), "bytes", 1000, beside)]


async def random_kids() -> list[Measurement]:
    """P16. Signed by nobody; good tokens go on being verified beside them."""
    issuer = Issuer()
    (good,) = issuer.tokens(1)
    _, payload, signature = good.split(".")
    async with issuer.verifier(cache_size=0) as verifier:
        await verifier.verify(good)
        before, end = issuer.keys_fetched, time.monotonic() + COOLDOWN
        for number in range(10_000):
            header = {"alg": "RS256", "typ": "at+jwt", "kid": f"unknown-{number}"}
            segment = urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=").decode()
            with suppress(TokenRejected):
                await verifier.verify(f"{segment}.{payload}.{signature}")
            if number % 100 == 0:
                await verifier.verify(good)
        assert time.monotonic() < end, "the cooldown was over before the flood was"
    fetched = issuer.keys_fetched - before
    return [Measurement("P16", "JWKS fetches caused by 10 000 random kids in a cooldown", fetched, "fetches", 1)]


async def status_lists() -> list[Measurement]:
    """P15. Ten million sessions are ten lists."""
    spread = random.Random(1)  # noqa: S311 - the same ones in each run
    revoked = [spread.sample(range(LIST_SIZE), LIST_SIZE // 100) for _ in range(10)]
    packed = [status_list.build(positions, LIST_SIZE) for positions in revoked]
    octets = [status_list.decode(lst, 1).octets for lst in packed]
    contestants = {
        "build": each(lambda positions: status_list.build(positions, LIST_SIZE), revoked),
        "decode": each(lambda lst: status_list.decode(lst, 1), packed),
        "zlib level 6": each(zlib.compress, octets),
    }
    taken = {name: seconds * 10e3 for name, seconds in in_turns(contestants, seconds=3).items()}
    beside = {
        "packed by zlib's level 6 alone": f"{taken['zlib level 6']:.1f} ms",
        "length of the ten": f"{sum(map(len, packed)) // 1000} kB",
    }
    return [
        Measurement("P15", "build the lists of 10 M sessions, 1 % revoked", taken["build"], "ms", 60, beside),
        Measurement("P15", "decode them", taken["decode"], "ms", 5),
    ]


async def revocation() -> list[Measurement]:
    """P14. From sending the revocation to the first refusal here, in another process than the service's."""
    with installation() as place, place.serve(**CHEAP_HASHES) as service:
        latencies, refreshes = await _revoke_all(service.url)
    beside = {"revocations": f"{len(latencies)}", "refreshes meanwhile": f"{refreshes}"}
    half, most = (percentile(latencies, percent) * 1000 for percent in (50, 99))
    return [
        Measurement("P14", "revoke -> refused in another process, p50", half, "ms", 50, beside),
        Measurement("P14", "revoke -> refused in another process, p99", most, "ms", 1000),
    ]


async def _revoke_all(url: str) -> tuple[list[float], int]:
    user = {"username": "bench", "password": secrets.token_urlsafe(24)}
    async with httpx2.AsyncClient(base_url=url, timeout=10) as http, Verifier(url, audience=AUDIENCE) as verifier:
        (await http.post("/users", json=user)).raise_for_status()

        async def log_in() -> dict[str, Any]:
            answer = await http.post("/token", data={"grant_type": "password"} | user)
            tokens: dict[str, Any] = answer.raise_for_status().json()
            return tokens

        load = asyncio.create_task(_refresh_for_ever(http, (await log_in())["refresh_token"]))
        logins = [await log_in() for _ in range(_REVOCATIONS)]
        for tokens in logins:
            await verifier.verify(tokens["access_token"])
        while not verifier.status().stream_connected:  # noqa: ASYNC110 - it is a value, nobody announces it
            await asyncio.sleep(0.05)
        latencies = [await _revoke(http, verifier, tokens) for tokens in logins]
        load.cancel()
        (done,) = await asyncio.gather(load)
    return latencies, done


async def _revoke(http: httpx2.AsyncClient, verifier: Verifier, tokens: dict[str, Any]) -> float:
    start = time.monotonic()
    request = asyncio.create_task(http.post("/revoke", data={"token": tokens["refresh_token"]}))
    try:
        while time.monotonic() < start + 5:
            await verifier.verify(tokens["access_token"])
            await asyncio.sleep(0.0005)
    except TokenRejected:
        return time.monotonic() - start
    finally:
        (await request).raise_for_status()
    raise RuntimeError("a revoked token was still accepted after five seconds")


async def _refresh_for_ever(http: httpx2.AsyncClient, refresh_token: str) -> int:
    done = 0
    while True:
        try:
            answer = await http.post("/token", data={"grant_type": "refresh_token", "refresh_token": refresh_token})
            refresh_token = answer.raise_for_status().json()["refresh_token"]
            done += 1
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            return done


class _KeysAtHand(jwt.PyJWKClient):
    """The stock client, without the one fetch over the network."""

    def __init__(self, document: bytes) -> None:
        super().__init__("http://localhost/")
        self._document = json.loads(document)

    def fetch_data(self) -> Any:
        return self._document


def _pyjwt(token: str, key: jwt.PyJWK) -> dict[str, Any]:
    claims: dict[str, Any] = jwt.decode(
        token, key, algorithms=["RS256"], audience=AUDIENCE, issuer=ISSUER, options={"require": _CLAIMS}
    )
    return claims


def _joserfc(document: bytes) -> Callable[[str], object] | None:
    if find_spec("joserfc") is None:
        return None
    from joserfc import jwk
    from joserfc import jwt as jose

    key = jwk.import_key(json.loads(document)["keys"][0])
    rules = jose.JWTClaimsRegistry(
        iss={"essential": True, "value": ISSUER}, aud={"essential": True, "value": AUDIENCE}, exp={"essential": True}
    )

    def verify(token: str) -> object:
        decoded = jose.decode(token, key, algorithms=["RS256"])
        rules.validate(decoded.claims)
        return decoded

    return verify


def _request(app: FastAPI, path: str, token: str) -> Callable[[], None]:
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"orders.example.com"),
            (b"user-agent", b"bench"),
            (b"accept", b"*/*"),
            (b"authorization", b"Bearer " + token.encode()),
        ],
        "client": ("127.0.0.1", 40_000),
        "server": ("127.0.0.1", 8000),
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200, message

    return lambda: finish(app(dict(scope), receive, send))


MEASURES: dict[str, Callable[[], Coroutine[Any, Any, list[Measurement]]]] = {
    "P11": uncached,
    "P12": cached,
    "P12 route": route,
    "P13": memory,
    "P14": revocation,
    "P15": status_lists,
    "P16": random_kids,
}
