"""Reading the record of what happened. Exporting it and checking its chain is left to the command line."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import Query, Request
from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, Field

from identity_service import audit, errors
from identity_service.audit import Event
from identity_service.audit.events import EventFilter, RecordedEvent
from identity_service.web import paging
from identity_service.web.dependencies import Administrator, runtime_of
from identity_service.web.paging import Listing, Page, Text
from identity_service.web.problems import ADMINISTERED, Router, refusals

router = Router(prefix="/admin/audit-events", tags=["Administration: audit"])


def _within_reach(moment: datetime) -> datetime:
    """Refuse moments that some time zone cannot write."""
    if not 1970 <= moment.year < 9999:
        raise ValueError("the year must be between 1970 and 9998")
    return moment


def _with_a_date(value: object) -> object:
    """Refuse plain numbers, whose unit would be guessed."""
    if isinstance(value, str) and "-" not in value:
        raise ValueError("must be a moment such as 2026-11-22T08:00:00Z")
    return value


Moment = Annotated[
    AwareDatetime,
    BeforeValidator(_with_a_date),
    AfterValidator(_within_reach),
    Field(examples=["2026-11-22T08:00:00Z"]),
]


class EventPage(Page):
    """All of what is given must match; `until` itself is not included."""

    event: Event | None = None
    outcome: Literal["success", "failure"] | None = None
    subject_id: Text | None = None
    actor_id: Text | None = None
    client_id: Text | None = None
    since: Moment | None = None
    until: Moment | None = None


class EventAnswer(BaseModel):
    """`position` is its place in the chain; a new event gets it within seconds."""

    id: int
    occurred_at: datetime
    event: str
    outcome: str
    reason: str | None
    actor_kind: str
    actor_id: str | None
    subject_kind: str | None
    subject_id: str | None
    client_id: str | None
    session_id: UUID | None
    address: str | None
    user_agent: str | None
    request_id: str | None
    details: Mapping[str, Any]
    position: int | None


@router.get("", responses=refusals(*ADMINISTERED, errors.CursorRejected))
async def list_events(
    request: Request, caller: Administrator, page: Annotated[EventPage, Query()]
) -> Listing[EventAnswer]:
    """What happened, the newest first."""
    before = paging.position(request, caller, page)
    wanted = EventFilter(
        event=page.event,
        outcome=page.outcome,
        subject_id=page.subject_id,
        actor_id=page.actor_id,
        client_id=page.client_id,
        since=page.since,
        until=page.until,
    )
    async with runtime_of(request).database.connection() as db:
        found = await audit.list_events(
            db, wanted, before_id=int(before) if before is not None else None, limit=page.limit + 1
        )
    return paging.listing(request, caller, page, found, show=_show, position_of=lambda event: str(event.id))


def _show(event: RecordedEvent) -> EventAnswer:
    return EventAnswer(**asdict(event))
