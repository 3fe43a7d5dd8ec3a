"""The todo API: who may read, who may write, and how soon a logout arrives."""

import json
import time
from base64 import urlsafe_b64decode
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest

from identity_service.accounts import registration, roles
from identity_service.database import Connection
from identity_service.signing.key_files import KeyFolder
from identity_service.signing.keyring import TokenLifetimes
from identity_service.tokens import jws
from tests.conftest import TESTER, bearer
from tests.examples.conftest import Beside, StartExample


@pytest.fixture(scope="module")
def todos(start_example: StartExample) -> Beside:
    """Emma is an editor, Rita may read, Nora has no role."""
    todos = start_example("todos")
    for username in ("emma", "rita", "nora"):
        todos.sign_up(username)

    async def prepare(db: Connection) -> None:
        now = datetime.now(UTC)
        for username, role in (("emma", "editor"), ("rita", "reader")):
            await roles.create(db, role, scope="todos:read", by=TESTER, now=now)
            user = await registration.find_named(db, username)
            await roles.grant(db, user.id, role, end_sessions=False, by=TESTER, now=now)

    todos.change(prepare)
    return todos


def ask(
    todos: Beside, token: str | None = None, method: str = "GET", path: str = "/todos/", **more: Any
) -> httpx2.Response:
    headers = bearer(token) if token is not None else {}
    answer: httpx2.Response = httpx2.request(method, todos.url + path, headers=headers, timeout=10, **more)
    return answer


def add(todos: Beside, token: str | None, title: str = "Water the plants") -> httpx2.Response:
    return ask(todos, token, "POST", json={"title": title})


def test_without_a_token_there_is_a_bare_challenge(todos):
    for answer in (ask(todos), add(todos, None), ask(todos, None, "DELETE", "/todos/1")):
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="api"')


def test_a_token_without_the_scope_reads_nothing_and_hears_which_one_it_lacks(todos):
    answer = ask(todos, todos.log_in("nora")["access_token"])
    assert answer.status_code == 403
    challenge = answer.headers["www-authenticate"]
    assert 'error="insufficient_scope"' in challenge
    assert 'scope="todos:read"' in challenge


def test_a_scope_that_was_not_asked_for_is_not_had(todos):
    """Rita's role gives the scope, her login asked for another one."""
    assert ask(todos, todos.log_in("rita")["access_token"]).status_code == 200
    assert ask(todos, todos.log_in("rita", scope="todos:write")["access_token"]).status_code == 403


def test_an_editor_writes_reads_finishes_and_deletes(todos):
    token = todos.log_in("emma")["access_token"]
    added = add(todos, token)
    todo = added.json()
    assert (added.status_code, todo) == (201, {"id": todo["id"], "title": "Water the plants", "done": False})
    assert ask(todos, token).json() == [todo]
    path = f"/todos/{todo['id']}"
    assert ask(todos, token, "PUT", f"{path}/done").json() == todo | {"done": True}
    assert ask(todos, token, "DELETE", path).status_code == 204
    assert ask(todos, token, "DELETE", path).status_code == 404
    assert ask(todos, token).json() == []


def test_a_reader_cannot_write(todos):
    token = todos.log_in("rita")["access_token"]
    for answer in (add(todos, token), ask(todos, token, "DELETE", "/todos/1")):
        assert answer.status_code == 403
        assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]
    assert ask(todos, token).json() == []


def test_nobody_sees_or_touches_the_list_of_another(todos):
    emma, rita = todos.log_in("emma")["access_token"], todos.log_in("rita")["access_token"]
    todo = add(todos, emma).json()
    assert ask(todos, rita).json() == []
    todos.change(lambda db: db.execute("UPDATE users SET roles = '{reader,editor}' WHERE username = 'rita'"))
    rita = todos.log_in("rita")["access_token"]
    assert ask(todos, rita, "DELETE", f"/todos/{todo['id']}").status_code == 404
    todos.change(lambda db: db.execute("UPDATE users SET roles = '{reader}' WHERE username = 'rita'"))
    assert ask(todos, emma, "DELETE", f"/todos/{todo['id']}").status_code == 204


@pytest.mark.parametrize("title", ["", "x" * 201])
def test_a_title_that_is_too_long_or_empty_is_refused(todos, title):
    assert add(todos, todos.log_in("emma")["access_token"], title).status_code == 422


def test_a_list_does_not_grow_for_ever(todos):
    token = todos.log_in("emma")["access_token"]
    with httpx2.Client(base_url=todos.url, headers=bearer(token), timeout=10) as http:
        statuses = [http.post("/todos/", json={"title": str(n)}).status_code for n in range(101)]
        for todo in http.get("/todos/").json():
            http.delete(f"/todos/{todo['id']}")
    assert statuses == [201] * 100 + [409]


def test_a_token_for_another_audience_is_refused(todos):
    """RS-7: signed by the same issuer with the same key."""
    payload = todos.log_in("emma")["access_token"].split(".")[1]
    claims = json.loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    folder = KeyFolder(
        Path(todos.service.environment["IDENTITY_KEYS_DIR"]), TokenLifetimes(timedelta(minutes=10), timedelta(days=14))
    )
    key = folder.read().signer(datetime.now(UTC))
    assert ask(todos, jws.sign(key, "at+jwt", claims)).status_code == 200
    for audience in ("billing", ["billing", claims["iss"]]):
        answer = ask(todos, jws.sign(key, "at+jwt", claims | {"aud": audience}))
        assert answer.status_code == 401
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]


def test_a_refresh_token_is_no_access_token(todos):
    assert ask(todos, todos.log_in("emma")["refresh_token"]).status_code == 401


def test_after_a_logout_the_token_is_refused_within_seconds(todos):
    tokens, other = todos.log_in("emma"), todos.log_in("emma")
    for each in (tokens, other):
        assert ask(todos, each["access_token"]).status_code == 200
    todos.log_out(tokens)
    deadline = time.monotonic() + 10
    while ask(todos, tokens["access_token"]).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    answer = ask(todos, tokens["access_token"])
    assert answer.status_code == 401
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]
    assert ask(todos, other["access_token"]).status_code == 200
