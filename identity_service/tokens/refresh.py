"""Refresh tokens: which session, and which generation of it. What a generation is worth is decided in `sessions`."""

import re
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from identity_service.errors import TokenRejected
from identity_service.signing.keyring import Key, Keyring
from identity_service.tokens import jws
from identity_service.tokens.access import read_id

TYP = "rt+jwt"
_GENERATION = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)


class RefreshClaims(NamedTuple):
    """The checked claims of a refresh token. Its `jti` is `<session id>.<generation>`; it has no `nbf`."""

    issuer: str
    subject: UUID
    client_id: str
    session_id: UUID
    generation: int
    issued_at: datetime
    expires_at: datetime


def mint(key: Key, claims: RefreshClaims) -> str:
    """Return the claims as a signed token; equal claims under one key give equal bytes."""
    return jws.signed(unsigned(key, claims))


def unsigned(key: Key, claims: RefreshClaims) -> jws.Unsigned:
    """Return the same before it is signed; see `rounds`."""
    return jws.unsigned(
        key,
        TYP,
        {
            "iss": claims.issuer,
            "aud": claims.issuer,
            "sub": str(claims.subject),
            "client_id": claims.client_id,
            "sid": str(claims.session_id),
            "jti": f"{claims.session_id}.{claims.generation}",
            "iat": int(claims.issued_at.timestamp()),
            "exp": int(claims.expires_at.timestamp()),
        },
    )


def read(unverified_token: str, keyring: Keyring, *, issuer: str, now: datetime) -> RefreshClaims:
    """Return the claims of one of our refresh tokens.

    Raises:
        TokenRejected: the token is not one of those, or its time is over.
    """
    claims = jws.verify(unverified_token, TYP, keyring, now=now)
    if claims.get("iss") != issuer:
        raise TokenRejected("wrong_issuer")
    if claims.get("aud") != issuer:
        raise TokenRejected("wrong_audience")
    issued_at, expires_at = jws.lifetime_of(claims, now=now)
    session_id = read_id(jws.text(claims, "sid"), "sid")
    named, _, generation = jws.text(claims, "jti").rpartition(".")
    if named != str(session_id) or not _GENERATION.fullmatch(generation):
        raise TokenRejected("missing_claim", "jti")
    return RefreshClaims(
        issuer=issuer,
        subject=read_id(jws.text(claims, "sub"), "sub"),
        client_id=jws.text(claims, "client_id"),
        session_id=session_id,
        generation=int(generation),
        issued_at=issued_at,
        expires_at=expires_at,
    )
