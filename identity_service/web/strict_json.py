"""Reading JSON bodies strictly: only `application/json`, no repeated members, no control characters.

Starlette's reader takes the last of repeated members, passes NUL on to Postgres and fails on lone surrogates; each of
them would end as a 500 or as two readings of one request.
"""

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from identity_service.verifier.jws import each_once, refuse_constant
from identity_service.web.dependencies import administrator, signed_in
from identity_service.web.problems import JSON_BODY, BadRequest

# One anchored pattern: the standard library's parser takes time that grows with the square of what it is given.
_JSON = re.compile(r"\s*application/json\s*(;\s*charset=\"?utf-?8\"?\s*)?", re.IGNORECASE | re.ASCII)
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class StrictRequest(Request):
    """A request whose `json()` refuses what a careful reader should."""

    async def json(self) -> Any:
        body = await self.body()
        try:
            value = json.loads(body.decode(), object_pairs_hook=each_once, parse_constant=refuse_constant)
            _refuse_controls(value)  # from Python 3.12 on, what it takes may be nested deeper than we can follow
        except (ValueError, RecursionError):
            raise BadRequest(400, "malformed_json", "The body is not valid JSON in UTF-8.") from None
        return value


class StrictRoute(APIRoute):
    """A route that reads its body as `StrictRequest` does, and answers 415 to any other media type.

    Where the body may be left out, nothing at all is fine too. Who may not ask is refused before the body is judged.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        required, guards = self.body_field.field_info.is_required(), _calls(self.dependant)

        async def handle_strictly(request: Request) -> Response:
            try:
                if required or "content-type" in request.headers or _has_body(request):
                    require_json(request)
                return await handle(StrictRequest(request.scope, request.receive))
            except BadRequest as refusal:
                # The framework reads the body before it asks the guards.
                if refusal.code in JSON_BODY and signed_in in guards:
                    caller = await signed_in(request, None)
                    if administrator in guards:
                        await administrator(caller)
                raise

        return handle_strictly


def _calls(dependant: Dependant) -> set[object]:
    """Return everything that a route depends on."""
    return {dependant.call}.union(*map(_calls, dependant.dependencies))


def _has_body(request: Request) -> bool:
    return request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers


def require_json(request: Request) -> None:
    """Refuse a request that a form on another site could have sent without asking (CSRF).

    Raises:
        BadRequest: 415.
    """
    if not _JSON.fullmatch(request.headers.get("content-type", "")):
        raise BadRequest(415, "unsupported_media_type", "Send the body as application/json in UTF-8.")


def _refuse_controls(value: Any) -> None:
    if isinstance(value, str):
        if CONTROLS.search(value):
            raise BadRequest(422, "validation_failed", "Text must not contain control characters or lone surrogates.")
    elif isinstance(value, dict):
        for name, member in value.items():
            _refuse_controls(name)
            _refuse_controls(member)
    elif isinstance(value, list):
        for item in value:
            _refuse_controls(item)
