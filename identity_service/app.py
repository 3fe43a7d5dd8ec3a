"""The one place where the parts meet: `create_app` wires them, `from_environment` does so for a worker process."""

import asyncio
import gc
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import datetime
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI

from identity_service import logs, throttling
from identity_service import settings as configuration
from identity_service.accounts import resets
from identity_service.accounts import store as account_store
from identity_service.accounts.argon2id import Argon2Cost
from identity_service.accounts.breaches import BreachCheck
from identity_service.accounts.hashing import PasswordHashing
from identity_service.accounts.roles import OfferedScopes
from identity_service.audit import Actor, chain
from identity_service.clients import own_tokens
from identity_service.clients import store as clients
from identity_service.database import Connection, open_database
from identity_service.errors import DatabaseUnavailable, HashingOverloaded
from identity_service.metrics import Metrics
from identity_service.revocation import CHANNEL
from identity_service.revocation.feed import RevocationFeed
from identity_service.revocation.status_lists import StatusLists
from identity_service.runtime import Runtime
from identity_service.sessions import lifecycle
from identity_service.sessions.rotation import Rotations
from identity_service.settings import Settings
from identity_service.shell import utc_now
from identity_service.signing import recording
from identity_service.signing.keyring import KeyState
from identity_service.signing.live import LiveKeyring, open_keys
from identity_service.tokens.rounds import SigningRounds
from identity_service.web import (
    accounts,
    admin_audit,
    admin_clients,
    admin_keys,
    admin_roles,
    admin_users,
    docs,
    health,
    introspection,
    login,
    metadata,
    problems,
    revocation,
    sessions,
    token,
)
from identity_service.web import status_lists as status_list_routes
from identity_service.web.direct import direct_routes
from identity_service.web.middleware import Edge, EdgePolicy
from identity_service.web.proxies import TrustedProxies

log = logging.getLogger(__name__)

KEYRING_POLL_SECONDS = 2.0
PRUNE_SECONDS = 60.0
PRUNE_PAUSE_SECONDS = 0.1
LEARN_SECONDS = 10.0
CHAIN_SECONDS = 1.0
PARTITION_SECONDS = 3600.0
LEARN_HASHES_SECONDS = 60.0
LOOK_SECONDS = 0.5
MEASURE_SECONDS = 2.0
YOUNG_OBJECTS = 3_000
LISTEN_AGAIN_SECONDS = 1.0
AGAIN_SECONDS = 1.0
"""After housekeeping that could not be done."""
_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


def create_app(settings: Settings, keys: LiveKeyring, *, now: Callable[[], datetime] = utc_now) -> FastAPI:
    """Wire a service.

    Args:
        settings: must have a `database_url`.
        now: the clock of everything below.
    """
    metrics = Metrics()
    cost = Argon2Cost.of(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        assert settings.database_url is not None, "the caller names a database"
        threads = max(1, _cores() // settings.workers)
        passwords = PasswordHashing(cost, threads=threads, observe=metrics.hashed)
        url = settings.database_url.get_secret_value()
        try:
            async with open_database(url, pool_size=settings.database_pool_size) as database:
                revocations = RevocationFeed(database)
                status_lists = StatusLists(revocations, keys, issuer=settings.issuer_url)
                breaches = BreachCheck(settings.breach_check_url) if settings.breach_check_url else None
                scopes = OfferedScopes()
                runtime = Runtime(
                    settings=settings,
                    database=database,
                    rotations=Rotations(database),
                    keys=keys,
                    signing=SigningRounds(),
                    revocations=revocations,
                    status_lists=status_lists,
                    passwords=passwords,
                    breaches=breaches,
                    offered_scopes=scopes,
                    metrics=metrics,
                    now=now,
                )
                app.state.runtime = runtime
                _stop_gently(app, runtime)
                with suppress(DatabaseUnavailable):  # then it is the first thing done when the database is there
                    await revocations.look(now())
                    await _learn_hashes(runtime)
                heard = asyncio.Event()
                housekeeping: list[tuple[str, float, Callable[[], Awaitable[None]]]] = [
                    ("keys", KEYRING_POLL_SECONDS, lambda: _tend_keys(runtime)),
                    ("pruning", PRUNE_SECONDS, lambda: _prune(runtime)),
                    ("listening", LISTEN_AGAIN_SECONDS, lambda: database.listen(CHANNEL, heard.set)),
                    ("revocations", 0, lambda: _look(runtime, heard)),
                    ("scopes", LEARN_SECONDS, lambda: _learn(runtime)),
                    ("audit chain", CHAIN_SECONDS, lambda: _chain(runtime)),
                    ("audit partitions", PARTITION_SECONDS, lambda: _partition(runtime)),
                    ("metrics", MEASURE_SECONDS, lambda: _measure(runtime)),
                    ("password hashes", LEARN_HASHES_SECONDS, lambda: _learn_hashes(runtime)),
                ]
                async with AsyncExitStack() as tasks:
                    for what, seconds, work in housekeeping:
                        await tasks.enter_async_context(_repeating(what, seconds, work))
                    yield
        finally:
            passwords.close()

    own = (login, accounts, sessions)
    administration = (admin_users, admin_roles, admin_clients, admin_keys, admin_audit)
    described = settings.docs == "on"
    parts = (
        *(token, revocation, introspection, *own, *administration, metadata, status_list_routes, health),
        *((docs,) if described else ()),
    )
    app = FastAPI(
        title="Identity service",
        version="1",
        lifespan=lifespan,
        # It would record what failed validation, passwords among it, and asks for a provider on each request.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        openapi_url="/openapi.json" if described else None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        routes=[route for part in parts for route in part.router.routes],
    )
    app.state.draining = False
    app.state.metrics = metrics
    problems.install(app)
    # Outside of everything, the framework's own middleware too.
    app.middleware_stack = Edge(app, _edge_policy(settings), metrics, direct_routes(app.routes))
    return app


def from_environment() -> Edge:
    """Wire a service for a worker process, which gets nothing but the environment."""
    settings = configuration.load().settings
    logs.configure(settings.log_level)
    _stop_with_parent()
    app = create_app(settings, open_keys(settings))
    keep_what_is_loaded()
    return edge_of(app)


def edge_of(app: FastAPI) -> Edge:
    """Return what a server calls: the edge by itself, which needs nothing of the framework's way to it."""
    assert isinstance(app.middleware_stack, Edge), "`create_app` put it there"
    return app.middleware_stack


def _cores() -> int:
    """Return how many cores this process may run on, where the system tells; a container may have few of many."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_what_is_loaded() -> None:
    """Let the garbage collector leave alone what stays anyway: looking through all modules holds every request up.

    Nor does it look after every other request any more: what a request makes goes when nobody refers to it.
    """
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


def _stop_with_parent() -> None:
    """Stop when the parent is gone: a worker that outlived it would keep the address, and no service could start."""
    parent = multiprocessing.parent_process()
    if parent is None:  # run by a server other than ours
        return

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()


def _edge_policy(settings: Settings) -> EdgePolicy:
    own = urlsplit(settings.issuer_url).hostname or ""
    bound = () if settings.host in ("0.0.0.0", "::") else (settings.host,)  # noqa: S104 - compared, not bound
    hosts = frozenset(name.lower() for name in (own, *_LOOPBACK_HOSTS, *bound, *settings.allowed_hosts))
    return EdgePolicy(
        cookie=login.cookie_name(settings),
        hosts=hosts,
        origins=settings.origins,
        strict_transport=settings.secure_cookies,
        proxies=TrustedProxies(settings.trusted_proxies),
    )


@asynccontextmanager
async def _repeating(what: str, seconds: float, work: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Do some housekeeping at once, and again that long after it was done, for as long as the context lasts."""

    async def repeat() -> None:
        waits_for = ""
        while True:
            try:
                await work()
            except DatabaseUnavailable as error:
                # Said once: what lasts, such as a privilege that is missing, would otherwise never be heard of.
                level = logging.DEBUG if error.detail == waits_for else logging.WARNING
                waits_for = error.detail
                log.log(level, "housekeeping.waits", extra={"what": what, "detail": error.detail})
                await asyncio.sleep(AGAIN_SECONDS)
            except Exception:
                # Housekeeping outlives whatever it stumbles over.
                log.exception("housekeeping.failed", extra={"what": what})
                await asyncio.sleep(AGAIN_SECONDS)
            else:
                waits_for = ""
            await asyncio.sleep(seconds)

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        # Again and again: on Python 3.11 some of what is waited for swallows a cancellation that meets its result.
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=1)


async def _tend_keys(runtime: Runtime) -> None:
    now = runtime.now()
    promoted = await runtime.change_keys(lambda: runtime.keys.tend(now), now=now)
    if promoted is not None:
        runtime.keys.unrecorded.append((promoted, now))
    # Keys rotate whether or not the database is there; what could not be written down is when it is back.
    while runtime.keys.unrecorded:
        key, rotated_at = runtime.keys.unrecorded.pop(0)
        try:
            async with runtime.database.connection() as db:
                await recording.record_rotation(db, key, by=Actor("service"), now=rotated_at)
        except BaseException:
            runtime.keys.unrecorded.insert(0, (key, rotated_at))
            raise


async def _prune(runtime: Runtime) -> None:
    runtime.revocations.forget_expired(runtime.now())
    while True:
        async with runtime.database.connection() as db:
            went = await lifecycle.prune(db, now=runtime.now())
            went += await own_tokens.prune(db, now=runtime.now())
            went += await resets.prune(db, now=runtime.now())
            tallies = await throttling.prune(db, now=runtime.now())
        if went < lifecycle.PRUNE_BATCH and tallies < throttling.PRUNE_BATCH:
            return
        await asyncio.sleep(PRUNE_PAUSE_SECONDS)


async def _chain(runtime: Runtime) -> None:
    while await runtime.database.transact(chain.lengthen) == chain.BATCH:
        pass


async def _partition(runtime: Runtime) -> None:
    now, retention = runtime.now(), runtime.settings.audit_retention
    async with runtime.database.connection() as db:
        if not await chain.add_partitions(db, now=now):
            log.warning("audit.partition_missing")
    if retention:

        async def drop(db: Connection) -> list[str]:
            older_than = await chain.oldest_kept(db, retention, now=now)
            return await chain.drop_partitions(db, older_than=older_than, by=Actor("service"), now=now)

        for name in await runtime.database.transact(drop):
            log.info("audit.partition_dropped", extra={"partition": name})


async def _learn(runtime: Runtime) -> None:
    async with runtime.database.connection() as db:
        await runtime.offered_scopes.look(db, of_clients=await clients.list_scopes(db))


async def _learn_hashes(runtime: Runtime) -> None:
    """Look which kinds of password hashes are stored, so that no refusal is answered sooner than the slowest."""
    async with runtime.database.connection() as db:
        hashes = await account_store.sample_hashes(db, unlike=runtime.passwords.own_kind)
    with suppress(HashingOverloaded):  # too busy now; the next look is soon
        await runtime.passwords.learn(hashes)


async def _look(runtime: Runtime, heard: asyncio.Event) -> None:
    """Take up revocations, then wait for a notification or half a second."""
    heard.clear()
    await runtime.revocations.look(runtime.now())
    # Not `wait_for`: on Python 3.11 it swallows a cancellation that meets the event, and the service would never stop.
    with suppress(TimeoutError):
        async with asyncio.timeout(LOOK_SECONDS):
            await heard.wait()


async def _measure(runtime: Runtime) -> None:
    now = runtime.now()
    states = dict.fromkeys((state.value for state in KeyState), 0)
    age = 0.0
    for status in runtime.keys.current.statuses(now):
        states[status.state.value] += 1
        if status.state is KeyState.ACTIVE and status.key.signs_from is not None:
            age = (now - status.key.signs_from).total_seconds()
    runtime.metrics.looked(
        hash_queue=runtime.passwords.waiting,
        pool_size=runtime.database.size,
        pool_in_use=runtime.database.in_use,
        followers=runtime.revocations.followers,
        keys=states,
        active_key_age=age,
    )


def _stop_gently(app: FastAPI, runtime: Runtime) -> None:
    """On a signal, turn `/readyz` and end the streams; uvicorn, which closes its listener at once, stops later."""
    loop = asyncio.get_running_loop()
    wait = runtime.settings.drain.total_seconds()
    for number, seconds in ((signal.SIGTERM, wait), (signal.SIGINT, 0.0)):
        stop = signal.getsignal(number)
        if getattr(stop, "__name__", "") != "handle_exit":  # not run by uvicorn
            continue

        def gently(number: int, frame: FrameType | None, *, stop: Any = stop, seconds: float = seconds) -> None:
            app.state.draining = True
            loop.call_soon_threadsafe(runtime.revocations.close)
            loop.call_soon_threadsafe(loop.call_later, seconds, stop, number, frame)

        signal.signal(number, gently)
