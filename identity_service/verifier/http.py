"""Asking the issuer over HTTP: what it may answer, how large, and how long it may take.

No redirects, no other hosts, https unless the issuer is on this machine. `keys` and `revocations` say what is asked.
"""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

log = logging.getLogger("identity_service.verifier")

TIMEOUT = 3.0
"""Seconds for a whole answer, and for the beginning of a stream."""
_DATE_PRECISION = 2.0
"""Seconds by which a `Date` may be behind: it has whole ones, and servers write it once a second."""


class FetchFailed(Exception):
    """The issuer could not be asked, or its answer cannot be used; the text says why and is for the log."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of 200 with its body, 304, or 404."""

    status: int
    headers: httpx2.Headers
    body: bytes


class Border:
    """The one way out: a client per event loop, and what its answers say about the issuer's clock.

    Args:
        transport: takes the place of the network, in tests.
        local: the issuer is on this machine, where no proxy could reach it.
        leeway: seconds of difference between the clocks from which on it is worth a warning.
    """

    def __init__(
        self, transport: httpx2.AsyncBaseTransport | None, *, local: bool, now: Callable[[], float], leeway: float
    ) -> None:
        self.clock_skew: float | None = None
        self._transport = transport
        self._local = local
        self._now = now
        self._leeway = leeway
        self._clients: dict[asyncio.AbstractEventLoop, httpx2.AsyncClient] = {}
        self._tls: ssl.SSLContext | None = None

    async def get(
        self, url: str, *, accept: str, max_length: int, etag: str | None = None, fresh: bool = False
    ) -> Answer:
        """Ask once.

        Args:
            fresh: whether caches on the way must ask the issuer themselves.

        Raises:
            FetchFailed: no answer in time, or one of another status, too long, or in a coding nobody asked for.
        """
        headers = {"Accept": accept}
        if etag:
            headers["If-None-Match"] = etag
        if fresh:
            headers["Cache-Control"] = "no-cache"
        try:
            async with asyncio.timeout(TIMEOUT), self.stream(url, headers=headers, timeout=TIMEOUT) as answer:
                if answer.status_code in {304, 404}:
                    return Answer(answer.status_code, answer.headers, b"")
                if answer.status_code != 200:
                    raise FetchFailed(f"{url} answered {answer.status_code}")
                body = bytearray()
                async for part in answer.aiter_bytes():
                    body += part
                    if len(body) > max_length:
                        raise FetchFailed(f"{url} answered more than {max_length} bytes")
                return Answer(200, answer.headers, bytes(body))
        except (httpx2.HTTPError, TimeoutError, OSError) as error:
            raise FetchFailed(f"{url}: {type(error).__name__}: {error}") from error

    @asynccontextmanager
    async def stream(
        self,
        url: str,
        *,
        headers: dict[str, str],
        timeout: float,  # noqa: ASYNC109 - httpx2 keeps it
    ) -> AsyncIterator[httpx2.Response]:
        """Open an answer whose body is still to come."""
        client = await self._open_client()
        timeouts = httpx2.Timeout(TIMEOUT, read=timeout)
        # Compressed answers could unpack to anything, and what is long here is compressed already.
        headers = headers | {"Accept-Encoding": "identity"}
        async with client.stream("GET", url, headers=headers, timeout=timeouts, follow_redirects=False) as answer:
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise FetchFailed(f"{url} answered in a coding that was not asked for")
            self._compare_clocks(answer.headers)
            yield answer

    async def close(self) -> None:
        """Close the connections of the running loop."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    async def _open_client(self) -> httpx2.AsyncClient:
        loop = asyncio.get_running_loop()
        if (client := self._clients.get(loop)) is not None:
            return client
        if self._tls is None and self._transport is None:
            # Reading the certificate store takes tens of milliseconds.
            self._tls = await asyncio.to_thread(httpx2.create_ssl_context)
        # Connections belong to the loop they were made in, and do not outlast it.
        for other in [each for each in list(self._clients) if each is not loop and not each.is_running()]:
            self._clients.pop(other, None)
        client = httpx2.AsyncClient(
            transport=self._transport,
            verify=True if self._tls is None else self._tls,
            trust_env=not self._local,
            headers={"User-Agent": "identity-service-verifier"},
        )
        return self._clients.setdefault(loop, client)

    def _compare_clocks(self, headers: httpx2.Headers) -> None:
        try:
            theirs = parsedate_to_datetime(headers["date"]).timestamp() + int(headers.get("age", "0"))
        except (KeyError, ValueError):
            return
        self.clock_skew = theirs - self._now()
        if abs(self.clock_skew) > self._leeway + _DATE_PRECISION:
            log.warning("verifier.clock_skew: the issuer's clock differs by %.0f s", self.clock_skew)


def start(work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
    """Start a task that outlives the request that happens to start it, and so has nothing of its context."""
    return Context().run(lambda: asyncio.get_running_loop().create_task(work, name=name))
