"""Making and changing accounts. Proving who asks is next door in `authentication`, forgotten passwords in `resets`."""

import re
import unicodedata
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from email_validator import EmailNotValidError, validate_email
from precis_i18n import get_profile

from identity_service import audit
from identity_service.accounts import User, passwords, store
from identity_service.accounts.breaches import BreachCheck
from identity_service.accounts.hashing import PasswordHashing
from identity_service.accounts.roles import keep as keep_roles
from identity_service.accounts.roles import keep_an_administrator
from identity_service.audit import Actor, Event, Subject
from identity_service.database import Connection
from identity_service.errors import CurrentPasswordWrong, EmailRejected, UsernameRejected, UserNotFound
from identity_service.ids import read_uuid
from identity_service.revocation import Reason
from identity_service.sessions import lifecycle
from identity_service.sessions import store as sessions

USERNAME_MAX_LENGTH = 254
# Joiners, and a second dot on letters that have one: nothing that anybody sees.
_INVISIBLE = re.compile("[\u200c\u200d]|[ij\u0456\u0458]\u0307")
_profile = get_profile("UsernameCaseMapped")


def normalise_username(unverified_username: str) -> str:
    """Return the one spelling of a username under which an account is kept and found (RFC 8265 3.3).

    Width and case are folded. A name that does not survive upper-casing and back (dotless i, sharp s, final sigma) is
    refused: its twin could be somebody else's.

    Raises:
        UsernameRejected: characters that a username cannot have, too long, or a UUID.
    """
    if len(unverified_username) > USERNAME_MAX_LENGTH:
        raise UsernameRejected(f"The username must have at most {USERNAME_MAX_LENGTH} characters.")
    try:
        username: str = _profile.enforce(unverified_username)
    except UnicodeError:
        raise UsernameRejected(
            "The username must consist of letters, digits and punctuation, without spaces."
        ) from None
    if len(username) > USERNAME_MAX_LENGTH:
        raise UsernameRejected(f"The username must have at most {USERNAME_MAX_LENGTH} characters.")
    if unicodedata.normalize("NFC", username.upper().lower()) != username or _INVISIBLE.search(username):
        raise UsernameRejected("The username has a letter that can be mistaken for another when its case changes.")
    if read_uuid(username) is not None:
        raise UsernameRejected("The username must not be a UUID: it could be taken for another account's id.")
    return username


def normalise_email(unverified_email: str) -> str:
    """Return the address in NFC with a lower-case ASCII domain; nothing is trimmed or guessed.

    Raises:
        EmailRejected: not an address (RFC 5322 3.4.1, without comments and quoted local parts).
    """
    if unicodedata.normalize("NFKC", unverified_email).count("@") != 1:
        raise EmailRejected
    try:
        address = validate_email(unverified_email, check_deliverability=False)
    except EmailNotValidError:
        raise EmailRejected from None
    if address.ascii_domain is None:  # pragma: no cover - a domain literal, which is refused above by default
        raise EmailRejected
    return f"{address.local_part}@{address.ascii_domain.lower()}"


async def hash_new_password(
    hashing: PasswordHashing,
    unverified_password: str,
    *,
    username: str,
    email: str | None,
    min_length: int,
    breaches: BreachCheck | None,
) -> str:
    """Return the hash of a password that someone wants to use from now on.

    Args:
        breaches: who knows passwords from breaches, if anybody is to be asked.

    Raises:
        PasswordRejected: it breaks the policy.
        HashingOverloaded: too much to hash at once.
    """
    password = passwords.normalise(unverified_password)
    passwords.check_length(password, min_length=min_length)
    context = tuple(text for text in (username, email) if text)
    await hashing.estimate(lambda: passwords.check_guessability(password, context=context))
    if breaches is not None:
        await breaches.refuse_breached(password)
    return await hashing.hash(password)


async def find(db: Connection, user_id: UUID) -> User:
    """Return an account.

    Raises:
        UserNotFound: there is none of this id.
    """
    user = await store.find_by_id(db, user_id)
    if user is None:
        raise UserNotFound
    return user


async def find_named(db: Connection, unverified_name: str) -> User:
    """Return the account of this username, however it is spelt, or of this id. No username looks like an id.

    Raises:
        UserNotFound: there is none; the detail has what was looked for.
    """
    user_id = read_uuid(unverified_name)
    try:
        if user_id is not None:
            user = await store.find_by_id(db, user_id)
        else:
            user = await store.find(db, normalise_username(unverified_name))
    except UsernameRejected:  # nobody can have it
        user = None
    if user is None:
        raise UserNotFound(detail=unverified_name)
    return user


async def search(db: Connection, prefix: str, *, role: str | None = None, after: str | None, limit: int) -> list[User]:
    """Return the users, in the order of their usernames, whose username or e-mail address begins like this.

    Args:
        prefix: empty for everybody.
        role: only those who have it.
        after: the username that the page before ended with.
    """
    # As far as the beginning of a name can be read as names are: by itself it need not be one.
    prefix = unicodedata.normalize("NFC", _profile.width_mapping_rule(prefix).lower())
    return await store.list_users(db, prefix=prefix, role=role, after=after, limit=limit)


async def register(
    db: Connection,
    user_id: UUID,
    *,
    username: str,
    password_hash: str,
    email: str | None,
    roles: Sequence[str],
    by: Actor,
    now: datetime,
) -> User:
    """Make an account. Call within a transaction.

    Args:
        username, email: normalised.
        password_hash: `formats.UNUSABLE` for an account that nobody can log in to until its password was reset.

    Raises:
        RoleNotFound: one of the roles does not exist; the detail names it.
        UsernameTaken: another account has this username.
    """
    await keep_roles(db, roles)
    user = await store.insert(
        db, user_id, username=username, password_hash=password_hash, email=email, roles=roles, now=now
    )
    details = {"username": username, "roles": list(roles)}
    await audit.record(db, Event.USER_CREATED, Subject("user", str(user_id)), by=by, now=now, details=details)
    return user


async def update(
    db: Connection,
    user_id: UUID,
    *,
    username: str | None,
    change_email: bool,
    email: str | None,
    by: Actor,
    now: datetime,
) -> User:
    """Change the username, the e-mail address, or both; a new address is not verified yet. Call within a transaction.

    What is so already changes nothing, and is not recorded.

    Args:
        username: None to keep it.
        email: None, with `change_email`, to remove it.

    Raises:
        UsernameTaken: another account has this username.
        UserNotFound: the account is gone.
    """
    await store.lock(db, user_id)  # so that what is recorded is what this did
    before = await find(db, user_id)
    change_email = change_email and email != before.email
    if username in (None, before.username) and not change_email:
        return before
    updated = await store.update(db, user_id, username=username, change_email=change_email, email=email)
    if updated is None:  # pragma: no cover - deleted since it was found a moment ago
        raise UserNotFound
    if change_email:
        await store.delete_reset(db, user_id)
    details = {"username": updated.username} if updated.username != before.username else {}
    if change_email:
        details["email"] = "changed" if email is not None else "removed"
    await audit.record(db, Event.USER_UPDATED, Subject("user", str(user_id)), by=by, now=now, details=details)
    return updated


async def change_password(
    db: Connection,
    user_id: UUID,
    *,
    password_hash: str,
    proved_at: datetime,
    keep_session: UUID,
    by: Actor,
    now: datetime,
) -> None:
    """Set another password and end all sessions but one. Call within a transaction.

    Args:
        proved_at: when the password that the caller has just proved was set; another change since then wins.

    Raises:
        CurrentPasswordWrong: the account is gone, disabled, or got another password in the meantime.
    """
    if not await store.update_password(db, user_id, password_hash=password_hash, proved_at=proved_at, now=now):
        raise CurrentPasswordWrong(detail="overtaken by another change")
    await store.delete_reset(db, user_id)
    await audit.record(db, Event.USER_PASSWORD_CHANGED, Subject("user", str(user_id)), by=by, now=now)
    await lifecycle.end_all(db, user_id, keep=keep_session, reason=Reason.PASSWORD_CHANGED, by=by, now=now)
    await sessions.keep_after_password_change(db, keep_session, password_changed_at=now)


async def disable(db: Connection, user_id: UUID, *, by: Actor, now: datetime) -> User:
    """Shut an account and end its sessions; one that is shut stays as it is. Call within a transaction.

    Raises:
        UserNotFound: the account is gone.
        LastAdministrator: nobody could administer the service any more.
    """
    async with keep_an_administrator(db):
        user = await store.disable(db, user_id, now=now)
    await store.delete_reset(db, user_id)
    if user is None:
        return await find(db, user_id)
    await audit.record(db, Event.USER_DISABLED, Subject("user", str(user.id)), by=by, now=now)
    await lifecycle.end_all(db, user.id, reason=Reason.DISABLED, by=by, now=now)
    return user


async def enable(db: Connection, user_id: UUID, *, by: Actor, now: datetime) -> User:
    """Open an account again; its old sessions stay ended. One that is open stays as it is. Call within a transaction.

    Raises:
        UserNotFound: the account is gone.
    """
    user = await store.enable(db, user_id)
    if user is None:
        return await find(db, user_id)
    await audit.record(db, Event.USER_ENABLED, Subject("user", str(user.id)), by=by, now=now)
    return user


async def delete(db: Connection, user_id: UUID, *, proved_at: datetime | None = None, by: Actor, now: datetime) -> None:
    """Delete an account with its sessions; its tokens are revoked. Call within a transaction.

    Args:
        proved_at: as of `change_password`, where the account is deleted by who proved its password.

    Raises:
        CurrentPasswordWrong: the account was disabled, or got another password in the meantime.
        UserNotFound: the account is gone already.
        LastAdministrator: nobody could administer the service any more.
    """
    # The user's row is locked first, as a login locks it. A deadlock with another end of sessions is tried again.
    async with keep_an_administrator(db):
        await store.lock(db, user_id)
        user = await find(db, user_id)
        if proved_at is not None and (user.password_changed_at != proved_at or user.disabled_at is not None):
            raise CurrentPasswordWrong(detail="overtaken by another change")
        await lifecycle.end_all(db, user_id, reason=Reason.DELETED, by=by, now=now)
        await store.delete(db, user_id)
    await audit.record(db, Event.USER_DELETED, Subject("user", str(user_id)), by=by, now=now)
