"""Access tokens (RFC 9068): the claims other services read, and our own reading of them at the account API."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from identity_service.errors import TokenRejected
from identity_service.signing.keyring import Key, Keyring
from identity_service.tokens import jws

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


@dataclass(frozen=True, slots=True)
class StatusReference:
    """Where an access token's status is found (draft-ietf-oauth-status-list 6.1)."""

    index: int
    uri: str


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
            "status": {"status_list": {"idx": status.index, "uri": status.uri}},
        },
    )


def read(unverified_token: str, keyring: Keyring, *, issuer: str, now: datetime) -> AccessClaims:
    """Return the claims of an access token whose audience has the issuer itself.

    Raises:
        TokenRejected: the token is not one of those, or its time is over.
    """
    claims = jws.verify(unverified_token, TYP, keyring, now=now)
    if claims.get("iss") != issuer:
        raise TokenRejected("wrong_issuer")
    audience = jws.texts(claims, "aud")
    if issuer not in audience:
        raise TokenRejected("wrong_audience")
    issued_at, expires_at = jws.lifetime_of(claims, now=now)
    scope = claims.get("scope")
    if not isinstance(scope, str):
        raise TokenRejected("missing_claim", "scope")
    return AccessClaims(
        issuer=issuer,
        subject=read_uuid(jws.text(claims, "sub"), "sub"),
        audience=audience,
        client_id=jws.text(claims, "client_id"),
        session_id=read_uuid(jws.text(claims, "sid"), "sid"),
        token_id=jws.text(claims, "jti"),
        issued_at=issued_at,
        expires_at=expires_at,
        authenticated_at=jws.moment(claims, "auth_time"),
        amr=jws.texts(claims, "amr"),
        scope=tuple(scope.split()),
        roles=jws.texts(claims, "roles"),
    )


def read_uuid(value: str, claim: str) -> UUID:
    try:
        return UUID(value)
    except ValueError:
        raise TokenRejected("missing_claim", claim) from None
