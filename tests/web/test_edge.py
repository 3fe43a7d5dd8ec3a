"""The outer edge of every request: paths and methods, size, ids, headers, hosts, failures and the log."""

import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import redirect_stderr
from io import StringIO
from itertools import product
from typing import Any

import asyncpg
import httpx2
import pytest
from starlette.types import Message

from identity_service import logs
from identity_service.app import edge_of
from identity_service.web.middleware import MAX_DISCARDED
from tests.conftest import ISSUER, PASSWORD, Api, bearer
from tests.web.answers import problem, seen

APP = "https://app.example.com"
LIMIT = 65536

NOT_FOUND = problem(404, "not_found", "There is nothing at this path.")
NOT_ALLOWED = problem(405, "method_not_allowed", "This path does not answer that method; see the Allow header.")
TOO_LARGE = problem(413, "body_too_large", "The body must have at most 65536 bytes.")
UNKNOWN_HOST = problem(400, "unknown_host", "This host name is not served here; see IDENTITY_ALLOWED_HOSTS.")
FAILED = problem(500, "internal_error", "Something went wrong here; the request id finds it in the log.")


# Paths and methods


UNKNOWN_PATHS = [
    "/nowhere",
    "/users/",
    "/users/me/",
    f"{ISSUER}//users",
    "/USERS",
    "/token/",
    "/users/%2e%2e/users",
    "/users/me%2Fpassword%2F",
    "/users%2fme",
    "/users/me%2Fpassword",
    "/users/me%00",
    "/users/me%0a",
    "/%0a",
    "/token%0A",
    "/users/me%20",
    "/users/me;x=1",
    "/docs/",
    "/docs/..%2fapp.py",
    "/docs/%2e%2e/%2e%2e/etc/passwd",
    "/static/swagger-ui.css",
    "/redoc",
    "/.well-known/",
    "/.well-known/jwks.json/",
    "/.well-known/openid-configuration",
    "/.git/config",
    "/keys/keyring.json",
    "/" + "a" * 4000,
    "/%F0%9F%A6%89",
    "/%ff",
]


async def test_what_is_not_there_is_a_problem_document(api):
    """FPS-4: and no redirect to a neighbour."""
    answers = [await api.http.request(method, path) for path in UNKNOWN_PATHS for method in ("GET", "POST", "DELETE")]
    assert {answer.url.raw_path: seen(answer) for answer in answers if seen(answer) != NOT_FOUND} == {}
    assert [answer.url.raw_path for answer in answers if "location" in answer.headers] == []


@pytest.mark.parametrize(
    ("path", "allowed", "method"),
    [
        ("/token", "POST", "GET"),
        ("/revoke", "POST", "GET"),
        ("/introspect", "POST", "GET"),
        ("/login", "POST", "GET"),
        ("/refresh", "POST", "PUT"),
        ("/logout", "POST", "GET"),
        ("/users", "POST", "GET"),
        ("/users/me", "DELETE, GET, HEAD, PATCH", "POST"),
        ("/users/me/password", "PUT", "POST"),
        ("/users/me/sessions", "DELETE, GET, HEAD", "POST"),
        ("/users/me/sessions/x", "DELETE", "GET"),
        ("/password-reset", "POST", "GET"),
        ("/admin/users/x", "DELETE, GET, HEAD, PATCH", "POST"),
        ("/.well-known/jwks.json", "GET, HEAD", "POST"),
        ("/.well-known/oauth-authorization-server", "GET, HEAD", "DELETE"),
        ("/", "GET, HEAD", "POST"),
        ("/health", "GET, HEAD", "POST"),
        ("/livez", "GET, HEAD", "PATCH"),
        ("/readyz", "GET, HEAD", "POST"),
        ("/docs", "GET, HEAD", "POST"),
        ("/openapi.json", "GET, HEAD", "POST"),
    ],
)
async def test_a_wrong_method_is_told_every_right_one(api, path, allowed, method):
    """TOK-1, and RFC 9110 15.5.6: `Allow` lists all of them, also where several routes share a path."""
    for asked in (method, "OPTIONS", "TRACE", "BREW"):
        answer = await api.http.request(asked, path)
        assert seen(answer) == NOT_ALLOWED
        assert ", ".join(sorted(answer.headers["allow"].split(", "))) == allowed


# Size


def json_of(size: int) -> bytes:
    """Return a sign-up of exactly so many bytes."""
    frame = json.dumps({"username": "alice", "password": ""}).encode()
    return frame.replace(b'""', b'"' + b"x" * (size - len(frame)) + b'"')


async def in_chunks(body: bytes, size: int = 4096) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


async def send(api: Api, body: bytes, *, chunked: bool, **headers: str) -> httpx2.Response:
    return await api.http.post(
        "/users",
        content=in_chunks(body) if chunked else body,
        headers={"Content-Type": "application/json", **headers},
    )


@pytest.mark.parametrize("chunked", [False, True], ids=["with a length", "chunked"])
async def test_a_body_of_the_last_permitted_byte_is_read_and_one_more_is_refused(api, chunked):
    """FPS-1, F69"""
    assert [len(json_of(size)) for size in (LIMIT, LIMIT + 1)] == [LIMIT, LIMIT + 1]
    read = await send(api, json_of(LIMIT), chunked=chunked)
    assert (read.status_code, read.json()["code"]) == (422, "validation_failed")
    refused = await send(api, json_of(LIMIT + 1), chunked=chunked)
    assert ("transfer-encoding" in refused.request.headers) is chunked
    assert seen(refused) == TOO_LARGE
    assert refused.headers["connection"] == "close"


async def test_a_small_body_in_chunks_is_as_good_as_any(api):
    body = json.dumps({"username": "alice", "password": PASSWORD}).encode()
    for size in (1, 7):
        answer = await api.http.post(
            "/users", content=in_chunks(body, size), headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == (201 if size == 1 else 409)


async def test_a_body_that_never_ends_is_not_waited_for(api):
    given = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given
        while True:
            given += 4096
            yield b" " * 4096

    answer = await api.http.post("/users", content=endless(), headers={"Content-Type": "application/json"})
    assert seen(answer) == TOO_LARGE
    assert given <= LIMIT + MAX_DISCARDED + 2 * 4096


async def test_a_short_length_does_not_smuggle_a_long_body_past_the_limit(api):
    """Where both are given the chunks count (RFC 9112 6.3)."""
    both = {"Content-Length": "10", "Transfer-Encoding": "chunked"}
    assert seen(await send(api, json_of(LIMIT + 1), chunked=True, **both)) == TOO_LARGE


async def test_no_path_and_no_type_of_body_is_exempt_from_the_limit(api):
    body = b"x" * (LIMIT + 1)
    paths = ("/token", "/revoke", "/introspect", "/login", "/users", "/users/me/password", "/nowhere", "/health", "/")
    for path in paths:
        for media_type in ("application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            for content in (body, in_chunks(body)):
                answer = await api.http.post(path, content=content, headers={"Content-Type": media_type})
                assert seen(answer) == TOO_LARGE


async def test_an_impossible_length_is_refused_before_anything_is_read(api):
    read = 0

    async def counted() -> AsyncIterator[bytes]:
        nonlocal read
        read += 1
        yield b"{}"

    not_a_number = problem(400, "bad_request", "Content-Length is not a number.")
    for length in ["-1", "+5", "1e3", "0x10", "abc", "", "5, 5", "1_0", "\u00b2", "\u0663"]:
        answer = await api.http.post("/users", content=counted(), headers=[(b"Content-Length", length.encode())])
        assert seen(answer) == not_a_number, length
    assert read == 0


@pytest.mark.parametrize("length", [b"65537", b"9" * 20, b"9" * 5000])
async def test_what_is_too_large_is_answered_before_anything_is_read(api, length):
    """What comes then is thrown away, for as long as the connection is needed for the answer."""
    order: list[Any] = []

    async def receive() -> Message:
        order.append("read")
        return {"type": "http.request", "body": b"x" * 65536, "more_body": len(order) < 10}

    async def send(message: Message) -> None:
        order.append(message.get("status") or message["more_body"])

    headers = [(b"host", b"id.example.com"), (b"content-length", length)]
    scope = {"type": "http", "method": "POST", "path": "/users", "raw_path": b"/users", "headers": headers}
    await edge_of(api.app)(scope | {"query_string": b"", "client": None}, receive, send)
    assert order[:2] == [413, True]
    assert order[2:] == ["read"] * 8 + [False]


async def test_a_compressed_body_is_not_unpacked(api):
    """A few bytes must not become a thousand times as many."""
    answer = await send(api, b"\x1f\x8b\x08\x00", chunked=False, **{"Content-Encoding": "gzip"})
    assert seen(answer) == problem(400, "malformed_json", "The body is not valid JSON in UTF-8.")


PATTERNS = [
    b"a",
    b" ",
    b",",
    b";",
    b"=",
    b'"',
    b"\\",
    b"%",
    b"/",
    b".",
    b"\xff",
    b"a=",
    b'a="b;',
    b";a=b",
    b'"a",',
    b"W/",
    b"e30.",
    b"1-2,",
]
PREFIXES = [b"", b"application/json", b"application/x-www-form-urlencoded;", b"Basic ", b"Bearer ", b"bytes="]


async def test_no_header_is_expensive_to_read(api):
    """F69: what takes time that grows with the square of a header stops the service for everyone."""
    names = (
        b"Authorization",
        b"Content-Type",
        b"Cookie",
        b"Origin",
        b"Host",
        b"If-None-Match",
        b"Range",
        b"X-Request-ID",
    )
    routes = [("GET", "/users/me"), ("GET", "/.well-known/jwks.json"), ("POST", "/token"), ("POST", "/login")]

    async def took(method: str, path: str, header: tuple[bytes, bytes]) -> float:
        started = time.thread_time()
        answer = await api.http.request(method, path, headers=[header])
        assert answer.status_code < 500
        return time.thread_time() - started

    slow = []
    for name, prefix, pattern in product(names, PREFIXES, PATTERNS):
        value = prefix + pattern * (30_000 // len(pattern))
        for method, path in routes if prefix and name in (b"Authorization", b"Content-Type", b"Cookie") else routes[:1]:
            for _ in range(3):  # the garbage of earlier tests is collected within one request, not within three
                if await took(method, path, (name, value)) < 0.2:
                    break
            else:
                slow.append((name, value[:40], path))
    assert slow == []


# Request ids


async def test_a_request_id_that_came_along_is_kept(api):
    for given in ("a", "Ab-1._", "x" * 64, "0f8fad5b-d9cb-469f-a165-70867728950e"):
        for path in ("/health", "/nowhere", "/users/me"):
            answer = await api.http.get(path, headers={"X-Request-ID": given})
            assert answer.headers.get_list("x-request-id") == [given]
            assert answer.json().get("request_id", given) == given


async def test_a_request_id_that_could_forge_a_log_line_is_replaced(api):
    """F70"""
    for given in ("", " ", "x" * 65, "a b", "a,b", "<script>", '"', "a/b", "\x1b[31m", "\u00e9", "%0a", "a:b", "a\tb"):
        answer = await api.http.get("/nowhere", headers=[(b"X-Request-ID", given.encode())])
        assert re.fullmatch("[0-9a-f]{16}", answer.headers["x-request-id"]), given
        assert seen(answer) == NOT_FOUND


async def test_every_request_without_an_id_gets_its_own(api):
    ids = {(await api.http.get("/health")).headers["x-request-id"] for _ in range(20)}
    assert len(ids) == 20


# Headers of every response

HEADERS = {
    "content-security-policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "strict-transport-security": "max-age=31536000; includeSubDomains",
}


async def every_status(api: Api) -> list[httpx2.Response]:
    """Return one answer of every status that the service gives."""

    async def boom() -> None:
        raise RuntimeError

    api.app.add_api_route("/boom", boom)
    ask, start = api.http.request, api.clock()
    answers = [
        await ask("POST", "/users", json={"username": "alice", "password": PASSWORD}),
        await ask("POST", "/users", json={"username": "alice", "password": PASSWORD}),
        await ask("GET", "/"),
        await ask("GET", "/.well-known/jwks.json"),
        await ask("GET", "/.well-known/jwks.json", headers={"If-None-Match": "*"}),
        await ask("GET", "/openapi.json"),
        await ask("GET", "/docs/start.js"),
        await ask("POST", "/token", data={"grant_type": "password", "username": "alice", "password": PASSWORD}),
        await ask("POST", "/token", data={}),
        await ask("POST", "/token", data={"grant_type": "password", "client_id": "unknown"}),
        await ask("POST", "/login", json={"username": "alice", "password": PASSWORD}, headers={"Origin": APP}),
        await ask("POST", "/login", json={"username": "alice", "password": "x"}, headers={"Origin": APP}),
        await ask("POST", "/logout", json={}, headers={"Origin": APP}),
        await ask("POST", "/login", json={"username": "alice", "password": PASSWORD}),
        await ask("OPTIONS", "/login", headers={"Origin": APP, "Access-Control-Request-Method": "POST"}),
        await ask("POST", "/users", content=b"{"),
        await ask("POST", "/users", content=b"{", headers={"Content-Type": "application/json"}),
        await ask("POST", "/users", json={}),
        await ask("GET", "/users/me"),
        await ask("GET", "/users/me", headers=bearer("x.y.z")),
        await ask("GET", "/nowhere"),
        await ask("DELETE", "/"),
        await ask("HEAD", "/"),
        await ask("POST", "/users", content=b"x" * (LIMIT + 1)),
        await ask("GET", "/", headers={"Host": "evil.example"}),
        await ask("GET", "/boom"),
    ]
    api.clock.advance(days=-1)  # before the first key signs
    answers.append(await ask("GET", "/readyz"))
    api.clock.advance(seconds=(start - api.clock()).total_seconds())
    return answers


async def test_every_response_carries_the_security_headers_each_once(api):
    """BRW-5"""
    answers = await every_status(api)
    statuses = {answer.status_code for answer in answers}
    assert statuses == {200, 201, 204, 304, 400, 401, 403, 404, 405, 409, 413, 415, 422, 500, 503}
    for answer in answers:
        shown = {name: answer.headers.get_list(name) for name in HEADERS}
        assert shown == {name: [value] for name, value in HEADERS.items()}, answer.request.url
        assert len(answer.headers.get_list("x-request-id")) == 1
        assert len(answer.headers.get_list("cache-control")) == 1
        assert "x-powered-by" not in answer.headers


async def test_nothing_is_cached_but_what_is_public(api):
    for answer in await every_status(api):
        public = answer.request.url.path == "/.well-known/jwks.json"
        assert answer.headers["cache-control"].startswith("public, " if public else "no-store"), answer.request.url


async def test_http_is_not_declared_https_only(start_api):
    async with start_api(issuer_url="http://localhost:8000") as api:
        api.http.base_url = httpx2.URL("http://localhost:8000")
        for answer in await every_status(api):
            assert "strict-transport-security" not in answer.headers
            assert answer.headers["x-frame-options"] == "DENY"


# Hosts and proxies


async def to_hosts(api: Api, *hosts: str, path: str = "/") -> httpx2.Response:
    request = api.http.build_request("GET", path, headers=[("Host", host) for host in hosts])
    if not hosts:
        del request.headers["host"]
    assert request.headers.get_list("host") == list(hosts)
    return await api.http.send(request)


STRANGE_HOSTS = [
    "evil.example",
    "id.example.com.evil.example",
    "evil-id.example.com",
    "evil.id.example.com",
    "example.com",
    "id.example.com.",
    "id.example.com@evil.example",
    "evil.example@id.example.com",
    "evil.example:80@id.example.com",
    "id.example.com/evil",
    "id.example.com?evil",
    "id.example.com#evil",
    "id.example.com evil.example",
    "id.example.com,evil.example",
    "id.example.com\\evil.example",
    "id.example.com%00",
    "id%2eexample.com",
    "",
    ".",
    "*",
    ":443",
    "::1",
    "[id.example.com]",
    "[::2]",
    "0.0.0.0",  # noqa: S104 - a name that was asked for
    "127.0.0.2",
    "2130706433",
    "localhost.evil.example",
    "id.example.com:abc",
    "id.example.com:-1",
    "id.example.com:99999",
    "id.example.com:443:443",
    "id.example.com:443:evil.example",
    "[::1]evil.example",
    "evil[::1]",
    "[::1",
    "::1]",
    "[[::1]]",
]


async def test_a_host_that_is_not_ours_or_not_a_host_is_refused(api):
    """BRW-7, F53"""
    answers = {host: seen(await to_hosts(api, host)) for host in STRANGE_HOSTS}
    assert {host: answer for host, answer in answers.items() if answer != UNKNOWN_HOST} == {}


OWN_HOSTS = [
    "id.example.com",
    "ID.Example.COM",
    "id.example.com:443",
    "id.example.com:8443",
    "localhost",
    "localhost:8000",
    "127.0.0.1:8000",
    "[::1]:8000",
    "[::1]",
]


async def test_our_own_names_are_answered_in_any_case_on_any_port(api):
    for host in OWN_HOSTS:
        assert (await to_hosts(api, host)).status_code == 200, host


async def test_no_host_and_two_hosts_are_refused(api):
    """RFC 9112 3.2"""
    for hosts in [(), ("id.example.com", "id.example.com"), ("id.example.com", "evil.example"), ("", "id.example.com")]:
        assert seen(await to_hosts(api, *hosts)) == UNKNOWN_HOST


async def test_probes_answer_whatever_name_the_orchestrator_calls_them_by(api):
    for path in ("/health", "/livez", "/readyz"):
        for hosts in [("10.0.0.7:8000",), ("evil.example",), ()]:
            assert (await to_hosts(api, *hosts, path=path)).status_code == 200
    for path in ("/health/", "/readyz/..", "//health", "/HEALTH", "/healthz"):
        assert seen(await to_hosts(api, "evil.example", path=path)) == UNKNOWN_HOST


async def test_further_names_can_be_allowed_however_they_are_spelled(start_api):
    async with start_api(allowed_hosts="internal.example, Identity.Cluster.Local") as api:
        for host in ("internal.example", "identity.cluster.local:8000", "Identity.Cluster.Local"):
            assert (await to_hosts(api, host)).status_code == 200, host
        for host in ("evil.example", "internal.example.evil.example"):
            assert seen(await to_hosts(api, host)) == UNKNOWN_HOST


async def test_a_star_allows_every_name(start_api):
    async with start_api(allowed_hosts="*") as api:
        for hosts in [("anything.example",), ("10.1.2.3:80",), ()]:
            answer = await to_hosts(api, *hosts)
            assert (answer.status_code, answer.json()["issuer"]) == (200, ISSUER)


async def test_the_address_it_is_bound_to_is_a_name_of_ours_unless_it_is_every_address(start_api):
    async with start_api(bind="192.0.2.7:8000") as api:
        assert (await to_hosts(api, "192.0.2.7:8000")).status_code == 200
    async with start_api(bind="0.0.0.0:8000") as api:
        assert seen(await to_hosts(api, "0.0.0.0:8000")) == UNKNOWN_HOST


FORWARDED = {
    "Forwarded": "for=203.0.113.7;host=evil.example;proto=http",
    "X-Forwarded-For": "203.0.113.7",
    "X-Forwarded-Host": "evil.example",
    "X-Forwarded-Proto": "http",
    "X-Forwarded-Port": "666",
    "X-Forwarded-Prefix": "/evil",
    "X-Forwarded-Server": "evil.example",
    "X-Original-Host": "evil.example",
    "X-Original-URL": "/evil",
    "X-Rewrite-URL": "/evil",
    "X-Host": "evil.example",
    "X-Real-IP": "203.0.113.7",
    "X-HTTP-Host-Override": "evil.example",
    "X-HTTP-Method-Override": "DELETE",
    "X-Script-Name": "/evil",
    "Host": "localhost:8000",
    "Origin": "https://evil.example",
    "Referer": "https://evil.example/",
}


@pytest.mark.parametrize(
    "path",
    ["/", "/.well-known/oauth-authorization-server", "/.well-known/jwks.json", "/openapi.json", "/docs", "/users/me"],
)
async def test_no_header_changes_where_links_lead(api, alice, path):
    """BRW-7, F53"""
    token = (await alice.log_in())["access_token"]
    plain = await api.http.get(path, headers=bearer(token))
    forwarded = await api.http.get(path, headers=FORWARDED | bearer(token))
    assert plain.status_code == 200
    assert (forwarded.status_code, forwarded.content) == (200, plain.content)
    varying = {"x-request-id", "vary"}
    assert {n: v for n, v in forwarded.headers.items() if n not in varying} == {
        n: v for n, v in plain.headers.items() if n not in varying
    }
    assert "evil" not in forwarded.text + str(forwarded.headers)


async def test_no_header_changes_who_issues_a_token(api, alice):
    """F53"""
    form = {"grant_type": "password", "username": "alice", "password": PASSWORD}
    answer = await api.http.post("/token", data=form, headers=FORWARDED)
    assert answer.status_code == 200
    me = await api.me(answer.json()["access_token"])  # refused unless `iss` and `aud` are the configured issuer
    assert me.status_code == 200
    signed_up = await api.http.post("/users", json={"username": "bob", "password": PASSWORD}, headers=FORWARDED)
    assert signed_up.headers["location"] == "/users/me"


# Failures and the log


@pytest.fixture
def log_lines() -> Iterator[Callable[[], list[str]]]:
    """What the service has logged at its most talkative since last asked, line by line as on standard error."""
    root, own = logging.getLogger(), logging.getLogger("identity_service")
    handlers, levels = root.handlers[:], (root.level, own.level)
    root.handlers.clear()  # pytest's own, which would not outlive being configured away
    stream = StringIO()
    with redirect_stderr(stream):
        logs.configure("debug")
    (handler,) = root.handlers
    root.handlers.extend(handlers)

    def read() -> list[str]:
        text = stream.getvalue()
        stream.seek(0)
        stream.truncate()
        return text.splitlines()

    yield read
    root.removeHandler(handler)
    root.setLevel(levels[0])
    own.setLevel(levels[1])


async def test_an_unexpected_failure_says_nothing_about_itself_and_is_logged_once(api, log_lines):
    """LOG-1: generic outside, the whole story inside, one id for both."""

    async def boom() -> None:
        raise RuntimeError("details for the log only")

    api.app.add_api_route("/boom", boom)
    log_lines()
    answer = await api.http.get("/boom?token=a-token-in-the-query", headers={"X-Request-ID": "find-me", "Origin": APP})
    assert seen(answer) == FAILED
    assert answer.json()["request_id"] == "find-me"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["access-control-allow-origin"] == APP
    failure, request = (json.loads(line) for line in log_lines())
    assert "RuntimeError: details for the log only" in failure.pop("exception")
    del failure["at"], request["at"], request["duration_ms"]
    assert failure == {
        "level": "error",
        "event": "request.failed",
        "logger": "identity_service.request",
        "request_id": "find-me",
        "path": "/boom",
    }
    assert request == {
        "level": "error",
        "event": "request",
        "logger": "identity_service.request",
        "request_id": "find-me",
        "method": "GET",
        "path": "/boom",
        "status": 500,
        "client": "127.0.0.1",
        "error": "internal_error",
        "detail": answer.json()["detail"],
    }


async def test_a_service_that_failed_once_goes_on(api, alice):
    async def boom() -> None:
        raise RuntimeError

    api.app.add_api_route("/boom", boom)
    for _ in range(3):
        assert (await api.http.get("/boom")).status_code == 500
    await alice.log_in()


async def test_each_request_is_one_line_that_says_what_happened_and_not_what_was_said(api, alice, log_lines):
    log_lines()
    await api.http.post("/token?password=in-the-query", data={"grant_type": "password", "username": "alice"})
    await api.token(grant_type="password", username="alice", password="wrong all the same")
    await api.http.head("/")
    lines = [json.loads(line) for line in log_lines()]
    common = {"level": "info", "event": "request", "logger": "identity_service.request", "client": "127.0.0.1"}
    for line in lines:
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("at"))
        assert line.pop("duration_ms") >= 0
        assert re.fullmatch("[0-9a-f]{16}", line.pop("request_id"))
    assert lines == [
        common
        | {
            "method": "POST",
            "path": "/token",
            "status": 400,
            "error": "invalid_request",
            "detail": "The parameter password is missing.",
        },
        common
        | {
            "method": "POST",
            "path": "/token",
            "status": 400,
            "error": "InvalidCredentials",
            "detail": "wrong_password",
        },
        common | {"method": "HEAD", "path": "/", "status": 200},
    ]


async def test_what_the_edge_refuses_says_why_in_its_line(api, log_lines):
    """So that a forgotten IDENTITY_ALLOWED_ORIGINS can be seen where the service runs."""
    log_lines()
    asked = {"Origin": "https://other.example.com", "Access-Control-Request-Method": "POST"}
    answers = [
        await api.http.options("/login", headers=asked),
        await api.http.get("/", headers={"Host": "evil.example"}),
        await send(api, json_of(LIMIT + 1), chunked=True),
        await send(api, json_of(LIMIT + 1), chunked=False),
    ]
    assert [answer.status_code for answer in answers] == [403, 400, 413, 413]
    lines = [json.loads(line) for line in log_lines()]
    assert [(line["status"], line["error"], line["detail"]) for line in lines] == [
        (answer.status_code, answer.json()["code"], answer.json()["detail"]) for answer in answers
    ]
    assert lines[0]["error"] == "origin_not_allowed"


async def test_every_refusal_says_why_in_its_line_and_is_counted(api, alice, log_lines):
    """With the code that the caller got, where nothing else is to be said of it."""
    tokens = await alice.log_in()
    counted = api.runtime.metrics.registry.get_sample_value
    log_lines()
    answers = [
        await api.http.get("/nothing"),
        await api.http.put("/users"),
        await api.http.get("/users/me"),
        await api.http.get("/admin/users", headers=bearer(tokens["access_token"])),
        await api.http.post("/users", json={}),
        await api.http.post("/users", content=b"{", headers={"Content-Type": "application/json"}),
        await api.http.post("/users", content=b"a=b", headers={"Content-Type": "text/plain"}),
        await api.http.post("/login", json={}),
        await api.http.get("/status-lists/0?time=1"),
    ]
    lines = [json.loads(line) for line in log_lines()]
    assert [(line["status"], line["error"], line["detail"]) for line in lines] == [
        (answer.status_code, answer.json()["code"], answer.json()["detail"]) for answer in answers
    ]
    for line in lines:
        assert counted("identity_refusals_total", {"error": line["error"]}) == 1


@pytest.mark.parametrize(
    "path",
    [
        '/%0d%0a{"event":"forged"}',
        "/%0a",
        "/%1b[31mred%1b[0m",
        "/%00",
        "/%e2%80%a8",
        "/%c2%85",
        "/%ff%fe",
        '/"}%0a{"level":"error',
        "/%0d%0aSet-Cookie:%20x=1",
    ],
)
async def test_a_hostile_path_stays_one_clean_line_and_no_header(api, log_lines, path):
    """F70"""
    log_lines()
    answer = await api.http.get(path)
    assert seen(answer) == NOT_FOUND
    assert "set-cookie" not in answer.headers
    (line,) = log_lines()
    assert line.isprintable()
    assert line.isascii()
    assert json.loads(line)["event"] == "request"
    assert json.loads(line)["status"] == 404


@pytest.mark.parametrize("hostile", ["alice\r\nforged", "\x1b[2J", "alice\u2028forged", "alice\x85", "\u202eecila"])
async def test_a_hostile_username_reaches_no_log_line(api, log_lines, hostile):
    """F70"""
    log_lines()
    body = {"username": hostile, "password": PASSWORD}
    await api.http.post("/users", json=body)
    await api.http.post("/login", json=body, headers={"Origin": APP})
    await api.token(grant_type="password", **body)
    lines = log_lines()
    assert len(lines) == 3
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert all(json.loads(line)["event"] == "request" for line in lines)
    assert not any("forged" in line or "ecila" in line for line in lines)


SAID = {
    "password": "quiet violet harbour lanterns",
    "next password": "purple elephants dance at dusk",
    "wrong_password": "seven wrong words for a login",
    "short password": "hunter2-hunter",
    "email": "somebody.private@example.com",
    "query": "something-in-the-query",
    "bearer": "not.a.token",
    "basic": "c29tZWJvZHk6YSBjbGllbnQgc2VjcmV0",
    "client secret": "a client secret",
    "reset": "Cookie-Of-Somebody-Else",
}


async def whole_flow(api: Api) -> list[httpx2.Response]:
    """Do everything that handles a secret, right and wrong, and return all answers."""
    answers: list[httpx2.Response] = []

    async def keep(answer: httpx2.Response) -> None:
        await answer.aread()
        answers.append(answer)

    api.http.event_hooks = {"response": [keep]}
    ask = api.http.request
    person = {"username": "alice", "password": SAID["password"]}
    origin = {"Origin": APP}
    await ask("POST", "/users", json=person | {"email": SAID["email"]})
    await ask("POST", "/users", json=person)
    await ask("POST", "/users", json=person | {"password": SAID["short password"]})
    await ask("POST", "/users", json=person | {"password": [SAID["wrong_password"]], "x": SAID["next password"]})
    await ask("POST", "/users", content=json.dumps(person).encode()[:-1], headers={"Content-Type": "application/json"})
    tokens = (await ask("POST", "/token", data={"grant_type": "password"} | person)).json()
    await ask("POST", "/token", data={"grant_type": "password"} | person | {"password": SAID["wrong_password"]})
    await ask("POST", "/token", data=person, headers={"Authorization": f"Basic {SAID['basic']}"})
    await ask("POST", "/token", data={"grant_type": "password", "client_secret": SAID["client secret"]} | person)
    await ask("POST", f"/token?client_secret={SAID['query']}", data={"grant_type": "password"} | person)
    await ask("GET", f"/users/me?access_token={tokens['access_token']}&q={SAID['query']}")
    await ask("GET", "/users/me", headers=bearer(SAID["bearer"]))
    await ask("GET", "/users/me", headers=bearer(tokens["access_token"]))
    await ask("GET", f"/nowhere?password={SAID['query']}", headers={"Cookie": f"session={SAID['reset']}"})
    await ask("POST", "/login", json=person, headers=origin)
    await ask("POST", "/login", json=person | {"password": SAID["wrong_password"]}, headers=origin)
    await ask("POST", "/login", json=person)
    await ask("POST", "/refresh", json={}, headers=origin)
    await ask("POST", "/refresh", json={"refresh_token": tokens["refresh_token"]}, headers=origin)
    form = {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]}
    refreshed = (await ask("POST", "/token", data=form)).json()
    again = (await ask("POST", "/token", data=form | {"refresh_token": refreshed["refresh_token"]})).json()
    await ask("POST", "/token", data=form)  # spent twice over: reuse
    await ask("POST", "/token", data=form | {"refresh_token": again["refresh_token"]})
    await ask("POST", "/token", data=form | {"refresh_token": tokens["access_token"]})
    token = (await ask("POST", "/token", data={"grant_type": "password"} | person)).json()["access_token"]
    api.clock.advance(seconds=1)
    change = {"current_password": SAID["wrong_password"], "new_password": SAID["next password"]}
    await ask("PUT", "/users/me/password", json=change, headers=bearer(token))
    await ask("PUT", "/users/me/password", json=change | {"current_password": SAID["password"]}, headers=bearer(token))
    await ask("PATCH", "/users/me", json={"email": SAID["email"], "username": "bob"}, headers=bearer(token))
    await ask("POST", "/revoke", data={"token": tokens["refresh_token"]})
    await ask("POST", "/logout", json={}, headers=origin)
    deletion = {"current_password": SAID["next password"]}
    await ask("DELETE", "/users/me", json=deletion, headers=bearer(token))
    for path in ("/", "/.well-known/jwks.json", "/.well-known/oauth-authorization-server", "/readyz"):
        await ask("GET", path)
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(500) == 0
    assert {200, 201, 204, 400, 401, 403, 404, 409, 422} <= set(statuses)
    api.http.event_hooks = {}
    return answers


async def test_no_log_line_holds_a_password_a_token_a_query_an_address_or_a_key(api, keys_dir, log_lines):
    """F65, LOG-1"""
    answers = await whole_flow(api)
    lines = log_lines()
    text = "\n".join(lines)
    assert len(lines) >= len(answers)
    assert all(json.loads(line) for line in lines)
    assert [name for name, secret in SAID.items() if secret in text] == []
    tokens = re.findall(r"eyJ[A-Za-z0-9_.-]{20,}", "".join(f"{answer.headers} {answer.text}" for answer in answers))
    assert len(set(tokens)) >= 10
    assert [token for token in tokens if token in text or token.rpartition(".")[2] in text] == []
    assert re.findall(r"eyJ[A-Za-z0-9_-]{8,}|\$argon2|PRIVATE KEY", text) == []
    for pem in keys_dir.glob("*.pem"):
        assert not any(row in text for row in pem.read_text().splitlines())
    assert '"d"' not in text


async def test_no_answer_holds_a_private_key(api, keys_dir):
    """F65, JWK-1"""
    text = "\n".join(f"{answer.headers} {answer.text}" for answer in await whole_flow(api))
    rows = [row for pem in keys_dir.glob("*.pem") for row in pem.read_text().splitlines() if "-----" not in row]
    assert len(rows) > 40
    assert [row for row in rows if row in text] == []
    assert re.findall(r'PRIVATE KEY|"(?:d|p|q|dp|dq|qi|oth|k)": ?"', text) == []


async def test_a_row_that_the_database_refuses_is_not_written_to_the_log_instead(api, database_url, log_lines):
    """LOG-1, F66: Postgres repeats the row, with hash and address, in the error that reaches us."""
    connection = await asyncpg.connect(database_url)
    await connection.execute("ALTER TABLE users ADD CONSTRAINT nobody CHECK (username = '') NOT VALID")
    try:
        body = {"username": "alice", "password": PASSWORD, "email": "somebody.private@example.com"}
        answer = await api.http.post("/users", json=body)
    finally:
        await connection.execute("ALTER TABLE users DROP CONSTRAINT nobody")
        await connection.close()
    assert seen(answer) == FAILED
    text = "\n".join(log_lines())
    assert "CheckViolationError" in text
    assert re.findall(r"\$argon2|somebody\.private", text) == []


@pytest.mark.parametrize("path", ["/token", "/revoke", "/introspect", "/users", "/login"])
@pytest.mark.parametrize("length", [b"content-length", b"transfer-encoding"])
async def test_half_a_body_is_none_and_no_failure_of_ours(api, path, length):
    """Anybody can hang up; what had come by then must not be taken for all of it."""
    form = path in ("/token", "/revoke", "/introspect")
    media_type = b"application/x-www-form-urlencoded" if form else b"application/json"
    headers = [(b"host", b"id.example.com"), (b"content-type", media_type), (b"origin", ISSUER.encode())]
    headers.append((length, b"100" if length == b"content-length" else b"chunked"))
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    coming: list[MutableMapping[str, Any]] = [
        {"type": "http.request", "body": b"grant_type=password&token=x" if form else b"{}", "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return coming.pop(0) if coming else {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    await api.app(scope, receive, send)
    assert [message["status"] for message in sent if "status" in message] == [400]
    assert form is (b"not complete" in b"".join(message.get("body", b"") for message in sent))
