"""What the records look like once they are written."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """An event as it stands in the table. `id` grows with time; `position` is its place in the chain, if it has one."""

    id: int
    occurred_at: datetime
    event: str
    outcome: str
    reason: str | None
    actor_kind: str
    actor_id: str | None
    subject_kind: str | None
    subject_id: str | None
    client_id: str | None
    session_id: UUID | None
    address: str | None
    user_agent: str | None
    request_id: str | None
    details: Mapping[str, Any]
    position: int | None


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events are wanted: all of what is given must match. `until` is not included."""

    event: str | None = None
    outcome: str | None = None
    subject_id: str | None = None
    actor_id: str | None = None
    client_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Chained:
    """An event with its place in the chain; hashes are SHA-256, 32 bytes."""

    event: RecordedEvent
    position: int
    previous_hash: bytes
    hash: bytes


@dataclass(frozen=True, slots=True)
class ChainState:
    """Where the chain ends, and where what retention has dropped ended."""

    position: int
    hash: bytes
    dropped_position: int
    dropped_hash: bytes
