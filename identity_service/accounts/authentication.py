"""Proving who asks: by password at a login, by a live session at our own API."""

from identity_service.accounts import Credentials, User, store
from identity_service.accounts.hashing import PasswordHashing, Verdict
from identity_service.accounts.passwords import normalise
from identity_service.accounts.registration import normalise_username
from identity_service.database import Connection
from identity_service.errors import InvalidCredentials, PasswordRejected, TokenRejected, UsernameRejected
from identity_service.tokens.access import AccessClaims


async def find_credentials(db: Connection, unverified_username: str) -> Credentials | None:
    """Return what to check a login against. An impossible username is an unknown one, and costs the same query."""
    try:
        username = normalise_username(unverified_username)
    except UsernameRejected:
        username = ""
    return await store.find_credentials(db, username)


async def prove(credentials: Credentials | None, unverified_password: str, hashing: PasswordHashing) -> Verdict:
    """Return the verdict on a password that matched.

    Unknown user, wrong password and disabled account cost one hash each and raise one error.

    Raises:
        InvalidCredentials: do not say why; the detail, for the audit, is a stable word.
        HashingOverloaded: too many logins at once.
    """
    try:
        password = normalise(unverified_password)
    except PasswordRejected as error:
        raise InvalidCredentials(detail=error.reason) from None
    verdict = await hashing.verify(credentials.password_hash if credentials is not None else None, password)
    if credentials is None:
        raise InvalidCredentials(detail="unknown_user")
    if not verdict.matched:
        raise InvalidCredentials(detail="wrong_password")
    if credentials.user.disabled_at is not None:
        raise InvalidCredentials(detail="disabled")
    return verdict


async def find_caller(db: Connection, claims: AccessClaims) -> User:
    """Return the user behind an access token, if the token's session still lives at this very moment.

    Raises:
        TokenRejected: revoked.
    """
    user = await store.find_caller(db, claims)
    if user is None:
        raise TokenRejected("revoked")
    return user
