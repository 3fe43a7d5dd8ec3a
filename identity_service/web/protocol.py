"""How much of a request may arrive before it is one: bounds that the HTTP server does not set by itself.

Without them one socket could make the process hold a header of any size, any number of requests in a row, or a
connection that never says anything.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 32 * 1024
MAX_PIPELINED = 8


class BoundedProtocol(HttpToolsProtocol):
    """HTTP/1.1 with a bound on the head, on requests sent ahead of their answers, and on the time a request takes."""

    seconds_to_arrive = 20.0
    _arriving_since: float | None = None
    _alarm: asyncio.TimerHandle | None = None
    _head = 0
    _in_head = True

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._begins()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arriving_since = None
        if self._alarm is not None:
            self._alarm.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head += len(data)
        super().data_received(data)
        if self._in_head and self._head > MAX_HEAD and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        if self._arriving_since is None:
            self._begins()

    def on_headers_complete(self) -> None:
        self._in_head = False
        if len(self.pipeline) >= MAX_PIPELINED or (self._head > MAX_HEAD and self._length_of_head() > MAX_HEAD):
            raise ValueError("too much at once")  # the parser makes it a 400 and the end of the connection
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._head = True, 0
        self._arriving_since = None
        super().on_message_complete()

    def _length_of_head(self) -> int:
        """Return what was read of this head; with it came the body, and the next request perhaps."""
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _begins(self) -> None:
        """Start waiting for a request. The alarm goes on ringing from one request to another: to set one takes time."""
        self._arriving_since = self.loop.time()
        if self._alarm is None:
            self._alarm = self.loop.call_later(self.seconds_to_arrive, self._look)

    def _look(self) -> None:
        self._alarm = None
        if self._arriving_since is None:
            return
        left = self._arriving_since + self.seconds_to_arrive - self.loop.time()
        if left <= 0:
            self.transport.abort()
        else:
            self._alarm = self.loop.call_later(left, self._look)
