"""The session of a browser: log in, refresh, log out, with the refresh token in a cookie that no script can read.

The three want JSON and a known `Origin`, so that no other site can act through a visitor's cookie.
"""

from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from identity_service import errors, grants
from identity_service.clients import FIRST_PARTY
from identity_service.errors import SessionEnded, TokenRejected
from identity_service.grants import IssuedTokens
from identity_service.revocation import Reason
from identity_service.runtime import Runtime
from identity_service.settings import Settings
from identity_service.tokens import refresh
from identity_service.web import problems
from identity_service.web.dependencies import actor_of, public, runtime_of
from identity_service.web.problems import JSON_BODY, BadRequest, Router, refusals
from identity_service.web.revocation import end_session_of
from identity_service.web.strict_json import StrictRoute, require_json

_SAME_SITE: Any = "Strict"
"""As RFC 6265bis spells it; the framework's type knows it in lower case only."""

_LEFT_BEHIND = '"storage"'
"""What `Clear-Site-Data` clears at a logout: the storage that `/docs` uses. Not "cookies", which would be those of the
whole domain.
"""


async def from_our_pages(request: Request) -> None:
    """Refuse what a page of another site could have sent.

    Raises:
        BadRequest: 415 for anything but JSON, 403 for an Origin that is missing or not ours.
    """
    require_json(request)
    given = request.headers.getlist("origin")
    if len(given) != 1 or given[0] not in runtime_of(request).settings.origins:
        raise BadRequest(*problems.FOREIGN)


router = Router(route_class=StrictRoute, tags=["Browser session"], dependencies=[Depends(from_our_pages)])


class LoginBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    username: Annotated[str, Field(max_length=1024, examples=["alice"])]
    password: Annotated[str, Field(max_length=4096, examples=["correct horse battery staple"])]
    scope: Annotated[str, Field(max_length=4096)] = ""


class EmptyBody(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AccessTokenAnswer(BaseModel):
    access_token: Annotated[str, Field(examples=["eyJhbGciOiJSUzI1NiIsInR5cCI6ImF0K2p3dCJ9.e30.c2ln"])]
    token_type: str = "Bearer"  # noqa: S105 - the type's name in RFC 6750
    expires_in: Annotated[int, Field(examples=[600])]
    scope: Annotated[str, Field(examples=["orders:read orders:write"])]


_FROM_OUR_PAGES = (*JSON_BODY, "origin_not_allowed", errors.Unavailable)


@router.post(
    "/login",
    response_model=AccessTokenAnswer,
    responses=refusals(*_FROM_OUR_PAGES, errors.InvalidCredentials, errors.ScopeRejected, errors.Throttled),
)
@public
async def login(request: Request, body: LoginBody) -> JSONResponse:
    """Log in. The access token is in the answer, the refresh token only in the cookie."""
    runtime = runtime_of(request)
    issued = await grants.password(
        runtime,
        FIRST_PARTY,
        username=body.username,
        password=body.password,
        scope=body.scope,
        by=actor_of(request),
    )
    runtime.metrics.issued("password")
    return _answer(runtime, issued)


@router.post("/refresh", response_model=AccessTokenAnswer, responses=refusals(*_FROM_OUR_PAGES, errors.SessionEnded))
@public
async def refresh_session(request: Request, _: EmptyBody | None = None) -> JSONResponse:
    """Get the next access token for the session in the cookie, and the next cookie."""
    runtime = runtime_of(request)
    try:
        issued = await grants.refresh_token(
            runtime, FIRST_PARTY, unverified_token=_cookie(request), scope="", by=actor_of(request)
        )
    except SessionEnded as error:
        answer = problems.refused(request, error)
        _clear_cookie(answer, runtime.settings)
        return answer
    runtime.metrics.issued("refresh_token")
    return _answer(runtime, issued)


@router.post("/logout", status_code=204, responses=refusals(*_FROM_OUR_PAGES))
@public
async def logout(request: Request, _: EmptyBody | None = None) -> Response:
    """End the session in the cookie and clear it. Without a session there is nothing to do, which is fine too."""
    runtime = runtime_of(request)
    try:
        claims = refresh.read(
            _cookie(request), runtime.keys.current, issuer=runtime.settings.issuer_url, now=runtime.now()
        )
    except (SessionEnded, TokenRejected):
        pass
    else:
        if claims.client_id == FIRST_PARTY.client_id:  # as at /revoke, another client's session is not ours to end
            await end_session_of(runtime, claims, Reason.LOGOUT, by=actor_of(request))
    answer = Response(status_code=204, headers={"Clear-Site-Data": _LEFT_BEHIND})
    _clear_cookie(answer, runtime.settings)
    return answer


def cookie_name(settings: Settings) -> str:
    """Browsers only accept the `__Host-` prefix over https; on plain-http localhost there is nothing to protect it."""
    return "__Host-identity-refresh" if settings.secure_cookies else "identity-refresh"


def _cookie(request: Request) -> str:
    token: str = request.scope.get("identity.cookie", "")
    if not token or not token.isascii():
        raise SessionEnded(detail="no cookie")
    return token


def _answer(runtime: Runtime, issued: IssuedTokens) -> JSONResponse:
    body = AccessTokenAnswer(
        access_token=issued.access_token, expires_in=issued.expires_in, scope=" ".join(issued.scope)
    )
    answer = JSONResponse(body.model_dump())
    answer.set_cookie(
        cookie_name(runtime.settings),
        issued.refresh_token,
        max_age=issued.refresh_token_expires_in,
        path="/",
        secure=runtime.settings.secure_cookies,
        httponly=True,
        samesite=_SAME_SITE,
    )
    return answer


def _clear_cookie(answer: Response, settings: Settings) -> None:
    answer.delete_cookie(
        cookie_name(settings), path="/", secure=settings.secure_cookies, httponly=True, samesite=_SAME_SITE
    )
