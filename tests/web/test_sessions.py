"""Where a person is logged in, and logging out there (SES-1, F64)."""

from typing import Any

import pytest

from tests.conftest import Account, Api, bearer
from tests.web.answers import problem, seen
from tests.web.test_admin import session_of

NOT_FOUND = problem(404, "session_not_found", "There is no such session.")


async def listed(api: Api, token: str, **parameters: Any) -> Any:
    answer = await api.http.get("/users/me/sessions", headers=bearer(token), params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def log_in(account: Account, user_agent: str) -> dict[str, Any]:
    api = account.api
    form = {"grant_type": "password", "username": account.username, "password": account.password}
    tokens: dict[str, Any] = (await api.http.post("/token", data=form, headers={"User-Agent": user_agent})).json()
    return tokens


async def test_a_session_says_where_it_began_and_when_it_was_used(api, alice):
    tokens = await log_in(alice, "Firefox\t<script>")
    api.clock.advance(seconds=60)
    tokens = (await api.refresh(tokens["refresh_token"])).json()
    api.clock.advance(seconds=60)
    assert await listed(api, tokens["access_token"]) == {
        "items": [
            {
                "id": session_of(tokens["access_token"]),
                "current": True,
                "client_id": "first-party",
                "user_agent": "Firefox?<script>",
                "address": "127.0.0.1",
                "created_at": "2026-11-22T12:00:00Z",
                "last_used_at": "2026-11-22T12:01:00Z",
                "expires_at": "2026-12-22T12:00:00Z",
            }
        ],
        "next_cursor": None,
    }


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 200])
async def test_this_session_comes_first_then_those_used_last(api, alice, bob, limit):
    mine = await log_in(alice, "mine")
    others = {}
    for name in ("first", "second", "third"):
        api.clock.advance(seconds=1)
        others[name] = await log_in(alice, name)
    api.clock.advance(seconds=1)
    await api.refresh(others["first"]["refresh_token"])
    await bob.log_in()
    names: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = await listed(api, mine["access_token"], limit=limit, **cursor)
        names += [session["user_agent"] for session in page["items"]]
        assert len(page["items"]) <= limit
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert names == ["mine", "first", "third", "second"]


async def test_sessions_of_the_same_moment_are_each_shown_once(api, alice):
    for _ in range(5):
        tokens = await alice.log_in()
    ids: list[str] = []
    cursor: dict[str, str] = {}
    for _ in range(5):
        page = await listed(api, tokens["access_token"], limit=1, **cursor)
        ids += [session["id"] for session in page["items"]]
        cursor = {"cursor": page["next_cursor"]}
    assert page["next_cursor"] is None
    assert len(set(ids)) == 5


async def test_what_is_over_is_not_listed(api, alice):
    ended, idle, left = [await log_in(alice, name) for name in ("ended", "idle", "left")]
    await api.http.post("/revoke", data={"token": ended["refresh_token"]})
    for _ in range(2):
        api.clock.advance(days=13)
        left = (await api.refresh(left["refresh_token"])).json()
    names = [session["user_agent"] for session in (await listed(api, left["access_token"]))["items"]]
    assert names == ["left"]
    assert idle["refresh_token"]
    api.clock.advance(days=4)
    late = (await log_in(alice, "late"))["access_token"]
    assert [session["user_agent"] for session in (await listed(api, late))["items"]] == ["late"]


async def test_looking_at_the_sessions_writes_nothing(api, alice):
    """The last use is what a refresh writes anyway."""
    token = (await alice.log_in())["access_token"]
    rows = "SELECT array_agg(t::text || xmin::text) FROM sessions AS t"
    before = await api.scalar(rows)
    await listed(api, token)
    assert await api.scalar(rows) == before


async def test_one_session_is_ended_and_the_others_go_on(api, alice):
    mine, lost = await alice.log_in(), await alice.log_in()
    place = f"/users/me/sessions/{session_of(lost['access_token'])}"
    assert (await api.http.delete(place, headers=bearer(mine["access_token"]))).status_code == 204
    assert (await api.me(lost["access_token"])).status_code == 401
    assert (await api.refresh(lost["refresh_token"])).json()["error"] == "invalid_grant"
    assert (await api.me(mine["access_token"])).status_code == 200
    assert seen(await api.http.delete(place, headers=bearer(mine["access_token"]))) == NOT_FOUND
    assert await api.scalar("SELECT reason FROM revoked_tokens") == "revoked"


async def test_ending_the_current_session_logs_out(api, alice):
    token = (await alice.log_in())["access_token"]
    answer = await api.http.delete(f"/users/me/sessions/{session_of(token)}", headers=bearer(token))
    assert answer.status_code == 204
    assert (await api.me(token)).status_code == 401


async def test_all_other_sessions_are_ended_and_this_one_goes_on(api, alice, bob):
    mine = await alice.log_in()
    others = [await alice.log_in() for _ in range(3)]
    bobs = await bob.log_in()
    for _ in range(2):
        assert (await api.http.delete("/users/me/sessions", headers=bearer(mine["access_token"]))).status_code == 204
    assert {(await api.me(tokens["access_token"])).status_code for tokens in others} == {401}
    assert {(await api.refresh(tokens["refresh_token"])).status_code for tokens in others} == {400}
    for tokens in (mine, bobs):
        assert (await api.refresh(tokens["refresh_token"])).status_code == 200
    assert len((await listed(api, mine["access_token"]))["items"]) == 1


async def test_the_session_of_somebody_else_is_one_that_is_not_there(api, alice, bob):
    """F64: the same answer as for an id that nobody has."""
    mine, bobs = await alice.log_in(), await bob.log_in()
    place = f"/users/me/sessions/{session_of(bobs['access_token'])}"
    assert seen(await api.http.delete(place, headers=bearer(mine["access_token"]))) == NOT_FOUND
    assert (await api.me(bobs["access_token"])).status_code == 200
    assert session_of(bobs["access_token"]) not in str(await listed(api, mine["access_token"]))
