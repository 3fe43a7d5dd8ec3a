"""How a client proves who it is: by a secret of which only the digest is kept.

SHA-256 and not a slow hash: our own secrets are 256 random bits, which nobody finds by trying, however fast. A slow
hash would buy nothing, and every token request would pay for it.
"""

import hashlib
import hmac
import re
from datetime import datetime

from identity_service.clients import Client, ClientCredentials, store
from identity_service.database import Connection
from identity_service.errors import ClientRejected

CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)

_NOBODYS = bytes(32)
"""Compared with when there is nothing to compare with. No text is known that has this digest."""


def digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).digest()


async def authenticate(db: Connection, unverified_client_id: str, unverified_secret: str, *, now: datetime) -> Client:
    """Return the registered client whose secret this is.

    Raises:
        ClientRejected: do not say why; the detail, for the audit, is a stable word.
    """
    # An impossible id is an unknown one, and costs the same query.
    client_id = unverified_client_id if CLIENT_ID.fullmatch(unverified_client_id) else ""
    return prove(await store.find_credentials(db, client_id), unverified_secret, now=now)


def prove(credentials: ClientCredentials | None, unverified_secret: str, *, now: datetime) -> Client:
    """Return the client if the secret is its present one, or its previous one while that is still accepted.

    Unknown client, wrong secret and disabled client cost the same digest and the same comparisons.

    Raises:
        ClientRejected: whatever the reason.
    """
    presented = digest(unverified_secret)
    present, previous = _NOBODYS, _NOBODYS
    if credentials is not None:
        present = credentials.secret_digest
        if (until := credentials.client.previous_secret_expires_at) is not None and now < until:
            previous = credentials.previous_secret_digest or _NOBODYS
    is_present, is_previous = hmac.compare_digest(presented, present), hmac.compare_digest(presented, previous)
    if credentials is None:
        raise ClientRejected(detail="unknown_client")
    if not unverified_secret:
        raise ClientRejected(detail="no_secret")
    if not (is_present or is_previous):
        raise ClientRejected(detail="wrong_secret")
    if credentials.client.disabled_at is not None:
        raise ClientRejected(detail="disabled")
    return credentials.client
