"""`POST /revoke`: what ends a session, at once and everywhere, and what must not (REV-1, REV-2, REV-3, F24)."""

import asyncio
import hmac
import json
from base64 import b64encode, urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from identity_service import housekeeping
from identity_service.accounts import registration
from identity_service.sessions import lifecycle
from identity_service.tokens import access, refresh
from tests.conftest import ISSUER, START, TESTER, Account, Api, StartApi, bearer

FORM = "application/x-www-form-urlencoded"
Tokens = dict[str, Any]


async def revoke(api: Api, token: str, **form: str) -> httpx2.Response:
    return await api.http.post("/revoke", data={"token": token, **form})


def done(answer: httpx2.Response) -> None:
    """REV-2: the one answer to everything that is a revocation request, whether or not it found something."""
    assert (answer.status_code, answer.json()) == (200, {})
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["pragma"] == "no-cache"


def refused(answer: httpx2.Response, status: int, error: str) -> None:
    assert (answer.status_code, answer.json().get("error")) == (status, error), answer.text
    assert answer.json().keys() == {"error", "error_description"}
    assert answer.headers["cache-control"] == "no-store"


def claims_of(token: str) -> dict[str, Any]:
    payload = token.split(".")[1]
    claims: dict[str, Any] = json.loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return claims


@dataclass
class Family:
    """A session that has been refreshed twice: every token it ever had, oldest first."""

    all: list[Tokens]

    @property
    def session_id(self) -> str:
        session_id: str = claims_of(self.all[0]["access_token"])["sid"]
        return session_id

    async def assert_ended(self, *services: Api) -> None:
        for api in services:
            for tokens in self.all:
                assert (await api.me(tokens["access_token"])).status_code == 401
                assert (await api.refresh(tokens["refresh_token"])).json()["error"] == "invalid_grant"

    async def assert_alive(self, api: Api) -> None:
        assert (await api.me(self.all[-1]["access_token"])).status_code == 200
        tokens = await api.refresh(self.all[-1]["refresh_token"])
        assert tokens.status_code == 200
        self.all.append(tokens.json())


async def family(account: Account) -> Family:
    tokens = [await account.log_in()]
    for _ in range(2):
        tokens.append((await account.api.refresh(tokens[-1]["refresh_token"])).json())
    return Family(tokens)


# What it ends


PRESENTED: dict[str, Callable[[Family], str]] = {
    "newest refresh token": lambda family: family.all[2]["refresh_token"],
    "refresh token just spent": lambda family: family.all[1]["refresh_token"],
    "refresh token spent before": lambda family: family.all[0]["refresh_token"],
    "newest access token": lambda family: family.all[2]["access_token"],
    "oldest access token": lambda family: family.all[0]["access_token"],
}


@pytest.mark.parametrize("presented", PRESENTED)
async def test_any_token_of_a_session_ends_it_at_once_and_everywhere(api, alice, bob, start_api: StartApi, presented):
    """REV-3: on every worker at the very next request, and nobody else's session."""
    mine, my_other, theirs = await family(alice), await family(alice), await family(bob)
    async with start_api() as other_worker:
        assert (await other_worker.me(mine.all[2]["access_token"])).status_code == 200
        done(await revoke(api, PRESENTED[presented](mine)))
        await mine.assert_ended(api, other_worker)
        await my_other.assert_alive(other_worker)
        await theirs.assert_alive(other_worker)
    async with api.database.connection() as db:
        rows = await db.fetch("SELECT jti, reason, revoked_at, expires_at FROM revoked_tokens")
    expected = (mine.session_id, "revoked", START, START + timedelta(seconds=600 + 30 + 120))
    assert [tuple(row) for row in rows] == [expected]


@pytest.mark.parametrize("presented", ["newest refresh token", "newest access token"])
async def test_the_hint_never_changes_the_outcome(api, alice, presented):
    """REV-1: right, wrong or made up."""
    for hint in ("access_token", "refresh_token", "id_token", "", "none", "\u00e9\"'", "refresh_token access_token"):
        mine = await family(alice)
        done(await revoke(api, PRESENTED[presented](mine), token_type_hint=hint))
        await mine.assert_ended(api)


async def test_the_session_of_a_browser_can_be_revoked_too(api, alice):
    credentials = {"username": "alice", "password": alice.password}
    answer = await api.http.post("/login", json=credentials, headers={"Origin": ISSUER})
    token = answer.json()["access_token"]
    done(await revoke(api, token))
    assert (await api.me(token)).status_code == 401
    again = await api.http.post("/refresh", json={}, headers={"Origin": ISSUER})
    assert (again.status_code, again.json()["code"]) == (401, "session_ended")


@pytest.mark.parametrize("lifetime", [60, 86400])
async def test_a_revocation_is_remembered_for_as_long_as_a_token_could_live(start_api: StartApi, lifetime):
    async with start_api(access_lifetime=str(lifetime)) as api:
        token = (await (await api.sign_up()).log_in())["access_token"]
        api.clock.advance(seconds=lifetime - 1)
        done(await revoke(api, token))
        remembered = await api.scalar("SELECT expires_at FROM revoked_tokens")
        # The session's last token may have been the answer to a retry; verifiers allow for clocks.
        assert remembered == START + timedelta(seconds=lifetime + 30 + 120)


async def test_a_session_without_a_living_token_is_remembered_long_enough_to_be_told(api, alice, clock):
    """Somebody may hold a connection open that was begun with its token."""
    token = (await alice.log_in())["refresh_token"]
    clock.advance(hours=1)
    done(await revoke(api, token))
    assert await api.scalar("SELECT expires_at FROM revoked_tokens") == clock() + timedelta(seconds=120)


async def test_revoking_again_changes_nothing(api, alice, clock):
    """REV-3: idempotent, and the first reason and time stay."""
    mine = await family(alice)
    done(await revoke(api, mine.all[2]["refresh_token"]))
    clock.advance(seconds=77)
    for tokens in mine.all:
        done(await revoke(api, tokens["refresh_token"]))
        done(await revoke(api, tokens["access_token"]))
    async with api.database.connection() as db:
        assert [tuple(row) for row in await db.fetch("SELECT reason, revoked_at FROM revoked_tokens")] == [
            ("revoked", START)
        ]
    assert await api.scalar("SELECT revoked_at FROM sessions") == START


async def test_revoking_a_session_that_a_thief_ended_keeps_the_reason(api, alice):
    mine = await family(alice)
    assert (await api.refresh(mine.all[0]["refresh_token"])).status_code == 400
    done(await revoke(api, mine.all[2]["refresh_token"]))
    assert await api.scalar("SELECT string_agg(reason, ',') FROM revoked_tokens") == "reuse"


async def test_revoking_the_session_of_a_deleted_account_is_fine(api, alice):
    mine = await family(alice)
    answer = await api.http.request(
        "DELETE",
        "/users/me",
        json={"current_password": alice.password},
        headers=bearer(mine.all[2]["access_token"]),
    )
    assert answer.status_code == 204
    done(await revoke(api, mine.all[2]["refresh_token"]))
    done(await revoke(api, mine.all[2]["access_token"]))
    await mine.assert_ended(api)


async def test_sixteen_simultaneous_revocations_leave_one_row(api, alice):
    mine = await family(alice)
    asked = [token for tokens in mine.all for token in (tokens["refresh_token"], tokens["access_token"])]
    for answer in await asyncio.gather(*(revoke(api, asked[n % len(asked)]) for n in range(16))):
        done(answer)
    assert await api.scalar("SELECT count(*) FROM revoked_tokens") == 1
    await mine.assert_ended(api)


async def test_no_refresh_under_way_survives_a_revocation(api, alice):
    """REV-3: whatever a racing refresh was answered, its tokens are dead too."""
    for _ in range(8):
        mine = await family(alice)
        newest = mine.all[2]["refresh_token"]
        *refreshed, revoked = await asyncio.gather(*(api.refresh(newest) for _ in range(6)), revoke(api, newest))
        done(revoked)
        mine.all += [answer.json() for answer in refreshed if answer.status_code == 200]
        await mine.assert_ended(api)


# What it must not end


def _spelled(token: str) -> dict[str, str]:
    before, after = token[:-1], token[-1]
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return {
        "padded": f"{token}==",
        "with other unused bits": before + letters[letters.index(after) ^ 1],
        "with a space": f"{token} ",
        "with its scheme": f"Bearer {token}",
        "cut": before,
        "continued": f"{token}A",
        "with a dot": f"{token}.",
        "quoted": f'"{token}"',
        "in capitals": token.upper(),
    }


def _base64url(value: bytes) -> str:
    return urlsafe_b64encode(value).rstrip(b"=").decode()


def _forged(api: Api, token: str) -> dict[str, str]:
    """What somebody who knows a session id and everything public can make of it."""
    header, payload, signature = token.split(".")
    members = json.loads(urlsafe_b64decode(header + "=="))
    unsigned = f"{_base64url(json.dumps(members | {'alg': 'none'}).encode())}.{payload}"
    keyed = f"{_base64url(json.dumps(members | {'alg': 'HS256'}).encode())}.{payload}"
    public = api.keys.current.signer(api.clock()).public
    secret = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    stranger = rsa.generate_private_key(65537, 2048)
    strange = stranger.sign(f"{header}.{payload}".encode(), padding.PKCS1v15(), hashes.SHA256())
    return {
        "unsigned": f"{unsigned}.",
        "called unsigned": f"{unsigned}.{signature}",
        "keyed with our public key": f"{keyed}.{_base64url(hmac.digest(secret, keyed.encode(), 'sha256'))}",
        "signed by a stranger": f"{header}.{payload}.{_base64url(strange)}",
        "without a signature": f"{header}.{payload}",
        "with a signature turned round": f"{header}.{payload}.{signature[::-1]}",
    }


@pytest.mark.parametrize("kind", ["access_token", "refresh_token"])
async def test_what_is_not_exactly_a_token_of_ours_ends_nothing(api, alice, kind):
    """REV-2, F9: the same 200 as for one that is, so that nobody learns which it was."""
    mine = await family(alice)
    token = mine.all[2][kind]
    for made_up in (
        *("x", "null", "..", "e30.e30.e30", "\u00e9", mine.session_id, f"{mine.session_id}.2", "x" * 60_000),
        *(token[:20], token[::-1], json.dumps({"token": token}), claims_of(token)["jti"]),
        *_spelled(token).values(),
        *_forged(api, token).values(),
    ):
        done(await revoke(api, made_up))
    assert await api.scalar("SELECT count(*) FROM revoked_tokens") == 0
    await mine.assert_alive(api)


@pytest.mark.parametrize("kind", ["access_token", "refresh_token"])
async def test_an_expired_token_ends_nothing(api, alice, clock, kind):
    """REV-2: its session has gone on without it."""
    mine = await family(alice)
    clock.advance(days=13)
    newest = (await api.refresh(mine.all[2]["refresh_token"])).json()
    clock.advance(days=1)
    done(await revoke(api, mine.all[2][kind]))
    assert await api.scalar("SELECT count(*) FROM revoked_tokens") == 0
    assert (await api.refresh(newest["refresh_token"])).status_code == 200


async def test_an_expired_access_token_leaves_the_refresh_token_to_end_the_session(api, alice, clock):
    mine = await family(alice)
    clock.advance(seconds=601)
    done(await revoke(api, mine.all[2]["access_token"]))
    done(await revoke(api, mine.all[2]["refresh_token"]))
    await mine.assert_ended(api)


@pytest.mark.parametrize("kind", ["access", "refresh"])
async def test_another_clients_token_ends_nothing(api, alice, kind):
    """REV-2, F24: signed by us, and the answer is the one for an unknown token."""
    mine = await family(alice)
    ring, now = api.keys.current, api.clock()
    module: Any = {"access": access, "refresh": refresh}[kind]
    more = {"access": (api.runtime.status_lists.reference(0),), "refresh": ()}[kind]
    claims = module.read(mine.all[2][f"{kind}_token"], ring, issuer=ISSUER, now=now)
    done(await revoke(api, module.mint(ring.signer(now), claims._replace(client_id="other"), *more)))
    await mine.assert_alive(api)
    done(await revoke(api, module.mint(ring.signer(now), claims, *more)))
    await mine.assert_ended(api)


async def test_the_token_of_another_issuer_ends_nothing(api, alice, start_api: StartApi):
    mine = await family(alice)
    async with start_api(issuer_url="https://other.example.com", allowed_hosts="id.example.com") as other:
        done(await revoke(other, mine.all[2]["refresh_token"]))
        done(await revoke(other, mine.all[2]["access_token"]))
    await mine.assert_alive(api)


async def test_a_revoked_token_stays_revoked_in_every_spelling(api, alice):
    """F9, F79."""
    mine = await family(alice)
    token = mine.all[2]["access_token"]
    done(await revoke(api, token))
    for spelled in (token, *_spelled(token).values()):
        assert (await api.me(spelled)).status_code == 401


# The request


@pytest.mark.parametrize("form", [{}, {"token": ""}, {"token_type_hint": "access_token"}, {"TOKEN": "x"}])
async def test_a_missing_token_is_an_invalid_request(api, form):
    """REV-1."""
    answer = await api.http.post("/revoke", data=form, headers={"Content-Type": FORM})
    refused(answer, 400, "invalid_request")
    assert answer.json()["error_description"] == "The parameter token is missing."


@pytest.mark.parametrize(
    "request_with",
    [
        lambda token: {"json": {"token": token}},
        lambda token: {"files": {"token": (None, token)}},
        lambda token: {"content": f"token={token}", "headers": {"Content-Type": "text/plain"}},
        lambda token: {"content": f"token={token}"},
        lambda token: {"content": f"token={token}&token={token}", "headers": {"Content-Type": FORM}},
        lambda token: {"content": f"token=x&token={token}", "headers": {"Content-Type": FORM}},
        lambda token: {
            "content": f"token={token}&token_type_hint=a&token_type_hint=b",
            "headers": {"Content-Type": FORM},
        },
        lambda token: {"content": f"token={token}%00", "headers": {"Content-Type": FORM}},
        lambda token: {"params": {"token": token}, "data": {"token_type_hint": "access_token"}},
        lambda token: {"params": {"client_secret": "x"}, "data": {"token": token}},
    ],
    ids=["json", "multipart", "text", "untyped", "twice", "two", "hint-twice", "nul", "in-url", "secret-in-url"],
)
async def test_a_request_that_is_no_plain_form_is_refused_and_ends_nothing(
    api, alice, request_with: Callable[[str], dict[str, Any]]
):
    """REV-1, TOK-1, TOK-2."""
    mine = await family(alice)
    refused(await api.http.post("/revoke", **request_with(mine.all[2]["refresh_token"])), 400, "invalid_request")
    await mine.assert_alive(api)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_no_other_method_revokes(api, alice, method):
    """REV-3: a link or an image must not log anyone out."""
    mine = await family(alice)
    params = {"token": mine.all[2]["refresh_token"], "callback": "x"}
    answer = await api.http.request(method, "/revoke", params=params)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    await mine.assert_alive(api)


async def test_unknown_parameters_and_callbacks_are_ignored(api, alice):
    """REV-3: no JSONP."""
    mine = await family(alice)
    done(await revoke(api, mine.all[2]["refresh_token"], callback="alert", resource="x"))
    await mine.assert_ended(api)


@pytest.mark.parametrize(
    ("authorization", "form"),
    [
        (None, {}),
        (None, {"client_id": "first-party"}),
        ("Basic Og==", {}),
        ("Basic " + b64encode(b"first-party:").decode(), {}),
    ],
)
async def test_the_first_party_client_revokes_without_a_secret(api, alice, authorization, form):
    mine = await family(alice)
    headers = {"Authorization": authorization} if authorization else {}
    done(await api.http.post("/revoke", data={"token": mine.all[2]["refresh_token"]} | form, headers=headers))
    await mine.assert_ended(api)


@pytest.mark.parametrize(
    ("authorization", "form", "status", "error"),
    [
        (None, {"client_id": "nobody"}, 401, "invalid_client"),
        (None, {"client_secret": "x"}, 401, "invalid_client"),
        ("Basic " + b64encode(b"nobody:x").decode(), {}, 401, "invalid_client"),
        ("Basic " + b64encode(b"first-party:x").decode(), {}, 401, "invalid_client"),
        ("Bearer {token}", {}, 401, "invalid_client"),
        ("Basic " + b64encode(b"first-party:").decode(), {"client_id": "nobody"}, 400, "invalid_request"),
    ],
)
async def test_a_client_that_does_not_prove_itself_revokes_nothing(api, alice, authorization, form, status, error):
    """REV-2, TOK-6."""
    mine = await family(alice)
    token = mine.all[2]["access_token"]
    headers = {"Authorization": authorization.format(token=token)} if authorization else {}
    answer = await api.http.post("/revoke", data={"token": token} | form, headers=headers)
    refused(answer, status, error)
    assert ("www-authenticate" in answer.headers) == (status == 401 and authorization is not None)
    await mine.assert_alive(api)


# Forgetting


async def prune(api: Api) -> int:
    async with api.database.connection() as db:
        return await lifecycle.prune(db, now=api.clock())


async def test_a_revocation_is_forgotten_only_when_no_token_it_concerns_can_be_accepted(api, alice, clock):
    """KEY-8: the row goes after the last access token and every clock's skew, the session with its absolute end."""
    mine = await family(alice)
    done(await revoke(api, mine.all[2]["refresh_token"]))
    for pause in (0, 599, 151):
        clock.advance(seconds=pause)
        assert await prune(api) == 0
        await mine.assert_ended(api)
    clock.advance(microseconds=1)
    assert await prune(api) == 1
    assert await api.scalar("SELECT count(*) FROM revoked_tokens") == 0
    await mine.assert_ended(api)
    clock.time = START + timedelta(days=30)
    assert await prune(api) == 0
    clock.advance(microseconds=1)
    assert await prune(api) == 1
    assert await api.scalar("SELECT count(*) FROM sessions") == 0
    await mine.assert_ended(api)


async def test_pruning_touches_no_session_that_lives(api, alice, clock):
    token = (await alice.log_in())["refresh_token"]
    for _ in range(3):
        clock.advance(days=9, hours=23)
        assert await prune(api) == 0
        token = (await api.refresh(token)).json()["refresh_token"]


@pytest.mark.parametrize("form", [{}, {"scope": "orders:read"}])
async def test_a_shorter_access_lifetime_revives_no_revoked_token(start_api: StartApi, form):
    """Tokens of before the change live on; their revocation must not be forgotten earlier than they end."""
    async with start_api(access_lifetime="7200") as before, start_api(access_lifetime="60") as after:
        mine = await family(await before.sign_up())
        await before.scalar("UPDATE sessions SET scope = '{orders:read}' RETURNING id")
        assert (await after.refresh(mine.all[2]["refresh_token"], **form)).status_code == 200
        done(await revoke(after, mine.all[2]["access_token"]))
        before.clock.advance(seconds=7200)
        await prune(after)
        assert await after.scalar("SELECT count(*) FROM revoked_tokens") == 1
        await mine.assert_ended(before, after)


async def test_pruning_works_in_batches_and_side_by_side(api):
    await api.scalar(
        """
        INSERT INTO revoked_tokens (jti, reason, revoked_at, expires_at)
        SELECT n::text, 'logout', $1::timestamptz, $1 + n * interval '1 second' FROM generate_series(-2500, 2) AS n
        RETURNING jti
        """,
        START,
    )
    assert await prune(api) == 1000
    assert sum(await asyncio.gather(prune(api), prune(api), prune(api))) == 1500
    assert await api.scalar("SELECT array_agg(jti ORDER BY jti) FROM revoked_tokens") == ["0", "1", "2"]


async def test_pruning_does_not_stop_after_a_batch_while_more_is_waiting(api):
    """A batch a minute is 1.4 million a day, which a large installation outgrows."""
    await api.scalar(
        """
        INSERT INTO revoked_tokens (jti, reason, revoked_at, expires_at)
        SELECT n::text, 'logout', $1::timestamptz, $1 - interval '1 second' FROM generate_series(1, 2500) AS n
        RETURNING jti
        """,
        START,
    )
    await housekeeping.prune(api.runtime)
    assert await api.scalar("SELECT count(*) FROM revoked_tokens") == 0


async def test_a_session_that_is_over_is_still_revoked_when_its_account_is_disabled(api, alice, clock):
    """A connection that was opened with one of its tokens may have outlived it."""
    tokens = await alice.log_in()
    clock.advance(days=31)
    async with api.database.connection() as db, db.transaction():
        await registration.disable(db, UUID(alice.id), by=TESTER, now=clock())
    session_id = jwt.decode(tokens["access_token"], options={"verify_signature": False})["sid"]
    assert await api.scalar("SELECT jti FROM revoked_tokens WHERE reason = 'disabled'") == session_id
    assert await api.scalar("SELECT expires_at FROM revoked_tokens") > clock()
