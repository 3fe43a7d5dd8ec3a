"""`audit`: what happened, who did it, and whether the record is whole."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from identity_service import audit
from identity_service.accounts import registration
from identity_service.audit import Event, chain
from identity_service.audit import store as events
from identity_service.audit.chain import Verification
from identity_service.audit.events import EventFilter, RecordedEvent
from identity_service.cli.environment import load_settings, operator, with_database
from identity_service.cli.output import AsJson, counted, new_file, print_json
from identity_service.database import Connection, Database
from identity_service.errors import ConfigurationError
from identity_service.ids import read_uuid
from identity_service.settings import Settings
from identity_service.shell import utc_now

app = typer.Typer(no_args_is_help=True, help="What happened.")
Moment = Annotated[datetime | None, typer.Option(help="In UTC, such as 2026-11-22T08:00:00.")]
FOLLOW_SECONDS = 1.0
_LOOK_BACK = 1000
"""How many of the newest events are looked at again: they become visible when they are committed, which is not the
order of their ids."""

T = TypeVar("T")


@app.command()
def tail(
    *,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=0, max=100_000, help="How many of the newest events.")
    ] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on, until Ctrl-C.")] = False,
    event: Annotated[
        Event | None, typer.Option(help="Only events of this name, such as user.login.", show_choices=False)
    ] = None,
    user: Annotated[
        str | None, typer.Option(help="Only what was done to this user: a username, or the id of anybody ever.")
    ] = None,
    actor: Annotated[
        str | None,
        typer.Option(help="Only what was done by this: a user's or client's id, or an operator's account."),
    ] = None,
    since: Moment = None,
    until: Moment = None,
    as_json: AsJson = False,
) -> None:
    """Show the newest events, the newest last."""

    async def work(db: Database, _: Any) -> None:
        async with db.connection() as connection:
            wanted = EventFilter(
                event=event,
                subject_id=await _user_id(connection, user) if user is not None else None,
                actor_id=actor,
                since=_utc(since),
                until=_utc(until),
            )
            latest = await audit.list_events(connection, wanted, limit=max(lines, _LOOK_BACK))
        found = latest[:lines][::-1]
        if not follow:
            _show(found, as_json=as_json)
            return
        for recorded in found:
            _show_one(recorded, as_json=as_json)
        while True:
            seen = {recorded.id for recorded in latest}
            looked_at = latest[_LOOK_BACK - 1].id if len(latest) >= _LOOK_BACK else 0
            await asyncio.sleep(FOLLOW_SECONDS)
            async with db.connection() as connection:
                latest = await _newest(connection, wanted, down_to=looked_at)
            for recorded in latest[::-1]:
                if recorded.id not in seen:
                    _show_one(recorded, as_json=as_json)

    try:
        with_database(load_settings(), work)
    except KeyboardInterrupt:
        return


async def _newest(db: Connection, wanted: EventFilter, *, down_to: int) -> list[RecordedEvent]:
    """Return the events from that id on, however many there are, newest first."""
    found: list[RecordedEvent] = []
    before = None
    while page := await audit.list_events(db, wanted, before_id=before, limit=_LOOK_BACK):
        found += [recorded for recorded in page if recorded.id >= down_to]
        before = page[-1].id
        if before <= down_to or len(page) < _LOOK_BACK:
            break
    return found


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="A new file; - for standard output.")] = Path("-"),
    *,
    since: Moment = None,
    until: Moment = None,
    _as_json: Annotated[bool, typer.Option("--json", help="Write JSON, as it does without.")] = False,
) -> None:
    """Write events as JSON, one object a line, the oldest first. The export itself is recorded."""
    wanted = EventFilter(since=_utc(since), until=_utc(until))

    async def work(db: Database, _: Settings) -> int:
        count = 0
        with new_file(file) as out:
            async with db.connection() as connection, connection.transaction(isolation="repeatable_read"):
                await connection.execute("SELECT")  # it sees this moment, which is before the record of itself
                # Committed first: whoever reads along has what was written, however the command ends.
                by, now = operator(), utc_now()
                await db.transact(lambda own: audit.record(own, Event.AUDIT_EXPORTED, None, by=by, now=now))
                async for recorded in events.iterate(connection, wanted):
                    out.write(json.dumps(_facts(recorded)).encode() + b"\n")
                    count += 1
        return count

    count = with_database(load_settings(), work)
    print(f"{counted(count, 'event')}.", file=sys.stderr)


@app.command()
def verify(
    *,
    expect: Annotated[
        str | None, typer.Option(metavar="POSITION:HASH", help="What an earlier look reported as the chain's end.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that no recorded event was changed, removed or put in between. Exits with 1 when one was."""
    expected = _position_and_hash(expect) if expect is not None else None
    found = _within_one_moment(lambda db: chain.verify(db, now=utc_now(), expected=expected))
    if as_json:
        print_json(asdict(found) | {"hash": found.hash.hex(), "whole": not found.problems})
    else:
        _report(found)
    if found.problems:
        sys.exit(1)


def _report(found: Verification) -> None:
    for problem in found.problems:
        print(problem)
    if not found.problems:
        print(f"The chain is whole: {counted(found.events, 'event')}.")
    if found.dropped:
        print(f"Retention has dropped events up to position {found.dropped}.")
    if found.unchained:
        print(f"Not in the chain yet: {counted(found.unchained, 'event')}; a running service links them.")
    print(f"It ends at {found.position}:{found.hash.hex()}")


def _within_one_moment(unit: Callable[[Connection], Awaitable[T]]) -> T:
    """Do what may take long in one transaction that sees one moment."""

    async def work(db: Database, _: Any) -> T:
        async with db.connection() as connection, connection.transaction(isolation="repeatable_read"):
            return await unit(connection)

    return with_database(load_settings(), work)


async def _user_id(db: Connection, unverified_name: str) -> str:
    """Return an id as it is, since its user may be deleted, or the id of whoever has this username."""
    user_id = read_uuid(unverified_name)
    return str(user_id or (await registration.find_named(db, unverified_name)).id)


def _position_and_hash(text: str) -> tuple[int, bytes]:
    position, _, digest = text.partition(":")
    try:
        return int(position), bytes.fromhex(digest)
    except ValueError:
        raise ConfigurationError("--expect takes POSITION:HASH, as `audit verify` prints it.") from None


def _utc(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment is not None else None


def _facts(recorded: RecordedEvent) -> dict[str, Any]:
    return asdict(recorded) | {
        "occurred_at": recorded.occurred_at.isoformat(),
        "session_id": str(recorded.session_id) if recorded.session_id is not None else None,
    }


def _show(found: list[RecordedEvent], *, as_json: bool) -> None:
    if as_json:
        print_json([_facts(recorded) for recorded in found])
        return
    for recorded in found:
        _show_one(recorded, as_json=False)


def _show_one(recorded: RecordedEvent, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_facts(recorded)), flush=True)
        return
    who = f"{recorded.actor_kind} {recorded.actor_id or ''}".strip()
    whom = f" -> {recorded.subject_kind} {recorded.subject_id}" if recorded.subject_id is not None else ""
    outcome = "" if recorded.outcome == "success" else f" {recorded.outcome.upper()}"
    reason = f" ({recorded.reason})" if recorded.reason else ""
    where = f" from {recorded.address}" if recorded.address else ""
    details = f" {json.dumps(recorded.details, separators=(',', ':'), ensure_ascii=False)}" if recorded.details else ""
    at = recorded.occurred_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
    line = f"{at}  {recorded.event:28}{outcome}{reason}  {who}{whom}{where}{details}"
    # No name looks like another line, or moves the cursor.
    print("".join(each if each.isprintable() else f"\\u{ord(each):04x}" for each in line), flush=True)
