"""The envelope of every token: RS256 in compact serialisation (RFC 7515 3.1), written one way and read one way.

PyJWT signs and checks signatures. The reading around it is our own because its defaults accept what RFC 8725 says to
refuse: any `typ`, repeated members, padding, several spellings of one token.
"""

import json
import re
from base64 import urlsafe_b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from jwt.algorithms import RSAAlgorithm

from identity_service.errors import TokenRejected
from identity_service.signing.jwks import base64url
from identity_service.signing.keyring import Key, Keyring

MAX_LENGTH = 8192
LEEWAY = timedelta(seconds=30)
"""How far in the future `iat` may lie when another replica signed."""

_RS256 = RSAAlgorithm(RSAAlgorithm.SHA256)
_COMPACT = re.compile(r"([A-Za-z0-9_-]{1,512})\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)", re.ASCII)
_VISIBLE = re.compile(r"[\x21-\x7e]{1,255}", re.ASCII)
_KID = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)


def sign(key: Key, typ: str, claims: Mapping[str, Any]) -> str:
    """Return the claims as a signed token of the given type; `key` has its private half."""
    assert key.private is not None, "the keyring hands out signers with their private half"
    signing_input = f"{_header(typ, key.kid)}.{base64url(_json(claims))}"
    return f"{signing_input}.{base64url(_RS256.sign(signing_input.encode(), key.private))}"


def verify(unverified_token: str, typ: str, keyring: Keyring, *, now: datetime) -> dict[str, Any]:
    """Return the claims of a token that this issuer signed as this type.

    Neither times nor any other claim have been looked at.

    Raises:
        TokenRejected: with reason malformed, wrong_algorithm, wrong_type, unknown_key or bad_signature.
    """
    unverified = _take_apart(unverified_token)
    header = _object(_decode(unverified.header))
    if header.get("alg") != "RS256":
        raise TokenRejected("wrong_algorithm")
    if header.get("typ") != typ:
        raise TokenRejected("wrong_type")
    kid = header.get("kid")
    if header.keys() != {"alg", "typ", "kid"} or not isinstance(kid, str) or not _KID.fullmatch(kid):
        raise TokenRejected("malformed", "unexpected header members")
    public = keyring.verification_key(kid, now)
    if public is None:
        raise TokenRejected("unknown_key")
    signature = _decode(unverified.signature)
    if not _RS256.verify(unverified.signing_input, public, signature):
        raise TokenRejected("bad_signature")
    return _object(_decode(unverified.payload))


def lifetime_of(claims: Mapping[str, Any], *, now: datetime) -> tuple[datetime, datetime]:
    """Return `iat` and `exp` of verified claims, having refused a token outside of them.

    Raises:
        TokenRejected: with reason missing_claim, not_yet_valid or expired.
    """
    issued_at, expires_at = moment(claims, "iat"), moment(claims, "exp")
    if issued_at > now + LEEWAY:
        raise TokenRejected("not_yet_valid")
    if expires_at <= now:
        raise TokenRejected("expired")
    return issued_at, expires_at


def moment(claims: Mapping[str, Any], name: str) -> datetime:
    """Return a NumericDate claim (RFC 7519 2), which we always write as whole seconds."""
    value = claims.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 253_402_300_800:
        raise TokenRejected("missing_claim", name)
    return datetime.fromtimestamp(value, UTC)


def text(claims: Mapping[str, Any], name: str) -> str:
    """Return a claim that is a string of visible ASCII characters (which is all we write), and not empty."""
    value = claims.get(name)
    if not isinstance(value, str) or not _VISIBLE.fullmatch(value):
        raise TokenRejected("missing_claim", name)
    return value


def texts(claims: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return a claim that is an array of strings."""
    value = claims.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TokenRejected("missing_claim", name)
    return tuple(value)


@dataclass(frozen=True, slots=True)
class _Unverified:
    header: str
    payload: str
    signature: str
    signing_input: bytes


def _take_apart(unverified_token: str) -> _Unverified:
    match = _COMPACT.fullmatch(unverified_token) if len(unverified_token) <= MAX_LENGTH else None
    if match is None:
        raise TokenRejected("malformed")
    header, payload, signature = match.groups()
    return _Unverified(header, payload, signature, f"{header}.{payload}".encode())


def _decode(segment: str) -> bytes:
    """Decode base64url, refusing every spelling but the one we write: unused trailing bits make a second token."""
    try:
        decoded = urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    except ValueError:
        raise TokenRejected("malformed") from None
    if base64url(decoded) != segment:
        raise TokenRejected("malformed")
    return decoded


def _object(encoded: bytes) -> dict[str, Any]:
    try:
        value = json.loads(encoded.decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        raise TokenRejected("malformed") from None
    if not isinstance(value, dict):
        raise TokenRejected("malformed")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("repeated member")
    return members


@lru_cache(maxsize=16)
def _header(typ: str, kid: str) -> str:
    return base64url(_json({"alg": "RS256", "typ": typ, "kid": kid}))


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
