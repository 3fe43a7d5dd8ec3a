"""`users`: accounts from the command line. The first administrator comes from here."""

import sys
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any, TypeAlias, TypeVar

import typer

from identity_service import throttling
from identity_service.accounts import User, registration, resets
from identity_service.accounts.breaches import BreachCheck
from identity_service.accounts.hashing import Argon2Cost, PasswordHashing
from identity_service.cli.environment import load_settings, operator, print_json, with_database
from identity_service.database import Connection, Database
from identity_service.settings import Settings
from identity_service.shell import reset_token, utc_now, uuid7
from identity_service.throttling import Standing

app = typer.Typer(no_args_is_help=True, help="Accounts.")
Shown: TypeAlias = tuple[User, Standing]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
T = TypeVar("T")


@app.command()
def create(
    username: str,
    *,
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read the password from standard input.")
    ] = False,
    role: Annotated[list[str] | None, typer.Option(help="A role to give; repeat for more.")] = None,
    email: Annotated[str | None, typer.Option()] = None,
    as_json: AsJson = False,
) -> None:
    """Make an account."""
    password = (
        _read_password() if password_stdin else typer.prompt("Password", hide_input=True, confirmation_prompt=True)
    )
    settings = load_settings()

    async def work(db: Database, settings: Settings) -> Shown:
        name = registration.normalise_username(username)
        address = registration.normalise_email(email) if email is not None else None
        cost = Argon2Cost(settings.argon2_memory_kib, settings.argon2_time_cost, settings.argon2_parallelism)
        hashing = PasswordHashing(cost, threads=1)
        password_hash = await registration.hash_new_password(
            hashing,
            password,
            username=name,
            email=address,
            min_length=settings.password_min_length,
            breaches=BreachCheck(settings.breach_check_url) if settings.breach_check_url else None,
        )
        now = utc_now()
        roles = tuple(dict.fromkeys(role or ()))
        user = await db.transact(
            lambda connection: registration.register(
                connection,
                uuid7(now),
                username=name,
                password_hash=password_hash,
                email=address,
                roles=roles,
                by=operator(),
                now=now,
            )
        )
        return user, Standing()

    _show(with_database(settings, work), as_json=as_json)


@app.command("list")
def list_users(
    *,
    search: Annotated[str, typer.Option(help="How the username or the e-mail address begins.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 100,
    after: Annotated[str | None, typer.Option(help="Go on after this username.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show accounts in the order of their usernames."""
    found = _transact(lambda db: registration.search(db, search, after=after, limit=limit + 1))
    shown = found[:limit]
    if as_json:
        print_json([_facts(user) for user in shown])
    else:
        width = max((len(user.username) for user in shown), default=0)
        for user in shown:
            shut = "  (disabled)" if user.disabled_at is not None else ""
            print(f"{user.username:{width}}  {user.id}  {', '.join(user.roles) or '-'}{shut}")
    if len(found) > limit:
        print(f"identity-service: there are more; go on with --after {shown[-1].username}", file=sys.stderr)


@app.command()
def show(username: str, *, as_json: AsJson = False) -> None:
    """Show an account."""
    _show(_transact(lambda db: _with_standing(db, registration.find_named(db, username))), as_json=as_json)


@app.command()
def disable(username: str, *, as_json: AsJson = False) -> None:
    """Shut an account: its sessions end at once and no login succeeds."""

    async def unit(db: Connection) -> Shown:
        user = await registration.find_named(db, username)
        return await _with_standing(db, registration.disable(db, user.id, by=operator(), now=utc_now()))

    _show(_transact(unit), as_json=as_json)


@app.command()
def enable(username: str, *, as_json: AsJson = False) -> None:
    """Open a disabled account again."""

    async def unit(db: Connection) -> Shown:
        user = await registration.find_named(db, username)
        return await _with_standing(db, registration.enable(db, user.id, by=operator(), now=utc_now()))

    _show(_transact(unit), as_json=as_json)


@app.command()
def delete(username: str) -> None:
    """Delete an account with its sessions; its tokens are revoked."""

    async def unit(db: Connection) -> None:
        user = await registration.find_named(db, username)
        await registration.delete(db, user.id, by=operator(), now=utc_now())

    _transact(unit)
    print(f"Deleted {username}.")


@app.command()
def unlock(username: str, *, as_json: AsJson = False) -> None:
    """Forget an account's failed logins, so that the next password is looked at."""

    async def unit(db: Connection) -> Shown:
        user = await registration.find_named(db, username)
        await throttling.unlock(db, user.id, by=operator(), now=utc_now())
        return user, await throttling.standing(db, user.id, now=utc_now())

    _show(_transact(unit), as_json=as_json)


@app.command("reset-password")
def reset_password(username: str, *, as_json: AsJson = False) -> None:
    """Print a token, this once, with which the user can set another password."""
    token = reset_token()

    async def unit(db: Connection) -> datetime:
        user = await registration.find_named(db, username)
        return await resets.start(db, user.id, token, by=operator(), now=utc_now())

    expires_at = _transact(unit).isoformat(timespec="seconds")
    if as_json:
        print_json({"reset_token": token, "expires_at": expires_at})
    else:
        print(token)
        print(f"identity-service: good once, until {expires_at}, at POST /password-reset.", file=sys.stderr)


async def _with_standing(db: Connection, found: Awaitable[User]) -> Shown:
    user = await found
    return user, await throttling.standing(db, user.id, now=utc_now())


def _transact(unit: Callable[[Connection], Awaitable[T]]) -> T:
    return with_database(load_settings(), lambda db, _: db.transact(unit))


def _read_password() -> str:
    return sys.stdin.readline().rstrip("\r\n")


def _facts(user: User) -> dict[str, Any]:
    return {
        "id": str(user.id),
        "username": user.username,
        "email": user.email,
        "email_verified": user.email_verified,
        "roles": list(user.roles),
        "created_at": user.created_at.isoformat(),
        "password_changed_at": user.password_changed_at.isoformat(),
        "disabled_at": user.disabled_at.isoformat() if user.disabled_at is not None else None,
    }


def _show(shown: Shown, *, as_json: bool) -> None:
    user, standing = shown
    facts = _facts(user) | {
        "failures": standing.failures,
        "locked_until": standing.locked_until.isoformat() if standing.locked_until is not None else None,
    }
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        print(f"{name:20} {', '.join(value) if isinstance(value, list) else value if value is not None else '-'}")
