"""SQL of the sessions.

The user's state, the client's, and what the roles give is joined in: a refresh sees it in one statement.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from uuid import UUID

from identity_service.audit.store import Entry, insert_from, parameters_of
from identity_service.database import MINUTES, Connection, Record, wait_briefly_for_locks
from identity_service.revocation import store as revoked
from identity_service.sessions import BUILT_IN_CLIENT, CLIENT_GATES, Claim, Login, Session, SessionSummary
from identity_service.throttling import Attempt
from identity_service.throttling.store import nothing_counts
from identity_service.tokens.refresh import RefreshClaims

_SESSION = """
    s.id, s.user_id, s.client_id, s.scope, s.amr, s.authenticated_at, s.generation, s.rotated_at, s.expires_at,
    s.access_expires_at, s.status_index, u.roles,
    ARRAY(SELECT unnest(r.scopes) FROM roles AS r WHERE r.name = ANY(u.roles)) AS role_scopes
"""
# Postgres stops at the first half for the built-in client. The other is one look by the primary key: EXISTS could be
# planned as a hash of the whole table.
_OF_WELCOME_CLIENT = f"""
    (s.client_id = '{BUILT_IN_CLIENT}'
     OR (SELECT c.disabled_at IS NULL FROM clients AS c WHERE c.client_id = s.client_id))
"""
_WELCOME = f"""
        u.id = s.user_id AND s.revoked_at IS NULL
    AND u.disabled_at IS NULL AND u.password_changed_at = s.password_changed_at
    AND {_OF_WELCOME_CLIENT}
"""
_LIVE = f"{_WELCOME} AND s.expires_at > $4 AND s.rotated_at > $5"

# FOR SHARE waits for a password change, a disabling or a change of what a role gives that is under way, then sees what
# it did. Nobody waits for a failure that is being counted: where there are others before it nothing begins here, and
# the first of all blocks nothing.
INSERT = f"""
    WITH gate AS (
        SELECT pg_advisory_xact_lock_shared({CLIENT_GATES}, hashtext($3))
    ), client AS (
        SELECT FROM clients, gate
         WHERE client_id = $3 AND disabled_at IS NULL AND 'password' = ANY (grants)
           FOR SHARE OF clients
    ), welcome AS (
        SELECT id, roles, password_changed_at FROM users
         WHERE id = $2 AND disabled_at IS NULL AND password_changed_at = $6
           FOR SHARE
    ), given AS (
        SELECT r.scopes FROM roles AS r, welcome AS u WHERE r.name = ANY (u.roles) FOR SHARE OF r
    ), session AS (
        INSERT INTO sessions
            (id, user_id, client_id, scope, amr, authenticated_at, password_changed_at, rotated_at, expires_at,
             access_expires_at, address, user_agent)
        SELECT $1, id, $3, $4, $5, $7, password_changed_at, $7, $8, $9, $10, $11 FROM welcome
         WHERE ($3 = '{BUILT_IN_CLIENT}' OR EXISTS (SELECT FROM client)) AND {nothing_counts("$12", "$13", "$7")}
        RETURNING id, user_id, client_id, scope, amr, authenticated_at, generation, rotated_at, expires_at,
                  access_expires_at, status_index, (SELECT roles FROM welcome) AS roles,
                  ARRAY(SELECT unnest(scopes) FROM given) AS role_scopes
    ), event AS (
        {insert_from("(SELECT id AS session_id FROM session) AS begun", first=14)}
    )
    SELECT * FROM session
"""
CLAIM_GENERATION = f"""
    UPDATE sessions AS s
       SET generation = s.generation + 1, rotated_at = $4, access_expires_at = greatest(s.access_expires_at, $8)
      FROM users AS u
     WHERE s.id = $1 AND s.user_id = $2 AND s.client_id = $3 AND s.generation = $6
       AND s.scope @> $7 AND {_LIVE}
    RETURNING {_SESSION}
"""
# The same for many sessions at once. Rows that somebody else has locked are skipped, so that nobody waits for them. The
# lock gives a row's physical place (ctid), which saves looking it up a second time. A row that was changed after the
# statement began has moved, so it is skipped too; what is skipped is tried again alone.
CLAIM_GENERATIONS = f"""
    WITH free AS (
        SELECT s.ctid AS place, asked.*
          FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::integer[], $5::timestamptz[], $6::timestamptz[],
                      $7::timestamptz[])
                   AS asked (id, user_id, client_id, generation, now, idle_since, access_expires_at),
               sessions AS s
         WHERE s.id = asked.id FOR NO KEY UPDATE OF s SKIP LOCKED
    )
    UPDATE sessions AS s
       SET generation = s.generation + 1, rotated_at = free.now,
           access_expires_at = greatest(s.access_expires_at, free.access_expires_at)
      FROM free, users AS u
     WHERE s.ctid = free.place AND s.id = free.id
       AND s.user_id = free.user_id AND s.client_id = free.client_id AND s.generation = free.generation
       AND {_WELCOME} AND s.expires_at > free.now AND s.rotated_at > free.idle_since
    RETURNING {_SESSION}
"""
FIND_LIVE = f"""
    SELECT {_SESSION} FROM sessions AS s, users AS u
     WHERE s.id = $1 AND s.user_id = $2 AND s.client_id = $3 AND {_LIVE}
"""
FIND_CURRENT = f"""
    SELECT {_SESSION}, u.username FROM sessions AS s, users AS u
     WHERE s.id = $1 AND s.user_id = $2 AND s.client_id = $3 AND s.generation = $6 AND {_LIVE}
"""
# The current one first, then those used last. No index for it: nobody has very many.
LIST = """
    SELECT id, user_id, client_id, user_agent, address, authenticated_at, rotated_at, expires_at
      FROM sessions AS s
     WHERE user_id = $1 AND revoked_at IS NULL AND expires_at > $2 AND rotated_at > $3
       AND ($5::boolean IS NULL OR (id IS NOT DISTINCT FROM $4, rotated_at, id) < ($5, $6, $7))
     ORDER BY id IS NOT DISTINCT FROM $4 DESC, rotated_at DESC, id DESC
     LIMIT $8
"""
_OF_USER = ("subject_id",)


def _end(which: str, *, of: str = "", first: int) -> str:
    """Return a statement that ends sessions, revokes their tokens, records each end, and counts them.

    However many they are, they stay in the database: a user, a client or a role may have hundreds of thousands.

    Args:
        which: a condition on `s`, and on the table that `of` adds; its parameters begin with $3.
        first: the number of the first parameter after those, which are an `Entry` without its subject's id.
    """
    source = "(SELECT id AS session_id, user_id::text AS subject_id FROM ended) AS each"
    tokens = "(SELECT id::text AS jti, status_index, access_expires_at AS expires_at FROM ended) AS tokens"
    return f"""
        WITH ended AS (
            UPDATE sessions AS s SET revoked_at = $1 {of} WHERE {which} AND s.revoked_at IS NULL
            RETURNING s.id, s.user_id, s.status_index, s.access_expires_at
        ), revoked AS (
            {revoked.insert_from(tokens, now="$1", reason="$2")}
        ), event AS (
            {insert_from(source, first=first, given=_OF_USER)}
        )
        SELECT (SELECT count(*) FROM ended), {revoked.tell()} FROM revoked
    """


END = _end("s.id = $3 AND ($4::uuid IS NULL OR s.user_id = $4)", first=5)
END_ALL = _end("s.user_id = $3 AND ($4::uuid IS NULL OR s.id <> $4)", first=5)
# The second condition is that of the index.
END_ALL_OF_CLIENT = _end(f"s.client_id = $3 AND s.client_id <> '{BUILT_IN_CLIENT}'", first=4)
END_ALL_OF_ROLE = _end("u.id = s.user_id AND $3 = ANY (u.roles)", of="FROM users AS u", first=4)
KEEP_AFTER_PASSWORD_CHANGE = "UPDATE sessions SET password_changed_at = $2 WHERE id = $1 AND revoked_at IS NULL"


async def insert(db: Connection, login: Login, entry: Entry, attempt: Attempt) -> Session | None:
    """Insert a session and what is recorded of it.

    Not if its user or client is disabled or gone, the user has another password by now, the attempt's target has
    failures, or its place is blocked.
    """
    row = await db.fetchrow(
        INSERT,
        login.session_id,
        login.user_id,
        login.client_id,
        list(login.scope),
        list(login.amr),
        login.password_changed_at,
        login.now,
        login.now + login.limits.absolute,
        login.limits.access_expires_at(login.now),
        login.by.address,
        login.by.user_agent,
        attempt.target_key,
        attempt.place_key,
        *entry,
    )
    return _session(row) if row is not None else None


async def claim_generation(db: Connection, claim: Claim, *, scope: Sequence[str]) -> Session | None:
    """Advance the session if the presented generation is its current one, the scope within its own, and all is well."""
    row = await db.fetchrow(
        CLAIM_GENERATION,
        claim.presented.session_id,
        claim.presented.subject,
        claim.presented.client_id,
        claim.now,
        claim.idle_since,
        claim.presented.generation,
        list(scope),
        claim.access_expires_at,
    )
    return _session(row) if row is not None else None


async def claim_generations(db: Connection, claims: Iterable[Claim]) -> dict[UUID, Session]:
    """Advance those of the sessions with which all is well and nobody else is busy. No two claims are of one."""
    columns = zip(
        *(
            (
                claim.presented.session_id,
                claim.presented.subject,
                claim.presented.client_id,
                claim.presented.generation,
                claim.now,
                claim.idle_since,
                claim.access_expires_at,
            )
            for claim in claims
        ),
        strict=True,
    )
    return {row["id"]: _session(row) for row in await db.fetch(CLAIM_GENERATIONS, *columns)}


async def find_live(db: Connection, presented: RefreshClaims, *, now: datetime, idle_since: datetime) -> Session | None:
    """Return the session, whatever its generation, if all else is well with it."""
    row = await db.fetchrow(FIND_LIVE, presented.session_id, presented.subject, presented.client_id, now, idle_since)
    return _session(row) if row is not None else None


async def find_current(
    db: Connection, presented: RefreshClaims, *, now: datetime, idle_since: datetime
) -> tuple[Session, str] | None:
    """Return the session and its user's name if the presented generation is its current one, and all is well."""
    row = await db.fetchrow(
        FIND_CURRENT,
        presented.session_id,
        presented.subject,
        presented.client_id,
        now,
        idle_since,
        presented.generation,
    )
    return (_session(row), row["username"]) if row is not None else None


async def list_live(
    db: Connection,
    user_id: UUID,
    *,
    current: UUID | None,
    after: tuple[bool, datetime, UUID] | None,
    limit: int,
    now: datetime,
    idle_since: datetime,
) -> list[SessionSummary]:
    """Return a user's sessions that are not over.

    Args:
        after: of the session that the page before ended with: whether it was the current one, its last use, its id.
    """
    was_current, last_used_at, session_id = after if after is not None else (None, None, None)
    rows = await db.fetch(LIST, user_id, now, idle_since, current, was_current, last_used_at, session_id, limit)
    return [
        SessionSummary(
            id=row["id"],
            user_id=row["user_id"],
            client_id=row["client_id"],
            user_agent=row["user_agent"],
            address=row["address"],
            created_at=row["authenticated_at"],
            last_used_at=row["rotated_at"],
            expires_at=row["expires_at"],
        )
        for row in rows
    ]


async def end(db: Connection, session_id: UUID, *, owner: UUID | None, reason: str, entry: Entry) -> int:
    """End a session; return 1 if it was still alive, else 0."""
    parameters = parameters_of(entry, given=_OF_USER)
    count: int = await db.fetchval(END, entry.occurred_at, reason, session_id, owner, *parameters)
    return count


async def end_all(db: Connection, user_id: UUID, *, keep: UUID | None, reason: str, entry: Entry) -> int:
    """End all but one of a user's sessions; return how many."""
    return await _end_many(db, END_ALL, reason, entry, user_id, keep)


async def end_all_of_client(db: Connection, client_id: str, *, reason: str, entry: Entry) -> int:
    return await _end_many(db, END_ALL_OF_CLIENT, reason, entry, client_id)


async def end_all_of_role(db: Connection, role: str, *, reason: str, entry: Entry) -> int:
    """Reads the whole table of users."""
    return await _end_many(db, END_ALL_OF_ROLE, reason, entry, role)


async def _end_many(db: Connection, statement: str, reason: str, entry: Entry, *which: UUID | str | None) -> int:
    await wait_briefly_for_locks(db)
    parameters = parameters_of(entry, given=_OF_USER)
    count: int = await db.fetchval(statement, entry.occurred_at, reason, *which, *parameters, timeout=MINUTES)
    return count


async def keep_after_password_change(db: Connection, session_id: UUID, *, password_changed_at: datetime) -> None:
    """Let the session that changed the password outlive the change."""
    await db.execute(KEEP_AFTER_PASSWORD_CHANGE, session_id, password_changed_at)


def _session(row: Record) -> Session:
    return Session(
        id=row["id"],
        user_id=row["user_id"],
        client_id=row["client_id"],
        scope=tuple(row["scope"]),
        amr=tuple(row["amr"]),
        authenticated_at=row["authenticated_at"],
        generation=row["generation"],
        rotated_at=row["rotated_at"],
        expires_at=row["expires_at"],
        access_expires_at=row["access_expires_at"],
        status_index=row["status_index"],
        roles=tuple(row["roles"]),
        role_scopes=tuple(row["role_scopes"]),
    )
