"""A person's own account: sign up, look, change, reset a forgotten password, delete. Sessions are next door."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field

from identity_service import errors, grants, throttling
from identity_service.accounts import User, authentication, registration, resets, store
from identity_service.audit import Event, Subject
from identity_service.database import Connection
from identity_service.errors import (
    CurrentPasswordWrong,
    InvalidCredentials,
    ResetTokenInvalid,
    SignupClosed,
    UserNotFound,
)
from identity_service.runtime import Runtime
from identity_service.shell import uuid7
from identity_service.web.dependencies import Caller, SignedIn, actor_of, public, runtime_of
from identity_service.web.problems import JSON_BODY, SIGNED_IN, Router, refusals
from identity_service.web.strict_json import StrictRoute

router = Router(route_class=StrictRoute, tags=["Account"])

NAMES = (errors.UsernameTaken, errors.UsernameRejected, errors.EmailRejected)
_HASHES = (errors.Throttled, errors.Unavailable)

Username = Annotated[str, Field(min_length=1, max_length=1024, examples=["alice"])]
Password = Annotated[str, Field(max_length=4096, examples=["correct horse battery staple"])]
Email = Annotated[str, Field(max_length=320, examples=["alice@example.com"])]


class NewUser(BaseModel):
    model_config = ConfigDict(extra="forbid")

    username: Username
    password: Password
    email: Email | None = None


class AccountChange(BaseModel):
    """What is left out stays as it is; an e-mail address of null is removed."""

    model_config = ConfigDict(extra="forbid")

    username: Username = ""
    email: Email | None = None


class PasswordChange(BaseModel):
    model_config = ConfigDict(extra="forbid")

    current_password: Password
    new_password: Password


class PasswordReset(BaseModel):
    model_config = ConfigDict(extra="forbid")

    token: Annotated[str, Field(max_length=1024, examples=["Yn1cD0qfF0Zr9Yx0m3wq4l2s8nTqj7b5kz6v1u0pWcE"])]
    new_password: Password


class Deletion(BaseModel):
    model_config = ConfigDict(extra="forbid")

    current_password: Password


class UserAnswer(BaseModel):
    id: UUID
    username: str
    email: str | None
    email_verified: bool
    roles: tuple[str, ...]
    created_at: datetime
    password_changed_at: datetime

    @classmethod
    def of(cls, user: User) -> "UserAnswer":
        return cls(
            id=user.id,
            username=user.username,
            email=user.email,
            email_verified=user.email_verified,
            roles=user.roles,
            created_at=user.created_at,
            password_changed_at=user.password_changed_at,
        )


@router.post(
    "/users",
    status_code=201,
    responses=refusals(*JSON_BODY, errors.SignupClosed, *NAMES, errors.PasswordRejected, errors.Unavailable),
)
@public
async def sign_up(request: Request, response: Response, body: NewUser) -> UserAnswer:
    """Make an account, while the installation accepts registrations."""
    runtime = runtime_of(request)
    if runtime.settings.signup == "closed":
        raise SignupClosed
    username = registration.normalise_username(body.username)
    email = registration.normalise_email(body.email) if body.email is not None else None
    password_hash = await hash_new(runtime, body.password, username=username, email=email)
    now = runtime.now()
    by = actor_of(request)
    user = await runtime.database.transact(
        lambda db: registration.register(
            db, uuid7(now), username=username, password_hash=password_hash, email=email, roles=(), by=by, now=now
        )
    )
    response.headers["Location"] = "/users/me"
    return UserAnswer.of(user)


@router.get("/users/me", responses=refusals(*SIGNED_IN))
async def show_me(caller: SignedIn) -> UserAnswer:
    """The caller's account."""
    return UserAnswer.of(caller.user)


@router.patch("/users/me", responses=refusals(*SIGNED_IN, *JSON_BODY, *NAMES, errors.UserNotFound))
async def change_me(request: Request, caller: SignedIn, body: AccountChange) -> UserAnswer:
    """Change the username or the e-mail address. Roles and the like cannot be reached from here."""
    return UserAnswer.of(await change(runtime_of(request), caller, caller.user.id, body))


async def change(runtime: Runtime, caller: Caller, user_id: UUID, body: AccountChange) -> User:
    """Change an account, the caller's own or, for an administrator, another's."""
    given = body.model_fields_set
    username = registration.normalise_username(body.username) if "username" in given else None
    email = registration.normalise_email(body.email) if body.email is not None else None
    return await runtime.database.transact(
        lambda db: registration.update(
            db,
            user_id,
            username=username,
            change_email="email" in given,
            email=email,
            by=caller.actor,
            now=caller.now,
        )
    )


@router.put(
    "/users/me/password",
    status_code=204,
    responses=refusals(
        *SIGNED_IN, *JSON_BODY, errors.UserNotFound, errors.CurrentPasswordWrong, errors.PasswordRejected, *_HASHES
    ),
)
async def change_password(request: Request, caller: SignedIn, body: PasswordChange) -> None:
    """Set another password. All other sessions end; this one goes on."""
    runtime, user = runtime_of(request), caller.user
    await _prove_again(runtime, caller, body.current_password)
    password_hash = await hash_new(runtime, body.new_password, username=user.username, email=user.email)

    async def change(db: Connection) -> None:
        await throttling.forgive(db, user.id, by=caller.actor, now=runtime.now())  # before the user, as a login does
        await registration.change_password(
            db,
            user.id,
            password_hash=password_hash,
            proved_at=user.password_changed_at,
            keep_session=caller.claims.session_id,
            by=caller.actor,
            now=runtime.now(),
        )

    await runtime.database.transact(change)


@router.delete(
    "/users/me",
    status_code=204,
    responses=refusals(
        *SIGNED_IN, *JSON_BODY, errors.UserNotFound, errors.CurrentPasswordWrong, errors.LastAdministrator, *_HASHES
    ),
)
async def delete_me(request: Request, caller: SignedIn, body: Deletion) -> None:
    """Delete the account. Its sessions end and its tokens are revoked."""
    runtime, user = runtime_of(request), caller.user
    await _prove_again(runtime, caller, body.current_password)
    proved_at = user.password_changed_at
    await runtime.database.transact(
        lambda db: registration.delete(db, user.id, proved_at=proved_at, by=caller.actor, now=runtime.now())
    )


@router.post(
    "/password-reset",
    status_code=204,
    responses=refusals(*JSON_BODY, errors.ResetTokenInvalid, errors.PasswordRejected, *_HASHES),
)
@public
async def reset_password(request: Request, body: PasswordReset) -> None:
    """Set another password with the token of a reset. All sessions end, and none begins: log in with it."""
    runtime, by = runtime_of(request), actor_of(request)
    attempt = throttling.token_attempt(by.address, exempt=runtime.settings.throttle_exempt)
    try:
        async with runtime.database.connection() as db:
            await throttling.check(db, attempt, now=runtime.now())
            user = await resets.find(db, body.token, now=runtime.now())
    except ResetTokenInvalid as error:
        await grants.count_failure(runtime, attempt, Event.USER_PASSWORD_RESET, None, error, by=by)
        raise
    password_hash = await hash_new(runtime, body.new_password, username=user.username, email=user.email)
    by = by._replace(kind="user", id=str(user.id))

    async def finish(db: Connection) -> None:
        await throttling.forgive(db, user.id, by=by, now=runtime.now())  # before the user, as a login does
        await resets.finish(db, user.id, body.token, password_hash=password_hash, by=by, now=runtime.now())

    await runtime.database.transact(finish)


async def _prove_again(runtime: Runtime, caller: Caller, password: str) -> None:
    """Raises: CurrentPasswordWrong, Throttled after too many that were, UserNotFound when the account has just gone."""
    user, by = caller.user, caller.actor
    attempt = throttling.session_attempt(caller.claims.session_id)
    async with runtime.database.connection() as db:
        await throttling.check(db, attempt, now=runtime.now())
        credentials = await store.find_credentials_by_id(db, user.id)
    if credentials is None:
        raise UserNotFound
    subject = Subject("user", str(user.id))
    try:
        verdict = await authentication.prove(
            credentials,
            password,
            runtime.passwords,
            count=lambda error: grants.count_failure(
                runtime, attempt, Event.USER_PASSWORD_REJECTED, subject, error, by=by
            ),
        )
    except InvalidCredentials as error:
        raise CurrentPasswordWrong(detail=error.detail) from None
    # Here and not in the change that follows: whether that succeeds already tells whether the password was right.
    async with runtime.passwords.holding_back(verdict):
        await runtime.database.transact(lambda db: throttling.admit(db, attempt, now=runtime.now()))


async def hash_new(runtime: Runtime, password: str, *, username: str, email: str | None) -> str:
    """Return the hash of a password that somebody is to have from now on, if the policy allows it."""
    return await registration.hash_new_password(
        runtime.passwords,
        password,
        username=username,
        email=email,
        min_length=runtime.settings.password_min_length,
        breaches=runtime.breaches,
    )
