"""The documentation page: no foreign or inline script, a strict policy, and an *Authorize* button that logs in."""

import asyncio
import re
from base64 import b64encode
from collections.abc import MutableMapping
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urljoin

import pytest

from tests.conftest import ISSUER, PASSWORD, Api, bearer
from tests.web.answers import problem, seen
from tests.web.test_admin import ADMIN_ROUTES

ASSETS = {
    "/docs/swagger-ui.css": "text/css; charset=utf-8",
    "/docs/swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "/docs/start.js": "text/javascript; charset=utf-8",
}


class Page(HTMLParser):
    """Collects what a browser would run, load or style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""
        self._within = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._within = tag

    def handle_endtag(self, tag: str) -> None:
        self._within = "" if self._within == tag else self._within

    def handle_data(self, data: str) -> None:
        if self._within in ("script", "style"):
            self.inline += data.strip()

    @property
    def loaded(self) -> set[str]:
        return {value for _, attributes in self.tags for name in ("src", "href") if (value := attributes.get(name))}


async def page(api: Api) -> Page:
    answer = await api.http.get("/docs")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return Page(answer.text)


def policy_of(value: str) -> dict[str, set[str]]:
    directives = [directive.split() for directive in value.split(";")]
    policy = {name: set(sources) for name, *sources in directives}
    assert len(policy) == len(directives)
    return policy


async def description(api: Api) -> Any:
    answer = await api.http.get("/openapi.json")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


async def test_the_documentation_can_be_switched_off(start_api):
    """FPS-4: and nothing points at it."""
    async with start_api(docs="off") as api:
        for path in ("/docs", "/docs/start.js", "/openapi.json"):
            assert seen(await api.http.get(path)) == problem(404, "not_found", "There is nothing at this path.")
        for path in ("/", "/.well-known/oauth-authorization-server"):
            assert "/docs" not in (await api.http.get(path)).text


# The page


async def test_the_page_has_no_inline_script_style_or_handler(api):
    """BRW-5: so that a policy without `unsafe-inline` for scripts holds."""
    found = await page(api)
    assert found.inline == ""
    for tag, attributes in found.tags:
        assert tag not in ("style", "iframe", "object", "embed", "base", "form")
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert tag != "script" or attributes.get("src")
        assert not any("javascript:" in (value or "") for value in attributes.values())
    assert [tag for tag, _ in found.tags].count("script") == 2


async def test_everything_the_page_loads_comes_from_our_own_origin(api):
    found = await page(api)
    assert found.loaded == {*ASSETS, "data:,"}
    for path, media_type in ASSETS.items():
        answer = await api.http.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == media_type
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert len(answer.content) > 50


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", *ASSETS])
async def test_asking_for_the_head_gets_the_headers_and_no_body(api, path):
    head, whole = await api.http.head(path), await api.http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == len(whole.content)
    assert head.headers["content-type"] == whole.headers["content-type"]


@pytest.mark.parametrize("path", ASSETS)
async def test_the_head_of_a_file_ends_once(api, path):
    """A file is sent in pieces; after a last one a server wants to hear no more (ASGI, `more_body`)."""
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        await asyncio.Event().wait()  # nobody disconnects
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", b"id.example.com")]
    scope = {"type": "http", "method": "HEAD", "path": path, "query_string": b"", "headers": headers}
    await api.app(scope, receive, send)
    assert sent[0]["status"] == 200
    assert b"".join(message["body"] for message in sent[1:]) == b""
    assert [message.get("more_body", False) for message in sent[1:]].count(False) == 1
    assert not sent[-1].get("more_body", False)


async def test_the_policy_lets_the_page_run_our_files_and_nothing_else(api):
    """BRW-5"""
    answer = await api.http.get("/docs")
    assert policy_of(answer.headers["content-security-policy"]) == {
        "default-src": {"'none'"},
        "script-src": {"'self'"},
        "style-src": {"'self'", "'unsafe-inline'"},  # Swagger UI writes style attributes
        "img-src": {"'self'", "data:"},
        "connect-src": {"'self'"},
        "base-uri": {"'none'"},
        "form-action": {"'none'"},
        "frame-ancestors": {"'none'"},
    }
    assert answer.headers["cross-origin-opener-policy"] == "same-origin"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["referrer-policy"] == "no-referrer"


async def test_the_script_that_starts_the_page_shows_our_description_and_keeps_no_token(api):
    text = (await api.http.get("/docs/start.js")).text
    assert '"/openapi.json"' in text
    assert "persistAuthorization: false" in text
    assert not re.findall(r"eval|Function\(|innerHTML|localStorage|https?://", text)


async def test_the_page_repeats_nothing_of_the_request(api):
    """F73"""
    plain = await api.http.get("/docs")
    asked = await api.http.get('/docs?url=https://evil.example/x.json&configUrl="><script>alert(1)</script>')
    assert asked.content == plain.content
    assert asked.headers["content-security-policy"] == plain.headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/docs/../openapi.json", "/docs/swagger-ui.css/", "/docs/favicon.png", "/redoc"])
async def test_nothing_but_the_pages_own_files_is_served(api, path):
    answer = await api.http.get(f"{ISSUER}{path}")
    assert answer.status_code == (200 if path.endswith("openapi.json") else 404)
    raw = api.http.build_request("GET", "/docs")
    raw.url = raw.url.copy_with(raw_path=b"/docs/%2e%2e/%2e%2e/__init__.py")
    assert (await api.http.send(raw)).status_code == 404


# The description


async def test_authorize_logs_in_with_the_password_grant_at_an_address_that_is_there(api):
    scheme = (await description(api))["components"]["securitySchemes"]
    assert scheme == {
        "OAuth2PasswordBearer": {
            "type": "oauth2",
            "flows": {"password": {"tokenUrl": "token", "scopes": {"identity:admin": "Administer this service"}}},
        }
    }
    # Swagger UI resolves the address against that of the description.
    assert urljoin(f"{ISSUER}/openapi.json", "token") == f"{ISSUER}/token"


async def test_without_the_password_grant_authorize_asks_for_a_token_that_one_has(start_api):
    async with start_api(password_grant="off") as api:
        described = await description(api)
        assert described == await description(api)
    assert described["components"]["securitySchemes"] == {"OAuth2PasswordBearer": {"type": "http", "scheme": "bearer"}}


FILLED_IN = f"Basic {b64encode(b'first-party:').decode()}"
LEFT_EMPTY = "Basic Og=="


@pytest.mark.parametrize(
    ("authorization", "more"),
    [
        (FILLED_IN, {}),
        (LEFT_EMPTY, {}),
        (None, {"client_id": "first-party"}),
        (None, {"client_id": "first-party", "client_secret": ""}),
        (None, {"client_id": "", "client_secret": ""}),
    ],
    ids=["client by default", "nothing filled in", "in the body", "in the body with no secret", "empty in the body"],
)
@pytest.mark.parametrize("scope", ["", "identity:admin"])
async def test_the_very_request_of_the_authorize_button_is_answered_with_a_token_that_works(
    api, alice, authorization, more, scope
):
    """Byte for byte what Swagger UI sends, for each way of its form to be filled in."""
    form = {"grant_type": "password", "scope": scope, "username": "alice", "password": PASSWORD, **more}
    headers = {
        "Accept": "application/json, text/plain, */*",
        "Content-Type": "application/x-www-form-urlencoded",
        "Origin": ISSUER,
        "Referer": f"{ISSUER}/docs",
        "Sec-Fetch-Site": "same-origin",
        "X-Requested-With": "XMLHttpRequest",
    } | ({"Authorization": authorization} if authorization else {})
    answer = await api.http.post("/token", data=form, headers=headers)
    assert answer.status_code == 200
    tokens = answer.json()
    assert (tokens["token_type"], tokens["scope"]) == ("Bearer", "")
    me = await api.http.get("/users/me", headers=bearer(tokens["access_token"]) | {"Origin": ISSUER})
    assert me.json()["username"] == "alice"


async def test_a_wrong_password_in_the_authorize_form_is_an_error_the_page_can_show(api, alice):
    form = {"grant_type": "password", "scope": "", "username": "alice", "password": "wrong"}
    answer = await api.http.post("/token", data=form, headers={"Authorization": FILLED_IN})
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_grant")


async def test_the_description_names_every_route_and_what_each_asks_for(api):
    paths = (await description(api))["paths"]
    operations = {
        (method.upper(), path): operation for path, item in paths.items() for method, operation in item.items()
    }
    guarded = {key for key, operation in operations.items() if operation.get("security")}
    administration = {(method, path) for method, path in operations if path.startswith("/admin/")}
    assert administration == ADMIN_ROUTES.keys()
    assert guarded - administration == {
        ("GET", "/users/me"),
        ("GET", "/users/me/sessions"),
        ("DELETE", "/users/me/sessions"),
        ("DELETE", "/users/me/sessions/{session_id}"),
        ("PATCH", "/users/me"),
        ("PUT", "/users/me/password"),
        ("DELETE", "/users/me"),
    }
    assert operations.keys() - guarded == {
        ("POST", "/token"),
        ("POST", "/revoke"),
        ("POST", "/introspect"),
        ("POST", "/login"),
        ("POST", "/refresh"),
        ("POST", "/logout"),
        ("POST", "/users"),
        ("POST", "/password-reset"),
        ("GET", "/"),
        ("GET", "/health"),
        ("GET", "/livez"),
        ("GET", "/readyz"),
        ("GET", "/.well-known/jwks.json"),
        ("GET", "/.well-known/oauth-authorization-server"),
        ("GET", "/status-lists"),
        ("GET", "/status-lists/{number}"),
        ("GET", "/status-lists/events"),
    }
    identifiers = [operation["operationId"] for operation in operations.values()]
    assert len(set(identifiers)) == len(identifiers)


async def test_the_description_shows_no_password_hash_and_no_way_to_privileges(api):
    """F64, F66"""
    schemas = (await description(api))["components"]["schemas"]
    assert schemas["NewUser"]["properties"].keys() == {"username", "password", "email"}
    assert schemas["AccountChange"]["properties"].keys() == {"username", "email"}
    assert all(schemas[name]["additionalProperties"] is False for name in ("NewUser", "AccountChange", "LoginBody"))
    assert "hash" not in str(schemas)


async def test_the_description_promises_the_refusals_that_are_really_sent(api):
    """What generated clients are built on: problem documents (RFC 9457), not the framework's own shape."""
    text = (await api.http.get("/openapi.json")).text
    assert "HTTPValidationError" not in text
    refusals = {
        media_type
        for item in (await description(api))["paths"].values()
        for operation in item.values()
        for status, response in operation["responses"].items()
        if status.startswith(("4", "5"))
        for media_type in response.get("content", {})
    }
    assert refusals <= {"application/problem+json", "application/json"}
    answer = await api.http.post("/users", json={})
    assert "detail" in answer.json()
    assert isinstance(answer.json()["detail"], str)
