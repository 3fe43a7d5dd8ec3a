"""Revoked tokens: which are no longer good before they expire, and how everybody else hears of it.

`revoking` is the one place through which everything is revoked, in the same transaction as what caused it. `feed` keeps
a process up to date with what any replica revoked, and `status_lists` renders it for whoever verifies tokens elsewhere.
Ending the session row is the business of `sessions`.
"""

from dataclasses import dataclass
from datetime import datetime

CHANNEL = "identity_revoked"
"""On which the database tells listeners that something was revoked; never more than a hint."""

LIST_SIZE = 1 << 20
"""Entries of a status list."""


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the status lists: the list's number and the index in it."""

    list_number: int
    index: int


def position(status_index: int) -> Position:
    """Return the place of a session. The database has scattered it over its list already: `next_status_index()`."""
    return Position(*divmod(status_index, LIST_SIZE))


@dataclass(frozen=True, slots=True)
class Revocable:
    """What tokens carry: an id (of a session, as `sid`, or of a single token, as `jti`), and a status index.

    `expires_at` is when the last token that carries them ends.
    """

    token_id: str
    status_index: int
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class RevokedIndex:
    """One revoked entry of the status lists, for as long as a token that names it could still be accepted.

    `recorded_at` is by the database's clock, `expires_at` by ours.
    """

    status_index: int
    expires_at: datetime
    recorded_at: datetime
