"""The least that ASGI can do: answer everything with one document. `BENCH_DOCUMENT` names its file."""

import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

_BODY = Path(os.environ["BENCH_DOCUMENT"]).read_bytes()
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(_BODY)).encode())]


async def app(
    scope: dict[str, Any], _receive: object, send: Callable[[MutableMapping[str, Any]], Awaitable[None]]
) -> None:
    assert scope["type"] == "http", "uvicorn is told that there is no lifespan"
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": _BODY})
