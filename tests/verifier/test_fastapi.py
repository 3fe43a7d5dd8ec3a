"""The answers of RFC 6750, and sockets that close when their session is revoked."""

import asyncio
import logging
from collections.abc import Callable
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import Depends, FastAPI, Security, WebSocket, WebSocketDisconnect
from fastapi.exceptions import FastAPIError
from starlette.testclient import TestClient

from identity_service.verifier import Claims, Verifier
from identity_service.verifier.fastapi import Bearer
from identity_service.verifier.testing import TestIssuer

issuer = TestIssuer("https://id.example.com", "orders")


def make_app(verifier: Verifier, **options: Any) -> FastAPI:  # noqa: C901 - many small routes
    auth = Bearer(verifier, **options)
    app = FastAPI()

    @app.get("/orders")
    async def orders(caller: Annotated[Claims, Depends(auth)]) -> dict[str, str]:
        return {"subject": caller.subject}

    @app.get("/sync")
    def sync(caller: Annotated[Claims, Depends(auth)]) -> dict[str, str]:
        return {"subject": caller.subject}

    @app.post("/orders")
    async def create(caller: Annotated[Claims, Depends(auth.require(scope="orders:write"))]) -> dict[str, str]:
        return {"subject": caller.subject}

    @app.delete("/orders")
    async def delete(
        caller: Annotated[Claims, Depends(auth.require(scope=["orders:write", "orders:delete"], role="admin"))],
    ) -> dict[str, str]:
        return {"subject": caller.subject}

    @app.put("/orders")
    async def replace(caller: Annotated[Claims, Security(auth, scopes=["orders:write"])]) -> dict[str, str]:
        return {"subject": caller.subject}

    @app.patch("/orders")
    async def change(
        caller: Annotated[Claims, Security(auth.require(role="clerk"), scopes=["orders:write"])],
    ) -> dict[str, str]:
        return {"subject": caller.subject}

    @app.get("/me")
    async def me(caller: Annotated[Claims, Depends(auth)]) -> Claims:
        return caller

    @app.get("/me-too", response_model=None)
    async def me_too(caller: Annotated[Claims, Depends(auth)]) -> Any:
        return caller

    @app.get("/drafts")
    async def drafts(caller: Annotated[Claims | None, Security(auth.optional, scopes=["orders:write"])]) -> None: ...

    @app.get("/admin")
    async def admin(caller: Annotated[Claims, Depends(auth.require(role="admin"))]) -> dict[str, str]:
        return {"subject": caller.subject}

    @app.get("/catalogue")
    async def catalogue(caller: Annotated[Claims | None, Depends(auth.optional)]) -> dict[str, str | None]:
        return {"subject": caller.subject if caller is not None else None}

    @app.websocket("/ws")
    async def chat(socket: WebSocket, caller: Annotated[Claims, Depends(auth.websocket())]) -> None:
        await socket.accept()
        try:
            while True:
                await socket.send_text(f"{caller.subject}: {await socket.receive_text()}")
        except WebSocketDisconnect as gone:
            logging.getLogger("chat").info("gone %s", gone.code)

    @app.websocket("/write")
    async def write(
        socket: WebSocket, caller: Annotated[Claims, Depends(auth.websocket(scope="orders:write"))]
    ) -> None:
        await socket.accept("mine")
        await socket.close()

    @app.websocket("/write-too")
    async def write_too(
        socket: WebSocket, caller: Annotated[Claims, Security(auth.websocket(), scopes=["orders:write"])]
    ) -> None:
        await socket.accept()
        await socket.close()

    return app


@pytest.fixture
async def http() -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=make_app(issuer.verifier())), base_url="http://orders")


async def test_the_scopes_of_fastapis_own_security_are_asked_for(http: httpx2.AsyncClient) -> None:
    """`Security(auth, scopes=[...])` is how FastAPI's documentation spells them."""
    lacks, has = issuer.token(scope="orders:read", role="clerk"), issuer.token(scope="orders:write", role="clerk")
    for method in ("PUT", "PATCH"):
        refused = await http.request(method, "/orders", headers=bearer(lacks))
        assert (refused.status_code, 'scope="orders:write"' in refused.headers["www-authenticate"]) == (403, True)
        assert (await http.request(method, "/orders", headers=bearer(has))).status_code == 200
    assert (await http.get("/drafts")).status_code == 401, "nobody has a scope without a token"
    no_role = await http.patch("/orders", headers=bearer(issuer.token(scope="orders:write")))
    assert no_role.status_code == 403


async def test_a_route_can_return_the_claims(http: httpx2.AsyncClient) -> None:
    token = issuer.token("alice", scope="a b", sid="s1", jti="t1", email="not shown")
    for path in ("/me", "/me-too"):
        answer = await http.get(path, headers=bearer(token))
        assert answer.status_code == 200, answer.text
        shown = answer.json()
        assert (shown["subject"], shown["scopes"], shown["session_id"]) == ("alice", ["a", "b"], "s1")
        assert not [name for name in shown if name.startswith("_")]
        assert "not shown" not in answer.text


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


BARE = 'Bearer realm="orders"'
ANSWERS: dict[str, tuple[str, str, list[tuple[str, str]], int, str | None]] = {
    "good": ("GET", "/orders", [("Authorization", "Bearer {good}")], 200, None),
    "good_in_a_sync_route": ("GET", "/sync", [("Authorization", "Bearer {good}")], 200, None),
    "RS-4_scheme_in_any_case": ("GET", "/orders", [("Authorization", "bEARER {good}")], 200, None),
    "RS-4_missing": ("GET", "/orders", [], 401, BARE),
    "RS-5_empty": ("GET", "/orders", [("Authorization", "")], 401, BARE),
    "RS-5_scheme_alone": ("GET", "/orders", [("Authorization", "Bearer")], 401, BARE),
    "RS-5_scheme_and_spaces": ("GET", "/orders", [("Authorization", "Bearer   ")], 401, BARE),
    "another_scheme": ("GET", "/orders", [("Authorization", "Basic YTpi")], 401, BARE),
    "RS-5_query_ignored": ("GET", "/orders?access_token={good}", [], 401, BARE),
    "RS-5_two_words": (
        "GET",
        "/orders",
        [("Authorization", "Bearer a b")],
        401,
        f'{BARE}, error="invalid_token", error_description="The token is malformed"',
    ),
    "RS-5_long": (
        "GET",
        "/orders",
        [("Authorization", "Bearer " + "A" * 100_000)],
        401,
        f'{BARE}, error="invalid_token", error_description="The token is malformed"',
    ),
    "RS-5_not_ascii": (
        "GET",
        "/orders",
        [("Authorization", "Bearer \xe9")],
        401,
        f'{BARE}, error="invalid_token", error_description="The token is malformed"',
    ),
    "RS-4_expired": (
        "GET",
        "/orders",
        [("Authorization", "Bearer {expired}")],
        401,
        f'{BARE}, error="invalid_token", error_description="The token has expired"',
    ),
    "RS-7_for_another": (
        "GET",
        "/orders",
        [("Authorization", "Bearer {foreign}")],
        401,
        f'{BARE}, error="invalid_token", error_description="The token is for another audience"',
    ),
    "RS-4_two_headers": (
        "GET",
        "/orders",
        [("Authorization", "Bearer {good}"), ("Authorization", "Bearer {good}")],
        400,
        f'{BARE}, error="invalid_request", error_description="More than one Authorization header"',
    ),
    "RS-4_scope_missing": (
        "POST",
        "/orders",
        [("Authorization", "Bearer {good}")],
        403,
        f'{BARE}, error="insufficient_scope", error_description="The token lacks a scope", scope="orders:write"',
    ),
    "scope_there": ("POST", "/orders", [("Authorization", "Bearer {writer}")], 200, None),
    "scope_needs_a_token_first": ("POST", "/orders", [], 401, BARE),
    "one_scope_of_two": (
        "DELETE",
        "/orders",
        [("Authorization", "Bearer {writer}")],
        403,
        (
            f'{BARE}, error="insufficient_scope", error_description="The token lacks a scope", '
            'scope="orders:write orders:delete"'
        ),
    ),
    "scopes_without_the_role": (
        "DELETE",
        "/orders",
        [("Authorization", "Bearer {deleter}")],
        403,
        (
            f'{BARE}, error="insufficient_scope", error_description="The caller lacks the role admin", '
            'scope="orders:write orders:delete"'
        ),
    ),
    "role_missing": (
        "GET",
        "/admin",
        [("Authorization", "Bearer {writer}")],
        403,
        f'{BARE}, error="insufficient_scope", error_description="The caller lacks the role admin"',
    ),
    "role_there": ("GET", "/admin", [("Authorization", "Bearer {admin}")], 200, None),
    "optional_without": ("GET", "/catalogue", [], 200, None),
    "optional_with": ("GET", "/catalogue", [("Authorization", "Bearer {good}")], 200, None),
    "optional_with_a_bad_one": (
        "GET",
        "/catalogue",
        [("Authorization", "Bearer {expired}")],
        401,
        f'{BARE}, error="invalid_token", error_description="The token has expired"',
    ),
}


@pytest.mark.parametrize("case", ANSWERS)
async def test_answers(http: httpx2.AsyncClient, case: str) -> None:
    method, path, headers, status, challenge = ANSWERS[case]
    tokens = {
        "good": issuer.token("alice"),
        "expired": issuer.token(expired=True),
        "foreign": issuer.token(aud=["billing"]),
        "writer": issuer.token(scope="orders:write"),
        "deleter": issuer.token(scope="orders:write orders:delete"),
        "admin": issuer.token(role="admin"),
    }

    def fill(text: str) -> str:
        for name, token in tokens.items():
            text = text.replace("{" + name + "}", token)
        return text

    raw = [(name.encode(), fill(value).encode("latin-1")) for name, value in headers]
    answer = await http.request(method, fill(path), headers=raw)
    assert answer.status_code == status
    assert answer.headers.get("www-authenticate") == challenge


async def test_a_revoked_token_is_401(http: httpx2.AsyncClient) -> None:
    token = issuer.token("alice")
    assert (await http.get("/orders", headers=bearer(token))).json() == {"subject": "alice"}
    issuer.revoke(token)
    answer = await http.get("/orders", headers=bearer(token))
    assert (answer.status_code, answer.json()) == (401, {"detail": "The token has been revoked."})


async def test_keys_that_cannot_be_had_are_503() -> None:
    verifier = issuer.verifier(http=httpx2.MockTransport(lambda request: httpx2.Response(500)))
    app = make_app(verifier)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://orders") as http:
        answer = await http.get("/orders", headers=bearer(issuer.token()))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "www-authenticate" not in answer.headers


async def test_swagger_ui_logs_in_against_the_issuer(http: httpx2.AsyncClient) -> None:
    schema = (await http.get("/openapi.json")).json()
    assert schema["components"]["securitySchemes"] == {
        "identity": {
            "type": "oauth2",
            "flows": {
                "password": {
                    "tokenUrl": "https://id.example.com/token",
                    "scopes": {"orders:write": "", "orders:delete": ""},
                }
            },
        }
    }
    assert schema["paths"]["/orders"]["get"]["security"] == [{"identity": []}]
    assert schema["paths"]["/orders"]["post"]["security"] == [{"identity": []}]


async def test_a_realm_cannot_break_out_of_its_quotes() -> None:
    app = make_app(issuer.verifier(), realm='a"b\\c\r\nd')
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://orders") as http:
        assert (await http.get("/orders")).headers["www-authenticate"] == 'Bearer realm="abcd"'


@pytest.fixture
def client() -> TestClient:
    return TestClient(make_app(issuer.verifier()))


def closed(client: TestClient, path: str, **options: Any) -> int:
    with client.websocket_connect(path, **options) as socket, pytest.raises(WebSocketDisconnect) as gone:
        socket.receive_text()
    return gone.value.code


def test_a_socket_takes_the_token_of_the_header(client: TestClient) -> None:
    with client.websocket_connect("/ws", headers=bearer(issuer.token("alice"))) as socket:
        socket.send_text("hello")
        assert socket.receive_text() == "alice: hello"
        assert socket.accepted_subprotocol is None


def test_a_socket_takes_the_token_of_the_subprotocol_and_answers_bearer(client: TestClient) -> None:
    with client.websocket_connect("/ws", subprotocols=["bearer", issuer.token("alice")]) as socket:
        socket.send_text("hello")
        assert socket.receive_text() == "alice: hello"
        assert socket.accepted_subprotocol == "bearer"


def test_a_route_may_answer_a_subprotocol_of_its_own(client: TestClient) -> None:
    token = issuer.token(scope="orders:write")
    with client.websocket_connect("/write", subprotocols=["bearer", token, "mine"]) as socket:
        assert socket.accepted_subprotocol == "mine"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"headers": bearer("nonsense")},
        {"headers": {"Authorization": "Basic YTpi"}},
        {"headers": bearer(issuer.token(expired=True))},
        {"subprotocols": ["bearer"]},
        {"subprotocols": ["bearer", "nonsense"]},
        {"subprotocols": ["chat", issuer.token()]},
        {"headers": bearer(issuer.token()), "subprotocols": ["bearer", issuer.token()]},
    ],
)
def test_a_socket_without_a_good_token_is_closed_with_4401(client: TestClient, options: dict[str, Any]) -> None:
    assert closed(client, "/ws", **options) == 4401


def test_a_socket_does_not_look_at_the_query(client: TestClient) -> None:
    assert closed(client, f"/ws?access_token={issuer.token()}&token={issuer.token()}") == 4401


def test_a_socket_without_the_scope_is_closed_with_4403(client: TestClient) -> None:
    assert closed(client, "/write", headers=bearer(issuer.token())) == 4403


def test_a_socket_asks_for_the_scopes_of_security_too(client: TestClient) -> None:
    assert closed(client, "/write-too", headers=bearer(issuer.token())) == 4403
    assert closed(client, "/write-too", headers=bearer(issuer.token(scope="orders:write"))) == 1000


def test_a_socket_while_keys_cannot_be_had_is_told_to_come_back() -> None:
    verifier = issuer.verifier(http=httpx2.MockTransport(lambda request: httpx2.Response(500)))
    assert closed(TestClient(make_app(verifier)), "/ws", headers=bearer(issuer.token())) == 1013


def test_an_open_socket_is_closed_with_4401_when_its_session_is_revoked(client: TestClient) -> None:
    token = issuer.token("alice", sid="s1")
    with client.websocket_connect("/ws", headers=bearer(token)) as socket:
        socket.send_text("hello")
        assert socket.receive_text() == "alice: hello"
        issuer.revoke(issuer.token(sid="s1"))
        with pytest.raises(WebSocketDisconnect) as gone:
            socket.receive_text()
    assert (gone.value.code, gone.value.reason) == (4401, "revoked")


class Peer:
    """The other end of a socket, at the server's side of the network."""

    def __init__(self, token: str) -> None:
        self.sent: list[str] = []
        self.held_up = asyncio.Event()
        self.held_up.set()
        self.says: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        headers = [(b"authorization", f"Bearer {token}".encode())]
        self.socket = WebSocket({"type": "websocket", "headers": headers}, self.says.get, self.send)
        self.says.put_nowait({"type": "websocket.connect"})

    async def send(self, message: Any) -> None:
        await self.held_up.wait()
        self.sent.append(message["type"])

    def say(self, text: str) -> None:
        self.says.put_nowait({"type": "websocket.receive", "text": text})


async def test_a_revoked_peer_that_does_not_let_itself_be_closed_says_nothing_any_more() -> None:
    """It does not read, so the close never leaves; what it writes would arrive for as long as it likes."""
    auth, token = Bearer(issuer.verifier()), issuer.token()
    peer = Peer(token)
    async for _ in auth.websocket()(peer.socket):
        await peer.socket.accept()
        peer.say("before")
        assert await peer.socket.receive_text() == "before"
        waiting = asyncio.create_task(peer.socket.receive_text())
        await asyncio.sleep(0.01)
        peer.held_up.clear()
        issuer.revoke(token)
        await asyncio.sleep(0.01)
        peer.say("after")
        with pytest.raises(WebSocketDisconnect) as gone:
            await waiting
        assert (gone.value.code, gone.value.reason) == (4401, "revoked")
        assert (await peer.socket.receive())["type"] == "websocket.disconnect"
    assert peer.sent == ["websocket.accept"]


async def test_a_route_that_only_sends_sees_that_the_session_was_revoked() -> None:
    auth, token = Bearer(issuer.verifier()), issuer.token()
    peer = Peer(token)
    async for _ in auth.websocket()(peer.socket):
        await peer.socket.accept()
        await peer.socket.send_text("before")
        issuer.revoke(token)
        await asyncio.sleep(0.01)
        with pytest.raises(WebSocketDisconnect) as gone:
            await peer.socket.send_text("after")
        assert (gone.value.code, gone.value.reason) == (4401, "revoked")
    assert peer.sent == ["websocket.accept", "websocket.send", "websocket.close"]


async def test_a_session_that_is_revoked_before_the_route_accepts_is_closed_with_4401() -> None:
    """Closed any earlier, its owner would only see that it failed, and the route would fail with it."""
    auth, token = Bearer(issuer.verifier()), issuer.token()
    peer = Peer(token)
    async for _ in auth.websocket()(peer.socket):
        issuer.revoke(token)
        await asyncio.sleep(0.01)
        assert peer.sent == []
        await peer.socket.accept()
        assert peer.sent == ["websocket.accept", "websocket.close"]


async def test_a_socket_that_the_route_has_closed_is_left_alone() -> None:
    """The revocation and the end of the route may come in any order."""
    auth, token = Bearer(issuer.verifier()), issuer.token()
    peer = Peer(token)
    async for _ in auth.websocket()(peer.socket):
        await peer.socket.accept()
        await peer.socket.close()
        issuer.revoke(token)
        await asyncio.sleep(0.01)
    assert peer.sent == ["websocket.accept", "websocket.close"]


# Ways to be wrong as the author of a service


def forgotten_call_of_a_route(auth: Bearer, app: FastAPI) -> None:
    @app.get("/x")
    async def x(caller: Annotated[Claims, Depends(auth.require)]) -> None: ...


def forgotten_call_among_dependencies(auth: Bearer, app: FastAPI) -> None:
    app.get("/x", dependencies=[Depends(auth.require)])(lambda: None)


def forgotten_call_of_a_socket(auth: Bearer, app: FastAPI) -> None:
    @app.websocket("/x")
    async def x(socket: WebSocket, caller: Annotated[Claims, Depends(auth.websocket)]) -> None: ...


@pytest.mark.parametrize(
    "forget", [forgotten_call_of_a_route, forgotten_call_among_dependencies, forgotten_call_of_a_socket]
)
def test_a_guard_that_was_not_called_makes_no_route(forget: Callable[[Bearer, FastAPI], None]) -> None:
    """FastAPI would read scope and role from the query, and let everybody in."""
    with pytest.raises(FastAPIError, match="_CallRequireWithParentheses"):
        forget(Bearer(issuer.verifier()), FastAPI())


@pytest.mark.parametrize("address", [None, "", "localhost:8000"])
def test_an_address_that_is_none_is_told_with_one_that_would_be(address: Any) -> None:
    """`os.environ.get` of a variable that nobody set."""
    with pytest.raises(ValueError, match="such as https://"):
        Verifier(address, audience="orders")


def test_an_address_in_the_place_of_a_verifier_is_told() -> None:
    address: Any = "https://id.example.com"
    with pytest.raises(TypeError, match="takes a Verifier"):
        Bearer(address)


@pytest.mark.parametrize("asked", ["orders:read,orders:write", ["orders:read,"]])
def test_scopes_between_commas_are_no_guard(asked: Any) -> None:
    with pytest.raises(ValueError, match="spaces"):
        Bearer(issuer.verifier()).require(scope=asked)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"audience": "billing"},
            "verifier.names_differ: tokens are refused because of their aud, which",
        ),
        ({}, ""),
    ],
)
async def test_what_is_probably_a_wrong_setting_is_said_once(
    caplog: pytest.LogCaptureFixture, options: dict[str, Any], said: str
) -> None:
    app = make_app(issuer.verifier(**options))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="https://orders") as http:
        for _ in range(2):
            for token in (issuer.token(), issuer.token(expired=True), "x"):
                await http.get("/orders", headers={"Authorization": f"Bearer {token}"})
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == bool(said)
    assert "".join(lines).startswith(said)
