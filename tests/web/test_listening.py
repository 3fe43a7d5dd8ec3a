"""How connections are taken (P7, P19): one in a turn, many once somebody has waited for long, none lost."""

import asyncio
import errno
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, cast

import pytest

from identity_service.web import listening
from identity_service.web.listening import LONG_SECONDS, TAKEN_AT_ONCE, Listener, Loop


class Reluctant(socket.socket):
    """A listener that cannot take a connection at first."""

    errors: list[OSError]
    accepted = 0

    def accept(self) -> tuple[socket.socket, Any]:
        if self.errors:
            raise self.errors.pop()
        taken = super().accept()
        self.accepted += 1
        return taken


class Place:
    """A listener, who came to it, who was taken, and how many of those were sent away as the server does at its end."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.socket = stack.enter_context(Reluctant())
        self.socket.errors = []
        self.socket.bind(("127.0.0.1", 0))
        self.socket.listen()
        self.taken: list[asyncio.BaseTransport] = []
        self.sent_away = 0

    def come(self, count: int) -> None:
        for _ in range(count):
            self._stack.enter_context(socket.create_connection(self.socket.getsockname()))

    def taken_by_another_worker(self) -> None:
        with socket.socket(fileno=os.dup(self.socket.fileno())) as other:
            other.accept()[0].close()

    def serve(self, work: Callable[[Listener], Awaitable[None]]) -> None:
        place = self

        class Noting(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                place.taken.append(transport)

            def shutdown(self) -> None:
                place.sent_away += 1

        async def run() -> None:
            loop = cast(Any, asyncio.get_running_loop())
            listener: Listener = await loop.create_server(Noting, sock=self.socket, ssl=None, backlog=1)
            try:
                await work(listener)
            finally:
                listener.close()
                await listener.wait_closed()
                for transport in self.taken:
                    transport.close()

        with asyncio.Runner(loop_factory=Loop) as runner:
            runner.run(run())

    async def turns(self, count: int, *, seconds: float = 0) -> list[int]:
        """Let the loop turn so often, and take so long each time. Return how many connections it took in each."""
        accepted = [self.socket.accepted]
        for _ in range(count):
            await asyncio.sleep(0)
            accepted.append(self.socket.accepted)
            time.sleep(seconds)  # noqa: ASYNC251 - the work of a turn
        return [after - before for before, after in pairwise(accepted)]

    async def until_accepted(self) -> None:
        for _ in range(10_000):
            if self.socket.accepted:
                break
            await asyncio.sleep(0)
        assert self.socket.accepted == 1

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


def test_one_is_taken_in_a_turn_and_the_rest_is_left_to_other_workers(place: Place, monkeypatch):
    monkeypatch.setattr(listening, "LONG_SECONDS", 60)

    async def watch(_: Listener) -> None:
        taken = await place.turns(20, seconds=0.002)
        assert max(taken) == 1
        assert sum(taken) == 8

    place.come(8)
    place.serve(watch)


def test_many_are_taken_in_a_turn_once_somebody_has_waited_for_long(place: Place):
    """Whoever comes while all turns are long must not wait for one for each who came before."""

    async def watch(_: Listener) -> None:
        await place.turns(3)
        time.sleep(LONG_SECONDS * 2)  # noqa: ASYNC251 - the work of a long turn
        assert max(await place.turns(3)) == TAKEN_AT_ONCE
        await place.until_taken(TAKEN_AT_ONCE * 3)

    place.come(TAKEN_AT_ONCE * 3)
    place.serve(watch)


def test_many_turns_of_middling_length_are_a_long_wait_too(place: Place):
    async def watch(_: Listener) -> None:
        taken = await place.turns(TAKEN_AT_ONCE, seconds=LONG_SECONDS / 2)
        assert sum(taken) == TAKEN_AT_ONCE * 2

    place.come(TAKEN_AT_ONCE * 2)
    place.serve(watch)


def test_nobody_waits_any_more_when_another_worker_has_taken_the_last_one(place: Place, monkeypatch):
    monkeypatch.setattr(listening, "LONG_SECONDS", 0.1)

    async def watch(_: Listener) -> None:
        await place.until_accepted()
        place.taken_by_another_worker()
        await asyncio.sleep(0.3)
        place.come(TAKEN_AT_ONCE)
        assert next(taken for taken in await place.turns(8) if taken) == 1

    place.come(2)
    place.serve(watch)


@pytest.mark.parametrize("of_one_connection", ["EAGAIN", "ECONNABORTED", "EPROTO", "EHOSTUNREACH", "EPERM"])
def test_what_is_wrong_with_one_connection_keeps_nobody_else_waiting(place: Place, caplog, of_one_connection):
    """Whoever can bring that about would stop the service for a second each time."""

    async def watch(_: Listener) -> None:
        assert not place.socket.getblocking(), "another worker may take what this one was told of"
        place.socket.errors = [OSError(getattr(errno, of_one_connection), "")]
        place.come(1)
        await place.until_taken(1)

    place.serve(watch)
    assert not caplog.records


@pytest.mark.parametrize("fails", ["accept", "connect_accepted_socket"])
def test_without_descriptors_those_who_come_wait_until_there_are_some(place: Place, caplog, monkeypatch, fails):
    monkeypatch.setattr(listening, "REST_SECONDS", 0.1)
    connect = Loop.connect_accepted_socket
    no_room = [OSError(errno.EMFILE, os.strerror(errno.EMFILE)) for _ in range(2)]

    async def connect_or_fail(loop: Loop, *arguments: Any) -> Any:
        if no_room:
            raise no_room.pop()
        return await connect(loop, *arguments)

    if fails == "accept":
        place.socket.errors = no_room
    else:
        monkeypatch.setattr(Loop, "connect_accepted_socket", connect_or_fail)
    place.come(5)
    place.serve(lambda _: place.until_taken(5 if fails == "accept" else 3))
    assert {record.getMessage() for record in caplog.records} == {"connections.not_taken"}
    assert "Too many open files" in caplog.records[0].detail


def test_many_that_cannot_be_served_are_one_line_in_the_log(place: Place, caplog, monkeypatch):
    connect = Loop.connect_accepted_socket

    async def connect_two(loop: Loop, *arguments: Any) -> Any:
        if place.socket.accepted > 2:
            raise OSError(errno.ENOMEM, "")
        return await connect(loop, *arguments)

    async def watch(_: Listener) -> None:
        await place.until_taken(1)
        place.come(TAKEN_AT_ONCE + 1)
        monkeypatch.setattr(listening, "LONG_SECONDS", 0)
        await place.turns(100, seconds=0.002)

    monkeypatch.setattr(Loop, "connect_accepted_socket", connect_two)
    place.come(1)
    place.serve(watch)
    assert place.socket.accepted > 3
    assert len(caplog.records) == 1


def test_a_rest_that_cannot_be_ended_is_followed_by_another(place: Place, caplog, monkeypatch):
    monkeypatch.setattr(listening, "REST_SECONDS", 0.02)
    place.socket.errors = [OSError(errno.ENOMEM, "")]
    add_reader, refusals = Loop.add_reader, [OSError(errno.ENOSPC, "") for _ in range(2)]

    def add_reader_or_fail(loop: Loop, *arguments: Any) -> None:
        if not place.socket.errors and refusals:
            raise refusals.pop()
        add_reader(loop, *arguments)

    monkeypatch.setattr(Loop, "add_reader", add_reader_or_fail)
    place.come(1)
    place.serve(lambda _: place.until_taken(1))
    assert not refusals
    assert len(caplog.records) == 3


@pytest.mark.parametrize("resting", [False, True])
def test_a_listener_that_is_closed_takes_nobody(place: Place, monkeypatch, resting):
    monkeypatch.setattr(listening, "REST_SECONDS", 0.2)
    taken = []

    async def close(listener: Listener) -> None:
        if resting:
            place.socket.errors = [OSError(errno.EMFILE, "")]
            place.come(1)
            await place.turns(100)
            assert not place.socket.errors, "it has begun to rest"
        listener.close()
        taken.append(place.socket.accepted)
        place.come(1)
        await asyncio.sleep(0.3)
        taken.append(place.socket.accepted)

    place.serve(close)
    assert taken[0] == taken[1]


def test_who_was_taken_in_the_last_turn_is_sent_away_like_all_others(place: Place):
    """The server has told only those it knew. A client that says nothing would hold the stop up."""

    async def close(listener: Listener) -> None:
        await place.until_accepted()
        listener.close()
        await place.until_taken(1)
        await place.turns(4)

    place.come(1)
    place.serve(close)
    assert place.sent_away == 1
