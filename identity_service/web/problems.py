"""What HTTP makes of our errors: the one table, and the problem documents (RFC 9457) that carry it."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any, TypeAlias

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from identity_service import errors
from identity_service.errors import IdentityError

MEDIA_TYPE = "application/problem+json"
MOST_ERRORS = 20

STATUS: dict[type[IdentityError], tuple[int, str]] = {
    errors.SignupClosed: (403, "signup_closed"),
    errors.UsernameTaken: (409, "username_taken"),
    errors.UsernameRejected: (422, "username_rejected"),
    errors.EmailRejected: (422, "email_rejected"),
    errors.PasswordRejected: (422, "password_rejected"),
    errors.InvalidCredentials: (401, "invalid_credentials"),
    errors.ResetTokenInvalid: (400, "reset_token_invalid"),
    errors.CurrentPasswordWrong: (403, "current_password_wrong"),
    errors.UserNotFound: (404, "user_not_found"),
    errors.UserDisabled: (409, "user_disabled"),
    errors.RoleNotFound: (404, "role_not_found"),
    errors.RoleTaken: (409, "role_taken"),
    errors.RoleBuiltIn: (409, "role_built_in"),
    errors.RoleInUse: (409, "role_in_use"),
    errors.RoleRejected: (422, "role_rejected"),
    errors.LastAdministrator: (409, "last_administrator"),
    errors.ClientNotFound: (404, "client_not_found"),
    errors.ClientTaken: (409, "client_taken"),
    errors.ClientBuiltIn: (409, "client_built_in"),
    errors.ClientInvalid: (422, "client_invalid"),
    errors.ClientNotAllowed: (400, "unauthorized_client"),
    errors.CursorRejected: (400, "invalid_cursor"),
    errors.SessionNotFound: (404, "session_not_found"),
    errors.Throttled: (429, "too_many_attempts"),
    errors.TokenRejected: (401, "invalid_token"),
    errors.SessionEnded: (401, "session_ended"),
    errors.RefreshTokenReused: (401, "session_ended"),
    errors.ClientRejected: (401, "invalid_client"),
    errors.GrantNotOffered: (400, "unsupported_grant_type"),
    errors.ScopeRejected: (400, "invalid_scope"),
    errors.Unavailable: (503, "temporarily_unavailable"),
    errors.DatabaseUnavailable: (503, "temporarily_unavailable"),
    errors.KeysUnavailable: (503, "temporarily_unavailable"),
    errors.ClocksDiffer: (503, "temporarily_unavailable"),
    errors.TooManyFollowers: (503, "temporarily_unavailable"),
    errors.HashingOverloaded: (503, "temporarily_unavailable"),
    errors.KeyNotFound: (404, "key_not_found"),
    errors.ConfigurationError: (503, "temporarily_unavailable"),
    errors.IdentityError: (400, "refused"),
}

CODES: dict[str, int] = {
    "bad_request": 400,
    "unknown_host": 400,
    "body_too_large": 413,
    "internal_error": 500,
    "not_found": 404,
    "method_not_allowed": 405,
    "unsupported_media_type": 415,
    "malformed_json": 400,
    "validation_failed": 422,
    "authentication_required": 401,
    "insufficient_user_authentication": 401,
    "insufficient_scope": 403,
    "invalid_request": 400,
    "origin_not_allowed": 403,
    "time_not_supported": 400,
}
"""The codes of what is wrong with the HTTP itself, with their status: what `middleware` and `BadRequest` refuse."""

EVERYWHERE = ("bad_request", "unknown_host", "body_too_large")
JSON_BODY = ("malformed_json", "unsupported_media_type", "validation_failed")
SIGNED_IN = ("authentication_required", "invalid_request", errors.TokenRejected, errors.DatabaseUnavailable)
"""What routes can refuse that read JSON, and those that are guarded: for `refusals`."""

ADMINISTERED = (*SIGNED_IN, "insufficient_user_authentication", "insufficient_scope", "validation_failed")
"""What every route of the administration can refuse."""

Refusal: TypeAlias = tuple[int, str, str]
"""Status, code and detail."""

NOT_FOUND: Refusal = (404, "not_found", "There is nothing at this path.")
WRONG_METHOD: Refusal = (405, "method_not_allowed", "This path does not answer that method; see the Allow header.")
FOREIGN: Refusal = (
    403,
    "origin_not_allowed",
    "The Origin header is missing or not in IDENTITY_ALLOWED_ORIGINS; what is no web page uses /token.",
)
FAILED: Refusal = (500, "internal_error", "Something went wrong here; the request id finds it in the log.")
_HTTP = {status: (code, detail) for status, code, detail in (NOT_FOUND, WRONG_METHOD)}


class BadRequest(HTTPException):
    """What a client got wrong in the HTTP itself, before any rule was asked."""

    def __init__(self, status: int, code: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, detail, headers)
        self.code = code


def problem(
    request: Request, status: int, code: str, detail: str, *, headers: Mapping[str, str] | None = None, **more: Any
) -> JSONResponse:
    """Render a problem document. `code` is stable; programs should look at nothing else."""
    note(request, code, detail)
    body = document(status, code, detail, request.scope.get("identity.request_id", "")) | more
    return JSONResponse(body, status, {"Cache-Control": "no-store", **(headers or {})}, MEDIA_TYPE)


def document(status: int, code: str, detail: str, request_id: str) -> dict[str, Any]:
    """Return the members that every problem document has (RFC 9457)."""
    return {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": detail,
        "request_id": request_id,
    }


def refusals(*refused: type[IdentityError] | str) -> dict[int | str, dict[str, Any]]:
    """Describe to OpenAPI what a route refuses, by errors and by `CODES`, beside what every route does.

    Routes share what describes an answer, so nobody may change it.
    """
    codes: dict[int, list[str]] = {}
    for one in (*EVERYWHERE, *refused):
        status, code = (CODES[one], one) if isinstance(one, str) else STATUS[one]
        if code not in codes.setdefault(status, []):
            codes[status].append(code)
    if 404 in codes and "not_found" not in codes[404]:  # a name in the path that no path can hold
        codes[404].append("not_found")
    return {status: _described(status, tuple(found)) for status, found in sorted(codes.items())}


class Router(APIRouter):
    """Takes the routes of a file, which the application takes over as they are.

    `include_router` would make each of them again at the first request: 40 ms in which nobody is answered. What it
    would add is added here, but for the application's `dependency_overrides`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(responses=refusals(), generate_unique_id_function=lambda route: route.name, **options)

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if options.get("status_code") == 204:
            options["response_class"] = Response  # without a body there is no media type
        super().add_api_route(path, endpoint, **options)


# Most routes refuse the same things, and what describes them stays in memory for as long as the process serves.
@cache
def _described(status: int, codes: tuple[str, ...]) -> dict[str, Any]:
    title = HTTPStatus(status).phrase
    document = {"type": "about:blank", "title": title, "status": status, "detail": "What happened, in one sentence."}
    schema = {
        "type": "object",
        "required": _REQUIRED,
        "properties": {**_MEMBERS, "status": {"const": status}, "code": {"enum": list(codes)}},
    }
    examples = {code: {"value": {**document, "code": code, "request_id": "5f0c6a1e9d2b4873"}} for code in codes}
    description = f"{title}: {', '.join(f'`{code}`' for code in codes)}"
    return {"description": description, "content": {MEDIA_TYPE: {"schema": schema, "examples": examples}}}


_REQUIRED = ["type", "title", "status", "code", "detail", "request_id"]
_MEMBERS = {
    "type": {"const": "about:blank"},
    "title": {"type": "string"},
    "status": {},
    "code": {},
    "detail": {"type": "string"},
    "request_id": {"type": "string"},
    "reason": {"type": "string", "description": "With `password_rejected`: which part of the policy."},
    "errors": {
        "type": "array",
        "description": "With `validation_failed`: where, as JSON pointers, and what is wrong there.",
        "items": {"type": "object", "properties": {name: {"type": "string"} for name in ("pointer", "detail")}},
    },
}


def note(request: Request, error: str, detail: str) -> None:
    """Leave why a request is refused for the line that `middleware` writes about it, and for the count of refusals.

    What is noted first stays: an error of ours by its name, with what is not for callers, before the code they get.
    """
    request.scope.setdefault("identity.error", error)
    request.scope.setdefault("identity.detail", detail)


def install(app: FastAPI) -> None:
    """Render everything that routes raise as a problem document."""
    app.add_exception_handler(IdentityError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, failed)


def failed(request: Request, _: Exception) -> JSONResponse:
    """Render what nobody expected. The log has it, under the request's id."""
    return problem(request, *FAILED)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, IdentityError)
    return refused(request, error)


def refused(request: Request, error: IdentityError) -> JSONResponse:
    """Render an error of ours, and leave its detail for the log."""
    note(request, type(error).__name__, error.detail)
    status, code = STATUS[type(error)]
    headers = {}
    more = {}
    if isinstance(error, errors.Unavailable | errors.Throttled):
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, errors.TokenRejected):
        headers["WWW-Authenticate"] = (
            f'Bearer realm="identity", error="invalid_token", error_description="{error.text}"'
        )
    if isinstance(error, errors.PasswordRejected):
        more["reason"] = error.reason
    return problem(request, status, code, error.text, headers=headers, **more)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Say where the input is wrong, never what it was: FastAPI's own answer repeats passwords."""
    assert isinstance(error, RequestValidationError)
    found = [{"pointer": _pointer(entry["loc"][1:]), "detail": entry["msg"]} for entry in error.errors()[:MOST_ERRORS]]
    return problem(
        request, 422, "validation_failed", "The request has members that are missing or wrong.", errors=found
    )


def _pointer(path: Sequence[object]) -> str:
    """Return a JSON pointer (RFC 6901 3); the whole document is the empty string."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error, BadRequest):
        code, detail = error.code, error.detail
    else:
        code, detail = _HTTP.get(error.status_code, ("bad_request", "The request could not be understood."))
    headers = {"Allow": allowed(request.app, request.scope)} if error.status_code == 405 else error.headers
    return problem(request, error.status_code, code, detail, headers=headers)


def allowed(app: FastAPI, scope: Scope) -> str:
    """Return every method of the path; the framework only names those of the first route that has it."""
    methods: set[str] = set()
    for route in app.routes:
        if route.matches(scope)[0] is not Match.NONE:
            methods |= getattr(route, "methods", None) or set()
    if "GET" in methods:
        methods.add("HEAD")
    return ", ".join(sorted(methods))
