"""What any replica has revoked, as one process holds it: read from the table, handed to whoever follows.

The table is the truth and is looked at every half second; a notification only makes the next look come sooner.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from identity_service.database import Database
from identity_service.revocation import RevokedIndex, store
from identity_service.revocation.indexes import position

OVERLAP = timedelta(seconds=60)
"""How much later than it was written a revocation may be committed, and how far two database servers may disagree."""

LOOKS_PER_FULL_ONE = 600
FOLLOWER_QUEUE = 1000


class Follower:
    """Somebody who hears of every revocation from now on."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[RevokedIndex | None] = asyncio.Queue(FOLLOWER_QUEUE)

    async def next(self, *, within: float) -> RevokedIndex | None:
        """Return the next revocation, None when no more will come.

        Raises:
            TimeoutError: there was none within that many seconds.
        """
        return await asyncio.wait_for(self._queue.get(), within)

    def tell(self, revoked: RevokedIndex) -> bool:
        """Queue a revocation; return False when the follower does not keep up."""
        if self._queue.full():
            return False
        self._queue.put_nowait(revoked)
        return True

    def dismiss(self) -> None:
        """Let the follower go: what it has not heard yet is in the lists."""
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(None)


class RevocationFeed:
    """The revoked entries of all status lists. `versions` counts the changes of each list."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lists: dict[int, dict[int, RevokedIndex]] = {}
        self._followers: set[Follower] = set()
        self._seen_at: datetime | None = None
        self._looks = 0
        self._closed = False
        self.versions: dict[int, int] = {}

    @property
    def loaded(self) -> bool:
        """Whether the table has been read at all; before that, nothing may be said about any token."""
        return self._looks > 0

    async def look(self, now: datetime) -> None:
        """Take up what has been revoked since the last look, now and then all of it.

        Raises:
            DatabaseUnavailable: what is held stays in force.
        """
        since = self._seen_at if self._looks % LOOKS_PER_FULL_ONE else None
        async with self._database.connection() as db:
            found = await store.list_since(db, since, overlap=OVERLAP, now=now)
        self._looks += 1
        for revoked in found:
            self._take_up(revoked)

    def forget_expired(self, now: datetime) -> None:
        """Drop entries that no token can name any more."""
        for number, entries in self._lists.items():
            kept = {index: revoked for index, revoked in entries.items() if revoked.expires_at > now}
            if len(kept) != len(entries):
                self._lists[number] = kept
                self.versions[number] += 1

    def revoked_in(self, list_number: int) -> list[int]:
        """Return the revoked indexes of one list."""
        return list(self._lists.get(list_number, ()))

    def recorded_since(self, recorded_at: datetime) -> list[RevokedIndex]:
        """Return what was recorded from then on, and what may have been committed late before it, oldest first."""
        entries = [revoked for entries in self._lists.values() for revoked in entries.values()]
        late = [revoked for revoked in entries if revoked.recorded_at >= recorded_at - OVERLAP]
        return sorted(late, key=lambda revoked: revoked.recorded_at)

    @contextmanager
    def follow(self) -> Iterator[Follower]:
        """Hear of every revocation for as long as the context lasts."""
        follower = Follower()
        if self._closed:
            follower.dismiss()
        self._followers.add(follower)
        try:
            yield follower
        finally:
            self._followers.discard(follower)

    def close(self) -> None:
        """Let every follower go, so that the process can stop."""
        self._closed = True
        for follower in self._followers:
            follower.dismiss()

    def _take_up(self, revoked: RevokedIndex) -> None:
        place = position(revoked.status_index)
        entries = self._lists.setdefault(place.list_number, {})
        if place.index in entries:
            return
        entries[place.index] = revoked
        self.versions[place.list_number] = self.versions.get(place.list_number, 0) + 1
        self._seen_at = revoked.recorded_at if self._seen_at is None else max(self._seen_at, revoked.recorded_at)
        for follower in list(self._followers):
            if not follower.tell(revoked):
                follower.dismiss()
                self._followers.discard(follower)
