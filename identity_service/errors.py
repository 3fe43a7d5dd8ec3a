"""What can go wrong, in the domain's own words.

No HTTP and no SQL here: `web/problems.py` and `web/oauth.py` hold the tables that say what HTTP makes of each error,
`cli` the table of exit codes. Every error carries two texts: one that a caller may read and one for the log only.
"""

from typing import ClassVar


class IdentityError(Exception):
    """Base of everything this service refuses on purpose.

    Args:
        text: what the caller is told; the class's own text when left out. Never repeats what the caller sent.
        detail: what only the log says.
    """

    default_text: ClassVar[str] = "The request was refused."

    def __init__(self, text: str = "", *, detail: str = "") -> None:
        self.text = text or self.default_text
        self.detail = detail
        super().__init__(self.text)


class ConfigurationError(IdentityError):
    """A setting, a key file or the schema keeps the service from starting; the text names the cause and the fix."""

    default_text = "The configuration is wrong."


# Accounts


class SignupClosed(IdentityError):
    default_text = "This service does not accept new registrations."


class UsernameTaken(IdentityError):
    default_text = "This username is already taken."


class UsernameRejected(IdentityError):
    default_text = "This username cannot be used."


class EmailRejected(IdentityError):
    default_text = "This is not an e-mail address that can be used."


class PasswordRejected(IdentityError):
    """A new password breaks the policy; `reason` is stable and says which part of it."""

    default_text = "This password cannot be used."

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class InvalidCredentials(IdentityError):
    """Unknown user, wrong password, disabled account: one error, so that no answer tells them apart."""

    default_text = "The username or the password is wrong."


class ResetTokenInvalid(IdentityError):
    """Unknown, used, expired or made void: one error, so that no answer tells them apart."""

    default_text = "This token cannot reset a password; ask for a new one."


class CurrentPasswordWrong(IdentityError):
    default_text = "The current password is wrong."


class UserNotFound(IdentityError):
    default_text = "There is no such user."


class UserDisabled(IdentityError):
    """Only for those who administer: at a login a disabled account is `InvalidCredentials`."""

    default_text = "This account is disabled; enable it first."


class RoleNotFound(IdentityError):
    default_text = "There is no such role."


class RoleTaken(IdentityError):
    default_text = "There already is a role of this name."


class RoleBuiltIn(IdentityError):
    default_text = "This role is built in; it cannot be created, changed or deleted."


class RoleInUse(IdentityError):
    default_text = "Users have this role."


class RoleRejected(IdentityError):
    default_text = "A role cannot have this name or give these scopes."


class LastAdministrator(IdentityError):
    default_text = "This is the last administrator who can log in; make another one first."


# Tokens, sessions and clients


class CursorRejected(IdentityError):
    """Not a cursor that this list handed to this caller for this search within the last day."""

    default_text = "The cursor is not one of this list, or too old; begin again without it."


class SessionNotFound(IdentityError):
    default_text = "There is no such session."


class TokenRejected(IdentityError):
    """A token is not one of ours, not of this kind, or no longer good; `reason` is stable."""

    default_text = "The token is invalid, expired or revoked."

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail=detail or reason)
        self.reason = reason


class SessionEnded(IdentityError):
    """The refresh token can no longer be used: expired, revoked, or its user is no longer welcome."""

    default_text = "The session has ended; log in again."


class RefreshTokenReused(SessionEnded):
    """A spent refresh token came back: either it or its successor was stolen. The session has been ended."""


class ClientRejected(IdentityError):
    """Unknown client or wrong client credentials."""

    default_text = "Client authentication failed."


class ClientNotFound(IdentityError):
    default_text = "There is no such client."


class ClientTaken(IdentityError):
    default_text = "There already is a client of this id."


class ClientBuiltIn(IdentityError):
    default_text = "This client is built in; it cannot be created, changed or deleted."


class ClientInvalid(IdentityError):
    """An administrator asks for a client that there cannot be. Not to be mixed up with `ClientRejected`."""

    default_text = "The client cannot be defined like this."


class ClientNotAllowed(IdentityError):
    """A client asks with a grant type that it was not given (`unauthorized_client` of RFC 6749 5.2)."""

    default_text = "This client may not use this grant type."


class GrantNotOffered(IdentityError):
    default_text = "This grant type is not offered."


class ScopeRejected(IdentityError):
    default_text = "The requested scope is malformed or exceeds what was granted."


class Throttled(IdentityError):
    """Too many failures for this account, client or address; nothing was looked at.

    Args:
        retry_after: seconds until the next attempt is looked at.
    """

    default_text = "There were too many failed attempts; try again later."

    def __init__(self, text: str = "", *, detail: str = "", retry_after: int) -> None:
        super().__init__(text, detail=detail)
        self.retry_after = retry_after


# What we depend on


class Unavailable(IdentityError):
    """Something the service depends on is away for the moment; the same request may succeed later.

    Args:
        retry_after: seconds after which asking again makes sense.
    """

    default_text = "The service cannot answer this at the moment; try again shortly."

    def __init__(self, text: str = "", *, detail: str = "", retry_after: int = 2) -> None:
        super().__init__(text, detail=detail)
        self.retry_after = retry_after


class DatabaseUnavailable(Unavailable):
    pass


class KeysUnavailable(Unavailable):
    pass


class ClocksDiffer(Unavailable):
    """A token that we signed is from the future: our clock is wrong, or a replica's is."""


class TooManyFollowers(Unavailable):
    """No room for another stream of revocations: in this process, or for this network address."""


class HashingOverloaded(Unavailable):
    """More passwords wait to be hashed than can be answered in time."""


class KeyNotFound(IdentityError):
    default_text = "There is no key with this id."
