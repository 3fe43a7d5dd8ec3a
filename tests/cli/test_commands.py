"""The commands that others script against: their JSON, their words and their exit codes."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from importlib.metadata import version
from typing import Any
from uuid import UUID

import pytest
import typer

from identity_service import errors, throttling
from identity_service.cli import EXIT_CODES, assemble
from identity_service.cli.environment import place_of
from identity_service.cli.migrate import upgrade
from identity_service.database import SCHEMA_HEAD, Connection, open_database
from identity_service.embedded import is_made, postgres
from identity_service.settings import Settings
from identity_service.shell import utc_now
from identity_service.web.admin_clients import ClientAnswer
from tests.cli.conftest import Command
from tests.conftest import PASSWORD, TESTER

ROW = {"kid", "state", "created_at", "signs_from", "in_jwks_until", "verified_until"}


def listed(command: Command) -> list[dict[str, str]]:
    outcome = command("keys", "list", "--json")
    assert outcome.code == 0
    rows: list[dict[str, str]] = json.loads(outcome.out)
    return rows


def test_keys_list_json_has_the_members_of_the_contract(command: Command):
    rows = listed(command)
    assert [row["state"] for row in rows] == ["standby", "active"]
    assert all(row.keys() == ROW for row in rows)
    assert datetime.fromisoformat(rows[1]["signs_from"]).tzinfo is not None
    assert rows[1]["in_jwks_until"] is None


def test_keys_list_prints_a_table(command: Command):
    outcome = command("keys", "list")
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) == 3


def test_keys_rotate_promotes_the_standby_key(command: Command):
    standby = listed(command)[0]["kid"]
    outcome = command("keys", "rotate")
    assert outcome.code == 0
    assert outcome.out.startswith(f"Rotated: {standby} signs from now on. Nothing to restart.")
    rows = listed(command)
    assert [row["state"] for row in rows] == ["standby", "active", "retiring"]
    assert rows[2]["in_jwks_until"]
    assert rows[2]["verified_until"] > rows[2]["in_jwks_until"]


def test_keys_rotate_schedules_what_is_too_young_and_says_when(command: Command):
    command("keys", "rotate")
    scheduled = command("keys", "rotate")
    assert scheduled.code == 0
    assert scheduled.out.startswith("Scheduled: ")
    again = command("keys", "rotate")
    assert again.out.startswith("A rotation is already scheduled: ")
    at_once = command("keys", "rotate", "--now", "--json")
    assert sorted(row["state"] for row in json.loads(at_once.out)) == ["active", "retiring", "retiring", "standby"]


def test_a_key_id_may_begin_with_a_hyphen_and_an_option_that_is_none_is_refused(command: Command):
    command("keys", "rotate")
    assert command("keys", "revoke", "-" + "A" * 42, "--yes").code == 3
    assert command("keys", "revoke", "A" * 43, "--yes", "--jsonn").code == 2


def test_keys_revoke_wants_yes_and_knows_its_keys(command: Command):
    kid = listed(command)[1]["kid"]
    assert command("keys", "revoke", kid).code == 2
    assert listed(command)[1]["state"] == "active"
    outcome = command("keys", "revoke", kid, "--yes")
    assert outcome.code == 0
    assert outcome.out.startswith(f"Revoked {kid}.")
    assert [row["state"] for row in listed(command)] == ["standby", "active", "revoked"]
    again = command("keys", "revoke", kid, "--yes")
    assert (again.code, again.out.splitlines()[0]) == (0, f"{kid} was revoked already.")
    missing = command("keys", "revoke", "A" * 43, "--yes", "--json")
    assert (missing.code, missing.err) == (3, "identity-service: There is no key with this id.\n")


def test_keys_of_an_empty_folder_is_a_configuration_error(command: Command, tmp_path):
    outcome = command("keys", "list", IDENTITY_KEYS_DIR=str(tmp_path / "none"))
    assert outcome.code == 2
    assert "serve" in outcome.err


def test_users_create_show_disable_enable_delete(command: Command):
    created = command(
        "users", "create", "Alice", "--password-stdin", "--role", "admin", "--json", stdin=PASSWORD + "\n"
    )
    assert created.code == 0
    user = json.loads(created.out)
    assert (user["username"], user["roles"], user["disabled_at"]) == ("alice", ["admin"], None)
    for verb in ("disable", "delete"):
        refused = command("users", verb, "alice")
        assert (refused.code, refused.err[:40]) == (4, "identity-service: This is the last admini"[:40])
    command("users", "create", "root", "--password-stdin", "--role", "admin", stdin=PASSWORD)
    assert json.loads(command("users", "show", "alice", "--json").out) == user
    assert json.loads(command("users", "disable", "alice", "--json").out)["disabled_at"]
    assert json.loads(command("users", "enable", "ALICE", "--json").out) == user
    assert "alice" in command("users", "show", "alice").out
    assert command("users", "delete", "alice").code == 0
    assert command("users", "show", "alice").code == 3


def test_users_show_tells_of_a_lock_and_unlock_ends_it(command: Command, database_url):
    command("users", "create", "alice", "--password-stdin", stdin=PASSWORD + "\n")
    user = json.loads(command("users", "show", "alice", "--json").out)
    assert (user["failures"], user["locked_until"]) == (0, None)
    attempt = throttling.password_attempt(UUID(user["id"]), "alice", None, exempt=())

    async def fail(connection: Connection) -> None:
        for minutes in range(59 * 15, -1, -15):
            now = utc_now() - timedelta(minutes=minutes)
            await throttling.count_failure(connection, attempt, by=TESTER, subject=None, now=now)

    async def fail_for_hours() -> None:
        async with open_database(database_url, pool_size=1) as db:
            await db.transact(fail)

    asyncio.run(fail_for_hours())
    locked = json.loads(command("users", "show", "alice", "--json").out)
    assert locked["failures"] == 60
    assert datetime.fromisoformat(locked["locked_until"]) > utc_now()
    assert locked["locked_until"] in command("users", "show", "alice").out
    assert command("users", "list").out.endswith("  -  (locked)\n")
    assert json.loads(command("users", "list", "--json").out) == [locked]
    assert json.loads(command("users", "unlock", "ALICE", "--json").out) == user
    assert command("users", "list").out.endswith("  -\n")
    assert json.loads(command("users", "show", "alice", "--json").out) == user


@pytest.mark.parametrize("verb", ["show", "disable", "enable", "delete", "unlock"])
def test_an_unknown_user_exits_with_three(command: Command, verb):
    outcome = command("users", verb, "nobody")
    assert (outcome.code, outcome.err) == (3, "identity-service: There is no such user. (nobody)\n")
    assert command("users", verb, "no body").code == 3, "as of a client or a role that cannot be"
    nobody = "00000000-0000-0000-0000-000000000000"
    assert command("users", verb, nobody).err == f"identity-service: There is no such user. ({nobody})\n"


def test_an_id_does_where_a_username_does(command: Command):
    made = command("users", "create", "alice", "--password-stdin", "--json", stdin=PASSWORD)
    user_id = json.loads(made.out)["id"]
    command("roles", "create", "clerk")
    for arguments in (
        ("users", "show"), ("users", "disable"), ("users", "enable"), ("users", "unlock"), ("users", "reset-password"),
        ("sessions", "list"), ("sessions", "revoke-all"), ("audit", "tail", "--user"),
    ):  # fmt: skip
        assert command(*arguments, user_id.upper()).code == 0, arguments
    assert command("roles", "grant", user_id, "clerk").out.startswith("alice has clerk.")
    assert command("users", "delete", user_id).code == 0
    assert "user.deleted" in command("audit", "tail", "--user", user_id).out, "long after the user is gone"
    assert command("users", "create", user_id, "--no-password").code == 1, "no username looks like an id"


def test_users_set_changes_what_is_given_and_keeps_the_rest(command: Command):
    arguments = ("users", "create", "alice", "--no-password", "--email", "a@example.com", "--json")
    alice = json.loads(command(*arguments).out)
    assert json.loads(command("users", "set", "alice", "--username", "Alicia", "--json").out) == alice | {
        "username": "alicia"
    }
    assert json.loads(command("users", "set", "alicia", "--email", "b@example.com", "--json").out)["email"][0] == "b"
    assert json.loads(command("users", "set", alice["id"], "--no-email", "--json").out)["email"] is None
    for wrong in ((), ("--email", "a@example.com", "--no-email")):
        assert command("users", "set", "alicia", *wrong).code == 2
    assert command("users", "set", "alicia", "--email", "nowhere").code == 1
    assert command("users", "set", "alice", "--no-email").code == 3


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        ((), PASSWORD, "pass --password-stdin"),
        (("--password-stdin",), f"{PASSWORD}\n{PASSWORD}\n", "more than one line"),
        (("--password-stdin",), "", "is empty"),
        (("--password-stdin",), "\n", "is empty"),
        (("--password-stdin",), PASSWORD + "\udcff", "is not UTF-8"),
        (("--password-stdin", "--no-password"), PASSWORD, "contradict"),
    ],
)
def test_a_password_that_comes_in_no_clear_way_makes_no_account(command: Command, arguments, stdin, says):
    refused = command("users", "create", "alice", *arguments, stdin=stdin)
    assert (refused.code, says in refused.err) == (2, True)
    assert command("users", "list").out == ""


def test_every_command_prints_json_that_prints_anything_a_program_would_read():
    """`serve` and `healthcheck` have nothing to print, and an export is JSON already."""
    without = {"serve", "healthcheck", "migrate", "users export", "audit export"}
    commands = commands_of(typer.main.get_command(assemble("")))
    assert {" ".join(path) for path, made in commands if "as_json" not in parameters_of(made)} == without


def commands_of(group: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, made in group.commands.items():
        if hasattr(made, "commands"):
            yield from commands_of(made, *path, name)
        else:
            yield (*path, name), made


def parameters_of(command: Any) -> set[str]:
    return {parameter.name for parameter in command.params}


def test_what_was_changed_is_told_in_json_too(command: Command):
    made = command("users", "create", "alice", "--password-stdin", "--json", stdin=PASSWORD).json()
    command("roles", "create", "clerk", "--scope", "orders:read")
    alice = {"id": made["id"], "username": "alice"}
    grant = ("roles", "grant", "alice", "clerk", "--json")
    assert command(*grant).json() == alice | {"roles": ["clerk"], "changed": True}
    assert command(*grant, "--end-sessions").json() == alice | {"roles": ["clerk"], "changed": False}
    assert command("roles", "revoke", "alice", "clerk", "--json").json() == alice | {"roles": [], "changed": True}
    assert command("roles", "delete", "clerk", "--json").json() == {"name": "clerk", "deleted": True}
    assert command("sessions", "revoke-all", "alice", "--json").json() == {"username": "alice", "ended": 0}
    assert command("users", "delete", "alice", "--json").json() == alice | {"deleted": True}


def test_a_taken_username_exits_with_four(command: Command):
    arguments = ("users", "create", "alice", "--password-stdin")
    assert command(*arguments, stdin=PASSWORD).code == 0
    outcome = command(*arguments, stdin=PASSWORD)
    assert (outcome.code, outcome.err) == (4, "identity-service: This username is already taken.\n")


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (("alice", "--password-stdin"), "short", "at least 15 characters"),
        (("al ice", "--password-stdin"), PASSWORD, "without spaces"),
        (("alice", "--password-stdin", "--email", "nowhere"), PASSWORD, "not an e-mail address"),
    ],
)
def test_a_refused_account_exits_with_one_and_says_why(command: Command, arguments, stdin, says):
    outcome = command("users", "create", *arguments, stdin=stdin)
    assert outcome.code == 1
    assert says in outcome.err


@pytest.mark.parametrize("role", ["editor", "Über"])
def test_an_unknown_role_exits_with_three_and_makes_no_account(command: Command, role):
    arguments = ("users", "create", "alice", "--password-stdin", "--role", "admin", "--role")
    outcome = command(*arguments, role, stdin=PASSWORD)
    assert (outcome.code, outcome.err) == (3, f"identity-service: There is no such role. ({role})\n")
    assert command("users", "show", "alice").code == 3


def test_roles_create_show_list_set_delete(command: Command):
    created = command("roles", "create", "clerk", "--scope", "orders:read", "--scope", "orders:write", "--json")
    assert created.code == 0
    clerk = json.loads(created.out)
    assert datetime.fromisoformat(clerk["created_at"]).tzinfo is not None
    assert clerk == {
        "name": "clerk",
        "scopes": ["orders:read", "orders:write"],
        "built_in": False,
        "created_at": clerk["created_at"],
    }
    assert json.loads(command("roles", "show", "clerk", "--json").out) == clerk
    admin = {"name": "admin", "scopes": ["identity:admin"], "built_in": True, "created_at": None}
    assert json.loads(command("roles", "list", "--json").out) == [admin, clerk]
    assert json.loads(command("roles", "show", "admin", "--json").out) == admin
    changed = command("roles", "set", "clerk", "--scope", "orders:read", "--json")
    assert json.loads(changed.out) == clerk | {"scopes": ["orders:read"]}
    assert command("roles", "create", "guest").out == "guest  -\n"
    assert command("roles", "list").out == "admin  identity:admin\nclerk  orders:read\nguest  -\n"
    assert command("roles", "delete", "clerk").out == "Deleted clerk.\n"
    assert command("roles", "show", "clerk").code == 3


def test_roles_grant_and_revoke(command: Command):
    command("users", "create", "alice", "--password-stdin", stdin=PASSWORD)
    command("roles", "create", "clerk", "--scope", "orders:read")
    later = "Their sessions hear of it at the next refresh.\n"
    for said in (f"alice has clerk.\n{later}", "alice has clerk; nothing was changed.\n"):
        granted = command("roles", "grant", "ALICE", "clerk")
        assert (granted.code, granted.out) == (0, said)
    in_use = command("roles", "delete", "clerk")
    assert (in_use.code, in_use.err) == (4, "identity-service: 1 user has this role.\n")
    granted = command("roles", "grant", "alice", "admin", "--end-sessions")
    assert (granted.code, granted.out) == (0, "alice has clerk, admin.\nTheir sessions have ended.\n")
    assert command("roles", "revoke", "alice", "admin").code == 4, "the last administrator"
    command("users", "create", "root", "--password-stdin", "--role", "admin", stdin=PASSWORD)
    assert command("roles", "revoke", "alice", "admin").out == f"alice has clerk.\n{later}"
    for said in ("alice has no roles.", "alice has no roles; nothing was changed."):
        revoked = command("roles", "revoke", "alice", "clerk", "--end-sessions")
        assert (revoked.code, revoked.out) == (0, f"{said}\nTheir sessions have ended.\n")
    assert command("roles", "delete", "clerk").code == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("show", "clerk"), 3),
        (("set", "clerk", "--scope", "a"), 3),
        (("delete", "clerk"), 3),
        (("grant", "alice", "clerk"), 3),
        (("revoke", "alice", "clerk"), 3),
        (("grant", "nobody", "admin"), 3),
        (("revoke", "nobody", "admin"), 3),
        (("create", "admin", "--scope", "a"), 4),
        (("set", "admin", "--scope", "a"), 4),
        (("delete", "admin"), 4),
        (("create", "guest"), 4),
        (("create", "Clerk"), 1),
        (("create", "clerk", "--scope", "identity:admin"), 1),
        (("set", "clerk"), 2),
    ],
)
def test_what_cannot_be_done_with_a_role_has_its_exit_code(command: Command, arguments, code):
    command("users", "create", "alice", "--password-stdin", stdin=PASSWORD)
    command("roles", "create", "guest")
    outcome = command("roles", *arguments)
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err


def test_clients_create_prints_the_secret_once(command: Command):
    made = command(
        "clients", "create", "robot", "--grant", "client_credentials", "--scope", "a", "--scope", "b", "--json"
    )
    assert made.code == 0
    client = json.loads(made.out)
    secret = client.pop("client_secret")
    assert secret.startswith("ids_")
    assert len(secret) == 47
    assert client == {
        "client_id": "robot",
        "grants": ["client_credentials"],
        "scopes": ["a", "b"],
        "audience": [],
        "first_party": False,
        "built_in": False,
        "access_lifetime": None,
        "created_at": client["created_at"],
        "secret_changed_at": client["created_at"],
        "previous_secret_expires_at": None,
        "disabled_at": None,
    }
    assert json.loads(command("clients", "show", "robot", "--json").out) == client
    listed = json.loads(command("clients", "list", "--json").out)
    assert [row["client_id"] for row in listed] == ["first-party", "robot"]
    assert [row["built_in"] for row in listed] == [True, False]
    assert listed[1] == client
    assert client.keys() == ClientAnswer.model_fields.keys(), "as the administration API calls them"
    shown = command("clients", "list").out + command("clients", "show", "robot").out
    assert secret not in shown
    assert "robot        enabled   client_credentials  a b\n" in shown


def test_clients_set_rotate_secret_disable_enable_delete(command: Command):
    arguments = ("--grant", "client_credentials", "--audience", "orders", "--access-lifetime", "60")
    made = command("clients", "create", "robot", *arguments)
    first = re.findall(r"ids_\S+", made.out)
    changed = json.loads(command("clients", "set", "robot", "--scope", "a", "--access-lifetime", "0", "--json").out)
    assert (changed["scopes"], changed["audience"], changed["access_lifetime"]) == (["a"], ["orders"], None)
    assert json.loads(command("clients", "set", "robot", "--audience", "", "--json").out)["audience"] == []
    nothing = command("clients", "set", "robot")
    assert (nothing.code, nothing.out) == (2, "")
    assert nothing.err.startswith("identity-service: Nothing to change; pass --grant, ")
    for overlap, kept in (((), True), (("--overlap", "5"), True), (("--overlap", "0"), False)):
        rotated = json.loads(command("clients", "rotate-secret", "robot", *overlap, "--json").out)
        assert rotated["client_secret"].startswith("ids_")
        assert rotated["client_secret"] not in first
        assert (rotated["previous_secret_expires_at"] is not None) == kept
    assert json.loads(command("clients", "disable", "robot", "--json").out)["disabled_at"]
    assert "robot        disabled" in command("clients", "list").out
    assert json.loads(command("clients", "enable", "robot", "--json").out)["disabled_at"] is None
    assert command("clients", "delete", "robot").out == "Deleted robot.\n"
    assert command("clients", "show", "robot").code == 3


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("show", "nobody"), 3),
        (("set", "nobody", "--scope", "a"), 3),
        (("rotate-secret", "nobody"), 3),
        (("disable", "nobody"), 3),
        (("enable", "nobody"), 3),
        (("delete", "nobody"), 3),
        (("create", "robot", "--grant", "client_credentials"), 4),
        (("create", "first-party", "--grant", "client_credentials"), 4),
        (("disable", "first-party"), 4),
        (("delete", "first-party"), 4),
        (("rotate-secret", "first-party"), 4),
        (("create", "a b", "--grant", "client_credentials"), 1),
        (("create", "other"), 2),
        (("create", "other", "--grant", "password", "--grant", "refresh_token"), 1),
        (("create", "other", "--grant", "client_credentials", "--scope", "identity:admin"), 1),
        (("create", "other", "--grant", "client_credentials", "--access-lifetime", "601"), 1),
        (("create", "other", "--grant", "client_credentials", "--access-lifetime", "86401"), 2),
        (("rotate-secret", "robot", "--overlap", "-1"), 2),
        (("create",), 2),
    ],
)
def test_what_cannot_be_done_with_a_client_has_its_exit_code(command: Command, arguments, code):
    command("clients", "create", "robot", "--grant", "client_credentials")
    outcome = command("clients", *arguments)
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err


def test_config_show_tells_each_value_and_where_it_came_from(command: Command, database_url):
    outcome = command("config", "show", "--json", IDENTITY_ACCESS_LIFETIME="60", IDENTITY_KEYS_PASSPHRASE="hunter2")
    rows = json.loads(outcome.out)
    assert rows["IDENTITY_ACCESS_LIFETIME"] == {"value": 60, "from": "IDENTITY_ACCESS_LIFETIME"}
    assert rows["IDENTITY_REFRESH_LIFETIME"] == {"value": 1209600, "from": "default"}
    assert rows["IDENTITY_DATABASE_URL"]["from"] == "DATABASE_URL"
    assert rows["IDENTITY_KEYS_PASSPHRASE"]["value"] == "********"
    assert "hunter2" not in outcome.out


def test_config_show_masks_every_secret_there_is(command: Command):
    """Those of tomorrow too, for which nobody thinks of this file."""
    secrets = [name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)]
    assert {"database_url", "keys_passphrase"} <= set(secrets)
    values = {f"IDENTITY_{name.upper()}": "hunter2" for name in secrets}
    values |= {"DATABASE_URL": "", "IDENTITY_DATABASE_URL": "postgresql://x:hunter2@db.example.com/y?password=hunter2"}
    for form in ((), ("--json",)):
        outcome = command("config", "show", *form, **values)
        assert (outcome.code, "hunter2" in outcome.out + outcome.err) == (0, False)
        assert outcome.out.count("********") == len(secrets)


def test_a_setting_that_is_called_a_secret_is_one():
    plain = [
        name
        for name, field in Settings.model_fields.items()
        if re.search(r"passphrase|secret|api_key", name) and "SecretStr" not in str(field.annotation)
    ]
    assert plain == []


def test_config_show_masks_the_password_of_the_database(command: Command):
    url = "postgresql://service:hunter2@db.example.com:5432/identity?sslmode=require"
    outcome = command("config", "show", DATABASE_URL=url, IDENTITY_ACESS_LIFETIME="1")
    assert "hunter2" not in outcome.out
    assert "db.example.com:5432/identity" in outcome.out
    assert "identity-service: IDENTITY_ACESS_LIFETIME" in outcome.err
    lines = [line for line in outcome.out.splitlines() if line.startswith("IDENTITY_")]
    assert "None" not in outcome.out
    assert len({line.rindex("  ") for line in lines}) == 1, "the last column is one"


def test_a_migration_that_the_database_refuses_is_said_in_one_line(command: Command, new_database):
    url = new_database("refusing")

    async def stand_in_the_way() -> None:
        async with open_database(url, pool_size=1) as database, database.connection() as db:
            await db.execute("CREATE TABLE users (id integer)")

    asyncio.run(stand_in_the_way())
    refused = command("migrate", DATABASE_URL=url)
    assert (refused.code, refused.err.count("\n")) == (5, 1), refused.err
    assert "already exists" in refused.err


def test_migrate_says_what_it_did(command: Command, new_database):
    url = new_database("by_command")
    assert command("migrate", DATABASE_URL=url).out == f"Migrated the schema from nothing to {SCHEMA_HEAD}.\n"
    assert command("migrate", DATABASE_URL=url).out == f"The schema is up to date ({SCHEMA_HEAD}).\n"


def test_a_command_without_a_database_exits_with_five(command: Command, tmp_path):
    outcome = command("users", "show", "alice", DATABASE_URL=f"postgresql://x@/y?host={tmp_path}")
    assert outcome.code == 5
    assert "DATABASE_URL" in outcome.err


@pytest.mark.parametrize("arguments", [("serve", "--nonsense"), ("users", "create"), ("nonsense",)])
def test_wrong_usage_exits_with_two(command: Command, arguments):
    assert command(*arguments).code == 2


def test_a_command_in_the_wrong_folder_makes_no_database_and_says_where_it_looked(command: Command, tmp_path):
    folder = tmp_path / "elsewhere" / "postgres"
    outcome = command("users", "list", DATABASE_URL="", IDENTITY_EMBEDDED_DIR=str(folder))
    assert outcome.code == 5
    assert f"there is no embedded Postgres in {folder}." in outcome.err
    assert not folder.parent.exists()


def test_an_embedded_postgres_that_was_made_is_found_again(open_folder):
    folder = open_folder / "made"
    assert not is_made(folder)
    with postgres(folder):
        assert is_made(folder)
    assert is_made(folder)


@pytest.mark.parametrize("revision", [None, "0004"])
def test_a_database_without_the_schema_says_how_to_get_it(command: Command, new_database, revision):
    url = new_database(f"schema_{revision}")
    if revision is not None:
        upgrade(url, revision)
    outcome = command("audit", "tail", DATABASE_URL=url)
    assert outcome.code == 5
    assert "has no schema of this release: run `identity-service migrate`." in outcome.err
    assert "DATABASE_URL" not in outcome.err


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("postgresql://identity:secret@db:5432/identity?sslmode=require", "db:5432/identity"),
        ("postgresql://identity:Se?cr/e#t@db/identity", "the place that it names"),
        ("postgresql://db/identity?user=identity&password=s@cret", "the place that it names"),
        ("postgresql://identity:s://e@cret@db/identity?application_name=x", "db/identity"),
        ("postgresql://db/identity", "db/identity"),
        ("postgresql://?host=/run/postgresql", "the local socket"),
    ],
)
def test_a_place_that_is_printed_has_nothing_of_a_password(url, place):
    """However it was spelt."""
    assert place_of(url) == place


def test_the_version_is_told(command: Command):
    told = command("--version")
    assert (told.code, told.out) == (0, f"{version('identity-service')}\n")


def test_every_error_of_a_dependency_exits_with_five():
    """A new kind of absence must not pass for an ordinary failure."""
    away = {errors.DatabaseUnavailable, errors.KeysUnavailable}
    assert {error for error, code in EXIT_CODES.items() if code == 5} == away


def test_a_health_check_does_not_import_a_whole_service():
    """It runs every few seconds in every container."""
    script = (
        "import sys; from identity_service.cli import assemble; assemble('healthcheck');"
        "print([name for name in ('fastapi', 'asyncpg', 'cryptography', 'argon2') if name in sys.modules])"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert outcome.stdout == "[]\n"
