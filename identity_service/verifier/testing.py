"""An issuer in memory for the tests of services that verify tokens: no server, no network, no waiting.

    issuer = TestIssuer(audience="orders")
    app = make_app(issuer.verifier())
    token = issuer.token(scope="orders:write")
    issuer.revoke(token)

In pytest, `pytest_plugins = ["identity_service.verifier.testing"]` in a conftest gives the fixture `token_issuer`.
There is nothing to rewrite in here, whoever imports it first: PYTEST_DONT_REWRITE.
"""

import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from typing import Any
from uuid import uuid4
from weakref import WeakSet

import httpx2
from cryptography.hazmat.primitives.asymmetric import rsa

from identity_service.verifier import jws
from identity_service.verifier.claims import StatusReference
from identity_service.verifier.jws import encode_base64url
from identity_service.verifier.keys import ALGORITHMS
from identity_service.verifier.verification import TYP, Verifier

__all__ = ["TestIssuer"]

_MISSPELT = frozenset({"scopes", "expire", "expires", "session_id"})


class TestIssuer:
    """Mints tokens as the real issuer does, and hands out verifiers that know only this one.

    Args:
        issuer: the `iss` of its tokens.
        audience: the `aud` of its tokens, and what its verifiers are called.
        now: seconds since 1970.
    """

    __test__ = False  # for pytest: this is not a test case

    def __init__(
        self,
        issuer: str = "https://id.example.com",
        audience: str | Iterable[str] = "api",
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.issuer = issuer
        self.audience = (audience,) if isinstance(audience, str) else tuple(audience)
        self._now = now
        self._key = _private_key()
        self._jwk = _public_jwk(self._key)
        self._indexes: dict[str, int] = {}
        self._revoked: dict[StatusReference, int] = {}
        self._verifiers: WeakSet[Verifier] = WeakSet()

    @property
    def key_id(self) -> str:
        return self._jwk["kid"]

    def token(
        self,
        subject: str = "0190a3c2-0000-7000-8000-000000000001",
        *,
        scope: str | Iterable[str] = "",
        role: str | Iterable[str] = (),
        audience: str | Iterable[str] | None = None,
        expired: bool = False,
        lifetime: int = 600,
        **claims: Any,
    ) -> str:
        """Return an access token.

        Args:
            scope, role: what the caller may do; a string or several.
            audience: for whom it is, when not for this issuer's usual audience.
            expired: whether its time is over already.
            claims: further claims, or others than these would be; None leaves one out. Tokens with the same `sid`
                belong to one session, and are revoked together.
        """
        if misspelt := _MISSPELT & claims.keys():
            # As claims that nobody reads they would make a test pass for the wrong reason.
            there_are = "there are scope, role, audience, sid, expired and lifetime"
            raise TypeError(f"{', '.join(sorted(misspelt))}: {there_are}")
        aud = self.audience if audience is None else (audience,) if isinstance(audience, str) else audience
        issued = int(self._now()) - (lifetime + 3600 if expired else 0)
        session_id, token_id = claims.get("sid", str(uuid4())), str(uuid4())
        # A client's own token has no session, and is revoked alone.
        index = self._indexes.setdefault(str(session_id or token_id), len(self._indexes))
        contents = {
            "iss": self.issuer,
            "sub": subject,
            "aud": list(aud),
            "client_id": "first-party",
            "jti": token_id,
            "iat": issued,
            "exp": issued + lifetime,
            "sid": session_id,
            "auth_time": issued,
            "amr": ["pwd"],
            "scope": scope if isinstance(scope, str) else " ".join(scope),
            "roles": [role] if isinstance(role, str) else list(role),
            "status": {"status_list": {"idx": index, "uri": f"{self.issuer.rstrip('/')}/status-lists/1"}},
        } | claims
        return self.sign({name: value for name, value in contents.items() if value is not None})

    def sign(self, payload: dict[str, Any], *, typ: str = TYP, **header: Any) -> str:
        """Return any claims as a token that this issuer has signed, for tests of what must be refused."""
        head = {"alg": "RS256", "typ": typ, "kid": self.key_id} | header
        signing_input = f"{_encode(head)}.{_encode(payload)}"
        signature = ALGORITHMS["RS256"].sign(signing_input.encode(), self._key)
        return f"{signing_input}.{encode_base64url(signature)}"

    def revoke(self, token: str) -> None:
        """Revoke the session of a token, or the token if it has none. Every verifier of this issuer knows at once."""
        claims = jws.parse_object(jws.take_apart(token.encode()).payload())
        if "status" not in claims:
            raise ValueError("a token without `status` cannot be revoked")
        listed = claims["status"]["status_list"]
        reference = StatusReference(listed["uri"], listed["idx"])
        self._revoked[reference] = until = claims["exp"]
        for verifier in self._verifiers:
            verifier.hear_revoked(reference, until)

    def verifier(self, **options: Any) -> Verifier:
        """Return a verifier that knows this issuer's keys and hears of what it revokes.

        Args:
            options: as `Verifier` takes them.
        """
        own: dict[str, Any] = {
            "audience": self.audience,
            "http": self.transport(),
            "now": self._now,
            "follow_revocations": False,
        }
        bound = Verifier(self.issuer, **own | options)
        for reference, until in self._revoked.items():
            bound.hear_revoked(reference, until)
        self._verifiers.add(bound)
        return bound

    def transport(self) -> httpx2.AsyncBaseTransport:
        """Return what takes the place of the network: it answers for the JWKS, and 404 for everything else."""
        return httpx2.MockTransport(self._answer)

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path.endswith("/.well-known/jwks.json"):
            return httpx2.Response(200, json={"keys": [self._jwk]}, headers={"Cache-Control": "public, max-age=300"})
        return httpx2.Response(404)


@cache
def _private_key() -> rsa.RSAPrivateKey:
    """One key for all issuers of a test run: making it takes longer than most tests."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _public_jwk(key: rsa.RSAPrivateKey) -> dict[str, str]:
    numbers = key.public_key().public_numbers()
    required = {"e": _number(numbers.e), "kty": "RSA", "n": _number(numbers.n)}
    thumbprint = sha256(json.dumps(required, separators=(",", ":"), sort_keys=True).encode()).digest()
    return required | {"use": "sig", "alg": "RS256", "kid": encode_base64url(thumbprint)}


def _encode(value: dict[str, Any]) -> str:
    return encode_base64url(json.dumps(value, separators=(",", ":")).encode())


def _number(value: int) -> str:
    return encode_base64url(value.to_bytes((value.bit_length() + 7) // 8, "big"))


with suppress(ImportError):  # the kit works without pytest, the fixture does not
    import pytest

    @pytest.fixture
    def token_issuer() -> TestIssuer:
        """An issuer in memory, new for each test."""
        return TestIssuer()
