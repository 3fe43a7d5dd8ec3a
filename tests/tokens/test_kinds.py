"""Every kind of token we sign, at every place that takes one: only the cells of the design pass (RS-6, F18)."""

import importlib
import json
import pkgutil
import re
from base64 import urlsafe_b64decode
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import identity_service
from identity_service import tokens
from identity_service.tokens import jws
from tests.conftest import ISSUER, Api, Robot, register

FROM_OUR_PAGE = {"Origin": ISSUER, "Content-Type": "application/json"}


@dataclass
class Login:
    """A session with one good token of every kind, the session's own status list among them."""

    api: Api
    access: str
    refresh: str
    status_list: str
    robot: Robot
    own: str
    """The robot's own token. It is first-party: the token names this service in its audience too."""
    cursor: str

    async def is_alive(self) -> bool:
        return (await self.api.me(self.access)).status_code == 200

    async def generation(self) -> int:
        generation: int = await self.api.scalar("SELECT generation FROM sessions")
        return generation


# Kinds: a row for each


def _resigned(login: Login, typ: str, claims_of: str) -> str:
    """Return one kind's claims under another kind's type, signed with our key: what a slip of ours would make."""
    payload = claims_of.split(".")[1]
    claims = json.loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return jws.sign(login.api.keys.current.signer(login.api.clock()), typ, claims)


KINDS: dict[str, Callable[[Login], str]] = {
    "at+jwt": lambda login: login.access,
    "rt+jwt": lambda login: login.refresh,
    "statuslist+jwt": lambda login: login.status_list,
    "cursor+jwt": lambda login: login.cursor,
}
IMPOSTORS: dict[str, Callable[[Login], str]] = {
    "at+jwt over a refresh token's claims": lambda login: _resigned(login, "at+jwt", login.refresh),
    "rt+jwt over an access token's claims": lambda login: _resigned(login, "rt+jwt", login.access),
    "statuslist+jwt over an access token's claims": lambda login: _resigned(login, "statuslist+jwt", login.access),
    "at+jwt over a cursor's claims": lambda login: _resigned(login, "at+jwt", login.cursor),
    "cursor+jwt over an access token's claims": lambda login: _resigned(login, "cursor+jwt", login.access),
    "JWT over a refresh token's claims": lambda login: _resigned(login, "JWT", login.refresh),
}
A_CLIENTS_OWN: dict[str, Callable[[Login], str]] = {"at+jwt of a client": lambda login: login.own}


# Acceptors: a column for each. They say whether the token did what is done here.


async def as_bearer(login: Login, token: str) -> bool:
    answer = await login.api.me(token)
    assert answer.status_code in (200, 401)
    return answer.status_code == 200


async def as_bearer_of_a_change(login: Login, token: str) -> bool:
    headers = {"Authorization": f"Bearer {token}"}
    answer = await login.api.http.patch("/users/me", json={"email": "alice@example.com"}, headers=headers)
    assert answer.status_code in (200, 401)
    return answer.status_code == 200


async def at_the_token_endpoint(login: Login, token: str) -> bool:
    answer = await login.api.refresh(token)
    assert answer.status_code == 200 or answer.json()["error"] == "invalid_grant"
    assert await login.generation() == (1 if answer.status_code == 200 else 0)
    return answer.status_code == 200


async def in_the_refresh_cookie(login: Login, token: str) -> bool:
    headers = FROM_OUR_PAGE | {"Cookie": f"__Host-identity-refresh={token}"}
    answer = await login.api.http.post("/refresh", content=b"{}", headers=headers)
    assert answer.status_code == 200 or answer.json()["code"] == "session_ended"
    assert await login.generation() == (1 if answer.status_code == 200 else 0)
    return answer.status_code == 200


async def in_the_cookie_at_logout(login: Login, token: str) -> bool:
    headers = FROM_OUR_PAGE | {"Cookie": f"__Host-identity-refresh={token}"}
    assert (await login.api.http.post("/logout", content=b"{}", headers=headers)).status_code == 204
    return not await login.is_alive()


async def at_the_revocation_endpoint(login: Login, token: str) -> bool:
    assert (await login.api.http.post("/revoke", data={"token": token})).status_code == 200
    return not await login.is_alive()


async def at_the_introspection_endpoint(login: Login, token: str) -> bool:
    answer = await login.robot.introspect(token)
    assert answer["active"] or answer == {"active": False}
    active: bool = answer["active"]
    return active


async def as_client_authentication(login: Login, token: str) -> bool:
    form = {"grant_type": "refresh_token", "refresh_token": login.refresh}
    headers = {"Authorization": f"Bearer {token}"}
    answer = await login.api.http.post("/token", data=form, headers=headers)
    assert answer.status_code == 200 or answer.json()["error"] == "invalid_client"
    return answer.status_code == 200


async def as_a_client_secret(login: Login, token: str) -> bool:
    answer = await login.api.refresh(login.refresh, client_id="first-party", client_secret=token)
    assert answer.status_code == 200 or answer.json()["error"] == "invalid_client"
    return answer.status_code == 200


async def as_a_password(login: Login, token: str) -> bool:
    answer = await login.api.token(grant_type="password", username="alice", password=token)
    assert answer.status_code == 200 or answer.json()["error"] == "invalid_grant"
    return answer.status_code == 200


async def as_a_cursor(login: Login, token: str) -> bool:
    headers = {"Authorization": f"Bearer {login.access}"}
    answer = await login.api.http.get("/users/me/sessions", params={"cursor": token}, headers=headers)
    assert answer.status_code == 200 or answer.json()["code"] == "invalid_cursor"
    return answer.status_code == 200


Acceptor = Callable[[Login, str], Awaitable[bool]]
ACCEPTORS: tuple[Acceptor, ...] = (
    as_bearer,
    as_bearer_of_a_change,
    at_the_token_endpoint,
    in_the_refresh_cookie,
    in_the_cookie_at_logout,
    at_the_revocation_endpoint,
    at_the_introspection_endpoint,
    as_client_authentication,
    as_a_client_secret,
    as_a_password,
    as_a_cursor,
)
DESIGNED: dict[str, set[Acceptor]] = {
    "at+jwt": {as_bearer, as_bearer_of_a_change, at_the_revocation_endpoint, at_the_introspection_endpoint},
    "rt+jwt": {
        at_the_token_endpoint,
        in_the_refresh_cookie,
        in_the_cookie_at_logout,
        at_the_revocation_endpoint,
    },
    "statuslist+jwt": set(),
    "cursor+jwt": {as_a_cursor},
}
DESIGNED_FOR_CLIENTS: dict[str, set[Acceptor]] = {"at+jwt of a client": {at_the_introspection_endpoint}}


@pytest.fixture
async def login(api, alice) -> Login:
    tokens = await alice.log_in()
    status_list = (await api.http.get("/status-lists/0")).text
    headers = {"Authorization": f"Bearer {tokens['access_token']}"}
    await alice.log_in()
    page = (await api.http.get("/users/me/sessions", params={"limit": 1}, headers=headers)).json()
    assert await api.scalar("DELETE FROM sessions WHERE id::text <> $1 RETURNING id", page["items"][0]["id"])
    cursor = page["next_cursor"]
    robot = await register(api, "robot", first_party=True)
    own = await robot.access_token()
    return Login(api, tokens["access_token"], tokens["refresh_token"], status_list, robot, own, cursor)


@pytest.mark.parametrize("acceptor", ACCEPTORS)
@pytest.mark.parametrize("kind", [*KINDS, *IMPOSTORS, *A_CLIENTS_OWN])
async def test_a_kind_of_token_passes_only_where_it_belongs(login: Login, kind: str, acceptor: Acceptor):
    """Refused elsewhere without an effect: the session still stands where it stood."""
    token = (KINDS | IMPOSTORS | A_CLIENTS_OWN)[kind](login)
    belongs = acceptor in (DESIGNED | DESIGNED_FOR_CLIENTS).get(kind, set())
    assert await acceptor(login, token) == belongs
    if not belongs:
        assert await login.is_alive()
        assert await login.generation() == 0
        assert (await login.api.refresh(login.refresh)).status_code == 200


# No kind without a row


def declared_kinds() -> set[str]:
    """The `TYP` of every module that has one."""
    names = (module.name for module in pkgutil.walk_packages(identity_service.__path__, "identity_service."))
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    return {module.TYP for module in modules if hasattr(module, "TYP")}


def written_kinds() -> set[str]:
    """Every type that stands in our source between quotes, in case somebody signs without declaring."""
    sources = Path(identity_service.__path__[0]).rglob("*.py")
    pattern = re.compile(r"""["'](?:application/)?([a-z-]+\+jwt)["']""")
    return {kind for source in sources for kind in pattern.findall(source.read_text())}


@pytest.mark.parametrize("found", [declared_kinds, written_kinds])
def test_every_kind_we_sign_has_a_row_and_a_design(found: Callable[[], set[str]]):
    assert found() == KINDS.keys() == DESIGNED.keys()


def test_every_module_of_tokens_but_the_envelope_and_its_signing_is_a_kind():
    modules: dict[str, Any] = {
        module.name: importlib.import_module(f"identity_service.tokens.{module.name}")
        for module in pkgutil.iter_modules(tokens.__path__)
    }
    assert {name for name, module in modules.items() if not hasattr(module, "TYP")} == {"jws", "rounds"}


async def test_tokens_name_their_kind_in_the_header(login: Login):
    """The rows are what is really handed out."""
    for kind, present in KINDS.items():
        header = present(login).split(".")[0]
        assert json.loads(urlsafe_b64decode(header + "=="))["typ"] == kind
