"""`healthcheck`: asks the service on this machine whether it is ready, for images without curl."""

import http.client
import sys
from typing import Annotated

import typer

from identity_service.settings import load

TIMEOUT_SECONDS = 3
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound


def healthcheck(
    *, _as_json: Annotated[bool, typer.Option("--json", help="Print JSON, as it does without.")] = False
) -> None:
    """Exit 0 when the service at IDENTITY_BIND answers that it is ready, 1 otherwise."""
    settings = load().settings
    connection = http.client.HTTPConnection(
        _EVERYWHERE.get(settings.host, settings.host), settings.port, timeout=TIMEOUT_SECONDS
    )
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        body = answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        print(f"identity-service: nothing answers at {settings.bind} ({error}).", file=sys.stderr)
        raise typer.Exit(1) from None
    finally:
        connection.close()
    print(body)
    if answer.status != 200:
        raise typer.Exit(1)
