"""`migrate`: brings the schema to what this release needs. Safe to run from several places at once."""

import asyncio
from pathlib import Path

from identity_service.cli.environment import load_settings, schema_revision, with_database_url
from identity_service.database import SCHEMA_HEAD
from identity_service.settings import Settings


def migrate() -> None:
    """Bring the database schema up to date."""
    with with_database_url(load_settings()) as settings:
        before = asyncio.run(schema_revision(settings))
        if before is not None and before >= SCHEMA_HEAD:
            print(f"The schema is up to date ({before}).")
            return
        _upgrade(settings)
        print(f"Migrated the schema from {before or 'nothing'} to {SCHEMA_HEAD}.")


def _upgrade(settings: Settings) -> None:
    from alembic import command
    from alembic.config import Config

    assert settings.database_url is not None, "with_database_url gives one"
    config = Config()
    config.set_main_option("script_location", str(_migrations()).replace("%", "%%"))
    config.attributes["database_url"] = settings.database_url.get_secret_value()
    command.upgrade(config, SCHEMA_HEAD)


def _migrations() -> Path:
    """Return the folder of the migrations: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "migrations"
    return installed if installed.exists() else package.parent / "migrations"
