"""`migrate`: brings the schema to what this release needs. Safe to run from several places at once."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from identity_service.cli.environment import load_settings, schema_revision, with_database_url
from identity_service.database import SCHEMA_HEAD
from identity_service.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from alembic.config import Config


def migrate() -> None:
    """Bring the database schema up to date."""
    with with_database_url(load_settings(), make=True) as settings:
        before = asyncio.run(schema_revision(settings))
        if before is not None and before >= SCHEMA_HEAD:
            print(f"The schema is up to date ({before}).")
            return
        assert settings.database_url is not None, "with_database_url gives one"
        _upgrade_or_say_why(settings.database_url.get_secret_value())
        print(f"Migrated the schema from {before or 'nothing'} to {SCHEMA_HEAD}.")


def _upgrade_or_say_why(database_url: str) -> None:
    """Run the migrations.

    Raises:
        DatabaseUnavailable: the database refuses one, such as for want of a privilege, or lets it wait for a lock.
    """
    from sqlalchemy.exc import DBAPIError

    try:
        upgrade(database_url)
    except DBAPIError as error:
        reason = getattr(error.orig, "__cause__", None) or error.orig
        raise DatabaseUnavailable(
            "The schema was not migrated; migrations that are done stay.", detail=f"{type(reason).__name__}: {reason}"
        ) from None


def upgrade(database_url: str, revision: str = SCHEMA_HEAD) -> None:
    """Run the migrations up to a revision."""
    from alembic import command

    command.upgrade(alembic_config(database_url), revision)


def alembic_config(database_url: str) -> "Config":
    """Return what alembic needs to know, without reading a file."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_migrations()).replace("%", "%%"))
    config.attributes["database_url"] = database_url
    return config


def _migrations() -> Path:
    """Return the folder of the migrations: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "migrations"
    return installed if installed.exists() else package.parent / "migrations"
