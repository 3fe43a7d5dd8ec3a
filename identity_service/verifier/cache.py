"""Tokens that have been verified, so that the next request with the same bytes costs microseconds.

Keyed by SHA-256 of the exact bytes: two spellings of a token are two tokens. What ends an entry early (a revocation, a
key that is gone) is asked by `verification` on every hit or empties the cache; nothing here decides about a token.
"""

from identity_service.verifier.claims import Claims


class TokenCache:
    """Bounded, and without a list to keep in order: two halves, of which the older is dropped when the newer is full.

    Args:
        size: how many tokens are held at most; 0 switches the cache off.
    """

    def __init__(self, size: int) -> None:
        self._half = (size + 1) // 2
        self._newer: dict[bytes, Claims] = {}
        self._older: dict[bytes, Claims] = {}
        self.get = self._newer.get
        """Looks among the newer half only: the way of a hot token. `get_older` is asked after that."""

    def __len__(self) -> int:
        return len(self._newer.keys() | self._older.keys())

    def get_older(self, digest: bytes) -> Claims | None:
        """Look among the older half, and keep what is found for another round."""
        claims = self._older.pop(digest, None)
        if claims is not None:
            self.put(digest, claims)
        return claims

    def put(self, digest: bytes, claims: Claims) -> None:
        if not self._half:
            return
        if len(self._newer) >= self._half:
            self._older, self._newer = self._newer, {}
            self.get = self._newer.get
        self._newer[digest] = claims

    def remove(self, digest: bytes) -> None:
        self._newer.pop(digest, None)
        self._older.pop(digest, None)

    def clear(self) -> None:
        self._newer.clear()
        self._older.clear()
