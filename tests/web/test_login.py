"""The session of a browser: login, refresh, logout, and who may ask for them (contract section 3)."""

import asyncio
import json
from base64 import urlsafe_b64decode
from typing import Any

import httpx2
import pytest

from tests.conftest import ISSUER, PASSWORD, Account, Api, bearer, register
from tests.web.answers import problem, seen

COOKIE = "__Host-identity-refresh"
APP = "https://app.example.com"
FOURTEEN_DAYS = 14 * 24 * 3600
ATTRIBUTES = {"HttpOnly", "SameSite=Strict", "Path=/", "Secure"}

WRONG_LOGIN = problem(401, "invalid_credentials", "The username or the password is wrong.")
ENDED = problem(401, "session_ended", "The session has ended; log in again.")
TOKEN_REVOKED = problem(401, "invalid_token", "The token is invalid, expired or revoked.")
NOT_JSON = problem(415, "unsupported_media_type", "Send the body as application/json in UTF-8.")
FOREIGN = problem(
    403,
    "origin_not_allowed",
    "The Origin header is missing or not in IDENTITY_ALLOWED_ORIGINS; what is no web page uses /token.",
)
PATHS = ["/login", "/refresh", "/logout"]


async def post(
    api: Api, path: str, body: Any = None, *, cookie: str | None = None, origin: str = APP, name: str = COOKIE
) -> httpx2.Response:
    """Ask as a page of ours does, with exactly the cookie that is given."""
    api.http.cookies.clear()
    headers = [(b"Origin", origin.encode())] + (
        [(b"Cookie", f"{name}={cookie}".encode())] if cookie is not None else []
    )
    return await api.http.post(path, json={} if body is None else body, headers=headers)


async def log_in(account: Account, **more: str) -> tuple[str, str]:
    """Return the access token and the cookie's value."""
    body = {"username": account.username, "password": account.password, **more}
    answer = await post(account.api, "/login", body)
    assert answer.status_code == 200, answer.text
    return answer.json()["access_token"], cookie_of(answer)[0]


def cookie_of(answer: httpx2.Response, name: str = COOKIE) -> tuple[str, set[str]]:
    """Return the value and the attributes of the one cookie that an answer sets."""
    (line,) = answer.headers.get_list("set-cookie")
    pair, *attributes = line.split("; ")
    given, _, value = pair.partition("=")
    assert given == name
    assert len(attributes) == len(set(attributes))
    return value, set(attributes)


def is_cleared(answer: httpx2.Response, name: str = COOKIE, attributes: set[str] = ATTRIBUTES) -> bool:
    """Whether the cookie is removed, by the attributes it was set with (BRW-2)."""
    value, given = cookie_of(answer, name)
    lapsed = {attribute for attribute in given if attribute.startswith(("Max-Age=", "expires="))}
    return value.strip('"') == "" and "Max-Age=0" in lapsed and given - lapsed == attributes


def claims_of(token: str) -> dict[str, Any]:
    payload = token.split(".")[1]
    claims: dict[str, Any] = json.loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return claims


# Login


async def test_the_access_token_is_in_the_body_and_the_refresh_token_only_in_the_cookie(api, alice):
    """BRW-1, BRW-2"""
    answer = await post(api, "/login", {"username": "alice", "password": PASSWORD})
    body = answer.json()
    value, attributes = cookie_of(answer)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert body == {"access_token": body["access_token"], "token_type": "Bearer", "expires_in": 600, "scope": ""}
    assert (await api.me(body["access_token"])).json()["id"] == alice.id
    assert attributes == ATTRIBUTES | {f"Max-Age={FOURTEEN_DAYS}"}
    assert claims_of(value)["sid"] == claims_of(body["access_token"])["sid"]
    assert value not in answer.text
    assert len(answer.headers["set-cookie"]) <= 4096


async def test_answers_with_tokens_are_kept_by_no_cache_old_or_new(api, alice):
    """TOK-4"""
    login = await post(api, "/login", {"username": "alice", "password": PASSWORD})
    refreshed = await post(api, "/refresh", cookie=cookie_of(login)[0])
    for answer in (login, refreshed):
        assert answer.status_code == 200
        assert (answer.headers["cache-control"], answer.headers.get("pragma")) == ("no-store", "no-cache")


async def test_on_plain_http_localhost_the_cookie_is_one_that_browsers_accept_there(start_api):
    """Browsers refuse the prefix and the attribute on http, so both are left out together."""
    local = "http://localhost:8000"
    async with start_api(issuer_url=local, allowed_origins="http://localhost:5173") as api:
        api.http.base_url = httpx2.URL(local)
        await api.sign_up()
        own = {"name": "identity-refresh", "origin": local}
        answer = await post(api, "/login", {"username": "alice", "password": PASSWORD}, **own)
        value, attributes = cookie_of(answer, "identity-refresh")
        assert answer.status_code == 200
        assert attributes == ATTRIBUTES - {"Secure"} | {f"Max-Age={FOURTEEN_DAYS}"}
        refreshed = await post(api, "/refresh", cookie=value, **own)
        assert refreshed.status_code == 200
        assert cookie_of(refreshed, "identity-refresh")[1] == attributes
        value, _ = cookie_of(refreshed, "identity-refresh")
        out = await post(api, "/logout", cookie=value, **own)
        assert out.status_code == 204
        assert is_cleared(out, "identity-refresh", ATTRIBUTES - {"Secure"})
        refused = await post(api, "/refresh", cookie=value, **own)
        assert seen(refused) == ENDED
        assert is_cleared(refused, "identity-refresh", ATTRIBUTES - {"Secure"})


async def test_on_https_the_cookie_without_its_prefix_counts_for_nothing(api, alice):
    """A sibling host may set `identity-refresh`, never `__Host-identity-refresh`."""
    _, cookie = await log_in(alice)
    assert seen(await post(api, "/refresh", cookie=cookie, name="identity-refresh")) == ENDED
    assert (await post(api, "/refresh", cookie=cookie)).status_code == 200


@pytest.mark.parametrize(
    ("username", "password"),
    [
        ("nobody", PASSWORD),
        ("alice", "wise old owls never sleep"),
        ("alice", ""),
        ("", PASSWORD),
        ("", ""),
        ("not a username", PASSWORD),
        ("alice", "x" * 257),
    ],
)
async def test_a_refused_login_has_one_answer_and_sets_no_cookie(api, alice, username, password):
    """FPS-1"""
    answer = await post(api, "/login", {"username": username, "password": password})
    assert seen(answer) == WRONG_LOGIN
    assert "set-cookie" not in answer.headers
    assert "www-authenticate" not in answer.headers  # a browser would ask for a password by itself
    assert await api.scalar("SELECT count(*) FROM sessions") == 0


async def test_a_refused_login_leaves_the_session_that_was_there(api, alice):
    _, cookie = await log_in(alice)
    assert seen(await post(api, "/login", {"username": "alice", "password": "x"}, cookie=cookie)) == WRONG_LOGIN
    assert (await post(api, "/refresh", cookie=cookie)).status_code == 200


async def test_each_login_is_a_new_session_whatever_cookie_came_along(api, alice):
    """FPS-2, SES-1: a session planted before the login is not the one after it."""
    _, planted = await log_in(alice)
    answer = await post(api, "/login", {"username": "alice", "password": PASSWORD}, cookie=planted)
    claims = claims_of(answer.json()["access_token"])
    assert claims["sid"] != claims_of(planted)["sid"]
    assert claims["amr"] == ["pwd"]
    assert claims["auth_time"] == int(api.clock().timestamp())


async def test_two_people_at_one_browser_never_get_each_others_tokens(api, alice, bob):
    """F32"""
    _, alices = await log_in(alice)
    answer = await post(api, "/login", {"username": "bob", "password": bob.password}, cookie=alices)
    bobs = cookie_of(answer)[0]
    for cookie, owner in [(alices, alice), (bobs, bob)]:
        token = (await post(api, "/refresh", cookie=cookie)).json()["access_token"]
        assert claims_of(token)["sub"] == owner.id
        assert (await api.me(token)).json()["username"] == owner.username


async def test_the_scope_of_administrators_is_given_only_when_asked_for(api, alice):
    async with api.database.connection() as db:
        await db.execute("UPDATE users SET roles = '{admin}'")
    for asked, given in [({}, ""), ({"scope": "identity:admin"}, "identity:admin"), ({"scope": "orders:read"}, "")]:
        answer = await post(api, "/login", {"username": "alice", "password": PASSWORD, **asked})
        assert answer.json()["scope"] == given
        assert claims_of(answer.json()["access_token"])["scope"] == given
        refreshed = await post(api, "/refresh", cookie=cookie_of(answer)[0])
        assert refreshed.json()["scope"] == given


async def test_a_malformed_scope_starts_no_session(api, alice):
    answer = await post(api, "/login", {"username": "alice", "password": PASSWORD, "scope": 'a" b'})
    assert seen(answer) == problem(
        400, "invalid_scope", "The requested scope is malformed or exceeds what was granted."
    )
    assert await api.scalar("SELECT count(*) FROM sessions") == 0


async def test_the_browser_login_does_not_hang_on_the_password_grant(start_api):
    async with start_api(password_grant="off") as api:
        alice = await api.sign_up()
        refused = await api.token(grant_type="password", username="alice", password=PASSWORD)
        assert refused.json()["error"] == "unsupported_grant_type"
        token, cookie = await log_in(alice)
        assert (await api.me(token)).status_code == 200
        assert (await post(api, "/refresh", cookie=cookie)).status_code == 200


# Refresh


async def test_a_refresh_renews_both_tokens_of_the_same_session(api, alice):
    token, cookie = await log_in(alice)
    api.clock.advance(seconds=300)
    answer = await post(api, "/refresh", cookie=cookie)
    body = answer.json()
    value, attributes = cookie_of(answer)
    before, after = claims_of(token), claims_of(body["access_token"])
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    assert body == {"access_token": body["access_token"], "token_type": "Bearer", "expires_in": 600, "scope": ""}
    assert attributes == ATTRIBUTES | {f"Max-Age={FOURTEEN_DAYS}"}
    assert value != cookie
    assert value not in answer.text
    renewed = {"jti", "iat", "exp"}
    assert {name: before[name] for name in before.keys() - renewed} == {
        name: after[name] for name in after.keys() - renewed
    }
    assert all(after[name] != before[name] for name in renewed)
    assert (await api.me(token)).status_code == 200
    assert (await api.me(body["access_token"])).status_code == 200


async def test_the_cookie_never_promises_more_than_the_session_has_left(start_api):
    """FPS-2: the server ends the session; the cookie only tells the browser when."""
    async with start_api(refresh_lifetime="1000", session_lifetime="1500") as api:
        alice = await api.sign_up()
        _, cookie = await log_in(alice)
        for waited, left in [(400, 1000), (400, 700), (400, 300)]:
            api.clock.advance(seconds=waited)
            answer = await post(api, "/refresh", cookie=cookie)
            cookie, attributes = cookie_of(answer)
            assert f"Max-Age={left}" in attributes
            assert answer.json()["expires_in"] == min(600, left)
        api.clock.advance(seconds=300)
        assert seen(await post(api, "/refresh", cookie=cookie)) == ENDED


async def test_two_tabs_that_refresh_at_once_stay_logged_in_with_one_cookie(api, alice):
    _, cookie = await log_in(alice)
    answers = await asyncio.gather(*(post(api, "/refresh", cookie=cookie) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({cookie_of(answer)[0] for answer in answers}) == 1


async def over_by_logout(api: Api, alice: Account, cookie: str, token: str) -> None:
    assert (await post(api, "/logout", cookie=cookie)).status_code == 204


async def over_by_revoke(api: Api, alice: Account, cookie: str, token: str) -> None:
    assert (await api.http.post("/revoke", data={"token": token})).status_code == 200


async def over_by_time(api: Api, alice: Account, cookie: str, token: str) -> None:
    api.clock.advance(seconds=FOURTEEN_DAYS)


async def over_by_disabling(api: Api, alice: Account, cookie: str, token: str) -> None:
    async with api.database.connection() as db:
        await db.execute("UPDATE users SET disabled_at = now()")


async def over_by_password_change(api: Api, alice: Account, cookie: str, token: str) -> None:
    api.clock.advance(seconds=1)
    other = (await alice.log_in())["access_token"]
    body = {"current_password": PASSWORD, "new_password": "purple elephants dance at dusk"}
    assert (await api.http.put("/users/me/password", json=body, headers=bearer(other))).status_code == 204


async def over_by_deletion(api: Api, alice: Account, cookie: str, token: str) -> None:
    body = {"current_password": PASSWORD}
    assert (await api.http.request("DELETE", "/users/me", json=body, headers=bearer(token))).status_code == 204


async def over_by_reuse(api: Api, alice: Account, cookie: str, token: str) -> None:
    second, _ = cookie_of(await post(api, "/refresh", cookie=cookie))
    await post(api, "/refresh", cookie=second)


@pytest.mark.parametrize(
    "end",
    [
        over_by_logout,
        over_by_revoke,
        over_by_time,
        over_by_disabling,
        over_by_password_change,
        over_by_deletion,
        over_by_reuse,
    ],
)
async def test_a_session_that_is_over_says_so_and_takes_the_cookie_away(api, alice, end):
    token, cookie = await log_in(alice)
    await end(api, alice, cookie, token)
    for _ in range(2):
        answer = await post(api, "/refresh", cookie=cookie)
        assert seen(answer) == ENDED
        assert is_cleared(answer)
        assert answer.headers["cache-control"] == "no-store"


async def test_a_spent_cookie_ends_the_session_for_thief_and_owner(api, alice):
    """F27"""
    _, first = await log_in(alice)
    second, _ = cookie_of(await post(api, "/refresh", cookie=first))
    answer = await post(api, "/refresh", cookie=second)
    token, third = answer.json()["access_token"], cookie_of(answer)[0]
    assert seen(await post(api, "/refresh", cookie=first)) == ENDED
    assert seen(await post(api, "/refresh", cookie=third)) == ENDED
    assert seen(await api.me(token)) == TOKEN_REVOKED
    assert await api.scalar("SELECT array_agg(reason) FROM revoked_tokens") == ["reuse"]


NO_SESSION = [None, "", "x", "a.b.c", '"quoted"', "é", "%00", "x" * 8000, "a;b", "\\054", '"\\377"']


async def test_without_a_session_there_is_nothing_to_refresh(api):
    for cookie in NO_SESSION:
        answer = await post(api, "/refresh", cookie=cookie)
        assert seen(answer) == ENDED, cookie
        assert is_cleared(answer)


async def test_other_cookies_beside_ours_do_not_matter(api, alice):
    """A browser sends all it has for the host, in one header or in several."""
    _, cookie = await log_in(alice)
    own = f"{COOKIE}={cookie}"
    for lines in [
        [f"a=b; {own}"],
        [f"{own}; a=b"],
        [f"a=b;{own};c=d"],
        ["a=b", own],
        [f"x{COOKIE}=y; {own}; {COOKIE.lower()}=z"],
        [f"; ;=;a;=b; {own}"],
        ["q=" + ";" * 20_000 + own],
    ]:
        api.http.cookies.clear()
        headers = [("Origin", APP), *(("Cookie", line) for line in lines)]
        assert (await api.http.post("/refresh", json={}, headers=headers)).status_code == 200, lines


async def test_two_cookies_of_our_name_count_as_none(api, alice):
    """One of them was planted, and which is not for us to guess; nobody is logged in as somebody else (F32)."""
    _, cookie = await log_in(alice)
    own, planted = f"{COOKIE}={cookie}", f"{COOKIE}=planted"
    for lines in ([f"{own}; {planted}"], [f"{planted}; {own}"], [own, planted], [planted, own], [own, own]):
        api.http.cookies.clear()
        headers = [("Origin", APP), *(("Cookie", line) for line in lines)]
        assert seen(await api.http.post("/refresh", json={}, headers=headers)) == ENDED, lines
    assert (await post(api, "/refresh", cookie=cookie)).status_code == 200


async def test_an_access_token_in_the_cookie_refreshes_nothing(api, alice):
    """RS-6, F18"""
    token, _ = await log_in(alice)
    assert seen(await post(api, "/refresh", cookie=token)) == ENDED


async def test_the_refresh_token_is_taken_from_the_cookie_alone(api, alice):
    """BRW-1: one place, so that a page's script cannot be made to carry it."""
    tokens = await alice.log_in()
    refused = await post(api, "/refresh", {"refresh_token": tokens["refresh_token"]})
    assert (refused.status_code, refused.json()["code"]) == (422, "validation_failed")
    answer = await api.http.post(
        f"/refresh?refresh_token={tokens['refresh_token']}",
        json={},
        headers={"Origin": APP, **bearer(tokens["refresh_token"])},
    )
    assert seen(answer) == ENDED


# Logout


async def test_logging_out_ends_the_session_in_every_way(api, alice):
    token, cookie = await log_in(alice)
    answer = await post(api, "/logout", cookie=cookie)
    assert (answer.status_code, answer.content) == (204, b"")
    assert is_cleared(answer)
    assert answer.headers["clear-site-data"] == '"storage"'
    assert seen(await api.me(token)) == TOKEN_REVOKED
    assert seen(await post(api, "/refresh", cookie=cookie)) == ENDED
    assert (await api.refresh(cookie)).json() == {
        "error": "invalid_grant",
        "error_description": "The session has ended; log in again.",
    }
    sid = claims_of(token)["sid"]
    assert await api.scalar("SELECT jti FROM revoked_tokens WHERE reason = 'logout'") == sid
    assert await api.scalar("SELECT revoked_at FROM sessions") == api.clock()


async def test_logging_out_without_a_session_is_fine_too(api):
    for cookie in NO_SESSION:
        answer = await post(api, "/logout", cookie=cookie)
        assert (answer.status_code, answer.content) == (204, b""), cookie
        assert is_cleared(answer)
    assert await api.scalar("SELECT count(*) FROM revoked_tokens") == 0


async def test_logging_out_twice_answers_the_same(api, alice):
    _, cookie = await log_in(alice)
    answers = [await post(api, "/logout", cookie=cookie) for _ in range(2)]
    varying = {"x-request-id", "set-cookie"}
    first, second = ({n: v for n, v in answer.headers.items() if n not in varying} for answer in answers)
    assert first == second
    assert all(is_cleared(answer) and answer.status_code == 204 for answer in answers)


async def test_the_cookie_of_an_older_generation_logs_out_too(api, alice):
    """Another tab has refreshed since; whoever asks to leave, leaves."""
    _, first = await log_in(alice)
    second, _ = cookie_of(await post(api, "/refresh", cookie=first))
    answer = await post(api, "/refresh", cookie=second)
    token, third = answer.json()["access_token"], cookie_of(answer)[0]
    assert (await post(api, "/logout", cookie=first)).status_code == 204
    assert seen(await api.me(token)) == TOKEN_REVOKED
    assert seen(await post(api, "/refresh", cookie=third)) == ENDED


async def test_logging_out_works_after_the_access_token_has_expired(api, alice):
    """FPS-2"""
    token, cookie = await log_in(alice)
    api.clock.advance(seconds=601)
    headers = {"Origin": APP, "Cookie": f"{COOKIE}={cookie}", **bearer(token)}
    assert (await api.http.post("/logout", json={}, headers=headers)).status_code == 204
    assert seen(await post(api, "/refresh", cookie=cookie)) == ENDED


async def test_logging_out_ends_this_session_and_no_other(api, alice, bob):
    _, cookie = await log_in(alice)
    others = [await log_in(alice), await log_in(bob)]
    assert (await post(api, "/logout", cookie=cookie)).status_code == 204
    for token, own in others:
        assert (await api.me(token)).status_code == 200
        assert (await post(api, "/refresh", cookie=own)).status_code == 200


async def test_a_refresh_that_races_the_logout_leaves_nothing_alive(api, alice):
    _, cookie = await log_in(alice)
    out, *answers = await asyncio.gather(
        post(api, "/logout", cookie=cookie), *(post(api, "/refresh", cookie=cookie) for _ in range(6))
    )
    assert out.status_code == 204
    assert {answer.status_code for answer in answers} <= {200, 401}
    for answer in answers:
        if answer.status_code == 200:
            assert seen(await api.me(answer.json()["access_token"])) == TOKEN_REVOKED
            assert seen(await post(api, "/refresh", cookie=cookie_of(answer)[0])) == ENDED


async def test_a_body_may_be_left_out_where_nothing_belongs_in_it(api, alice):
    _, cookie = await log_in(alice)
    headers = {"Origin": APP, "Content-Type": "application/json", "Cookie": f"{COOKIE}={cookie}"}
    api.http.cookies.clear()
    assert (await api.http.post("/refresh", headers=headers)).status_code == 200
    api.http.cookies.clear()
    assert (await api.http.post("/logout", headers=headers)).status_code == 204


# Who may ask


NOT_JSON_TYPES = [
    None,
    "",
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/x+json",
    "application/problem+json",
    "application/jsonp",
    "application/json-patch+json",
    "text/json",
    "text/plain; application/json",
    "application/json, text/plain",
    "application/json; charset=utf-16",
    "application/json; charset=iso-8859-1",
    "*/*",
    "json",
]


async def test_what_a_form_of_another_site_can_send_is_refused(api, alice):
    """F67, BRW-3: anything but JSON, even from our own page, with the right cookie and the right body."""
    _, cookie = await log_in(alice)
    bodies = {"/login": json.dumps({"username": "alice", "password": PASSWORD}).encode()}
    for media_type in NOT_JSON_TYPES:
        headers = {"Origin": APP, "Cookie": f"{COOKIE}={cookie}"}
        headers |= {"Content-Type": media_type} if media_type is not None else {}
        for path in PATHS:
            api.http.cookies.clear()
            answer = await api.http.post(path, content=bodies.get(path, b"{}"), headers=headers)
            assert seen(answer) == NOT_JSON, media_type
            assert "set-cookie" not in answer.headers
    assert await api.scalar("SELECT count(*) FROM sessions WHERE generation = 0 AND revoked_at IS NULL") == 1


@pytest.mark.parametrize("path", PATHS)
async def test_no_content_type_at_all_is_not_json_either(api, path):
    request = api.http.build_request("POST", path, headers={"Origin": APP})
    assert "content-type" not in request.headers
    assert seen(await api.http.send(request)) == NOT_JSON


@pytest.mark.parametrize(
    "media_type",
    ["application/json", "Application/JSON", "application/json; charset=utf-8", 'application/json;charset="UTF-8"'],
)
async def test_json_is_json_in_every_spelling(api, alice, media_type):
    body = json.dumps({"username": "alice", "password": PASSWORD})
    answer = await api.http.post("/login", content=body, headers={"Origin": APP, "Content-Type": media_type})
    assert answer.status_code == 200


FOREIGN_ORIGINS = [
    [],
    [""],
    ["null"],
    ["*"],
    ["https://evil.example"],
    ["http://app.example.com"],
    ["http://id.example.com"],
    ["https://app.example.com:8443"],
    ["https://app.example.com:443"],
    ["https://app.example.com."],
    ["https://app.example.com/"],
    ["https://app.example.com.evil.example"],
    ["https://app.example.comevil.example"],
    ["https://evilapp.example.com"],
    ["https://evil.app.example.com"],
    ["https://example.com"],
    ["https://app-example.com"],
    ["https://appxexample.com"],
    ["https://app.example.com@evil.example"],
    ["https://evil.example#https://app.example.com"],
    ["https://APP.EXAMPLE.COM"],
    ["https://app.example.com,https://evil.example"],
    ["https://app.example.com https://evil.example"],
    ["app.example.com"],
    ["//app.example.com"],
    ["file://"],
    ["https://app.example.com", "https://evil.example"],
    ["https://evil.example", "https://app.example.com"],
    ["https://app.example.com", "https://app.example.com"],
]


@pytest.mark.parametrize("path", PATHS)
async def test_only_our_own_pages_reach_the_session(api, alice, path):
    """BRW-3, BRW-4, F47: exact scheme, host and port, one header; the cookie, the body and the type are all right."""
    _, cookie = await log_in(alice)
    body = {"username": "alice", "password": PASSWORD} if path == "/login" else {}
    for origins in FOREIGN_ORIGINS:
        api.http.cookies.clear()
        headers = [("Cookie", f"{COOKIE}={cookie}"), *(("Origin", origin) for origin in origins)]
        answer = await api.http.post(path, json=body, headers=headers)
        assert seen(answer) == FOREIGN, origins
        assert "set-cookie" not in answer.headers
        assert "access-control-allow-credentials" not in answer.headers or origins[0] == APP
        if APP not in origins:
            assert "access-control-allow-origin" not in answer.headers, origins
    assert await api.scalar("SELECT count(*) FROM sessions WHERE generation = 0 AND revoked_at IS NULL") == 1


@pytest.mark.parametrize("path", PATHS)
async def test_a_referer_does_not_replace_an_origin(api, path):
    answer = await api.http.post(path, json={}, headers={"Referer": f"{APP}/", "Sec-Fetch-Site": "same-origin"})
    assert seen(answer) == FOREIGN


@pytest.mark.parametrize("origin", [ISSUER, APP])
async def test_our_own_pages_may_send_the_cookie_and_read_the_answer(api, alice, origin):
    for path in PATHS:
        body = {"username": "alice", "password": PASSWORD} if path == "/login" else {}
        answer = await post(api, path, body, origin=origin)
        assert cors_of(answer) == {
            "access-control-allow-origin": origin,
            "access-control-allow-credentials": "true",
            "access-control-expose-headers": "WWW-Authenticate, Retry-After, X-Request-ID",
        }
        assert answer.headers["vary"] == "Origin"


@pytest.mark.parametrize("path", PATHS)
async def test_unknown_members_are_refused(api, alice, path):
    """FPS-1"""
    _, cookie = await log_in(alice)
    known = {"username": "alice", "password": PASSWORD} if path == "/login" else {}
    answer = await post(api, path, {**known, "remember": True}, cookie=cookie)
    assert seen(answer) == problem(
        422,
        "validation_failed",
        "The request has members that are missing or wrong.",
        errors=[{"pointer": "/remember", "detail": "Extra inputs are not permitted"}],
    )
    assert "set-cookie" not in answer.headers
    assert (await post(api, "/refresh", cookie=cookie)).status_code == 200


@pytest.mark.parametrize("path", PATHS)
async def test_nothing_but_a_post_moves_the_session(api, alice, path):
    """BRW-3: no state changes on a GET, and no header or parameter turns one into a POST."""
    _, cookie = await log_in(alice)
    headers = {"Origin": APP, "Cookie": f"{COOKIE}={cookie}", "X-HTTP-Method-Override": "POST"}
    for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
        answer = await api.http.request(method, f"{path}?_method=POST", headers=headers)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST"), method
    assert await api.scalar("SELECT count(*) FROM sessions WHERE generation = 0 AND revoked_at IS NULL") == 1


# CORS of everything


def cors_of(answer: httpx2.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


async def preflight(api: Api, path: str, origin: str | None, method: str = "POST") -> httpx2.Response:
    headers = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": "content-type"}
    return await api.http.options(path, headers=headers | ({"Origin": origin} if origin is not None else {}))


@pytest.mark.parametrize("origin", [ISSUER, APP])
async def test_a_preflight_of_our_own_page_is_told_what_it_may_send(api, origin):
    """BRW-4: cookies only where there is one."""
    told = {
        "access-control-allow-origin": origin,
        "access-control-allow-methods": "GET, HEAD, POST, PUT, PATCH, DELETE",
        "access-control-allow-headers": "Authorization, Content-Type, X-Request-ID, X-Requested-With",
        "access-control-expose-headers": "WWW-Authenticate, Retry-After, X-Request-ID",
        "access-control-max-age": "600",
    }
    without = ["/token", "/revoke", "/users", "/users/me", "/users/me/password", "/", "/login/", "/LOGIN", "/nowhere"]
    for path in PATHS + without:
        answer = await preflight(api, path, origin)
        assert (answer.status_code, answer.content) == (204, b"")
        assert cors_of(answer) == told | ({"access-control-allow-credentials": "true"} if path in PATHS else {}), path
        assert answer.headers["vary"] == "Origin"


async def test_the_authorize_button_of_another_services_docs_passes_its_preflight(api):
    """The headers of Swagger UI's request to `/token`, as Chromium asks for them."""
    asked = "authorization,x-requested-with"
    headers = {"Origin": APP, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": asked}
    answer = await api.http.options("/token", headers=headers)
    told = answer.headers["access-control-allow-headers"].lower().split(", ")
    assert set(asked.split(",")) <= set(told)


async def test_a_preflight_of_anyone_else_is_refused(api):
    for path in ("/login", "/refresh", "/logout", "/token", "/users/me"):
        for origins in FOREIGN_ORIGINS:
            if len(origins) > 1:
                continue
            answer = await preflight(api, path, origins[0] if origins else None)
            assert seen(answer) == FOREIGN
            assert cors_of(answer) == {}, origins
            assert answer.headers["vary"] == "Origin"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/users/me"), ("POST", "/token"), ("POST", "/users"), ("GET", "/health"), ("GET", "/nowhere")],
)
async def test_other_answers_are_readable_without_credentials_and_for_our_pages_only(api, method, path):
    for origin in (ISSUER, APP):
        answer = await api.http.request(method, path, headers={"Origin": origin})
        assert cors_of(answer) == {
            "access-control-allow-origin": origin,
            "access-control-expose-headers": "WWW-Authenticate, Retry-After, X-Request-ID",
        }
        assert answer.headers["vary"] == "Origin"
    for origins in FOREIGN_ORIGINS:
        if APP in origins:
            continue
        answer = await api.http.request(method, path, headers=[("Origin", origin) for origin in origins])
        assert cors_of(answer) == {}, origins
        assert answer.headers["vary"] == "Origin"  # so that no cache serves this answer to our own page


@pytest.mark.parametrize("path", ["/.well-known/jwks.json", "/.well-known/oauth-authorization-server"])
async def test_public_documents_are_readable_by_everyone_without_credentials(api, path):
    """TOK-15"""
    for headers in ({}, {"Origin": "null"}, {"Origin": "https://evil.example"}, {"Origin": APP}):
        for method in ("GET", "HEAD"):
            answer = await api.http.request(method, path, headers=headers)
            assert (answer.status_code, cors_of(answer)) == (200, {"access-control-allow-origin": "*"})


async def test_a_cookie_made_of_another_clients_token_logs_that_client_out_of_nothing(api, alice):
    """REV-2: its session ends at /revoke, for the client that proves itself."""
    backend = await register(api, "backend", grants=["password", "refresh_token"], first_party=True)
    form = {"grant_type": "password", "username": "alice", "password": PASSWORD}
    tokens = (await backend.post("/token", **form)).json()
    assert (await post(api, "/logout", {}, cookie=tokens["refresh_token"])).status_code == 204
    refreshed = await backend.post("/token", grant_type="refresh_token", refresh_token=tokens["refresh_token"])
    assert refreshed.status_code == 200
