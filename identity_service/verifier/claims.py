"""What an access token says (RFC 9068), and what it must say to be accepted here.

The signature has been checked before anything in this module looks at a token; whether the token has been revoked is
asked in `revocations` afterwards.
"""

import marshal
import re
from collections.abc import Hashable
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

from identity_service.verifier import jws
from identity_service.verifier.rejection import TokenRejected

MAXIMUM_LIFETIME = 86_400
_YEAR_10000 = 253_402_300_800
_SHARED_VALUES = 4096
_PATH = re.compile(r"(?:/(?!\.\.?(?:/|$))[A-Za-z0-9._~-]+)+", re.ASCII)
_Value = TypeVar("_Value", bound=Hashable)


class StatusReference(NamedTuple):
    """Where a token's status is published: an index into a Token Status List."""

    uri: str
    idx: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """The claims of a token that has been verified. Immutable, so that one object can serve many requests.

    Attributes:
        subject: the user's id, or the client's for client credentials.
        session_id: the login that the token belongs to; None for client credentials.
        scopes: in the order in which they were granted.
        issued, expires: seconds since 1970; `issued_at` and `expires_at` are the same as aware datetimes.
        status: where a revocation would show, when the issuer publishes that.
    """

    issuer: str
    subject: str
    client_id: str
    session_id: str | None = None
    scopes: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    audience: tuple[str, ...]
    token_id: str
    issued: int
    expires: int
    status: StatusReference | None = None
    # Everything the fields do not say. Bytes of our own making: a dict would cost a kilobyte and could be changed.
    _more: bytes = field(default=marshal.dumps({}), repr=False)

    @property
    def issued_at(self) -> datetime:
        return datetime.fromtimestamp(self.issued, UTC)

    @property
    def expires_at(self) -> datetime:
        return datetime.fromtimestamp(self.expires, UTC)

    @property
    def raw(self) -> dict[str, Any]:
        """All claims as the token has them, in a dict made for this call."""
        claims: dict[str, Any] = {
            "iss": self.issuer,
            "sub": self.subject,
            "aud": list(self.audience),
            "client_id": self.client_id,
            "jti": self.token_id,
            "iat": self.issued,
            "exp": self.expires,
            "scope": " ".join(self.scopes),
        }
        if self.session_id is not None:
            claims["sid"] = self.session_id
        if self.roles:
            claims["roles"] = list(self.roles)
        if self.status is not None:
            claims["status"] = {"status_list": {"idx": self.status.idx, "uri": self.status.uri}}
        more: dict[str, Any] = marshal.loads(self._more)  # noqa: S302 - written by `ClaimsReader`, never received
        return claims | more


_new = object.__new__
(
    _set_issuer,
    _set_subject,
    _set_client_id,
    _set_session_id,
    _set_scopes,
    _set_roles,
    _set_audience,
    _set_token_id,
    _set_issued,
    _set_expires,
    _set_status,
    _set_more,
) = (vars(Claims)[each.name].__set__ for each in fields(Claims))


class ClaimsReader:
    """Reads the payload of a token whose signature holds.

    Args:
        issuer: the exact `iss`.
        audience: the names of which `aud` has to have one.
        leeway: seconds by which clocks may differ.
        maximum_lifetime: seconds between `iat` and `exp` beyond which a token is not one of ours.
    """

    def __init__(
        self, issuer: str, audience: frozenset[str], *, leeway: float, maximum_lifetime: float = MAXIMUM_LIFETIME
    ) -> None:
        self._issuer = issuer
        self._audience = audience
        self._leeway = leeway
        self._maximum_lifetime = maximum_lifetime
        self._base = issuer.rstrip("/")
        # A few audiences, scopes and roles are repeated by all tokens; holding each once halves the cache.
        self._shared: dict[Any, Any] = {}
        self._shared_scopes: dict[str, tuple[str, ...]] = {}
        self._lists: dict[str, str] = {}

    def read(self, payload: bytes, *, now: float) -> Claims:
        """Return the claims.

        A claim that is there with the wrong type counts as missing.

        Raises:
            TokenRejected: with reason malformed, wrong_issuer, wrong_audience, expired, not_yet_valid or missing_claim.
        """
        members = jws.parse_object(payload)
        take = members.pop
        if "iss" not in members or "aud" not in members:
            raise TokenRejected("missing_claim", "iss and aud")
        if take("iss") != self._issuer:
            raise TokenRejected("wrong_issuer")
        audience = _texts(take("aud"))
        if audience is None or self._audience.isdisjoint(audience):
            raise TokenRejected("wrong_audience")
        issued, expires = self._times(members, now)
        subject, client_id, token_id = take("sub", None), take("client_id", None), take("jti", None)
        if not (isinstance(subject, str) and isinstance(client_id, str) and isinstance(token_id, str)):
            raise TokenRejected("missing_claim", "sub, client_id and jti")
        session_id = None
        if "sid" in members and (not isinstance(session_id := take("sid"), str) or not session_id):
            raise TokenRejected("missing_claim", "sid")
        if not (subject and client_id and token_id):
            raise TokenRejected("missing_claim", "sub, client_id or jti is empty")
        scopes = self._scopes(members)
        roles = self._roles(members) if "roles" in members else ()
        status = self._status(members) if "status" in members else None
        # The constructor of a frozen dataclass takes three times as long as this, a tenth of checking the signature.
        claims = _new(Claims)
        _set_issuer(claims, self._issuer)
        _set_subject(claims, subject)
        _set_client_id(claims, self._share(client_id))
        _set_session_id(claims, session_id)
        _set_scopes(claims, scopes)
        _set_roles(claims, roles)
        _set_audience(claims, self._share(audience))
        _set_token_id(claims, token_id)
        _set_issued(claims, issued)
        _set_expires(claims, expires)
        _set_status(claims, status)
        _set_more(claims, _freeze(members))
        return claims

    def _times(self, members: dict[str, Any], now: float) -> tuple[int, int]:
        issued, expires = members.pop("iat", None), members.pop("exp", None)
        not_before = members.get("nbf", issued)
        # `type`, not `isinstance`: a bool is an int, and not a time.
        if not (type(issued) is type(expires) is type(not_before) is int and issued >= 0 and expires < _YEAR_10000):
            raise TokenRejected("missing_claim", "iat, exp or nbf is not whole seconds")
        if not issued < expires <= issued + self._maximum_lifetime:
            raise TokenRejected("malformed", "lifetime")
        if now >= expires + self._leeway:
            raise TokenRejected("expired")
        if issued > now + self._leeway or not_before > now + self._leeway:
            raise TokenRejected("not_yet_valid")
        return issued, expires

    def _scopes(self, members: dict[str, Any]) -> tuple[str, ...]:
        scope = members.get("scope")
        if not isinstance(scope, str):
            raise TokenRejected("missing_claim", "scope")
        scopes = self._shared_scopes.get(scope)
        if scopes is None:
            if len(self._shared_scopes) >= _SHARED_VALUES:
                self._shared_scopes.clear()
            scopes = self._shared_scopes[scope] = tuple(scope.split())
        if " ".join(scopes) == scope:
            del members["scope"]
        return scopes

    def _roles(self, members: dict[str, Any]) -> tuple[str, ...]:
        roles = _texts(members["roles"])
        if roles is None:
            raise TokenRejected("missing_claim", "roles")
        if roles:
            del members["roles"]
        return self._share(roles)

    def _status(self, members: dict[str, Any]) -> StatusReference:
        """Read a reference to a status list of the issuer's own: nobody else says what has been revoked."""
        status = members["status"]
        reference = status.get("status_list") if isinstance(status, dict) else None
        if not isinstance(reference, dict):
            raise TokenRejected("missing_claim", "status")
        index, uri = reference.get("idx"), reference.get("uri")
        if type(index) is not int or not 0 <= index < 1 << 32:
            raise TokenRejected("missing_claim", "status.status_list.idx")
        if not isinstance(uri, str) or not self.is_list_of_the_issuer(uri):
            raise TokenRejected("missing_claim", "status.status_list.uri")
        if len(status) == 1 and len(reference) == 2:
            del members["status"]
        return StatusReference(self._lists[uri], index)

    def is_list_of_the_issuer(self, uri: str) -> bool:
        """Tell whether a status list's address lies below the issuer's, by any reading of it."""
        if uri in self._lists:
            return True
        if len(uri) > 2048 or not uri.startswith(self._base) or not _PATH.fullmatch(uri, len(self._base)):
            return False
        if len(self._lists) >= _SHARED_VALUES:
            self._lists.clear()
        self._lists[uri] = uri
        return True

    def _share(self, value: _Value) -> _Value:
        shared: _Value | None = self._shared.get(value)
        if shared is not None:
            return shared
        if len(self._shared) >= _SHARED_VALUES:
            self._shared.clear()
        self._shared[value] = value
        return value


def _freeze(members: dict[str, Any]) -> bytes:
    try:
        return marshal.dumps(members)
    except ValueError:
        raise TokenRejected("malformed", "nested too deeply") from None


def _texts(value: object) -> tuple[str, ...] | None:
    if not isinstance(value, list):
        return None
    for item in value:
        if not isinstance(item, str):
            return None
    return tuple(value)
