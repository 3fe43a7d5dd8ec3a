"""Whether the process turns (`/health`, `/livez`), and whether it should be sent requests (`/readyz`)."""

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from identity_service.database import SCHEMA_HEAD
from identity_service.errors import DatabaseUnavailable, KeysUnavailable
from identity_service.runtime import Runtime
from identity_service.web.dependencies import public, runtime_of

router = APIRouter(tags=["Health"])

PING_SECONDS = 1.0


@router.get("/health")
@router.get("/livez")
@public
async def alive() -> dict[str, str]:
    """Says ok as long as the event loop turns, whatever else is broken."""
    return {"status": "ok"}


@router.get("/readyz")
@public
async def ready(request: Request) -> JSONResponse:
    """Says ok when requests can be answered, else 503 and what is missing: database, schema, keys, draining."""
    missing = await _missing(runtime_of(request))
    if request.app.state.draining:
        missing.append("draining")
    if missing:
        return JSONResponse({"status": "unavailable", "missing": missing}, 503, {"Retry-After": "2"})
    return JSONResponse({"status": "ok", "missing": []})


async def _missing(runtime: Runtime) -> list[str]:
    missing = []
    try:
        revision = await asyncio.wait_for(runtime.database.schema_revision(), PING_SECONDS)
        # A newer schema serves this release too: migrations expand before they contract.
        if revision is None or revision < SCHEMA_HEAD:
            missing.append("schema")
    except (DatabaseUnavailable, TimeoutError):
        missing.append("database")
    try:
        runtime.keys.current.signer(runtime.now())
    except KeysUnavailable:
        missing.append("keys")
    return missing
