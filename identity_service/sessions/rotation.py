"""Refreshing a session: one row, one statement, which refreshes that arrive together share. Next door: `lifecycle`."""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from identity_service.audit import Actor
from identity_service.database import CONNECT_TIMEOUT, Connection, Database
from identity_service.errors import DatabaseUnavailable, RefreshTokenReused, ScopeRejected, SessionEnded
from identity_service.revocation import Reason
from identity_service.sessions import Claim, Session, lifecycle, store
from identity_service.tokens.jws import LEEWAY

MOST_AT_ONCE = 64
_CLAIMS = 3
"""How often a token is claimed that is the current one afterwards too."""


class _Waiting(NamedTuple):
    claim: Claim
    turn: "asyncio.Future[Session | None]"
    until: float


class Rotations:
    """Refreshes that arrive together go to Postgres together: one statement, one transaction, one wait for the disk.

    A refresh that comes alone is sent alone, at once. While one statement is under way the next ones gather, for
    `CONNECT_TIMEOUT` at most: to spend the token for a client that has given up would make its next attempt, after the
    retry window, look like theft.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._loop = asyncio.get_running_loop()  # once: on Python 3.11 it asks the system each time
        self._waiting: deque[_Waiting] = deque()
        self._sending: asyncio.Task[None] | None = None

    async def claim(self, claim: Claim) -> Session | None:
        """Advance the session if the presented generation is its current one and all is well with it.

        None says only that this did not do it: somebody else may have had the row in hand.

        Raises:
            DatabaseUnavailable: see there; and when those before this one take too long.
        """
        turn: asyncio.Future[Session | None] = self._loop.create_future()
        self._waiting.append(_Waiting(claim, turn, self._loop.time() + CONNECT_TIMEOUT))
        if self._sending is None:
            self._sending = self._loop.create_task(self._send())
        return await turn

    async def _send(self) -> None:
        try:
            while self._waiting:
                if taken := self._take():
                    await self._send_some(taken)
        finally:
            self._sending = None

    def _take(self) -> list[_Waiting]:
        """Return the next claims. For whoever has left, and whoever waited for too long, nothing is spent."""
        taken: list[_Waiting] = []
        now = self._loop.time()
        while self._waiting and len(taken) < MOST_AT_ONCE:
            waiting = self._waiting.popleft()
            if waiting.turn.done():
                continue
            if waiting.until < now:
                waiting.turn.set_exception(DatabaseUnavailable(detail="the refreshes before this one took too long"))
            else:
                taken.append(waiting)
        return taken

    async def _send_some(self, taken: list[_Waiting]) -> None:
        # Only the first of each session: a second one in the same statement would not see what the first did.
        claims = {claim.presented.session_id: claim for claim, _, _ in reversed(taken)}
        try:
            async with self._database.connection() as db:
                advanced = await store.claim_generations(db, claims.values())
        except Exception as error:  # noqa: BLE001 - each of those who wait raises it
            for _, turn, _ in taken:
                if not turn.done():
                    turn.set_exception(error)
            return
        for claim, turn, _ in taken:
            session = advanced.pop(claim.presented.session_id, None)  # the others of this session see who did it
            if not turn.done():  # whoever does not wait any more has been advanced all the same, as by a lost answer
                turn.set_result(session)


async def rotate(db: Connection, claim: Claim, *, scope: Sequence[str], by: Actor) -> Session:
    """Advance the session to its next refresh token and return it.

    Asking again with the token just spent returns the same successor (RFC 9700 4.14.2 allows no second family); asking
    with an older one ends the session.

    Args:
        db: a connection outside of any transaction: what is found out here must outlive the refusal.
        by: who presents the token; an end of the session is recorded in their name and that of the token's client.
        scope: what is asked for this time; nothing is spent when it exceeds what the login was granted.

    Raises:
        SessionEnded: expired, revoked, or its user is no longer welcome.
        RefreshTokenReused: the token had been spent before; the session has been ended.
        ScopeRejected: the scope exceeds the session's.
    """
    assert not db.is_in_transaction(), "a refusal would undo the end of the session"
    presented, held = claim.presented, 0
    for _ in range(_CLAIMS):
        if session := await store.claim_generation(db, claim, scope=scope):
            return session
        current = await store.find_live(db, presented, now=claim.now, idle_since=claim.idle_since)
        if current is None:
            raise SessionEnded(detail="the session is over, or its user is not welcome")
        if presented.generation < current.generation:
            await _end_unless_retried(db, claim, current, by=by)
        if not set(scope) <= set(current.scope):
            raise ScopeRejected
        if presented.generation < current.generation:
            return current
        held = current.generation
        if presented.generation > held:
            break
        # The current one after all: its account was being changed while the claim waited for the row. Somebody else's
        # claim may be first at the next attempt as well; then this one is a retry.
    # Signed by us, yet never handed out as far as this database knows: it was restored from a backup.
    raise SessionEnded(detail=f"generation {presented.generation} is unknown, the session is at {held}")


async def _end_unless_retried(db: Connection, claim: Claim, current: Session, *, by: Actor) -> None:
    """End a session whose spent token came back, unless it is the one just spent, within the window for that."""
    presented, window = claim.presented, claim.limits.retry_window
    # Replicas may differ. Where a clock was set back by more, a spent token must not be good for as long again.
    in_time = bool(window) and -LEEWAY <= claim.now - current.rotated_at <= window
    if in_time and presented.generation + 1 == current.generation:
        return
    # Committed before refusing: raising inside the transaction would bring the family back.
    by = by._replace(client_id=presented.client_id)
    async with db.transaction():
        await lifecycle.end(db, current.id, reason=Reason.REUSE, by=by, now=claim.now)
    raise RefreshTokenReused(
        detail=f"session {current.id}: generation {presented.generation} came back at {current.generation}"
    )
