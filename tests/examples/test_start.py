"""`make example-todos` and `make demo` where nothing runs: what they print works, and Ctrl-C leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.examples.conftest import Beside, StartExample
from tests.services import free_port


@pytest.fixture
def terminal(tmp_path: Path) -> dict[str, str]:
    """The environment of a terminal: nobody answers at the issuer, and two variables name a database in production."""
    url = f"postgresql://127.0.0.1:{free_port()}/production"
    (tmp_path / "url").write_text(url)
    return {
        "PATH": os.environ["PATH"],
        "PORT": str(free_port()),
        "IDENTITY_ISSUER_URL": f"http://localhost:{free_port()}",
        "DATABASE_URL": url,
        "IDENTITY_DATABASE_URL_FILE": str(tmp_path / "url"),
    }


TODOS = [sys.executable, "-m", "examples.start", "todos"]


@pytest.fixture
def started(terminal: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """The example with a service of its own, in the foreground of a terminal of its own."""
    yield from start(terminal)


@pytest.fixture(scope="module")
def another(start_example: StartExample) -> Beside:
    """The example on another port, with a service that runs and knows the page of that port only."""
    return start_example("todos")


@pytest.fixture
def beside(another: Beside, terminal: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """The example beside a service that was not started for it."""
    yield from start(terminal | {"IDENTITY_ISSUER_URL": another.service.environment["IDENTITY_ISSUER_URL"]})


def start(environment: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        TODOS, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    yield process
    if process.poll() is None:
        process.terminate()
    process.communicate(timeout=60)


def printed(process: "subprocess.Popen[str]") -> list[str]:
    """Return the lines up to the last that is printed once everything runs."""
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or "Ctrl-C" not in lines[-1]:
        lines.append(process.stdout.readline())
        assert process.poll() is None, lines
    return lines


def processes() -> str:
    return subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True, check=True).stdout  # noqa: S607


def test_what_is_printed_works_beside_a_database_of_production_and_ctrl_c_leaves_nothing_behind(started, terminal):
    lines = printed(started)
    assert not any("IDENTITY_ALLOWED_ORIGINS" in line for line in lines)
    script = "".join(line for line in lines if line.startswith("    "))
    ran = run(["/bin/sh", "-ec", script], terminal)
    assert ran.returncode == 0, ran.stderr
    assert re.findall(r"HTTP/1.1 (\d+)", ran.stdout) == ["401", "201", "200", "401"]
    assert "emma has editor." in ran.stdout
    assert "The token has been revoked" in ran.stdout

    folder = re.search(r"IDENTITY_EMBEDDED_DIR=(\S+)/postgres", script)
    url = re.search(r"curl -i (http://\S+)/todos/", script)
    assert folder is not None
    assert url is not None
    assert folder[1] in processes()
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(timeout=30) == 0
    assert folder[1] not in processes()
    assert not os.path.exists(folder[1])  # noqa: PTH110 - a name out of the output
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(url[1], timeout=5)


def test_a_service_that_does_not_know_the_page_is_told_of_and_an_example_that_dies_is_no_success(beside, terminal):
    hint = (
        f"needs a service that was started with: IDENTITY_ALLOWED_ORIGINS=http://localhost:{terminal['PORT']} make run"
    )
    assert any(line.endswith(f"{hint}\n") for line in printed(beside))
    (child,) = run(["pgrep", "-P", str(beside.pid)], terminal).stdout.split()
    os.kill(int(child), signal.SIGKILL)
    said, _ = beside.communicate(timeout=30)
    assert (beside.returncode, said) == (1, "The example ended by itself (exit code -9).\n")


def run(command: list[str], environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_demo_ends_in_a_refusal_that_the_verifier_heard_of(terminal):
    ran = run([sys.executable, "-m", "examples.demo"], terminal)
    assert ran.returncode == 0, ran.stderr
    heard = re.search(r"verifier +revoked, heard after (\d+) ms\n", ran.stdout)
    assert heard is not None, ran.stdout
    assert int(heard[1]) < 1500
    assert ran.stdout.endswith("\nAll of it worked.\n")


def test_a_port_that_another_program_answers_on_is_refused_before_anything_starts(another, terminal):
    taken = another.url.rpartition(":")[2]
    ran = run(TODOS, terminal | {"PORT": taken})
    said = f"Port {taken} cannot be used (Address already in use); choose another one with PORT.\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", said)


@pytest.mark.parametrize("port", ["abc", "0", "-1", "65536", "8001 ", "9" * 5000])
def test_a_port_that_is_none_is_said_in_one_line(terminal, port):
    ran = run(TODOS, terminal | {"PORT": port})
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", f"PORT is a number from 1 to 65535, not {port!r}.\n")
