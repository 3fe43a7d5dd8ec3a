"""Starting an example: beside the identity service that runs, or beside one of its own. All of it ends with Ctrl-C.

    python -m examples.start todos

`make example-todos` and `make example-chat` do this; `demo` shares the service.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2


@dataclass(frozen=True)
class Service:
    """A running identity service: its issuer, and how to type its command line."""

    issuer: str
    command: str


@dataclass(frozen=True)
class Example:
    """What an example needs to be told: its port, and what to try. All commands of the text are indented by four."""

    port: int
    text: str


EXAMPLES = {
    "todos": Example(
        8001,
        """
The todo API is at {url}/todos/ and described at {url}/docs. In another terminal (once), give a user a role and use it:

    {command} roles create editor --scope todos:read
    curl -s {issuer}/users -H 'Content-Type: application/json' \\
         -d '{{"username": "emma", "password": "correct horse battery staple"}}'
    {command} roles grant emma editor
    TOKEN=$(curl -s {issuer}/token -d grant_type=password -d username=emma \\
         --data-urlencode 'password=correct horse battery staple' | sed 's/.*"access_token":"\\([^"]*\\)".*/\\1/')
    curl -i {url}/todos/
    curl -i {url}/todos/ -H "Authorization: Bearer $TOKEN" \\
         -H 'Content-Type: application/json' -d '{{"title": "Water the plants"}}'
    curl -i {url}/todos/ -H "Authorization: Bearer $TOKEN"

The role is taken away, and within a second the token that named it is refused:

    {command} roles revoke emma editor --end-sessions
    sleep 1
    curl -i {url}/todos/ -H "Authorization: Bearer $TOKEN"
""",
    ),
    "chat": Example(
        8002,
        """
Open {url}/ in two browsers that share no cookies (a private window is one), register two people and let them talk.
One of them logs out and is disconnected. So is whoever an administrator shuts out, in another terminal:

    {command} users disable USERNAME
""",
    ),
}


DATABASE_VARIABLES = ("DATABASE_URL", "DATABASE_URL_FILE", "IDENTITY_DATABASE_URL", "IDENTITY_DATABASE_URL_FILE")


def main() -> None:
    name = sys.argv[1]
    example = EXAMPLES[name]
    port = port_for(example)
    url = f"http://localhost:{port}"
    with suppress(KeyboardInterrupt), service(IDENTITY_ALLOWED_ORIGINS=url) as running:
        known = knows_origin(running, url)
        restart = f"IDENTITY_ALLOWED_ORIGINS={url} make run"
        if name == "chat" and not known:
            sys.exit(f"The service does not know this page. Start it with: {restart}")
        command = [sys.executable, "-m", "uvicorn", f"examples.{name}:app", "--port", port, "--log-level", "warning"]
        own = os.environ | {"IDENTITY_ISSUER_URL": running.issuer}
        with process([*command, "--ws-max-size", "16384"], own, f"{url}/openapi.json") as started:
            print(example.text.format(url=url, issuer=running.issuer, command=running.command))
            if not known:
                print(f"The Authorize button of {url}/docs needs a service that was started with: {restart}\n")
            print("Ctrl-C stops everything that was started here.", flush=True)
            while started.poll() is None:  # a Ctrl-C that comes just before a wait without end would not be noticed
                time.sleep(0.5)
            sys.exit(f"The example ended by itself (exit code {started.returncode}).")


def port_for(example: Example) -> str:
    """Return the port to listen on, which nobody else does; end here, with what to do, when there is none."""
    port = os.environ.get("PORT") or str(example.port)
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536):
        sys.exit(f"PORT is a number from 1 to 65535, not {port!r}.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(port)))
        except OSError as error:
            sys.exit(f"Port {port} cannot be used ({error.strerror}); choose another one with PORT.")
    return port


@contextmanager
def service(**settings: str) -> Iterator[Service]:
    """Yield a running service; if there is none, one with these settings and nothing else of the environment's."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background programs begin without it
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that what was started here is stopped here, whatever happens
        signal.signal(number, lambda *_: sys.exit(1))
    issuer = os.environ.get("IDENTITY_ISSUER_URL", "http://localhost:8000")
    command = os.path.relpath(Path(sys.executable).with_name("identity-service"))
    if answers(f"{issuer}/readyz"):
        print(f"Using the service at {issuer}.")
        yield Service(issuer, command)
        return
    print(
        f"Nothing answers at {issuer}: starting a service of our own, whose data is deleted at the end ...", flush=True
    )
    with tempfile.TemporaryDirectory(prefix="identity-example-") as folder:
        Path(folder).chmod(0o755)
        port = free_port()
        own = {
            "IDENTITY_BIND": f"127.0.0.1:{port}",
            "IDENTITY_ISSUER_URL": f"http://localhost:{port}",
            "IDENTITY_EMBEDDED_DIR": f"{folder}/postgres",
            "IDENTITY_KEYS_DIR": f"{folder}/keys",
            "IDENTITY_LOG_LEVEL": "warning",
            "IDENTITY_MIGRATE_ON_START": "on",
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("IDENTITY_")}
        for name in DATABASE_VARIABLES:
            kept.pop(name, None)
        issuer = own["IDENTITY_ISSUER_URL"]
        # What is typed must not reach a database that the terminal has in its environment; empty is as good as not set.
        emptied = "".join(f"{name}= " for name in DATABASE_VARIABLES if name == "DATABASE_URL" or name in os.environ)
        with process([sys.executable, "-m", "identity_service", "serve"], kept | own | settings, f"{issuer}/readyz"):
            yield Service(issuer, f"{emptied}IDENTITY_EMBEDDED_DIR={own['IDENTITY_EMBEDDED_DIR']} {command}")


@contextmanager
def process(command: Sequence[str], environment: Mapping[str, str], url: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a program of ours until the context ends; it has started when the URL answers."""
    # In a session of its own: Ctrl-C is for this process, which then stops the others once and in order.
    started = subprocess.Popen(  # noqa: S603 - a program of ours
        command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        for _ in range(300):
            if started.poll() is not None:  # asked first: it may be another program that answers
                sys.exit("It did not start; see the lines above.")
            if answers(url):
                break
            time.sleep(0.1)
        else:
            sys.exit(f"{url} did not answer within 30 seconds.")
        yield started
    finally:
        started.send_signal(signal.SIGTERM)
        started.wait(timeout=30)


def answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=2).status_code == 200
    except httpx2.HTTPError:
        return False


def knows_origin(running: Service, origin: str) -> bool:
    """Whether the service lets pages of this origin talk to it."""
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    return httpx2.options(f"{running.issuer}/login", headers=asked, timeout=10).status_code == 204


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
