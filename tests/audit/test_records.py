"""Every change leaves a record in the transaction that made it, and says who, to whom, from where."""

import asyncio
from uuid import UUID

import pytest

from identity_service import audit
from identity_service.accounts import registration
from identity_service.audit import Event, Subject
from identity_service.audit.events import EventFilter, RecordedEvent
from identity_service.database import StatementFailed
from tests.conftest import PASSWORD, TESTER, Api, bearer

AGENT = "curl/8.5 (a test)"


async def recorded(api: Api, **wanted) -> list[RecordedEvent]:
    async with api.database.connection() as db:
        return (await audit.list_events(db, EventFilter(**wanted), limit=100))[::-1]


async def test_a_login_says_who_from_where_with_which_program_and_in_which_request(api, alice):
    answer = await api.http.post(
        "/token",
        data={"grant_type": "password", "username": "alice", "password": PASSWORD},
        headers={"User-Agent": AGENT, "X-Request-ID": "abc-1"},
    )
    assert answer.status_code == 200
    (login,) = await recorded(api, event="user.login")
    assert (login.outcome, login.reason, login.actor_kind, login.actor_id) == ("success", None, "user", alice.id)
    assert (login.subject_kind, login.subject_id, login.client_id) == ("user", alice.id, "first-party")
    assert (login.address, login.user_agent, login.request_id) == ("127.0.0.1", AGENT, "abc-1")
    assert login.session_id == await api.scalar("SELECT id FROM sessions")
    assert login.occurred_at == api.clock()


@pytest.mark.parametrize(
    ("form", "reason", "known"),
    [
        ({"username": "alice", "password": "not the password"}, "wrong_password", True),
        ({"username": "nobody", "password": PASSWORD}, "unknown_user", False),
        ({"username": "alice\u200c", "password": PASSWORD}, "unknown_user", False),
    ],
)
async def test_a_login_that_failed_says_why_and_repeats_nothing_that_was_typed(api, alice, form, reason, known):
    assert (await api.token(grant_type="password", **form)).status_code == 400
    (failed,) = await recorded(api, event="user.login")
    assert (failed.outcome, failed.reason, failed.actor_kind) == ("failure", reason, "anonymous")
    assert failed.subject_id == (alice.id if known else None)
    row = await api.scalar("SELECT to_jsonb(e)::text FROM audit_events AS e WHERE event = 'user.login'")
    assert form["password"] not in row
    assert known or form["username"] not in row


async def test_what_a_user_does_to_the_own_account_is_recorded_with_the_sessions_that_it_ends(api, alice):
    for _ in range(2):
        await alice.log_in()
    token = (await alice.log_in())["access_token"]
    headers = bearer(token)
    assert (await api.http.patch("/users/me", json={"email": "a@example.com"}, headers=headers)).status_code == 200
    other = "owls and wise otters agree"
    wrong = {"current_password": "wrong", "new_password": other}
    assert (await api.http.put("/users/me/password", json=wrong, headers=headers)).status_code == 403
    change = {"current_password": PASSWORD, "new_password": other}
    assert (await api.http.put("/users/me/password", json=change, headers=headers)).status_code == 204
    gone = await api.http.request("DELETE", "/users/me", json={"current_password": other}, headers=headers)
    assert gone.status_code == 204
    events = [(event.event, event.outcome, event.reason, event.actor_kind) for event in await recorded(api)]
    assert events == [
        ("user.created", "success", None, "anonymous"),
        *[("user.login", "success", None, "user")] * 3,
        ("user.updated", "success", None, "user"),
        ("user.password_rejected", "failure", "wrong_password", "user"),
        ("user.password_changed", "success", None, "user"),
        *[("session.ended", "success", "password_changed", "user")] * 2,
        ("session.ended", "success", "deleted", "user"),
        ("user.deleted", "success", None, "user"),
    ]


async def test_a_spent_refresh_token_that_comes_back_is_on_record_although_the_answer_is_a_refusal(api, alice):
    first = (await alice.log_in())["refresh_token"]
    second = (await api.refresh(first)).json()["refresh_token"]
    await api.refresh(second)
    assert (await api.refresh(first)).status_code == 400
    (ended,) = await recorded(api, event="session.ended")
    assert (ended.reason, ended.actor_kind, ended.subject_id) == ("reuse", "anonymous", alice.id)
    assert ended.session_id is not None


async def test_a_refresh_adds_no_row(api, alice):
    """Storage grows with sessions, never with refreshes."""
    token = (await alice.log_in())["refresh_token"]
    before = await api.scalar("SELECT count(*) FROM audit_events")
    for _ in range(3):
        token = (await api.refresh(token)).json()["refresh_token"]
    assert await api.scalar("SELECT count(*) FROM audit_events") == before


async def test_what_was_undone_leaves_no_record(api, alice):
    async def undone(db):
        await registration.disable(db, UUID(alice.id), by=TESTER, now=api.clock())
        raise KeyError

    with pytest.raises(KeyError):
        await api.database.transact(undone)
    assert await recorded(api, event="user.disabled") == []


async def test_events_are_found_by_any_of_their_sides_and_page_by_page(api):
    subject = Subject("user", "someone")

    async def write(db):
        for _ in range(5):
            await audit.record(db, Event.USER_UPDATED, subject, by=TESTER, now=api.clock())
        await audit.record(db, Event.USER_DELETED, None, by=TESTER, now=api.clock(), outcome="failure")

    await api.database.transact(write)
    assert len(await recorded(api, event="user.updated")) == 5
    assert len(await recorded(api, outcome="failure")) == 1
    assert len(await recorded(api, subject_id="someone")) == 5
    assert len(await recorded(api, actor_id="tests")) == 6
    assert await recorded(api, client_id="someone") == []
    assert await recorded(api, until=api.clock()) == []
    assert len(await recorded(api, since=api.clock())) == 6
    async with api.database.connection() as db:
        pages = []
        before = None
        while page := await audit.list_events(db, EventFilter(), before_id=before, limit=4):
            pages.append([event.id for event in page])
            before = page[-1].id
    assert [len(page) for page in pages] == [4, 2]
    assert sum(pages, []) == sorted(sum(pages, []), reverse=True)  # noqa: RUF017 - six numbers


async def test_hostile_text_in_headers_is_kept_as_text(api, alice):
    headers = {"User-Agent": b"\xff\xfe\x1b[31m" + b"x" * 2000, "X-Request-ID": "'; DROP TABLE users; --"}
    await api.http.post(
        "/token", data={"grant_type": "password", "username": "alice", "password": "x"}, headers=headers
    )
    (failed,) = await recorded(api, event="user.login")
    assert failed.user_agent is not None
    assert len(failed.user_agent) == 256
    assert failed.user_agent.isprintable()
    assert failed.request_id is not None
    assert "DROP" not in failed.request_id


@pytest.mark.parametrize("change", ["UPDATE audit_events SET outcome = 'failure'", "DELETE FROM audit_events"])
async def test_the_table_refuses_to_forget(api, alice, change):
    with pytest.raises(StatementFailed, match="append-only"):
        await api.scalar(change)
    assert await api.scalar("SELECT count(*) FROM audit_events") == 1


async def test_fifty_logins_at_once_leave_fifty_records(api, alice):
    await asyncio.gather(*(alice.log_in() for _ in range(50)))
    assert len(await recorded(api, event="user.login")) == 50
