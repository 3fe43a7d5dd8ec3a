"""SQL of the revoked token ids."""

from collections.abc import Sequence
from datetime import datetime

from identity_service.database import Connection

INSERT = """
    INSERT INTO revoked_tokens (jti, reason, revoked_at, expires_at)
    SELECT jti, $2, $3, $4 FROM unnest($1::text[]) AS jti
    ON CONFLICT (jti) DO NOTHING
"""
DELETE_EXPIRED = """
    DELETE FROM revoked_tokens WHERE jti IN (
        SELECT jti FROM revoked_tokens WHERE expires_at < $1 LIMIT $2 FOR UPDATE SKIP LOCKED
    )
"""


async def insert(
    db: Connection, jtis: Sequence[str], *, reason: str, revoked_at: datetime, expires_at: datetime
) -> None:
    await db.execute(INSERT, list(jtis), reason, revoked_at, expires_at)


async def delete_expired(db: Connection, *, now: datetime, limit: int) -> int:
    """Delete rows that concern no token any more; return how many."""
    return int((await db.execute(DELETE_EXPIRED, now, limit)).rpartition(" ")[2])
