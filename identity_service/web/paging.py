"""Lists in pages, `{"items": [...], "next_cursor": ...}`, and what else the routes of people and administrators share.

`tokens.cursors` writes the cursors.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Generic, TypeVar
from uuid import UUID

from fastapi import Path, Request
from pydantic import BaseModel, ConfigDict, Field

from identity_service.errors import IdentityError
from identity_service.ids import read_uuid
from identity_service.tokens import cursors
from identity_service.web.dependencies import Caller, runtime_of

Item = TypeVar("Item")
Answer = TypeVar("Answer")

Text = Annotated[str, Field(max_length=320, pattern=r"^[^\u0000-\u001f\u007f-\u009f]*$")]
"""A parameter of a query: Postgres cannot hold NUL."""

PathId = Annotated[str, Path(examples=["019e8f5c-3e80-7c2b-8f1d-5b7a2c9d4e10"], json_schema_extra={"format": "uuid"})]
"""An id in a path, not read yet: see `read_id`."""

Scopes = Annotated[
    list[Annotated[str, Field(pattern=r"^[!#-\[\]-~]{1,128}$")]],
    Field(max_length=64, examples=[["orders:read", "orders:write"]]),
]
"""Scopes as an array (scope-token of RFC 6749 3.3)."""


class Page(BaseModel):
    """What every list takes. Its own filters are added by inheriting; another parameter is refused."""

    model_config = ConfigDict(extra="forbid")

    limit: Annotated[int, Field(ge=1, le=200, description="How many items at most.")] = 50
    cursor: Annotated[
        str | None, Field(max_length=4096, description="The `next_cursor` of the page before; good for a day.")
    ] = None


class Whole(BaseModel):
    """What a list takes that has no filters and comes on one page: nothing, and another parameter is refused."""

    model_config = ConfigDict(extra="forbid")


class Listing(BaseModel, Generic[Answer]):
    """A page of a list. `next_cursor` is null on the last one."""

    items: list[Answer]
    next_cursor: str | None = None


def position(request: Request, caller: Caller, page: Page) -> str | None:
    """Return where the page begins, None for the first one.

    Raises:
        CursorRejected: the cursor was not handed out to this caller for this list with these filters.
    """
    if page.cursor is None:
        return None
    runtime = runtime_of(request)
    return cursors.read(
        page.cursor,
        runtime.keys.current,
        listed=_listed(request, page),
        issuer=runtime.settings.issuer_url,
        user_id=caller.user.id,
        now=caller.now,
    )


def listing(
    request: Request,
    caller: Caller,
    page: Page,
    found: Sequence[Item],
    *,
    show: Callable[[Item], Answer],
    position_of: Callable[[Item], str],
) -> Listing[Answer]:
    """Return the page.

    Args:
        found: the items of the page, and one more if there is one.
    """
    shown = found[: page.limit]
    next_cursor = None
    if len(found) > page.limit:
        runtime = runtime_of(request)
        next_cursor = cursors.mint(
            runtime.keys.current.signer(caller.now),
            position_of(shown[-1]),
            listed=_listed(request, page),
            issuer=runtime.settings.issuer_url,
            user_id=caller.user.id,
            now=caller.now,
        )
    return Listing(items=[show(item) for item in shown], next_cursor=next_cursor)


def read_id(unverified_id: str, missing: type[IdentityError]) -> UUID:
    """Return an id of a path in its one spelling; whatever else stands there names nothing.

    Raises:
        IdentityError: `missing`.
    """
    found = read_uuid(unverified_id)
    if found is None:
        raise missing
    return found


def _listed(request: Request, page: Page) -> str:
    """Return the list with its filters. How many items a page has may change on the way."""
    filters = page.model_dump(mode="json", exclude={"limit", "cursor"})
    return hashlib.sha256(json.dumps([request.url.path, filters], sort_keys=True).encode()).hexdigest()
