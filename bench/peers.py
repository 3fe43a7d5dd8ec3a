"""Comparable systems beside ours: the same work, on the same core, in turns. `make bench-peers` installs and runs them.

The peers' own programs are in `peer/`. Each is set up as its documentation says, and where that leaves a choice, as is
best for its speed. All of them run at once, but only one is ever asked for anything. In a round each has its turn; a
ratio is the median of the ratios of the rounds, so that what else the machine does falls on both sides of it. A peer
that is missing is said to be, and the rest is measured without it.
"""

import asyncio
import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TypeVar
from urllib.parse import urlsplit

import asyncpg
import httpx2
import jwt
from argon2 import PasswordHasher
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding

from bench import frame, load, verifier
from bench.deployment import (
    FIRST,
    LAST,
    Installation,
    Service,
    clean_environment,
    free_port,
    installation,
    wait_until_ready,
)
from bench.frame import Contestant, Measurement, NotMeasured, in_turns, percentile
from bench.issuer import AUDIENCE, ISSUER, Issuer
from bench.load import on_cores
from bench.serving import bare

T = TypeVar("T")

ROUNDS = 3
CONNECTIONS = 32
LOGINS = 16
"""Connections that log in."""

SESSIONS = 500
"""A run begins with sessions of its own: the one before left the refresh tokens that it began with spent."""

_ROOT = Path(__file__).parents[1]
_PROGRAMS = Path(__file__).with_name("peer")
_NODE = _ROOT / ".local/bench/node"
_PYTHON = _ROOT / ".local/bench/python/bin/python"
_NOT_INSTALLED = "not installed; `make bench-peers` does it, or says above why it could not"
_USERS = "fastapi-users"
_OIDC = "oidc-provider"
_LIMIT = "two RSA-2048 signatures (the limit)"
_BARE = "bare ASGI app"
_MAIL = "bench@example.com"
_PASSWORD = "password"  # noqa: S105 - of nobody
_LOGIN = "/auth/jwt/login"
_CLIENT = "bench"
_SETTLE_SECONDS = 30
_QUIET = 0.5
_A_TICK = 0.015
"""Of the clock that processor time is told in, and a little."""
_STOP_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Peers:
    """Who takes part. Whoever is missing is in `skipped`, with the reason."""

    bare: str
    oidc: "Oidc | None"
    users: Service | None
    skipped: dict[str, str]


@dataclass(frozen=True, slots=True)
class Oidc:
    """oidc-provider, and for each round a file of refresh tokens that it knows."""

    service: Service
    sessions: Iterator[Path]


def measure() -> Iterator[Measurement]:
    """Measure everything. What nobody could be found for is said here."""
    try:
        load.require_wrk()
    except NotMeasured as missing:
        yield Measurement("P2 P4 P6 P10 P17", "", 0, "", 0, skipped=str(missing))
        yield verifying()
        return
    with installation(cores=LAST) as place, place.serve(cores=FIRST) as ours, _peers(ours) as peers:
        if peers.oidc is None:
            print(f"  P2    {_OIDC} {peers.skipped[_OIDC]}")
        else:
            yield refreshes(ours, peers.oidc)
        yield key_sets(ours, peers)
        name, password = _sign_up(ours)
        yield logins(ours, peers, name, password)
        yield kept(ours, peers, name, password)
        yield memory(ours, peers)
    yield verifying()


def refreshes(ours: Service, oidc: Oidc) -> Measurement:
    """P2. Ours goes through Postgres, durably; the peer's is a map in memory.

    Where other work is on the core, the peer, which signs in threads, is given more of it than ours. The ratio of the
    processor time that each takes for a refresh does not move with that, so it stands beside.
    """
    scheme, digest, key = padding.PKCS1v15(), hashes.SHA256(), ours.at.key.private
    assert key is not None

    def sign() -> None:
        key.sign(b"header.claims", scheme, digest)
        key.sign(b"header.claims", scheme, digest)

    taken: list[float] = []
    taken_by_peer: list[float] = []

    def refresh(service: Service, sessions: Path, *client: object, times: list[float]) -> float:
        before = _processor_seconds(service)
        got = _load(service, "refresh", sessions, *client)
        times.append((_processor_seconds(service) - before) / got.requests)
        return got.rate

    rates = _rounds(
        {
            _LIMIT: lambda: _repeat(sign, 1),
            "ours": lambda: refresh(ours, ours.sessions(SESSIONS), times=taken),
            _OIDC: lambda: refresh(oidc.service, next(oidc.sessions), 0, _CLIENT, times=taken_by_peer),
        }
    )
    limit = in_turns({_LIMIT: Contestant(sign)}, seconds=1)[_LIMIT]
    times = {_LIMIT: limit, "ours": median(taken[1:]), _OIDC: median(taken_by_peer[1:])}
    beside = {name: _per_second(rate) for name, rate in rates.items()}
    beside |= {f"{name} / the limit": f"{_ratio(rates, name, _LIMIT):.2f} x" for name in ("ours", _OIDC)}
    beside |= {f"{name}, processor time": f"{seconds * 1e6:.0f} us" for name, seconds in times.items()}
    beside["the goal's ratio in processor time"] = f"{times[_OIDC] / times['ours']:.2f} x"
    ratio = _ratio(rates, "ours", _OIDC)
    return Measurement(
        "P2",
        f"refreshes / {_OIDC}'s, which keeps them in memory",
        ratio,
        "x",
        1.4,
        beside,
        at_least=True,
        series={name: median(rate) for name, rate in rates.items()},
    )


def key_sets(ours: Service, peers: Peers) -> Measurement:
    """P10. The bare application answers with a document as long as ours, and looks at nothing."""
    turns = {
        _BARE: lambda: load.run(peers.bare, "get", connections=CONNECTIONS, seconds=2, cores=LAST).rate,
        "ours": lambda: _rate(ours, "get", path="/.well-known/jwks.json", seconds=2),
    }
    if (oidc := peers.oidc) is not None:
        turns[_OIDC] = lambda: _rate(oidc.service, "get", path="/jwks", seconds=2)
    rates = _rounds(turns)
    beside = {name: _per_second(rate) for name, rate in rates.items()}
    beside[f"{_OIDC} / bare"] = f"{_ratio(rates, _OIDC, _BARE):.2f} x" if peers.oidc else peers.skipped[_OIDC]
    ratio = _ratio(rates, "ours", _BARE)
    return Measurement("P10", "JWKS requests / a bare ASGI app's on uvicorn", ratio, "x", 0.5, beside, at_least=True)


def logins(ours: Service, peers: Peers, name: str, password: str) -> Measurement:
    """P4. Each beside its own raw rate: the parameters differ, and the peer's bindings may be others than ours."""
    hashed = asyncio.run(_hash_of(ours.at, name))
    hasher = PasswordHasher()  # a hash is verified with its own parameters
    raw, raw_peer = "raw Argon2id, our parameters", "raw Argon2id, the peer's parameters"
    turns = {
        raw: lambda: _repeat(lambda: hasher.verify(hashed, password), 1.5),
        "ours": lambda: _logins(ours, name, password),
    }
    if (users := peers.users) is not None:
        turns[raw_peer] = _raw_rate_of_users
        turns[_USERS] = lambda: _logins(users, _MAIL, _PASSWORD, _LOGIN)
    rates = _rounds(turns)
    beside = {name: _per_second(rate) for name, rate in rates.items()}
    beside[f"{_USERS} / raw"] = f"{_ratio(rates, _USERS, raw_peer):.2f} x" if users else peers.skipped[_USERS]
    return Measurement("P4", "logins / raw Argon2id", _ratio(rates, "ours", raw), "x", 0.94, beside, at_least=True)


def kept(ours: Service, peers: Peers, name: str, password: str) -> Measurement:
    """P6. Ours refreshes, which costs it two signatures; the peer, which has no refresh tokens, says who asks."""
    ours_flooded, me, me_flooded = "ours beside logins", f"{_USERS}, /users/me", f"{_USERS}, /users/me beside logins"

    def refresh() -> float:
        return _rate(ours, "refresh", ours.sessions(SESSIONS))

    turns = {"ours": refresh, ours_flooded: lambda: _flooded(ours, refresh, ("login", name, password))}
    if (users := peers.users) is not None:
        token = _log_in_to_users(users)

        def who() -> float:
            return _rate(users, "get", token, path="/users/me")

        turns |= {me: who, me_flooded: lambda: _flooded(users, who, ("login", _MAIL, _PASSWORD, _LOGIN))}
    rates = _rounds(turns, warm_up=0)
    beside = {name: _per_second(rate) for name, rate in rates.items()}
    ratio = _ratio(rates, ours_flooded, "ours")
    series = {name: median(rate) for name, rate in rates.items()} | {"kept by ours": ratio}
    if users is None:
        beside[f"{_USERS}, kept"] = peers.skipped[_USERS]
    else:
        series[f"kept by {_USERS}"] = _ratio(rates, me_flooded, me)
        beside[f"{_USERS}, kept"] = f"{series[f'kept by {_USERS}']:.3f} x"
    what = f"refreshes kept beside {LOGINS} login connections"
    return Measurement("P6", what, ratio, "x", 0.95, beside, at_least=True, series=series)


def memory(ours: Service, peers: Peers) -> Measurement:
    """P17. Of each worker after what it was asked for above, which is not the same for all of them."""
    beside = {
        _OIDC: f"{_mebibytes(peers.oidc.service):.0f} MiB" if peers.oidc else peers.skipped[_OIDC],
        _USERS: f"{_mebibytes(peers.users):.0f} MiB" if peers.users else peers.skipped[_USERS],
    }
    return Measurement("P17", "resident memory of a worker after all of this", _mebibytes(ours), "MiB", 90, beside)


def verifying() -> Measurement:
    """P11, with Node's jose beside: against Node's own RSA, and per token."""
    (measurement,) = asyncio.run(verifier.uncached())
    try:
        beside = _jose()
    except NotMeasured as skipped:
        beside = {"jose": f"skipped: {skipped}"}
    return replace(measurement, beside=measurement.beside | beside)


def _jose() -> dict[str, str]:
    issuer = Issuer()
    (token,) = issuer.tokens(1)
    program = _node("jose", issuer.jwks.decode(), token, ISSUER, AUDIENCE, "3")
    with on_cores(FIRST):
        ended = subprocess.run(program, cwd=_NODE, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    if ended.returncode != 0:
        raise NotMeasured(_last_line(ended.stderr))
    taken = {name: percentile(times, 5) for name, times in json.loads(ended.stdout).items()}
    return {
        "Node's own RSA-2048 verify": f"{taken['raw'] * 1e6:.1f} us",
        "jose, on Node": f"{taken['jose'] * 1e6:.1f} us",
        "jose / Node's own": f"{taken['jose'] / taken['raw']:.2f} x",
    }


# Turns


def _rounds(turns: dict[str, Callable[[], float]], *, warm_up: int = 1) -> dict[str, list[float]]:
    """Give each its turn, round after round, and return what they came to in all rounds but those that warm up."""
    rounds = [{name: turn() for name, turn in turns.items()} for _ in range(warm_up + ROUNDS)]
    return {name: [one[name] for one in rounds[warm_up:]] for name in turns}


def _ratio(rates: dict[str, list[float]], name: str, other: str) -> float:
    return median(one / of for one, of in zip(rates[name], rates[other], strict=True))


def _repeat(work: Callable[[], object], seconds: float) -> float:
    """Return how often a second the work can be done where the services run."""
    with on_cores(FIRST):
        done, start = 0, time.monotonic()
        while time.monotonic() < start + seconds:
            work()
            done += 1
        return done / (time.monotonic() - start)


def _rate(
    service: Service, *asked: object, path: str = "", connections: int = CONNECTIONS, seconds: float = 3
) -> float:
    return _load(service, *asked, path=path, connections=connections, seconds=seconds).rate


def _load(
    service: Service, *asked: object, path: str = "", connections: int = CONNECTIONS, seconds: float = 3
) -> load.Load:
    """Return what a load came to. Refusals would be a rate of something else."""
    got = load.run(service.url + path, *asked, connections=connections, seconds=seconds, cores=LAST)
    if got.refused:
        raise RuntimeError(f"{got.refused} of {got.requests} requests of {asked[0]} were refused by {service.url}")
    return got


def _logins(service: Service, *asked: str) -> float:
    rate = _rate(service, "login", *asked, connections=LOGINS, seconds=4)
    _settle(service)
    return rate


def _flooded(service: Service, turn: Callable[[], float], login: tuple[str, ...]) -> float:
    """Return what a turn comes to while logins saturate the service."""
    flood = load.start(service.url, *login, connections=LOGINS, seconds=5, cores=LAST)
    try:
        time.sleep(1)
        return turn()
    finally:
        flood.finish()
        _settle(service)


def _settle(service: Service) -> None:
    """Wait until a service idles: it goes on hashing for those who hung up, which is not the next turn's to pay."""
    end = time.monotonic() + _SETTLE_SECONDS
    before = -1.0
    while (now := _processor_seconds(service)) - before > _A_TICK and time.monotonic() < end:
        before = now
        time.sleep(0.3)


def _processor_seconds(service: Service) -> float:
    """Return what a process and its threads have taken so far."""
    fields = Path(f"/proc/{service.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# Peers


@contextmanager
def _peers(ours: Service) -> Iterator[Peers]:
    skipped: dict[str, str] = {}
    with ExitStack() as stack:

        def join(name: str, peer: AbstractContextManager[T]) -> T | None:
            try:
                return stack.enter_context(peer)
            except (NotMeasured, httpx2.HTTPError) as why:
                skipped[name] = f"skipped: {why}"
                return None

        oidc = join(_OIDC, _oidc_provider(ours.at))
        users = join(_USERS, _fastapi_users(ours.at))
        yield Peers(stack.enter_context(bare()), oidc, users, skipped)


@contextmanager
def _fastapi_users(place: Installation) -> Iterator[Service]:
    if not _PYTHON.exists():
        raise NotMeasured(_NOT_INSTALLED)
    database = asyncio.run(_make_database(place.database_url))
    port = free_port()
    program = _uvicorn(str(_PYTHON), "users", port)
    with _running(program, port, "/openapi.json", at=place, BENCH_DATABASE=database) as service:
        user = {"email": _MAIL, "password": _PASSWORD}
        httpx2.post(f"{service.url}/auth/register", json=user, timeout=30).raise_for_status()
        yield service


async def _make_database(url: str) -> str:
    """Make the peer a database of its own on our Postgres, and return its URL."""
    db = await asyncpg.connect(url)
    try:
        await db.execute("CREATE DATABASE peer")
    finally:
        await db.close()
    return urlsplit(url)._replace(path="/peer").geturl()


@contextmanager
def _oidc_provider(place: Installation) -> Iterator[Oidc]:
    port, file = free_port(), place.folder / "oidc-refresh-tokens"
    program = _node("oidc", str(port), str(1 + SESSIONS * (1 + ROUNDS)), str(file))
    with _running(program, port, "/jwks", at=place, cwd=_NODE, NODE_ENV="production") as service:
        first, *tokens = file.read_text(encoding="ascii").splitlines()
        _check_signatures(service, first)
        yield Oidc(service, _files(file, tokens))


def _files(file: Path, tokens: Sequence[str]) -> Iterator[Path]:
    """Write one file after the other, each with sessions that nobody has used yet."""
    for start in range(0, len(tokens), SESSIONS):
        file.write_text("".join(f"{token}\n" for token in tokens[start : start + SESSIONS]), encoding="ascii")
        yield file


def _check_signatures(service: Service, refresh_token: str) -> None:
    """Raise if a refresh of oidc-provider does not come to two RS256 signatures, or does not rotate."""
    form = {"grant_type": "refresh_token", "client_id": _CLIENT, "refresh_token": refresh_token}
    answer = httpx2.post(f"{service.url}/token", data=form).raise_for_status().json()
    keys = httpx2.get(f"{service.url}/jwks").raise_for_status().json()["keys"]
    for name in ("access_token", "id_token"):
        jwt.decode(answer[name], jwt.PyJWK(keys[0]), algorithms=["RS256"], options={"verify_aud": False})
    assert answer["refresh_token"] != refresh_token, "it did not rotate"


def _node(module: str, *arguments: str) -> list[str]:
    """Return the command of a program for Node. It looks for packages where it runs, if it is not a file."""
    if shutil.which("node") is None:
        raise NotMeasured("needs Node (Debian: apt-get install nodejs npm)")
    if not (_NODE / "node_modules").exists():
        raise NotMeasured(_NOT_INSTALLED)
    program = (_PROGRAMS / f"{module}.mjs").read_text(encoding="utf-8")
    return ["node", "--input-type=module", "--eval", program, *arguments]


def _uvicorn(python: str, module: str, port: int, *options: str) -> list[str]:
    return [python, "-m", "uvicorn", f"bench.peer.{module}:app", f"--port={port}", "--log-level=warning", *options]


@contextmanager
def _running(
    program: Sequence[str], port: int, path: str, *, at: Installation, cwd: Path = _ROOT, **environment: str
) -> Iterator[Service]:
    """Run a peer on the core of the services until it answers `path`, and take it away at the end."""
    url, log = f"http://127.0.0.1:{port}", at.folder / f"peer-{port}.log"
    with on_cores(FIRST), log.open("w") as output:
        process = subprocess.Popen(  # noqa: S603 - ours
            program, cwd=cwd, env=clean_environment() | environment, stdout=output, stderr=output
        )
    try:
        try:
            wait_until_ready(url, process, path)
        except RuntimeError as error:
            raise NotMeasured(_last_line(log.read_text())) from error
        yield Service(url, process.pid, at)
    finally:
        process.terminate()
        process.wait(timeout=_STOP_SECONDS)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it did not start"])[-1]


# Users


def _sign_up(ours: Service) -> tuple[str, str]:
    """Return the name and the password of a new user."""
    user = {"username": "bench", "password": secrets.token_hex(16)}
    httpx2.post(f"{ours.url}/users", json=user).raise_for_status()
    return user["username"], user["password"]


async def _hash_of(place: Installation, username: str) -> str:
    db = await asyncpg.connect(place.database_url)
    try:
        hashed: str = await db.fetchval("SELECT password_hash FROM users WHERE username = $1", username)
        return hashed
    finally:
        await db.close()


def _log_in_to_users(users: Service) -> str:
    form = {"username": _MAIL, "password": _PASSWORD}
    answer = httpx2.post(f"{users.url}{_LOGIN}", data=form, timeout=30).raise_for_status()
    token: str = answer.json()["access_token"]
    return token


def _raw_rate_of_users() -> float:
    with on_cores(FIRST):
        program = [str(_PYTHON), "-m", "bench.peer.users", "1.5"]
        environment = clean_environment() | {"BENCH_DATABASE": "postgresql://localhost/nowhere"}
        return float(subprocess.check_output(program, cwd=_ROOT, env=environment))  # noqa: S603 - ours


# Words


def _per_second(rates: Sequence[float]) -> str:
    rate = median(rates)
    return f"{rate:.0f}/s" if rate >= 100 else f"{rate:.1f}/s"


def _mebibytes(service: Service) -> float:
    return service.memory() / 2**20


def main() -> None:
    start = time.monotonic()
    if (busy := os.getloadavg()[0]) > _QUIET:
        print(f"  This machine is at other work too (load average {busy:.1f}); that falls on some more than on others.")
    done = []
    for measurement in measure():
        frame.show(measurement)
        done.append(measurement)
    frame.conclude(done, seconds=time.monotonic() - start, now=datetime.now(UTC))


if __name__ == "__main__":
    main()
