"""`keys`: list, rotate and revoke signing keys. Running services take a change up within seconds."""

import sys
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any

import typer

from identity_service.cli.environment import load_settings, operator, with_database
from identity_service.cli.output import AsJson, print_json
from identity_service.database import Database
from identity_service.errors import ConfigurationError, IdentityError
from identity_service.settings import Settings
from identity_service.shell import utc_now
from identity_service.signing import recording
from identity_service.signing.key_files import KeyChange, KeyFolder
from identity_service.signing.keyring import Key, Keyring
from identity_service.signing.live import key_folder

app = typer.Typer(no_args_is_help=True, help="Signing keys.")


@app.command("list")
def list_keys(*, as_json: AsJson = False) -> None:
    """Show every key with its state and times."""
    _show(_folder(load_settings()).read(), as_json=as_json)


@app.command()
def rotate(
    context: typer.Context,
    *,
    now: Annotated[bool, typer.Option("--now", help="Do not wait until every verifier knows the standby key.")] = False,
    as_json: AsJson = False,
) -> None:
    """Promote the standby key, as soon as every verifier can know it, and create the next one."""
    settings = load_settings()
    folder = _folder(settings)
    requested_at = context.obj
    assert isinstance(requested_at, datetime), "cli.run passes the moment the command was typed"
    change = folder.rotate(
        requested_at=requested_at, now=utc_now(), publish_window=settings.key_publish_window, at_once=now
    )
    if change.key is not None:
        _record(settings, recording.record_rotation, change.key)
    if not as_json:
        print(_what_happened(change))
    _show(change.ring, as_json=as_json)


# One key id in 64 begins with a hyphen: what is no option of ours is one of those.
@app.command(context_settings={"ignore_unknown_options": True})
def revoke(
    kid: str,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Really: whoever holds tokens of this key is logged out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Withdraw a key at once: it leaves the JWKS, and everything it signed is refused."""
    if not yes:
        raise ConfigurationError(
            "Revoking a key logs out everyone whose tokens it signed; add --yes to do it, or use `keys rotate`."
        )
    settings = load_settings()
    change = _folder(settings).revoke(kid, now=utc_now())
    if change.key is not None:
        _record(settings, recording.record_revocation, change.key)
    if not as_json:
        if change.key is None:
            print(f"{kid} was revoked already.")
        else:
            print(
                f"Revoked {kid}. Tokens it signed are refused here, and by services with our verifier, within seconds; "
                "elsewhere once the JWKS was fetched again."
            )
    _show(change.ring, as_json=as_json)


def _record(settings: Settings, record: Callable[..., Awaitable[None]], key: Key) -> None:
    """Write down what was done, if that can be: in an emergency keys must change while the database is away."""

    async def work(db: Database, _: Settings) -> None:
        async with db.connection() as connection:
            await record(connection, key, by=operator(), now=utc_now())

    try:
        with_database(settings, work)
    except IdentityError as error:
        print(f"identity-service: done, but nothing was recorded in the audit: {error.text}", file=sys.stderr)


def _folder(settings: Settings) -> KeyFolder:
    folder = key_folder(settings)
    if folder.is_empty():
        raise ConfigurationError(f"{settings.keys_dir} holds no keyring; `identity-service serve` creates one.")
    return folder


def _what_happened(change: KeyChange) -> str:
    now = utc_now()
    standby = change.ring.standby(now)
    if standby is not None and standby.signs_from is not None:
        verb = "Scheduled" if change.key is not None else "A rotation is already scheduled"
        return (
            f"{verb}: {standby.kid} signs from {standby.signs_from.isoformat(timespec='seconds')}. Nothing to restart."
        )
    if change.key is None:
        return "Another rotation has just been done; nothing to do."
    return f"Rotated: {change.ring.signer(now).kid} signs from now on. Nothing to restart."


def _show(ring: Keyring, *, as_json: bool) -> None:
    rows = _rows(ring)
    if as_json:
        print_json(rows)
        return
    print(f"{'kid':43}  {'state':8}  {'signs from':25}  {'in JWKS until':25}  verified until")
    for row in rows:
        cells = [str(row[name] or "-") for name in ("signs_from", "in_jwks_until", "verified_until")]
        print(f"{row['kid']}  {row['state']:8}  {cells[0]:25}  {cells[1]:25}  {cells[2]}")


def _rows(ring: Keyring) -> list[dict[str, Any]]:
    """Return the rows of `keys list --json`. Times are ISO 8601 in UTC, null while they are open."""
    return [
        {
            "kid": status.key.kid,
            "state": status.state.value,
            "created_at": _time(status.key.created_at),
            "signs_from": _time(status.key.signs_from),
            "in_jwks_until": _time(status.in_jwks_until),
            "verified_until": _time(status.verified_until),
        }
        for status in ring.listed(utc_now())
    ]


def _time(moment: datetime | None) -> str | None:
    return moment.isoformat(timespec="seconds") if moment is not None else None
