"""The outer edge of every request: its id, the host it was meant for, its size, CORS, security headers, one log line.

Pure ASGI: as an HTTP middleware of the framework the same would cost a fifth of a refresh.
"""

import json
import logging
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import TypeAlias
from urllib.parse import unquote

from fastapi import FastAPI, Request, Response
from starlette.types import Message, Receive, Scope, Send

from identity_service import audit
from identity_service.metrics import Metrics
from identity_service.web import problems
from identity_service.web.direct import DirectRoute
from identity_service.web.problems import MEDIA_TYPE, Refusal
from identity_service.web.protocol import write_whole
from identity_service.web.proxies import TrustedProxies

log = logging.getLogger("identity_service.request")

MAX_BODY = 64 * 1024
MAX_DISCARDED = 32 * 1024 * 1024
"""Of a body that is too large, so much is read and thrown away while whoever sends it is told."""
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_HOST = re.compile(r"(?:(?P<name>[A-Za-z0-9._-]+)|\[(?P<address>[0-9A-Fa-f:.]+)\])(?::(?P<port>[0-9]{1,5}))?", re.ASCII)
_CONTROLS = re.compile("[\x00-\x1f\x7f]")
_PROBES = frozenset({"/health", "/livez", "/readyz"})
_ENDLESS = "/status-lists/events"
_COOKIE_PATHS = frozenset({"/login", "/refresh", "/logout"})
_ALLOWED_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE"
# Swagger UI adds X-Requested-With: without it the Authorize button of another service's docs cannot log in here.
_ALLOWED_HEADERS = "Authorization, Content-Type, X-Request-ID, X-Requested-With"
_EXPOSED_HEADERS = "WWW-Authenticate, Retry-After, X-Request-ID"

# The default is a document that loads and does nothing; pages of HTML bring their own policy.
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, slots=True)
class EdgePolicy:
    """What the edge lets through.

    Args:
        cookie: name of the one cookie that any route reads; it is found at `scope["identity.cookie"]`.
        hosts: names that a request may be addressed to, without ports; `*` for any.
        origins: origins whose pages may read our answers.
        strict_transport: whether the service is only reached over https.
        proxies: who may say for whom they ask; the address of the client is found at `scope["identity.address"]`.
    """

    cookie: str
    hosts: frozenset[str]
    origins: frozenset[str]
    strict_transport: bool
    proxies: TrustedProxies


RawHeader: TypeAlias = tuple[bytes, bytes]


class Edge:
    """Wraps the application. Answers by itself what never needs to reach a route."""

    def __init__(
        self, app: FastAPI, policy: EdgePolicy, metrics: Metrics, direct: Mapping[tuple[str, str], DirectRoute]
    ) -> None:
        self._framework = app
        self._app = app.build_middleware_stack()
        self._metrics = metrics
        self._policy = policy
        self._direct = direct
        self._at_once = {(method, path.encode()): route for (method, path), route in direct.items() if route.at_once}
        self._cookie = policy.cookie.encode()
        # Unique, not secret: a random prefix of this process, and a counter.
        self._ids, self._counter = secrets.token_hex(4), count()
        self._any_host = "*" in policy.hosts
        # Nearly every request names the same host.
        self._is_served = lru_cache(maxsize=64)(self._serves)
        self._lines = lru_cache(maxsize=64)(self._lines_of)
        own = dict(SECURITY_HEADERS)
        if policy.strict_transport:
            own["Strict-Transport-Security"] = "max-age=31536000; includeSubDomains"
        self._headers = [(name.lower().encode(), value.encode()) for name, value in own.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self._framework
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        scope = self._opened(scope)
        answer = _Answer(self, scope, send)
        listening = audit.listener.set(self._metrics.recorded)
        try:
            await self._answer(scope, receive, answer)
        except Exception:
            log.exception("request.failed", extra={"request_id": scope["identity.request_id"], "path": scope["path"]})
            if not answer.begun:
                await _send_problem(answer.send, *problems.FAILED, scope["identity.request_id"])
        finally:
            audit.listener.reset(listening)
            self._closed(scope, answer.status, time.perf_counter() - started)
        if "identity.unread" in scope:
            await _discard(scope["identity.unread"])
            await answer.send({"type": "http.response.body", "body": b"", "more_body": False})

    def answer_at_once(self, scope: Scope, send: Send) -> bool:
        """Answer a request for a document that is at hand; anything unusual about it takes the ordinary way."""
        route = self._at_once.get((scope["method"], scope["raw_path"]))
        if route is None or self._is_draining():
            return False
        started = time.perf_counter()
        scope["app"] = self._framework
        scope = self._opened(scope)
        headers = scope["identity.headers"]
        if b"content-length" in headers or b"transfer-encoding" in headers or not self._is_for_us(scope, headers):
            return False
        scope["route"] = route
        try:
            response = route.endpoint(Request(scope))
            if not self.write(response, scope, send):
                return False
        except Exception:  # noqa: BLE001 - it fails again on the ordinary way, where that is seen to
            return False
        self._closed(scope, response.status_code, time.perf_counter() - started)
        return True

    def answer_nonsense(
        self, detail: str, client: tuple[str, int] | None, target: bytes | None
    ) -> tuple[int, bytes, bytes]:
        """Return status, head (without `connection`) and body of the answer to what is no request that can be read.

        Args:
            client: address and port of whoever sent it.
            target: what was asked for with a method that nobody knows, if that is what is wrong.
        """
        request_id, status, code, own = self._next_id(), 400, "bad_request", b""
        if target is not None:
            path = unquote(target.partition(b"?")[0].decode())
            allowed = problems.allowed(self._framework, {"type": "http", "path": path, "method": ""})
            status, code, detail = problems.WRONG_METHOD if allowed else problems.NOT_FOUND
            own = b"allow: %b\r\n" % allowed.encode() if allowed else b""
        body = json.dumps(problems.document(status, code, detail, request_id)).encode()
        own += b"content-length: %d\r\nx-request-id: %b\r\n" % (len(body), request_id.encode())
        facts = {"request_id": request_id, "status": status, "client": client and client[0]}
        log.info("request", extra=facts | {"error": code, "detail": detail})
        return status, self._lines(_PROBLEM, None) + own, body

    def _next_id(self) -> str:
        return f"{self._ids}{next(self._counter):08x}"

    def _opened(self, scope: Scope) -> Scope:
        """Return the scope with what everything inside asks for."""
        headers = dict(reversed(scope["headers"]))  # of several with one name, the first
        given_id = headers.get(b"x-request-id")
        method = scope["method"]
        scope = {
            **scope,
            # Routes answer GET; HEAD is the same without the body (RFC 9110 9.3.2).
            "method": "GET" if method == "HEAD" else method,
            "identity.method": method,
            "identity.request_id": (
                given_id.decode() if given_id is not None and _REQUEST_ID.fullmatch(given_id) else self._next_id()
            ),
            "identity.headers": headers,
            "identity.address": self._policy.proxies.client_of(scope),
        }
        return {**scope, **self._cookies_of(scope)} if b"cookie" in headers else scope

    def _closed(self, scope: Scope, status: int, seconds: float) -> None:
        self._count(scope, status, seconds)
        self._log(scope, status, seconds)

    async def _answer(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        """Refuse what must not reach a route, answer preflights, and pass everything else on."""
        headers = scope["identity.headers"]
        if refusal := self._refuse(scope, headers):
            await _turn_away(scope, answer.send, refusal, receive)
        elif scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            await self._preflight(scope, receive, answer.send, headers.get(b"origin", b"").decode("latin-1"))
        else:
            body, is_too_large = await _whole_body(headers, receive)
            if is_too_large:
                await _turn_away(scope, answer.send, _TOO_LARGE, body)
            elif (route := self._direct.get((scope["method"], scope["path"]))) is None:
                await self._app(scope, body, answer.send)
            else:
                scope["route"] = route
                response = await route.respond(Request(scope, body))
                if not answer.write(response):
                    await response(scope, body, answer.send)

    def _refuse(self, scope: Scope, headers: Mapping[bytes, bytes]) -> Refusal | None:
        path = scope["path"]
        if _CONTROLS.search(path) or b"%2f" in scope.get("raw_path", b"").lower():
            # A route's pattern would take a line break at the end of a path for its end, and a slash that was encoded
            # into an id for one that begins another route.
            return problems.NOT_FOUND
        if path not in _PROBES and not self._is_for_us(scope, headers):
            return 400, "unknown_host", "This host name is not served here; see IDENTITY_ALLOWED_HOSTS."
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return 400, "bad_request", "Content-Length is not a number."
        if len(length) > 9 or int(length) > MAX_BODY:
            return _TOO_LARGE
        return None

    def _is_for_us(self, scope: Scope, headers: Mapping[bytes, bytes]) -> bool:
        if self._any_host:
            return True
        host = headers.get(b"host")
        repeated = len(headers) < len(scope["headers"])
        if host is None or (repeated and sum(name == b"host" for name, _ in scope["headers"]) > 1):
            return False
        return self._is_served(host)

    def _serves(self, host: bytes) -> bool:
        return _host_name(host.decode("latin-1")) in self._policy.hosts

    def _cookies_of(self, scope: Scope) -> Scope:
        """Return what the scope becomes: our cookie read, and the header taken away.

        The framework would parse it for every route, with a parser whose time grows with the square of its length.
        """
        given = [value for name, value in scope["headers"] if name == b"cookie"]
        pairs = (pair.strip().partition(b"=") for value in given for pair in value.split(b";"))
        found = [value for name, _, value in pairs if name == self._cookie]
        cookie = found[0].decode("latin-1") if len(found) == 1 else ""
        return {"headers": [pair for pair in scope["headers"] if pair[0] != b"cookie"], "identity.cookie": cookie}

    async def _preflight(self, scope: Scope, receive: Receive, send: Send, origin: str) -> None:
        if origin not in self._policy.origins:
            await _turn_away(scope, send, problems.FOREIGN, receive)
            return
        headers = {
            "Access-Control-Allow-Methods": _ALLOWED_METHODS,
            "Access-Control-Allow-Headers": _ALLOWED_HEADERS,
            "Access-Control-Max-Age": "600",
        }
        await _start(send, 204, headers)
        await send({"type": "http.response.body", "body": b""})

    def _origin_of(self, scope: Scope) -> bytes | None:
        """Return the origin whose pages may read the answer, if one of those asks."""
        origin: bytes | None = scope["identity.headers"].get(b"origin")
        return origin if origin is not None and origin.decode("latin-1") in self._policy.origins else None

    def finished(self, headers: Iterable[RawHeader], scope: Scope) -> list[RawHeader]:
        """Return an answer's headers with what every answer carries. Their names come in lower case (ASGI)."""
        origin = self._origin_of(scope)
        finished = self._completed(headers, origin)
        finished.append((b"x-request-id", scope["identity.request_id"].encode()))
        if origin is not None and scope["path"] in _COOKIE_PATHS:
            finished.append((b"access-control-allow-credentials", b"true"))
        if self._is_draining():  # or the next request on this connection would meet its end
            finished.append((b"connection", b"close"))
        return finished

    def _is_draining(self) -> bool:
        draining: bool = self._framework.state.draining
        return draining

    def write(self, response: Response, scope: Scope, send: Send) -> bool:
        """Write a whole answer with the same headers, if the server takes one; see `protocol.write_whole`."""
        given = tuple(pair for pair in response.raw_headers if pair[0] != b"content-length")
        if len(given) == len(response.raw_headers) or scope["path"] in _COOKIE_PATHS or self._is_draining():
            return False  # it does not say how long it is, or has headers that the lines kept here do not have
        own = b"content-length: %d\r\nx-request-id: %b\r\n"
        own %= len(response.body), scope["identity.request_id"].encode()
        head = self._lines(given, self._origin_of(scope)) + own
        return write_whole(send, response.status_code, head, bytes(response.body))

    def _lines_of(self, headers: tuple[RawHeader, ...], origin: bytes | None) -> bytes:
        finished = self._completed(headers, origin)
        if any(_CONTROLS.search(text.decode("latin-1")) for pair in finished for text in pair):
            raise ValueError("a header with control characters")
        return b"".join(b"%b: %b\r\n" % pair for pair in finished)

    def _completed(self, headers: Iterable[RawHeader], origin: bytes | None) -> list[RawHeader]:
        finished = list(headers)
        given = dict(finished)
        finished += [pair for pair in self._headers if pair[0] not in given]
        if given.get(b"cache-control", b"no-store") == b"no-store" and b"pragma" not in given:
            finished.append((b"pragma", b"no-cache"))
        if b"access-control-allow-origin" in given:  # public documents answer everyone
            return finished
        finished.append((b"vary", b"Origin"))
        if origin is not None:
            finished.append((b"access-control-allow-origin", origin))
            finished.append((b"access-control-expose-headers", _EXPOSED_HEADERS.encode()))
        return finished

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope["route"].path if "route" in scope else "none"
        if route != _ENDLESS:
            self._metrics.answered(scope["identity.method"], route, status, seconds)
        if "identity.error" in scope:
            self._metrics.refused(scope["identity.error"])

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        level = logging.ERROR if status >= 500 else logging.INFO
        if scope["path"] in _PROBES:  # they come every few seconds, and say what is wrong by themselves
            level = logging.DEBUG
        if not log.isEnabledFor(level):
            return
        facts = {
            "request_id": scope["identity.request_id"],
            "method": scope["identity.method"],
            "path": scope["path"],
            "status": status,
            "duration_ms": round(seconds * 1000, 2),
            "client": scope["identity.address"],
        }
        if "identity.error" in scope:
            facts |= {"error": scope["identity.error"], "detail": scope["identity.detail"]}
        log.log(level, "request", extra=facts)


class _Answer:
    """An answer on its way out: what every answer carries is added, and a HEAD loses the body."""

    __slots__ = ("_edge", "_ended", "_scope", "_send", "begun", "status")

    def __init__(self, edge: Edge, scope: Scope, send: Send) -> None:
        self._edge = edge
        self._scope = scope
        self._send = send
        self._ended = False
        self.begun = False
        self.status = 500

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.begun = message["status"], True
            message["headers"] = self._edge.finished(message["headers"], self._scope)
        elif self._scope["identity.method"] == "HEAD":
            if self._ended:
                return
            message, self._ended = {"type": "http.response.body", "body": b""}, True
        await self._send(message)

    def write(self, response: Response) -> bool:
        """Write a whole answer, if that can be done."""
        if self._scope["identity.method"] == "HEAD" or not self._edge.write(response, self._scope, self._send):
            return False
        self.status, self.begun = response.status_code, True
        return True


_PROBLEM = ((b"content-type", MEDIA_TYPE.encode()),)
_TOO_LARGE = (413, "body_too_large", f"The body must have at most {MAX_BODY} bytes.")


async def _whole_body(headers: Mapping[bytes, bytes], receive: Receive) -> tuple[Receive, bool]:
    """Return a `receive` with a body of bounded size; or one with what is left of a body that is too large, and True.

    A body with a length was checked by its header; one without is read here, since nobody knows its end.
    """
    if b"transfer-encoding" not in headers:
        return receive, False
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":  # gone: half a body is none
            return _already(message, receive), False
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            return _already({"type": "http.request", "body": b"", "more_body": more}, receive), True
    return _already({"type": "http.request", "body": bytes(body), "more_body": False}, receive), False


def _already(message: Message, receive: Receive) -> Receive:
    pending = [message]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


async def _turn_away(scope: Scope, send: Send, refusal: Refusal, receive: Receive) -> None:
    """Refuse a request that no route sees, and leave the reason for its line in the log."""
    _, scope["identity.error"], scope["identity.detail"] = refusal
    if refusal is _TOO_LARGE:
        scope["identity.unread"] = receive
    await _send_problem(send, *refusal, scope["identity.request_id"], more=refusal is _TOO_LARGE)


async def _discard(receive: Receive) -> None:
    """Throw away what is left of a body that has been refused.

    A connection that is closed while more arrives is reset, and the answer lost on its way (RFC 9112 9.6).
    """
    left = MAX_DISCARDED
    while left > 0 and (message := await receive()).get("more_body", False):
        left -= len(message["body"])


async def _send_problem(
    send: Send, status: int, code: str, detail: str, request_id: str, *, more: bool = False
) -> None:
    body = json.dumps(problems.document(status, code, detail, request_id)).encode()
    headers = {"Content-Type": MEDIA_TYPE, "Content-Length": str(len(body))}
    if status == 413:
        headers["Connection"] = "close"
    await _start(send, status, headers)
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _start(send: Send, status: int, headers: Mapping[str, str]) -> None:
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


def _host_name(value: str) -> str:
    """Return the name of a Host header (RFC 9110 7.2) in lower case, nothing for what is none."""
    match = _HOST.fullmatch(value)
    if match is None or int(match["port"] or 0) > 65535:
        return ""
    return (match["name"] or match["address"]).lower()
