"""How long the disk takes for what Postgres asks of it at each commit, found out beside a measure.

A disk that is shared stalls now and then, and then every refresh waits: what a measure of waiting says can be told from
what the disk did only when both are looked at in the same seconds.
"""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.load import on_cores

_BLOCK = 8192
_BLOCKS = 64
_PAUSE_SECONDS = 0.005
"""So seldom that the disk has nearly all of its time for Postgres."""


class Waits:
    """When somebody waited for the disk and for how long, in seconds."""

    def __init__(self) -> None:
        self._waits: list[tuple[float, float]] = []

    def add(self, began: float, ended: float) -> None:
        self._waits.append((ended, ended - began))

    def longest(self, seconds: float) -> float:
        """Return the longest of those that ended within the last so many seconds."""
        since = time.perf_counter() - seconds
        return max((wait for ended, wait in self._waits if ended > since), default=0.0)


@contextmanager
def watched(folder: Path, *, cores: Sequence[int]) -> Iterator[Waits]:
    """Overwrite a block of a file in the folder and wait until it is on the disk, again and again, as a log does."""
    path, waits, over = folder / "disk", Waits(), threading.Event()
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(file, bytes(_BLOCK * _BLOCKS), 0)
    os.fsync(file)

    def watch() -> None:
        number = 0
        while not over.wait(_PAUSE_SECONDS):
            began = time.perf_counter()
            os.pwrite(file, os.urandom(_BLOCK), number % _BLOCKS * _BLOCK)
            os.fdatasync(file)
            waits.add(began, time.perf_counter())
            number += 1

    with on_cores(cores):
        thread = threading.Thread(target=watch)
        thread.start()
    try:
        yield waits
    finally:
        over.set()
        thread.join()
        os.close(file)
        path.unlink()
