"""`make example-todos` on a machine where nothing runs: what it prints works, and Ctrl-C leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx2
import pytest

from tests.services import free_port


@pytest.fixture
def started() -> Iterator["subprocess.Popen[str]"]:
    """The example with a service of its own, in the foreground of a terminal of its own."""
    environment = {
        "PATH": os.environ["PATH"],
        "PORT": str(free_port()),
        "IDENTITY_ISSUER_URL": f"http://localhost:{free_port()}",
    }
    command = [sys.executable, "-m", "examples.start", "todos"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    yield process
    if process.poll() is None:
        process.terminate()
    process.communicate(timeout=60)


def processes() -> str:
    return subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True, check=True).stdout  # noqa: S607


def test_what_is_printed_works_and_ctrl_c_leaves_nothing_behind(started):
    assert started.stdout is not None
    lines: list[str] = []
    while not lines or "Ctrl-C" not in lines[-1]:
        lines.append(started.stdout.readline())
        assert started.poll() is None, lines
    script = "".join(line for line in lines if line.startswith("    "))
    ran = subprocess.run(["/bin/sh", "-ec", script], capture_output=True, text=True, timeout=60, check=False)
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
