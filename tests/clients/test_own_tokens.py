"""`grant_type=client_credentials`: what a service gets for itself, how it verifies, how it ends (TOK-8, TOK-13)."""

import json
from base64 import urlsafe_b64decode
from datetime import timedelta
from typing import Any

import httpx2
import pytest

from identity_service.clients import own_tokens, registration
from identity_service.errors import ClientRejected
from identity_service.grants import client_credentials
from identity_service.housekeeping import prune
from identity_service.revocation import LIST_SIZE
from identity_service.verifier import TokenRejected, Verifier
from tests.conftest import ISSUER, START, TESTER, Api, Robot, bearer, register

FOR_USERS = {"grants": ["password", "refresh_token", "client_credentials"], "first_party": True}


def claims_of(token: str) -> dict[str, Any]:
    payload = token.split(".")[1]
    claims: dict[str, Any] = json.loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return claims


@pytest.fixture
async def robot(api: Api) -> Robot:
    return await register(api, "robot")


# The answer


async def test_the_answer_has_an_access_token_and_no_refresh_token(robot):
    answer = await robot.token()
    assert answer.status_code == 200
    assert (answer.headers["cache-control"], answer.headers["pragma"]) == ("no-store", "no-cache")
    assert answer.json() == {
        "access_token": answer.json()["access_token"],
        "token_type": "Bearer",
        "expires_in": 600,
        "scope": "orders:read orders:write",
    }


async def test_the_token_claims_what_the_contract_says_and_nothing_of_a_user(robot):
    """TOK-13, RFC 9068: the subject is the client."""
    claims = claims_of(await robot.access_token())
    now = int(START.timestamp())
    assert claims == {
        "iss": ISSUER,
        "sub": "robot",
        "aud": ["api"],
        "client_id": "robot",
        "jti": claims["jti"],
        "iat": now,
        "exp": now + 600,
        "scope": "orders:read orders:write",
        "status": {"status_list": {"idx": claims["status"]["status_list"]["idx"], "uri": f"{ISSUER}/status-lists/0"}},
    }


async def test_no_two_tokens_share_an_id_or_a_place_in_the_lists(robot):
    tokens = [claims_of(await robot.access_token()) for _ in range(20)]
    assert len({claims["jti"] for claims in tokens}) == 20
    assert len({claims["status"]["status_list"]["idx"] for claims in tokens}) == 20


@pytest.mark.parametrize(
    ("more", "audience", "expires_in"),
    [
        ({}, ["api"], 600),
        ({"audience": ["orders", "stock"]}, ["orders", "stock"], 600),
        ({"first_party": True}, ["api", ISSUER], 600),
        ({"first_party": True, "audience": ["orders"]}, ["orders", ISSUER], 600),
        ({"access_lifetime": timedelta(seconds=30)}, ["api"], 30),
    ],
    ids=str,
)
async def test_a_token_has_the_clients_audience_and_lifetime(api, more, audience, expires_in):
    """Only tokens of first-party clients name this service itself."""
    answer = (await (await register(api, "robot", **more)).token()).json()
    claims = claims_of(answer["access_token"])
    assert (claims["aud"], answer["expires_in"]) == (audience, expires_in)
    assert claims["exp"] - claims["iat"] == expires_in


async def test_this_service_is_never_the_audience_of_a_third_party_whatever_the_settings_say(start_api):
    async with start_api(audience=f"api {ISSUER}", access_lifetime="60") as api:
        robot = await register(api, "robot")
        await api.scalar("UPDATE clients SET access_lifetime = interval '1 hour' RETURNING 1")
        claims = claims_of(await robot.access_token())
        assert claims["aud"] == ["api"]
        assert claims["exp"] - claims["iat"] == 60, "a key is published no longer than for the installation's tokens"


@pytest.mark.parametrize(
    ("scope", "granted"),
    [
        ("", "orders:read orders:write"),
        ("orders:write", "orders:write"),
        ("orders:write orders:read", "orders:write orders:read"),
    ],
)
async def test_a_client_gets_the_scopes_it_asks_for_of_its_own(robot, scope, granted):
    answer = (await robot.token(scope=scope)).json()
    assert answer["scope"] == claims_of(answer["access_token"])["scope"] == granted


@pytest.mark.parametrize(
    "scope", ["orders:delete", "orders:read orders:delete", "identity:admin", "a,b", 'a"b', "orders:read  x"]
)
async def test_a_scope_that_the_client_does_not_have_is_refused(api, robot, scope):
    answer = await robot.token(scope=scope)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_scope")
    assert await api.scalar("SELECT count(*) FROM client_tokens") == 0


async def test_a_token_is_recorded_with_its_client(api, robot):
    await robot.access_token(scope="orders:read")
    async with api.database.connection() as db:
        (row,) = await db.fetch("SELECT * FROM audit_events WHERE event = 'client.login'")
    assert (row["outcome"], row["actor_kind"], row["actor_id"], row["subject_id"]) == (
        "success",
        "client",
        "robot",
        "robot",
    )
    assert json.loads(row["details"]) == {"scope": ["orders:read"]}


async def test_a_client_that_was_disabled_since_it_proved_itself_gets_nothing(api, robot):
    async with api.database.connection() as db:
        client = await registration.find(db, "robot")
    await api.database.transact(lambda db: registration.disable(db, "robot", by=TESTER, now=api.clock()))
    with pytest.raises(ClientRejected):
        await client_credentials(api.runtime, client, scope="", by=TESTER)


# Which grants


@pytest.mark.parametrize("grant_type", ["password", "refresh_token"])
async def test_a_grant_that_the_client_was_not_given_is_unauthorized(api, alice, robot, grant_type):
    """TOK-8, F40: whatever else is right in the request."""
    tokens = await alice.log_in()
    form = {"username": "alice", "password": alice.password, "refresh_token": tokens["refresh_token"]}
    answer = await robot.token(grant_type=grant_type, **form)
    assert (answer.status_code, answer.json()["error"]) == (400, "unauthorized_client")
    assert (await api.refresh(tokens["refresh_token"])).status_code == 200


async def test_who_proves_nothing_gets_no_token_for_itself(api):
    """RFC 6749 4.4: the built-in client cannot, and nobody else was named."""
    for form in ({}, {"client_id": "first-party"}):
        answer = await api.token(grant_type="client_credentials", **form)
        assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
        assert "www-authenticate" not in answer.headers


async def test_an_unknown_grant_type_is_unsupported_for_every_client(robot):
    answer = await robot.token(grant_type="urn:ietf:params:oauth:grant-type:jwt-bearer")
    assert (answer.status_code, answer.json()["error"]) == (400, "unsupported_grant_type")


async def test_the_password_grant_that_is_switched_off_is_off_for_registered_clients_too(start_api):
    """F40"""
    async with start_api(password_grant="off") as api:
        alice, backend = await api.sign_up(), await register(api, "backend", **FOR_USERS)
        answer = await backend.token(grant_type="password", username="alice", password=alice.password)
        assert (answer.status_code, answer.json()["error"]) == (400, "unsupported_grant_type")


# A backend that logs users in


async def test_a_first_party_client_has_sessions_of_its_own(api, alice):
    backend = await register(api, "backend", audience=["orders"], access_lifetime=timedelta(seconds=60), **FOR_USERS)
    login = (await backend.token(grant_type="password", username="alice", password=alice.password)).json()
    refreshed = (await backend.token(grant_type="refresh_token", refresh_token=login["refresh_token"])).json()
    for tokens in (login, refreshed):
        claims = claims_of(tokens["access_token"])
        assert (claims["client_id"], claims["sub"], claims["aud"]) == ("backend", alice.id, ["orders", ISSUER])
        assert tokens["expires_in"] == claims["exp"] - claims["iat"] == 60
        assert (await api.me(tokens["access_token"])).status_code == 200
    assert await api.scalar("SELECT access_expires_at FROM sessions") == START + timedelta(seconds=60 + 30)


async def test_a_refresh_token_is_good_for_its_own_client_only(api, alice):
    """TOK-11, F31: not for another one, not without the secret, not with a wrong one, and not the other way round."""
    backend, other = await register(api, "backend", **FOR_USERS), await register(api, "other", **FOR_USERS)
    login = (await backend.token(grant_type="password", username="alice", password=alice.password)).json()
    form = {"grant_type": "refresh_token", "refresh_token": login["refresh_token"]}
    foreign = (await alice.log_in())["refresh_token"]
    answers = [
        await other.token(**form),
        await api.token(**form),
        await api.token(**form, client_id="first-party"),
        await api.token(**form, client_id="backend"),
        await api.token(**form, client_id="backend", client_secret=other.secret),
        await backend.token(grant_type="refresh_token", refresh_token=foreign),
    ]
    told = [(answer.status_code, answer.json()["error"]) for answer in answers]
    assert told == [(400, "invalid_grant")] * 3 + [(401, "invalid_client")] * 2 + [(400, "invalid_grant")]
    assert (await backend.token(**form)).status_code == 200
    assert (await api.refresh(foreign)).status_code == 200


async def test_a_users_scopes_are_the_roles_and_not_the_clients(api, alice):
    backend = await register(api, "backend", scope="stock:read", **FOR_USERS)
    answer = await backend.token(grant_type="password", username="alice", password=alice.password, scope="stock:read")
    assert answer.json()["scope"] == ""


# Elsewhere


@pytest.mark.parametrize("first_party", [False, True])
async def test_a_clients_token_opens_no_account(api, first_party):
    """Our own API is for users, also when the token names this service in its audience."""
    robot = await register(api, "robot", first_party=first_party)
    headers = bearer(await robot.access_token())
    for method, path in (
        ("GET", "/users/me"),
        ("PATCH", "/users/me"),
        ("DELETE", "/users/me"),
        ("PUT", "/users/me/password"),
    ):
        answer = await api.http.request(method, path, json={}, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (401, "invalid_token")


async def test_other_services_verify_it_and_its_place_in_the_list_says_when_it_is_revoked(api, robot):
    """What carries the list to them is shown in tests/processes and in the guide."""
    token, other = await robot.access_token(), await robot.access_token()
    transport = httpx2.ASGITransport(app=api.app)
    verifier = Verifier(
        ISSUER, audience="api", http=transport, follow_revocations=False, now=lambda: api.clock().timestamp()
    )
    claims = await verifier.verify(token)
    assert (claims.subject, claims.client_id, claims.session_id) == ("robot", "robot", None)
    assert (claims.roles, claims.scopes) == ((), ("orders:read", "orders:write"))
    with pytest.raises(TokenRejected, match="wrong_audience"):
        await Verifier(ISSUER, audience="stock", http=transport, follow_revocations=False).verify(token)
    assert (await robot.post("/revoke", token=token)).status_code == 200
    await look(api)
    revoked = api.runtime.revocations.revoked_in(0)
    indexes = [claims_of(each)["status"]["status_list"]["idx"] for each in (token, other)]
    assert [index in revoked for index in indexes] == [True, False]


# Ending


async def test_revoking_a_clients_token_revokes_that_one_alone(api, robot, clock):
    """REV-3: recorded once, however often it is asked for."""
    token, other = await robot.access_token(), await robot.access_token()
    for _ in range(3):
        answer = await robot.post("/revoke", token=token)
        assert (answer.status_code, answer.json()) == (200, {})
        clock.advance(seconds=1)
    assert await robot.introspect(token) == {"active": False}
    assert (await robot.introspect(other))["active"]
    async with api.database.connection() as db:
        revoked = await db.fetch("SELECT jti, reason, revoked_at, expires_at FROM revoked_tokens")
        recorded = await db.fetch("SELECT details FROM audit_events WHERE event = 'client.token_revoked'")
    assert [tuple(row) for row in revoked] == [
        (claims_of(token)["jti"], "revoked", START, START + timedelta(seconds=600 + 120))
    ]
    assert [json.loads(row["details"]) for row in recorded] == [{"tokens": 1}]


@pytest.mark.parametrize(("seconds", "revoked"), [(720, 0), (719, 1)])
async def test_what_a_verifier_may_still_take_is_revoked_with_its_client(api, robot, clock, seconds, revoked):
    """REV-3: within the leeway of its clock, and of one that is behind."""
    await robot.access_token()
    clock.advance(seconds=seconds)
    await api.database.transact(lambda db: registration.disable(db, "robot", by=TESTER, now=clock()))
    assert await api.scalar("SELECT count(*) FROM revoked_tokens") == revoked


async def test_another_clients_token_is_not_revoked(api, alice, robot):
    """REV-2, F24: in every direction, with the answer for an unknown token."""
    other, users = await register(api, "other"), (await alice.log_in())
    token = await robot.access_token()
    for answer in (
        await other.post("/revoke", token=token),
        await api.http.post("/revoke", data={"token": token}),
        await robot.post("/revoke", token=users["access_token"]),
        await robot.post("/revoke", token=users["refresh_token"]),
    ):
        assert (answer.status_code, answer.json()) == (200, {})
    assert await api.scalar("SELECT count(*) FROM revoked_tokens") == 0
    assert (await api.me(users["access_token"])).status_code == 200


async def test_a_row_lives_as_long_as_its_token_may_be_taken_somewhere(api, robot, clock):
    await robot.access_token()
    for seconds, left in ((720, 1), (1, 0)):
        clock.advance(seconds=seconds)
        await prune(api.runtime)
        assert await api.scalar("SELECT count(*) FROM client_tokens") == left


async def test_rows_go_in_batches(api, robot, clock):
    await api.scalar(
        "INSERT INTO client_tokens (jti, client_id, expires_at)"
        " SELECT n::text, 'robot', $1 FROM generate_series(1, 2500) AS n RETURNING 1",
        START,
    )
    clock.advance(seconds=121)
    async with api.database.connection() as db:
        assert [await own_tokens.prune(db, now=clock()) for _ in range(4)] == [1000, 1000, 500, 0]


async def test_a_list_is_served_while_a_clients_token_names_it(api, robot, clock):
    """Sessions end earlier than that, and the next token is in another list."""
    await robot.access_token()
    await api.scalar("SELECT setval('status_index_seq', $1)", 3 * LIST_SIZE)
    try:
        await look(api)
        assert api.runtime.revocations.first_list == 0
        clock.advance(seconds=721)
        await prune(api.runtime)
        await look(api)
        assert api.runtime.revocations.first_list == 3
    finally:
        await api.scalar("SELECT setval('status_index_seq', 1000)")


async def look(api: Api) -> None:
    """Look as often as it takes for the range to be looked at too."""
    for _ in range(10):
        await api.runtime.revocations.look(api.clock())
