"""Traffic on verifying processes: every process is asked with every token, all the time, and every answer is kept.

The requests are written by hand, because a client library would take more of the machine than the services that are
measured.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

PAUSE = 0.01
"""Seconds between two questions to a process on one connection: how exactly a moment is known."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a process said about a token: a status and a body; the times are seconds since 1970."""

    asked_at: float
    answered_at: float
    status: int
    body: bytes


class Traffic:
    """Asks processes on these ports. Runs in the event loop that `run` is called in; the rest may be called anywhere.

    On one connection to each process all tokens take turns, on another the one that is watched is asked about.
    """

    def __init__(self, ports: Sequence[int]) -> None:
        self.answers: dict[tuple[int, str], list[Answer]] = {}
        self._ports = ports
        self._tokens: list[str] = []
        self._watched: str | None = None

    async def run(self) -> None:
        """Ask until cancelled."""
        await asyncio.gather(
            *(self._ask_for_ever(port, take) for port in self._ports for take in (self._all, self._one))
        )

    def add(self, *tokens: str) -> None:
        """Ask about these too, and wait until every process has accepted them twice: anew, and from its cache."""
        self.answers.update({(port, token): [] for port in self._ports for token in tokens})
        self._tokens = [*self._tokens, *tokens]
        new = [self.answers[port, token] for port in self._ports for token in tokens]
        self._wait(lambda: all(len(answers) >= 2 for answers in new))
        assert {answer.status for answers in new for answer in answers} == {200}

    def watch(self, token: str) -> None:
        """Ask about this one more often than about the others."""
        self._watched = token

    def refusals(self, token: str, *, within: float = 30) -> list[float]:
        """Return when each process first refused the token, having waited for all of them."""
        self._wait(lambda: all(self._first_refusal(port, token) for port in self._ports), within)
        return [answer.answered_at for port in self._ports if (answer := self._first_refusal(port, token))]

    def catch_up(self) -> None:
        """Wait until every process was asked about every token once more."""
        since = time.time()
        self._wait(lambda: all(answers[-1].asked_at > since for answers in self.answers.values()))

    def wrong(self, good: Collection[str]) -> list[Answer]:
        """Return every answer that should not have been: a refusal of a good token, an acceptance that was asked for
        after the same process had refused the token, and whatever is neither.
        """
        found = []
        for (port, token), answers in self.answers.items():
            refusal = None if token in good else self._first_refusal(port, token)
            for each in answers:
                accepts = each.status == 200 and not (refusal and each.asked_at > refusal.answered_at)
                refuses = each.status == 401 and b"revoked" in each.body and token not in good
                if not accepts and not refuses:
                    found.append(each)
        return found

    def _first_refusal(self, port: int, token: str) -> Answer | None:
        return next((answer for answer in self.answers[port, token] if answer.status == 401), None)

    def _wait(self, condition: Callable[[], bool], within: float = 30) -> None:
        end = time.monotonic() + within
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(PAUSE)

    def _all(self) -> list[str]:
        return self._tokens

    def _one(self) -> list[str]:
        return [self._watched] if self._watched is not None else []

    async def _ask_for_ever(self, port: int, tokens: Callable[[], list[str]]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while True:
                for token in tokens():
                    await self._ask(port, token, reader, writer)
                    await asyncio.sleep(PAUSE)
                await asyncio.sleep(PAUSE)
        finally:
            writer.close()

    async def _ask(self, port: int, token: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked_at = time.time()
        writer.write(f"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        self.answers[port, token].append(Answer(asked_at, time.time(), int(head.split(b" ", 2)[1]), body))
