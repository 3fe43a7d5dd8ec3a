"""Argon2id off the event loop: a few threads at low priority behind a bounded queue with a deadline.

When more passwords wait than can be answered in time, further ones are turned away at once; refreshes, the JWKS and
health never notice. While those fill the event loop, a flood of passwords is hashed at a pace. Next door, `formats`
reads hashes, also those of other systems, and `passwords` holds the policy.

Verifying a hash that is not of today's kind takes another time than nobody's. So while there are such hashes, refusals
are answered at whole multiples of a step that is longer than the slowest of them takes: see
docs/decisions/0012-password-hashes-of-other-systems.md.
"""

import asyncio
import contextlib
import os
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TypeAlias, TypeVar

from argon2.exceptions import HashingError

from identity_service.accounts import formats
from identity_service.accounts.argon2id import SALT_BYTES, Argon2Cost, Argon2id, keep_memory
from identity_service.accounts.formats import HashRejected, StoredHash
from identity_service.errors import HashingOverloaded, IdentityError

T = TypeVar("T")
Kind: TypeAlias = tuple[str, str]
"""Format and cost of a hash."""

NICENESS = 10
"""Priority of the hashing threads: below the event loop, so that a flood of logins leaves refreshes their latency.

Not the lowest there is: at 19 a core that refreshes fill leaves logins nothing, and they run into the deadline.
"""

PACE_SECONDS = 0.1
"""From one password to the next while many wait and the event loop has no rest.

A login costs the loop as much as two or three refreshes, so that a flood of them would take the place of a quarter of
those that fill it.
"""

LOOK_SECONDS = 0.1
NO_REST = 0.9
"""Share of the time between two looks that the loop must have run, or waited for a core, to count as busy."""

QUEUE_PER_THREAD = 100
SHARE_OF_DEADLINE = 0.75
"""Only as many are let in as should be done in this share of the deadline: the next ones may take longer."""

TELLING = 4
"""How many hashes each thread must have done before their speed is relied on."""

ESTIMATES_AT_ONCE = 32
DEADLINE_SECONDS = 8.0

STEP = 4
"""The step of refusals is so many times the slowest one: room for a second spelling, and for a busy machine."""

MOST_STEP_SECONDS = 4.0
"""The longest step: enough for both spellings of the costliest hash that `formats` takes, and for one of ours."""

LOOKS_UNTIL_GONE = 60
"""In how many looks in a row a kind must be missing. In a large table a look is at a sample."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a password matched, and the hash to store instead when the stored one is not of today's kind.

    Args:
        refuse_at: when to answer if it is a refusal, on the monotonic clock; see `PasswordHashing.holding_back`.
    """

    matched: bool
    replacement: str | None = None
    refuse_at: float = 0.0


@dataclass(frozen=True, slots=True)
class _Known:
    """What a refusal takes for a kind of hash, at best, and how many looks in a row did not find one."""

    seconds: float
    missed: int = 0


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
        self._hasher = Argon2id(cost)
        self._deadline = deadline
        room = threads * QUEUE_PER_THREAD
        self._hashes = _BoundedThreads(threads, room, observe, prepare=lambda: keep_memory(cost), pace=PACE_SECONDS)
        self._estimates = _BoundedThreads(1, ESTIMATES_AT_ONCE)
        # For users that do not exist: nobody knows its password, and it costs what a real one does.
        self._nobodys_hash = self._hash(secrets.token_urlsafe(32))
        # The kinds of stored hashes but today's. Changed by the threads as well, a whole entry at a time.
        self._kinds: dict[Kind, _Known] = {}

    @property
    def waiting(self) -> int:
        """How many passwords wait or are being hashed."""
        return self._hashes.waiting

    async def hash(self, password: str) -> str:
        """Return the password as a PHC string.

        Raises:
            HashingOverloaded: the queue is full or the deadline passed.
        """
        return await self._hashes.run(lambda: self._hash(password), self._deadline)

    async def estimate(self, check: Callable[[], None]) -> None:
        """Run a check of a new password that takes long, in a thread that no login waits for.

        Raises:
            HashingOverloaded: the queue is full or the deadline passed.
        """
        await self._estimates.run(check, self._deadline)

    def refuse_when_full(self) -> None:
        """Turn away whom `verify` would turn away, before anything is spent on them.

        Raises:
            HashingOverloaded: the queue is full.
        """
        self._hashes.refuse_when_full(self._deadline)

    async def verify(self, password_hash: str | None, password: str, *, as_sent: str | None = None) -> Verdict:
        """Say whether the password matches the stored hash.

        Without a stored hash that can be read the work is done all the same, and the answer is no.

        Args:
            password: normalised.
            as_sent: the password before that, which is what other systems may have hashed.

        Raises:
            HashingOverloaded: the queue is full or the deadline passed.
        """
        spellings = dict.fromkeys((password, as_sent if as_sent is not None else password))
        return await self._hashes.run(lambda: self._verify(password_hash, list(spellings)), self._deadline)

    @contextlib.asynccontextmanager
    async def holding_back(self, verdict: Verdict) -> AsyncIterator[None]:
        """Delay a refusal that is raised within until the end of its step.

        Count the failure within, too: guesses sent at once must not wait side by side, uncounted.
        """
        try:
            yield
        except IdentityError:
            if (wait := verdict.refuse_at - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            raise

    @property
    def own_kind(self) -> str:
        """How hashes of today's kind begin."""
        return self._hasher.kind

    async def learn(self, password_hashes: Iterable[str]) -> None:
        """Take up a look at the stored hashes: measure kinds that are new, forget those that have long been missing.

        The slowest, which makes the step, is measured again: the machine may have been busy.

        Raises:
            HashingOverloaded: the queue is full or the deadline passed.
        """
        found = await self._estimates.run(lambda: self._outdated(password_hashes), self._deadline)
        for kind, known in list(self._kinds.items()):
            if kind in found:
                self._kinds[kind] = replace(known, missed=0)
            elif known.missed + 1 < LOOKS_UNTIL_GONE:
                self._kinds[kind] = replace(known, missed=known.missed + 1)
            else:
                del self._kinds[kind]
        slowest = max((known.seconds for known in list(self._kinds.values())), default=0.0)
        for kind, stored in found.items():
            if kind not in self._kinds or self._kinds[kind].seconds == slowest:
                await self.estimate(lambda stored=stored: self._measure(stored))  # type: ignore[misc]

    def close(self) -> None:
        self._hashes.close()
        self._estimates.close()

    def _hash(self, password: str) -> str:
        return self._hasher.hash(password, secrets.token_bytes(SALT_BYTES))

    def _verify(self, password_hash: str | None, spellings: list[str]) -> Verdict:
        """Verify a password.

        Args:
            spellings: normalised, then as it was sent if that is another text.
        """
        began = time.monotonic()
        if password_hash is not None and self._hasher.has_made(password_hash):
            matched = self._hasher.verify(password_hash, spellings[0])
            return Verdict(matched, refuse_at=self._end_of_step(began))
        stored = _read(password_hash) if password_hash is not None else None
        if stored is None:
            self._spend_as_much(spellings[0])
            return Verdict(matched=False, refuse_at=self._end_of_step(began))
        replacement = None
        if matched := any(stored.matches(spelling) for spelling in spellings):
            replacement = self._hash(spellings[0])
        else:
            self._spend_as_much(spellings[0])  # a cheaper hash must not tell that the account exists
        self._note(stored, time.monotonic() - began)
        return Verdict(matched, replacement, refuse_at=self._end_of_step(began))

    def _outdated(self, password_hashes: Iterable[str]) -> dict[Kind, StoredHash]:
        """Return a hash of each kind but today's."""
        found = {}
        for password_hash in password_hashes:
            stored = _read(password_hash)
            if stored is not None and not self._hasher.has_made(password_hash):
                found[_kind(stored)] = stored
        return found

    def _measure(self, stored: StoredHash) -> None:
        began = time.monotonic()
        stored.matches(secrets.token_urlsafe(12))
        self._spend_as_much("")
        self._note(stored, time.monotonic() - began)

    def _note(self, stored: StoredHash, seconds: float) -> None:
        """Note what a refusal took. The fastest one was disturbed the least."""
        known = self._kinds.get(_kind(stored))
        self._kinds[_kind(stored)] = _Known(min(seconds, known.seconds) if known is not None else seconds)

    def _end_of_step(self, began: float) -> float:
        """Return when a refusal is answered whose work began then and has just been done."""
        slowest = max((known.seconds for known in list(self._kinds.values())), default=0.0)
        if not slowest:
            return 0.0
        step = min(STEP * slowest, MOST_STEP_SECONDS)
        return began + step * ceil((time.monotonic() - began) / step)

    def _spend_as_much(self, password: str) -> None:
        """Do the work of a verification at today's cost; what comes of it is of no interest."""
        self._hasher.verify(self._nobodys_hash, password)


def _read(password_hash: str) -> StoredHash | None:
    try:
        return formats.read(password_hash)
    except HashRejected:
        return None


def _kind(stored: StoredHash) -> Kind:
    return stored.format, stored.cost


class _BoundedThreads:
    """A few threads at low priority, and room for so many pieces of work in all."""

    def __init__(
        self,
        threads: int,
        room: int,
        observe: Callable[[float], None] = lambda _: None,
        *,
        prepare: Callable[[], None] = lambda: None,
        pace: float = 0.0,
    ) -> None:
        self.waiting = 0
        self._at_once = threads
        self._room = room
        self._observe = observe
        self._pace = pace
        self._loop = _Unrest()
        self._starting = threading.Lock()
        self._next_start = 0.0
        self._busy_since, self._done = 0.0, 0

        def begin() -> None:
            _lower_priority()
            prepare()

        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="passwords", initializer=begin)

    def refuse_when_full(self, deadline: float) -> None:
        if not self._has_room(deadline):
            raise HashingOverloaded(detail="the queue is full", retry_after=int(deadline))

    async def run(self, work: Callable[[], T], deadline: float) -> T:
        self.refuse_when_full(deadline)
        began = time.perf_counter()
        try:
            future = asyncio.get_running_loop().run_in_executor(self._threads, self._in_turn, work)
        except RuntimeError as error:  # no thread can be started, or the service ends
            raise HashingOverloaded(detail=str(error), retry_after=int(deadline)) from None
        try:
            self.waiting += 1
            future.add_done_callback(self._leave)
            return await asyncio.wait_for(future, deadline)
        except TimeoutError:
            raise HashingOverloaded(detail="the deadline passed", retry_after=int(deadline)) from None
        except (HashingError, MemoryError) as error:
            raise HashingOverloaded(detail=f"no memory: {error}", retry_after=int(deadline)) from None
        finally:
            self._observe(time.perf_counter() - began)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _in_turn(self, work: Callable[[], T]) -> T:
        """Work, but while the event loop has no rest and many wait, only so often."""
        with self._starting:
            while self.waiting > self._at_once and self._loop.has_no_rest():
                if (wait := self._next_start - time.monotonic()) <= 0:
                    break
                time.sleep(min(wait, LOOK_SECONDS))
            self._next_start = time.monotonic() + self._pace
        return work()

    def _has_room(self, deadline: float) -> bool:
        """Say whether one more may wait: for one of the places, and for no longer than it has at the speed of late."""
        if self.waiting < self._at_once:  # a thread has nothing to do: whatever comes now is the beginning
            self._busy_since, self._done = time.monotonic(), 0
        if self._done >= TELLING * self._at_once:
            took = time.monotonic() - self._busy_since
            if self.waiting * took >= SHARE_OF_DEADLINE * deadline * self._done:
                return False
        return self.waiting < self._room

    def _leave(self, future: "asyncio.Future[T]") -> None:
        self.waiting -= 1
        if future.cancelled():
            return
        self._done += 1
        if self._done >= 4 * TELLING * self._at_once:  # what was long ago counts half
            self._done //= 2
            self._busy_since += (time.monotonic() - self._busy_since) / 2


class _Unrest:
    """Tells whether the thread that makes this ran, or waited for a core, all the time of late. Only Linux says."""

    def __init__(self) -> None:
        self._file = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._looked_at, self._wanted = time.monotonic(), self._wanted_so_far()
        self._answer = False

    def has_no_rest(self) -> bool:
        now = time.monotonic()
        if (passed := now - self._looked_at) >= LOOK_SECONDS:
            wanted = self._wanted_so_far()
            self._answer = wanted - self._wanted > NO_REST * passed
            self._looked_at, self._wanted = now, wanted
        return self._answer

    def _wanted_so_far(self) -> float:
        """Return for how many seconds the thread has run or waited, 0.0 where nobody knows."""
        try:
            ran, waited, _ = self._file.read_text(encoding="ascii").split()
        except (OSError, ValueError):
            return 0.0
        return (int(ran) + int(waited)) / 1e9


def _lower_priority() -> None:
    # Linux counts niceness per thread. Elsewhere the threads keep the priority of the process.
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
