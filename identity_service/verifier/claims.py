"""What an access token says (RFC 9068), and what it must say to be accepted here.

The signature has been checked before anything in this module looks at a token; whether the token has been revoked is
asked in `revocations` afterwards.
"""

import marshal
import re
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

from identity_service.verifier import jws
from identity_service.verifier.rejection import TokenRejected

MAXIMUM_LIFETIME = 86_400
"""Seconds between `iat` and `exp` beyond which a token is not one of ours."""
_YEAR_10000 = 253_402_300_800
SHARED_VALUES = 4096
_PATH = re.compile(r"(?:/(?!\.\.?(?:/|$))[A-Za-z0-9._~-]+)+", re.ASCII)
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class StatusReference(NamedTuple):
    """Where a token's status is published: an index into a Token Status List."""

    uri: str
    idx: int


_NOTHING = marshal.dumps({})


class _Unread:
    """What the fields of `Claims` do not say. Not a field itself: a route that returns claims shows none of it."""

    __slots__ = ("_key_id", "_more")
    # Bytes of our own making: a dict would cost a kilobyte and could be changed.
    _more: bytes
    _key_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims(_Unread):
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
        packed = getattr(self, "_more", _NOTHING)
        more: dict[str, Any] = marshal.loads(packed)  # noqa: S302 - written by `ClaimsReader`, never received
        return claims | more

    @property
    def key_id(self) -> str:
        """The id of the key that signed the token; empty for claims that came without one."""
        return getattr(self, "_key_id", "")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Claims) and self.__reduce__() == other.__reduce__()

    def __hash__(self) -> int:
        return hash(self.token_id)

    def __reduce__(self) -> tuple[Any, ...]:
        values = tuple(getattr(self, each.name) for each in fields(self))
        return _copy, (values, getattr(self, "_more", _NOTHING), self.key_id)


def _copy(values: tuple[Any, ...], more: bytes, key_id: str = "") -> Claims:
    copy = Claims(**dict(zip((each.name for each in fields(Claims)), values, strict=True)))
    _set_more(copy, more)
    _set_key_id(copy, key_id)
    return copy


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
) = (vars(Claims)[each.name].__set__ for each in fields(Claims))
_set_more = vars(_Unread)["_more"].__set__
_set_key_id = vars(_Unread)["_key_id"].__set__


class Shared(dict[_Key, _Value]):
    """Values of which many tokens have the same few. Bounded, because a client may invent them."""

    __slots__ = ()

    def keep(self, key: _Key, value: _Value) -> _Value:
        if len(self) >= SHARED_VALUES:
            self.clear()
        self[key] = value
        return value


class ClaimsReader:
    """Reads the payload of a token whose signature holds.

    Args:
        issuer: the exact `iss`.
        audience: the names of which `aud` has to have one.
        leeway: seconds by which clocks may differ.
    """

    def __init__(self, issuer: str, audience: frozenset[str], *, leeway: float) -> None:
        self._issuer = issuer
        self._audience = audience
        self._leeway = leeway
        self._base = issuer.rstrip("/")
        # A few audiences, roles, scopes, clients and lists are repeated by all tokens: each is looked at and held once.
        self._arrays = Shared[tuple[str, ...], tuple[str, ...]]()
        self._scopes = Shared[str, tuple[str, ...]]()
        self._clients = Shared[str, str]()
        self._lists = Shared[str, str]()

    def read(self, payload: bytes, *, now: float, key_id: str = "") -> Claims:
        """Return the claims.

        A claim that is there with the wrong type counts as missing.

        Args:
            key_id: which key the signature is of.

        Raises:
            TokenRejected: with reason malformed, wrong_issuer, wrong_audience, expired, not_yet_valid or missing_claim.
        """
        members = jws.parse_object(payload)
        take = members.pop
        try:
            issuer, unread_audience, issued, expires = take("iss"), take("aud"), take("iat"), take("exp")
            subject, client_id, token_id, scope = take("sub"), take("client_id"), take("jti"), take("scope")
        except KeyError as missing:
            raise TokenRejected("missing_claim", missing.args[0]) from None
        if issuer != self._issuer:
            raise TokenRejected("wrong_issuer", f"iss, which is not {self._issuer}")
        audience = self._array(unread_audience)
        if audience is None or self._audience.isdisjoint(audience):
            raise TokenRejected("wrong_audience", f"aud, which does not have {' or '.join(sorted(self._audience))}")
        self._check_times(issued, expires, members.get("nbf", issued), now)
        if not (type(subject) is type(client_id) is type(token_id) is type(scope) is str):
            raise TokenRejected("missing_claim", "sub, client_id, jti or scope is not text")
        if not (subject and client_id and token_id):
            raise TokenRejected("missing_claim", "sub, client_id or jti is empty")
        session_id = None
        if "sid" in members and not (type(session_id := take("sid")) is str and session_id):
            raise TokenRejected("missing_claim", "sid")
        # The constructor of a frozen dataclass takes three times as long as this, a tenth of checking the signature.
        claims = _new(Claims)
        _set_issuer(claims, self._issuer)
        _set_subject(claims, subject)
        _set_client_id(claims, self._clients.get(client_id) or self._clients.keep(client_id, client_id))
        _set_session_id(claims, session_id)
        _set_scopes(claims, self._scopes.get(scope) or self._split(scope, members))
        _set_roles(claims, self._roles(members) if "roles" in members else ())
        _set_audience(claims, audience)
        _set_token_id(claims, token_id)
        _set_issued(claims, issued)
        _set_expires(claims, expires)
        _set_status(claims, self._status(members) if "status" in members else None)
        _set_more(claims, _freeze(members))
        _set_key_id(claims, key_id)
        return claims

    def _check_times(self, issued: Any, expires: Any, not_before: Any, now: float) -> None:
        # `type`, not `isinstance`: a bool is an int, and not a time.
        if not (type(issued) is type(expires) is type(not_before) is int and issued >= 0 and expires < _YEAR_10000):
            raise TokenRejected("missing_claim", "iat, exp or nbf is not whole seconds")
        if now >= expires + self._leeway:
            raise TokenRejected("expired")
        if issued > now + self._leeway or not_before > now + self._leeway:
            raise TokenRejected("not_yet_valid")
        if not issued < expires <= issued + MAXIMUM_LIFETIME:
            raise TokenRejected("malformed", "lifetime")

    def _array(self, value: Any) -> tuple[str, ...] | None:
        """Return an array of strings, or None if it is something else."""
        if type(value) is not list:
            return None
        array = tuple(value)
        try:
            known = self._arrays.get(array)
        except TypeError:  # it holds an array or an object
            return None
        if known is None and all(type(item) is str for item in array):
            known = self._arrays.keep(array, array)
        return known

    def _split(self, scope: str, members: dict[str, Any]) -> tuple[str, ...]:
        scopes = tuple(scope.split())
        if " ".join(scopes) == scope:
            return self._scopes.keep(scope, scopes)
        members["scope"] = scope
        return scopes

    def _roles(self, members: dict[str, Any]) -> tuple[str, ...]:
        roles = self._array(members["roles"])
        if roles is None:
            raise TokenRejected("missing_claim", "roles")
        if roles:
            del members["roles"]
        return roles

    def _status(self, members: dict[str, Any]) -> StatusReference:
        """Read a reference to a status list of the issuer's own: nobody else says what has been revoked."""
        status = members["status"]
        try:
            reference = status["status_list"]
            index, uri = reference["idx"], reference["uri"]
        except (KeyError, TypeError):
            raise TokenRejected("missing_claim", "status") from None
        if type(index) is not int or not 0 <= index < 1 << 32:
            raise TokenRejected("missing_claim", "status.status_list.idx")
        if type(uri) is not str or not (shared := self.list_of_the_issuer(uri)):
            raise TokenRejected("missing_claim", "status.status_list.uri")
        if len(status) == 1 and len(reference) == 2:
            del members["status"]
        return StatusReference(shared, index)

    def list_of_the_issuer(self, uri: str) -> str | None:
        """Return a status list's address if it lies below the issuer's by any reading of it, else None."""
        if uri in self._lists:
            return self._lists[uri]
        if len(uri) > 2048 or not uri.startswith(self._base) or not _PATH.fullmatch(uri, len(self._base)):
            return None
        return self._lists.keep(uri, uri)


def _freeze(members: dict[str, Any]) -> bytes:
    try:
        return marshal.dumps(members)
    except ValueError:
        raise TokenRejected("malformed", "nested too deeply") from None
