"""Verifying a token: what is asked, in which order, and when it need not be asked again."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from types import TracebackType
from typing import Self

import httpx2

from identity_service.verifier import jws
from identity_service.verifier.addresses import check_url, is_loopback_url
from identity_service.verifier.cache import FRESH_TOKENS, TokenCache
from identity_service.verifier.claims import Claims, ClaimsReader, Shared, StatusReference
from identity_service.verifier.http import Border
from identity_service.verifier.jws import MAX_LENGTH
from identity_service.verifier.keys import Key, Keys
from identity_service.verifier.rejection import TokenRejected
from identity_service.verifier.revocations import OnStale, Revocations

TYP = "at+jwt"


@dataclass(frozen=True, slots=True)
class VerifierStatus:
    """How a verifier stands, for metrics and health checks. Ages and the skew are seconds.

    Attributes:
        keys_age: since the issuer last confirmed its keys; None before the first time.
        keys: the ids of the keys in force.
        stream_connected: whether revocations arrive as they happen.
        lists: since the issuer last vouched for each status list; None for one that could not be fetched yet.
        cached_tokens: tokens that are remembered.
        clock_skew: how far the issuer's clock is ahead of ours; None while unknown.
    """

    keys_age: float | None
    keys: tuple[str, ...]
    stream_connected: bool
    lists: Mapping[str, float | None]
    cached_tokens: int
    clock_skew: float | None


class Verifier:
    """Verifies access tokens of one issuer for one audience. Make one per process, wherever the application is made.

    It needs no start: keys are fetched for the first token, revocations are followed from the first token that has a
    status, in the event loop of that call. Another loop beside it is served by what the first one hears; when the first
    one has ended or stands still, the next call follows the issuer from its own.

    Args:
        issuer: the exact `iss`, https (or http on this machine).
        audience: what this service is called in `aud`; several names when it has several.
        algorithms: asymmetric algorithms by name. Each key is for one of them.
        leeway: seconds by which clocks may differ, 60 at most: the issuer forgets what was revoked soon after its end.
        jwks_uri: where the keys are, when not at `/.well-known/jwks.json` of the issuer.
        cache_size: how many verified tokens are remembered; 0 for none.
        on_stale: what becomes of tokens with a status when nothing could be heard about revocations for
            `max_staleness` seconds: "accept" (they live for minutes only) or "reject" (as keys_unavailable).
        max_key_age: seconds for which keys are used without the issuer confirming them.
        follow_revocations: whether status lists and the event stream are looked at.
        http: takes the place of the network, in tests.
        now: seconds since 1970, for tests.
    """

    def __init__(
        self,
        issuer: str,
        *,
        audience: str | Iterable[str],
        algorithms: Iterable[str] = ("RS256",),
        leeway: float = 30,
        jwks_uri: str | None = None,
        cache_size: int = 10_000,
        on_stale: OnStale = "accept",
        max_staleness: float = 300,
        max_key_age: float = 86_400,
        follow_revocations: bool = True,
        http: httpx2.AsyncBaseTransport | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.issuer = issuer
        self.audience = (audience,) if isinstance(audience, str) else tuple(audience)
        check_url(issuer)
        keys_url = jwks_uri or f"{issuer.rstrip('/')}/.well-known/jwks.json"
        check_url(keys_url)
        allowed = frozenset(algorithms)
        if not allowed or not allowed.issubset(jws.ALGORITHMS):
            raise ValueError(f"algorithms are some of {', '.join(jws.ALGORITHMS)}")
        if not self.audience or not all(self.audience):
            raise ValueError("an audience is needed: without one, any service's token would do")
        if not 0 <= leeway <= 60:
            raise ValueError("leeway is from 0 to 60 seconds")
        if on_stale not in {"accept", "reject"}:
            raise ValueError('on_stale is "accept" or "reject"')
        self._now = now
        # Intervals must not jump with the time of day; a test has one clock for both.
        self._clock = time.monotonic if now is time.time else now
        self._leeway = leeway
        self._algorithms = allowed
        self._known_headers = Shared[bytes, Key]()
        self._reader = ClaimsReader(issuer, frozenset(self.audience), leeway=leeway)
        # A fresh token is not asked about again until something is heard; "reject" wants to know when nothing is.
        self._cache = TokenCache(cache_size, fresh=FRESH_TOKENS if on_stale == "accept" else 0)
        self._border = Border(http, local=is_loopback_url(issuer), now=now, leeway=leeway)
        self._keys = Keys(
            self._border,
            keys_url,
            algorithms=allowed,
            max_age=max_key_age,
            clock=self._clock,
            on_removal=self._hear_keys_gone,
        )
        self._revocations = Revocations(
            self._border,
            self._keys,
            issuer,
            list_of_the_issuer=self._reader.list_of_the_issuer,
            leeway=leeway,
            on_stale=on_stale,
            max_staleness=max_staleness,
            follow=follow_revocations,
            clock=self._clock,
            now=now,
            on_change=self._cache.forget_fresh,
        )

    async def verify(self, unverified_token: str | bytes) -> Claims:
        """Return the claims of a token that is valid at this moment.

        Raises:
            TokenRejected: and nothing else, whatever the token is made of.
        """
        claims = self._cache.fresh.get(unverified_token) if type(unverified_token) is str else None
        if claims is not None:
            moment = self._clock()
            heard = moment < self._keys.due_at and moment < self._revocations.due_at
            if heard and not self._revocations.has_gone() and self._now() < claims.expires + self._leeway:
                return claims
        return await self._look_closer(unverified_token)

    async def wait_revoked(self, claims: Claims) -> None:
        """Return when the session of these claims has been revoked; for what outlives a request, like a WebSocket.

        Returns too when the key that signed the token has been, when the token has expired and the issuer could not be
        heard for so long that a revocation may have been missed, and with `on_stale="reject"` as soon as `verify`
        would refuse the token because nothing is heard.
        Of a token without a status only its key can be revoked, which is noticed when other tokens are verified.
        Cancel it when nobody is interested any more.
        """
        await self._revocations.wait(claims)

    def hear_revoked(self, reference: StatusReference, until: float) -> None:
        """Refuse tokens with this status from now on, learnt by other ways than the issuer's stream.

        For applications with a message bus of their own, and for `testing`. Callable from any thread.

        Args:
            until: when the last of those tokens expires, in seconds since 1970.
        """
        self._revocations.revoke(reference, until)

    def status(self) -> VerifierStatus:
        """Return how things stand, without asking the issuer."""
        return VerifierStatus(
            keys_age=self._keys.age,
            keys=self._keys.key_ids,
            stream_connected=self._revocations.connected,
            lists=self._revocations.ages(),
            cached_tokens=len(self._cache),
            clock_skew=self._border.clock_skew,
        )

    async def aclose(self) -> None:
        """Stop following the issuer and close the connections. Verifying again starts them again."""
        await self._revocations.close()
        await self._border.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _look_closer(self, unverified_token: str | bytes) -> Claims:
        exact = _exact_bytes(unverified_token)
        digest = sha256(exact).digest()
        cache = self._cache
        fresh = cache.fresh  # Before any question is asked: what is heard after the answer puts another in its place.
        claims = cache.get(digest) or cache.get_older(digest)
        if claims is not None and self._clock() >= self._keys.due_at:
            await self._keys.tend()
            claims = cache.get(digest)  # its key may have gone
        key = None
        if claims is None:
            signing_input, header, payload, encoded_signature = jws.split(exact)
            signature = jws.decode_base64url(encoded_signature)
            known = self._known_key(header)
            key = await self._find_key(header) if known is None or self._clock() >= self._keys.due_at else known
            if not key.verify(signing_input, signature):
                raise TokenRejected("bad_signature")
            if known is not key:
                self._known_headers.keep(header, key)  # not before: strangers must not push out what is used
            claims = self._reader.read(jws.decode_base64url(payload), now=self._now(), key_id=key.key_id)
        elif self._now() >= claims.expires + self._leeway:
            cache.remove(digest)
            raise TokenRejected("expired")
        status = claims.status
        if status is not None:
            # Only now: a token that is not valid must not make us ask anybody anything.
            self._revocations.keep_following()
            if not self._revocations.check(status):
                await self._revocations.require(status)
        if key is not None:
            self._keep(digest, claims, key)
        elif type(unverified_token) is str:
            # Only the second time: tokens that are seen once would push out those that are used.
            cache.keep_fresh(fresh, unverified_token, claims)
        return claims

    def _known_key(self, header_segment: bytes) -> Key | None:
        """Return the key of a header that was put aside, if it is still in force: another thread may take it away."""
        key = self._known_headers.get(header_segment)
        return key if key is not None and self._keys.held(key.key_id) is key else None

    def _keep(self, digest: bytes, claims: Claims, key: Key) -> None:
        """Remember a token, unless its key was revoked while we waited for the list, or is at this moment."""
        if self._keys.held(key.key_id) is key:
            self._cache.put(digest, claims)
            if self._keys.held(key.key_id) is not key:
                self._cache.remove(digest)

    async def _find_key(self, header_segment: bytes) -> Key:
        header = jws.read_header(header_segment)
        if header.algorithm not in self._algorithms:
            raise TokenRejected("wrong_algorithm")
        if not jws.is_type(header.typ, TYP):
            raise TokenRejected("wrong_type")
        key = await self._keys.find(header.key_id)
        if key is None:
            raise TokenRejected("unknown_key")
        if key.algorithm != header.algorithm:
            raise TokenRejected("wrong_algorithm")
        return key

    def _hear_keys_gone(self, key_ids: Collection[str]) -> None:
        """Forget what was verified. A key that goes before its tokens are over has been revoked: none of them is."""
        now = self._now()
        held = (*self._cache.values(), *self._revocations.waiting())
        revoked = {claims.key_id for claims in held if claims.key_id in key_ids and claims.expires > now}
        self._known_headers.clear()
        self._cache.clear()
        if revoked:
            self._revocations.wake_those_of_keys(revoked)


def _exact_bytes(unverified_token: str | bytes) -> bytes:
    if not isinstance(unverified_token, (str, bytes)):
        raise TokenRejected("malformed", "neither text nor bytes")
    if len(unverified_token) > MAX_LENGTH:
        raise TokenRejected("malformed", "too long")
    if isinstance(unverified_token, bytes):
        return unverified_token
    try:
        return unverified_token.encode()
    except UnicodeEncodeError:
        raise TokenRejected("malformed", "not text") from None
