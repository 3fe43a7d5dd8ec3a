"""Access tokens (RFC 9068): how they are minted, and our own reading of them, with the verifier's eyes."""

from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

from identity_service.errors import TokenRejected
from identity_service.ids import read_uuid
from identity_service.signing.keyring import Key, Keyring
from identity_service.tokens import jws
from identity_service.verifier.claims import Claims, ClaimsReader, StatusReference
from identity_service.verifier.rejection import TokenRejected as VerifierRejected

TYP = "at+jwt"


class AccessClaims(NamedTuple):
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


class ClientClaims(NamedTuple):
    """The checked claims of an access token that a client got for itself. Its subject is the client."""

    issuer: str
    audience: tuple[str, ...]
    client_id: str
    token_id: str
    issued_at: datetime
    expires_at: datetime
    scope: tuple[str, ...]

    @property
    def subject(self) -> str:
        return self.client_id


def mint(key: Key, claims: AccessClaims | ClientClaims, status: StatusReference) -> str:
    """Return the claims as a signed token. Times are written as whole seconds."""
    return jws.signed(unsigned(key, claims, status))


def unsigned(key: Key, claims: AccessClaims | ClientClaims, status: StatusReference) -> jws.Unsigned:
    """Return the same before it is signed; see `rounds`."""
    return jws.unsigned(
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
            **(_of_login(claims) if isinstance(claims, AccessClaims) else {}),
            "scope": " ".join(claims.scope),
            "status": {"status_list": {"idx": status.idx, "uri": status.uri}},
        },
    )


def _of_login(claims: AccessClaims) -> dict[str, Any]:
    return {
        "sid": str(claims.session_id),
        "auth_time": int(claims.authenticated_at.timestamp()),
        "amr": list(claims.amr),
        "roles": list(claims.roles),
    }


def read(unverified_token: str, keyring: Keyring, *, issuer: str, now: datetime) -> AccessClaims:
    """Return the claims of a user's access token whose audience has the issuer itself.

    Raises:
        TokenRejected: the token is not one of those, or its time is over.
    """
    payload = jws.open_envelope(unverified_token, TYP, keyring, now=now)
    return _of_user(_read(payload, _reader(issuer), now))


def read_any(unverified_token: str, keyring: Keyring, *, issuer: str, now: datetime) -> AccessClaims | ClientClaims:
    """Return the claims of any access token of ours, whoever it is for. It lets nobody in.

    Raises:
        TokenRejected: the token is not one of ours, or its time is over.
    """
    payload = jws.open_envelope(unverified_token, TYP, keyring, now=now)
    audience = jws.texts(jws.members_of(payload), "aud")
    claims = _read(payload, ClaimsReader(issuer, frozenset(audience), leeway=jws.LEEWAY.total_seconds()), now)
    if claims.session_id is not None:
        return _of_user(claims)
    if claims.subject != claims.client_id:
        raise TokenRejected("missing_claim", "sid")
    return ClientClaims(
        issuer=claims.issuer,
        audience=claims.audience,
        client_id=jws.text(claims.raw, "client_id"),
        token_id=jws.text(claims.raw, "jti"),
        issued_at=claims.issued_at,
        expires_at=claims.expires_at,
        scope=claims.scopes,
    )


def _read(payload: bytes, reader: ClaimsReader, now: datetime) -> Claims:
    try:
        claims = reader.read(payload, now=now.timestamp())
    except VerifierRejected as error:
        raise jws.in_own_words(error) from None
    if claims.expires_at <= now:  # the leeway is for clocks that differ, and the clock that wrote this is ours
        raise TokenRejected("expired")
    return claims


def _of_user(claims: Claims) -> AccessClaims:
    members = claims.raw  # read again where we write less than a verifier takes
    return AccessClaims(
        issuer=claims.issuer,
        subject=read_id(claims.subject, "sub"),
        audience=claims.audience,
        client_id=jws.text(members, "client_id"),
        session_id=read_id(jws.text(members, "sid"), "sid"),
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


def read_id(value: str, claim: str) -> UUID:
    """Return the id that a claim holds.

    Raises:
        TokenRejected: it holds none.
    """
    found = read_uuid(value)
    if found is None:
        raise TokenRejected("missing_claim", claim)
    return found
