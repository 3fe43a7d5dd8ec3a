"""One refresh is one update: races, retries, replays, and what ends a session (TOK-11, TOK-12, F25 to F30)."""

import asyncio
import math
from base64 import urlsafe_b64decode
from collections import Counter
from collections.abc import Awaitable, Iterable
from contextlib import AsyncExitStack
from datetime import timedelta
from json import loads
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from identity_service import grants
from identity_service.accounts import registration
from identity_service.clients import FIRST_PARTY
from identity_service.database import Connection
from identity_service.errors import CurrentPasswordWrong, RefreshTokenReused, SessionEnded
from identity_service.sessions import Claim, Session, rotation, store
from tests.conftest import TESTER, Api, StartApi, until_somebody_waits


def claims_of(token: str) -> dict[str, object]:
    payload = token.split(".")[1]
    claims: dict[str, object] = loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return claims


async def test_sixty_four_simultaneous_refreshes_share_one_successor_for_twenty_rounds(api, alice):
    """F25: checked and written in one statement, so nobody is logged out and the family never forks."""
    token = (await alice.log_in())["refresh_token"]

    async def refresh(unverified_token: str) -> str:
        issued = await grants.refresh_token(
            api.runtime, FIRST_PARTY, unverified_token=unverified_token, scope="", by=TESTER
        )
        return issued.refresh_token

    for _ in range(20):
        successors = set(await asyncio.gather(*(refresh(token) for _ in range(64))))
        assert len(successors) == 1
        (token,) = successors
    assert claims_of(token)["jti"] == f"{claims_of(token)['sid']}.20"
    assert await api.scalar("SELECT generation FROM sessions") == 20


async def test_sixteen_simultaneous_requests_share_one_successor(api, alice):
    token = (await alice.log_in())["refresh_token"]
    answers = await asyncio.gather(*(api.refresh(token) for _ in range(16)))
    assert Counter(answer.status_code for answer in answers) == {200: 16}
    assert len({answer.json()["refresh_token"] for answer in answers}) == 1


async def test_a_clock_that_is_set_back_gives_a_spent_token_no_more_time(api, alice, clock):
    token = (await alice.log_in())["refresh_token"]
    clock.advance(seconds=600)
    assert (await api.refresh(token)).status_code == 200
    clock.advance(seconds=-29)  # as far as replicas may differ
    assert (await api.refresh(token)).status_code == 200
    clock.advance(seconds=-100)
    assert (await api.refresh(token)).status_code == 400
    assert await api.scalar("SELECT reason FROM revoked_tokens") == "reuse"


@pytest.mark.parametrize("spent_first", [True, False])
async def test_a_spent_token_that_comes_together_with_the_current_one_gets_nothing_of_it(api, alice, bob, spent_first):
    """They share a statement, and only one of them is what it advanced."""
    spent = await alice.log_in()
    current = (await api.refresh((await api.refresh(spent["refresh_token"])).json()["refresh_token"])).json()
    under_way = asyncio.create_task(refresh(api, await bob.log_in()))
    await asyncio.sleep(0)  # what comes now waits for the next statement
    together = [spent, current] if spent_first else [current, spent]
    outcomes = await asyncio.gather(*(refresh(api, tokens) for tokens in together), return_exceptions=True)
    await under_way
    assert isinstance(outcomes[together.index(spent)], RefreshTokenReused | SessionEnded)
    assert await api.scalar("SELECT reason FROM revoked_tokens") == "reuse"


async def test_a_revocation_is_kept_for_as_long_as_the_newest_token_of_a_shared_refresh_lives(api, alice, clock):
    tokens = await alice.log_in()
    clock.advance(seconds=500)
    newest = (await refresh(api, tokens)).access_token
    clock.advance(seconds=1)
    assert (await api.http.post("/revoke", data={"token": newest})).status_code == 200
    kept = await api.scalar("SELECT extract(epoch FROM expires_at) FROM revoked_tokens")
    assert kept >= claims_of(newest)["exp"]


async def test_replicas_agree_on_one_successor(api, alice, start_api: StartApi):
    """F25: three services on one database, 48 refreshes of one token at once."""
    token = (await alice.log_in())["refresh_token"]
    async with AsyncExitStack() as stack:
        replicas: list[Api] = [await stack.enter_async_context(start_api()) for _ in range(3)]
        answers = await asyncio.gather(*(replicas[n % 3].refresh(token) for n in range(48)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["refresh_token"] for answer in answers}) == 1


async def test_a_retry_within_the_window_gets_the_same_successor(api, alice, clock):
    first = (await alice.log_in())["refresh_token"]
    second = (await api.refresh(first)).json()
    clock.advance(seconds=30)
    retried = await api.refresh(first)
    assert retried.status_code == 200
    assert retried.json()["refresh_token"] == second["refresh_token"]
    assert retried.json()["access_token"] != second["access_token"]
    assert (await api.refresh(second["refresh_token"])).status_code == 200


async def test_without_a_window_a_spent_token_is_never_good_again(start_api, clock):
    """Nor on a replica whose clock is behind, where less than no time has passed."""
    async with start_api(refresh_retry_window="0") as api:
        alice = await api.sign_up()
        clock.advance(seconds=60)
        for behind in (0, 10):
            first = (await alice.log_in())["refresh_token"]
            assert (await api.refresh(first)).status_code == 200
            clock.advance(seconds=-behind)
            assert (await api.refresh(first)).json()["error"] == "invalid_grant"


async def test_two_tabs_that_refresh_while_their_session_changes_the_password_both_go_on(api, alice, clock):
    """TOK-12: the second one's token has been spent by the first, which is no reason to log anybody out."""
    tokens = await alice.log_in()
    proved_at = await api.scalar("SELECT password_changed_at FROM users")
    clock.advance(seconds=1)
    session_id = UUID(str(claims_of(tokens["refresh_token"])["sid"]))
    async with api.database.connection() as db, db.transaction():
        await registration.change_password(
            db,
            UUID(alice.id),
            password_hash="another",
            proved_at=proved_at,
            keep_session=session_id,
            by=TESTER,
            now=clock(),
        )
        tabs = [asyncio.create_task(api.refresh(tokens["refresh_token"])) for _ in range(2)]
        await until_somebody_waits(api)
        await asyncio.sleep(0.05)
    answers = await asyncio.gather(*tabs)
    assert [answer.status_code for answer in answers] == [200, 200]
    assert len({answer.json()["refresh_token"] for answer in answers}) == 1


async def test_a_retry_after_the_window_ends_the_session(api, alice, clock):
    first = (await alice.log_in())["refresh_token"]
    second = (await api.refresh(first)).json()["refresh_token"]
    clock.advance(seconds=30, microseconds=1)
    assert (await api.refresh(first)).json()["error"] == "invalid_grant"
    assert (await api.refresh(second)).json()["error"] == "invalid_grant"


async def test_an_older_generation_ends_the_session_even_within_the_window(api, alice):
    """F27: the window covers the immediately preceding token and no other."""
    first = (await alice.log_in())["refresh_token"]
    second = (await api.refresh(first)).json()["refresh_token"]
    third = (await api.refresh(second)).json()
    replayed = await api.refresh(first)
    assert (replayed.status_code, replayed.json()["error"]) == (400, "invalid_grant")
    assert (await api.refresh(third["refresh_token"])).status_code == 400
    assert (await api.me(third["access_token"])).status_code == 401
    assert await api.scalar("SELECT reason FROM revoked_tokens") == "reuse"


async def test_replaying_an_ancestor_ends_the_family_when_its_access_token_has_expired(api, alice, clock):
    """F28: reuse is recorded whatever became of the access token."""
    first = (await alice.log_in())["refresh_token"]
    second = (await api.refresh(first)).json()["refresh_token"]
    clock.advance(hours=2)
    third = (await api.refresh(second)).json()["refresh_token"]
    assert (await api.refresh(first)).status_code == 400
    assert (await api.refresh(third)).status_code == 400
    assert await api.scalar("SELECT count(*) FROM sessions WHERE revoked_at IS NOT NULL") == 1


async def test_reuse_is_remembered_after_a_restart(api, alice, start_api: StartApi):
    """F26: what was spent is known to a service that has just started."""
    first = (await alice.log_in())["refresh_token"]
    second = (await api.refresh(first)).json()["refresh_token"]
    third = (await api.refresh(second)).json()["refresh_token"]
    async with start_api() as restarted:
        assert (await restarted.refresh(first)).status_code == 400
        assert (await restarted.refresh(third)).status_code == 400


async def test_reuse_leaves_other_sessions_alone(api, alice):
    other = (await alice.log_in())["refresh_token"]
    first = (await alice.log_in())["refresh_token"]
    second = (await api.refresh(first)).json()["refresh_token"]
    await api.refresh(second)
    assert (await api.refresh(first)).status_code == 400
    assert (await api.refresh(other)).status_code == 200


async def test_a_hundred_refreshes_never_pass_the_absolute_end(api, alice, clock):
    """F30: the end of the session is fixed at the login."""
    tokens = await alice.log_in()
    claims = claims_of(tokens["refresh_token"])
    end = int(str(claims["iat"])) + 30 * 86400
    for _ in range(100):
        clock.advance(hours=7.19)
        tokens = (await api.refresh(tokens["refresh_token"])).json()
        assert int(str(claims_of(tokens["refresh_token"])["exp"])) <= end
        assert int(str(claims_of(tokens["access_token"])["exp"])) <= end
    clock.advance(hours=2)
    assert (await api.refresh(tokens["refresh_token"])).json()["error"] == "invalid_grant"


async def test_a_pause_longer_than_the_idle_lifetime_ends_the_session(api, alice, clock):
    token = (await alice.log_in())["refresh_token"]
    clock.advance(days=14)
    assert (await api.refresh(token)).json()["error"] == "invalid_grant"


async def test_a_refresh_adds_no_row_and_updates_in_place(start_api: StartApi):
    """P8, P9: storage grows with sessions, never with refreshes, and no index is written."""
    updates = """
        SELECT n_tup_upd, n_tup_hot_upd, pg_stat_force_next_flush() FROM pg_stat_user_tables WHERE relname = 'sessions'
    """
    async with start_api(database_pool_size=1) as api:
        await api.scalar("INSERT INTO roles VALUES ('clerk', '{orders:read}', now()) RETURNING name")
        alice = await api.sign_up()
        await api.scalar("UPDATE users SET roles = '{clerk}' RETURNING id")
        token = (await alice.log_in())["refresh_token"]
        async with api.database.connection() as db:
            await db.fetchrow(updates)
            before = await db.fetchrow(updates)
        for _ in range(20):
            token = (await api.refresh(token)).json()["refresh_token"]
        assert await api.scalar("SELECT count(*) FROM sessions") == 1
        assert await api.scalar("SELECT count(*) FROM revoked_tokens") == 0
        async with api.database.connection() as db:
            await db.fetchrow(updates)
            after = await db.fetchrow(updates)
    assert before is not None
    assert after is not None
    assert after["n_tup_upd"] - before["n_tup_upd"] == 20
    assert after["n_tup_hot_upd"] - before["n_tup_hot_upd"] == 20


async def test_a_generation_from_the_future_is_refused_and_harms_nobody(api, alice):
    """A database restored from a backup does not know its newest tokens; that is no theft."""
    first = (await alice.log_in())["refresh_token"]
    second = (await api.refresh(first)).json()["refresh_token"]
    third = (await api.refresh(second)).json()["refresh_token"]
    await api.scalar("UPDATE sessions SET generation = 0 RETURNING id")
    assert (await api.refresh(third)).json()["error"] == "invalid_grant"
    assert (await api.refresh(first)).status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE users SET disabled_at = now() RETURNING id",
        "UPDATE users SET password_changed_at = password_changed_at + interval '1 second' RETURNING id",
        "DELETE FROM users RETURNING id",
    ],
)
async def test_a_changed_account_is_seen_in_the_same_statement(api, alice, change):
    """F29: what changed behind our back, straight in the table, stops the next refresh too."""
    token = (await alice.log_in())["refresh_token"]
    await api.scalar(change)
    assert (await api.refresh(token)).json()["error"] == "invalid_grant"


async def test_after_disabling_returns_no_refresh_succeeds(api, alice, clock):
    """Refreshes race the disabling over real connections; none that starts after it is answered."""
    tokens = [(await alice.log_in())["refresh_token"] for _ in range(8)]
    racing = [asyncio.create_task(api.refresh(token)) for token in tokens for _ in range(4)]
    await racing[0]
    await api.database.transact(lambda db: registration.disable(db, UUID(alice.id), by=TESTER, now=clock()))
    late = await asyncio.gather(*(api.refresh(token) for token in tokens))
    early = await asyncio.gather(*racing)
    assert {answer.status_code for answer in late} == {400}
    newest = [answer.json()["refresh_token"] for answer in early if answer.status_code == 200]
    assert {(await api.refresh(token)).status_code for token in newest} == {400}


async def test_a_refresh_that_waits_for_a_password_change_in_its_own_session_goes_on(api, alice, clock):
    """The session that changes the password lives on, even if it refreshes at the same moment."""
    tokens = await alice.log_in()
    password_changed_at = await api.scalar("SELECT password_changed_at FROM users")
    clock.advance(seconds=1)
    async with api.database.connection() as db:
        transaction = db.transaction()
        await transaction.start()
        await registration.change_password(
            db,
            UUID(alice.id),
            password_hash="another",
            proved_at=password_changed_at,
            keep_session=UUID(str(claims_of(tokens["refresh_token"])["sid"])),
            by=TESTER,
            now=clock(),
        )
        refresh = asyncio.create_task(api.refresh(tokens["refresh_token"]))
        done, _ = await asyncio.wait([refresh], timeout=0.3)
        assert not done, "the refresh waits for the session's row"
        await transaction.commit()
    assert (await refresh).status_code == 200


# Refreshes that go to the database together


async def refresh(api: Api, tokens: dict[str, Any]) -> grants.IssuedTokens:
    return await grants.refresh_token(
        api.runtime, FIRST_PARTY, unverified_token=tokens["refresh_token"], scope="", by=TESTER
    )


async def test_a_session_that_somebody_has_locked_keeps_nobody_else_waiting(api, alice):
    locked, *others = [await alice.log_in() for _ in range(10)]
    sid = UUID(str(claims_of(locked["refresh_token"])["sid"]))
    async with api.database.connection() as db, db.transaction():
        await db.execute("SELECT FROM sessions WHERE id = $1 FOR UPDATE", sid)
        waiting = asyncio.create_task(refresh(api, locked))
        await asyncio.gather(*(refresh(api, tokens) for tokens in others))
        assert not waiting.done()
    assert claims_of((await waiting).refresh_token)["jti"] == f"{sid}.1"


async def until_the_statement_waits(blocker: Any) -> None:
    waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%WITH free%'"
    for _ in range(1000):
        await blocker.execute("SELECT pg_stat_clear_snapshot()")  # within a transaction it is looked at only once
        if await blocker.fetchrow(waiting) is not None:
            return
        await asyncio.sleep(0.005)
    pytest.fail("nobody waits")


@pytest.mark.parametrize(
    ("change", "outcome", "generation"),
    [
        ("UPDATE sessions SET generation = generation + 1, rotated_at = $1", "IssuedTokens", 1),
        ("UPDATE sessions SET revoked_at = $1", "SessionEnded", 0),
        ("UPDATE sessions SET access_expires_at = $1", "IssuedTokens", 1),
    ],
    ids=["advanced", "ended", "changed otherwise"],
)
async def test_a_session_that_changes_while_the_statement_is_under_way_is_looked_at_anew(
    api, alice, clock, monkeypatch, change, outcome, generation
):
    """The statement sees it as it was when it began, and would lock it as it is now."""
    tokens = await alice.log_in()
    gate = "(SELECT pg_advisory_xact_lock_shared(1)) AS gate, unnest("
    monkeypatch.setattr(store, "CLAIM_GENERATIONS", store.CLAIM_GENERATIONS.replace("unnest(", gate, 1))
    blocker = await asyncpg.connect(api.settings.database_url.get_secret_value())
    await blocker.execute("SELECT pg_advisory_lock(1)")
    refreshing = asyncio.create_task(refresh(api, tokens))
    await until_the_statement_waits(blocker)
    await blocker.execute(change, clock())
    await blocker.close()
    (came_of_it,) = await asyncio.gather(refreshing, return_exceptions=True)
    assert type(came_of_it).__name__ == outcome
    assert await api.scalar("SELECT generation FROM sessions") == generation


async def test_refreshes_of_many_sessions_at_once_each_get_their_own(api, alice, bob):
    sessions = [await who.log_in() for _ in range(40) for who in (alice, bob)]
    issued = await asyncio.gather(*(refresh(api, tokens) for tokens in sessions))
    for tokens, successor in zip(sessions, issued, strict=True):
        before, after = claims_of(tokens["refresh_token"]), claims_of(successor.refresh_token)
        assert (after["sid"], after["sub"]) == (before["sid"], before["sub"])
        assert after["jti"] == f"{before['sid']}.1"
        assert claims_of(successor.access_token)["sub"] == before["sub"]


async def test_one_that_is_refused_changes_nothing_for_those_beside_it(api, alice):
    """An ended session, an ancestor, one from the future and one of nobody, among four good ones."""
    ended, old, *good = [await alice.log_in() for _ in range(6)]
    await api.http.post("/revoke", data={"token": ended["refresh_token"]})
    await refresh(api, await as_tokens(refresh(api, old)))
    outcomes = await asyncio.gather(
        *(refresh(api, tokens) for tokens in (good[0], ended, *good[1:], old)), return_exceptions=True
    )
    assert [type(outcome).__name__ for outcome in outcomes] == [
        "IssuedTokens", "SessionEnded", "IssuedTokens", "IssuedTokens", "IssuedTokens", "RefreshTokenReused"
    ]  # fmt: skip


async def as_tokens(issuing: Awaitable[grants.IssuedTokens]) -> dict[str, Any]:
    return {"refresh_token": (await issuing).refresh_token}


async def test_whoever_leaves_before_the_answer_can_ask_again(api, alice):
    tokens = await alice.log_in()
    leaving = asyncio.create_task(refresh(api, tokens))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert (
        claims_of((await refresh(api, tokens)).refresh_token)["jti"] == f"{claims_of(tokens['refresh_token'])['sid']}.1"
    )
    assert await api.scalar("SELECT generation FROM sessions") == 1


async def test_when_the_database_is_away_all_who_came_together_are_told_and_nothing_is_spent(api, alice):
    sessions = [await alice.log_in() for _ in range(5)]
    await api.scalar("ALTER TABLE sessions RENAME TO sessions_away")
    try:
        leaving = asyncio.create_task(refresh(api, sessions[0]))
        outcomes = asyncio.gather(*(refresh(api, tokens) for tokens in sessions), return_exceptions=True)
        await asyncio.sleep(0)
        leaving.cancel()
        assert {type(outcome).__name__ for outcome in await outcomes} == {"DatabaseUnavailable"}
    finally:
        await api.scalar("ALTER TABLE sessions_away RENAME TO sessions")
    for tokens in sessions:
        await refresh(api, tokens)
    assert await api.scalar("SELECT array_agg(generation) FROM sessions") == [1] * 5


async def test_what_waits_behind_statements_that_fail_is_given_up_before_anything_is_spent(
    api, alice, clock, monkeypatch
):
    """Its client comes again later than a retry may, and is no thief because the database was away."""
    sessions = [await alice.log_in() for _ in range(6)]
    patience, away = 0.2, asyncio.Event()
    send = store.claim_generations

    async def timing_out(db: Connection, claims: Iterable[Claim]) -> dict[UUID, Session]:
        if away.is_set():
            await asyncio.sleep(patience * 2)
            raise TimeoutError
        return await send(db, claims)

    monkeypatch.setattr(rotation, "MOST_AT_ONCE", 2)
    monkeypatch.setattr(rotation, "CONNECT_TIMEOUT", patience)
    monkeypatch.setattr(store, "claim_generations", timing_out)
    away.set()
    waiting = [asyncio.create_task(refresh(api, tokens)) for tokens in sessions]
    left = asyncio.create_task(refresh(api, sessions[-1]))
    await asyncio.sleep(patience / 2)
    left.cancel()
    away.clear()
    outcomes = await asyncio.gather(*waiting, left, return_exceptions=True)
    assert [type(outcome).__name__ for outcome in outcomes] == ["DatabaseUnavailable"] * 6 + ["CancelledError"]
    assert await api.scalar("SELECT max(generation) FROM sessions") == 0
    clock.advance(seconds=31)
    await asyncio.gather(*(refresh(api, tokens) for tokens in sessions))


async def test_whoever_refreshes_one_session_without_a_pause_does_not_keep_others_waiting(api, alice, monkeypatch):
    """All that comes of one session goes with the same statement: the others of it did not do it."""
    one, other = [await alice.log_in() for _ in range(2)]
    sent, send = 0, store.claim_generations

    async def counting(db: Connection, claims: Iterable[Claim]) -> dict[UUID, Session]:
        nonlocal sent
        sent += 1
        return await send(db, claims)

    monkeypatch.setattr(store, "claim_generations", counting)
    flood = [asyncio.create_task(refresh(api, one)) for _ in range(200)]
    await asyncio.sleep(0)
    await refresh(api, other)
    assert sent <= 1 + math.ceil(201 / rotation.MOST_AT_ONCE)
    assert len({issued.refresh_token for issued in await asyncio.gather(*flood)}) == 1


@pytest.mark.parametrize("end", ["well", "badly"])
async def test_whoever_leaves_while_the_statement_is_under_way_changes_nothing_for_the_others(api, alice, end):
    sessions = [await alice.log_in() for _ in range(3)]
    blocker = await asyncpg.connect(api.settings.database_url.get_secret_value())
    async with blocker.transaction():
        await blocker.execute("LOCK TABLE sessions IN ACCESS EXCLUSIVE MODE")
        leaving, *staying = [asyncio.create_task(refresh(api, tokens)) for tokens in sessions]
        await until_the_statement_waits(blocker)
        leaving.cancel()
        await asyncio.sleep(0)
        if end == "badly":
            await blocker.execute("ALTER TABLE sessions RENAME TO sessions_away")
    outcomes = await asyncio.gather(leaving, *staying, return_exceptions=True)
    if end == "badly":
        await blocker.execute("ALTER TABLE sessions_away RENAME TO sessions")
    await blocker.close()
    came_of_it = "IssuedTokens" if end == "well" else "DatabaseUnavailable"
    assert [type(outcome).__name__ for outcome in outcomes] == ["CancelledError", came_of_it, came_of_it]


async def test_a_password_change_that_another_one_overtook_changes_nothing(api, alice, clock):
    tokens = await alice.log_in()
    sid = UUID(str(claims_of(tokens["refresh_token"])["sid"]))

    async def change(db: Connection) -> None:
        await registration.change_password(
            db,
            UUID(alice.id),
            password_hash="another",
            proved_at=clock() - timedelta(seconds=1),
            keep_session=sid,
            by=TESTER,
            now=clock(),
        )

    with pytest.raises(CurrentPasswordWrong):
        await api.database.transact(change)
    await alice.log_in()
