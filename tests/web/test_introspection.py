"""`POST /introspect` (RFC 7662): who is told what, and who nothing at all (INT-1, INT-2, INT-3, F19)."""

import json
from base64 import urlsafe_b64decode
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from identity_service.accounts import registration as accounts
from identity_service.clients import registration
from identity_service.database import Connection
from identity_service.tokens import jws
from tests.conftest import ISSUER, TESTER, Account, Api, Robot, bearer, register

INACTIVE = {"active": False}
FOR_USERS = {"grants": ["password", "refresh_token", "client_credentials"], "first_party": True}


def claims_of(token: str) -> dict[str, Any]:
    payload = token.split(".")[1]
    claims: dict[str, Any] = json.loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return claims


@pytest.fixture
async def robot(api: Api) -> Robot:
    return await register(api, "robot")


@pytest.fixture
async def backend(api: Api) -> Robot:
    return await register(api, "backend", **FOR_USERS)


async def log_in(backend: Robot, alice: Account, **more: str) -> dict[str, Any]:
    answer = await backend.token(grant_type="password", username="alice", password=alice.password, **more)
    assert answer.status_code == 200, answer.text
    tokens: dict[str, Any] = answer.json()
    return tokens


# What is told


async def test_a_users_access_token_is_described_whole(api, alice, robot):
    """INT-2: the same as the token itself says, and the name of its user."""
    token = (await alice.log_in())["access_token"]
    claims = claims_of(token)
    assert await robot.introspect(token) == {
        "active": True,
        "iss": ISSUER,
        "sub": alice.id,
        "client_id": "first-party",
        "iat": claims["iat"],
        "exp": claims["exp"],
        "scope": "",
        "aud": ["api", ISSUER],
        "jti": claims["jti"],
        "token_type": "Bearer",
        "username": "alice",
        "sid": claims["sid"],
    }


async def test_a_clients_own_token_is_described_without_a_user(robot):
    token = await robot.access_token(scope="orders:read")
    claims = claims_of(token)
    assert await robot.introspect(token) == {
        "active": True,
        "iss": ISSUER,
        "sub": "robot",
        "client_id": "robot",
        "iat": claims["iat"],
        "exp": claims["exp"],
        "scope": "orders:read",
        "aud": ["api"],
        "jti": claims["jti"],
        "token_type": "Bearer",
    }


async def test_a_refresh_token_is_described_to_its_own_client_and_has_no_token_type(alice, backend):
    token = (await log_in(backend, alice))["refresh_token"]
    claims = claims_of(token)
    assert await backend.introspect(token) == {
        "active": True,
        "iss": ISSUER,
        "sub": alice.id,
        "client_id": "backend",
        "iat": claims["iat"],
        "exp": claims["exp"],
        "scope": "",
        "aud": ISSUER,
        "jti": claims["jti"],
        "username": "alice",
        "sid": claims["sid"],
    }


async def test_no_answer_is_stored_anywhere(alice, robot):
    """INT-3"""
    for token in ("nonsense", (await alice.log_in())["access_token"]):
        answer = await robot.post("/introspect", token=token)
        assert (answer.headers["cache-control"], answer.headers["pragma"]) == ("no-store", "no-cache")
        assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("hint", ["access_token", "refresh_token", "id_token", "\u00e9", ""])
async def test_the_hint_never_changes_the_answer(alice, backend, hint):
    tokens = await log_in(backend, alice)
    for token in (tokens["access_token"], tokens["refresh_token"]):
        answer = await backend.post("/introspect", token=token, token_type_hint=hint)
        assert answer.json() == await backend.introspect(token)
        assert answer.json()["active"]


async def test_asking_spends_nothing(api, alice, backend):
    tokens = await log_in(backend, alice)
    for _ in range(3):
        assert (await backend.introspect(tokens["refresh_token"]))["active"]
    assert (await backend.token(grant_type="refresh_token", refresh_token=tokens["refresh_token"])).status_code == 200


# Who is told


async def test_a_token_authorises_nobody_to_ask_about_it(api, alice, robot):
    """INT-1: neither as a bearer nor as a secret."""
    for token in ((await alice.log_in())["access_token"], await robot.access_token()):
        for headers, form in (
            (bearer(token), {}),
            (bearer(token), {"client_id": "robot"}),
            ({}, {"client_id": "robot", "client_secret": token}),
        ):
            answer = await api.http.post("/introspect", data={"token": token} | form, headers=headers)
            assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
            assert answer.json().keys() == {"error", "error_description"}


@pytest.mark.parametrize("form", [{}, {"client_id": "first-party"}])
async def test_a_public_client_is_told_nothing(api, alice, form):
    """Anybody can be a public client."""
    token = (await alice.log_in())["access_token"]
    answer = await api.http.post("/introspect", data={"token": token} | form)
    assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
    answer = await api.http.post("/introspect", data={"token": token}, auth=("first-party", ""))
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Basic realm="identity", charset="UTF-8"'


async def test_a_request_without_a_token_is_invalid(robot):
    answer = await robot.post("/introspect", token_type_hint="access_token")
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


async def test_a_foreign_caller_is_told_exactly_nothing(api, alice, backend, robot):
    """INT-2, F19: not even that there is such a token."""
    stranger = await register(api, "stranger", audience=["elsewhere"])
    tokens = await log_in(backend, alice)
    for token in (
        (await alice.log_in())["access_token"],
        (await alice.log_in())["refresh_token"],
        tokens["access_token"],
        tokens["refresh_token"],
        await robot.access_token(),
        await backend.access_token(),
    ):
        assert await stranger.introspect(token) == INACTIVE
    assert await robot.introspect(tokens["refresh_token"]) == INACTIVE, "refresh tokens are for their client alone"
    assert await register_with(api, "other-backend", tokens["refresh_token"]) == INACTIVE


async def register_with(api: Api, client_id: str, token: str) -> Any:
    return await (await register(api, client_id, **FOR_USERS)).introspect(token)


@pytest.mark.parametrize(
    ("issued_to", "asking", "told"),
    [
        # A client whose id is an audience of the token: it is a resource server.
        ({"audience": ["orders"]}, ("orders", {"audience": ["elsewhere"]}), True),
        ({"audience": ["orders", "stock"]}, ("stock", {"audience": ["elsewhere"]}), True),
        ({"audience": ["orders"]}, ("stock", {"audience": ["elsewhere"]}), False),
        # The token of a third party: an audience in common is not enough.
        ({"audience": ["orders"]}, ("stock", {"audience": ["orders"]}), False),
        ({}, ("stock", {}), False),
        # The token of a first-party client: an audience in common is.
        ({"audience": ["orders"], "first_party": True}, ("stock", {"audience": ["orders"]}), True),
        ({"first_party": True}, ("stock", {}), True),
        ({"audience": ["orders"], "first_party": True}, ("stock", {"audience": ["elsewhere"]}), False),
        # ... but not this service itself, which all first-party clients have in common.
        ({"audience": ["a"], "first_party": True}, ("stock", {"audience": ["b"], "first_party": True}), False),
    ],
    ids=str,
)
async def test_a_caller_is_told_of_what_is_its_business(api, issued_to, asking, told):
    """INT-2, F19"""
    token = await (await register(api, "issued-to", **issued_to)).access_token()
    client_id, more = asking
    assert (await (await register(api, client_id, **more)).introspect(token))["active"] is told


@pytest.mark.parametrize("made_up", ["x", "..", "e30.e30.e30", "\u00e9", "x" * 60_000, "null", "a.b.c"])
async def test_what_is_no_token_is_inactive(robot, made_up):
    assert await robot.introspect(made_up) == INACTIVE


async def test_a_token_without_a_session_speaks_for_nobody_but_its_client(api, robot, alice):
    """TOK-13: signed by us or not, one that names a user and no session is no token of ours."""
    payload = (await robot.access_token()).split(".")[1]
    claims = json.loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    key = api.keys.current.signer(api.clock())
    assert (await robot.introspect(jws.sign(key, "at+jwt", claims)))["active"] is True
    claims |= {"sub": alice.id, "aud": [ISSUER, "api"]}
    token = jws.sign(key, "at+jwt", claims)
    assert await robot.introspect(token) == INACTIVE
    assert (await api.me(token)).status_code == 401
    assert (await robot.post("/revoke", token=token)).status_code == 200
    assert await api.scalar("SELECT count(*) FROM revoked_tokens") == 0


# Until when


Flip = Callable[[Api, Robot], Awaitable[object]]


def by_sql(sql: str) -> Flip:
    async def flip(api: Api, _: Robot) -> None:
        async with api.database.connection() as db:
            await db.execute(sql)

    return flip


async def disable_backend(api: Api, _: Robot) -> None:
    await api.database.transact(lambda db: registration.disable(db, "backend", by=TESTER, now=api.clock()))


async def disable_alice(api: Api, _: Robot) -> None:
    async def unit(db: Connection) -> None:
        alice = await accounts.find_named(db, "alice")
        await accounts.disable(db, alice.id, by=TESTER, now=api.clock())

    await api.database.transact(unit)


ENDS: dict[str, Flip] = {
    "session ended": by_sql("UPDATE sessions SET revoked_at = now()"),
    "session gone": by_sql("DELETE FROM sessions"),
    "user disabled": by_sql("UPDATE users SET disabled_at = now()"),
    "user disabled by rule": disable_alice,
    "user gone": by_sql("DELETE FROM users"),
    "password changed": by_sql("UPDATE users SET password_changed_at = password_changed_at + interval '1 second'"),
    "client disabled": by_sql("UPDATE clients SET disabled_at = now() WHERE client_id = 'backend'"),
    "client disabled by rule": disable_backend,
    "client gone": by_sql("DELETE FROM clients WHERE client_id = 'backend'"),
}


@pytest.mark.parametrize("end", ENDS)
async def test_whatever_ends_a_session_makes_its_tokens_inactive(api, alice, backend, robot, end):
    """INT-3: at once, since it asks the database.

    F22: there is no "not before" of a user or of everybody that one could overlook. All tokens of a user end with the
    user's sessions, which a disabling, a password change and a deletion end; all of everybody end with their key.
    """
    tokens = await log_in(backend, alice)
    assert (await robot.introspect(tokens["access_token"]))["active"]
    await ENDS[end](api, backend)
    assert await robot.introspect(tokens["access_token"]) == INACTIVE
    if not end.startswith("client"):
        assert await backend.introspect(tokens["refresh_token"]) == INACTIVE


@pytest.mark.parametrize("carried", ["jti", "sid"])
async def test_a_revoked_id_is_inactive_whichever_it_is(api, alice, robot, carried):
    """INT-3: the single token, or its session."""
    token = (await alice.log_in())["access_token"]
    await api.scalar(
        "INSERT INTO revoked_tokens (jti, reason, revoked_at, expires_at)"
        " VALUES ($1, 'x', now(), 'infinity') RETURNING 1",
        claims_of(token)[carried],
    )
    assert await robot.introspect(token) == INACTIVE


@pytest.mark.parametrize("end", ["client disabled", "client disabled by rule", "client gone"])
async def test_whatever_shuts_a_client_out_makes_its_own_tokens_inactive(api, backend, robot, end):
    token = await backend.access_token()
    assert (await robot.introspect(token))["active"]
    await ENDS[end](api, backend)
    assert await robot.introspect(token) == INACTIVE


async def test_tokens_are_inactive_from_the_second_they_expire(alice, backend, robot, clock):
    tokens, own = await log_in(backend, alice), await backend.access_token()
    clock.advance(seconds=599)
    assert (await robot.introspect(tokens["access_token"]))["active"]
    assert (await robot.introspect(own))["active"]
    clock.advance(seconds=1)
    assert await robot.introspect(tokens["access_token"]) == INACTIVE
    assert await robot.introspect(own) == INACTIVE
    assert (await backend.introspect(tokens["refresh_token"]))["active"]
    clock.advance(days=14)
    assert await backend.introspect(tokens["refresh_token"]) == INACTIVE


async def test_a_spent_refresh_token_is_inactive_and_its_successor_is_not(alice, backend):
    spent = (await log_in(backend, alice))["refresh_token"]
    newest = (await backend.token(grant_type="refresh_token", refresh_token=spent)).json()["refresh_token"]
    assert await backend.introspect(spent) == INACTIVE
    assert (await backend.introspect(newest))["active"]


async def test_a_token_of_a_revoked_key_is_inactive(api, alice, robot):
    token = (await alice.log_in())["access_token"]
    api.clock.advance(seconds=1)
    api.keys.folder.revoke(json.loads(urlsafe_b64decode(token.split(".")[0] + "=="))["kid"], now=api.clock())
    api.keys.tend(api.clock())
    assert await robot.introspect(token) == INACTIVE


async def test_the_token_of_another_issuer_is_inactive(alice, start_api):
    token = (await alice.log_in())["access_token"]
    async with start_api(issuer_url="https://other.example.com", allowed_hosts="id.example.com") as other:
        assert await (await register(other, "robot2")).introspect(token) == INACTIVE
