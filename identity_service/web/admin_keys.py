"""Administering the signing keys. What is shown of them are names, states and times, never numbers."""

from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from typing import Annotated

from fastapi import Path, Query, Request
from pydantic import BaseModel, ConfigDict

from identity_service import errors
from identity_service.signing import recording
from identity_service.signing.key_files import KeyChange
from identity_service.signing.keyring import Keyring, KeyState
from identity_service.web.dependencies import Administrator, runtime_of
from identity_service.web.paging import Listing, Whole
from identity_service.web.problems import ADMINISTERED, JSON_BODY, Router, refusals
from identity_service.web.strict_json import StrictRoute

router = Router(
    prefix="/admin/keys",
    route_class=StrictRoute,
    tags=["Administration: keys"],
)


class Rotation(BaseModel):
    """`now` does not wait until every verifier can know the next key: for an active one that others may have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    now: bool = False


class KeyAnswer(BaseModel):
    kid: str
    state: KeyState
    created_at: datetime
    signs_from: datetime | None
    in_jwks_until: datetime | None
    verified_until: datetime | None


@router.get("", responses=refusals(*ADMINISTERED))
async def list_keys(request: Request, caller: Administrator, _query: Annotated[Whole, Query()]) -> Listing[KeyAnswer]:
    """Every key with its state and times, as `keys list --json` shows them."""
    return _show(runtime_of(request).keys.current, caller.now)


@router.post("/rotate", responses=refusals(*ADMINISTERED, *JSON_BODY, errors.KeysUnavailable))
async def rotate_keys(request: Request, caller: Administrator, body: Rotation | None = None) -> Listing[KeyAnswer]:
    """Promote the standby key, as soon as every verifier can know it. Other processes take it up within seconds."""
    keys, at_once = runtime_of(request).keys, body is not None and body.now
    rotate = partial(keys.rotate, now=caller.now, at_once=at_once)
    return await _change(request, caller, rotate, recording.record_rotation)


@router.post("/{kid}/revoke", responses=refusals(*ADMINISTERED, errors.KeyNotFound, errors.KeysUnavailable))
async def revoke_key(
    request: Request, caller: Administrator, kid: Annotated[str, Path(examples=["B" * 43])]
) -> Listing[KeyAnswer]:
    """Withdraw a key, in an emergency: whoever holds tokens that it signed is logged out.

    At once where this is answered; other processes take it up within seconds.
    """
    revoke = partial(runtime_of(request).keys.revoke, kid, now=caller.now)
    return await _change(request, caller, revoke, recording.record_revocation)


async def _change(
    request: Request, caller: Administrator, change: Callable[[], KeyChange], record: Callable[..., Awaitable[None]]
) -> Listing[KeyAnswer]:
    """Change the files within a transaction, so that they do not while nobody could write it down.

    Where the database goes away in between, housekeeping writes it down when it is back.
    """
    runtime, now = runtime_of(request), caller.now
    changed = None
    try:
        async with runtime.database.connection() as db, db.transaction():
            changed = await runtime.change_keys(change, now=now)
            if changed.key is not None:
                await record(db, changed.key, by=caller.actor, now=now)
    except BaseException:
        if changed is not None and (key := changed.key) is not None:
            runtime.keys.unrecorded.append(lambda db: record(db, key, by=caller.actor, now=now))
        raise
    return _show(changed.ring, now)


def _show(ring: Keyring, now: datetime) -> Listing[KeyAnswer]:
    return Listing(
        items=[
            KeyAnswer(
                kid=status.key.kid,
                state=status.state,
                created_at=status.key.created_at,
                signs_from=status.key.signs_from,
                in_jwks_until=status.in_jwks_until,
                verified_until=status.verified_until,
            )
            for status in ring.listed(now)
        ]
    )
