"""The issuer's public keys as a client should hold them: fetched once, renewed early, kept when the issuer is away.

Nothing a stranger sends makes this ask the issuer more than once per cooldown, and nothing the issuer answers by
mistake takes away keys that worked a moment ago.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, NamedTuple

import httpx2
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurve, EllipticCurvePublicNumbers
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from jwt.algorithms import Algorithm, ECAlgorithm, OKPAlgorithm, RSAAlgorithm, RSAPSSAlgorithm

from identity_service.verifier import jws
from identity_service.verifier.http import Answer, Border, FetchFailed, start
from identity_service.verifier.rejection import TokenRejected

log = logging.getLogger("identity_service.verifier")

COOLDOWN = 30.0
"""Seconds between two requests to the issuer that unknown key ids may cause, all of them together."""
SETTLED = 3.0
"""Seconds after a change of the keys by which every replica of the issuer publishes them."""
MIN_LIFETIME, DEFAULT_LIFETIME, MAX_LIFETIME = 30.0, 300.0, 86_400.0
"""Seconds for which a JWKS is good: whatever `Cache-Control` says, when it says nothing, and at most."""
MAX_LENGTH = 256 * 1024
"""Bytes of the longest JWKS that is read."""
MAX_KEYS = 100
_RETRY = (1.0, 30.0)
ALGORITHMS: Final[Mapping[str, Algorithm]] = {
    "RS256": RSAAlgorithm(RSAAlgorithm.SHA256),
    "RS384": RSAAlgorithm(RSAAlgorithm.SHA384),
    "RS512": RSAAlgorithm(RSAAlgorithm.SHA512),
    "PS256": RSAPSSAlgorithm(RSAPSSAlgorithm.SHA256),
    "PS384": RSAPSSAlgorithm(RSAPSSAlgorithm.SHA384),
    "PS512": RSAPSSAlgorithm(RSAPSSAlgorithm.SHA512),
    "ES256": ECAlgorithm(ECAlgorithm.SHA256),
    "ES384": ECAlgorithm(ECAlgorithm.SHA384),
    "ES512": ECAlgorithm(ECAlgorithm.SHA512),
    "EdDSA": OKPAlgorithm(),
    "Ed25519": OKPAlgorithm(),
}
"""What checks signatures, for each of `jws.ALGORITHMS`. Not there, since the issuer reads tokens without PyJWT."""
_CURVES: Mapping[str, tuple[str, EllipticCurve]] = {
    "ES256": ("P-256", ec.SECP256R1()),
    "ES384": ("P-384", ec.SECP384R1()),
    "ES512": ("P-521", ec.SECP521R1()),
}
_PRIVATE_MEMBERS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_WHITE_SPACE = b" \t\r\n"
_MAX_AGE = re.compile(r"(?:^|[\s,])max-age=\"?(\d{1,10})", re.ASCII | re.IGNORECASE)


class Key(NamedTuple):
    """A public key made ready for one algorithm."""

    key_id: str
    algorithm: str
    verify: jws.SignatureCheck
    public: Any


class Keys:
    """The keys in force.

    Args:
        max_age: seconds after which keys are no longer used, when the issuer has not confirmed them for so long.
        clock: seconds that only ever grow; not the time of day.
        on_removal: called with the ids of keys that were there and are there no longer.
    """

    def __init__(
        self,
        border: Border,
        url: str,
        *,
        algorithms: Collection[str],
        max_age: float,
        clock: Callable[[], float],
        on_removal: Callable[[Collection[str]], None],
    ) -> None:
        self.due_at = float("-inf")
        """When to look here again before trusting the keys, on `clock`. Hot paths compare against this and no more."""
        self._border = border
        self._url = url
        self._algorithms = frozenset(algorithms)
        self._max_age = max_age
        self._clock = clock
        self._on_removal = on_removal
        self._keys: dict[str, Key] = {}
        self._etag: str | None = None
        self._confirmed_at: float | None = None
        self._stale_at = 0.0
        self._retry_at = float("-inf")
        self._failures = 0
        self._flight: asyncio.Task[None] | None = None
        self._hinted = False
        """Whether the issuer has said that its keys changed, and not every replica of it need have published them."""
        self._settled_at = float("-inf")
        self._unknown_refetch_at = float("-inf")

    @property
    def key_ids(self) -> tuple[str, ...]:
        return tuple(self._keys)

    @property
    def age(self) -> float | None:
        """Seconds since the issuer last confirmed the keys; None before the first time."""
        return None if self._confirmed_at is None else self._clock() - self._confirmed_at

    def held(self, key_id: str) -> Key | None:
        return self._keys.get(key_id)

    def has_lost(self, key_id: str) -> bool:
        """Tell whether keys are known, and this is none of them."""
        return bool(key_id and self._keys) and key_id not in self._keys

    async def find(self, key_id: str) -> Key | None:
        """Return the key of this id, having asked the issuer about one that is not known, as often as is polite.

        Raises:
            TokenRejected: keys_unavailable.
        """
        if self._clock() >= self.due_at:
            await self.tend()
        return self._keys.get(key_id) or await self._find_unknown(key_id)

    async def tend(self) -> None:
        """Renew what is due: in the background while the keys are good, waiting for it once they are not.

        Raises:
            TokenRejected: keys_unavailable, because there are none or they have not been confirmed for `max_age`.
        """
        now = self._clock()
        if now >= self._retry_at or self._is_flying():
            flight = self._fetch()
            # After a pause the first request waits for the issuer's word; when that has failed, others do not.
            if self._is_dead(now) or (now >= self._stale_at and not self._failures):
                await asyncio.wait({flight})
        if self._is_dead(self._clock()):
            raise TokenRejected("keys_unavailable")

    def hear_changed(self) -> None:
        """Ask now, because the issuer says that its keys have changed, and again when all its replicas must know."""
        self._hinted = True
        self._settled_at = self._clock() + SETTLED
        self._fetch()

    def _is_dead(self, now: float) -> bool:
        return self._confirmed_at is None or now - self._confirmed_at >= self._max_age

    async def _find_unknown(self, key_id: str) -> Key | None:
        now = self._clock()
        flying = self._is_flying()
        if not flying and now < self._unknown_refetch_at:
            return None
        if not flying:
            self._unknown_refetch_at = now + COOLDOWN
        await asyncio.wait({self._fetch()})
        return self._keys.get(key_id)

    def _is_flying(self) -> bool:
        flight = self._flight
        return flight is not None and not flight.done() and flight.get_loop() is asyncio.get_running_loop()

    def _fetch(self) -> asyncio.Task[None]:
        """Start asking the issuer, or join those who wait for its answer already."""
        if self._flight is None or not self._is_flying():
            self._flight = start(self._renew(), name="identity-verifier-keys")
        return self._flight

    async def _renew(self) -> None:
        try:
            answer = await self._border.get(
                self._url, accept="application/json", max_length=MAX_LENGTH, etag=self._etag, fresh=self._hinted
            )
            self._take(answer)
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the keys held stay in force
            now = self._clock()
            if now >= self.due_at or self._hinted:  # else only an unknown key id wanted it, and the keys are good
                self._retry_at = now + min(_RETRY[0] * 2**self._failures, _RETRY[1])
                self._failures = min(self._failures + 1, 10)
                confirmed_at = float("-inf") if self._confirmed_at is None else self._confirmed_at
                self.due_at = min(self._retry_at, confirmed_at + self._max_age)
            log.warning("verifier.keys_unavailable: %s", error)

    def _take(self, answer: Answer) -> None:
        if answer.status == 200:
            found, held = parse(answer.body, self._algorithms), self._keys
            # A key that stays is the same object: who holds it may compare by that.
            self._keys = {
                kid: held[kid] if kid in held and _is_same(held[kid], found[kid]) else found[kid] for kid in found
            }
            self._etag = answer.headers.get("etag")
            if gone := [kid for kid, key in held.items() if self._keys.get(kid) is not key]:
                self._on_removal(gone)
        elif answer.status != 304 or not self._keys:
            raise FetchFailed(f"{self._url} answered {answer.status}")
        now = self._clock()
        lifetime = min(max(_lifetime(answer.headers), MIN_LIFETIME), MAX_LIFETIME)
        self._confirmed_at, self._failures, self._retry_at = now, 0, float("-inf")
        self._stale_at = now + lifetime
        self._hinted = now < self._settled_at
        self.due_at = self._settled_at if self._hinted else now + min(lifetime * 0.8, self._max_age)


def _is_same(one: Key, other: Key) -> bool:
    same: bool = one.algorithm == other.algorithm and one.public == other.public
    return same


def parse(body: bytes, algorithms: Collection[str]) -> dict[str, Key]:
    """Return the keys of a JWKS (RFC 7517) that may verify signatures here. An entry that may not is passed over.

    Raises:
        FetchFailed: it is not a JWKS, or nothing in it can be used.
    """
    try:
        entries = jws.parse_object(body.strip(_WHITE_SPACE)).get("keys")
    except TokenRejected as error:
        raise FetchFailed(f"the JWKS is {error.detail}") from None
    if not isinstance(entries, list):
        raise FetchFailed("the JWKS has no array of keys")
    keys: dict[str, Key] = {}
    for entry in entries[:MAX_KEYS]:
        key = _prepare(entry, algorithms)
        if key is not None:
            keys.setdefault(key.key_id, key)
    if not keys:
        raise FetchFailed("the JWKS has no key that can be used")
    return keys


def _prepare(entry: Any, algorithms: Collection[str]) -> Key | None:
    if not isinstance(entry, dict) or entry.get("use") != "sig" or not _PRIVATE_MEMBERS.isdisjoint(entry):
        return None
    key_id, algorithm = entry.get("kid"), entry.get("alg")
    if not isinstance(key_id, str) or not jws.is_key_id(key_id):
        return None
    if not isinstance(algorithm, str) or algorithm not in algorithms:
        return None
    try:
        public = _public_key(entry, algorithm)
    except (KeyError, ValueError, TypeError, AttributeError, TokenRejected, UnsupportedAlgorithm):
        public = None
    if public is None:
        log.warning("verifier.key_ignored: %s", key_id)
        return None
    return Key(key_id, algorithm, _check_with(ALGORITHMS[algorithm], public), public)


def _public_key(entry: dict[str, Any], algorithm: str) -> Any:
    """Build the key from its public numbers, or return None when it is too weak or of another kind."""
    kind = entry["kty"]
    if algorithm in _CURVES:
        name, curve = _CURVES[algorithm]
        if kind != "EC" or entry["crv"] != name:
            return None
        return EllipticCurvePublicNumbers(_number(entry["x"]), _number(entry["y"]), curve).public_key()
    if algorithm in {"EdDSA", "Ed25519"}:
        if kind != "OKP" or entry["crv"] != "Ed25519":
            return None
        return Ed25519PublicKey.from_public_bytes(jws.decode_base64url(entry["x"].encode()))
    modulus, exponent = _number(entry["n"]), _number(entry["e"])
    # Large numbers would make each signature cost as much as the sender of the key likes.
    if (
        kind != "RSA"
        or not modulus & exponent & 1
        or not 2048 <= modulus.bit_length() <= 8192
        or not 65537 <= exponent < 1 << 32
    ):
        return None
    return rsa.RSAPublicNumbers(exponent, modulus).public_key()


def _check_with(algorithm: Any, public: Any) -> jws.SignatureCheck:
    if type(algorithm) is RSAAlgorithm:
        return _check_pkcs1(public, algorithm.hash_alg())

    def check(signing_input: bytes, signature: bytes) -> bool:
        holds: bool = algorithm.verify(signing_input, public, signature)
        return holds

    return check


def _check_pkcs1(public: rsa.RSAPublicKey, digest: hashes.HashAlgorithm) -> jws.SignatureCheck:
    """What PyJWT does, with what it makes for each signature made once."""
    verify, scheme = public.verify, padding.PKCS1v15()

    def check(signing_input: bytes, signature: bytes) -> bool:
        try:
            verify(signature, signing_input, scheme, digest)
        except InvalidSignature:
            return False
        return True

    return check


def _number(encoded: str) -> int:
    return int.from_bytes(jws.decode_base64url(encoded.encode()))


def _lifetime(headers: httpx2.Headers) -> float:
    """Return for how long the answer says it is good, less the time it spent in caches on the way."""
    control = headers.get("cache-control", "")
    if found := _MAX_AGE.search(control):
        age = headers.get("age", "0")
        return float(found[1]) - (int(age) if age.isascii() and age.isdecimal() else 0)
    return MIN_LIFETIME if "no-" in control else DEFAULT_LIFETIME
