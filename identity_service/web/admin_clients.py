"""Administering clients: the services and backends that ask for tokens. A secret is shown once, when it is made."""

from datetime import datetime, timedelta
from typing import Annotated

from fastapi import Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from identity_service import errors
from identity_service.clients import Client, registration
from identity_service.shell import client_secret
from identity_service.verifier.claims import MAXIMUM_LIFETIME
from identity_service.web.dependencies import Administrator, runtime_of
from identity_service.web.paging import Listing, Scopes, Whole
from identity_service.web.problems import ADMINISTERED, JSON_BODY, Router, refusals
from identity_service.web.strict_json import StrictRoute

router = Router(
    prefix="/admin/clients",
    route_class=StrictRoute,
    tags=["Administration: clients"],
)

ClientId = Annotated[str, Path(examples=["batch-job"])]
Names = Annotated[list[Annotated[str, Field(max_length=255)]], Field(max_length=64)]
Grants = Annotated[Names, Field(examples=[["client_credentials"]])]
Audience = Annotated[Names, Field(examples=[["orders"]], description="Empty for that of the installation.")]
Lifetime = Annotated[
    int | None,
    Field(ge=1, le=MAXIMUM_LIFETIME, description="Seconds its access tokens live; null for the installation's."),
]
_ONE_OF_THEIRS = (errors.ClientNotFound, errors.ClientBuiltIn)


class NewClient(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    client_id: Annotated[str, Field(max_length=64, examples=["batch-job"])]
    grants: Grants
    scopes: Scopes = []
    audience: Audience = []
    first_party: bool = False
    access_lifetime: Lifetime = None


class ClientChange(BaseModel):
    """What is left out stays as it is."""

    model_config = ConfigDict(extra="forbid", strict=True)

    grants: Grants = []
    scopes: Scopes = []
    audience: Audience = []
    access_lifetime: Lifetime = None


class SecretRotation(BaseModel):
    """For how many seconds the present secret works beside the new one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    overlap: Annotated[int, Field(ge=0, le=registration.MOST_OVERLAP_SECONDS)] = registration.OVERLAP_SECONDS


class ClientAnswer(BaseModel):
    """One that is built in was never created, has no secret, and cannot be changed."""

    client_id: str
    grants: tuple[str, ...]
    scopes: tuple[str, ...]
    audience: tuple[str, ...]
    first_party: bool
    built_in: bool
    access_lifetime: int | None
    created_at: datetime | None
    secret_changed_at: datetime | None
    previous_secret_expires_at: datetime | None
    disabled_at: datetime | None

    @classmethod
    def of(cls, client: Client) -> "ClientAnswer":
        return cls(
            client_id=client.client_id,
            grants=client.grants,
            scopes=client.scopes,
            audience=client.audience,
            first_party=client.first_party,
            built_in=client.created_at is None,
            access_lifetime=_seconds(client.access_lifetime),
            created_at=client.created_at,
            secret_changed_at=client.secret_changed_at,
            previous_secret_expires_at=client.previous_secret_expires_at,
            disabled_at=client.disabled_at,
        )


class ClientWithSecret(ClientAnswer):
    """`client_secret` is shown this once."""

    client_secret: str

    @classmethod
    def with_secret(cls, client: Client, secret: str) -> "ClientWithSecret":
        return cls(**ClientAnswer.of(client).model_dump(), client_secret=secret)


@router.get("", responses=refusals(*ADMINISTERED))
async def list_clients(
    request: Request, _caller: Administrator, _query: Annotated[Whole, Query()]
) -> Listing[ClientAnswer]:
    """Every client, all on one page."""
    async with runtime_of(request).database.connection() as db:
        found = await registration.list_all(db)
    return Listing(items=[ClientAnswer.of(client) for client in found])


@router.post(
    "",
    status_code=201,
    responses=refusals(*ADMINISTERED, *JSON_BODY, errors.ClientTaken, errors.ClientBuiltIn, errors.ClientInvalid),
)
async def create_client(
    request: Request, response: Response, caller: Administrator, body: NewClient
) -> ClientWithSecret:
    """Register a confidential client."""
    runtime, secret = runtime_of(request), client_secret()
    client = await runtime.database.transact(
        lambda db: registration.create(
            db,
            body.client_id,
            grants=body.grants,
            scope=" ".join(body.scopes),
            audience=body.audience,
            first_party=body.first_party,
            access_lifetime=_lifetime(body.access_lifetime),
            secret=secret,
            issuer=runtime.settings.issuer_url,
            longest_lifetime=runtime.settings.access_lifetime,
            by=caller.actor,
            now=caller.now,
        )
    )
    response.headers["Location"] = f"/admin/clients/{client.client_id}"
    return ClientWithSecret.with_secret(client, secret)


@router.get("/{client_id}", responses=refusals(*ADMINISTERED, errors.ClientNotFound))
async def show_client(request: Request, _caller: Administrator, client_id: ClientId) -> ClientAnswer:
    """A client."""
    async with runtime_of(request).database.connection() as db:
        return ClientAnswer.of(await registration.find(db, client_id))


@router.patch("/{client_id}", responses=refusals(*ADMINISTERED, *JSON_BODY, *_ONE_OF_THEIRS, errors.ClientInvalid))
async def change_client(
    request: Request, caller: Administrator, client_id: ClientId, body: ClientChange
) -> ClientAnswer:
    """Change what a client may do. Its next token says so."""
    runtime, given = runtime_of(request), body.model_fields_set
    client = await runtime.database.transact(
        lambda db: registration.update(
            db,
            client_id,
            grants=body.grants if "grants" in given else None,
            scope=" ".join(body.scopes) if "scopes" in given else None,
            audience=body.audience if "audience" in given else None,
            change_access_lifetime="access_lifetime" in given,
            access_lifetime=_lifetime(body.access_lifetime),
            issuer=runtime.settings.issuer_url,
            longest_lifetime=runtime.settings.access_lifetime,
            by=caller.actor,
            now=caller.now,
        )
    )
    return ClientAnswer.of(client)


@router.post(
    "/{client_id}/rotate-secret",
    responses=refusals(*ADMINISTERED, *JSON_BODY, *_ONE_OF_THEIRS, errors.ClientInvalid),
)
async def rotate_client_secret(
    request: Request, caller: Administrator, client_id: ClientId, body: SecretRotation | None = None
) -> ClientWithSecret:
    """Give a client another secret. At most two work at a time."""
    secret = client_secret()
    client = await runtime_of(request).database.transact(
        lambda db: registration.rotate_secret(
            db,
            client_id,
            secret=secret,
            overlap=timedelta(seconds=(body or SecretRotation()).overlap),
            by=caller.actor,
            now=caller.now,
        )
    )
    return ClientWithSecret.with_secret(client, secret)


@router.post("/{client_id}/disable", responses=refusals(*ADMINISTERED, *_ONE_OF_THEIRS))
async def disable_client(request: Request, caller: Administrator, client_id: ClientId) -> ClientAnswer:
    """Shut a client out: its sessions end, its own tokens are revoked."""
    client = await runtime_of(request).database.transact(
        lambda db: registration.disable(db, client_id, by=caller.actor, now=caller.now)
    )
    return ClientAnswer.of(client)


@router.post("/{client_id}/enable", responses=refusals(*ADMINISTERED, *_ONE_OF_THEIRS))
async def enable_client(request: Request, caller: Administrator, client_id: ClientId) -> ClientAnswer:
    """Let a client in again. Its old sessions and tokens stay ended."""
    client = await runtime_of(request).database.transact(
        lambda db: registration.enable(db, client_id, by=caller.actor, now=caller.now)
    )
    return ClientAnswer.of(client)


@router.delete("/{client_id}", status_code=204, responses=refusals(*ADMINISTERED, *_ONE_OF_THEIRS))
async def delete_client(request: Request, caller: Administrator, client_id: ClientId) -> None:
    """Delete a client; its sessions end and its own tokens are revoked."""
    await runtime_of(request).database.transact(
        lambda db: registration.delete(db, client_id, by=caller.actor, now=caller.now)
    )


def _lifetime(seconds: int | None) -> timedelta | None:
    return timedelta(seconds=seconds) if seconds is not None else None


def _seconds(lifetime: timedelta | None) -> int | None:
    return int(lifetime.total_seconds()) if lifetime is not None else None
