"""`doctor`: each of its checks on an installation that is well, and on one that is not in that one way."""

import asyncio
import json
import platform
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from identity_service.cli import doctor
from identity_service.cli.doctor import Finding
from identity_service.database import SCHEMA_HEAD, open_database
from identity_service.settings import Settings
from identity_service.signing.key_files import KeyFolder
from identity_service.signing.keyring import TokenLifetimes
from identity_service.signing.live import key_folder
from tests.cli.conftest import Command
from tests.conftest import PASSWORD, START
from tests.services import Service, free_port

LIFETIMES = TokenLifetimes(timedelta(minutes=10), timedelta(days=14))


@pytest.fixture
def well(settings: Settings) -> Settings:
    """Settings of an installation in which nothing is odd."""
    return changed(settings, signup="closed", password_grant="off", bind="0.0.0.0:8000")


def changed(settings: Settings, **more: Any) -> Settings:
    return Settings.model_validate(settings.model_dump() | more)


def named(findings: list[Finding], check: str) -> Finding:
    (found,) = (finding for finding in findings if finding.check == check)
    return found


# Settings


@pytest.mark.parametrize(
    ("check", "odd"),
    [
        (doctor.issuer, {"issuer_url": "http://localhost:8000"}),
        (doctor.cookies, {"issuer_url": "http://localhost:8000"}),
        (doctor.hosts, {"allowed_hosts": ("*",)}),
        (doctor.proxy, {"bind": "127.0.0.1:8000"}),
        (doctor.sign_up, {"signup": "open"}),
        (doctor.password_grant, {"password_grant": "on"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_odd_in_the_settings_is_a_warning_with_its_fix(well, check, odd):
    assert check(well).state == "ok"
    found = check(changed(well, **odd))
    assert (found.state, bool(found.fix)) == ("warn", True)


def test_a_hash_that_costs_next_to_nothing_or_half_a_second_is_a_warning(well, monkeypatch):
    """The tests' own cost is one."""
    found = doctor.hashing_cost(well)
    assert (found.state, found.fix[:5]) == ("warn", "unset")
    assert "logins per second and core" in found.text
    monkeypatch.setattr(doctor, "FASTEST_HASH", 0.0)
    assert doctor.hashing_cost(well).state == "ok"
    monkeypatch.setattr(doctor, "SLOWEST_HASH", 0.0)
    assert doctor.hashing_cost(well).fix.startswith("lower IDENTITY_ARGON2_TIME_COST")


@pytest.mark.parametrize(
    ("tag", "processor", "said"),
    [
        (
            "cp310-abi3-manylinux_2_28_x86_64",
            "x86_64",
            "the published wheel, which is for any processor; `make fast-hash`",
        ),
        ("cp310-abi3-manylinux_2_28_aarch64", "aarch64", "the published wheel"),
        ("cp311-cp311-linux_x86_64", "x86_64", "built from source"),
    ],
)
def test_the_build_of_argon2_is_named(well, monkeypatch, tag, processor, said):
    class Installed:
        version = "26.2.0"

        def read_text(self, name: str) -> str:
            return f"Wheel-Version: 1.0\nTag: {tag}\n" if name == "WHEEL" else ""

    monkeypatch.setattr(doctor, "distribution", lambda name: Installed())
    monkeypatch.setattr(platform, "machine", lambda: processor)
    found = doctor.hashing_build(well)
    assert (found.state, found.fix) == ("ok", "")
    assert f"argon2-cffi-bindings 26.2.0, {said}" in found.text


def test_the_build_of_argon2_that_runs_is_found(well):
    assert version("argon2-cffi-bindings") in doctor.hashing_build(well).text


# Keys


def test_keys_that_are_well_are_four_times_ok_but_for_the_passphrase(well):
    states = {found.check: found.state for found in doctor.of_keys(well, START + timedelta(days=1))}
    assert states == {"keys folder": "ok", "keys at rest": "warn", "active key": "ok", "standby key": "ok"}


def test_keys_that_others_can_read_fail_with_the_command_that_mends_it(well):
    next(well.keys_dir.glob("*.pem")).chmod(0o644)
    (found,) = doctor.of_keys(well, START)
    assert (found.check, found.state) == ("keys folder", "fail")
    assert "chmod 600" in found.text


def test_no_keys_fail(well, tmp_path):
    (found,) = doctor.of_keys(changed(well, keys_dir=tmp_path / "none"), START)
    assert (found.state, "serve" in found.fix) == ("fail", True)


def test_a_ring_that_is_gone_is_not_taken_for_a_new_installation(well):
    (well.keys_dir / "keyring.json").unlink()
    (found,) = doctor.of_keys(well, START)
    assert (found.state, found.fix) == ("fail", "")


def test_a_standby_key_that_cannot_sign_fails(well):
    standby = key_folder(well).read().standby(START)
    assert standby is not None
    (well.keys_dir / f"{standby.kid}.pem").unlink()
    found = {found.check: found for found in doctor.of_keys(well, START)}["standby key"]
    assert (found.state, "rotate" in found.fix) == ("fail", True)


def test_a_keys_folder_that_cannot_be_written_is_found(well, monkeypatch):
    """Mounted read-only, say. The superuser may write to all others."""
    monkeypatch.setattr("os.access", lambda *_: False)
    assert doctor.of_keys(well, START)[0].state == "warn"


def test_a_private_half_from_before_the_passphrase_is_found(well, tmp_path):
    with_passphrase = changed(well, keys_passphrase="long and secret")
    assert "keys rotate --now" in doctor.encryption(with_passphrase).fix
    new = changed(with_passphrase, keys_dir=tmp_path / "new")
    KeyFolder(new.keys_dir, LIFETIMES, b"long and secret").create(now=START)
    assert doctor.encryption(new).state == "ok"


def test_an_active_key_that_is_gone_or_old_is_found(well):
    old = START + timedelta(days=92)
    ring = KeyFolder(well.keys_dir, LIFETIMES).read()
    assert "would have rotated it" in doctor.active_key(well, ring, old).text
    by_hand = changed(well, key_rotation_period=0)
    assert "make rotate-keys" in doctor.active_key(by_hand, ring, old).fix
    for path in well.keys_dir.glob("*.pem"):
        path.unlink()
    gone = KeyFolder(well.keys_dir, LIFETIMES).read()
    assert doctor.active_key(well, gone, START).state == "fail"


def test_no_standby_key_fails(well):
    ring = KeyFolder(well.keys_dir, LIFETIMES).read()
    assert doctor.standby_key(ring, START).state == "ok"
    lone = type(ring)(tuple(key for key in ring.keys if key.signs_from), ring.lifetimes)
    assert doctor.standby_key(lone, START).state == "fail"


# The front door


def test_the_front_door_of_a_running_service_is_well(running: Service):
    settings = Settings.model_validate(
        {
            "issuer_url": running.environment["IDENTITY_ISSUER_URL"],
            "keys_dir": running.environment["IDENTITY_KEYS_DIR"],
        }
    )
    assert {found.check: found.state for found in doctor.front_door(settings, insist=True)} == {
        "front door": "ok",
        "front door keys": "ok",
        "front door clock": "ok",
    }


def test_a_front_door_that_belongs_to_another_is_found(running: Service, keys_dir):
    """The same address by another name: another issuer, other keys."""
    other = Settings.model_validate({"issuer_url": running.url, "keys_dir": keys_dir})
    found = doctor.front_door(other, insist=True)
    assert named(found, "front door").state == "fail"
    assert named(found, "front door keys").state == "fail"


def test_a_front_door_that_does_not_answer_fails_only_who_insists(well):
    nowhere = changed(well, issuer_url=f"http://localhost:{free_port()}")
    assert [found.state for found in doctor.front_door(nowhere, insist=True)] == ["fail"]
    assert [found.state for found in doctor.front_door(nowhere, insist=False)] == ["warn"]


@pytest.mark.parametrize(
    ("date", "state"),
    [
        ("Sun, 22 Nov 2026 12:00:00 GMT", "ok"),
        ("Sun, 22 Nov 2026 12:00:00 -0000", "ok"),
        ("Sun, 22 Nov 2026 11:59:50 GMT", "warn"),
        ("Sun, 22 Nov 2026 12:00:10 GMT", "warn"),
        ("Sun, 22 Nov 2026 12:02:00 GMT", "fail"),
        ("yesterday", "warn"),
        (None, "warn"),
    ],
)
def test_clocks_that_differ_are_found(date, state):
    assert doctor.same_time("clock", date, START, START + timedelta(milliseconds=300)).state == state


# The database


async def test_a_database_that_is_well_has_only_nobody_to_administer_it(well):
    states = {found.check: found.state for found in await doctor.of_database(well)}
    assert states == {
        "database": "ok",
        "database clock": "ok",
        "pooler": "ok",
        "schema": "ok",
        "revocations": "ok",
        "administrator": "warn",
    }


async def test_a_database_that_takes_no_writes_fails(well, new_database):
    """A standby, say, which answers everything that only reads."""
    url = await asyncio.to_thread(new_database, "read_only", "pristine")
    async with open_database(url, pool_size=1) as database, database.connection() as db:
        await db.execute("ALTER DATABASE read_only SET default_transaction_read_only = on")
    found = named(await doctor.of_database(changed(well, database_url=url)), "database")
    assert (found.state, "target_session_attrs" in found.fix) == ("fail", True)


async def test_revocations_that_the_role_may_not_read_fail(well, api):
    """Nothing else needs that privilege, and nobody would hear of a logout."""
    async with api.database.connection() as db:
        await db.execute("ALTER SEQUENCE status_index_seq RENAME TO status_index_seq_away")
        try:
            found = await doctor.revocations(api.database)
        finally:
            await db.execute("ALTER SEQUENCE status_index_seq_away RENAME TO status_index_seq")
    assert found.state == "fail"


async def test_the_embedded_database_is_a_warning(well):
    assert (await doctor.of_database(well, embedded=True))[0].state == "warn"


async def test_an_old_server_is_a_warning(api, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_POSTGRES", 99)
    assert (await doctor.server(api.database, "here", embedded=False)).state == "warn"


async def test_a_database_whose_clock_differs_is_found(api, monkeypatch):
    monkeypatch.setattr(doctor, "utc_now", lambda: datetime.now(UTC) + timedelta(minutes=2))
    assert (await doctor.database_clock(api.database)).state == "fail"


async def test_notifications_that_do_not_arrive_are_a_warning(api, monkeypatch):
    """As behind a pooler in transaction mode, which takes LISTEN and forgets it."""
    assert await api.database.hears("doctor")
    listen = asyncpg.Connection.add_listener

    async def forget(connection: Any, channel: str, callback: Any) -> None:
        await listen(connection, channel, callback)
        await connection.execute("UNLISTEN *")

    monkeypatch.setattr(asyncpg.Connection, "add_listener", forget)
    assert not await api.database.hears("doctor", within=0.2)
    assert (await doctor.pooler(api.database)).state == "warn"


async def test_a_database_without_our_schema_fails_with_the_command_that_makes_it(well, new_database):
    url = await asyncio.to_thread(new_database, "doctor_without_schema")
    found = named(await doctor.of_database(changed(well, database_url=url)), "schema")
    assert (found.state, found.fix) == ("fail", "`identity-service migrate`")


async def test_a_newer_schema_is_fine(api):
    async with api.database.connection() as db:
        await db.execute("UPDATE alembic_version SET version_num = '9999'")
        try:
            found = await doctor.schema(api.database)
        finally:
            await db.execute("UPDATE alembic_version SET version_num = $1", SCHEMA_HEAD)
    assert (found.state, "newer" in found.text) == ("ok", True)


async def test_an_administrator_is_found_as_long_as_they_can_log_in(api, alice):
    async with api.database.connection() as db:
        await db.execute("UPDATE users SET roles = '{admin}'")
        assert (await doctor.administrator(api.database)).state == "ok"
        await db.execute("UPDATE users SET disabled_at = now()")
        assert (await doctor.administrator(api.database)).state == "warn"


# The command


def test_the_command_exits_with_zero_when_nothing_fails(command: Command):
    command("users", "create", "root", "--password-stdin", "--role", "admin", stdin=PASSWORD)
    outcome = command("doctor", "--json", IDENTITY_ISSUER_URL="https://id.example.com")
    found = json.loads(outcome.out)
    assert outcome.code == 0, found
    assert all(entry.keys() == {"check", "state", "text", "fix"} for entry in found)
    assert len(found) >= 17
    assert all(entry["fix"] for entry in found if entry["state"] != "ok")
    printed = command("doctor", IDENTITY_ISSUER_URL="https://id.example.com").out.splitlines()
    assert len(printed) == len(found) + sum(bool(entry["fix"]) for entry in found)


def test_the_command_exits_with_one_when_something_fails(command: Command, tmp_path):
    assert command("doctor", IDENTITY_KEYS_DIR=str(tmp_path / "none")).code == 1
    wrong = command("doctor", "--json", IDENTITY_ACCESS_LIFETIME="ten minutes")
    assert wrong.code == 1
    assert "IDENTITY_ACCESS_LIFETIME" in json.loads(wrong.out)[0]["text"]


def test_the_command_exits_with_five_without_the_password_when_the_database_is_away(command: Command):
    url = f"postgresql://service:hunter2-secret@127.0.0.1:{free_port()}/identity"
    outcome = command("doctor", DATABASE_URL=url)
    assert outcome.code == 5
    assert "hunter2" not in outcome.out + outcome.err
    assert "check DATABASE_URL" in outcome.out


def test_an_unknown_variable_and_a_missing_embedded_database_are_warnings(command: Command, tmp_path: Path):
    folder = tmp_path / "nothing"
    odd = {"DATABASE_URL": "", "IDENTITY_EMBEDDED_DIR": str(folder), "IDENTITY_SINGUP": "closed"}
    # Its front door is asked too, and some other service may listen where one listens that was told nothing.
    outcome = command("doctor", "--json", **odd, IDENTITY_BIND=f"127.0.0.1:{free_port()}")
    found = {entry["check"]: entry for entry in json.loads(outcome.out)}
    assert (outcome.code, found["settings"]["state"], found["database"]["state"]) == (0, "warn", "warn")
    assert "IDENTITY_SIGNUP" in found["settings"]["text"]
    assert not folder.exists()
