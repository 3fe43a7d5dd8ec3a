"""What ten times as many sessions cost: P9 and P15 of the goals, and how fast sessions that are over go away.

`make bench-scale` runs it, for some ten minutes and with some gigabytes of disk, so it is no part of `make bench`.
Both sizes are there at once and take turns, because another minute may be another machine. Each has a Postgres with as
many buffers as its documentation has an operator give it, and with the tables in them, as after hours of work. What one
costs that has the 128 MB it comes with, and reads a page or more for each refresh, is a figure beside that.

A refresh that is the first on its page since a checkpoint also writes an image of the page to the log. How often that
happens follows from the refreshes per page between two checkpoints, not from the number of sessions, and at the same
rate ten times as many pages get ten times fewer each. So there are three figures: with the images, straight after a
checkpoint, when it is nearly every refresh; without them, once every page in use has been written, which is what the
goal is about; and the two put together for the five minutes between two checkpoints at the measured rate.
"""

import asyncio
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, TypeVar
from uuid import UUID

import asyncpg
import uvloop

from bench import frame, load
from bench.deployment import FIRST, LAST, LIFETIMES, Installation, Service, installation
from bench.frame import Measurement
from bench.load import Load, on_cores
from identity_service.database import open_database
from identity_service.revocation.feed import LOOKS_PER_FULL_ONE, RevocationFeed
from identity_service.revocation.status_lists import StatusLists
from identity_service.shell import utc_now
from identity_service.signing.key_files import KeyFolder
from identity_service.signing.live import LiveKeyring
from identity_service.tokens import refresh

T = TypeVar("T")

SIZES = (1_000_000, 10_000_000)
SESSIONS_OF_A_USER = 4
SESSION_LIFETIME = timedelta(days=30)
REFRESHED = 12_000
"""Sessions that are refreshed, in turn: some more than a round comes to, on more pages than 128 MB of buffers."""

ROUNDS = 3
ROUND_SECONDS = 15
CHECKPOINT_SECONDS = 300

BUFFERS = min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4, 8 << 30)
"""A quarter of the memory, as PostgreSQL's documentation has it (`shared_buffers`), and no more than could be used."""

_BYTES_A_SESSION = 700
_BYTES_BESIDES = 3 << 30
"""What the log and a sort take for a while."""

_BATCH = 1000
_WARM_SECONDS = 40
"""So long until those processes of Postgres that are asked have mapped their pages: until then, some 4 us a refresh."""
_STATISTICS_SECONDS = 11
"""So long a process of Postgres keeps to itself what it has counted."""

_TICK = os.sysconf("SC_CLK_TCK")
_AGENTS = (
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Safari/537.36",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_7 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/26.0",
    "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0",
    "orders-app/7.3.1 (Android 16; SM-S931B) okhttp/5.1.0",
)


class Crowd:
    """Sessions by their number, in the order of time. Whose they are and when they began follows from the number.

    The first `over` have ended; of the others none ends meanwhile.
    """

    def __init__(self, size: int, now: datetime) -> None:
        self.size = size
        self.over = max(size // 25, 100_000)
        self.total = self.over + size
        self.users = self.total // SESSIONS_OF_A_USER
        self.now = now
        self._now_ms = int(now.timestamp() * 1000)
        self._lifetime_ms = int(SESSION_LIFETIME.total_seconds() * 1000)
        self._hour_ms = 3_600_000
        self._step = (self._lifetime_ms - 2 * self._hour_ms) / size

    def session(self, number: int) -> UUID:
        return UUID(_uuid7(self._began_at(number), number))

    def user_of(self, number: int) -> UUID:
        return UUID(self._user(number))

    def user_rows(self) -> Iterator[str]:
        registered = f"{self.now - timedelta(days=400):%Y-%m-%d %H:%M:%S}+00"
        for user in range(self.users):
            digest = f"$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHRzYWx0c2E${user:043d}"
            yield f"{self._user_id(user)}\tuser.{user}\tuser.{user}@example.com\t{digest}\t{registered}\t{registered}\n"

    def session_rows(self) -> Iterator[str]:
        password_changed = f"{self.now - timedelta(days=400):%Y-%m-%d %H:%M:%S}+00"
        rotated = f"{self.now - timedelta(hours=1):%Y-%m-%d %H:%M:%S}+00"
        access_ends = f"{self.now - timedelta(minutes=50):%Y-%m-%d %H:%M:%S}+00"
        second, began_text, ends_text = 0, "", ""
        for number in range(self.total):
            began_at = self._began_at(number)
            if began_at // 1000 != second:
                second = began_at // 1000
                began = datetime.fromtimestamp(second, UTC)
                began_text, ends_text = f"{began:%Y-%m-%d %H:%M:%S}", f"{began + SESSION_LIFETIME:%Y-%m-%d %H:%M:%S}"
            fraction = f".{began_at % 1000:03d}+00"
            yield (
                f"{_uuid7(began_at, number)}\t{self._user(number)}\tfirst-party\t{{}}\t{{pwd}}\t{began_text}{fraction}"
                f"\t{password_changed}\t{rotated}\t{ends_text}{fraction}\t{access_ends}"
                f"\t198.51.{number % 251}.{number % 241}\t{_AGENTS[number % 4]}\n"
            )

    def _began_at(self, number: int) -> int:
        began_at = self._now_ms - self._lifetime_ms + int((number - self.over) * self._step)
        return began_at + self._hour_ms if number >= self.over else began_at - self._hour_ms

    def _user(self, number: int) -> str:
        return self._user_id(number * 1_000_000_007 % self.users)

    def _user_id(self, user: int) -> str:
        return _uuid7(self._now_ms - 400 * 86_400_000 + user, user)


def _uuid7(milliseconds: int, number: int) -> str:
    """Return the digits of an id of that time. The rest is as scattered as random bits, and the same each time."""
    scattered = (number + 1) * 0x9E3779B97F4A7C15F39CC0605CEDC835
    return f"{milliseconds:012x}7{scattered & 0xFFF:03x}{1 << 63 | scattered >> 64 & (1 << 62) - 1:016x}"


@dataclass(frozen=True, slots=True)
class Round:
    """What some refreshes came to, by the way, in the server's processor time and in its log."""

    load: Load
    processor: float
    log: int
    images: int


@dataclass(slots=True)
class Deployment:
    """An installation with its sessions, its service, and what was measured of it."""

    place: Installation
    service: Service
    crowd: Crowd
    spread: list[int] = field(init=False)
    """The sessions to be refreshed, from all over those that live."""

    newest: list[int] = field(init=False)
    """As many that began last, in any order."""

    def __post_init__(self) -> None:
        living = range(self.crowd.over, self.crowd.total)
        chance = random.Random(1)  # noqa: S311 - the same ones in each run
        self.spread = chance.sample(living, min(REFRESHED, len(living) // 4))
        self.newest = chance.sample(living[-len(self.spread) :], len(self.spread))

    def refresh(self, numbers: Sequence[int], *, seconds: float) -> Round:
        """Refresh these sessions one after the other, over and over, as fast as it goes."""
        self.mint(numbers)
        return asyncio.run(self._measured(partial(self.load, 32, seconds=seconds)))

    def load(self, connections: int, *pause: int, seconds: float) -> Load:
        asked = ("refresh", self._file, *pause)
        done = load.run(self.service.url, *asked, connections=connections, seconds=seconds, cores=LAST)
        if done.refused:
            raise RuntimeError(f"{done.refused} refreshes were refused")
        return done

    def mint(self, numbers: Sequence[int]) -> None:
        """Write the refresh tokens that these sessions have come to."""
        ids = [self.crowd.session(number) for number in numbers]
        rows = self.sql("SELECT id, generation FROM sessions WHERE id = ANY ($1::uuid[])", ids)
        generations = {row["id"]: row["generation"] for row in rows}
        now = utc_now().replace(microsecond=0)
        with self._file.open("w", encoding="ascii") as lines:
            for number, session in zip(numbers, ids, strict=True):
                claims = refresh.RefreshClaims(
                    issuer=self.service.url,
                    subject=self.crowd.user_of(number),
                    client_id="first-party",
                    session_id=session,
                    generation=generations[session],
                    issued_at=now,
                    expires_at=now + timedelta(days=14),
                )
                lines.write(refresh.mint(self.place.key, claims) + "\n")

    def sql(self, statement: str, *arguments: object) -> list[Any]:
        return asyncio.run(_query(self.place.database_url, statement, *arguments))

    @property
    def _file(self) -> Path:
        return self.place.folder / "refresh-tokens"

    async def _measured(self, work: Callable[[], Load]) -> Round:
        db = await asyncpg.connect(self.place.database_url)
        try:
            await db.execute("CREATE EXTENSION IF NOT EXISTS pg_walinspect")
            server = _parent(await db.fetchval("SELECT pg_backend_pid()"))
            began_at, before = await db.fetchval("SELECT pg_current_wal_lsn()::text"), _processor_seconds(server)
            done = await asyncio.to_thread(work)
            processor = _processor_seconds(server) - before
            ended_at = await db.fetchval("SELECT pg_current_wal_lsn()::text")
            (written,) = await db.fetch(_LOG, began_at, ended_at)
        finally:
            await db.close()
        return Round(done, processor, int(written["log"]), int(written["images"]))


_LOG = """
    SELECT $2::text::pg_lsn - $1::text::pg_lsn AS log, sum(fpi_size) AS images
      FROM pg_get_wal_stats($1::text::pg_lsn, $2::text::pg_lsn)
"""


async def _query(url: str, statement: str, *arguments: object) -> list[Any]:
    db = await asyncpg.connect(url)
    try:
        return await db.fetch(statement, *arguments)
    finally:
        await db.close()


def _parent(pid: int) -> int:
    return int(_process(Path(f"/proc/{pid}"))[1])


def _processor_seconds(server: int) -> float:
    """Return what the server and its processes have taken so far, those that have ended included."""
    ticks = sum(map(int, _process(Path(f"/proc/{server}"))[11:15]))
    for place in Path("/proc").glob("[0-9]*"):
        try:
            facts = _process(place)
        except OSError:  # it has just ended
            continue
        if int(facts[1]) == server:
            ticks += int(facts[11]) + int(facts[12])
    return ticks / _TICK


def _process(place: Path) -> list[str]:
    """Return what the system says of a process after its name, which may have anything in it."""
    return (place / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


async def _copy(url: str, crowd: Crowd) -> None:
    """Bring users and sessions in by COPY. What is built of the sessions' rows is built once they are there."""
    db = await asyncpg.connect(url)
    try:
        built = await db.fetch(_BUILT_OF_SESSIONS)
        for statement in built:
            await db.execute(statement["drop"])
        await db.copy_to_table("users", source=_batches(crowd.user_rows()), columns=_USER_COLUMNS, format="text")
        await db.copy_to_table(
            "sessions", source=_batches(crowd.session_rows()), columns=_SESSION_COLUMNS, format="text"
        )
        for statement in reversed(built):
            await db.execute(statement["make"])
    finally:
        await db.close()


async def _batches(rows: Iterator[str]) -> AsyncIterator[bytes]:
    while batch := "".join(islice(rows, _BATCH)):
        yield batch.encode("ascii")


_USER_COLUMNS = ("id", "username", "email", "password_hash", "password_changed_at", "created_at")
_SESSION_COLUMNS = (
    "id", "user_id", "client_id", "scope", "amr", "authenticated_at", "password_changed_at", "rotated_at", "expires_at",
    "access_expires_at", "address", "user_agent",
)  # fmt: skip
_BUILT_OF_SESSIONS = """
    SELECT format('ALTER TABLE sessions DROP CONSTRAINT %I', conname) AS drop,
           format('ALTER TABLE sessions ADD CONSTRAINT %I %s', conname, pg_get_constraintdef(oid)) AS make
      FROM pg_constraint WHERE conrelid = 'sessions'::regclass AND contype IN ('p', 'f')
     UNION ALL
    SELECT format('DROP INDEX %s', indexrelid::regclass), pg_get_indexdef(indexrelid)
      FROM pg_index WHERE indrelid = 'sessions'::regclass AND NOT indisprimary
"""
_WARM = """
    SELECT sum(pg_prewarm(oid)) FROM pg_class
     WHERE oid IN ('sessions'::regclass, 'users'::regclass)
        OR oid IN (SELECT indexrelid FROM pg_index WHERE indrelid IN ('sessions'::regclass, 'users'::regclass))
"""
_HUGE_PAGES = "SELECT current_setting('huge_pages_status') AS status"
_SPACE = "SELECT pg_table_size('sessions') AS rows, pg_indexes_size('sessions') AS indexes"
_UPDATES = "SELECT n_tup_upd AS all, n_tup_hot_upd AS hot FROM pg_stat_user_tables WHERE relname = 'sessions'"
_COUNT_OVER = "SELECT count(*) FROM sessions WHERE expires_at < $1"
_REVOKE = """
    INSERT INTO revoked_tokens (jti, status_index, reason, revoked_at, recorded_at, expires_at)
    SELECT id::text, status_index, 'logout', at, at, now() + interval '1 hour'
      FROM (SELECT id, status_index, now() - random() * interval '12 minutes' AS at
              FROM sessions TABLESAMPLE BERNOULLI (1)) AS revoked
"""


@dataclass(frozen=True, slots=True)
class Pruning:
    """How many rows went a second, and what refreshes took meanwhile and afterwards."""

    rate: float
    meanwhile: Load
    alone: Load


def _prune(at: Deployment) -> Pruning:
    """The service has just started, and deletes what is over."""
    # A hundred refreshes a second from many connections, each at a moment of its own.
    seconds = at.crowd.over / 20_000  # it never deletes more than half as many a second
    numbers = at.spread[: int(200 * seconds) + 200]
    at.mint(numbers)
    began_at, before = time.monotonic(), _over(at)
    meanwhile = at.load(100, 1000, seconds=seconds)
    left, lasted = _over(at), time.monotonic() - began_at
    if not left:
        raise RuntimeError("what is over was gone before the refreshes were measured")
    _wait_until_pruned(at)
    at.mint(numbers)
    alone = at.load(100, 1000, seconds=seconds)
    return Pruning((before - left) / lasted, meanwhile, alone)


def _over(at: Deployment) -> int:
    count: int = at.sql(_COUNT_OVER, at.crowd.now)[0]["count"]
    return count


def _wait_until_pruned(at: Deployment) -> None:
    while _over(at):
        time.sleep(0.5)


@dataclass(frozen=True, slots=True)
class Uptake:
    """What a fresh process needs to know of all that is revoked. Seconds, and bytes."""

    revoked: int
    lists: int
    look: float
    look_held: float
    looks_held: float
    build: float
    build_held: float
    memory: int


def take_up(url: str, keys: Path) -> Uptake:
    """Measure in this process, which must be fresh. The loop is the service's."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_take_up(url, keys))


async def _take_up(url: str, keys: Path) -> Uptake:
    ring = LiveKeyring(KeyFolder(keys, LIFETIMES), publish_window=timedelta(hours=1), rotation_period=timedelta(0))
    async with open_database(url, pool_size=2) as database:
        feed = RevocationFeed(database)
        lists = StatusLists(feed, ring, issuer="https://id.example.com")
        before = _resident()
        look, look_held = await _held(feed.look(utc_now()))
        memory = _resident() - before
        numbers = range(feed.first_list, feed.last_list + 1)
        revoked = sum(len(feed.revoked_in(number)) for number in numbers)

        async def five_minutes() -> None:
            for _ in range(LOOKS_PER_FULL_ONE):
                await feed.look(utc_now())

        async def build() -> None:
            for number in numbers:
                await lists.document(number, utc_now())

        _, looks_held = await _held(five_minutes())
        took, build_held = await _held(build())
    return Uptake(revoked, len(numbers), look, look_held, looks_held, took, build_held, memory)


async def _held(work: Awaitable[None]) -> tuple[float, float]:
    """Return how long some work took, and for how long at most nothing else had its turn meanwhile.

    The latter is the processor time of this thread: when another process has the core, it is not we who hold the loop.
    """
    gaps = []

    async def tick() -> None:
        last = time.thread_time()
        while True:
            await asyncio.sleep(0.001)
            now = time.thread_time()
            gaps.append(now - last)
            last = now

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    gaps.clear()
    start = time.perf_counter()
    await work
    took = time.perf_counter() - start
    await asyncio.sleep(0.002)
    ticking.cancel()
    return took, max(gaps)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _in_a_fresh_process(place: Installation) -> Uptake:
    with on_cores(FIRST), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(take_up, place.database_url, place.folder / "keys").result()


@dataclass(frozen=True, slots=True)
class PerRefresh:
    """What a refresh came to, on average of some rounds: seconds of Postgres, bytes of log, bytes of images in it."""

    processor: float
    log: float
    images: float
    rate: float
    p99: float

    @classmethod
    def of(cls, *rounds: Round) -> "PerRefresh":
        done = sum(each.load.requests for each in rounds)
        return cls(
            processor=sum(each.processor for each in rounds) / done,
            log=sum(each.log - each.images for each in rounds) / done,
            images=sum(each.images for each in rounds) / done,
            rate=done / sum(each.load.seconds for each in rounds),
            p99=max(each.load.p99 for each in rounds),
        )


@dataclass(frozen=True, slots=True)
class Cost:
    """What refreshes cost at one size: straight after a checkpoint, later, and of the newest sessions only."""

    size: int
    first: PerRefresh
    later: PerRefresh
    rounds: Sequence[PerRefresh]
    newest: PerRefresh
    image_of_a_page: float
    bytes_of_rows: int
    bytes_of_indexes: int
    hot: float
    hot_of_newest: float
    huge_pages: str

    @property
    def name(self) -> str:
        return _short(self.size)

    @property
    def log_between_checkpoints(self) -> float:
        """The bytes of log per refresh, images included, of all that is written between two checkpoints."""
        refreshes = self.later.rate * CHECKPOINT_SECONDS
        return self.later.log + self.image_of_a_page * _pages_met(self.bytes_of_rows, refreshes) / refreshes


def _pages_met(bytes_of_rows: int, refreshes: float) -> float:
    """Return on how many different pages that many random refreshes are: balls in bins."""
    pages = bytes_of_rows / 8192
    return pages * -math.expm1(-refreshes / pages)


def measure(sizes: Sequence[int]) -> list[Measurement]:
    """Measure all of it, saying what is under way."""
    now = utc_now().replace(microsecond=0)
    with ExitStack() as stack:
        filled = []
        for size in sizes:
            place = stack.enter_context(installation(cores=LAST, options=[f"shared_buffers={BUFFERS >> 20}MB"]))
            crowd = Crowd(size, now)
            _fill(place, crowd)
            filled.append((place, crowd))
        with ExitStack() as services:
            small, large = (Deployment(place, _served(services, place), crowd) for place, crowd in filled)
            _say("deleting sessions that are over")
            pruning = _prune(large)
            _wait_until_pruned(small)
            costs = _costs(small, large)
        unasked = _costs_unasked(filled)
        place, crowd = filled[-1]
        _say(f"{_short(crowd.size)} sessions: 1 % revoked, and taken up by a fresh process")
        without = _memory_of_a_service(place)
        large.sql(_REVOKE)
        uptake = _in_a_fresh_process(place)
        memory = without, _memory_of_a_service(place)
    return [*_report_costs(costs, unasked), *_report_revocations(uptake, memory), *_report_pruning(pruning, crowd.size)]


def _fill(place: Installation, crowd: Crowd) -> None:
    start = time.monotonic()
    _say(f"{_short(crowd.size)} sessions: COPY and indexes")
    asyncio.run(_copy(place.database_url, crowd))
    _settle(place)
    _say(f"{_short(crowd.size)} sessions: there after {time.monotonic() - start:.0f} s")


def _settle(place: Installation) -> None:
    """Bring the tables to where they are most of the time, and begin the time between two checkpoints."""
    for statement in ("VACUUM ANALYZE", "CHECKPOINT"):
        asyncio.run(_query(place.database_url, statement))


def _served(services: ExitStack, place: Installation) -> Service:
    return services.enter_context(place.serve(cores=FIRST))


def _memory_of_a_service(place: Installation) -> int:
    with place.serve(cores=FIRST) as service:
        return service.memory()


def _costs(*deployments: Deployment) -> list[Cost]:
    """Refresh at each size in turn."""
    for at in deployments:
        at.sql("CREATE EXTENSION IF NOT EXISTS pg_prewarm")
        at.sql(_WARM)
        _settle(at.place)
    firsts = _turn(deployments, "straight after a checkpoint")
    warming = max(_WARM_SECONDS, math.ceil(REFRESHED / min(each.load.rate for each in firsts)))
    _turn(deployments, "until the pages of all have been written", seconds=warming)
    later = [_turn(deployments, f"round {number + 1} of {ROUNDS}") for number in range(ROUNDS)]
    updates = _updates(deployments)
    newest = _turn(deployments, "of the newest only", newest=True)
    updates_of_newest = _updates(deployments)
    costs = []
    for number, at in enumerate(deployments):
        (space,) = at.sql(_SPACE)
        (pages,) = at.sql(_HUGE_PAGES)
        first, all_of_it, hot = firsts[number], *updates[number]
        cost = Cost(
            size=at.crowd.size,
            first=PerRefresh.of(first),
            later=PerRefresh.of(*(rounds[number] for rounds in later)),
            rounds=[PerRefresh.of(rounds[number]) for rounds in later],
            newest=PerRefresh.of(newest[number]),
            image_of_a_page=first.images / _pages_met(space["rows"], min(first.load.requests, len(at.spread))),
            bytes_of_rows=space["rows"],
            bytes_of_indexes=space["indexes"],
            hot=hot / all_of_it,
            hot_of_newest=(updates_of_newest[number][1] - hot) / (updates_of_newest[number][0] - all_of_it),
            huge_pages=pages["status"],
        )
        costs.append(cost)
    return costs


def _costs_unasked(filled: Sequence[tuple[Installation, Crowd]]) -> list[PerRefresh]:
    """Refresh at each size with the buffers that Postgres has when nobody asks for more."""
    for place, _ in filled:
        place.restart(cores=LAST)
    with ExitStack() as services:
        deployments = [Deployment(place, _served(services, place), crowd) for place, crowd in filled]
        _turn(deployments, "with 128 MB of buffers, until their pages have been written")
        return [PerRefresh.of(each) for each in _turn(deployments, "with 128 MB of buffers")]


def _turn(
    deployments: Sequence[Deployment], name: str, *, seconds: float = ROUND_SECONDS, newest: bool = False
) -> list[Round]:
    rounds = []
    for at in deployments:
        _say(f"{_short(at.crowd.size)} sessions: refreshes, {name}")
        rounds.append(at.refresh(at.newest if newest else at.spread, seconds=seconds))
    return rounds


def _updates(deployments: Sequence[Deployment]) -> list[tuple[int, int]]:
    """Return how many updates of sessions there were so far, and how many of them in place."""
    time.sleep(_STATISTICS_SECONDS)
    return [(row["all"], row["hot"]) for at in deployments for row in at.sql(_UPDATES)]


def _report_costs(both: Sequence[Cost], unasked: Sequence[PerRefresh]) -> list[Measurement]:
    small, large = both
    names = f"{large.name} sessions / {small.name}"
    ratios = [most.processor / least.processor for most, least in zip(large.rounds, small.rounds, strict=True)]
    processor = {
        "of each of the rounds": f"{', '.join(f'{ratio:.2f}' for ratio in ratios)} x",
        **{f"at {at.name}": f"{at.later.processor * 1e6:.0f} us" for at in both},
        "buffers of each Postgres": f"{BUFFERS / 2**30:.1f} GiB",
        "in huge pages, which the system has to reserve": f"{', '.join(at.huge_pages for at in both)}",
        "with 128 MB of them, as Postgres comes": f"{unasked[1].processor / unasked[0].processor:.2f} x",
        **{
            f"with 128 MB of them, at {at.name}": f"{each.processor * 1e6:.0f} us"
            for at, each in zip(both, unasked, strict=True)
        },
        "straight after a checkpoint": f"{large.first.processor / small.first.processor:.2f} x",
        "the newest sessions only": f"{large.newest.processor / small.newest.processor:.2f} x",
        **{f"refreshes a second at {at.name}": f"{at.later.rate:.0f}" for at in both},
        **{f"p99 at 32 connections at {at.name}": f"{at.later.p99 * 1000:.0f} ms" for at in both},
    }
    log = {
        **{f"at {at.name}": f"{at.later.log:.0f} bytes" for at in both},
        **{f"images in these rounds at {at.name}": f"+ {at.later.images:.0f} bytes" for at in both},
        "the newest sessions only": f"{large.newest.log / small.newest.log:.2f} x",
        **{
            f"images, straight after a checkpoint, at {at.name}": f"{at.first.log:.0f} + {at.first.images:.0f} bytes"
            for at in both
        },
        **{
            f"with images, {CHECKPOINT_SECONDS} s of this rate at {at.name}": f"{at.log_between_checkpoints:.0f}"
            for at in both
        },
    }
    space = {
        **{f"of the newest sessions only at {at.name}": f"{100 * at.hot_of_newest:.2f} %" for at in both},
        **{
            f"a session at {at.name}, row + indexes": (
                f"{at.bytes_of_rows / at.size:.0f} + {at.bytes_of_indexes / at.size:.0f} bytes"
            )
            for at in both
        },
    }
    wal = large.later.log / small.later.log
    hot = 100 * min(at.hot for at in both)
    return [
        Measurement(
            "P9",
            f"Postgres CPU per refresh, {names}",
            median(ratios),
            "x",
            1.15,
            processor,
            series={f"processor seconds at {at.name}": at.later.processor for at in both},
        ),
        Measurement(
            "P9",
            f"WAL per refresh, {names}",
            wal,
            "x",
            1.3,
            log,
            series={f"bytes of log at {at.name}": at.later.log for at in both}
            | {f"bytes of log with page images at {at.name}": at.log_between_checkpoints for at in both},
        ),
        Measurement("P9", "refreshes that write no index entry (HOT)", hot, "%", 99.9, space, at_least=True),
    ]


def _report_revocations(uptake: Uptake, memory: tuple[int, int]) -> list[Measurement]:
    what = f"{uptake.revoked} revocations"
    beside = {
        "to take them up": f"{uptake.look * 1000:.0f} ms",
        "what a process holds of them": f"{uptake.memory / 2**20:.0f} MiB",
        "memory of the service without and with them": " and ".join(f"{size / 2**20:.0f}" for size in memory) + " MiB",
    }
    building = {
        "the loop held meanwhile, at most": f"{uptake.build_held * 1000:.1f} ms",
        "lists": f"{uptake.lists}",
    }
    return [
        Measurement("P15", f"a fresh process takes up {what}: loop held", uptake.look_held * 1000, "ms", 25, beside),
        Measurement("P15", "the looks of five minutes after that: loop held", uptake.looks_held * 1000, "ms", 25),
        Measurement("P15", "it builds and signs the lists", uptake.build * 1000, "ms", 60, building),
    ]


def _report_pruning(pruning: Pruning, size: int) -> list[Measurement]:
    ratio = pruning.meanwhile.p99 / pruning.alone.p99
    beside = {
        "p99 meanwhile": f"{pruning.meanwhile.p99 * 1000:.1f} ms",
        "p99 alone": f"{pruning.alone.p99 * 1000:.1f} ms",
    }
    return [
        Measurement("prune", f"sessions deleted a second, of {_short(size)}", pruning.rate, "/s", 1000, at_least=True),
        Measurement("prune", "p99 of 100 refreshes a second meanwhile / alone", ratio, "x", 1.6, beside),
    ]


def _short(size: int) -> str:
    return f"{size / 1_000_000:g} M"


def _say(text: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')} {text}", flush=True)


def _refuse_without_room(sizes: Sequence[int]) -> None:
    folder = tempfile.gettempdir()
    needed, free = sum(sizes) * _BYTES_A_SESSION + _BYTES_BESIDES, shutil.disk_usage(folder).free
    if free < needed:
        sys.exit(
            f"bench-scale: {folder} has {free / 2**30:.0f} GiB free and this takes {needed / 2**30:.0f}; set TMPDIR to "
            'a folder with more, or measure less: make bench-scale SESSIONS="100000 1000000"'
        )


def main(asked: Sequence[str]) -> None:
    if not Path("/proc/self/stat").exists():
        sys.exit("bench-scale: needs a system that counts processor time in /proc")
    try:
        load.require_wrk()
    except frame.NotMeasured as missing:
        sys.exit(f"bench-scale: {missing}")
    sizes = sorted({int(text) for text in asked}) or SIZES
    if len(sizes) != 2 or sizes[0] < 10 * _BATCH:
        sys.exit('bench-scale: name two sizes, each 10000 or more: make bench-scale SESSIONS="1000000 10000000"')
    _refuse_without_room(sizes)
    start = time.monotonic()
    done = measure(sizes)
    for each in done:
        frame.show(each)
    frame.conclude(done, seconds=time.monotonic() - start, now=utc_now())


if __name__ == "__main__":
    main(sys.argv[1:])
