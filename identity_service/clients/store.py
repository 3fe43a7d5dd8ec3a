"""SQL of the registered clients, and of the tokens they got for themselves."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from identity_service.clients import Client, ClientCredentials
from identity_service.database import MINUTES, Connection, Record, wait_briefly_for_locks
from identity_service.revocation import store as revoked
from identity_service.sessions import CLIENT_GATES

_CLIENT = """
    client_id, grants, scopes, audience, first_party, access_lifetime, created_at, secret_changed_at,
    previous_secret_expires_at, disabled_at
"""

INSERT = f"""
    INSERT INTO clients
        (client_id, grants, scopes, audience, first_party, access_lifetime, secret_digest, secret_changed_at,
         created_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $8)
    ON CONFLICT DO NOTHING
    RETURNING {_CLIENT}
"""
FIND = f"SELECT {_CLIENT} FROM clients WHERE client_id = $1"
FIND_CREDENTIALS = f"SELECT {_CLIENT}, secret_digest, previous_secret_digest FROM clients WHERE client_id = $1"
LOCK = f"""
    WITH gate AS (
        SELECT pg_advisory_xact_lock({CLIENT_GATES}, hashtext($1))
    )
    SELECT {_CLIENT}, secret_digest, previous_secret_digest FROM clients, gate WHERE client_id = $1
       FOR UPDATE OF clients
"""
LIST = f"SELECT {_CLIENT} FROM clients ORDER BY client_id"
LIST_SCOPES = "SELECT DISTINCT unnest(scopes) AS scope FROM clients WHERE disabled_at IS NULL"
UPDATE = f"""
    UPDATE clients SET grants = $2, scopes = $3, audience = $4, access_lifetime = $5 WHERE client_id = $1
    RETURNING {_CLIENT}
"""
ROTATE_SECRET = f"""
    UPDATE clients
       SET secret_digest = $2, secret_changed_at = $3, previous_secret_expires_at = $4,
           previous_secret_digest = CASE WHEN $4::timestamptz IS NOT NULL THEN secret_digest END
     WHERE client_id = $1
    RETURNING {_CLIENT}
"""
SET_DISABLED = f"UPDATE clients SET disabled_at = $2 WHERE client_id = $1 RETURNING {_CLIENT}"
DELETE = "DELETE FROM clients WHERE client_id = $1"

# FOR SHARE waits for a disabling under way, then sees what it did.
INSERT_TOKEN = f"""
    WITH gate AS (
        SELECT pg_advisory_xact_lock_shared({CLIENT_GATES}, hashtext($2))
    ), welcome AS (
        SELECT client_id FROM clients, gate
         WHERE client_id = $2 AND disabled_at IS NULL AND 'client_credentials' = ANY (grants)
           AND created_at = $4 AND scopes @> $5 AND audience = $6
           FOR SHARE OF clients
    )
    INSERT INTO client_tokens (jti, client_id, expires_at) SELECT $1, client_id, $3 FROM welcome
    RETURNING status_index
"""


def _revoke_tokens(which: str) -> str:
    tokens = f"(SELECT jti, status_index, expires_at FROM client_tokens WHERE client_id = $3 AND {which}) AS tokens"
    return f"""
        WITH revoked AS ({revoked.insert_from(tokens, now="$1", reason="$2")})
        SELECT count(*), {revoked.tell()} FROM revoked
    """


REVOKE_TOKEN = _revoke_tokens("jti = $4")
# Those that have just expired too: verifiers may still take them.
REVOKE_TOKENS = _revoke_tokens(f"expires_at + interval '{revoked.REMEMBERED_LONGER}' > $1")
FIND_LIVE_TOKEN = """
    SELECT t.jti FROM client_tokens AS t JOIN clients AS c USING (client_id)
     WHERE t.jti = $1 AND t.client_id = $2 AND c.disabled_at IS NULL
       AND NOT EXISTS (SELECT FROM revoked_tokens AS r WHERE r.jti = t.jti)
"""


async def insert(
    db: Connection,
    client_id: str,
    *,
    grants: Sequence[str],
    scopes: Sequence[str],
    audience: Sequence[str],
    first_party: bool,
    access_lifetime: timedelta | None,
    secret_digest: bytes,
    now: datetime,
) -> Client | None:
    """Insert a client unless there is one of this id."""
    row = await db.fetchrow(
        INSERT,
        client_id,
        list(grants),
        list(scopes),
        list(audience),
        first_party,
        access_lifetime,
        secret_digest,
        now,
    )
    return _client(row) if row is not None else None


async def find(db: Connection, client_id: str) -> Client | None:
    row = await db.fetchrow(FIND, client_id)
    return _client(row) if row is not None else None


async def find_credentials(db: Connection, client_id: str) -> ClientCredentials | None:
    row = await db.fetchrow(FIND_CREDENTIALS, client_id)
    return _credentials(row) if row is not None else None


async def lock(db: Connection, client_id: str) -> ClientCredentials | None:
    """Lock the client until the transaction ends: nothing is issued to it meanwhile."""
    row = await db.fetchrow(LOCK, client_id)
    return _credentials(row) if row is not None else None


async def list_all(db: Connection) -> list[Client]:
    return [_client(row) for row in await db.fetch(LIST)]


async def list_scopes(db: Connection) -> list[str]:
    return [row["scope"] for row in await db.fetch(LIST_SCOPES)]


async def update(
    db: Connection,
    client_id: str,
    *,
    grants: Sequence[str],
    scopes: Sequence[str],
    audience: Sequence[str],
    access_lifetime: timedelta | None,
) -> Client:
    """Replace what a locked client may do."""
    row = await db.fetchrow(UPDATE, client_id, list(grants), list(scopes), list(audience), access_lifetime)
    assert row is not None, "its row is locked"
    return _client(row)


async def rotate_secret(
    db: Connection, client_id: str, *, secret_digest: bytes, previous_expires_at: datetime | None, now: datetime
) -> Client:
    """Put another secret in place for a locked client; the present one becomes the previous, or goes at once."""
    row = await db.fetchrow(ROTATE_SECRET, client_id, secret_digest, now, previous_expires_at)
    assert row is not None, "its row is locked"
    return _client(row)


async def set_disabled(db: Connection, client_id: str, *, disabled_at: datetime | None) -> Client:
    """Shut a locked client out, or let it in again."""
    row = await db.fetchrow(SET_DISABLED, client_id, disabled_at)
    assert row is not None, "its row is locked"
    return _client(row)


async def delete(db: Connection, client_id: str) -> None:
    await db.execute(DELETE, client_id, timeout=MINUTES)  # with all its tokens


async def insert_token(
    db: Connection, token_id: str, client: Client, *, scope: Sequence[str], expires_at: datetime
) -> int | None:
    """Insert a token and return its status index, unless the client is disabled, gone, or another than it was."""
    index: int | None = await db.fetchval(
        INSERT_TOKEN, token_id, client.client_id, expires_at, client.created_at, list(scope), list(client.audience)
    )
    return index


async def revoke_token(db: Connection, client_id: str, token_id: str, *, reason: str, now: datetime) -> int:
    """Revoke one of a client's tokens; return 1 if it was good until now, else 0."""
    count: int = await db.fetchval(REVOKE_TOKEN, now, reason, client_id, token_id)
    return count


async def revoke_tokens(db: Connection, client_id: str, *, reason: str, now: datetime) -> int:
    """Revoke all of a client's tokens, which may be very many; return how many were good until now."""
    await wait_briefly_for_locks(db)
    count: int = await db.fetchval(REVOKE_TOKENS, now, reason, client_id, timeout=MINUTES)
    return count


async def is_live_token(db: Connection, token_id: str, client_id: str) -> bool:
    """Tell whether a token is not revoked and its client not disabled; when it expires, it says itself."""
    return await db.fetchval(FIND_LIVE_TOKEN, token_id, client_id) is not None


def _client(row: Record) -> Client:
    return Client(
        client_id=row["client_id"],
        grants=tuple(row["grants"]),
        scopes=tuple(row["scopes"]),
        audience=tuple(row["audience"]),
        first_party=row["first_party"],
        public=False,
        access_lifetime=row["access_lifetime"],
        created_at=row["created_at"],
        secret_changed_at=row["secret_changed_at"],
        previous_secret_expires_at=row["previous_secret_expires_at"],
        disabled_at=row["disabled_at"],
    )


def _credentials(row: Record) -> ClientCredentials:
    return ClientCredentials(_client(row), row["secret_digest"], row["previous_secret_digest"])
