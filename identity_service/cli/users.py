"""`users`: accounts from the command line. The first administrator comes from here."""

import sys
from typing import Annotated, Any, TypeAlias

import typer

from identity_service import throttling
from identity_service.accounts import User, registration, store
from identity_service.accounts.breaches import BreachCheck
from identity_service.accounts.hashing import Argon2Cost, PasswordHashing
from identity_service.cli.environment import load_settings, operator, print_json, with_database
from identity_service.database import Connection, Database
from identity_service.errors import UserNotFound
from identity_service.settings import Settings
from identity_service.shell import utc_now, uuid7
from identity_service.throttling import Standing

app = typer.Typer(no_args_is_help=True, help="Accounts.")
Shown: TypeAlias = tuple[User, Standing]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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


@app.command()
def show(username: str, *, as_json: AsJson = False) -> None:
    """Show an account."""

    async def work(db: Database, _: Settings) -> Shown:
        async with db.connection() as connection:
            user = await store.find(connection, registration.normalise_username(username))
        if user is None:
            raise UserNotFound
        return await _with_standing(db, user)

    _show(with_database(load_settings(), work), as_json=as_json)


@app.command()
def disable(username: str, *, as_json: AsJson = False) -> None:
    """Shut an account: its sessions end at once and no login succeeds."""

    async def work(db: Database, _: Settings) -> Shown:
        name = registration.normalise_username(username)
        user = await db.transact(
            lambda connection: registration.disable(connection, name, by=operator(), now=utc_now())
        )
        return await _with_standing(db, user)

    _show(with_database(load_settings(), work), as_json=as_json)


@app.command()
def enable(username: str, *, as_json: AsJson = False) -> None:
    """Open a disabled account again."""

    async def work(db: Database, _: Settings) -> Shown:
        name = registration.normalise_username(username)
        user = await db.transact(lambda connection: registration.enable(connection, name, by=operator(), now=utc_now()))
        return await _with_standing(db, user)

    _show(with_database(load_settings(), work), as_json=as_json)


@app.command()
def delete(username: str) -> None:
    """Delete an account with its sessions; its tokens are revoked."""

    async def work(db: Database, _: Settings) -> None:
        async with db.connection() as connection:
            user = await store.find(connection, registration.normalise_username(username))
        if user is None:
            raise UserNotFound
        await db.transact(lambda connection: registration.delete(connection, user.id, by=operator(), now=utc_now()))

    with_database(load_settings(), work)
    print(f"Deleted {username}.")


@app.command()
def unlock(username: str, *, as_json: AsJson = False) -> None:
    """Forget an account's failed logins, so that the next password is looked at."""

    async def work(db: Database, _: Settings) -> Shown:
        name = registration.normalise_username(username)

        async def forget(connection: Connection) -> User:
            user = await store.find(connection, name)
            if user is None:
                raise UserNotFound
            await throttling.unlock(connection, user.id, by=operator(), now=utc_now())
            return user

        return await _with_standing(db, await db.transact(forget))

    _show(with_database(load_settings(), work), as_json=as_json)


async def _with_standing(db: Database, user: User) -> Shown:
    async with db.connection() as connection:
        return user, await throttling.standing(connection, user.id, now=utc_now())


def _read_password() -> str:
    return sys.stdin.readline().rstrip("\r\n")


def _show(shown: Shown, *, as_json: bool) -> None:
    user, standing = shown
    facts: dict[str, Any] = {
        "id": str(user.id),
        "username": user.username,
        "email": user.email,
        "email_verified": user.email_verified,
        "roles": list(user.roles),
        "created_at": user.created_at.isoformat(),
        "password_changed_at": user.password_changed_at.isoformat(),
        "disabled_at": user.disabled_at.isoformat() if user.disabled_at is not None else None,
        "failures": standing.failures,
        "locked_until": standing.locked_until.isoformat() if standing.locked_until is not None else None,
    }
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        print(f"{name:20} {', '.join(value) if isinstance(value, list) else value if value is not None else '-'}")
