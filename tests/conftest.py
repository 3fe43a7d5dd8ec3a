"""A real Postgres, real keys and a clock that tests turn by hand. Nothing of ours is replaced by a stand-in."""

import asyncio
import os
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import asyncpg
import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from fastapi import FastAPI

from identity_service.app import create_app
from identity_service.audit import Actor
from identity_service.cli.migrate import upgrade
from identity_service.clients import registration
from identity_service.database import Database
from identity_service.embedded import postgres
from identity_service.runtime import Runtime
from identity_service.settings import Settings
from identity_service.shell import client_secret
from identity_service.signing.key_files import KeyFolder
from identity_service.signing.keyring import TokenLifetimes
from identity_service.signing.live import LiveKeyring, open_keys


def _use_memory_for_files() -> None:
    """Put everything temporary into memory where there is plenty: a Postgres is made of very many small files."""
    memory = Path("/dev/shm")  # noqa: S108 - not a name of our own in it, only what `tempfile` makes
    if "TMPDIR" not in os.environ and memory.is_dir():
        room = os.statvfs(memory)
        if room.f_bavail * room.f_frsize > 4 << 30 and not room.f_flag & os.ST_NOEXEC:
            os.environ["TMPDIR"] = tempfile.tempdir = str(memory)


_use_memory_for_files()


@pytest.fixture(scope="session", autouse=True)
def _clocks_may_differ() -> Iterator[None]:
    """Ours stands still, the database's goes on."""
    with pytest.MonkeyPatch.context() as patch:
        for where in ("housekeeping", "web.health"):
            patch.setattr(f"identity_service.{where}.CLOCK_SKEW", timedelta(days=36500))
        yield


ISSUER = "https://id.example.com"
TESTER = Actor("service", "tests")
START = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)
PASSWORD = "correct horse battery staple"


class Clock:
    """A clock that stands still until a test turns it."""

    def __init__(self) -> None:
        self.time = START

    def __call__(self) -> datetime:
        return self.time

    def advance(self, **duration: float) -> None:
        self.time += timedelta(**duration)


@dataclass
class Api:
    """A running service and an HTTP client in front of it."""

    app: FastAPI
    http: httpx2.AsyncClient
    clock: Clock
    settings: Settings
    keys: LiveKeyring

    @property
    def runtime(self) -> Runtime:
        runtime: Runtime = self.app.state.runtime
        return runtime

    @property
    def database(self) -> Database:
        return self.runtime.database

    async def sign_up(self, username: str = "alice", password: str = PASSWORD, **more: Any) -> "Account":
        answer = await self.http.post("/users", json={"username": username, "password": password, **more})
        assert answer.status_code == 201, answer.text
        return Account(self, answer.json()["id"], username, password)

    async def token(self, **form: str) -> httpx2.Response:
        """Post a form to the token endpoint."""
        return await self.http.post("/token", data=form)

    async def refresh(self, refresh_token: str, **form: str) -> httpx2.Response:
        return await self.token(grant_type="refresh_token", refresh_token=refresh_token, **form)

    async def me(self, access_token: str) -> httpx2.Response:
        return await self.http.get("/users/me", headers=bearer(access_token))

    async def forget_failures(self) -> None:
        """Let the next wrong password be looked at like the first."""
        async with self.database.connection() as db:
            await db.execute("DELETE FROM throttles")

    async def scalar(self, sql: str, *arguments: Any) -> Any:
        """Look into the database."""
        async with self.database.connection() as db:
            return await db.fetchval(sql, *arguments)


@dataclass
class Account:
    """Somebody who has signed up."""

    api: Api
    id: str
    username: str
    password: str = field(repr=False)

    async def log_in(self, **form: str) -> dict[str, Any]:
        answer = await self.api.token(grant_type="password", username=self.username, password=self.password, **form)
        assert answer.status_code == 200, answer.text
        tokens: dict[str, Any] = answer.json()
        return tokens


@dataclass
class Robot:
    """A registered client that knows its secret."""

    api: Api
    client_id: str
    secret: str = field(repr=False)

    async def post(self, path: str, **form: str) -> httpx2.Response:
        """Post a form as this client, by Basic."""
        return await self.api.http.post(path, data=form, auth=(self.client_id, self.secret))

    async def token(self, **form: str) -> httpx2.Response:
        return await self.post("/token", **({"grant_type": "client_credentials"} | form))

    async def access_token(self, **form: str) -> str:
        answer = await self.token(**form)
        assert answer.status_code == 200, answer.text
        token: str = answer.json()["access_token"]
        return token

    async def introspect(self, token: str) -> Any:
        answer = await self.post("/introspect", token=token)
        assert answer.status_code == 200, answer.text
        return answer.json()


async def register(api: Api, client_id: str, **more: Any) -> Robot:
    """Make a client, as the command does: `await register(api, "robot", scope="a b", first_party=True)`."""
    facts: dict[str, Any] = {
        "grants": ["client_credentials"],
        "scope": "orders:read orders:write",
        "audience": [],
        "first_party": False,
        "access_lifetime": None,
        "secret": client_secret(),
    } | more
    await api.database.transact(
        lambda db: registration.create(
            db,
            client_id,
            **facts,
            issuer=ISSUER,
            longest_lifetime=api.settings.access_lifetime,
            by=TESTER,
            now=api.clock(),
        )
    )
    return Robot(api, client_id, facts["secret"])


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="tests/processes: take minutes and many samples")


_WHEN_WE_ARE_KILLED = """
read -r nothing  # until the other end of the pipe is gone
for file in "$0"/*/postmaster.pid; do kill -QUIT "$(head -n 1 "$file")"; done 2> /dev/null
sleep 1
rm -rf "$0"
"""


@pytest.fixture(scope="session")
def open_folder() -> Iterator[Path]:
    """A temporary folder that the user who runs Postgres for root can pass through; pytest's own are closed.

    Servers with their data in it are stopped, and it is deleted, even when the tests are killed.
    """
    with TemporaryDirectory(prefix="identity-tests-") as folder:
        Path(folder).chmod(0o755)
        guard = ["/bin/sh", "-c", _WHEN_WE_ARE_KILLED, folder]
        with subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True) as guarding:
            yield Path(folder)
            guarding.kill()


@pytest.fixture(scope="session")
def postgres_url(open_folder: Path) -> Iterator[str]:
    """A server of our own for the whole run; nothing it holds has to survive."""
    with postgres(open_folder / "postgres", options=("fsync=off", "full_page_writes=off")) as server:
        yield server.url


@pytest.fixture(scope="session")
def new_database(postgres_url: str) -> Callable[..., str]:
    """Makes a database and returns its URL."""

    def make(name: str, template: str = "template1") -> str:
        async def create() -> None:
            connection = await asyncpg.connect(postgres_url)
            try:
                await connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
            finally:
                await connection.close()

        asyncio.run(create())
        return postgres_url.replace("/postgres?", f"/{name}?")

    return make


@pytest.fixture(scope="session")
def migrated(new_database: Callable[..., str]) -> str:
    """The URL of a database with our schema, migrated as a deployment does; `pristine` is its template."""
    upgrade(new_database("pristine"))
    return new_database("migrated", "pristine")


@pytest.fixture
def database_url(migrated: str) -> str:
    """The same database without a row in it."""

    async def empty() -> None:
        connection = await asyncpg.connect(migrated)
        await connection.execute(
            "SET session_replication_role = replica;"  # the audit is append-only
            "DELETE FROM audit_events; UPDATE audit_chain SET (position, hash) = (0, dropped_hash);"
            "SET session_replication_role = origin;"
            "DELETE FROM revoked_tokens; DELETE FROM sessions; DELETE FROM users; DELETE FROM roles;"
            "DELETE FROM clients; DELETE FROM throttles"
        )
        await connection.close()

    asyncio.run(empty())
    return migrated


@pytest.fixture(scope="session")
def made_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A keys folder made once; tests work on copies."""
    folder = tmp_path_factory.mktemp("keys") / "keys"
    KeyFolder(folder, TokenLifetimes(timedelta(minutes=10), timedelta(days=14))).create(now=START)
    return folder


@pytest.fixture
def keys_dir(made_keys: Path, tmp_path: Path) -> Path:
    """A keys folder of the test's own, with an active and a standby key created at START."""
    folder = tmp_path / "keys"
    shutil.copytree(made_keys, folder)
    return folder


@pytest.fixture(scope="session")
def impostor(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """For a server that says by a certificate of its own making that it is 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("impostor") / "tls.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.write_bytes(private + made.public_bytes(Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context


@pytest.fixture
def clock() -> Clock:
    return Clock()


def settings_of(database_url: str, keys_dir: Path) -> Settings:
    return Settings.model_validate(
        {
            "database_url": database_url,
            "issuer_url": ISSUER,
            "keys_dir": keys_dir,
            "allowed_origins": "https://app.example.com",
            # Tests fail a lot from one address; those of throttling ask from others.
            "throttle_exempt": "127.0.0.0/8",
            "argon2_memory_kib": 8,
            "argon2_time_cost": 1,
        }
    )


@pytest.fixture
def settings(database_url: str, keys_dir: Path) -> Settings:
    return settings_of(database_url, keys_dir)


async def until_somebody_waits(api: Api) -> None:
    """Wait until a statement waits for a lock that somebody else has."""
    waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    for _ in range(1000):
        await asyncio.sleep(0.005)
        if await api.scalar(waits):
            return
    pytest.fail("nobody waits")


StartApi = Callable[..., AbstractAsyncContextManager[Api]]


@asynccontextmanager
async def run_api(settings: Settings, clock: Clock) -> AsyncIterator[Api]:
    keys = open_keys(settings)
    app = create_app(settings, keys, now=clock)
    async with app.router.lifespan_context(app):
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url=ISSUER) as http:
            yield Api(app, http, clock, settings, keys)


@pytest.fixture
def start_api(settings: Settings, clock: Clock) -> StartApi:
    """Starts a service with some settings changed: `async with start_api(signup="closed") as api`."""
    return lambda **changed: run_api(Settings.model_validate(settings.model_dump() | changed), clock)


@pytest.fixture
async def api(start_api: StartApi) -> AsyncIterator[Api]:
    async with start_api() as running:
        yield running


@pytest.fixture
async def alice(api: Api) -> Account:
    return await api.sign_up("alice")


@pytest.fixture
async def bob(api: Api) -> Account:
    return await api.sign_up("bob", "wise old owls never sleep")


# Tests may come to a file twice in one process, when they are shared out between several.
_databases = count()


@pytest.fixture(scope="module")
def shared_settings(
    new_database: Callable[..., str], migrated: str, made_keys: Path, tmp_path_factory: pytest.TempPathFactory
) -> Settings:
    keys_dir = tmp_path_factory.mktemp("shared") / "keys"
    shutil.copytree(made_keys, keys_dir)
    return settings_of(new_database(f"shared{next(_databases)}", template="pristine"), keys_dir)


@pytest.fixture(scope="module")
async def shared_api(shared_settings: Settings) -> AsyncIterator[Api]:
    """One service with a database of its own for all tests of a file, which must leave it as they found it."""
    async with run_api(shared_settings, Clock()) as running:
        yield running
