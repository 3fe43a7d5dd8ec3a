"""`/docs`: Swagger UI from our own origin, without inline scripts, so that a strict content policy holds."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse, HTMLResponse

from identity_service.web.dependencies import public
from identity_service.web.problems import Router

router = Router(include_in_schema=False)

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Identity service: API</title>
<link rel="stylesheet" href="/docs/swagger-ui.css">
<link rel="icon" href="data:,">
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</html>
"""
# Swagger UI writes style attributes; everything else comes from this origin.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_START = """const ui = SwaggerUIBundle({
  url: "/openapi.json", dom_id: "#swagger-ui", deepLinking: true, persistAuthorization: false,
});
ui.initOAuth({clientId: "first-party"});
"""
_ASSETS = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}


def describe_no_login(app: FastAPI) -> None:
    """Where nobody may log in at `/token`, have *Authorize* ask for a token that one has."""
    describe = app.openapi

    def described() -> dict[str, Any]:
        description = describe()
        schemes = description["components"]["securitySchemes"]
        description["components"]["securitySchemes"] = {name: {"type": "http", "scheme": "bearer"} for name in schemes}
        return description

    app.openapi = described  # type: ignore[method-assign]


@router.get("/docs")
@public
async def page() -> HTMLResponse:
    return HTMLResponse(
        _PAGE, headers={"Content-Security-Policy": _POLICY, "Cross-Origin-Opener-Policy": "same-origin"}
    )


@router.get("/docs/start.js")
@public
async def start() -> Response:
    return Response(_START, media_type="text/javascript")


@router.get("/docs/swagger-ui.css")
@public
async def stylesheet() -> FileResponse:
    return _asset("swagger-ui.css")


@router.get("/docs/swagger-ui-bundle.js")
@public
async def script() -> FileResponse:
    return _asset("swagger-ui-bundle.js")


def _asset(name: str) -> FileResponse:
    """Serve a file that the `fastapi-offline` package ships."""
    spec = find_spec("fastapi_offline")
    assert spec is not None, "fastapi-offline is a dependency of the server"
    assert spec.origin is not None, "it is a package with a file"
    path = Path(spec.origin).with_name("static") / name
    return FileResponse(path, media_type=_ASSETS[name], headers={"Cache-Control": "public, max-age=86400"})
