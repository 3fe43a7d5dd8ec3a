"""What the speed of the hot paths rests on, by structure and not by time: `make bench` measures the time."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Coroutine
from contextlib import suppress
from contextvars import ContextVar, copy_context
from itertools import product
from typing import Any
from uuid import uuid4

import argon2
import pytest
from fastapi import Request, Response

from identity_service.accounts.argon2id import Argon2id
from identity_service.errors import HashingOverloaded, KeysUnavailable
from identity_service.sessions import store
from identity_service.shell import utc_now
from identity_service.signing import key_files
from identity_service.web.direct import DirectRoute, direct_routes
from identity_service.web.problems import MEDIA_TYPE, refusals
from tests.conftest import Api, StartApi

_WORKING: ContextVar[bool] = ContextVar("working", default=False)
"""Also in the tasks that the work makes, and in the callback of asyncpg, which runs in no task."""


async def statements_of(api: Api, work: Coroutine[Any, Any, Any]) -> list[str]:
    """Return what the work asked the database, beside the housekeeping, which goes on. The pool has one connection."""
    asked: list[str] = []

    def note(record: Any) -> None:
        if _WORKING.get():
            asked.append(record.query)

    async with api.database.connection() as db:
        db.add_query_logger(note)
    context = copy_context()
    context.run(_WORKING.set, True)
    await asyncio.create_task(work, context=context)
    async with api.database.connection() as db:
        db.remove_query_logger(note)
    return asked


async def test_a_refresh_asks_the_database_once(start_api: StartApi):
    """P8: one statement, which is its own transaction."""
    async with start_api(database_pool_size=1) as api:
        tokens = await (await api.sign_up("alice")).log_in()
        await api.refresh(tokens["refresh_token"])  # what follows is not the first
        tokens = await (await api.sign_up("bob", "wise old owls never sleep")).log_in()
        asked = await statements_of(api, api.refresh(tokens["refresh_token"]))
    assert len(asked) == 1
    assert "UPDATE sessions" in asked[0]


async def test_a_login_asks_the_database_twice(start_api: StartApi):
    """Before the password is hashed and after it. Each is one statement, which is its own transaction."""
    async with start_api(database_pool_size=1) as api:
        alice = await api.sign_up("alice")
        await alice.log_in()  # what follows is not the first
        asked = await statements_of(api, alice.log_in())
    before, after = asked
    assert "password_hash" in before
    assert "throttles" in before
    for part in ("throttles", "INSERT INTO sessions", "INSERT INTO audit_events"):
        assert part in after


async def test_a_login_that_finds_no_room_to_be_hashed_asks_the_database_nothing(start_api: StartApi, monkeypatch):
    """A flood whose clients ask again at once costs the event loop no more than it has to."""
    gate = threading.Event()
    async with start_api(database_pool_size=1) as api:
        monkeypatch.setattr(Argon2id, "hash", lambda *_: str(gate.wait(20)))
        waiting = []
        with suppress(HashingOverloaded):
            while True:
                waiting.append(asyncio.create_task(api.runtime.passwords.hash("a password")))
                await asyncio.sleep(0)
                api.runtime.passwords.refuse_when_full()

        async def log_in() -> None:
            answer = await api.token(grant_type="password", username="alice", password="any password")
            assert answer.status_code == 503

        asked = await statements_of(api, log_in())
        gate.set()
        await asyncio.gather(*waiting)
    assert asked == []


async def test_refreshes_that_come_together_ask_the_database_together(start_api: StartApi):
    """The first goes at once, all others with the next."""
    async with start_api(database_pool_size=1) as api:
        alice = await api.sign_up("alice")
        sessions = [await alice.log_in() for _ in range(20)]

        async def refresh_all() -> None:
            answers = await asyncio.gather(*(api.refresh(tokens["refresh_token"]) for tokens in sessions))
            assert {answer.status_code for answer in answers} == {200}

        asked = await statements_of(api, refresh_all())
    assert 1 <= len(asked) <= 4


async def test_refreshes_that_share_a_statement_look_each_session_up_once(api):
    """P9: it is locked first, and then found by its place."""
    values = ([uuid4()], [uuid4()], ["first-party"], [0], *([utc_now()] for _ in range(3)))
    async with api.database.connection() as db, db.transaction():
        for better_for_a_table_of_no_size in ("seqscan", "hashjoin", "mergejoin"):
            await db.execute(f"SET LOCAL enable_{better_for_a_table_of_no_size} = off")
        plan = "\n".join(row[0] for row in await db.fetch(f"EXPLAIN {store.CLAIM_GENERATIONS}", *values))
    assert plan.count("sessions_pkey") == 1, plan
    assert "Tid Scan on sessions" in plan


async def test_no_key_is_read_or_parsed_after_the_start(api, alice, monkeypatch):
    """Parsing an RSA key takes a hundred times as long as signing with it."""
    keys = api.keys.current
    for name in ("load_pem_private_key", "RSAPublicNumbers"):
        monkeypatch.setattr(key_files, name, None)
    tokens = await alice.log_in()
    for _ in range(3):
        tokens = (await api.refresh(tokens["refresh_token"])).json()
    assert (await api.me(tokens["access_token"])).status_code == 200
    assert api.keys.current is keys


async def test_no_password_is_hashed_on_the_event_loop(api, monkeypatch):
    hashed_in: list[int] = []
    for kind, name in product((argon2.PasswordHasher, Argon2id), ("hash", "verify")):
        real = getattr(kind, name)

        def noting(*arguments: Any, real: Any = real, **more: Any) -> Any:
            hashed_in.append(threading.get_ident())
            return real(*arguments, **more)

        monkeypatch.setattr(kind, name, noting)
    alice = await api.sign_up("alice")
    await alice.log_in()
    await api.token(grant_type="password", username="alice", password="wrong")
    await api.token(grant_type="password", username="nobody", password="wrong")
    assert len(hashed_in) >= 4
    assert threading.get_ident() not in hashed_in


async def test_the_routes_that_must_be_fast_are_called_directly(api):
    direct = direct_routes(api.app.routes)
    assert {("POST", "/token"), ("GET", "/.well-known/jwks.json")} <= direct.keys()


async def test_a_direct_route_answers_as_the_framework_would(api, alice):
    """Refusals come by the same way, and what is not its method or its path is the framework's business."""
    assert (await api.token(grant_type="nonsense")).json()["error"] == "unsupported_grant_type"
    assert (await api.http.get("/token")).status_code == 405
    assert (await api.http.post("/token/", data={})).status_code == 404
    assert (await api.http.head("/.well-known/jwks.json")).content == b""
    described = (await api.http.get("/openapi.json")).json()["paths"]
    assert "post" in described["/token"]


@pytest.mark.parametrize("wrong", ["more than the request", "a parameter in its path"])
def test_an_endpoint_that_needs_the_framework_is_no_direct_route(wrong):
    async def more(request: Any, body: Any) -> None: ...

    async def fitting(request: Any) -> None: ...

    endpoint: Any = more if "more" in wrong else fitting
    with pytest.raises(TypeError):
        DirectRoute("/{name}" if "path" in wrong else "/", endpoint, response_model=None)


async def test_what_goes_wrong_in_a_direct_route_is_a_problem_document(api):
    """A refusal with its code; what nobody expected without a word about itself."""

    async def refuse(request: Request) -> Response:
        raise KeysUnavailable

    async def fail(request: Request) -> Response:
        raise RuntimeError("secret")

    edge = api.app.middleware_stack
    edge._direct = dict(edge._direct) | {
        ("GET", "/refuse"): DirectRoute("/refuse", refuse, response_model=None),
        ("GET", "/fail"): DirectRoute("/fail", fail, response_model=None),
    }
    refused, failed = await api.http.get("/refuse"), await api.http.get("/fail")
    assert (refused.status_code, refused.json()["code"]) == (503, "temporarily_unavailable")
    assert (failed.status_code, failed.json()["code"]) == (500, "internal_error")
    assert "secret" not in failed.text


def test_a_serving_process_loads_nothing_that_only_others_need():
    """P17: the verifier's libraries, those of migrations and of dictionaries stay out until somebody needs them."""
    needless = ("jwt", "httpx2", "alembic", "sqlalchemy", "zxcvbn", "fastapi_offline", "rich", "cryptography.x509")
    script = (
        "import sys; from identity_service.cli import assemble; assemble('serve'); import identity_service.app;"
        f"print([name for name in {needless} if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout == "[]\n"


async def test_what_describes_a_refusal_is_there_once(api):
    """P17: a copy for each route was more than a mebibyte. None of those who share it has changed it."""
    told = [
        answer
        for route in api.app.routes
        for answer in getattr(route, "responses", {}).values()
        if MEDIA_TYPE in answer.get("content", {}) and len(answer["content"]) == 1
    ]
    assert len(told) > 100
    assert len({id(answer) for answer in told}) == len({answer["description"] for answer in told})
    assert refusals()[400]["content"].keys() == {MEDIA_TYPE}
