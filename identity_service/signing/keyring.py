"""The states of keys as a function of time, and what a rotation or an emergency does to the list of them.

Nothing here stores a state: two processes that read the same list at the same moment reach the same answer without
talking to each other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey

from identity_service.errors import KeyNotFound, KeysUnavailable

JWKS_MAX_AGE = timedelta(minutes=5)
"""How long anyone may hold a copy of the JWKS without asking again."""

CLOCK_SKEW = timedelta(minutes=1)
"""How far the clocks of the machines that sign and verify may lie apart."""


class KeyState(StrEnum):
    STANDBY = "standby"  # published, waits to sign
    ACTIVE = "active"  # published, signs
    RETIRING = "retiring"  # published for the access tokens it signed
    RETAINED = "retained"  # no longer published; the issuer still verifies refresh tokens it signed
    RETIRED = "retired"  # nothing it signed can still be accepted
    REVOKED = "revoked"  # withdrawn at once, in an emergency


@dataclass(frozen=True, slots=True)
class Key:
    """One RSA key; `kid` stands for its numbers. `private` is None as soon as the key has stopped signing."""

    kid: str
    created_at: datetime
    signs_from: datetime | None
    revoked_at: datetime | None
    public: RSAPublicKey = field(compare=False, repr=False)
    private: RSAPrivateKey | None = field(default=None, compare=False, repr=False)

    def took_over_by(self, now: datetime) -> bool:
        """Whether the key's turn to sign has come; one revoked before its turn never had one."""
        if self.signs_from is None or self.signs_from > now:
            return False
        return self.revoked_at is None or self.revoked_at > self.signs_from

    def revoked_by(self, now: datetime) -> bool:
        return self.revoked_at is not None and self.revoked_at <= now


@dataclass(frozen=True, slots=True)
class TokenLifetimes:
    """The longest lifetimes of what the keys sign."""

    access: timedelta
    refresh: timedelta

    @property
    def published_after_signing(self) -> timedelta:
        """How long a key stays in the JWKS after its last signature: until no access token of it can be accepted."""
        return self.access + JWKS_MAX_AGE + CLOCK_SKEW

    @property
    def verified_after_signing(self) -> timedelta:
        """How long this issuer itself accepts what a key has signed: until no refresh token of it is left."""
        return max(self.refresh + CLOCK_SKEW, self.published_after_signing)


@dataclass(frozen=True, slots=True)
class KeyStatus:
    """A key as an administrator sees it. The two ends are None while the key has not been superseded."""

    key: Key
    state: KeyState
    in_jwks_until: datetime | None
    verified_until: datetime | None


_PUBLISHED = frozenset({KeyState.ACTIVE, KeyState.STANDBY, KeyState.RETIRING})
_VERIFIED = _PUBLISHED | {KeyState.RETAINED}
_JWKS_ORDER = {KeyState.ACTIVE: 0, KeyState.STANDBY: 1, KeyState.RETIRING: 2}


@dataclass(frozen=True, slots=True)
class Keyring:
    """The keys of one installation, oldest first."""

    keys: tuple[Key, ...]
    lifetimes: TokenLifetimes
    _outlooks: list["_Outlook"] = field(default_factory=list, init=False, compare=False, repr=False)

    def status(self, key: Key, now: datetime) -> KeyStatus:
        """Return the key's state at `now` and the ends that follow from it."""
        superseded_at = self._superseded_at(key)
        if key.revoked_by(now):
            return KeyStatus(key, KeyState.REVOKED, key.revoked_at, key.revoked_at)
        if not key.took_over_by(now):
            return KeyStatus(key, KeyState.STANDBY, None, None)
        if superseded_at is None:
            return KeyStatus(key, KeyState.ACTIVE, None, None)
        in_jwks_until = superseded_at + self.lifetimes.published_after_signing
        verified_until = superseded_at + self.lifetimes.verified_after_signing
        if now < superseded_at:
            state = KeyState.ACTIVE
        elif now < in_jwks_until:
            state = KeyState.RETIRING
        elif now < verified_until:
            state = KeyState.RETAINED
        else:
            state = KeyState.RETIRED
        return KeyStatus(key, state, in_jwks_until, verified_until)

    def statuses(self, now: datetime) -> tuple[KeyStatus, ...]:
        return self._outlook(now).statuses

    def listed(self, now: datetime) -> list[KeyStatus]:
        """Return the keys as an administrator reads them: in the order in which a key goes through its states."""
        order = list(KeyState)
        return sorted(self.statuses(now), key=lambda status: (order.index(status.state), status.key.created_at))

    def signer(self, now: datetime) -> Key:
        """Return the key that signs at `now`; its `private` is present.

        When the active key's private half is already gone, a peer whose clock runs ahead has seen the hand-over and
        destroyed it: the successor, long published, signs in its place.

        Raises:
            KeysUnavailable: no key may sign now, or its private half is missing.
        """
        states = self.statuses(now)
        active = next((status.key for status in states if status.state is KeyState.ACTIVE), None)
        if active is not None and active.private is not None:
            return active
        successor = active and next((key for key in self._scheduled(now) if key.private is not None), None)
        if successor is None:
            raise KeysUnavailable(
                detail="no key is active at this time" if active is None else f"{active.kid}.pem is missing"
            )
        return successor

    def verification_key(self, kid: str, now: datetime) -> RSAPublicKey | None:
        """Return the public half that verifies what this issuer itself receives back, None when it must be refused."""
        return self._outlook(now).verified.get(kid)

    def published(self, now: datetime) -> tuple[Key, ...]:
        """Return the keys of the JWKS, the active one first."""
        return self._outlook(now).published

    def stopped_signing(self, now: datetime) -> tuple[Key, ...]:
        """Return the keys whose private half must not exist any more."""
        signing = (KeyState.ACTIVE, KeyState.STANDBY)
        return tuple(status.key for status in self.statuses(now) if status.state not in signing)

    def find(self, kid: str) -> Key | None:
        return next((key for key in self.keys if key.kid == kid), None)

    def standby(self, now: datetime) -> Key | None:
        """Return the key that signs next: the scheduled one if a rotation is on its way, else the one in waiting."""
        waiting = [key for key in self.keys if key.signs_from is None and not key.revoked_by(now)]
        return next(iter(self._scheduled(now) + waiting), None)

    def _outlook(self, now: datetime) -> "_Outlook":
        """Return how the keys stand at `now`; worked out again only when one of them has changed its state since."""
        for outlook in self._outlooks:
            if outlook.since <= now < outlook.until:
                return outlook
        statuses = tuple(self.status(key, now) for key in self.keys)
        published = [status for status in statuses if status.state in _PUBLISHED]
        changes = {time for key in self.keys for time in (key.signs_from, key.revoked_at) if time is not None}
        changes |= {
            superseded_at + lasting
            for key in self.keys
            if (superseded_at := self._superseded_at(key)) is not None
            for lasting in (self.lifetimes.published_after_signing, self.lifetimes.verified_after_signing)
        }
        outlook = _Outlook(
            since=max((time for time in changes if time <= now), default=_START),
            until=min((time for time in changes if time > now), default=_END),
            statuses=statuses,
            published=tuple(status.key for status in sorted(published, key=lambda status: _JWKS_ORDER[status.state])),
            verified={status.key.kid: status.key.public for status in statuses if status.state in _VERIFIED},
        )
        self._outlooks[:] = [outlook]
        return outlook

    def _scheduled(self, now: datetime) -> list[Key]:
        coming = [
            (key.signs_from, key)
            for key in self.keys
            if key.signs_from is not None and key.signs_from > now and not key.revoked_by(now)
        ]
        return [key for _, key in sorted(coming, key=lambda pair: pair[0])]

    def _superseded_at(self, key: Key) -> datetime | None:
        """Return when a later key takes over from this one, which may lie in the future."""
        turn = _turn(key)
        later = [_turn(other)[0] for other in self.keys if other.took_over_by(_END) and _turn(other) > turn]
        return min(later, default=None)


@dataclass(frozen=True, slots=True)
class _Outlook:
    """How keys stand from one moment to the next at which one of them changes its state."""

    since: datetime
    until: datetime
    statuses: tuple[KeyStatus, ...]
    published: tuple[Key, ...]
    verified: Mapping[str, RSAPublicKey]


_START = datetime.min.replace(tzinfo=UTC)
_END = datetime.max.replace(tzinfo=UTC)


def _turn(key: Key) -> tuple[datetime, datetime, str]:
    return (key.signs_from or _END, key.created_at, key.kid)


FreshKey = Callable[[], Key]
"""Makes a key that waits to sign, created now, with its private half."""


def first_keys(fresh: FreshKey, lifetimes: TokenLifetimes) -> Keyring:
    """Return the keyring of a new installation: one key that signs at once, one in waiting."""
    active = fresh()
    return Keyring((replace(active, signs_from=active.created_at), fresh()), lifetimes)


def rotated(
    ring: Keyring, fresh: FreshKey, *, requested_at: datetime, now: datetime, publish_window: timedelta, at_once: bool
) -> Keyring:
    """Return the ring with its standby key promoted and a new one in waiting.

    The promotion takes effect once every verifier can have fetched the standby key: `publish_window` after it was
    created, or at once when asked for. The same ring comes back when there is nothing to do: a promotion is already
    scheduled, or another rotation happened since this one was requested (two at once make one).
    """
    if any(requested_at <= key.created_at <= now + CLOCK_SKEW for key in ring.keys):
        return ring
    able = _without_lost(ring, now)
    standby = able.standby(now) or fresh()
    scheduled = standby.signs_from is not None
    if scheduled and not at_once:
        return ring
    signs_from = now if at_once else max(now, standby.created_at + publish_window)
    ring = _with(able, replace(standby, signs_from=signs_from))
    needed = tuple(status.key for status in ring.statuses(now) if status.state is not KeyState.RETIRED)
    return _with_one_in_waiting(replace(ring, keys=needed), fresh, now)


def is_due(ring: Keyring, *, period: timedelta, now: datetime) -> bool:
    """Whether the active key has signed for `period` and none is scheduled to follow it; never for a period of zero."""
    standby = ring.standby(now)
    if not period or (standby is not None and standby.signs_from is not None):
        return False
    active = (status.key for status in ring.statuses(now) if status.state is KeyState.ACTIVE)
    return any(key.signs_from is not None and key.signs_from + period <= now for key in active)


def revoked(ring: Keyring, kid: str, fresh: FreshKey, *, now: datetime) -> Keyring:
    """Return the ring with one key withdrawn at once; the standby key signs from now if the active one is gone.

    Raises:
        KeyNotFound: no such key in the ring.
    """
    key = ring.find(kid)
    if key is None:
        raise KeyNotFound
    if key.revoked_by(now):
        return ring
    was = ring.status(key, now).state
    ring = _without_lost(_with(ring, replace(key, revoked_at=now, private=None)), now)
    if was is KeyState.ACTIVE:
        ring = _with(ring, replace(ring.standby(now) or fresh(), signs_from=now))
    return _with_one_in_waiting(ring, fresh, now)


def _without_lost(ring: Keyring, now: datetime) -> Keyring:
    """Return the ring without keys that lost their private half before their turn: they never signed, and never can."""
    kept = tuple(key for key in ring.keys if key.private is not None or key.took_over_by(now) or key.revoked_by(now))
    return replace(ring, keys=kept)


def _with(ring: Keyring, changed: Key) -> Keyring:
    """Return the ring with one key replaced, or added when it is new."""
    if ring.find(changed.kid) is None:
        return replace(ring, keys=(*ring.keys, changed))
    return replace(ring, keys=tuple(changed if key.kid == changed.kid else key for key in ring.keys))


def _with_one_in_waiting(ring: Keyring, fresh: FreshKey, now: datetime) -> Keyring:
    """Return the ring with a key that no schedule has claimed: what is promoted next must be published by then."""
    if any(key.signs_from is None and not key.revoked_by(now) for key in ring.keys):
        return ring
    return _with(ring, fresh())
