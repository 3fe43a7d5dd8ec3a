"""What holds for every route and every error there is, those of tomorrow too."""

import ast
import re
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import RouteContext, iter_route_contexts

import identity_service
from identity_service import errors
from identity_service.errors import IdentityError
from identity_service.web import oauth, problems
from identity_service.web.dependencies import PUBLIC, public, signed_in
from tests.conftest import PASSWORD, Account, Api, bearer
from tests.web.answers import ENDLESS

APP = "https://app.example.com"
SAFE = {"GET", "HEAD"}

# Written by the framework, without a guard: the description of the API is for everyone.
BY_THE_FRAMEWORK = {"/openapi.json"}

# How many routes there were when this was written. A walk that finds fewer looks in the wrong place.
AT_LEAST = 58


def routes_of(app: FastAPI) -> list[RouteContext]:
    """Return every route as it answers. `app.routes` itself holds whole routers, of any depth."""
    return list(iter_route_contexts(app.routes))


def is_guarded(dependant: Dependant | None) -> bool:
    return dependant is not None and any(
        inner.call is signed_in or is_guarded(inner) for inner in dependant.dependencies
    )


def unprotected(app: FastAPI) -> set[str | None]:
    """Return the paths of routes that say neither that they are public nor who may call them."""
    return {
        route.path
        for route in routes_of(app)
        if not getattr(route.endpoint, PUBLIC, False) and not is_guarded(getattr(route, "dependant", None))
    }


# Guards


async def test_every_route_is_marked_public_or_guarded(api):
    assert len(routes_of(api.app)) >= AT_LEAST
    assert unprotected(api.app) == BY_THE_FRAMEWORK


async def test_no_route_is_marked_public_and_guarded_at_once(api):
    both = [
        route.path
        for route in routes_of(api.app)
        if getattr(route.endpoint, PUBLIC, False) and is_guarded(getattr(route, "dependant", None))
    ]
    assert both == []


async def test_a_route_that_somebody_forgot_to_guard_is_found_however_deep_it_is(api):
    """The check itself: with and without a mark, a guard on the route, and a guard on its router."""

    async def answer() -> None: ...

    async def marked() -> None: ...

    outer, inner, guarded = APIRouter(prefix="/outer"), APIRouter(prefix="/inner"), APIRouter()
    inner.add_api_route("/forgotten", answer)
    inner.add_api_route("/marked", public(marked))
    inner.add_api_route("/guarded", answer, dependencies=[Depends(signed_in)])
    guarded.add_api_route("/by-its-router", answer)
    outer.include_router(inner)
    outer.include_router(guarded, dependencies=[Depends(signed_in)])
    api.app.include_router(outer)
    api.app.add_route("/plain", answer)
    assert unprotected(api.app) == BY_THE_FRAMEWORK | {"/outer/inner/forgotten", "/plain"}


async def test_every_guarded_route_turns_away_whoever_has_no_token(api):
    guarded = [route for route in routes_of(api.app) if is_guarded(getattr(route, "dependant", None))]
    assert len(guarded) >= 36
    for route in guarded:
        for method in route.methods or ():
            answer = await api.http.request(method, re.sub(r"{\w+}", "x", route.path or ""), json={})
            assert answer.status_code == 401, (method, route.path)
            assert answer.headers["www-authenticate"] == 'Bearer realm="identity"'


# Methods


async def test_nothing_changes_by_looking_at_it(api, alice):
    """BRW-3: every route that answers GET or HEAD, with everything a browser could send along."""

    async def everything() -> list[Any]:
        return [
            await api.scalar("SELECT array_agg(t::text ORDER BY t::text) FROM users AS t"),
            await api.scalar("SELECT array_agg(t::text ORDER BY t::text) FROM sessions AS t"),
            await api.scalar("SELECT array_agg(t::text ORDER BY t::text) FROM revoked_tokens AS t"),
        ]

    headers = await as_a_browser(api, alice)
    before = await everything()
    looked_at = 0
    for route in routes_of(api.app):
        for method in SAFE & (route.methods or set()):
            asked = "HEAD" if route.path == ENDLESS else method
            answer = await api.http.request(asked, re.sub(r"{\w+}", "x", route.path or ""), headers=headers)
            assert answer.status_code < 500
            looked_at += 1
    assert looked_at >= 25
    assert await everything() == before


async def as_a_browser(api: Api, account: Account) -> dict[str, str]:
    """Return the headers of somebody who is logged in by cookie and by token."""
    body = {"username": account.username, "password": PASSWORD}
    answer = await api.http.post("/login", json=body, headers={"Origin": APP})
    cookie = answer.headers["set-cookie"].partition(";")[0]
    api.http.cookies.clear()
    return {"Origin": APP, "Cookie": cookie, **bearer(answer.json()["access_token"])}


async def test_no_route_answers_both_a_safe_method_and_another(api):
    mixed = [
        (route.path, route.methods)
        for route in routes_of(api.app)
        if (methods := route.methods or set()) & SAFE and methods - SAFE
    ]
    assert mixed == []


# Errors


def all_errors(root: type[IdentityError] = IdentityError) -> Iterator[type[IdentityError]]:
    yield root
    for error in root.__subclasses__():
        yield from all_errors(error)


ALL = sorted(set(all_errors()), key=lambda error: error.__name__)

# Refusals of other routes, or turned into one of the others before they reach the OAuth endpoints:
# an impossible name is an unknown one, an impossible password a wrong one, a foreign token an ended session.
NEVER_AT_OAUTH = {
    errors.IdentityError,
    errors.ConfigurationError,
    errors.CurrentPasswordWrong,
    errors.CursorRejected,
    errors.EmailRejected,
    errors.ClientBuiltIn,
    errors.ClientInvalid,
    errors.ClientNotFound,
    errors.ClientTaken,
    errors.KeyNotFound,
    errors.LastAdministrator,
    errors.PasswordRejected,
    errors.ResetTokenInvalid,
    errors.RoleBuiltIn,
    errors.RoleInUse,
    errors.RoleNotFound,
    errors.RoleRejected,
    errors.RoleTaken,
    errors.SessionNotFound,
    errors.SignupClosed,
    errors.TokenRejected,
    errors.UserNotFound,
    errors.UserDisabled,
    errors.UsernameRejected,
    errors.UsernameTaken,
}


def test_every_error_has_a_status_and_a_code():
    assert len(ALL) >= 20
    assert [error.__name__ for error in ALL if error not in problems.STATUS] == []
    assert set(problems.STATUS) == set(ALL)
    for status, code in problems.STATUS.values():
        assert 400 <= HTTPStatus(status) < 600
        assert status != 500
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", code)


def test_an_error_that_says_the_same_as_another_has_the_same_status():
    by_code: dict[str, set[int]] = {}
    for status, code in problems.STATUS.values():
        by_code.setdefault(code, set()).add(status)
    assert {code: statuses for code, statuses in by_code.items() if len(statuses) > 1} == {}


def test_every_error_that_a_grant_can_raise_has_a_name_in_rfc_6749():
    """TOK-5: whoever adds an error decides here whether the OAuth endpoints can meet it."""
    assert set(oauth.ERRORS) | NEVER_AT_OAUTH == set(ALL)
    assert set(oauth.ERRORS) & NEVER_AT_OAUTH == set()
    assert set(oauth.ERRORS.values()) <= {
        "invalid_request",
        "invalid_client",
        "invalid_grant",
        "unauthorized_client",
        "slow_down",
        "unsupported_grant_type",
        "invalid_scope",
        "temporarily_unavailable",
    }
    assert {oauth.ERRORS[error] for error in ALL if issubclass(error, errors.Unavailable)} == {
        "temporarily_unavailable"
    }
    assert {oauth.ERRORS[error] for error in ALL if issubclass(error, errors.SessionEnded)} == {"invalid_grant"}


PERMITTED = re.compile(r"[\x20-\x21\x23-\x5B\x5D-\x7E]+")
SOURCES = sorted(Path(identity_service.__file__).parent.rglob("*.py"))


def texts_raised(source: str) -> Iterator[str]:
    """Return what is given to an error where it is made: its literals, and the literal parts of its f-strings."""
    names = {error.__name__ for error in ALL} | {"InvalidRequest"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in names:
            for part in (inner for argument in node.args for inner in ast.walk(argument)):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


def test_every_text_that_a_caller_reads_has_only_characters_that_an_oauth_error_may_have():
    """TOK-5: the same text is an `error_description` (RFC 6749 5.2) and a quoted string in a header (RFC 6750 3)."""
    texts = [error.default_text for error in ALL]
    texts += [text for source in SOURCES for text in texts_raised(source.read_text(encoding="utf-8")) if text]
    assert len(texts) > 50
    assert [text for text in texts if not PERMITTED.fullmatch(text)] == []


def test_the_search_for_texts_sees_literals_and_f_strings():
    source = 'raise errors.ScopeRejected("a") from None\nraise UsernameRejected(f"b {n} c", detail="unseen")'
    assert list(texts_raised(source)) == ["a", "b ", " c"]


def made(error: type[IdentityError], detail: str) -> IdentityError:
    if issubclass(error, errors.PasswordRejected):
        return error("too_short", "told")
    if issubclass(error, errors.TokenRejected):
        return error("malformed", detail)
    if issubclass(error, errors.Throttled):
        return error(detail=detail, retry_after=1)
    return error(detail=detail)


def test_no_error_speaks_of_what_only_the_log_should_hold():
    """Two texts: one that a caller may read, one for the log."""
    for error in ALL:
        one = made(error, "for the log only")
        assert one.text
        assert "for the log only" not in f"{one} {one.text} {one.args}"
