"""What a client may send before it is a request: bounded in size, in number and in time, and linear to read."""

import asyncio
import json
import logging
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.responses import PlainTextResponse

from identity_service.app import edge_of
from identity_service.cli.serve import _config
from identity_service.errors import KeysUnavailable
from identity_service.web import middleware
from identity_service.web.direct import DirectRoute
from identity_service.web.protocol import MAX_HEAD, BoundedProtocol
from tests.conftest import ISSUER, Api

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\n"


class Impatient(BoundedProtocol):
    seconds_to_arrive = 0.3


@pytest.fixture
def listening() -> Iterator[Callable[[type[BoundedProtocol]], int]]:
    """Start uvicorn with a protocol around a small application, and return its port."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        while scope["path"] != "/early" and (await receive()).get("more_body"):
            pass
        echo = dict(scope["headers"]).get(b"x-echo", b"").decode()
        await PlainTextResponse(f"ok {echo}")(scope, receive, send)

    def start(protocol: type[BoundedProtocol]) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(application, http=protocol, lifespan="off", log_config=None, timeout_keep_alive=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        servers.append((server, thread))
        port: int = listener.getsockname()[1]
        return port

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join()


def talk(port: int, data: bytes, within: float = 5) -> bytes:
    """Send something and return all that comes back until the connection is closed or nothing more comes."""
    with socket.create_connection(("127.0.0.1", port), timeout=within) as connection:
        answer = b""
        try:
            connection.sendall(data)
            while part := connection.recv(65536):
                answer += part
                connection.settimeout(1)
        except (TimeoutError, ConnectionError):
            pass
        return answer


def test_ordinary_requests_are_answered_one_after_the_other(listening):
    port = listening(BoundedProtocol)
    assert talk(port, GET).startswith(b"HTTP/1.1 200 OK")
    assert talk(port, GET * 5).count(b"HTTP/1.1 200 OK") == 5


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * MAX_HEAD + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 2 * MAX_HEAD,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X%d: y\r\n" % n for n in range(8000)) + b"\r\n",
        b"GET /" + b"a" * MAX_HEAD + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["one large header", "one that never ends", "many headers", "a long path"],
)
def test_a_head_beyond_its_bound_is_refused_and_the_connection_closed(listening, head):
    assert talk(listening(BoundedProtocol), head).startswith(b"HTTP/1.1 400 Bad Request")


@pytest.mark.parametrize("before", [GET, b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\na"])
def test_a_head_is_bounded_wherever_in_what_was_read_it_begins(listening, before):
    answer = talk(listening(BoundedProtocol), before + GET[:-2] + b"X: " + b"a" * MAX_HEAD + b"\r\n\r\n")
    assert b"HTTP/1.1 400 Bad Request" in answer


CHUNKED = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n"


@pytest.mark.parametrize(
    "rest",
    [
        b"0\r\n" + b"X: y\r\n" * 100_000,
        b"0\r\nX: " + b"a" * 600_000,
        b"1;x=" + b"a" * 600_000,
    ],
    ids=["many trailers", "one that never ends", "an extension of a chunk that never ends"],
)
def test_what_comes_beside_a_body_is_bounded_as_the_head_is(listening, rest):
    assert talk(listening(BoundedProtocol), CHUNKED + rest).startswith(b"HTTP/1.1 400 Bad Request")


def test_what_comes_after_a_body_is_no_header(listening):
    """Whoever stands in front of us takes headers away, and need not look there."""
    answer = talk(listening(BoundedProtocol), CHUNKED + b"0\r\nX-Echo: from a trailer\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"trailer" not in answer


def test_a_body_in_very_small_parts_is_read(listening):
    assert talk(listening(BoundedProtocol), CHUNKED + b"1\r\na\r\n" * 20_000 + b"0\r\n\r\n").startswith(
        b"HTTP/1.1 200 OK"
    )


def test_requests_sent_far_ahead_of_their_answers_end_the_connection(listening):
    answer = talk(listening(BoundedProtocol), GET * 5000)
    assert answer.count(b"HTTP/1.1 200 OK") < 5000
    assert b"HTTP/1.1 400 Bad Request" in answer


@pytest.mark.parametrize(
    "part",
    [b"", b"GET / HTTP/1.1\r\nHost:", b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nabc"],
    ids=["nothing", "half a head", "half a body"],
)
def test_a_request_that_does_not_arrive_is_not_waited_for(listening, part):
    started = time.monotonic()
    assert talk(listening(Impatient), part) == b""
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (GET, b""),
        (GET, b"\r\n"),
        (GET, GET[:9]),
        (b"POST /early HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n", b"a"),
    ],
    ids=["nothing", "an empty line", "the beginning of another request", "a body after its answer"],
)
def test_a_connection_that_says_nothing_more_is_not_kept(listening, first, then):
    with socket.create_connection(("127.0.0.1", listening(Impatient)), timeout=3) as connection:
        connection.sendall(first)
        received = connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 200 OK")
        connection.sendall(then)
        with suppress(ConnectionError):
            while part := connection.recv(65536):  # the rest of the answer, if it came in two parts
                received += part
        assert received.count(b"HTTP/1.1") == 1


async def lasting(api: Api, **headers: str) -> float:
    """Return for how many seconds the event loop stood still while a request was answered."""
    slowest = 0.0

    async def tick() -> None:
        nonlocal slowest
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0)
            slowest = max(slowest, time.perf_counter() - before)

    ticking = asyncio.create_task(tick())
    answer = await api.http.post("/login", json={}, headers={"Origin": "https://id.example.com", **headers})
    ticking.cancel()
    assert answer.status_code < 500
    return slowest


@pytest.mark.parametrize(
    "header",
    [
        {"Cookie": 'a="' + '\\"' * 14000 + '"'},
        {"Cookie": "; ".join(f"a{n}=b" for n in range(4000))},
        {"Content-Type": "application/json; a=" + '"' + ";" * 30000},
        {"Content-Type": "application/json; a*=x; a*0=y"},
        {"Content-Type": "application/json; a*" + "9" * 5000 + "=x"},
    ],
    ids=["escapes in a cookie", "many cookies", "many parameters", "continued parameter", "number of a parameter"],
)
async def test_no_header_is_read_in_quadratic_time(api, header):
    """One request of 30 kB must not hold up everybody else's."""
    assert await lasting(api, **header) < 1


# Answers that are written whole


@pytest.fixture
async def served(api: Api) -> AsyncIterator[httpx2.AsyncClient]:
    """The same service behind its server, in this event loop."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # or the kernel takes megabytes for a slow client
    config = _config(api.settings, edge_of(api.app))
    config.lifespan = "off"
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    # Named as the tests without a server name it, so that both see the same request.
    base_url, host = f"http://127.0.0.1:{listener.getsockname()[1]}", httpx2.URL(ISSUER).host
    async with httpx2.AsyncClient(base_url=base_url, headers={"Host": host}) as http:
        yield http
    server.should_exit = True
    await serving


APP = {"Origin": "https://app.example.com"}
WRONG_CLIENT = {"Authorization": "Basic bm9ib2R5OndvcmRz"}


@pytest.mark.parametrize(
    ("method", "path", "form", "headers"),
    [
        ("GET", "/.well-known/jwks.json", None, {}),
        ("GET", "/.well-known/jwks.json", None, APP),
        ("GET", "/.well-known/jwks.json", None, {"If-None-Match": "*"}),
        ("HEAD", "/.well-known/jwks.json", None, {}),
        ("POST", "/.well-known/jwks.json", {}, {}),
        ("GET", "/.well-known/jwks.json", {"a": "body"}, {}),
        ("GET", "/.well-known/jwks.json", {"a": "x" * 70_000}, {}),
        ("GET", "/.well-known/jwks.json", None, {"Host": "elsewhere.example.com"}),
        ("GET", "/.well-known%2fjwks.json", None, {}),
        ("GET", "/.well-known/oauth-authorization-server", None, {}),
        ("GET", "/", None, {"Origin": "https://evil.example.com"}),
        ("GET", "/", None, {"Connection": "close"}),
        ("POST", "/token", {"grant_type": "refresh_token", "refresh_token": "e30.e30.c2ln"}, APP),
        ("POST", "/token", {"grant_type": "refresh_token"}, WRONG_CLIENT),
        ("POST", "/token", {"grant_type": "nonsense"}, {}),
        ("POST", "/revoke", {"token": "nonsense"}, {}),
        ("POST", "/introspect", {"token": "nonsense"}, WRONG_CLIENT),
    ],
)
async def test_an_answer_is_the_same_written_whole_or_in_parts(api, served, method, path, form, headers):
    """Without a server, as tests ask, there is nothing to write to, and answers go the framework's way."""
    asked: dict[str, Any] = {"headers": {"X-Request-ID": "mine", **headers}}
    if form is not None:
        asked["data"] = form
    in_parts, written = await api.http.request(method, path, **asked), await served.request(method, path, **asked)
    assert (written.status_code, written.content) == (in_parts.status_code, in_parts.content)
    of_server = {"date", "connection"}
    headers_of = [
        sorted(pair for pair in answer.headers.multi_items() if pair[0] not in of_server)
        for answer in (in_parts, written)
    ]
    assert headers_of[0] == headers_of[1]
    assert len(written.headers.get_list("date")) == 1


NO_REQUESTS = {
    b"FOO / HTTP/9.9\r\nHost: localhost\r\n\r\n": "This is not well-formed HTTP/1.1.",
    b"F(O) / HTTP/1.1\r\nHost: localhost\r\n\r\n": "This is not well-formed HTTP/1.1.",
    b"GET /\xc3\xa9 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n": (
        "This is not well-formed HTTP/1.1."
    ),
    GET[:-2] + b"X: " + b"a" * MAX_HEAD + b"\r\n\r\n": "The head of the request is too large.",
    GET[:-2] + b"X: " + b"a" * 2 * MAX_HEAD: "The head of the request is too large.",
    GET[:-2] + b"Connection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 1\r\n\r\na": (
        "A request that asks for an upgrade must not have a body."
    ),
}


@pytest.mark.parametrize("data", NO_REQUESTS)
async def test_what_cannot_be_read_as_a_request_is_refused_like_any_other(served, caplog, data):
    """A problem document with what every answer carries, one line in the log, and the end of the connection."""
    with caplog.at_level(logging.INFO, "identity_service.request"):
        answer = await asyncio.to_thread(talk, served.base_url.port, data)
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    ordinary = (await served.get("/nowhere")).headers
    assert status == "http/1.1 400 bad request"
    assert headers.keys() == ordinary.keys() | {"connection"}
    assert (headers["connection"], headers["content-length"]) == ("close", str(len(body)))
    changing = {"content-length", "date", "x-request-id"}
    assert {name: headers[name] for name in ordinary.keys() - changing} == {
        name: value.lower() for name, value in ordinary.items() if name not in changing
    }
    (line, *_) = [record for record in caplog.records if record.name == "identity_service.request"]
    assert (line.request_id, line.status, line.error) == (headers["x-request-id"], 400, "bad_request")
    assert json.loads(body) == {
        "type": "about:blank",
        "title": "Bad Request",
        "status": 400,
        "code": "bad_request",
        "detail": NO_REQUESTS[data],
        "request_id": headers["x-request-id"],
    }


@pytest.mark.parametrize(
    ("path", "status", "allow"),
    [
        ("/", 405, "GET, HEAD"),
        ("/users/me?a=b", 405, "DELETE, GET, HEAD, PATCH"),
        ("/users%2Fme", 405, "DELETE, GET, HEAD, PATCH"),
        ("/nowhere", 404, None),
        ("/%ff", 404, None),
    ],
)
async def test_a_method_that_nobody_knows_is_a_wrong_one_like_any_other(served, caplog, path, status, allow):
    """FPS-4. Nothing more of it is read: where its body begins, only who knows the method could say."""
    with caplog.at_level(logging.INFO, "identity_service.request"):
        answer = await served.request("FOO", path, content=b"a body")
    like = await served.request("TRACE", path.replace("%2F", "/"))
    assert (answer.status_code, answer.headers.get("allow")) == (status, allow)
    assert answer.headers["connection"] == "close"
    assert (like.status_code, like.headers.get("allow")) == (status, allow)
    assert answer.json() | {"request_id": ""} == like.json() | {"request_id": ""}
    assert answer.headers.keys() - {"connection"} == like.headers.keys()
    (line,) = [record for record in caplog.records if record.name == "identity_service.request"]
    assert (line.request_id, line.status) == (answer.headers["x-request-id"], status)


WRONG_METHOD = b"FOO / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("parts", "statuses"),
    [
        ([WRONG_METHOD * 2], [b"405"]),
        ([WRONG_METHOD + GET], [b"405"]),
        ([b"get" + GET[3:]], [b"405"]),
        ([GET, WRONG_METHOD], [b"200", b"405"]),
        ([GET + WRONG_METHOD], [b"200", b"400"]),
        ([GET + b"P", GET], [b"200", b"400"]),
        ([GET + b"F", WRONG_METHOD[1:]], [b"200", b"400"]),
        ([GET * 2 + b"GET / HTTP/1.1\r\nX: ", GET + WRONG_METHOD], [b"200", b"200", b"200", b"400"]),
        ([POST + b"Content-Length: 8\r\n\r\n", b"FOO / aa" + WRONG_METHOD], [b"405", b"400"]),
        ([GET[:-2] + b"X: ", b"FOO / HTTP/1.1\r\n\r\n" + WRONG_METHOD], [b"200", b"400"]),
        ([b"FO", WRONG_METHOD[2:]], [b"400"]),
    ],
)
async def test_what_a_client_sends_in_whatever_parts_is_run_once_or_not_at_all(served, caplog, parts, statuses):
    """A method that is not known is told only of what a request begins with, and ends the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.base_url.port)
    with caplog.at_level(logging.INFO, "identity_service.request"):
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.1)
        answers = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert re.findall(rb"HTTP/1.1 (\d+) ", answers) == statuses
    lines = [record.status for record in caplog.records if record.name == "identity_service.request"]
    assert sorted(lines) == sorted(int(status) for status in statuses)


async def test_what_is_wrong_with_a_request_is_not_told_to_the_one_before_it(api, served):
    """Whoever waits for an answer would take a 404 for theirs."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.base_url.port)
    async with api.database.connection() as db, db.transaction():
        await db.execute("LOCK TABLE users")
        form = b"grant_type=password&username=alice&password=x"
        writer.write(POST.replace(b"/", b"/token", 1) + b"Content-Type: application/x-www-form-urlencoded\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(form), form))
        await asyncio.sleep(0.2)
        writer.write(WRONG_METHOD.replace(b"/", b"/nowhere", 1))
        answers = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert re.findall(rb"HTTP/1.1 (\d+) ", answers) == [b"400"]


@pytest.mark.parametrize("behind", [b"", GET], ids=["alone", "with another behind it"])
async def test_a_body_that_is_too_large_and_has_arrived_is_not_waited_for(served, behind):
    """Nor is what comes behind it run: the connection ends with the answer."""
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (70_000, b"x" * 70_000)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.base_url.port)
    writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n" + body + behind)
    answers = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert re.findall(rb"HTTP/1.1 (\d+) ", answers) == [b"413"]


@pytest.mark.parametrize("framing", ["Content-Length: 10000000", "Transfer-Encoding: chunked"])
async def test_who_sends_far_too_much_hears_of_it(served, framing):
    """F60: also those who read no answer before they have sent everything. A reset would take it from them."""

    def send() -> bytes:
        body = b"x" * 10_000_000
        with socket.create_connection(("127.0.0.1", served.base_url.port), timeout=30) as connection:
            connection.sendall(f"POST /login HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n".encode())
            chunked = "chunked" in framing
            connection.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body)
            answer = b""
            while part := connection.recv(65536):
                answer += part
            return answer

    answer = await asyncio.to_thread(send)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"\r\nconnection: close\r\n" in answer.lower()
    assert answer.endswith(b"}")


async def test_what_is_too_large_without_an_end_ends(served, monkeypatch):
    monkeypatch.setattr(middleware, "MAX_DISCARDED", 1_000_000)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.base_url.port)
    writer.write(b"POST /login HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
    writer.write(b"20000\r\n" + b"x" * 131072 + b"\r\n")
    assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 413 ")
    sent = 131072
    with suppress(ConnectionError):
        while sent < 100_000_000:
            writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            await writer.drain()
            sent += 65536
    writer.close()
    assert 1_000_000 <= sent < 100_000_000


async def test_an_answer_that_is_written_whole_is_counted_and_timed(api, served, caplog):
    with caplog.at_level(logging.INFO, "identity_service.request"):
        assert (await served.get("/.well-known/jwks.json", headers={"X-Request-ID": "mine"})).status_code == 200
    (line,) = [record for record in caplog.records if record.name == "identity_service.request"]
    assert (line.request_id, line.path, line.status) == ("mine", "/.well-known/jwks.json", 200)
    labels = {"method": "GET", "route": "/.well-known/jwks.json", "status": "200"}
    registry = api.app.state.metrics.registry
    assert registry.get_sample_value("http_server_request_duration_seconds_count", labels) == 1


async def test_documents_are_answered_in_the_order_in_which_they_were_asked_for(served):
    """One that is at hand must not overtake the answer to what was sent before it on the same connection."""
    asked = [
        b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /.well-known/jwks.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    ]
    reader, writer = await asyncio.open_connection("127.0.0.1", served.base_url.port)
    writer.write(b"".join(asked))
    answers = await reader.read()
    writer.close()
    found = [answers.index(part) for part in (b'"missing"', b'"docs"', b'"status":"ok"}', b'"keys"')]
    assert answers.count(b"HTTP/1.1 200 OK") == 4
    assert found == sorted(found)


async def test_a_document_is_answered_without_a_task(api, served):
    """As soon as the head of the request is there; all else about it is as ever."""

    def note(request: Request) -> Response:
        assert asyncio.current_task() is None
        return Response("noted")

    edge = api.app.middleware_stack
    edge._at_once = {("GET", b"/note"): DirectRoute("/note", note)}
    assert (await served.get("/note")).text == "noted"


async def test_documents_asked_for_far_ahead_of_their_answers_end_the_connection(served):
    """They are answered without a task, and still nobody else may have to wait for thousands of them."""
    ahead = b"GET /.well-known/jwks.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 600
    answers = await asyncio.to_thread(talk, served.base_url.port, ahead)
    assert 0 < answers.count(b"HTTP/1.1 200 OK") < 100


async def test_a_document_that_fails_is_a_problem_document(api, served):
    def fail(request: Request) -> Response:
        raise RuntimeError("secret")

    def refuse(request: Request) -> Response:
        raise KeysUnavailable

    edge = api.app.middleware_stack
    routes = {path: DirectRoute(path, endpoint) for path, endpoint in (("/fail", fail), ("/refuse", refuse))}
    edge._direct = dict(edge._direct) | {("GET", path): route for path, route in routes.items()}
    edge._at_once = {("GET", path.encode()): route for path, route in routes.items()}
    failed, refused = await served.get("/fail"), await served.get("/refuse")
    assert (failed.status_code, failed.json()["code"]) == (500, "internal_error")
    assert (refused.status_code, refused.json()["code"]) == (503, "temporarily_unavailable")
    assert "secret" not in failed.text


async def test_a_header_with_a_line_break_is_never_written(api, served):
    async def split(request: Request) -> Response:
        return Response("a", headers={"X-Name": "a\r\nX-Other: b"})

    edge = api.app.middleware_stack
    edge._direct = dict(edge._direct) | {("GET", "/split"): DirectRoute("/split", split, response_model=None)}
    answer = await served.get("/split")
    assert answer.status_code == 500
    assert "x-other" not in answer.headers


UPGRADE = b"Connection: upgrade\r\nUpgrade: websocket\r\n"


async def say(port: int, *parts: bytes) -> bytes:
    """Send parts, each once the one before has been read, and return all that comes back until the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(0.1)
    with suppress(ConnectionError):
        async with asyncio.timeout(8):
            answers = await reader.read()
    writer.close()
    return answers


@pytest.mark.parametrize("framing", [b"Content-Length: %d\r\n", b"Transfer-Encoding: chunked\r\n"])
@pytest.mark.parametrize("path", [b"/token", b"/.well-known/jwks.json"])
async def test_the_body_of_an_upgrade_is_not_run_as_a_request(served, path, framing):
    """For the parser the message ends at its head. A proxy that forwards both would be told what was not asked."""
    hidden = b"GET /.well-known/jwks.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    framing = framing % len(hidden) if b"%" in framing else framing
    head = b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\n" + UPGRADE + framing + b"\r\n"
    answers = await say(served.base_url.port, head, hidden)
    assert answers.startswith(b"HTTP/1.1 400 Bad Request")
    assert answers.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("path", [b"/", b"/livez", b"/nowhere"])
async def test_an_upgrade_is_not_granted_and_ends_the_connection_with_its_answer(served, caplog, path):
    asked = b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n" + UPGRADE + b"\r\n"
    answers = await say(served.base_url.port, asked, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answers.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in answers
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("length", [b"0", b"00"])
async def test_an_upgrade_that_says_it_has_no_body_is_answered(served, length):
    """Java's client sends a length of zero with a GET, and offers HTTP/2 to every server without TLS."""
    head = b"GET /.well-known/jwks.json HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + length + b"\r\n"
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n\r\n"
    answers = await say(served.base_url.port, head + upgrade)
    assert answers.startswith(b"HTTP/1.1 200 OK")
    assert b'"keys"' in answers


async def test_a_client_that_does_not_take_its_answer_loses_the_connection(served, monkeypatch):
    """Or as many of them as like would keep a request under way for ever, each with the answer in memory."""
    closed = asyncio.Event()
    connection_lost = BoundedProtocol.connection_lost

    def note(self: BoundedProtocol, exc: Exception | None) -> None:
        connection_lost(self, exc)
        closed.set()

    monkeypatch.setattr(BoundedProtocol, "connection_lost", note)
    monkeypatch.setattr(BoundedProtocol, "seconds_to_leave", 0.2)
    with socket.socket() as asking:
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asking.connect(("127.0.0.1", served.base_url.port))
        asking.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 8)
        asking.settimeout(5)
        async with asyncio.timeout(20):
            await closed.wait()
        taken = await asyncio.to_thread(lambda: sum(len(part) for part in iter(lambda: asking.recv(65536), b"")))
    assert taken < 8 * 400_000, "the end came after all that was asked for"


async def test_a_client_that_takes_its_answer_slowly_gets_all_of_it(served, monkeypatch):
    monkeypatch.setattr(BoundedProtocol, "seconds_to_leave", 1.0)
    pauses, pause_writing = 0, BoundedProtocol.pause_writing

    def note(self: BoundedProtocol) -> None:
        nonlocal pauses
        pauses += 1
        pause_writing(self)

    monkeypatch.setattr(BoundedProtocol, "pause_writing", note)
    ask = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n"
    taken = 0
    with socket.socket() as asking:
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asking.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(asking, ("127.0.0.1", served.base_url.port))
        await loop.sock_sendall(asking, (ask + b"\r\n") * 7 + ask + b"Connection: close\r\n\r\n")
        while part := await loop.sock_recv(asking, 8192):
            taken += len(part)
            await asyncio.sleep(0.004)  # two seconds for all of it, a quarter for each answer
    assert pauses > 0, "all of it was taken at once"
    assert taken > 8 * 400_000


async def test_nothing_is_written_into_the_middle_of_an_answer(api, served):
    """The connection just ends, so that nobody takes the refusal for a part of it (RFC 9112 9.3.2)."""

    async def begin(request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b"begun"
            await asyncio.Event().wait()

        return StreamingResponse(parts())

    edge = api.app.middleware_stack
    edge._direct = dict(edge._direct) | {("GET", "/begin"): DirectRoute("/begin", begin)}
    reader, writer = await asyncio.open_connection("127.0.0.1", served.base_url.port)
    writer.write(b"GET /begin HTTP/1.1\r\nHost: localhost\r\n\r\n")
    async with asyncio.timeout(10):
        before = await reader.readuntil(b"begun\r\n")
        writer.write(b"nonsense\r\n\r\n")
        after = await reader.read()
    writer.close()
    assert before.startswith(b"HTTP/1.1 200 OK")
    assert b"400" not in after


@pytest.mark.parametrize("end", ["a reset", "a request that is refused"])
async def test_the_end_of_a_connection_is_told_to_the_request_that_is_answered(api, served, caplog, end):
    """The server tells only the one that came last. What goes on would write to a closed connection, and fail."""
    begun, told = asyncio.Event(), asyncio.Event()

    async def wait(request: Request) -> Response:
        begun.set()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        told.set()
        return Response("a")

    edge = api.app.middleware_stack
    edge._direct = dict(edge._direct) | {("GET", "/wait"): DirectRoute("/wait", wait)}
    reader, writer = await asyncio.open_connection("127.0.0.1", served.base_url.port)
    then = GET if end == "a reset" else b"nonsense\r\n\r\n"
    writer.write(b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n" + then)
    async with asyncio.timeout(5):
        await begun.wait()
        if end == "a reset":
            writer.transport.abort()
        else:
            assert (await reader.read()).startswith(b"HTTP/1.1 400 Bad Request")
        await told.wait()
    await asyncio.sleep(0.1)
    writer.close()
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
