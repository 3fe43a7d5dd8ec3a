"""`users`: accounts from the command line, one by one or many at a time. The first administrator comes from here."""

import os
import sys
from collections import Counter
from collections.abc import Awaitable, Iterator
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeAlias

import typer

from identity_service import throttling
from identity_service.accounts import User, formats, registration, resets, roles, transfer
from identity_service.accounts.argon2id import Argon2Cost
from identity_service.accounts.breaches import BreachCheck
from identity_service.accounts.hashing import PasswordHashing
from identity_service.cli.environment import load_settings, operator, transact, with_database
from identity_service.cli.output import AsJson, counted, new_file, print_json
from identity_service.database import Connection, Database
from identity_service.errors import ConfigurationError
from identity_service.settings import Settings
from identity_service.shell import reset_token, utc_now, uuid7
from identity_service.throttling import Standing

app = typer.Typer(no_args_is_help=True, help="Accounts.")
Shown: TypeAlias = tuple[User, Standing]
Name = Annotated[str, typer.Argument(help="The username, or the id.")]


@app.command()
def create(
    username: str,
    *,
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read the password from standard input.")
    ] = False,
    no_password: Annotated[
        bool, typer.Option("--no-password", help="Nobody can log in until the password was reset.")
    ] = False,
    role: Annotated[list[str] | None, typer.Option(help="A role to give; repeat for more.")] = None,
    email: Annotated[str | None, typer.Option(help="An e-mail address, which counts as not verified.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make an account. The password is asked for at the terminal unless an option says otherwise."""
    if password_stdin and no_password:
        raise ConfigurationError("--password-stdin and --no-password contradict each other.")
    password = None if no_password else _read_password() if password_stdin else _ask_for_password()

    async def work(db: Database, settings: Settings) -> Shown:
        name = registration.normalise_username(username)
        address = registration.normalise_email(email) if email is not None else None
        password_hash = formats.UNUSABLE
        if password is not None:
            password_hash = await _hash(password, settings, username=name, email=address)
        now = utc_now()
        user = await db.transact(
            lambda connection: registration.register(
                connection,
                uuid7(now),
                username=name,
                password_hash=password_hash,
                email=address,
                roles=tuple(dict.fromkeys(role or ())),
                by=operator(),
                now=now,
            )
        )
        return user, Standing()

    _show(with_database(load_settings(), work), as_json=as_json)


@app.command("set")
def set_user(
    username: Name,
    *,
    new_username: Annotated[str | None, typer.Option("--username", help="Another username.")] = None,
    email: Annotated[str | None, typer.Option(help="Another e-mail address, which counts as not verified.")] = None,
    no_email: Annotated[bool, typer.Option("--no-email", help="Remove the e-mail address.")] = False,
    as_json: AsJson = False,
) -> None:
    """Replace what is given and keep the rest."""
    if email is not None and no_email:
        raise ConfigurationError("--email and --no-email contradict each other.")
    if new_username is None and email is None and not no_email:
        raise ConfigurationError("Nothing to change; pass --username, --email or --no-email.")

    async def unit(db: Connection) -> Shown:
        user = await registration.find_named(db, username)
        changed = registration.update(
            db,
            user.id,
            username=registration.normalise_username(new_username) if new_username is not None else None,
            change_email=email is not None or no_email,
            email=registration.normalise_email(email) if email is not None else None,
            by=operator(),
            now=utc_now(),
        )
        return await _with_standing(db, changed)

    _show(transact(unit), as_json=as_json)


@app.command("list")
def list_users(
    *,
    search: Annotated[str, typer.Option(help="How the username or the e-mail address begins.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many at most.")] = 100,
    role: Annotated[str | None, typer.Option(help="Only those who have it.")] = None,
    after: Annotated[str | None, typer.Option(help="Go on after this username.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show accounts in the order of their usernames."""

    async def unit(db: Connection) -> list[Shown]:
        if role is not None:
            await roles.find(db, role)
        found = await registration.search(db, search, role=role, after=after, limit=limit + 1)
        standing = await throttling.standings(db, [user.id for user in found], now=utc_now())
        return [(user, standing[user.id]) for user in found]

    found = transact(unit)
    shown = found[:limit]
    if as_json:
        print_json([_facts(user, standing) for user, standing in shown])
    else:
        width = max((len(user.username) for user, _ in shown), default=0)
        for user, standing in shown:
            shut = "  (disabled)" if user.disabled_at is not None else ""
            locked = "  (locked)" if standing.locked_until is not None else ""
            print(f"{user.username:{width}}  {user.id}  {', '.join(user.roles) or '-'}{shut}{locked}")
    if len(found) > limit:
        print(f"identity-service: there are more; go on with --after {shown[-1][0].username}", file=sys.stderr)


@app.command()
def show(username: Name, *, as_json: AsJson = False) -> None:
    """Show an account."""
    _show(transact(lambda db: _with_standing(db, registration.find_named(db, username))), as_json=as_json)


@app.command()
def disable(username: Name, *, as_json: AsJson = False) -> None:
    """Shut an account: its sessions end at once and no login succeeds."""

    async def unit(db: Connection) -> Shown:
        user = await registration.find_named(db, username)
        return await _with_standing(db, registration.disable(db, user.id, by=operator(), now=utc_now()))

    _show(transact(unit), as_json=as_json)


@app.command()
def enable(username: Name, *, as_json: AsJson = False) -> None:
    """Open a disabled account again."""

    async def unit(db: Connection) -> Shown:
        user = await registration.find_named(db, username)
        return await _with_standing(db, registration.enable(db, user.id, by=operator(), now=utc_now()))

    _show(transact(unit), as_json=as_json)


@app.command()
def delete(username: Name, *, as_json: AsJson = False) -> None:
    """Delete an account with its sessions; its tokens are revoked."""

    async def unit(db: Connection) -> User:
        user = await registration.find_named(db, username)
        await registration.delete(db, user.id, by=operator(), now=utc_now())
        return user

    user = transact(unit)
    if as_json:
        print_json({"id": str(user.id), "username": user.username, "deleted": True})
    else:
        print(f"Deleted {username}.")


@app.command()
def unlock(username: Name, *, as_json: AsJson = False) -> None:
    """Forget an account's failed logins, so that the next password is looked at."""

    async def unit(db: Connection) -> Shown:
        user = await registration.find_named(db, username)
        await throttling.unlock(db, user.id, by=operator(), now=utc_now())
        return user, await throttling.standing(db, user.id, now=utc_now())

    _show(transact(unit), as_json=as_json)


@app.command("reset-password")
def reset_password(username: Name, *, as_json: AsJson = False) -> None:
    """Print a token, this once, with which the user can set another password."""
    token = reset_token()

    async def unit(db: Connection) -> datetime:
        user = await registration.find_named(db, username)
        return await resets.start(db, user.id, token, by=operator(), now=utc_now())

    expires_at = transact(unit).isoformat(timespec="seconds")
    if as_json:
        print_json({"reset_token": token, "expires_at": expires_at})
    else:
        print(token)
        print(f"identity-service: good once, until {expires_at}, at POST /password-reset.", file=sys.stderr)


async def _with_standing(db: Connection, found: Awaitable[User]) -> Shown:
    user = await found
    return user, await throttling.standing(db, user.id, now=utc_now())


@app.command("import")
def import_users(
    file: Annotated[
        typer.FileBinaryRead, typer.Argument(metavar="FILE.jsonl", help="A JSON object on each line; - for stdin.")
    ],
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would happen.")] = False,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Import the others even if some cannot be; without it all or none.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make accounts with the password hashes of another system."""
    if file.name.endswith(".csv"):
        raise ConfigurationError("CSV is not read; write a JSON object for each user on a line of its own.")

    async def work(db: Database, _: Settings) -> transfer.ImportReport:
        now = utc_now()
        return await db.transact(
            lambda connection: transfer.import_users(
                connection,
                _lines(file),
                skip_invalid=skip_invalid,
                dry_run=dry_run,
                new_id=lambda: uuid7(now),
                by=operator(),
                now=now,
            ),
            attempts=1,
        )

    report = with_database(load_settings(), work)
    _show_import(report, dry_run=dry_run, as_json=as_json)
    raise typer.Exit(1 if report.refused else 4 if report.conflicts else 0)


@app.command("export")
def export_users(
    file: Annotated[Path, typer.Argument(help="A file that does not exist yet; - for stdout.")] = Path("-"),
    *,
    without_hashes: Annotated[bool, typer.Option("--without-hashes", help="Leave the password hashes out.")] = False,
) -> None:
    """Write all accounts as JSON lines that `users import` takes."""

    async def work(db: Database, _: Settings) -> None:
        with_hashes = not without_hashes
        with new_file(file) as out:
            await db.transact(
                lambda own: transfer.record_export(own, with_hashes=with_hashes, by=operator(), now=utc_now())
            )
            async with db.connection() as connection, connection.transaction():
                async for line in transfer.export_users(connection, with_hashes=with_hashes):
                    out.write(line)

    with_database(load_settings(), work)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Return the lines, of those that are far too long no more than shows it; with progress, if somebody watches."""
    size = os.fstat(file.fileno()).st_size if file.seekable() else 0
    watched = sys.stderr.isatty() and size > 0
    with typer.progressbar(length=size, label="Reading", file=sys.stderr) if watched else nullcontext() as bar:
        while line := file.readline(transfer.MOST_BYTES + 1):
            yield line
            read = len(line)
            while not line.endswith(b"\n") and (line := file.readline(transfer.MOST_BYTES)):
                read += len(line)
            if bar is not None:
                bar.update(read)


def _show_import(report: transfer.ImportReport, *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "lines": report.lines,
                "imported": report.imported,
                "refused": report.refused,
                "conflicts": report.conflicts,
                "formats": dict(report.formats),
                "roles": dict(report.roles),
                "problems": [{"line": problem.line, "problem": problem.text} for problem in report.problems],
            }
        )
        return
    for problem in report.problems:
        print(f"line {problem.line}: {problem.text}", file=sys.stderr)
    if unnamed := report.refused + report.conflicts - len(report.problems):
        print(f"... and {unnamed} more.", file=sys.stderr)
    lines = counted(report.lines, "line")
    print(f"{lines}: {report.refused} refused, {report.conflicts} in conflict with accounts that exist.")
    print(f"Password hashes: {_counts(report.formats)}.")
    print(f"Roles: {_counts(report.roles)}.")
    print(f"{'Would import' if dry_run else 'Imported'} {counted(report.imported, 'user')}.")


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common()) or "none"


def _read_password() -> str:
    try:
        first, _, rest = sys.stdin.buffer.read().decode().partition("\n")
    except UnicodeDecodeError:
        raise ConfigurationError("Standard input is not UTF-8; it must be the password and nothing else.") from None
    if rest:
        raise ConfigurationError("Standard input has more than one line; it must be the password and nothing else.")
    if not (password := first.removesuffix("\r")):
        raise ConfigurationError("Standard input is empty; it must be the password.")
    return password


def _ask_for_password() -> str:
    if not sys.stdin.isatty():
        raise ConfigurationError("There is no terminal to ask for the password at; pass --password-stdin.")
    password: str = typer.prompt("Password", hide_input=True, confirmation_prompt=True)
    return password


async def _hash(password: str, settings: Settings, *, username: str, email: str | None) -> str:
    cost = Argon2Cost.of(settings)
    return await registration.hash_new_password(
        PasswordHashing(cost, threads=1),
        password,
        username=username,
        email=email,
        min_length=settings.password_min_length,
        breaches=BreachCheck(settings.breach_check_url) if settings.breach_check_url else None,
    )


def _facts(user: User, standing: Standing) -> dict[str, Any]:
    return transfer.facts_of(user) | {
        "failures": standing.failures,
        "locked_until": standing.locked_until.isoformat() if standing.locked_until is not None else None,
    }


def _show(shown: Shown, *, as_json: bool) -> None:
    facts = _facts(*shown)
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        print(f"{name:20} {', '.join(value) if isinstance(value, list) else value if value is not None else '-'}")
