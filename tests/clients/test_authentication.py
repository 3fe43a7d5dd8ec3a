"""How clients prove who they are, at all three endpoints alike (TOK-6, TOK-7, F6, F46, F47)."""

import hmac
import time
from base64 import b64encode
from collections.abc import Sequence
from datetime import timedelta
from urllib.parse import quote_plus

import httpx2
import pytest

from identity_service.clients import FIRST_PARTY, ClientCredentials, authentication, registration
from identity_service.errors import ClientRejected
from identity_service.shell import client_secret
from tests.conftest import START, TESTER, Api, Robot, register

CHALLENGE = 'Basic realm="identity", charset="UTF-8"'
FAILED = {"error": "invalid_client", "error_description": "Client authentication failed."}
ENDPOINTS = {
    "/token": {"grant_type": "client_credentials"},
    "/revoke": {"token": "x"},
    "/introspect": {"token": "x"},
}


def basic(client_id: str, secret: str) -> dict[str, str]:
    """RFC 6749 2.3.1: both are encoded as in a form before they are joined."""
    joined = f"{quote_plus(client_id)}:{quote_plus(secret)}"
    return {"Authorization": f"Basic {b64encode(joined.encode()).decode()}"}


@pytest.fixture
async def robot(api: Api) -> Robot:
    return await register(api, "robot")


async def rotate(robot: Robot, *, overlap: float) -> str:
    secret = client_secret()
    await robot.api.database.transact(
        lambda db: registration.rotate_secret(
            db, robot.client_id, secret=secret, overlap=timedelta(seconds=overlap), by=TESTER, now=robot.api.clock()
        )
    )
    return secret


async def works(robot: Robot, secret: str) -> bool:
    answer = await Robot(robot.api, robot.client_id, secret).token()
    assert answer.status_code == 200 or answer.json() == FAILED
    return answer.status_code == 200


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_a_client_proves_itself_by_basic_or_by_the_form(api, robot, path):
    form = ENDPOINTS[path]
    by_form = {"client_id": "robot", "client_secret": robot.secret}
    for answer in (
        await api.http.post(path, data=form, headers=basic("robot", robot.secret)),
        await api.http.post(path, data=form | {"client_id": "robot"}, headers=basic("robot", robot.secret)),
        await api.http.post(path, data=form | by_form),
    ):
        assert answer.status_code == 200, answer.text
        assert (answer.headers["cache-control"], answer.headers["pragma"]) == ("no-store", "no-cache")


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_more_than_one_method_is_an_invalid_request(api, robot, path):
    """TOK-7: even when both are right."""
    right, form = basic("robot", robot.secret), ENDPOINTS[path]
    answers = [
        await api.http.post(path, data=form | {"client_secret": robot.secret}, headers=right),
        await api.http.post(path, data=form | {"client_id": "robot", "client_secret": robot.secret}, headers=right),
        await api.http.post(path, data=form | {"client_id": "other"}, headers=right),
        await api.http.post(path, data=form, headers=[*right.items(), *right.items()]),
        await api.http.post(path, data=form, params={"client_secret": robot.secret}),
    ]
    assert [(answer.status_code, answer.json()["error"]) for answer in answers] == [(400, "invalid_request")] * 5


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_unknown_client_wrong_secret_no_secret_and_disabled_client_look_alike(api, robot, path):
    """TOK-6, F46: the challenge is only for who used the header."""
    disabled = await register(api, "disabled")
    await api.database.transact(lambda db: registration.disable(db, "disabled", by=TESTER, now=api.clock()))
    for client_id, secret in (
        ("nobody", robot.secret),
        ("robot", "wrong"),
        ("robot", ""),
        ("robot", robot.secret[:-1]),
        ("robot", robot.secret + "x"),
        ("robot", robot.secret.swapcase()),
        ("Robot", robot.secret),
        ("robot\u00e9", robot.secret),
        ("x" * 5000, robot.secret),
        ("", robot.secret),
        ("disabled", disabled.secret),
        ("disabled", "wrong"),
    ):
        await api.scalar("DELETE FROM throttles")
        by_form = {"client_id": client_id, "client_secret": secret}
        answer = await api.http.post(path, data=ENDPOINTS[path] | by_form)
        assert (answer.status_code, answer.json()) == (401, FAILED), (client_id, secret)
        assert "www-authenticate" not in answer.headers
        answer = await api.http.post(path, data=ENDPOINTS[path], headers=basic(client_id, secret))
        assert (answer.status_code, answer.json()) == (401, FAILED), (client_id, secret)
        assert answer.headers["www-authenticate"] == CHALLENGE
        assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("secret", ["", "digest"])
async def test_neither_an_empty_secret_nor_the_digest_of_one_opens_anything(api, robot, secret):
    """F6: even if the empty one's digest stood in the database."""
    stored = await api.scalar("SELECT secret_digest FROM clients")
    assert robot.secret.encode() not in stored
    if secret:
        assert not await works(robot, stored.hex())
    else:
        await api.scalar("UPDATE clients SET secret_digest = $1 RETURNING 1", authentication.digest(""))
        assert not await works(robot, "")


@pytest.mark.parametrize(
    "secret",
    [
        "colon:colon:colon:colon:colon:colon:",
        "percent%41percent%41percent%41percent",
        "plus+plus+plus+plus+plus+plus+plus+pl",
    ],
)
async def test_a_secret_with_characters_that_mean_something_in_a_form_is_read_as_it_is(api, secret):
    """TOK-7: encoded once by the client, decoded once here."""
    await register(api, "Odd._-1", secret=secret)
    form = {"grant_type": "client_credentials"}
    assert (await api.http.post("/token", data=form, headers=basic("Odd._-1", secret))).status_code == 200
    joined = b64encode(f"Odd._-1:{secret}".encode()).decode()
    unencoded = await api.http.post("/token", data=form, headers={"Authorization": f"Basic {joined}"})
    assert unencoded.status_code == (200 if quote_plus(secret) == secret or "colon" in secret else 401)


async def test_loosely_encoded_basic_credentials_are_refused(api, robot):
    """TOK-7, F47: one spelling."""
    right = basic("robot", robot.secret)["Authorization"].removeprefix("Basic ")
    for wrong in (f"{right}=", right.rstrip("=") + "===", f"{right[:4]} {right[4:]}", f"{right}\u00e9", right[:-2]):
        answer = await api.http.post(
            "/token", data=ENDPOINTS["/token"], headers=[(b"Authorization", f"Basic {wrong}".encode())]
        )
        assert (answer.status_code, answer.json()) == (401, FAILED), wrong


async def test_a_rotated_secret_works_beside_its_successor_for_the_overlap(api, robot, clock):
    second = await rotate(robot, overlap=60)
    assert await works(robot, robot.secret)
    assert await works(robot, second)
    clock.advance(seconds=59.9)
    assert await works(robot, robot.secret)
    clock.advance(seconds=0.1)
    assert not await works(robot, robot.secret)
    assert await works(robot, second)


async def test_no_third_secret_works(api, robot):
    second, third = await rotate(robot, overlap=600), await rotate(robot, overlap=600)
    assert [await works(robot, secret) for secret in (robot.secret, second, third)] == [False, True, True]


async def test_without_an_overlap_the_present_secret_ends_at_once(api, robot):
    second = await rotate(robot, overlap=600)
    third = await rotate(robot, overlap=0)
    assert [await works(robot, secret) for secret in (robot.secret, second, third)] == [False, False, True]
    assert await api.scalar("SELECT previous_secret_digest FROM clients") is None


async def test_failures_are_recorded_without_what_was_presented(api, robot):
    for client_id, secret in (("robot", "wrong-secret-wrong"), ("mallory", robot.secret)):
        assert (await Robot(api, client_id, secret).token()).status_code == 401
    async with api.database.connection() as db:
        rows = await db.fetch(
            "SELECT * FROM audit_events WHERE event = 'client.login' AND outcome = 'failure' ORDER BY id"
        )
    assert [(row["reason"], row["subject_id"], row["actor_kind"]) for row in rows] == [
        ("wrong_secret", "robot", "anonymous"),
        ("unknown_client", None, "anonymous"),
    ]
    assert [word for word in ("wrong-secret", "mallory", robot.secret) if word in str(rows)] == []


async def test_a_client_that_is_built_in_costs_no_query(api, alice):
    """Whoever looked at the table would find it missing, and answer 503."""
    token = (await alice.log_in())["refresh_token"]
    async with api.database.connection() as db:
        await db.execute("ALTER TABLE clients RENAME TO hidden")
    try:
        asked = [await api.token(grant_type=name) for name in ("client_credentials", "password", "x")]
    finally:
        await api.scalar("ALTER TABLE hidden RENAME TO clients")
    assert [answer.status_code for answer in asked] == [401, 400, 400]
    assert (await api.refresh(token)).status_code == 200


def test_secrets_are_compared_in_constant_time_and_as_often_whoever_asks(monkeypatch):
    """F45: by `hmac.compare_digest`, and by nothing else. Watched, not replaced."""
    compared = []
    compare = hmac.compare_digest

    def watched(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    right = authentication.digest("right")
    known = ClientCredentials(FIRST_PARTY, right, None)
    assert authentication.prove(known, "right", now=START) is FIRST_PARTY
    assert compared.pop(0) == (right, right)
    assert len(compared) == 1
    for credentials, secret in ((known, "wrong"), (known, ""), (None, "right")):
        compared.clear()
        with pytest.raises(ClientRejected):
            authentication.prove(credentials, secret, now=START)
        assert [one for one, _ in compared] == [authentication.digest(secret)] * 2
    monkeypatch.setattr(hmac, "compare_digest", lambda one, other: False)
    with pytest.raises(ClientRejected):
        authentication.prove(known, "right", now=START)


def test_unknown_clients_and_wrong_secrets_take_the_same_time():
    """TOK-6, without a network and a database to hide in: the check alone."""

    def check(known: ClientCredentials | None) -> float:
        began = time.perf_counter()
        for _ in range(50):
            with pytest.raises(ClientRejected):
                authentication.prove(known, "ids_wrong", now=START)
        return time.perf_counter() - began

    credentials = ClientCredentials(FIRST_PARTY, authentication.digest("right"), None)
    unknown, wrong = zip(*((check(None), check(credentials)) for _ in range(60)), strict=True)
    assert 0.6 < fastest(unknown) / fastest(wrong) < 1.6


async def test_unknown_clients_and_wrong_secrets_take_the_same_time_over_http(api, robot):
    """A smoke test: half as long would show in every series, what neighbours do in one of three."""

    async def ask(client_id: str) -> float:
        await api.scalar("DELETE FROM throttles")
        began = time.perf_counter()
        answer: httpx2.Response = await Robot(api, client_id, "ids_wrong").token()
        assert answer.status_code == 401
        return time.perf_counter() - began

    for _ in range(10):
        await ask("nobody")
    ratios: list[float] = []
    while len(ratios) < 3 and not any(0.6 < ratio < 1.6 for ratio in ratios):
        pairs = [(await ask("nobody"), await ask("robot")) for _ in range(60)]
        unknown, wrong = zip(*pairs, strict=True)
        ratios.append(fastest(unknown) / fastest(wrong))
    assert 0.6 < ratios[-1] < 1.6, ratios


def fastest(times: Sequence[float]) -> float:
    """Return the fifth fastest: on a busy machine the middle says more about the neighbours than about us."""
    return sorted(times)[4]
