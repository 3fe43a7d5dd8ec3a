"""The keys folder: `keyring.json` lists the keys with their public halves, `<kid>.pem` holds a private half.

Every change happens under a lock and is decided by one rename of `keyring.json`: before it the old ring is in force,
after it the new one. The new ring is written beside the old one first, then new private halves; spent ones are
destroyed after the rename. So a crash at any step leaves a folder that can be read, and private halves without any ring
are those of a ring that was lost.
"""

import errno
import fcntl
import json
import logging
import os
import re
import stat
import time
from base64 import urlsafe_b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import (
    RSAPrivateKey,
    RSAPublicKey,
    RSAPublicNumbers,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from identity_service.errors import ConfigurationError
from identity_service.signing import keyring as rules
from identity_service.signing.jwks import base64url_uint, thumbprint
from identity_service.signing.keyring import Key, Keyring, TokenLifetimes

log = logging.getLogger(__name__)

KEY_BITS = 2048
RING = "keyring.json"
_UNFINISHED = ".new"
_KID = r"[A-Za-z0-9_-]{43}"
_LEFTOVER = re.compile(rf"{_KID}\.pem|\.({_KID}\.pem|keyring\.json)\.new", re.ASCII)
_OURS = re.compile(rf"{_LEFTOVER.pattern}|keyring\.json|\.lock|\.gitignore|README\.md", re.ASCII)
VERSION = 1
LOCK_SECONDS = 5.0
"""How long somebody else may hold the folder's lock: what is done under it takes milliseconds."""


@dataclass(frozen=True, slots=True)
class KeyChange:
    """What came of a rotation or a revocation: the ring now in force, and the key that this very call promoted or
    revoked, None when there was nothing to do.
    """

    ring: Keyring
    key: Key | None


@dataclass(frozen=True, slots=True)
class KeyFolder:
    """Where an installation's keys are and how they are read.

    Args:
        passphrase: encrypts private halves at rest (PKCS#8, AES-256); None leaves that to the file system.
        lifetimes: of the tokens that the keys sign.
    """

    path: Path
    lifetimes: TokenLifetimes
    passphrase: bytes | None = None

    def is_empty(self) -> bool:
        """Whether there is no keyring yet.

        Raises:
            ConfigurationError: the folder cannot be looked into.
        """
        try:
            return not (self.path / RING).exists()
        except OSError as error:
            raise ConfigurationError(f"{self.path} cannot be read: {error.strerror}.") from None

    def is_unused(self) -> bool:
        """Whether there is neither a keyring nor a private half, so that `create` makes the first keys."""
        return not (self.path / RING).exists() and not self._private_halves()

    def version(self) -> tuple[int, int]:
        """Return a value that changes whenever the keyring does; raises OSError when it cannot be seen."""
        seen = (self.path / RING).stat()
        return seen.st_ino, seen.st_mtime_ns

    def read(self, previous: Keyring | None = None) -> Keyring:
        """Return the ring that is in force.

        Args:
            previous: a ring read earlier, whose private halves need not be parsed again.

        Raises:
            ConfigurationError: the folder, the ring or a private half cannot be used; the text says why and what to do.
        """
        self._refuse_folder_open_to_others()
        while True:
            seen = self._seen()
            try:
                ring = self._read(previous)
            except ConfigurationError:
                if seen == self._seen():
                    raise
            else:
                if seen == self._seen():
                    return ring
            # Another process has just changed it, and a private half may be gone that the list still names.

    def _seen(self) -> tuple[int, int] | None:
        try:
            return self.version()
        except OSError:
            return None

    def _read(self, previous: Keyring | None) -> Keyring:
        try:
            ring = self.path / RING
            if stat.S_IMODE(ring.stat().st_mode) & 0o022:
                raise ConfigurationError(f"{ring} can be written by others; run: chmod 600 {ring}")
            listed = json.loads(ring.read_text(encoding="utf-8"))
            if listed["version"] != VERSION:
                raise ConfigurationError(f"{self.path / RING} was written by a newer version of this service; upgrade.")
            keys = tuple(self._key(entry, previous) for entry in listed["keys"])
        except FileNotFoundError:
            raise ConfigurationError(f"{self.path} holds no keyring; mount the folder that does.") from None
        except OSError as error:
            raise ConfigurationError(f"{self.path / RING} cannot be read: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(
                f"{self.path / RING} is damaged ({type(error).__name__}); restore it from a backup."
            ) from None
        return Keyring(keys, self.lifetimes)

    def create(self, *, now: datetime) -> Keyring:
        """Make the first two keys of an installation, unless another process has just done so."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            strangers = sorted(path.name for path in self.path.iterdir() if not _OURS.fullmatch(path.name))
            if self.is_empty() and strangers:
                raise ConfigurationError(
                    f"{self.path} holds other files ({strangers[0]}); name a folder of its own with IDENTITY_KEYS_DIR."
                )
            if self.is_empty():
                self.path.chmod(0o700)
        except OSError as error:
            raise ConfigurationError(
                f"{self.path} cannot be made a private folder ({error.strerror}); "
                "it must belong to the user who runs the service."
            ) from None
        with self._locked():
            if self.is_empty():
                self._refuse_orphans()
                self._write(rules.first_keys(lambda: fresh_key(now), self.lifetimes), now)
            return self.read()

    def rotate(
        self,
        *,
        requested_at: datetime,
        now: datetime,
        publish_window: timedelta,
        at_once: bool,
        due_after: timedelta | None = None,
    ) -> KeyChange:
        """Promote the standby key as `keyring.rotated` says.

        Args:
            due_after: only if the active key has signed for so long, as `keyring.is_due` says.
        """

        def change(ring: Keyring) -> Keyring:
            if due_after is not None and not rules.is_due(ring, period=due_after, now=now):
                return ring
            return rules.rotated(
                ring,
                lambda: fresh_key(now),
                requested_at=requested_at,
                now=now,
                publish_window=publish_window,
                at_once=at_once,
            )

        before, after = self._change(change, now)
        turns = {key.kid: key.signs_from for key in before.keys}
        return KeyChange(after, next((key for key in after.keys if key.signs_from != turns.get(key.kid)), None))

    def revoke(self, kid: str, *, now: datetime) -> KeyChange:
        """Withdraw one key as `keyring.revoked` says.

        Raises:
            KeyNotFound: there is none of this id.
        """
        before, after = self._change(lambda ring: rules.revoked(ring, kid, lambda: fresh_key(now), now=now), now)
        return KeyChange(after, after.find(kid) if after != before else None)

    def destroy_spent(self, ring: Keyring, *, now: datetime) -> bool:
        """Delete the private halves of keys that no longer sign; return whether there was one."""
        spent = [path for key in ring.stopped_signing(now) if (path := self._private_path(key.kid)).exists()]
        for path in spent:
            _destroy(path)
        return bool(spent)

    def _change(self, change: Callable[[Keyring], Keyring], now: datetime) -> tuple[Keyring, Keyring]:
        """Return the ring before and after."""
        with self._locked():
            ring = self.read()
            changed = change(ring)
            if changed is not ring:
                self._write(changed, now)
                return ring, self.read()
            return ring, ring

    def _write(self, ring: Keyring, now: datetime) -> None:
        listed = {"version": VERSION, "keys": [_entry(key) for key in ring.keys]}
        with _written(self.path / RING, json.dumps(listed, indent=1).encode()):
            for key in ring.keys:
                if key.private is not None and not self._private_path(key.kid).exists():
                    pem = key.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, self._encryption())
                    with _written(self._private_path(key.kid), pem):
                        pass
        try:
            self.destroy_spent(ring, now=now)
            # Left by a crash: private halves that no ring names, and files whose writing never ended.
            for path in self.path.iterdir():
                if _LEFTOVER.fullmatch(path.name) and ring.find(path.stem) is None:
                    _destroy(path)
        except OSError as error:
            # The change is in force and has to be recorded. A running service tries to destroy them every few seconds.
            log.error("keyring.not_destroyed: %s: %s", error.filename or self.path, error.strerror)  # noqa: TRY400

    def _key(self, entry: dict[str, Any], previous: Keyring | None) -> Key:
        numbers = RSAPublicNumbers(e=_uint(entry["e"]), n=_uint(entry["n"]))
        public = numbers.public_key()
        kid = entry["kid"]
        if kid != thumbprint(public) or public.key_size < KEY_BITS:
            raise ValueError(kid)
        return Key(
            kid=kid,
            created_at=_time(entry["created_at"]),
            signs_from=entry["signs_from"] and _time(entry["signs_from"]),
            revoked_at=entry["revoked_at"] and _time(entry["revoked_at"]),
            public=public,
            private=self._private(kid, public, previous),
        )

    def _private(self, kid: str, public: RSAPublicKey, previous: Keyring | None) -> RSAPrivateKey | None:
        path = self._private_path(kid)
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            return None
        if stat.S_IMODE(mode) & 0o077:
            raise ConfigurationError(f"{path} can be read by others; run: chmod 600 {path}")
        known = previous.find(kid) if previous is not None else None
        if known is not None and known.private is not None:
            return known.private
        try:
            private = self._parse(path)
        except FileNotFoundError:  # destroyed a moment ago
            return None
        if private.public_key().public_numbers() != public.public_numbers():
            raise ConfigurationError(f"{path} does not hold the key that {RING} lists under its name; restore it.")
        return private

    def _parse(self, path: Path) -> RSAPrivateKey:
        pem = path.read_bytes()
        encrypted = b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in pem
        if encrypted and self.passphrase is None:
            raise ConfigurationError(
                f"{path} is encrypted; set IDENTITY_KEYS_PASSPHRASE or IDENTITY_KEYS_PASSPHRASE_FILE."
            )
        try:
            # We wrote the file and compare its public half with the ring: the primality checks would only cost a start
            # 31 ms for each key.
            private = load_pem_private_key(
                pem, self.passphrase if encrypted else None, unsafe_skip_rsa_key_validation=True
            )
        except (ValueError, TypeError, UnsupportedAlgorithm):
            fix = (
                "is IDENTITY_KEYS_PASSPHRASE the one it was written with?" if encrypted else "restore it from a backup."
            )
            raise ConfigurationError(f"{path} cannot be parsed; {fix}") from None
        if not isinstance(private, RSAPrivateKey):
            raise ConfigurationError(f"{path} is not an RSA key.")
        return private

    def _private_halves(self) -> list[Path]:
        return [path for path in self.path.glob("*.pem") if _LEFTOVER.fullmatch(path.name)]

    def _private_path(self, kid: str) -> Path:
        return self.path / f"{kid}.pem"

    def _encryption(self) -> KeySerializationEncryption:
        return NoEncryption() if self.passphrase is None else BestAvailableEncryption(self.passphrase)

    def _refuse_orphans(self) -> None:
        """Refuse to begin anew where private halves are left of a ring that is gone: beginning would destroy them."""
        if self._private_halves() and not _unfinished(self.path / RING).exists():
            raise ConfigurationError(
                f"{self.path} holds private keys but no {RING}; restore it from a backup, "
                "or move them away to begin anew."
            )

    def _refuse_folder_open_to_others(self) -> None:
        try:
            mode = self.path.stat().st_mode
        except FileNotFoundError:
            return
        except OSError as error:
            raise ConfigurationError(f"{self.path} cannot be read: {error.strerror}.") from None
        if stat.S_IMODE(mode) & 0o077:
            raise ConfigurationError(f"{self.path} is open to others; run: chmod 700 {self.path}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of all who change the folder, and say in our words what the file system refuses meanwhile."""
        try:
            lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                _wait_for(lock)
                yield
            finally:
                os.close(lock)
        except OSError as error:
            raise ConfigurationError(f"{self.path} cannot be written: {error.strerror}.") from None


def _wait_for(lock: int) -> None:
    """Take a lock, and refuse to wait for ever for whoever has it.

    Raises:
        TimeoutError: somebody else had it for LOCK_SECONDS.
    """
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise TimeoutError(errno.ETIMEDOUT, "another process holds .lock") from None
            time.sleep(0.02)
        else:
            return


def fresh_key(now: datetime) -> Key:
    """Make a key that waits to sign."""
    private = generate_private_key(public_exponent=65537, key_size=KEY_BITS)
    public = private.public_key()
    return Key(thumbprint(public), created_at=now, signs_from=None, revoked_at=None, public=public, private=private)


def _entry(key: Key) -> dict[str, Any]:
    numbers = key.public.public_numbers()
    return {
        "kid": key.kid,
        "created_at": key.created_at.isoformat(),
        "signs_from": key.signs_from and key.signs_from.isoformat(),
        "revoked_at": key.revoked_at and key.revoked_at.isoformat(),
        "n": base64url_uint(numbers.n),
        "e": base64url_uint(numbers.e),
    }


def _time(value: str) -> datetime:
    parsed = datetime.fromisoformat(value)
    if parsed.tzinfo is None:
        raise ValueError(value)
    return parsed


def _uint(value: str) -> int:
    return int.from_bytes(urlsafe_b64decode(value + "=" * (-len(value) % 4)), "big")


def _unfinished(path: Path) -> Path:
    """Return where a file is while it is being written."""
    return path.with_name(f".{path.name}{_UNFINISHED}")


@contextmanager
def _written(path: Path, content: bytes) -> Iterator[None]:
    """Write a file that is complete, on disk and for its owner alone. It takes its place at the context's end."""
    temporary = _unfinished(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _destroy(path: Path) -> None:
    path.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Make renames and removals in the folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
