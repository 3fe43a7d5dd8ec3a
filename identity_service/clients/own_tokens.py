"""Access tokens that clients get for themselves (RFC 6749 4.4). They belong to no session, so each has a row.

The row lives as long as the token, so that disabling a client can revoke it, and holds its place in a status list.
"""

from collections.abc import Sequence
from datetime import datetime

from identity_service import audit
from identity_service.audit import Actor, Event, Subject
from identity_service.clients import Client, store
from identity_service.database import Connection, delete_expired
from identity_service.errors import ClientRejected
from identity_service.revocation import Reason
from identity_service.revocation.store import REMEMBERED_LONGER


async def issue(
    db: Connection,
    client: Client,
    token_id: str,
    *,
    scope: Sequence[str],
    expires_at: datetime,
    by: Actor,
    now: datetime,
) -> int:
    """Write down a token that is about to be signed; return its status index. Call within a transaction.

    Args:
        token_id: begins with the time: the lists that are served reach back to the oldest one.

    Raises:
        ClientRejected: the client was disabled, deleted, or changed since it proved itself.
    """
    status_index = await store.insert_token(db, token_id, client, scope=scope, expires_at=expires_at)
    if status_index is None:
        raise ClientRejected(detail="client_changed")
    await audit.record(
        db,
        Event.CLIENT_LOGIN,
        Subject("client", client.client_id),
        by=by.proved_client(client.client_id),
        now=now,
        details={"scope": list(scope)},
    )
    return status_index


async def revoke(db: Connection, client_id: str, token_id: str, *, by: Actor, now: datetime) -> bool:
    """Revoke one token; return whether it was good until now. Call within a transaction."""
    count = await store.revoke_token(db, client_id, token_id, reason=Reason.REVOKED, now=now)
    await _record(db, client_id, tokens=count, reason=Reason.REVOKED, by=by, now=now)
    return count == 1


async def revoke_all(db: Connection, client_id: str, *, reason: Reason, by: Actor, now: datetime) -> int:
    """Revoke a client's tokens; return how many were good until now. Call within a transaction that locked its row."""
    count = await store.revoke_tokens(db, client_id, reason=reason, now=now)
    await _record(db, client_id, tokens=count, reason=reason, by=by, now=now)
    return count


async def prune(db: Connection, *, now: datetime) -> int:
    """Delete a batch of rows whose tokens nobody takes any more; return how many went."""
    return await delete_expired(db, "client_tokens", "jti", before=now - REMEMBERED_LONGER)


async def _record(db: Connection, client_id: str, *, tokens: int, reason: Reason, by: Actor, now: datetime) -> None:
    if tokens:
        await audit.record(
            db,
            Event.CLIENT_TOKEN_REVOKED,
            Subject("client", client_id),
            by=by,
            now=now,
            reason=reason,
            details={"tokens": tokens},
        )
