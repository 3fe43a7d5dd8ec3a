"""The choke point through which everything is revoked."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import StrEnum

from identity_service.database import Connection
from identity_service.revocation import Revocable, store

REMEMBERED_LONGER = timedelta(minutes=2)
"""A verifier may take a token for a minute after its end, by a clock a minute behind ours."""


class Reason(StrEnum):
    LOGOUT = "logout"
    REVOKED = "revoked"  # the client asked at /revoke, the user elsewhere, or an administrator
    REUSE = "reuse"  # a spent refresh token came back
    PASSWORD_CHANGED = "password_changed"  # noqa: S105 - a reason, not a secret
    ROLES_CHANGED = "roles_changed"
    CLIENT_CHANGED = "client_changed"  # it may not have sessions any more
    DISABLED = "disabled"
    DELETED = "deleted"


async def revoke(db: Connection, revoked: Sequence[Revocable], *, reason: Reason, now: datetime) -> int:
    """Record that tokens carrying one of these are no longer good, and tell every replica once this is committed.

    Returns how many of them were good before.

    A session id stands for every access token of the session: they all carry it as `sid`. A row is kept for as long as
    a token it concerns could still be accepted somewhere, and when there is none, long enough to be told to whoever
    holds a connection open on one.
    """
    until = [max(item.expires_at, now) + REMEMBERED_LONGER for item in revoked]
    return await store.insert(db, revoked, reason=reason.value, revoked_at=now, expires_at=until)
