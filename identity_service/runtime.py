"""What a running service holds, handed to every request."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from identity_service.accounts.hashing import PasswordHashing
from identity_service.accounts.roles import OfferedScopes
from identity_service.database import Database
from identity_service.metrics import Metrics
from identity_service.revocation.feed import RevocationFeed
from identity_service.revocation.status_lists import StatusLists
from identity_service.sessions import SessionLimits
from identity_service.settings import Settings
from identity_service.signing.live import LiveKeyring


@dataclass(frozen=True, slots=True)
class Runtime:
    """The parts of a running service. `now` is the only clock that anything below asks for the time."""

    settings: Settings
    database: Database
    keys: LiveKeyring
    revocations: RevocationFeed
    status_lists: StatusLists
    passwords: PasswordHashing
    offered_scopes: OfferedScopes
    metrics: Metrics
    now: Callable[[], datetime]

    @property
    def session_limits(self) -> SessionLimits:
        return SessionLimits(
            idle=self.settings.refresh_lifetime,
            absolute=self.settings.session_lifetime,
            retry_window=self.settings.refresh_retry_window,
            access=self.settings.access_lifetime,
        )
