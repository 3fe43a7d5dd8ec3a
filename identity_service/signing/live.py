"""The keyring as a running process holds it: re-read when the folder changes, kept when it cannot be read."""

import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from identity_service.database import Connection
from identity_service.errors import ConfigurationError, KeysUnavailable
from identity_service.settings import Settings
from identity_service.signing import jwks
from identity_service.signing.key_files import KeyChange, KeyFolder
from identity_service.signing.keyring import Key, KeyState, TokenLifetimes, is_due

log = logging.getLogger(__name__)

FAILED_LOOKS_PER_LINE = 30
MOST_FAILED_LOOKS = 150
"""After five minutes of looks in vain a process is not ready: it would go on signing with a key that was revoked."""


@contextmanager
def _folder_at_hand() -> Iterator[None]:
    try:
        yield
    except (ConfigurationError, OSError) as error:
        raise KeysUnavailable(detail=str(error)) from error


def key_folder(settings: Settings) -> KeyFolder:
    """Return the folder that the settings name."""
    passphrase = settings.keys_passphrase
    return KeyFolder(
        settings.keys_dir,
        TokenLifetimes(access=settings.access_lifetime, refresh=settings.refresh_lifetime),
        passphrase.get_secret_value().encode() if passphrase is not None else None,
    )


def open_keys(settings: Settings) -> "LiveKeyring":
    """Read the keyring.

    Raises:
        ConfigurationError: there is none, or it cannot be used.
    """
    return LiveKeyring(
        key_folder(settings),
        publish_window=settings.key_publish_window,
        rotation_period=settings.key_rotation_period,
    )


class LiveKeyring:
    """Holds the ring in force. `current` is replaced whole, so a reader never sees half a change.

    Args:
        rotation_period: age at which the active key is rotated without anyone asking; zero leaves that to an operator.
    """

    def __init__(self, folder: KeyFolder, *, publish_window: timedelta, rotation_period: timedelta) -> None:
        self.folder = folder
        self.publish_window = publish_window
        self.rotation_period = rotation_period
        self._version = folder.version() if not folder.is_empty() else (0, 0)
        self.current = folder.read()
        self.unrecorded: list[Callable[[Connection], Awaitable[None]]] = []
        """What writes down what was done to the keys here: the audit hears of it once the database is there."""
        self._changing = threading.Lock()
        """Without it a thread that read the folder before a change could put the old ring into force after it."""
        self._trouble = ""
        self._failed_looks = 0
        self._document: tuple[tuple[Key, ...], jwks.JwksDocument] | None = None

    @property
    def is_troubled(self) -> bool:
        """Whether the last look at the folder failed: there may be keys that are not known here."""
        return bool(self._trouble)

    @property
    def is_lost(self) -> bool:
        """Whether nothing is known of the folder for so long that what is held may have been revoked."""
        return self._failed_looks >= MOST_FAILED_LOOKS

    def jwks(self, now: datetime) -> jwks.JwksDocument:
        """Return the JWKS at `now`, rendered anew only when the published keys or their order changed."""
        published = self.current.published(now)
        if self._document is None or self._document[0] != published:
            self._document = published, jwks.document(self.current, now)
        return self._document[1]

    def rotate(self, *, now: datetime, at_once: bool) -> KeyChange:
        """Promote the standby key as `keyring.rotated` says; here the change is in force when this returns.

        Blocks on files, as `revoke` does: call it in a thread.

        Raises:
            KeysUnavailable: the folder cannot be read or written.
        """
        with self._changing, _folder_at_hand():
            change = self.folder.rotate(requested_at=now, now=now, publish_window=self.publish_window, at_once=at_once)
            self.current = change.ring
        return change

    def revoke(self, kid: str, *, now: datetime) -> KeyChange:
        """Withdraw one key as `keyring.revoked` says; nothing it signed is accepted here once this returns.

        Raises:
            KeyNotFound: there is none of this id.
            KeysUnavailable: as of `rotate`.
        """
        with self._changing, _folder_at_hand():
            change = self.folder.revoke(kid, now=now)
            self.current = change.ring
        return change

    def tend(self, now: datetime) -> Key | None:
        """Take up a changed folder, rotate a key that is due, destroy private halves that are spent.

        Return the key that this call promoted, if it did.

        Blocks on files: call it in a thread. A folder that cannot be read or written is reported, and what is held
        stays in force; tokens already issued must not fail because a disk did.
        """
        promoted = None
        with self._changing:
            try:
                self._take_up(now)
                if is_due(self.current, period=self.rotation_period, now=now):
                    # Asked again once the folder is locked: a replica may have been faster.
                    rotation = self.folder.rotate(
                        requested_at=now,
                        now=now,
                        publish_window=self.publish_window,
                        at_once=False,
                        due_after=self.rotation_period,
                    )
                    self.current, promoted = rotation.ring, rotation.key
                    if promoted is not None and promoted.signs_from is not None:
                        log.info("keyring.rotation_scheduled", extra={"signs_from": promoted.signs_from.isoformat()})
                if self.folder.destroy_spent(self.current, now=now):
                    self.current = self.folder.read(self.current)
                self._trouble, self._failed_looks = "", 0
            except (ConfigurationError, OSError) as error:
                # Said once a minute: it is tried again every few seconds.
                is_new = str(error) != self._trouble or self._failed_looks % FAILED_LOOKS_PER_LINE == 0
                self._trouble = str(error)
                self._failed_looks += 1
                log.log(logging.ERROR if is_new else logging.DEBUG, "keyring.unusable", extra={"detail": self._trouble})
        return promoted

    def _take_up(self, now: datetime) -> None:
        version = self.folder.version()
        if version == self._version:
            return
        before, self.current = self.current, self.folder.read(self.current)
        if self.current.keys != before.keys:
            log.info("keyring.changed", extra={"kids": [key.kid for key in self.current.published(now)]})
        if any(status.state is KeyState.ACTIVE for status in self.current.statuses(now)):
            try:
                self.current.signer(now)
            except KeysUnavailable as error:
                # Files that are restored one by one, say. In force is what the ring withdraws; it is looked at again.
                raise ConfigurationError(f"No key in {self.folder.path} can sign: {error.detail}.") from None
        self._version = version
