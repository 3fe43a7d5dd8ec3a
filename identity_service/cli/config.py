"""`config`: what the service would run with, and where each value comes from."""

import sys
from datetime import timedelta
from typing import Any

import typer

from identity_service import settings as configuration
from identity_service.cli.environment import place_of
from identity_service.cli.output import AsJson, print_json

app = typer.Typer(no_args_is_help=True, help="Settings.")

MASK = "********"


@app.command()
def show(*, as_json: AsJson = False) -> None:
    """Print each setting with its value and where it came from. Secrets are masked."""
    loaded = configuration.load()
    rows = {
        configuration.PREFIX + name.upper(): {"value": _shown(name, loaded.settings), "from": loaded.origins[name]}
        for name in configuration.Settings.model_fields
    }
    for warning in loaded.warnings:
        print(f"identity-service: {warning}", file=sys.stderr)
    if as_json:
        print_json(rows)
        return
    names, values = max(map(len, rows)), max(len(_text(row["value"])) for row in rows.values())
    for variable, row in rows.items():
        print(f"{variable:{names}}  {_text(row['value']):{values}}  {row['from']}")


def _text(value: Any) -> str:
    return "-" if value in (None, "") else str(value)


def _shown(name: str, settings: configuration.Settings) -> Any:
    value = getattr(settings, name)
    if value is None:
        return None
    if name == "database_url":
        return f"postgresql://{MASK}@{place_of(value.get_secret_value())}"
    if hasattr(value, "get_secret_value"):
        return MASK
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
        return int(seconds) if seconds.is_integer() else seconds
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return value if isinstance(value, int | str) else str(value)
