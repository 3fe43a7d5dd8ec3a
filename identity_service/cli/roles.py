"""`roles`: what users may do, and the scopes that come with it. Sessions hear of a change at their next refresh."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import typer

from identity_service.accounts import Role, User, registration, roles
from identity_service.cli.environment import operator, transact
from identity_service.cli.output import AsJson, print_json
from identity_service.database import Connection
from identity_service.shell import utc_now

app = typer.Typer(no_args_is_help=True, help="Roles, and the scopes they give.")
Scope = Annotated[list[str], typer.Option(help='The scopes it gives: "orders:read orders:write"; or repeat for more.')]
EndSessions = Annotated[
    bool, typer.Option("--end-sessions", help="Log the user out everywhere, so that it takes effect at once.")
]


@app.command()
def create(name: str, *, scope: Scope = [], as_json: AsJson = False) -> None:  # noqa: B006 - nobody changes it
    """Make a role."""
    role = transact(lambda db: roles.create(db, name, scope=" ".join(scope), by=operator(), now=utc_now()))
    _show([role], as_json=as_json, several=False)


@app.command("list")
def list_roles(*, as_json: AsJson = False) -> None:
    """Show every role with the scopes it gives."""
    _show(transact(roles.list_all), as_json=as_json)


@app.command()
def show(name: str, *, as_json: AsJson = False) -> None:
    """Show a role."""
    role = transact(lambda db: roles.find(db, name))
    _show([role], as_json=as_json, several=False)


@app.command("set")
def set_scopes(
    name: str,
    *,
    scope: Scope,
    end_sessions: Annotated[
        bool, typer.Option("--end-sessions", help="Log everybody out who has it, so that it takes effect at once.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Replace the scopes that a role gives."""
    given = " ".join(scope)
    role = transact(
        lambda db: roles.set_scopes(db, name, scope=given, end_sessions=end_sessions, by=operator(), now=utc_now())
    )
    _show([role], as_json=as_json, several=False)


@app.command()
def delete(name: str, *, as_json: AsJson = False) -> None:
    """Delete a role that no user has."""
    transact(lambda db: roles.delete(db, name, by=operator(), now=utc_now()))
    if as_json:
        print_json({"name": name, "deleted": True})
    else:
        print(f"Deleted {name}.")


@app.command()
def grant(username: str, role: str, *, end_sessions: EndSessions = False, as_json: AsJson = False) -> None:
    """Give a user a role."""
    _change(roles.grant, username, role, end_sessions=end_sessions, as_json=as_json)


@app.command()
def revoke(username: str, role: str, *, end_sessions: EndSessions = False, as_json: AsJson = False) -> None:
    """Take a role from a user."""
    _change(roles.revoke, username, role, end_sessions=end_sessions, as_json=as_json)


def _change(
    rule: Callable[..., Awaitable[User]], username: str, role: str, *, end_sessions: bool, as_json: bool
) -> None:
    async def unit(db: Connection) -> tuple[User, User]:
        before = await registration.find_named(db, username)
        return before, await rule(db, before.id, role, end_sessions=end_sessions, by=operator(), now=utc_now())

    before, user = transact(unit)
    changed = before.roles != user.roles
    if as_json:
        print_json({"id": str(user.id), "username": user.username, "roles": list(user.roles), "changed": changed})
        return
    already = "" if changed else "; nothing was changed"
    print(f"{user.username} has {', '.join(user.roles) or 'no roles'}{already}.")
    if end_sessions:
        print("Their sessions have ended.")
    elif changed:
        print("Their sessions hear of it at the next refresh.")


def _show(found: list[Role], *, as_json: bool, several: bool = True) -> None:
    facts: list[dict[str, Any]] = [
        {
            "name": role.name,
            "scopes": list(role.scopes),
            "built_in": role.created_at is None,
            "created_at": role.created_at.isoformat() if role.created_at is not None else None,
        }
        for role in found
    ]
    if as_json:
        print_json(facts if several else facts[0])
        return
    width = max(len(role.name) for role in found)
    for role in found:
        print(f"{role.name:{width}}  {' '.join(role.scopes) or '-'}")
