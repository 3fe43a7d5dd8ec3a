"""What the issuer has revoked: its status lists, and the stream of events that says so a moment earlier.

A list is fetched when a valid token first names it. From then on one task listens to the issuer's event stream, and one
looks twice a second whether a list has to be fetched again: after each (re)connection of the stream, because what was
revoked in between is only in the lists, once more when the issuer's replicas must have caught up with each other, and
when its `ttl` has run out while there is no stream.

Both tasks start by themselves in the running loop and end with it.
"""

import asyncio
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from typing import Any, Literal
from weakref import WeakSet

import httpx2

from identity_service.verifier import jws, status_list
from identity_service.verifier.claims import Claims, StatusReference
from identity_service.verifier.events import Event, EventReader
from identity_service.verifier.http import Border, FetchFailed, start
from identity_service.verifier.keys import Keys
from identity_service.verifier.rejection import TokenRejected
from identity_service.verifier.status_list import StatusList, StatusListToken

log = logging.getLogger("identity_service.verifier")

OnStale = Literal["accept", "reject"]

SILENCE = 15.5
"""Seconds without a byte after which the stream is dead; the issuer promises a comment every 15 at most."""
TICK = 0.5
_WATCH = 2.0
"""Seconds after which a loop that has not ticked is taken to stand still, and between looks after those who wait."""
MAX_LISTS = 256
MAX_OVERLAY = 100_000
_CONNECTED_INTERVAL = 300.0
_SETTLING = (2.0, 10.0)
"""Seconds between the looks after a connection. By the first, replicas in step list what another one had told its
followers before we were one of them; by the second, one that lags has noticed, and answers nothing at all."""
_JUST_NOW = 12.0
_MISSED = 100.0
"""Seconds without the issuer's word, and after a token's end, from which on its revocation may have come and gone: the
entry is kept for two minutes after both."""
_GRACE = 5.0
"""Seconds that hearing may take before it counts as overdue; longer than fetching a list."""
_UNUSED = 86_400.0
_ABSENT_INTERVAL = 60.0
_PRUNE_INTERVAL = 30.0
# Shorter than a list's `ttl`, so that a revocation after an outage is heard as soon as one without a stream.
_RETRY = (1.0, 10.0)
_RECONNECT = (0.25, 10.0)
_STEADY = 10.0
"""Seconds from a stream's beginning to the last that came of it, for its end to be no failure. What is cut or held back
again and again would otherwise be opened again at once, and every list be asked for each time."""
_MOST_IF_ANSWERED = 2
"""Failures in a row that count after an answer: an issuer that restarts twice is heard again soon."""
_TOLD = 3
"""Failures in a row after which it is said that revocations come late."""
_DEFAULT_EVENT_LIFETIME = 86_400


class _List:
    """One status list as it is held here. Times are on the growing clock."""

    def __init__(self, uri: str, now: float) -> None:
        self.uri = uri
        self.statuses: StatusList | None = None
        self.absent = False
        self.etag: str | None = None
        self.token: StatusListToken | None = None
        self.used = True
        self.looked_at = now
        """When `used`, which each token that names the list sets, was last taken back."""
        self.good_at: float | None = None
        """When the issuer last vouched for the contents, apart from what the stream says since."""
        self.due_at = now
        self.failures = 0
        self.unheard = False
        """Whether nobody listened for a while, and it has not been fetched since."""
        self.connection = 0
        """The number of the stream's connection during which it was fetched."""
        self.looks = 0
        """How often it was fetched during that."""
        self.flight: asyncio.Task[None] | None = None

    def take(self, token: StatusListToken, etag: str | None, *, just_now: bool) -> None:
        """Take up what a list says.

        Indexes are never used again, so what one replica has listed is not undone by another that lags behind it or
        has another clock: a list that is older, or came just after the one held, adds to it.

        Raises:
            ValueError: it would have to be added, and is of another shape.
        """
        held, held_token = self.statuses, self.token
        older = held_token is not None and token.issued < held_token.issued
        if held is not None and (older or just_now):
            # Without its ETag: what is held now is nobody's list, and the next one is to be seen whole.
            self.statuses, self.etag = status_list.union(held, token.statuses), None
        else:
            self.statuses, self.etag = token.statuses, etag
        self.token = held_token if older else token
        self.absent = False

    def says_revoked(self, index: int) -> bool:
        """Tell what the list says; IndexError beyond its end. Any status but VALID refuses."""
        return self.statuses is not None and self.statuses.status(index) != status_list.VALID


class Revocations:
    """Follows the issuer.

    Args:
        keys: what status lists must be signed with.
        list_of_the_issuer: returns a list's address if it is the issuer's own.
        on_stale: whether a token is accepted when nothing was heard of its list for `max_staleness` seconds.
        clock: seconds that only ever grow; `now` is the time of day.
        on_change: called when `check` may answer otherwise than before, and after that it does.
    """

    def __init__(
        self,
        border: Border,
        keys: Keys,
        issuer: str,
        *,
        list_of_the_issuer: Callable[[str], str | None],
        leeway: float,
        on_stale: OnStale,
        max_staleness: float,
        follow: bool,
        clock: Callable[[], float],
        now: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self.connected = False
        self._border = border
        self._keys = keys
        self._issuer = issuer
        self._events_url = f"{issuer.rstrip('/')}/status-lists/events"
        self._list_of_the_issuer = list_of_the_issuer
        self._leeway = leeway
        self._max_staleness = max_staleness if on_stale == "reject" else None
        self._follow = follow
        self._clock = clock
        self._now = now
        self._on_change = on_change
        self._lists: dict[str, _List] = {}
        self._overlay: dict[StatusReference, float] = {}
        self._noting, self._starting = threading.Lock(), threading.Lock()
        self._waiters: dict[StatusReference | None, dict[asyncio.Future[None], Claims]] = {}
        """Who waits for a revocation, with the claims that each began with."""
        self._watching = WeakSet[asyncio.AbstractEventLoop]()
        """The loops in which somebody waits."""
        self._prune_at = 0.0
        self._last_event_id = ""
        self._connections = 0
        self._heard_at = self._connected_at = 0.0
        self._ticked_at = 0.0
        """When the loop that follows was last seen to turn, on the machine's own clock."""
        self._clocks_apart = now() - clock()
        self.due_at = float("inf")
        """From when on, on `clock`, `check` must be asked about every token: nothing was heard when it should have."""
        self._tasks: tuple[asyncio.Task[None], ...] = ()
        self.has_gone: Callable[[], bool] = _never
        """Whether the event loop in which the issuer was followed has ended, and nobody has listened since."""

    # What verifying asks

    def check(self, reference: StatusReference) -> bool:
        """Refuse a token that has been revoked, without waiting; False when `require` has to be asked instead.

        Raises:
            TokenRejected: with reason revoked; malformed, when the list has no such entry; or keys_unavailable, when
                nothing was heard for too long and that is to be refused.
        """
        return self._clock() < self.due_at and self._accepts(reference)

    def _accepts(self, reference: StatusReference) -> bool:
        """Judge by what is held; False when nothing is held of this list."""
        if self._overlay and reference in self._overlay:
            raise TokenRejected("revoked")
        if not self._follow:
            return True
        uri, index = reference
        held = self._lists.get(uri)
        if held is None or (held.statuses is None and not held.absent):
            return False
        held.used = True
        try:
            if held.statuses is not None and held.statuses.status(index) != status_list.VALID:
                raise TokenRejected("revoked")
        except IndexError:
            raise TokenRejected("malformed", "status index beyond the end of its list") from None
        if held.unheard and not held.failures:
            return False
        if self._max_staleness is not None and (self._age(held) or 0) > self._max_staleness:
            raise TokenRejected("keys_unavailable", "nothing was heard of revocations for too long")
        return True

    async def require(self, reference: StatusReference) -> None:
        """Refuse a valid token that has been revoked, having fetched the list that it names.

        Raises:
            TokenRejected: as `check`, and keys_unavailable when the list cannot be had and that is to be refused.
        """
        self.keep_following()
        held = self._hold(reference.uri)
        # The first requests wait for a list that is not known. When that has failed, later ones do not, unless nobody
        # else tries again: the tasks have ended with their loop.
        if not held.failures or self._clock() >= held.due_at + _GRACE:
            await asyncio.wait({self._fetch(held)})
        self._set_due()
        if not self._accepts(reference) and self._max_staleness is not None:
            raise TokenRejected("keys_unavailable", "the status list cannot be had")

    def _hold(self, uri: str) -> _List:
        now = self._clock()
        held = self._lists.get(uri)
        if held is None:
            if len(self._lists) >= MAX_LISTS:
                del self._lists[
                    min(self._lists, key=lambda each: (self._lists[each].used, self._lists[each].looked_at))
                ]
                self._on_change()
            held = self._lists[uri] = _List(uri, now)
        return held

    def ages(self) -> dict[str, float | None]:
        """Return how many seconds ago the issuer last vouched for each list, by the list or by the stream."""
        return {uri: self._age(held) for uri, held in self._lists.items()}

    # What is learnt

    def revoke(self, reference: StatusReference, until: float) -> None:
        """Refuse tokens with this reference from now on, whatever their list says. Callable from any thread.

        Args:
            until: when the last of those tokens has expired, in seconds since 1970.
        """
        with self._noting:  # of several with one reference, the last to expire counts
            self._overlay[reference] = max(self._overlay.get(reference, 0.0), until + self._leeway)
        self._on_change()
        if len(self._overlay) > MAX_OVERLAY:
            self._prune_overlay()
        self._wake(reference)

    async def wait(self, claims: Claims) -> None:
        """Return when the token of these claims is revoked, or may have been while nothing was heard."""
        reference = claims.status
        waiter = asyncio.get_running_loop().create_future()
        with self._noting:
            self._waiters.setdefault(reference, {})[waiter] = claims
        try:
            if self._keys.has_lost(claims.key_id) and claims.expires > self._now():
                return  # its key was revoked while we looked elsewhere
            if reference is not None:
                held = self._lists.get(reference.uri)
                if reference in self._overlay or (held is not None and _revoked_in(held, reference)):
                    return
                self._keep_watch()
            await waiter
        finally:
            with self._noting:
                waiters = self._waiters.get(reference, {})
                waiters.pop(waiter, None)
                if not waiters:
                    self._waiters.pop(reference, None)

    def _keep_watch(self) -> None:
        """Follow the issuer for as long as somebody waits in this loop: another one that does may end or stand still.

        One timer for all who wait; with one for each, ten thousand sockets would take a tenth of a core.
        """
        loop = asyncio.get_running_loop()
        with self._noting:
            if loop in self._watching:
                return
            self._watching.add(loop)
        self._watch(loop)

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._noting:
            waits = any(
                reference is not None and any(waiter.get_loop() is loop for waiter in waiters)
                for reference, waiters in self._waiters.items()
            )
            if not waits:
                self._watching.discard(loop)
        if waits:
            # First, so that nothing that goes wrong ends it; with nothing of whose request it was begun in.
            loop.call_later(_WATCH, self._watch, loop, context=Context())
            self.keep_following()

    def waiting(self) -> list[Claims]:
        """Return the claims of all who wait."""
        return [claims for waiters in list(self._waiters.values()) for claims in tuple(waiters.values())]

    def wake_those_of_keys(self, key_ids: Collection[str]) -> None:
        """Tell those who wait with tokens that these keys signed."""
        for waiters in list(self._waiters.values()):
            for waiter, claims in tuple(waiters.items()):
                if claims.key_id in key_ids:
                    _resolve_in_its_loop(waiter)

    def _wake(self, reference: StatusReference) -> None:
        with self._noting:
            waiters = tuple(self._waiters.pop(reference, ()))
        for waiter in waiters:
            _resolve_in_its_loop(waiter)

    def _prune_overlay(self) -> None:
        now = self._now()
        # One by one, of a copy that is made in one step: another thread may be adding to it.
        for reference, until in self._overlay.copy().items():
            if until <= now:
                self._overlay.pop(reference, None)
        if len(self._overlay) > MAX_OVERLAY:
            # What leaves here early is in its list; the list is fetched again to be sure. Many at once: looking for
            # some takes as long as looking for one.
            for forgotten in list(self._overlay)[: MAX_OVERLAY // 10]:
                self._overlay.pop(forgotten, None)
                if (held := self._lists.get(forgotten.uri)) is not None:
                    held.due_at = min(held.due_at, self._clock())

    # How old that is

    def _age(self, held: _List) -> float | None:
        if held.good_at is None:
            return None
        heard_at = self._heard_at if held.connection == self._connections else held.good_at
        return self._clock() - max(heard_at, held.good_at)

    # Fetching lists

    def _fetch(self, held: _List) -> asyncio.Task[None]:
        if held.flight is None or not _flies(held.flight):
            held.flight = start(self._renew(held), name="identity-verifier-list")
        return held.flight

    async def _renew(self, held: _List) -> None:
        connection = self._connections if self.connected else 0
        try:
            await self._take(held)
        except Exception as error:  # noqa: BLE001 - whatever went wrong, what is held stays in force
            held.due_at = self._clock() + min(_RETRY[0] * 2**held.failures, _RETRY[1])
            held.failures = min(held.failures + 1, 10)
            log.warning("verifier.status_list_unavailable: %s: %s", held.uri, error)
            self._set_due()
            return
        held.failures, held.unheard = 0, False
        gap = self._age(held) or 0.0
        held.good_at = self._clock()
        held.due_at = held.good_at + self._interval(held)
        if connection and connection == self._connections:
            held.looks = held.looks + 1 if held.connection == connection else 1
            if held.looks <= len(_SETTLING):
                held.due_at = held.good_at + _SETTLING[held.looks - 1]
            held.connection = connection
        elif self.connected:
            held.due_at = held.good_at  # fetched before the stream stood: something may lie between the two
        self._set_due()
        for reference in self._waited_for(held):
            ends = [claims.expires for claims in tuple(self._waiters.get(reference, {}).values())]
            expired = min(ends, default=0.0) < self._now() - _MISSED
            if _revoked_in(held, reference) or (gap > _MISSED and expired):
                self._wake(reference)

    def _waited_for(self, held: _List) -> list[StatusReference]:
        return [reference for reference in list(self._waiters) if reference is not None and reference.uri == held.uri]

    async def _take(self, held: _List) -> None:
        answer = await self._border.get(
            held.uri,
            accept=status_list.MEDIA_TYPE,
            max_length=status_list.MAX_TOKEN_LENGTH,
            etag=held.etag,
            # Without a stream, a cache's copy is as good as the `ttl`. What follows a connection must be the last word.
            fresh=self.connected,
        )
        if answer.status == 304 and held.statuses is not None:
            return
        if answer.status == 404 and self._max_staleness is None:
            # An issuer without this list, or one that has retired it: what is known of it stays.
            held.absent = held.statuses is None
            return
        if answer.status != 200:
            raise FetchFailed(f"answered {answer.status}")
        token = await self._open(answer.body, held.uri)
        just_now = held.good_at is not None and self._clock() - held.good_at <= _JUST_NOW
        held.take(token, answer.headers.get("etag"), just_now=just_now)
        self._on_change()

    async def _open(self, unverified_token: bytes, uri: str) -> StatusListToken:
        unverified = jws.take_apart(unverified_token, max_length=status_list.MAX_TOKEN_LENGTH)
        if not jws.is_type(unverified.header.typ, status_list.TYP):
            raise TokenRejected("wrong_type")
        key = await self._keys.find(unverified.header.key_id)
        if key is None or key.algorithm != unverified.header.algorithm:
            raise TokenRejected("unknown_key")
        if not key.verify(unverified.signing_input, unverified.signature):
            raise TokenRejected("bad_signature")
        return status_list.read(unverified.payload(), uri=uri, now=self._now(), leeway=self._leeway)

    def _interval(self, held: _List) -> float:
        if held.token is None:
            return _ABSENT_INTERVAL
        return max(held.token.ttl, _CONNECTED_INTERVAL) if self.connected else float(held.token.ttl)

    def _set_due(self) -> None:
        """Work out until when the tasks must have heard something, if they run."""
        lists = self._lists.values()
        if self.connected:
            self.due_at = max(self._heard_at, *(held.good_at or 0.0 for held in lists), 0.0) + SILENCE + _GRACE
        else:
            self.due_at = min((held.due_at for held in lists), default=float("inf")) + _GRACE

    # The two tasks

    def keep_following(self) -> None:
        """Start the two tasks, unless they run, in this loop or in another one, or are not wanted."""
        if not self._follow or self._is_followed():
            return
        with self._starting:
            if not self._is_followed():
                self._start_following()

    def _is_followed(self) -> bool:
        """Tell whether the tasks run: in this loop, or in another one that turns."""
        if not self._tasks:
            return False
        turns = time.monotonic() - self._ticked_at < _WATCH
        return _flies(self._tasks[0]) or (turns and not self._tasks[0].done() and not self.has_gone())

    def _start_following(self) -> None:
        loop = asyncio.get_running_loop()
        self._ticked_at = time.monotonic()
        # Tasks of a loop that has ended or stands still cannot go on; what they knew has a gap from here.
        _cancel(self._tasks)
        self._disconnected()
        if self.has_gone():
            # Where each call has a loop of its own, as under a TestClient, no task lives to be told or to fetch: each
            # asks for the list that its token names. Not where that failed lately, or an issuer away held up everybody.
            for held in self._lists.values():
                if not held.failures:
                    held.due_at, held.unheard = self._clock(), True
        self.has_gone = lambda: not loop.is_running()
        self._tasks = (
            start(self._listen_for_ever(), name="identity-verifier-stream"),
            start(self._tend_for_ever(), name="identity-verifier-lists"),
        )

    async def close(self) -> None:
        tasks, self._tasks = self._tasks, ()
        _cancel(tasks)
        if own := [task for task in tasks if _flies(task)]:
            await asyncio.wait(own)

    async def _tend_for_ever(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._ticked_at = time.monotonic()
            now = self._clock()
            if now >= self._prune_at:
                self._notice_leap()
                self._prune_overlay()
                self._prune_at = now + _PRUNE_INTERVAL
            for held in list(self._lists.values()):
                if now >= held.looked_at + _UNUSED:
                    self._look_after(held, now)
                elif now >= held.due_at:
                    self._fetch(held)
                if self._max_staleness is not None and (self._age(held) or 0) > self._max_staleness:
                    for reference in self._waited_for(held):  # whoever comes now is refused
                        self._wake(reference)

    def _notice_leap(self) -> None:
        """Fetch the lists when the time of day was set: what the stream said may look expired, and not be."""
        apart = self._now() - self._clock()
        if abs(apart - self._clocks_apart) > self._leeway:
            for held in self._lists.values():
                held.due_at = self._clock()
        self._clocks_apart = apart

    def _look_after(self, held: _List, now: float) -> None:
        """Let go of a list that no token has named for longer than a token can live."""
        if not held.used and not self._waited_for(held):
            del self._lists[held.uri]
        held.used, held.looked_at = False, now
        self._on_change()  # so that the next token that names it is noticed

    async def _listen_for_ever(self) -> None:
        failures, told = 0, False
        while True:
            connections = self._connections
            try:
                await self._listen()
            except Exception as error:  # noqa: BLE001 - whatever ended the stream, it is opened again
                log.info("verifier.stream_ended: %s: %s", type(error).__name__, error)
            finally:
                self._disconnected(of=asyncio.current_task())
            answered = self._connections > connections
            if answered and self._heard_at - self._connected_at >= _STEADY:
                failures, told = 0, False
            else:
                failures = min(failures, _MOST_IF_ANSWERED if answered else failures) + 1
            if failures >= _TOLD and not told:
                log.warning("verifier.stream_unsteady: revocations come late, with the lists: %s", self._events_url)
                told = True
            # Spread out, so that a restarted issuer does not meet everybody in the same moment.
            pause = min(_RECONNECT[0] * 2 ** min(failures, 10), _RECONNECT[1])
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - it spreads, it hides nothing

    async def _listen(self) -> None:
        async with self._open_stream() as answer:
            self._connected()
            reader = EventReader(self._last_event_id)
            async with asyncio.timeout(SILENCE) as limit:
                async for part in answer.aiter_bytes():
                    limit.reschedule(asyncio.get_running_loop().time() + SILENCE)
                    self._heard_at = self._clock()
                    self._set_due()
                    for event in reader.feed(part):
                        self._hear(event)
                    self._last_event_id = reader.last_id

    @asynccontextmanager
    async def _open_stream(self) -> AsyncIterator[httpx2.Response]:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if self._last_event_id:
            headers["Last-Event-ID"] = self._last_event_id
        async with self._border.stream(self._events_url, headers=headers, timeout=SILENCE) as answer:
            media_type = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
            if answer.status_code != 200 or media_type != "text/event-stream":
                raise FetchFailed(f"{self._events_url} answered {answer.status_code} {media_type}")
            yield answer

    def _connected(self) -> None:
        self.connected = True
        self._connections += 1
        self._heard_at = self._connected_at = self._clock()
        for held in self._lists.values():
            held.due_at = self._heard_at
            if not _flies(held.flight):
                self._fetch(held)
        if (self._keys.age or 0) > 1:
            self._keys.hear_changed()  # it may have been said while nobody here was listening
        self._set_due()

    def _disconnected(self, *, of: "asyncio.Task[Any] | None" = None) -> None:
        """Note that nobody listens any more; the end `of` a task says so unless another one listens since."""
        if of is not None and self._tasks and of not in self._tasks:
            return
        self._on_change()  # so that the next token starts the tasks again, should their loop have ended
        if not self.connected:
            return
        self.connected = False
        for held in self._lists.values():
            if held.connection == self._connections and held.good_at is not None:
                held.good_at = max(held.good_at, self._heard_at)
                held.due_at = min(held.due_at, held.good_at + self._interval(held))
            held.connection = 0
        self._set_due()

    def _hear(self, event: Event) -> None:
        if event.name == "keys":
            self._keys.hear_changed()
        if event.name != "revoked":
            return
        try:
            members = jws.parse_object(event.data.strip().encode())
        except TokenRejected:
            members = {}
        uri, index, until = members.get("uri"), members.get("idx"), members.get("exp")
        if not isinstance(uri, str) or type(index) is not int or index < 0 or not self._list_of_the_issuer(uri):
            log.warning("verifier.event_ignored")
            return
        if type(until) is not int:
            until = int(self._now()) + _DEFAULT_EVENT_LIFETIME
        self.revoke(StatusReference(uri, index), until)


def _revoked_in(held: _List, reference: StatusReference) -> bool:
    try:
        return held.says_revoked(reference.idx)
    except IndexError:
        return True


def _never() -> bool:
    return False


def _flies(task: asyncio.Task[None] | None) -> bool:
    return task is not None and not task.done() and task.get_loop() is asyncio.get_running_loop()


def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in tasks:
        with suppress(RuntimeError):  # its loop has ended, and the task with it
            task.get_loop().call_soon_threadsafe(task.cancel)


def _resolve_in_its_loop(waiter: asyncio.Future[None]) -> None:
    with suppress(RuntimeError):  # the loop that waited has ended
        waiter.get_loop().call_soon_threadsafe(_resolve, waiter)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
