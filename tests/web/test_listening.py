"""How connections are taken (P7, P19): one in a turn while turns are short, many after a long one, none lost."""

import asyncio
import errno
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from identity_service.web import listening
from identity_service.web.listening import LONG_TURN_SECONDS, TAKEN_AT_ONCE, Listener, Loop


class Reluctant(socket.socket):
    """A listener that cannot take a connection at first."""

    errors: list[OSError]

    def accept(self) -> tuple[socket.socket, Any]:
        if self.errors:
            raise self.errors.pop()
        return super().accept()


class Place:
    """A listener, who came to it, and who was taken."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.socket = stack.enter_context(Reluctant())
        self.socket.errors = []
        self.socket.bind(("127.0.0.1", 0))
        self.socket.listen()
        self.taken: list[asyncio.BaseTransport] = []

    def come(self, count: int) -> None:
        for _ in range(count):
            self._stack.enter_context(socket.create_connection(self.socket.getsockname()))

    def serve(self, work: Callable[[Listener], Awaitable[None]]) -> None:
        taken = self.taken

        class Noting(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                taken.append(transport)

        async def run() -> None:
            listener = await asyncio.get_running_loop().create_server(Noting, sock=self.socket)
            assert isinstance(listener, Listener)
            try:
                await work(listener)
            finally:
                listener.close()
                await listener.wait_closed()
                for transport in taken:
                    transport.close()

        with asyncio.Runner(loop_factory=Loop) as runner:
            runner.run(run())

    async def until_taken(self, count: int) -> None:
        for _ in range(20_000):
            if len(self.taken) >= count:
                break
            await asyncio.sleep(0.001)
        assert len(self.taken) == count


@pytest.fixture
def place() -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(stack)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_while_turns_are_short_one_is_taken_in_each_and_the_rest_is_left_to_other_workers(place: Place, monkeypatch):
    monkeypatch.setattr(listening, "LONG_TURN_SECONDS", 60)
    most = 0

    async def watch(_: Listener) -> None:
        nonlocal most
        while (before := len(place.taken)) < TAKEN_AT_ONCE:
            await turns(1)
            most = max(most, len(place.taken) - before)

    place.come(TAKEN_AT_ONCE)
    place.serve(watch)
    assert most == 1


def test_after_a_long_turn_many_are_taken_in_one(place: Place):
    """Whoever comes while all turns are long must not wait for one for each who came before."""
    after_each: list[int] = []

    async def watch(_listener: Listener) -> None:
        for _ in range(2):
            await turns(4)  # in which those that were taken become connections
            after_each.append(len(place.taken))
            time.sleep(LONG_TURN_SECONDS * 2)  # noqa: ASYNC251 - the work of a long turn
        await place.until_taken(TAKEN_AT_ONCE * 2)

    place.come(TAKEN_AT_ONCE * 2)
    place.serve(watch)
    assert after_each[1] - after_each[0] >= TAKEN_AT_ONCE


@pytest.mark.parametrize("error", [BlockingIOError(errno.EAGAIN, ""), ConnectionAbortedError(errno.ECONNABORTED, "")])
def test_a_connection_that_another_worker_took_or_that_left_is_no_reason_to_rest(place: Place, caplog, error):
    place.socket.errors = [error]
    place.come(1)
    place.serve(lambda _: place.until_taken(1))
    assert not caplog.records


def test_without_descriptors_connections_wait_until_there_are_some(place: Place, caplog, monkeypatch):
    monkeypatch.setattr(listening, "REST_SECONDS", 0.1)
    place.socket.errors = [OSError(errno.EMFILE, os.strerror(errno.EMFILE)) for _ in range(2)]
    place.come(3)
    place.serve(lambda _: place.until_taken(3))
    assert [record.getMessage() for record in caplog.records] == ["connections.not_taken"] * 2
    assert "Too many open files" in caplog.records[0].detail


def test_a_listener_that_is_closed_takes_nobody_even_after_a_rest(place: Place, monkeypatch):
    monkeypatch.setattr(listening, "REST_SECONDS", 0.02)

    async def close(listener: Listener) -> None:
        place.socket.errors = [OSError(errno.EMFILE, "")]
        place.come(1)
        await turns(100)
        assert not place.socket.errors, "it has rested"
        listener.close()
        await asyncio.sleep(0.1)

    place.serve(close)
    assert place.taken == []
