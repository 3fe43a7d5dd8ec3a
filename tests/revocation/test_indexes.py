"""Where sessions are in the status lists: no collision, no order, nothing used twice (TSL-6)."""

import itertools
from collections.abc import Callable

import asyncpg
import pytest

from identity_service.revocation import LIST_SIZE, position


@pytest.fixture(scope="session")
def database(new_database: Callable[..., str], migrated: str) -> str:
    """One with a sequence of its own: some of it is used up here."""
    return new_database("indexes", template="pristine")


async def drawn(database: str, count: int, *, after: int) -> list[int]:
    connection = await asyncpg.connect(database)
    try:
        await connection.execute("SELECT setval('status_index_seq', $1)", after)
        rows = await connection.fetch("SELECT next_status_index() AS drawn FROM generate_series(1, $1)", count)
        return [row["drawn"] for row in rows]
    finally:
        await connection.close()


async def test_a_whole_list_is_filled_without_a_collision(database):
    connection = await asyncpg.connect(database)
    await connection.execute("SELECT setval('status_index_seq', $1)", 7 * LIST_SIZE - 1)
    row = await connection.fetchrow(
        "SELECT count(DISTINCT place), min(place), max(place)"
        " FROM (SELECT next_status_index() AS place FROM generate_series(1, $1)) AS list",
        LIST_SIZE,
    )
    await connection.close()
    assert row is not None
    assert tuple(row) == (LIST_SIZE, 7 * LIST_SIZE, 8 * LIST_SIZE - 1)


async def test_neighbours_are_far_apart(database):
    indexes = [position(place).index for place in await drawn(database, 1000, after=1)]
    steps = [abs(after - before) for before, after in itertools.pairwise(indexes)]
    assert len(set(steps)) > 900
    assert sum(step < 1000 for step in steps) < 30


async def test_the_same_number_is_elsewhere_in_another_list(database):
    first, second = await drawn(database, 1000, after=1), await drawn(database, 1000, after=LIST_SIZE + 1)
    pairs = zip(map(position, first), map(position, second), strict=True)
    assert sum(one.index == other.index for one, other in pairs) < 10


async def test_no_list_is_too_far_to_be_drawn_from(database):
    """A billion lists, a quadrillion logins."""
    (place,) = await drawn(database, 1, after=LIST_SIZE << 30)
    assert position(place).list_number == 1 << 30
