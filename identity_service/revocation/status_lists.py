"""Status lists (draft-ietf-oauth-status-list) as signed tokens, rendered when they changed and served from memory."""

import asyncio
import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta

from identity_service.errors import DatabaseUnavailable
from identity_service.revocation import LIST_SIZE, position
from identity_service.revocation.feed import RevocationFeed
from identity_service.signing.keyring import Key
from identity_service.signing.live import LiveKeyring
from identity_service.tokens import jws
from identity_service.verifier import status_list
from identity_service.verifier.claims import StatusReference
from identity_service.verifier.jws import encode_base64url

TYP = status_list.TYP

TIME_TO_LIVE = timedelta(seconds=15)
"""How long somebody who does not follow the events may rely on a copy."""

LIFETIME = timedelta(hours=24)
"""After this a copy must not be relied on at all, even when we cannot be asked."""


@dataclass(frozen=True, slots=True)
class StatusListDocument:
    body: bytes
    etag: str


@dataclass(frozen=True, slots=True)
class _Rendered:
    document: StatusListDocument
    version: int
    kid: str
    issued_at: datetime


class StatusLists:
    """The lists of one issuer."""

    def __init__(self, feed: RevocationFeed, keys: LiveKeyring, *, issuer: str) -> None:
        self._feed = feed
        self._keys = keys
        self._issuer = issuer
        self._rendered: dict[int, _Rendered] = {}
        self._rendering = asyncio.Lock()

    def uri(self, list_number: int) -> str:
        return f"{self._issuer}/status-lists/{list_number}"

    def reference(self, status_index: int) -> StatusReference:
        """Return how a token names its entry."""
        place = position(status_index)
        return StatusReference(self.uri(place.list_number), place.index)

    async def document(self, list_number: int, now: datetime) -> StatusListDocument:
        """Return a list, rendered anew in a thread when an entry or the signing key changed, or it has aged.

        Raises:
            KeysUnavailable: no key may sign.
            DatabaseUnavailable: it is not known at this moment what has been revoked.
        """
        if not self._feed.is_current:
            raise DatabaseUnavailable(detail="what has been revoked cannot be read")
        key = self._keys.current.signer(now)
        if document := self._current(list_number, key, now):
            return document
        async with self._rendering:
            if document := self._current(list_number, key, now):
                return document
            version = self._feed.versions.get(list_number, 0)
            revoked = self._feed.revoked_in(list_number)
            document = await asyncio.to_thread(self._render, list_number, revoked, key, now)
            self._rendered[list_number] = _Rendered(document, version, key.kid, now)
        return document

    def _current(self, list_number: int, key: Key, now: datetime) -> StatusListDocument | None:
        rendered = self._rendered.get(list_number)
        if rendered is None or rendered.version != self._feed.versions.get(list_number, 0):
            return None
        fresh = rendered.kid == key.kid and timedelta(0) <= now - rendered.issued_at < LIFETIME / 2
        return rendered.document if fresh else None

    def _render(self, list_number: int, revoked: list[int], key: Key, now: datetime) -> StatusListDocument:
        token = jws.sign(
            key,
            TYP,
            {
                "iss": self._issuer,
                "sub": self.uri(list_number),
                "iat": int(now.timestamp()),
                "exp": int((now + LIFETIME).timestamp()),
                "ttl": int(TIME_TO_LIVE.total_seconds()),
                "status_list": {"bits": 1, "lst": status_list.build(revoked, LIST_SIZE)},
            },
        ).encode()
        return StatusListDocument(token, f'"{encode_base64url(hashlib.sha256(token).digest()[:16])}"')
