"""Resetting a password (PWD-10): a token that is good once, for half an hour, until anything else happens."""

import asyncio
from uuid import UUID

import httpx2
import pytest

from identity_service.accounts import formats, registration, resets
from identity_service.errors import UserDisabled, UserNotFound
from identity_service.housekeeping import prune
from identity_service.shell import reset_token
from tests.conftest import PASSWORD, TESTER, Account, Api, bearer, until_somebody_waits
from tests.web.answers import problem, seen

NEW_PASSWORD = "purple elephants dance at dusk"
TEXT = "This token cannot reset a password; ask for a new one."
INVALID = problem(400, "reset_token_invalid", TEXT)


async def start(account: Account) -> str:
    token = reset_token()
    api, user_id = account.api, UUID(account.id)
    await api.database.transact(lambda db: resets.start(db, user_id, token, by=TESTER, now=api.clock()))
    return token


async def finish(api: Api, token: str, password: str = NEW_PASSWORD) -> httpx2.Response:
    return await api.http.post("/password-reset", json={"token": token, "new_password": password})


async def password_works(api: Api, password: str) -> bool:
    return (await api.token(grant_type="password", username="alice", password=password)).status_code == 200


async def test_a_reset_sets_the_password_ends_all_sessions_and_logs_nobody_in(api, alice):
    tokens = await alice.log_in()
    token = await start(alice)
    assert (await api.me(tokens["access_token"])).status_code == 200, "until it is done nothing has changed"
    assert await password_works(api, PASSWORD)
    answer = await finish(api, token)
    assert (answer.status_code, answer.content) == (204, b"")
    assert "set-cookie" not in answer.headers
    assert (await api.me(tokens["access_token"])).status_code == 401
    assert (await api.refresh(tokens["refresh_token"])).json()["error"] == "invalid_grant"
    assert await api.scalar("SELECT count(*) FROM audit_events WHERE event = 'user.unlocked'") == 0, "nor was it locked"
    assert await password_works(api, NEW_PASSWORD)
    assert not await password_works(api, PASSWORD)


async def test_the_token_has_enough_bits_and_only_its_digest_is_kept(api, alice):
    token = await start(alice)
    assert len(token) == 43
    kept = await api.scalar("SELECT password_resets::text FROM password_resets")
    events = await api.scalar("SELECT string_agg(audit_events::text, ' ') FROM audit_events")
    assert token not in kept + events
    assert await api.scalar("SELECT length(token_digest) FROM password_resets") == 32


async def used_before(api: Api, alice: Account) -> str:
    token = await start(alice)
    assert (await finish(api, token)).status_code == 204
    return token


async def expired(api: Api, alice: Account) -> str:
    token = await start(alice)
    api.clock.advance(minutes=30)
    return token


async def followed_by_another(api: Api, alice: Account) -> str:
    token = await start(alice)
    await start(alice)
    return token


async def followed_by_a_change_of_the_password(api: Api, alice: Account) -> str:
    token = await start(alice)
    mine = bearer((await alice.log_in())["access_token"])
    body = {"current_password": PASSWORD, "new_password": "wise old owls never sleep"}
    assert (await api.http.put("/users/me/password", json=body, headers=mine)).status_code == 204
    return token


async def followed_by_a_change_of_the_address(api: Api, alice: Account) -> str:
    token = await start(alice)
    mine = bearer((await alice.log_in())["access_token"])
    assert (await api.http.patch("/users/me", json={"email": "a@example.com"}, headers=mine)).status_code == 200
    return token


async def followed_by_disabling_and_enabling(api: Api, alice: Account) -> str:
    token = await start(alice)
    async with api.database.connection() as db:
        for rule in (registration.disable, registration.enable):
            await rule(db, UUID(alice.id), by=TESTER, now=api.clock())
    return token


async def of_a_disabled_account(api: Api, alice: Account) -> str:
    """However it came to be: disabling makes the token void, and for who is disabled none is started."""
    token = await start(alice)
    await api.scalar("UPDATE users SET disabled_at = now()")
    return token


async def of_a_deleted_account(api: Api, alice: Account) -> str:
    token = await start(alice)
    await api.database.transact(lambda db: registration.delete(db, UUID(alice.id), by=TESTER, now=api.clock()))
    return token


async def made_up(api: Api, alice: Account) -> str:
    await start(alice)
    return reset_token()


async def its_digest(api: Api, alice: Account) -> str:
    await start(alice)
    digest: bytes = await api.scalar("SELECT token_digest FROM password_resets")
    return digest.hex()


async def nothing(api: Api, alice: Account) -> str:
    await start(alice)
    return ""


@pytest.mark.parametrize(
    "spoilt",
    [
        used_before,
        expired,
        followed_by_another,
        followed_by_a_change_of_the_password,
        followed_by_a_change_of_the_address,
        followed_by_disabling_and_enabling,
        of_a_disabled_account,
        of_a_deleted_account,
        made_up,
        its_digest,
        nothing,
    ],
)
async def test_a_token_that_is_no_longer_good_resets_nothing(api, alice, spoilt):
    """One answer for all, and no hash is computed for it: an unknown token costs one query."""
    token = await spoilt(api, alice)
    before = await api.scalar("SELECT string_agg(users::text, ' ') FROM users")
    assert seen(await finish(api, token, "yellow submarines sing at noon")) == INVALID
    assert await api.scalar("SELECT string_agg(users::text, ' ') FROM users") == before


async def test_a_change_of_the_username_leaves_the_reset_alone(api, alice):
    token = await start(alice)
    mine = bearer((await alice.log_in())["access_token"])
    assert (await api.http.patch("/users/me", json={"username": "alicia"}, headers=mine)).status_code == 200
    assert (await finish(api, token)).status_code == 204


@pytest.mark.parametrize(("password", "reason"), [("short", "too_short"), ("alicealicealice", "contains_username")])
async def test_a_refused_password_does_not_spend_the_token(api, alice, password, reason):
    token = await start(alice)
    refused = await finish(api, token, password)
    assert (refused.status_code, refused.json()["code"], refused.json()["reason"]) == (422, "password_rejected", reason)
    assert (await finish(api, token)).status_code == 204


async def test_of_fifty_who_use_one_token_at_once_one_sets_the_password(api, alice):
    """Rule 4: over real connections, and all of them saw a token that was good."""
    token = await start(alice)
    hashes = [f"hash {n}" for n in range(50)]

    async def use(password_hash: str) -> str:
        now = api.clock()
        async with api.database.connection() as db:
            user = await resets.find(db, token, now=now)
        await api.database.transact(
            lambda db: resets.finish(db, user.id, token, password_hash=password_hash, by=TESTER, now=now)
        )
        return password_hash

    outcomes = await asyncio.gather(*(use(password_hash) for password_hash in hashes), return_exceptions=True)
    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert {type(outcome).__name__ for outcome in outcomes if outcome != winner} == {"ResetTokenInvalid"}
    assert await api.scalar("SELECT password_hash FROM users") == winner
    assert await api.scalar("SELECT count(*) FROM audit_events WHERE event = 'user.password_reset'") == 1


async def test_a_reset_and_a_disabling_at_once_leave_no_way_in(api, alice):
    for _ in range(10):
        token = await start(alice)
        disabling = api.database.transact(
            lambda db: registration.disable(db, UUID(alice.id), by=TESTER, now=api.clock())
        )
        answer, _ = await asyncio.gather(finish(api, token), disabling)
        assert answer.status_code in (204, 400)
        assert seen(await finish(api, token)) == INVALID
        assert not await password_works(api, NEW_PASSWORD)
        await api.database.transact(lambda db: registration.enable(db, UUID(alice.id), by=TESTER, now=api.clock()))


async def test_a_reset_that_waits_for_the_account_holds_nothing_that_others_wait_for(api, alice):
    """Whoever disables or deletes the account has its row and then wants the token's: two such would never end."""
    token = await start(alice)
    async with api.database.connection() as other, other.transaction():
        await other.execute("SELECT FROM users FOR UPDATE")
        finishing = asyncio.create_task(finish(api, token))
        await until_somebody_waits(api)
        await other.execute("SELECT FROM password_resets FOR UPDATE NOWAIT")
    assert (await finishing).status_code == 204


async def test_an_account_without_a_password_gets_one(api):
    user_id = UUID(int=1)
    await api.database.transact(
        lambda db: registration.register(
            db,
            user_id,
            username="alice",
            password_hash=formats.UNUSABLE,
            email=None,
            roles=(),
            by=TESTER,
            now=api.clock(),
        )
    )
    token = await start(Account(api, str(user_id), "alice", ""))
    assert (await finish(api, token)).status_code == 204
    assert await password_works(api, NEW_PASSWORD)


async def test_an_expired_token_leaves_nothing_in_the_database(api, alice, clock):
    bob = await api.sign_up("bob", "wise old owls never sleep")
    await start(alice)
    clock.advance(minutes=20)
    await start(bob)
    clock.advance(minutes=10, seconds=1)
    await prune(api.runtime)
    assert await api.scalar("SELECT array_agg(user_id) FROM password_resets") == [UUID(bob.id)]


async def test_nobody_resets_the_password_of_nobody(api):
    with pytest.raises(UserNotFound):
        await start(Account(api, str(UUID(int=1)), "alice", ""))


async def test_for_a_disabled_account_no_reset_is_started(api, alice):
    """Its token could not work. Of two at once the disabling has the last word."""
    for _ in range(10):
        disabling = api.database.transact(
            lambda db: registration.disable(db, UUID(alice.id), by=TESTER, now=api.clock())
        )
        await asyncio.gather(start(alice), disabling, return_exceptions=True)
        assert await api.scalar("SELECT count(*) FROM password_resets") == 0
        with pytest.raises(UserDisabled):
            await start(alice)
        await api.database.transact(lambda db: registration.enable(db, UUID(alice.id), by=TESTER, now=api.clock()))
    assert await api.scalar("SELECT count(*) FROM password_resets") == 0
    await finish(api, await start(alice))
    assert await password_works(api, NEW_PASSWORD)


async def test_a_reset_is_recorded_at_its_start_and_at_its_end(api, alice):
    await finish(api, await start(alice))
    events = "SELECT array_agg(event || ' by ' || actor_kind ORDER BY id) FROM audit_events WHERE event LIKE '%reset%'"
    assert await api.scalar(events) == ["user.password_reset_started by service", "user.password_reset by user"]
