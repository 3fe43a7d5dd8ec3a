"""Making, changing, disabling and deleting clients, and what that does to their sessions and tokens (F29)."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from identity_service import audit, grants
from identity_service.accounts import registration as accounts
from identity_service.audit import Event
from identity_service.clients import Client, own_tokens, registration
from identity_service.database import Connection
from identity_service.errors import (
    ClientBuiltIn,
    ClientInvalid,
    ClientNotFound,
    ClientRejected,
    ClientTaken,
    IdentityError,
    InvalidCredentials,
)
from identity_service.shell import client_secret
from tests.conftest import ISSUER, START, TESTER, Account, Api, Robot, register

A_UUID = "01938a5e-7c00-7b3a-9d2f-5a1e4c6b8d90"
FOR_USERS = {"grants": ["password", "refresh_token", "client_credentials"], "first_party": True}


@pytest.fixture
async def backend(api: Api) -> Robot:
    """A first-party client with sessions: a backend for a frontend."""
    return await register(api, "backend", **FOR_USERS)


async def do(api: Api, rule: Callable[..., Awaitable[Any]], client_id: str, **more: Any) -> Any:
    return await api.database.transact(lambda db: rule(db, client_id, by=TESTER, now=api.clock(), **more))


async def update(api: Api, client_id: str, **more: Any) -> Client:
    longest = api.settings.access_lifetime
    client: Client = await do(api, registration.update, client_id, issuer=ISSUER, longest_lifetime=longest, **more)
    return client


async def log_in(backend: Robot, alice: Account) -> dict[str, Any]:
    answer = await backend.token(grant_type="password", username=alice.username, password=alice.password)
    assert answer.status_code == 200, answer.text
    tokens: dict[str, Any] = answer.json()
    return tokens


async def events(api: Api) -> list[tuple[Any, ...]]:
    async with api.database.connection() as db:
        rows = await db.fetch(
            "SELECT event, subject_kind, reason, details FROM audit_events WHERE actor_id = 'tests' ORDER BY id"
        )
    return [(row["event"], row["subject_kind"], row["reason"], json.loads(row["details"])) for row in rows]


# What there can be


@pytest.mark.parametrize("client_id", ["a", "Orders-api", "0.9_x", "a" * 64, "first-party2"])
async def test_an_id_that_fits_into_urls_and_shells_is_taken_as_it_is(api, client_id):
    assert await (await register(api, client_id)).access_token()


@pytest.mark.parametrize(
    "client_id",
    [
        "",
        "-a",
        ".a",
        "a b",
        "a/b",
        "a:b",
        "\u00e9",
        "a" * 65,
        "a\n",
        "a\x00",
        A_UUID,
        A_UUID.replace("-", ""),
        A_UUID.upper(),
    ],
)
async def test_an_id_that_could_be_taken_for_something_else_is_refused(api, client_id):
    """TOK-13: `sub` of a client is never one of a user."""
    with pytest.raises(ClientInvalid):
        await register(api, client_id)


async def test_one_client_has_an_id_and_the_built_in_one_keeps_its_own(api):
    await register(api, "robot")
    with pytest.raises(ClientTaken):
        await register(api, "robot")
    with pytest.raises(ClientBuiltIn):
        await register(api, "first-party")


async def test_sixteen_simultaneous_registrations_make_one_client(api):
    made = await asyncio.gather(*(register(api, "robot") for _ in range(16)), return_exceptions=True)
    winners = [robot for robot in made if isinstance(robot, Robot)]
    assert sum(isinstance(robot, ClientTaken) for robot in made) == 15
    assert [(await robot.token()).status_code for robot in winners] == [200]


@pytest.mark.parametrize(
    "more",
    [
        {"grants": []},
        {"grants": ["authorization_code"]},
        {"grants": ["client_credentials", "implicit"]},
        {"grants": ["password", "refresh_token"]},
        {"grants": ["client_credentials", "refresh_token"]},
        {"grants": ["password"], "first_party": True},
        {"grants": ["refresh_token"], "first_party": True},
        {"scope": "a,b"},
        {"scope": "a  b"},
        {"scope": "identity:admin"},
        {"scope": "orders:read identity:x"},
        {"scope": 'a"b'},
        {"scope": " ".join(f"s{n}" for n in range(65))},
        {"audience": [ISSUER]},
        {"audience": ["orders", ISSUER]},
        {"audience": [ISSUER], "first_party": True},
        {"audience": ["a b"]},
        {"audience": ["a,b"]},
        {"audience": [""]},
        {"audience": ["\u00e9"]},
        {"audience": [f"a{n}" for n in range(17)]},
        {"access_lifetime": timedelta(0)},
        {"access_lifetime": timedelta(seconds=-1)},
        {"access_lifetime": timedelta(seconds=601)},
        {"secret": ""},
        {"secret": "x" * 31},
        {"secret": "x" * 257},
        {"secret": "x" * 31 + " "},
        {"secret": "\u00e9" * 40},
    ],
    ids=str,
)
async def test_a_client_that_there_cannot_be_is_refused(api, more):
    """F40: no third party ever handles passwords, and nobody is given what is this service's own."""
    with pytest.raises(ClientInvalid) as refused:
        await register(api, "robot", **more)
    assert len(refused.value.text) > 20
    assert await api.scalar("SELECT count(*) FROM clients") == 0


async def test_a_client_shows_everything_but_its_secret(api):
    robot = await register(api, "robot", audience=["orders", "orders"], access_lifetime=timedelta(seconds=60))
    async with api.database.connection() as db:
        found, everyone = await registration.find(db, "robot"), await registration.list_all(db)
    assert found == Client(
        client_id="robot",
        grants=("client_credentials",),
        scopes=("orders:read", "orders:write"),
        audience=("orders",),
        first_party=False,
        public=False,
        access_lifetime=timedelta(seconds=60),
        created_at=START,
        secret_changed_at=START,
        previous_secret_expires_at=None,
        disabled_at=None,
    )
    assert [client.client_id for client in everyone] == ["first-party", "robot"]
    assert robot.secret not in repr(everyone)


@pytest.mark.parametrize("rule", [registration.disable, registration.enable, registration.delete])
@pytest.mark.parametrize(
    ("client_id", "error"), [("nobody", ClientNotFound), ("a b", ClientNotFound), ("first-party", ClientBuiltIn)]
)
async def test_what_is_not_there_cannot_be_changed(api, rule, client_id: str, error: type[IdentityError]):
    for attempt in (
        do(api, rule, client_id),
        update(api, client_id),
        do(api, registration.rotate_secret, client_id, secret=client_secret(), overlap=timedelta(0)),
    ):
        with pytest.raises(error):
            await attempt


# Changes


async def test_a_change_leaves_the_rest_and_is_seen_by_the_next_token(api):
    robot = await register(api, "robot", audience=["orders"])
    changed = await update(
        api, "robot", scope="stock:read", change_access_lifetime=True, access_lifetime=timedelta(seconds=9)
    )
    assert (changed.scopes, changed.audience, changed.grants) == (("stock:read",), ("orders",), ("client_credentials",))
    answer = (await robot.token()).json()
    assert (answer["scope"], answer["expires_in"]) == ("stock:read", 9)
    back = await update(api, "robot", audience=[], change_access_lifetime=True)
    assert (back.audience, back.access_lifetime) == ((), None)
    assert [event[0] for event in await events(api)] == ["client.created", "client.updated", "client.updated"]


async def test_a_change_that_changes_nothing_is_not_recorded(api):
    await register(api, "robot")
    await update(api, "robot", scope="orders:read orders:write", grants=["client_credentials"])
    assert [event[0] for event in await events(api)] == ["client.created"]


@pytest.mark.parametrize(
    "more", [{"grants": ["password", "refresh_token"]}, {"scope": "identity:x"}, {"audience": [ISSUER]}]
)
async def test_a_change_is_held_to_the_same_rules(api, more):
    await register(api, "robot")
    with pytest.raises(ClientInvalid):
        await update(api, "robot", **more)


async def test_a_client_that_may_not_refresh_any_more_loses_its_sessions(api, alice, backend):
    tokens = await log_in(backend, alice)
    await update(api, "backend", grants=["client_credentials"])
    assert (await api.me(tokens["access_token"])).status_code == 401
    assert await api.scalar("SELECT reason FROM revoked_tokens") == "client_changed"
    answer = await backend.token(grant_type="refresh_token", refresh_token=tokens["refresh_token"])
    assert answer.json()["error"] == "unauthorized_client"


@pytest.mark.parametrize("overlap", [-1, 31 * 86400])
async def test_an_overlap_has_its_bounds(api, overlap):
    await register(api, "robot")
    with pytest.raises(ClientInvalid):
        await do(api, registration.rotate_secret, "robot", secret=client_secret(), overlap=timedelta(seconds=overlap))


async def test_a_secret_that_is_the_present_one_already_is_left_alone(api):
    """Whoever makes a client match a file does so every time."""
    robot = await register(api, "robot")
    await do(api, registration.rotate_secret, "robot", secret=robot.secret, overlap=timedelta(0))
    assert [event[0] for event in await events(api)] == ["client.created"]


async def test_fifty_simultaneous_rotations_leave_two_secrets_that_work(api):
    robot = await register(api, "robot")
    secrets = [client_secret() for _ in range(50)]
    day = timedelta(days=1)
    await asyncio.gather(
        *(do(api, registration.rotate_secret, "robot", secret=secret, overlap=day) for secret in secrets)
    )
    statuses = []
    for secret in (robot.secret, *secrets):
        await api.forget_failures()
        statuses.append((await Robot(api, "robot", secret).token()).status_code)
    assert sorted(statuses) == [200] * 2 + [401] * 49


# Disabling


@pytest.mark.parametrize("verb", ["disable", "delete"])
async def test_a_client_that_is_shut_out_loses_its_sessions_and_tokens_in_one_go(api, alice, bob, backend, verb):
    other = await register(api, "other")
    mine, theirs = await log_in(backend, alice), await log_in(backend, bob)
    elsewhere, own, others_own = await alice.log_in(), await backend.access_token(), await other.access_token()
    await do(api, getattr(registration, verb), "backend")
    for tokens in (mine, theirs):
        assert (await api.me(tokens["access_token"])).status_code == 401
        refreshed = await backend.token(grant_type="refresh_token", refresh_token=tokens["refresh_token"])
        assert refreshed.json()["error"] == "invalid_client"
    assert (await backend.token()).status_code == 401
    assert (await api.me(elsewhere["access_token"])).status_code == 200
    assert (await other.introspect(others_own))["active"]
    reason = {"disable": "disabled", "delete": "deleted"}[verb]
    async with api.database.connection() as db:
        rows = await db.fetch("SELECT reason, status_index FROM revoked_tokens")
    assert [row["reason"] for row in rows] == [reason] * 3
    assert len({row["status_index"] for row in rows} - {None}) == 3
    told = await events(api)
    assert sorted(event[:3] for event in told if event[0] != "client.created") == [
        (f"client.{reason}", "client", None),
        ("client.token_revoked", "client", reason),
        ("session.ended", "user", reason),
        ("session.ended", "user", reason),
    ]
    assert await api.scalar("SELECT count(DISTINCT subject_id) FROM audit_events WHERE event = 'session.ended'") == 2
    assert own


async def test_the_ends_of_all_sessions_are_recorded_together(api, alice, bob, backend):
    """In one statement, whoever's and however many they are."""
    for user in (alice, bob) * 3:
        await log_in(backend, user)
    told: list[tuple[Event, int]] = []
    before = audit.listener.set(lambda event, _outcome, _reason, times: told.append((event, times)))
    try:
        await do(api, registration.disable, "backend")
    finally:
        audit.listener.reset(before)
    assert [times for event, times in told if event is Event.SESSION_ENDED] == [6]


async def test_shutting_out_and_letting_in_twice_is_recorded_once(api, backend):
    api.clock.advance(seconds=1)
    first = await do(api, registration.disable, "backend")
    api.clock.advance(seconds=1)
    assert await do(api, registration.disable, "backend") == first
    for _ in range(2):
        assert (await do(api, registration.enable, "backend")).disabled_at is None
    told = [event[0] for event in await events(api)]
    assert [told.count(f"client.{verb}d") for verb in ("disable", "enable")] == [1, 1]


async def test_an_enabled_client_begins_anew(api, alice, backend):
    tokens, own = await log_in(backend, alice), await backend.access_token()
    await do(api, registration.disable, "backend")
    await do(api, registration.enable, "backend")
    assert (await backend.introspect(own)) == {"active": False}
    answer = await backend.token(grant_type="refresh_token", refresh_token=tokens["refresh_token"])
    assert answer.json()["error"] == "invalid_grant"
    assert (await log_in(backend, alice))["access_token"]
    assert (await backend.introspect(await backend.access_token()))["active"]


async def test_an_id_that_was_deleted_and_made_again_gets_nothing_of_the_old_one(api, alice, backend):
    tokens, own = await log_in(backend, alice), await backend.access_token()
    await do(api, registration.delete, "backend")
    again = await register(api, "backend", **FOR_USERS)
    assert (await backend.token()).status_code == 401
    assert await again.introspect(own) == {"active": False}
    answer = await again.token(grant_type="refresh_token", refresh_token=tokens["refresh_token"])
    assert answer.json()["error"] == "invalid_grant"


@pytest.mark.parametrize("flip", ["UPDATE clients SET disabled_at = now()", "DELETE FROM clients"])
async def test_no_session_goes_on_for_a_client_that_is_not_welcome(api, alice, backend, flip):
    """F29: whatever it was that shut the client out, each use looks at it. Proved by hand, as if it had just been."""
    tokens = await log_in(backend, alice)
    async with api.database.connection() as db:
        client = await registration.find(db, "backend")
        await db.execute(flip)
    assert (await api.me(tokens["access_token"])).status_code == 401
    with pytest.raises(IdentityError) as refused:
        await refresh_as(api, client, tokens["refresh_token"])
    assert type(refused.value).__name__ == "SessionEnded"
    with pytest.raises(IdentityError) as refused:
        await log_in_as(api, client, alice)
    assert type(refused.value).__name__ == "InvalidCredentials"
    with pytest.raises(IdentityError) as refused:
        await grants.client_credentials(api.runtime, client, scope="", by=TESTER)
    assert type(refused.value).__name__ == "ClientRejected"
    assert await api.scalar("SELECT count(*) FROM sessions") == 1


async def test_no_refresh_and_no_token_succeeds_once_disabling_has_returned(api, alice, backend):
    """Fifty at once, all through the same door; what was given out before is dead too."""
    sessions = [await log_in(backend, alice) for _ in range(50)]
    async with api.database.connection() as db:
        client = await registration.find(db, "backend")
    begun, done = asyncio.Event(), asyncio.Event()
    given: list[dict[str, Any]] = []
    late: list[object] = []

    async def refresh(tokens: dict[str, Any]) -> None:
        while True:
            began_after = done.is_set()
            try:
                issued = await refresh_as(api, client, tokens["refresh_token"])
                own = await grants.client_credentials(api.runtime, client, scope="", by=TESTER)
            except IdentityError:
                return
            tokens = {"refresh_token": issued.refresh_token, "access_token": issued.access_token}
            given.append(tokens)
            given.append({"access_token": own.access_token})
            begun.set()
            if began_after:
                late.append(issued)

    async def disable() -> None:
        async with asyncio.timeout(30):
            await begun.wait()
        await do(api, registration.disable, "backend")
        done.set()

    await asyncio.gather(disable(), *(refresh(tokens) for tokens in sessions))
    assert late == []
    witness = await register(api, "witness")
    assert given
    for tokens in given[-100:]:
        assert await witness.introspect(tokens["access_token"]) == {"active": False}
    assert await api.scalar("SELECT count(*) FROM sessions WHERE revoked_at IS NULL") == 0
    left = """
        SELECT count(*) FROM client_tokens AS t
         WHERE NOT EXISTS (SELECT FROM revoked_tokens AS r WHERE r.jti = t.jti)
    """
    assert await api.scalar(left) == 0


async def test_no_login_overtakes_a_disabling(api, alice, backend):
    """The session's insert waits for the client's row, and then sees what became of it."""
    async with api.database.connection() as db:
        client = await registration.find(db, "backend")
    for _ in range(5):
        outcomes = await asyncio.gather(
            *(log_in_as(api, client, alice) for _ in range(8)),
            do(api, registration.disable, "backend"),
            return_exceptions=True,
        )
        assert isinstance(outcomes[-1], Client)
        assert await api.scalar("SELECT count(*) FROM sessions WHERE revoked_at IS NULL") == 0
        await do(api, registration.enable, "backend")


async def test_disabling_while_a_user_is_disabled_ends_well(api, alice, backend):
    """Both end the same sessions; who is chosen to wait tries again."""
    for _ in range(5):
        for _ in range(8):
            await log_in(backend, alice)

        async def disable_user(db: Connection) -> None:
            await accounts.disable(db, UUID(alice.id), by=TESTER, now=api.clock())

        await asyncio.gather(do(api, registration.disable, "backend"), api.database.transact(disable_user))
        assert await api.scalar("SELECT count(*) FROM sessions WHERE revoked_at IS NULL") == 0
        await do(api, registration.enable, "backend")
        await api.database.transact(lambda db: accounts.enable(db, UUID(alice.id), by=TESTER, now=api.clock()))


async def refresh_as(api: Api, client: Client, token: str) -> grants.IssuedTokens:
    return await grants.refresh_token(api.runtime, client, unverified_token=token, scope="", by=TESTER)


async def log_in_as(api: Api, client: Client, account: Account) -> grants.IssuedTokens:
    return await grants.password(
        api.runtime, client, username=account.username, password=account.password, scope="", by=TESTER
    )


async def test_a_grant_that_was_withdrawn_meanwhile_gives_nothing_to_who_had_passed_the_door(api, alice):
    """What a request found out about its client may be old when it begins a session or a token."""
    both = ["client_credentials", "password", "refresh_token"]
    await register(api, "backend", grants=both, first_party=True)
    async with api.database.connection() as db:
        seen_at_the_door = await registration.find(db, "backend")
    facts = {"issuer": ISSUER, "longest_lifetime": api.settings.access_lifetime, "by": TESTER, "now": api.clock()}

    async def allow(*given: str) -> None:
        await api.database.transact(lambda db: registration.update(db, "backend", grants=given, **facts))

    await allow("client_credentials")
    with pytest.raises(InvalidCredentials):
        await grants.password(
            api.runtime, seen_at_the_door, username="alice", password=alice.password, scope="", by=TESTER
        )
    assert await api.scalar("SELECT count(*) FROM sessions") == 0
    await allow("password", "refresh_token")
    with pytest.raises(ClientRejected):
        await grants.client_credentials(api.runtime, seen_at_the_door, scope="", by=TESTER)
    assert await api.scalar("SELECT count(*) FROM client_tokens") == 0


async def test_an_end_is_remembered_for_as_long_as_a_token_that_a_retry_got_when_lifetimes_had_changed(api, alice):
    """REV-3, KEY-8: or it would be taken again."""
    app = await register(api, "app", **FOR_USERS, access_lifetime=timedelta(seconds=60))
    first = (await log_in(app, alice))["refresh_token"]
    second = (await app.token(grant_type="refresh_token", refresh_token=first)).json()
    assert second["expires_in"] == 60
    await update(api, "app", change_access_lifetime=True, access_lifetime=None)
    api.clock.advance(seconds=21)
    retried = (await app.token(grant_type="refresh_token", refresh_token=first)).json()
    assert retried["expires_in"] == 60 + 30 - 21, "and not 600: nothing says that the session's tokens live for so long"
    assert (await app.post("/revoke", token=second["refresh_token"])).status_code == 200
    remembered = await api.scalar("SELECT expires_at FROM revoked_tokens")
    assert remembered >= api.clock() + timedelta(seconds=retried["expires_in"] + 120)


@pytest.mark.parametrize("change", ["narrowed", "for others", "another of that name"])
async def test_no_token_is_issued_with_what_the_client_had_a_moment_ago(api, monkeypatch, change):
    """Between the proof of its secret and the row of its token it may be another one."""
    robot = await register(api, "robot")
    issue = own_tokens.issue

    async def change_first(db: Connection, client: Client, token_id: str, **more: Any) -> int:
        if change == "another of that name":
            await do(api, registration.delete, "robot")
            await register(api, "robot", scope="orders:read orders:write")
        else:
            facts: dict[str, Any] = {"scope": "orders:read"} if change == "narrowed" else {"audience": ["b"]}
            await update(api, "robot", **facts)
        return await issue(db, client, token_id, **more)

    api.clock.advance(seconds=1)
    monkeypatch.setattr(own_tokens, "issue", change_first)
    answer = await robot.token()
    assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
    assert await api.scalar("SELECT count(*) FROM client_tokens") == 0
