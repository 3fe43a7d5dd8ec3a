"""The service as a process on cores of its own, its Postgres on others, and sessions ready to be refreshed."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlencode, urlsplit

import asyncpg

from bench.load import on_cores
from identity_service.embedded import _Server, postgres
from identity_service.shell import uuid7
from identity_service.signing.key_files import KeyFolder
from identity_service.signing.keyring import Key, TokenLifetimes
from identity_service.tokens import refresh

LIFETIMES = TokenLifetimes(timedelta(minutes=10), timedelta(days=14))
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
FIRST, LAST = CORES[:1], CORES[-1:]
"""Where the service runs alone, and where everything else does. Only with two cores these are two."""

CHEAP_HASHES: Any = {"IDENTITY_ARGON2_MEMORY_KIB": "8", "IDENTITY_ARGON2_TIME_COST": "1"}
"""Settings for what is not about logins."""

Process: TypeAlias = "subprocess.Popen[bytes]"

_START_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Installation:
    """A Postgres with the schema, and a folder of keys. Services come and go."""

    folder: Path
    database_url: str
    key: Key

    def ask(self, sql: str) -> tuple[Any, ...]:
        """Return the first row of what the database answers, once the statistics of all its sessions are in."""

        async def ask() -> tuple[Any, ...]:
            db = await asyncpg.connect(self.database_url)
            try:
                await asyncio.sleep(1.1)  # sessions that are idle tell theirs a second later
                return tuple(await db.fetchrow(sql) or ())
            finally:
                await db.close()

        return asyncio.run(ask())

    def restart(self, *, cores: Sequence[int] = (), options: Sequence[str] = ()) -> None:
        """Stop Postgres and start it with other settings. No service may run."""
        server = _Server.at(self.folder / "postgres")
        server.stop()
        with on_cores(cores):
            server.ensure_running(options)

    @contextmanager
    def serve(
        self, *, cores: Sequence[int] = (), until: Callable[[str, "Process"], None] | None = None, **settings: str
    ) -> Iterator["Service"]:
        """Run the service. What is not set is at its default, but for the log: only warnings.

        Args:
            until: waits until it may be used, instead of asking whether it is ready.
        """
        port = free_port()
        url = f"http://localhost:{port}"
        own = {
            "DATABASE_URL": self.database_url,
            "IDENTITY_BIND": f"127.0.0.1:{port}",
            "IDENTITY_ISSUER_URL": url,
            "IDENTITY_KEYS_DIR": str(self.folder / "keys"),
            "IDENTITY_LOG_LEVEL": "warning",
            "IDENTITY_THROTTLE_EXEMPT": "127.0.0.0/8",
        }
        command = [sys.executable, "-m", "identity_service", "serve"]
        with on_cores(cores), (self.folder / "log").open("w") as log:
            process = subprocess.Popen(command, env=clean_environment() | own | settings, stdout=log)  # noqa: S603 - ours
        try:
            (until or wait_until_ready)(url, process)
            yield Service(url, process.pid, self)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=_START_SECONDS)


@dataclass(frozen=True, slots=True)
class Service:
    """A service that runs; `url` is its address and its issuer."""

    url: str
    pid: int
    at: Installation

    def sessions(self, count: int) -> Path:
        """Begin sessions and return a file with their refresh tokens, a line each, in no order."""
        path = self.at.folder / "refresh-tokens"
        tokens = asyncio.run(self._begin(count))
        random.shuffle(tokens)
        path.write_text("\n".join(tokens) + "\n", encoding="ascii")
        return path

    async def _begin(self, count: int) -> list[str]:
        db = await asyncpg.connect(self.at.database_url)
        try:
            now = await db.fetchval("SELECT date_trunc('second', now())")
            ids = [uuid7(now) for _ in range(count)]
            user_id = uuid7(now)
            await db.execute(_USER, user_id, f"bench-{user_id}", now)
            await db.execute(_SESSIONS, ids, user_id, now, now + timedelta(days=30))
        finally:
            await db.close()
        return [
            refresh.mint(
                self.at.key,
                refresh.RefreshClaims(self.url, user_id, "first-party", session, 0, now, now + timedelta(days=14)),
            )
            for session in ids
        ]

    def memory(self) -> int:
        """Return the resident memory of the process in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


_USER = """
    INSERT INTO users (id, username, password_hash, password_changed_at, created_at) VALUES ($1, $2, '', $3, $3)
"""
_SESSIONS = """
    INSERT INTO sessions (id, user_id, client_id, scope, amr, authenticated_at, password_changed_at, rotated_at,
                          expires_at, access_expires_at)
    SELECT id, $2, 'first-party', '{}', '{pwd}', $3, $3, $3, $4, $3 FROM unnest($1::uuid[]) AS id
"""


@contextmanager
def installation(*, cores: Sequence[int] = (), options: Sequence[str] = ()) -> Iterator[Installation]:
    """Make a Postgres, durable as it comes, and keys, and take all of it away at the end."""
    with tempfile.TemporaryDirectory(prefix="identity-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # Postgres may run as another user
        with ExitStack() as stack:
            with on_cores(cores):
                server = stack.enter_context(postgres(folder / "postgres", options=options))
            command("migrate", DATABASE_URL=server.url)
            ring = KeyFolder(folder / "keys", LIFETIMES).create(now=datetime.now(UTC) - timedelta(days=1))
            yield Installation(folder, server.url, ring.signer(datetime.now(UTC)))


def command(*arguments: str, stdin: str = "", **environment: str) -> None:
    """Run a command line of ours to its end."""
    program = [sys.executable, "-m", "identity_service", *arguments]
    subprocess.run(  # noqa: S603 - ours
        program,
        env=clean_environment() | environment,
        input=stdin,
        stdout=subprocess.DEVNULL,
        text=True,
        check=True,
    )


def clean_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("IDENTITY_")}
    for name in ("DATABASE_URL", "DATABASE_URL_FILE"):
        kept.pop(name, None)
    kept.pop("PYTHONDONTWRITEBYTECODE", None)  # an installation has the bytecode of what it imports
    return kept


def wait_until_ready(url: str, process: Process, path: str = "/readyz") -> None:
    ask_until_answered(url, process, "GET", path)


def ask_until_answered(url: str, process: Process, method: str, path: str, **form: str) -> None:
    """Ask a process that is starting again and again, until it answers 200."""
    address = urlsplit(url)
    assert address.hostname is not None, "it is one of ours"
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        asking = HTTPConnection(address.hostname, address.port, timeout=_START_SECONDS)
        try:
            asking.request(method, path, urlencode(form), {"Content-Type": "application/x-www-form-urlencoded"})
            if asking.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            asking.close()
        time.sleep(0.005)
    raise RuntimeError("the service did not start; see the lines above")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
