"""Proving who asks: by password at a login, by a live session at our own API."""

import unicodedata
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

from identity_service import throttling
from identity_service.accounts import Credentials, User, store
from identity_service.accounts.hashing import PasswordHashing, Verdict
from identity_service.accounts.passwords import normalise
from identity_service.accounts.registration import normalise_username
from identity_service.database import Connection
from identity_service.errors import InvalidCredentials, PasswordRejected, TokenRejected, UsernameRejected
from identity_service.throttling import Attempt, Networks
from identity_service.tokens.access import AccessClaims


@dataclass(frozen=True, slots=True)
class Identified:
    """Whom a username means.

    Args:
        credentials: what to check a login against; None for an unknown user.
        attempt: whose failure it is when the login fails: of an account, or of a name that nobody has.
    """

    credentials: Credentials | None
    attempt: Attempt


async def identify(
    db: Connection, unverified_username: str, address: str | None, *, exempt: Networks, now: datetime
) -> Identified:
    """Return whom somebody wants to log in as. An impossible username is an unknown one, and costs the same query.

    Args:
        address: where they ask from.
        exempt: networks whose addresses are not counted.

    Raises:
        Throttled: not yet; nothing was spent on it.
    """
    possible = True
    try:
        username = normalise_username(unverified_username)
    except UsernameRejected:
        # Opens no account. But whoever tries an account with spaces around its name has tried that account.
        username, possible = _bare(unverified_username), False
    attempt = throttling.password_attempt(None, username, address, exempt=exempt)
    found, tallies = await store.find_credentials(db, username, attempt)
    if found is not None:
        attempt = attempt.at_account(found.user.id)
    throttling.refuse_blocked(attempt, tallies, now=now)
    return Identified(found if possible else None, attempt)


def _bare(impossible_username: str) -> str:
    """Return what is left of a name without spaces, controls and joiners, in one width and case."""
    folded = unicodedata.normalize("NFKC", impossible_username).casefold()
    return "".join(character for character in folded if character.isprintable() and character != " ")


async def prove(
    credentials: Credentials | None,
    unverified_password: str,
    hashing: PasswordHashing,
    *,
    count: Callable[[InvalidCredentials], Awaitable[None]],
) -> Verdict:
    """Return the verdict on a password that matched. What it opens is opened within `hashing.holding_back`.

    Unknown user, wrong password and disabled account cost one hash each, take one time and raise one error.

    Args:
        count: is told of a refusal before it is held back, and may raise another error in its place.

    Raises:
        InvalidCredentials: do not say why; the detail, for the audit, is a stable word.
        HashingOverloaded: too many logins at once.
    """
    try:
        password = normalise(unverified_password)
    except PasswordRejected as error:
        impossible = InvalidCredentials(detail=error.reason)
        await count(impossible)
        raise impossible from None
    password_hash = credentials.password_hash if credentials is not None else None
    verdict = await hashing.verify(password_hash, password, as_sent=unverified_password)
    if reason := _refusal(credentials, verdict):
        async with hashing.holding_back(verdict):
            refusal = InvalidCredentials(detail=reason)
            await count(refusal)
            raise refusal
    return verdict


def _refusal(credentials: Credentials | None, verdict: Verdict) -> str | None:
    if credentials is None:
        return "unknown_user"
    if not verdict.matched:
        return "wrong_password"
    return "disabled" if credentials.user.disabled_at is not None else None


async def find_caller(db: Connection, claims: AccessClaims) -> User:
    """Return the user behind an access token, if the token's session still lives at this very moment.

    Raises:
        TokenRejected: revoked.
    """
    user = await store.find_caller(db, claims)
    if user is None:
        raise TokenRejected("revoked")
    return user
