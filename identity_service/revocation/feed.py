"""What any replica has revoked, as one process holds it: read from the table, handed to whoever follows.

The table is the truth and is looked at every half second; a notification only makes the next look come sooner. While
the table cannot be looked at, nothing is vouched for: lists are refused and streams end, and verifiers go by their age.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum

from identity_service.database import Database
from identity_service.revocation import RevokedIndex, position, store

OVERLAP = timedelta(seconds=60)
"""How much later than it was written a revocation may be committed, and how far two database servers may disagree."""

SHORT_OVERLAP = timedelta(seconds=2)
"""What most looks read again; enough for all but a commit that had to wait."""

LOOKS_PER_LONG_ONE = 10
LOOKS_PER_FULL_ONE = 600
TAKEN_AT_ONCE = 500
"""Entries that a look takes up, for a millisecond or two, before it lets others have their turn."""

VOUCHED_SECONDS = 10.0
"""For how long a look is good; longer than two of them and a reconnection take, shorter than a list's `ttl` (15 s)."""

FOLLOWER_QUEUE = 1000
"""Events that a follower may be behind, and that one who comes back is told at most."""

MAX_FOLLOWERS = 2000
"""Streams of one process. Anyone may open one, and each costs a connection and some kilobytes."""

MAX_FOLLOWERS_OF_ONE = 50
"""Streams of one process that go to the same place of the network."""


class News(Enum):
    """What followers hear besides revocations."""

    KEYS = "keys"  # the published keys are others than a moment ago
    END = "end"  # no more will come


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What a look found that is new: one for all who follow, TAKEN_AT_ONCE at most. Equal to itself only."""

    revoked: tuple[RevokedIndex, ...]

    def __len__(self) -> int:
        return len(self.revoked)


class Follower:
    """Somebody who hears of every revocation from now on."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Batch | News] = asyncio.Queue()
        self._behind = 0

    async def next(self, *, within: float) -> Batch | News:
        """Return what is heard next.

        Raises:
            TimeoutError: there was none within that many seconds.
        """
        async with asyncio.timeout(within):
            news = await self._queue.get()
        self._behind -= _count(news)
        return news

    def tell(self, news: Batch | News) -> bool:
        """Queue some news; return False when the follower does not keep up."""
        if self._behind + _count(news) > FOLLOWER_QUEUE:
            return False
        self._behind += _count(news)
        self._queue.put_nowait(news)
        return True

    def dismiss(self) -> None:
        """Let the follower go: what it has not heard yet is in the lists."""
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(News.END)


def _count(news: Batch | News) -> int:
    return len(news) if isinstance(news, Batch) else 1


class RevocationFeed:
    """The revoked entries of all status lists. `versions` counts the changes of each list."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lists: dict[int, dict[int, datetime]] = {}
        """Of each list the entries and when they expire: only what the garbage collector need not look at."""
        self._recent: deque[RevokedIndex] = deque()
        self._pushed_out_at: datetime | None = None
        """When the newest was recorded of those that had to leave the recent ones."""
        self._followers: set[Follower] = set()
        self._places: Counter[str | None] = Counter()
        self._looks = 0
        self._doubtful = False
        self._looked_at = float("-inf")
        self._closed = False
        self.versions: dict[int, int] = {}
        self.newest_at: datetime | None = None
        """When the newest was recorded. Later ones may be dated up to OVERLAP earlier."""
        self.first_list = self.last_list = 0
        """The lists that a living session may have its index in."""

    @property
    def followers(self) -> int:
        """How many streams are open."""
        return len(self._followers)

    @property
    def is_current(self) -> bool:
        """Whether the table was read a moment ago; otherwise nothing may be said about any token."""
        return asyncio.get_running_loop().time() - self._looked_at < VOUCHED_SECONDS

    def has_room(self, origin: str | None) -> bool:
        """Tell whether one more may follow: of all that one process serves, and of those that come from `origin`."""
        if origin is not None and self._places[origin] >= MAX_FOLLOWERS_OF_ONE:
            return False
        return self._places.total() < MAX_FOLLOWERS

    async def look(self, now: datetime) -> None:
        """Take up what has been revoked since the last look, now and then all of it.

        Raises:
            DatabaseUnavailable: what is held stays in force.
        """
        began_at = asyncio.get_running_loop().time()
        whole, self._doubtful = self._doubtful or self._looks % LOOKS_PER_FULL_ONE == 0, False
        since = None if whole else self.newest_at
        is_long = self._looks % LOOKS_PER_LONG_ONE == 0
        overlap = OVERLAP if is_long else SHORT_OVERLAP
        try:
            async with self._database.connection() as db, db.transaction():
                if is_long:
                    handed_out = await store.index_range(db)
                    self.first_list, self.last_list = (position(index).list_number for index in handed_out)
                some: list[RevokedIndex] = []
                async for revoked in store.list_since(db, since, overlap=overlap, now=now, at_once=TAKEN_AT_ONCE):
                    some.append(revoked)
                    if len(some) == TAKEN_AT_ONCE:
                        self._take_up(some)
                        some = []
                self._take_up(some)
        except BaseException:
            self._doubtful = self._doubtful or whole
            raise
        # Only now: half of it is nothing to vouch for, and a look that was broken off is begun again.
        self._looks += 1
        self._looked_at = began_at

    def doubt(self) -> None:
        """Have the next look read everything: much was revoked, and recorded longer ago than most looks reach back."""
        self._doubtful = True

    def forget_expired(self, now: datetime) -> None:
        """Drop entries that no token can name any more."""
        for number, entries in self._lists.items():
            kept = {index: expires_at for index, expires_at in entries.items() if expires_at > now}
            if len(kept) != len(entries):
                self._lists[number] = kept
                self.versions[number] += 1
        self._recent = deque(revoked for revoked in self._recent if revoked.expires_at > now)

    def revoked_in(self, list_number: int) -> list[int]:
        """Return the revoked indexes of one list."""
        return list(self._lists.get(list_number, ()))

    def recorded_since(self, recorded_at: datetime) -> list[RevokedIndex]:
        """Return what was recorded from then on, and what may have been committed late before it, oldest first.

        Nothing at all when that is more than the recent ones: whoever was away for so long has to read the lists.
        """
        since = recorded_at - OVERLAP
        if self._pushed_out_at is not None and self._pushed_out_at >= since:
            return []
        late = [revoked for revoked in self._recent if revoked.recorded_at >= since]
        return sorted(late, key=lambda revoked: revoked.recorded_at)

    @contextmanager
    def follow(self, origin: str | None = None) -> Iterator[Follower]:
        """Hear of every revocation for as long as the context lasts, or at once of the end when there is no room.

        Args:
            origin: a place of the network, which gets no more than its share; None for what is not counted.
        """
        follower = Follower()
        if self._closed or not self.has_room(origin):
            follower.dismiss()
        self._followers.add(follower)
        self._places[origin] += 1
        try:
            yield follower
        finally:
            self._followers.discard(follower)
            self._places[origin] -= 1
            if not self._places[origin]:
                del self._places[origin]

    def announce_keys(self) -> None:
        """Tell followers that the published keys have changed, so that a key that was stolen serves nobody any more."""
        self._tell(News.KEYS)

    def close(self) -> None:
        """Let every follower go, so that the process can stop."""
        self._closed = True
        for follower in self._followers:
            follower.dismiss()

    def _take_up(self, some: Iterable[RevokedIndex]) -> None:
        if new := tuple(revoked for revoked in some if self._is_new(revoked)):
            self._tell(Batch(new))

    def _is_new(self, revoked: RevokedIndex) -> bool:
        """Put an entry into its list, unless it is there."""
        place = position(revoked.status_index)
        entries = self._lists.setdefault(place.list_number, {})
        if place.index in entries:
            return False
        entries[place.index] = revoked.expires_at
        self.versions[place.list_number] = self.versions.get(place.list_number, 0) + 1
        self.newest_at = max(self.newest_at or revoked.recorded_at, revoked.recorded_at)
        self._recent.append(revoked)
        if len(self._recent) > FOLLOWER_QUEUE:
            pushed_out_at = self._recent.popleft().recorded_at
            self._pushed_out_at = max(self._pushed_out_at or pushed_out_at, pushed_out_at)
        return True

    def _tell(self, news: Batch | News) -> None:
        for follower in list(self._followers):
            if not follower.tell(news):
                follower.dismiss()
                self._followers.discard(follower)
