"""Commands, run in this process or, where processes are the point, as real ones."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest

from identity_service.cli import run
from identity_service.cli.migrate import upgrade
from identity_service.signing.key_files import KeyFolder
from identity_service.signing.keyring import TokenLifetimes


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


def environment_of(database_url: str, keys_dir: Path) -> dict[str, str]:
    """What a command sees: a database, and keys that were made an hour ago."""
    lifetimes = TokenLifetimes(timedelta(minutes=10), timedelta(days=14))
    KeyFolder(keys_dir, lifetimes).create(now=datetime.now(UTC) - timedelta(hours=1))
    return {
        "DATABASE_URL": database_url,
        "IDENTITY_KEYS_DIR": str(keys_dir),
        "IDENTITY_ARGON2_MEMORY_KIB": "8",
        "IDENTITY_ARGON2_TIME_COST": "1",
    }


@pytest.fixture
def environment(database_url: str, tmp_path: Path) -> dict[str, str]:
    return environment_of(database_url, tmp_path / "cli-keys")


@pytest.fixture
def command(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """Run a command line in this process: `command("users", "show", "alice", stdin="...", IDENTITY_SIGNUP="open")`."""

    def invoke(*arguments: str, stdin: str = "", **variables: str) -> Outcome:
        with monkeypatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("IDENTITY_")]:
                patch.delenv(name)
            for name, value in (environment | variables).items():
                patch.setenv(name, value)
            (tmp_path / "stdin").write_text(stdin)
            patch.setattr(sys, "argv", ["identity-service", *arguments])
            with (tmp_path / "stdin").open() as given:
                patch.setattr(sys, "stdin", given)
                with pytest.raises(SystemExit) as stopped:
                    run(started_at=datetime.now(UTC))
        captured = capfd.readouterr()
        code = stopped.value.code
        return Outcome(code if isinstance(code, int) else 0 if code is None else 1, captured.out, captured.err)

    return invoke


@dataclass
class Service:
    """A real `identity-service serve`."""

    process: "subprocess.Popen[str]"
    url: str
    environment: dict[str, str]

    def get(self, path: str, **more: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=10, **more)

    def post(self, path: str, **more: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, timeout=10, **more)

    def wait_until_ready(self) -> None:
        for _ in range(200):
            try:
                if self.get("/readyz").status_code == 200:
                    return
            except httpx2.HTTPError:
                pass
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.1)
        pytest.fail("the service did not get ready within 20 seconds")

    def stop(self, number: int = signal.SIGTERM) -> tuple[str, str]:
        """Stop the service as an operator would, and return what it printed."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=30)


StartService = Callable[..., Service]


def start_service(environment: dict[str, str], *arguments: str) -> Service:
    """Start `identity-service serve` on a free port."""
    port = free_port()
    given = {
        "PATH": os.environ["PATH"],
        "IDENTITY_BIND": f"127.0.0.1:{port}",
        "IDENTITY_ISSUER_URL": f"http://localhost:{port}",
    }
    own = given | environment
    program = [sys.executable, "-m", "identity_service", "serve", *arguments]
    process = subprocess.Popen(program, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return Service(process, f"http://127.0.0.1:{own['IDENTITY_BIND'].rpartition(':')[2]}", own)


@pytest.fixture(scope="module")
def running(new_database: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all tests that only ask something of it."""
    url = new_database("running")
    upgrade(url)
    service = start_service(environment_of(url, tmp_path_factory.mktemp("running") / "keys"))
    service.wait_until_ready()
    yield service
    service.stop()


@pytest.fixture
def serve(environment: dict[str, str]) -> Iterator[StartService]:
    """Start services with some variables changed; all that were started are stopped at the end."""
    started: list[Service] = []

    def start(*arguments: str, ready: bool = True, without: tuple[str, ...] = (), **variables: str) -> Service:
        own = {name: value for name, value in (environment | variables).items() if name not in without}
        service = start_service(own, *arguments)
        started.append(service)
        if ready:
            service.wait_until_ready()
        return service

    yield start
    for service in started:
        if service.process.poll() is None:
            service.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
