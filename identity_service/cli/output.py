"""What the commands write: JSON where it was asked for, and exports, to standard output or to a new file."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from identity_service.errors import ConfigurationError, IdentityError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Output:
    """Where an export goes, as lines. What goes wrong there is not the database's fault."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, line: bytes) -> None:
        """Write a line.

        Raises:
            IdentityError: the disk is full, or the like. Nobody reading any more ends the program without a word.
        """
        with self._own_failures():
            self._file.write(line)

    def flush(self) -> None:
        with self._own_failures():
            self._file.flush()

    def close(self) -> None:
        with self._own_failures():
            self._file.close()

    @contextmanager
    def _own_failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._file is sys.stdout.buffer:
                # What is left in Python's own buffer would fail once more at the end.
                with Path(os.devnull).open("wb") as nothing:
                    os.dup2(nothing.fileno(), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                raise SystemExit(1) from None
            raise IdentityError(f"The output cannot be written: {error.strerror}.") from None


@contextmanager
def new_file(path: Path) -> Iterator[Output]:
    """Open a file that only its owner can read and that was not there before; it goes if it cannot be completed."""
    if str(path) == "-":
        out = Output(sys.stdout.buffer)
        yield out
        out.flush()
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be made: {error.strerror}.") from None
    out = Output(os.fdopen(descriptor, "wb"))
    try:
        yield out
        out.close()
    except BaseException:
        with suppress(IdentityError):  # what could not be written is still in the buffer
            out.close()
        path.unlink()
        raise


def counted(count: int, noun: str) -> str:
    """Return `1 event`, `2 events`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))
