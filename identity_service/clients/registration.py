"""Making, changing, disabling and deleting clients. Proving who asks is next door in `authentication`."""

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from identity_service import audit, scopes
from identity_service.audit import Actor, Event, Subject
from identity_service.clients import FIRST_PARTY, Client, ClientCredentials, own_tokens, store
from identity_service.clients.authentication import CLIENT_ID, digest
from identity_service.database import Connection
from identity_service.errors import ClientBuiltIn, ClientInvalid, ClientNotFound, ClientTaken, ScopeRejected
from identity_service.revocation import Reason
from identity_service.sessions import lifecycle

SECRET_MIN_LENGTH = 32
OVERLAP_SECONDS = 86_400
MOST_OVERLAP_SECONDS = 30 * 86_400
"""For how long a replaced secret goes on working: unless somebody says otherwise, and at most."""

_FOR_ITSELF = "client_credentials"
_FOR_USERS = frozenset({"password", "refresh_token"})
_SECRET = re.compile(rf"[\x21-\x7e]{{{SECRET_MIN_LENGTH},256}}", re.ASCII)
_AUDIENCE = re.compile(r"[\x21-\x2b\x2d-\x7e]{1,255}", re.ASCII)
_MOST_AUDIENCES = 16


async def create(
    db: Connection,
    unverified_client_id: str,
    *,
    grants: Sequence[str],
    scope: str,
    audience: Sequence[str],
    first_party: bool,
    access_lifetime: timedelta | None,
    secret: str,
    issuer: str,
    longest_lifetime: timedelta,
    by: Actor,
    now: datetime,
) -> Client:
    """Register a confidential client. Call within a transaction.

    Args:
        grants: `client_credentials`; and for a first-party client `password` and `refresh_token`, which go together.
        scope: what it may do by itself, separated by spaces.
        audience: who its tokens are for; empty for those of the installation.
        first_party: decided for good: no other client becomes one later.
        access_lifetime: None for the installation's.
        secret: random, from the shell; or an administrator's own. Only its digest is kept.
        issuer: of this installation. Tokens of first-party clients are for it too, those of others never.
        longest_lifetime: of the installation's access tokens: for so long a key is published after its last signature.

    Raises:
        ClientInvalid: the text says what there cannot be.
        ClientBuiltIn, ClientTaken: there is one of this id.
    """
    _refuse_built_in(unverified_client_id)
    if not CLIENT_ID.fullmatch(unverified_client_id):
        raise ClientInvalid("A client id has at most 64 letters, digits and ._- and begins with a letter or a digit.")
    if _is_uuid(unverified_client_id):
        raise ClientInvalid("A client id must not be a UUID: it could be taken for a user.")
    client = await store.insert(
        db,
        unverified_client_id,
        grants=_grants(grants, first_party=first_party),
        scopes=_scopes(scope),
        audience=_audience(audience, issuer),
        first_party=first_party,
        access_lifetime=_lifetime(access_lifetime, longest_lifetime),
        secret_digest=_digest(secret),
        now=now,
    )
    if client is None:
        raise ClientTaken
    await _record(db, Event.CLIENT_CREATED, client.client_id, by=by, now=now, details=_told(client))
    return client


async def find(db: Connection, unverified_client_id: str) -> Client:
    """Return a client, the built-in one too.

    Raises:
        ClientNotFound: there is none of this id.
    """
    if unverified_client_id == FIRST_PARTY.client_id:
        return FIRST_PARTY
    client = await store.find(db, unverified_client_id) if CLIENT_ID.fullmatch(unverified_client_id) else None
    if client is None:
        raise ClientNotFound
    return client


async def list_all(db: Connection) -> list[Client]:
    """Return the clients, the built-in one first, the others by id."""
    return [FIRST_PARTY, *await store.list_all(db)]


async def update(
    db: Connection,
    unverified_client_id: str,
    *,
    grants: Sequence[str] | None = None,
    scope: str | None = None,
    audience: Sequence[str] | None = None,
    change_access_lifetime: bool = False,
    access_lifetime: timedelta | None = None,
    issuer: str,
    longest_lifetime: timedelta,
    by: Actor,
    now: datetime,
) -> Client:
    """Change what a client may do: what is given, as `create` takes it, and nothing else. Call within a transaction.

    It is seen by the next token. A client that may not refresh any more loses its sessions at once.

    Raises:
        ClientInvalid: the text says what there cannot be.
        ClientBuiltIn, ClientNotFound: it is not one that can be changed.
    """
    before = (await _lock(db, unverified_client_id)).client
    after = await store.update(
        db,
        before.client_id,
        grants=before.grants if grants is None else _grants(grants, first_party=before.first_party),
        scopes=before.scopes if scope is None else _scopes(scope),
        audience=before.audience if audience is None else _audience(audience, issuer),
        access_lifetime=(
            _lifetime(access_lifetime, longest_lifetime) if change_access_lifetime else before.access_lifetime
        ),
    )
    if after == before:
        return after
    await _record(db, Event.CLIENT_UPDATED, after.client_id, by=by, now=now, details=_told(after))
    if _FOR_USERS.isdisjoint(after.grants) and not _FOR_USERS.isdisjoint(before.grants):
        await lifecycle.end_all_of_client(db, after.client_id, reason=Reason.CLIENT_CHANGED, by=by, now=now)
    return after


async def rotate_secret(
    db: Connection, unverified_client_id: str, *, secret: str, overlap: timedelta, by: Actor, now: datetime
) -> Client:
    """Give a client another secret. Call within a transaction.

    The present one is accepted for `overlap` longer, and any before it no more: at most two work at a time. A secret
    that is the present one already changes nothing.

    Raises:
        ClientInvalid: a secret that is too easy, or an overlap that is too long.
        ClientBuiltIn, ClientNotFound: it is not one that has a secret.
    """
    if not 0 <= overlap.total_seconds() <= MOST_OVERLAP_SECONDS:
        raise ClientInvalid(f"Two secrets can be valid at once for at most {MOST_OVERLAP_SECONDS // 86_400} days.")
    locked = await _lock(db, unverified_client_id)
    if locked.secret_digest == (new := _digest(secret)):
        return locked.client
    client = await store.rotate_secret(
        db, locked.client.client_id, secret_digest=new, previous_expires_at=now + overlap if overlap else None, now=now
    )
    details = {"overlap": int(overlap.total_seconds())}
    await _record(db, Event.CLIENT_SECRET_ROTATED, client.client_id, by=by, now=now, details=details)
    return client


async def disable(db: Connection, unverified_client_id: str, *, by: Actor, now: datetime) -> Client:
    """Shut a client out: its sessions end, its own tokens are revoked, it gets no others. Call within a transaction.

    One that is shut out stays as it is.

    Raises:
        ClientBuiltIn, ClientNotFound: it is not one that can be disabled.
    """
    locked = await _lock(db, unverified_client_id)
    if locked.client.disabled_at is not None:
        return locked.client
    client = await store.set_disabled(db, locked.client.client_id, disabled_at=now)
    await _record(db, Event.CLIENT_DISABLED, client.client_id, by=by, now=now)
    # What was being issued had passed the gate that `_lock` closed, and is seen by now; what comes later sees this.
    await lifecycle.end_all_of_client(db, client.client_id, reason=Reason.DISABLED, by=by, now=now)
    await own_tokens.revoke_all(db, client.client_id, reason=Reason.DISABLED, by=by, now=now)
    return client


async def enable(db: Connection, unverified_client_id: str, *, by: Actor, now: datetime) -> Client:
    """Let a client in again; its old sessions and tokens stay ended. Call within a transaction.

    One that is let in stays as it is.

    Raises:
        ClientBuiltIn, ClientNotFound: it is not one that can be disabled.
    """
    locked = await _lock(db, unverified_client_id)
    if locked.client.disabled_at is None:
        return locked.client
    client = await store.set_disabled(db, locked.client.client_id, disabled_at=None)
    await _record(db, Event.CLIENT_ENABLED, client.client_id, by=by, now=now)
    return client


async def delete(db: Connection, unverified_client_id: str, *, by: Actor, now: datetime) -> None:
    """Delete a client; its sessions end and its own tokens are revoked. Call within a transaction.

    Raises:
        ClientBuiltIn, ClientNotFound: it is not one that can be deleted.
    """
    client_id = (await _lock(db, unverified_client_id)).client.client_id
    await lifecycle.end_all_of_client(db, client_id, reason=Reason.DELETED, by=by, now=now)
    await own_tokens.revoke_all(db, client_id, reason=Reason.DELETED, by=by, now=now)
    await store.delete(db, client_id)
    await _record(db, Event.CLIENT_DELETED, client_id, by=by, now=now)


async def _lock(db: Connection, unverified_client_id: str) -> ClientCredentials:
    _refuse_built_in(unverified_client_id)
    locked = await store.lock(db, unverified_client_id) if CLIENT_ID.fullmatch(unverified_client_id) else None
    if locked is None:
        raise ClientNotFound
    return locked


def _refuse_built_in(client_id: str) -> None:
    if client_id == FIRST_PARTY.client_id:
        raise ClientBuiltIn


def _is_uuid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True


def _grants(unverified: Sequence[str], *, first_party: bool) -> tuple[str, ...]:
    given = set(unverified)
    if not given:
        raise ClientInvalid("The grants are missing: client_credentials, or password and refresh_token.")
    if not given <= _FOR_USERS | {_FOR_ITSELF}:
        raise ClientInvalid("A client may use client_credentials, and if it is first-party password and refresh_token.")
    if given & _FOR_USERS and not first_party:
        raise ClientInvalid("Only a first-party client may use password and refresh_token.")
    if given & _FOR_USERS and not given >= _FOR_USERS:
        raise ClientInvalid("The grants password and refresh_token go together.")
    return tuple(sorted(given))


def _scopes(scope: str) -> tuple[str, ...]:
    try:
        return scopes.parse_given(scope)
    except ScopeRejected as error:
        raise ClientInvalid(error.text) from None


def _audience(unverified: Sequence[str], issuer: str) -> tuple[str, ...]:
    audience = tuple(dict.fromkeys(unverified))
    if len(audience) > _MOST_AUDIENCES or not all(_AUDIENCE.fullmatch(name) for name in audience):
        raise ClientInvalid(
            f"There may be at most {_MOST_AUDIENCES} audiences of printable ASCII, without spaces and commas."
        )
    if issuer in audience:
        raise ClientInvalid("Only tokens of first-party clients are for this service itself; they need not say so.")
    return audience


def _lifetime(access_lifetime: timedelta | None, longest: timedelta) -> timedelta | None:
    if access_lifetime is not None and not timedelta(seconds=1) <= access_lifetime <= longest:
        raise ClientInvalid(
            f"Access tokens live for at least 1 and at most {int(longest.total_seconds())} seconds here; "
            "IDENTITY_ACCESS_LIFETIME is the bound."
        )
    return access_lifetime


def _digest(secret: str) -> bytes:
    if not _SECRET.fullmatch(secret):
        raise ClientInvalid(f"A client's secret has at least {SECRET_MIN_LENGTH} characters of printable ASCII.")
    return digest(secret)


def _told(client: Client) -> dict[str, Any]:
    """Return what the audit tells of a client."""
    return {
        "grants": list(client.grants),
        "scopes": list(client.scopes),
        "audience": list(client.audience),
        "first_party": client.first_party,
        "access_lifetime": client.access_lifetime.total_seconds() if client.access_lifetime is not None else None,
    }


async def _record(
    db: Connection, event: Event, client_id: str, *, by: Actor, now: datetime, details: dict[str, Any] | None = None
) -> None:
    await audit.record(db, event, Subject("client", client_id), by=by, now=now, details=details)
