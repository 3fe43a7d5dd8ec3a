"""`apply`: make roles and clients match a file, all of it or nothing, and as often as one likes."""

import json
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from identity_service.accounts import roles
from identity_service.cli.environment import load_settings, operator, with_database
from identity_service.cli.output import AsJson, print_json
from identity_service.clients import FIRST_PARTY, Client, registration
from identity_service.database import Connection, Database
from identity_service.errors import ClientNotFound, ConfigurationError, IdentityError, RoleNotFound, Unavailable
from identity_service.settings import Settings
from identity_service.shell import client_secret, utc_now
from identity_service.verifier.claims import MAXIMUM_LIFETIME
from identity_service.verifier.jws import each_once


@dataclass(frozen=True, slots=True)
class WantedClient:
    """A client as the file has it; `secret` and `disabled` are None where the file does not say."""

    grants: tuple[str, ...]
    scope: str
    audience: tuple[str, ...]
    first_party: bool
    access_lifetime: timedelta | None
    secret: str | None
    disabled: bool | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a file says: the scopes of each role, and the clients."""

    roles: Mapping[str, str]
    clients: Mapping[str, WantedClient]


@dataclass(slots=True)
class Plan:
    """What was changed, in the order of the file, and the secrets that were made on the way."""

    changes: list[dict[str, Any]] = field(default_factory=list)
    client_secrets: dict[str, str] = field(default_factory=dict)

    def note(self, action: str, kind: str, name: str, **members: tuple[Any, Any]) -> None:
        """Note a change; of an update also the members that differ, each as it was and as it is."""
        differing = {member: {"from": old, "to": new} for member, (old, new) in members.items() if old != new}
        self.changes.append({"action": action, "kind": kind, "name": name, "members": differing})


class _DryRun(Exception):
    """Undoes what was done to find out what would be."""


def apply(
    file: Annotated[Path, typer.Argument(help="TOML, or JSON of the same shape; - for standard input.")],
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete the roles and clients that the file does not name.")
    ] = False,
    overlap: Annotated[
        int,
        typer.Option(
            min=0, max=registration.MOST_OVERLAP_SECONDS, help="Seconds for which a replaced secret goes on working."
        ),
    ] = registration.OVERLAP_SECONDS,
    as_json: AsJson = False,
) -> None:
    """Make roles and clients match a file. Applied again, it changes nothing."""
    wanted = read(file)

    async def work(db: Database, settings: Settings) -> Plan:
        plan = Plan()

        async def unit(connection: Connection) -> None:
            plan.changes.clear()
            plan.client_secrets.clear()
            await _match(connection, wanted, plan, settings, prune=prune, overlap=timedelta(seconds=overlap))
            if dry_run:
                raise _DryRun

        try:
            await db.transact(unit)
        except _DryRun:
            plan.client_secrets.clear()
        return plan

    _show(with_database(load_settings(), work), dry_run=dry_run, as_json=as_json)


def read(file: Path) -> Wanted:
    """Return what a file says.

    Raises:
        ConfigurationError: naming the place in the file and what is wrong with it; nothing of a secret.
    """
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        is_json = file.suffix == ".json" or text.lstrip().startswith("{")
        given = json.loads(text, object_pairs_hook=each_once) if is_json else tomllib.loads(text)
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:  # bad UTF-8 is one too
        raise ConfigurationError(f"{file} is neither TOML nor JSON: {error}.") from None
    top = _Table(given, str(file))
    wanted = Wanted(
        roles={name: _role(table) for name, table in top.tables("roles")},
        clients={name: _client(table, file.parent) for name, table in top.tables("clients")},
    )
    top.end()
    return wanted


def _role(table: "_Table") -> str:
    scope = " ".join(table.words("scopes"))
    table.end()
    return scope


def _client(table: "_Table", folder: Path) -> WantedClient:
    lifetime = table.take("access_lifetime", int, None)
    if lifetime is not None and not 0 < lifetime <= MAXIMUM_LIFETIME:
        raise ConfigurationError(f"{table.place}.access_lifetime must be between 1 and {MAXIMUM_LIFETIME} seconds.")
    secret_file = table.take("secret_file", str, None)
    wanted = WantedClient(
        grants=table.words("grants"),
        scope=" ".join(table.words("scopes")),
        audience=table.words("audience"),
        first_party=table.take("first_party", bool, default=False),
        access_lifetime=timedelta(seconds=lifetime) if lifetime is not None else None,
        secret=_secret(table, folder / secret_file) if secret_file is not None else None,
        disabled=table.take("disabled", bool, None),
    )
    table.end()
    return wanted


def _secret(table: "_Table", file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigurationError(f"{table.place}.secret_file: {file} cannot be read ({error.strerror}).") from None
    except ValueError:
        raise ConfigurationError(f"{table.place}.secret_file: {file} is not text in UTF-8.") from None


class _Table:
    """A table of the file, from which each member is taken once; what is left at the end is a mistake."""

    def __init__(self, given: Any, place: str) -> None:
        if not isinstance(given, dict):
            raise ConfigurationError(f"{place} must be a table.")
        self._left = dict(given)
        self.place = place

    def take(self, name: str, kind: type, default: Any) -> Any:
        value = self._left.pop(name, default)
        if value is not default and type(value) is not kind:
            raise ConfigurationError(f"{self.place}.{name} must be of type {kind.__name__}.")
        return value

    def words(self, name: str) -> tuple[str, ...]:
        found = self.take(name, list, [])
        if not all(isinstance(word, str) and word and " " not in word for word in found):
            raise ConfigurationError(f"{self.place}.{name} must be an array of words.")
        return tuple(found)

    def tables(self, name: str) -> list[tuple[str, "_Table"]]:
        place = name if "." not in self.place else f"{self.place}: {name}"
        return [(key, _Table(value, f"{place}.{key}")) for key, value in self.take(name, dict, {}).items()]

    def end(self) -> None:
        if self._left:
            raise ConfigurationError(f"{self.place} has an unknown member: {min(self._left)}.")


async def _match(
    db: Connection, wanted: Wanted, plan: Plan, settings: Settings, *, prune: bool, overlap: timedelta
) -> None:
    for name, scope in wanted.roles.items():
        with _naming(f"roles.{name}"):
            await _match_role(db, name, scope, plan)
    for client_id, client in wanted.clients.items():
        with _naming(f"clients.{client_id}"):
            await _match_client(db, client_id, client, plan, settings, overlap=overlap)
    if not prune:
        return
    for role in await roles.list_all(db):
        if role.created_at is not None and role.name not in wanted.roles:
            with _naming(f"roles.{role.name}"):
                await roles.delete(db, role.name, by=operator(), now=utc_now())
            plan.note("delete", "role", role.name)
    for registered in await registration.list_all(db):
        if registered != FIRST_PARTY and registered.client_id not in wanted.clients:
            await registration.delete(db, registered.client_id, by=operator(), now=utc_now())
            plan.note("delete", "client", registered.client_id)


@contextmanager
def _naming(entry: str) -> Iterator[None]:
    """Say of which entry a rule speaks when it refuses one."""
    try:
        yield
    except Unavailable:
        raise
    except IdentityError as error:
        error.text = f"{entry}: {error.text}"
        raise


async def _match_role(db: Connection, name: str, scope: str, plan: Plan) -> None:
    try:
        role = await roles.find(db, name)
    except RoleNotFound:
        await roles.create(db, name, scope=scope, by=operator(), now=utc_now())
        plan.note("create", "role", name)
        return
    if set(role.scopes) != set(scope.split()):
        await roles.set_scopes(db, name, scope=scope, by=operator(), now=utc_now())
        plan.note("update", "role", name, scopes=(" ".join(role.scopes), " ".join(sorted(set(scope.split())))))


async def _match_client(
    db: Connection, client_id: str, wanted: WantedClient, plan: Plan, settings: Settings, *, overlap: timedelta
) -> None:
    facts: dict[str, Any] = {
        "grants": wanted.grants,
        "scope": wanted.scope,
        "audience": wanted.audience,
        "access_lifetime": wanted.access_lifetime,
        "issuer": settings.issuer_url,
        "longest_lifetime": settings.access_lifetime,
        "by": operator(),
        "now": utc_now(),
    }
    try:
        before = await registration.find(db, client_id)
    except ClientNotFound:
        secret = wanted.secret
        if secret is None:
            secret = plan.client_secrets[client_id] = client_secret()
        client = await registration.create(db, client_id, first_party=wanted.first_party, secret=secret, **facts)
        plan.note("create", "client", client_id)
    else:
        if before.first_party != wanted.first_party and before != FIRST_PARTY:
            raise ConfigurationError("first_party cannot change; delete the client first, or name another.")
        client = await registration.update(db, client_id, change_access_lifetime=True, **facts)
        if client != before:
            plan.note(
                "update",
                "client",
                client_id,
                grants=(" ".join(before.grants), " ".join(client.grants)),
                scopes=(" ".join(before.scopes), " ".join(client.scopes)),
                audience=(" ".join(before.audience), " ".join(client.audience)),
                access_lifetime=(_seconds(before.access_lifetime), _seconds(client.access_lifetime)),
            )
        client = await _match_secret(db, client, wanted.secret, plan, overlap=overlap)
    await _match_disabled(db, client, plan, disabled=wanted.disabled)


async def _match_secret(
    db: Connection, client: Client, secret: str | None, plan: Plan, *, overlap: timedelta
) -> Client:
    if secret is None:
        return client
    after = await registration.rotate_secret(
        db, client.client_id, secret=secret, overlap=overlap, by=operator(), now=utc_now()
    )
    if after != client:
        plan.note("rotate-secret", "client", client.client_id)
    return after


async def _match_disabled(db: Connection, client: Client, plan: Plan, *, disabled: bool | None) -> None:
    """Only as the file itself says: the next deploy must not let in again who was shut out in an emergency."""
    if disabled is None or (client.disabled_at is not None) == disabled:
        return
    change: Callable[..., Any] = registration.disable if disabled else registration.enable
    await change(db, client.client_id, by=operator(), now=utc_now())
    plan.note("disable" if disabled else "enable", "client", client.client_id)


def _seconds(lifetime: timedelta | None) -> int | None:
    return int(lifetime.total_seconds()) if lifetime is not None else None


def _show(plan: Plan, *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print_json({"dry_run": dry_run, "changes": plan.changes, "client_secrets": plan.client_secrets})
        return
    for change in plan.changes:
        print(f"{change['action']:13} {change['kind']} {change['name']}")
        for member, values in change["members"].items():
            print(f"{'':13} {member}: {values['from'] or '-'} -> {values['to'] or '-'}")
    for client_id, secret in plan.client_secrets.items():
        print(f"client_secret of {client_id}, shown only now: {secret}")
    if not plan.changes:
        print("Nothing to change.")
    elif dry_run:
        print("Nothing was changed: this was a dry run.")
