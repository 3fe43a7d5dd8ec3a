"""Real processes for tests: `identity-service serve`, and whatever else has to run beside it."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO

import httpx2
import pytest

from identity_service.signing.key_files import KeyFolder
from identity_service.signing.keyring import TokenLifetimes
from tests.conftest import PASSWORD

PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Holds no certificates: reading those of the system takes longer than most requests, and nothing here is https."""


@dataclass
class Service:
    """A process that answers HTTP on this machine; `url` is its own address, whatever it calls itself."""

    process: "subprocess.Popen[str]"
    url: str
    environment: dict[str, str]
    output: tuple[TextIO, TextIO]
    """Files and not pipes: nobody reads while the tests run, and a full pipe would hold the service up."""

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def get(self, path: str, **more: Any) -> httpx2.Response:
        return self.ask("GET", path, **more)

    def post(self, path: str, **more: Any) -> httpx2.Response:
        return self.ask("POST", path, **more)

    def ask(self, method: str, path: str, **more: Any) -> httpx2.Response:
        return httpx2.request(method, self.url + path, timeout=10, verify=PLAIN, **more)

    def wait_until_ready(self) -> None:
        for _ in range(200):
            try:
                if self.get("/readyz").status_code == 200:
                    return
            except httpx2.HTTPError:
                pass
            assert self.process.poll() is None, self.finish()
            time.sleep(0.1)
        pytest.fail("the service did not get ready within 20 seconds")

    def command(self, *arguments: str) -> str:
        """Run a command line beside the service and return what it prints."""
        program = [sys.executable, "-m", "identity_service", *arguments]
        return subprocess.run(program, env=self.environment, check=True, stdout=subprocess.PIPE, text=True).stdout

    def stop(self, number: int = signal.SIGTERM) -> tuple[str, str]:
        """Stop the service as an operator would, and return what it printed."""
        self.process.send_signal(number)
        return self.finish()

    def finish(self) -> tuple[str, str]:
        """Wait for the end and return what was printed: standard output, standard error."""
        self.process.wait(timeout=30)
        said = []
        for file in self.output:
            file.seek(0)
            said.append(file.read())
            file.close()
        return said[0], said[1]


def start_service(environment: Mapping[str, str], *arguments: str) -> Service:
    """Start `identity-service serve`, on a free port unless the environment names one."""
    port = free_port()
    own = {"IDENTITY_BIND": f"127.0.0.1:{port}", "IDENTITY_ISSUER_URL": f"http://localhost:{port}", **environment}
    url = f"http://127.0.0.1:{own['IDENTITY_BIND'].rpartition(':')[2]}"
    return start_program([sys.executable, "-m", "identity_service", "serve", *arguments], url, own)


def start_program(command: Sequence[str], url: str, environment: Mapping[str, str]) -> Service:
    """Start any program that will answer at `url`; of our own environment it sees where programs are."""
    own = {"PATH": os.environ["PATH"], **environment}
    output = TemporaryFile("w+"), TemporaryFile("w+")  # noqa: SIM115 - `finish` closes them
    process = subprocess.Popen(command, env=own, stdout=output[0], stderr=output[1], text=True)
    return Service(process, url, own, output)


def environment_of(database_url: str, keys_dir: Path) -> dict[str, str]:
    """What the service and its commands see: a database, and keys that were made an hour ago."""
    lifetimes = TokenLifetimes(timedelta(minutes=10), timedelta(days=14))
    KeyFolder(keys_dir, lifetimes).create(now=datetime.now(UTC) - timedelta(hours=1))
    return {
        "DATABASE_URL": database_url,
        "IDENTITY_KEYS_DIR": str(keys_dir),
        "IDENTITY_THROTTLE_EXEMPT": "127.0.0.0/8",
        "IDENTITY_ARGON2_MEMORY_KIB": "8",
        "IDENTITY_ARGON2_TIME_COST": "1",
    }


def sign_up(service: Service, username: str = "alice") -> dict[str, Any]:
    """Make an account, log in and return the tokens."""
    answer = service.post("/users", json={"username": username, "password": PASSWORD})
    assert answer.status_code == 201, answer.text
    return log_in(service, username)


def log_in(service: Service, username: str = "alice") -> dict[str, Any]:
    return _tokens(service.post("/token", data={"grant_type": "password", "username": username, "password": PASSWORD}))


def refresh(service: Service, tokens: dict[str, Any]) -> dict[str, Any]:
    form = {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]}
    return _tokens(service.post("/token", data=form))


def _tokens(answer: httpx2.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    tokens: dict[str, Any] = answer.json()
    return tokens


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
