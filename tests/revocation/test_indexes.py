"""Where sessions are in the status lists: no collision, no order, nothing used twice (TSL-6)."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from identity_service.revocation import indexes
from identity_service.revocation.indexes import LIST_BITS, LIST_SIZE, Position, position


def number_at(place: Position) -> int:
    """Undo every step of `position`, last first."""
    value = place.index
    for odd in reversed(indexes._ODD):
        value ^= value >> LIST_BITS // 2
        value = value * pow(odd, -1, LIST_SIZE) - (place.list_number + 1) * odd & LIST_SIZE - 1
    return place.list_number << LIST_BITS | value


@given(st.integers(0, 2**62))
def test_no_two_numbers_share_a_place(status_index):
    """Who can be told from the place alone has it alone."""
    assert number_at(position(status_index)) == status_index


@given(st.integers(0, 2**62))
def test_every_number_has_its_place(status_index):
    place = position(status_index)
    assert place.list_number == status_index // LIST_SIZE
    assert 0 <= place.index < LIST_SIZE


def test_neighbours_are_far_apart():
    found = [position(number).index for number in range(1000)]
    steps = [abs(after - before) for before, after in itertools.pairwise(found)]
    assert len(set(steps)) > 900
    assert sum(step < 1000 for step in steps) < 20


def test_the_same_number_is_elsewhere_in_another_list():
    same = sum(position(number).index == position(number + LIST_SIZE).index for number in range(1000))
    assert same < 10


def test_places_never_change():
    """They are written into tokens: another arithmetic would revoke strangers."""
    assert [position(number) for number in (0, 1, 2, LIST_SIZE)] == [
        Position(0, 22698),
        Position(0, 84729),
        Position(0, 871865),
        Position(1, 45396),
    ]
