"""Commands, run in this process or, where processes are the point, as real ones."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from identity_service.cli import run
from tests.services import Service, environment_of, start_service


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Outcome]


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
            (tmp_path / "stdin").write_bytes(stdin.encode(errors="surrogateescape"))
            patch.setattr(sys, "argv", ["identity-service", *arguments])
            with (tmp_path / "stdin").open() as given:
                patch.setattr(sys, "stdin", given)
                with pytest.raises(SystemExit) as stopped:
                    run(started_at=datetime.now(UTC))
        captured = capfd.readouterr()
        code = stopped.value.code
        return Outcome(code if isinstance(code, int) else 0 if code is None else 1, captured.out, captured.err)

    return invoke


StartService = Callable[..., Service]

# Tests may come to a file twice in one process, when they are shared out between several.
_databases = count()


@pytest.fixture(scope="module")
def running(
    new_database: Callable[..., str], migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """One service for all tests of a file that only ask something of it."""
    url = new_database(f"running{next(_databases)}", template="pristine")
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
