"""The breach check against a real server of its own: what leaves, what counts, and that nothing depends on it."""

import asyncio
import hashlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest

from identity_service.accounts.breaches import MAX_LENGTH, BreachCheck
from identity_service.errors import PasswordRejected
from tests.conftest import PASSWORD, StartApi, bearer

KNOWN = "a wise man once sang badly"
UNKNOWN = "purple elephants dance at dusk"

Answer = Callable[[BaseHTTPRequestHandler], None]


def digest(password: str) -> str:
    return hashlib.sha1(password.encode(), usedforsecurity=False).hexdigest().upper()


def lines(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def knows(handler: BaseHTTPRequestHandler, count: str = "7") -> None:
    others = "".join(f"{number:035X}:3\r\n" for number in range(800))
    lines(handler, f"{others}{digest(KNOWN)[5:]}:{count}\r\n{'F' * 35}:0".encode())


@dataclass
class RangeApi:
    """Somebody who knows one password."""

    url: str = ""
    answer: Answer = knows
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)


@contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[RangeApi]:
    made = RangeApi()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            try:
                made.answer(self)
            except OSError:  # nobody waits for the rest
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    made.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_port}/range"
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def api_of_ranges() -> Iterator[RangeApi]:
    with serving() as made:
        yield made


async def refused(check: BreachCheck, password: str = KNOWN) -> bool:
    try:
        await check.refuse_breached(password)
    except PasswordRejected as error:
        return error.reason == "breached"
    return False


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """For answers that must come: a busy machine may take its second elsewhere."""
    monkeypatch.setattr("identity_service.accounts.breaches.TIMEOUT_SECONDS", 20.0)


async def test_a_known_password_is_refused_and_another_is_not(api_of_ranges, patience):
    check = BreachCheck(api_of_ranges.url + "/")
    assert await refused(check)
    assert not await refused(check, UNKNOWN)


async def test_only_five_digits_leave(api_of_ranges, patience):
    await refused(BreachCheck(api_of_ranges.url))
    ((path, headers),) = api_of_ranges.asked
    assert path == f"/range/{digest(KNOWN)[:5]}"
    assert headers["add-padding"] == "true"
    assert digest(KNOWN)[5:12] not in str(headers).upper()


async def test_padding_is_no_knowledge(api_of_ranges, patience):
    api_of_ranges.answer = lambda handler: knows(handler, count="0")
    assert not await refused(BreachCheck(api_of_ranges.url))


def slow(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(6)
    knows(handler)


def dripping(handler: BaseHTTPRequestHandler) -> None:
    """Each byte comes in time, the whole does not."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(60):
        handler.wfile.write(b"0")
        handler.wfile.flush()
        time.sleep(0.1)


def huge(handler: BaseHTTPRequestHandler) -> None:
    lines(handler, f"{digest(KNOWN)[5:]}:7\r\n".encode() * (MAX_LENGTH // 39 + 1))


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x" * 65536)


def elsewhere(handler: BaseHTTPRequestHandler) -> None:
    if handler.path.startswith("/elsewhere"):
        knows(handler)
    else:
        lines(handler, b"", 302, Location="/elsewhere")


def gone(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.close()


def no_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x00\x01\x02\r\n\r\n")


FAILURES: dict[str, Answer] = {
    "slow": slow,
    "dripping": dripping,
    "huge": huge,
    "endless": endless,
    "elsewhere": elsewhere,
    "gone": gone,
    "empty": lambda handler: lines(handler, b""),
    "a page": lambda handler: lines(handler, b"<html>" + digest(KNOWN).encode()),
    "garbage": lambda handler: lines(handler, bytes(range(256)) * 100),
    "an error": lambda handler: lines(handler, f"{digest(KNOWN)[5:]}:7".encode(), 503),
    "compressed": lambda handler: lines(handler, f"{digest(KNOWN)[5:]}:7".encode(), Content_Encoding="gzip"),
    "no HTTP": no_http,
}


@pytest.mark.parametrize("name", FAILURES)
async def test_no_usable_answer_within_a_second_is_no_reason_to_refuse(api_of_ranges, caplog, name):
    api_of_ranges.answer = FAILURES[name]
    check = BreachCheck(api_of_ranges.url)
    caplog.set_level("INFO", logger="identity_service")
    started = time.perf_counter()
    assert not await refused(check)
    assert time.perf_counter() - started < 4
    (record,) = [record for record in caplog.records if record.name.startswith("identity_service")]
    assert (record.levelname, record.message) == ("INFO", "passwords.breach_check_failed")
    assert digest(KNOWN)[:5] not in str(vars(record)), "the log must not say what was asked for"
    assert len(api_of_ranges.asked) == 1


async def test_nobody_there_is_no_reason_to_refuse(api_of_ranges):
    assert not await refused(BreachCheck("http://127.0.0.1:1/range"))
    assert not await refused(BreachCheck("https://nowhere.invalid/range"))


async def test_whoever_nobody_vouches_for_is_not_asked(impostor, patience):
    """Neither may they learn what is asked for, nor say which passwords can be used here."""
    with serving(impostor) as made:
        assert not await refused(BreachCheck(made.url))
    assert made.asked == []


async def test_a_password_is_asked_about_when_it_is_set_and_never_when_it_is_proved(
    start_api: StartApi, api_of_ranges, patience
):
    async with start_api(breach_check_url=api_of_ranges.url) as api:
        answer = await api.http.post("/users", json={"username": "bob", "password": KNOWN})
        assert (answer.status_code, answer.json()["code"], answer.json()["reason"]) == (
            422,
            "password_rejected",
            "breached",
        )
        alice = await api.sign_up()
        asked = len(api_of_ranges.asked)
        token = (await alice.log_in())["access_token"]
        await api.token(grant_type="password", username="alice", password=KNOWN)
        assert len(api_of_ranges.asked) == asked

        async def change(new: str) -> httpx2.Response:
            body = {"current_password": PASSWORD, "new_password": new}
            return await api.http.put("/users/me/password", json=body, headers=bearer(token))

        assert (await change(KNOWN)).json()["reason"] == "breached"
        assert (await change(UNKNOWN)).status_code == 204
        assert len(api_of_ranges.asked) == asked + 2


async def test_what_is_refused_without_a_network_is_not_asked_about(start_api: StartApi, api_of_ranges):
    async with start_api(breach_check_url=api_of_ranges.url) as api:
        for password in ("short", "passwordpassword", "x" * 300):
            assert (await api.http.post("/users", json={"username": "bob", "password": password})).status_code == 422
    assert api_of_ranges.asked == []


async def test_a_flood_of_sign_ups_is_not_a_flood_over_there(api_of_ranges, monkeypatch):
    monkeypatch.setattr("identity_service.accounts.breaches.MOST_AT_ONCE", 1)
    api_of_ranges.answer = slow
    check = BreachCheck(api_of_ranges.url)
    assert not any(await asyncio.gather(*(refused(check) for _ in range(20))))
    assert len(api_of_ranges.asked) <= 2
