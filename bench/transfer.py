"""What moving in costs: P20 of the goals."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from bench.frame import Measurement
from identity_service.embedded import postgres

USERS = 100_000
_BCRYPT = "$2b$12$abcdefghijklmnopqrstuuABCDEFGHIJKLMNOPQRSTUVWXYZabcde"


async def arriving() -> list[Measurement]:
    """P20. The command from its start to its end, on a file of users whose hashes are taken as they are."""
    seconds = _import()
    rate = {"users a minute": f"{USERS * 60 / seconds:.0f}"}
    return [Measurement("P20", f"{USERS} users come in", seconds, "s", 60, rate)]


def _import() -> float:
    with tempfile.TemporaryDirectory(prefix="identity-bench-") as folder:
        Path(folder).chmod(0o755)  # Postgres may run as another user
        file = Path(folder) / "users.jsonl"
        with file.open("w", encoding="utf-8") as lines:
            for n in range(USERS):
                user = {"username": f"user.{n}", "email": f"user.{n}@example.com", "password_hash": _BCRYPT}
                lines.write(json.dumps(user) + "\n")
        with postgres(Path(folder) / "postgres") as server:
            _command(server.url, "migrate")
            start = time.monotonic()
            _command(server.url, "users", "import", str(file))
            return time.monotonic() - start


def _command(url: str, *arguments: str) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("IDENTITY_")}
    command = [sys.executable, "-m", "identity_service", *arguments]
    subprocess.run(command, env=kept | {"DATABASE_URL": url}, stdout=subprocess.DEVNULL, check=True)  # noqa: S603 - ours


MEASURES: dict[str, Callable[[], Coroutine[Any, Any, list[Measurement]]]] = {"P20": arriving}
