"""What failures cost, as a function of how many there were and when."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity_service.throttling import ACCOUNT, ADDRESS, CLIENT, FORGOTTEN_AFTER, LOCK, SESSION, Rule, prefix
from identity_service.throttling.store import Tally
from tests.conftest import START

RULES = {"account": ACCOUNT, "session": SESSION, "client": CLIENT, "address": ADDRESS}
NOTHING = Tally(0, START, START)
SECOND = timedelta(seconds=1)


def after(rule: Rule, failures: int, *, every: timedelta = timedelta(0)) -> Tally:
    tally = NOTHING
    for number in range(failures):
        tally = rule.one_more(tally, START + number * every)
    return tally


def test_the_delays_of_an_account_are_those_that_are_documented():
    delays = [ACCOUNT.delay(failures).total_seconds() for failures in range(1, 18)]
    assert delays == [0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900]
    assert ACCOUNT.delay(99) == timedelta(minutes=15)
    assert ACCOUNT.delay(100) == ACCOUNT.delay(10_000) == LOCK


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@given(failures=st.integers(0, 2**31 - 1))
def test_a_delay_never_falls_and_never_exceeds_its_bound(rule, failures):
    assert rule.delay(failures) <= rule.delay(failures + 1)
    assert (rule.delay(failures) == timedelta(0)) == (failures <= rule.free)
    assert rule.delay(failures) <= (LOCK if rule.locks_at is not None else rule.longest)


@pytest.mark.parametrize("rule", [ACCOUNT, SESSION], ids=["account", "session"])
@given(pauses=st.lists(st.floats(0, 3 * 86400), max_size=150))
def test_no_patience_gets_more_than_a_hundred_guesses_in_a_row_without_a_day_between(rule, pauses):
    """NIST SP 800-63B-4 3.2.2, for whoever waits exactly as long as told, or longer, before each guess."""
    tally, now, waited = NOTHING, START, []
    for pause in pauses:
        waited.append(max(tally.blocked_until - now, timedelta(seconds=pause)))
        now += waited[-1]
        tally = rule.one_more(tally, now)
    assert all(max(waited[start : start + 101]) >= LOCK for start in range(max(0, len(waited) - 100)))


def test_an_attacker_needs_most_of_a_day_to_lock_an_account_for_one():
    waits = sum((ACCOUNT.delay(failures) for failures in range(1, 100)), timedelta(0))
    assert timedelta(hours=20) < waits < timedelta(hours=24)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@given(failures=st.integers(1, 200))
def test_nothing_is_left_a_day_after_the_last_wait(rule, failures):
    tally = after(rule, failures)
    assert rule.one_more(tally, tally.blocked_until + FORGOTTEN_AFTER).failures == 1


@given(failures=st.integers(1, 200))
def test_the_failures_of_an_account_do_not_fade(failures):
    tally = after(ACCOUNT, failures)
    assert ACCOUNT.one_more(tally, tally.blocked_until + FORGOTTEN_AFTER - SECOND).failures == failures + 1


def test_a_busy_address_is_never_slowed_while_its_failures_drain():
    """A company behind one address, with somebody who mistypes every 37 seconds all day."""
    assert ADDRESS.drains_every is not None
    assert after(ADDRESS, 3000, every=ADDRESS.drains_every + SECOND).failures <= 2


def test_failures_a_little_faster_than_they_drain_do_not_keep_all_others():
    """Parts of a step are not lost: 35 seconds apart, one in 36 is left over."""
    assert ADDRESS.drains_every is not None
    assert after(ADDRESS, 720, every=ADDRESS.drains_every - SECOND).failures == pytest.approx(20, abs=2)


def test_a_flood_from_one_address_comes_to_a_hundred_or_so_guesses_an_hour():
    tally, now, guesses = after(ADDRESS, 100), START, 0
    while now < START + timedelta(hours=10):
        now = max(now, tally.blocked_until)
        tally = ADDRESS.one_more(tally, now)
        guesses += 1
    assert 900 <= guesses <= 1050


def test_a_clock_that_is_behind_takes_nothing_away():
    tally = after(ADDRESS, 50)
    assert ADDRESS.one_more(tally, START - timedelta(minutes=5)).failures == 51


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        (None, None),
    ],
)
def test_a_subscriber_has_one_address_of_ipv4_and_a_64_of_ipv6(address, expected):
    assert prefix(address) == expected
