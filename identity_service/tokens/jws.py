"""How this issuer writes tokens, and what it wants of those that come back.

Taking a token apart is the verifier's: one place reads JWTs. What is stricter here is what only the issuer can ask for:
the exact `typ` of the kind expected, and RS256 with a key of its own keyring.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from json import encoder as json_encoder
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256

from identity_service.errors import TokenRejected
from identity_service.signing.keyring import Key, Keyring
from identity_service.verifier import jws as envelope
from identity_service.verifier.jws import encode_base64url
from identity_service.verifier.rejection import TokenRejected as VerifierRejected

LEEWAY = timedelta(seconds=30)
"""How far in the future `iat` may lie when another replica signed."""

_PKCS1, _SHA256 = PKCS1v15(), SHA256()  # RS256: RFC 7518 3.3
_known_headers: dict[bytes, envelope.Header] = {}
# What `json.dumps` makes for each call, made once.
_chunks = vars(json_encoder)["c_make_encoder"](
    None, None, json_encoder.encode_basestring_ascii, None, ":", ",", False, False, False
)
_VISIBLE = re.compile(r"[\x21-\x7e]{1,255}", re.ASCII)


class Unsigned(NamedTuple):
    """A token but for its signature, and the key that is to make that."""

    key: Key
    signing_input: str


def unsigned(key: Key, typ: str, claims: Mapping[str, Any]) -> Unsigned:
    """Return the claims as a token of the given type that has yet to be signed."""
    return Unsigned(key, f"{_header(typ, key.kid)}.{encode_base64url(to_json(claims).encode())}")


def signed(token: Unsigned) -> str:
    """Return the token with its signature; the key has its private half."""
    key, signing_input = token
    assert key.private is not None, "the keyring hands out signers with their private half"
    signature = key.private.sign(signing_input.encode(), _PKCS1, _SHA256)
    return f"{signing_input}.{encode_base64url(signature)}"


def sign(key: Key, typ: str, claims: Mapping[str, Any]) -> str:
    """Return the claims as a signed token of the given type."""
    return signed(unsigned(key, typ, claims))


def open_envelope(unverified_token: str, typ: str, keyring: Keyring, *, now: datetime) -> bytes:
    """Return the payload of a token that this issuer signed as this type. What it claims has not been looked at.

    Raises:
        TokenRejected: with reason malformed, wrong_algorithm, wrong_type, unknown_key or bad_signature.
    """
    try:
        unverified = envelope.take_apart(unverified_token.encode(errors="replace"), _known_headers)
        if unverified.header.algorithm != "RS256":
            raise TokenRejected("wrong_algorithm")
        if unverified.header.typ != typ:
            raise TokenRejected("wrong_type")
        public = keyring.verification_key(unverified.header.key_id, now)
        if public is None:
            raise TokenRejected("unknown_key")
        try:
            public.verify(unverified.signature, unverified.signing_input, _PKCS1, _SHA256)
        except InvalidSignature:
            raise TokenRejected("bad_signature") from None
        envelope.remember(_known_headers, unverified)
        return unverified.payload()
    except VerifierRejected as error:
        raise in_own_words(error) from None


def verify(unverified_token: str, typ: str, keyring: Keyring, *, now: datetime) -> dict[str, Any]:
    """Return the claims of a token as `open_envelope` does, read but not judged.

    Raises:
        TokenRejected: as there.
    """
    return members_of(open_envelope(unverified_token, typ, keyring, now=now))


def members_of(payload: bytes) -> dict[str, Any]:
    """Return what a payload says, not judged.

    Raises:
        TokenRejected: malformed.
    """
    try:
        return envelope.parse_object(payload)
    except VerifierRejected as error:
        raise in_own_words(error) from None


def in_own_words(error: VerifierRejected) -> TokenRejected:
    """Return what the verifier says of a token as an error of this service."""
    return TokenRejected(error.reason, error.detail)


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


@lru_cache(maxsize=16)
def _header(typ: str, kid: str) -> str:
    return encode_base64url(to_json({"alg": "RS256", "typ": typ, "kid": kid}).encode())


def to_json(value: Mapping[str, Any]) -> str:
    """Return a JSON object in its shortest spelling, of values that JSON has and nothing else."""
    return "".join(_chunks(value, 0))
