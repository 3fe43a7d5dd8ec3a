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
    _deadline: asyncio.TimerHandle | None = None
    _head = 0
    _in_head = True

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head += len(data)
            if self._head > MAX_HEAD:
                self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head = True, 0
        if self._deadline is None:
            self._start_waiting()

    def on_headers_complete(self) -> None:
        self._in_head = False
        head = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head > MAX_HEAD or len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too much at once")  # the parser makes it a 400 and the end of the connection
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._head = True, 0
        self._stop_waiting()
        super().on_message_complete()

    def _start_waiting(self) -> None:
        self._deadline = self.loop.call_later(self.seconds_to_arrive, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
