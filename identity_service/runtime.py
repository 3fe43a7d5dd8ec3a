"""What a running service holds, handed to every request."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

from identity_service.accounts.breaches import BreachCheck
from identity_service.accounts.hashing import PasswordHashing
from identity_service.accounts.roles import OfferedScopes
from identity_service.clients import Client
from identity_service.database import Database
from identity_service.metrics import Metrics
from identity_service.revocation.feed import RevocationFeed
from identity_service.revocation.status_lists import StatusLists
from identity_service.sessions import SessionLimits
from identity_service.sessions.rotation import Rotations
from identity_service.settings import Settings
from identity_service.signing.live import LiveKeyring
from identity_service.tokens.rounds import SigningRounds

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Runtime:
    """The parts of a running service. `now` is the only clock that anything below asks for the time."""

    settings: Settings
    database: Database
    rotations: Rotations
    keys: LiveKeyring
    signing: SigningRounds
    revocations: RevocationFeed
    status_lists: StatusLists
    passwords: PasswordHashing
    breaches: BreachCheck | None
    offered_scopes: OfferedScopes
    metrics: Metrics
    now: Callable[[], datetime]

    def session_limits(self, client: Client) -> SessionLimits:
        """Return how long sessions that a client begins live."""
        return SessionLimits(
            idle=self.settings.refresh_lifetime,
            absolute=self.settings.session_lifetime,
            retry_window=self.settings.refresh_retry_window,
            access=self.access_lifetime(client),
        )

    def access_lifetime(self, client: Client) -> timedelta:
        """Return how long the access tokens of a client live: no longer than keys are published for."""
        return min(client.access_lifetime or self.settings.access_lifetime, self.settings.access_lifetime)

    def audience(self, client: Client) -> tuple[str, ...]:
        """Return who the access tokens of a client are for. This service itself takes those of first-party clients."""
        issuer = self.settings.issuer_url
        others = tuple(name for name in client.audience or self.settings.audience if name != issuer)
        return (*others, issuer) if client.first_party else others

    async def change_keys(self, change: Callable[[], T], *, now: datetime) -> T:
        """Run a change of the keys in a thread, and tell those who follow when the JWKS is another one afterwards."""
        published = self.keys.jwks(now)
        try:
            return await asyncio.to_thread(change)
        finally:
            if self.keys.jwks(now) != published:
                self.revocations.announce_keys()
