"""An issuer at the network border: real keys, real signatures, real status lists, and every way to misbehave."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from identity_service.verifier import Verifier, status_list
from identity_service.verifier.testing import TestIssuer

ISSUER = "https://id.example.com"
AUDIENCE = "orders"
LIST = f"{ISSUER}/status-lists/1"


class Clock:
    """Seconds since 1970 that stand still until a test turns them."""

    def __init__(self) -> None:
        self.time = 1_795_000_000.0

    def __call__(self) -> float:
        return self.time

    def advance(self, seconds: float) -> None:
        self.time += seconds


Answer = httpx2.Response | Exception


class Stream(httpx2.AsyncByteStream):
    """A body that arrives when the test says so; None ends it."""

    def __init__(self) -> None:
        self.parts: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (part := await self.parts.get()) is not None:
            if isinstance(part, Exception):
                raise part
            yield part

    def say(self, text: str) -> None:
        self.parts.put_nowait(text.encode())

    def revoked(self, idx: int, *, exp: int, event_id: str = "1", uri: str = LIST) -> None:
        data = json.dumps({"uri": uri, "idx": idx, "exp": exp})
        self.say(f"id: {event_id}\nevent: revoked\ndata: {data}\n\n")

    def end(self) -> None:
        self.parts.put_nowait(None)


@dataclass
class Issuer:
    """Answers for the JWKS, status lists and their events, and counts what it is asked."""

    clock: Clock
    kit: TestIssuer
    requests: list[httpx2.Request] = field(default_factory=list)
    keys: list[dict[str, Any]] = field(default_factory=list)
    keys_headers: dict[str, str] = field(default_factory=lambda: {"Cache-Control": "public, max-age=300"})
    keys_answer: Callable[[httpx2.Request], Answer] | None = None
    delay: float = 0
    revoked: set[int] = field(default_factory=set)
    list_claims: dict[str, Any] = field(default_factory=dict)
    list_typ: str = "statuslist+jwt"
    list_header: dict[str, Any] = field(default_factory=dict)
    list_answer: Callable[[httpx2.Request], Answer] | None = None
    lists: tuple[str, ...] = ("/status-lists/1",)
    ttl: int = 300
    streams: list[Stream] = field(default_factory=list)
    offers_stream: bool = True
    down: bool = False

    def transport(self) -> httpx2.MockTransport:
        return httpx2.MockTransport(self.answer)

    async def answer(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        if self.delay:
            await asyncio.sleep(self.delay)
        if self.down:
            raise httpx2.ConnectError("down")
        answer = self._choose(request)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _choose(self, request: httpx2.Request) -> Answer:
        path = request.url.path
        if path == "/.well-known/jwks.json":
            if self.keys_answer is not None:
                return self.keys_answer(request)
            return httpx2.Response(200, json={"keys": self.keys}, headers=self.keys_headers)
        if path == "/status-lists/events" and self.offers_stream:
            stream = Stream()
            self.streams.append(stream)
            return httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, stream=stream)
        if path in self.lists:
            return self.list_answer(request) if self.list_answer is not None else self._list(request)
        return httpx2.Response(404)

    def _list(self, request: httpx2.Request) -> httpx2.Response:
        etag = f'"{sorted(self.revoked)}"'
        if request.headers.get("if-none-match") == etag:
            return httpx2.Response(304, headers={"ETag": etag})
        return httpx2.Response(200, content=self.list_token(str(request.url)), headers={"ETag": etag})

    def list_token(self, uri: str = LIST) -> str:
        now = int(self.clock())
        claims = {
            "sub": uri,
            "iat": now,
            "exp": now + 86_400,
            "ttl": self.ttl,
            "status_list": {"bits": 1, "lst": status_list.build(self.revoked, 1024)},
        } | self.list_claims
        claims = {name: value for name, value in claims.items() if value is not None}
        return self.kit.sign(claims, typ=self.list_typ, **self.list_header)

    def asked(self, ending: str) -> int:
        return sum(request.url.path.endswith(ending) for request in self.requests)

    @property
    def keys_asked(self) -> int:
        return self.asked("jwks.json")

    def verifier(self, **options: Any) -> Verifier:
        own: dict[str, Any] = {"audience": AUDIENCE, "http": self.transport(), "now": self.clock}
        return Verifier(ISSUER, **own | options)

    def token(self, *subject: str, **claims: Any) -> str:
        return self.kit.token(*subject, **claims)


@pytest.fixture
def now() -> Clock:
    return Clock()


@pytest.fixture
def issuer(now: Clock) -> Issuer:
    kit = TestIssuer(ISSUER, AUDIENCE, now=now)
    return Issuer(now, kit, keys=[kit._jwk])


@pytest.fixture(scope="session")
def other_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture
async def verifier(issuer: Issuer) -> AsyncIterator[Verifier]:
    async with issuer.verifier() as verifier:
        yield verifier


async def until(condition: Callable[[], bool], *, within: float = 5.0) -> None:
    """Wait for something that happens by itself."""
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.005)
