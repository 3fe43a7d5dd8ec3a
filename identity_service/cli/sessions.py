"""`sessions`: where users are logged in, and logging them out."""

from typing import Any
from uuid import UUID

import typer

from identity_service.accounts import registration
from identity_service.cli.environment import load_settings, operator, transact, with_database
from identity_service.cli.output import AsJson, counted, print_json
from identity_service.database import Connection, Database
from identity_service.errors import SessionNotFound
from identity_service.ids import read_uuid
from identity_service.revocation import Reason
from identity_service.sessions import SessionSummary, lifecycle
from identity_service.settings import Settings
from identity_service.shell import utc_now

app = typer.Typer(no_args_is_help=True, help="Where users are logged in.")
_MOST = 1000


@app.command("list")
def list_sessions(username: str, *, as_json: AsJson = False) -> None:
    """Show where a user is logged in, the session used last first; the thousand used last."""

    async def work(db: Database, settings: Settings) -> list[SessionSummary]:
        async with db.connection() as connection:
            user = await registration.find_named(connection, username)
            idle = settings.refresh_lifetime
            return await lifecycle.list_live(connection, user.id, limit=_MOST, now=utc_now(), idle=idle)

    rows = [_facts(session) for session in with_database(load_settings(), work)]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        cells = [row[name] or "-" for name in ("id", "last_used_at", "address", "client_id", "user_agent")]
        print("  ".join(cells))


@app.command()
def revoke(session_id: str, *, as_json: AsJson = False) -> None:
    """End a session."""

    async def unit(db: Connection) -> bool:
        return await lifecycle.end(db, _read(session_id), reason=Reason.REVOKED, by=operator(), now=utc_now())

    if not transact(unit):
        raise SessionNotFound
    if as_json:
        print_json({"id": str(_read(session_id)), "ended": True})
    else:
        print("Ended.")


@app.command("revoke-all")
def revoke_all(username: str, *, as_json: AsJson = False) -> None:
    """Log a user out everywhere."""

    async def unit(db: Connection) -> int:
        user = await registration.find_named(db, username)
        return await lifecycle.end_all(db, user.id, reason=Reason.REVOKED, by=operator(), now=utc_now())

    ended = transact(unit)
    if as_json:
        print_json({"username": username, "ended": ended})
    else:
        print(f"Ended {counted(ended, 'session')}.")


def _read(session_id: str) -> UUID:
    found = read_uuid(session_id)
    if found is None:
        raise SessionNotFound
    return found


def _facts(session: SessionSummary) -> dict[str, Any]:
    return {
        "id": str(session.id),
        "client_id": session.client_id,
        "user_agent": session.user_agent,
        "address": session.address,
        "created_at": session.created_at.isoformat(timespec="seconds"),
        "last_used_at": session.last_used_at.isoformat(timespec="seconds"),
        "expires_at": session.expires_at.isoformat(timespec="seconds"),
    }
