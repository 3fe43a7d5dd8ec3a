"""Cursors: where the next page of a list begins, in words that nobody but us can write.

A cursor is only good for the list and the search that handed it out, for the same user, and for a day.
"""

from datetime import datetime, timedelta
from uuid import UUID

from identity_service.errors import CursorRejected, TokenRejected
from identity_service.signing.keyring import Key, Keyring
from identity_service.tokens import jws

TYP = "cursor+jwt"
LIFETIME = timedelta(days=1)


def mint(key: Key, position: str, *, listed: str, issuer: str, user_id: UUID, now: datetime) -> str:
    """Return a cursor.

    Args:
        position: of the last item of this page, in the words of the list.
        listed: which list this is, with everything that was searched for.
    """
    claims = {
        "iss": issuer,
        "sub": str(user_id),
        "list": listed,
        "position": position,
        "iat": int(now.timestamp()),
        "exp": int((now + LIFETIME).timestamp()),
    }
    return jws.sign(key, TYP, claims)


def read(unverified_cursor: str, keyring: Keyring, *, listed: str, issuer: str, user_id: UUID, now: datetime) -> str:
    """Return the position in a cursor.

    Raises:
        CursorRejected: not one of ours, of another list, search or user, or too old.
    """
    try:
        claims = jws.verify(unverified_cursor, TYP, keyring, now=now)
        jws.lifetime_of(claims, now=now)
    except TokenRejected as error:
        raise CursorRejected(detail=error.detail) from None
    expected = {"iss": issuer, "sub": str(user_id), "list": listed}
    position = claims.get("position")
    if not isinstance(position, str) or any(claims.get(name) != value for name, value in expected.items()):
        raise CursorRejected(detail="of another list, search or user")
    return position
