"""`clients`: the programs that ask for tokens. A secret is printed once, when it is made."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Annotated, Any, TypeVar

import typer

from identity_service.cli.environment import load_settings, operator, with_database
from identity_service.cli.output import AsJson, print_json
from identity_service.clients import Client, registration
from identity_service.database import Connection
from identity_service.errors import ConfigurationError
from identity_service.settings import Settings
from identity_service.shell import client_secret, utc_now
from identity_service.verifier.claims import MAXIMUM_LIFETIME

app = typer.Typer(no_args_is_help=True, help="OAuth clients: services and backends that ask for tokens.")
Grants = Annotated[
    list[str] | None,
    typer.Option("--grant", help="client_credentials; first-party clients also password and refresh_token. Repeat."),
]
Scope = Annotated[
    list[str] | None, typer.Option(help='What it may do by itself: "orders:read orders:write"; or repeat for more.')
]
Audience = Annotated[
    list[str] | None, typer.Option(help="Who its tokens are for; repeat for more. Without: IDENTITY_AUDIENCE.")
]
Lifetime = Annotated[
    int | None,
    typer.Option(
        "--access-lifetime",
        min=1,
        max=MAXIMUM_LIFETIME,
        help="Seconds its tokens live, below IDENTITY_ACCESS_LIFETIME.",
    ),
]
T = TypeVar("T")


@app.command()
def create(
    client_id: str,
    *,
    grant: Grants = None,
    scope: Scope = None,
    audience: Audience = None,
    access_lifetime: Lifetime = None,
    first_party: Annotated[
        bool, typer.Option("--first-party", help="It may handle passwords, and its users' tokens open our own API.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Register a client and print its secret, which is shown this once."""
    if not grant:
        raise ConfigurationError("The grants are missing; pass --grant, for a service --grant client_credentials.")
    secret = client_secret()
    client = _transact(
        lambda db, settings: registration.create(
            db,
            client_id,
            grants=grant,
            scope=" ".join(scope or ()),
            audience=audience or (),
            first_party=first_party,
            access_lifetime=timedelta(seconds=access_lifetime) if access_lifetime is not None else None,
            secret=secret,
            issuer=settings.issuer_url,
            longest_lifetime=settings.access_lifetime,
            by=operator(),
            now=utc_now(),
        )
    )
    _show(client, as_json=as_json, secret=secret)


@app.command("list")
def list_clients(*, as_json: AsJson = False) -> None:
    """Show every client."""
    found = _transact(lambda db, _: registration.list_all(db))
    if as_json:
        print_json([_facts(client) for client in found])
        return
    width = max(len(client.client_id) for client in found)
    for client in found:
        state = "disabled" if client.disabled_at is not None else "enabled"
        print(f"{client.client_id:{width}}  {state:8}  {' '.join(client.grants)}  {' '.join(client.scopes) or '-'}")


@app.command()
def show(client_id: str, *, as_json: AsJson = False) -> None:
    """Show a client."""
    _show(_transact(lambda db, _: registration.find(db, client_id)), as_json=as_json)


@app.command("set")
def set_client(
    client_id: str,
    *,
    grant: Grants = None,
    scope: Scope = None,
    audience: Audience = None,
    access_lifetime: Annotated[
        int | None,
        typer.Option(
            "--access-lifetime", min=0, max=MAXIMUM_LIFETIME, help="Seconds its tokens live; 0 for the installation's."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replace what is given and keep the rest. An empty --audience means IDENTITY_AUDIENCE again."""
    if grant is None and scope is None and audience is None and access_lifetime is None:
        raise ConfigurationError("Nothing to change; pass --grant, --scope, --audience or --access-lifetime.")
    client = _transact(
        lambda db, settings: registration.update(
            db,
            client_id,
            grants=grant,
            scope=" ".join(scope) if scope is not None else None,
            audience=[name for name in audience if name] if audience is not None else None,
            change_access_lifetime=access_lifetime is not None,
            access_lifetime=timedelta(seconds=access_lifetime) if access_lifetime else None,
            issuer=settings.issuer_url,
            longest_lifetime=settings.access_lifetime,
            by=operator(),
            now=utc_now(),
        )
    )
    _show(client, as_json=as_json)


@app.command("rotate-secret")
def rotate_secret(
    client_id: str,
    *,
    overlap: Annotated[
        int,
        typer.Option(
            min=0,
            max=registration.MOST_OVERLAP_SECONDS,
            help="Seconds for which the present one is accepted too; or 0.",
        ),
    ] = registration.OVERLAP_SECONDS,
    as_json: AsJson = False,
) -> None:
    """Give a client another secret and print it, this once."""
    secret = client_secret()
    client = _transact(
        lambda db, _: registration.rotate_secret(
            db, client_id, secret=secret, overlap=timedelta(seconds=overlap), by=operator(), now=utc_now()
        )
    )
    _show(client, as_json=as_json, secret=secret)


@app.command()
def disable(client_id: str, *, as_json: AsJson = False) -> None:
    """Shut a client out: its sessions end at once, its tokens are revoked."""
    _show(_transact(lambda db, _: registration.disable(db, client_id, by=operator(), now=utc_now())), as_json=as_json)


@app.command()
def enable(client_id: str, *, as_json: AsJson = False) -> None:
    """Let a disabled client in again."""
    _show(_transact(lambda db, _: registration.enable(db, client_id, by=operator(), now=utc_now())), as_json=as_json)


@app.command()
def delete(client_id: str, *, as_json: AsJson = False) -> None:
    """Delete a client; its sessions end, its tokens are revoked."""
    _transact(lambda db, _: registration.delete(db, client_id, by=operator(), now=utc_now()))
    if as_json:
        print_json({"client_id": client_id, "deleted": True})
    else:
        print(f"Deleted {client_id}.")


def _transact(unit: Callable[[Connection, Settings], Awaitable[T]]) -> T:
    return with_database(
        load_settings(), lambda db, settings: db.transact(lambda connection: unit(connection, settings))
    )


def _facts(client: Client) -> dict[str, Any]:
    moments = {
        name: moment.isoformat() if moment is not None else None
        for name, moment in (
            ("created_at", client.created_at),
            ("secret_changed_at", client.secret_changed_at),
            ("previous_secret_expires_at", client.previous_secret_expires_at),
            ("disabled_at", client.disabled_at),
        )
    }
    return {
        "client_id": client.client_id,
        "grants": list(client.grants),
        "scopes": list(client.scopes),
        "audience": list(client.audience),
        "first_party": client.first_party,
        "built_in": client.created_at is None,
        "access_lifetime": int(client.access_lifetime.total_seconds()) if client.access_lifetime is not None else None,
        **moments,
    }


def _show(client: Client, *, as_json: bool, secret: str | None = None) -> None:
    facts = _facts(client)
    if secret is not None:
        facts = {"client_id": client.client_id, "client_secret": secret} | facts
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        shown = " ".join(value) if isinstance(value, list) else value
        print(f"{name:26} {shown if shown not in (None, '') else '-'}")
