"""SQL of the users."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import asyncpg

from identity_service.accounts import Credentials, User
from identity_service.database import Connection, Record
from identity_service.errors import UsernameTaken
from identity_service.tokens.access import AccessClaims

_USER = "u.id, u.username, u.email, u.email_verified, u.roles, u.created_at, u.password_changed_at, u.disabled_at"

INSERT = f"""
    INSERT INTO users AS u (id, username, email, password_hash, password_changed_at, roles, created_at)
    VALUES ($1, $2, $3, $4, $6, $5, $6)
    RETURNING {_USER}
"""
FIND = f"SELECT {_USER} FROM users AS u WHERE u.username = $1"
FIND_CREDENTIALS = f"SELECT {_USER}, u.password_hash FROM users AS u WHERE u.username = $1"
FIND_CREDENTIALS_BY_ID = f"SELECT {_USER}, u.password_hash FROM users AS u WHERE u.id = $1"
# One look at everything that can end a token before its time, in the database that every worker shares.
FIND_CALLER = f"""
    SELECT {_USER} FROM users AS u JOIN sessions AS s ON s.user_id = u.id
     WHERE u.id = $1 AND s.id = $2 AND s.revoked_at IS NULL
       AND u.disabled_at IS NULL AND u.password_changed_at = s.password_changed_at
       AND NOT EXISTS (SELECT FROM revoked_tokens WHERE jti IN ($3, $4))
"""
UPDATE = f"""
    UPDATE users AS u
       SET username = coalesce($2, u.username),
           email = CASE WHEN $3 THEN $4 ELSE u.email END,
           email_verified = u.email_verified AND (NOT $3 OR u.email IS NOT DISTINCT FROM $4)
     WHERE u.id = $1
    RETURNING {_USER}
"""
UPDATE_HASH = "UPDATE users SET password_hash = $3 WHERE id = $1 AND password_hash = $2"
UPDATE_PASSWORD = """
    UPDATE users SET password_hash = $2, password_changed_at = $4
     WHERE id = $1 AND password_changed_at = $3 AND disabled_at IS NULL
"""
SET_DISABLED = f"UPDATE users AS u SET disabled_at = $2 WHERE u.username = $1 RETURNING {_USER}"
LOCK = "SELECT id FROM users WHERE id = $1 FOR UPDATE"
DELETE = "DELETE FROM users WHERE id = $1"


async def insert(
    db: Connection,
    user_id: UUID,
    *,
    username: str,
    password_hash: str,
    email: str | None,
    roles: Sequence[str],
    now: datetime,
) -> User:
    try:
        row = await db.fetchrow(INSERT, user_id, username, email, password_hash, list(roles), now)
    except asyncpg.UniqueViolationError:
        raise UsernameTaken from None
    assert row is not None
    return _user(row)


async def find(db: Connection, username: str) -> User | None:
    row = await db.fetchrow(FIND, username)
    return _user(row) if row is not None else None


async def find_credentials(db: Connection, username: str) -> Credentials | None:
    row = await db.fetchrow(FIND_CREDENTIALS, username)
    return Credentials(_user(row), row["password_hash"]) if row is not None else None


async def find_credentials_by_id(db: Connection, user_id: UUID) -> Credentials | None:
    row = await db.fetchrow(FIND_CREDENTIALS_BY_ID, user_id)
    return Credentials(_user(row), row["password_hash"]) if row is not None else None


async def find_caller(db: Connection, claims: AccessClaims) -> User | None:
    row = await db.fetchrow(FIND_CALLER, claims.subject, claims.session_id, str(claims.session_id), claims.token_id)
    return _user(row) if row is not None else None


async def update(
    db: Connection, user_id: UUID, *, username: str | None, change_email: bool, email: str | None
) -> User | None:
    """Change what is given and leave the rest as it is at this moment."""
    try:
        row = await db.fetchrow(UPDATE, user_id, username, change_email, email)
    except asyncpg.UniqueViolationError:
        raise UsernameTaken from None
    return _user(row) if row is not None else None


async def update_hash(db: Connection, user_id: UUID, *, old: str, new: str) -> None:
    """Store the same password under a stronger hash, unless the password changed in the meantime."""
    await db.execute(UPDATE_HASH, user_id, old, new)


async def update_password(
    db: Connection, user_id: UUID, *, password_hash: str, proved_at: datetime, now: datetime
) -> bool:
    """Set another password; return False when the one that was proved is no longer in force."""
    return await db.execute(UPDATE_PASSWORD, user_id, password_hash, proved_at, now) == "UPDATE 1"


async def set_disabled(db: Connection, username: str, *, disabled_at: datetime | None) -> User | None:
    row = await db.fetchrow(SET_DISABLED, username, disabled_at)
    return _user(row) if row is not None else None


async def lock(db: Connection, user_id: UUID) -> bool:
    """Lock the user's row until the transaction ends; return whether there is one."""
    return await db.fetchval(LOCK, user_id) is not None


async def delete(db: Connection, user_id: UUID) -> None:
    await db.execute(DELETE, user_id)


def _user(row: Record) -> User:
    return User(
        id=row["id"],
        username=row["username"],
        email=row["email"],
        email_verified=row["email_verified"],
        roles=tuple(row["roles"]),
        created_at=row["created_at"],
        password_changed_at=row["password_changed_at"],
        disabled_at=row["disabled_at"],
    )
