"""The service as a process: starting, refusing to start, stopping, being killed, and several workers."""

import asyncio
import errno
import json
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx2
import jwt
import pytest

from identity_service import embedded
from identity_service.cli.serve import _print_welcome, _run, _Workers
from identity_service.errors import ConfigurationError
from identity_service.settings import Settings
from identity_service.signing.live import open_keys
from identity_service.verifier import TokenRejected, Verifier
from tests.cli.conftest import StartService
from tests.conftest import PASSWORD, bearer, settings_of
from tests.services import Service, free_port, log_in, refresh, sign_up
from tests.verifier.conftest import until


def refused(service: Service) -> tuple[int, str]:
    """Return the exit code and what was said, which must be one line."""
    _, err = service.finish()
    said = err.strip()
    assert "\n" not in said, said
    assert "Traceback" not in said
    return service.process.returncode, said


def test_it_prints_where_it_is_and_what_to_do_next(serve: StartService):
    service = serve()
    issuer = service.environment["IDENTITY_ISSUER_URL"]
    assert "server" not in service.get("/health").headers
    out, _ = service.stop(signal.SIGINT)
    assert service.process.returncode == 0
    for line in (issuer, f"{issuer}/.well-known/jwks.json", f"{issuer}/docs", "curl"):
        assert line in out


def test_it_names_nothing_to_do_that_is_switched_off(serve: StartService):
    service = serve(IDENTITY_SIGNUP="closed", IDENTITY_PASSWORD_GRANT="off")
    out, _ = service.stop(signal.SIGINT)
    assert "identity-service users create alice" in out
    assert "curl" not in out


def test_in_earnest_it_tells_nobody_to_make_an_account_whose_password_everybody_knows(serve: StartService):
    service = serve(IDENTITY_ISSUER_URL="https://id.example.com")
    out, _ = service.stop(signal.SIGINT)
    assert "identity-service doctor --online" in out
    assert "correct horse" not in out


def test_a_stock_library_verifies_what_it_signs(running: Service):
    issuer = running.environment["IDENTITY_ISSUER_URL"]
    token = sign_up(running, "verified")["access_token"]
    key = jwt.PyJWKClient(f"{running.url}/.well-known/jwks.json").get_signing_key_from_jwt(token)
    claims = jwt.decode(token, key, algorithms=["RS256"], audience="api", issuer=issuer)
    assert claims["client_id"] == "first-party"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_embedded_postgres_starts_and_stops_with_it(serve: StartService, open_folder: Path, tmp_path, number):
    place = open_folder / f"embedded{number}"
    keys = {"IDENTITY_KEYS_DIR": str(tmp_path / "new keys"), "IDENTITY_EMBEDDED_DIR": str(place)}
    service = serve(without=("DATABASE_URL",), **keys)
    sign_up(service)
    assert (place / "postmaster.pid").exists()
    out, _ = service.stop(number)
    assert "Created the signing keys" in out
    assert f"IDENTITY_ISSUER_URL={service.environment['IDENTITY_ISSUER_URL']} make demo" in out
    assert service.process.returncode == 0
    assert not (place / "postmaster.pid").exists()
    if number == signal.SIGTERM:
        again = serve(without=("DATABASE_URL",), **keys)
        assert log_in(again)["token_type"] == "Bearer"


def test_a_kill_never_prevents_the_next_start(serve: StartService, open_folder: Path):
    place = open_folder / "killed"
    service = serve(without=("DATABASE_URL",), IDENTITY_EMBEDDED_DIR=str(place))
    sign_up(service)
    service.process.kill()
    service.finish()
    again = serve(without=("DATABASE_URL",), IDENTITY_EMBEDDED_DIR=str(place))
    log_in(again)
    again.stop()
    assert not (place / "postmaster.pid").exists(), "the server that the killed process left behind is stopped too"


def test_two_services_share_the_embedded_postgres_and_the_last_one_stops_it(serve: StartService, open_folder: Path):
    place = open_folder / "shared"
    one = serve(without=("DATABASE_URL",), IDENTITY_EMBEDDED_DIR=str(place))
    sign_up(one)
    two = serve(without=("DATABASE_URL",), IDENTITY_EMBEDDED_DIR=str(place))
    one.stop()
    log_in(two)
    two.stop()
    assert not (place / "postmaster.pid").exists()


def test_two_first_starts_do_not_take_the_binaries_away_from_each_other(tmp_path, monkeypatch):
    """As root each copies them to where an unprivileged user can reach them; the first copy may be in use already."""
    installed, target = tmp_path / "installed", tmp_path / "copied"
    (installed / "bin").mkdir(parents=True)
    (installed / "bin" / "postgres").write_text("binary", encoding="utf-8")
    monkeypatch.setattr(embedded, "_private_place", lambda *_: target)
    copytree, both = shutil.copytree, threading.Barrier(2)

    def copied_by_both(*arguments: Any, **more: Any) -> Any:
        copy = copytree(*arguments, **more)
        both.wait(10)
        return copy

    monkeypatch.setattr(shutil, "copytree", copied_by_both)
    used = []

    def use() -> None:
        binaries = embedded._copied(installed / "bin")
        used.append((binaries.parent.stat().st_ino, (binaries / "postgres").exists()))

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(use) for _ in range(2)]:
            future.result()
    assert len(set(used)) == 1
    assert used[0][1]
    assert not list(tmp_path.glob("identity-postgres-*"))


def test_binaries_of_which_a_cleaner_left_half_are_copied_again(tmp_path, monkeypatch):
    installed, target = tmp_path / "installed", tmp_path / "copied"
    (installed / "bin").mkdir(parents=True)
    (installed / "bin" / "postgres").write_text("binary", encoding="utf-8")
    (target / "lib").mkdir(parents=True)
    (target / "lib" / "old").touch()
    monkeypatch.setattr(embedded, "_private_place", lambda *_: target)
    assert (embedded._copied(installed / "bin") / "postgres").exists()
    assert not (target / "lib").exists()


def test_the_newest_postgres_that_is_installed_and_new_enough_is_the_embedded_one(monkeypatch, tmp_path):
    """Where the package with the binaries is not."""
    monkeypatch.setattr(embedded, "find_spec", lambda _: None)
    monkeypatch.setattr(embedded, "_PACKAGED", tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    for version in ("9.6", "13", "common"):
        make_binaries(tmp_path / version)
    with pytest.raises(ConfigurationError, match=r"no Postgres to start: .* \(PostgreSQL 14 or newer\)"):
        embedded._find_binaries()
    for version in ("9", "14", "100", "16"):
        make_binaries(tmp_path / version)
    assert embedded._find_binaries() == tmp_path / "100/bin"


def make_binaries(folder: Path) -> None:
    (folder / "bin").mkdir(parents=True)
    for name in ("pg_ctl", "initdb"):
        (folder / "bin" / name).touch()


@pytest.mark.skipif(sys.platform != "linux", reason="the limits of another process can be asked for on Linux only")
def test_a_low_limit_of_open_files_does_not_turn_followers_away(serve: StartService):
    """1024 is what a login shell and many a container give; one process serves 2000 streams."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    try:
        service = serve()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE) == (min(4000, hard), hard)


def test_a_taken_port_is_said_in_one_line(serve: StartService):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        code, said = refused(serve(ready=False, IDENTITY_BIND=bind))
    assert code == 2
    assert said.startswith(f"identity-service: {bind} cannot be bound (Address already in use)")
    assert "IDENTITY_BIND" in said


def test_an_option_overrides_the_setting_in_a_file_too(serve: StartService, tmp_path):
    """Or both would be set and differ, which is refused."""
    for name, value in (("bind", "127.0.0.1:1"), ("workers", "2")):
        (tmp_path / name).write_text(value)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        files = {f"IDENTITY_{name.upper()}_FILE": str(tmp_path / name) for name in ("bind", "workers")}
        service = serve("--bind", bind, "--workers", "1", ready=False, **files)
        code, said = refused(service)
    assert (code, said.partition(" cannot")[0]) == (2, f"identity-service: {bind}")


def test_an_unreachable_database_is_said_in_one_line_without_its_password(serve: StartService):
    url = f"postgresql://service:hunter2-secret@127.0.0.1:{free_port()}/identity"
    code, said = refused(serve(ready=False, DATABASE_URL=url))
    assert code == 5
    assert "DATABASE_URL" in said
    assert "hunter2" not in said


def test_a_wrong_password_of_the_database_is_said_in_one_line(serve: StartService, database_url):
    code, said = refused(serve(ready=False, DATABASE_URL=database_url.replace("identity@", "stranger@")))
    assert code == 5
    assert "DATABASE_URL" in said


def test_a_wrong_setting_is_said_in_one_line(serve: StartService):
    code, said = refused(serve(ready=False, IDENTITY_ACCESS_LIFETIME="ten minutes"))
    assert (code, said) == (2, "identity-service: IDENTITY_ACCESS_LIFETIME: must be a number of seconds.")


def test_keys_that_others_can_read_are_said_in_one_line(serve: StartService, environment):
    next(Path(environment["IDENTITY_KEYS_DIR"]).glob("*.pem")).chmod(0o644)
    code, said = refused(serve(ready=False))
    assert code == 2
    assert "chmod 600" in said


def test_a_ring_whose_active_private_half_is_gone_is_said_in_one_line(serve: StartService, environment):
    """F75: it neither starts with half a key nor makes a new one in silence."""
    for path in Path(environment["IDENTITY_KEYS_DIR"]).glob("*.pem"):
        path.unlink()
    code, said = refused(serve(ready=False))
    assert code == 2
    assert "can sign" in said


def test_the_server_itself_believes_no_proxy_either(serve: StartService):
    """F51: uvicorn would take the client's address from a header of whoever is on this machine."""
    service = serve()
    sign_up(service)
    form = {"grant_type": "password", "username": "alice", "password": PASSWORD}
    service.post("/token", data=form, headers={"X-Forwarded-For": "198.51.100.1", "X-Forwarded-Proto": "https"})
    _, said = service.stop()
    clients = {line["client"] for line in map(json.loads, said.splitlines()) if line.get("path") == "/token"}
    assert clients == {"127.0.0.1"}


def test_an_unknown_setting_is_a_warning_and_no_more(serve: StartService):
    service = serve(IDENTITY_ACESS_LIFETIME="60")
    _, err = service.stop()
    assert "The nearest is IDENTITY_ACCESS_LIFETIME." in err


def test_without_the_schema_it_starts_and_is_not_ready_until_someone_migrates(serve: StartService, new_database):
    url = new_database("not_migrated")
    service = serve(ready=False, DATABASE_URL=url)
    for _ in range(100):
        try:
            answer = service.get("/readyz")
            break
        except httpx2.HTTPError:
            time.sleep(0.1)
    assert (answer.status_code, answer.json()["missing"]) == (503, ["schema"])
    tokens = service.post("/token", data={"grant_type": "password", "username": "alice", "password": PASSWORD})
    assert (tokens.status_code, tokens.json()["error"]) == (503, "temporarily_unavailable")
    migrate = subprocess.run([sys.executable, "-m", "identity_service", "migrate"], env=service.environment, check=True)
    assert migrate.returncode == 0
    service.wait_until_ready()
    sign_up(service)


def test_every_worker_refuses_a_revoked_access_token_at_once(serve: StartService):
    service = serve("--workers", "2")
    tokens = sign_up(service)
    with ThreadPoolExecutor(8) as pool:

        def ask(_: int) -> int:
            return service.get("/users/me", headers=bearer(tokens["access_token"])).status_code

        assert set(pool.map(ask, range(40))) == {200}
        assert service.post("/revoke", data={"token": tokens["refresh_token"]}).status_code == 200
        assert set(pool.map(ask, range(40))) == {401}
    service.stop()
    assert service.process.returncode == 0


def test_workers_take_up_a_rotation_within_seconds_and_refuse_nothing(serve: StartService):
    """KEY-3: no restart, and a stock verifier that never fetches again still knows the key."""
    service = serve("--workers", "2")
    tokens = sign_up(service)
    keys = jwt.PyJWKClient(f"{service.url}/.well-known/jwks.json")
    before = jwt.get_unverified_header(tokens["access_token"])["kid"]
    keys.get_signing_key(before)
    rotate = [sys.executable, "-m", "identity_service", "keys", "rotate", "--now"]
    subprocess.run(rotate, env=service.environment, check=True, stdout=subprocess.DEVNULL)
    assert not (Path(service.environment["IDENTITY_KEYS_DIR"]) / f"{before}.pem").exists()
    deadline = time.monotonic() + 15
    in_a_row = 0
    while in_a_row < 8:
        assert time.monotonic() < deadline, "a worker still signs with the spent key, or does not publish the next one"
        tokens = refresh(service, tokens)
        kid = jwt.get_unverified_header(tokens["access_token"])["kid"]
        assert keys.get_signing_key(kid), "known without fetching again"
        published = service.get("/.well-known/jwks.json").json()["keys"]
        in_a_row = in_a_row + 1 if kid != before and len(published) == 3 else 0


async def test_a_revoked_key_is_refused_by_other_services_within_seconds(serve: StartService):
    """KEY-3: they hear of it on the stream, long before their copy of the JWKS is too old."""
    service = await asyncio.to_thread(serve)
    token = (await asyncio.to_thread(sign_up, service))["access_token"]
    async with Verifier(service.environment["IDENTITY_ISSUER_URL"], audience="api") as verifier:
        await verifier.verify(token)
        await until(lambda: verifier.status().stream_connected)
        kid = jwt.get_unverified_header(token)["kid"]
        program = [sys.executable, "-m", "identity_service", "keys", "revoke", kid, "--yes"]
        done = await asyncio.create_subprocess_exec(*program, env=service.environment, stdout=subprocess.DEVNULL)
        assert await done.wait() == 0
        await until(lambda: kid not in verifier.status().keys, within=10)
        with pytest.raises(TokenRejected, match="unknown_key"):
            await verifier.verify(token)


def test_a_polite_stop_turns_readiness_first(serve: StartService):
    service = serve(IDENTITY_DRAIN="4")
    service.process.send_signal(signal.SIGTERM)
    while (answer := service.get("/readyz")).status_code == 200:
        time.sleep(0.05)
    assert (answer.status_code, answer.json()["missing"]) == (503, ["draining"])
    assert service.get("/health").status_code == 200
    service.finish()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_terminal_that_is_closed_stops_it_like_a_polite_kill(serve: StartService, workers):
    """With several workers uvicorn would start them anew, in a group that has just been told to end."""
    service = serve("--workers", workers, IDENTITY_DRAIN="0")
    service.wait_until_ready()
    service.process.send_signal(signal.SIGHUP)
    service.finish()
    assert service.process.returncode == 0


def test_an_end_that_no_signal_asked_for_is_a_failure(monkeypatch, database_url: str, keys_dir: Path):
    """Or whoever restarts what fails would leave it: a worker could not start."""
    settings = settings_of(database_url, keys_dir).model_copy(update={"workers": 2})
    monkeypatch.setattr("identity_service.logs.configure", lambda _: None)
    monkeypatch.setattr(_Workers, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(_Workers, "run", lambda _: None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(ConfigurationError, match="could not start"):
            _run(settings, open_keys(settings), listener)
        monkeypatch.setattr(_Workers, "run", lambda self: setattr(self, "asked_to_stop", True))
        _run(settings, open_keys(settings), listener)


def test_a_full_disk_in_the_place_of_a_terminal_keeps_nobody_from_logging_in(monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.print", full)
    _print_welcome(Settings.model_validate({}), embedded=True)


def test_workers_are_told_to_stop_when_no_more_connections_are_taken():
    """Or the kernel would take some for as long as the last of them works, and reset them all at the end."""
    listener, seen = socket.create_server(("127.0.0.1", 0)), []
    workers = object.__new__(_Workers)
    workers.sockets, workers.processes = [listener], [Mock(terminate=lambda: seen.append(listener.fileno()))]
    workers.terminate_all()
    assert seen == [-1]


def test_nothing_it_prints_or_writes_outside_the_keys_folder_holds_a_secret(serve: StartService, open_folder: Path):
    """F65, LOG-1: no private key, no password, no token in the output or in any file of the database."""
    place = open_folder / "scanned"
    service = serve(without=("DATABASE_URL",), IDENTITY_EMBEDDED_DIR=str(place), IDENTITY_LOG_LEVEL="debug")
    tokens = sign_up(service)
    service.post("/token", data={"grant_type": "password", "username": "alice", "password": "a wrong one " + PASSWORD})
    service.post("/users", json={"username": "bob", "password": "short hunter2"})
    service.post("/revoke", data={"token": tokens["refresh_token"]})
    out, err = service.stop()
    written = [path.read_bytes() for path in place.rglob("*") if path.is_file()]
    secrets = [PASSWORD, "hunter2", tokens["access_token"], tokens["refresh_token"].split(".")[2], "PRIVATE KEY"]
    printed = re.sub(r"curl.*\n.*\n", "", out)
    for secret in secrets:
        assert secret not in printed.replace(f"'password={PASSWORD}'", "")
        assert secret not in err
        assert not any(secret.encode() in content for content in written), secret


def test_the_healthcheck_command_tells_ready_from_not(running: Service):
    check = [sys.executable, "-m", "identity_service", "healthcheck"]
    healthy = subprocess.run(check, env=running.environment, capture_output=True, text=True, check=False)
    assert (healthy.returncode, healthy.stdout) == (0, '{"status":"ok","missing":[]}\n')
    asked = subprocess.run([*check, "--json"], env=running.environment, capture_output=True, text=True, check=False)
    assert (asked.returncode, asked.stdout) == (0, healthy.stdout)
    elsewhere = running.environment | {"IDENTITY_BIND": f"127.0.0.1:{free_port()}"}
    gone = subprocess.run(check, env=elsewhere, capture_output=True, text=True, check=False)
    assert gone.returncode == 1
    assert "nothing answers" in gone.stderr


def test_the_cookie_of_plain_http_localhost_works_end_to_end(running: Service):
    sign_up(running, "browsing")
    origin = {"Origin": running.environment["IDENTITY_ISSUER_URL"]}
    with httpx2.Client(base_url=running.url, headers=origin) as browser:
        assert browser.post("/login", json={"username": "browsing", "password": PASSWORD}).status_code == 200
        assert browser.cookies.get("identity-refresh")
        assert browser.post("/refresh", json={}).status_code == 200
        assert browser.post("/logout", json={}).status_code == 204
        assert browser.post("/refresh", json={}).status_code == 401
