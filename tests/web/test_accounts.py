"""A person's own account, from sign-up to deletion (contract section 4)."""

import asyncio
import json
from collections import Counter
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx2
import pytest

from identity_service.accounts import registration
from identity_service.accounts.store import LOCK_ADMINISTRATION
from identity_service.errors import CurrentPasswordWrong, UserNotFound
from tests.conftest import PASSWORD, START, TESTER, Account, Api, bearer, until_somebody_waits
from tests.verifier.conftest import until
from tests.web.answers import problem, seen

NEW_PASSWORD = "purple elephants dance at dusk"

TAKEN = problem(409, "username_taken", "This username is already taken.")
WRONG_CURRENT = problem(403, "current_password_wrong", "The current password is wrong.")
TOKEN_REVOKED = problem(401, "invalid_token", "The token is invalid, expired or revoked.")
UNAUTHENTICATED = problem(401, "authentication_required", "Present an access token as a bearer token.")
SESSION_OVER = {"error": "invalid_grant", "error_description": "The session has ended; log in again."}
WRONG_LOGIN = {"error": "invalid_grant", "error_description": "The username or the password is wrong."}

PRIVILEGED = {
    "roles": ["admin"],
    "is_admin": True,
    "admin": True,
    "scope": "identity:admin",
    "id": "00000000-0000-7000-8000-000000000000",
    "tenant": "another",
    "email_verified": True,
    "password": NEW_PASSWORD,
    "password_hash": "$argon2id$v=19$m=8,t=1,p=1$c29tZXNhbHRzb21lc2FsdA$AAAA",
    "password_changed_at": "2020-01-01T00:00:00Z",
    "created_at": "2020-01-01T00:00:00Z",
    "disabled_at": None,
    "__proto__": {"roles": ["admin"]},
    "Username": "root",
}


def full_width(text: str) -> str:
    return "".join(chr(ord(character) + 0xFEE0) for character in text)


def not_permitted(member: str) -> Any:
    return problem(
        422,
        "validation_failed",
        "The request has members that are missing or wrong.",
        errors=[{"pointer": f"/{member}", "detail": "Extra inputs are not permitted"}],
    )


async def access_token(account: Account) -> str:
    token: str = (await account.log_in())["access_token"]
    return token


async def change_password(api: Api, token: str, current: str, new: str) -> httpx2.Response:
    body = {"current_password": current, "new_password": new}
    return await api.http.put("/users/me/password", json=body, headers=bearer(token))


async def delete(api: Api, token: str, password: str) -> httpx2.Response:
    return await api.http.request("DELETE", "/users/me", json={"current_password": password}, headers=bearer(token))


async def execute(api: Api, sql: str, *arguments: Any) -> None:
    async with api.database.connection() as db:
        await db.execute(sql, *arguments)


# Sign-up


async def test_signing_up_answers_with_the_whole_account_and_where_it_is(api):
    body = {"username": "Alice", "password": PASSWORD, "email": "Alice@EXAMPLE.com"}
    answer = await api.http.post("/users", json=body)
    user = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == "/users/me"
    assert answer.headers["cache-control"] == "no-store"
    assert user == {
        "id": str(UUID(user["id"])),
        "username": "alice",
        "email": "Alice@example.com",
        "email_verified": False,
        "roles": [],
        "created_at": "2026-11-22T12:00:00Z",
        "password_changed_at": "2026-11-22T12:00:00Z",
    }
    assert UUID(user["id"]).version == 7
    assert await api.scalar("SELECT id FROM users") == UUID(user["id"])


@pytest.mark.parametrize("more", [{}, {"email": None}], ids=["left out", "null"])
async def test_signing_up_needs_no_email_address(api, more):
    answer = await api.http.post("/users", json={"username": "alice", "password": PASSWORD, **more})
    assert answer.status_code == 201
    assert answer.json()["email"] is None


@pytest.mark.parametrize("twin", ["alice", "ALICE", "aLiCe", full_width("alice"), full_width("ALICE")])
async def test_a_taken_name_is_taken_in_every_case_and_width(api, alice, twin):
    answer = await api.http.post("/users", json={"username": twin, "password": NEW_PASSWORD})
    assert seen(answer) == TAKEN
    assert "location" not in answer.headers
    assert await api.scalar("SELECT count(*) FROM users") == 1
    await alice.log_in()


async def test_sixteen_simultaneous_sign_ups_of_one_name_make_one_account(api):
    spellings = ["alice", "ALICE", full_width("alice"), "Alice"] * 4
    requests = (api.http.post("/users", json={"username": name, "password": PASSWORD}) for name in spellings)
    answers = await asyncio.gather(*requests)
    assert Counter(answer.status_code for answer in answers) == {201: 1, 409: 15}
    assert [seen(answer) for answer in answers if answer.status_code == 409] == [TAKEN] * 15
    assert await api.scalar("SELECT count(*) FROM users") == 1


async def test_an_email_address_that_somebody_else_gave_answers_like_a_free_one(api):
    """F58: nobody learns from a sign-up whose address is registered."""
    first = await api.http.post("/users", json={"username": "alice", "password": PASSWORD, "email": "a@example.com"})
    second = await api.http.post("/users", json={"username": "bob", "password": PASSWORD, "email": "a@example.com"})
    varying = {"id", "username"}
    assert [answer.status_code for answer in (first, second)] == [201, 201]
    assert {name: first.json()[name] for name in first.json().keys() - varying} == {
        name: second.json()[name] for name in second.json().keys() - varying
    }


@pytest.mark.parametrize(
    ("password", "reason", "detail"),
    [
        ("fourteen chars", "too_short", "The password must have at least 15 characters."),
        ("", "too_short", "The password must not be empty."),
        ("Zq7!" * 64 + "x", "too_long", "The password must have at most 256 characters."),
        ("iloveyouprincess", "common", "The password is one of those that are tried first."),
        ("aaaaaaaaaaaaaaaaaaaa", "repetitive", "The password repeats itself too much to be safe."),
        ("123456789012345678", "sequential", "The password follows a sequence or a row of keys."),
        (
            "wintergardener2",
            "contains_username",
            "The password must not be made of the username or the e-mail address.",
        ),
    ],
)
async def test_a_password_that_is_refused_is_told_why(api, password, reason, detail):
    body = {"username": "wintergardener", "password": password, "email": "meadowlark.foxglove@example.com"}
    answer = await api.http.post("/users", json=body)
    assert seen(answer) == problem(422, "password_rejected", detail, reason=reason)
    assert await api.scalar("SELECT count(*) FROM users") == 0


async def test_a_closed_sign_up_says_so_to_everyone_and_makes_nothing(start_api):
    async with start_api() as open_api:
        await open_api.sign_up("alice")
    async with start_api(signup="closed") as api:
        for username, password in [("bob", PASSWORD), ("alice", PASSWORD), ("carol", "short"), ("a b", PASSWORD)]:
            answer = await api.http.post("/users", json={"username": username, "password": password})
            assert seen(answer) == problem(403, "signup_closed", "This service does not accept new registrations.")
        assert await api.scalar("SELECT array_agg(username) FROM users") == ["alice"]


async def test_nobody_signs_up_with_privileges(api):
    """F64"""
    for member in PRIVILEGED.keys() - {"password"}:
        body = {"username": "mallory", "password": PASSWORD, member: PRIVILEGED[member]}
        assert seen(await api.http.post("/users", json=body)) == not_permitted(member)
    assert await api.scalar("SELECT count(*) FROM users") == 0


# The account as its owner sees it


async def test_the_account_shows_everything_but_the_password(api):
    alice = await api.sign_up("alice", email="alice@example.com")
    await execute(api, "UPDATE users SET roles = '{admin,editor}', email_verified = true")
    api.clock.advance(seconds=90)
    answer = await api.me(await access_token(alice))
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json() == {
        "id": alice.id,
        "username": "alice",
        "email": "alice@example.com",
        "email_verified": True,
        "roles": ["admin", "editor"],
        "created_at": "2026-11-22T12:00:00Z",
        "password_changed_at": "2026-11-22T12:00:00Z",
    }


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/users/me", None),
        ("PATCH", "/users/me", {"email": None}),
        ("PUT", "/users/me/password", {"current_password": PASSWORD, "new_password": NEW_PASSWORD}),
        ("DELETE", "/users/me", {"current_password": PASSWORD}),
    ],
)
async def test_without_a_token_the_account_is_out_of_reach(api, alice, method, path, body):
    answer = await api.http.request(method, path, json=body)
    assert seen(answer) == UNAUTHENTICATED
    assert answer.headers["www-authenticate"] == 'Bearer realm="identity"'
    await alice.log_in()


async def test_nobody_reaches_another_account_by_its_id_or_name(api, alice, bob):
    """F64: an account has no address but `/users/me`."""
    token = await access_token(alice)
    for path in (f"/users/{bob.id}", "/users/bob", f"/users/{bob.id}/password", "/users"):
        for method in ("GET", "PATCH", "PUT", "DELETE"):
            answer = await api.http.request(method, path, json={"email": None}, headers=bearer(token))
            assert answer.status_code in (404, 405), (method, path)


# Changing it


async def test_a_change_of_the_email_address_leaves_the_rest_alone(api, alice):
    token = await access_token(alice)
    before = (await api.me(token)).json()
    answer = await api.http.patch("/users/me", json={"email": "alice@BÜCHER.example"}, headers=bearer(token))
    assert answer.status_code == 200
    assert answer.json() == before | {"email": "alice@xn--bcher-kva.example"}
    assert (await api.me(token)).json() == answer.json()


async def test_null_removes_the_email_address_and_its_proof(api):
    alice = await api.sign_up("alice", email="alice@example.com")
    await execute(api, "UPDATE users SET email_verified = true")
    answer = await api.http.patch("/users/me", json={"email": None}, headers=bearer(await access_token(alice)))
    assert answer.status_code == 200
    assert (answer.json()["email"], answer.json()["email_verified"]) == (None, False)


@pytest.mark.parametrize(
    ("change", "still_verified"),
    [
        ({"email": "other@example.com"}, False),
        ({"email": "Alice@example.com"}, False),
        ({"email": "alice@example.com"}, True),
        ({"email": "alice@EXAMPLE.COM"}, True),
        ({"username": "alice2"}, True),
        ({}, True),
    ],
)
async def test_another_email_address_has_to_be_proved_anew(api, change, still_verified):
    alice = await api.sign_up("alice", email="alice@example.com")
    await execute(api, "UPDATE users SET email_verified = true")
    answer = await api.http.patch("/users/me", json=change, headers=bearer(await access_token(alice)))
    assert answer.status_code == 200
    assert answer.json()["email_verified"] is still_verified


async def test_the_way_back_to_a_proved_address_does_not_bring_its_proof_back(api):
    alice = await api.sign_up("alice", email="alice@example.com")
    await execute(api, "UPDATE users SET email_verified = true")
    token = await access_token(alice)
    for email in ("other@example.com", "alice@example.com"):
        answer = await api.http.patch("/users/me", json={"email": email}, headers=bearer(token))
        assert answer.json()["email_verified"] is False


async def test_another_username_is_the_one_to_log_in_with_from_then_on(api, alice):
    tokens = await alice.log_in()
    answer = await api.http.patch("/users/me", json={"username": "ALICIA"}, headers=bearer(tokens["access_token"]))
    assert answer.status_code == 200
    assert answer.json()["username"] == "alicia"
    assert answer.json()["id"] == alice.id
    assert (await api.me(tokens["access_token"])).json()["username"] == "alicia"
    assert (await api.refresh(tokens["refresh_token"])).status_code == 200
    old = await api.token(grant_type="password", username="alice", password=PASSWORD)
    assert (old.status_code, old.json()) == (400, WRONG_LOGIN)
    await Account(api, alice.id, "alicia", PASSWORD).log_in()


async def test_ones_own_name_in_other_letters_is_no_conflict(api, alice):
    answer = await api.http.patch(
        "/users/me", json={"username": full_width("ALICE")}, headers=bearer(await access_token(alice))
    )
    assert (answer.status_code, answer.json()["username"]) == (200, "alice")


@pytest.mark.parametrize("twin", ["bob", "BOB", full_width("bob")])
async def test_a_name_that_is_taken_cannot_be_changed_to(api, alice, bob, twin):
    token = await access_token(alice)
    change = {"username": twin, "email": "new@example.com"}
    assert seen(await api.http.patch("/users/me", json=change, headers=bearer(token))) == TAKEN
    me = (await api.me(token)).json()
    assert (me["username"], me["email"]) == ("alice", None)


async def test_of_eight_who_want_one_name_at_once_one_gets_it(api):
    tokens = [await access_token(await api.sign_up(f"user{number}")) for number in range(8)]
    answers = await asyncio.gather(
        *(api.http.patch("/users/me", json={"username": "wanted"}, headers=bearer(token)) for token in tokens)
    )
    assert Counter(answer.status_code for answer in answers) == {200: 1, 409: 7}
    assert await api.scalar("SELECT count(*) FROM users WHERE username = 'wanted'") == 1


async def test_two_changes_at_once_of_different_members_both_stay(api, alice, database_url):
    """A change writes what it was asked to change, not what it had read of the rest before."""
    token = await access_token(alice)
    blocker = await asyncpg.connect(database_url)
    async with blocker.transaction():
        await blocker.execute("SELECT FROM users FOR UPDATE")
        changes = [
            asyncio.create_task(api.http.patch("/users/me", json=change, headers=bearer(token)))
            for change in ({"username": "alicia"}, {"email": "alice@example.com"})
        ]
        for _ in range(500):  # until both have read the account and wait to write it
            if await blocker.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted") == len(changes):
                break
            await asyncio.sleep(0.01)
        else:
            pytest.fail("they do not wait")
    await blocker.close()
    assert [answer.status_code for answer in await asyncio.gather(*changes)] == [200, 200]
    me = (await api.me(token)).json()
    assert (me["username"], me["email"]) == ("alicia", "alice@example.com")


async def test_nobody_reaches_privileges_by_changing_their_account(api, alice):
    """F64: refused as a whole, so that the permitted member beside it changes nothing either."""
    token = await access_token(alice)
    before = (await api.me(token)).json()
    for member, value in PRIVILEGED.items():
        change = {"email": "alice@example.com", member: value}
        assert seen(await api.http.patch("/users/me", json=change, headers=bearer(token))) == not_permitted(member)
    assert (await api.me(token)).json() == before
    assert await api.scalar("SELECT roles FROM users") == []
    await alice.log_in()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"username": "al ice"},
            problem(
                422,
                "username_rejected",
                "The username must consist of letters, digits and punctuation, without spaces.",
            ),
        ),
        (
            {"username": "x" * 255},
            problem(422, "username_rejected", "The username must have at most 254 characters."),
        ),
        (
            {"email": "not an address"},
            problem(422, "email_rejected", "This is not an e-mail address that can be used."),
        ),
        (
            {"username": None},
            problem(
                422,
                "validation_failed",
                "The request has members that are missing or wrong.",
                errors=[{"pointer": "/username", "detail": "Input should be a valid string"}],
            ),
        ),
    ],
)
async def test_a_change_that_cannot_be_made_changes_nothing(api, alice, change, expected):
    token = await access_token(alice)
    before = (await api.me(token)).json()
    assert seen(await api.http.patch("/users/me", json=change, headers=bearer(token))) == expected
    assert (await api.me(token)).json() == before


# Another password


async def test_another_password_ends_all_other_sessions_at_once_and_this_one_goes_on(api, alice):
    """PWD-11"""
    here, *elsewhere = [await alice.log_in() for _ in range(3)]
    api.clock.advance(seconds=5)
    answer = await change_password(api, here["access_token"], PASSWORD, NEW_PASSWORD)
    assert (answer.status_code, answer.content) == (204, b"")
    for tokens in elsewhere:
        assert seen(await api.me(tokens["access_token"])) == TOKEN_REVOKED
        refused = await api.refresh(tokens["refresh_token"])
        assert (refused.status_code, refused.json()) == (400, SESSION_OVER)
    me = await api.me(here["access_token"])
    assert me.status_code == 200
    assert me.json()["password_changed_at"] == "2026-11-22T12:00:05Z"
    refreshed = await api.refresh(here["refresh_token"])
    assert refreshed.status_code == 200
    assert (await api.me(refreshed.json()["access_token"])).status_code == 200
    reasons = await api.scalar("SELECT array_agg(reason) FROM revoked_tokens")
    assert reasons == ["password_changed"] * 2


async def test_the_old_password_no_longer_logs_in_and_the_new_one_does(api, alice):
    api.clock.advance(seconds=1)
    assert (await change_password(api, await access_token(alice), PASSWORD, NEW_PASSWORD)).status_code == 204
    old = await api.token(grant_type="password", username="alice", password=PASSWORD)
    assert (old.status_code, old.json()) == (400, WRONG_LOGIN)
    await Account(api, alice.id, "alice", NEW_PASSWORD).log_in()


async def test_the_session_that_changed_the_password_can_change_it_again(api, alice):
    token = await access_token(alice)
    for current, new in [(PASSWORD, NEW_PASSWORD), (NEW_PASSWORD, PASSWORD)]:
        api.clock.advance(seconds=1)
        assert (await change_password(api, token, current, new)).status_code == 204
    await alice.log_in()


async def test_a_password_change_leaves_everybody_else_logged_in(api, alice, bob):
    bobs = await bob.log_in()
    api.clock.advance(seconds=1)
    assert (await change_password(api, await access_token(alice), PASSWORD, NEW_PASSWORD)).status_code == 204
    assert (await api.me(bobs["access_token"])).status_code == 200
    assert (await api.refresh(bobs["refresh_token"])).status_code == 200


@pytest.mark.parametrize("wrong", ["wise old owls never sleep", "", NEW_PASSWORD, PASSWORD + " ", PASSWORD.upper()])
async def test_without_the_current_password_nothing_changes(api, alice, wrong):
    tokens, others = await alice.log_in(), await alice.log_in()
    api.clock.advance(seconds=1)
    assert seen(await change_password(api, tokens["access_token"], wrong, NEW_PASSWORD)) == WRONG_CURRENT
    assert (await api.me(others["access_token"])).status_code == 200
    await alice.log_in()


@pytest.mark.parametrize(
    ("new", "reason"),
    [("too short", "too_short"), ("alicealicealice", "contains_username"), ("123456789012345678", "sequential")],
)
async def test_a_new_password_obeys_the_policy_too(api, alice, new, reason):
    """PWD-4"""
    tokens, others = await alice.log_in(), await alice.log_in()
    refused = await change_password(api, tokens["access_token"], PASSWORD, new)
    assert (refused.status_code, refused.json()["code"], refused.json()["reason"]) == (422, "password_rejected", reason)
    assert (await api.me(others["access_token"])).status_code == 200
    await alice.log_in()


async def test_of_two_password_changes_at_once_one_wins(api, alice):
    """The loser proved a password that was no longer in force when it came to writing."""
    tokens = [await alice.log_in() for _ in range(2)]
    wanted = ["purple elephants dance at dusk", "wise old owls never sleep"]
    api.clock.advance(seconds=1)
    answers = await asyncio.gather(
        *(change_password(api, own["access_token"], PASSWORD, new) for own, new in zip(tokens, wanted, strict=True))
    )
    assert sorted(answer.status_code for answer in answers) == [204, 403]
    winner = next(number for number, answer in enumerate(answers) if answer.status_code == 204)
    assert seen(answers[1 - winner]) == WRONG_CURRENT
    assert (await api.me(tokens[winner]["access_token"])).status_code == 200
    assert seen(await api.me(tokens[1 - winner]["access_token"])) == TOKEN_REVOKED
    logins = [await api.token(grant_type="password", username="alice", password=password) for password in wanted]
    assert [login.status_code == 200 for login in logins] == [number == winner for number in (0, 1)]


async def test_no_login_with_the_old_password_outlives_a_change_that_overtakes_it(api, alice):
    """A session begun while the password changes is either refused or ended by it."""
    here = await alice.log_in()
    api.clock.advance(seconds=1)
    logins = [api.token(grant_type="password", username="alice", password=PASSWORD) for _ in range(6)]
    changed, *answers = await asyncio.gather(
        change_password(api, here["access_token"], PASSWORD, NEW_PASSWORD), *logins
    )
    assert changed.status_code == 204
    for answer in answers:
        if answer.status_code == 200:
            assert seen(await api.me(answer.json()["access_token"])) == TOKEN_REVOKED
            assert (await api.refresh(answer.json()["refresh_token"])).json() == SESSION_OVER
        else:
            assert (answer.status_code, answer.json()) == (400, WRONG_LOGIN)


@pytest.mark.parametrize("act", ["change the password", "delete the account"])
async def test_another_accounts_password_proves_nothing_even_under_a_name_that_changed_hands(start_api, act):
    """PWD-11: whoever stole a token renames the victim, takes the name and proves a password of their own.

    One connection makes the requests queue up between each other's statements.
    """
    async with start_api(database_pool_size=1) as api:
        alice, mallory = await api.sign_up("alice"), await api.sign_up("mallory", "wise old owls never sleep")
        stolen, own = await access_token(alice), await access_token(mallory)
        api.clock.advance(seconds=1)
        third = (
            change_password(api, stolen, mallory.password, NEW_PASSWORD)
            if act == "change the password"
            else delete(api, stolen, mallory.password)
        )
        steps = (
            api.http.patch("/users/me", json={"username": "alice-before"}, headers=bearer(stolen)),
            api.http.patch("/users/me", json={"username": "alice"}, headers=bearer(own)),
            third,
        )
        under_way = []
        async with api.database.connection():
            for step in steps:
                under_way.append(asyncio.create_task(step))
                await until(lambda: len(api.database._lending._waiting) == len(under_way))
        *renamed, refused = await asyncio.gather(*under_way)
        assert [answer.status_code for answer in renamed] == [200, 200]
        assert refused.status_code == 403
        assert seen(refused) == WRONG_CURRENT
        await Account(api, alice.id, "alice-before", PASSWORD).log_in()


async def test_no_password_is_set_for_an_account_that_was_disabled_meanwhile(api, alice):
    """Between the proof of the old one and this, the new one is hashed."""
    proved_at = await api.scalar("SELECT password_changed_at FROM users")
    await execute(api, "UPDATE users SET disabled_at = now()")
    with pytest.raises(CurrentPasswordWrong):
        await api.database.transact(
            lambda db: registration.change_password(
                db,
                UUID(alice.id),
                password_hash="another",
                proved_at=proved_at,
                keep_session=uuid4(),
                by=TESTER,
                now=api.clock(),
            )
        )


@pytest.mark.parametrize("end", ["revoked", "disabled", "expired"])
async def test_a_token_that_is_over_changes_and_deletes_nothing(api, alice, end):
    tokens = await alice.log_in()
    if end == "revoked":
        await api.http.post("/revoke", data={"token": tokens["refresh_token"]})
    elif end == "disabled":
        await execute(api, "UPDATE users SET disabled_at = now()")
    else:
        api.clock.advance(seconds=600)
    token = tokens["access_token"]
    assert seen(await change_password(api, token, PASSWORD, NEW_PASSWORD)) == TOKEN_REVOKED
    assert seen(await delete(api, token, PASSWORD)) == TOKEN_REVOKED
    assert seen(await api.http.patch("/users/me", json={"email": None}, headers=bearer(token))) == TOKEN_REVOKED
    await execute(api, "UPDATE users SET disabled_at = NULL")
    await alice.log_in()


# The end


async def test_deleting_the_account_leaves_nothing_that_works(api, alice):
    """F62"""
    sessions = [await alice.log_in() for _ in range(3)]
    answer = await delete(api, sessions[0]["access_token"], PASSWORD)
    assert (answer.status_code, answer.content) == (204, b"")
    for tokens in sessions:
        assert seen(await api.me(tokens["access_token"])) == TOKEN_REVOKED
        refused = await api.refresh(tokens["refresh_token"])
        assert (refused.status_code, refused.json()) == (400, SESSION_OVER)
    login = await api.token(grant_type="password", username="alice", password=PASSWORD)
    assert (login.status_code, login.json()) == (400, WRONG_LOGIN)
    assert await api.scalar("SELECT count(*) FROM users") == 0
    assert await api.scalar("SELECT count(*) FROM sessions") == 0


async def test_deleting_the_account_leaves_a_record_of_its_sessions_for_everyone_who_holds_a_token(api, alice):
    for _ in range(2):
        await alice.log_in()
    token = await access_token(alice)
    sessions = await api.scalar("SELECT array_agg(id::text ORDER BY id) FROM sessions")
    assert (await delete(api, token, PASSWORD)).status_code == 204
    assert await api.scalar("SELECT array_agg(jti ORDER BY jti) FROM revoked_tokens") == sessions
    assert await api.scalar("SELECT array_agg(DISTINCT reason) FROM revoked_tokens") == ["deleted"]


async def test_whoever_takes_the_name_of_a_deleted_account_is_somebody_else(api, alice):
    """RS-2, F62: neither the id nor a token of the old account comes back with the name."""
    tokens = await alice.log_in()
    assert (await delete(api, tokens["access_token"], PASSWORD)).status_code == 204
    successor = await api.sign_up("alice", NEW_PASSWORD)
    assert successor.id != alice.id
    assert seen(await api.me(tokens["access_token"])) == TOKEN_REVOKED
    assert (await api.refresh(tokens["refresh_token"])).json() == SESSION_OVER
    await successor.log_in()


@pytest.mark.parametrize("wrong", ["wise old owls never sleep", "", PASSWORD + " "])
async def test_without_the_password_nothing_is_deleted(api, alice, wrong):
    tokens = await alice.log_in()
    assert seen(await delete(api, tokens["access_token"], wrong)) == WRONG_CURRENT
    assert (await api.me(tokens["access_token"])).status_code == 200
    await alice.log_in()


async def test_deleting_one_account_leaves_the_others(api, alice, bob):
    bobs = await bob.log_in()
    assert (await delete(api, await access_token(alice), PASSWORD)).status_code == 204
    assert (await api.me(bobs["access_token"])).status_code == 200
    assert (await api.refresh(bobs["refresh_token"])).status_code == 200


async def test_an_account_that_is_deleted_eight_times_at_once_is_deleted_once(api, alice):
    tokens = [await access_token(alice) for _ in range(8)]
    answers = await asyncio.gather(*(delete(api, token, PASSWORD) for token in tokens))
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses[204] == 1
    assert set(statuses) <= {204, 401, 403, 404}
    assert await api.scalar("SELECT count(*) FROM users") == 0


async def test_logins_and_refreshes_that_race_a_deletion_leave_no_session(api, alice):
    sessions = [await alice.log_in() for _ in range(4)]
    logins = [api.token(grant_type="password", username="alice", password=PASSWORD) for _ in range(6)]
    refreshes = [api.refresh(tokens["refresh_token"]) for tokens in sessions]
    deleted, *answers = await asyncio.gather(delete(api, sessions[0]["access_token"], PASSWORD), *logins, *refreshes)
    assert deleted.status_code == 204
    assert {answer.status_code for answer in answers} <= {200, 400}
    assert await api.scalar("SELECT count(*) FROM sessions") == 0
    for answer in answers:
        if answer.status_code == 200:
            assert seen(await api.me(answer.json()["access_token"])) == TOKEN_REVOKED


async def test_no_answer_ever_holds_a_password_or_its_hash(api):
    """F66"""
    answers: list[httpx2.Response] = []

    async def keep(answer: httpx2.Response) -> None:
        await answer.aread()
        answers.append(answer)

    api.http.event_hooks = {"response": [keep]}
    alice = await api.sign_up("alice", email="alice@example.com")
    stored = [await api.scalar("SELECT password_hash FROM users")]
    token = await access_token(alice)
    await api.me(token)
    await api.http.patch("/users/me", json={"username": "alicia"}, headers=bearer(token))
    api.clock.advance(seconds=1)
    assert (await change_password(api, token, PASSWORD, NEW_PASSWORD)).status_code == 204
    stored.append(await api.scalar("SELECT password_hash FROM users"))
    await change_password(api, token, "a wrong one, longer than most", NEW_PASSWORD)
    await api.http.post("/users", json={"username": "alicia", "password": PASSWORD})
    await delete(api, token, "a wrong one, longer than most")
    assert (await delete(api, token, NEW_PASSWORD)).status_code == 204
    assert len(set(stored)) == 2
    assert all(value.startswith("$argon2id$") for value in stored)
    secrets = [*stored, *(value.rpartition("$")[2] for value in stored), "argon2", PASSWORD, NEW_PASSWORD]
    shown = "\n".join(f"{answer.headers.multi_items()} {answer.text}" for answer in answers)
    assert len(answers) == 9
    assert [secret for secret in secrets if secret in shown] == []


async def test_an_account_that_is_gone_by_now_is_not_changed(api):
    """Deleted between the look at the token and the change."""
    async with api.database.connection() as db:
        with pytest.raises(UserNotFound):
            await registration.update(
                db, uuid4(), username="nobody", change_email=False, email=None, by=TESTER, now=START
            )


async def test_a_change_is_recorded_as_what_it_did_and_not_what_another_did_meanwhile(api, alice):
    """LOG-1: an administrator's change of an address looked like the renaming that its user made beside it."""
    url = api.settings.database_url.get_secret_value()
    other = await asyncpg.connect(url)
    async with other.transaction():
        await other.execute("UPDATE users SET username = 'mallory'")
        changing = asyncio.create_task(
            api.database.transact(
                lambda db: registration.update(
                    db, UUID(alice.id), username=None, change_email=True, email="a@example.com", by=TESTER, now=START
                )
            )
        )
        await until_somebody_waits(api)
    await other.close()
    assert (await changing).username == "mallory"
    details = await api.scalar("SELECT details::text FROM audit_events WHERE event = 'user.updated'")
    assert json.loads(details) == {"email": "changed"}


@pytest.mark.parametrize("meanwhile", ["changed the password", "was disabled"])
async def test_a_deletion_that_something_overtook_deletes_nothing(api, alice, clock, meanwhile):
    """PWD-11: who proved the password before it was changed is logged out by then, and no owner any more."""
    thief, owner = await alice.log_in(), await alice.log_in()
    clock.advance(seconds=1)
    blocker = await asyncpg.connect(api.settings.database_url.get_secret_value())
    async with blocker.transaction():
        await blocker.execute(LOCK_ADMINISTRATION)  # another administrative act
        deletion = {"headers": bearer(thief["access_token"]), "json": {"current_password": PASSWORD}}
        deleting = asyncio.create_task(api.http.request("DELETE", "/users/me", **deletion))
        await until_somebody_waits(api)
        if meanwhile == "was disabled":
            await blocker.execute("UPDATE users SET disabled_at = $1", clock())
        else:
            change = {"current_password": PASSWORD, "new_password": "wise old owls never sleep"}
            answer = await api.http.put("/users/me/password", headers=bearer(owner["access_token"]), json=change)
            assert answer.status_code == 204
    await blocker.close()
    assert (await deleting).json()["code"] == "current_password_wrong"
    assert await api.scalar("SELECT count(*) FROM users") == 1


@pytest.mark.parametrize("change", [{}, {"username": "ALICE"}, {"email": None}])
async def test_a_change_to_what_is_so_already_is_recorded_nowhere(api, alice, change):
    """Nobody can bury the record under changes that are none."""
    headers = bearer((await alice.log_in())["access_token"])
    assert (await api.http.patch("/users/me", json=change, headers=headers)).status_code == 200
    assert await api.scalar("SELECT count(*) FROM audit_events WHERE event = 'user.updated'") == 0
