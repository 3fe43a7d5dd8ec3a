"""What moving in costs: P20 of the goals."""

import json
import time
from collections.abc import Callable, Coroutine
from typing import Any

from bench.deployment import command, installation
from bench.frame import Measurement

USERS = 100_000
_BCRYPT = "$2b$12$abcdefghijklmnopqrstuuABCDEFGHIJKLMNOPQRSTUVWXYZabcde"


async def arriving() -> list[Measurement]:
    """P20. The command from its start to its end, on a file of users whose hashes are taken as they are."""
    seconds = _import()
    rate = {"users a minute": f"{USERS * 60 / seconds:.0f}"}
    return [Measurement("P20", f"{USERS} users come in", seconds, "s", 60, rate)]


def _import() -> float:
    with installation() as place:
        file = place.folder / "users.jsonl"
        with file.open("w", encoding="utf-8") as lines:
            for n in range(USERS):
                user = {"username": f"user.{n}", "email": f"user.{n}@example.com", "password_hash": _BCRYPT}
                lines.write(json.dumps(user) + "\n")
        start = time.monotonic()
        command("users", "import", str(file), DATABASE_URL=place.database_url)
        return time.monotonic() - start


MEASURES: dict[str, Callable[[], Coroutine[Any, Any, list[Measurement]]]] = {"P20": arriving}
