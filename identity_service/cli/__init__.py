"""The command line: one file per noun, thin over the same rules as the HTTP API.

Reading commands take `--json`; diagnostics go to standard error. Exit codes: 0 ok, 1 failed, 2 usage or configuration,
3 not found, 4 conflict, 5 a dependency is unavailable.
"""

import sys
from datetime import datetime

import typer

from identity_service import errors
from identity_service.cli import config, healthcheck, keys, migrate, serve, users
from identity_service.errors import IdentityError

EXIT_CODES: dict[type[IdentityError], int] = {
    errors.ConfigurationError: 2,
    errors.UserNotFound: 3,
    errors.KeyNotFound: 3,
    errors.UsernameTaken: 4,
    errors.DatabaseUnavailable: 5,
    errors.KeysUnavailable: 5,
}
"""What is not listed exits with 1."""

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Users, passwords, sessions and tokens.")
app.command("serve")(serve.serve)
app.command("migrate")(migrate.migrate)
app.command("healthcheck")(healthcheck.healthcheck)
app.add_typer(keys.app, name="keys")
app.add_typer(users.app, name="users")
app.add_typer(config.app, name="config")


def run(*, started_at: datetime) -> None:
    """Run the command that was typed and exit as the table says."""
    try:
        app(obj=started_at, prog_name="identity-service")
    except IdentityError as error:
        detail = f" ({error.detail})" if error.detail else ""
        print(f"identity-service: {error.text}{detail}", file=sys.stderr)
        sys.exit(EXIT_CODES.get(type(error), 1))
