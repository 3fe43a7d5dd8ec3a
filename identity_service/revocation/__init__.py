"""Revoked tokens: which are no longer good before they expire, and how everybody else hears of it.

`store.insert_from` is the one place through which everything is revoked, in the statement that ends it: `sessions` and
`clients` have those. `feed` keeps a process up to date with what any replica revoked, and `status_lists` renders it for
whoever verifies tokens elsewhere.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

CHANNEL = "identity_revoked"
"""On which the database tells listeners that something was revoked; never more than a hint."""

MANY = "many"
"""What it tells when it was so much, or took so long, that the first of it was recorded long before the end."""

LIST_SIZE = 1 << 20
"""Entries of a status list."""


class Reason(StrEnum):
    LOGOUT = "logout"
    REVOKED = "revoked"  # the client asked at /revoke, the user elsewhere, or an administrator
    REUSE = "reuse"  # a spent refresh token came back
    PASSWORD_CHANGED = "password_changed"  # noqa: S105 - a reason, not a secret
    ROLES_CHANGED = "roles_changed"
    CLIENT_CHANGED = "client_changed"  # it may not have sessions any more
    DISABLED = "disabled"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the status lists: the list's number and the index in it."""

    list_number: int
    index: int


def position(status_index: int) -> Position:
    """Return the place of a session. The database has scattered it over its list already: `next_status_index()`."""
    return Position(*divmod(status_index, LIST_SIZE))


@dataclass(frozen=True, slots=True)
class RevokedIndex:
    """One revoked entry of the status lists, for as long as a token that names it could still be accepted.

    `recorded_at` is by the database's clock, `expires_at` by ours.
    """

    status_index: int
    expires_at: datetime
    recorded_at: datetime
