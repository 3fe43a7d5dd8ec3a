"""Who may call the account API: the Authorization header and nothing else (RS-4, RS-5, F16)."""

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import pytest

from identity_service.accounts import registration
from tests.conftest import TESTER, Account, Api, StartApi, bearer
from tests.web.answers import problem, seen

BARE = 'Bearer realm="identity"'
INVALID = (
    'Bearer realm="identity", error="invalid_token", error_description="The token is invalid, expired or revoked."'
)
TWICE = 'Bearer realm="identity", error="invalid_request"'
NOBODY = problem(401, "authentication_required", "Present an access token as a bearer token.")
REJECTED = problem(401, "invalid_token", "The token is invalid, expired or revoked.")

Header = tuple[bytes, bytes]


def authorization(*values: bytes) -> list[Header]:
    return [(b"Authorization", value) for value in values]


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
async def test_without_credentials_the_challenge_is_bare(api, method):
    """RS-4, RFC 6750 3.1: no error code when nothing was presented."""
    answer = await api.http.request(method, "/users/me", **({} if method == "GET" else {"json": {}}))
    assert (seen(answer), answer.headers.get_list("www-authenticate")) == (NOBODY, [BARE])
    assert answer.headers["cache-control"] == "no-store"


NO_CREDENTIALS = [
    b"",
    b" ",
    b"Bearer",
    b"Bearer ",
    b"Bearer    ",
    b"Bearer\t{token}",
    b"Bearer:{token}",
    b"Bearer={token}",
    b"Bearer\xa0{token}",
    b"Bearer{token}",
    b"Bearers {token}",
    b"Basic {token}",
    b"Basic Og==",
    b"DPoP {token}",
    b"Token {token}",
    b"JWT {token}",
    b"Digest username={token}",
    b"{token}",
    b"{token} Bearer",
    b", Bearer {token}",
    b"\xff\xfe",
    b"\xe2\x80\x8bBearer {token}",
    b"B\xc3\xa9arer {token}",
    b"x" * 100_000,
]


async def test_a_header_that_is_no_bearer_credential_counts_as_none(api, alice):
    """RS-5: a genuine token under another scheme is not looked at."""
    token = (await alice.log_in())["access_token"].encode()
    for value in NO_CREDENTIALS:
        answer = await api.http.get("/users/me", headers=authorization(value.replace(b"{token}", token)))
        assert (seen(answer), answer.headers.get_list("www-authenticate")) == (NOBODY, [BARE]), value[:60]


NO_TOKENS = [
    b"bearer x",
    b"Bearer x",
    b"Bearer a b",
    b"Bearer {token} {token}",
    b"Bearer {token}, Bearer {token}",
    b"Bearer {token},",
    b"Bearer Bearer {token}",
    b'Bearer "{token}"',
    b"Bearer token={token}",
    b"Bearer {token}\xa0",
    b"Bearer \xe9",
    b"Bearer \xff\xfe\xfd",
    b"Bearer {token}\xc3\xa9",
    b"Bearer \xf0\x9f\x94\x91",
    b"Bearer =====",
    b"Bearer ..",
    b"Bearer undefined",
    b"Bearer null",
    b"Bearer " + b"x" * 100_000,
    b"Bearer " + b"." * 100_000,
    b"Bearer " + b"a b " * 25_000,
]


async def test_a_bearer_credential_that_is_no_token_is_an_invalid_one(api, alice):
    """RS-4, RS-5, F16: 401 with an error code, never 500, and nothing of what was sent comes back."""
    token = (await alice.log_in())["access_token"].encode()
    for value in NO_TOKENS:
        answer = await api.http.get("/users/me", headers=authorization(value.replace(b"{token}", token)))
        assert (seen(answer), answer.headers.get_list("www-authenticate")) == (REJECTED, [INVALID]), value[:60]
        assert answer.headers["cache-control"] == "no-store"
    assert (await api.me(token.decode())).status_code == 200


@pytest.mark.parametrize("value", [b"Bearer {token}", b"bearer {token}", b"BEARER {token}", b"Bearer   {token}"])
async def test_the_scheme_is_named_in_any_case(api, alice, value: bytes):
    """RS-4, RFC 9110 11.1: and any number of spaces separates it."""
    token = (await alice.log_in())["access_token"].encode()
    answer = await api.http.get("/users/me", headers=authorization(value.replace(b"{token}", token)))
    assert (answer.status_code, answer.json()["id"]) == (200, alice.id)
    assert "www-authenticate" not in answer.headers


@pytest.mark.parametrize(
    "values",
    [
        (b"Bearer {token}", b"Bearer {token}"),
        (b"Bearer {token}", b"Basic Og=="),
        (b"Basic Og==", b"Bearer {token}"),
        (b"", b"Bearer {token}"),
        (b"Bearer {token}", b"Bearer x", b"Bearer y"),
    ],
)
async def test_two_authorization_headers_are_an_invalid_request(api, alice, values: tuple[bytes, ...]):
    """RS-4, RFC 6750 3.1: a proxy in front may have looked at the other one."""
    token = (await alice.log_in())["access_token"].encode()
    sent = authorization(*(value.replace(b"{token}", token) for value in values))
    answer = await api.http.get("/users/me", headers=sent)
    assert seen(answer) == problem(400, "invalid_request", "More than one Authorization header.")
    assert answer.headers.get_list("www-authenticate") == [TWICE]


@pytest.mark.parametrize(
    "request_with",
    [
        lambda token: {"params": {"access_token": token}},
        lambda token: {"params": {"authorization": f"Bearer {token}", "token": token}},
        lambda token: {"data": {"access_token": token}},
        lambda token: {"json": {"access_token": token}},
        lambda token: {"headers": {"Cookie": f"access_token={token}; Authorization={token}; token={token}"}},
        lambda token: {"headers": {"Cookie": f"__Host-identity-refresh={token}; identity-refresh={token}"}},
        lambda token: {"headers": {"X-Authorization": f"Bearer {token}", "X-Access-Token": token}},
        lambda token: {"headers": {"Proxy-Authorization": f"Bearer {token}"}},
        lambda token: {"headers": {"Sec-WebSocket-Protocol": f"bearer, {token}"}},
        lambda _: {"headers": {"X-Forwarded-User": "alice", "Remote-User": "alice", "X-User-Id": "1"}},
    ],
    ids=["query", "query-header", "form", "json", "cookie", "our-cookie", "x-headers", "proxy", "websocket", "gateway"],
)
async def test_a_token_anywhere_else_is_not_looked_at(api, alice, request_with: Callable[[str], dict[str, Any]]):
    """RS-5."""
    token = (await alice.log_in())["access_token"]
    answer = await api.http.request("GET", "/users/me", **request_with(token))
    assert (seen(answer), answer.headers.get_list("www-authenticate")) == (NOBODY, [BARE])
    assert (await api.me(token)).status_code == 200


async def test_a_token_in_the_url_does_not_disturb_the_one_in_the_header(api, alice, bob):
    """RS-5: ignored means ignored."""
    mine, theirs = (await alice.log_in())["access_token"], (await bob.log_in())["access_token"]
    answer = await api.http.get("/users/me", params={"access_token": theirs}, headers=bearer(mine))
    assert (answer.status_code, answer.json()["username"]) == (200, "alice")


async def test_a_token_for_another_issuers_services_is_refused_here(start_api: StartApi):
    """RS-7: our own account API is one audience of several, and it is named by the issuer."""
    async with start_api(audience="orders") as api:
        token = (await (await api.sign_up()).log_in())["access_token"]
        assert (await api.me(token)).status_code == 200
    async with start_api(
        audience="orders", issuer_url="https://accounts.example.com", allowed_hosts="id.example.com"
    ) as other:
        answer = await other.me(token)
        assert (seen(answer), answer.headers.get_list("www-authenticate")) == (REJECTED, [INVALID])


Ending = Callable[[Api, Account, str], Awaitable[object]]


async def let_it_expire(api: Api, _: Account, __: str) -> None:
    api.clock.advance(seconds=600)


async def revoke_it(api: Api, _: Account, token: str) -> None:
    assert (await api.http.post("/revoke", data={"token": token})).status_code == 200


async def list_its_session_as_revoked(api: Api, _: Account, __: str) -> None:
    await api.scalar("""
        INSERT INTO revoked_tokens (jti, reason, revoked_at, expires_at)
        SELECT id::text, 'disabled', now(), now() + interval '1 day' FROM sessions RETURNING jti
    """)


async def disable(api: Api, alice: Account, _: str) -> None:
    await api.database.transact(lambda db: registration.disable(db, UUID(alice.id), by=TESTER, now=api.clock()))


async def disable_behind_our_back(api: Api, _: Account, __: str) -> None:
    await api.scalar("UPDATE users SET disabled_at = now() RETURNING id")


async def change_the_password_behind_our_back(api: Api, _: Account, __: str) -> None:
    await api.scalar("UPDATE users SET password_changed_at = now() RETURNING id")


async def delete_behind_our_back(api: Api, _: Account, __: str) -> None:
    await api.scalar("DELETE FROM users RETURNING id")


@pytest.mark.parametrize(
    "end",
    [
        let_it_expire,
        revoke_it,
        list_its_session_as_revoked,
        disable,
        disable_behind_our_back,
        change_the_password_behind_our_back,
        delete_behind_our_back,
    ],
)
async def test_a_token_that_is_no_longer_good_is_refused_without_saying_why(api, alice, end: Ending):
    """RS-4, F29, F62: at the very next request."""
    token = (await alice.log_in())["access_token"]
    assert (await api.me(token)).status_code == 200
    await end(api, alice, token)
    answer = await api.me(token)
    assert (seen(answer), answer.headers.get_list("www-authenticate")) == (REJECTED, [INVALID])


async def test_the_last_second_of_a_token_still_counts(api, alice, clock):
    token = (await alice.log_in())["access_token"]
    clock.advance(seconds=599, microseconds=999_999)
    assert (await api.me(token)).status_code == 200
    clock.advance(microseconds=1)
    assert (await api.me(token)).status_code == 401


async def test_the_account_is_shown_as_it_stands_now(api, alice):
    """The token says who; what the account is, the database says."""
    token = (await alice.log_in())["access_token"]
    await api.scalar("UPDATE users SET username = 'alice2', roles = '{admin}' RETURNING id")
    shown = (await api.me(token)).json()
    assert (shown["id"], shown["username"], shown["roles"]) == (alice.id, "alice2", ["admin"])
