"""Users come in and go out as JSON lines: what is taken, what is refused and how it is told; nothing is lost."""

import asyncio
import json
import os
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import asyncpg
import bcrypt
import pytest

from tests.cli.conftest import Command
from tests.conftest import PASSWORD

BCRYPT = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
ALICE = {
    "username": "alice",
    "password_hash": BCRYPT,
    "email": "alice@example.com",
    "email_verified": True,
    "roles": ["admin"],
    "disabled": False,
    "id": "6f1c1d3e-6c1c-4f0a-9c39-3f6d4a0f6a11",
    "created_at": "2020-02-29T12:00:00+02:00",
}


def jsonl(lines: Iterable[Any]) -> str:
    return "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)


@pytest.fixture
def ask(database_url: str):
    """Look into the database."""

    def look(sql: str) -> Any:
        async def fetch() -> Any:
            connection = await asyncpg.connect(database_url)
            found = await connection.fetchval(sql)
            await connection.close()
            return found

        return asyncio.run(fetch())

    return look


def shown(command: Command, *arguments: str, stdin: str) -> tuple[int, dict[str, Any]]:
    outcome = command("users", "import", "-", "--json", *arguments, stdin=stdin)
    return outcome.code, json.loads(outcome.out)


def test_a_user_comes_in_as_the_line_says(command: Command, ask):
    code, report = shown(command, stdin=jsonl([ALICE, "", {"username": "Bob"}]))
    assert (code, report) == (
        0,
        {
            "dry_run": False,
            "lines": 2,
            "imported": 2,
            "refused": 0,
            "conflicts": 0,
            "formats": {"bcrypt": 1, "none": 1},
            "roles": {"admin": 1},
            "problems": [],
        },
    )
    user = json.loads(command("users", "show", "alice", "--json").out)
    assert user == {name: value for name, value in ALICE.items() if name not in {"password_hash", "disabled"}} | {
        "created_at": "2020-02-29T10:00:00+00:00",
        "password_changed_at": "2020-02-29T10:00:00+00:00",
        "disabled_at": None,
        "failures": 0,
        "locked_until": None,
    }
    assert ask("SELECT password_hash FROM users WHERE username = 'alice'") == BCRYPT
    assert ask("SELECT password_hash FROM users WHERE username = 'bob'") == "!"
    event = json.loads(ask("SELECT details FROM audit_events WHERE event = 'users.imported'"))
    counted = {"lines": 2, "imported": 2, "refused": 0, "conflicts": 0}
    assert event == counted | {"formats": {"bcrypt": 1, "none": 1}, "roles": {"admin": 1}}
    assert "alice" in command("users", "export").out
    assert ask("SELECT count(*) FROM audit_events WHERE event = 'users.exported'") == 1


def test_the_audit_names_everybody_who_comes_in_with_a_role(command: Command, ask):
    """An import is a way to make administrators."""
    command("roles", "create", "clerk", "--scope", "orders:read")
    assert shown(command, stdin=jsonl([{"username": "carol", "roles": ["admin"]}]))[0] == 0
    lines = [
        ALICE | {"roles": ["admin", "clerk"]},
        {"username": "bob"},
        {"username": "dave", "roles": ["clerk"]},
        {"username": "carol", "roles": ["admin"]},
        {"username": "ALICE", "roles": ["admin"]},
        {"username": "not a name", "roles": ["admin"]},
    ]
    code, report = shown(command, "--skip-invalid", stdin=jsonl(lines))
    assert (code, report["imported"], report["roles"]) == (1, 3, {"admin": 1, "clerk": 2})
    events = ask("""
        SELECT json_agg(json_build_array(subject_kind, u.username, e.details, outcome, actor_kind) ORDER BY e.id)
          FROM audit_events AS e JOIN users AS u ON u.id::text = e.subject_id WHERE event = 'user.created'
    """)
    assert sorted(json.loads(events), key=str) == [
        ["user", username, {"username": username, "roles": roles}, "success", "operator"]
        for username, roles in {"alice": ["admin", "clerk"], "carol": ["admin"], "dave": ["clerk"]}.items()
    ]
    assert ask("SELECT details -> 'roles' FROM audit_events WHERE event = 'users.imported' ORDER BY id DESC LIMIT 1")
    assert command("audit", "verify").code == 0


def test_an_import_that_has_to_give_way_to_others_says_so(command: Command, ask):
    """Deadlocks and serialisation failures (40P01, 40001) are tried again elsewhere; a stream is read once."""
    for code, name in (("40P01", "DeadlockDetectedError"), ("40001", "SerializationError")):
        ask(
            f"CREATE FUNCTION give_way() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION 'give way' USING ERRCODE = '{code}'; END $$"
        )
        ask("CREATE TRIGGER give_way BEFORE INSERT ON users EXECUTE FUNCTION give_way()")
        try:
            outcome = command("users", "import", "-", stdin=jsonl([ALICE]))
        finally:
            ask("DROP FUNCTION give_way CASCADE")
        assert (outcome.code, outcome.out) == (5, "")
        told = f"identity-service: The request conflicted with another one; try again. ({name}: give way)\n"
        assert outcome.err == told


WRONG = {
    "not JSON": "It is not JSON in UTF-8.",
    "[]": "It is not a JSON object.",
    "[" * 20_000: "It is not JSON in UTF-8.",
    '{"username": "a", "username": "b"}': "It has a member twice.",
    '{"username": "' + "x" * 70_000 + '"}': "It is longer than 65536 bytes.",
    '{"username": "x", "is_admin": true}': "Members that are not among username",
    '{"username": "x", "password": "SECRET"}': "Passwords are not imported, only their hashes: password_hash.",
    "{}": "The username must consist of letters",
    '{"username": 7}': "username is not a string.",
    '{"username": "SEC RET"}': "The username must consist of letters",
    '{"username": "\\ud800"}': "The username must consist of letters",
    '{"username": "x", "email": "SECRET"}': "This is not an e-mail address",
    '{"username": "x", "email": "a\\ud800@example.com"}': "",
    '{"username": "x", "email_verified": true}': "email_verified needs an e-mail address.",
    '{"username": "x", "email_verified": "yes"}': "email_verified is neither true nor false.",
    '{"username": "x", "password_hash": "SECRET"}': "The password hash has a format that is not known",
    '{"username": "x", "password_hash": ["SECRET"]}': "password_hash is not a string.",
    json.dumps(
        {"username": "x", "password_hash": f"$2b$31${'.' * 53}"}
    ): "The password hash is outside the accepted range",
    '{"username": "x", "roles": "admin"}': "roles is not an array of strings.",
    '{"username": "x", "roles": ["SECRET"]}': "One of its roles does not exist.",
    '{"username": "x", "id": "SECRET"}': "id is not a UUID.",
    '{"username": "x", "id": "{6f1c1d3e-6c1c-4f0a-9c39-3f6d4a0f6a11}"}': "id is not a UUID.",
    '{"username": "x", "created_at": "2020-02-30T00:00:00Z"}': "created_at is not a time as in RFC 3339.",
    '{"username": "x", "created_at": "0001-01-01T00:00:00+14:00"}': "created_at is not a time as in RFC 3339.",
    '{"username": "x", "created_at": "2020-02-28T00:00:00"}': "created_at has no offset from UTC.",
    '{"username": "x", "created_at": "9999-12-31T23:59:59Z"}': "created_at is in the future.",
    '{"username": "x", "disabled": false, "disabled_at": "2020-02-28T00:00:00Z"}': "disabled and disabled_at con",
}


def test_every_wrong_line_is_named_with_what_is_wrong_and_nothing_of_it_is_repeated(command: Command, ask):
    outcome = command("users", "import", "-", stdin=jsonl([*WRONG, ALICE]))
    assert outcome.code == 1
    told = [line for line in outcome.err.splitlines() if line.startswith("line ")]
    expected = [f"line {number}: {text}" for number, text in enumerate(WRONG.values(), start=1)]
    assert [line for line, start in zip(told, expected, strict=True) if not line.startswith(start)] == []
    assert "SEC" not in outcome.err + outcome.out
    assert "...." not in outcome.err
    assert outcome.out.endswith("Imported 0 users.\n")
    assert ask("SELECT count(*) FROM users") == 0
    assert ask("SELECT count(*) FROM audit_events") == 0


def test_bytes_that_are_no_text_are_one_wrong_line(command: Command, tmp_path: Path):
    (tmp_path / "users.jsonl").write_bytes(b'{"username": "\xff"}\n\n' + jsonl([ALICE]).encode())
    outcome = command("users", "import", str(tmp_path / "users.jsonl"), "--json", "--skip-invalid")
    report = json.loads(outcome.out)
    assert (outcome.code, report["imported"]) == (1, 1)
    assert report["problems"] == [{"line": 1, "problem": "It is not JSON in UTF-8."}]


def test_a_byte_order_mark_is_no_part_of_the_first_line(command: Command, tmp_path: Path):
    """Some editors and exports write one; RFC 8259 8.1 lets it be ignored."""
    (tmp_path / "users.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl([ALICE]).encode())
    outcome = command("users", "import", str(tmp_path / "users.jsonl"), "--json")
    assert (outcome.code, json.loads(outcome.out)["imported"]) == (0, 1), outcome.out


def test_what_repeats_or_exists_already_is_a_conflict_and_nothing_or_the_rest_is_imported(command: Command, ask):
    assert shown(command, stdin=jsonl([ALICE]))[0] == 0
    other_id = "11111111-1111-4111-8111-111111111111"
    lines = [
        {"username": "ALICE"},
        {"username": "carol", "id": ALICE["id"]},
        {"username": "bob", "id": other_id},
        {"username": "BOB"},
        {"username": "dave", "id": other_id},
        {"username": "erin"},
    ]
    expected = [
        {"line": 1, "problem": "Another account has this username or id."},
        {"line": 2, "problem": "Another account has this username or id."},
        {"line": 4, "problem": "An earlier line has the same username or id."},
        {"line": 5, "problem": "An earlier line has the same username or id."},
    ]
    code, report = shown(command, stdin=jsonl(lines))
    assert (code, report["imported"], report["refused"], report["conflicts"]) == (1, 0, 2, 2)
    assert report["problems"] == expected
    assert ask("SELECT count(*) FROM users") == 1
    assert shown(command, stdin=jsonl(lines[:1]))[0] == 4
    code, report = shown(command, "--skip-invalid", stdin=jsonl(lines))
    assert (code, report["imported"], report["problems"]) == (1, 2, expected)
    assert ask("SELECT array_agg(username ORDER BY username) FROM users") == ["alice", "bob", "erin"]
    assert shown(command, "--skip-invalid", stdin=jsonl(lines[2:3]))[0] == 4, "a second time, nothing is left to do"


def test_a_dry_run_says_what_would_happen_and_changes_nothing(command: Command, ask):
    lines = jsonl([ALICE, {"username": "bob", "password_hash": "SECRET"}])
    assert shown(command, "--dry-run", "--skip-invalid", stdin=lines) == (
        1,
        {
            "dry_run": True,
            "lines": 2,
            "imported": 1,
            "refused": 1,
            "conflicts": 0,
            "formats": {"bcrypt": 1},
            "roles": {"admin": 1},
            "problems": [
                {
                    "line": 2,
                    "problem": "The password hash has a format that is not known, or its format's parts are damaged.",
                }
            ],
        },
    )
    outcome = command("users", "import", "-", "--dry-run", stdin=jsonl([ALICE]))
    assert outcome.out == (
        "1 line: 0 refused, 0 in conflict with accounts that exist.\n"
        "Password hashes: 1 bcrypt.\n"
        "Roles: 1 admin.\n"
        "Would import 1 user.\n"
    )
    assert ask("SELECT count(*) FROM users") == ask("SELECT count(*) FROM audit_events") == 0


def test_a_report_names_a_thousand_problems_and_counts_the_rest(command: Command):
    outcome = command("users", "import", "-", stdin="{}\n" * 1500)
    assert outcome.code == 1
    assert len([line for line in outcome.err.splitlines() if line.startswith("line ")]) == 1000
    assert "... and 500 more." in outcome.err
    assert shown(command, stdin="")[1]["lines"] == 0


def test_what_is_exported_comes_back_as_it_was(command: Command, ask, tmp_path: Path):
    command("roles", "create", "clerk", "--scope", "orders:read")
    lines = [
        ALICE,
        {"username": "bob", "roles": ["clerk"], "disabled_at": "2021-01-01T00:00:00.123456Z", "email": "b@exämple.com"},
        {"username": "çelik", "disabled": True, "password_changed_at": "2022-01-01T00:00:00Z"},
    ]
    assert shown(command, stdin=jsonl(lines))[0] == 0
    everything = "SELECT json_agg(u ORDER BY u.id)::text FROM users AS u"
    before = ask(everything)
    file = tmp_path / "users.jsonl"
    assert command("users", "export", str(file)).code == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert command("users", "import", str(file)).code == 4
    ask("DELETE FROM users")
    assert command("users", "import", str(file)).code == 0
    assert ask(everything) == before


def test_an_export_without_hashes_has_none(command: Command, ask):
    shown(command, stdin=jsonl([ALICE]))
    outcome = command("users", "export", "-", "--without-hashes")
    assert BCRYPT[7:] not in outcome.out
    ask("DELETE FROM users")
    assert shown(command, stdin=outcome.out)[1]["formats"] == {"none": 1}


def test_an_export_overwrites_nothing_and_leaves_no_half_a_file(command: Command, ask, tmp_path: Path):
    file = tmp_path / "users.jsonl"
    file.write_text("mine")
    outcome = command("users", "export", str(file))
    assert (outcome.code, file.read_text()) == (2, "mine")
    ask("ALTER TABLE users RENAME COLUMN email_verified TO away")
    try:
        assert command("users", "export", str(tmp_path / "other.jsonl")).code == 5
        assert not (tmp_path / "other.jsonl").exists()
    finally:
        ask("ALTER TABLE users RENAME COLUMN away TO email_verified")


def test_a_file_that_is_not_there_is_a_mistake_of_usage(command: Command, tmp_path: Path):
    assert command("users", "import", str(tmp_path / "none.jsonl")).code == 2


def test_csv_is_not_taken_for_a_thousand_wrong_lines(command: Command, tmp_path: Path):
    (tmp_path / "users.csv").write_text("username,email\nalice,a@example.com\n")
    refused = command("users", "import", str(tmp_path / "users.csv"))
    assert (refused.code, "CSV is not read" in refused.err) == (2, True)


def test_progress_is_shown_to_somebody_who_watches(command: Command, tmp_path: Path, monkeypatch, capfd):
    file = tmp_path / "users.jsonl"
    file.write_text(jsonl([ALICE]))
    quiet = command("users", "import", str(file), "--dry-run")
    assert "Reading" not in quiet.err
    terminal, end = os.openpty()
    with os.fdopen(end, "w") as watched:
        monkeypatch.setattr("sys.stderr", watched)
        assert command("users", "import", str(file), "--dry-run").code == 0
    assert b"100%" in os.read(terminal, 10_000)
    os.close(terminal)


def test_two_thousand_users_come_in_within_seconds(command: Command, ask, tmp_path: Path):
    """A fifth of the goal of 100 000 a minute, which `make bench ONLY=P20` measures: neighbours may be busy."""
    file = tmp_path / "users.jsonl"
    lines = ({"username": f"user.{n}", "email": f"user.{n}@example.com", "password_hash": BCRYPT} for n in range(2_000))
    file.write_text(jsonl(lines))
    started = time.monotonic()
    assert command("users", "import", str(file)).code == 0
    assert time.monotonic() - started < 12
    again = command("users", "import", str(file), "--json")
    assert (again.code, json.loads(again.out)["conflicts"]) == (4, 2_000)
    assert ask("SELECT count(*) FROM users") == 2_000
