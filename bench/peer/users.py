"""fastapi-users as its documentation sets it up: SQLAlchemy, a JWT of one shared secret, hashes as they come.

It runs in a Python environment of its own, where nothing of ours is installed. `BENCH_DATABASE` is where it keeps its
users. As a program it says how many passwords a second its hasher verifies with nothing around it, for some seconds.
"""

import os
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI
from fastapi_users import BaseUserManager, FastAPIUsers, UUIDIDMixin, schemas
from fastapi_users.authentication import AuthenticationBackend, BearerTransport, JWTStrategy
from fastapi_users.password import PasswordHelper
from fastapi_users_db_sqlalchemy import SQLAlchemyBaseUserTableUUID, SQLAlchemyUserDatabase
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase


class Base(DeclarativeBase):
    pass


class User(SQLAlchemyBaseUserTableUUID, Base):
    pass


class UserManager(UUIDIDMixin, BaseUserManager[User, uuid.UUID]):
    pass


engine = create_async_engine(os.environ["BENCH_DATABASE"].replace("postgresql:", "postgresql+asyncpg:", 1))
sessions = async_sessionmaker(engine, expire_on_commit=False)


async def get_session() -> AsyncIterator[AsyncSession]:
    async with sessions() as session:
        yield session


async def get_users(session: Annotated[AsyncSession, Depends(get_session)]) -> AsyncIterator[SQLAlchemyUserDatabase]:
    yield SQLAlchemyUserDatabase(session, User)


async def get_manager(users: Annotated[SQLAlchemyUserDatabase, Depends(get_users)]) -> AsyncIterator[UserManager]:
    yield UserManager(users)


def get_strategy() -> JWTStrategy[User, uuid.UUID]:
    return JWTStrategy(secret="a secret that whoever verifies has to share", lifetime_seconds=3600)  # noqa: S106 - of nobody


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with engine.begin() as db:
        await db.run_sync(Base.metadata.create_all)
    yield


app = FastAPI(lifespan=lifespan)
backend = AuthenticationBackend("jwt", BearerTransport(tokenUrl="auth/jwt/login"), get_strategy)
users = FastAPIUsers[User, uuid.UUID](get_manager, [backend])
read, create, update = schemas.BaseUser[uuid.UUID], schemas.BaseUserCreate, schemas.BaseUserUpdate
app.include_router(users.get_auth_router(backend), prefix="/auth/jwt")
app.include_router(users.get_register_router(read, create), prefix="/auth")
app.include_router(users.get_users_router(read, update), prefix="/users")


def raw_rate(seconds: float) -> float:
    hasher = PasswordHelper()
    hashed = hasher.hash("password")
    done, start = 0, time.monotonic()
    while time.monotonic() < start + seconds:
        assert hasher.verify_and_update("password", hashed)[0]
        done += 1
    return done / (time.monotonic() - start)


if __name__ == "__main__":
    print(raw_rate(float(sys.argv[1])))
