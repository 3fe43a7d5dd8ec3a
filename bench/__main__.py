"""`python -m bench [ID ...]`: measure, print a table, write it as JSON. The exit code is 0 unless it broke."""

import asyncio
import sys
from datetime import UTC, datetime
from time import monotonic

from bench import frame, transfer, verifier

PARTS = (verifier, transfer)


def main(wanted: set[str]) -> None:
    start = monotonic()
    done = []
    for part in PARTS:
        for ids, measure in part.MEASURES.items():
            if wanted and wanted.isdisjoint(ids.split()):
                continue
            for measurement in asyncio.run(measure()):
                frame.show(measurement)
                done.append(measurement)
    if not done:
        known = sorted({name for part in PARTS for ids in part.MEASURES for name in ids.split()})
        sys.exit(f"bench: nothing is called {' '.join(sorted(wanted))}; there is {' '.join(known)}")
    frame.conclude(done, seconds=monotonic() - start, now=datetime.now(UTC))


main(set(sys.argv[1:]))
