"""Resetting a forgotten password: an administrator starts it, whoever has the token sets the password.

The database knows the token by its digest. There is one for a user at most; another password, another e-mail address
and disabling the account make it void, wherever they come from. Changing a password that is known is next door in
`registration`.
"""

import hashlib
from datetime import datetime, timedelta
from uuid import UUID

from identity_service import audit
from identity_service.accounts import User, store
from identity_service.audit import Actor, Event, Subject
from identity_service.database import Connection, delete_expired
from identity_service.errors import ResetTokenInvalid, UserDisabled, UserNotFound
from identity_service.revocation import Reason
from identity_service.sessions import lifecycle

RESET_LIFETIME = timedelta(minutes=30)


async def start(db: Connection, user_id: UUID, token: str, *, by: Actor, now: datetime) -> datetime:
    """Let `token` set another password once, and return until when. Call within a transaction.

    The present password goes on until then. An earlier token becomes void.

    Raises:
        UserNotFound: the account is gone.
        UserDisabled: the token would open nothing.
    """
    await store.lock(db, user_id)
    user = await store.find_by_id(db, user_id)
    if user is None:
        raise UserNotFound
    if user.disabled_at is not None:
        raise UserDisabled
    expires_at = now + RESET_LIFETIME
    await store.insert_reset(db, user_id, token_digest=_digest(token), now=now, expires_at=expires_at)
    await audit.record(db, Event.USER_PASSWORD_RESET_STARTED, Subject("user", str(user_id)), by=by, now=now)
    return expires_at


async def find(db: Connection, unverified_token: str, *, now: datetime) -> User:
    """Return whose password the token may set. Nothing is spent.

    Raises:
        ResetTokenInvalid: it may not, or no longer.
    """
    user = await store.find_reset(db, _digest(unverified_token), now=now)
    if user is None:
        raise ResetTokenInvalid(detail="unknown_token")
    return user


async def finish(
    db: Connection, user_id: UUID, unverified_token: str, *, password_hash: str, by: Actor, now: datetime
) -> None:
    """Set the password and end all sessions of the user that `find` returned. Call within a transaction.

    Raises:
        ResetTokenInvalid: somebody else was faster, or the token became void in the meantime.
    """
    # The user's row is locked first, as a login locks it. A deadlock with another end of sessions is tried again.
    await store.lock(db, user_id)
    if not await store.spend_reset(db, _digest(unverified_token), password_hash=password_hash, now=now):
        raise ResetTokenInvalid(detail="overtaken")
    await audit.record(db, Event.USER_PASSWORD_RESET, Subject("user", str(user_id)), by=by, now=now)
    await lifecycle.end_all(db, user_id, reason=Reason.PASSWORD_CHANGED, by=by, now=now)


async def prune(db: Connection, *, now: datetime) -> int:
    """Delete a batch of tokens that have expired; return how many went."""
    return await delete_expired(db, "password_resets", "user_id", before=now)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
