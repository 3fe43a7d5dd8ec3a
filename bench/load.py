"""Load from outside: wrk, a process of its own on the cores it is given. What it asks for is in `load.lua`."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.frame import NotMeasured

_SCRIPT = Path(__file__).with_name("load.lua")


@dataclass(frozen=True, slots=True)
class Load:
    """What a run of load came to. Latencies are seconds; `refused` is every answer other than the one wanted."""

    requests: int
    seconds: float
    p50: float
    p99: float
    most: float
    refused: int

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


class Running:
    """A load that is under way."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def stop(self) -> None:
        """End it before its time; what it came to is lost."""
        self._process.terminate()
        self._process.communicate()

    def finish(self) -> Load:
        output, errors = self._process.communicate()
        line = next((line for line in output.splitlines() if line.startswith("JSON ")), None)
        if line is None:
            raise RuntimeError(f"wrk: {errors.strip() or output.strip()}")
        told = json.loads(line.removeprefix("JSON "))
        return Load(
            requests=told["requests"],
            seconds=told["microseconds"] / 1e6,
            p50=told["p50"] / 1e6,
            p99=told["p99"] / 1e6,
            most=told["most"] / 1e6,
            refused=told["refused"],
        )


def require_wrk() -> None:
    """Raise NotMeasured where there is none."""
    if shutil.which("wrk") is None:
        raise NotMeasured("needs wrk (Debian: apt-get install wrk)")


def start(url: str, *asked: object, connections: int, seconds: float, cores: Sequence[int] = ()) -> Running:
    """Start a load on a URL.

    Args:
        asked: what `load.lua` is told, such as `"get"`.
        cores: where wrk runs; anywhere when there are none.
    """
    require_wrk()
    options = ["-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--timeout", "30s", "-s", str(_SCRIPT)]
    program = ["wrk", *options, url, "--", *map(str, asked)]
    with on_cores(cores):
        return Running(
            subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # noqa: S603 - on the PATH
        )


def run(url: str, *asked: object, connections: int, seconds: float, cores: Sequence[int] = ()) -> Load:
    return start(url, *asked, connections=connections, seconds=seconds, cores=cores).finish()


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Start processes on these cores: they take over where their parent may run. No cores: wherever it may already."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
