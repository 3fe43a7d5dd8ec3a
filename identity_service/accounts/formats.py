"""Reading stored password hashes, ours and those of other systems: what they are, and whether a password matches.

Nothing here makes a hash: `hashing` does, always with Argon2id, and replaces whatever else it finds at the next login.
Parameters have ceilings, so that no stored hash, imported or slipped in, can keep a thread or the memory busy for long.
Passwords come in as text and are hashed as UTF-8.
"""

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass

from argon2 import PasswordHasher
from argon2.exceptions import HashingError, VerificationError, VerifyMismatchError

UNUSABLE = "!"
"""Stands where an account without a password has its hash. Django marks such accounts with it too."""

MOST_BCRYPT_COST = 14
MOST_ROUNDS = {"sha1": 3_000_000, "sha256": 3_000_000, "sha512": 1_500_000}
"""Of PBKDF2, times the blocks of its output."""
MOST_MEMORY_KIB = 256 * 1024
"""Of Argon2 and of scrypt."""
MOST_ARGON2_WORK = 1024 * 1024
"""Memory in KiB times passes."""
MOST_ARGON2_PASSES = 64
MOST_LANE_PASSES = 256
"""Passes times lanes. Each takes four threads, which cost more than the work when there is little memory."""
MOST_SCRYPT_WORK = 2**21
"""N times r times p."""
MOST_LANES = 16
MOST_CHARACTERS = 512
SALT_BYTES = range(1, 65)
DIGEST_BYTES = range(16, 65)
_ARGON2_LEAST_SALT = 8
_BCRYPT_BYTES = 72


class HashRejected(ValueError):
    """A stored hash is of no known format or exceeds a ceiling. The text may be shown: it repeats nothing of it."""


@dataclass(frozen=True, slots=True)
class StoredHash:
    """A hash that can be verified.

    Args:
        format: `argon2id`, `bcrypt`, ...: one word for reports.
        cost: its parameters, without salt and digest.
        is_digest_of: whether the bytes are what was hashed; takes up to some two seconds, and lets go of the GIL.
    """

    format: str
    cost: str
    is_digest_of: Callable[[bytes], bool]

    def matches(self, password: str) -> bool:
        """Say whether the password matches. Text that has no bytes in UTF-8 never does.

        Raises:
            HashingError, MemoryError: there is not the memory that it takes.
        """
        try:
            return self.is_digest_of(password.encode())
        except UnicodeEncodeError:
            return False


def read(stored: str) -> StoredHash:
    """Return what a stored hash is.

    Raises:
        HashRejected: nothing else, whatever the text.
    """
    if len(stored) > MOST_CHARACTERS:
        raise HashRejected("The password hash is too long.")
    for pattern, reader in _FORMATS:
        if match := pattern.fullmatch(stored):
            return reader(match)
    raise HashRejected("The password hash has a format that is not known, or its format's parts are damaged.")


def _argon2(match: re.Match[str]) -> StoredHash:
    memory, passes, lanes = int(match["m"]), int(match["t"]), int(match["p"])
    _check(lanes, range(1, MOST_LANES + 1), "lanes")
    _check(memory, range(8 * lanes, MOST_MEMORY_KIB + 1), "memory")
    _check(passes, range(1, MOST_ARGON2_PASSES + 1), "passes")
    _check(memory * passes, range(1, MOST_ARGON2_WORK + 1), "memory times passes")
    _check(passes * lanes, range(1, MOST_LANE_PASSES + 1), "passes times lanes")
    _check(len(_base64(match["salt"])), range(_ARGON2_LEAST_SALT, SALT_BYTES.stop), "length of the salt")
    _check(len(_base64(match["digest"])), DIGEST_BYTES, "length of the digest")
    phc = match["phc"]

    def is_digest_of(password: bytes) -> bool:
        try:
            return PasswordHasher().verify(phc, password)
        except VerifyMismatchError:
            return False
        except VerificationError as error:  # it is well formed, so that there was no memory: that is no wrong password
            raise HashingError(*error.args) from None

    return StoredHash(match["type"], f"m={memory},t={passes},p={lanes}", is_digest_of)


def _bcrypt(match: re.Match[str]) -> StoredHash:
    _check(int(match["cost"]), range(4, MOST_BCRYPT_COST + 1), "cost")
    stored = match["hash"].encode()
    hashed_before = match["sha256"] is not None

    def is_digest_of(password: bytes) -> bool:
        import bcrypt

        # Every bcrypt reads 72 bytes and no more. The library refuses longer input where those that wrote the hash cut.
        known = hashlib.sha256(password).hexdigest().encode() if hashed_before else password[:_BCRYPT_BYTES]
        return b"\0" not in known and bcrypt.checkpw(known, stored)

    return StoredHash("bcrypt_sha256" if hashed_before else "bcrypt", match["cost"], is_digest_of)


def _scrypt(match: re.Match[str], n: int, salt: bytes, digest: bytes) -> StoredHash:
    r, p = int(match["r"]), int(match["p"])
    _check(r, range(1, 33), "block size")
    _check(p, range(1, MOST_LANES + 1), "parallelism")
    _check(n * r * p, range(1, MOST_SCRYPT_WORK + 1), "work")
    _check(n * r // 8, range(MOST_MEMORY_KIB + 1), "memory")
    if n < 2 or n & (n - 1) or n.bit_length() > 16 * r:  # RFC 7914 6
        raise HashRejected("The password hash has a cost that scrypt does not have.")
    _check(len(salt), SALT_BYTES, "length of the salt")
    _check(len(digest), DIGEST_BYTES, "length of the digest")

    def is_digest_of(password: bytes) -> bool:
        memory = 128 * r * (n + p + 2)
        try:
            made = hashlib.scrypt(password, salt=salt, n=n, r=r, p=p, maxmem=memory + 2**20, dklen=len(digest))
        except ValueError as error:  # of what was asked for nothing is wrong
            raise MemoryError(*error.args) from None
        return hmac.compare_digest(made, digest)

    return StoredHash("scrypt", f"n={n},r={r},p={p}", is_digest_of)


def _pbkdf2(match: re.Match[str], salt: bytes, digest: bytes) -> StoredHash:
    algorithm, rounds = match["algorithm"] or "sha1", int(match["rounds"])
    _check(len(salt), SALT_BYTES, "length of the salt")
    _check(len(digest), DIGEST_BYTES, "length of the digest")
    blocks = -(-len(digest) // hashlib.new(algorithm, usedforsecurity=False).digest_size)
    _check(rounds * blocks, range(1, MOST_ROUNDS[algorithm] + 1), "iterations")

    def is_digest_of(password: bytes) -> bool:
        made = hashlib.pbkdf2_hmac(algorithm, password, salt, rounds, len(digest))
        return hmac.compare_digest(made, digest)

    return StoredHash(f"pbkdf2_{algorithm}", str(rounds), is_digest_of)


def _check(value: int, allowed: range, what: str) -> None:
    if value not in allowed:
        raise HashRejected(f"The password hash is outside the accepted range: {what}, {allowed[0]} to {allowed[-1]}.")


def _base64(text: str) -> bytes:
    """Decode base64 with or without padding, in the alphabet of PHC strings or in passlib's, which has `.` for `+`."""
    try:
        return base64.b64decode(text.replace(".", "+").rstrip("=") + "=" * (-len(text.rstrip("=")) % 4), validate=True)
    except binascii.Error:
        raise HashRejected("The password hash has a part that is not base64.") from None


def _hex(text: str) -> bytes:
    if len(text) % 2:
        raise HashRejected("The password hash has a part that is not hexadecimal.")
    return bytes.fromhex(text)


_NUMBER = "[1-9][0-9]{0,8}"
_TEXT = "[!-#%-~]{1,64}"
_BASE64 = "[A-Za-z0-9+/.]{1,128}"
_PADDED = "[A-Za-z0-9+/]{1,128}={0,2}"
_HEX = "[0-9a-f]{1,128}"
_HASHES = "sha1|sha256|sha512"


def _format(
    pattern: str, reader: Callable[[re.Match[str]], StoredHash]
) -> tuple[re.Pattern[str], Callable[[re.Match[str]], StoredHash]]:
    return re.compile(pattern, re.ASCII), reader


# Argon2d is not among them: no library writes it for passwords, and its memory access depends on the password.
_FORMATS = (
    _format(
        rf"(?:argon2)?(?P<phc>\$(?P<type>argon2id?)(?:\$v=(?:16|19))?\$m=(?P<m>{_NUMBER}),t=(?P<t>{_NUMBER}),p=(?P<p>{_NUMBER})"
        rf"\$(?P<salt>[A-Za-z0-9+/]{{1,128}})\$(?P<digest>[A-Za-z0-9+/]{{1,128}}))",
        _argon2,
    ),
    # The last character of the salt has four bits that mean nothing and have to be zero.
    _format(
        r"(?:bcrypt(?P<sha256>_sha256)?\$)?(?P<hash>\$2[aby]\$(?P<cost>[0-9]{2})\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31})",
        _bcrypt,
    ),
    # Django
    _format(
        rf"scrypt\$(?P<n>{_NUMBER})\$(?P<salt>{_TEXT})\$(?P<r>{_NUMBER})\$(?P<p>{_NUMBER})\$(?P<digest>{_PADDED})",
        lambda match: _scrypt(match, int(match["n"]), match["salt"].encode(), _base64(match["digest"])),
    ),
    _format(
        rf"pbkdf2_(?P<algorithm>{_HASHES})\$(?P<rounds>{_NUMBER})\$(?P<salt>{_TEXT})\$(?P<digest>{_PADDED})",
        lambda match: _pbkdf2(match, match["salt"].encode(), _base64(match["digest"])),
    ),
    # Werkzeug
    _format(
        rf"scrypt:(?P<n>{_NUMBER}):(?P<r>{_NUMBER}):(?P<p>{_NUMBER})\$(?P<salt>{_TEXT})\$(?P<digest>{_HEX})",
        lambda match: _scrypt(match, int(match["n"]), match["salt"].encode(), _hex(match["digest"])),
    ),
    _format(
        rf"pbkdf2:(?P<algorithm>{_HASHES}):(?P<rounds>{_NUMBER})\$(?P<salt>{_TEXT})\$(?P<digest>{_HEX})",
        lambda match: _pbkdf2(match, match["salt"].encode(), _hex(match["digest"])),
    ),
    # PHC strings, and passlib's, which came before them
    _format(
        rf"\$scrypt\$ln=(?P<ln>[1-9][0-9]?),r=(?P<r>{_NUMBER}),p=(?P<p>{_NUMBER})\$(?P<salt>{_BASE64})\$(?P<digest>{_BASE64})",
        lambda match: _scrypt(match, 2 ** int(match["ln"]), _base64(match["salt"]), _base64(match["digest"])),
    ),
    _format(
        rf"\$pbkdf2(?:-(?P<algorithm>{_HASHES}))?\$(?:i=)?(?P<rounds>{_NUMBER})(?:,l=[0-9]{{1,3}})?"
        rf"\$(?P<salt>{_BASE64})\$(?P<digest>{_BASE64})",
        lambda match: _pbkdf2(match, _base64(match["salt"]), _base64(match["digest"])),
    ),
)
