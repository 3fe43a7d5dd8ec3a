"""Where in the status lists a session is: its number, scattered over a list so that neighbours tell nothing.

The database hands out consecutive numbers; 2^20 of them share a list. Within a list the order is a fixed bijection: no
two numbers meet, none is ever used again, and the position in a token does not say how many logins came before it.
"""

from dataclasses import dataclass

LIST_BITS = 20
LIST_SIZE = 1 << LIST_BITS

_MASK = LIST_SIZE - 1
_ODD = (0x9E3B5, 0x6C8E9, 0xB5AD5)


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the status lists: the list's number and the index in it."""

    list_number: int
    index: int


def position(status_index: int) -> Position:
    """Return the place of a session's number."""
    list_number, value = status_index >> LIST_BITS, status_index & _MASK
    # Each step can be undone, so the whole is a bijection: adding, multiplying by an odd number, folding the high half.
    for odd in _ODD:
        value = (value + (list_number + 1) * odd) * odd & _MASK
        value ^= value >> LIST_BITS // 2
    return Position(list_number, value)
