"""Whether the process turns (`/health`, `/livez`), and whether it should be sent requests (`/readyz`)."""

import asyncio
from typing import Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from identity_service.database import SCHEMA_HEAD
from identity_service.errors import DatabaseUnavailable, KeysUnavailable
from identity_service.runtime import Runtime
from identity_service.signing.keyring import CLOCK_SKEW
from identity_service.web.dependencies import public, runtime_of
from identity_service.web.problems import Router

router = Router(tags=["Health"])

PING_SECONDS = 1.0


@router.get("/health", name="health")
@router.get("/livez", name="alive")
@public
async def alive() -> dict[str, str]:
    """Says ok as long as the event loop turns, whatever else is broken."""
    return {"status": "ok"}


class Readiness(BaseModel):
    status: Literal["ok", "unavailable"]
    missing: list[Literal["database", "schema", "clock", "keys", "draining"]]


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness, "description": "Not ready"}})
@public
async def ready(request: Request) -> JSONResponse:
    """Says ok when requests can be answered, else 503 and what is missing.

    `database`, `schema`, `keys`; `clock` when ours and the database's differ by more than a minute; `draining`.
    """
    missing = await _missing(runtime_of(request))
    if request.app.state.draining:
        missing.append("draining")
    if missing:
        return JSONResponse({"status": "unavailable", "missing": missing}, 503, {"Retry-After": "2"})
    return JSONResponse({"status": "ok", "missing": []})


async def _missing(runtime: Runtime) -> list[str]:
    missing = []
    looking = asyncio.create_task(_look(runtime))
    # Not `wait_for`: it would wait for a hung server to take note that nobody wants its answer any more.
    done, _ = await asyncio.wait({looking}, timeout=PING_SECONDS)
    looking.cancel()
    missing += looking.result() if done else ["database"]
    if not missing and not runtime.revocations.is_current:  # a table that cannot be read, say
        missing.append("database")
    try:
        runtime.keys.current.signer(runtime.now())
        if runtime.keys.is_lost:
            missing.append("keys")
    except KeysUnavailable:
        missing.append("keys")
    return missing


async def _look(runtime: Runtime) -> list[str]:
    """Return what of the database is missing, or differs from what this release needs."""
    try:
        revision = await runtime.database.schema_revision()
        server = await runtime.database.server()
    except DatabaseUnavailable:
        return ["database"]
    if server.read_only:
        return ["database"]
    # A newer schema serves this release too: migrations expand before they contract.
    if revision is None or revision < SCHEMA_HEAD:
        return ["schema"]
    return ["clock"] if abs(runtime.now() - server.now) > CLOCK_SKEW else []
