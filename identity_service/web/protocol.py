"""What the HTTP server leaves open: how much may arrive before it is a request, and answers written in one piece.

Without bounds one socket could make the process hold a header of any size, any number of requests in a row, or a
connection that never says anything.
"""

import asyncio
import re
import sys
from typing import Any

from httptools import HttpParserInvalidMethodError
from starlette.types import Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

MAX_HEAD = 32 * 1024
MAX_PIPELINED = 8
_REQUEST_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ (/[!-~]*) HTTP/1\.[01]\r\n")
_TOO_LARGE = "The head of the request is too large."


class BoundedProtocol(HttpToolsProtocol):
    """HTTP/1.1 with a bound on the head, on requests sent ahead of their answers, and on the time that both take."""

    seconds_to_arrive = 20.0
    seconds_to_leave = 60.0
    """For as much of an answer as has to be taken before more of it is written: half a megabyte at most."""
    _due: float | None = None
    """When the connection is closed unless a request has arrived; None while one is answered."""
    _idle = False
    """Whether nothing of that request is here yet, after one that has been answered."""
    _alarm: asyncio.TimerHandle | None = None
    _beside_bodies = 0
    """Bytes read since the last part of a body: a head, what frames the parts of a body, or what comes after it."""
    _in_head = True
    _head = 0
    """Bytes of the headers of the request that is being read."""
    _at_once = 0
    """Answers written since something was read, without a task and so without letting anybody else run."""
    _stuck: asyncio.TimerHandle | None = None
    """Closes the connection of a client that does not take what it asked for."""
    _wrong = "This is not well-formed HTTP/1.1."
    _between = True
    """Whether nothing of the next request is here yet."""
    _beginning = b""
    """What is being read, if a request begins with it and has not ended."""
    _running: RequestResponseCycle | None = None
    """The request that is answered; those sent ahead of its answer wait in the pipeline."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect(self.seconds_to_arrive)

    def connection_lost(self, exc: Exception | None) -> None:
        self._due = None
        if self._alarm is not None:
            self._alarm.cancel()
        if self._stuck is not None:
            self._stuck.cancel()
        self._give_up()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(self.seconds_to_leave, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()

    def data_received(self, data: bytes) -> None:
        if self._between:
            self._beginning = data
        self._beside_bodies += len(data)
        self._at_once = 0
        super().data_received(data)
        self._beginning = b""
        if self._beside_bodies > MAX_HEAD and not self.transport.is_closing():
            self._wrong = _TOO_LARGE
            self.send_400_response(_TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._between, self._in_head, self._head = False, True, 0
        if self._due is None or self._idle:
            self._idle = False
            self._expect(self.seconds_to_arrive)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # what comes after a body is no header (RFC 9110 6.5.1), and may be without end
            self._head += len(name) + len(value)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._beside_bodies = False, 0
        if self._head + len(self.url) > MAX_HEAD:
            raise self._unreadable(_TOO_LARGE)
        if len(self.pipeline) >= MAX_PIPELINED:
            raise self._unreadable("Too many requests were sent ahead of their answers.")
        upgrades = self.parser.should_upgrade()
        if upgrades and any(_announces_body(*header) for header in self.headers):
            # For the parser the message ends here. What follows is its body, and would be run as the next request.
            raise self._unreadable("A request that asks for an upgrade must not have a body.")
        super().on_headers_complete()
        if upgrades:  # which is not granted (RFC 9110 7.8), and nobody knows what the client sends after it
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._beside_bodies = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._between, self._beginning, self._beside_bodies = True, b"", 0
        self._due = None
        super().on_message_complete()
        if self.cycle.response_complete:  # it was answered before all of it was here
            self._rest()

    def on_response_complete(self) -> None:
        """Do as the server does, but for a timer of its own after each answer."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._due is None:
            self._rest()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        answer_at_once = getattr(app, "answer_at_once", None)  # see `middleware.Edge`
        if answer_at_once is not None and self._at_once < MAX_PIPELINED and not self.parser.should_upgrade():
            self._at_once += 1
            if answer_at_once(cycle.scope, cycle.send):
                return
        super()._start_asgi_task(cycle, app)

    def _unreadable(self, why: str) -> ValueError:
        """Return what the server makes a 400 of, and the end of the connection."""
        self._wrong = why
        return ValueError(why)

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be read as a request in the words of the application, if it has any.

        Not in the middle of an answer: what is under way ends with the connection.
        """
        answer_nonsense = getattr(self.app, "answer_nonsense", None)  # see `middleware.Edge`
        answered = self._running
        if answered is not None and answered.response_started and not answered.response_complete:
            self.transport.close()
        elif answer_nonsense is None:
            super().send_400_response(msg)
        else:
            # The parser does not know the method, and knows nothing of what comes after it. That is not looked at.
            is_method = isinstance(sys.exception(), HttpParserInvalidMethodError)
            waits = self.pipeline or (answered is not None and not answered.response_complete)
            line = _REQUEST_LINE.match(self._beginning) if is_method and not waits else None
            status, head, body = answer_nonsense(self._wrong, self.client, line and line[1])
            of_server = [b"%b: %b\r\n" % pair for pair in self.server_state.default_headers]
            parts = (STATUS_LINE[status], *of_server, head, b"connection: close\r\n\r\n", body)
            self.transport.write(b"".join(parts))
            self.transport.close()
        self._give_up()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: any client could fill the log with it."""

    def _give_up(self) -> None:
        """Tell all requests of the connection that it is gone. The server tells only the one that came last."""
        for cycle in (self._running, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def _rest(self) -> None:
        self._idle = True
        self._expect(self.timeout_keep_alive)

    def _expect(self, seconds: float) -> None:
        """Wait so long for a request. The alarm goes on ringing from one to another: to set one takes time."""
        self._due = self.loop.time() + seconds
        if self._alarm is None:
            self._set_alarm(seconds)

    def _set_alarm(self, seconds: float) -> None:
        # Never later than an idle connection is due, which it may be by the time it rings.
        self._alarm = self.loop.call_later(min(seconds, self.timeout_keep_alive), self._ring)

    def _ring(self) -> None:
        self._alarm = None
        if self._due is None:
            return
        left = self._due - self.loop.time()
        if left > 0:
            self._set_alarm(left)
        elif self._idle:
            self.transport.close()
        else:
            self.transport.abort()


def _announces_body(name: bytes, value: bytes) -> bool:
    # Some clients send a length of zero with every GET, and offer to upgrade.
    return name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0") != b"")


def write_whole(send: Send, status: int, head: bytes, body: bytes) -> bool:
    """Write an answer in one piece if `send` is of a request that is served here; return whether it was written.

    The server's own way looks at each header again, in answers that are made of a few fixed ones.

    Args:
        head: a line for each header, `content-length` among them, but `connection` and those of the server itself.
    """
    cycle = getattr(send, "__self__", None)
    if not isinstance(cycle, RequestResponseCycle) or cycle.response_started or not cycle.keep_alive:
        return False
    if cycle.disconnected or cycle.flow.write_paused:
        return False
    cycle.response_started = cycle.response_complete = True
    cycle.waiting_for_100_continue = False
    of_server = [b"%b: %b\r\n" % pair for pair in cycle.default_headers]
    cycle.transport.write(b"".join((STATUS_LINE[status], *of_server, head, b"\r\n", body)))
    cycle.message_event.set()
    cycle.on_response()
    return True
