"""How a process takes connections: as fast as it must, and no faster than leaves the other workers their share.

All workers listen on one socket, so that none waits for a worker that is stuck or starts again. A worker that takes all
it finds has every connection of a burst before the next one is awake, and answers them alone ever after. A worker that
takes one in each turn of its loop, as loops do, keeps newcomers waiting once its turns are long.
"""

import asyncio
import logging
import select
import socket
from collections.abc import Callable

import uvloop

TAKEN_AT_ONCE = 16
"""How many connections are taken in one turn after a long one."""
LONG_TURN_SECONDS = 0.005
"""So long that any worker with less to do has taken what waited."""
REST_SECONDS = 1.0
"""How long none is taken after one could not be, for want of descriptors or memory."""

log = logging.getLogger(__name__)


class Loop(uvloop.Loop):
    """The event loop of uvloop, but for how it takes connections."""

    async def create_server(  # type: ignore[override]
        self,
        protocol_factory: Callable[[], asyncio.Protocol],
        *,
        sock: socket.socket,
        ssl: None = None,  # noqa: ARG002 - as the server calls it; TLS is for what stands in front
        backlog: int = 0,  # noqa: ARG002 - it listens already
    ) -> "Listener":
        """Serve those who connect to `sock`."""
        return Listener(self, protocol_factory, sock)


class Listener:
    def __init__(self, loop: Loop, protocol_factory: Callable[[], asyncio.Protocol], sock: socket.socket) -> None:
        sock.setblocking(False)
        self._loop, self._protocol_factory, self._socket = loop, protocol_factory, sock
        self._starting = set[asyncio.Task[None]]()
        self._waiting = select.poll()
        self._waiting.register(sock, select.POLLIN)
        self._waited_since: float | None = None
        """When somebody was left waiting, in seconds of the loop's clock; None if nobody was."""
        self._resting: asyncio.TimerHandle | None = None
        self._listen()

    def close(self) -> None:
        """Take nobody any more; the socket and those who are connected stay."""
        self._loop.remove_reader(self._socket)
        if self._resting is not None:
            self._resting.cancel()

    async def wait_closed(self) -> None:
        """Return at once: nothing goes on after `close`."""

    def _listen(self) -> None:
        self._loop.add_reader(self._socket, self._take)

    def _take(self) -> None:
        waited = 0.0 if self._waited_since is None else self._loop.time() - self._waited_since
        try:
            for _ in range(TAKEN_AT_ONCE if waited > LONG_TURN_SECONDS else 1):
                connection, _ = self._socket.accept()
                start = self._loop.create_task(self._start(connection))
                self._starting.add(start)
                start.add_done_callback(self._starting.discard)
        except (BlockingIOError, ConnectionAbortedError):
            pass  # another worker was faster, or the client has left
        except OSError as error:
            log.warning("connections.not_taken", extra={"detail": str(error)})
            self._loop.remove_reader(self._socket)  # or this would be called again at once
            self._resting = self._loop.call_later(REST_SECONDS, self._listen)
        self._waited_since = self._loop.time() if self._waiting.poll(0) else None

    async def _start(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol_factory, connection)
        except OSError:  # the client has left
            connection.close()
