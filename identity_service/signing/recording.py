"""Writing down in the audit what was done to the keys. Doing it is next door in `key_files`.

The files cannot be part of a transaction: whoever changes them says here what came of it.
"""

from datetime import datetime

from identity_service import audit
from identity_service.audit import Actor, Event, Subject
from identity_service.database import Connection
from identity_service.signing.keyring import Key


async def record_rotation(db: Connection, promoted: Key, *, by: Actor, now: datetime) -> None:
    """Record which key was promoted, and from when on it signs."""
    assert promoted.signs_from is not None, "a promoted key has its turn"
    details = {"signs_from": promoted.signs_from.isoformat()}
    await audit.record(db, Event.KEY_ROTATED, Subject("key", promoted.kid), by=by, now=now, details=details)


async def record_revocation(db: Connection, revoked: Key, *, by: Actor, now: datetime) -> None:
    await audit.record(db, Event.KEY_REVOKED, Subject("key", revoked.kid), by=by, now=now)
