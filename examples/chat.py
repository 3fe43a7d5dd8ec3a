"""A chat: register, log in, talk over a WebSocket, and be disconnected by a logout, wherever it happens.

    uvicorn examples.chat:app --port 8002 --ws-max-size 16384

`make example-chat` starts it beside an identity service. The page talks to the issuer from the browser, so the issuer's
IDENTITY_ALLOWED_ORIGINS must have the origin of this page. The room is in this process.
"""

import asyncio
import os
import time
from collections import deque
from contextlib import suppress
from html import escape
from typing import Annotated

from fastapi import Depends, FastAPI, Response, WebSocket, WebSocketDisconnect

from identity_service.verifier import Claims, Verifier
from identity_service.verifier.fastapi import UNAVAILABLE, Bearer

ISSUER = os.environ.get("IDENTITY_ISSUER_URL", "http://localhost:8000")
MOST_SOCKETS = 100
MOST_SOCKETS_EACH = 5
MOST_LINES_A_SECOND = 5
MOST_UNREAD = 100
LONGEST_LINE = 500

Line = dict[str, str]

auth = Bearer(Verifier(ISSUER, audience="api"))
app = FastAPI(title="Chat")
room: dict[asyncio.Queue[Line], str] = {}  # whose inbox it is


@app.websocket("/ws")
async def talk(socket: WebSocket, caller: Annotated[Claims, Depends(auth.websocket())]) -> None:
    """Hear every line and say some. The guard closes the socket with 4401 when the caller's session ends."""
    await socket.accept()
    if len(room) >= MOST_SOCKETS or list(room.values()).count(caller.subject) >= MOST_SOCKETS_EACH:
        await socket.close(UNAVAILABLE, "full")
        return
    inbox: asyncio.Queue[Line] = asyncio.Queue(MOST_UNREAD)
    room[inbox] = caller.subject
    said: deque[float] = deque(maxlen=MOST_LINES_A_SECOND)
    delivering = asyncio.create_task(deliver(inbox, socket))
    try:
        while (message := await socket.receive())["type"] == "websocket.receive":
            text = (message.get("text") or "").strip()[:LONGEST_LINE]
            if text and (len(said) < MOST_LINES_A_SECOND or time.monotonic() - said[0] >= 1):
                said.append(time.monotonic())  # more lines than that are lost: nobody floods the room
                say(caller, text)
    finally:
        del room[inbox]
        delivering.cancel()


def say(caller: Claims, text: str) -> None:
    """Tell everyone. Who speaks is what the token says, never what the message says."""
    for inbox in room:
        with suppress(asyncio.QueueFull):  # whoever does not keep up misses lines and holds nobody up
            inbox.put_nowait({"from": caller.subject, "text": text})


async def deliver(inbox: asyncio.Queue[Line], socket: WebSocket) -> None:
    with suppress(RuntimeError, WebSocketDisconnect):  # it was closed in the meantime
        while True:
            await socket.send_json(await inbox.get())


@app.get("/")
async def page() -> Response:
    """The page may run its own script, and talk to this service and to the issuer; nothing else."""
    policy = f"default-src 'none'; script-src 'self'; connect-src 'self' {ISSUER}; base-uri 'none'; form-action 'none'"
    headers = {"Content-Security-Policy": f"{policy}; frame-ancestors 'none'", "Referrer-Policy": "no-referrer"}
    return Response(PAGE.replace("{issuer}", escape(ISSUER)), headers=headers, media_type="text/html")


@app.get("/chat.js")
async def script() -> Response:
    return Response(SCRIPT, headers={"X-Content-Type-Options": "nosniff"}, media_type="text/javascript")


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Chat</title>
<body data-issuer="{issuer}">
<form id="account">
  <input id="username" placeholder="Username" autocomplete="username" required>
  <input id="password" placeholder="Password" type="password" autocomplete="current-password" required>
  <button>Log in</button> <button type="button" id="register">Register</button>
  <button type="button" id="logout">Log out</button>
</form>
<form id="chat"><input id="text" placeholder="Say something" maxlength="500"> <button>Send</button></form>
<ul id="lines"></ul>
<script src="/chat.js"></script>
</body>
</html>
"""

SCRIPT = """
const issuer = document.body.dataset.issuer;
const at = (id) => document.getElementById(id);
let socket = null;

// Always as text: what people write must never become part of the page.
function show(text) {
  const line = document.createElement("li");
  line.textContent = text;
  at("lines").append(line);
}

async function post(path, body = {}, credentials = "include") {
  const headers = {"Content-Type": "application/json"};
  const answer = await fetch(issuer + path, {method: "POST", credentials, headers, body: JSON.stringify(body)});
  if (!answer.ok) throw new Error((await answer.json()).detail);
  return answer.status === 204 ? null : answer.json();
}

const account = () => ({username: at("username").value, password: at("password").value});
const complain = (error) => show(error.message);

async function login() {
  const {access_token: token} = await post("/login", account());
  socket?.close();
  const mine = socket = new WebSocket(location.origin.replace(/^http/, "ws") + "/ws", ["bearer", token]);
  mine.onopen = () => show("You are in.");
  mine.onmessage = (event) => {
    const line = JSON.parse(event.data);
    show(line.from.slice(-4) + ": " + line.text);  // a token names people by id only
  };
  mine.onclose = (event) => show(event.code === 4401 ? "You are logged out." : "The connection is closed.");
}

at("account").onsubmit = (event) => { event.preventDefault(); login().catch(complain); };
at("register").onclick = () => post("/users", account(), "omit").then(login).catch(complain);
at("logout").onclick = () => post("/logout").catch(complain);
at("chat").onsubmit = (event) => {
  event.preventDefault();
  if (socket?.readyState === WebSocket.OPEN) socket.send(at("text").value);
  at("text").value = "";
};
"""
