"""What everyone may know: the JWKS, the server's metadata (RFC 8414), and the page at the root."""

from functools import lru_cache
from typing import Annotated, Any, Literal

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from identity_service.signing.jwks import JwksDocument
from identity_service.signing.keyring import JWKS_MAX_AGE
from identity_service.web.dependencies import public, runtime_of
from identity_service.web.direct import DirectRoute
from identity_service.web.problems import Router
from identity_service.web.token import offered_grants

router = Router(route_class=DirectRoute, tags=["Metadata"])

_MAX_AGE = int(JWKS_MAX_AGE.total_seconds())
_JWKS_CACHING = f"public, max-age={_MAX_AGE}, stale-while-revalidate=60, stale-if-error=3600"
_BY_SECRET = ["client_secret_basic", "client_secret_post"]
NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "What the caller has is current."}}
FOR_EVERYONE = {"Access-Control-Allow-Origin": "*"}


class PublicKey(BaseModel):
    kty: Literal["RSA"]
    use: Literal["sig"]
    alg: Literal["RS256"]
    kid: Annotated[str, Field(examples=["NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"])]
    n: str
    e: Annotated[str, Field(examples=["AQAB"])]


class PublicKeys(BaseModel):
    keys: list[PublicKey]


class ServerMetadata(BaseModel):
    """RFC 8414 2."""

    model_config = ConfigDict(extra="forbid")

    issuer: str
    token_endpoint: str
    jwks_uri: str
    revocation_endpoint: str
    introspection_endpoint: str
    status_list_aggregation_endpoint: str
    grant_types_supported: list[str]
    response_types_supported: list[str]
    scopes_supported: list[str]
    token_endpoint_auth_methods_supported: list[str]
    revocation_endpoint_auth_methods_supported: list[str]
    introspection_endpoint_auth_methods_supported: list[str]
    service_documentation: Annotated[str, Field("")]


class Root(BaseModel):
    issuer: str
    jwks_uri: str
    metadata: str
    docs: Annotated[str, Field("")]


@router.get("/.well-known/jwks.json", response_model=PublicKeys, responses=NOT_MODIFIED)
@public
def jwks(request: Request) -> Response:
    """The public keys that verify our tokens (RFC 7517), the signing one first."""
    runtime = runtime_of(request)
    document = runtime.keys.jwks(runtime.now())
    whole, unchanged = _answers(document)
    return unchanged if not_modified(request, document.etag) else whole


@lru_cache(maxsize=2)
def _answers(document: JwksDocument) -> tuple[Response, Response]:
    """Return the answer with the document and the one without, made once; an answer may be given many times."""
    headers = {"Cache-Control": _JWKS_CACHING, "ETag": document.etag, **FOR_EVERYONE}
    return Response(document.body, 200, headers, "application/json"), Response(None, 304, headers)


@router.get("/.well-known/oauth-authorization-server", response_model=ServerMetadata)
@public
def authorization_server(request: Request) -> JSONResponse:
    """What this server offers and where (RFC 8414)."""
    runtime = runtime_of(request)
    issuer, described = runtime.settings.issuer_url, runtime.settings.docs == "on"
    body: dict[str, Any] = {
        "issuer": issuer,
        "token_endpoint": f"{issuer}/token",
        "jwks_uri": f"{issuer}/.well-known/jwks.json",
        "revocation_endpoint": f"{issuer}/revoke",
        "introspection_endpoint": f"{issuer}/introspect",
        "status_list_aggregation_endpoint": f"{issuer}/status-lists",
        "grant_types_supported": list(offered_grants(runtime)),
        "response_types_supported": [],
        "scopes_supported": list(runtime.offered_scopes.names),
        "token_endpoint_auth_methods_supported": ["none", *_BY_SECRET],
        "revocation_endpoint_auth_methods_supported": ["none", *_BY_SECRET],
        "introspection_endpoint_auth_methods_supported": _BY_SECRET,
        **({"service_documentation": f"{issuer}/docs"} if described else {}),
    }
    return JSONResponse(body, headers={"Cache-Control": f"public, max-age={_MAX_AGE}", **FOR_EVERYONE})


@router.get("/", response_model=Root)
@public
def root(request: Request) -> JSONResponse:
    """Where to go from here."""
    settings = runtime_of(request).settings
    issuer = settings.issuer_url
    return JSONResponse(
        {
            "issuer": issuer,
            "jwks_uri": f"{issuer}/.well-known/jwks.json",
            "metadata": f"{issuer}/.well-known/oauth-authorization-server",
            **({"docs": f"{issuer}/docs"} if settings.docs == "on" else {}),
        }
    )


def not_modified(request: Request, etag: str) -> bool:
    """Compare validators as RFC 9110 13.1.2 says: any of the list, weakly."""
    if b"if-none-match" not in request.scope["identity.headers"]:
        return False
    lines = ",".join(request.headers.getlist("if-none-match"))  # one list, in however many lines (RFC 9110 5.3)
    given = [value.strip().removeprefix("W/") for value in lines.split(",")]
    return etag in given or given == ["*"]
