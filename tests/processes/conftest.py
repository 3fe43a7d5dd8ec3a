"""An installation of real processes: the service, a replica of it, and services that verify its tokens.

`downstream` is the program of the latter, `relay` stands between them and the issuer, `traffic` asks them all the time.
"""

import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from tests.processes.relay import Relay
from tests.processes.traffic import Traffic
from tests.services import Service, environment_of, free_port, start_program, start_service

PUBLISH_WINDOW = 3
HURRY = 900 / PUBLISH_WINDOW
"""What `test_rotations` divides every time by that has to do with keys."""


@dataclass
class Installation:
    """Processes that run: the relay leads to `issuer`, which has two workers at first; `replica` shares its database.

    The four `verifiers` are as anyone would have them, two of them without a cache; for `hurried` time goes by faster.
    """

    issuer: Service
    replica: Service
    verifiers: tuple[Service, ...]
    hurried: Service
    relay: Relay
    loop: BlockingPortal

    @property
    def url(self) -> str:
        return self.issuer.environment["IDENTITY_ISSUER_URL"]

    @contextmanager
    def traffic(self) -> Iterator[Traffic]:
        """Ask every verifying process about every token that is added, for as long as the context lasts."""
        traffic = Traffic([verifier.port for verifier in self.verifiers])
        asking = self.loop.start_task_soon(traffic.run)
        try:
            yield traffic
            assert not asking.done(), asking.exception()
        finally:
            asking.cancel()

    def do(self, what: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Break or mend the relay."""
        self.loop.call(what)

    def wait_for_streams(self, *, connected: bool) -> None:
        """Wait until every verifying process follows the events, or knows that it does not."""
        end = time.monotonic() + 30
        while {each.get("/readyz").json()["stream_connected"] for each in self.verifiers} != {connected}:
            assert time.monotonic() < end, "the streams did not get there"
            time.sleep(0.02)

    def kill_issuer(self) -> None:
        """`kill -9`, and wait for its workers to have left the address."""
        self.issuer.process.kill()
        self.issuer.finish()

    def restart_issuer(self) -> None:
        """Start it again at the same address; one worker will do from here on."""
        self.issuer = start_service(self.issuer.environment)
        self.issuer.wait_until_ready()


def start_downstream(issuer_url: str, *kinds: tuple[int, float]) -> tuple[Service, ...]:
    """Start services that verify tokens of this issuer.

    Args:
        kinds: how many tokens each remembers, and by what it divides the times for which it holds keys.
    """
    ports = [free_port() for _ in kinds]
    places = [f"{port},{cache_size},{hurry}" for port, (cache_size, hurry) in zip(ports, kinds, strict=True)]
    program = [sys.executable, str(Path(__file__).with_name("downstream.py")), issuer_url, *places]
    one = start_program(program, f"http://127.0.0.1:{ports[0]}", {})
    return tuple(replace(one, url=f"http://127.0.0.1:{port}") for port in ports)


def stop_all(*services: Service) -> None:
    for service in services:
        service.process.terminate()
    for service in services:
        service.finish()


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest) -> int:
    """How often to do what takes a moment: once, or for minutes to know the percentiles."""
    return 25 if request.config.getoption("--soak") else 1


@pytest.fixture
def soaking(rounds: int) -> None:
    if rounds == 1:
        pytest.skip("2026-11-22: takes a minute; `make soak` runs it")


@pytest.fixture(scope="session")
def installation(
    migrated: str, new_database: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    with ExitStack() as stack:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        shared = environment_of(
            new_database("processes", "pristine"), tmp_path_factory.mktemp("processes") / "keys"
        ) | {
            "IDENTITY_ISSUER_URL": url,
            "IDENTITY_KEY_PUBLISH_WINDOW": str(PUBLISH_WINDOW),
            "IDENTITY_ACCESS_LIFETIME": "3600",  # longer than a soak
            "IDENTITY_LOG_LEVEL": "warning",
        }
        issuer, replica = start_service(shared, "--workers", "2"), start_service(shared)
        *verifiers, hurried = start_downstream(url, *((size, 1) for size in (10_000, 10_000, 0, 0)), (10_000, HURRY))
        loop = stack.enter_context(start_blocking_portal())
        relay = Relay(issuer.port)
        loop.call(relay.start, port)
        stack.callback(loop.call, relay.stop)
        running = Installation(issuer, replica, tuple(verifiers), hurried, relay, loop)
        stack.callback(lambda: stop_all(running.issuer, replica, hurried))
        for each in (issuer, replica, *verifiers, hurried):
            each.wait_until_ready()
        yield running
