"""Key states as a function of time, over any history of rotations, revocations and waiting (KEY-2, KEY-3)."""

from dataclasses import replace
from datetime import datetime, timedelta
from itertools import count

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from identity_service.errors import KeyNotFound, KeysUnavailable
from identity_service.signing import keyring as rules
from identity_service.signing.key_files import fresh_key
from identity_service.signing.keyring import Key, Keyring, KeyState, TokenLifetimes
from tests.conftest import START

LIFETIMES = TokenLifetimes(access=timedelta(minutes=10), refresh=timedelta(days=14))
WINDOW = timedelta(minutes=15)
_MATERIAL = fresh_key(START)
_ids = count()


class History:
    """A ring, a clock, and what has been seen: which key signed when, and what it should still be good for."""

    def __init__(self) -> None:
        self.now = START
        self.ring = rules.first_keys(self.fresh, LIFETIMES)
        self.last_signed: dict[str, datetime] = {}
        self.withdrawn: set[str] = set()
        self.unannounced = {self.ring.keys[0].kid}

    def fresh(self) -> Key:
        return replace(_MATERIAL, kid=f"key{next(_ids):06}", created_at=self.now)

    def rotate(self, *, at_once: bool = False, requested_earlier: timedelta = timedelta(0)) -> None:
        requested_at = self.now - requested_earlier
        self.ring = rules.rotated(
            self.ring, self.fresh, requested_at=requested_at, now=self.now, publish_window=WINDOW, at_once=at_once
        )

    def revoke(self, kid: str) -> None:
        self.ring = rules.revoked(self.ring, kid, self.fresh, now=self.now)

    def act(self, act: str, which: int) -> None:
        """Do one of the things an administrator can do; remember what it excuses from waiting."""
        signer = self.signer().kid
        if act == "revoke":
            kid = self.ring.keys[which % len(self.ring.keys)].kid
            self.revoke(kid)
            self.withdrawn.add(kid)
        else:
            self.rotate(at_once=act == "rotate --now")
        if act != "rotate" and self.signer().kid != signer:
            self.unannounced.add(self.signer().kid)

    def check(self, now: datetime) -> None:
        """Assert all that must hold at an instant."""
        for instant in (now, now - LIFETIMES.access, now + LIFETIMES.access, now):  # what is remembered is of its time
            assert self.ring.statuses(instant) == tuple(self.ring.status(key, instant) for key in self.ring.keys)
        states = [status.state for status in self.ring.statuses(now)]
        signer = self.ring.signer(now)
        published = [key.kid for key in self.ring.published(now)]
        assert states.count(KeyState.ACTIVE) == 1
        assert KeyState.STANDBY in states, "a rotation can only promote what every verifier already knows"
        assert published[0] == signer.kid
        assert signer.kid in self.unannounced or now - signer.created_at >= WINDOW
        self.last_signed[signer.kid] = now
        for kid, signed_at in self.last_signed.items():
            if kid in self.withdrawn:
                assert self.ring.verification_key(kid, now) is None
                assert kid not in published
                continue
            assert kid in published or now > signed_at + LIFETIMES.access
            assert self.ring.verification_key(kid, now) is not None or now > signed_at + LIFETIMES.refresh

    def states(self) -> dict[str, KeyState]:
        return {status.key.kid: status.state for status in self.ring.statuses(self.now)}

    def signer(self) -> Key:
        return self.ring.signer(self.now)


PAUSES = st.sampled_from([1, 60, 14 * 60, 15 * 60, 16 * 60, 3600, 86400, 15 * 86400])
ACTS = st.sampled_from(["rotate", "rotate --now", "revoke"])
STEPS = st.lists(st.tuples(ACTS, PAUSES, st.integers(0, 9)), max_size=12)


@hypothesis_settings(max_examples=100, deadline=None)
@given(STEPS)
def test_at_every_instant_one_key_signs_and_what_it_signed_verifies(steps):
    """KEY-2: whatever signs was published for the publish window, whatever was signed verifies for its lifetime."""
    history = History()
    for act, pause, which in steps:
        history.act(act, which)
        for moment in (0, 1, pause // 2, pause):
            history.check(history.now + timedelta(seconds=moment))
        history.now += timedelta(seconds=pause)


def test_a_key_passes_through_its_states_in_order():
    history = History()
    kid = history.ring.keys[1].kid
    seen = [history.states()[kid]]
    history.now += WINDOW
    history.rotate()
    for pause in (timedelta(0), WINDOW, timedelta(minutes=15, seconds=59), timedelta(seconds=1), timedelta(days=14)):
        history.now += pause
        history.rotate(at_once=pause == WINDOW)
        seen.append(history.states().get(kid, KeyState.RETIRED))
    assert seen == ["standby", "active", "retiring", "retiring", "retained", "retired"]


def test_a_young_standby_key_is_scheduled_not_refused():
    history = History()
    standby = history.ring.keys[1]
    history.now += timedelta(minutes=1)
    history.rotate()
    promoted = history.ring.find(standby.kid)
    assert promoted is not None
    assert promoted.signs_from == START + WINDOW
    assert history.signer().kid != standby.kid
    history.now = START + WINDOW
    assert history.signer().kid == standby.kid


def test_rotating_again_while_one_is_scheduled_changes_nothing():
    history = History()
    history.now += timedelta(minutes=1)
    history.rotate()
    scheduled = history.ring
    history.now += timedelta(minutes=1)
    history.rotate()
    assert history.ring is scheduled


def test_an_emergency_rotation_overrides_the_schedule():
    history = History()
    standby = history.ring.keys[1]
    history.now += timedelta(minutes=1)
    history.rotate()
    history.now += timedelta(minutes=1)
    history.rotate(at_once=True)
    assert history.signer().kid == standby.kid
    assert len(history.ring.keys) == 3


def test_two_rotations_at_once_make_one():
    """The second was requested before the first one was done."""
    history = History()
    history.now += timedelta(hours=1)
    history.rotate()
    done = history.ring
    history.now += timedelta(seconds=2)
    history.rotate(at_once=True, requested_earlier=timedelta(seconds=3))
    assert history.ring is done


def test_revoking_the_active_key_lets_the_standby_sign_at_once():
    history = History()
    active, standby = history.ring.keys
    history.now += timedelta(hours=1)
    history.revoke(active.kid)
    assert history.signer().kid == standby.kid
    assert active.kid not in [key.kid for key in history.ring.published(history.now)]
    assert history.ring.verification_key(active.kid, history.now) is None
    revoked = history.ring.find(active.kid)
    assert revoked is not None
    assert revoked.private is None


def test_revoking_the_standby_key_makes_another():
    history = History()
    active, standby = history.ring.keys
    history.now += timedelta(hours=1)
    history.revoke(standby.kid)
    assert history.signer().kid == active.kid
    assert sorted(history.states().values()) == ["active", "revoked", "standby"]


def test_revoking_twice_changes_nothing_and_an_unknown_key_is_an_error():
    history = History()
    kid = history.ring.keys[0].kid
    history.now += timedelta(hours=1)
    history.revoke(kid)
    once = history.ring
    history.revoke(kid)
    assert history.ring is once
    with pytest.raises(KeyNotFound):
        history.revoke("nothing")


def test_revoking_a_key_that_no_longer_signs_leaves_the_others_alone():
    history = History()
    old = history.signer().kid
    history.now += timedelta(hours=1)
    history.rotate()
    signer = history.signer().kid
    history.revoke(old)
    assert history.signer().kid == signer
    assert history.ring.verification_key(old, history.now) is None


def test_a_ring_without_any_key_in_waiting_gets_one_at_the_next_rotation():
    """Only a keyring edited by hand can be in this state."""
    history = History()
    history.ring = Keyring(history.ring.keys[:1], LIFETIMES)
    history.now += timedelta(hours=1)
    history.rotate(at_once=True)
    assert sorted(history.states().values()) == ["active", "retiring", "standby"]


def test_revoking_the_only_key_of_a_ring_makes_one_that_signs_at_once():
    history = History()
    history.ring = Keyring(history.ring.keys[:1], LIFETIMES)
    history.now += timedelta(hours=1)
    history.revoke(history.ring.keys[0].kid)
    assert sorted(history.states().values()) == ["active", "revoked", "standby"]


def test_before_the_first_key_signs_nothing_signs():
    """F76: a clock that is wrong must not find a key."""
    history = History()
    with pytest.raises(KeysUnavailable):
        history.ring.signer(START - timedelta(seconds=1))


def test_a_replica_whose_clock_is_behind_signs_with_the_successor_once_the_spent_half_is_gone():
    history = History()
    active, standby = history.ring.keys
    history.now += timedelta(minutes=1)
    history.rotate()
    without = replace(
        history.ring, keys=tuple(replace(k, private=None) if k is active else k for k in history.ring.keys)
    )
    assert without.signer(history.now).kid == standby.kid


def test_a_missing_private_half_without_a_successor_signs_nothing():
    history = History()
    ring = Keyring(tuple(replace(key, private=None) for key in history.ring.keys), LIFETIMES)
    with pytest.raises(KeysUnavailable):
        ring.signer(START)


def test_retired_keys_are_forgotten_at_the_next_rotation():
    history = History()
    first = history.signer().kid
    history.now += timedelta(hours=1)
    history.rotate()
    history.now += timedelta(days=15)
    history.rotate()
    assert history.ring.find(first) is None
