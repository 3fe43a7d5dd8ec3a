"""`POST /token`: the form, who asks, the answer, what the tokens claim, how a session goes on (TOK-1 to TOK-12)."""

import asyncio
import gzip
import json
import logging
import re
from base64 import b64encode, urlsafe_b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from hashlib import sha256
from itertools import count
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

import asyncpg
import httpx2
import jwt
import pytest

from identity_service.accounts import registration
from identity_service.tokens import refresh as refresh_tokens
from tests.conftest import ISSUER, PASSWORD, START, TESTER, Account, Api, StartApi, bearer

FORM = "application/x-www-form-urlencoded"
LOGIN = {"grant_type": "password", "username": "alice", "password": PASSWORD}
NOW = int(START.timestamp())
ENDED = {"error": "invalid_grant", "error_description": "The session has ended; log in again."}
WRONG_CREDENTIALS = {"error": "invalid_grant", "error_description": "The username or the password is wrong."}
AWAY = {
    "error": "temporarily_unavailable",
    "error_description": "The service cannot answer this at the moment; try again shortly.",
}


def refused(answer: httpx2.Response, status: int, error: str) -> None:
    """TOK-4, TOK-5: the whole shape of an error, which never depends on what was sent."""
    assert (answer.status_code, answer.json().get("error")) == (status, error), answer.text
    assert answer.json().keys() == {"error", "error_description"}
    assert re.fullmatch(r"[\x20\x21\x23-\x5B\x5D-\x7E]{8,}", answer.json()["error_description"])
    never_stored(answer)


def never_stored(answer: httpx2.Response) -> None:
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["pragma"] == "no-cache"


def basic(credentials: str | bytes) -> str:
    return "Basic " + b64encode(credentials.encode() if isinstance(credentials, str) else credentials).decode()


async def post(api: Api, content: bytes, content_type: str | None = FORM, **headers: str) -> httpx2.Response:
    return await api.http.post(
        "/token", content=content, headers=headers | ({"Content-Type": content_type} if content_type else {})
    )


@pytest.fixture(scope="module")
async def knows_alice(shared_api: Api) -> Api:
    await shared_api.sign_up("alice")
    return shared_api


@pytest.fixture
async def shared(knows_alice: Api) -> Api:
    """A service that knows alice, for the tables of this file: none of their rows leaves anything behind."""
    await knows_alice.forget_failures()
    return knows_alice


# The request


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"])
async def test_any_method_but_post_is_answered_with_405_and_allow(shared, method):
    """TOK-1, and nobody may talk a GET into being a POST."""
    answer = await shared.http.request(
        method, "/token", params=LOGIN, headers={"X-HTTP-Method-Override": "POST", "Content-Type": FORM}
    )
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "access_token" not in answer.text


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=x",
        f"{FORM}; charset=iso-8859-1",
        f"{FORM}; charset=utf-16",
        f"{FORM}; charset=utf-8; charset=utf-7",
        f"{FORM}+json",
        f"{FORM}s",
        f"x{FORM}",
        f"{FORM}, application/json",
        f"application/json, {FORM}",
    ],
)
async def test_a_login_declared_as_anything_but_a_form_is_refused(shared, content_type):
    """TOK-1: the same bytes log in as soon as they are declared as what they are."""
    content = urlencode(LOGIN).encode()
    refused(await post(shared, content, content_type), 400, "invalid_request")
    assert (await post(shared, content)).status_code == 200


@pytest.mark.parametrize(
    "content_type", [f"{FORM}; charset=UTF-8", f'{FORM};charset="utf-8"', FORM.upper(), f"{FORM} ; charset=utf-8"]
)
async def test_a_form_in_utf_8_is_read_however_its_type_is_spelled(shared, content_type):
    assert (await post(shared, urlencode(LOGIN).encode(), content_type)).status_code == 200


async def test_a_json_body_is_refused_in_the_words_of_oauth(shared):
    """TOK-1: never the framework's 422."""
    answer = await shared.http.post("/token", json=LOGIN)
    refused(answer, 400, "invalid_request")
    assert PASSWORD not in answer.text


async def test_a_multipart_body_is_refused(shared):
    answer = await shared.http.post("/token", files={name: (None, value) for name, value in LOGIN.items()})
    assert answer.request.headers["content-type"].startswith("multipart/form-data; boundary=")
    refused(answer, 400, "invalid_request")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"&&&",
        b"=password&username=alice&password=x",
        b"grant_type=password&username=alice&password=%FF",
        b"grant_type=password&username=alice&password=\xff\xfe",
        b"grant_type=password&username=alice&password=%ED%A0%80",
        b"grant_type=password&username=alice%00&password=x",
        b"grant_type=password&username=alice&password=x%0D%0ASet-Cookie:x",
        b"grant_type=password&username=alice&password=%C2%85",
        b"grant_type=password&username=alice&password=x&%00=x",
        b"grant_type=password&username=alice&password=x&" + b"&".join(b"a%d=1" % n for n in range(33)),
        b"grant_type=password;username=alice;password=x",
        urlencode(LOGIN).encode("utf-16"),
        json.dumps(LOGIN).encode(),
        gzip.compress(urlencode(LOGIN).encode()),
    ],
    ids=[
        "empty",
        "only-separators",
        "nameless-parameter",
        "broken-utf-8",
        "raw-bytes",
        "lone-surrogate",
        "nul",
        "line-break",
        "c1-control",
        "control-in-a-name",
        "too-many",
        "semicolons",
        "utf-16",
        "json-called-a-form",
        "compressed",
    ],
)
async def test_a_form_that_cannot_be_read_one_way_is_refused(shared, content):
    """TOK-1, F61: 400 and no 500, whatever the bytes."""
    wrong = await post(shared, content, **{"Content-Encoding": "identity"})
    assert wrong.status_code == 400
    assert wrong.json()["error"] in ("invalid_request", "unsupported_grant_type")
    refused(wrong, 400, wrong.json()["error"])


@pytest.mark.parametrize(
    "more",
    [
        "grant_type=password",
        "grant_type=refresh_token",
        "username=alice",
        "username=bob",
        "%75sername=alice",
        "password=",
        "scope=&scope=",
        "client_id=first-party&client_id=first-party",
        "client_id=&client_id=other",
        "nobody_knows_this=1&nobody_knows_this=2",
    ],
)
async def test_a_parameter_given_twice_is_refused(shared, more):
    """TOK-2: neither the first nor the last wins."""
    refused(await post(shared, f"{urlencode(LOGIN)}&{more}".encode()), 400, "invalid_request")


@pytest.mark.parametrize("missing", ["username", "password"])
@pytest.mark.parametrize("left", [None, ""])
async def test_a_login_without_username_or_password_is_an_invalid_request(shared, missing, left):
    """TOK-2: an empty parameter is a missing one."""
    form = {name: value for name, value in LOGIN.items() if name != missing}
    answer = await shared.token(**form, **({} if left is None else {missing: left}))
    refused(answer, 400, "invalid_request")
    assert answer.json()["error_description"] == f"The parameter {missing} is missing."


@pytest.mark.parametrize("form", [{}, {"refresh_token": ""}])
async def test_a_refresh_without_a_token_is_an_invalid_request(shared, form):
    refused(await shared.token(grant_type="refresh_token", **form), 400, "invalid_request")


@pytest.mark.parametrize(
    "more",
    [
        {"scope": "", "client_id": "", "client_secret": ""},
        {"state": "xyz", "resource": "https://orders.example.com", "scope[]": "identity:admin", "x": "\u00fc"},
        {f"unknown{n}": "1" for n in range(20)},
    ],
    ids=["empty", "unknown", "many"],
)
async def test_empty_and_unknown_parameters_change_nothing(shared, more):
    """TOK-2."""
    answer = await shared.token(**LOGIN, **more)
    assert (answer.status_code, answer.json()["scope"]) == (200, "")


@pytest.mark.parametrize("moved", [("grant_type",), ("username",), ("password",), ("username", "password"), (*LOGIN,)])
async def test_parameters_in_the_url_are_not_honoured(shared, moved):
    """TOK-2: URLs end up in logs."""
    form = {name: value for name, value in LOGIN.items() if name not in moved}
    answer = await shared.http.post("/token", data=form, params={name: LOGIN[name] for name in moved})
    refused(answer, 400, "invalid_request")


async def test_the_url_cannot_override_the_form(shared):
    answer = await shared.http.post(
        "/token", data=LOGIN, params={"username": "mallory", "scope": "identity:admin", "grant_type": "refresh_token"}
    )
    assert (answer.status_code, answer.json()["scope"]) == (200, "")


@pytest.mark.parametrize("url", ["/token?client_secret=x", "/token?client_secret=", "/token?a=1&client%5Fsecret=x"])
async def test_a_client_secret_in_the_url_is_refused(shared, url):
    """TOK-2."""
    refused(await shared.http.post(url, data=LOGIN), 400, "invalid_request")


@pytest.mark.parametrize("form", [{}, {"grant_type": ""}, {"GRANT_TYPE": "password"}])
async def test_a_missing_grant_type_is_an_invalid_request(shared, form):
    """TOK-8."""
    answer = await shared.token(username="alice", password=PASSWORD, **form)
    refused(answer, 400, "invalid_request")
    assert answer.json()["error_description"] == "The parameter grant_type is missing."


@pytest.mark.parametrize(
    "grant_type",
    [
        "Password",
        "password ",
        "password refresh_token",
        "implicit",
        "token",
        "urn:ietf:params:oauth:grant-type:saml2-bearer",
        "__class__",
        '\u00e9"\\<script>',
        "x" * 10_000,
    ],
)
async def test_an_unknown_grant_type_is_unsupported(shared, grant_type):
    """TOK-8, TOK-5: and not repeated in the answer."""
    answer = await shared.token(**{**LOGIN, "grant_type": grant_type})
    refused(answer, 400, "unsupported_grant_type")
    assert grant_type not in answer.text


@pytest.mark.parametrize("path", ["/token/", "//token", "/TOKEN", "/token%00", "/token;x=1", "/oauth/token"])
async def test_the_endpoint_has_one_path(shared, path):
    assert (await shared.http.post(f"{ISSUER}{path}", data=LOGIN)).status_code == 404


# Who asks


@pytest.mark.parametrize(
    ("authorization", "form"),
    [
        (None, {}),
        (None, {"client_id": "first-party"}),
        ("Basic Og==", {}),
        ("Basic Og==", {"client_id": "first-party"}),
        ("basic Og==", {}),
        ("Basic   Og==", {}),
        (basic("first-party:"), {}),
        (basic("first-party:"), {"client_id": "first-party"}),
        (basic("first%2Dparty:"), {}),
        ("BASIC " + basic("first-party:")[6:], {}),
    ],
)
async def test_the_first_party_client_needs_no_secret(shared, authorization, form):
    """TOK-7; `Og==` is an empty id and an empty secret, which Swagger UI sends when nothing was filled in."""
    headers = {"Authorization": authorization} if authorization else {}
    answer = await shared.http.post("/token", data=LOGIN | form, headers=headers)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "form",
    [
        {"client_secret": "x"},
        {"client_id": "first-party", "client_secret": "x"},
        {"client_id": "nobody"},
        {"client_id": "nobody", "client_secret": "x"},
        {"client_id": "First-Party"},
        {"client_id": "first-party "},
        {"client_id": "first-party\u200b"},
        {"client_id": "x" * 10_000},
    ],
)
async def test_a_client_that_cannot_be_identified_by_the_form_is_refused(shared, form):
    """TOK-6, TOK-7: no challenge for a scheme that was not used; unknown clients and wrong secrets look the same."""
    answer = await shared.token(**LOGIN, **form)
    refused(answer, 401, "invalid_client")
    assert answer.json()["error_description"] == "Client authentication failed."
    assert "www-authenticate" not in answer.headers


@pytest.mark.parametrize(
    "authorization",
    [
        basic("nobody:"),
        basic("nobody:x"),
        basic("first-party:x"),
        basic("first-party:first-party"),
        basic("first-party::"),
        basic(":x"),
        basic("First-Party:"),
        basic("first-party"),
        basic("first party:"),
        basic("first+party:"),
        basic("first%party:"),
        basic("first-party%00:"),
        basic("first-party:%00"),
        basic("%FF:"),
        basic(b"\xff:\xff"),
        basic(b"\x00:\x00"),
        basic("x" * 10_000),
        "Basic",
        "Basic !!!!",
        "Basic Og",
        "Basic Og=",
        "Basic Og===",
        "Basic Og== Og==",
        "Basic O g==",
        "Basic Og==,",
        "Basic Oh==",
        "Basic " + basic("first-party:")[6:] + "====",
        "Basic " + basic("nobody:\u00fb\u00ff")[6:].replace("+", "-").replace("/", "_"),
        "Basic\tOg==",
        "Bearer x",
        "Negotiate Og==",
        "Og==",
    ],
)
async def test_a_client_that_cannot_be_identified_by_its_header_is_challenged(shared, authorization):
    """TOK-6, TOK-7, F47: strict base64, urlencoded values, and the one answer with a challenge."""
    answer = await shared.http.post("/token", data=LOGIN, headers={"Authorization": authorization})
    refused(answer, 401, "invalid_client")
    assert answer.json()["error_description"] == "Client authentication failed."
    assert answer.headers["www-authenticate"] == 'Basic realm="identity", charset="UTF-8"'


@pytest.mark.parametrize(
    ("headers", "form"),
    [
        ([basic("first-party:")], {"client_secret": "x"}),
        ([basic("first-party:x")], {"client_secret": "x"}),
        ([basic("first-party:")], {"client_id": "nobody"}),
        ([basic("nobody:x")], {"client_id": "first-party"}),
        ([basic("first-party:"), basic("first-party:")], {}),
        ([basic("first-party:"), "Bearer x"], {}),
    ],
)
async def test_two_ways_to_identify_the_client_are_refused(shared, headers, form):
    """TOK-7."""
    answer = await shared.http.post(
        "/token", data=LOGIN | form, headers=[("Authorization", value) for value in headers]
    )
    refused(answer, 400, "invalid_request")


@pytest.mark.parametrize(
    "wrong",
    [
        {"username": "nobody"},
        {"username": "alice bob"},
        {"username": "\u202ealice"},
        {"username": "a" * 30_000},
        {"username": "'; DROP TABLE users; --"},
        {"password": "wrong"},
        {"password": PASSWORD + " "},
        {"password": PASSWORD.upper()},
        {"password": "x" * 30_000},
        {"password": "\U0010ffff"},
    ],
)
async def test_wrong_credentials_have_one_answer(shared, wrong):
    """PWD-8."""
    answer = await shared.token(**{**LOGIN, **wrong})
    refused(answer, 400, "invalid_grant")
    assert answer.json() == WRONG_CREDENTIALS


async def test_a_disabled_account_is_answered_as_a_wrong_password_is(api, alice):
    """PWD-8."""
    await disable(api, alice, {})
    answer = await api.token(**LOGIN)
    refused(answer, 400, "invalid_grant")
    assert answer.json() == WRONG_CREDENTIALS


@pytest.mark.parametrize(
    ("origin", "allowed"), [("https://app.example.com", True), ("https://evil.example.com", False), ("null", False)]
)
async def test_pages_of_other_origins_cannot_read_tokens(api, alice, origin, allowed):
    """TOK-15: allowed origins may, and never with credentials."""
    answer = await api.http.post("/token", data=LOGIN, headers={"Origin": origin})
    assert answer.headers.get("access-control-allow-origin") == (origin if allowed else None)
    assert "access-control-allow-credentials" not in answer.headers


# Switched off


async def test_without_the_password_grant_a_login_is_unsupported(start_api: StartApi):
    """TOK-8, F40: and it leaves no session. The metadata stops offering it."""
    async with start_api(password_grant="off") as api:
        alice = await api.sign_up()
        refused(await api.token(**LOGIN), 400, "unsupported_grant_type")
        refused(await api.token(**{**LOGIN, "password": "wrong"}), 400, "unsupported_grant_type")
        assert await api.scalar("SELECT count(*) FROM sessions") == 0
        metadata = (await api.http.get("/.well-known/oauth-authorization-server")).json()
        assert metadata["grant_types_supported"] == ["refresh_token", "client_credentials"]
        assert alice.id


async def test_sessions_go_on_without_the_password_grant(api, alice, start_api: StartApi):
    assert "password" in (await api.http.get("/.well-known/oauth-authorization-server")).json()["grant_types_supported"]
    token = (await alice.log_in())["refresh_token"]
    async with start_api(password_grant="off") as without:
        assert (await without.refresh(token)).status_code == 200


# The answer


@pytest.mark.parametrize("grant", ["password", "refresh_token"])
async def test_the_answer_holds_exactly_what_the_contract_says(api, alice, grant):
    """TOK-3, TOK-4: numbers are numbers, nothing is null, and no cache keeps it."""
    answer = await api.token(**LOGIN)
    if grant == "refresh_token":
        answer = await api.refresh(answer.json()["refresh_token"])
    body = answer.json()
    assert answer.status_code == 200
    never_stored(answer)
    segments = r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{342}"
    assert re.fullmatch(segments, body.pop("access_token"))
    assert re.fullmatch(segments, body.pop("refresh_token"))
    assert body == {
        "token_type": "Bearer",
        "expires_in": 600,
        "scope": "",
        "refresh_token_expires_in": 14 * 86400,
    }
    assert {type(body[name]) for name in ("expires_in", "refresh_token_expires_in")} == {int}
    assert "set-cookie" not in answer.headers


async def decoded(api: Api, token: str, audience: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return header and claims as a stock PyJWT reads them with nothing but our JWKS. Times are ours to judge."""
    keys = (await api.http.get("/.well-known/jwks.json")).json()
    key = jwt.PyJWKSet.from_dict(keys)[jwt.get_unverified_header(token)["kid"]]
    options: Any = {"verify_exp": False, "verify_iat": False}
    read = jwt.decode_complete(token, key, algorithms=["RS256"], audience=audience, issuer=ISSUER, options=options)
    return read["header"], read["payload"]


async def thumbprint_of_the_signing_key(api: Api) -> str:
    """RFC 7638, from what is published."""
    key = (await api.http.get("/.well-known/jwks.json")).json()["keys"][0]
    required = json.dumps({"e": key["e"], "kty": "RSA", "n": key["n"]}, separators=(",", ":"))
    return urlsafe_b64encode(sha256(required.encode()).digest()).rstrip(b"=").decode()


async def test_an_access_token_claims_exactly_what_the_contract_says(api, alice):
    """RS-1, RS-2."""
    header, claims = await decoded(api, (await alice.log_in())["access_token"], "api")
    assert header == {"alg": "RS256", "typ": "at+jwt", "kid": await thumbprint_of_the_signing_key(api)}
    session_id, token_id = claims.pop("sid"), claims.pop("jti")
    assert str(UUID(session_id)) == session_id
    assert re.fullmatch(r"[A-Za-z0-9_-]{22}", token_id)
    status = claims.pop("status")["status_list"]
    assert status == {"idx": status["idx"], "uri": f"{ISSUER}/status-lists/0"}
    assert type(status["idx"]) is int
    assert 0 <= status["idx"] < 1 << 20
    assert claims == {
        "iss": ISSUER,
        "sub": alice.id,
        "aud": ["api", ISSUER],
        "client_id": "first-party",
        "iat": NOW,
        "exp": NOW + 600,
        "auth_time": NOW,
        "amr": ["pwd"],
        "scope": "",
        "roles": [],
    }


async def test_a_refresh_token_claims_exactly_what_the_contract_says(api, alice):
    """For the issuer alone, without `nbf`, and its `jti` names session and generation."""
    tokens = await alice.log_in()
    session_id = (await decoded(api, tokens["access_token"], "api"))[1]["sid"]
    for generation in range(3):
        header, claims = await decoded(api, tokens["refresh_token"], ISSUER)
        assert header == {"alg": "RS256", "typ": "rt+jwt", "kid": await thumbprint_of_the_signing_key(api)}
        assert claims == {
            "iss": ISSUER,
            "sub": alice.id,
            "aud": ISSUER,
            "client_id": "first-party",
            "sid": session_id,
            "jti": f"{session_id}.{generation}",
            "iat": NOW + 60 * generation,
            "exp": NOW + 60 * generation + 14 * 86400,
        }
        api.clock.advance(seconds=60)
        tokens = (await api.refresh(tokens["refresh_token"])).json()


async def test_a_refresh_moves_times_and_id_and_nothing_else(api, alice, clock):
    """RS-2: `sid`, `auth_time` and `amr` are those of the login."""
    tokens = await alice.log_in()
    _, before = await decoded(api, tokens["access_token"], "api")
    clock.advance(hours=5)
    _, after = await decoded(api, (await api.refresh(tokens["refresh_token"])).json()["access_token"], "api")
    assert after["jti"] != before["jti"]
    assert after == before | {"iat": NOW + 18000, "exp": NOW + 18600, "jti": after["jti"]}


async def test_two_logins_share_neither_session_nor_token_id(api, alice):
    first, second = [(await decoded(api, (await alice.log_in())["access_token"], "api"))[1] for _ in range(2)]
    assert first["sid"] != second["sid"]
    assert first["jti"] != second["jti"]


async def test_tokens_are_for_the_configured_audiences_and_the_issuer(start_api: StartApi):
    async with start_api(audience="orders billing") as api:
        token = (await (await api.sign_up()).log_in())["access_token"]
        _, claims = await decoded(api, token, "billing")
        assert sorted(claims["aud"]) == sorted(["orders", "billing", ISSUER])
        assert (await api.me(token)).status_code == 200


@pytest.mark.parametrize(
    "hostile", [{"Host": "localhost"}, {"X-Forwarded-Host": "evil.example"}, {"Forwarded": "host=evil.example"}]
)
async def test_the_issuer_never_comes_from_the_request(api, alice, hostile):
    """F53."""
    answer = await api.http.post("/token", data=LOGIN, headers=hostile)
    assert (await decoded(api, answer.json()["access_token"], "api"))[1]["iss"] == ISSUER


@pytest.mark.parametrize(
    ("changed", "access", "refresh"),
    [
        ({"access_lifetime": "60"}, 60, 14 * 86400),
        ({"refresh_lifetime": "120"}, 600, 120),
        ({"session_lifetime": "300"}, 300, 300),
        ({"session_lifetime": "3600", "refresh_lifetime": "7200"}, 600, 3600),
    ],
)
async def test_lifetimes_are_the_settings_and_never_pass_the_end_of_the_session(
    start_api: StartApi, changed, access, refresh
):
    async with start_api(**changed) as api:
        tokens = await (await api.sign_up()).log_in()
        assert (tokens["expires_in"], tokens["refresh_token_expires_in"]) == (access, refresh)
        assert (await decoded(api, tokens["access_token"], "api"))[1]["exp"] == NOW + access
        assert (await decoded(api, tokens["refresh_token"], ISSUER))[1]["exp"] == NOW + refresh


async def test_near_the_end_of_the_session_both_tokens_end_with_it(api, alice, clock):
    tokens = await alice.log_in()
    for _ in range(3):
        clock.advance(days=9, hours=23)
        tokens = (await api.refresh(tokens["refresh_token"])).json()
    clock.advance(hours=2, minutes=55)
    tokens = (await api.refresh(tokens["refresh_token"])).json()
    assert (tokens["expires_in"], tokens["refresh_token_expires_in"]) == (300, 300)
    end = NOW + 30 * 86400
    assert (await decoded(api, tokens["access_token"], "api"))[1]["exp"] == end
    assert (await decoded(api, tokens["refresh_token"], ISSUER))[1]["exp"] == end
    clock.advance(seconds=300)
    assert (await api.me(tokens["access_token"])).status_code == 401
    assert (await api.refresh(tokens["refresh_token"])).json() == ENDED


# Scope


async def make_admin(api: Api) -> None:
    await api.scalar("UPDATE users SET roles = '{admin}' WHERE username = 'alice' RETURNING id")


async def scope_of(api: Api, answer: dict[str, Any]) -> str:
    """The answer and the token must agree."""
    _, claims = await decoded(api, answer["access_token"], "api")
    assert claims["scope"] == answer["scope"]
    scope: str = claims["scope"]
    return scope


@pytest.mark.parametrize(
    ("admin", "asked", "granted"),
    [
        (True, "identity:admin", "identity:admin"),
        (True, "identity:admin identity:admin", "identity:admin"),
        (True, "openid identity:admin profile", "identity:admin"),
        (True, "", ""),
        (True, "identity", ""),
        (True, "identity:*", ""),
        (True, "IDENTITY:ADMIN", ""),
        (True, "admin", ""),
        (False, "identity:admin", ""),
    ],
)
async def test_a_scope_is_given_only_when_asked_for_and_only_to_who_has_the_role(api, alice, admin, asked, granted):
    if admin:
        await make_admin(api)
    tokens = await alice.log_in(scope=asked)
    assert await scope_of(api, tokens) == granted
    _, claims = await decoded(api, tokens["access_token"], "api")
    assert claims["roles"] == (["admin"] if admin else [])


MALFORMED_SCOPES = [
    " ",
    " identity:admin",
    "identity:admin ",
    "identity:admin  openid",
    'identity:admin "',
    "identity:admin \\",
    "identity\u00a0admin",
    "idéntity:admin",
    "x" * 129,
    " ".join(f"s{n}" for n in range(65)),
]


@pytest.mark.parametrize("scope", MALFORMED_SCOPES)
async def test_a_malformed_scope_is_refused_at_the_login(shared, scope):
    """RFC 6749 3.3, and no session has begun."""
    before = await shared.scalar("SELECT count(*) FROM sessions")
    refused(await shared.token(**LOGIN, scope=scope), 400, "invalid_scope")
    assert await shared.scalar("SELECT count(*) FROM sessions") == before


@pytest.mark.parametrize("scope", [*MALFORMED_SCOPES, "identity:admin", "openid", "identity:admin openid"])
async def test_a_malformed_or_wider_scope_at_a_refresh_spends_nothing(shared, scope):
    """TOK-11: `invalid_scope`, and the same token still is the newest."""
    token = (await shared.token(**LOGIN)).json()["refresh_token"]
    refused(await shared.refresh(token, scope=scope), 400, "invalid_scope")
    _, claims = await decoded(shared, (await shared.refresh(token)).json()["refresh_token"], ISSUER)
    assert claims["jti"].endswith(".1")


async def test_a_role_gained_after_the_login_widens_nothing(api, alice):
    token = (await alice.log_in(scope="identity:admin"))["refresh_token"]
    await make_admin(api)
    refused(await api.refresh(token, scope="identity:admin"), 400, "invalid_scope")
    assert await scope_of(api, (await api.refresh(token)).json()) == ""


async def test_narrowing_is_for_one_access_token_only(api, alice):
    """TOK-11: the next refresh token keeps the scope of the login."""
    await make_admin(api)
    tokens = await alice.log_in(scope="identity:admin")
    await api.scalar("UPDATE sessions SET scope = '{identity:admin,openid}' RETURNING id")
    tokens = (await api.refresh(tokens["refresh_token"], scope="openid")).json()
    assert "identity:admin" not in (await scope_of(api, tokens)).split()
    tokens = (await api.refresh(tokens["refresh_token"], scope="identity:admin")).json()
    assert await scope_of(api, tokens) == "identity:admin"
    tokens = (await api.refresh(tokens["refresh_token"])).json()
    assert (await scope_of(api, tokens)).split()[:1] == ["identity:admin"]


async def test_a_role_lost_takes_its_scope_along_at_the_next_refresh(api, alice):
    await make_admin(api)
    tokens = await alice.log_in(scope="identity:admin")
    await api.scalar("UPDATE users SET roles = '{}' RETURNING id")
    for asked in ({}, {"scope": "identity:admin"}):
        tokens = (await api.refresh(tokens["refresh_token"], **asked)).json()
        assert await scope_of(api, tokens) == ""
        assert (await decoded(api, tokens["access_token"], "api"))[1]["roles"] == []


async def make_clerk(api: Api, scopes: str = "{orders:write,orders:read}") -> None:
    """Alice becomes a clerk and an administrator."""
    await api.scalar("INSERT INTO roles VALUES ('clerk', $1::text::text[], now()) RETURNING name", scopes)
    await api.scalar("UPDATE users SET roles = '{clerk,admin}' WHERE username = 'alice' RETURNING id")


@pytest.mark.parametrize(
    ("asked", "granted"),
    [
        ("", "orders:read orders:write"),
        ("orders:read", "orders:read"),
        ("orders:write orders:read", "orders:write orders:read"),
        ("orders:read identity:admin orders:delete", "orders:read identity:admin"),
        ("identity:admin", "identity:admin"),
        ("orders:delete", ""),
        ("clerk", ""),
        ("orders", ""),
    ],
)
async def test_a_login_is_granted_what_its_roles_give_and_by_default_no_administration(api, alice, asked, granted):
    await make_clerk(api)
    tokens = await alice.log_in(scope=asked)
    assert await scope_of(api, tokens) == granted
    assert (await decoded(api, tokens["access_token"], "api"))[1]["roles"] == ["clerk", "admin"]
    assert await scope_of(api, (await api.refresh(tokens["refresh_token"])).json()) == granted


async def test_a_role_gives_nothing_to_those_who_do_not_have_it(api, alice, bob):
    await make_clerk(api)
    for asked in ("", "orders:read"):
        tokens = await bob.log_in(scope=asked)
        assert await scope_of(api, tokens) == ""
        assert await scope_of(api, (await api.refresh(tokens["refresh_token"])).json()) == ""


@pytest.mark.parametrize("asked", ["", "orders:read", "orders:refund"])
async def test_a_scope_that_a_role_gains_reaches_no_session_that_lives(api, alice, asked):
    """A session never gains scopes, not even one that asked for none, or for this one when nothing gave it."""
    await make_clerk(api)
    tokens = await alice.log_in(scope=asked)
    before = tokens["scope"]
    await api.scalar("UPDATE roles SET scopes = scopes || '{orders:refund}' RETURNING name")
    refused(await api.refresh(tokens["refresh_token"], scope="orders:refund"), 400, "invalid_scope")
    assert await scope_of(api, (await api.refresh(tokens["refresh_token"])).json()) == before
    assert (await alice.log_in(scope="orders:refund"))["scope"] == "orders:refund"


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE roles SET scopes = '{orders:read}' RETURNING name",
        "UPDATE roles SET scopes = '{orders:read,orders:refund}' RETURNING name",
    ],
)
async def test_a_scope_that_a_role_loses_is_gone_at_the_next_refresh_and_may_come_back(api, alice, change):
    """RFC 6749 6: what the login was granted is the most, what the roles give now decides."""
    await make_clerk(api)
    tokens = await alice.log_in()
    await api.scalar(change)
    for asked in ("", "orders:write orders:read"):
        answer = await api.refresh(tokens["refresh_token"], scope=asked)
        assert await scope_of(api, answer.json()) == "orders:read"
    await api.scalar("UPDATE roles SET scopes = '{orders:read,orders:write}' RETURNING name")
    tokens = (await api.refresh(answer.json()["refresh_token"])).json()
    assert await scope_of(api, tokens) == "orders:read orders:write"


async def test_two_roles_that_give_one_scope_give_it_once_and_losing_one_keeps_it(api, alice):
    await make_clerk(api)
    await api.scalar("INSERT INTO roles VALUES ('driver', '{orders:read}', now()) RETURNING name")
    await api.scalar("UPDATE users SET roles = '{clerk,driver}' RETURNING id")
    tokens = await alice.log_in()
    assert await scope_of(api, tokens) == "orders:read orders:write"
    await api.scalar("UPDATE users SET roles = '{driver}' RETURNING id")
    tokens = (await api.refresh(tokens["refresh_token"])).json()
    assert await scope_of(api, tokens) == "orders:read"
    assert (await decoded(api, tokens["access_token"], "api"))[1]["roles"] == ["driver"]


async def test_asking_for_too_much_does_not_hide_the_reuse_of_an_old_token(api, alice):
    """F27: a thief's request must end the family even when it would have been refused anyway."""
    first = (await alice.log_in())["refresh_token"]
    second = (await api.refresh(first)).json()["refresh_token"]
    third = (await api.refresh(second)).json()["refresh_token"]
    refused(await api.refresh(first, scope="identity:admin"), 400, "invalid_grant")
    assert (await api.refresh(third)).json() == ENDED


async def test_a_retry_that_asks_for_more_than_the_login_got_is_refused(api, alice):
    """Or the answer to the token just spent would be a way around the session's scope."""
    await make_admin(api)
    first = (await alice.log_in())["refresh_token"]
    second = (await api.refresh(first)).json()["refresh_token"]
    refused(await api.refresh(first, scope="identity:admin"), 400, "invalid_scope")
    assert (await api.refresh(second)).status_code == 200


# Refreshing


async def test_a_retry_gets_the_same_bytes_and_never_a_second_family(api, alice, clock):
    """TOK-12: within the window, and only until the successor has been used."""
    clock.advance(microseconds=678_901)
    first = (await alice.log_in())["refresh_token"]
    second = (await api.refresh(first)).json()["refresh_token"]
    for _ in range(3):
        clock.advance(seconds=9.9)
        assert (await api.refresh(first)).json()["refresh_token"] == second
    third = (await api.refresh(second)).json()["refresh_token"]
    assert len({first, second, third}) == 3
    assert await api.scalar("SELECT count(*) FROM sessions") == 1
    assert (await api.refresh(first)).json() == ENDED


@pytest.mark.parametrize("replayed", [0, 1, 2])
async def test_a_replayed_ancestor_ends_the_whole_family(api, alice, replayed):
    """TOK-12, F27: however recent it is, every token of the family is refused from then on."""
    other = await alice.log_in()
    family = [await alice.log_in()]
    for _ in range(4):
        family.append((await api.refresh(family[-1]["refresh_token"])).json())
    answer = await api.refresh(family[replayed]["refresh_token"])
    refused(answer, 400, "invalid_grant")
    assert answer.json() == ENDED
    for tokens in family:
        assert (await api.refresh(tokens["refresh_token"])).json() == ENDED
        assert (await api.me(tokens["access_token"])).status_code == 401
    assert (await api.me(other["access_token"])).status_code == 200
    assert (await api.refresh(other["refresh_token"])).status_code == 200


async def test_a_token_spent_long_ago_ends_the_family_after_every_access_token_expired(api, alice, clock):
    """F28."""
    first = (await alice.log_in())["refresh_token"]
    second = (await api.refresh(first)).json()["refresh_token"]
    clock.advance(days=3)
    assert (await api.refresh(first)).json() == ENDED
    assert (await api.refresh(second)).json() == ENDED
    assert await api.scalar("SELECT reason FROM revoked_tokens") == "reuse"


async def test_no_window_means_no_retry(start_api: StartApi):
    async with start_api(refresh_retry_window="0") as api:
        first = (await (await api.sign_up()).log_in())["refresh_token"]
        second = (await api.refresh(first)).json()["refresh_token"]
        api.clock.advance(microseconds=1)
        assert (await api.refresh(first)).json() == ENDED
        assert (await api.refresh(second)).json() == ENDED


async def test_a_hundred_refreshes_move_the_end_by_nothing(api, alice, clock):
    """F30: the remaining time only ever falls, to the second."""
    tokens = await alice.log_in()
    for done in range(1, 101):
        clock.advance(seconds=25_900)
        tokens = (await api.refresh(tokens["refresh_token"])).json()
        left = 30 * 86400 - 25_900 * done
        assert tokens["refresh_token_expires_in"] == min(14 * 86400, left)
        assert tokens["expires_in"] == min(600, left)
    clock.advance(seconds=2_000)
    assert (await api.refresh(tokens["refresh_token"])).json() == ENDED


Ending = Callable[[Api, Account, dict[str, Any]], Awaitable[None]]


async def disable(api: Api, alice: Account, _: dict[str, Any]) -> None:
    await api.database.transact(lambda db: registration.disable(db, UUID(alice.id), by=TESTER, now=api.clock()))


async def disable_and_enable_again(api: Api, alice: Account, tokens: dict[str, Any]) -> None:
    await disable(api, alice, tokens)
    await api.database.transact(lambda db: registration.enable(db, UUID(alice.id), by=TESTER, now=api.clock()))


async def disable_behind_our_back(api: Api, _: Account, __: dict[str, Any]) -> None:
    await api.scalar("UPDATE users SET disabled_at = now() RETURNING id")


async def change_password_elsewhere(api: Api, alice: Account, _: dict[str, Any]) -> None:
    elsewhere = (await alice.log_in())["access_token"]
    answer = await api.http.put(
        "/users/me/password",
        json={"current_password": alice.password, "new_password": "wise old owls never sleep"},
        headers=bearer(elsewhere),
    )
    assert answer.status_code == 204


async def delete_account(api: Api, alice: Account, tokens: dict[str, Any]) -> None:
    answer = await api.http.request(
        "DELETE", "/users/me", json={"current_password": alice.password}, headers=bearer(tokens["access_token"])
    )
    assert answer.status_code == 204


async def delete_account_and_sign_up_again(api: Api, alice: Account, tokens: dict[str, Any]) -> None:
    await delete_account(api, alice, tokens)
    await api.sign_up(alice.username)


async def revoke_refresh_token(api: Api, _: Account, tokens: dict[str, Any]) -> None:
    assert (await api.http.post("/revoke", data={"token": tokens["refresh_token"]})).status_code == 200


async def log_out_in_the_browser(api: Api, _: Account, tokens: dict[str, Any]) -> None:
    headers = {"Origin": ISSUER, "Cookie": f"__Host-identity-refresh={tokens['refresh_token']}"}
    assert (await api.http.post("/logout", json={}, headers=headers)).status_code == 204


async def hand_over_to_another_client(api: Api, _: Account, __: dict[str, Any]) -> None:
    await api.scalar("UPDATE sessions SET client_id = 'other' RETURNING id")


async def hand_over_to_another_user(api: Api, _: Account, __: dict[str, Any]) -> None:
    bob = await api.sign_up("bob")
    await api.scalar("UPDATE sessions SET user_id = $1 RETURNING id", UUID(bob.id))


@pytest.mark.parametrize(
    "end",
    [
        disable,
        disable_and_enable_again,
        disable_behind_our_back,
        change_password_elsewhere,
        delete_account,
        delete_account_and_sign_up_again,
        revoke_refresh_token,
        log_out_in_the_browser,
        hand_over_to_another_client,
        hand_over_to_another_user,
    ],
)
async def test_no_refresh_token_outlives_what_ends_its_session(api, alice, end: Ending):
    """TOK-11, F29, F62: neither the newest one, nor the one before it by way of the retry window."""
    spent = await alice.log_in()
    newest = (await api.refresh(spent["refresh_token"])).json()
    assert (await api.refresh(spent["refresh_token"])).json()["refresh_token"] == newest["refresh_token"]
    await end(api, alice, newest)
    for tokens in (spent, newest, spent):
        answer = await api.refresh(tokens["refresh_token"])
        refused(answer, 400, "invalid_grant")
        assert answer.json() == ENDED


@pytest.mark.parametrize(
    ("pause", "status"), [({"days": 14, "seconds": -1}, 200), ({"days": 14}, 400), ({"days": 29}, 400)]
)
async def test_a_session_ends_after_a_pause_of_the_idle_lifetime(api, alice, clock, pause, status):
    """TOK-11."""
    token = (await alice.log_in())["refresh_token"]
    clock.advance(**pause)
    assert (await api.refresh(token)).status_code == status


async def test_a_shorter_idle_lifetime_ends_sessions_that_were_promised_more(api, alice, clock, start_api: StartApi):
    token = (await alice.log_in())["refresh_token"]
    clock.advance(seconds=3600)
    async with start_api(refresh_lifetime="3600") as stricter:
        assert (await stricter.refresh(token)).json() == ENDED


@pytest.mark.parametrize(
    ("form", "headers", "status", "error"),
    [
        ({"client_id": "nobody"}, {}, 401, "invalid_client"),
        ({}, {"Authorization": basic("nobody:x")}, 401, "invalid_client"),
        ({"client_secret": "x"}, {}, 401, "invalid_client"),
        ({"client_id": "nobody"}, {"Authorization": basic("first-party:")}, 400, "invalid_request"),
        ({"grant_type": "password"}, {}, 400, "invalid_request"),
    ],
)
async def test_a_refused_request_spends_nothing(shared, form, headers, status, error):
    """TOK-11, F31: the token still is the newest of its session afterwards."""
    token = (await shared.token(**LOGIN)).json()["refresh_token"]
    asked = {"grant_type": "refresh_token", "refresh_token": token} | form
    refused(await shared.http.post("/token", data=asked, headers=headers), status, error)
    _, claims = await decoded(shared, (await shared.refresh(token)).json()["refresh_token"], ISSUER)
    assert claims["jti"].endswith(".1")


@pytest.mark.parametrize("owner", ["first-party", "other"])
async def test_a_refresh_token_of_another_client_is_refused_and_its_session_left_alone(api, alice, owner):
    """TOK-11: even if its signature is ours, and even if the session really is the other client's."""
    token = (await alice.log_in())["refresh_token"]
    await api.scalar("UPDATE sessions SET client_id = $1 RETURNING id", owner)
    ring = api.keys.current
    claims = refresh_tokens.read(token, ring, issuer=ISSUER, now=api.clock())
    foreign = refresh_tokens.RefreshClaims(
        issuer=ISSUER,
        subject=claims.subject,
        client_id="other",
        session_id=claims.session_id,
        generation=claims.generation,
        issued_at=claims.issued_at,
        expires_at=claims.expires_at,
    )
    answer = await api.refresh(refresh_tokens.mint(ring.signer(api.clock()), foreign))
    refused(answer, 400, "invalid_grant")
    assert answer.json() == ENDED
    assert await api.scalar("SELECT generation FROM sessions WHERE revoked_at IS NULL") == 0


# When something is away


class Doomed:
    """A database that a test can take away and give back."""

    def __init__(self, server_url: str, url: str, name: str) -> None:
        self.server_url, self.url, self.name = server_url, url, name

    @asynccontextmanager
    async def held(self, state: str) -> AsyncIterator[None]:
        """Hold the database in a state. Connections to it break on the way in and out, as they do in a failover."""
        taken, given_back = STATES_OF_A_DATABASE[state]
        await self._run(taken)
        yield
        await self._run(given_back)

    async def _run(self, steps: tuple[str, ...]) -> None:
        connection = await asyncpg.connect(self.server_url)
        for step in steps:
            if step == BREAK_CONNECTIONS:
                broken = [row["pid"] for row in await connection.fetch(step, self.name)]
                for _ in range(1000):
                    if not await connection.fetch("SELECT FROM pg_stat_activity WHERE pid = ANY($1)", broken):
                        break
                    await asyncio.sleep(0.005)
                else:
                    pytest.fail("the connections live on")
            else:
                await connection.execute(step.format(self.name))
        await connection.close()


BREAK_CONNECTIONS = "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1"
CLOSE, OPEN = 'ALTER DATABASE "{}" ALLOW_CONNECTIONS false', 'ALTER DATABASE "{}" ALLOW_CONNECTIONS true'
READ_ONLY = 'ALTER DATABASE "{}" SET default_transaction_read_only = on'
STATES_OF_A_DATABASE = {
    "gone": (
        (CLOSE, BREAK_CONNECTIONS, 'ALTER DATABASE "{0}" RENAME TO "{0}_away"'),
        ('ALTER DATABASE "{0}_away" RENAME TO "{0}"', OPEN),
    ),
    "closed": ((CLOSE, BREAK_CONNECTIONS), (OPEN,)),
    "a standby": (
        (READ_ONLY, BREAK_CONNECTIONS),
        ('ALTER DATABASE "{}" RESET default_transaction_read_only', BREAK_CONNECTIONS),
    ),
}


_doomed = count()


@pytest.fixture
def doomed(postgres_url: str, new_database: Callable[..., str], migrated: str) -> Doomed:
    name = f"doomed{next(_doomed)}"
    return Doomed(postgres_url, new_database(name, template="pristine"), name)


@pytest.mark.parametrize("state", STATES_OF_A_DATABASE)
async def test_without_its_database_the_service_says_when_to_come_back_and_spends_nothing(
    start_api: StartApi, doomed: Doomed, state
):
    """F76: 503, never 500, never 200, and no restart is needed afterwards."""
    async with start_api(database_url=doomed.url) as api:
        alice = await api.sign_up()
        tokens = await alice.log_in()
        async with doomed.held(state):
            for answer in (
                await api.token(**LOGIN),
                await api.refresh(tokens["refresh_token"]),
                await api.http.post("/revoke", data={"token": tokens["refresh_token"]}),
            ):
                refused(answer, 503, "temporarily_unavailable")
                assert answer.json() == AWAY
                assert re.fullmatch("[1-9][0-9]*", answer.headers["retry-after"])
        _, claims = await decoded(api, (await api.refresh(tokens["refresh_token"])).json()["refresh_token"], ISSUER)
        assert claims["jti"].endswith(".1")


async def test_without_its_schema_the_service_says_when_to_come_back(start_api: StartApi, doomed: Doomed):
    """A deploy is under way: 503 for everyone, in each endpoint's own words."""
    async with start_api(database_url=doomed.url) as api:
        tokens = await (await api.sign_up()).log_in()
        await api.scalar("ALTER TABLE users RENAME TO users_away")
        refused(await api.token(**LOGIN), 503, "temporarily_unavailable")
        refused(await api.refresh(tokens["refresh_token"]), 503, "temporarily_unavailable")
        answer = await api.me(tokens["access_token"])
        assert (answer.status_code, answer.json()["code"]) == (503, "temporarily_unavailable")
        assert re.fullmatch("[1-9][0-9]*", answer.headers["retry-after"])
        await api.scalar("ALTER TABLE users_away RENAME TO users")
        assert (await api.refresh(tokens["refresh_token"])).status_code == 200


async def test_more_logins_than_can_be_hashed_in_time_are_turned_away_and_refreshes_are_not(start_api: StartApi):
    """PWD-6: 64 workers leave one thread to each, behind which a hundred may wait."""
    async with start_api(workers=64, argon2_memory_kib=4096, argon2_time_cost=4) as api:
        await api.sign_up()
        token = (await api.token(**LOGIN)).json()["refresh_token"]
        flood = [asyncio.create_task(api.token(**LOGIN)) for _ in range(300)]
        turned_away = (await next(asyncio.as_completed(flood))).status_code
        assert turned_away in (200, 503)
        assert not all(login.done() for login in flood)
        assert (await api.refresh(token)).status_code == 200
        answers = await asyncio.gather(*flood)
        assert {answer.status_code for answer in answers} == {200, 503}
        for answer in answers:
            if answer.status_code == 503:
                refused(answer, 503, "temporarily_unavailable")
                assert answer.json() == AWAY
                assert re.fullmatch("[1-9][0-9]*", answer.headers["retry-after"])
        assert (await api.token(**LOGIN)).status_code == 200


@pytest.mark.parametrize("back", [10, 3600])
async def test_before_its_first_key_may_sign_the_service_says_when_to_come_back(api, alice, clock, back):
    """F76: a clock set wrong logs nobody out and begins nothing."""
    token = (await alice.log_in())["refresh_token"]
    clock.advance(seconds=-back)
    for answer in (await api.refresh(token), await api.token(**LOGIN)):
        refused(answer, 503, "temporarily_unavailable")
        assert answer.json() == AWAY
        assert re.fullmatch("[1-9][0-9]*", answer.headers["retry-after"])
    assert await api.scalar("SELECT array_agg(generation) FROM sessions") == [0]
    clock.advance(seconds=back)
    assert (await api.refresh(token)).status_code == 200


async def test_without_the_private_half_of_its_key_the_service_says_when_to_come_back(api, alice, keys_dir, start_api):
    token = (await alice.log_in())["refresh_token"]
    kid = await thumbprint_of_the_signing_key(api)
    (keys_dir / f"{kid}.pem").unlink()
    async with start_api() as restarted:
        for answer in (await restarted.refresh(token), await restarted.token(**LOGIN)):
            refused(answer, 503, "temporarily_unavailable")
            assert answer.json() == AWAY
    assert await api.scalar("SELECT array_agg(generation) FROM sessions") == [0]


# Logs


async def test_neither_passwords_nor_tokens_reach_the_log(api, alice, caplog):
    """LOG-1: whatever goes wrong, and at the chattiest level."""
    caplog.set_level(logging.DEBUG)
    tokens = await alice.log_in()
    newest = (await api.refresh(tokens["refresh_token"])).json()
    await api.refresh(newest["refresh_token"])
    await api.refresh(tokens["refresh_token"])
    await api.token(**{**LOGIN, "password": "a-wrong-password"})
    await api.http.post("/token", data=LOGIN, params={"client_secret": "a-secret-in-the-url"})
    await api.token(**LOGIN, client_secret="a-secret-in-the-form")
    await api.http.post("/token", data=LOGIN, headers={"Authorization": basic("nobody:a-secret-in-the-header")})
    await api.http.post("/token", json=LOGIN)
    ours = [record for record in caplog.records if not record.name.startswith("httpx2")]
    lines = "\n".join(json.dumps(vars(record), default=repr) for record in ours)
    assert "RefreshTokenReused" in lines
    secrets = [PASSWORD, "a-wrong-password", "a-secret-in-the-url", "a-secret-in-the-form", "a-secret-in-the-header"]
    secrets += [token for pair in (tokens, newest) for token in (pair["access_token"], pair["refresh_token"])]
    assert [secret for secret in secrets if secret in lines] == []
