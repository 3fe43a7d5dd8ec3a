"""An issuer without a service: its own code, with a key of its own. The service as a process is in `deployment`."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
from cryptography.hazmat.primitives.asymmetric import rsa

from identity_service.revocation import LIST_SIZE, position
from identity_service.shell import token_id, utc_now, uuid7
from identity_service.signing import jwks
from identity_service.signing.keyring import Key, Keyring, TokenLifetimes
from identity_service.tokens import access, jws
from identity_service.verifier import Verifier, status_list
from identity_service.verifier.claims import StatusReference

ISSUER = "https://id.example.com"
AUDIENCE = "api"
_LIST = f"{ISSUER}/status-lists/0"


class Issuer:
    """Signs access tokens as the service does for its users, and answers for the JWKS and the first status list."""

    def __init__(self) -> None:
        private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        public = private.public_key()
        created = datetime.now(UTC) - timedelta(days=1)
        self.key = Key(jwks.thumbprint(public), created, created, None, public, private)
        ring = Keyring((self.key,), TokenLifetimes(timedelta(minutes=10), timedelta(days=14)))
        self.jwks = jwks.document(ring, utc_now()).body
        self.keys_fetched = 0
        self._list = self._sign_list()
        self._sessions = 0

    def tokens(self, count: int) -> list[str]:
        """Return tokens of as many sessions, with the claims and the lengths of `grants`."""
        return [self._token() for _ in range(count)]

    def _token(self) -> str:
        now = utc_now()
        place = position(self._sessions)
        self._sessions += 1
        claims = access.AccessClaims(
            issuer=ISSUER,
            subject=uuid7(now),
            audience=(AUDIENCE, ISSUER),
            client_id="first-party",
            session_id=uuid7(now),
            token_id=token_id(),
            issued_at=now,
            expires_at=now + timedelta(minutes=10),
            authenticated_at=now,
            amr=("pwd",),
            scope=("orders:read", "orders:write"),
            roles=("customer",),
        )
        return access.mint(self.key, claims, StatusReference(_LIST, place.index))

    def _sign_list(self) -> str:
        now = int(time.time())
        packed = {"bits": 1, "lst": status_list.build((), LIST_SIZE)}
        claims = {"iss": ISSUER, "sub": _LIST, "iat": now, "exp": now + 86_400, "ttl": 300}
        return jws.sign(self.key, status_list.TYP, claims | {"status_list": packed})

    def verifier(self, **options: Any) -> Verifier:
        """Return a verifier that has this issuer in place of the network."""
        return Verifier(ISSUER, audience=AUDIENCE, http=httpx2.MockTransport(self._answer), **options)

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/.well-known/jwks.json":
            self.keys_fetched += 1
            return httpx2.Response(200, content=self.jwks, headers={"Cache-Control": "public, max-age=300"})
        if str(request.url) == _LIST:
            return httpx2.Response(200, content=self._list)
        return httpx2.Response(404)
