"""Services of somebody else's, which verify tokens by themselves: one program, forked into a process for each.

python downstream.py ISSUER PORT,CACHE_SIZE,HURRY ...

HURRY divides the times for which keys are held and unknown ones are not asked for; 1 leaves them as they are.
"""

import multiprocessing
import signal
import sys
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI

from identity_service.verifier import Claims, Verifier, keys
from identity_service.verifier.fastapi import Bearer


def make_app(issuer: str, cache_size: int) -> FastAPI:
    auth = Bearer(Verifier(issuer, audience="api", cache_size=cache_size))
    app = FastAPI(openapi_url=None)

    @app.get("/")
    async def whoami(caller: Annotated[Claims, Depends(auth)]) -> dict[str, str]:
        return {"subject": caller.subject}

    @app.get("/readyz")
    async def readyz() -> dict[str, Any]:
        return {"stream_connected": auth.verifier.status().stream_connected}

    return app


def serve(issuer: str, port: str, cache_size: str, hurry: str) -> None:
    factor = float(hurry)
    keys.MAX_LIFETIME = keys.DEFAULT_LIFETIME / factor  # what the issuer asks for, and no more
    keys.MIN_LIFETIME /= factor
    keys.COOLDOWN /= factor
    uvicorn.run(make_app(issuer, int(cache_size)), port=int(port), log_level="warning", access_log=False)


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    for place in sys.argv[2:]:
        fork.Process(target=serve, args=(sys.argv[1], *place.split(",")), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    while True:
        signal.pause()
