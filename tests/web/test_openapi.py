"""Whatever the description of the API allows is sent, and whatever comes back has to be described there.

Walks `/openapi.json`, so routes of tomorrow are in it. What each should do is said in the tests beside this one.
"""

import json
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

import httpx2
import pytest
import schemathesis
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, Phase, given, seed, settings
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

EXAMPLES = 10
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


@dataclass
class Asker:
    """Somebody who asks; None for the headers until they have logged in."""

    who: str
    headers: dict[str, str] | None = None

    async def ready(self, api: Api) -> dict[str, str]:
        """Return the headers to ask with. Some operations end the session they are asked in."""
        if self.headers is None or (self.who in PEOPLE and not await self._is_logged_in(api)):
            self.headers = await headers_of(api, self.who)
        return self.headers | {"Origin": APP}

    async def _is_logged_in(self, api: Api) -> bool:
        return (await api.http.get("/users/me", headers=self.headers)).status_code == 200


PEOPLE = ("user", "administrator")


@pytest.fixture(scope="module")
def askers() -> list[Asker]:
    return [Asker(who) for who in ("nobody", *PEOPLE, "client")]


async def headers_of(api: Api, who: str) -> dict[str, str]:
    if who == "nobody":
        return {}
    if who == "client":
        robot = await register(api, "robot")
        return {"Authorization": "Basic " + b64encode(f"robot:{robot.secret}".encode()).decode()}
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


def examples(operation: Any, who: str, mode: GenerationMode) -> int:
    """Return how many requests are worth sending: none if this caller is like another one to the route."""
    if mode is GenerationMode.NEGATIVE and not can_be_wrong(operation):
        return 0
    administered, guarded = operation.path.startswith("/admin/"), "security" in operation.definition.raw
    if guarded:
        let_in = "administrator" if administered else "user"
        known = {"nobody", "user", let_in} if administered else {"nobody", let_in}
    elif "invalid_client" in str(operation.definition.raw["responses"].get("401")):
        let_in, known = "client", {"nobody", "client"}
    else:
        let_in, known = "nobody", {"nobody"}
    if who not in known:
        return 0
    takes_something = operation.body or operation.query or operation.path_parameters
    return EXAMPLES if who == let_in and takes_something else 1


def can_be_wrong(operation: Any) -> bool:
    """Whether there is a request that the description does not allow: any text is a name in a path."""
    return bool(operation.body or operation.query) or '"format": "uuid"' in json.dumps(operation.definition.raw)


def takes_json(operation: Any) -> bool:
    return "application/json" in operation.definition.raw.get("requestBody", {}).get("content", {})


async def send(api: Api, case: Any, headers: dict[str, str]) -> httpx2.Response:
    asked = case.as_transport_kwargs(base_url=ISSUER, headers=headers)
    asked.pop("cookies")
    body = asked.pop("data", None)
    if isinstance(body, bytes | str):
        asked["content"] = body
    elif body is not None:
        if headers.get("Authorization", "").startswith("Basic "):  # and by that alone, for what no guess finds
            given = {name: value for name, value in body.items() if f"{name}{value}".isprintable()}
            body = {name: value for name, value in given.items() if name not in ("client_id", "client_secret")}
            body |= {"grant_type": "client_credentials"} if "grant_type" in body else {}
        asked["content"], asked["headers"]["Content-Type"] = urlencode(body, doseq=True), FORM
    return await api.http.request(**asked)


def ask(
    portal: BlockingPortal, api: Api, operation: Any, mode: GenerationMode, asker: Asker, count: int
) -> Counter[int]:
    """Ask in a number of ways and return the statuses that came back; fails on what the description does not say."""
    statuses: Counter[int] = Counter()
    headers = portal.call(asker.ready, api)

    @seed(9457)
    @settings(max_examples=count, phases=[Phase.generate], database=None, deadline=None, suppress_health_check=ALL)
    @given(operation.as_strategy(generation_mode=mode))
    def once(case: Any) -> None:
        answer = portal.call(send, api, case, headers)
        statuses[answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)

    once()
    return statuses


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_answer_is_one_that_the_description_promises(portal, walked, schema, askers, mode):
    seen: dict[str, Counter[int]] = {}
    for asker in askers:
        for operation in operations(schema):
            if count := examples(operation, asker.who, mode):
                seen[operation.label] = seen.get(operation.label, Counter()) + ask(
                    portal, walked, operation, mode, asker, count
                )
    if mode is GenerationMode.POSITIVE:
        assert len(seen) == len(operations(schema))
        to_guess = {one.label for one in operations(schema) if not (one.path_parameters or takes_json(one))}
        refused = {label for label, statuses in seen.items() if min(statuses) >= 400}
        assert refused & to_guess == set()
        assert len(to_guess) >= 17
    else:
        assert len(seen) == sum(can_be_wrong(one) for one in operations(schema))
        assert {label for label, statuses in seen.items() if max(statuses) < 400} == set()


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
