"""`/status-lists`: which tokens were revoked, as signed lists anyone can poll and as events anyone can follow.

Neither names a user. Rendering is the business of `revocation`.
"""

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from ipaddress import ip_address

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from identity_service import errors
from identity_service.errors import DatabaseUnavailable, TooManyFollowers
from identity_service.revocation import RevokedIndex
from identity_service.revocation.feed import Batch, News, RevocationFeed
from identity_service.revocation.status_lists import TIME_TO_LIVE, StatusLists
from identity_service.runtime import Runtime
from identity_service.throttling import prefix
from identity_service.web.dependencies import public, runtime_of
from identity_service.web.metadata import FOR_EVERYONE, NOT_MODIFIED, not_modified
from identity_service.web.problems import BadRequest, Router, refusals

router = Router(tags=["Status lists"])

HEARTBEAT_SECONDS = 10.0
STREAM_SECONDS = (600.0, 900.0)
"""How long a stream lasts at least and at most. Then it has to ask for its place again, like everybody else."""

TURNED_AWAY_SECONDS = 30
REPLAY_BATCH = 100
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)
_EVENT_ID = re.compile(r"[0-9]{1,17}", re.ASCII)
_CACHING = f"public, max-age={int(TIME_TO_LIVE.total_seconds())}"


class StatusListUris(BaseModel):
    status_lists: list[str]


@router.get("/status-lists", response_model=StatusListUris, responses=refusals(errors.DatabaseUnavailable))
@public
async def lists(request: Request) -> JSONResponse:
    """The lists that tokens may name today."""
    runtime = runtime_of(request)
    feed = _current(runtime)
    uris = [runtime.status_lists.uri(number) for number in range(feed.first_list, feed.last_list + 1)]
    return JSONResponse({"status_lists": uris}, headers={"Cache-Control": _CACHING, **FOR_EVERYONE})


@router.get(
    "/status-lists/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}, **refusals(errors.Unavailable)},
)
@public
async def events(request: Request) -> StreamingResponse:
    """Every revocation as it happens, as server-sent events.

    `Last-Event-ID` resumes where a stream ended, but replays no more than a thousand events and nothing when there were
    more: fetch the lists again after every connection. `event: keys` says that the JWKS has changed before anybody's
    copy of it is too old. A stream ends after ten to fifteen minutes; open the next one at once.
    """
    runtime = runtime_of(request)
    feed = _current(runtime)
    origin = _origin(request.scope["identity.address"])
    if not feed.has_room(origin):
        raise TooManyFollowers(detail=f"of all, or from {origin}", retry_after=TURNED_AWAY_SECONDS)
    since = _moment(request.headers.get("last-event-id", ""))
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", **FOR_EVERYONE}
    # HEAD has no body, so there is nothing to wait for.
    told = iter(()) if request.scope["identity.method"] == "HEAD" else _events(runtime, since, origin)
    return StreamingResponse(told, media_type="text/event-stream", headers=headers)


@router.get(
    "/status-lists/{number}",
    response_class=Response,
    responses={
        200: {"content": {"application/statuslist+jwt": {"schema": {"type": "string"}}}},
        **NOT_MODIFIED,
        # The framework promises a 422 of its own shape for every parameter unless there is one.
        **refusals("time_not_supported", "not_found", "validation_failed", errors.Unavailable),
    },
)
@public
async def status_list(request: Request, number: str) -> Response:
    """One list as a signed token (draft-ietf-oauth-status-list 5)."""
    runtime = runtime_of(request)
    if "time" in request.query_params:
        raise BadRequest(400, "time_not_supported", "Lists of the past are not kept.")
    # The next list is there before the first session gets an index in it, on whichever replica that is.
    if not _NUMBER.fullmatch(number) or int(number) > runtime.revocations.last_list + 1:
        raise BadRequest(404, "not_found", "There is no such status list.")
    document = await runtime.status_lists.document(int(number), runtime.now())
    headers = {"Cache-Control": _CACHING, "ETag": document.etag, **FOR_EVERYONE}
    if not_modified(request, document.etag):
        return Response(status_code=304, headers=headers)
    return Response(document.body, headers=headers, media_type="application/statuslist+jwt")


def _current(runtime: Runtime) -> RevocationFeed:
    """Return what has been revoked, if that is known at the moment.

    Raises:
        DatabaseUnavailable: it cannot be read.
    """
    if not runtime.revocations.is_current:
        raise DatabaseUnavailable(detail="what has been revoked cannot be read")
    return runtime.revocations


async def _events(runtime: Runtime, since: datetime | None, origin: str | None) -> AsyncIterator[str]:
    """Speak for as long as we know what there is to say, and the stream's time has not come."""
    feed, clock = runtime.revocations, asyncio.get_running_loop().time
    # Spread out, so that those who came together after a restart do not come together again.
    ends_at = clock() + random.uniform(*STREAM_SECONDS)  # noqa: S311 - it spreads, it hides nothing
    with feed.follow(origin) as follower:
        # At one moment: whatever is not in these is told below. The id comes after what it stands for, so that whoever
        # breaks off in between does not skip the rest.
        newest_at, missed = feed.newest_at, feed.recorded_since(since) if since is not None else []
        for start in range(0, len(missed), REPLAY_BATCH):
            yield "".join(_event(runtime.status_lists, revoked) for revoked in missed[start : start + REPLAY_BATCH])
            await asyncio.sleep(0)  # writing to a fast reader waits for nothing, and others have to be served
        yield f": follow\nid: {_event_id(newest_at or _EPOCH)}\n\n"
        while feed.is_current and (left := ends_at - clock()) > 0:
            try:
                news = await follower.next(within=min(HEARTBEAT_SECONDS, left))
            except TimeoutError:
                yield ": still here\n\n"
                continue
            if news is News.END:
                return
            yield "event: keys\ndata: {}\n\n" if isinstance(news, News) else _text(runtime.status_lists, news)
            await asyncio.sleep(0)  # as above


@lru_cache(maxsize=16)
def _text(status_lists: StatusLists, batch: Batch) -> str:
    """Write the events of a batch once for all who follow."""
    return "".join(_event(status_lists, revoked) for revoked in batch.revoked)


@lru_cache(maxsize=1024)
def _event(status_lists: StatusLists, revoked: RevokedIndex) -> str:
    """Write an event once for all to whom it is told."""
    reference = status_lists.reference(revoked.status_index)
    data = {"uri": reference.uri, "idx": reference.idx, "exp": int(revoked.expires_at.timestamp())}
    number = _event_id(revoked.recorded_at)
    return f"event: revoked\nid: {number}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


def _event_id(recorded_at: datetime) -> int:
    """Return the microseconds since 1970: an id that means the same on every replica."""
    return (recorded_at - _EPOCH) // timedelta(microseconds=1)


def _moment(event_id: str) -> datetime | None:
    """Return when the event with this id was recorded, None for what is no id of ours."""
    return _EPOCH + timedelta(microseconds=int(event_id)) if _EVENT_ID.fullmatch(event_id) else None


def _origin(address: str | None) -> str | None:
    """Return what a client's streams are counted by, None for one that may be a proxy with everybody behind it."""
    return prefix(address) if address is not None and ip_address(address).is_global else None
