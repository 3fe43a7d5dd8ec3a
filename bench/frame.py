"""How things are measured and shown. What is measured is in the modules beside this one.

Absolute times move by a tenth from run to run and by half between machines, so a goal is a ratio between things
measured in turns, a millisecond each, in one process on one core. Processor time is taken, not time on the wall, and of
many turns the fifth percentile: what the code costs when nothing else disturbs it.
"""

import gc
import json
import os
import platform
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from time import process_time, thread_time

_TURN_SECONDS = 0.001
_WARM_UP = 3
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One line of the table.

    Args:
        id: the goal's name.
        goal: what `value` may be at most, in the same unit.
        beside: the limit and the peers, in words, from the same run.
        at_least: the goal is what `value` must reach instead.
        series: figures for the pictures, as they were measured: seconds, bytes, rates a second, and ratios.
        skipped: why it was not measured; there is no value then.
    """

    id: str
    what: str
    value: float
    unit: str
    goal: float
    beside: dict[str, str] = field(default_factory=dict)
    at_least: bool = False
    series: dict[str, float] = field(default_factory=dict)
    skipped: str = ""

    @property
    def met(self) -> bool:
        if self.skipped:
            return False
        return self.value >= self.goal if self.at_least else self.value <= self.goal


class NotMeasured(Exception):
    """Something is missing that a measure needs; the text says what, and where to get it."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """Something to be timed: `run` does it `count` times."""

    run: Callable[[], object]
    count: int = 1


def each(work: Callable[..., object], *series: Sequence[object]) -> Contestant:
    """Return a contestant that does the work once for every item, or for every row of items."""
    rows = list(zip(*series, strict=True))

    def run() -> None:
        for row in rows:
            work(*row)

    return Contestant(run, len(rows))


def each_awaited(work: Callable[..., Awaitable[object]], items: Sequence[object]) -> Contestant:
    """Return a contestant that awaits the work for every item. The work must never have to wait for anything."""

    async def all_of_them() -> None:
        for item in items:
            await work(item)

    return Contestant(lambda: finish(all_of_them()), len(items))


def finish(coroutine: Awaitable[object]) -> None:
    """Run a coroutine that never waits, without the cost of an event loop around it."""
    steps = coroutine.__await__()
    try:
        next(steps)
    except StopIteration:
        return
    raise RuntimeError("it waits for something")


def in_turns(contestants: dict[str, Contestant], *, seconds: float) -> dict[str, float]:
    """Return the processor seconds that each contestant needs for one of its `count`, all measured in turns.

    It keeps an event loop that it is called in from turning, so that nothing else runs meanwhile.

    Args:
        seconds: how long this may take altogether.
    """
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    with _one_core():
        turns = {name: _turns(contestant) for name, contestant in contestants.items()}
        gc.collect()
        end = process_time() + seconds
        while process_time() < end:
            for name, contestant in contestants.items():
                start = thread_time()
                for _ in range(turns[name]):
                    contestant.run()
                taken[name].append((thread_time() - start) / turns[name] / contestant.count)
    return {name: percentile(times, 5) for name, times in taken.items()}


def _turns(contestant: Contestant) -> int:
    """Return how often a contestant is run in its turn; running it to find out warms it up."""
    times = []
    for _ in range(_WARM_UP):
        start = thread_time()
        contestant.run()
        times.append(thread_time() - start)
    return max(1, round(_TURN_SECONDS / max(median(times), 1e-9)))


def percentile(values: Sequence[float], percent: float) -> float:
    return sorted(values)[min(int(len(values) * percent / 100), len(values) - 1)]


@contextmanager
def _one_core() -> Iterator[None]:
    """Keep this process on its last core meanwhile, where the system lets it choose."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def show(measurement: Measurement) -> None:
    if measurement.skipped:
        print(f"  {measurement.id:5} not measured: {measurement.skipped}")
        return
    verdict = "met" if measurement.met else "NOT MET"
    relation = ">=" if measurement.at_least else "<="
    value = f"{_number(measurement.value)} {measurement.unit}"
    goal = f"{relation} {_number(measurement.goal):>6}"
    print(f"  {measurement.id:5} {measurement.what:56} {value:>12}   {goal}   {verdict}")
    for name, text in measurement.beside.items():
        print(f"  {'':5}   {name:54} {text:>12}")


def conclude(measurements: Sequence[Measurement], *, seconds: float, now: datetime) -> None:
    """Write the results down, and say how many goals were met and which were not."""
    path = write(measurements, seconds=seconds, now=now)
    print(f"\n  {sum(each.met for each in measurements)} of {len(measurements)} goals met in {seconds:.0f} s; {path}")
    if missed := [f"{each.id} {each.what}" for each in measurements if not each.met and not each.skipped]:
        print(f"  Missed: {'; '.join(missed)}")


def write(measurements: Sequence[Measurement], *, seconds: float, now: datetime) -> Path:
    """Write the results as JSON, and return where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{now:%Y%m%dT%H%M%SZ}.json"
    contents = {
        "at": now.isoformat(),
        "seconds": round(seconds, 1),
        "python": platform.python_version(),
        "machine": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "measurements": [asdict(measurement) | {"met": measurement.met} for measurement in measurements],
    }
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"
