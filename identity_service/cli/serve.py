"""`serve`: everything from an empty folder to a listening service, and back to nothing left running."""

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Annotated

import typer
import uvicorn
from uvicorn.supervisors import Multiprocess

from identity_service import logs
from identity_service.app import create_app, edge_of, keep_what_is_loaded
from identity_service.cli.environment import load_settings, schema_revision, with_database_url
from identity_service.cli.exporter import exported, shared_registry
from identity_service.database import SCHEMA_HEAD
from identity_service.errors import ConfigurationError, KeysUnavailable
from identity_service.revocation.feed import MAX_FOLLOWERS
from identity_service.settings import Settings
from identity_service.shell import utc_now
from identity_service.signing.live import LiveKeyring, key_folder, open_keys
from identity_service.verifier.addresses import is_loopback_url
from identity_service.web.middleware import Edge
from identity_service.web.protocol import BoundedProtocol

GRACE_SECONDS = 20
OPEN_FILES = 2 * MAX_FOLLOWERS
"""What a process may need: a socket for each stream, and as many for everything else."""


def serve(
    bind: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Overrides IDENTITY_BIND.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; overrides IDENTITY_WORKERS.")] = None,
) -> None:
    """Run the service until Ctrl-C."""
    # Through the environment, which is all that worker processes get.
    for name, value in (("IDENTITY_BIND", bind), ("IDENTITY_WORKERS", workers)):
        if value is not None:
            os.environ.pop(f"{name}_FILE", None)
            os.environ[name] = str(value)
    # So that a polite kill unwinds the contexts below, and nothing is left running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # the terminal is closed; `nohup` ignores it
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    _allow_open_files()
    settings = load_settings()
    with _listener(settings) as listener:
        keys = _keys(settings)
        embedded = settings.database_url is None
        with with_database_url(settings, make=True) as settings:
            assert settings.database_url is not None, "with_database_url gives one"
            if embedded:  # for the children; a URL that was given reaches them as it reached us
                os.environ["IDENTITY_DATABASE_URL"] = settings.database_url.get_secret_value()
            _prepare_schema(settings, embedded=embedded)
            _print_welcome(settings, embedded=embedded)
            _run(settings, keys, listener)


def _allow_open_files() -> None:
    """Raise the soft limit, often 1024, as far as it is needed and the hard limit lets us; children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def _listener(settings: Settings) -> socket.socket:
    """Take the address before anything else is started. Connections wait in its queue until the service answers."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        fix = "stop what listens there or choose another address with IDENTITY_BIND"
        raise ConfigurationError(f"{settings.bind} cannot be bound ({error.strerror}); {fix}.") from None
    listener.set_inheritable(True)
    return listener


def _keys(settings: Settings) -> LiveKeyring:
    """Open the keyring, making its first keys on the first start: fresh ones, never a default."""
    folder = key_folder(settings)
    if folder.is_empty():
        folder.create(now=utc_now())
        print(
            f"Created the signing keys of this installation in {settings.keys_dir}; tokens of other keys are refused."
        )
    keys = open_keys(settings)
    try:
        keys.current.signer(utc_now())
    except KeysUnavailable as error:
        raise ConfigurationError(
            f"No key in {settings.keys_dir} can sign ({error.detail}); "
            "restore the folder, or replace the key with `identity-service keys revoke`."
        ) from None
    return keys


def _prepare_schema(settings: Settings, *, embedded: bool) -> None:
    revision = asyncio.run(schema_revision(settings))
    if revision is not None and revision >= SCHEMA_HEAD:
        return
    if settings.migrate_on_start == "on" or (settings.migrate_on_start == "auto" and embedded):
        # In a process of its own: alembic's imports would stay in this one for as long as it serves.
        migration = subprocess.run([sys.executable, "-m", "identity_service", "migrate"], check=False)
        if migration.returncode != 0:
            raise ConfigurationError("The schema could not be migrated; see the lines above.")
        return
    print(
        f"identity-service: the schema stands at {revision or 'nothing'} and this release needs {SCHEMA_HEAD}; "
        "run `identity-service migrate`. Until then /readyz answers 503.",
        file=sys.stderr,
    )


def _print_welcome(settings: Settings, *, embedded: bool) -> None:
    issuer = settings.issuer_url
    tour = "make demo" if issuer == "http://localhost:8000" else f"IDENTITY_ISSUER_URL={issuer} make demo"
    sign_up = [
        f"    curl -s {issuer}/users -H 'Content-Type: application/json' \\",
        """         -d '{"username": "alice", "password": "correct horse battery staple"}'; echo""",
    ]
    log_in = [
        f"    curl -s {issuer}/token -d grant_type=password -d username=alice \\",
        "         --data-urlencode 'password=correct horse battery staple'; echo",
    ]
    try_it = [
        *(sign_up if settings.signup == "open" else ["    identity-service users create alice"]),
        *(log_in if settings.password_grant == "on" else []),  # noqa: S105 - a switch
    ]
    in_earnest = ["    identity-service doctor --online", "    identity-service users create NAME --role admin"]
    place = f"embedded Postgres in {settings.embedded_dir} (development only)" if embedded else "from DATABASE_URL"
    lines = [
        "",
        f"  Identity service on http://{settings.bind}",
        f"  Issuer    {issuer}",
        f"  JWKS      {issuer}/.well-known/jwks.json",
        *([f"  Docs      {issuer}/docs"] if settings.docs == "on" else []),
        f"  Database  {place}",
        "",
        "  Next, in another terminal:",
        "",
        *(try_it if is_loopback_url(issuer) else in_earnest),
        "",
        f"  {f'or `{tour}` for the whole tour. ' if embedded else ''}Ctrl-C stops everything.",
        "",
    ]
    with suppress(OSError):  # a disk that is full keeps nobody from logging in
        print("\n".join(lines), flush=True)


def _run(settings: Settings, keys: LiveKeyring, listener: socket.socket) -> None:
    logs.configure(settings.log_level)
    if settings.workers > 1:
        with shared_registry() as registry, exported(settings, registry):
            workers = _Workers(_config(settings, "identity_service.app:from_environment"), sockets=[listener])
            workers.run()
        if not workers.asked_to_stop:
            raise ConfigurationError("A worker could not start; see the lines above.")
        return
    app = create_app(settings, keys)
    server = uvicorn.Server(_config(settings, edge_of(app)))
    keep_what_is_loaded()
    with exported(settings, app.state.metrics.registry), suppress(KeyboardInterrupt):  # raised again after a clean stop
        server.run(sockets=[listener])
    if not server.started:
        raise ConfigurationError("The service did not start; see the lines above.")


class _Workers(Multiprocess):
    asked_to_stop = False
    """Whether a signal asked for the end, and no worker that could not start."""

    def handle_term(self) -> None:
        self.asked_to_stop = True
        super().handle_term()

    handle_int = handle_hup = handle_term  # the terminal that is closed stops one process too

    def terminate_all(self) -> None:
        """Stop the workers. The listener here goes first, or the kernel would take connections that nobody answers."""
        for listener in self.sockets:
            listener.close()
        super().terminate_all()


def _config(settings: Settings, app: Edge | str) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        factory=isinstance(app, str),
        workers=settings.workers,
        loop="identity_service.web.listening:Loop",
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
