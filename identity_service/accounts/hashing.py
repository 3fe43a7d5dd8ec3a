"""Argon2id off the event loop: a few threads at low priority behind a bounded queue with a deadline.

When more passwords wait than can be answered in time, further ones are turned away at once; refreshes, the JWKS and
health never notice. The policy for passwords is next door in `passwords`.
"""

import asyncio
import contextlib
import os
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from argon2 import PasswordHasher, Type
from argon2.exceptions import InvalidHashError, VerificationError

from identity_service.errors import HashingOverloaded

T = TypeVar("T")

NICENESS = 10
"""Priority of the hashing threads: below the event loop, so that a flood of logins leaves refreshes their latency."""

QUEUE_PER_THREAD = 100
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
    """

    def __init__(self, cost: Argon2Cost, *, threads: int, deadline: float = DEADLINE_SECONDS) -> None:
        self._hasher = PasswordHasher(
            time_cost=cost.time_cost,
            memory_cost=cost.memory_kib,
            parallelism=cost.parallelism,
            hash_len=32,
            salt_len=16,
            type=Type.ID,
        )
        self._deadline = deadline
        self._room = threads * QUEUE_PER_THREAD
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="argon2", initializer=_lower_priority)
        # For users that do not exist: nobody knows its password, and it costs what a real one does.
        self._nobodys_hash = self._hasher.hash(secrets.token_urlsafe(32))

    async def hash(self, password: str, *, check: Callable[[], None] | None = None) -> str:
        """Return the password as a PHC string.

        Args:
            check: runs in the thread first, for checks of the password that take milliseconds too.

        Raises:
            HashingOverloaded: the queue is full or the deadline passed.
        """

        def work() -> str:
            if check is not None:
                check()
            return self._hasher.hash(password)

        return await self._run(work)

    async def verify(self, password_hash: str | None, password: str) -> Verdict:
        """Say whether the password matches the stored hash.

        Without a stored hash the work is done all the same, and the answer is no.

        Raises:
            HashingOverloaded: the queue is full or the deadline passed.
        """
        return await self._run(lambda: self._verify(password_hash, password))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _verify(self, password_hash: str | None, password: str) -> Verdict:
        try:
            self._hasher.verify(password_hash or self._nobodys_hash, password)
        except (VerificationError, InvalidHashError):
            return Verdict(matched=False)
        if password_hash is None:
            return Verdict(matched=False)
        if self._hasher.check_needs_rehash(password_hash):
            return Verdict(matched=True, replacement=self._hasher.hash(password))
        return Verdict(matched=True)

    async def _run(self, work: Callable[[], T]) -> T:
        if self._room <= 0:
            raise HashingOverloaded(detail="the queue is full", retry_after=int(self._deadline))
        self._room -= 1
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        future.add_done_callback(self._leave)
        try:
            return await asyncio.wait_for(future, self._deadline)
        except TimeoutError:
            raise HashingOverloaded(detail="the deadline passed", retry_after=int(self._deadline)) from None

    def _leave(self, _: object) -> None:
        self._room += 1


def _lower_priority() -> None:
    # Linux counts niceness per thread. Elsewhere the threads keep the priority of the process.
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
