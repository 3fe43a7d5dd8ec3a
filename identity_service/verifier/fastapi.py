"""The verifier as a dependency of FastAPI applications, with the answers of RFC 6750.

    auth = Bearer(Verifier("https://id.example.com", audience="orders"))

    @app.get("/orders")
    async def orders(caller: Annotated[Claims, Depends(auth)]): ...
    @app.post("/orders")
    async def create(caller: Annotated[Claims, Depends(auth.require(scope="orders:write"))]): ...
    @app.get("/catalogue")
    async def catalogue(caller: Annotated[Claims | None, Depends(auth.optional)]): ...
    @app.websocket("/ws")
    async def chat(socket: WebSocket, caller: Annotated[Claims, Depends(auth.websocket())]): ...

Browsers cannot set headers on a WebSocket. They present the token as a subprotocol after the word `bearer`:

    new WebSocket("wss://orders.example.com/ws", ["bearer", token])

`await socket.accept()` then answers `bearer` by itself. A token in a query string is never looked at: it would be in
every log on the way.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress

from fastapi import HTTPException, Request, WebSocket, WebSocketDisconnect, WebSocketException
from fastapi.openapi.models import OAuth2, OAuthFlowPassword, OAuthFlows
from fastapi.security import SecurityScopes
from fastapi.security.base import SecurityBase
from starlette.datastructures import Headers
from starlette.types import Message
from starlette.websockets import WebSocketState

from identity_service.verifier.claims import Claims
from identity_service.verifier.rejection import TokenRejected
from identity_service.verifier.verification import Verifier

log = logging.getLogger("identity_service.verifier")

UNAUTHENTICATED = 4401
FORBIDDEN = 4403
UNAVAILABLE = 1013
"""Close codes of a WebSocket: those of HTTP plus 4000, and *try again later* (RFC 6455's registry)."""
_LONGEST_REASON = 100  # characters, of the 123 octets that RFC 6455 5.5 leaves
SUBPROTOCOL = "bearer"
RETRY_AFTER = "5"
_LIKELY_OURS = frozenset({"wrong_issuer", "wrong_audience"})

_DESCRIPTIONS = {
    "malformed": "The token is malformed",
    "wrong_type": "This is not an access token",
    "wrong_algorithm": "The token is signed with another algorithm",
    "unknown_key": "The token is signed with an unknown key",
    "bad_signature": "The signature does not match",
    "wrong_issuer": "The token is from another issuer",
    "wrong_audience": "The token is for another audience",
    "expired": "The token has expired",
    "not_yet_valid": "The token is not valid yet",
    "missing_claim": "The token lacks a claim",
    "revoked": "The token has been revoked",
}


_NO_SCOPES = SecurityScopes()


class _CallRequireWithParentheses:
    """No type that FastAPI can read: `Depends(auth.require)`, where the call was forgotten, would let everybody in.

    Its name is in the error that FastAPI raises.
    """


Asked = str | Iterable[str] | _CallRequireWithParentheses
"""Scopes or roles: one, several in one string between spaces, or several strings."""


class _Scheme(SecurityBase):
    """What OpenAPI shows of all guards of one verifier: Swagger UI logs in against the issuer."""

    model: OAuth2

    def __init__(self, model: OAuth2, scheme_name: str) -> None:
        self.model = model
        self.scheme_name = scheme_name


class Guard(_Scheme):
    """A dependency that lets in callers with a valid token that has these scopes and roles."""

    def __init__(self, bearer: "Bearer", scopes: tuple[str, ...], roles: tuple[str, ...]) -> None:
        super().__init__(bearer.model, bearer.scheme_name)
        self._bearer = bearer
        self._scopes = scopes
        self._roles = roles

    async def __call__(self, request: Request, asked: SecurityScopes = _NO_SCOPES) -> Claims:
        claims = await self._bearer(request, asked)
        self._bearer.refuse_without(claims, self._scopes, self._roles)
        return claims


class Optional(_Scheme):
    """A dependency that gives None to callers without credentials. A token that is there still has to be good."""

    def __init__(self, bearer: "Bearer") -> None:
        super().__init__(bearer.model, bearer.scheme_name)
        self._bearer = bearer

    async def __call__(self, request: Request, asked: SecurityScopes = _NO_SCOPES) -> Claims | None:
        if "authorization" not in request.headers and not asked.scopes:
            return None
        return await self._bearer(request, asked)


class Bearer(_Scheme):
    """Lets in callers with a valid token, whatever they may do. Use it with `Depends`; see the module's text.

    Args:
        verifier: verifies the tokens.
        realm: what challenges call this service; its audience when left out.
        scheme_name: what OpenAPI calls the scheme.
    """

    def __init__(self, verifier: Verifier, *, realm: str | None = None, scheme_name: str = "identity") -> None:
        if not hasattr(verifier, "issuer"):
            raise TypeError(f"Bearer takes a Verifier, not {verifier!r}")
        flow = OAuthFlowPassword(tokenUrl=f"{verifier.issuer.rstrip('/')}/token", scopes={})
        super().__init__(OAuth2(flows=OAuthFlows(password=flow)), scheme_name)
        self.verifier = verifier
        self._realm = realm if realm is not None else verifier.audience[0]
        self._told: set[str] = set()
        self._shown_scopes = flow.scopes

    @property
    def optional(self) -> Optional:
        """A dependency for routes that also answer strangers: `Claims | None`."""
        return Optional(self)

    def require(self, *, scope: Asked = (), role: Asked = ()) -> Guard:
        """Return a dependency that asks for scopes and roles: for all of them, when there are several."""
        scopes = _several(scope)
        self._show(scopes)
        return Guard(self, scopes, _several(role))

    def websocket(self, *, scope: Asked = (), role: Asked = ()) -> Callable[..., AsyncIterator[Claims]]:
        """Return a dependency for WebSocket routes.

        The socket is closed with 4401 when the token is missing or bad, with 4403 when it lacks a scope or role, and
        with 4401 when the session is revoked while the socket is open: the route then sees `WebSocketDisconnect`.
        The scopes of `Security(auth.websocket(), scopes=[...])` are asked for too.
        """
        scopes, roles = _several(scope), _several(role)

        async def guard(socket: WebSocket, asked: SecurityScopes = _NO_SCOPES) -> AsyncIterator[Claims]:
            unverified_token, subprotocol = _token_of_socket(socket.headers)
            over = asyncio.Event()
            _end_with(socket, over, subprotocol)
            try:
                claims = await self.verifier.verify(unverified_token)
            except TokenRejected as error:
                self._tell(error)
                unavailable = error.reason == "keys_unavailable"
                await _turn_away(socket, UNAVAILABLE if unavailable else UNAUTHENTICATED, error.reason)
            if missing := _missing(claims, (*scopes, *asked.scopes), roles):
                await _turn_away(socket, FORBIDDEN, missing)
            watch = asyncio.create_task(self._close_when_revoked(socket, claims, over))
            try:
                yield claims
            finally:
                watch.cancel()

        return guard

    async def __call__(self, request: Request, asked: SecurityScopes = _NO_SCOPES) -> Claims:
        """Return the claims of whoever asks.

        Args:
            asked: the scopes of FastAPI's own `Security(auth, scopes=[...])`: whoever writes that means it.
        """
        unverified_token = self._token_of(request.scope["headers"])
        try:
            claims = await self.verifier.verify(unverified_token)
        except TokenRejected as error:
            self._tell(error)
            if error.reason == "keys_unavailable":
                raise HTTPException(
                    503, "Tokens cannot be verified at the moment.", {"Retry-After": RETRY_AFTER}
                ) from None
            raise self.refusal(401, "invalid_token", _DESCRIPTIONS[error.reason]) from None
        if asked.scopes:
            self.refuse_without(claims, tuple(asked.scopes))
        return claims

    def refuse_without(self, claims: Claims, scopes: tuple[str, ...], roles: tuple[str, ...] = ()) -> None:
        """Refuse a caller who lacks one of these.

        Raises:
            HTTPException: 403.
        """
        if missing := _missing(claims, scopes, roles):
            scope = {"scope": " ".join(scopes)} if scopes else {}
            raise self.refusal(403, "insufficient_scope", missing, **scope)

    def refusal(self, status: int, error: str, description: str, **more: str) -> HTTPException:
        """Make the answer of RFC 6750 3 for a request whose credentials do not do."""
        parts = {"realm": self._realm, "error": error, "error_description": description} | more
        return _challenge(status, f"{description}.", parts)

    def _token_of(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Return the token of the Authorization header. Nothing else is looked at (RFC 6750 2.1)."""
        values = [value for name, value in headers if name == b"authorization"]
        if len(values) > 1:
            raise self.refusal(400, "invalid_request", "More than one Authorization header")
        scheme, _, token = (values[0].decode("latin-1") if values else "").partition(" ")
        token = token.strip(" ")
        if scheme.lower() != "bearer" or not token:
            raise _challenge(401, "An access token is needed.", {"realm": self._realm})
        return token

    async def _close_when_revoked(self, socket: WebSocket, claims: Claims, over: asyncio.Event) -> None:
        await self.verifier.wait_revoked(claims)
        over.set()
        if socket.application_state is WebSocketState.CONNECTED:
            await _close_revoked(socket)

    def _tell(self, error: TokenRejected) -> None:
        """Log, once for each, what is more likely our configuration than the caller's fault: the signature held."""
        if error.reason in _LIKELY_OURS and error.reason not in self._told:
            self._told.add(error.reason)
            log.warning("verifier.names_differ: tokens are refused because of their %s", error.detail)

    def _show(self, scopes: tuple[str, ...]) -> None:
        for scope in scopes:
            self._shown_scopes.setdefault(scope, "")


def _several(value: Asked) -> tuple[str, ...]:
    assert not isinstance(value, _CallRequireWithParentheses)
    names = tuple(value.split()) if isinstance(value, str) else tuple(value)
    if any("," in name for name in names):
        raise ValueError(f"several are separated by spaces: {value!r}")
    return names


def _missing(claims: Claims, scopes: tuple[str, ...], roles: tuple[str, ...]) -> str:
    """Return what to tell a caller who may not, or nothing."""
    if not set(scopes).issubset(claims.scopes):
        return "The token lacks a scope"
    missing = [role for role in roles if role not in claims.roles]
    return f"The caller lacks the role {' '.join(missing)}" if missing else ""


def _challenge(status: int, detail: str, parts: dict[str, str]) -> HTTPException:
    shown = ", ".join(f'{name}="{_quotable(value)}"' for name, value in parts.items())
    return HTTPException(status, detail, {"WWW-Authenticate": f"Bearer {shown}"})


def _quotable(value: str) -> str:
    return "".join(character for character in value if " " <= character <= "~" and character not in '"\\')


def _token_of_socket(headers: Headers) -> tuple[str, str | None]:
    """Return the token, and the subprotocol to answer; the token is empty when there is not exactly one."""
    offered = [name.strip() for value in headers.getlist("sec-websocket-protocol") for name in value.split(",")]
    subprotocol = SUBPROTOCOL if SUBPROTOCOL in offered else None
    found = [value.partition(" ")[2].strip(" ") for value in headers.getlist("authorization") if _is_bearer(value)]
    if subprotocol is not None:
        found += offered[offered.index(SUBPROTOCOL) + 1 :][:1]
    return (found[0] if len(found) == 1 else ""), subprotocol


def _is_bearer(value: str) -> bool:
    return value.partition(" ")[0].lower() == "bearer"


def _end_with(socket: WebSocket, over: asyncio.Event, default: str | None) -> None:
    """Have nothing more arrive on the socket once it is over, whatever its owner does about being closed.

    Args:
        default: the subprotocol that `accept` answers when the route names none; without one, browsers give up.
    """
    accept, receive, send = socket.accept, socket.receive, socket.send

    async def accept_and_look(
        subprotocol: str | None = None, headers: Iterable[tuple[bytes, bytes]] | None = None
    ) -> None:
        await accept(subprotocol or default, headers)
        if over.is_set():
            await _close_revoked(socket)

    async def receive_until_over() -> Message:
        message: Message = {} if over.is_set() else await receive()
        if not over.is_set():
            return message
        socket.client_state = WebSocketState.DISCONNECTED
        return {"type": "websocket.disconnect", "code": UNAUTHENTICATED, "reason": "revoked"}

    async def send_until_over(message: Message) -> None:
        if over.is_set() and message["type"] == "websocket.send":
            raise WebSocketDisconnect(UNAUTHENTICATED, "revoked")
        await send(message)

    socket.accept = accept_and_look  # type: ignore[method-assign]
    socket.receive = receive_until_over  # type: ignore[method-assign]
    socket.send = send_until_over  # type: ignore[method-assign]


async def _close_revoked(socket: WebSocket) -> None:
    with suppress(RuntimeError, OSError):  # it is being closed from the other side
        await socket.close(UNAUTHENTICATED, "revoked")


async def _turn_away(socket: WebSocket, code: int, reason: str) -> None:
    """Close the socket with a code that its owner can see: before `accept`, a browser only sees that it failed."""
    await socket.accept()
    raise WebSocketException(code, reason[:_LONGEST_REASON])
