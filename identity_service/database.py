"""Connections to Postgres: the pool, units of work with their retries, and what counts as the database being away.

SQL lives in the `store.py` of each domain package; the schema in `migrations/`.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias, TypeVar

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from identity_service.errors import DatabaseUnavailable

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"
Record: TypeAlias = asyncpg.Record
Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
T = TypeVar("T")

SCHEMA_HEAD = "0009"
"""The newest revision in `migrations/versions`. A test holds it equal, so that serving need not import alembic."""

CONNECT_TIMEOUT = 5.0
"""Seconds in which a connection is there, be it opened or given back by somebody else."""
STATEMENT_TIMEOUT = 10.0
"""Seconds in which a statement is answered."""
ATTEMPTS = 4
"""How often a unit of work is tried when Postgres asks for it."""
PRUNE_BATCH = 1000
"""Most rows that are pruned by one statement, so that it never takes long."""
MINUTES = 300.0
"""The time limit, in seconds, of a statement that ends all that somebody has, while a request waits for it."""
HOURS = 24 * 3600.0
"""The time limit, in seconds, of a statement that may go through whole tables."""
_NAMED = {"application_name": "identity-service"}

_AWAY = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.ObjectNotInPrerequisiteStateError,
    # A pooler in transaction mode that keeps no prepared statements.
    asyncpg.DuplicatePreparedStatementError,
    asyncpg.InvalidSQLStatementNameError,
    # The schema is not there yet, or not any more: a deploy is under way.
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.InsufficientPrivilegeError,
)
_CONFLICTS = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError)


def lacks_schema(error: DatabaseUnavailable) -> bool:
    """Return whether a database that answers does not have the tables and columns of this release."""
    return isinstance(error.__cause__, asyncpg.UndefinedTableError | asyncpg.UndefinedColumnError)


def _unavailable(error: BaseException, text: str = "") -> DatabaseUnavailable:
    return DatabaseUnavailable(text, detail=f"{type(error).__name__}: {error}")


def normalise_url(url: str) -> str:
    """Accept the spellings that SQLAlchemy users have in their environment (`postgresql+asyncpg://`)."""
    scheme, separator, rest = url.partition("://")
    return scheme.partition("+")[0] + separator + rest


def affected(status: str) -> int:
    """Return how many rows a statement inserted, updated or deleted, of what `execute` returns."""
    return int(status.rpartition(" ")[2])


async def wait_briefly_for_locks(db: Connection) -> None:
    """Have the rest of a transaction wait for no lock longer than for an answer, before what may take `MINUTES`."""
    await db.execute(f"SET LOCAL lock_timeout = {int(STATEMENT_TIMEOUT * 1000)}; SET LOCAL statement_timeout = 0")


async def delete_expired(
    db: Connection, table: str, key: str, *, before: datetime, expired: str = "expires_at < $1"
) -> int:
    """Delete a batch of a table's rows; return how many went. What somebody else has locked stays for the next time.

    Args:
        table, key, expired: SQL of our own: the table, its primary key, and which rows are over at `before`, $1.
    """
    # An array, because some plans run the subquery of an IN again, and it skips what it has locked.
    statement = f"""
        DELETE FROM {table} WHERE {key} = ANY (ARRAY(
            SELECT {key} FROM {table} WHERE {expired} LIMIT $2 FOR UPDATE SKIP LOCKED
        ))
    """  # noqa: S608 - put together from constants of ours, see above
    return affected(await db.execute(statement, before, PRUNE_BATCH))


class StatementFailed(Exception):
    """Postgres refused a statement for a reason that is a mistake of ours. Says which, but not the row it was about."""


@dataclass(frozen=True, slots=True)
class Server:
    """What a server says of itself: its major version, its clock, and whether it takes writes."""

    version: int
    now: datetime
    read_only: bool


class _Held(NamedTuple):
    """A connection taken from the pool, and until when it is kept."""

    connection: "PoolConnectionProxy[asyncpg.Record]"
    until: float

    def is_open(self) -> bool:
        try:
            return not self.connection.is_closed()
        except asyncpg.InterfaceError:  # the pool has noticed before us, and taken it back
            return False


class _Lending:
    """Lends connections, first come, first served, and keeps those that come back clean at hand.

    The pool behind it takes longer to give out and take back a connection, by way of tasks and timers, than a refresh
    waits for Postgres, and serves those who wait in any order. It still opens, checks and closes every connection: each
    returns to it when something went wrong, and every half a minute.

    To open one takes longer than most statements do. So whoever finds none at hand gets the one that comes first, be it
    the new one or another that has come back. When one cannot be opened, it is tried again after a rest, and whoever
    waits may get one that comes back meanwhile; only when none is lent does somebody hear of the failure at once.
    """

    KEEP_SECONDS = 30.0
    REST_SECONDS = 1.0
    """From one that could not be opened to the next attempt, while others are lent."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._idle: deque[_Held] = deque()
        self._waiting: deque[asyncio.Future[_Held]] = deque()
        self._opening: set[asyncio.Task[None]] = set()
        self._held = 0
        self._keeps = True
        self._rests_until = 0.0

    @property
    def in_use(self) -> int:
        return self._held - len(self._idle)

    async def borrow(self) -> _Held:
        while self._idle:
            held = self._idle.pop()
            if held.is_open():
                return held
            await self._let_go(held)
        return await self._wait()

    async def give_back(self, held: _Held, *, clean: bool) -> None:
        """Take a connection back; `clean` says that nothing went wrong with it."""
        now = asyncio.get_running_loop().time()
        if not clean or now > held.until or not held.is_open() or held.connection.is_in_transaction():
            await self._let_go(held)
            return
        await self._pass_on(held)
        if self._idle and self._idle[0].until < now:  # those that are not needed any more are at this end
            await self._let_go(self._idle.popleft())

    async def close(self) -> None:
        """Return to the pool what is at hand, and from now on whatever comes back: it waits for all of it."""
        self._keeps = False
        await self._let_go_of_idle()
        await asyncio.gather(*self._opening, return_exceptions=True)

    async def renew(self) -> None:
        """Have every connection opened anew: each began with settings that a server has changed since."""
        await self._pool.expire_connections()
        await self._let_go_of_idle()

    async def _let_go_of_idle(self) -> None:
        while self._idle:
            await self._let_go(self._idle.popleft())

    async def _wait(self) -> _Held:
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[_Held] = loop.create_future()
        patience = loop.call_later(CONNECT_TIMEOUT, self._give_up, turn)
        self._waiting.append(turn)
        self._open_more()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(turn)
            elif turn.exception() is None:
                await self._pass_on(turn.result())  # its turn came in the same moment
            raise
        finally:
            patience.cancel()

    def _give_up(self, turn: "asyncio.Future[_Held]") -> None:
        if not turn.done():
            self._forget(turn)
            turn.set_exception(TimeoutError("no connection became free in time"))

    def _forget(self, turn: "asyncio.Future[_Held]") -> None:
        with suppress(ValueError):
            self._waiting.remove(turn)

    def _open_more(self) -> None:
        """Have as many opened as there are who wait, up to the size of the pool."""
        if self._held and asyncio.get_running_loop().time() < self._rests_until:
            return
        most = self._pool.get_max_size() - self._held
        while len(self._opening) < min(len(self._waiting), most):
            opening = asyncio.create_task(self._open())
            self._opening.add(opening)
            opening.add_done_callback(self._opened)

    def _opened(self, opening: "asyncio.Task[None]") -> None:
        self._opening.discard(opening)
        if not opening.cancelled():
            self._open_more()

    async def _open(self) -> None:
        """Take a connection from the pool for whoever waits longest, or tell them why there is none."""
        try:
            connection = await self._pool.acquire(timeout=CONNECT_TIMEOUT)
        except Exception as error:  # noqa: BLE001 - raised again where it is waited for
            if self._held:
                loop = asyncio.get_running_loop()
                self._rests_until = loop.time() + self.REST_SECONDS
                loop.call_later(self.REST_SECONDS, self._open_more)
            elif turn := self._next_turn():
                turn.set_exception(error)
        else:
            self._held += 1
            await self._pass_on(_Held(connection, asyncio.get_running_loop().time() + self.KEEP_SECONDS))

    async def _pass_on(self, held: _Held) -> None:
        """Give a connection to whoever waits longest, or keep it at hand."""
        if turn := self._next_turn():
            turn.set_result(held)
        elif self._keeps:
            self._idle.append(held)
        else:
            await self._let_go(held)

    async def _let_go(self, held: _Held) -> None:
        try:
            await self._pool.release(held.connection)
        finally:
            self._held -= 1
            self._open_more()

    def _next_turn(self) -> "asyncio.Future[_Held] | None":
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                return turn
        return None


class _Loan:
    """A connection for the length of a context, whose errors are ours from here on."""

    __slots__ = ("_held", "_lending")

    def __init__(self, lending: _Lending) -> None:
        self._lending = lending

    async def __aenter__(self) -> Connection:
        try:
            self._held = await self._lending.borrow()
        except (*_AWAY, asyncpg.PostgresError) as error:
            raise _unavailable(error) from error
        return self._held.connection

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        with suppress(*_AWAY, asyncpg.PostgresError):  # the pool closes what it cannot take back
            if isinstance(error, asyncpg.ReadOnlySQLTransactionError | asyncpg.QueryCanceledError):
                await self._lending.renew()
            await self._lending.give_back(self._held, clean=error is None)
        if isinstance(error, _CONFLICTS):
            raise _unavailable(error, "The request conflicted with another one; try again.") from error
        if isinstance(error, _AWAY):
            raise _unavailable(error) from error
        if isinstance(error, asyncpg.PostgresError):
            # Its own text goes on with the failing row, which may hold a password's hash.
            raise StatementFailed(f"{type(error).__name__}: {error.args[0] if error.args else ''}") from None


class Database:
    """A pool of connections to one Postgres.

    `connection()` is for single statements, each its own transaction; `transact()` for several that belong together, or
    for one that may get into another's way.
    """

    def __init__(self, pool: Pool, url: str) -> None:
        self._pool = pool
        self._lending = _Lending(pool)
        self._url = url

    @property
    def size(self) -> int:
        """Most connections there may be."""
        return self._pool.get_max_size()

    @property
    def in_use(self) -> int:
        """Connections that are lent at this moment."""
        return self._lending.in_use

    def connection(self) -> AbstractAsyncContextManager[Connection]:
        """Lend a connection.

        Raises:
            DatabaseUnavailable: Postgres cannot be reached, does not answer in time, lacks the schema, or wants the
                same done once more.
        """
        return _Loan(self._lending)

    async def close(self) -> None:
        """Return what is at hand to the pool."""
        await self._lending.close()

    async def transact(
        self, unit: Callable[[Connection], Awaitable[T]], *, attempts: int = ATTEMPTS, one_statement: bool = False
    ) -> T:
        """Run `unit` in one transaction, again from the start when Postgres asks for it (40001, 40P01).

        Args:
            attempts: 1 for what cannot be done twice, such as reading a stream.
            one_statement: `unit` is no more than that. It is its own transaction, and spares two round trips.

        Raises:
            DatabaseUnavailable: as of `connection`, after the last attempt.
        """
        for attempt in range(attempts):
            try:
                async with self.connection() as connection:
                    if one_statement:
                        return await unit(connection)
                    async with connection.transaction():
                        return await unit(connection)
            except DatabaseUnavailable as error:
                if attempt == attempts - 1 or not isinstance(error.__cause__, _CONFLICTS):
                    raise
        raise AssertionError("unreachable")  # pragma: no cover

    async def listen(self, channel: str, hear: Callable[[str], None]) -> None:
        """Call `hear` with the text of every notification, over a connection of its own, until that is lost.

        Only ever a hint: a pooler in transaction mode forwards none.
        """
        lost = asyncio.Event()
        try:
            connection = await asyncpg.connect(
                self._url, timeout=CONNECT_TIMEOUT, command_timeout=STATEMENT_TIMEOUT, server_settings=_NAMED
            )
            try:
                connection.add_termination_listener(lambda _: lost.set())
                await connection.add_listener(channel, lambda *event: hear(event[-1]))
                await lost.wait()
            finally:
                connection.terminate()
        except (*_AWAY, asyncpg.PostgresError) as error:
            raise _unavailable(error) from error

    async def hears(self, channel: str, *, within: float = 2.0) -> bool:
        """Say whether a notification on a channel of listeners reaches one, in seconds `within`."""
        heard = asyncio.Event()
        listening = asyncio.create_task(self.listen(channel, lambda _: heard.set()))
        try:
            async with asyncio.timeout(within):
                while not heard.is_set():  # listening begins at some moment of its own
                    async with self.connection() as connection:
                        await connection.execute("SELECT pg_notify($1, '')", channel)
                    await asyncio.sleep(0.05)
        except TimeoutError:
            return False
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
        return True

    async def server(self) -> Server:
        async with self.connection() as connection:
            row = await connection.fetchrow(
                """
                SELECT current_setting('server_version_num')::int / 10000 AS version, clock_timestamp() AS now,
                       current_setting('transaction_read_only')::boolean AS read_only
                """
            )
        assert row is not None, "it selects one row"
        return Server(row["version"], row["now"], row["read_only"])

    async def schema_revision(self) -> str | None:
        """Return the migration the schema stands at, None when there is no schema."""
        async with self.connection() as connection:
            try:
                revision: str | None = await connection.fetchval("SELECT version_num FROM alembic_version")
            except (asyncpg.UndefinedTableError, asyncpg.InsufficientPrivilegeError):
                return None
        return revision


_ARRAYS = {
    "bytea": (17, 1001),
    "int8": (20, 1016),
    "int4": (23, 1007),
    "timestamptz": (1184, 1185),
    "uuid": (2950, 2951),
}
"""Types whose arrays our statements take: the numbers of both in every Postgres (`pg_type.dat`)."""


async def _know_arrays(connection: Connection) -> None:
    """Tell a new connection about the arrays it will meet.

    It would ask the server about each, with a query that takes ten to twenty milliseconds, which the first refresh over
    this connection would wait for. Without this it still does.
    """
    with suppress(Exception):
        settings: Any = connection.get_settings()
        settings.register_data_types(
            {
                "oid": array,
                "ns": "pg_catalog",
                "name": f"_{name}",
                "kind": b"b",
                "basetype": None,
                "elemtype": element,
                "elemtype_name": name,
                "elemdelim": ",",
                "range_subtype": None,
                "attrtypoids": None,
            }
            for name, (element, array) in _ARRAYS.items()
        )


async def _keep_session(_: Connection) -> None:
    """We leave no session state behind, so a released connection needs no RESET round trip."""


@asynccontextmanager
async def open_database(url: str, *, pool_size: int, connect: bool = True) -> AsyncIterator[Database]:
    """Open a pool for as long as the context lasts.

    Args:
        url: a libpq connection URL; several hosts with `target_session_attrs` follow a failover.
        pool_size: most connections held at once.
        connect: whether the first connections are made at once, or not before somebody needs one.

    Raises:
        DatabaseUnavailable: the first connection failed.
    """
    try:
        pool = await asyncpg.create_pool(
            normalise_url(url),
            min_size=min(2, pool_size) if connect else 0,
            max_size=pool_size,
            max_inactive_connection_lifetime=300,
            timeout=CONNECT_TIMEOUT,
            command_timeout=STATEMENT_TIMEOUT,
            init=_know_arrays,
            reset=_keep_session,
            server_settings=_NAMED,
        )
    except (ValueError, asyncpg.ClientConfigurationError) as error:
        # Its text repeats parts of the URL, the password among them.
        raise DatabaseUnavailable(detail=f"the URL cannot be used: {type(error).__name__}") from None
    except (*_AWAY, asyncpg.PostgresError) as error:
        raise _unavailable(error) from error
    database = Database(pool, normalise_url(url))
    try:
        yield database
    finally:
        try:
            await database.close()
            await pool.close()
        finally:
            pool.terminate()
