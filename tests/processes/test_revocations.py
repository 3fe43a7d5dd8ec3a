"""A revocation between real processes: how soon every verifying process refuses, and what it does not forget."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from itertools import count
from typing import Any

import pytest

from tests.conftest import PASSWORD, bearer
from tests.processes.conftest import Installation
from tests.processes.traffic import Traffic
from tests.services import Service, log_in, refresh, sign_up

log = logging.getLogger(__name__)

WITH_STREAM = 1.5
"""Seconds from a revocation to the last process's refusal, at the 99th percentile."""
TTL = 15.0
WITHOUT_STREAM = TTL + 1

_names = (f"user-{number}" for number in count())

Ending = Callable[[], float]
"""Ends a session and returns when that was asked for, in seconds since 1970."""


def by_revoke(service: Service) -> tuple[str, Ending]:
    tokens = sign_up(service, next(_names))
    return tokens["access_token"], lambda: asked(service, "POST", "/revoke", data={"token": tokens["refresh_token"]})


def by_logout(service: Service) -> tuple[str, Ending]:
    username = next(_names)
    sign_up(service, username)
    origin = {"Origin": service.environment["IDENTITY_ISSUER_URL"]}
    login = service.post("/login", json={"username": username, "password": PASSWORD}, headers=origin)
    cookie = {"Cookie": login.headers["set-cookie"].partition(";")[0]}
    token: str = login.json()["access_token"]
    return token, lambda: asked(service, "POST", "/logout", json={}, headers=origin | cookie)


def by_password_change(service: Service) -> tuple[str, Ending]:
    """A session is ended from another one."""
    username = next(_names)
    other = bearer(sign_up(service, username)["access_token"])
    change = {"current_password": PASSWORD, "new_password": f"{PASSWORD} anew"}
    token: str = log_in(service, username)["access_token"]
    return token, lambda: asked(service, "PUT", "/users/me/password", json=change, headers=other)


def by_refresh_token_reuse(service: Service) -> tuple[str, Ending]:
    stolen = sign_up(service, next(_names))
    form = {"grant_type": "refresh_token", "refresh_token": stolen["refresh_token"]}
    token: str = refresh(service, refresh(service, stolen))["access_token"]
    return token, lambda: asked(service, "POST", "/token", data=form, refused=True)


def by_deleting_the_account(service: Service) -> tuple[str, Ending]:
    tokens = sign_up(service, next(_names))
    proof, own = {"current_password": PASSWORD}, bearer(tokens["access_token"])
    return tokens["access_token"], lambda: asked(service, "DELETE", "/users/me", json=proof, headers=own)


def by_disabling_the_user(service: Service) -> tuple[str, Ending]:
    username = next(_names)
    token: str = sign_up(service, username)["access_token"]

    def end() -> float:
        shown = json.loads(service.command("users", "disable", username, "--json"))
        return datetime.fromisoformat(shown["disabled_at"]).timestamp()

    return token, end


WAYS = (
    by_revoke,
    by_logout,
    by_password_change,
    by_refresh_token_reuse,
    by_deleting_the_account,
    by_disabling_the_user,
)


def asked(service: Service, method: str, path: str, *, refused: bool = False, **more: Any) -> float:
    at = time.time()
    answer = service.ask(method, path, **more)
    assert answer.is_success is not refused, answer.text
    return at


def revoke(service: Service, traffic: Traffic) -> tuple[str, float]:
    """Revoke the session of a token that every process has just accepted."""
    token, end = by_revoke(service)
    traffic.add(token)
    traffic.watch(token)
    return token, end()


def report(what: str, seconds: Sequence[float]) -> float:
    """Log how long it took, and return the 99th percentile; of a few, whose worst is the machine's, the median."""
    ordered = sorted(seconds)
    p50, p99 = (ordered[int(len(ordered) * part)] for part in (0.5, 0.99))
    log.info(
        "%s: p50 %.0f ms, p99 %.0f ms, max %.0f ms (%d)", what, p50 * 1e3, p99 * 1e3, ordered[-1] * 1e3, len(ordered)
    )
    return p99 if len(ordered) >= 100 else p50


@pytest.fixture
def traffic(installation: Installation) -> Iterator[Traffic]:
    """Traffic with the tokens of two bystanders, whom whatever is done to others never troubles."""
    with installation.traffic() as traffic:
        bystanders = [sign_up(installation.issuer, next(_names))["access_token"] for _ in range(2)]
        traffic.add(*bystanders)
        installation.wait_for_streams(connected=True)
        yield traffic
        traffic.catch_up()
        assert not traffic.wrong(good=bystanders)


def test_whatever_ends_a_session_reaches_four_processes_in_time(
    installation: Installation, traffic: Traffic, rounds: int
) -> None:
    took: dict[str, list[float]] = {way.__name__: [] for way in WAYS}
    for _ in range(rounds):
        prepared = [(way.__name__, *way(installation.issuer)) for way in WAYS]
        traffic.add(*(token for _, token, _ in prepared))
        for way, token, end in prepared:
            traffic.watch(token)
            ended_at = end()
            took[way] += [refused_at - ended_at for refused_at in traffic.refusals(token)]
    for way, seconds in took.items():
        report(way, seconds)
    assert report("all ways", [each for seconds in took.values() for each in seconds]) <= WITH_STREAM


def test_what_another_replica_revokes_is_heard_too(installation: Installation, traffic: Traffic, rounds: int) -> None:
    took: list[float] = []
    for _ in range(2 * rounds):
        token, revoked_at = revoke(installation.replica, traffic)
        took += [refused_at - revoked_at for refused_at in traffic.refusals(token)]
    assert report("at a replica", took) <= WITH_STREAM


def test_what_was_revoked_while_nobody_could_be_asked_is_heard_on_return(
    installation: Installation, traffic: Traffic, rounds: int
) -> None:
    took: list[float] = []
    for _ in range(rounds):
        before, _ = revoke(installation.issuer, traffic)
        traffic.refusals(before)
        installation.do(installation.relay.cut)
        installation.wait_for_streams(connected=False)
        missed, _ = revoke(installation.issuer, traffic)
        traffic.catch_up()
        mended_at = time.time()
        installation.do(installation.relay.mend)
        took += [refused_at - mended_at for refused_at in traffic.refusals(missed)]
        installation.wait_for_streams(connected=True)
    assert report("after an interruption", took) <= WITHOUT_STREAM


def test_an_issuer_that_is_killed_and_starts_again_brings_no_token_back(
    installation: Installation, traffic: Traffic, rounds: int
) -> None:
    """Its replica goes on, and revokes while nobody can hear it."""
    missed_for: list[float] = []
    took: list[float] = []
    for _ in range(-(-rounds // 8)):
        before, _ = revoke(installation.issuer, traffic)
        traffic.refusals(before)
        installation.kill_issuer()
        missed, _ = revoke(installation.replica, traffic)
        installation.restart_issuer()
        restarted_at = time.time()
        missed_for += [refused_at - restarted_at for refused_at in traffic.refusals(missed)]
        installation.wait_for_streams(connected=True)
        token, revoked_at = revoke(installation.issuer, traffic)
        took += [refused_at - revoked_at for refused_at in traffic.refusals(token)]
    assert report("missed, after a restart", missed_for) <= WITHOUT_STREAM
    assert report("the next one", took) <= WITH_STREAM


@pytest.mark.usefixtures("soaking")
def test_without_the_stream_the_lists_are_soon_enough(installation: Installation, traffic: Traffic) -> None:
    installation.do(installation.relay.cut_streams)
    installation.wait_for_streams(connected=False)
    revoked = []
    for _ in range(60):
        revoked.append(revoke(installation.issuer, traffic))
        time.sleep(1)
    took = [refused_at - revoked_at for token, revoked_at in revoked for refused_at in traffic.refusals(token)]
    installation.do(installation.relay.mend)
    installation.wait_for_streams(connected=True)
    assert report("without the stream", took) <= WITHOUT_STREAM


@pytest.mark.usefixtures("soaking")
def test_a_stream_that_went_silent_does_not_hide_a_revocation(installation: Installation, traffic: Traffic) -> None:
    took: list[float] = []
    for _ in range(5):
        installation.do(installation.relay.swallow_streams)
        token, revoked_at = revoke(installation.issuer, traffic)
        took += [refused_at - revoked_at for refused_at in traffic.refusals(token)]
        installation.wait_for_streams(connected=True)
    assert report("a stream gone silent", took) <= WITHOUT_STREAM
