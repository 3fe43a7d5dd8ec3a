"""An example beside the service it trusts, each a process of its own; tests come through the front door of both."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest

from identity_service.cli.migrate import upgrade
from identity_service.database import Connection, open_database
from tests.conftest import PASSWORD
from tests.services import Service, environment_of, free_port, start_program, start_service


@dataclass
class Beside:
    """A running example and the service it trusts."""

    service: Service
    url: str

    def change(self, unit: Callable[[Connection], Awaitable[object]]) -> None:
        """Do in the service's database what an administrator would do."""

        async def work() -> None:
            async with open_database(self.service.environment["DATABASE_URL"], pool_size=1) as database:
                await database.transact(unit)

        asyncio.run(work())

    def sign_up(self, username: str) -> None:
        answer = self.service.post("/users", json={"username": username, "password": PASSWORD})
        assert answer.status_code == 201, answer.text

    def log_in(self, username: str, **form: str) -> dict[str, Any]:
        """Return the tokens of a new session."""
        form |= {"grant_type": "password", "username": username, "password": PASSWORD}
        answer = self.service.post("/token", data=form)
        assert answer.status_code == 200, answer.text
        tokens: dict[str, Any] = answer.json()
        return tokens

    def log_out(self, tokens: dict[str, Any]) -> None:
        assert self.service.post("/revoke", data={"token": tokens["refresh_token"]}).status_code == 200


StartExample = Callable[[str], Beside]

_databases = count()


@pytest.fixture(scope="module")
def start_example(
    new_database: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StartExample]:
    """Starts an example and a service that knows its page: `start_example("todos")`."""
    started: list[Service] = []

    def start(name: str) -> Beside:
        database_url, port = new_database(f"example{next(_databases)}"), free_port()
        upgrade(database_url)
        origin = {"IDENTITY_ALLOWED_ORIGINS": f"http://localhost:{port}"}
        keys: Path = tmp_path_factory.mktemp(name) / "keys"
        service = start_service(environment_of(database_url, keys) | origin)
        started.append(service)
        command = [sys.executable, "-m", "uvicorn", f"examples.{name}:app", "--port", str(port), "--log-level", "error"]
        example = start_program(command, f"http://127.0.0.1:{port}", service.environment)
        started.append(example)
        service.wait_until_ready()
        wait_for(f"{example.url}/openapi.json")
        return Beside(service, example.url)

    yield start
    for program in reversed(started):
        program.stop()


def wait_for(url: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if httpx2.get(url, timeout=5).status_code == 200:
                return
        except httpx2.HTTPError:
            time.sleep(0.05)
    pytest.fail(f"{url} did not answer within {seconds} seconds")
