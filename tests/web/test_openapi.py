"""Whatever the description of the API allows is sent, and whatever comes back has to be described there.

Walks `/openapi.json`, so routes of tomorrow are in it. What each should do is said in the tests beside this one.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

import httpx2
import pytest
import schemathesis
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from identity_service.accounts import resets
from identity_service.settings import Settings
from identity_service.shell import reset_token
from tests.conftest import ISSUER, PASSWORD, TESTER, Api, Clock, bearer, register, run_api
from tests.web.answers import ENDLESS
from tests.web.test_admin import ADMIN_ROUTES, OWN_ROUTES

EXAMPLES = 20
AT_LEAST = 18
ANSWERED_AT_LEAST = 8
ALL = list(HealthCheck)
FORM = "application/x-www-form-urlencoded"
CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
APP = "https://app.example.com"


@pytest.fixture(scope="module")
def portal() -> Iterator[BlockingPortal]:
    with start_blocking_portal() as portal:
        yield portal


@pytest.fixture(scope="module")
def walked(portal: BlockingPortal, shared_settings: Settings) -> Iterator[Api]:
    """A service that is talked to from outside of its event loop, which is how schemathesis works."""
    with portal.wrap_async_context_manager(run_api(shared_settings, Clock())) as api:
        yield api


@pytest.fixture(scope="module")
def schema(portal: BlockingPortal, walked: Api) -> Any:
    described = portal.call(walked.http.get, "/openapi.json").json()
    return schemathesis.openapi.from_dict(described)


async def headers_of(api: Api, who: str) -> dict[str, str]:
    """Return the headers of a caller. Made anew for each operation, since some end a session or an account."""
    if who == "nobody":
        return {}
    await api.http.post("/users", json={"username": who, "password": PASSWORD})
    scope = ""
    if who == "administrator":
        scope = "identity:admin"
        async with api.database.connection() as db:
            await db.execute("UPDATE users SET roles = '{admin}' WHERE username = $1", who)
    await api.forget_failures()  # of passwords that were made up
    form = {"grant_type": "password", "username": who, "password": PASSWORD, "scope": scope}
    return bearer((await api.token(**form)).json()["access_token"])


def operations(schema: Any) -> list[Any]:
    found = [operation.ok() for operation in schema.get_all_operations()]
    # A client in memory waits for the end of an answer, and this one has none.
    return [operation for operation in found if operation.path != ENDLESS]


async def send(api: Api, case: Any, headers: dict[str, str]) -> httpx2.Response:
    asked = case.as_transport_kwargs(base_url=ISSUER, headers=headers)
    asked.pop("cookies")
    body = asked.pop("data", None)
    if isinstance(body, bytes | str):
        asked["content"] = body
    elif body is not None:
        asked["content"], asked["headers"]["Content-Type"] = urlencode(body, doseq=True), FORM
    return await api.http.request(**asked)


def ask(
    portal: BlockingPortal, api: Api, operation: Any, mode: GenerationMode, headers: dict[str, str]
) -> Counter[int]:
    """Ask in a number of ways and return the statuses that came back; fails on what the description does not say."""
    statuses: Counter[int] = Counter()

    @seed(9457)
    @settings(max_examples=EXAMPLES, phases=[Phase.generate], database=None, deadline=None, suppress_health_check=ALL)
    @given(operation.as_strategy(generation_mode=mode))
    def once(case: Any) -> None:
        answer = portal.call(send, api, case, headers)
        statuses[answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)

    with suppress(Unsatisfiable):  # a request without parameters cannot be wrong
        once()
    return statuses


@pytest.mark.parametrize("who", ["nobody", "user", "administrator"])
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_answer_is_one_that_the_description_promises(portal, walked, schema, who, mode):
    seen: dict[str, Counter[int]] = {}
    for operation in operations(schema):
        headers = portal.call(headers_of, walked, who) | {"Origin": APP}
        seen[operation.label] = ask(portal, walked, operation, mode, headers)
    assert len(seen) >= AT_LEAST
    if mode is GenerationMode.POSITIVE:
        assert sum(statuses[200] > 0 for statuses in seen.values()) >= ANSWERED_AT_LEAST


async def test_what_comes_back_to_those_who_know_the_password_is_promised_too(api):
    """Which no guess does."""
    schema = schemathesis.openapi.from_dict((await api.http.get("/openapi.json")).json())
    seen = []

    async def expect(status: int, method: str, path: str, **request: Any) -> Any:
        answer = await api.http.request(method, path, **request)
        assert answer.status_code == status, answer.text
        schema[path][method].validate_response(answer)
        seen.append((method, path))
        return answer

    await expect(201, "POST", "/users", json={"username": "alice", "password": PASSWORD, "email": "alice@example.com"})
    login = {"grant_type": "password", "username": "alice", "password": PASSWORD}
    tokens = (await expect(200, "POST", "/token", data=login)).json()
    tokens = (await expect(200, "POST", "/token", data={**tokens, "grant_type": "refresh_token"})).json()
    mine = {"headers": bearer(tokens["access_token"])}
    await expect(200, "GET", "/users/me", **mine)
    await expect(200, "PATCH", "/users/me", json={"username": "alicia", "email": None}, **mine)
    body = {"current_password": PASSWORD, "new_password": "wise old owls never sleep"}
    await expect(204, "PUT", "/users/me/password", json=body, **mine)
    page = {"Origin": APP}
    password = {"username": "alicia", "password": "wise old owls never sleep"}
    cookie = (await expect(200, "POST", "/login", json=password, headers=page)).headers["set-cookie"]
    page["Cookie"] = cookie.partition(";")[0]
    await expect(200, "POST", "/refresh", json={}, headers=page)
    await expect(204, "POST", "/logout", json={}, headers=page)
    token = reset_token()
    user_id = UUID((await api.me(tokens["access_token"])).json()["id"])
    await api.database.transact(lambda db: resets.start(db, user_id, token, by=TESTER, now=api.clock()))
    again = {"token": token, "new_password": "purple elephants dance at dusk"}
    await expect(204, "POST", "/password-reset", json=again)
    login |= {"username": "alicia", "password": again["new_password"]}
    tokens = (await expect(200, "POST", "/token", data=login)).json()
    mine, body = {"headers": bearer(tokens["access_token"])}, {"new_password": again["new_password"]}
    await expect(204, "DELETE", "/users/me", json={"current_password": body["new_password"]}, **mine)
    await expect(200, "POST", "/revoke", data={"token": tokens["refresh_token"]})
    robot = await register(api, "robot")
    asking = {"client_id": "robot", "client_secret": robot.secret}
    own = (await expect(200, "POST", "/token", data=asking | {"grant_type": "client_credentials"})).json()
    await expect(200, "POST", "/introspect", data=asking | {"token": own["access_token"]})
    await expect(200, "POST", "/introspect", data=asking | {"token": "x"})
    changing = {(one.method.upper(), one.path) for one in operations(schema) if one.method.upper() != "GET"}
    assert changing - ADMIN_ROUTES.keys() - OWN_ROUTES.keys() <= set(seen), "those are held to it in `test_admin`"


async def test_every_refusal_has_an_example_and_names_its_codes(api):
    described = (await api.http.get("/openapi.json")).json()
    refusals = [
        content
        for item in described["paths"].values()
        for operation in item.values()
        for status, answer in operation["responses"].items()
        if status.startswith(("4", "5"))
        for content in answer["content"].values()
        if "$ref" not in content["schema"]  # of /readyz, which is no refusal
    ]
    assert len(refusals) > 40
    for content in refusals:
        names = content["schema"]["properties"]
        assert sorted(content["examples"]) == sorted(names["code" if "code" in names else "error"]["enum"])
