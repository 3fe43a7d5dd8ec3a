"""`audit tail|export|verify`: the record, for people and for programs."""

import asyncio
import json
import os
import pwd
import queue
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from identity_service.errors import DatabaseUnavailable
from tests.cli.conftest import Command, StartService
from tests.conftest import PASSWORD
from tests.services import sign_up


def test_tail_shows_who_did_what_the_newest_last(command: Command):
    command("users", "create", "alice", "--password-stdin", stdin=PASSWORD)
    command("users", "disable", "alice")
    shown = command("audit", "tail").out.splitlines()
    assert [line.split()[2] for line in shown] == ["user.created", "user.disabled"]
    assert "operator" in shown[0]
    events = json.loads(command("audit", "tail", "--json", "--lines", "1").out)
    assert [event["event"] for event in events] == ["user.disabled"]
    assert events[0]["actor_kind"] == "operator"
    assert json.loads(command("audit", "tail", "--user", "ALICE", "--event", "user.created", "--json").out)
    assert command("audit", "tail", "--user", "bob").code == 3
    assert json.loads(command("audit", "tail", "--event", "role.created", "--json").out) == []
    assert command("audit", "tail", "--event", "user.craeted").code == 2


def test_the_operator_is_who_the_system_says_and_not_the_environment(command: Command, monkeypatch):
    """LOG-1: or anybody could sign with another's name, and with two lines where there was one event."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "mallory\n2026-11-22 09:01:02  user.deleted")
    command("roles", "create", "clerk")
    assert [event["actor_id"] for event in json.loads(command("audit", "tail", "--json").out)] == [
        pwd.getpwuid(os.getuid()).pw_name
    ]
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    command("roles", "create", "driver")
    assert json.loads(command("audit", "tail", "--json").out)[-1]["actor_id"] == str(os.getuid())


def test_no_name_in_the_record_looks_like_another_line_or_moves_the_cursor(command: Command, database_url: str):
    async def insert() -> None:
        connection = await asyncpg.connect(database_url)
        await connection.execute(
            "INSERT INTO audit_events (occurred_at, event, outcome, actor_kind, actor_id, details)"
            " VALUES (now(), 'user.login', 'success', 'operator', $1, $2)",
            "mallory\n2026-11-22 09:01:02  user.deleted\x1b[1A",
            json.dumps({"scope": "\u202egro"}),
        )
        await connection.close()

    asyncio.run(insert())
    (line,) = command("audit", "tail").out.splitlines()
    assert r"mallory\u000a2026" in line
    assert r"\u001b[1A" in line
    assert r"\u202egro" in line


def test_tail_tells_details_and_finds_by_actor_and_time(command: Command):
    command("users", "create", "alice", "--password-stdin", "--role", "admin", stdin=PASSWORD)
    (event,) = json.loads(command("audit", "tail", "--json").out)
    assert command("audit", "tail").out.endswith(' {"roles":["admin"],"username":"alice"}\n')
    for arguments, found in (
        (("--actor", event["actor_id"]), 1),
        (("--actor", "somebody"), 0),
        (("--since", "2026-01-01T00:00:00"), 1),
        (("--until", "2026-01-01T00:00:00"), 0),
    ):
        assert len(json.loads(command("audit", "tail", *arguments, "--json").out)) == found, arguments


@pytest.fixture
def following(environment: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """A process that follows, and has begun to."""
    program = [sys.executable, "-m", "identity_service", "audit", "tail", "--follow", "--json", "--lines", "0"]
    environment = {"PATH": os.environ["PATH"], **environment}
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.terminate()  # SIGINT may be ignored: by what is started in the background


INSERT = """
    INSERT INTO audit_events (occurred_at, event, outcome, actor_kind, subject_id)
    SELECT now(), 'user.login', 'success', 'user', n::text FROM generate_series($1::integer, $2::integer) AS n
"""


def test_following_shows_every_event_also_when_thousands_come_between_two_looks(
    following: "subprocess.Popen[str]", database_url: str
):
    shown: queue.Queue[str] = queue.Queue()

    def pass_on() -> None:
        for line in following.stdout or ():
            shown.put(line)

    threading.Thread(target=pass_on, daemon=True).start()

    async def insert(first: int, last: int) -> None:
        connection = await asyncpg.connect(database_url)
        await connection.execute(INSERT, first, last)
        await connection.close()

    def take(first: int, last: int) -> None:
        subjects = [json.loads(shown.get(timeout=30))["subject_id"] for _ in range(first, last + 1)]
        assert subjects == [str(number) for number in range(first, last + 1)]

    begun = 0
    while shown.empty():  # until it looks
        begun += 1
        asyncio.run(insert(begun, begun))
        time.sleep(0.5)
    first = int(json.loads(shown.get(timeout=30))["subject_id"])
    take(first + 1, begun)
    for last in (begun + 2500, begun + 2501, begun + 4700):
        asyncio.run(insert(begun + 1, last))
        take(begun + 1, last)
        begun = last
    time.sleep(2.5)
    assert shown.empty(), "nothing twice"


def test_export_writes_a_line_for_each_event_into_a_file_that_only_its_owner_reads(command: Command, tmp_path):
    command("users", "create", "alice", "--password-stdin", stdin=PASSWORD)
    file = tmp_path / "events.jsonl"
    assert command("audit", "export", str(file)).code == 0
    assert [json.loads(line)["event"] for line in file.read_text().splitlines()] == ["user.created"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = command("audit", "export", str(file))
    assert again.code == 2
    assert "File exists" in again.err
    everything = command("audit", "export").out.splitlines()
    assert [json.loads(line)["event"] for line in everything] == ["user.created", "audit.exported"]
    assert command("audit", "export", "--json").out.splitlines()[:2] == everything
    assert command("audit", "export", "--until", "2020-01-01T00:00:00").out == ""


def test_verify_of_an_untouched_record_is_whole_and_one_of_a_touched_one_is_not(
    command: Command, serve: StartService, database_url: str
):
    sign_up(serve())

    async def touch(sql: str) -> None:
        connection = await asyncpg.connect(database_url)
        for _ in range(100):
            if not await connection.fetchval("SELECT count(*) FROM audit_events WHERE position IS NULL"):
                break
            await asyncio.sleep(0.1)
        else:
            pytest.fail("nobody links the events")
        await connection.execute(f"SET session_replication_role = replica; {sql}")
        await connection.close()

    asyncio.run(touch(""))
    whole = command("audit", "verify", "--json")
    report = json.loads(whole.out)
    assert (whole.code, report["whole"], report["events"], report["unchained"]) == (0, True, 2, 0)
    noted = f"{report['position']}:{report['hash']}"
    assert noted in command("audit", "verify").out
    assert command("audit", "verify", "--expect", noted).code == 0
    assert command("audit", "verify", "--expect", f"1:{report['hash']}").code == 1
    assert command("audit", "verify", "--expect", "nonsense").code == 2
    asyncio.run(touch("UPDATE audit_events SET actor_id = 'somebody else' WHERE event = 'user.login'"))
    touched = command("audit", "verify")
    assert touched.code == 1
    assert "is not what was recorded" in touched.out


def test_an_export_that_failed_leaves_nothing_in_the_way_of_the_next(command: Command, tmp_path):
    file = tmp_path / "events.jsonl"
    away = command("audit", "export", str(file), DATABASE_URL="postgresql://nobody@127.0.0.1:1/x")
    assert away.code == 5
    assert not file.exists()
    assert command("audit", "export", str(file)).code == 0


@pytest.mark.parametrize("noun", ["audit", "users"])
def test_an_export_that_cannot_be_recorded_leaves_no_file(command: Command, monkeypatch, tmp_path, noun):
    command("users", "create", "alice", "--no-password")

    async def away(*_: Any, **__: Any) -> None:
        raise DatabaseUnavailable(detail="gone")

    monkeypatch.setattr("identity_service.audit.record", away)
    assert command(noun, "export", str(tmp_path / "export")).code == 5
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("noun", ["audit", "users"])
def test_a_full_disk_is_not_blamed_on_the_database_and_what_came_out_is_recorded(
    environment: dict[str, str], command: Command, noun
):
    """LOG-1: whoever reads along could break off before the end, and nobody would know who has all the hashes."""
    program = [sys.executable, "-m", "identity_service", noun, "export", "-"]
    command("users", "create", "alice", "--no-password")
    with Path("/dev/full").open("wb") as full:
        failed = subprocess.run(program, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (failed.returncode, "No space left" in failed.stderr) == (1, True), failed.stderr
    assert json.loads(command("audit", "tail", "--event", f"{noun}.exported", "--json").out)


@pytest.mark.parametrize("noun", ["audit", "users"])
def test_a_file_that_cannot_be_completed_is_said_in_one_line_and_is_gone(
    environment: dict[str, str], command: Command, tmp_path: Path, noun
):
    for name in ("alice", "bob", "carol"):
        command("users", "create", name, "--no-password")
    program = [sys.executable, "-m", "identity_service", noun, "export", str(tmp_path / "export")]
    failed = subprocess.run(
        ["/bin/sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *program],
        env=environment | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (failed.returncode, failed.stderr) == (
        1,
        "identity-service: The output cannot be written: File too large.\n",
    )
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("arguments", [("users", "list", "--search", "\udcff"), ("audit", "tail", "--user", "\udcff")])
def test_octets_that_are_no_text_are_refused_in_one_line(command: Command, arguments):
    refused = command(*arguments)
    assert (refused.code, refused.err) == (2, "identity-service: An argument is not text in UTF-8.\n")
