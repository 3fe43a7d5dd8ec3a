"""A running process follows the folder, rotates what is due, and keeps what it has when the folder fails."""

import threading
from datetime import timedelta
from pathlib import Path

import pytest

from identity_service.errors import KeysUnavailable
from identity_service.signing.key_files import KeyFolder
from identity_service.signing.keyring import Keyring, TokenLifetimes
from identity_service.signing.live import LiveKeyring
from tests.conftest import START

LIFETIMES = TokenLifetimes(timedelta(minutes=10), timedelta(days=14))
WINDOW = timedelta(minutes=15)
PERIOD = timedelta(days=90)
DAY = START + timedelta(days=1)


@pytest.fixture
def folder(keys_dir: Path) -> KeyFolder:
    return KeyFolder(keys_dir, LIFETIMES)


def live(folder: KeyFolder, period: timedelta = PERIOD) -> LiveKeyring:
    return LiveKeyring(folder, publish_window=WINDOW, rotation_period=period)


def test_a_rotation_by_another_process_is_taken_up(folder):
    keys = live(folder)
    before = keys.jwks(DAY)
    ring = folder.rotate(requested_at=DAY, now=DAY, publish_window=WINDOW, at_once=False).ring
    keys.tend(DAY)
    assert keys.current.signer(DAY).kid == ring.signer(DAY).kid
    assert keys.jwks(DAY).etag != before.etag


def test_what_is_asked_for_here_is_in_force_at_once(folder):
    keys = live(folder)
    first, second = (key.kid for key in keys.current.published(DAY))
    promoted = keys.rotate(now=DAY, at_once=False)
    assert promoted.key is not None
    assert (promoted.key.kid, keys.current.signer(DAY).kid) == (second, second)
    keys.revoke(second, now=DAY)
    assert keys.current.verification_key(second, DAY) is None
    assert keys.current.verification_key(first, DAY) is not None
    assert keys.current == folder.read()


def test_a_look_that_began_before_a_revocation_does_not_bring_the_key_back(folder, monkeypatch):
    keys = live(folder)
    kid = keys.current.signer(DAY).kid
    folder.rotate(requested_at=DAY, now=DAY, publish_window=WINDOW, at_once=False)
    read, revoking = KeyFolder.read, threading.Thread(target=lambda: keys.revoke(kid, now=DAY))

    def slowly(self: KeyFolder, previous: Keyring | None = None) -> Keyring:
        ring = read(self, previous)
        if not revoking.ident:
            revoking.start()
            revoking.join(0.5)
        return ring

    with monkeypatch.context() as patch:
        patch.setattr(KeyFolder, "read", slowly)
        keys.tend(DAY)
        revoking.join()
    assert keys.current.verification_key(kid, DAY) is None


def test_a_change_that_cannot_be_read_at_first_is_taken_up_later(folder):
    keys = live(folder)
    kid, ring = keys.current.signer(DAY).kid, folder.path / "keyring.json"
    folder.revoke(kid, now=DAY)
    ring.chmod(0o666)
    keys.tend(DAY)
    assert keys.current.verification_key(kid, DAY) is not None
    ring.chmod(0o600)
    keys.tend(DAY)
    assert keys.current.verification_key(kid, DAY) is None


def test_a_change_at_the_moment_of_the_start_is_taken_up(folder, monkeypatch):
    read, kid = KeyFolder.read, folder.read().signer(DAY).kid
    with monkeypatch.context() as patch:

        def overtaken(self: KeyFolder, previous: Keyring | None = None) -> Keyring:
            ring = read(self, previous)
            patch.undo()
            self.revoke(kid, now=DAY)
            return ring

        patch.setattr(KeyFolder, "read", overtaken)
        keys = live(folder)
    assert keys.current.verification_key(kid, DAY) is not None
    keys.tend(DAY)
    assert keys.current.verification_key(kid, DAY) is None


def test_an_unchanged_folder_is_not_read_again(folder, monkeypatch):
    keys = live(folder)
    ring = keys.current
    monkeypatch.setattr(KeyFolder, "read", lambda *_: pytest.fail("read again"))
    keys.tend(DAY)
    assert keys.current is ring


def test_a_scheduled_hand_over_happens_by_the_clock_and_destroys_the_spent_half(folder):
    now = START + timedelta(minutes=1)
    keys = live(folder)
    spent = keys.current.signer(now).kid
    folder.rotate(requested_at=now, now=now, publish_window=WINDOW, at_once=False)
    keys.tend(now)
    assert keys.current.signer(now).kid == spent
    keys.tend(START + WINDOW)
    assert keys.current.signer(START + WINDOW).kid != spent
    assert not (folder.path / f"{spent}.pem").exists()
    held = keys.current.find(spent)
    assert held is not None
    assert held.private is None


def test_the_jwks_changes_with_the_clock_alone(folder):
    now = START + timedelta(minutes=1)
    folder.rotate(requested_at=now, now=now, publish_window=WINDOW, at_once=False)
    keys = live(folder)
    assert keys.jwks(now) is keys.jwks(now)
    assert keys.jwks(now).etag != keys.jwks(START + WINDOW).etag


def test_a_key_that_is_due_is_rotated_without_anyone_asking(folder):
    keys = live(folder)
    first = keys.current.signer(START).kid
    keys.tend(START + PERIOD - timedelta(seconds=1))
    assert keys.current.signer(START + PERIOD).kid == first
    keys.tend(START + PERIOD)
    assert keys.current.signer(START + PERIOD).kid != first
    assert len(keys.current.keys) == 3


def test_two_replicas_rotate_a_due_key_once(folder):
    one, two = live(folder), live(folder)
    one.tend(START + PERIOD)
    two.tend(START + PERIOD + timedelta(seconds=1))
    assert [key.kid for key in two.current.keys] == [key.kid for key in one.current.keys]
    assert len(two.current.keys) == 3


def test_a_due_rotation_is_not_scheduled_twice_while_the_standby_key_is_young(folder):
    keys = live(folder)
    young = START + PERIOD - timedelta(minutes=1)
    folder.revoke(keys.current.keys[1].kid, now=young)
    keys.tend(START + PERIOD)
    keys.tend(START + PERIOD + timedelta(seconds=2))
    assert len(keys.current.keys) == 4


@pytest.mark.parametrize("since_due", [timedelta(0), timedelta(days=60)])
def test_a_key_that_was_made_since_the_active_one_came_due_holds_up_no_rotation(folder, since_due, caplog):
    caplog.set_level("INFO")
    keys = live(folder)
    first = keys.current.signer(START).kid
    folder.revoke(keys.current.keys[1].kid, now=START + PERIOD + since_due)
    now = START + PERIOD + since_due + timedelta(days=1)
    promoted = keys.tend(now)
    assert promoted is not None
    assert keys.current.signer(now).kid == promoted.kid != first
    assert caplog.text.count("keyring.rotation_scheduled") == 1


def test_a_rotation_that_a_faster_replica_did_is_neither_done_again_nor_logged(folder, caplog, monkeypatch):
    caplog.set_level("INFO")
    one, two = live(folder), live(folder)
    one.tend(START + PERIOD)
    caplog.clear()
    monkeypatch.setattr(two, "_take_up", lambda now: None)  # the other one changed the folder after it was looked at
    assert two.tend(START + PERIOD) is None
    assert "keyring.rotation_scheduled" not in caplog.text
    assert len(two.current.keys) == 3


def test_a_period_of_zero_leaves_rotation_to_the_operator(folder):
    keys = live(folder, timedelta(0))
    first = keys.current.signer(START).kid
    keys.tend(START + timedelta(days=3650))
    assert keys.current.signer(START + timedelta(days=3650)).kid == first


def test_a_folder_that_is_restored_file_by_file_is_looked_at_until_it_can_sign(folder, caplog):
    keys = live(folder)
    active = keys.current.signer(START)
    ring, private = folder.path / "keyring.json", folder.path / f"{active.kid}.pem"
    half = private.read_bytes()
    private.unlink()
    ring.write_bytes(ring.read_bytes() + b"\n")  # the ring is there first
    for _ in range(2):
        keys.tend(START)
        with pytest.raises(KeysUnavailable):
            keys.current.signer(START)
    assert caplog.text.count("keyring.unusable") == 1
    private.write_bytes(half)
    private.chmod(0o600)
    keys.tend(START)
    assert keys.current.signer(START).kid == active.kid


def test_what_keeps_the_folder_from_being_read_is_said_again_every_minute(folder, caplog):
    keys = live(folder)
    (folder.path / "keyring.json").write_text("{")
    for _ in range(61):
        keys.tend(DAY)
    said = [record for record in caplog.records if record.message == "keyring.unusable" and record.levelname == "ERROR"]
    assert len(said) == 3


@pytest.mark.parametrize("content", ["{", None])
def test_a_folder_that_fails_leaves_the_keys_in_force(folder, content, caplog):
    keys = live(folder)
    ring = keys.current
    if content is None:
        (folder.path / "keyring.json").unlink()
    else:
        (folder.path / "keyring.json").write_text(content)
    keys.tend(DAY)
    assert keys.current is ring
    assert "keyring.unusable" in caplog.text
    assert [record.levelname for record in caplog.records if record.message == "keyring.unusable"] == ["ERROR"]
    keys.tend(DAY)
    assert caplog.text.count("keyring.unusable") == 1, "said once, although it is tried every few seconds"
