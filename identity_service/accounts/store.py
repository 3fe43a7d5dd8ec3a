"""SQL of the users and of their roles."""

import re
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

import asyncpg

from identity_service.accounts import Credentials, Role, User
from identity_service.database import HOURS, MINUTES, Connection, Record, affected
from identity_service.errors import UsernameTaken
from identity_service.sessions.store import _OF_WELCOME_CLIENT
from identity_service.throttling import Attempt
from identity_service.throttling.store import _TALLY, Tally, key_of_account, tallies_of
from identity_service.tokens.access import AccessClaims

_LIKE = re.compile(r"[\\%_]")
_USER = "u.id, u.username, u.email, u.email_verified, u.roles, u.created_at, u.password_changed_at, u.disabled_at"
_CREDENTIALS = f"""
    {_USER}, u.password_hash, ARRAY(SELECT unnest(r.scopes) FROM roles AS r WHERE r.name = ANY(u.roles)) AS role_scopes
"""

INSERT = f"""
    INSERT INTO users AS u (id, username, email, password_hash, password_changed_at, roles, created_at)
    VALUES ($1, $2, $3, $4, $6, $5, $6)
    RETURNING {_USER}
"""
FIND = f"SELECT {_USER} FROM users AS u WHERE u.username = $1"
FIND_BY_ID = f"SELECT {_USER} FROM users AS u WHERE u.id = $1"
LIST = f"""
    SELECT {_USER} FROM users AS u
     WHERE ($1::text IS NULL OR u.username > $1) AND ($3::text IS NULL OR $3 = ANY (u.roles))
     ORDER BY u.username LIMIT $2
"""
SEARCH = f"""
    SELECT {_USER} FROM users AS u
     WHERE ($1::text IS NULL OR u.username > $1) AND ($3::text IS NULL OR $3 = ANY (u.roles))
       AND (u.username LIKE $4 OR lower(u.email) LIKE $4)
     ORDER BY u.username LIMIT $2
"""
# With the failures that count against them, or where nobody has the name against that: a login looks once.
FIND_CREDENTIALS = f"""
    SELECT {_CREDENTIALS}, {_TALLY}
      FROM (VALUES ($1)) AS asked (username)
      LEFT JOIN users AS u ON u.username = asked.username
      LEFT JOIN throttles AS t ON t.key IN (coalesce({key_of_account("u.id")}, $2), $3)
"""
FIND_CREDENTIALS_BY_ID = f"SELECT {_CREDENTIALS} FROM users AS u WHERE u.id = $1"
# One look at everything that can end a token before its time, in the database that every worker shares.
FIND_CALLER = f"""
    SELECT {_USER} FROM users AS u JOIN sessions AS s ON s.user_id = u.id
     WHERE u.id = $1 AND s.id = $2 AND s.revoked_at IS NULL
       AND u.disabled_at IS NULL AND u.password_changed_at = s.password_changed_at AND {_OF_WELCOME_CLIENT}
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
DISABLE = f"UPDATE users AS u SET disabled_at = $2 WHERE u.id = $1 AND u.disabled_at IS NULL RETURNING {_USER}"
ENABLE = f"UPDATE users AS u SET disabled_at = NULL WHERE u.id = $1 AND u.disabled_at IS NOT NULL RETURNING {_USER}"
LOCK = "SELECT id FROM users WHERE id = $1 FOR UPDATE"
# One advisory lock, not the administrators' rows: a statement that waits keeps the rows that do not match any more, so
# that two would deadlock.
LOCK_ADMINISTRATION = "SELECT pg_advisory_xact_lock(5130117205114733)"
COUNT_ADMINISTRATORS = """
    SELECT count(*) FROM users WHERE 'admin' = ANY (roles) AND disabled_at IS NULL AND password_hash <> '!'
"""
DELETE = "DELETE FROM users WHERE id = $1"
ADD_ROLE = f"""
    UPDATE users AS u SET roles = array_append(u.roles, $2)
     WHERE u.id = $1 AND NOT $2 = ANY (u.roles)
    RETURNING {_USER}
"""
REMOVE_ROLE = f"""
    UPDATE users AS u SET roles = array_remove(u.roles, $2)
     WHERE u.id = $1 AND $2 = ANY (u.roles)
    RETURNING {_USER}
"""
SET_ROLES = f"UPDATE users AS u SET roles = $2 WHERE u.id = $1 AND u.roles <> $2 RETURNING {_USER}"
# Some of the hashes that are not of today's kind: all of them in a small table, a few thousand of a large one.
SAMPLE_HASHES = """
    SELECT password_hash FROM users
     TABLESAMPLE SYSTEM (
         (SELECT 100 * least(1, 20000 / greatest(reltuples, 1)) FROM pg_class WHERE oid = 'users'::regclass)
     )
     WHERE NOT starts_with(password_hash, $1)
     LIMIT 5000
"""
COUNT_USERS = "SELECT count(*) FROM users WHERE $1 = ANY(roles)"
STREAM = f"SELECT {_USER}, u.password_hash FROM users AS u ORDER BY u.id"

# The statements of an import, each of which may take long. They need the table that the first one makes, so that they
# cannot be prepared without it; it goes with the transaction, which suits a pooler in transaction mode. Nobody may have
# counted the users yet, and a planner who takes them for few would compare each with each.
_STAGE = """
    SET LOCAL statement_timeout = 0;
    SET LOCAL enable_nestloop = off;
    CREATE TEMPORARY TABLE staged_users (
        line bigint, id uuid, username text, email text, email_verified boolean, password_hash text,
        password_changed_at timestamptz, roles text[], created_at timestamptz, disabled_at timestamptz
    ) ON COMMIT DROP
"""
_DROP_STAGED_REPETITIONS = """
    WITH numbered AS (
        SELECT line, row_number() OVER (PARTITION BY username ORDER BY line) AS by_username,
               row_number() OVER (PARTITION BY id ORDER BY line) AS by_id
          FROM staged_users
    ), dropped AS (
        DELETE FROM staged_users AS s USING numbered AS n
         WHERE s.line = n.line AND (n.by_username > 1 OR n.by_id > 1)
        RETURNING s.line
    )
    SELECT count(*) AS lines, (array_agg(line ORDER BY line))[1:$1] AS first FROM dropped
"""
_DROP_STAGED_CONFLICTS = """
    WITH known AS (
        SELECT s.line FROM staged_users AS s JOIN users AS u ON u.username = s.username
        UNION SELECT s.line FROM staged_users AS s JOIN users AS u ON u.id = s.id
    ), dropped AS (
        DELETE FROM staged_users AS s USING known AS k WHERE s.line = k.line RETURNING s.line
    )
    SELECT count(*) AS lines, (array_agg(line ORDER BY line))[1:$1] AS first FROM dropped
"""
# In one order, so that no two imports can wait for each other.
_INSERT_STAGED = """
    INSERT INTO users (id, username, email, email_verified, password_hash, password_changed_at, roles, created_at,
                       disabled_at)
    SELECT id, username, email, email_verified, password_hash, password_changed_at, roles, created_at, disabled_at
      FROM staged_users
     ORDER BY username
    ON CONFLICT DO NOTHING
"""
_COUNT_STAGED_ROLES = "SELECT role, count(*) AS users FROM staged_users, unnest(roles) AS role GROUP BY role"
_STAGED_WITH_ROLES = """
    SELECT id::text AS subject_id, jsonb_build_object('username', username, 'roles', to_jsonb(roles)) AS details
      FROM staged_users WHERE roles <> '{}'
"""

INSERT_RESET = """
    INSERT INTO password_resets (user_id, token_digest, created_at, expires_at) VALUES ($1, $2, $3, $4)
    ON CONFLICT (user_id) DO UPDATE SET token_digest = $2, created_at = $3, expires_at = $4
"""
FIND_RESET = f"""
    SELECT {_USER} FROM password_resets AS r JOIN users AS u ON u.id = r.user_id
     WHERE r.token_digest = $1 AND r.expires_at > $2 AND u.disabled_at IS NULL
"""
SPEND_RESET = """
    WITH spent AS (DELETE FROM password_resets WHERE token_digest = $1 AND expires_at > $2 RETURNING user_id)
    UPDATE users SET password_hash = $3, password_changed_at = $2
      FROM spent WHERE users.id = spent.user_id AND users.disabled_at IS NULL
"""
DELETE_RESET = "DELETE FROM password_resets WHERE user_id = $1"

INSERT_ROLE = """
    INSERT INTO roles (name, scopes, created_at) VALUES ($1, $2, $3)
    ON CONFLICT DO NOTHING
    RETURNING name, scopes, created_at
"""
FIND_ROLE = "SELECT name, scopes, created_at FROM roles WHERE name = $1"
LIST_ROLES = "SELECT name, scopes, created_at FROM roles ORDER BY name"
UPDATE_ROLE = "UPDATE roles SET scopes = $2 WHERE name = $1 RETURNING name, scopes, created_at"
LOCK_ROLE = "SELECT name FROM roles WHERE name = $1 FOR UPDATE"
SHARE_ROLE = "SELECT name FROM roles WHERE name = $1 FOR KEY SHARE"
DELETE_ROLE = "DELETE FROM roles WHERE name = $1"


class StagedUser(NamedTuple):
    """A user on the way in, in the order of the columns; `line` says where it was read."""

    line: int
    id: UUID
    username: str
    email: str | None
    email_verified: bool
    password_hash: str
    password_changed_at: datetime
    roles: list[str]
    created_at: datetime
    disabled_at: datetime | None


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


async def find_by_id(db: Connection, user_id: UUID) -> User | None:
    row = await db.fetchrow(FIND_BY_ID, user_id)
    return _user(row) if row is not None else None


async def list_users(db: Connection, *, prefix: str, role: str | None, after: str | None, limit: int) -> list[User]:
    """Return users by username.

    Args:
        prefix: of the username or of the e-mail address, in lower case; empty for everybody.
        role: one that they have; None for everybody.
        after: the username that the page before ended with.
    """
    if not prefix:
        return [_user(row) for row in await db.fetch(LIST, after, limit, role)]
    return [_user(row) for row in await db.fetch(SEARCH, after, limit, role, _LIKE.sub(r"\\\g<0>", prefix) + "%")]


async def find_credentials(
    db: Connection, username: str, attempt: Attempt
) -> tuple[Credentials | None, dict[bytes, Tally]]:
    """Return whom a name means, and the tallies of an attempt at it: those of the account, if there is one."""
    rows = await db.fetch(FIND_CREDENTIALS, username, attempt.target_key, attempt.place_key)
    found = rows[0]
    return (
        _credentials(found) if found["id"] is not None else None,
        tallies_of([row for row in rows if row["key"] is not None]),
    )


async def find_credentials_by_id(db: Connection, user_id: UUID) -> Credentials | None:
    row = await db.fetchrow(FIND_CREDENTIALS_BY_ID, user_id)
    return _credentials(row) if row is not None else None


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


async def sample_hashes(db: Connection, *, unlike: str) -> list[str]:
    """Return hashes that do not begin like this, a few thousand at most."""
    return [row["password_hash"] for row in await db.fetch(SAMPLE_HASHES, unlike)]


async def update_password(
    db: Connection, user_id: UUID, *, password_hash: str, proved_at: datetime, now: datetime
) -> bool:
    """Set another password; return False when the one that was proved is no longer in force."""
    return await db.execute(UPDATE_PASSWORD, user_id, password_hash, proved_at, now) == "UPDATE 1"


async def disable(db: Connection, user_id: UUID, *, now: datetime) -> User | None:
    """Shut an account; return None when there is none, or it is shut already."""
    row = await db.fetchrow(DISABLE, user_id, now)
    return _user(row) if row is not None else None


async def enable(db: Connection, user_id: UUID) -> User | None:
    """Open an account; return None when there is none, or it is open already."""
    row = await db.fetchrow(ENABLE, user_id)
    return _user(row) if row is not None else None


async def lock(db: Connection, user_id: UUID) -> bool:
    """Lock the user's row until the transaction ends; return whether there is one."""
    return await db.fetchval(LOCK, user_id) is not None


async def lock_administration(db: Connection) -> None:
    """Keep everybody else from removing an administrator until the transaction ends."""
    await db.execute(LOCK_ADMINISTRATION)


async def count_administrators(db: Connection) -> int:
    """Return how many administrators can log in."""
    count: int = await db.fetchval(COUNT_ADMINISTRATORS)
    return count


async def delete(db: Connection, user_id: UUID) -> None:
    await db.execute(DELETE, user_id, timeout=MINUTES)  # with all sessions


async def add_role(db: Connection, user_id: UUID, role: str) -> User | None:
    """Give a user a role; return None when there is no such user, or they have it already."""
    row = await db.fetchrow(ADD_ROLE, user_id, role)
    return _user(row) if row is not None else None


async def remove_role(db: Connection, user_id: UUID, role: str) -> User | None:
    """Take a role from a user; return None when there is no such user, or they do not have it."""
    row = await db.fetchrow(REMOVE_ROLE, user_id, role)
    return _user(row) if row is not None else None


async def set_roles(db: Connection, user_id: UUID, roles: Sequence[str]) -> User | None:
    """Give a user exactly these roles; return None when there is no such user, or they have them already."""
    row = await db.fetchrow(SET_ROLES, user_id, list(roles))
    return _user(row) if row is not None else None


async def count_users(db: Connection, role: str) -> int:
    """Return how many users have a role. Reads the whole table."""
    count: int = await db.fetchval(COUNT_USERS, role)
    return count


async def insert_reset(
    db: Connection, user_id: UUID, *, token_digest: bytes, now: datetime, expires_at: datetime
) -> None:
    """Insert a reset of a password in the place of an earlier one."""
    await db.execute(INSERT_RESET, user_id, token_digest, now, expires_at)


async def find_reset(db: Connection, token_digest: bytes, *, now: datetime) -> User | None:
    """Return whose password a token that is still good may reset."""
    row = await db.fetchrow(FIND_RESET, token_digest, now)
    return _user(row) if row is not None else None


async def spend_reset(db: Connection, token_digest: bytes, *, password_hash: str, now: datetime) -> bool:
    """Set the password that a reset was started for; return False when the token is no longer good."""
    return await db.execute(SPEND_RESET, token_digest, now, password_hash) == "UPDATE 1"


async def delete_reset(db: Connection, user_id: UUID) -> None:
    await db.execute(DELETE_RESET, user_id)


async def stage(db: Connection, users: Iterable[StagedUser]) -> None:
    """Put users aside until the transaction ends, by COPY; they are asked for as they are sent."""
    await db.execute(_STAGE)
    await db.copy_records_to_table(
        "staged_users", records=users, columns=StagedUser._fields, schema_name="pg_temp", timeout=HOURS
    )
    await db.execute("ANALYZE staged_users", timeout=HOURS)


async def drop_staged_repetitions(db: Connection, *, limit: int) -> tuple[int, list[int]]:
    """Drop who was staged before; return on how many lines, and the first of them."""
    return await _drop_staged(db, _DROP_STAGED_REPETITIONS, limit)


async def drop_staged_conflicts(db: Connection, *, limit: int) -> tuple[int, list[int]]:
    """Drop whose username or id a user has; return on how many lines, and the first of them."""
    return await _drop_staged(db, _DROP_STAGED_CONFLICTS, limit)


async def _drop_staged(db: Connection, sql: str, limit: int) -> tuple[int, list[int]]:
    row = await db.fetchrow(sql, limit, timeout=HOURS)
    assert row is not None
    return row["lines"], row["first"] or []


async def count_staged_roles(db: Connection) -> dict[str, int]:
    """Return how many of those that are still staged have each role."""
    return {row["role"]: row["users"] for row in await db.fetch(_COUNT_STAGED_ROLES, timeout=HOURS)}


def staged_with_roles() -> str:
    """Return a query of those that were staged and have a role, as `audit.record_each` takes it."""
    return _STAGED_WITH_ROLES


async def insert_staged(db: Connection) -> int:
    """Make users of those that were staged, unless somebody was faster; return how many."""
    return affected(await db.execute(_INSERT_STAGED, timeout=HOURS))


async def stream(db: Connection) -> AsyncIterator[tuple[User, str]]:
    """Return all users with the hashes of their passwords, as of one moment. Call within a transaction."""
    async for row in db.cursor(STREAM, prefetch=1000):
        yield _user(row), row["password_hash"]


async def insert_role(db: Connection, name: str, *, scopes: Sequence[str], now: datetime) -> Role | None:
    """Insert a role unless there is one of this name."""
    row = await db.fetchrow(INSERT_ROLE, name, list(scopes), now)
    return _role(row) if row is not None else None


async def find_role(db: Connection, name: str) -> Role | None:
    row = await db.fetchrow(FIND_ROLE, name)
    return _role(row) if row is not None else None


async def list_roles(db: Connection) -> list[Role]:
    return [_role(row) for row in await db.fetch(LIST_ROLES)]


async def update_role(db: Connection, name: str, *, scopes: Sequence[str]) -> Role | None:
    row = await db.fetchrow(UPDATE_ROLE, name, list(scopes))
    return _role(row) if row is not None else None


async def lock_role(db: Connection, name: str) -> bool:
    """Keep a role from being given to anybody until the transaction ends; return whether there is one."""
    return await db.fetchval(LOCK_ROLE, name) is not None


async def share_role(db: Connection, name: str) -> bool:
    """Keep a role from being deleted until the transaction ends; return whether there is one."""
    return await db.fetchval(SHARE_ROLE, name) is not None


async def delete_role(db: Connection, name: str) -> None:
    await db.execute(DELETE_ROLE, name)


def _credentials(row: Record) -> Credentials:
    return Credentials(_user(row), row["password_hash"], tuple(row["role_scopes"]))


def _role(row: Record) -> Role:
    return Role(row["name"], tuple(row["scopes"]), row["created_at"])


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
