"""Tokens that have been verified, so that the next request with the same bytes costs microseconds.

Two layers. Most tokens are kept by SHA-256 of their exact bytes: two spellings of a token are two tokens, and a
kilobyte of text becomes 32 bytes. The few used most are kept by that text itself as well, from the second time on: it
spares the digest, and lasts only until something is heard that could speak against any of them. What that is,
`verification` says; nothing here decides about a token.
"""

from collections.abc import Iterator
from itertools import chain

from identity_service.verifier.claims import Claims

FRESH_TOKENS = 256


class TokenCache:
    """Bounded, and without a list to keep in order: two halves, of which the older is dropped when the newer is full.

    Args:
        size: how many tokens are held at most; 0 switches the cache off.
        fresh: how many of them by their text.
    """

    def __init__(self, size: int, *, fresh: int = FRESH_TOKENS) -> None:
        self._half = (size + 1) // 2
        self._fresh_size = min(fresh, size)
        self._newer: dict[bytes, Claims] = {}
        self._older: dict[bytes, Claims] = {}
        self.get = self._newer.get
        """Looks among the newer half only. `get_older` is asked after that."""
        self.fresh: dict[str, Claims] = {}
        """Tokens against which nothing can have been said since they were looked at. Replaced, never emptied."""

    def __len__(self) -> int:
        return len(self._newer.keys() | self._older.keys())

    def values(self) -> Iterator[Claims]:
        return chain(self._newer.values(), self._older.values())

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

    def keep_fresh(self, fresh: dict[str, Claims], token: str, claims: Claims) -> None:
        """Put a token among the fresh ones.

        Args:
            fresh: those of the moment before the token was looked at. When something was heard meanwhile, possibly in
                another thread, they have been replaced, and it is lost with them.
        """
        if len(fresh) >= self._fresh_size:
            self.forget_fresh()
        else:
            fresh[token] = claims

    def forget_fresh(self) -> None:
        """Have every token looked at again. Callable from any thread."""
        self.fresh = {}

    def remove(self, digest: bytes) -> None:
        self._newer.pop(digest, None)
        self._older.pop(digest, None)

    def clear(self) -> None:
        self._newer.clear()
        self._older.clear()
        self.forget_fresh()
