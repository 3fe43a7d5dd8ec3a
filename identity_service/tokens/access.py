"""Access tokens (RFC 9068): how they are minted, and our own reading of them, with the verifier's eyes."""

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from uuid import UUID

from identity_service.errors import TokenRejected
from identity_service.signing.keyring import Key, Keyring
from identity_service.tokens import jws
from identity_service.verifier.claims import ClaimsReader, StatusReference

TYP = "at+jwt"


@dataclass(frozen=True, slots=True)
class AccessClaims:
    """The checked claims of a user's access token."""

    issuer: str
    subject: UUID
    audience: tuple[str, ...]
    client_id: str
    session_id: UUID
    token_id: str
    issued_at: datetime
    expires_at: datetime
    authenticated_at: datetime
    amr: tuple[str, ...]
    scope: tuple[str, ...]
    roles: tuple[str, ...]


def mint(key: Key, claims: AccessClaims, status: StatusReference) -> str:
    """Return the claims as a signed token. Times are written as whole seconds."""
    return jws.sign(
        key,
        TYP,
        {
            "iss": claims.issuer,
            "sub": str(claims.subject),
            "aud": list(claims.audience),
            "client_id": claims.client_id,
            "jti": claims.token_id,
            "iat": int(claims.issued_at.timestamp()),
            "exp": int(claims.expires_at.timestamp()),
            "sid": str(claims.session_id),
            "auth_time": int(claims.authenticated_at.timestamp()),
            "amr": list(claims.amr),
            "scope": " ".join(claims.scope),
            "roles": list(claims.roles),
            "status": {"status_list": {"idx": status.idx, "uri": status.uri}},
        },
    )


def read(unverified_token: str, keyring: Keyring, *, issuer: str, now: datetime) -> AccessClaims:
    """Return the claims of an access token whose audience has the issuer itself.

    Raises:
        TokenRejected: the token is not one of those, or its time is over.
    """
    payload = jws.open_envelope(unverified_token, TYP, keyring, now=now)
    with jws.own_words():
        claims = _reader(issuer).read(payload, now=now.timestamp())
    if claims.expires_at <= now:  # the leeway is for clocks that differ, and the clock that wrote this is ours
        raise TokenRejected("expired")
    members = claims.raw  # read again where we write less than a verifier takes
    return AccessClaims(
        issuer=issuer,
        subject=read_uuid(claims.subject, "sub"),
        audience=claims.audience,
        client_id=jws.text(members, "client_id"),
        session_id=read_uuid(jws.text(members, "sid"), "sid"),
        token_id=jws.text(members, "jti"),
        issued_at=claims.issued_at,
        expires_at=claims.expires_at,
        authenticated_at=jws.moment(members, "auth_time"),
        amr=jws.texts(members, "amr"),
        scope=claims.scopes,
        roles=jws.texts(members, "roles"),
    )


@lru_cache(maxsize=4)
def _reader(issuer: str) -> ClaimsReader:
    return ClaimsReader(issuer, frozenset((issuer,)), leeway=jws.LEEWAY.total_seconds())


def read_uuid(value: str, claim: str) -> UUID:
    try:
        return UUID(value)
    except ValueError:
        raise TokenRejected("missing_claim", claim) from None
