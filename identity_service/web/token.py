"""`POST /token`: strict form → client → may it ask for this → grant → answer (RFC 6749 5)."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Literal

from fastapi import Request, Response
from pydantic import BaseModel, Field

from identity_service import grants
from identity_service.audit import Actor
from identity_service.clients import Client
from identity_service.errors import ClientNotAllowed, GrantNotOffered
from identity_service.grants import IssuedToken, IssuedTokens
from identity_service.runtime import Runtime
from identity_service.tokens.jws import to_json
from identity_service.web import oauth
from identity_service.web.dependencies import actor_of, public, runtime_of
from identity_service.web.problems import Router

router = Router(route_class=oauth.OAuthRoute, tags=["OAuth"])

Grant = Callable[[Runtime, Client, Mapping[str, str], Actor], Awaitable[IssuedToken]]


class TokenAnswer(BaseModel):
    """RFC 6749 5.1. Lifetimes are seconds from now. A client that asks for itself gets no refresh token."""

    access_token: Annotated[str, Field(examples=["eyJhbGciOiJSUzI1NiIsInR5cCI6ImF0K2p3dCJ9.e30.c2ln"])]
    token_type: Literal["Bearer"]
    expires_in: Annotated[int, Field(examples=[600])]
    scope: Annotated[str, Field(examples=["orders:read orders:write"])]
    refresh_token: Annotated[str, Field("", examples=["eyJhbGciOiJSUzI1NiIsInR5cCI6InJ0K2p3dCJ9.e30.c2ln"])]
    refresh_token_expires_in: Annotated[int, Field(0, examples=[1209600])]


@router.post(
    "/token",
    response_model=TokenAnswer,
    responses=oauth.described(*oauth.ERRORS),
    openapi_extra=oauth.form_schema("grant_type", "username", "password", "refresh_token", "scope"),
)
@public
async def token(request: Request) -> Response:
    """Get an access token for a user, with the next refresh token, or for the client that asks."""
    runtime = runtime_of(request)
    form = await oauth.read_form(request)
    grant_type = oauth.require(form, "grant_type")
    identify = oauth.identify_client
    if grant_type == "client_credentials":  # only confidential clients have any (RFC 6749 4.4)
        identify = oauth.identify_confidential_client
    client = await identify(request, form)
    grant = offered_grants(runtime).get(grant_type)
    if grant is None:
        raise GrantNotOffered
    if grant_type not in client.grants:
        raise ClientNotAllowed(detail=client.client_id)
    issued = await grant(runtime, client, form, actor_of(request))
    runtime.metrics.issued(grant_type)
    return _answer(issued)


def offered_grants(runtime: Runtime) -> dict[str, Grant]:
    """Return the grant types that are switched on, as the metadata lists them."""
    if runtime.settings.password_grant == "off":  # noqa: S105 - a switch, not a secret
        return {name: grant for name, grant in GRANTS.items() if name != "password"}
    return GRANTS


async def _password(runtime: Runtime, client: Client, form: Mapping[str, str], by: Actor) -> IssuedTokens:
    username, password = oauth.require(form, "username"), oauth.require(form, "password")
    scope = form.get("scope", "")
    return await grants.password(runtime, client, username=username, password=password, scope=scope, by=by)


async def _refresh_token(runtime: Runtime, client: Client, form: Mapping[str, str], by: Actor) -> IssuedTokens:
    unverified_token = oauth.require(form, "refresh_token")
    scope = form.get("scope", "")
    return await grants.refresh_token(runtime, client, unverified_token=unverified_token, scope=scope, by=by)


async def _client_credentials(runtime: Runtime, client: Client, form: Mapping[str, str], by: Actor) -> IssuedToken:
    return await grants.client_credentials(runtime, client, scope=form.get("scope", ""), by=by)


GRANTS: dict[str, Grant] = {
    "password": _password,
    "refresh_token": _refresh_token,
    "client_credentials": _client_credentials,
}


def _answer(issued: IssuedToken) -> Response:
    rest: dict[str, str | int] = {
        "token_type": "Bearer",
        "expires_in": issued.expires_in,
        "scope": " ".join(issued.scope),
    }
    # Nothing in a token has to be escaped (RFC 7515 7.1): what most of the answer is need not be searched for it.
    tokens = f'"access_token":"{issued.access_token}"'
    if isinstance(issued, IssuedTokens):
        tokens += f',"refresh_token":"{issued.refresh_token}"'
        rest["refresh_token_expires_in"] = issued.refresh_token_expires_in
    body = f"{{{tokens},{to_json(rest)[1:]}"
    return Response(body, headers=oauth.NO_STORE, media_type="application/json")
