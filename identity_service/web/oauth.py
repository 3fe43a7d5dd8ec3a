"""What the OAuth endpoints share: the strict form, how a client identifies itself, and RFC 6749's errors."""

import re
from base64 import b64decode, b64encode
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from http import HTTPStatus
from itertools import chain
from typing import Any
from urllib.parse import parse_qsl, unquote_plus

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from identity_service import errors, grants, throttling
from identity_service.audit import Event, Subject
from identity_service.clients import FIRST_PARTY, Client, authentication
from identity_service.errors import IdentityError
from identity_service.web.dependencies import actor_of, runtime_of
from identity_service.web.direct import DirectRoute
from identity_service.web.problems import note, refusals
from identity_service.web.strict_json import CONTROLS

NO_STORE = {"Cache-Control": "no-store"}

ERRORS: dict[type[IdentityError], str] = {
    errors.InvalidCredentials: "invalid_grant",
    errors.SessionEnded: "invalid_grant",
    errors.RefreshTokenReused: "invalid_grant",
    errors.ClientRejected: "invalid_client",
    errors.ClientNotAllowed: "unauthorized_client",
    errors.GrantNotOffered: "unsupported_grant_type",
    errors.ScopeRejected: "invalid_scope",
    errors.Throttled: "slow_down",
    errors.Unavailable: "temporarily_unavailable",
    errors.DatabaseUnavailable: "temporarily_unavailable",
    errors.KeysUnavailable: "temporarily_unavailable",
    errors.ClocksDiffer: "temporarily_unavailable",
    errors.TooManyFollowers: "temporarily_unavailable",
    errors.HashingOverloaded: "temporarily_unavailable",
}
"""The `error` of RFC 6749 5.2 for everything that a grant can raise."""

_PLAIN_FORM = b"application/x-www-form-urlencoded"
_FORM = re.compile(r"application/x-www-form-urlencoded(\s*;\s*charset=\"?utf-8\"?)?\s*", re.IGNORECASE | re.ASCII)
_MOST_PARAMETERS = 32


class InvalidRequest(Exception):
    """`invalid_request` of RFC 6749 5.2; the description never repeats what was sent."""

    def __init__(self, description: str) -> None:
        super().__init__(description)
        self.description = description


class OAuthRoute(DirectRoute):
    """A route whose refusals are RFC 6749 errors instead of problem documents."""

    async def respond(self, request: Request) -> Response:
        try:
            response: Response = await self.endpoint(request)
        except InvalidRequest as error:
            note(request, "invalid_request", error.description)
            return _error(400, "invalid_request", error.description)
        except IdentityError as error:
            return _refused(request, error)
        return response


async def read_form(request: Request) -> Mapping[str, str]:
    """Return the body's parameters; an empty value counts as absent (RFC 6749 3.2).

    Raises:
        InvalidRequest: not a form, not UTF-8, control characters, or a parameter given twice.
    """
    content_type = request.scope["identity.headers"].get(b"content-type", b"")
    if content_type != _PLAIN_FORM and not _FORM.fullmatch(content_type.decode("latin-1")):
        raise InvalidRequest("Send the parameters as application/x-www-form-urlencoded.")
    if request.scope["query_string"] and "client_secret" in request.query_params:
        raise InvalidRequest("A secret must not be sent in the URL.")
    body = await _read_body(request)
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=_MOST_PARAMETERS)
    except ValueError:
        raise InvalidRequest("The body is not a form in UTF-8, or has too many parameters.") from None
    form = dict(pairs)
    if len(form) != len(pairs):
        raise InvalidRequest("A parameter was given more than once.")
    text = "".join(chain.from_iterable(pairs))
    if not text.isprintable() and CONTROLS.search(text):
        raise InvalidRequest("Parameters must not contain control characters.")
    return {name: value for name, value in form.items() if value}


async def _read_body(request: Request) -> bytes:
    """Return the body, whose size the edge has bounded. Most come in one piece."""
    body = b""
    more = True
    while more:
        message = await request.receive()
        if message["type"] != "http.request":
            raise InvalidRequest("The body is not complete.")
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def require(form: Mapping[str, str], name: str) -> str:
    """Return a parameter that must be there.

    Raises:
        InvalidRequest: it is missing.
    """
    if name not in form:
        raise InvalidRequest(f"The parameter {name} is missing.")
    return form[name]


async def identify_client(request: Request, form: Mapping[str, str]) -> Client:
    """Return the client that asks, by Basic (RFC 6749 2.3.1), by form parameters, or the first-party client.

    Raises:
        InvalidRequest: two methods at once.
        ClientRejected: unknown, or not proved.
        Throttled: too many secrets before this one were wrong.
    """
    client_id, secret = form.get("client_id", ""), form.get("client_secret", "")
    if (credentials := _basic(request)) is not None:
        if secret or (client_id and client_id != credentials[0]):
            raise InvalidRequest("Identify the client by one method only.")
        client_id, secret = credentials
    if client_id in ("", FIRST_PARTY.client_id):  # built in: nothing to look up
        if secret:
            raise errors.ClientRejected(detail="a public client has no secret")
        return FIRST_PARTY
    return await _prove_client(request, client_id, secret)


async def _prove_client(request: Request, client_id: str, secret: str) -> Client:
    runtime, by = runtime_of(request), actor_of(request)
    attempt = throttling.client_attempt(client_id, by.address, exempt=runtime.settings.throttle_exempt)
    try:
        async with runtime.database.connection() as db:
            client = await authentication.authenticate(db, client_id, secret, now=runtime.now())
            # Comparing a digest costs nothing worth saving, so this is the only look. Not at the place: whoever guesses
            # from there must not keep out the services beside them, whose secrets nobody guesses.
            try:
                await throttling.admit(db, replace(attempt, place=None), now=runtime.now())
            except errors.Throttled:
                await throttling.check(db, attempt, now=runtime.now())  # told to wait for as long as a wrong one is
                raise
    except errors.ClientRejected as error:
        subject = Subject("client", client_id) if error.detail != "unknown_client" else None
        try:
            await grants.count_failure(runtime, attempt, Event.CLIENT_LOGIN, subject, error, by=by)
        except errors.Throttled:
            if subject is not None:
                # It may be the place alone that is blocked, where the right secret is let in. Guesses at it count, or
                # there would be no end to them. A client that nobody has is not found by guessing, and fills no table.
                with suppress(errors.Throttled):
                    at_client = replace(attempt, place=None)
                    await grants.count_failure(runtime, at_client, Event.CLIENT_LOGIN, subject, error, by=by)
            raise
        raise
    return client


async def identify_confidential_client(request: Request, form: Mapping[str, str]) -> Client:
    """Return the client that asks, which has proved itself by a secret.

    Raises:
        InvalidRequest, ClientRejected, Throttled: as above.
    """
    client = await identify_client(request, form)
    if client.public:
        raise errors.ClientRejected(detail="a public client asks")
    return client


def _basic(request: Request) -> tuple[str, str] | None:
    """Return the id and secret of Basic credentials, None without any.

    Empty id and secret, which Swagger UI sends when nothing was filled in, count as absent.
    """
    if b"authorization" not in request.scope["identity.headers"]:
        return None
    values = request.headers.getlist("authorization")
    if len(values) > 1:
        raise InvalidRequest("Identify the client by one method only.")
    scheme, _, encoded = values[0].partition(" ")
    try:
        given = encoded.strip(" ") if scheme.lower() == "basic" else ""
        octets = b64decode(given, validate=True)
        # Unused bits and padding make other spellings of the same credentials.
        decoded = octets.decode() if b64encode(octets).decode() == given else ""
        client_id, colon, secret = decoded.partition(":")
        client_id, secret = unquote_plus(client_id, errors="strict"), unquote_plus(secret, errors="strict")
    except ValueError:
        colon = ""
    if not colon:
        raise errors.ClientRejected(detail="malformed Basic credentials")
    return (client_id, secret) if client_id or secret else None


def _refused(request: Request, error: IdentityError) -> JSONResponse:
    note(request, type(error).__name__, error.detail)
    status = status_of(type(error))
    headers = {}
    if isinstance(error, errors.Unavailable | errors.Throttled):
        headers["Retry-After"] = str(error.retry_after)
    elif status == 401 and "authorization" in request.headers:
        headers["WWW-Authenticate"] = 'Basic realm="identity", charset="UTF-8"'
    return _error(status, ERRORS[type(error)], error.text, headers)


def status_of(error: type[IdentityError]) -> int:
    """Return the status of RFC 6749 5.2 and, where that says nothing, of HTTP."""
    if issubclass(error, errors.Unavailable):
        return 503
    if issubclass(error, errors.Throttled):
        return 429
    return 401 if issubclass(error, errors.ClientRejected) else 400


def _error(status: int, code: str, description: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": code, "error_description": description}, status, {**NO_STORE, **(headers or {})})


def described(*refused: type[IdentityError]) -> dict[int | str, dict[str, Any]]:
    """Describe to OpenAPI what an OAuth endpoint refuses, beside `invalid_request` and what every route does."""
    codes = {400: ["invalid_request"]}
    for error in refused:
        found = codes.setdefault(status_of(error), [])
        if ERRORS[error] not in found:
            found.append(ERRORS[error])
    answers = refusals()
    for status, found in codes.items():
        text = f"{HTTPStatus(status).phrase}: {', '.join(f'`{code}`' for code in found)}"
        own = {
            "schema": {
                "type": "object",
                "required": ["error", "error_description"],
                "properties": {"error": {"enum": found}, "error_description": {"type": "string"}},
            },
            "examples": {code: {"value": {"error": code, "error_description": "What happened."}} for code in found},
        }
        shared = answers.get(status, {"content": {}})
        answers[status] = {"description": text, "content": {**shared["content"], "application/json": own}}
    return answers


def form_schema(*parameters: str) -> dict[str, Any]:
    """Describe a form to OpenAPI; the route reads it by itself, since `Form()` takes the last of repeated values."""
    names = (*parameters, "client_id", "client_secret")
    properties = {name: {"type": "string"} for name in names}
    schema = {"type": "object", "required": [parameters[0]], "properties": properties}
    return {"requestBody": {"required": True, "content": {"application/x-www-form-urlencoded": {"schema": schema}}}}
