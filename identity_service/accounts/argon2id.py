"""Argon2id, the one way in which this service makes password hashes (RFC 9106).

The library takes the memory for each hash from the system, in pages of 4 KiB, and Argon2 goes to and fro in it: a fifth
of the time goes into finding pages. So a thread that hashes all day keeps its memory, in huge pages where the system
has them, and the library is handed that. What is computed, and how, is the library's own.
See docs/decisions/0016-argon2-in-memory-that-is-kept.md. Other hashes are read by `formats`.
"""

import hmac
import mmap
import re
import threading
from base64 import b64decode, b64encode
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from argon2.exceptions import HashingError
from argon2.low_level import ARGON2_VERSION, Type, core, error_to_str, ffi

from identity_service.settings import Settings

SALT_BYTES = 16
_DIGEST_BYTES = 32
_HUGE_PAGE = 2 << 20
_DONE, _FAILED = 0, 1


@dataclass(frozen=True, slots=True)
class Argon2Cost:
    """Parameters of Argon2id (RFC 9106 3.1): memory in KiB, passes, lanes."""

    memory_kib: int
    time_cost: int
    parallelism: int

    @classmethod
    def of(cls, settings: Settings) -> "Argon2Cost":
        return cls(settings.argon2_memory_kib, settings.argon2_time_cost, settings.argon2_parallelism)


class Argon2id:
    """Makes and verifies hashes of one cost, as PHC strings."""

    def __init__(self, cost: Argon2Cost) -> None:
        self._cost = cost
        self.kind = f"$argon2id$v={ARGON2_VERSION}$m={cost.memory_kib},t={cost.time_cost},p={cost.parallelism}$"
        """How hashes of this cost begin."""
        # The last characters carry bits that mean nothing, and have to be zero.
        self._made_here = re.compile(
            re.escape(self.kind) + r"([A-Za-z0-9+/]{21}[AQgw])\$([A-Za-z0-9+/]{42}[AEIMQUYcgkosw048])", re.ASCII
        )

    def has_made(self, password_hash: str) -> bool:
        """Say whether this is a hash of this cost, with a salt and a digest of the lengths that are made here."""
        return self._made_here.fullmatch(password_hash) is not None

    def hash(self, password: str, salt: bytes) -> str:
        """Return a hash. Takes long, and lets go of the GIL.

        Args:
            salt: 16 bytes that no other hash has.

        Raises:
            HashingError: there is no memory.
        """
        return f"{self.kind}{_base64(salt)}${_base64(self._digest(password, salt))}"

    def verify(self, password_hash: str, password: str) -> bool:
        """Say whether a password matches a hash that this `has_made`. Takes as long as to make one.

        Raises:
            HashingError: there is no memory.
        """
        match = self._made_here.fullmatch(password_hash)
        assert match is not None, "the caller asks `has_made` first"
        salt, digest = (b64decode(part + "=" * (-len(part) % 4), validate=True) for part in match.groups())
        return hmac.compare_digest(self._digest(password, salt), digest)

    def _digest(self, password: str, salt: bytes) -> bytes:
        octets = password.encode()
        # Held by names for as long as the library looks at them.
        digest, given, salted = (
            ffi.new("uint8_t[]", _DIGEST_BYTES), ffi.new("uint8_t[]", octets), ffi.new("uint8_t[]", salt)
        )  # fmt: skip
        memory: _Memory | None = getattr(_of_thread, "memory", None)
        kept = memory is not None and memory.size >= self._cost.memory_kib * 1024
        context = ffi.new(
            "argon2_context *",
            {
                "out": digest,
                "outlen": _DIGEST_BYTES,
                "pwd": given,
                "pwdlen": len(octets),
                "salt": salted,
                "saltlen": len(salt),
                "t_cost": self._cost.time_cost,
                "m_cost": self._cost.memory_kib,
                "lanes": self._cost.parallelism,
                "threads": self._cost.parallelism,
                "version": ARGON2_VERSION,
                "allocate_cbk": _lend if kept else ffi.NULL,
                "free_cbk": _take_back if kept else ffi.NULL,
            },
        )
        outcome = core(context, Type.ID.value)
        if outcome != _DONE:
            raise HashingError(error_to_str(outcome))
        return bytes(ffi.buffer(digest))


def keep_memory(cost: Argon2Cost) -> None:
    """Let this thread keep the memory for hashes of a cost, or less, from now on, until it ends.

    Where a system lets nobody make functions at run time, which C could call back, or has no memory to give at this
    moment, it does without.
    """
    if _lend is not None and _take_back is not None:
        with suppress(OSError, MemoryError):
            _of_thread.memory = _Memory(cost.memory_kib * 1024)


class _Memory:
    """Memory at an address that huge pages begin at. The library wipes it after each hash."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._map = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        octets = ffi.from_buffer(self._map)
        offset = -int(ffi.cast("uintptr_t", octets)) % _HUGE_PAGE
        with suppress(AttributeError, OSError):  # not Linux, or a kernel without them
            # Whole ones only: another would be taken for what is left at the end.
            self._map.madvise(mmap.MADV_HUGEPAGE, offset, size // _HUGE_PAGE * _HUGE_PAGE)
        self.start = ffi.cast("uint8_t *", octets) + offset


_of_thread = threading.local()


def _hand_over(place: Any, size: int) -> int:
    memory: _Memory = _of_thread.memory
    if size > memory.size:
        return _FAILED
    place[0] = memory.start
    return _DONE


def _callback(signature: str, function: Any) -> Any:
    """Return a function as C calls it, None where nobody may make one."""
    try:
        return ffi.callback(signature, function, error=_FAILED if signature.startswith("int") else None)
    except (MemoryError, SystemError):
        return None


_lend = _callback("int(uint8_t **, size_t)", _hand_over)
_take_back = _callback("void(uint8_t *, size_t)", lambda _memory, _size: None)


def _base64(octets: bytes) -> str:
    return b64encode(octets).decode().rstrip("=")
