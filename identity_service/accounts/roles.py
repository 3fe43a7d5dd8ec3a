"""Roles and the scopes they give.

A login is granted what its user's roles give at that moment, and its session never gains a scope after that. What a
refresh carries is what is left of it: the scopes of the login that the roles still give. `admin` is built in: it always
gives `identity:admin` and nothing else does, so that nobody can lock all administrators out or make one by accident.
"""

import re
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from uuid import UUID

from identity_service import audit, scopes
from identity_service.accounts import Role, User, store
from identity_service.audit import Actor, Event, Subject
from identity_service.database import Connection
from identity_service.errors import (
    LastAdministrator,
    RoleBuiltIn,
    RoleInUse,
    RoleNotFound,
    RoleRejected,
    RoleTaken,
    ScopeRejected,
    UserNotFound,
)
from identity_service.revocation import Reason
from identity_service.sessions import lifecycle

ADMIN = "admin"
ADMIN_SCOPE = f"{scopes.RESERVED}admin"
BUILT_IN: dict[str, Role] = {ADMIN: Role(ADMIN, (ADMIN_SCOPE,), None)}

# A role is named in URLs, in shells and in lists separated by spaces.
_ROLE_NAME = re.compile(r"[a-z][a-z0-9_.:-]{0,63}", re.ASCII)


def given(roles: Iterable[str], role_scopes: Iterable[str]) -> set[str]:
    """Return all the scopes that roles give.

    Args:
        role_scopes: what the database says that those roles give; it does not know the built-in ones.
    """
    return {scope for role in roles if role in BUILT_IN for scope in BUILT_IN[role].scopes}.union(role_scopes)


def granted(requested: Sequence[str], given: set[str]) -> tuple[str, ...]:
    """Return the scopes of a login: those of the requested that are given. None requested: all, but no `identity:*`."""
    if not requested:
        return tuple(sorted(scope for scope in given if not scope.startswith(scopes.RESERVED)))
    return tuple(scope for scope in requested if scope in given)


async def create(db: Connection, unverified_name: str, *, scope: str, by: Actor, now: datetime) -> Role:
    """Make a role. Call within a transaction.

    Args:
        scope: what it gives, separated by spaces.

    Raises:
        RoleRejected: a name or a scope that a role cannot have.
        RoleBuiltIn, RoleTaken: there is one of this name.
    """
    _refuse_built_in(unverified_name)
    if not _ROLE_NAME.fullmatch(unverified_name):
        raise RoleRejected(
            "A role is named by at most 64 lower-case letters, digits and _.:- and begins with a letter."
        )
    role = await store.insert_role(db, unverified_name, scopes=_scopes_of_role(scope), now=now)
    if role is None:
        raise RoleTaken
    await _record(db, Event.ROLE_CREATED, role.name, by=by, now=now, given=role.scopes)
    return role


async def find(db: Connection, unverified_name: str) -> Role:
    """Return a role.

    Raises:
        RoleNotFound: there is none of this name.
    """
    if unverified_name in BUILT_IN:
        return BUILT_IN[unverified_name]
    role = await store.find_role(db, unverified_name) if _ROLE_NAME.fullmatch(unverified_name) else None
    if role is None:
        raise RoleNotFound(detail=unverified_name)
    return role


async def list_all(db: Connection) -> list[Role]:
    """Return the roles, the built-in ones first, the others by name."""
    return [*BUILT_IN.values(), *await store.list_roles(db)]


async def set_scopes(
    db: Connection, unverified_name: str, *, scope: str, end_sessions: bool = False, by: Actor, now: datetime
) -> Role:
    """Replace what a role gives. Sessions hear of it at their next refresh. Call within a transaction.

    Args:
        end_sessions: log everybody out who has the role, so that no token with the old scopes is left.

    Raises:
        RoleRejected: a scope that a role cannot give.
        RoleBuiltIn, RoleNotFound: it is not one that can be changed.
    """
    _refuse_built_in(unverified_name)
    given = _scopes_of_role(scope)
    role = await store.update_role(db, unverified_name, scopes=given) if _ROLE_NAME.fullmatch(unverified_name) else None
    if role is None:
        raise RoleNotFound(detail=unverified_name)
    await _record(db, Event.ROLE_UPDATED, role.name, by=by, now=now, given=role.scopes)
    if end_sessions:
        await lifecycle.end_all_of_role(db, role.name, reason=Reason.ROLES_CHANGED, by=by, now=now)
    return role


async def delete(db: Connection, unverified_name: str, *, by: Actor, now: datetime) -> None:
    """Delete a role that no user has. Call within a transaction.

    Raises:
        RoleBuiltIn, RoleNotFound: it is not one that can be deleted.
        RoleInUse: users have it; the text says how many.
    """
    _refuse_built_in(unverified_name)
    await find(db, unverified_name)
    # Locked before its users are counted: whoever is granting it has committed by then, and nobody else begins.
    if not await store.lock_role(db, unverified_name):
        raise RoleNotFound(detail=unverified_name)
    if users := await store.count_users(db, unverified_name):
        raise RoleInUse(f"{users} users have this role." if users > 1 else "1 user has this role.")
    await store.delete_role(db, unverified_name)
    await _record(db, Event.ROLE_DELETED, unverified_name, by=by, now=now)


async def keep(db: Connection, unverified_names: Sequence[str]) -> None:
    """Keep roles from being deleted until the transaction ends, so that they can be given to a user.

    Raises:
        RoleNotFound: one of them does not exist; the detail names it.
    """
    for name in unverified_names:
        if name not in BUILT_IN and not (_ROLE_NAME.fullmatch(name) and await store.share_role(db, name)):
            raise RoleNotFound(detail=name)


async def grant(
    db: Connection, user_id: UUID, unverified_role: str, *, end_sessions: bool, by: Actor, now: datetime
) -> User:
    """Give a user a role; who has it already keeps it, and nothing is recorded. Call within a transaction.

    Args:
        end_sessions: log the user out everywhere, so that no token without the role is left.

    Raises:
        RoleNotFound: there is none of this name.
        UserNotFound: the account is gone.
    """
    await keep(db, [unverified_role])
    changed = await store.add_role(db, user_id, unverified_role)
    user = changed or await store.find_by_id(db, user_id)
    return await _given(db, user, changed=changed is not None, end_sessions=end_sessions, by=by, now=now)


async def revoke(
    db: Connection, user_id: UUID, unverified_role: str, *, end_sessions: bool, by: Actor, now: datetime
) -> User:
    """Take a role from a user who may or may not have it. Call within a transaction.

    Args:
        end_sessions: log the user out everywhere, so that no token with the role is left.

    Raises:
        RoleNotFound: there is none of this name, and the user has none either.
        UserNotFound: the account is gone.
        LastAdministrator: nobody could administer the service any more.
    """
    holder = await store.find_by_id(db, user_id)
    # A misspelt role must not look like one that was taken away. But one that is held can be taken away, whatever it is
    # called and whether or not it exists: once, users could have roles of any name.
    if holder is None or unverified_role not in holder.roles:
        await find(db, unverified_role)
    async with keep_an_administrator(db):
        changed = await store.remove_role(db, user_id, unverified_role)
    user = changed or await store.find_by_id(db, user_id)
    return await _given(db, user, changed=changed is not None, end_sessions=end_sessions, by=by, now=now)


async def replace(
    db: Connection, user_id: UUID, unverified_roles: Sequence[str], *, end_sessions: bool, by: Actor, now: datetime
) -> User:
    """Give a user exactly these roles. Call within a transaction.

    Args:
        end_sessions: log the user out everywhere, so that no token with the former roles is left.

    Raises:
        RoleNotFound: one of the roles does not exist; the detail names it.
        UserNotFound: the account is gone.
        LastAdministrator: nobody could administer the service any more.
    """
    names = tuple(dict.fromkeys(unverified_roles))
    await keep(db, names)
    async with keep_an_administrator(db):
        changed = await store.set_roles(db, user_id, names)
    user = changed or await store.find_by_id(db, user_id)
    return await _given(db, user, changed=changed is not None, end_sessions=end_sessions, by=by, now=now)


@asynccontextmanager
async def keep_an_administrator(db: Connection) -> AsyncIterator[None]:
    """Refuse what is done within when it leaves nobody who can administer the service. Call within a transaction.

    Raises:
        LastAdministrator: there was an administrator before, and there is none now.
    """
    # Before anybody is looked at or changed: two that remove each other meet here.
    await store.lock_administration(db)
    before = await store.count_administrators(db)
    yield
    if before and not await store.count_administrators(db):
        raise LastAdministrator


class OfferedScopes:
    """The scopes that any role gives or any client has, for the metadata, which must answer without the database.

    The service looks every few seconds and keeps what it saw while the database is away. Clients cache the metadata for
    minutes, so nobody could tell a fresher answer apart.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._take_up(BUILT_IN.values(), ())

    async def look(self, db: Connection, *, of_clients: Iterable[str]) -> None:
        """Take up what there is now; `of_clients` are the scopes that clients have for themselves."""
        self._take_up(await list_all(db), of_clients)

    def _take_up(self, roles: Iterable[Role], of_clients: Iterable[str]) -> None:
        self.names = tuple(sorted({scope for role in roles for scope in role.scopes}.union(of_clients)))


def _refuse_built_in(name: str) -> None:
    if name in BUILT_IN:
        raise RoleBuiltIn


def _scopes_of_role(scope: str) -> tuple[str, ...]:
    try:
        return scopes.parse_given(scope)
    except ScopeRejected as error:
        raise RoleRejected(error.text) from None


async def _given(
    db: Connection, user: User | None, *, changed: bool, end_sessions: bool, by: Actor, now: datetime
) -> User:
    if user is None:
        raise UserNotFound
    if changed:
        details = {"roles": list(user.roles)}
        await audit.record(db, Event.USER_ROLES_CHANGED, Subject("user", str(user.id)), by=by, now=now, details=details)
    if end_sessions:
        await lifecycle.end_all(db, user.id, reason=Reason.ROLES_CHANGED, by=by, now=now)
    return user


async def _record(
    db: Connection, event: Event, name: str, *, by: Actor, now: datetime, given: Sequence[str] | None = None
) -> None:
    details = {"scopes": list(given)} if given is not None else {}
    await audit.record(db, event, Subject("role", name), by=by, now=now, details=details)
