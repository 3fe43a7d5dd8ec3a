"""Argon2id off the event loop: a few threads at low priority behind a bounded queue with a deadline.

When more passwords wait than can be answered in time, further ones are turned away at once; refreshes, the JWKS and
health never notice. The policy for passwords is next door in `passwords`.
"""

import asyncio
import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from argon2 import PasswordHasher, Type
from argon2.exceptions import VerificationError

from identity_service.errors import HashingOverloaded

T = TypeVar("T")

NICENESS = 10
"""Priority of the hashing threads: below the event loop, so that a flood of logins leaves refreshes their latency."""

QUEUE_PER_THREAD = 100
ESTIMATES_AT_ONCE = 32
DEADLINE_SECONDS = 8.0


@dataclass(frozen=True, slots=True)
class Argon2Cost:
    """Parameters of Argon2id (RFC 9106 3.1): memory in KiB, passes, lanes."""

    memory_kib: int
    time_cost: int
    parallelism: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a password matched, and the hash to store instead when the stored one is weaker than today's."""

    matched: bool
    replacement: str | None = None


class PasswordHashing:
    """Hashes and verifies passwords.

    Args:
        threads: how many run at once; memory use is bounded by this number times the cost.
        deadline: longest time in seconds that a password may wait for its result.
        observe: told how many seconds each took, waiting included, those that were given up too.
    """

    def __init__(
        self,
        cost: Argon2Cost,
        *,
        threads: int,
        deadline: float = DEADLINE_SECONDS,
        observe: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._hasher = PasswordHasher(
            time_cost=cost.time_cost,
            memory_cost=cost.memory_kib,
            parallelism=cost.parallelism,
            hash_len=32,
            salt_len=16,
            type=Type.ID,
        )
        self._deadline = deadline
        self._hashes = _BoundedThreads(threads, threads * QUEUE_PER_THREAD, observe)
        self._estimates = _BoundedThreads(1, ESTIMATES_AT_ONCE)
        # For users that do not exist: nobody knows its password, and it costs what a real one does.
        self._nobodys_hash = self._hasher.hash(secrets.token_urlsafe(32))

    @property
    def waiting(self) -> int:
        """How many passwords wait or are being hashed."""
        return self._hashes.waiting

    async def hash(self, password: str) -> str:
        """Return the password as a PHC string.

        Raises:
            HashingOverloaded: the queue is full or the deadline passed.
        """
        return await self._hashes.run(lambda: self._hasher.hash(password), self._deadline)

    async def estimate(self, check: Callable[[], None]) -> None:
        """Run a check of a new password that takes long, in a thread that no login waits for.

        Raises:
            HashingOverloaded: the queue is full or the deadline passed.
        """
        await self._estimates.run(check, self._deadline)

    async def verify(self, password_hash: str | None, password: str) -> Verdict:
        """Say whether the password matches the stored hash.

        Without a stored hash the work is done all the same, and the answer is no.

        Raises:
            HashingOverloaded: the queue is full or the deadline passed.
        """
        return await self._hashes.run(lambda: self._verify(password_hash, password), self._deadline)

    def close(self) -> None:
        self._hashes.close()
        self._estimates.close()

    def _verify(self, password_hash: str | None, password: str) -> Verdict:
        if password_hash is None:
            self._spend_as_much(password)
            return Verdict(matched=False)
        try:
            self._hasher.verify(password_hash, password)
        except (VerificationError, ValueError):
            if self._is_outdated(password_hash):
                self._spend_as_much(password)  # an older, cheaper hash must not tell that the account exists
            return Verdict(matched=False)
        if self._is_outdated(password_hash):
            return Verdict(matched=True, replacement=self._hasher.hash(password))
        return Verdict(matched=True)

    def _is_outdated(self, password_hash: str) -> bool:
        try:
            return self._hasher.check_needs_rehash(password_hash)
        except ValueError:  # damaged
            return True

    def _spend_as_much(self, password: str) -> None:
        """Do the work of a verification at today's cost; what comes of it is of no interest."""
        with contextlib.suppress(VerificationError):
            self._hasher.verify(self._nobodys_hash, password)


class _BoundedThreads:
    """A few threads at low priority, and room for so many pieces of work in all."""

    def __init__(self, threads: int, room: int, observe: Callable[[float], None] = lambda _: None) -> None:
        self.waiting = 0
        self._room = room
        self._observe = observe
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="passwords", initializer=_lower_priority)

    async def run(self, work: Callable[[], T], deadline: float) -> T:
        if self.waiting >= self._room:
            raise HashingOverloaded(detail="the queue is full", retry_after=int(deadline))
        self.waiting += 1
        began = time.perf_counter()
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        future.add_done_callback(self._leave)
        try:
            return await asyncio.wait_for(future, deadline)
        except TimeoutError:
            raise HashingOverloaded(detail="the deadline passed", retry_after=int(deadline)) from None
        finally:
            self._observe(time.perf_counter() - began)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _leave(self, _: object) -> None:
        self.waiting -= 1


def _lower_priority() -> None:
    # Linux counts niceness per thread. Elsewhere the threads keep the priority of the process.
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
