"""Users: who they are, what their passwords must be, how they prove themselves, what their roles give.

`registration` makes and changes accounts, `authentication` proves who asks, `passwords` holds the policy, `breaches`
asks others whether they know a password, `hashing` holds the threads that run Argon2id (`argon2id`) and verify what
other systems hashed (`formats`), `resets` forgotten passwords, `transfer` the way in and out, `roles` what roles there
are and the scopes they give. What lives on after a login is the business of `sessions`.
"""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID


@dataclass(frozen=True, slots=True)
class User:
    """An account. It never carries the password's hash."""

    id: UUID
    username: str
    email: str | None
    email_verified: bool
    roles: tuple[str, ...]
    created_at: datetime
    password_changed_at: datetime
    disabled_at: datetime | None


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a login is checked against, and what the user's roles give it; see `roles.given`."""

    user: User
    password_hash: str
    role_scopes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Role:
    """A name that users can be given, and the scopes that come with it. One that is built in was never created."""

    name: str
    scopes: tuple[str, ...]
    created_at: datetime | None
