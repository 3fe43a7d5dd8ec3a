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
    _beside_bodies = 0
    """Bytes read since the last part of a body: a head, what frames the parts of a body, or what comes after it."""
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
        self._beside_bodies += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._beside_bodies > MAX_HEAD:
            self.send_400_response("The head of the request is too large.")
        elif self._arriving_since is None and self.cycle is not None and self.cycle.response_complete:
            self._begins()  # an empty line, which has stopped the server's own clock for idle connections

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        if self._arriving_since is None:
            self._begins()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # what comes after a body is no header (RFC 9110 6.5.1), and may be without end
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._beside_bodies = False, 0
        head = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head > MAX_HEAD or len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too much at once")  # the parser makes it a 400 and the end of the connection
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._beside_bodies = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._beside_bodies = 0
        self._arriving_since = None
        super().on_message_complete()

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
