"""What the service does at its limits: P1, P3 to P8, P10 and P17 to P19 of the goals.

Whatever is compared runs in turns, seconds each: a limit, then the service, then the limit again. Where there are two
cores, the service has one and everything else the other, unless a measure says that they share.
"""

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from statistics import median

import httpx2
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256

from bench import disk, load
from bench.deployment import (
    CHEAP_HASHES,
    CORES,
    FIRST,
    LAST,
    Installation,
    Process,
    Service,
    ask_until_answered,
    clean_environment,
    command,
    free_port,
    installation,
    wait_until_ready,
)
from bench.frame import Contestant, Measurement, NotMeasured, in_turns
from bench.issuer import Issuer
from bench.load import on_cores
from identity_service.tokens import jws

SESSIONS = 2000
"""So many that those of one statement are seldom on one page, as in any installation."""
ROUNDS = 3
STEADY_ROUNDS, STEADY_SECONDS = 5, 2
"""So many and so short that a disk which stalls now and then spoils less than half of them."""
PAUSE = 1000
"""Milliseconds between two requests of one of a hundred connections, on average."""
PASSWORD = secrets.token_hex(16)
_ROOT = Path(__file__).parent.parent
_BINDINGS = "argon2-cffi-bindings"


# Refreshing


def refreshing() -> list[Measurement]:
    """One worker on one core, with a durable Postgres and wrk on the other."""
    limits, rates, relations, last = [], [], [], None
    with installation(cores=LAST) as place, place.serve(cores=FIRST, **CHEAP_HASHES) as service:
        refresh(service, connections=32, seconds=2)
        before = place.ask(_WORK)
        done = 0
        for _ in range(ROUNDS):
            limits.append(raw("signatures", 1))
            last = refresh(service, connections=32, seconds=3)
            done += last.requests
            rates.append(last.rate)
            relations.append(last.rate / limits[-1])
        after = place.ask(_WORK)
        steadiness = _steadiness(place, service)
    assert last is not None
    transactions, added, updated, in_place = (now - then for now, then in zip(after, before, strict=True))
    return [
        Measurement(
            "P1",
            "refreshes, 1 worker / two signatures and nothing else",
            median(relations),
            "x",
            0.70,
            {
                "two signatures and nothing else": f"{median(limits):.0f}/s",
                "refreshes, 32 connections": f"{median(rates):.0f}/s",
                "p50, p99 of the last round": f"{last.p50 * 1e3:.1f} ms, {last.p99 * 1e3:.1f} ms",
            },
            at_least=True,
            series={"limit": median(limits), "identity-service": median(rates)},
        ),
        steadiness,
        Measurement(
            "P8",
            "transactions, each a round trip, for a refresh",
            transactions / done,
            "",
            1,
            {
                "rows added": f"{(added - SESSIONS * ROUNDS) / done:.3f}",
                "rows written": f"{updated / done:.3f}",
                "of which in place (HOT)": f"{in_place / updated:.2%}",
            },
        ),
    ]


def _steadiness(place: Installation, service: Service) -> Measurement:
    """P7. Many short rounds, and beside each what the disk did: all refreshes wait for the same write."""
    rounds = []
    with disk.watched(place.folder, cores=LAST) as waits:
        for _ in range(STEADY_ROUNDS):
            done = refresh(service, connections=64, seconds=STEADY_SECONDS)
            rounds.append((done.p99 / done.p50, done, waits.longest(done.seconds)))
    rounds.sort(key=itemgetter(0))
    (relation, middle, wait), (worst, slowest, stall) = rounds[STEADY_ROUNDS // 2], rounds[-1]
    beside = {
        "p50, p99, longest wait for the disk in that round": _milliseconds(middle.p50, middle.p99, wait),
        "the worst of the rounds": f"{worst:.2f} x",
        "p50, p99, longest wait for the disk in the worst": _milliseconds(slowest.p50, slowest.p99, stall),
    }
    what = f"p99 / p50 of refreshes at 64 connections, of {STEADY_ROUNDS} rounds"
    return Measurement("P7", what, relation, "x", 1.8, beside)


def _milliseconds(*seconds: float) -> str:
    return f"{', '.join(f'{each * 1e3:.1f}' if each < 0.01 else f'{each * 1e3:.0f}' for each in seconds)} ms"


_WORK = """
    SELECT xact_commit, tables.* FROM pg_stat_database, (
        SELECT n_tup_ins, n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'sessions'
    ) AS tables WHERE datname = current_database()
"""


def refresh(service: Service, *, connections: int, seconds: float, pause: int | None = None) -> load.Load:
    """Refresh sessions that were just begun; every refresh must succeed."""
    told = [] if pause is None else [pause]
    file = service.sessions(SESSIONS)
    done = load.run(service.url, "refresh", file, *told, connections=connections, seconds=seconds, cores=LAST)
    if done.refused:
        raise RuntimeError(f"{done.refused} of {done.requests} refreshes were refused")
    return done


def signing() -> list[Measurement]:
    """P3. One token of the service's own kind against the bare signature."""
    issuer = Issuer()
    key, padding, digest = issuer.key.private, PKCS1v15(), SHA256()
    assert key is not None, "it has just been made"
    claims = {"iss": "https://id.example.com", "sub": "0" * 36, "aud": ["api"], "jti": "0" * 22, "scope": "a b c"}
    octets = b"x" * 600
    taken = in_turns(
        {
            "raw": Contestant(lambda: key.sign(octets, padding, digest)),
            "token": Contestant(lambda: jws.sign(issuer.key, "at+jwt", claims)),
        },
        seconds=3,
    )
    beside = {"raw RSA-2048 sign": f"{taken['raw'] * 1e6:.0f} us"}
    return [Measurement("P3", "signing one token / raw sign", taken["token"] / taken["raw"], "x", 1.08, beside)]


# Logging in


def logging_in() -> list[Measurement]:
    """P4 to P6. Everything shares all cores, as on a machine that runs nothing else; P5 also without that."""
    limits, logins, kept, quiet_rates = [], [], [], []
    with installation() as place, place.serve() as service:
        username = sign_up(service)
        for _ in range(ROUNDS):
            limits.append(raw_on_all_cores("hashes", 2))
            logins.append(load.run(service.url, "login", username, PASSWORD, connections=16, seconds=3))
        sharing, failed = _beside_logins("shared cores", service, username)
        for _ in range(ROUNDS):
            quiet = load.run(service.url, "refresh", service.sessions(SESSIONS), connections=32, seconds=3)
            with flood(service, username):
                busy = load.run(service.url, "refresh", service.sessions(SESSIONS), connections=32, seconds=3)
            failed += quiet.refused + busy.refused
            quiet_rates.append(quiet.rate)
            kept.append(busy.rate / quiet.rate)
    with installation(cores=LAST) as place, place.serve(cores=FIRST) as service:
        apart, failed_apart = _beside_logins("own core", service, sign_up(service), cores=LAST)
    rates = [done.rate for done in logins]
    return [
        Measurement(
            "P4",
            "logins / Argon2id at the same cost, on the same cores",
            median(rate / limit for rate, limit in zip(rates, limits, strict=True)),
            "x",
            0.94,
            {"Argon2id and nothing else": f"{median(limits):.0f}/s", "logins": f"{median(rates):.0f}/s"},
            at_least=True,
            series={"limit": median(limits), "identity-service": median(rates)},
        ),
        apart,
        sharing,
        Measurement(
            "P5",
            "refreshes that failed beside logins, and logins alone",
            failed + failed_apart + sum(done.refused for done in logins),
            "",
            0,
        ),
        Measurement(
            "P6",
            "rate of refreshes kept beside 16 connections that log in",
            median(kept),
            "x",
            0.95,
            {"refreshes alone": f"{median(quiet_rates):.0f}/s"},
            at_least=True,
        ),
    ]


def _beside_logins(
    where: str, service: Service, username: str, *, cores: Sequence[int] = ()
) -> tuple[Measurement, int]:
    """P5, and how many refreshes failed: a hundred a second, each at a moment of its own.

    An application that does nothing is asked as well: what the machine does.

    Args:
        where: which cores who has, in words.
        cores: where everything but the service runs.
    """
    ours: dict[str, list[load.Load]] = {"alone": [], "beside": []}
    others: dict[str, list[load.Load]] = {"alone": [], "beside": []}

    def look(name: str) -> None:
        sessions = service.sessions(SESSIONS)
        other = load.start(nothing, "paced", PAUSE, connections=100, seconds=4, cores=cores)
        ours[name].append(load.run(service.url, "refresh", sessions, PAUSE, connections=100, seconds=4, cores=cores))
        others[name].append(other.finish())

    with bare(cores=cores) as nothing:
        for _ in range(ROUNDS):
            look("alone")
            with flood(service, username, cores=cores):
                look("beside")
    p50, p99 = ({name: median(getattr(done, p) for done in ours[name]) for name in ours} for p in ("p50", "p99"))
    bare_p99 = {name: median(done.p99 for done in others[name]) for name in others}
    measurement = Measurement(
        "P5",
        f"p99 of 100 refreshes/s beside logins / alone, {where}",
        p99["beside"] / p99["alone"],
        "x",
        1.6,
        {
            "p50, p99 alone": _milliseconds(p50["alone"], p99["alone"]),
            "p50, p99 beside a flood of logins": _milliseconds(p50["beside"], p99["beside"]),
            "p99 of an application that does nothing, alone": _milliseconds(bare_p99["alone"]),
            "the same beside the flood": _milliseconds(bare_p99["beside"]),
        },
        series={} if cores else {f"{p} {name}": of[name] for p, of in (("p50", p50), ("p99", p99)) for name in of},
    )
    return measurement, sum(done.refused for runs in ours.values() for done in runs)


@contextmanager
def flood(service: Service, username: str, *, cores: Sequence[int] = ()) -> Iterator[None]:
    """Log in over 16 connections meanwhile, without a pause."""
    running = load.start(service.url, "login", username, PASSWORD, connections=16, seconds=30, cores=cores)
    time.sleep(1)
    try:
        yield
    finally:
        running.stop()
        time.sleep(1)  # what was asked for last is still being hashed


def sign_up(service: Service) -> str:
    username = f"bench{time.time_ns()}"
    body = {"username": username, "password": PASSWORD}
    httpx2.post(f"{service.url}/users", json=body, timeout=30).raise_for_status()
    return username


def fast_hashes() -> list[Measurement]:
    """P4b. Two services that differ in how the bindings of Argon2 were built, each build in a folder of its own."""
    builds = {"wheel": _ROOT / ".local/bench/argon2-wheel", "native": _ROOT / ".local/bench/argon2-native"}
    what = "logins with Argon2 built for this processor / with the wheel"
    _build_bindings(builds)
    rates: dict[str, list[float]] = {name: [] for name in builds}
    limits: dict[str, list[float]] = {name: [] for name in builds}
    with installation() as place, ExitStack() as stack:
        services = {name: stack.enter_context(place.serve(PYTHONPATH=str(path))) for name, path in builds.items()}
        for _ in range(ROUNDS):
            for name, service in services.items():
                username = sign_up(service)
                limits[name].append(raw_on_all_cores("hashes", 1, PYTHONPATH=str(builds[name])))
                done = load.run(service.url, "login", username, PASSWORD, connections=16, seconds=2)
                rates[name].append(done.rate)
    relations = [native / wheel for native, wheel in zip(rates["native"], rates["wheel"], strict=True)]
    beside = {f"logins, {name}": f"{median(found):.0f}/s" for name, found in rates.items()}
    beside |= {f"Argon2id alone, {name}": f"{median(found):.0f}/s" for name, found in limits.items()}
    return [Measurement("P4b", what, median(relations), "x", 1.8, beside, at_least=True)]


def _build_bindings(builds: dict[str, Path]) -> None:
    """Install the bindings twice, as `make fast-hash` does and as a plain install does."""
    if shutil.which("cc") is None:
        raise NotMeasured("needs a C compiler")
    wanted = f"{_BINDINGS}=={version(_BINDINGS)}"
    for name, path in builds.items():
        if path.exists():
            continue
        how = ["--no-binary", _BINDINGS] if name == "native" else ["--only-binary", ":all:"]
        program = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(path), *how, wanted]
        done = subprocess.run(  # noqa: S603 - pip, with our own arguments
            program, env=os.environ | {"CFLAGS": "-O3 -march=native"}, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise NotMeasured(f"the bindings could not be built: {done.stderr.strip().splitlines()[-1:]}")


# Answering from memory


def key_sets() -> list[Measurement]:
    """P10. The JWKS against an application that does nothing, on the same server."""
    relations, rates, bare_rates = [], [], []
    with installation(cores=LAST) as place, place.serve(cores=FIRST, **CHEAP_HASHES) as service, bare() as url:
        for _ in range(ROUNDS):
            for_nothing = load.run(url, "get", connections=32, seconds=2, cores=LAST)
            done = load.run(f"{service.url}/.well-known/jwks.json", "get", connections=32, seconds=2, cores=LAST)
            rates.append(done.rate)
            bare_rates.append(for_nothing.rate)
            relations.append(done.rate / for_nothing.rate)
    beside = {"an application that does nothing": f"{median(bare_rates):.0f}/s", "JWKS": f"{median(rates):.0f}/s"}
    return [
        Measurement(
            "P10", "JWKS / an application that does nothing", median(relations), "x", 0.5, beside, at_least=True
        )
    ]


@contextmanager
def bare(*, cores: Sequence[int] = FIRST) -> Iterator[str]:
    port = free_port()
    options = [
        "--port",
        str(port),
        "--loop",
        "uvloop",
        "--http",
        "httptools",
        "--no-access-log",
        "--log-level",
        "error",
    ]
    with on_cores(cores):
        process = subprocess.Popen([sys.executable, "-m", "uvicorn", "bench.bare:app", *options])  # noqa: S603 - ours
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, process)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=10)


# Memory, start, workers


def memory() -> list[Measurement]:
    """P17. Everything for a while, then refreshes alone.

    Nobody signs up here: that has a worker load the dictionaries of the password policy, 12 MiB.
    """
    with installation(cores=LAST) as place, place.serve(cores=FIRST) as service:
        username = f"bench{time.time_ns()}"
        command("users", "create", username, "--password-stdin", stdin=PASSWORD, DATABASE_URL=place.database_url)
        mixed = 20
        loads = [
            load.start(service.url, "refresh", service.sessions(SESSIONS), connections=32, seconds=mixed, cores=LAST),
            load.start(service.url, "login", username, PASSWORD, connections=4, seconds=mixed, cores=LAST),
            load.start(f"{service.url}/.well-known/jwks.json", "get", connections=2, seconds=mixed, cores=LAST),
        ]
        for running in loads:
            running.finish()
        held = service.memory()
        done = refresh(service, connections=32, seconds=10).requests
        growth = service.memory() - held
    mebibyte = 1 << 20
    return [
        Measurement("P17", "resident memory of a worker after mixed load", held / mebibyte, "MiB", 90),
        Measurement("P17", f"its growth over {done} refreshes more", max(0, growth) / mebibyte, "MiB", 2),
    ]


def starting() -> list[Measurement]:
    """P18. From the command to the first token, against a process that only imports what every such service does."""
    relations, seconds = [], []
    with installation() as place:
        with place.serve(**CHEAP_HASHES) as service:
            form = {"grant_type": "password", "username": sign_up(service), "password": PASSWORD}

        def first_token(url: str, process: Process) -> None:
            ask_until_answered(url, process, "POST", "/token", **form)

        for _ in range(5):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import fastapi, uvicorn"], check=True)
            importing = time.perf_counter() - began
            began = time.perf_counter()
            with place.serve(**CHEAP_HASHES, until=first_token):
                seconds.append(time.perf_counter() - began)
            relations.append(seconds[-1] / importing)
    beside = {"to the first token": f"{median(seconds):.2f} s"}
    return [
        Measurement("P18", "start to the first token / importing fastapi, uvicorn", median(relations), "x", 1.8, beside)
    ]


def workers() -> list[Measurement]:
    """P19. All cores for everything, with one worker and with two."""
    relations, rates = [], {1: list[float](), 2: list[float]()}
    with installation() as place, ExitStack() as stack:
        services = {
            count: stack.enter_context(place.serve(**CHEAP_HASHES, IDENTITY_WORKERS=str(count))) for count in rates
        }
        for _ in range(ROUNDS):
            for count, service in services.items():
                done = load.run(service.url, "refresh", service.sessions(SESSIONS), connections=64, seconds=3)
                rates[count].append(done.rate)
            relations.append(rates[2][-1] / rates[1][-1])
    beside = {f"refreshes, {count} worker(s)": f"{median(found):.0f}/s" for count, found in rates.items()}
    return [
        Measurement("P19", "refreshes with 2 workers / with 1", median(relations), "x", 1.35, beside, at_least=True)
    ]


# Limits


def raw(kind: str, seconds: float, *, cores: Sequence[int] = FIRST, **environment: str) -> float:
    """Return the rate of something that does nothing else, in a process of its own. See `bench.raw`."""
    with on_cores(cores):
        return _finish(_start_raw(kind, seconds, environment))


def raw_on_all_cores(kind: str, seconds: float, **environment: str) -> float:
    """Return the rate of as many processes as there are cores."""
    running = [_start_raw(kind, seconds, environment) for _ in CORES or range(os.cpu_count() or 1)]
    return sum(_finish(process) for process in running)


def _start_raw(kind: str, seconds: float, environment: dict[str, str]) -> "subprocess.Popen[str]":
    program = [sys.executable, "-m", "bench.raw", kind, str(seconds)]
    return subprocess.Popen(program, env=clean_environment() | environment, stdout=subprocess.PIPE, text=True)  # noqa: S603


def _finish(process: "subprocess.Popen[str]") -> float:
    output, _ = process.communicate()
    return float(output)


MEASURES: dict[str, Callable[[], list[Measurement]]] = {
    "P1 P7 P8": refreshing,
    "P3": signing,
    "P4 P5 P6": logging_in,
    "P4b": fast_hashes,
    "P10": key_sets,
    "P17": memory,
    "P18": starting,
    "P19": workers,
}
