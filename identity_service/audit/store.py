"""SQL of the audit events."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from identity_service.database import Connection

INSERT = """
    INSERT INTO audit_events
        (session_id, occurred_at, event, outcome, reason, actor_kind, actor_id, subject_kind, subject_id, client_id,
         address, user_agent, request_id, details)
    SELECT session_id, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14::text::jsonb
      FROM unnest($1::uuid[]) AS given (session_id)
"""


async def insert(
    db: Connection,
    session_ids: Sequence[UUID | None],
    *,
    occurred_at: datetime,
    event: str,
    outcome: str,
    reason: str | None,
    actor_kind: str,
    actor_id: str | None,
    subject_kind: str | None,
    subject_id: str | None,
    client_id: str | None,
    address: str | None,
    user_agent: str | None,
    request_id: str | None,
    details: Mapping[str, Any],
) -> None:
    """Insert an event for each of the sessions."""
    await db.execute(
        INSERT,
        list(session_ids),
        occurred_at,
        event,
        outcome,
        reason,
        actor_kind,
        actor_id,
        subject_kind,
        subject_id,
        client_id,
        address,
        user_agent,
        request_id,
        json.dumps(details),
    )
