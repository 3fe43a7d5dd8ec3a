"""What the commands share: the settings with their warnings, and a database, embedded if nobody names one."""

import asyncio
import os
import pwd
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from identity_service import settings as configuration
from identity_service.audit import Actor
from identity_service.database import Connection, Database, lacks_schema, open_database
from identity_service.embedded import is_made, postgres
from identity_service.errors import DatabaseUnavailable
from identity_service.settings import Settings, secret

T = TypeVar("T")


def load_settings() -> Settings:
    """Read the settings and say on standard error what is odd about the environment."""
    loaded = configuration.load()
    for warning in loaded.warnings:
        print(f"identity-service: {warning}", file=sys.stderr)
    return loaded.settings


@contextmanager
def with_database_url(settings: Settings, *, make: bool = False) -> Iterator[Settings]:
    """Return the settings with a database URL, running the embedded Postgres if there was none.

    Args:
        make: start one where there was none yet. Only for commands that begin an installation: any other, run in the
            wrong folder, would look into an empty database.

    Raises:
        DatabaseUnavailable: there is none; the text says where it was looked for.
    """
    if settings.database_url is not None:
        yield settings
        return
    if not make and not is_made(settings.embedded_dir):
        raise DatabaseUnavailable(
            f"DATABASE_URL is not set, and there is no embedded Postgres in {settings.embedded_dir.absolute()}. "
            "Set it, or run this where `identity-service serve` (`make run`) was started, or start one here with that."
        )
    with postgres(settings.embedded_dir) as server:
        if server.note:
            print(f"identity-service: {server.note}", file=sys.stderr)
        yield settings.model_copy(update={"database_url": secret(server.url)})


@asynccontextmanager
async def database(settings: Settings) -> AsyncIterator[Database]:
    """Open the database that the settings name.

    Raises:
        DatabaseUnavailable: naming where it was looked for, without the password, or what its schema lacks.
    """
    assert settings.database_url is not None, "see with_database_url"
    url = settings.database_url.get_secret_value()
    try:
        async with open_database(url, pool_size=2) as opened:
            yield opened
    except DatabaseUnavailable as error:
        if lacks_schema(error):
            raise DatabaseUnavailable(
                f"The database at {place_of(url)} has no schema of this release: run `identity-service migrate`.",
                detail=error.detail,
            ) from None
        if error.text != DatabaseUnavailable.default_text:
            raise
        raise DatabaseUnavailable(
            f"The database at {place_of(url)} cannot be used; check DATABASE_URL and that the server runs.",
            detail=error.detail,
        ) from None


def operator() -> Actor:
    """Return who sits at the command line, by the account that the system says it is, not the environment."""
    user_id = os.getuid()
    try:
        return Actor("operator", pwd.getpwuid(user_id).pw_name)
    except KeyError:  # a container's user needs no name
        return Actor("operator", str(user_id))


def with_database(settings: Settings, work: Callable[[Database, Settings], Awaitable[T]]) -> T:
    """Do some work on the database, the embedded one if nobody names another."""

    async def run() -> T:
        async with database(ready) as db:
            return await work(db, ready)

    with with_database_url(settings) as ready:
        if settings.database_url is None:
            place = f"the embedded Postgres in {settings.embedded_dir.absolute()}"
            print(f"identity-service: using {place}; set DATABASE_URL to use another database.", file=sys.stderr)
        return asyncio.run(run())


async def schema_revision(settings: Settings) -> str | None:
    """Return the migration at which the schema stands, None without one."""
    async with database(settings) as db:
        return await db.schema_revision()


def place_of(url: str) -> str:
    """Return host, port and name of a database URL, which may be printed."""
    place, _, options = url.partition("://")[2].partition("?")
    if "@" in options:  # they hold a password, or it has a question mark in it
        return "the place that it names"
    return place.rpartition("@")[2] or "the local socket"


def transact(unit: Callable[[Connection], Awaitable[T]]) -> T:
    """Do a unit of work in the configured database and return what it returns."""
    return with_database(load_settings(), lambda db, _: db.transact(unit))
