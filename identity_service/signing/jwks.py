"""The JWKS (RFC 7517) and the thumbprints (RFC 7638) that name its keys, always built from public numbers."""

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from identity_service.signing.keyring import Keyring
from identity_service.verifier.jws import encode_base64url


@dataclass(frozen=True, slots=True)
class JwksDocument:
    body: bytes
    etag: str


def thumbprint(public: RSAPublicKey) -> str:
    """Return the SHA-256 thumbprint of the key, 43 base64url characters (RFC 7638 3)."""
    numbers = public.public_numbers()
    required = {"e": base64url_uint(numbers.e), "kty": "RSA", "n": base64url_uint(numbers.n)}
    canonical = json.dumps(required, separators=(",", ":"), sort_keys=True).encode()
    return encode_base64url(hashlib.sha256(canonical).digest())


def document(keyring: Keyring, now: datetime) -> JwksDocument:
    """Return the JWKS at `now` as the bytes to serve, with a strong validator."""
    keys = []
    for key in keyring.published(now):
        numbers = key.public.public_numbers()
        keys.append(
            {
                "kty": "RSA",
                "use": "sig",
                "alg": "RS256",
                "kid": key.kid,
                "n": base64url_uint(numbers.n),
                "e": base64url_uint(numbers.e),
            }
        )
    body = json.dumps({"keys": keys}, separators=(",", ":")).encode()
    return JwksDocument(body, f'"{encode_base64url(hashlib.sha256(body).digest()[:16])}"')


def base64url_uint(value: int) -> str:
    """Encode a positive integer without leading zero octets (RFC 7518 2)."""
    return encode_base64url(value.to_bytes((value.bit_length() + 7) // 8, "big"))
