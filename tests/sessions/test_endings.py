"""Ending sessions, however many there are: who has hundreds of thousands can be shut out like anybody else."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from uuid import UUID, uuid4

import pytest

from identity_service.accounts import registration as accounts
from identity_service.accounts import roles
from identity_service.clients import registration as clients
from identity_service.database import Connection
from identity_service.errors import DatabaseUnavailable
from identity_service.revocation import Reason
from identity_service.sessions import lifecycle
from tests.conftest import PASSWORD, TESTER, Account, Api, StartApi, bearer, register

MANY = 60
SLOWLY = """
    CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.02); RETURN NEW; END';
    CREATE TRIGGER dawdle BEFORE UPDATE ON sessions FOR EACH ROW EXECUTE FUNCTION dawdle();
    CREATE TRIGGER dawdle BEFORE INSERT ON revoked_tokens FOR EACH ROW EXECUTE FUNCTION dawdle();
    CREATE FUNCTION dawdle_too() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.02); RETURN OLD; END';
    CREATE TRIGGER dawdle_too BEFORE DELETE ON sessions FOR EACH ROW EXECUTE FUNCTION dawdle_too();
    CREATE TRIGGER dawdle_too BEFORE DELETE ON client_tokens FOR EACH ROW EXECUTE FUNCTION dawdle_too();
"""
COPY_SESSIONS = """
    INSERT INTO sessions (id, user_id, client_id, scope, amr, authenticated_at, password_changed_at, rotated_at,
                          expires_at, access_expires_at)
    SELECT gen_random_uuid(), user_id, client_id, scope, amr, authenticated_at, password_changed_at, rotated_at,
           expires_at, access_expires_at
      FROM sessions, generate_series(2, $1)
"""
COPY_TOKENS = """
    INSERT INTO client_tokens (jti, client_id, expires_at)
    SELECT gen_random_uuid()::text, client_id, expires_at FROM client_tokens, generate_series(2, $1)
"""
LIVE = "SELECT count(*) FROM sessions WHERE revoked_at IS NULL"


@pytest.fixture
async def slow_api(
    start_api: StartApi, new_database: Callable[..., str], migrated: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Api]:
    """A service to whose database a few sessions are what very many are to another one: they take too long."""
    monkeypatch.setattr("identity_service.database.STATEMENT_TIMEOUT", 1.0)
    url = await asyncio.to_thread(new_database, f"endings_{uuid4().hex}", "pristine")
    async with start_api(database_url=url) as api:
        yield api


async def with_many_sessions(api: Api) -> tuple[Account, dict[str, str]]:
    """Return a user with the role `clerk` who has many sessions of the client `backend`, and tokens of one of them."""
    by, now = TESTER, api.clock()
    await api.database.transact(lambda db: roles.create(db, "clerk", scope="a", by=by, now=now))
    grants = ["password", "refresh_token", "client_credentials"]
    backend = await register(api, "backend", grants=grants, first_party=True)
    alice = await api.sign_up()
    await api.database.transact(lambda db: roles.grant(db, UUID(alice.id), "clerk", end_sessions=False, by=by, now=now))
    answer = await backend.token(grant_type="password", username="alice", password=PASSWORD)
    await backend.access_token()
    async with api.database.connection() as db:
        await db.execute(COPY_SESSIONS, MANY)
        await db.execute(COPY_TOKENS, MANY)
        await db.execute(SLOWLY)
    return alice, answer.json()


Deed = Callable[[Api, str, dict[str, str]], Awaitable[object]]


async def log_out_elsewhere(api: Api, _: str, tokens: dict[str, str]) -> None:
    answer = await api.http.delete("/users/me/sessions", headers=bearer(tokens["access_token"]))
    assert answer.status_code == 204, answer.text


async def disable_user(api: Api, user_id: str, _: dict[str, str]) -> None:
    await api.database.transact(lambda db: accounts.disable(db, UUID(user_id), by=TESTER, now=api.clock()))


async def delete_user(api: Api, user_id: str, _: dict[str, str]) -> None:
    await api.database.transact(lambda db: accounts.delete(db, UUID(user_id), by=TESTER, now=api.clock()))


async def change_role(api: Api, _: str, __: dict[str, str]) -> None:
    await api.database.transact(
        lambda db: roles.set_scopes(db, "clerk", scope="b", end_sessions=True, by=TESTER, now=api.clock())
    )


async def delete_client(api: Api, _: str, __: dict[str, str]) -> None:
    await api.database.transact(lambda db: clients.delete(db, "backend", by=TESTER, now=api.clock()))


@pytest.mark.parametrize(
    ("deed", "left", "tokens"),
    [
        (log_out_elsewhere, 1, 0),
        (disable_user, 0, 0),
        (delete_user, 0, 0),
        (change_role, 0, 0),
        (delete_client, 0, MANY),
    ],
)
async def test_very_many_sessions_and_tokens_end_at_once(slow_api: Api, deed: Deed, left: int, tokens: int) -> None:
    """Within one transaction, though it takes longer than a statement may otherwise: nobody is too big to shut out."""
    alice, held = await with_many_sessions(slow_api)
    await deed(slow_api, alice.id, held)
    ended = MANY - left
    assert await slow_api.scalar(LIVE) == left
    assert await slow_api.scalar("SELECT count(*) FROM revoked_tokens") == ended + tokens
    recorded = "SELECT count(*) FROM audit_events WHERE event = 'session.ended' AND subject_id = $1"
    assert await slow_api.scalar(recorded, alice.id) == ended
    assert (await slow_api.me(held["access_token"])).status_code == (200 if left else 401)


async def test_ending_all_sessions_waits_for_nobody_for_longer_than_an_answer_takes(slow_api: Api) -> None:
    """Somebody who never commits would hold up whoever waits, and a connection with them, for a day."""
    alice, _ = await with_many_sessions(slow_api)

    async def end_all(db: Connection) -> None:
        await lifecycle.end_all(db, UUID(alice.id), reason=Reason.REVOKED, by=TESTER, now=slow_api.clock())

    async with slow_api.database.connection() as db, db.transaction():
        await db.execute("SELECT FROM sessions FOR UPDATE LIMIT 1")
        with pytest.raises(DatabaseUnavailable):
            await asyncio.wait_for(slow_api.database.transact(end_all), 10)
    assert await slow_api.scalar(LIVE) == MANY


async def test_the_patience_of_an_ending_is_forgotten_with_its_transaction(api: Api, alice: Account) -> None:
    """The connection goes on to others, who have their own."""
    async with api.database.connection() as db:
        before = await db.fetchval("SHOW lock_timeout")
        async with db.transaction():
            await lifecycle.end_all(db, UUID(alice.id), reason=Reason.REVOKED, by=TESTER, now=api.clock())
            assert await db.fetchval("SHOW lock_timeout") == "10s"
        assert await db.fetchval("SHOW lock_timeout") == before
