"""The administration API: who may do what (FPS-4, F48), what is recorded of it, and what no answer ever holds."""

import asyncio
import errno
import json
import os
import re
from base64 import urlsafe_b64decode
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from uuid import UUID, uuid4

import httpx2
import jwt
import pytest
import schemathesis

from identity_service.accounts import formats, registration, roles
from identity_service.clients import registration as clients
from identity_service.errors import DatabaseUnavailable
from identity_service.housekeeping import tend_keys
from identity_service.revocation.feed import News
from identity_service.runtime import Runtime
from identity_service.shell import client_secret
from identity_service.tokens import jws
from identity_service.web.dependencies import PUBLIC
from tests.conftest import ISSUER, PASSWORD, START, TESTER, Account, Api, bearer
from tests.conftest import register as register_client
from tests.verifier.conftest import until
from tests.web.answers import problem, seen
from tests.web.test_routes import is_guarded, routes_of

NEW_PASSWORD = "purple elephants dance at dusk"
NOT_PERMITTED = 'Bearer realm="identity", error="insufficient_scope", scope="identity:admin"'
TOO_OLD = (
    'Bearer realm="identity", error="insufficient_user_authentication", '
    'error_description="Log in again: this takes a login of the last 12 hours.", max_age="43200"'
)


async def sign_up_administrator(api: Api, username: str = "root") -> Account:
    account = await api.sign_up(username)
    await api.scalar("UPDATE users SET roles = '{admin}' WHERE username = $1 RETURNING id", username)
    return account


async def token_of(account: Account, scope: str = "identity:admin") -> str:
    token: str = (await account.log_in(scope=scope))["access_token"]
    return token


def session_of(access_token: str) -> str:
    sid: str = claims_of(access_token)["sid"]
    return sid


def claims_of(token: str) -> dict[str, Any]:
    payload = token.split(".")[1]
    claims: dict[str, Any] = json.loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return claims


@dataclass
class Admin:
    """An administrator who is logged in."""

    api: Api
    account: Account
    token: str = field(repr=False)

    async def __call__(self, method: str, path: str, body: Any = None, **more: Any) -> httpx2.Response:
        if body is not None:
            more["json"] = body
        return await self.api.http.request(method, path, headers=bearer(self.token), **more)

    async def get(self, path: str, **parameters: Any) -> Any:
        answer = await self("GET", path, params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture
async def root(api) -> Admin:
    account = await sign_up_administrator(api)
    return Admin(api, account, await token_of(account))


# The matrix


@dataclass(frozen=True)
class Row:
    """What an administrator is answered, and what body the route takes."""

    status: int
    body: Any = None


# In an order in which everything succeeds.
ADMIN_ROUTES: dict[tuple[str, str], Row] = {
    ("GET", "/admin/users"): Row(200),
    ("POST", "/admin/users"): Row(201, {"username": "carol", "password": NEW_PASSWORD, "roles": ["admin"]}),
    ("GET", "/admin/users/{user_id}"): Row(200),
    ("PATCH", "/admin/users/{user_id}"): Row(200, {"email": "bob@example.com"}),
    ("PUT", "/admin/users/{user_id}/roles"): Row(200, {"roles": ["clerk"], "end_sessions": False}),
    ("POST", "/admin/users/{user_id}/unlock"): Row(200),
    ("POST", "/admin/users/{user_id}/password-reset"): Row(201),
    ("GET", "/admin/users/{user_id}/sessions"): Row(200),
    ("DELETE", "/admin/sessions/{session_id}"): Row(204),
    ("DELETE", "/admin/users/{user_id}/sessions"): Row(204),
    ("POST", "/admin/users/{user_id}/disable"): Row(200),
    ("POST", "/admin/users/{user_id}/enable"): Row(200),
    ("DELETE", "/admin/users/{user_id}"): Row(204),
    ("GET", "/admin/roles"): Row(200),
    ("POST", "/admin/roles"): Row(201, {"name": "driver", "scopes": ["orders:read"]}),
    ("GET", "/admin/roles/{name}"): Row(200),
    ("PUT", "/admin/roles/{name}"): Row(200, {"scopes": []}),
    ("DELETE", "/admin/roles/{name}"): Row(204),
    ("GET", "/admin/clients"): Row(200),
    ("POST", "/admin/clients"): Row(201, {"client_id": "reports", "grants": ["client_credentials"]}),
    ("GET", "/admin/clients/{client_id}"): Row(200),
    ("PATCH", "/admin/clients/{client_id}"): Row(200, {"scopes": ["orders:read"]}),
    ("POST", "/admin/clients/{client_id}/rotate-secret"): Row(200, {"overlap": 60}),
    ("POST", "/admin/clients/{client_id}/disable"): Row(200),
    ("POST", "/admin/clients/{client_id}/enable"): Row(200),
    ("DELETE", "/admin/clients/{client_id}"): Row(204),
    ("GET", "/admin/keys"): Row(200),
    ("POST", "/admin/keys/rotate"): Row(200, {}),
    ("POST", "/admin/keys/{kid}/revoke"): Row(200),
    ("GET", "/admin/audit-events"): Row(200),
}
OWN_ROUTES: dict[tuple[str, str], Row] = {
    ("GET", "/users/me"): Row(200),
    ("PATCH", "/users/me"): Row(200, {"email": None}),
    ("GET", "/users/me/sessions"): Row(200),
    ("DELETE", "/users/me/sessions/{session_id}"): Row(404),  # it is bob's
    ("DELETE", "/users/me/sessions"): Row(204),
    ("PUT", "/users/me/password"): Row(204, {"current_password": PASSWORD, "new_password": NEW_PASSWORD}),
    ("DELETE", "/users/me"): Row(204, {"current_password": NEW_PASSWORD}),
}


@dataclass
class Caller:
    """Somebody with a token, and how the two kinds of routes turn them away; None for being let in."""

    headers: dict[str, str]
    at_admin: tuple[int, str] | None
    at_own: tuple[int, str] | None = None


async def nobody(api: Api) -> Caller:
    return Caller({}, (401, 'Bearer realm="identity"'), (401, 'Bearer realm="identity"'))


async def user(api: Api) -> Caller:
    """Asks for the scope, and does not get it."""
    return Caller(bearer(await token_of(await api.sign_up("mallory"))), (403, NOT_PERMITTED))


async def user_with_another_role(api: Api) -> Caller:
    account = await api.sign_up("mallory")
    await api.scalar("UPDATE users SET roles = '{clerk}' WHERE username = 'mallory' RETURNING id")
    return Caller(bearer(await token_of(account, "orders:read identity:admin")), (403, NOT_PERMITTED))


INVALID = 'Bearer realm="identity", error="invalid_token", error_description='
INVALID += '"The token is invalid, expired or revoked."'


async def service(api: Api) -> Caller:
    """A registered client with a token for itself."""
    token = await (await register_client(api, "robot")).access_token()
    return Caller(bearer(token), (401, INVALID), (401, INVALID))


async def service_of_our_own(api: Api) -> Caller:
    """Its tokens are for this service too, which still is about people."""
    token = await (await register_client(api, "backend", first_party=True)).access_token()
    assert ISSUER in claims_of(token)["aud"]
    return Caller(bearer(token), (401, INVALID), (401, INVALID))


async def service_with_a_token_that_cannot_be(api: Api) -> Caller:
    """Signed by us, and says everything it should not."""
    now = int(api.clock().timestamp())
    claims = {
        "iss": ISSUER,
        "sub": "batch-job",
        "aud": [ISSUER, "api"],
        "client_id": "batch-job",
        "jti": "a-token-of-a-service",
        "iat": now,
        "exp": now + 600,
        "scope": "identity:admin",
        "status": {"status_list": {"idx": 1, "uri": f"{ISSUER}/status-lists/0"}},
    }
    token = jws.sign(api.keys.current.signer(api.clock()), "at+jwt", claims)
    return Caller(bearer(token), (401, INVALID), (401, INVALID))


async def administrator_without_the_scope(api: Api) -> Caller:
    return Caller(bearer(await token_of(await sign_up_administrator(api), "")), (403, NOT_PERMITTED))


async def administrator_who_lost_the_role(api: Api) -> Caller:
    token = await token_of(await sign_up_administrator(api))
    await api.scalar("UPDATE users SET roles = '{}' WHERE username = 'root' RETURNING id")
    return Caller(bearer(token), (403, NOT_PERMITTED))


async def administrator_of_yesterday(api: Api) -> Caller:
    """Refreshed all the time, and still not asked for the password since."""
    account = await sign_up_administrator(api)
    tokens = await account.log_in(scope="identity:admin")
    api.clock.advance(hours=12, seconds=1)
    tokens = (await api.refresh(tokens["refresh_token"])).json()
    assert tokens["scope"] == "identity:admin"
    return Caller(bearer(tokens["access_token"]), (401, TOO_OLD))


async def administrator(api: Api) -> Caller:
    return Caller(bearer(await token_of(await sign_up_administrator(api))), None)


CALLERS: tuple[Callable[[Api], Awaitable[Caller]], ...] = (
    nobody,
    user,
    user_with_another_role,
    service,
    service_of_our_own,
    service_with_a_token_that_cannot_be,
    administrator_without_the_scope,
    administrator_who_lost_the_role,
    administrator_of_yesterday,
    administrator,
)


async def test_every_guarded_route_has_a_row(api):
    """Whoever adds a route decides here who may call it."""
    found, public = set(), 0
    for route in routes_of(api.app):
        if is_guarded(getattr(route, "dependant", None)):
            found |= {(method, route.path) for method in route.methods or ()}
        public += getattr(route.endpoint, PUBLIC, False)
    assert found == ADMIN_ROUTES.keys() | OWN_ROUTES.keys()
    assert public >= 15


@pytest.mark.parametrize("who", CALLERS)
async def test_who_may_call_what(api, bob, who):
    await create_role(api, "clerk")
    await create_client(api)
    await sign_up_administrator(api, "not-the-last-one")
    bobs = await bob.log_in()
    caller = await who(api)
    places = {"user_id": bob.id, "session_id": session_of(bobs["access_token"]), "name": "clerk"}
    places["client_id"] = "batch-job"
    before = await everything(api)
    schema = schemathesis.openapi.from_dict(api.app.openapi())
    for (method, path), row in ADMIN_ROUTES.items():
        kid = api.keys.current.published(api.clock())[1].kid
        address = path.format(**places, kid=kid)
        if caller.at_admin is None:
            given = {"json": row.body} if row.body is not None else {}
            answer = await api.http.request(method, address, headers=caller.headers, **given)
            assert answer.status_code == row.status, (method, path, answer.text)
            schema[path][method].validate_response(answer)
            assert_no_secret(answer)
            assert ("content-type" in answer.headers) == bool(answer.content)
        else:
            assert await told(api, method, address, row, caller) == {caller.at_admin}, (method, path)
    if caller.at_admin is not None:
        assert await everything(api) == before
    for (method, path), row in OWN_ROUTES.items():
        address = path.format(**places)
        if caller.at_own is None:
            given = {"json": row.body} if row.body is not None else {}
            answer = await api.http.request(method, address, headers=caller.headers, **given)
            assert answer.status_code == row.status, (method, path, answer.text)
            schema[path][method].validate_response(answer)
        else:
            assert await told(api, method, address, row, caller) == {caller.at_own}, (method, path)
    if caller.at_own is not None:
        assert await everything(api) == before
    if caller.at_admin is not None:
        assert (await api.refresh(bobs["refresh_token"])).status_code == 200


async def told(api: Api, method: str, address: str, row: Row, caller: Caller) -> set[tuple[int, str | None]]:
    """Return what a caller who is refused is told: with the body, with none, with another, and with a broken one."""
    headers = caller.headers or {}
    of_json = headers | {"Content-Type": "application/json"}
    bodies: list[dict[str, Any]] = [{"headers": headers}]
    if row.body is not None:
        bodies += [
            {"headers": headers, "json": row.body},
            {"headers": headers, "data": {"a": "form"}},
            {"headers": of_json, "content": b"{"},
            {"headers": of_json, "json": {"nothing": "of the kind"}},
        ]
    answers = [await api.http.request(method, address, **body) for body in bodies]
    return {(answer.status_code, answer.headers.get("www-authenticate")) for answer in answers}


TABLES = ("users", "sessions", "roles", "clients", "client_tokens", "revoked_tokens", "password_resets", "throttles")


async def everything(api: Api) -> list[Any]:
    """Return all that an administrator could change."""
    rows = "SELECT array_agg(t::text ORDER BY t::text) FROM {} AS t"
    return [api.keys.folder.read(), *[await api.scalar(rows.format(table)) for table in TABLES]]


async def create_client(api: Api) -> None:
    await api.database.transact(
        lambda db: clients.create(
            db,
            "batch-job",
            grants=["client_credentials"],
            scope="orders:read",
            audience=(),
            first_party=False,
            access_lifetime=None,
            secret=client_secret(),
            issuer=ISSUER,
            longest_lifetime=timedelta(minutes=10),
            by=TESTER,
            now=START,
        )
    )


async def create_role(api: Api, name: str, scope: str = "orders:read") -> None:
    await api.database.transact(lambda db: roles.create(db, name, scope=scope, by=TESTER, now=START))


def assert_no_secret(answer: httpx2.Response) -> None:
    """F65, F66"""
    for secret in ("password_hash", "$argon2", "PRIVATE KEY", '"n":', '"d":', '"p":', "digest"):
        assert secret not in answer.text


async def test_the_answer_to_a_token_that_is_not_enough_is_a_problem_document(api, alice):
    answer = await api.http.get("/admin/users", headers=bearer(await token_of(alice)))
    assert seen(answer) == problem(403, "insufficient_scope", "This takes the scope identity:admin.")


async def test_a_login_is_young_enough_for_twelve_hours_and_no_longer(api):
    account = await sign_up_administrator(api)
    tokens = await account.log_in(scope="identity:admin")
    api.clock.advance(hours=12)
    tokens = (await api.refresh(tokens["refresh_token"])).json()
    assert (await api.http.get("/admin/keys", headers=bearer(tokens["access_token"]))).status_code == 200
    api.clock.advance(seconds=1)
    answer = await api.http.get("/admin/keys", headers=bearer(tokens["access_token"]))
    text = "Log in again: this takes a login of the last 12 hours."
    assert seen(answer) == problem(401, "insufficient_user_authentication", text)


async def test_every_operation_says_what_it_takes_and_how_it_refuses(api):
    paths = api.app.openapi()["paths"]
    described = {
        (method.upper(), path): operation
        for path, item in paths.items()
        for method, operation in item.items()
        if path.startswith("/admin/")
    }
    assert described.keys() == ADMIN_ROUTES.keys()
    for (method, path), operation in described.items():
        refusals = {"400", "401", "403", "422", "503"}
        refusals |= {"404"} if "{" in path else set()
        refusals |= {"415"} if "requestBody" in operation else set()
        assert refusals <= operation["responses"].keys(), (method, path)
        assert operation["security"] == [{"OAuth2PasswordBearer": ["identity:admin"]}]
        assert operation["operationId"].isidentifier()
        assert operation["tags"][0].startswith("Administration: ")
        assert operation["description"]


# Paths


HOSTILE = [
    "x",
    "0",
    "me",
    "%2e%2e",
    "..%2f..%2fusers%2fme",
    "%2e%2e%2fkeys",
    "a%00",
    "a%0a",
    "%ff",
    "%F0%9F%A6%89",
    "1" * 10_000,
    "'%20OR%201=1--",
    "00000000-0000-0000-0000-000000000000",
    "urn:uuid:00000000-0000-0000-0000-000000000000",
    "{00000000-0000-0000-0000-000000000000}",
    "00000000000000000000000000000000",
]


async def test_an_id_that_is_none_reaches_nothing(api, root):
    """F80"""
    before = await everything(api)
    tried = 0
    for (method, path), row in (ADMIN_ROUTES | OWN_ROUTES).items():
        if "{" not in path:
            continue
        for hostile in HOSTILE:
            start, _, rest = path.partition("{")
            request = api.http.build_request(method, "/", headers=bearer(root.token), json=row.body or {})
            request.url = request.url.copy_with(raw_path=f"{start}{hostile}{rest.partition('}')[2]}".encode())
            answer = await api.http.send(request)
            assert answer.status_code == 404, (method, path, hostile, answer.text)
            assert len(answer.content) < 500
            tried += 1
    assert tried > 200
    assert await everything(api) == before


async def test_a_slash_hidden_in_an_id_reaches_no_other_route(api, root, bob):
    for path in (
        f"/admin/users/{bob.id}%2fdisable",
        f"/admin/users/{bob.id}%2Fdisable",
        f"/admin%2fusers/{bob.id}/disable",
    ):
        request = api.http.build_request("POST", "/", headers=bearer(root.token))
        request.url = request.url.copy_with(raw_path=path.encode())
        assert (await api.http.send(request)).status_code == 404
    assert await api.scalar("SELECT count(*) FROM users WHERE disabled_at IS NOT NULL") == 0


async def test_an_id_is_found_in_upper_case_too(root, bob):
    assert (await root("GET", f"/admin/users/{bob.id.upper()}")).json()["id"] == bob.id


# Users


async def test_for_a_disabled_account_no_reset_is_started(api, root, bob):
    await root("POST", f"/admin/users/{bob.id}/disable")
    before = await everything(api)
    refused = await root("POST", f"/admin/users/{bob.id}/password-reset")
    assert seen(refused) == problem(409, "user_disabled", "This account is disabled; enable it first.")
    assert await everything(api) == before


async def test_an_account_is_made_shown_changed_and_deleted(api, root):
    made = await root("POST", "/admin/users", {"username": "Carol", "password": NEW_PASSWORD, "email": "c@example.com"})
    assert made.status_code == 201
    carol = made.json()
    assert carol == {
        "id": carol["id"],
        "username": "carol",
        "email": "c@example.com",
        "email_verified": False,
        "roles": [],
        "created_at": "2026-11-22T12:00:00Z",
        "password_changed_at": "2026-11-22T12:00:00Z",
        "disabled_at": None,
    }
    place = f"/admin/users/{carol['id']}"
    assert made.headers["location"] == place
    assert (await root("GET", place)).json() == carol | {"failures": 0, "locked_until": None}
    changed = await root("PATCH", place, {"username": "Caroline", "email": None})
    assert changed.json() == carol | {"username": "caroline", "email": None}
    api.clock.advance(seconds=1)
    for _ in range(2):
        assert (await root("POST", f"{place}/disable")).json()["disabled_at"] == "2026-11-22T12:00:01Z"
        api.clock.advance(seconds=1)
    for _ in range(2):
        assert (await root("POST", f"{place}/enable")).json()["disabled_at"] is None
    for event in ("user.disabled", "user.enabled"):
        assert len(await walk(root, "/admin/audit-events", event=event)) == 1, "the second time changes nothing"
    assert (await root("DELETE", place)).status_code == 204
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/disable"), ("POST", "/unlock"), ("GET", "/sessions")):
        assert seen(await root(method, place + path)) == problem(404, "user_not_found", "There is no such user.")


async def test_an_administrator_sees_who_is_locked_out_and_unlocks(root, bob):
    """PWD-7"""
    api, place = root.api, f"/admin/users/{bob.id}"
    login = {"grant_type": "password", "username": "bob"}
    for _ in range(6):
        assert (await api.token(**login, password="wrong")).status_code == 400
    assert (await api.token(**login, password=bob.password)).status_code == 429
    shown = (await root("GET", place)).json()
    assert (shown["failures"], shown["locked_until"]) == (6, "2026-11-22T12:00:01Z")
    listed = {user["username"]: user for user in (await root.get("/admin/users"))["items"]}
    assert (listed["bob"], listed["root"]["failures"]) == (shown, 0)
    unlocked = (await root("POST", f"{place}/unlock")).json()
    assert (unlocked["failures"], unlocked["locked_until"]) == (0, None)
    assert (await api.token(**login, password=bob.password)).status_code == 200


async def test_an_administrator_is_shown_no_lock_that_is_over(root, bob):
    for _ in range(6):
        await root.api.token(grant_type="password", username="bob", password="wrong")
    root.api.clock.advance(seconds=1)
    shown = (await root("GET", f"/admin/users/{bob.id}")).json()
    assert (shown["failures"], shown["locked_until"]) == (6, None)


async def test_closed_registrations_do_not_keep_an_administrator_from_making_accounts(start_api):
    async with start_api() as api:
        account = await sign_up_administrator(api)
    async with start_api(signup="closed") as api:
        root = Admin(api, account, await token_of(Account(api, "", "root", PASSWORD)))
        assert (await root("POST", "/admin/users", {"username": "carol"})).status_code == 201


async def test_an_account_without_a_password_cannot_be_logged_in_to(api, root):
    await root("POST", "/admin/users", {"username": "carol"})
    for guess in ("!", PASSWORD, ""):
        answer = await api.token(grant_type="password", username="carol", password=guess)
        assert answer.status_code == 400


async def test_an_administrator_without_a_password_is_not_the_one_who_stays(api, root):
    """Nobody could log in as them."""
    await root("POST", "/admin/users", {"username": "carol", "roles": ["admin"]})
    answer = await root("POST", f"/admin/users/{root.account.id}/disable")
    assert (answer.status_code, answer.json()["code"]) == (409, "last_administrator")


PRIVILEGES: dict[str, Any] = {
    "id": str(uuid4()),
    "roles": ["admin"],
    "scope": "identity:admin",
    "scopes": ["identity:admin"],
    "is_admin": True,
    "password": NEW_PASSWORD,
    "password_hash": "$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$aGFzaA",
    "password_changed_at": "2026-11-22T12:00:00Z",
    "email_verified": True,
    "disabled_at": None,
    "created_at": "2000-01-01T00:00:00Z",
    "tenant": "other",
}


@pytest.mark.parametrize("member", PRIVILEGES)
async def test_what_is_no_member_cannot_be_assigned(api, root, alice, member):
    """F64"""
    token = (await alice.log_in())["access_token"]
    before = await everything(api)
    change = {"email": "new@example.com", member: PRIVILEGES[member]}
    answers = [
        await api.http.patch("/users/me", json=change, headers=bearer(token)),
        await root("PATCH", f"/admin/users/{alice.id}", change),
    ]
    if member not in ("roles", "password"):
        answers.append(await root("POST", "/admin/users", {"username": "carol", member: PRIVILEGES[member]}))
    for answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
        assert answer.json()["errors"] == [{"pointer": f"/{member}", "detail": "Extra inputs are not permitted"}]
    assert await everything(api) == before


async def test_every_body_of_an_administrator_is_read_strictly(api, root, bob):
    places = {"user_id": bob.id, "name": "clerk", "client_id": "batch-job"}
    await create_role(api, "clerk")
    await create_client(api)
    for (method, path), row in ADMIN_ROUTES.items():
        if row.body is None:
            continue
        address, good = path.format(**places), json.dumps(row.body)[:-1]
        separator = ", " if row.body else ""
        for body, media_type, expected in (
            (f'{good}{separator}"extra": 1}}', "application/json", 422),
            (f'{good}{separator}"a": 1, "a": 2}}', "application/json", 400),
            (f'{good}{separator}"a": "\\u0000"}}', "application/json", 422),
            (good, "application/json", 400),
            ("[]", "application/json", 422),
            (good + "}", "text/plain", 415),
        ):
            headers = bearer(root.token) | {"Content-Type": media_type}
            answer = await api.http.request(method, address, content=body.encode(), headers=headers)
            assert answer.status_code == expected, (method, path, body, answer.text)


MISREAD: dict[str, list[Any]] = {
    "boolean": [1, 0, "yes", "true", 1.0],
    "integer": [True, "300", 300.0, "1e2"],
    "string": [1, True],
    "array": ["a b", {"a": "b"}],
}


async def test_no_member_is_taken_for_one_of_another_type(api, root, bob):
    """What the description says is what is taken: `{"overlap": true}` is not a second."""
    places = {"user_id": bob.id, "name": "clerk", "client_id": "batch-job"}
    await create_role(api, "clerk")
    await create_client(api)
    before, asked = await everything(api), set()
    description = (await api.http.get("/openapi.json")).json()
    for (method, path), row in ADMIN_ROUTES.items():
        if (body := description["paths"][path][method.lower()].get("requestBody")) is None:
            continue
        named = re.search(r"#/components/schemas/(\w+)", json.dumps(body))
        assert named is not None
        for member, schema in description["components"]["schemas"][named[1]]["properties"].items():
            types = {one.get("type") for one in schema.get("anyOf", [schema])} - {"null"}
            for misread in MISREAD[types.pop()]:
                answer = await root(method, path.format(**places), (row.body or {}) | {member: misread})
                assert answer.status_code == 422, (method, path, member, misread)
                assert [error["pointer"] for error in answer.json()["errors"]] == [f"/{member}"]
            asked.add(member)
    assert asked >= {"overlap", "access_lifetime", "first_party", "now", "end_sessions", "scopes", "roles"}
    assert await everything(api) == before


# Roles


async def test_roles_of_a_user_are_set_as_a_whole(api, root, bob):
    for name in ("clerk", "driver"):
        await create_role(api, name)
    place = f"/admin/users/{bob.id}/roles"
    tokens = await bob.log_in()
    given = await root("PUT", place, {"roles": ["driver", "clerk", "driver"]})
    assert given.json()["roles"] == ["driver", "clerk"]
    assert (await api.refresh(tokens["refresh_token"])).status_code == 200
    missing = await root("PUT", place, {"roles": ["clerk", "boss"]})
    assert seen(missing) == problem(404, "role_not_found", "There is no such role.")
    taken = await root("PUT", place, {"roles": [], "end_sessions": True})
    assert taken.json()["roles"] == []
    assert (await api.me(tokens["access_token"])).status_code == 401


async def test_a_role_is_made_shown_changed_and_deleted(root):
    made = await root("POST", "/admin/roles", {"name": "clerk", "scopes": ["orders:read", "orders:write"]})
    clerk = {
        "name": "clerk",
        "scopes": ["orders:read", "orders:write"],
        "built_in": False,
        "created_at": "2026-11-22T12:00:00Z",
    }
    assert (made.status_code, made.headers["location"], made.json()) == (201, "/admin/roles/clerk", clerk)
    admin = {"name": "admin", "scopes": ["identity:admin"], "built_in": True, "created_at": None}
    assert await root.get("/admin/roles") == {"items": [admin, clerk], "next_cursor": None}
    changed = await root("PUT", "/admin/roles/clerk", {"scopes": ["orders:read"]})
    assert changed.json() == clerk | {"scopes": ["orders:read"]}
    assert (await root("GET", "/admin/roles/clerk")).json() == changed.json()
    assert (await root("DELETE", "/admin/roles/clerk")).status_code == 204
    assert (await root("GET", "/admin/roles/clerk")).json()["code"] == "role_not_found"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "", {"name": "admin"}, 409, "role_built_in"),
        ("PUT", "/admin", {"scopes": []}, 409, "role_built_in"),
        ("DELETE", "/admin", None, 409, "role_built_in"),
        ("POST", "", {"name": "clerk"}, 409, "role_taken"),
        ("DELETE", "/clerk", None, 409, "role_in_use"),
        ("POST", "", {"name": "Boss"}, 422, "role_rejected"),
        ("POST", "", {"name": "boss", "scopes": ["identity:admin"]}, 422, "role_rejected"),
        ("PUT", "/clerk", {"scopes": ["identity:everything"]}, 422, "role_rejected"),
        ("POST", "", {"name": "boss", "scopes": ["a b"]}, 422, "validation_failed"),
        ("POST", "", {"name": "boss", "scopes": [""]}, 422, "validation_failed"),
        ("POST", "", {"name": "boss", "scopes": "orders:read"}, 422, "validation_failed"),
    ],
)
async def test_what_a_role_cannot_be(api, root, method, path, body, status, code):
    await create_role(api, "clerk")
    await api.scalar("UPDATE users SET roles = '{admin,clerk}' RETURNING id")
    answer = await root(method, f"/admin/roles{path}", body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


# The last administrator


async def disable(root: Admin, user_id: str) -> int:
    return (await root("POST", f"/admin/users/{user_id}/disable")).status_code


async def delete(root: Admin, user_id: str) -> int:
    return (await root("DELETE", f"/admin/users/{user_id}")).status_code


async def take_the_role(root: Admin, user_id: str) -> int:
    return (await root("PUT", f"/admin/users/{user_id}/roles", {"roles": []})).status_code


async def delete_oneself(root: Admin, user_id: str) -> int:
    body = {"current_password": PASSWORD}
    headers = bearer(TOKENS[user_id])
    return (await root.api.http.request("DELETE", "/users/me", json=body, headers=headers)).status_code


TOKENS: dict[str, str] = {}
"""Of the administrators, by their ids."""


@pytest.mark.parametrize(
    "ways", [[disable], [delete], [take_the_role], [delete_oneself], [disable, delete, take_the_role, delete_oneself]]
)
@pytest.mark.parametrize("number", [2, 5])
async def test_of_fifty_who_remove_all_administrators_at_once_none_takes_the_last(api, ways, number):
    """They come over real connections; whoever is left can still administer the service."""
    admins = []
    for n in range(number):
        account = await sign_up_administrator(api, f"root{n}")
        admins.append(Admin(api, account, await token_of(account)))
        TOKENS[account.id] = admins[-1].token
    attempts = [ways[n % len(ways)](admins[(n + 1) % number], admins[n % number].account.id) for n in range(50)]
    statuses = await asyncio.gather(*attempts)
    assert set(statuses) <= {200, 204, 401, 403, 404, 409}
    left = await api.scalar("SELECT count(*) FROM users WHERE 'admin' = ANY (roles) AND disabled_at IS NULL")
    assert left == 1


# Sessions of others


async def test_the_sessions_of_a_user_are_listed_and_ended(api, root, bob):
    first = await bob.log_in()
    api.clock.advance(seconds=5)
    second = await bob.log_in()
    listed = await root.get(f"/admin/users/{bob.id}/sessions")
    ids = [session_of(tokens["access_token"]) for tokens in (second, first)]
    assert [session["id"] for session in listed["items"]] == ids
    assert not any(session["current"] for session in listed["items"])
    assert (await root("DELETE", f"/admin/sessions/{ids[0]}")).status_code == 204
    again = await root("DELETE", f"/admin/sessions/{ids[0]}")
    assert seen(again) == problem(404, "session_not_found", "There is no such session.")
    assert (await api.me(second["access_token"])).status_code == 401
    assert (await api.me(first["access_token"])).status_code == 200
    assert (await root("DELETE", f"/admin/users/{bob.id}/sessions")).status_code == 204
    assert (await api.refresh(first["refresh_token"])).status_code == 400
    assert (await root.get(f"/admin/users/{bob.id}/sessions"))["items"] == []


# Clients


async def test_a_client_is_made_changed_and_deleted_and_its_secret_shown_once(api, root):
    body = {"client_id": "reports", "grants": ["client_credentials"], "scopes": ["orders:read"], "audience": ["orders"]}
    made = await root("POST", "/admin/clients", body | {"access_lifetime": 60})
    secret = made.json()["client_secret"]
    reports = {
        **body,
        "first_party": False,
        "built_in": False,
        "access_lifetime": 60,
        "created_at": "2026-11-22T12:00:00Z",
        "secret_changed_at": "2026-11-22T12:00:00Z",
        "previous_secret_expires_at": None,
        "disabled_at": None,
    }
    assert (made.status_code, made.headers["location"]) == (201, "/admin/clients/reports")
    assert made.json() == reports | {"client_secret": secret}
    assert await get_token(api, secret) == 200
    listed = await root.get("/admin/clients")
    assert [(client["client_id"], client["built_in"]) for client in listed["items"]] == [
        ("first-party", True),
        ("reports", False),
    ]
    assert (await root("GET", "/admin/clients/reports")).json() == reports
    changed = await root("PATCH", "/admin/clients/reports", {"access_lifetime": None, "audience": []})
    assert changed.json() == reports | {"access_lifetime": None, "audience": []}
    rotated = await root("POST", "/admin/clients/reports/rotate-secret", {"overlap": 60})
    newer = rotated.json()["client_secret"]
    assert rotated.json()["previous_secret_expires_at"] == "2026-11-22T12:01:00Z"
    assert [await get_token(api, each) for each in (secret, newer)] == [200, 200]
    api.clock.advance(seconds=60)
    assert [await get_token(api, each) for each in (secret, newer)] == [401, 200]
    assert (await root("POST", "/admin/clients/reports/disable")).json()["disabled_at"] == "2026-11-22T12:01:00Z"
    assert await get_token(api, newer) == 401
    assert (await root("POST", "/admin/clients/reports/enable")).json()["disabled_at"] is None
    assert (await root("DELETE", "/admin/clients/reports")).status_code == 204
    assert (await root("GET", "/admin/clients/reports")).json()["code"] == "client_not_found"


async def get_token(api: Api, secret: str) -> int:
    form = {"grant_type": "client_credentials", "client_id": "reports", "client_secret": secret}
    return (await api.http.post("/token", data=form)).status_code


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "", {"client_id": "batch-job", "grants": ["client_credentials"]}, 409, "client_taken"),
        ("POST", "", {"client_id": "first-party", "grants": ["client_credentials"]}, 409, "client_built_in"),
        ("DELETE", "/first-party", None, 409, "client_built_in"),
        ("POST", "/first-party/disable", None, 409, "client_built_in"),
        ("POST", "", {"client_id": "a", "grants": ["authorization_code"]}, 422, "client_invalid"),
        ("POST", "", {"client_id": "a", "grants": ["password"]}, 422, "client_invalid"),
        ("PATCH", "/batch-job", {"scopes": ["identity:admin"]}, 422, "client_invalid"),
        ("PATCH", "/batch-job", {"audience": [ISSUER]}, 422, "client_invalid"),
        ("PATCH", "/batch-job", {"first_party": True}, 422, "validation_failed"),
        ("PATCH", "/batch-job", {"client_secret": "x" * 40}, 422, "validation_failed"),
    ],
)
async def test_what_a_client_cannot_be(api, root, method, path, body, status, code):
    await create_client(api)
    answer = await root(method, f"/admin/clients{path}", body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


# Keys


async def test_keys_are_shown_rotated_and_revoked_without_their_numbers(api, root):
    members = {"kid", "state", "created_at", "signs_from", "in_jwks_until", "verified_until"}
    listed = await root.get("/admin/keys")
    standby, active = listed["items"]
    assert (standby.keys(), active.keys(), listed["next_cursor"]) == (members, members, None)
    assert (standby["state"], active["state"]) == ("standby", "active")
    api.clock.advance(seconds=1)
    scheduled = (await root("POST", "/admin/keys/rotate", {})).json()["items"]
    assert [key["state"] for key in scheduled] == ["standby", "standby", "active"]
    at_once = (await root("POST", "/admin/keys/rotate", {"now": True})).json()["items"]
    assert [key["state"] for key in at_once if key["kid"] == standby["kid"]] == ["standby"], "one in the same second"
    api.clock.advance(seconds=1)
    at_once = (await root("POST", "/admin/keys/rotate", {"now": True})).json()["items"]
    assert {key["state"] for key in at_once if key["kid"] == standby["kid"]} == {"active"}
    revoked = (await root("POST", f"/admin/keys/{active['kid']}/revoke")).json()["items"]
    assert {key["state"] for key in revoked if key["kid"] == active["kid"]} == {"revoked"}
    assert (await root("GET", "/admin/keys")).status_code == 401, "its own token was signed with that key"
    told = await api.scalar(
        "SELECT array_agg(event || ' ' || subject_id ORDER BY id) FROM audit_events WHERE subject_kind = 'key'"
    )
    assert told == [f"key.rotated {standby['kid']}"] * 2 + [f"key.revoked {active['kid']}"]


async def test_a_key_that_was_revoked_signs_and_opens_nothing_after_the_answer(api, alice, root):
    """Not only when the folder is looked at the next time."""
    tokens = await alice.log_in()
    with api.runtime.revocations.follow() as follower:
        active = api.keys.current.signer(api.clock()).kid
        assert (await root("POST", f"/admin/keys/{active}/revoke")).status_code == 200
        assert await follower.next(within=0) is News.KEYS
    assert (await api.me(tokens["access_token"])).status_code == 401
    assert (await api.refresh(tokens["refresh_token"])).json()["error"] == "invalid_grant"
    assert active not in [key["kid"] for key in (await api.http.get("/.well-known/jwks.json")).json()["keys"]]
    fresh = await alice.log_in()
    assert jwt.get_unverified_header(fresh["access_token"])["kid"] != active
    assert (await api.me(fresh["access_token"])).status_code == 200


async def test_a_key_that_was_promoted_at_once_signs_after_the_answer(api, alice, root):
    standby = next(key["kid"] for key in (await root.get("/admin/keys"))["items"] if key["state"] == "standby")
    api.clock.advance(seconds=1)
    with api.runtime.revocations.follow() as follower:
        assert (await root("POST", "/admin/keys/rotate", {"now": True})).status_code == 200
        assert await follower.next(within=0) is News.KEYS
    assert jwt.get_unverified_header((await alice.log_in())["access_token"])["kid"] == standby


async def test_a_revoked_key_is_out_of_force_although_nobody_could_write_it_down(api, root):
    """The folder has changed by then, and no transaction holds it."""
    active = api.keys.current.signer(api.clock()).kid
    await api.scalar("ALTER TABLE audit_events RENAME TO away")
    try:
        assert (await root("POST", f"/admin/keys/{active}/revoke")).status_code >= 500
        assert (await root("GET", "/admin/keys")).status_code == 401
    finally:
        await api.scalar("ALTER TABLE away RENAME TO audit_events")


async def test_a_keys_folder_that_cannot_be_written_is_not_blamed_on_the_database(api, root, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    api.clock.advance(seconds=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        answer = await root("POST", "/admin/keys/rotate", {"now": True})
    assert answer.headers["retry-after"]
    assert seen(answer) == problem(
        503, "temporarily_unavailable", "The service cannot answer this at the moment; try again shortly."
    )
    assert await api.scalar("SELECT count(*) FROM audit_events WHERE subject_kind = 'key'") == 0
    monkeypatch.setattr(api.keys, "folder", replace(api.keys.folder, path=Path("/proc/nothing")))
    answer = await root("POST", f"/admin/keys/{api.keys.current.signer(api.clock()).kid}/revoke")
    assert answer.json()["code"] == "temporarily_unavailable"


@pytest.mark.parametrize("verb", ["rotate", "revoke"])
async def test_what_was_done_to_the_keys_is_recorded_although_the_database_went_away_meanwhile(
    api, root, monkeypatch, verb
):
    """The files are changed by then, and asking again would change and record nothing."""
    change_keys = api.runtime.change_keys

    async def change_and_lose(change: Callable[[], Any], *, now: datetime) -> Any:
        changed = await change_keys(change, now=now)
        await api.scalar(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE state LIKE 'idle in%' AND datname = current_database()"
        )
        return changed

    api.clock.advance(seconds=1)
    kid = api.keys.current.signer(api.clock()).kid
    monkeypatch.setattr(Runtime, "change_keys", lambda _, change, now: change_and_lose(change, now=now))
    path, body = {"rotate": ("rotate", {"now": True}), "revoke": (f"{kid}/revoke", None)}[verb]
    answer = await root("POST", f"/admin/keys/{path}", body)
    assert answer.status_code == 503
    monkeypatch.undo()
    await tend_keys(api.runtime)
    async with api.database.connection() as db:
        events = await db.fetch("SELECT event, actor_kind, occurred_at FROM audit_events WHERE subject_kind = 'key'")
    done = {"rotate": "key.rotated", "revoke": "key.revoked"}[verb]
    assert [tuple(event) for event in events] == [(done, "user", api.clock())]


async def test_revoking_a_key_that_is_none_or_revoked_is_no_event(api, root):
    missing = await root("POST", f"/admin/keys/{'A' * 43}/revoke")
    assert seen(missing) == problem(404, "key_not_found", "There is no key with this id.")
    kid = (await root.get("/admin/keys"))["items"][0]["kid"]
    for _ in range(2):
        assert (await root("POST", f"/admin/keys/{kid}/revoke")).status_code == 200
    assert await api.scalar("SELECT count(*) FROM audit_events WHERE subject_kind = 'key'") == 1


async def test_a_rotation_by_the_service_itself_is_counted_too(start_api, monkeypatch):
    monkeypatch.setattr("identity_service.housekeeping.KEYRING_POLL_SECONDS", 0.02)
    async with start_api(key_rotation_period=str(86400)) as api:
        api.clock.advance(days=1, seconds=1)
        counted = api.runtime.metrics.registry.get_sample_value
        which = {"event": "key.rotated", "outcome": "success"}
        await until(lambda: counted("identity_audit_events_total", which) == 1.0)


async def test_a_rotation_while_the_record_cannot_be_written_is_recorded_later_with_its_time(start_api):
    """Keys rotate whether or not the database is there."""
    async with start_api(key_rotation_period=str(86400)) as api:
        await api.scalar("ALTER TABLE audit_events RENAME TO away")
        api.clock.advance(days=1, seconds=1)
        with suppress(DatabaseUnavailable):  # or the service's own housekeeping was faster
            await tend_keys(api.runtime)
        rotated_at = api.clock()
        assert len(api.keys.unrecorded) == 1
        await api.scalar("ALTER TABLE away RENAME TO audit_events")
        api.clock.advance(seconds=30)
        await tend_keys(api.runtime)
        assert api.keys.unrecorded == []
        times = await api.scalar("SELECT array_agg(occurred_at) FROM audit_events WHERE event = 'key.rotated'")
        assert times == [rotated_at]


async def test_a_rotation_that_nobody_asked_for_is_recorded_once(start_api):
    async with start_api(key_rotation_period=str(86400)) as api:
        api.clock.advance(days=1, seconds=1)
        for _ in range(2):
            await tend_keys(api.runtime)
        for _ in range(100):  # or the service's own housekeeping did, and is about to say so
            if told := await api.scalar("SELECT array_agg(event || ' ' || actor_kind) FROM audit_events"):
                break
            await asyncio.sleep(0.05)
        assert told == ["key.rotated service"]


# Lists


async def walk(root: Admin, path: str, **parameters: Any) -> list[Any]:
    """Return all items of a list, page by page."""
    items: list[Any] = []
    cursor: dict[str, str] = {}
    for _ in range(100):
        page = await root.get(path, **parameters, **cursor)
        assert page.keys() == {"items", "next_cursor"}
        items += page["items"]
        if page["next_cursor"] is None:
            return items
        cursor = {"cursor": page["next_cursor"]}
    raise AssertionError("the list does not end")


async def register(api: Api, *users: tuple[str, str | None]) -> None:
    async with api.database.connection() as db:
        for number, (username, email) in enumerate(users):
            await registration.register(
                db,
                UUID(int=number + 1),
                username=username,
                password_hash=formats.UNUSABLE,
                email=email,
                roles=(),
                by=TESTER,
                now=START,
            )


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 9, 200])
async def test_pages_of_any_length_show_every_user_once(api, root, limit):
    await register(api, *((f"user{n}", None) for n in range(7)))
    found = await walk(root, "/admin/users", limit=limit)
    assert [user["username"] for user in found] == ["root", *(f"user{n}" for n in range(7))]


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("al", ["al_ice", "alan", "bob"]),
        ("AL", ["al_ice", "alan", "bob"]),
        ("\uff21\uff4c", ["al_ice", "alan", "bob"]),
        ("al_", ["al_ice"]),
        ("alice@", ["bob"]),
        ("Alice@Ex", ["bob"]),
        ("%", []),
        ("_", []),
        ("\\", []),
        ("lan", []),
        ("ünal", ["ünal"]),
        ("' OR 1=1 --", []),
        ("$argon2", []),
        ("", ["al_ice", "alan", "bob", "root", "ünal"]),
    ],
)
async def test_a_search_finds_how_a_username_or_an_address_begins(api, root, search, found):
    """F66: nothing else is looked at."""
    await register(api, ("alan", None), ("al_ice", None), ("bob", "Alice@example.com"), ("ünal", None))
    assert sorted(user["username"] for user in await walk(root, "/admin/users", search=search, limit=1)) == found


async def test_users_are_found_by_a_role(api, root):
    await register(api, ("alan", None), ("bob", None), ("carol", None))
    for name in ("clerk", "driver"):
        await create_role(api, name)
    await api.scalar("UPDATE users SET roles = '{clerk,driver}' WHERE username <> 'root' RETURNING id")
    for role, search, found in (
        ("driver", "", ["alan", "bob", "carol"]),
        ("driver", "b", ["bob"]),
        ("admin", "", ["root"]),
    ):
        users = await walk(root, "/admin/users", role=role, search=search, limit=1)
        assert [user["username"] for user in users] == found
    for nobodys in ("drivre", "", "' OR 1=1 --"):
        answer = await root("GET", f"/admin/users?{urlencode({'role': nobodys})}")
        assert seen(answer) == problem(404, "role_not_found", "There is no such role."), "as on the command line"


@pytest.mark.parametrize("path", ["/admin/roles", "/admin/clients", "/admin/keys"])
async def test_a_list_that_comes_whole_takes_no_parameter(root, path):
    """One that is not known must not look as if it had been heard."""
    assert (await root.get(path))["next_cursor"] is None
    for query in ("search=a", "limit=1", "cursor=x"):
        answer = await root("GET", f"{path}?{query}")
        assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")


@pytest.mark.parametrize(
    "query",
    [
        "limit=0", "limit=201", "limit=x", "limit=-1", "serch=a", "role=%00", "search=%00", "search=a%0ab",
        "search=" + "a" * 321, "cursor=" + "a" * 5000, "order=password_hash", "sort=email",
    ],
)  # fmt: skip
async def test_a_query_that_means_nothing_is_refused(root, query):
    """A misspelt filter must not show everything."""
    answer = await root("GET", f"/admin/users?{query}")
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")


async def a_cursor(root: Admin, path: str = "/admin/users", **parameters: Any) -> str:
    cursor: str = (await root.get(path, limit=1, **parameters))["next_cursor"]
    assert cursor
    return cursor


async def changed_in_the_middle(root: Admin) -> tuple[str, dict[str, str]]:
    header, payload, signature = (await a_cursor(root)).split(".")
    return "/admin/users", {"cursor": f"{header}.{payload[:-4]}AAAA.{signature}"}


async def in_clear(root: Admin) -> tuple[str, dict[str, str]]:
    return "/admin/users", {"cursor": "user1"}


async def in_clear_with_sql(root: Admin) -> tuple[str, dict[str, str]]:
    return "/admin/users", {"cursor": "' UNION SELECT password_hash FROM users --"}


async def of_another_list(root: Admin) -> tuple[str, dict[str, str]]:
    return "/admin/users", {"cursor": await a_cursor(root, "/admin/audit-events")}


async def of_another_search(root: Admin) -> tuple[str, dict[str, str]]:
    return "/admin/users", {"cursor": await a_cursor(root), "search": "user"}


async def of_a_search_that_is_left_out(root: Admin) -> tuple[str, dict[str, str]]:
    return "/admin/users", {"cursor": await a_cursor(root, search="user")}


async def of_the_sessions_of_another_user(root: Admin) -> tuple[str, dict[str, str]]:
    await root.account.log_in()
    cursor = await a_cursor(root, f"/admin/users/{root.account.id}/sessions")
    other = await root.api.scalar("SELECT id FROM users WHERE username = 'user1'")
    return f"/admin/users/{other}/sessions", {"cursor": cursor}


async def of_another_administrator(root: Admin) -> tuple[str, dict[str, str]]:
    account = await sign_up_administrator(root.api, "toor")
    return "/admin/users", {"cursor": await a_cursor(Admin(root.api, account, await token_of(account)))}


async def of_the_day_before(root: Admin) -> tuple[str, dict[str, str]]:
    cursor = await a_cursor(root)
    root.api.clock.advance(days=1)
    root.token = await token_of(root.account)
    return "/admin/users", {"cursor": cursor}


async def an_access_token(root: Admin) -> tuple[str, dict[str, str]]:
    return "/admin/users", {"cursor": root.token}


async def signed_without_a_position(root: Admin) -> tuple[str, dict[str, str]]:
    claims = claims_of(await a_cursor(root)) | {"position": None}
    return "/admin/users", {"cursor": jws.sign(root.api.keys.current.signer(root.api.clock()), "cursor+jwt", claims)}


async def empty(root: Admin) -> tuple[str, dict[str, str]]:
    return "/admin/users", {"cursor": ""}


@pytest.mark.parametrize(
    "wrong",
    [
        changed_in_the_middle,
        in_clear,
        in_clear_with_sql,
        of_another_list,
        of_another_search,
        of_a_search_that_is_left_out,
        of_the_sessions_of_another_user,
        of_another_administrator,
        of_the_day_before,
        an_access_token,
        signed_without_a_position,
        empty,
    ],
)
async def test_a_cursor_that_was_not_handed_out_for_this_is_refused(api, root, wrong):
    """F71"""
    await register(api, ("user1", None), ("user2", None))
    path, parameters = await wrong(root)
    answer = await root("GET", path, params=parameters)
    text = "The cursor is not one of this list, or too old; begin again without it."
    assert seen(answer) == problem(400, "invalid_cursor", text)


async def test_the_length_of_a_page_may_change_on_the_way(api, root):
    await register(api, *((f"user{n}", None) for n in range(5)))
    first = await root.get("/admin/users", limit=2)
    rest = await root.get("/admin/users", limit=50, cursor=first["next_cursor"])
    assert [user["username"] for user in first["items"] + rest["items"]] == ["root", *(f"user{n}" for n in range(5))]


# What is recorded


async def test_the_record_is_filtered_and_paged(api, root, bob):
    api.clock.advance(seconds=1)
    await root("POST", f"/admin/users/{bob.id}/disable")
    events = await walk(root, "/admin/audit-events", limit=2)
    assert [event["id"] for event in events] == sorted((event["id"] for event in events), reverse=True)
    assert len(events) == await api.scalar("SELECT count(*) FROM audit_events")
    assert events[0].keys() == {
        "id", "occurred_at", "event", "outcome", "reason", "actor_kind", "actor_id", "subject_kind", "subject_id",
        "client_id", "session_id", "address", "user_agent", "request_id", "details", "position",
    }  # fmt: skip
    for filters in (
        {"event": "user.disabled"},
        {"subject_id": bob.id, "since": "2026-11-22T12:00:01Z"},
        {"actor_id": root.account.id, "event": "user.disabled", "outcome": "success"},
        {"client_id": "first-party", "event": "user.disabled", "until": "2026-11-22T12:00:02Z"},
    ):
        found = await walk(root, "/admin/audit-events", limit=1, **filters)
        assert [event["event"] for event in found] == ["user.disabled"], filters
    assert await walk(root, "/admin/audit-events", until="2026-11-22T12:00:00Z") == []


@pytest.mark.parametrize(
    "query",
    [
        "event=user.deletd", "outcome=maybe", "since=yesterday", "since=2026-11-22T12:00:00", "since=253402300799",
        "since=0001-01-01T00:00:00Z", "until=9999-12-31T23:59:59-12:00", "subject_id=%00", "subject=x",
    ],
)  # fmt: skip
async def test_a_filter_that_means_nothing_is_refused(root, query):
    answer = await root("GET", f"/admin/audit-events?{query}")
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")


ACTS: list[tuple[str, str, Any, str, str]] = [
    ("POST", "/admin/users", {"username": "carol"}, "user.created", "user"),
    ("PATCH", "/admin/users/{bob}", {"email": "b@example.com"}, "user.updated", "user {bob}"),
    ("DELETE", "/admin/users/{bob}", None, "user.deleted", "user {bob}"),
    ("POST", "/admin/users/{bob}/disable", None, "user.disabled", "user {bob}"),
    ("POST", "/admin/users/{bob}/enable", None, "user.enabled", "user {bob}"),
    ("PUT", "/admin/users/{bob}/roles", {"roles": ["clerk"]}, "user.roles_changed", "user {bob}"),
    ("POST", "/admin/users/{bob}/unlock", None, "user.unlocked", "user {bob}"),
    ("POST", "/admin/users/{bob}/password-reset", None, "user.password_reset_started", "user {bob}"),
    ("DELETE", "/admin/users/{bob}/sessions", None, "session.ended", "user {bob}"),
    ("DELETE", "/admin/sessions/{session}", None, "session.ended", "user {bob}"),
    ("POST", "/admin/roles", {"name": "driver"}, "role.created", "role driver"),
    ("PUT", "/admin/roles/clerk", {"scopes": []}, "role.updated", "role clerk"),
    ("DELETE", "/admin/roles/clerk", None, "role.deleted", "role clerk"),
    ("POST", "/admin/clients", {"client_id": "a", "grants": ["client_credentials"]}, "client.created", "client a"),
    ("PATCH", "/admin/clients/batch-job", {"scopes": []}, "client.updated", "client batch-job"),
    ("POST", "/admin/clients/batch-job/rotate-secret", {}, "client.secret_rotated", "client batch-job"),
    ("POST", "/admin/clients/batch-job/disable", None, "client.disabled", "client batch-job"),
    ("POST", "/admin/clients/batch-job/enable", None, "client.enabled", "client batch-job"),
    ("DELETE", "/admin/clients/batch-job", None, "client.deleted", "client batch-job"),
    ("POST", "/admin/keys/rotate", {"now": True}, "key.rotated", "key {kid}"),
    ("POST", "/admin/keys/{kid}/revoke", None, "key.revoked", "key {kid}"),
]


def test_every_act_of_an_administrator_has_a_row_here():
    acts = {(method, path) for method, path in ADMIN_ROUTES if method != "GET"}
    assert len(ACTS) == len(acts)


@pytest.mark.parametrize(("method", "path", "body", "event", "subject"), ACTS)
async def test_every_act_is_recorded_with_who_did_it_and_to_whom(api, root, bob, method, path, body, event, subject):
    await create_role(api, "clerk")
    await create_client(api)
    bobs = session_of((await bob.log_in())["access_token"])
    places = {"bob": bob.id, "session": bobs, "kid": api.keys.current.published(START)[1].kid}
    if path.endswith("/enable"):
        await root("POST", path.replace("enable", "disable").format(**places))
    last = await api.scalar("SELECT max(id) FROM audit_events")
    api.clock.advance(seconds=1)
    answer = await root(method, path.format(**places), body)
    assert answer.status_code < 300
    async with api.database.connection() as db:
        row = await db.fetchrow("SELECT * FROM audit_events WHERE id > $1 AND event = $2 ORDER BY id", last, event)
    assert row["outcome"] == "success"
    assert (row["actor_kind"], row["actor_id"]) == ("user", root.account.id)
    assert f"{row['subject_kind']} {row['subject_id']}".startswith(subject.format(**places))
    assert row["session_id"] == UUID(bobs if event == "session.ended" else session_of(root.token))
    assert row["request_id"] == answer.headers["x-request-id"]
    assert row["occurred_at"] == START + timedelta(seconds=1)
