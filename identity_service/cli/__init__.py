"""The command line: one file per noun, thin over the same rules as the HTTP API.

Nearly all commands take `--json`; diagnostics go to standard error. Exit codes: 0 ok, 1 failed, 2 usage or
configuration, 3 not found, 4 conflict, 5 a dependency is unavailable.
"""

import gc
import sys
from datetime import datetime
from importlib import import_module
from importlib.metadata import version
from typing import Annotated

import typer

from identity_service import errors
from identity_service.errors import ConfigurationError, IdentityError

EXIT_CODES: dict[type[IdentityError], int] = {
    errors.ConfigurationError: 2,
    errors.UserNotFound: 3,
    errors.RoleNotFound: 3,
    errors.KeyNotFound: 3,
    errors.ClientNotFound: 3,
    errors.SessionNotFound: 3,
    errors.UsernameTaken: 4,
    errors.UserDisabled: 4,
    errors.RoleTaken: 4,
    errors.RoleBuiltIn: 4,
    errors.RoleInUse: 4,
    errors.ClientTaken: 4,
    errors.ClientBuiltIn: 4,
    errors.LastAdministrator: 4,
    errors.DatabaseUnavailable: 5,
    errors.KeysUnavailable: 5,
}
"""What is not listed exits with 1."""

COMMANDS = ("serve", "migrate", "apply", "healthcheck", "doctor")
NOUNS = ("keys", "users", "roles", "clients", "sessions", "audit", "config")


def assemble(typed: str) -> typer.Typer:
    """Return the command line. Only what was typed is imported: a health check must not cost a whole service."""
    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
    known = (*COMMANDS, *NOUNS)
    for name in (typed,) if typed in known else known:
        module = import_module(f"identity_service.cli.{name}")
        if name in COMMANDS:
            app.command(name)(getattr(module, name))
        else:
            app.add_typer(module.app, name=name)
    app.callback()(_top)  # without it, one command alone would not want its name
    return app


def _print_version(*, asked: bool) -> None:
    if asked:
        print(version("identity-service"))
        raise typer.Exit


def _top(
    *,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Users, passwords, sessions and tokens."""


def _is_text(argument: str) -> bool:
    """Python keeps octets that are not UTF-8 as lone surrogates, which no database takes."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def run(*, started_at: datetime) -> None:
    """Run the command that was typed and exit as the table says."""
    try:
        if not all(_is_text(argument) for argument in sys.argv[1:]):
            raise ConfigurationError("An argument is not text in UTF-8.")
        typed = sys.argv[1] if len(sys.argv) > 1 else ""
        gc.disable()  # what importing makes stays: looking for garbage in it is a tenth of a start
        try:
            commands = assemble(typed)
        finally:
            gc.enable()
        commands(obj=started_at, prog_name="identity-service")
    except IdentityError as error:
        detail = f" ({error.detail})" if error.detail else ""
        print(f"identity-service: {error.text}{detail}", file=sys.stderr)
        sys.exit(EXIT_CODES.get(type(error), 1))
