"""What is counted and timed, in Prometheus' terms. How a scrape gets at it is the business of `cli.exporter`.

Rules know nothing of it: `web.middleware` tells of every answer and of the audit events recorded on the way to it,
`web.token`, `web.login` and `grants` of tokens, and `housekeeping` of what it records and, every few seconds, of what
has a level. No label names a user, an address or a client: who asks must not decide how many series there are.
"""

from collections.abc import Mapping
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from identity_service.audit import Event
from identity_service.database import SCHEMA_HEAD

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """The metrics of one process, in a registry of their own.

    With PROMETHEUS_MULTIPROC_DIR in the environment they are kept in files there, which `cli.exporter` adds up.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._answers = Histogram(
            "http_server_request_duration_seconds",
            "Time from the head of a request to the end of its answer; the stream of revocations is left out.",
            ("method", "route", "status"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        # Looking a series up by its labels takes longer than counting in it: those of every request are kept.
        self._series: dict[tuple[str, str, int], Histogram] = {}
        self._issued_by: dict[str, Counter] = {}
        self._refusals = self._counter("identity_refusals", "Requests refused, by error.", "error")
        self._logins = self._counter("identity_logins", "Logins of users with a password.", "outcome", "reason")
        self._issued = self._counter("identity_tokens_issued", "Answers with an access token.", "grant")
        self._refreshes = self._counter("identity_refresh", "Refresh tokens presented.", "outcome")
        self._revocations = self._counter("identity_revocations", "Sessions and tokens revoked here.", "reason")
        self._events = self._counter("identity_audit_events", "Audit events recorded here.", "event", "outcome")
        self._hashes = Histogram(
            "identity_password_hash_seconds",
            "Time from asking for the work on a password to its result, waiting included.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._hash_queue = self._gauge("identity_password_hash_queue", "Passwords that wait or are worked on.")
        self._pool_size = self._gauge("identity_db_pool_size", "Connections to the database there may be.")
        self._pool_in_use = self._gauge("identity_db_pool_in_use", "Connections to the database in use.")
        self._followers = self._gauge("identity_revocation_followers", "Open streams of revocations.")
        self._keys = self._gauge("identity_keys", "Signing keys, by state.", "state", mode="livemax")
        self._key_age = self._gauge(
            "identity_active_key_age_seconds", "For how long the active key has signed.", mode="livemax"
        )
        build = self._gauge("identity_build_info", "The release that runs; always 1.", "version", "schema", mode="max")
        build.labels(version("identity-service"), SCHEMA_HEAD).set(1)
        # There before the first time: `increase` needs both.
        self._refreshed = {name: self._refreshes.labels(name) for name in ("rotated", "retried", "ended", "reused")}

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Time an answer. `route` is a template; methods that nobody knows count as one."""
        key = method if method in _METHODS else "other", route, status
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = self._answers.labels(*key)
        series.observe(seconds)

    def refused(self, error: str) -> None:
        """Count a refusal by the name of its error."""
        self._refusals.labels(error).inc()

    def recorded(self, event: Event, outcome: str, reason: str | None, times: int) -> None:
        """Count audit events, and the logins and revocations among them. `reason` is one of a few stable words."""
        self._events.labels(event.value, outcome).inc(times)
        if event is Event.USER_LOGIN:
            self._logins.labels(outcome, reason or "").inc(times)
        elif event in (Event.SESSION_ENDED, Event.CLIENT_TOKEN_REVOKED):
            self._revocations.labels(reason or "").inc(times)

    def issued(self, grant: str) -> None:
        series = self._issued_by.get(grant)
        if series is None:
            series = self._issued_by[grant] = self._issued.labels(grant)
        series.inc()

    def refreshed(self, outcome: str) -> None:
        """Count what came of a refresh token: `rotated`, `retried`, `ended` or `reused`."""
        self._refreshed[outcome].inc()

    def hashed(self, seconds: float) -> None:
        self._hashes.observe(seconds)

    def looked(
        self,
        *,
        hash_queue: int,
        pool_size: int,
        pool_in_use: int,
        followers: int,
        keys: Mapping[str, int],
        active_key_age: float,
    ) -> None:
        """Take down the levels as they are now."""
        self._hash_queue.set(hash_queue)
        self._pool_size.set(pool_size)
        self._pool_in_use.set(pool_in_use)
        self._followers.set(followers)
        for state, count in keys.items():
            self._keys.labels(state).set(count)
        self._key_age.set(active_key_age)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str, mode: str = "livesum") -> Gauge:
        """Return a gauge; `mode` says what becomes of the values of several processes."""
        return Gauge(name, text, labels, registry=self.registry, multiprocess_mode=mode)  # type: ignore[arg-type]
