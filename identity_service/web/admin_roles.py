"""Administering roles: which there are, and the scopes they give. Who has them is next door in `admin_users`."""

from datetime import datetime
from typing import Annotated

from fastapi import Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from identity_service import errors
from identity_service.accounts import Role, roles
from identity_service.web.dependencies import Administrator, runtime_of
from identity_service.web.paging import Listing, Scopes, Whole
from identity_service.web.problems import ADMINISTERED, JSON_BODY, Router, refusals
from identity_service.web.strict_json import StrictRoute

router = Router(
    prefix="/admin/roles",
    route_class=StrictRoute,
    tags=["Administration: roles"],
)

Name = Annotated[str, Path(examples=["clerk"])]


class NewRole(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(max_length=64, examples=["clerk"])]
    scopes: Scopes = []


class RoleChange(BaseModel):
    """All the scopes that the role is to give. Sessions hear of it at their next refresh, or end."""

    model_config = ConfigDict(extra="forbid", strict=True)

    scopes: Scopes
    end_sessions: bool = False


class RoleAnswer(BaseModel):
    """One that is built in was never created, and cannot be changed."""

    name: str
    scopes: tuple[str, ...]
    built_in: bool
    created_at: datetime | None

    @classmethod
    def of(cls, role: Role) -> "RoleAnswer":
        built_in = role.created_at is None
        return cls(name=role.name, scopes=role.scopes, built_in=built_in, created_at=role.created_at)


@router.get("", responses=refusals(*ADMINISTERED))
async def list_roles(
    request: Request, _caller: Administrator, _query: Annotated[Whole, Query()]
) -> Listing[RoleAnswer]:
    """Every role, all on one page."""
    async with runtime_of(request).database.connection() as db:
        found = await roles.list_all(db)
    return Listing(items=[RoleAnswer.of(role) for role in found])


@router.post(
    "",
    status_code=201,
    responses=refusals(*ADMINISTERED, *JSON_BODY, errors.RoleTaken, errors.RoleBuiltIn, errors.RoleRejected),
)
async def create_role(request: Request, response: Response, caller: Administrator, body: NewRole) -> RoleAnswer:
    """Make a role."""
    scope = " ".join(body.scopes)
    role = await runtime_of(request).database.transact(
        lambda db: roles.create(db, body.name, scope=scope, by=caller.actor, now=caller.now)
    )
    response.headers["Location"] = f"/admin/roles/{role.name}"
    return RoleAnswer.of(role)


@router.get("/{name}", responses=refusals(*ADMINISTERED, errors.RoleNotFound))
async def show_role(request: Request, _caller: Administrator, name: Name) -> RoleAnswer:
    """A role."""
    async with runtime_of(request).database.connection() as db:
        return RoleAnswer.of(await roles.find(db, name))


@router.put(
    "/{name}",
    responses=refusals(*ADMINISTERED, *JSON_BODY, errors.RoleNotFound, errors.RoleBuiltIn, errors.RoleRejected),
)
async def set_role_scopes(request: Request, caller: Administrator, name: Name, body: RoleChange) -> RoleAnswer:
    """Replace the scopes that a role gives."""
    scope = " ".join(body.scopes)
    role = await runtime_of(request).database.transact(
        lambda db: roles.set_scopes(
            db, name, scope=scope, end_sessions=body.end_sessions, by=caller.actor, now=caller.now
        )
    )
    return RoleAnswer.of(role)


@router.delete(
    "/{name}",
    status_code=204,
    responses=refusals(*ADMINISTERED, errors.RoleNotFound, errors.RoleBuiltIn, errors.RoleInUse),
)
async def delete_role(request: Request, caller: Administrator, name: Name) -> None:
    """Delete a role that no user has."""
    await runtime_of(request).database.transact(lambda db: roles.delete(db, name, by=caller.actor, now=caller.now))
