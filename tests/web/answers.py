"""Whole answers in one comparison: `assert seen(answer) == problem(403, "signup_closed", "...")`."""

from http import HTTPStatus
from typing import Any

import httpx2

Seen = tuple[int, str, dict[str, Any]]


def problem(status: int, code: str, detail: str, **more: Any) -> Seen:
    """Return the problem document (RFC 9457) that is expected, all of it but the request id."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "code": code, "detail": detail}
    return status, "application/problem+json", body | more


def seen(answer: httpx2.Response) -> Seen:
    """Return the problem document that came, without its request id if that is the one of the X-Request-ID header."""
    body = answer.json()
    if body.get("request_id") == answer.headers["x-request-id"]:
        del body["request_id"]
    return answer.status_code, answer.headers["content-type"], body


ENDLESS = "/status-lists/events"
"""A client in memory waits for the end of an answer, and here it would for ever: ask with HEAD."""
