"""How a process takes connections: as fast as it must, and no faster than leaves the other workers their share.

All workers listen on one socket, so that none waits for a worker that is stuck or starts again. A worker that takes all
it finds has every connection of a burst before the next one is awake, and answers them alone ever after. A worker that
takes one in each turn of its loop, as loops do, keeps newcomers waiting once its turns are long.
"""

import asyncio
import errno
import logging
import select
import socket
from collections.abc import Callable

import uvloop

from identity_service.web.protocol import BoundedProtocol

TAKEN_AT_ONCE = 16
"""How many connections are taken in one turn after somebody has waited for long."""
LONG_SECONDS = 0.005
"""So long that any worker with less to do has taken some of those who wait."""
REST_SECONDS = 1.0
"""How long none is taken after one could not be, for want of descriptors or memory."""
_OF_ONE_CONNECTION = frozenset(
    {
        errno.EAGAIN,  # another worker was faster
        errno.ECONNABORTED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.EPROTO,
    }
)
"""What accept(2) may say of the connection and not of the listener: nobody else has to wait for it."""

log = logging.getLogger(__name__)


class Loop(uvloop.Loop):
    """The event loop of uvloop, but for how it takes connections."""

    async def create_server(  # type: ignore[override]
        self,
        protocol_factory: Callable[[], BoundedProtocol],
        *,
        sock: socket.socket,
        ssl: None = None,  # noqa: ARG002 - as the server calls it; TLS is for what stands in front
        backlog: int = 0,  # noqa: ARG002 - it listens already
    ) -> "Listener":
        """Serve those who connect to `sock`."""
        return Listener(self, protocol_factory, sock)


class Listener:
    """Takes connections from a socket until it is closed."""

    def __init__(self, loop: Loop, protocol_factory: Callable[[], BoundedProtocol], sock: socket.socket) -> None:
        sock.setblocking(False)  # another worker may be faster
        self._loop, self._protocol_factory, self._socket = loop, protocol_factory, sock
        self._closed = False
        self._starting = set[asyncio.Task[None]]()
        self._queue = select.poll()
        self._queue.register(sock, select.POLLIN)
        self._waited_since: float | None = None
        """Since when there has always been somebody who waits, in seconds of the loop's clock."""
        self._look: asyncio.TimerHandle | None = None
        self._rest: asyncio.TimerHandle | None = None
        self._listen()

    def close(self) -> None:
        """Take nobody any more. The socket stays, and so do the connections."""
        self._closed = True
        self._loop.remove_reader(self._socket)
        for timer in (self._look, self._rest):
            if timer is not None:
                timer.cancel()

    async def wait_closed(self) -> None:
        """Wait until nobody is half taken, with whom uvloop could not be closed; connections outlive their listener."""
        if self._starting:
            await asyncio.wait(self._starting)

    def _listen(self) -> None:
        self._loop.add_reader(self._socket, self._take)

    def _take(self) -> None:
        now = self._loop.time()
        late = self._waited_since is not None and now - self._waited_since > LONG_SECONDS
        try:
            for _ in range(TAKEN_AT_ONCE if late else 1):
                connection, _ = self._socket.accept()
                start = self._loop.create_task(self._start(connection))
                self._starting.add(start)
                start.add_done_callback(self._starting.discard)
        except OSError as error:
            if error.errno not in _OF_ONE_CONNECTION:
                self._begin_rest(error)
        if self._waited_since is None or late:
            self._waited_since = now
        self._look_who_waits()

    def _look_who_waits(self) -> None:
        """Note when nobody waits any more, and look again: if another worker takes the last one, nothing tells us."""
        if self._look is not None:
            self._look.cancel()
            self._look = None
        if self._queue.poll(0):
            self._look = self._loop.call_later(LONG_SECONDS, self._look_who_waits)
        else:
            self._waited_since = None

    async def _start(self, connection: socket.socket) -> None:
        try:
            _, protocol = await self._loop.connect_accepted_socket(self._protocol_factory, connection)
        except OSError as error:
            connection.close()
            self._begin_rest(error)
            return
        if self._closed:  # too late for the server to have told it
            protocol.shutdown()

    def _begin_rest(self, error: OSError) -> None:
        if self._rest is None and not self._closed:
            log.warning("connections.not_taken", extra={"detail": str(error)})
            self._loop.remove_reader(self._socket)  # or it would call again at once
            self._rest = self._loop.call_later(REST_SECONDS, self._end_rest)

    def _end_rest(self) -> None:
        self._rest = None
        try:
            self._listen()
        except OSError as error:
            self._begin_rest(error)
