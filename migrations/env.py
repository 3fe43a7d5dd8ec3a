"""How alembic reaches the database: asyncpg, one migration at a time, and never waiting long for a lock."""

import asyncio
import time
from typing import Any

import asyncpg
from alembic import context
from sqlalchemy import Connection, pool, text
from sqlalchemy.ext.asyncio import create_async_engine

from identity_service import settings
from identity_service.database import normalise_url

# Any number that nobody else uses on this database: two deploys must not migrate at once.
ADVISORY_LOCK = 4_815_162_342
LOCK_WAIT_SECONDS = 600.0
LOCK_POLL_SECONDS = 0.2


def _url() -> str:
    """The URL comes from the caller (`identity-service migrate`) or, for a bare `alembic`, from the environment."""
    given: str | None = context.config.attributes.get("database_url")
    configured = settings.load().settings.database_url
    url = given or (configured and configured.get_secret_value())
    if not url:
        raise SystemExit("Set DATABASE_URL, or use `identity-service migrate`, which also knows the embedded server.")
    return normalise_url(url)


def _migrate(connection: Connection) -> None:
    # A session lock, not a transaction lock, which would end within a migration that builds an index concurrently. And
    # asked for again and again: such a migration waits for all transactions, and one that waits for the lock is one.
    give_up_at = time.monotonic() + LOCK_WAIT_SECONDS
    while not connection.execute(text(f"SELECT pg_try_advisory_lock({ADVISORY_LOCK})")).scalar():
        connection.commit()
        if time.monotonic() > give_up_at:
            raise SystemExit("Another migration of this database has not ended in ten minutes.")
        time.sleep(LOCK_POLL_SECONDS)
    # A migration that cannot get its lock in five seconds gives way to the traffic it would block.
    connection.execute(text("SET lock_timeout = '5s'"))
    connection.execute(text("SET statement_timeout = '300s'"))
    connection.commit()
    context.configure(connection=connection, target_metadata=None, transaction_per_migration=True)
    with context.begin_transaction():
        context.run_migrations()


async def _online() -> None:
    url = _url()

    async def connect(*_: Any, **__: Any) -> Any:
        return await asyncpg.connect(url, timeout=10)

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=pool.NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(_migrate)
    await engine.dispose()


asyncio.run(_online())
