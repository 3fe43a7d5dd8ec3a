"""The chat: two people talk over real WebSockets, and whose session ends is disconnected."""

import json
import time
from contextlib import ExitStack, suppress

import httpx2
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from tests.examples.conftest import Beside, StartExample


@pytest.fixture(scope="module")
def chat(start_example: StartExample) -> Beside:
    chat = start_example("chat")
    for username in ("alice", "bob"):
        chat.sign_up(username)
    return chat


def join(chat: Beside, token: str) -> ClientConnection:
    """Open a socket as a browser does."""
    offered = [Subprotocol("bearer"), Subprotocol(token)]
    return connect(f"ws{chat.url.removeprefix('http')}/ws", subprotocols=offered, open_timeout=10)


def closed_with(socket: ClientConnection, within: float) -> int:
    """Return the code with which the other side closed the socket."""
    with pytest.raises(ConnectionClosed) as closed:
        socket.recv(timeout=within)
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code


def test_two_people_talk_and_a_logout_disconnects_one_of_them(chat):
    alice, bob = chat.log_in("alice"), chat.log_in("bob")
    with join(chat, alice["access_token"]) as hers, join(chat, bob["access_token"]) as his:
        assert hers.subprotocol == "bearer"
        heard = []
        for speaker, text in ((hers, "Hello <b>Bob</b>"), (his, "Hello Alice")):
            speaker.send(text)
            lines = [json.loads(socket.recv(timeout=5)) for socket in (hers, his)]
            assert lines[0] == lines[1]
            assert lines[0]["text"] == text
            heard.append(lines[0]["from"])
        assert len(set(heard)) == 2
        chat.log_out(bob)
        assert closed_with(his, within=10) == 4401
        hers.send("Still here")
        assert json.loads(hers.recv(timeout=5)) == {"from": heard[0], "text": "Still here"}


def test_who_speaks_is_what_the_token_says(chat):
    with join(chat, chat.log_in("alice")["access_token"]) as hers:
        hers.send('{"from": "somebody else", "text": "Hello"}')
        line = json.loads(hers.recv(timeout=5))
        assert line["from"] != "somebody else"
        assert line["text"] == '{"from": "somebody else", "text": "Hello"}'


def test_bytes_and_blanks_are_no_lines_and_long_ones_are_cut(chat):
    with join(chat, chat.log_in("alice")["access_token"]) as hers:
        for nothing in (b"bytes", "", "   "):
            hers.send(nothing)
        hers.send("x" * 501)
        assert json.loads(hers.recv(timeout=5))["text"] == "x" * 500


@pytest.mark.parametrize("kind", ["none", "garbage", "refresh", "revoked"])
def test_a_bad_token_is_closed_with_4401(chat, kind):
    tokens = chat.log_in("bob")
    token = {"none": "x", "garbage": "a.b.c", "refresh": tokens["refresh_token"], "revoked": tokens["access_token"]}
    if kind == "revoked":
        with join(chat, tokens["access_token"]) as his:
            chat.log_out(tokens)
            assert closed_with(his, within=10) == 4401
    with join(chat, token[kind]) as socket:
        assert closed_with(socket, within=5) == 4401


def test_one_account_does_not_take_every_place(chat):
    alice, bob = (chat.log_in(username)["access_token"] for username in ("alice", "bob"))
    with ExitStack() as sockets:
        for _ in range(5):
            sockets.enter_context(join(chat, alice))
        with join(chat, alice) as sixth:
            assert closed_with(sixth, within=5) == 1013
        with join(chat, bob) as his:
            his.send("There is room for me")
            assert json.loads(his.recv(timeout=5))["text"] == "There is room for me"


def test_a_flood_of_lines_reaches_nobody(chat):
    alice, bob = (chat.log_in(username)["access_token"] for username in ("alice", "bob"))
    with join(chat, alice) as hers, join(chat, bob) as his:
        for number in range(200):
            hers.send(f"line {number}")
        time.sleep(1)
        heard: list[str] = []
        while not heard or heard[-1] != "slowly":
            hers.send("slowly")  # again and again: the flood may still be on its way
            with suppress(TimeoutError):
                heard.append(json.loads(his.recv(timeout=1))["text"])
        assert heard[:5] == [f"line {number}" for number in range(5)]
        assert len(heard) <= 5 * 2 + 1  # a slow machine takes more than a second for the flood


def test_a_token_in_the_query_string_is_not_looked_at(chat):
    token = chat.log_in("alice")["access_token"]
    with connect(f"ws{chat.url.removeprefix('http')}/ws?token={token}&access_token={token}") as socket:
        assert closed_with(socket, within=5) == 4401


def test_the_page_runs_its_own_script_and_nothing_else(chat):
    page, script = (httpx2.get(chat.url + path, timeout=10) for path in ("/", "/chat.js"))
    issuer = chat.service.environment["IDENTITY_ISSUER_URL"]
    policy = dict(part.split(maxsplit=1) for part in page.headers["content-security-policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "connect-src": f"'self' {issuer}",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert f'data-issuer="{issuer}"' in page.text
    assert script.headers["content-type"].startswith("text/javascript")
    assert not any(way in script.text for way in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval"))


@pytest.mark.parametrize("path", ["/users", "/login", "/logout"])
def test_the_issuer_lets_the_page_ask(chat, path):
    asked = {
        "Origin": chat.service.environment["IDENTITY_ALLOWED_ORIGINS"],
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    answer = httpx2.options(chat.service.url + path, headers=asked, timeout=10)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (204, asked["Origin"])
