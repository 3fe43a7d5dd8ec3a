"""SQL of the revoked tokens."""

from collections.abc import AsyncIterator
from datetime import datetime, timedelta

from identity_service.database import Connection
from identity_service.revocation import CHANNEL, MANY, RevokedIndex

REMEMBERED_LONGER = timedelta(minutes=2)
"""A verifier may take a token for a minute after its end, by a clock a minute behind ours."""
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


def insert_from(source: str, *, now: str, reason: str) -> str:
    """Return a statement that revokes each row of a source, as a part of one that goes on with `tell`.

    It returns the `jti` of each that was good until now. They are remembered for as long as a token could still be
    accepted somewhere, and where there is none, long enough to be told to whoever holds a connection open on one.

    Args:
        source: has a `jti` (a token's, or a session's id, which its tokens carry as `sid`), a `status_index`, and
            `expires_at`, when the last of those tokens ends.
        now, reason: parameters.
    """
    return f"""
        INSERT INTO revoked_tokens (jti, status_index, reason, revoked_at, expires_at)
        SELECT jti, status_index, {reason}, {now}, greatest(expires_at, {now}) + interval '{REMEMBERED_LONGER}'
          FROM {source}
        ON CONFLICT (jti) DO NOTHING
        RETURNING jti
    """


def tell() -> str:
    """Return what is selected from what has been revoked, so that listeners hear of it when this is committed."""
    told = f"CASE WHEN count(*) > 1000 OR clock_timestamp() - now() > interval '1 second' THEN '{MANY}' ELSE '' END"
    return f"CASE WHEN count(*) > 0 THEN pg_notify('{CHANNEL}', {told}) END"


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
