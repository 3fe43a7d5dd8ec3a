"""SQL of the tallies of failures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from identity_service.database import Connection, Record

_TALLY = "t.key, t.failures, t.last_failed_at, t.blocked_until"


def key_of_account(user_id: str) -> str:
    """Return what computes the key of an account's tally from its id."""
    return f"sha256(convert_to('account user ' || {user_id}, 'UTF8'))"


def nothing_counts(target: str, place: str, now: str) -> str:
    """Return a condition: there are no failures of the target, and the place is not blocked. Keys may be NULL."""
    return f"""
            NOT EXISTS (SELECT FROM throttles WHERE key = {target})
        AND NOT EXISTS (SELECT FROM throttles WHERE key = {place} AND blocked_until > {now})
    """


FIND = f"SELECT {_TALLY} FROM throttles AS t WHERE t.key = ANY ($1)"
# Makes the rows that are not there: of many first failures at once each counts. In one order, so that no two can wait
# for each other.
LOCK = f"""
    INSERT INTO throttles AS t (key, failures, last_failed_at, blocked_until)
    SELECT given.key, 0, $2, $2 FROM unnest($1::bytea[]) AS given (key) ORDER BY given.key
    ON CONFLICT (key) DO UPDATE SET failures = t.failures
    RETURNING {_TALLY}
"""
UPDATE = """
    UPDATE throttles AS t
       SET failures = given.failures, last_failed_at = given.last_failed_at, blocked_until = given.blocked_until
      FROM unnest($1::bytea[], $2::integer[], $3::timestamptz[], $4::timestamptz[])
           AS given (key, failures, last_failed_at, blocked_until)
     WHERE t.key = given.key
"""
DELETE_OPEN = "DELETE FROM throttles WHERE key = $1 AND blocked_until <= $2"
DELETE = "DELETE FROM throttles WHERE key = $1 RETURNING failures"


@dataclass(frozen=True, slots=True)
class Tally:
    """What is known about one key.

    Args:
        failures: in a row for an account or a client; for an address those that have not drained yet.
        last_failed_at: for an address the moment up to which they have drained.
    """

    failures: int
    last_failed_at: datetime
    blocked_until: datetime


async def find(db: Connection, keys: Sequence[bytes]) -> dict[bytes, Tally]:
    return tallies_of(await db.fetch(FIND, keys))


async def lock(db: Connection, keys: Sequence[bytes], *, now: datetime) -> dict[bytes, Tally]:
    """Return the tallies of all the keys, new ones where there were none, and keep others from changing them."""
    return tallies_of(await db.fetch(LOCK, keys, now))


async def update(db: Connection, tallies: Mapping[bytes, Tally]) -> None:
    given = tallies.values()
    await db.execute(
        UPDATE,
        list(tallies),
        [tally.failures for tally in given],
        [tally.last_failed_at for tally in given],
        [tally.blocked_until for tally in given],
    )


async def delete_open(db: Connection, key: bytes, *, now: datetime) -> None:
    """Delete a tally unless it blocks."""
    await db.execute(DELETE_OPEN, key, now)


async def delete(db: Connection, key: bytes) -> int:
    """Delete a tally and return how many failures it held."""
    return await db.fetchval(DELETE, key) or 0


def tallies_of(rows: Sequence[Record]) -> dict[bytes, Tally]:
    return {row["key"]: Tally(row["failures"], row["last_failed_at"], row["blocked_until"]) for row in rows}
