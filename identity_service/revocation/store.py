"""SQL of the revoked tokens."""

from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta

from identity_service.database import Connection
from identity_service.revocation import CHANNEL, Revocable, RevokedIndex

INSERT = f"""
    WITH inserted AS (
        INSERT INTO revoked_tokens (jti, status_index, reason, revoked_at, expires_at)
        SELECT jti, status_index, $4, $5, expires_at
          FROM unnest($1::text[], $2::bigint[], $3::timestamptz[]) AS given (jti, status_index, expires_at)
        ON CONFLICT (jti) DO NOTHING
        RETURNING jti
    )
    SELECT count(*), pg_notify('{CHANNEL}', '') FROM inserted
"""
LIST_SINCE = """
    SELECT status_index, expires_at, recorded_at FROM revoked_tokens
     WHERE recorded_at > $2::timestamptz - $3::interval AND expires_at > $1 AND status_index IS NOT NULL
     ORDER BY recorded_at
"""
LIST_ALL = """
    SELECT status_index, expires_at, recorded_at FROM revoked_tokens
     WHERE expires_at > $1 AND status_index IS NOT NULL
     ORDER BY recorded_at
"""
# Both ids begin with the time at which they were made.
FIND_FIRST_INDEX = """
    SELECT least((SELECT status_index FROM sessions ORDER BY id LIMIT 1),
                 (SELECT status_index FROM client_tokens ORDER BY jti LIMIT 1))
"""
FIND_LAST_INDEX = "SELECT last_value FROM status_index_seq"


async def insert(
    db: Connection, revoked: Sequence[Revocable], *, reason: str, revoked_at: datetime, expires_at: Sequence[datetime]
) -> int:
    """Insert a row for each that is not there yet, to be forgotten at its `expires_at`; return how many.

    Whoever listens on `CHANNEL` hears of it when the transaction commits.
    """
    jtis, indexes = [item.token_id for item in revoked], [item.status_index for item in revoked]
    new: int = await db.fetchval(INSERT, jtis, indexes, expires_at, reason, revoked_at)
    return new


async def list_since(
    db: Connection, since: datetime | None, *, overlap: timedelta, now: datetime, at_once: int
) -> AsyncIterator[RevokedIndex]:
    """Yield what was recorded from some time before `since` on, or everything, and still matters, oldest first.

    The overlap finds rows that were written earlier and committed later. There may be very many: others have their turn
    whenever so many have been read. Call within a transaction.
    """
    query, arguments = (LIST_ALL, (now,)) if since is None else (LIST_SINCE, (now, since, overlap))
    async for row in db.cursor(query, *arguments, prefetch=at_once):
        yield RevokedIndex(row["status_index"], row["expires_at"], row["recorded_at"])


async def index_range(db: Connection) -> tuple[int, int]:
    """Return the lowest number that a session or a client's token may still have, and the highest handed out."""
    last: int = await db.fetchval(FIND_LAST_INDEX)
    first: int | None = await db.fetchval(FIND_FIRST_INDEX)
    return (last if first is None else first), last
