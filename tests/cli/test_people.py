"""Looking after people and keys by command: what is printed, what is recorded, and the exit codes."""

import asyncio
import json
from datetime import timedelta
from uuid import uuid4

import asyncpg
import pytest

from identity_service.audit import Actor
from identity_service.sessions import Login, SessionLimits, lifecycle
from tests.cli.conftest import Command
from tests.conftest import PASSWORD

DAY = timedelta(days=1)
NO_SESSION = "identity-service: There is no such session.\n"


@pytest.fixture
def people(command: Command) -> Command:
    for username, email in (("alan", "x@example.com"), ("alice", "a@example.com"), ("bob", "alfred@example.com")):
        made = command("users", "create", username, "--password-stdin", "--email", email, stdin=PASSWORD)
        assert made.code == 0
    return command


def usernames(command: Command, *arguments: str) -> list[str]:
    outcome = command("users", "list", "--json", *arguments)
    assert outcome.code == 0
    return [user["username"] for user in json.loads(outcome.out)]


def test_users_list_searches_and_goes_on(people: Command):
    assert usernames(people) == ["alan", "alice", "bob"]
    assert usernames(people, "--search", "AL", "--limit", "2") == ["alan", "alice"]
    assert usernames(people, "--search", "AL", "--after", "alice") == ["bob"]
    assert usernames(people, "--search", "nobody") == []
    people("users", "disable", "alan")
    listed = people("users", "list", "--limit", "2")
    assert [line.split()[0] for line in listed.out.splitlines()] == ["alan", "alice"]
    assert listed.out.splitlines()[0].endswith("(disabled)")
    assert listed.err == "identity-service: there are more; go on with --after alice\n"
    assert people("users", "list", "--search", "nobody").out == ""
    assert people("users", "list", "--limit", "0").code == 2
    people("roles", "grant", "bob", "admin")
    assert usernames(people, "--role", "admin") == ["bob"]
    assert usernames(people, "--role", "admin", "--search", "alan") == []
    assert people("users", "list", "--role", "amdin").code == 3


def test_users_reset_password_prints_a_token_once(people: Command):
    token = json.loads(people("users", "reset-password", "ALICE", "--json").out)
    assert token.keys() == {"reset_token", "expires_at"}
    plain = people("users", "reset-password", "alice")
    assert len(plain.out) == 44
    assert "POST /password-reset" in plain.err
    assert people("users", "reset-password", "nobody").code == 3
    people("users", "disable", "alice")
    refused = people("users", "reset-password", "alice")
    assert (refused.code, refused.out) == (4, "")
    assert refused.err == "identity-service: This account is disabled; enable it first.\n"


async def begin_session(url: str, username: str) -> str:
    connection = await asyncpg.connect(url)
    user = await connection.fetchrow("SELECT id, password_changed_at FROM users WHERE username = $1", username)
    assert user is not None
    now, session_id = user["password_changed_at"], uuid4()
    limits = SessionLimits(idle=DAY, absolute=DAY, retry_window=DAY, access=DAY)
    async with connection.transaction():
        login = Login(
            session_id=session_id,
            user_id=user["id"],
            client_id="first-party",
            scope=(),
            amr=("pwd",),
            password_changed_at=now,
            by=Actor("anonymous", address="192.0.2.1", user_agent="Firefox"),
            now=now,
            limits=limits,
        )
        await lifecycle.start(connection, login)
    await connection.close()
    return str(session_id)


def test_sessions_are_listed_and_ended(people: Command, environment, database_url):
    first, second, *more = (asyncio.run(begin_session(database_url, "alice")) for _ in range(4))
    rows = json.loads(people("sessions", "list", "ALICE", "--json").out)
    assert {row["id"] for row in rows} == {first, second, *more}
    assert rows[0].keys() == {
        "id", "client_id", "user_agent", "address", "created_at", "last_used_at", "expires_at",
    }  # fmt: skip
    assert "192.0.2.1  first-party  Firefox" in people("sessions", "list", "alice").out
    assert people("sessions", "revoke", first).out == "Ended.\n"
    assert people("sessions", "revoke", second, "--json").json() == {"id": second, "ended": True}
    again = people("sessions", "revoke", first)
    assert (again.code, again.err) == (3, NO_SESSION)
    assert people("sessions", "revoke-all", "alice").out == "Ended 2 sessions.\n"
    assert json.loads(people("sessions", "list", "alice", "--json").out) == []


def test_a_role_that_changes_can_end_the_sessions_of_who_has_it(people: Command, environment, database_url):
    people("roles", "create", "clerk", "--scope", "a")
    people("roles", "grant", "alice", "clerk")
    for username in ("alice", "bob"):
        asyncio.run(begin_session(database_url, username))
    for more, left in (((), 1), (("--end-sessions",), 0)):
        assert people("roles", "set", "clerk", "--scope", "b", *more).out == "clerk  b\n"
        assert len(json.loads(people("sessions", "list", "alice", "--json").out)) == left
    assert len(json.loads(people("sessions", "list", "bob", "--json").out)) == 1


@pytest.mark.parametrize(
    "arguments", [("revoke", "x"), ("revoke", str(uuid4())), ("list", "nobody"), ("revoke-all", "nobody")]
)
def test_what_is_not_there_exits_with_three(command: Command, arguments):
    assert command("sessions", *arguments).code == 3


def test_changes_of_the_keys_are_recorded_with_who_made_them(command: Command):
    rows = json.loads(command("keys", "rotate", "--json").out)
    kid = next(row["kid"] for row in rows if row["state"] == "retiring")
    for _ in range(2):
        assert command("keys", "revoke", kid, "--yes").code == 0
    events = [json.loads(line) for line in command("audit", "export", "-").out.splitlines()]
    active = next(row["kid"] for row in rows if row["state"] == "active")
    told = [(event["event"], event["subject_id"], event["actor_kind"]) for event in events if event["subject_kind"]]
    assert told[:2] == [("key.rotated", active, "operator"), ("key.revoked", kid, "operator")]
    assert len([event for event in told if event[0].startswith("key.")]) == 2


def test_keys_change_while_the_database_is_away_and_say_that_nothing_was_recorded(command: Command, tmp_path):
    """In an emergency nothing may be in the way."""
    away = {"DATABASE_URL": f"postgresql://x@/y?host={tmp_path}"}
    kid = json.loads(command("keys", "list", "--json").out)[1]["kid"]
    for arguments in (("rotate", "--now"), ("revoke", kid, "--yes")):
        outcome = command("keys", *arguments, **away)
        assert outcome.code == 0
        assert "nothing was recorded in the audit" in outcome.err
    states = {row["kid"]: row["state"] for row in json.loads(command("keys", "list", "--json").out)}
    assert states[kid] == "revoked"
