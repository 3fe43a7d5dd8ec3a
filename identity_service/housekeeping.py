"""What a process does by itself while it serves: each piece of work repeats, and outlives whatever it stumbles over.

Next door: `app` starts it, `runtime` has what it works with.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from identity_service import audit, throttling
from identity_service.accounts import resets
from identity_service.accounts import store as account_store
from identity_service.audit import Actor, chain
from identity_service.clients import own_tokens
from identity_service.clients import store as clients
from identity_service.database import PRUNE_BATCH, Connection
from identity_service.errors import DatabaseUnavailable, HashingOverloaded
from identity_service.revocation import CHANNEL, MANY
from identity_service.runtime import Runtime
from identity_service.sessions import lifecycle
from identity_service.signing import recording
from identity_service.signing.keyring import CLOCK_SKEW, KeyState

log = logging.getLogger(__name__)

KEYRING_POLL_SECONDS = 2.0
"""What bounds how long a change of the keys made elsewhere takes to be in force here."""
PRUNE_SECONDS = 60.0
PRUNE_PAUSE_SECONDS = 0.1
"""Between two batches, so that deleting leaves the database to others."""
LEARN_SECONDS = 10.0
CHAIN_SECONDS = 1.0
PARTITION_SECONDS = 3600.0
LEARN_HASHES_SECONDS = 60.0
LOOK_SECONDS = 0.5
"""How long a revocation takes to be taken up when no notification tells of it."""
MEASURE_SECONDS = 2.0
LISTEN_AGAIN_SECONDS = 1.0
AGAIN_SECONDS = 1.0
"""Before what could not be done is tried again."""


@asynccontextmanager
async def running(runtime: Runtime) -> AsyncIterator[None]:
    """Keep house for as long as the context lasts."""
    heard = asyncio.Event()

    def hear(told: str) -> None:
        if told == MANY:
            runtime.revocations.doubt()
        heard.set()

    housekeeping: list[tuple[str, float, Callable[[], Awaitable[None]]]] = [
        ("keys", KEYRING_POLL_SECONDS, lambda: tend_keys(runtime)),
        ("pruning", PRUNE_SECONDS, lambda: prune_in_step(runtime)),
        ("listening", LISTEN_AGAIN_SECONDS, lambda: runtime.database.listen(CHANNEL, hear)),
        ("revocations", 0, lambda: hear_revocations(runtime, heard)),
        ("scopes", LEARN_SECONDS, lambda: learn_scopes(runtime)),
        ("audit chain", CHAIN_SECONDS, lambda: lengthen_chain(runtime)),
        ("audit partitions", PARTITION_SECONDS, lambda: tend_partitions(runtime)),
        ("metrics", MEASURE_SECONDS, lambda: measure(runtime)),
        ("password hashes", LEARN_HASHES_SECONDS, lambda: learn_hashes(runtime)),
    ]
    async with AsyncExitStack() as tasks:
        for what, seconds, work in housekeeping:
            await tasks.enter_async_context(repeating(what, seconds, work, runtime.metrics.recorded))
        yield


@asynccontextmanager
async def repeating(
    what: str, seconds: float, work: Callable[[], Awaitable[None]], listener: audit.Listener
) -> AsyncIterator[None]:
    """Do some work at once, and again that many seconds after it was done, for as long as the context lasts."""

    async def repeat() -> None:
        audit.listener.set(listener)
        waits_for = ""
        while True:
            pause = seconds
            try:
                await work()
            except DatabaseUnavailable as error:
                # Said once: what lasts, such as a privilege that is missing, would otherwise never be heard of.
                level = logging.DEBUG if error.detail == waits_for else logging.WARNING
                waits_for = error.detail
                log.log(level, "housekeeping.waits", extra={"what": what, "detail": error.detail})
                pause += AGAIN_SECONDS
            except Exception:
                # Housekeeping outlives whatever it stumbles over.
                log.exception("housekeeping.failed", extra={"what": what})
                pause += AGAIN_SECONDS
            else:
                waits_for = ""
            if task.cancelling():  # see below
                return
            await asyncio.sleep(pause)

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        # Again and again: on Python 3.11 some of what is waited for swallows a cancellation that meets its result.
        # Work that ends all the same is not begun anew.
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=1)


async def tend_keys(runtime: Runtime) -> None:
    now = runtime.now()
    promoted = await runtime.change_keys(lambda: runtime.keys.tend(now), now=now)
    if promoted is not None:
        runtime.keys.unrecorded.append(lambda db: recording.record_rotation(db, promoted, by=Actor("service"), now=now))
    # Keys rotate whether or not the database is there; what could not be written down is when it is back.
    while runtime.keys.unrecorded:
        record = runtime.keys.unrecorded.pop(0)
        try:
            async with runtime.database.connection() as db:
                await record(db)
        except BaseException:
            runtime.keys.unrecorded.insert(0, record)
            raise


async def prune_in_step(runtime: Runtime) -> None:
    """Prune, unless our clock is another than the database's: what one process deletes is gone for all of them."""
    ahead = runtime.now() - (await runtime.database.server()).now
    if abs(ahead) > CLOCK_SKEW:
        log.warning("pruning.clock_differs", extra={"seconds_ahead": round(ahead.total_seconds())})
        return
    await prune(runtime)


async def prune(runtime: Runtime) -> None:
    runtime.revocations.forget_expired(runtime.now())
    while True:
        async with runtime.database.connection() as db:
            went = [
                await work(db, now=runtime.now())
                for work in (lifecycle.prune, own_tokens.prune, resets.prune, throttling.prune)
            ]
        if max(went) < PRUNE_BATCH:
            return
        await asyncio.sleep(PRUNE_PAUSE_SECONDS)


async def lengthen_chain(runtime: Runtime) -> None:
    while True:
        if await runtime.database.transact(chain.lengthen) < chain.BATCH:
            return
        await asyncio.sleep(PRUNE_PAUSE_SECONDS)  # others have to be served, revocations among them


async def tend_partitions(runtime: Runtime) -> None:
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


async def learn_scopes(runtime: Runtime) -> None:
    async with runtime.database.connection() as db:
        await runtime.offered_scopes.look(db, of_clients=await clients.list_scopes(db))


async def learn_hashes(runtime: Runtime) -> None:
    """Look which kinds of password hashes are stored, so that no refusal is answered sooner than the slowest."""
    async with runtime.database.connection() as db:
        hashes = await account_store.sample_hashes(db, unlike=runtime.passwords.own_kind)
    with suppress(HashingOverloaded):  # too busy now; the next look is soon
        await runtime.passwords.learn(hashes)


async def hear_revocations(runtime: Runtime, heard: asyncio.Event) -> None:
    """Take up revocations, then wait for a notification or half a second."""
    heard.clear()
    await runtime.revocations.look(runtime.now())
    # Not `wait_for`: on Python 3.11 it swallows a cancellation that meets the event, and the service would never stop.
    with suppress(TimeoutError):
        async with asyncio.timeout(LOOK_SECONDS):
            await heard.wait()


async def measure(runtime: Runtime) -> None:
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
