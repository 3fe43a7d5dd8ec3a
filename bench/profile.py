"""Where a refresh goes: `make profile` writes a flame graph to `results/profile.svg` and prints a table by area.

py-spy looks at the service from outside, 200 times a second, while wrk refreshes as in P1. It stops the process at each
look, so how long a refresh takes is measured before, undisturbed: the processor time of the thread with the event loop.
What it looks at gives the shares. A look counts for the innermost function that an area knows; what is written in C,
such as a signature or a query's way through asyncpg's protocol, counts for the Python that called it.
"""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from bench import load
from bench.deployment import CHEAP_HASHES, FIRST, LAST, Service, installation
from bench.frame import RESULTS, NotMeasured
from bench.serving import SESSIONS, refresh

SECONDS = 8
FLAMES = RESULTS / "profile.svg"

_RATE = 200
_CONNECTIONS = 32
_LOOP = "(asyncio/runners.py:"
"""The frame below everything that the event loop runs."""

_SIGN = "signed (identity_service/tokens/jws.py:"
_SIGNATURES = "two signatures"
_REST = "event loop and the rest"
_AREAS = {
    name: re.compile(pattern)
    for name, pattern in {
        "verification of the presented token": (
            r"^(open_envelope|verify|members_of|lifetime_of|moment|text) \(identity_service/tokens/jws\.py"
            r"|^read \(identity_service/tokens/refresh\.py|\(identity_service/verifier/"
        ),
        "claims and JSON": r"\(identity_service/(tokens|accounts|signing|revocation/status_lists|runtime|scopes|shell)"
        r"|^_issue \(identity_service/grants\.py|^_answer \(identity_service/web/token\.py",
        "database": r"\((asyncpg/|identity_service/(database\.py|sessions/))",
        "HTTP server": r"\((uvicorn/|identity_service/web/protocol\.py)",
        "edge and route": r"\((identity_service/(web/|metrics|grants)|starlette/|fastapi/)",
    }.items()
}


def main() -> None:
    try:
        seconds, shares = _measured()
    except NotMeasured as why:
        sys.exit(f"profile: {why}")
    print(f"  {'a refresh, on the thread with the event loop':44} {seconds * 1e6:6.0f} us")
    for name, share in shares.items():
        print(f"    {name:42} {seconds * share * 1e6:6.0f} us   {share:5.1%}")
    print(f"  Flame graph: {FLAMES}")


def _measured() -> tuple[float, dict[str, float]]:
    """Return the processor seconds of a refresh, and what part of them each area has.

    Raises:
        NotMeasured: with the reason.
    """
    load.require_wrk()
    if not Path("/proc/self/schedstat").exists():
        raise NotMeasured("needs a system that counts the processor time of a thread in /proc")
    RESULTS.mkdir(exist_ok=True)
    with installation(cores=LAST) as place, place.serve(cores=FIRST, **CHEAP_HASHES) as service:
        refresh(service, connections=_CONNECTIONS, seconds=2)
        before = _loop_seconds(service)
        done = refresh(service, connections=_CONNECTIONS, seconds=5).requests
        seconds = (_loop_seconds(service) - before) / done
        raw = place.folder / "stacks"
        _record(service, "raw", raw)
        _record(service, "flamegraph", FLAMES)
        return seconds, shares(raw.read_text(encoding="utf-8").splitlines())


def _loop_seconds(service: Service) -> float:
    """Return the processor time that the first thread of the service has taken, which runs the event loop."""
    told = Path(f"/proc/{service.pid}/task/{service.pid}/schedstat").read_text(encoding="ascii")
    return int(told.split()[0]) / 1e9


def _record(service: Service, form: str, path: Path) -> None:
    """Look at the service while it refreshes, and write what was seen."""
    asked = ("refresh", service.sessions(SESSIONS))
    running = load.start(service.url, *asked, connections=_CONNECTIONS, seconds=SECONDS + 2, cores=LAST)
    options = ["--threads", "--rate", str(_RATE), "--duration", str(SECONDS), "--format", form, "--output", str(path)]
    program = [str(Path(sys.executable).with_name("py-spy")), "record", "--pid", str(service.pid), *options]
    try:
        with load.on_cores(LAST):
            ended = subprocess.run(program, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    except FileNotFoundError:
        raise NotMeasured("needs py-spy; `make profile` installs it") from None
    finally:
        running.stop()
    if ended.returncode == 0:
        return
    if "permi" in ended.stderr.lower():  # "Permission denied", "Operation not permitted"
        raise NotMeasured("this system lets no process look into another; be root, or in a container add SYS_PTRACE")
    raise NotMeasured(f"py-spy: {(ended.stderr.strip().splitlines() or ['no reason given'])[-1]}")


def shares(stacks: Iterable[str]) -> dict[str, float]:
    """Return the part that each area has of what the event loop runs.

    Args:
        stacks: py-spy's raw lines, the outermost frame first and how often it was seen last.
    """
    seen = Counter(dict.fromkeys((_SIGNATURES, *_AREAS, _REST), 0))
    for line in stacks:
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        below = max((place for place, frame in enumerate(frames) if _LOOP in frame), default=None)
        if below is not None:
            seen[_area(frames[below + 1 :])] += int(count)
    if not (total := seen.total()):
        raise NotMeasured("py-spy saw no event loop")
    return {name: count / total for name, count in seen.items()}


def _area(frames: list[str]) -> str:
    """Return the area of the innermost frame that has one."""
    if frames and frames[-1].startswith(_SIGN):  # with nothing of Python's inside: it signs
        return _SIGNATURES
    for frame in reversed(frames):
        for name, pattern in _AREAS.items():
            if pattern.search(frame):
                return name
    return _REST


if __name__ == "__main__":
    main()
