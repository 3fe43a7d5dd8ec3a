"""What only the shell asks for, and hands down as values: the time, new ids, and new secrets."""

import secrets
from datetime import UTC, datetime
from uuid import UUID


def utc_now() -> datetime:
    return datetime.now(UTC)


def uuid7(now: datetime) -> UUID:
    """Return a version 7 UUID (RFC 9562 5.7): 48 bits of milliseconds, then 74 random bits.

    Rows keyed by it land at the right edge of the index, which at ten million sessions writes a fifth of the log that
    random keys do.
    """
    milliseconds = int(now.timestamp() * 1000)
    random_bits = secrets.randbits(74)
    value = milliseconds << 80 | 0x7 << 76 | (random_bits >> 62) << 64 | 0b10 << 62 | random_bits & (1 << 62) - 1
    return UUID(int=value)


def reset_token() -> str:
    """Return 256 random bits as 43 URL-safe characters."""
    return secrets.token_urlsafe(32)


def client_secret() -> str:
    """Return 256 random bits as a secret that programs which look for leaked ones can tell by how it begins."""
    return f"ids_{secrets.token_urlsafe(32)}"


def token_id() -> str:
    """Return 128 random bits as 22 URL-safe characters."""
    return secrets.token_urlsafe(16)
