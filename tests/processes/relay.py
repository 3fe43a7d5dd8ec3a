"""What stands between the issuer and whoever asks it, as a load balancer would, and breaks when a test says so."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress

EVENTS = b"GET /status-lists/events "


class _Connection:
    """A connection of a client with the one that was made for it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writers = [writer]
        self.is_stream = False
        self.swallows = False

    def abort(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


class Relay:
    """Hands bytes on to a port of this machine. Everything here belongs to the event loop that started it."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._up = True
        self._offers_streams = True
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None

    async def start(self, port: int) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)

    async def stop(self) -> None:
        assert self._server is not None, "start was called"
        self._server.close()
        await self.cut()

    async def cut(self) -> None:
        """Break every connection and let none through, as when a cable is pulled."""
        self._up = False
        self._abort(self._connections)

    async def cut_streams(self) -> None:
        """Break the streams of events and let none through; everything else passes."""
        self._offers_streams = False
        self._abort(each for each in self._connections if each.is_stream)

    async def swallow_streams(self) -> None:
        """Let nothing more through on the streams that are open, and tell nobody, as when a firewall forgets them."""
        for each in self._connections:
            each.swallows = each.is_stream

    async def mend(self) -> None:
        self._up = self._offers_streams = True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(reader, writer)
        self._connections.add(connection)
        try:
            with suppress(OSError):
                await self._relay(connection)
        finally:
            connection.abort()
            self._connections.discard(connection)

    async def _relay(self, connection: _Connection) -> None:
        if not self._up:
            return
        reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        connection.writers.append(writer)
        there = asyncio.create_task(self._hand_on(connection, connection.reader, writer))
        back = asyncio.create_task(self._hand_on(connection, reader, connection.writers[0]))
        await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
        connection.abort()
        await asyncio.gather(there, back, return_exceptions=True)

    async def _hand_on(
        self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while part := await reader.read(65536):
            # A client that waits for each answer sends a request in one piece.
            connection.is_stream = connection.is_stream or part.startswith(EVENTS)
            if connection.is_stream and not self._offers_streams:
                return
            if not connection.swallows:
                writer.write(part)
                await writer.drain()

    def _abort(self, connections: Iterable[_Connection]) -> None:
        for each in list(connections):
            each.abort()
