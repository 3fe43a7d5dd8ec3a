"""`apply`: roles and clients match a file; what cannot be is refused whole, and a second time changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Command

GUIDE = (Path(__file__).parents[2] / "docs/guides/keep-it-in-a-file.md").read_text(encoding="utf-8")
FILE = GUIDE.partition("```toml\n")[2].partition("```")[0]
SECRET = "a secret that somebody chose, long enough".replace(" ", "-")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "web.secret").write_text(SECRET + "\n")
    (tmp_path / "identity.toml").write_text(FILE)
    return tmp_path / "identity.toml"


def state(command: Command) -> tuple[Any, Any]:
    return json.loads(command("roles", "list", "--json").out), json.loads(command("clients", "list", "--json").out)


def changes(out: str) -> list[str]:
    return [f"{change['action']} {change['kind']} {change['name']}" for change in json.loads(out)["changes"]]


def test_an_empty_installation_becomes_what_the_file_says_and_stays_so(command: Command, file: Path):
    first = command("apply", str(file), "--json")
    assert first.code == 0, first.err
    assert changes(first.out) == [
        "create role buyer",
        "create role guest",
        "create client billing",
        "create client web",
    ]
    assert list(json.loads(first.out)["client_secrets"]) == ["billing"], "the other one is in a file"
    roles, clients = before = state(command)
    assert [(role["name"], role["scopes"]) for role in roles if not role["built_in"]] == [
        ("buyer", ["orders:read", "orders:write"]),
        ("guest", []),
    ]
    assert [client["client_id"] for client in clients] == ["first-party", "billing", "web"]
    assert command("apply", str(file)).out == "Nothing to change.\n"
    assert state(command) == before
    assert len(json.loads(command("audit", "tail", "--json").out)) == 4, "what changes nothing is not recorded"


def test_a_dry_run_says_the_same_and_changes_nothing(command: Command, file: Path):
    before = state(command)
    tried = command("apply", str(file), "--dry-run", "--json")
    assert len(changes(tried.out)) == 4
    assert json.loads(tried.out)["client_secrets"] == {}, "a secret that will never work"
    assert state(command) == before
    assert json.loads(command("audit", "tail", "--json").out) == []
    assert "this was a dry run" in command("apply", str(file), "--dry-run").out


def test_an_update_says_what_it_changes_also_in_a_dry_run(command: Command, file: Path):
    command("apply", str(file))
    file.write_text(FILE.replace("access_lifetime = 300", "").replace('"orders:read", "orders:write"', '"orders:read"'))
    tried = json.loads(command("apply", str(file), "--dry-run", "--json").out)["changes"]
    assert [change["members"] for change in tried] == [
        {"scopes": {"from": "orders:read orders:write", "to": "orders:read"}},
        {"access_lifetime": {"from": 300, "to": None}},
    ]
    printed = command("apply", str(file), "--dry-run").out
    assert "scopes: orders:read orders:write -> orders:read\n" in printed
    assert "access_lifetime: 300 -> -\n" in printed


def test_what_differs_is_changed_and_nothing_else(command: Command, file: Path):
    command("apply", str(file))
    command("roles", "create", "other")
    text = FILE.replace('["orders:read", "orders:write"]', '["orders:read"]')
    text = text.replace("access_lifetime = 300", "access_lifetime = 60\ndisabled = true")
    file.write_text(text)
    (file.parent / "web.secret").write_text(SECRET[::-1])
    assert changes(command("apply", str(file), "--json").out) == [
        "update role buyer",
        "update client billing",
        "disable client billing",
        "rotate-secret client web",
    ]
    assert changes(command("apply", str(file), "--json").out) == []
    file.write_text(text.replace("disabled = true", ""))
    assert changes(command("apply", str(file), "--json").out) == [], "shut out until the file says otherwise"
    file.write_text(text.replace("disabled = true", "disabled = false"))
    assert changes(command("apply", str(file), "--json").out) == ["enable client billing"]
    assert command("roles", "show", "other").code == 0, "what the file does not name is left alone"


def test_pruning_deletes_what_the_file_does_not_name_unless_somebody_has_it(command: Command, file: Path):
    command("apply", str(file))
    file.write_text('[roles.buyer]\nscopes = ["orders:read"]\n')
    command("users", "create", "alice", "--password-stdin", "--role", "guest", stdin="correct horse battery staple")
    before = state(command)
    refused = command("apply", str(file), "--prune")
    assert refused.code == 4
    assert state(command) == before, "all of it or nothing"
    command("roles", "revoke", "alice", "guest")
    assert changes(command("apply", str(file), "--prune", "--json").out) == [
        "update role buyer",
        "delete role guest",
        "delete client billing",
        "delete client web",
    ]


def test_json_of_the_same_shape_from_standard_input(command: Command):
    given = {"roles": {"clerk": {"scopes": ["orders:read"]}}}
    assert command("apply", "-", stdin=json.dumps(given)).out == "create        role clerk\n"


def test_a_json_file_that_holds_no_object_is_told_so(command: Command, tmp_path: Path):
    (tmp_path / "identity.json").write_text("[]")
    refused = command("apply", str(tmp_path / "identity.json"))
    assert refused.code == 2
    assert refused.err.endswith("identity.json must be a table.\n")


def test_what_stands_twice_in_the_file_is_shown_once(command: Command):
    command("apply", "-", stdin='roles.clerk.scopes = ["orders:write"]')
    changed = command("apply", "-", stdin='roles.clerk.scopes = ["orders:read", "orders:read"]')
    assert changed.out.endswith("scopes: orders:write -> orders:read\n")


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("[roles", 2, "neither TOML nor JSON"),
        ('{"roles": {"a": {}, "a": {}}}', 2, "a member is there twice"),
        ('{"roles":' * 100_000, 2, "neither TOML nor JSON"),
        ("[clients.x]\naccess_lifetime = 99999999999999999999", 2, "clients.x.access_lifetime must be between"),
        ("{", 2, "neither TOML nor JSON"),
        ("[rolls.clerk]", 2, "rolls"),
        ("[roles.clerk]\nscope = []", 2, "roles.clerk has an unknown member: scope"),
        ('[roles.clerk]\nscopes = "a"', 2, "roles.clerk.scopes must be of type list"),
        ('[roles.clerk]\nscopes = ["a b"]', 2, "roles.clerk.scopes must be an array of words"),
        ("[roles.clerk]\nscopes = [1]", 2, "roles.clerk.scopes must be an array of words"),
        ("roles = 1", 2, "roles must be of type dict"),
        ("[roles]\nclerk = 1", 2, "roles.clerk must be a table"),
        ('[clients.x]\nfirst_party = "yes"', 2, "clients.x.first_party must be of type bool"),
        ("[clients.x]\naccess_lifetime = true", 2, "clients.x.access_lifetime must be of type int"),
        ('[clients.x]\nsecret_file = "nowhere"', 2, "nowhere cannot be read (No such file or directory)"),
        ('[roles.Clerk]\n[roles.guest]\nscopes = ["a"]', 1, "roles.Clerk: A role is named by"),
        ('[roles.admin]\nscopes = ["a"]', 4, "built in"),
        ('[roles.clerk]\nscopes = ["identity:admin"]', 1, "belong to this service"),
        ("[clients.x]", 1, "clients.x: The grants are missing"),
        ('[clients.first-party]\ngrants = ["client_credentials"]', 4, "built in"),
        ('[clients.x]\ngrants = ["password", "refresh_token"]', 1, "Only a first-party client"),
    ],
)
def test_a_file_that_cannot_be_is_refused_whole(command: Command, tmp_path, text, code, said):
    file = tmp_path / "identity.toml"
    file.write_text('[roles.before]\nscopes = ["a"]\n' * ("[" in text[:1] and "[roles]" not in text) + text)
    refused = command("apply", str(file))
    assert (refused.code, refused.out) == (code, "")
    assert said in refused.err
    assert [role["name"] for role in state(command)[0]] == ["admin"]


def test_a_client_does_not_become_first_party_by_a_file(command: Command, file: Path):
    command("apply", str(file))
    file.write_text(FILE.replace("access_lifetime = 300", "first_party = true"))
    refused = command("apply", str(file))
    assert refused.code == 2
    assert "clients.billing: first_party cannot change" in refused.err


def test_a_secret_that_is_too_short_is_refused_without_being_repeated(command: Command, file: Path):
    (file.parent / "web.secret").write_text("hunter2")
    refused = command("apply", str(file))
    assert refused.code == 1
    assert "hunter2" not in refused.err + refused.out
