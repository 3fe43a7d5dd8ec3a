"""`GET /metrics` on an address of its own, which nothing but a scraper needs to reach. Part of `serve`."""

import json
import os
import secrets
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Metric, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from identity_service.errors import ConfigurationError
from identity_service.settings import Settings
from identity_service.web import problems
from identity_service.web.middleware import SECURITY_HEADERS

SHARED = "PROMETHEUS_MULTIPROC_DIR"
"""Names the folder in which several processes keep their metrics; read by prometheus_client when it is imported."""


@contextmanager
def exported(settings: Settings, registry: CollectorRegistry) -> Iterator[None]:
    """Answer scrapes from a registry for as long as the context lasts; do nothing when no address was given.

    Raises:
        ConfigurationError: the address cannot be bound.
    """
    if not settings.metrics_bind:
        yield
        return
    host, port = settings.metrics_address
    try:
        server = _Server(host, port, registry)
    except OSError as error:
        fix = "stop what listens there or choose another address with IDENTITY_METRICS_BIND"
        raise ConfigurationError(f"{settings.metrics_bind} cannot be bound ({error.strerror}); {fix}.") from None
    with server:
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


@contextmanager
def shared_registry() -> Iterator[CollectorRegistry]:
    """Return the registry that adds up what worker processes count, in files that only this user can read.

    To be entered before the workers are started: they find the folder through the environment.
    """
    with TemporaryDirectory(prefix="identity-metrics-") as folder:
        os.environ[SHARED] = folder
        registry = CollectorRegistry()
        registry.register(_Workers(Path(folder)))
        yield registry


class _Workers(Collector):
    """Adds up the files, without the levels of workers that are gone; what those had counted still counts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: Any = MultiProcessCollector(None, str(folder))  # type: ignore[no-untyped-call]

    def collect(self) -> Iterable[Metric]:
        for path in self._folder.glob("gauge_live*.db"):
            if not _lives(int(path.stem.rpartition("_")[2])):
                path.unlink(missing_ok=True)
        found: Iterable[Metric] = self._files.collect()
        return found


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.registry = registry
        super().__init__((host, port), _Answer)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a scraper that hangs up is no event of ours."""


class _Answer(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self._refuse(*problems.NOT_FOUND)
        else:
            self._write(200, CONTENT_TYPE_PLAIN_0_0_4, generate_latest(self.server.registry))

    def do_HEAD(self) -> None:
        self.do_GET()

    def send_error(self, code: int, *_: object, **__: object) -> None:
        """Refuse what has come in the words of the service: the server's own are HTML, and 501 for a wrong method."""
        self.request_version = self.protocol_version  # or there would be no head before the body
        if code == HTTPStatus.NOT_IMPLEMENTED:
            self._refuse(*problems.WRONG_METHOD)
        else:
            self._refuse(400, "bad_request", "This is not a request as it has to be.")
        self.close_connection = True

    def _refuse(self, status: int, code: str, detail: str) -> None:
        body = json.dumps(problems.document(status, code, detail, self._request_id)).encode()
        self._write(status, problems.MEDIA_TYPE, body)

    def _write(self, status: int, media_type: str, body: bytes) -> None:
        """Write an answer with what every answer of the service carries, and nothing about the server."""
        self.send_response_only(status)
        self.send_header("Date", self.date_time_string())
        self.send_header("X-Request-ID", self._request_id)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        for name, value in SECURITY_HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(ConnectionError):
            self.wfile.write(b"" if self.command == "HEAD" else body)

    @cached_property
    def _request_id(self) -> str:
        return secrets.token_hex(8)

    def log_message(self, *_: object) -> None:
        """Say nothing: scrapes come every few seconds."""
