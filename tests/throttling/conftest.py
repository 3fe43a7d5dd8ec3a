"""Asking from anywhere: the suite's own address is exempt."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import httpx2
import pytest
from fastapi import FastAPI

from identity_service.database import Connection, Database
from identity_service.throttling import Attempt, store
from identity_service.throttling.store import Tally
from tests.conftest import ISSUER, START, Api


@asynccontextmanager
async def asking_from(app: FastAPI, address: str = "203.0.113.7") -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=app, client=(address, 1), raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url=ISSUER) as http:
        yield http


async def with_failures(
    database: Database, attempt: Attempt, failures: int, *, blocked_for: timedelta = timedelta(0)
) -> None:
    """Set the tallies to so many failures, with the wait for the last of them over unless something else is said."""
    tally = Tally(failures, START, START + blocked_for)

    async def unit(db: Connection) -> None:
        await store.lock(db, [counter.key for counter in attempt.counters], now=START)
        await store.update(db, {counter.key: tally for counter in attempt.counters})

    await database.transact(unit)


@pytest.fixture
async def stranger(api: Api) -> AsyncIterator[httpx2.AsyncClient]:
    """Somebody on the Internet."""
    async with asking_from(api.app) as http:
        yield http
