"""`python -m bench [ID ...]`: measure, print a table, write it as JSON. The exit code is 0 unless it broke."""

import asyncio
import inspect
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from bench import frame, serving, transfer, verifier
from bench.frame import Measurement, NotMeasured

PARTS: tuple[Mapping[str, Callable[[], Any]], ...] = (serving.MEASURES, verifier.MEASURES, transfer.MEASURES)


def _measured(ids: str, measure: Callable[[], Any]) -> list[Measurement]:
    try:
        found = measure()
        return asyncio.run(found) if inspect.iscoroutine(found) else found
    except NotMeasured as why:
        return [Measurement(ids, "", 0, "", 0, skipped=str(why))]


def main(wanted: set[str]) -> None:
    start = monotonic()
    done = []
    for part in PARTS:
        for ids, measure in part.items():
            if wanted and wanted.isdisjoint(ids.split()):
                continue
            for measurement in _measured(ids, measure):
                frame.show(measurement)
                done.append(measurement)
    if not done:
        known = sorted({name for part in PARTS for ids in part for name in ids.split()})
        sys.exit(f"bench: nothing is called {' '.join(sorted(wanted))}; there is {' '.join(known)}")
    frame.conclude(done, seconds=monotonic() - start, now=datetime.now(UTC))


main(set(sys.argv[1:]))
