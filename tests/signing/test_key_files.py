"""The keys folder: what is on disk, who may read it, and what a crash or a second process leaves (KEY-1, 3, 4, 5)."""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from identity_service.errors import ConfigurationError, KeyNotFound
from identity_service.signing.key_files import KeyFolder, fresh_key
from identity_service.signing.keyring import TokenLifetimes
from tests.conftest import START

LIFETIMES = TokenLifetimes(timedelta(minutes=10), timedelta(days=14))
WINDOW = timedelta(minutes=15)
LATER = START + timedelta(hours=1)


@pytest.fixture
def folder(keys_dir: Path) -> KeyFolder:
    return KeyFolder(keys_dir, LIFETIMES)


def rotate(folder: KeyFolder, now=LATER, *, at_once=True):
    return folder.rotate(requested_at=now, now=now, publish_window=WINDOW, at_once=at_once).ring


def pems(folder: KeyFolder) -> set[str]:
    return {path.stem for path in folder.path.glob("*.pem")}


def test_first_keys_are_an_active_and_a_standby_of_2048_bits_with_exponent_65537(tmp_path):
    folder = KeyFolder(tmp_path / "new", LIFETIMES)
    ring = folder.create(now=START)
    assert [status.state for status in ring.statuses(START)] == ["active", "standby"]
    for key in ring.keys:
        assert key.public.key_size == 2048
        assert key.public.public_numbers().e == 65537
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.path.iterdir()} == {0o600}
    assert pems(folder) == {key.kid for key in ring.keys}


def test_creating_where_keys_are_changes_nothing(folder):
    before = (folder.path / "keyring.json").read_bytes()
    folder.create(now=LATER)
    assert (folder.path / "keyring.json").read_bytes() == before


def test_two_installations_never_share_a_key(tmp_path):
    """F75: no default and no development key."""
    first = KeyFolder(tmp_path / "one", LIFETIMES).create(now=START)
    second = KeyFolder(tmp_path / "two", LIFETIMES).create(now=START)
    assert not {key.kid for key in first.keys} & {key.kid for key in second.keys}


def test_the_private_half_is_destroyed_when_its_key_stops_signing(folder):
    old = folder.read().signer(LATER).kid
    ring = rotate(folder)
    assert old not in pems(folder)
    assert pems(folder) == {key.kid for key in ring.keys if key.private is not None}
    assert ring.verification_key(old, LATER) is not None


def test_a_scheduled_hand_over_keeps_both_private_halves_until_it_happens(folder):
    now = START + timedelta(minutes=1)
    old = folder.read().signer(now).kid
    ring = rotate(folder, now, at_once=False)
    assert old in pems(folder)
    assert not folder.destroy_spent(ring, now=now)
    assert folder.destroy_spent(ring, now=START + WINDOW)
    assert old not in pems(folder)
    assert folder.read().signer(START + WINDOW).kid != old


@pytest.mark.parametrize("opened", [False, True])
def test_a_ring_that_changes_while_it_is_read_is_read_again(folder, monkeypatch, opened):
    """Or the key that signs would be listed and its private half gone: a ring that cannot sign."""
    private, changes = KeyFolder._private, ["only once"]

    def disturbed(self: KeyFolder, kid: str, *more: Any) -> Any:
        if changes:
            changes.pop()
            rotate(folder)
            if opened:  # it was there a moment ago
                raise FileNotFoundError(kid)
        return private(self, kid, *more)

    monkeypatch.setattr(KeyFolder, "_private", disturbed)
    assert folder.read().signer(LATER).kid in pems(folder)


def test_a_private_half_that_is_destroyed_while_it_is_read_is_one_that_is_gone(folder, monkeypatch):
    """Which changes nothing in the ring, so that reading it again would help nobody."""
    spent = folder.read().signer(LATER).kid
    parse, parsed = KeyFolder._parse, []

    def disturbed(self: KeyFolder, path: Path) -> Any:
        parsed.append(path.stem)
        if path.stem == spent:
            path.unlink()
        return parse(self, path)

    monkeypatch.setattr(KeyFolder, "_parse", disturbed)
    key = folder.read().find(spent)
    assert spent in parsed
    assert key is not None
    assert key.private is None


@pytest.mark.parametrize("change", ["rotate", "revoke"])
def test_a_standby_key_without_its_private_half_is_never_promoted(folder, change):
    """A file that was lost, or not restored: promoted, it would leave nothing that signs."""
    active, standby = (status.key.kid for status in folder.read().statuses(START))
    (folder.path / f"{standby}.pem").unlink()
    ring = rotate(folder) if change == "rotate" else folder.revoke(active, now=LATER).ring
    assert ring.find(standby) is None
    assert ring.signer(LATER).kid in pems(folder)
    assert len(ring.published(LATER)) == (3 if change == "rotate" else 2)


def test_a_scheduled_key_without_its_private_half_is_replaced_by_the_next_rotation(folder):
    now = START + timedelta(minutes=1)
    lost = rotate(folder, now, at_once=False).standby(now)
    (folder.path / f"{lost.kid}.pem").unlink()
    ring = rotate(folder, now + timedelta(minutes=1), at_once=False)
    assert ring.find(lost.kid) is None
    assert ring.signer(LATER).kid in pems(folder)


def test_private_halves_without_a_ring_are_not_destroyed_for_a_new_one(folder):
    halves = pems(folder)
    (folder.path / "keyring.json").unlink()
    assert not folder.is_unused()
    with pytest.raises(ConfigurationError, match=r"no keyring\.json; restore it"):
        folder.create(now=LATER)
    assert pems(folder) == halves


def test_a_change_that_failed_leaves_nothing_half_written(folder, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigurationError, match="No space left"):
        rotate(folder)
    assert not list(folder.path.glob(".*.new"))


def test_rotating_while_one_is_scheduled_writes_nothing(folder):
    now = START + timedelta(minutes=1)
    rotate(folder, now, at_once=False)
    written = folder.version()
    rotate(folder, now + timedelta(minutes=1), at_once=False)
    assert folder.version() == written


def test_revoking_destroys_the_private_half_and_is_remembered(folder):
    kid = folder.read().signer(LATER).kid
    folder.revoke(kid, now=LATER)
    assert kid not in pems(folder)
    assert [status.state for status in folder.read().statuses(LATER)] == ["revoked", "active", "standby"]
    with pytest.raises(KeyNotFound):
        folder.revoke("A" * 43, now=LATER)


class Crash(BaseException):
    """The machine stops here."""


STEPS = ("open", "fsync", "replace", "unlink", "rename")


@pytest.mark.parametrize("change", ["rotate", "revoke", "create"])
def test_a_crash_at_any_step_leaves_a_ring_that_can_be_read_and_changed(change, folder, tmp_path, monkeypatch):
    """KEY-3: before the one rename the old ring is in force, after it the new one."""
    for stop_at in range(60):
        place = tmp_path / f"{change}{stop_at}"
        copy = KeyFolder(place, LIFETIMES)
        if change != "create":
            place.mkdir(mode=0o700)
            for path in folder.path.iterdir():
                (place / path.name).write_bytes(path.read_bytes())
                (place / path.name).chmod(0o600)
        before = [key.kid for key in copy.read().keys] if change != "create" else None
        done = crash_at_step(stop_at, change, copy, monkeypatch)
        if before is None and copy.is_empty():
            assert not done
            assert len(copy.create(now=LATER).keys) == 2
            continue
        ring = copy.read()
        kids = [key.kid for key in ring.keys]
        assert kids == before or len(kids) == (2 if change == "create" else 3)
        ring.signer(LATER)
        after = rotate(copy, LATER + timedelta(hours=1))
        assert pems(copy) == {key.kid for key in after.keys if key.private is not None}
        assert not list(place.glob(".*.new")), "nothing half-written stays, least of all a private key"
        if done:
            assert stop_at > 5, "the change has that many steps at least"
            return
    pytest.fail("the change never finished")


@pytest.mark.parametrize("change", ["create", "rotate", "revoke"])
def test_a_full_disk_is_said_with_the_folder_and_changes_nothing(change, folder, tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ring = folder.read()
    place = KeyFolder(tmp_path / "new", LIFETIMES) if change == "create" else folder
    changes = {
        "create": lambda: place.create(now=START),
        "rotate": lambda: rotate(place),
        "revoke": lambda: place.revoke(ring.keys[0].kid, now=LATER),
    }
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigurationError, match=f"{place.path} cannot be written: No space left on device"):
            changes[change]()
    assert folder.read() == ring
    assert change != "create" or place.is_empty()


def test_a_change_in_force_is_one_although_what_is_spent_could_not_be_destroyed(folder, caplog):
    """It has to be recorded; and whoever revoked a stolen key must hear that its private half is still there."""
    spent, kid = folder.path / f".{'A' * 43}.pem.new", folder.read().keys[0].kid
    spent.mkdir()
    change = folder.revoke(kid, now=LATER)
    assert (change.key.kid, change.ring.find(kid).revoked_at) == (kid, LATER)
    assert f"keyring.not_destroyed: {spent}: Is a directory" in caplog.text


def crash_at_step(stop_at: int, change: str, folder: KeyFolder, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run the change and stop it before its n-th act upon the disk; return whether it finished."""
    acts = 0

    def counted(act):
        def wrapped(*arguments, **named):
            nonlocal acts
            acts += 1
            if acts > stop_at:
                raise Crash
            return act(*arguments, **named)

        return wrapped

    with monkeypatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            if change == "rotate":
                rotate(folder)
            elif change == "revoke":
                folder.revoke(folder.read().keys[0].kid, now=LATER)
            else:
                folder.create(now=START)
        except Crash:
            return False
    return True


def test_processes_that_rotate_at_once_make_one_rotation(tmp_path):
    """KEY-3: whoever comes second finds that what it was asked for is done."""
    folder = KeyFolder(tmp_path / "keys", LIFETIMES)
    folder.create(now=datetime.now(UTC) - timedelta(hours=1))
    script = (
        "import sys; from datetime import datetime, timedelta, UTC; from pathlib import Path;"
        "from identity_service.signing.key_files import KeyFolder; from identity_service.signing.keyring import *;"
        "folder = KeyFolder(Path(sys.argv[1]), TokenLifetimes(timedelta(minutes=10), timedelta(days=14)));"
        "requested = datetime.now(UTC); print('ready', flush=True); sys.stdin.readline();"
        "folder.rotate(requested_at=requested, now=datetime.now(UTC), publish_window=timedelta(0), at_once=True)"
    )
    command = [sys.executable, "-c", script, str(folder.path)]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.communicate("go\n", timeout=30)
        assert process.returncode == 0
    assert len(folder.read().keys) == 3


def test_a_change_waits_for_whoever_holds_the_lock(folder, monkeypatch):
    kid, key = folder.read().signer(LATER).kid, fresh_key(LATER)
    monkeypatch.setattr("identity_service.signing.key_files.fresh_key", lambda _: key)  # which takes a moment
    revoking = threading.Thread(target=lambda: folder.revoke(kid, now=LATER))
    with (folder.path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        revoking.start()
        revoking.join(0.5)
        assert revoking.is_alive()
        assert folder.read().verification_key(kid, LATER) is not None
    revoking.join(30)
    assert folder.read().verification_key(kid, LATER) is None


def test_a_lock_that_is_never_given_back_is_not_waited_for_for_ever(folder, monkeypatch):
    """Whoever waited could not be stopped, and held a thread and a transaction."""
    monkeypatch.setattr("identity_service.signing.key_files.LOCK_SECONDS", 0.1)
    with (folder.path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigurationError, match="another process holds"):
            folder.revoke(folder.read().signer(LATER).kid, now=LATER)


def test_every_renaming_and_every_removal_is_made_durable_at_once(folder, monkeypatch):
    """Or a ring that was replaced, and the private half of a stolen key, could come back with the power."""
    kid, acts = folder.read().signer(LATER).kid, []

    def noted(name: str, *, of: Callable[..., bool]) -> Callable[..., None]:
        act = getattr(os, name)

        def wrapped(*arguments: Any, **named: Any) -> None:
            act(*arguments, **named)
            if of(*arguments):
                acts.append(name)

        return wrapped

    monkeypatch.setattr(os, "replace", noted("replace", of=lambda *_: True))
    monkeypatch.setattr(os, "unlink", noted("unlink", of=lambda *_: True))
    monkeypatch.setattr(os, "fsync", noted("fsync", of=lambda file: stat.S_ISDIR(os.fstat(file).st_mode)))
    folder.revoke(kid, now=LATER)
    assert acts == ["replace", "fsync"] * 2 + ["unlink", "fsync"]


def test_a_passphrase_encrypts_private_halves_at_rest(tmp_path):
    folder = KeyFolder(tmp_path / "keys", LIFETIMES, b"a long passphrase")
    ring = folder.create(now=START)
    pem = (folder.path / f"{ring.keys[0].kid}.pem").read_bytes()
    assert b"ENCRYPTED PRIVATE KEY" in pem
    assert load_pem_private_key(pem, b"a long passphrase")
    assert folder.read().signer(START).private is not None
    with pytest.raises(ConfigurationError, match="IDENTITY_KEYS_PASSPHRASE_FILE"):
        KeyFolder(folder.path, LIFETIMES).read()
    with pytest.raises(ConfigurationError, match="is IDENTITY_KEYS_PASSPHRASE the one"):
        KeyFolder(folder.path, LIFETIMES, b"another").read()


def test_turning_the_passphrase_on_reads_the_old_keys_and_encrypts_the_next(folder):
    encrypting = KeyFolder(folder.path, LIFETIMES, b"a long passphrase")
    ring = rotate(encrypting)
    newest = ring.keys[-1].kid
    assert b"ENCRYPTED" in (folder.path / f"{newest}.pem").read_bytes()


def damage_json(folder: Path) -> None:
    (folder / "keyring.json").write_text("{")


def forget_members(folder: Path) -> None:
    (folder / "keyring.json").write_text('{"version": 1, "keys": [{}]}')


def list_instead_of_object(folder: Path) -> None:
    (folder / "keyring.json").write_text("[]")


def edit(folder: Path, **members: object) -> None:
    path = folder / "keyring.json"
    listed = json.loads(path.read_text())
    listed["keys"][0] |= members
    path.write_text(json.dumps(listed))


def naive_time(folder: Path) -> None:
    edit(folder, created_at="2026-11-22T12:00:00")


def another_kid(folder: Path) -> None:
    edit(folder, kid="A" * 43)


def small_key(folder: Path) -> None:
    edit(folder, n="AQAB")


def newer_version(folder: Path) -> None:
    path = folder / "keyring.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))


def swapped_halves(folder: Path) -> None:
    one, two = sorted(folder.glob("*.pem"))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def readable_by_group(folder: Path) -> None:
    next(folder.glob("*.pem")).chmod(0o640)


def folder_open_to_others(folder: Path) -> None:
    folder.chmod(0o705)


def ring_writable_by_others(folder: Path) -> None:
    (folder / "keyring.json").chmod(0o622)


def half_a_pem(folder: Path) -> None:
    path = next(folder.glob("*.pem"))
    path.write_bytes(path.read_bytes()[:200])


def another_kind_of_key(folder: Path) -> None:
    key = generate_private_key(SECP256R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    next(folder.glob("*.pem")).write_bytes(pem)


def no_ring(folder: Path) -> None:
    (folder / "keyring.json").unlink()


def ring_is_a_folder(folder: Path) -> None:
    no_ring(folder)
    (folder / "keyring.json").mkdir()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_json, "damaged"),
        (forget_members, "damaged"),
        (list_instead_of_object, "damaged"),
        (naive_time, "damaged"),
        (another_kid, "damaged"),
        (small_key, "damaged"),
        (newer_version, "newer version"),
        (swapped_halves, "does not hold the key"),
        (readable_by_group, "chmod 600"),
        (folder_open_to_others, "chmod 700"),
        (ring_writable_by_others, "chmod 600"),
        (half_a_pem, "cannot be parsed"),
        (another_kind_of_key, "not an RSA key"),
        (no_ring, "holds no keyring"),
        (ring_is_a_folder, "cannot be read"),
    ],
)
def test_a_folder_that_cannot_be_trusted_is_refused_in_one_line(folder, damage, says):
    """KEY-4, KEY-5: the text names the file and what to do."""
    damage(folder.path)
    with pytest.raises(ConfigurationError, match=says) as refused:
        folder.read()
    assert "\n" not in refused.value.text
    assert str(folder.path) in refused.value.text


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be made a private folder"):
        KeyFolder(tmp_path / "file" / "keys", LIFETIMES).create(now=START)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        KeyFolder(tmp_path / "file" / "keys", LIFETIMES).read()


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="holds no keyring"):
        KeyFolder(tmp_path / "nowhere", LIFETIMES).read()


def test_a_folder_without_a_place_for_the_lock_is_refused(folder):
    (folder.path / ".lock").unlink()
    (folder.path / ".lock").mkdir()
    with pytest.raises(ConfigurationError, match="cannot be written"):
        rotate(folder)


def test_private_halves_already_held_are_not_parsed_again(folder, monkeypatch):
    """31 ms a key: only what is new is read."""
    held = folder.read()
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("parsed again"))
    assert folder.read(held).keys == held.keys


def test_a_folder_with_other_files_is_not_made_a_keys_folder(tmp_path):
    """One mistyped setting must not cost anybody their files."""
    place = tmp_path / "certificates"
    place.mkdir(mode=0o755)
    for name in ("server.pem", "ca-bundle.pem", ".draft.new", "notes.txt"):
        (place / name).write_text("precious")
    with pytest.raises(ConfigurationError, match="IDENTITY_KEYS_DIR"):
        KeyFolder(place, LIFETIMES).create(now=START)
    assert len(list(place.iterdir())) == 4
    assert stat.S_IMODE(place.stat().st_mode) == 0o755


def test_files_that_others_laid_beside_the_keys_stay(folder):
    for name in ("server.pem", ".draft.new"):
        (folder.path / name).write_text("precious")
    rotate(folder)
    assert (folder.path / "server.pem").read_text() == "precious"
    assert (folder.path / ".draft.new").read_text() == "precious"


def test_a_folder_that_cannot_be_looked_into_is_refused(folder, monkeypatch):
    def closed(*_: object, **__: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", closed)
    with pytest.raises(ConfigurationError, match="cannot be read: Permission denied"):
        folder.is_empty()
