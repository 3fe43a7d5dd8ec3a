"""The one place where the parts meet: `create_app` wires them, `from_environment` does so for a worker process."""

import asyncio
import gc
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI

from identity_service import housekeeping, logs
from identity_service import settings as configuration
from identity_service.accounts.argon2id import Argon2Cost
from identity_service.accounts.breaches import BreachCheck
from identity_service.accounts.hashing import PasswordHashing
from identity_service.accounts.roles import OfferedScopes
from identity_service.database import open_database
from identity_service.errors import DatabaseUnavailable
from identity_service.metrics import Metrics
from identity_service.revocation.feed import RevocationFeed
from identity_service.revocation.status_lists import StatusLists
from identity_service.runtime import Runtime
from identity_service.sessions.rotation import Rotations
from identity_service.settings import Settings
from identity_service.shell import utc_now
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

YOUNG_OBJECTS = 3_000
"""How many more objects there must be before the garbage collector looks at the young ones."""
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
            # A worker that takes the place of another one while the database is away is there, and not ready.
            async with open_database(url, pool_size=settings.database_pool_size, connect=False) as database:
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
                with suppress(DatabaseUnavailable):  # housekeeping does this once the database is there
                    await revocations.look(now())
                    await housekeeping.learn_hashes(runtime)
                async with housekeeping.running(runtime):
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
    if settings.password_grant == "off":  # noqa: S105 - a switch
        docs.describe_no_login(app)
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

    It also runs less often: what a request allocates is freed by reference counting.
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
