"""Who failed too often, and how long they have to wait. A live session is never asked.

Whatever accepts a secret goes through here: `check` before the work of proving it, `count_failure` when it was wrong,
`admit` when it was right, in the transaction that makes use of it. A login, as long as nothing counts against it, does
both looks in statements that it needs anyway. What proves a secret is in `accounts` and `clients`. Counted in Postgres,
so that replicas agree.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import TypeAlias
from uuid import UUID

from identity_service import audit
from identity_service.audit import Actor, Event, Subject
from identity_service.database import Connection, delete_expired
from identity_service.errors import Throttled
from identity_service.throttling import store
from identity_service.throttling.store import Tally

Networks: TypeAlias = Sequence[IPv4Network | IPv6Network]

FIRST_DELAY = timedelta(seconds=1)
LOCK = timedelta(days=1)
FORGOTTEN_AFTER = timedelta(days=1)
"""How long after the last failure, and after the wait it brought, nothing is left of it."""

_MOST_DOUBLINGS = 30


@dataclass(frozen=True, slots=True)
class Rule:
    """What failures of one kind cost.

    Args:
        free: how many cost nothing; each one more doubles the delay, from one second on.
        longest: where the doubling ends.
        locks_at: the failure from which on the wait is a day.
        drains_every: one failure is forgotten in each such time; without it, all at once after a day.
    """

    free: int
    longest: timedelta
    locks_at: int | None = None
    drains_every: timedelta | None = None

    def delay(self, failures: int) -> timedelta:
        """Return the wait after so many failures in a row."""
        if self.locks_at is not None and failures >= self.locks_at:
            return LOCK
        if failures <= self.free:
            return timedelta(0)
        return min(self.longest, FIRST_DELAY * (1 << min(failures - self.free - 1, _MOST_DOUBLINGS)))

    def one_more(self, tally: Tally, now: datetime) -> Tally:
        """Return the tally after a failure at this moment."""
        failures, since = tally.failures, now
        if now >= tally.blocked_until + FORGOTTEN_AFTER:
            failures = 0
        elif self.drains_every is not None:
            drained = max(0, (now - tally.last_failed_at) // self.drains_every)
            failures = max(0, failures - drained)
            if failures:
                # Whole steps only: failures that come a little faster than they drain must not keep all others.
                since = tally.last_failed_at + drained * self.drains_every
        return Tally(failures + 1, since, now + self.delay(failures + 1))


# NIST SP 800-63B-4 3.2.2: no more than 100 in a row.
ACCOUNT = Rule(free=5, longest=timedelta(minutes=15), locks_at=100)
# Only somebody with a stolen access token gets here: the owner can log in again, and then has another session.
SESSION = Rule(free=5, longest=LOCK)
# Secrets of clients are long and random: a flood is to be slowed, but a service that got the right one soon goes on.
CLIENT = Rule(free=5, longest=timedelta(minutes=1))
# One address may be a whole company's.
ADDRESS = Rule(free=100, longest=timedelta(minutes=15), drains_every=timedelta(seconds=36))


@dataclass(frozen=True, slots=True)
class Counter:
    """One thing that failures are counted on. The key is a digest: people type passwords where usernames belong."""

    kind: str
    key: bytes
    rule: Rule


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a failure is counted on: the account or client that is tried, and the place it is tried from.

    A success is forgiveness for the first, never for the second: an attacker has an account too.
    """

    target: Counter | None
    place: Counter | None

    @property
    def counters(self) -> tuple[Counter, ...]:
        return tuple(counter for counter in (self.target, self.place) if counter is not None)

    @property
    def keys(self) -> list[bytes]:
        return [counter.key for counter in self.counters]

    @property
    def target_key(self) -> bytes | None:
        return self.target.key if self.target is not None else None

    @property
    def place_key(self) -> bytes | None:
        return self.place.key if self.place is not None else None

    def at_account(self, user_id: UUID) -> "Attempt":
        """Return the same once it is known whose name was typed."""
        return replace(self, target=_account(user_id))


UNCOUNTED = Attempt(None, None)
"""An attempt that counts against nothing, because it has been admitted already or is exempt."""


def password_attempt(user_id: UUID | None, username: str, address: str | None, *, exempt: Networks) -> Attempt:
    """Return what a wrong password is counted on.

    Args:
        user_id: None when nobody has this name. An account is counted by its id, which no change of its name resets.
        username: the canonical spelling of what was typed.
        exempt: networks whose addresses are not counted; accounts are counted wherever they are tried from.
    """
    account = _account(user_id) if user_id is not None else _counter("account", f"name {username}", ACCOUNT)
    return Attempt(account, _place(address, exempt))


def session_attempt(session_id: UUID) -> Attempt:
    """Return what a wrong password is counted on that somebody who is signed in proves once more: their session alone.

    Neither guesses at the login nor those from the same place keep the owner from changing the password; and a token
    that was stolen makes nobody wait but its own session.
    """
    return Attempt(_counter("session", str(session_id), SESSION), None)


def client_attempt(client_id: str, address: str | None, *, exempt: Networks) -> Attempt:
    """Return what a wrong client secret is counted on: nobody can lock a service out from elsewhere."""
    where = prefix(address) or ""
    return Attempt(_counter("client", f"{where} {client_id}", CLIENT), _place(address, exempt))


def token_attempt(address: str | None, *, exempt: Networks) -> Attempt:
    """Return what a wrong single-use token, such as one of a password reset, is counted on."""
    return Attempt(None, _place(address, exempt))


async def check(db: Connection, attempt: Attempt, *, now: datetime) -> None:
    """Look whether the attempt may be made at all, before anything is spent on it.

    Raises:
        Throttled: not yet.
    """
    refuse_blocked(attempt, await store.find(db, attempt.keys), now=now)


def refuse_blocked(attempt: Attempt, tallies: Mapping[bytes, Tally], *, now: datetime) -> None:
    """Do as `check` does, with tallies that the caller has read already.

    Raises:
        Throttled: not yet.
    """
    blocked = [
        (tallies[counter.key].blocked_until - now, counter.kind)
        for counter in attempt.counters
        if counter.key in tallies and tallies[counter.key].blocked_until > now
    ]
    if blocked:
        wait, kind = max(blocked)
        raise Throttled(detail=kind, retry_after=math.ceil(wait.total_seconds()))


async def count_failure(db: Connection, attempt: Attempt, *, by: Actor, subject: Subject | None, now: datetime) -> None:
    """Count a failed attempt. Call within a transaction.

    Args:
        subject: whose account it was, for the audit.

    Raises:
        Throttled: others have failed too often since `check`. Then this attempt was no use to anybody: right or wrong,
            the answer is the same, and it is not counted.
    """
    tallies = await store.lock(db, attempt.keys, now=now)
    refuse_blocked(attempt, tallies, now=now)
    counted = {counter: counter.rule.one_more(tallies[counter.key], now) for counter in attempt.counters}
    await store.update(db, {counter.key: tally for counter, tally in counted.items()})
    for counter, tally in counted.items():
        if counter.rule.locks_at is not None and tally.failures >= counter.rule.locks_at:
            details = {"failures": tally.failures, "locked_until": tally.blocked_until.isoformat()}
            await audit.record(db, Event.USER_LOCKED, subject, by=by, now=now, details=details)


async def admit(db: Connection, attempt: Attempt, *, now: datetime) -> None:
    """Make use of a secret that was right: look again, and forget the failures of the account or client.

    Call within the transaction that the secret opens, so that of many guesses at once none wins after a block began.
    A client's secret opens none: there it is called by itself.

    Raises:
        Throttled: others have failed too often since `check`.
    """
    tallies = await store.find(db, attempt.keys)
    refuse_blocked(attempt, tallies, now=now)
    if attempt.target is not None and attempt.target.key in tallies:
        # Whoever counts a failure at this moment holds the row. What is left after that is looked at.
        await store.delete_open(db, attempt.target.key, now=now)
        refuse_blocked(attempt, await store.find(db, attempt.keys), now=now)


@dataclass(frozen=True, slots=True)
class Standing:
    """How an account stands: failures in a row, and until when its password opens nothing, if it does not."""

    failures: int = 0
    locked_until: datetime | None = None


async def standing(db: Connection, user_id: UUID, *, now: datetime) -> Standing:
    """Return how an account stands, for an administrator."""
    return (await standings(db, [user_id], now=now))[user_id]


async def standings(db: Connection, user_ids: Sequence[UUID], *, now: datetime) -> dict[UUID, Standing]:
    """Return how several accounts stand."""
    keys = {user_id: _account(user_id).key for user_id in user_ids}
    tallies = await store.find(db, list(keys.values()))
    return {user_id: _standing(tallies.get(key), now) for user_id, key in keys.items()}


async def unlock(db: Connection, user_id: UUID, *, by: Actor, now: datetime) -> None:
    """Forget the failures of an account, as an administrator asks. Call within a transaction."""
    failures = await store.delete(db, _account(user_id).key)
    await _record_unlocked(db, user_id, failures, by=by, now=now)


async def forgive(db: Connection, user_id: UUID, *, by: Actor, now: datetime) -> None:
    """Forget the failures of an account whose owner set another password. Recorded if there were any.

    Call within a transaction.
    """
    if failures := await store.delete(db, _account(user_id).key):
        await _record_unlocked(db, user_id, failures, by=by, now=now)


async def prune(db: Connection, *, now: datetime) -> int:
    """Delete a batch of tallies that say nothing any more; return how many rows went."""
    expired = "last_failed_at < $1 AND blocked_until < $1 ORDER BY last_failed_at"
    return await delete_expired(db, "throttles", "key", before=now - FORGOTTEN_AFTER, expired=expired)


def prefix(address: str | None) -> str | None:
    """Return the part of the network that one subscriber has: an address of IPv4, a /64 of IPv6."""
    if address is None:
        return None
    parsed = ip_address(address)
    return str(ip_network((int(parsed), 64), strict=False)) if parsed.version == 6 else str(parsed)


def _standing(tally: Tally | None, now: datetime) -> Standing:
    if tally is None or now >= tally.blocked_until + FORGOTTEN_AFTER:
        return Standing()
    return Standing(tally.failures, tally.blocked_until if tally.blocked_until > now else None)


async def _record_unlocked(db: Connection, user_id: UUID, failures: int, *, by: Actor, now: datetime) -> None:
    details = {"failures": failures}
    await audit.record(db, Event.USER_UNLOCKED, Subject("user", str(user_id)), by=by, now=now, details=details)


def _place(address: str | None, exempt: Networks) -> Counter | None:
    where = prefix(address)
    if address is None or where is None or any(ip_address(address) in network for network in exempt):
        return None
    return _counter("address", where, ADDRESS)


def _counter(kind: str, name: str, rule: Rule) -> Counter:
    return Counter(kind, hashlib.sha256(f"{kind} {name}".encode(errors="surrogatepass")).digest(), rule)


def _account(user_id: UUID) -> Counter:
    """Return what failures at an account are counted on; `store.key_of_account` computes the same key."""
    return _counter("account", f"user {user_id}", ACCOUNT)
