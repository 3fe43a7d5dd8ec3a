"""The schema goes up, down and up again; every statement prepares against it; a lost database is one error."""

import asyncio
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import asyncpg
import pytest
from alembic import command
from alembic.script import ScriptDirectory

import identity_service
from identity_service import database as database_module
from identity_service.cli.migrate import alembic_config, upgrade
from identity_service.database import ATTEMPTS, SCHEMA_HEAD, Database, open_database
from identity_service.errors import DatabaseUnavailable, UserNotFound


def statements() -> Iterator[tuple[str, str]]:
    """Find every SQL constant of every store."""
    for module in pkgutil.walk_packages(identity_service.__path__, "identity_service."):
        if module.name.endswith(".store"):
            for name, value in vars(importlib.import_module(module.name)).items():
                if name.isupper() and isinstance(value, str) and " " in value and not name.startswith("_"):
                    yield f"{module.name}.{name}", value


@pytest.mark.parametrize(("name", "sql"), list(statements()), ids=lambda value: value if "." in value else "")
async def test_every_statement_prepares_against_the_schema_without_a_question(database_url, name, sql):
    """The library asks the server about a type it does not know: on each new connection, for 10 to 20 ms."""
    asked: list[str] = []
    async with open_database(database_url, pool_size=1) as database, database.connection() as db:
        db.add_query_logger(lambda query: asked.append(query.query))
        prepared = await db.prepare(sql)
        assert prepared.get_query() == sql, name
    assert asked == [], "is there an array of a type that is not in database._ARRAYS?"


def test_there_are_statements_to_prepare():
    assert len(list(statements())) >= 80


async def shape(url: str) -> list[str]:
    connection = await asyncpg.connect(url)
    rows = await connection.fetch(
        "SELECT table_name || '.' || column_name || ' ' || data_type || ' ' || is_nullable AS line"
        " FROM information_schema.columns WHERE table_schema = 'public'"
        " UNION ALL SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'"
        " UNION ALL SELECT conrelid::regclass || ' ' || pg_get_constraintdef(oid) FROM pg_constraint"
        "  WHERE connamespace = 'public'::regnamespace ORDER BY line"
    )
    await connection.close()
    return [row["line"] for row in rows]


async def scattering(url: str) -> str:
    connection = await asyncpg.connect(url)
    source: str = await connection.fetchval("SELECT prosrc FROM pg_proc WHERE proname = 'next_status_index'")
    await connection.close()
    return source


def test_the_schema_goes_up_and_down_and_up_again(new_database: Callable[[str], str]):
    url = new_database("up_down_up")
    upgrade(url)
    first, scattered = asyncio.run(shape(url)), asyncio.run(scattering(url))
    command.downgrade(alembic_config(url), "base")
    assert [line for line in asyncio.run(shape(url)) if "alembic_version" not in line] == []
    upgrade(url)
    assert asyncio.run(shape(url)) == first
    assert any(line.startswith("sessions.generation") for line in first)
    assert asyncio.run(scattering(url)) != scattered, "every installation scatters its status indexes in its own way"


def test_sessions_from_before_there_were_status_lists_get_an_index_of_their_own(new_database: Callable[[str], str]):
    """The table is not written anew, which would keep everybody out for as long as it took."""

    async def ask(sql: str) -> Any:
        connection = await asyncpg.connect(url)
        found = await connection.fetchval(sql)
        await connection.close()
        return found

    url = new_database("sessions_before")
    upgrade(url, "0001")
    asyncio.run(
        ask("INSERT INTO users (id, username, password_hash, password_changed_at, created_at)"
            " VALUES (gen_random_uuid(), 'alice', '', now(), now())")
    )  # fmt: skip
    begin = """
        INSERT INTO sessions (id, user_id, client_id, scope, amr, authenticated_at, password_changed_at, rotated_at,
                              expires_at)
        SELECT gen_random_uuid(), users.id, '', '{}', '{}', now(), now(), now(), now()
          FROM users, generate_series(1, 12000)
    """
    asyncio.run(ask(begin))
    file = asyncio.run(ask("SELECT pg_relation_filenode('sessions')"))
    upgrade(url, "0003")
    asyncio.run(ask(begin))
    upgrade(url)
    assert asyncio.run(ask("SELECT count(DISTINCT status_index) FROM sessions")) == 24_000
    assert asyncio.run(ask("SELECT pg_relation_filenode('sessions')")) == file


def test_building_indexes_can_be_interrupted_and_run_again(new_database: Callable[[str], str]):
    """It waits for whoever reads, as a backup does; when somebody ends it there, the next run begins anew."""

    async def ask(sql: str) -> Any:
        connection = await asyncpg.connect(url)
        found = await connection.fetchval(sql)
        await connection.close()
        return found

    async def interrupt() -> None:
        backup = await asyncpg.connect(url)
        snapshot = backup.transaction(isolation="repeatable_read")
        await snapshot.start()
        await backup.fetchval("SELECT count(*) FROM users")
        program = [sys.executable, "-m", "identity_service", "migrate"]
        run = await asyncio.create_subprocess_exec(*program, env={"DATABASE_URL": url}, stderr=subprocess.DEVNULL)
        cancel = """
            SELECT pg_cancel_backend(pid) FROM pg_stat_activity
             WHERE query LIKE 'CREATE INDEX CONCURRENTLY%' AND wait_event_type = 'Lock'
        """
        for _ in range(200):
            await asyncio.sleep(0.1)
            if await ask(cancel):
                break
        assert await asyncio.wait_for(run.wait(), 20) != 0
        await snapshot.rollback()
        await backup.close()

    url = new_database("interrupted")
    upgrade(url, "0007")
    asyncio.run(interrupt())
    invalid = "SELECT count(*) FROM pg_index WHERE NOT indisvalid"
    assert asyncio.run(ask(invalid)) == 1
    upgrade(url)
    assert asyncio.run(ask(invalid)) == 0
    assert asyncio.run(ask("SELECT version_num FROM alembic_version")) == SCHEMA_HEAD


def test_roles_that_users_had_before_roles_gave_scopes_exist_afterwards(new_database: Callable[[str], str]):
    """Nobody loses a role by the migration; `admin` is built in and not in the table."""

    async def ask(sql: str) -> list[tuple[str, list[str]]]:
        connection = await asyncpg.connect(url)
        rows = await connection.fetch(sql)
        await connection.close()
        return [tuple(row) for row in rows]

    url = new_database("roles_before")
    upgrade(url, "0002")
    users = "INSERT INTO users (id, username, password_hash, password_changed_at, roles, created_at) VALUES "
    for username, roles in (("alice", "{admin,clerk}"), ("bob", "{clerk,driver}")):
        asyncio.run(ask(f"{users} (gen_random_uuid(), '{username}', '', now(), '{roles}', now())"))
    upgrade(url)
    assert asyncio.run(ask("SELECT name, scopes FROM roles ORDER BY name")) == [("clerk", []), ("driver", [])]


def test_the_head_that_serving_expects_is_the_newest_migration(migrated):
    scripts = ScriptDirectory.from_config(alembic_config(migrated))
    assert scripts.get_heads() == [SCHEMA_HEAD]


def test_two_deploys_that_migrate_at_once_migrate_once(new_database: Callable[[str], str]):
    url = new_database("two_deploys")
    program = [sys.executable, "-m", "identity_service", "migrate"]
    runs = [subprocess.Popen(program, env={"DATABASE_URL": url}, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for run in runs:
        output, _ = run.communicate(timeout=60)
        assert run.returncode == 0, output
    assert asyncio.run(shape(url))


async def test_a_server_that_is_away_is_one_error(tmp_path):
    with pytest.raises(DatabaseUnavailable) as refused:
        async with open_database(f"postgresql://nobody:secret@/x?host={tmp_path}", pool_size=2):
            pytest.fail("there is no server")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url", ["mysql://x/y", "postgresql://[bad", "postgresql+asyncpg://x:notaport/y"])
async def test_a_url_that_is_none_is_one_error(url):
    with pytest.raises(DatabaseUnavailable):
        async with open_database(url, pool_size=2):
            pytest.fail("that is no URL")


async def test_the_spelling_of_sqlalchemy_users_is_understood(database_url):
    async with open_database(database_url.replace("postgresql://", "postgresql+asyncpg://"), pool_size=1) as database:
        assert await database.schema_revision() == SCHEMA_HEAD


async def test_a_connection_that_was_cut_is_unavailable_once_and_then_replaced(database_url):
    async with open_database(database_url, pool_size=1) as database:
        with pytest.raises(DatabaseUnavailable):
            async with database.connection() as db:
                await db.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        assert await database.schema_revision() == SCHEMA_HEAD


async def test_a_conflict_is_tried_again_and_then_given_up(database_url):
    attempts = 0

    async def conflicting(db):
        nonlocal attempts
        attempts += 1
        await db.execute("DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$")

    async with open_database(database_url, pool_size=1) as database:
        for most, one_statement in ((ATTEMPTS, False), (1, False), (ATTEMPTS, True)):
            attempts = 0
            with pytest.raises(DatabaseUnavailable):
                await database.transact(conflicting, attempts=most, one_statement=one_statement)
            assert attempts == most


async def test_a_conflict_outside_of_a_transaction_of_ours_is_unavailability_too(database_url):
    async with open_database(database_url, pool_size=1) as database:
        with pytest.raises(DatabaseUnavailable, match="try again"):
            async with database.connection() as db:
                await db.execute("DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40P01'; END $$")
        assert await database.schema_revision() == SCHEMA_HEAD


async def test_what_is_away_for_another_reason_is_not_tried_again(database_url):
    attempts = 0

    async def away(db):
        nonlocal attempts
        attempts += 1
        await db.execute("SELECT 1 FROM a_table_of_a_later_release")

    async with open_database(database_url, pool_size=1) as database:
        with pytest.raises(DatabaseUnavailable):
            await database.transact(away)
    assert attempts == 1


async def test_a_connection_that_is_lost_before_it_listens_is_unavailability(database_url, monkeypatch):
    async def cut(self: Any, *_: Any) -> None:
        self.terminate()
        await self.execute("LISTEN a_channel_of_its_own")

    monkeypatch.setattr(asyncpg.Connection, "add_listener", cut)
    async with open_database(database_url, pool_size=1) as database:
        with pytest.raises(DatabaseUnavailable):
            await database.listen("a_channel_of_its_own", lambda _: None)


async def test_one_statement_is_its_own_transaction(database_url):
    async def unit(db):
        return db.is_in_transaction(), await db.fetchval("SELECT 1")

    async with open_database(database_url, pool_size=1) as database:
        assert await database.transact(unit, one_statement=True) == (False, 1)
        assert await database.transact(unit) == (True, 1)


async def test_a_deadlock_is_resolved_by_trying_again(database_url):
    """Two transactions that take two locks in opposite order both end well."""
    turns = asyncio.Barrier(2)
    tried = [0, 0]

    async def locking(who: int) -> None:
        async def unit(db):
            tried[who] += 1
            first, second = (1, 2) if who == 0 else (2, 1)
            await db.execute("SELECT pg_advisory_xact_lock($1)", first)
            if tried[who] == 1:
                await turns.wait()
            await db.execute("SELECT pg_advisory_xact_lock($1)", second)

        await database.transact(unit)

    async with open_database(database_url, pool_size=2) as database:
        await asyncio.gather(locking(0), locking(1))
    assert sum(tried) == 3


# Lending


async def test_whoever_waits_longest_for_a_connection_is_served_first(database_url):
    served: list[int] = []

    async def use(number: int) -> None:
        async with database.connection() as db:
            served.append(number)
            await db.fetchval("SELECT pg_sleep(0.001)")

    async with open_database(database_url, pool_size=2) as database:
        await asyncio.gather(*(use(number) for number in range(50)))
        assert database.in_use == 0
    assert served == list(range(50))


async def test_waiting_for_a_connection_ends_and_harms_nobody(database_url, monkeypatch):
    monkeypatch.setattr(database_module, "CONNECT_TIMEOUT", 0.05)
    async with open_database(database_url, pool_size=1) as database:
        async with database.connection():
            with pytest.raises(DatabaseUnavailable):
                await database.schema_revision()
        assert await database.schema_revision() == SCHEMA_HEAD


@pytest.mark.parametrize("more_wait", [False, True])
async def test_a_turn_that_comes_to_somebody_who_has_left_goes_to_the_next(database_url, more_wait):
    async with open_database(database_url, pool_size=1) as database:
        async with database.connection():
            leaving = asyncio.create_task(database.schema_revision())
            await asyncio.sleep(0)
            staying = [asyncio.create_task(database.schema_revision())] if more_wait else []
            await asyncio.sleep(0)
        leaving.cancel()  # in the very moment in which it got the connection
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert await asyncio.gather(*staying, database.schema_revision()) == [SCHEMA_HEAD] * (1 + more_wait)
        assert database.in_use == 0


async def test_somebody_who_leaves_the_queue_is_passed_over(database_url):
    async with open_database(database_url, pool_size=1) as database:
        async with database.connection():
            leaving = asyncio.create_task(database.schema_revision())
            staying = asyncio.create_task(database.schema_revision())
            await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.sleep(0)
        assert await staying == SCHEMA_HEAD


async def test_nobody_overtakes_whoever_waits_when_a_connection_went_back_to_the_pool(database_url):
    """As it does after every refusal; whoever was refused comes again at once, as a wrong secret that is counted."""
    served: list[str] = []

    async def use(who: str, times: int) -> None:
        for _ in range(times):
            with suppress(UserNotFound):
                async with database.connection():
                    served.append(who)
                    await asyncio.sleep(0)
                    raise UserNotFound

    async with open_database(database_url, pool_size=1) as database:
        keen = asyncio.create_task(use("keen", 20))
        await asyncio.sleep(0)
        await use("patient", 1)
        assert served == ["keen", "patient"]
        await keen
        assert database.in_use == 0


@pytest.mark.parametrize("more_wait", [False, True])
async def test_a_connection_that_is_opened_for_somebody_who_has_left_is_not_lost(database_url, more_wait):
    async with open_database(database_url, pool_size=1) as database:
        waiting: list[asyncio.Task[str | None]] = []
        with suppress(UserNotFound):
            async with database.connection():
                waiting = [asyncio.create_task(database.schema_revision()) for _ in range(1 + more_wait)]
                await asyncio.sleep(0)
                raise UserNotFound
        waiting[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        assert await asyncio.gather(*waiting[1:], database.schema_revision()) == [SCHEMA_HEAD] * (1 + more_wait)
        assert database.in_use == 0


async def test_a_connection_that_was_lost_while_nobody_had_it_is_replaced_unnoticed(database_url):
    async with open_database(database_url, pool_size=2) as database:
        async with database.connection() as db:
            pid = await db.fetchval("SELECT pg_backend_pid()")
        killer = await asyncpg.connect(database_url)
        await killer.execute("SELECT pg_terminate_backend($1)", pid)
        while await killer.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pid):
            await killer.execute("SELECT pg_sleep(0.01)")
        await killer.close()
        await asyncio.sleep(0.1)  # until we have noticed, too
        assert await asyncio.gather(*(database.schema_revision() for _ in range(4))) == [SCHEMA_HEAD] * 4


async def test_connections_are_given_back_to_the_pool_after_a_while(database_url, monkeypatch):
    """So that it can close those that are old, or not needed any more."""
    async with open_database(database_url, pool_size=3) as database:
        pool = database._pool
        await asyncio.gather(*(database.schema_revision() for _ in range(9)))
        assert pool.get_idle_size() == 0
        monkeypatch.setattr(database_module._Lending, "KEEP_SECONDS", -1.0)
        for _ in range(3):
            async with database.connection():
                pass
        monkeypatch.undo()
        assert database.in_use == 0
    assert pool.is_closing()


async def test_a_transaction_that_was_left_open_does_not_reach_the_next(database_url):
    async with open_database(database_url, pool_size=1) as database:
        async with database.connection() as db:
            await db.execute("BEGIN")
        async with database.connection() as db:
            assert not db.is_in_transaction()


async def test_whoever_waits_for_connections_that_are_lost_gets_new_ones(database_url):
    async with open_database(database_url, pool_size=2) as database:
        wrong = database.connection()
        async with database.connection() as db, wrong as other:
            waiting = [asyncio.create_task(database.schema_revision()) for _ in range(4)]
            await asyncio.sleep(0)
            for lost in (db, other):
                await lost.close()
        assert await asyncio.gather(*waiting) == [SCHEMA_HEAD] * 4


async def test_a_connection_that_comes_back_after_the_end_keeps_nobody_waiting(database_url):
    returned = asyncio.Event()

    async def use() -> None:
        async with database.connection() as db:
            using.set()
            await returned.wait()
            await db.fetchval("SELECT 1")

    using = asyncio.Event()
    async with open_database(database_url, pool_size=2) as database:
        task = asyncio.create_task(use())
        await using.wait()
        asyncio.get_running_loop().call_later(0.05, returned.set)
    await task


def opening_later(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Let no connection be opened until the event is set."""
    acquire, may_open = asyncpg.Pool.acquire, asyncio.Event()

    async def wait(pool: Any, **how: Any) -> Any:
        await may_open.wait()
        return await acquire(pool, **how)

    monkeypatch.setattr(asyncpg.Pool, "acquire", wait)
    return may_open


async def test_whoever_waits_for_a_new_connection_takes_one_that_comes_back_before_it(database_url, monkeypatch):
    async with open_database(database_url, pool_size=2) as database:
        async with database.connection() as first:
            may_open = opening_later(monkeypatch)
            pid = first.get_server_pid()
            waiting = asyncio.create_task(_pid_of(database))
            await asyncio.sleep(0.01)
        assert await asyncio.wait_for(waiting, 1) == pid
        may_open.set()
        async with database.connection() as one, database.connection() as other:
            assert one.get_server_pid() != other.get_server_pid()


async def _pid_of(database: Database) -> int:
    async with database.connection() as db:
        return db.get_server_pid()


async def test_who_waits_for_a_connection_hears_why_there_is_none_and_the_next_gets_another_try(
    database_url, monkeypatch
):
    acquire = asyncpg.Pool.acquire

    async def refuse_once(*_: Any, **__: Any) -> Any:
        monkeypatch.setattr(asyncpg.Pool, "acquire", acquire)
        raise ConnectionRefusedError("nobody listens")

    async with open_database(database_url, pool_size=1) as database:
        monkeypatch.setattr(asyncpg.Pool, "acquire", refuse_once)
        answers = await asyncio.gather(*(database.schema_revision() for _ in range(3)), return_exceptions=True)
        assert database.in_use == 0
    assert isinstance(answers[0], DatabaseUnavailable)
    assert "nobody listens" in answers[0].detail
    assert answers[1:] == [SCHEMA_HEAD] * 2


async def test_postgres_knows_whose_connections_they_are_that_which_listens_too(database_url):
    async with open_database(database_url, pool_size=1) as database:
        listening = asyncio.create_task(database.listen("a_channel_of_its_own", lambda _: None))
        async with asyncio.timeout(5), database.connection() as db:
            name = "SELECT application_name FROM pg_stat_activity WHERE query ~ $1"
            while (found := await db.fetchval(name, "^LISTEN .*a_channel_of_its_own")) is None:
                await db.execute("SELECT pg_sleep(0.01)")
        assert found == "identity-service"
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


async def test_a_connection_that_is_being_opened_at_the_end_keeps_nobody_waiting(database_url, monkeypatch):
    may_open = opening_later(monkeypatch)
    async with open_database(database_url, pool_size=2) as database:
        leaving = asyncio.create_task(database.schema_revision())
        await asyncio.sleep(0.01)
        leaving.cancel()
        asyncio.get_running_loop().call_later(0.05, may_open.set)
    assert database._pool.get_size() == 0


async def test_while_none_can_be_opened_those_that_are_lent_serve_everybody(database_url, monkeypatch):
    """As when Postgres has no more to give: nobody is refused who would have been served a moment later."""
    refused: list[bool] = []

    async def refuse(*_: Any, **__: Any) -> Any:
        refused.append(True)
        raise asyncpg.TooManyConnectionsError("too many connections for role")

    async with open_database(database_url, pool_size=10) as database:
        async with database.connection():
            monkeypatch.setattr(asyncpg.Pool, "acquire", refuse)
            first = [asyncio.create_task(database.schema_revision()) for _ in range(3)]
            await asyncio.sleep(0.01)
            second = [asyncio.create_task(database.schema_revision()) for _ in range(20)]
            await asyncio.sleep(0.01)
        assert await asyncio.gather(*first, *second) == [SCHEMA_HEAD] * 23
    assert len(refused) == 3, "it asks again and again"


async def test_a_pooler_that_keeps_no_prepared_statements_is_a_database_that_is_away(database_url):
    """Older ones in transaction mode hand one client the statements of another."""
    async with open_database(database_url, pool_size=1) as database:
        with pytest.raises(DatabaseUnavailable) as away:  # noqa: PT012
            async with database.connection() as db:
                await db.execute("PREPARE same AS SELECT 1")
                await db.execute("PREPARE same AS SELECT 1")
        assert "DuplicatePreparedStatement" in away.value.detail


@pytest.fixture
def refuse_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Has the next connection refused, and the rest after that last a moment."""
    acquire = asyncpg.Pool.acquire

    async def refused(*_: Any, **__: Any) -> Any:
        monkeypatch.setattr(asyncpg.Pool, "acquire", acquire)
        raise asyncpg.TooManyConnectionsError("too many connections for role")

    monkeypatch.setattr(database_module._Lending, "REST_SECONDS", 0.05)
    return lambda: monkeypatch.setattr(asyncpg.Pool, "acquire", refused)


async def test_after_a_rest_another_one_is_opened_where_none_could_be(database_url, refuse_once):
    async with open_database(database_url, pool_size=2) as database:
        async with database.connection() as one:
            refuse_once()
            waiting = asyncio.create_task(_pid_of(database))
            await asyncio.sleep(0.1)
            assert await _pid_of(database) != one.get_server_pid()
        await waiting


async def test_after_a_rest_whoever_waits_need_not_wait_for_somebody_else_to_come(database_url, refuse_once):
    async with open_database(database_url, pool_size=2) as database, database.connection() as one:
        refuse_once()
        assert await _pid_of(database) != one.get_server_pid()


async def test_nothing_is_opened_for_those_who_have_left(database_url, monkeypatch):
    monkeypatch.setattr(database_module, "CONNECT_TIMEOUT", 0.05)
    async with open_database(database_url, pool_size=1) as database, database.connection():
        cancelled = [asyncio.create_task(database.schema_revision()) for _ in range(3)]
        patient = [asyncio.create_task(database.schema_revision()) for _ in range(3)]
        await asyncio.sleep(0)
        for task in cancelled:
            task.cancel()
        answers = await asyncio.gather(*cancelled, *patient, return_exceptions=True)
        assert [type(answer) for answer in answers] == [asyncio.CancelledError] * 3 + [DatabaseUnavailable] * 3
        assert not database._lending._waiting


async def test_a_connection_is_opened_even_if_it_cannot_be_told_about_arrays(database_url, monkeypatch):
    """That goes past what the library documents; without it, it asks the server."""

    def fail(_: Any) -> Any:
        raise TypeError("another library than we know")

    monkeypatch.setattr(asyncpg.Connection, "get_settings", fail)
    async with open_database(database_url, pool_size=1) as database, database.connection() as db:
        assert await db.fetchval("SELECT $1::bigint[]", [1, 2]) == [1, 2]
