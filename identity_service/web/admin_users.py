"""Administering users: their accounts, roles, sessions and passwords."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from identity_service import errors, throttling
from identity_service.accounts import User, formats, registration, resets, roles
from identity_service.database import Connection
from identity_service.errors import UserNotFound
from identity_service.revocation import Reason
from identity_service.sessions import lifecycle
from identity_service.shell import reset_token, uuid7
from identity_service.throttling import Standing
from identity_service.web import accounts, paging, sessions
from identity_service.web.accounts import NAMES, AccountChange, Email, Password, UserAnswer, Username, hash_new
from identity_service.web.dependencies import Administrator, runtime_of
from identity_service.web.paging import Listing, Page, PathId, Text
from identity_service.web.problems import ADMINISTERED, JSON_BODY, Router, refusals
from identity_service.web.sessions import SessionAnswer, SessionId
from identity_service.web.strict_json import StrictRoute

router = Router(
    prefix="/admin",
    route_class=StrictRoute,
    tags=["Administration: users"],
)

RoleNames = Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=64, examples=[["clerk"]])]


async def read_user_id(user_id: PathId) -> UUID:
    """Return the id of the path.

    Raises:
        UserNotFound: it is none.
    """
    return paging.read_id(user_id, UserNotFound)


UserId = Annotated[UUID, Depends(read_user_id)]


class UserPage(Page):
    search: Annotated[Text, Field(description="How the username or the e-mail address begins.")] = ""
    role: Annotated[Text | None, Field(description="Only users who have it.", examples=["admin"])] = None


class UserCreation(BaseModel):
    """Without a password nobody can log in to the account until it was reset."""

    model_config = ConfigDict(extra="forbid", strict=True)

    username: Username
    password: Password | None = None
    email: Email | None = None
    roles: RoleNames = []


class RoleAssignment(BaseModel):
    """All the roles that the user is to have. They hear of it at the next refresh, or have to log in again."""

    model_config = ConfigDict(extra="forbid", strict=True)

    roles: RoleNames
    end_sessions: bool = False


class AdministeredUser(UserAnswer):
    disabled_at: datetime | None

    @classmethod
    def of(cls, user: User) -> "AdministeredUser":
        return cls(**UserAnswer.of(user).model_dump(), disabled_at=user.disabled_at)


class UserWithStanding(AdministeredUser):
    """`failures` are wrong passwords in a row; until `locked_until` none is looked at."""

    failures: int
    locked_until: datetime | None

    @classmethod
    def standing(cls, user: User, standing: Standing) -> "UserWithStanding":
        facts = AdministeredUser.of(user).model_dump()
        return cls(**facts, failures=standing.failures, locked_until=standing.locked_until)


class StartedReset(BaseModel):
    """The token is shown this once. Whoever has it sets a password with `POST /password-reset`."""

    reset_token: Annotated[str, Field(examples=["Yn1cD0qfF0Zr9Yx0m3wq4l2s8nTqj7b5kz6v1u0pWcE"])]
    expires_at: datetime


@router.get("/users", responses=refusals(*ADMINISTERED, errors.CursorRejected, errors.RoleNotFound))
async def list_users(
    request: Request, caller: Administrator, page: Annotated[UserPage, Query()]
) -> Listing[UserWithStanding]:
    """The users in the order of their usernames, and who of them is locked out."""
    after = paging.position(request, caller, page)
    async with runtime_of(request).database.connection() as db:
        if page.role is not None:
            await roles.find(db, page.role)
        found = await registration.search(db, page.search, role=page.role, after=after, limit=page.limit + 1)
        standings = await throttling.standings(db, [user.id for user in found], now=caller.now)

    def show(user: User) -> UserWithStanding:
        return UserWithStanding.standing(user, standings[user.id])

    return paging.listing(request, caller, page, found, show=show, position_of=lambda user: user.username)


@router.post(
    "/users",
    status_code=201,
    responses=refusals(*ADMINISTERED, *JSON_BODY, *NAMES, errors.PasswordRejected, errors.RoleNotFound),
)
async def create_user(
    request: Request, response: Response, caller: Administrator, body: UserCreation
) -> AdministeredUser:
    """Make an account, whether or not the installation accepts registrations."""
    runtime = runtime_of(request)
    username = registration.normalise_username(body.username)
    email = registration.normalise_email(body.email) if body.email is not None else None
    password_hash = formats.UNUSABLE
    if body.password is not None:
        password_hash = await hash_new(runtime, body.password, username=username, email=email)
    now = runtime.now()
    user = await runtime.database.transact(
        lambda db: registration.register(
            db,
            uuid7(now),
            username=username,
            password_hash=password_hash,
            email=email,
            roles=tuple(dict.fromkeys(body.roles)),
            by=caller.actor,
            now=now,
        )
    )
    response.headers["Location"] = f"/admin/users/{user.id}"
    return AdministeredUser.of(user)


@router.get("/users/{user_id}", responses=refusals(*ADMINISTERED, errors.UserNotFound))
async def show_user(request: Request, caller: Administrator, user_id: UserId) -> UserWithStanding:
    """An account."""
    async with runtime_of(request).database.connection() as db:
        user = await registration.find(db, user_id)
        return UserWithStanding.standing(user, await throttling.standing(db, user_id, now=caller.now))


@router.post("/users/{user_id}/unlock", responses=refusals(*ADMINISTERED, errors.UserNotFound))
async def unlock_user(request: Request, caller: Administrator, user_id: UserId) -> UserWithStanding:
    """Forget an account's failed logins, so that the next password is looked at."""

    async def unlock(db: Connection) -> User:
        user = await registration.find(db, user_id)
        await throttling.unlock(db, user_id, by=caller.actor, now=caller.now)
        return user

    user = await runtime_of(request).database.transact(unlock)
    return UserWithStanding.standing(user, Standing())


@router.patch("/users/{user_id}", responses=refusals(*ADMINISTERED, *JSON_BODY, *NAMES, errors.UserNotFound))
async def change_user(
    request: Request, caller: Administrator, user_id: UserId, body: AccountChange
) -> AdministeredUser:
    """Change the username or the e-mail address. What is left out stays as it is."""
    return AdministeredUser.of(await accounts.change(runtime_of(request), caller, user_id, body))


@router.delete(
    "/users/{user_id}",
    status_code=204,
    responses=refusals(*ADMINISTERED, errors.UserNotFound, errors.LastAdministrator),
)
async def delete_user(request: Request, caller: Administrator, user_id: UserId) -> None:
    """Delete an account with its sessions; its tokens are revoked."""
    await runtime_of(request).database.transact(
        lambda db: registration.delete(db, user_id, by=caller.actor, now=caller.now)
    )


@router.post(
    "/users/{user_id}/disable", responses=refusals(*ADMINISTERED, errors.UserNotFound, errors.LastAdministrator)
)
async def disable_user(request: Request, caller: Administrator, user_id: UserId) -> AdministeredUser:
    """Shut an account: its sessions end at once and no login succeeds."""
    user = await runtime_of(request).database.transact(
        lambda db: registration.disable(db, user_id, by=caller.actor, now=caller.now)
    )
    return AdministeredUser.of(user)


@router.post("/users/{user_id}/enable", responses=refusals(*ADMINISTERED, errors.UserNotFound))
async def enable_user(request: Request, caller: Administrator, user_id: UserId) -> AdministeredUser:
    """Open a disabled account again. Its old sessions stay ended."""
    user = await runtime_of(request).database.transact(
        lambda db: registration.enable(db, user_id, by=caller.actor, now=caller.now)
    )
    return AdministeredUser.of(user)


@router.put(
    "/users/{user_id}/roles",
    responses=refusals(*ADMINISTERED, *JSON_BODY, errors.UserNotFound, errors.RoleNotFound, errors.LastAdministrator),
)
async def set_user_roles(
    request: Request, caller: Administrator, user_id: UserId, body: RoleAssignment
) -> AdministeredUser:
    """Give a user exactly these roles."""
    user = await runtime_of(request).database.transact(
        lambda db: roles.replace(
            db, user_id, body.roles, end_sessions=body.end_sessions, by=caller.actor, now=caller.now
        )
    )
    return AdministeredUser.of(user)


@router.post(
    "/users/{user_id}/password-reset",
    status_code=201,
    responses=refusals(*ADMINISTERED, errors.UserNotFound, errors.UserDisabled),
)
async def start_password_reset(request: Request, caller: Administrator, user_id: UserId) -> StartedReset:
    """Let the user set another password. An earlier reset becomes void; the present password goes on until then."""
    token = reset_token()
    expires_at = await runtime_of(request).database.transact(
        lambda db: resets.start(db, user_id, token, by=caller.actor, now=caller.now)
    )
    return StartedReset(reset_token=token, expires_at=expires_at)


@router.get("/users/{user_id}/sessions", responses=refusals(*ADMINISTERED, errors.UserNotFound, errors.CursorRejected))
async def list_user_sessions(
    request: Request, caller: Administrator, user_id: UserId, page: Annotated[Page, Query()]
) -> Listing[SessionAnswer]:
    """Where a user is logged in, the session used last first. `current` is the caller's own."""
    async with runtime_of(request).database.connection() as db:
        await registration.find(db, user_id)
    return await sessions.list_sessions(request, caller, page, user_id)


@router.delete("/users/{user_id}/sessions", status_code=204, responses=refusals(*ADMINISTERED, errors.UserNotFound))
async def end_user_sessions(request: Request, caller: Administrator, user_id: UserId) -> None:
    """Log a user out everywhere."""

    async def unit(db: Connection) -> None:
        await registration.find(db, user_id)
        await lifecycle.end_all(db, user_id, reason=Reason.REVOKED, by=caller.actor, now=caller.now)

    await runtime_of(request).database.transact(unit)


@router.delete("/sessions/{session_id}", status_code=204, responses=refusals(*ADMINISTERED, errors.SessionNotFound))
async def end_session(request: Request, caller: Administrator, session_id: SessionId) -> None:
    """End a session, whoever has it."""
    await sessions.end_session(request, caller, session_id)
