"""A person's own sessions: where they are logged in, and logging out there. Logging in is next door in `login`."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Query, Request
from pydantic import BaseModel

from identity_service import errors
from identity_service.errors import SessionNotFound
from identity_service.revocation import Reason
from identity_service.sessions import SessionSummary, lifecycle
from identity_service.web import paging
from identity_service.web.dependencies import Caller, SignedIn, runtime_of
from identity_service.web.paging import Listing, Page, PathId
from identity_service.web.problems import SIGNED_IN, Router, refusals

router = Router(prefix="/users/me/sessions", tags=["Account"])


async def read_session_id(session_id: PathId) -> UUID:
    """Return the id of the path.

    Raises:
        SessionNotFound: it is none.
    """
    return paging.read_id(session_id, SessionNotFound)


SessionId = Annotated[UUID, Depends(read_session_id)]


class SessionAnswer(BaseModel):
    """`address` and `user_agent` are of the login, `last_used_at` is the last refresh; it ends at `expires_at` or,
    left alone, before.
    """

    id: UUID
    current: bool
    client_id: str
    user_agent: str | None
    address: str | None
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime


@router.get("", responses=refusals(*SIGNED_IN, "validation_failed", errors.CursorRejected))
async def list_my_sessions(
    request: Request, caller: SignedIn, page: Annotated[Page, Query()]
) -> Listing[SessionAnswer]:
    """Where the caller is logged in: this session first, then those used last."""
    return await list_sessions(request, caller, page, caller.user.id)


@router.delete(
    "/{session_id}", status_code=204, responses=refusals(*SIGNED_IN, "validation_failed", errors.SessionNotFound)
)
async def end_my_session(request: Request, caller: SignedIn, session_id: SessionId) -> None:
    """Log out in one place."""
    await end_session(request, caller, session_id, owner=caller.user.id)


@router.delete("", status_code=204, responses=refusals(*SIGNED_IN))
async def end_my_other_sessions(request: Request, caller: SignedIn) -> None:
    """Log out everywhere else. This session goes on."""
    await runtime_of(request).database.transact(
        lambda db: lifecycle.end_all(
            db, caller.user.id, keep=caller.claims.session_id, reason=Reason.REVOKED, by=caller.actor, now=caller.now
        )
    )


async def list_sessions(request: Request, caller: Caller, page: Page, user_id: UUID) -> Listing[SessionAnswer]:
    """Return a page of somebody's sessions that are not over."""
    runtime = runtime_of(request)
    begin = paging.position(request, caller, page)
    async with runtime.database.connection() as db:
        found = await lifecycle.list_live(
            db,
            user_id,
            current=caller.claims.session_id,
            after=_read_position(begin) if begin is not None else None,
            limit=page.limit + 1,
            now=caller.now,
            idle=runtime.settings.refresh_lifetime,
        )

    def show(session: SessionSummary) -> SessionAnswer:
        return SessionAnswer(
            id=session.id,
            current=session.id == caller.claims.session_id,
            client_id=session.client_id,
            user_agent=session.user_agent,
            address=session.address,
            created_at=session.created_at,
            last_used_at=session.last_used_at,
            expires_at=session.expires_at,
        )

    def position_of(session: SessionSummary) -> str:
        current = "current" if session.id == caller.claims.session_id else "other"
        return f"{current} {session.last_used_at.isoformat()} {session.id}"

    return paging.listing(request, caller, page, found, show=show, position_of=position_of)


async def end_session(request: Request, caller: Caller, session_id: UUID, *, owner: UUID | None = None) -> None:
    """End a session.

    Raises:
        SessionNotFound: it has ended already, is not the owner's, or never was.
    """
    ended = await runtime_of(request).database.transact(
        lambda db: lifecycle.end(db, session_id, owner=owner, reason=Reason.REVOKED, by=caller.actor, now=caller.now)
    )
    if not ended:
        raise SessionNotFound


def _read_position(position: str) -> tuple[bool, datetime, UUID]:
    current, last_used_at, session_id = position.split(" ")
    return current == "current", datetime.fromisoformat(last_used_at), UUID(session_id)
