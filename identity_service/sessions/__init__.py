"""Sessions: a login that lives. One row each, whose `generation` is advanced by every refresh.

`lifecycle` starts and ends them, `rotation` refreshes them. Proving who logs in is the business of `accounts`, the
bytes of refresh tokens that of `tokens`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from identity_service.audit import Actor
from identity_service.tokens.refresh import RefreshClaims

BUILT_IN_CLIENT = "first-party"
"""The client that is always there and has no row: a session of it costs no look at the table of clients."""

CLIENT_GATES = 21_593
"""The class of the advisory locks, one for each client, under which new sessions and tokens are issued to it.

Advisory locks queue in order, row locks do not: a client that asks without a pause would keep the administrator who
disables it waiting for ever.
"""


class SessionLimits(NamedTuple):
    """How long sessions live.

    Args:
        idle: longest pause between two refreshes.
        absolute: end of the session after the login, whatever happens.
        retry_window: how long the refresh token just spent is answered with its successor.
        access: lifetime of access tokens, for which a revocation must be remembered.
    """

    idle: timedelta
    absolute: timedelta
    retry_window: timedelta
    access: timedelta

    def access_expires_at(self, now: datetime) -> datetime:
        """When the last access token of the generation that begins now has expired: a retry is answered with one."""
        return now + self.retry_window + self.access


@dataclass(frozen=True, slots=True)
class Login:
    """A user who has just proved a password, and the session that begins with it.

    Args:
        password_changed_at: when the proved password was set, so that a change or a disabling that happened while it
            was being hashed is not overtaken by this login.
        by: whose address and program the session will be known by.
    """

    session_id: UUID
    user_id: UUID
    client_id: str
    scope: Sequence[str]
    amr: Sequence[str]
    password_changed_at: datetime
    by: Actor
    now: datetime
    limits: SessionLimits


class Claim(NamedTuple):
    """A request to advance a session from the generation that a refresh token names to the next one."""

    presented: RefreshClaims
    now: datetime
    limits: SessionLimits

    @property
    def idle_since(self) -> datetime:
        return self.now - self.limits.idle

    @property
    def access_expires_at(self) -> datetime:
        return self.limits.access_expires_at(self.now)


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """A session as its user or an administrator sees it.

    `user_agent` and `address` are of the login; `last_used_at` is the last refresh, `expires_at` the end at the latest.
    """

    id: UUID
    user_id: UUID
    client_id: str
    user_agent: str | None
    address: str | None
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime


class Session(NamedTuple):
    """A session as it stands, with its user's roles and the scopes that the database says these give now.

    `scope` is what the login was granted, `rotated_at` when the current refresh token was issued, `access_expires_at`
    when the last access token ends.
    """

    id: UUID
    user_id: UUID
    client_id: str
    scope: tuple[str, ...]
    amr: tuple[str, ...]
    authenticated_at: datetime
    generation: int
    rotated_at: datetime
    expires_at: datetime
    access_expires_at: datetime
    status_index: int
    roles: tuple[str, ...]
    role_scopes: tuple[str, ...]

    def refresh_expires_at(self, limits: SessionLimits) -> datetime:
        """When the current refresh token ends: idle, but never past the session."""
        return min(self.rotated_at + limits.idle, self.expires_at)
