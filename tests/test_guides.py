"""What the README and the guides show is run as it stands there, and what their tables say is held against the code."""

import asyncio
import importlib.util
import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import fields
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import httpx2
import jwt
import pytest
from fastapi.testclient import TestClient
from prometheus_client import Counter, Gauge, Histogram

from identity_service import throttling
from identity_service.audit import Event
from identity_service.cli import EXIT_CODES
from identity_service.metrics import Metrics
from identity_service.verifier import TokenRejected, Verifier, VerifierStatus
from identity_service.verifier.rejection import Reason
from identity_service.verifier.testing import TestIssuer
from identity_service.web import oauth, problems
from tests.conftest import PASSWORD, bearer
from tests.services import Service, environment_of, start_service

ROOT = Path(__file__).parents[1]
ISSUER = "https://id.example.com"
README, PROTECT, OTHERS, SERVICES, ERRORS, MONITOR = (
    (ROOT / name).read_text()
    for name in (
        "README.md",
        "docs/guides/protect-a-service.md",
        "docs/guides/verify-in-other-languages.md",
        "docs/guides/service-to-service.md",
        "docs/errors.md",
        "docs/guides/monitor.md",
    )
)
_BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
_FILE_NAME = re.compile(r"# (\w+\.py)\n")
_ROW = re.compile(r"^\| (.+) \|$", re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
    found = [match["code"] for match in _BLOCK.finditer(text) if match["language"] == language]
    assert found, language
    return found


def files(text: str) -> dict[str, str]:
    """Return the Python files of a text: a block starts with its file's name, or goes on with the first file."""
    contents: dict[str, str] = {}
    first = name = ""
    for code in blocks(text, "python"):
        named = _FILE_NAME.match(code)
        name = named[1] if named else first
        first = first or name
        contents[name] = contents.get(name, "") + code
    return contents


def rows(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the table below a heading, without its head."""
    return [[cell.strip() for cell in row.split("|")] for row in _ROW.findall(section(text, heading))][1:]


def section(text: str, heading: str) -> str:
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"guide_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder: Path, contents: dict[str, str], *, issuer: str = ISSUER) -> Path:
    for name, code in contents.items():
        (folder / name).write_text(code.replace(ISSUER, issuer).replace("http://localhost:8000", issuer))
    return folder


# Tests may come to this file twice in one process, when they are shared out between several.
_databases = count()


@pytest.fixture
def orders(tmp_path: Path) -> ModuleType:
    """The application of the guide, with an issuer in memory."""
    return load(write(tmp_path, files(PROTECT)) / "orders.py")


@pytest.fixture(scope="module")
def service(
    migrated: str, new_database: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A real issuer that knows a service called `orders`, and alice."""
    url = new_database(f"guides{next(_databases)}", "pristine")
    environment = environment_of(url, tmp_path_factory.mktemp("guides") / "keys")
    service = start_service(environment | {"IDENTITY_AUDIENCE": "orders api"})
    service.wait_until_ready()
    assert service.post("/users", json={"username": "alice", "password": PASSWORD}).status_code == 201
    yield service
    service.stop()


@pytest.fixture
def real_files(tmp_path: Path, service: Service) -> Path:
    return write(tmp_path, files(PROTECT), issuer=service.environment["IDENTITY_ISSUER_URL"])


def log_in(service: Service) -> dict[str, Any]:
    form = {"grant_type": "password", "username": "alice", "password": PASSWORD}
    tokens: dict[str, Any] = service.post("/token", data=form).json()
    return tokens


# Protect a service


def test_callers_are_told_what_the_table_says(orders: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    issuer = TestIssuer(audience="orders")
    monkeypatch.setattr(orders.auth, "verifier", issuer.verifier())
    client = TestClient(orders.app)
    scope, expired = issuer.token(scope="orders:write"), issuer.token(expired=True)
    two = [("Authorization", f"Bearer {scope}")] * 2
    answers = [
        client.get("/orders"),
        client.get("/orders", headers=bearer(expired)),
        client.post("/orders", headers=bearer(issuer.token())),
        client.delete("/orders", headers=bearer(scope)),
        client.get("/orders", headers=two),
    ]
    monkeypatch.setattr(
        orders.auth, "verifier", issuer.verifier(http=httpx2.MockTransport(lambda _: httpx2.Response(500)))
    )
    away = client.get("/orders", headers=bearer(scope))
    told = [[str(answer.status_code), f"`{answer.headers['www-authenticate']}`"] for answer in answers]
    told.append([str(away.status_code), f"none, but `Retry-After: {away.headers['retry-after']}`"])
    assert [row[1:] for row in rows(PROTECT, "What callers are told")] == told


def test_strangers_get_the_list_prices(orders: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    issuer = TestIssuer()
    monkeypatch.setattr(orders.auth, "verifier", issuer.verifier())
    client = TestClient(orders.app)
    assert client.get("/catalogue").json() == "list prices"
    assert client.get("/catalogue", headers=bearer(issuer.token("alice"))).json() == "prices for alice"
    assert client.get("/catalogue", headers=bearer("nonsense")).status_code == 401


def test_the_status_can_be_returned_from_a_route(orders: ModuleType) -> None:
    shown = TestClient(orders.app).get("/internal/verifier").json()
    assert set(shown) == {field.name for field in fields(VerifierStatus)}
    assert [name for name in shown if f"`{name}`" not in section(PROTECT, "See how it stands")] == []


def test_the_tests_of_the_guide_pass_in_a_project_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, files(PROTECT))
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", str(tmp_path)]
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^4 passed", done.stdout, re.MULTILINE), done.stdout


def test_a_logout_reaches_the_application_of_the_guide(real_files: Path, service: Service) -> None:
    tokens = log_in(service)
    orders = load(real_files / "orders.py")
    with TestClient(orders.app) as client:
        listed = client.get("/orders", headers=bearer(tokens["access_token"]))
        assert listed.json()[0].startswith("an order of 0")
        while not client.get("/internal/verifier").json()["stream_connected"]:
            time.sleep(0.02)
        service.post("/revoke", data={"token": tokens["refresh_token"]})
        end = time.monotonic() + 5
        while (answer := client.get("/orders", headers=bearer(tokens["access_token"]))).status_code == 200:
            assert time.monotonic() < end, "the logout did not arrive"
            time.sleep(0.02)
        assert "The token has been revoked" in answer.headers["www-authenticate"]
        assert client.portal is not None
        client.portal.call(orders.auth.verifier.aclose)


def test_the_script_names_the_caller_and_after_a_logout_the_reason(
    real_files: Path, service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = log_in(service)
    me = service.get("/users/me", headers=bearer(tokens["access_token"])).json()
    monkeypatch.setattr(sys, "argv", ["whoami.py", tokens["access_token"]])
    runpy.run_path(str(real_files / "whoami.py"))
    assert capsys.readouterr().out == f"{me['id']}\n"
    service.post("/revoke", data={"token": tokens["refresh_token"]})
    with pytest.raises(SystemExit, match="refused: revoked"):
        runpy.run_path(str(real_files / "whoami.py"))


def test_a_blocking_program_verifies(real_files: Path, service: Service) -> None:
    blocking = load(real_files / "blocking.py")
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "verifier")
    try:
        assert blocking.verify(log_in(service)["access_token"]).client_id == "first-party"
        with pytest.raises(TokenRejected, match="malformed"):
            blocking.verify("nonsense")
    finally:
        asyncio.run_coroutine_threadsafe(blocking.verifier.aclose(), blocking.loop).result(5)
        blocking.loop.call_soon_threadsafe(blocking.loop.stop)
        thread.join()
        blocking.loop.close()


def test_both_sides_of_the_comparison_are_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (diff,) = blocks(PROTECT, "diff")
    lines = diff.splitlines()
    for name, left_out in (("before", "+"), ("after", "-")):
        (tmp_path / f"{name}.py").write_text("\n".join(line[1:] for line in lines if not line.startswith(left_out)))
    (tmp_path / "users.py").write_text("User = dict\n\ndef find_user(sub):\n    return {'sub': sub}\n")
    monkeypatch.syspath_prepend(tmp_path)
    load(tmp_path / "before.py")
    after = load(tmp_path / "after.py")
    issuer = TestIssuer()
    monkeypatch.setattr(after.auth, "verifier", issuer.verifier())
    assert TestClient(after.app).get("/users/me", headers=bearer(issuer.token("alice"))).json() == {"sub": "alice"}


def test_every_reason_is_explained() -> None:
    explained = [row[0].strip("`") for row in rows(PROTECT, "Why a token is refused")]
    assert sorted(explained) == sorted(get_args(Reason))


def test_every_setting_is_listed_with_its_default() -> None:
    parameters = [p for p in inspect.signature(Verifier).parameters.values() if p.name not in {"http", "now"}]
    shown = [[f"`{p.name}`", "" if p.default is p.empty else f"`{p.default!r}`".replace("'", '"')] for p in parameters]
    assert [row[:2] for row in rows(PROTECT, "Settings")] == shown


def test_every_event_in_the_log_is_named() -> None:
    sources = [path.read_text() for path in (ROOT / "identity_service" / "verifier").glob("*.py")]
    logged = {event for text in sources for event in re.findall(r'log\.\w+\("(verifier\.\w+)', text)}
    assert set(re.findall(r"`(verifier\.\w+)`", section(PROTECT, "See how it stands"))) == logged


# Service to service


def clients(service: Service, *arguments: str) -> Any:
    command = [sys.executable, "-m", "identity_service", "clients", *arguments, "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=service.environment)
    return json.loads(done.stdout)


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    end = time.monotonic() + 5
    while not await holds():
        assert time.monotonic() < end, "it took too long"
        await asyncio.sleep(0.02)


def test_one_service_calls_another_until_its_client_is_disabled(
    tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the commands of the guide; a revocation in between costs one more request, a disabling is the end."""
    made = clients(
        service, "create", "reports", "--grant", "client_credentials", "--scope", "orders:read", "--audience", "orders"
    )
    monkeypatch.setenv("REPORTS_SECRET", made["client_secret"])
    folder = write(tmp_path, files(SERVICES), issuer=service.environment["IDENTITY_ISSUER_URL"])
    reports, orders = load(folder / "reports.py"), load(folder / "orders.py")
    reports.orders._transport = httpx2.ASGITransport(app=orders.app)
    auth = reports.orders.auth

    async def connected() -> bool:
        stream: bool = orders.auth.verifier.status().stream_connected
        return stream

    async def got_another_token(kept: str) -> bool:
        assert await reports.todays_orders() == ["an order, for the service reports"]
        return bool(auth._token != kept)

    async def refused() -> bool:
        try:
            await reports.todays_orders()
        except httpx2.HTTPStatusError as error:
            return (error.response.status_code, error.request.url.path) == (401, "/token")
        return False

    async def call() -> None:
        assert await got_another_token("")
        kept = auth._token
        assert not await got_another_token(kept), "it serves for many calls"
        await eventually(connected)
        form = {"token": kept, "client_id": "reports", "client_secret": made["client_secret"]}
        assert service.post("/revoke", data=form).status_code == 200
        await eventually(lambda: got_another_token(kept))
        await asyncio.to_thread(clients, service, "disable", "reports")
        await eventually(refused)
        await orders.auth.verifier.aclose()

    asyncio.run(call())


# Errors


def stated(heading: str, column: int = 1) -> dict[str, str]:
    """Return the words of a table with what its column says, each word the anchor of its line."""
    found = {}
    for row in rows(ERRORS, heading):
        anchor = re.fullmatch(r'<a id="(?:\w+-)?(\w+)"></a>`(\w+)`', row[0])
        assert anchor is not None, row[0]
        assert anchor[1] == anchor[2]
        found[anchor[2]] = row[column]
    assert len(found) == len(rows(ERRORS, heading))
    return found


def test_every_code_of_a_problem_document_is_explained_with_its_status() -> None:
    told = {code: str(status) for status, code in problems.STATUS.values()}
    assert stated("Problem documents") == told | {code: str(status) for code, status in problems.CODES.items()}


def test_every_code_that_is_refused_by_hand_is_in_the_table() -> None:
    """`BadRequest(404, "not_found", ...)`, the tuples of the edge, and what the framework raises."""
    refusals = re.compile(r'(?<!": )\b(4\d\d|500)(?:: \(|,\s+)"([a-z_]+)"')
    sources = [path.read_text() for path in (ROOT / "identity_service" / "web").glob("*.py")]
    by_hand = {(code, int(status)) for text in sources for status, code in refusals.findall(text)}
    of_errors = {(code, status) for status, code in problems.STATUS.values()}
    assert by_hand - of_errors == set(problems.CODES.items())


def test_every_oauth_error_is_explained_with_its_status() -> None:
    told = {oauth.ERRORS[error]: str(oauth.status_of(error)) for error in oauth.ERRORS}
    assert stated("OAuth endpoints") == told | {"invalid_request": "400"}


def test_every_reason_of_the_verifier_and_of_the_password_policy_is_explained() -> None:
    assert sorted(stated("The verifier")) == sorted(get_args(Reason))
    sources = [path.read_text() for path in (ROOT / "identity_service" / "accounts").glob("*.py")]
    reasons = {reason for source in sources for reason in re.findall(r'PasswordRejected\("(\w+)"', source)}
    assert set(stated("Why a password is refused")) == reasons


def test_every_anchor_is_there_once() -> None:
    anchors = re.findall(r'<a id="([\w-]+)">', ERRORS)
    assert len(anchors) >= 60
    assert len(set(anchors)) == len(anchors)


# Monitor


def test_every_metric_is_listed_with_its_labels() -> None:
    listed = {}
    for names, labels, _ in rows(MONITOR, "Metrics"):
        for name in re.findall(r"`(\w+)`", names):
            listed[name] = set(re.findall(r"`(\w+)`", labels))
    metrics = Metrics()
    there = {
        metric._name + ("_total" if isinstance(metric, Counter) else ""): set(metric._labelnames)
        for metric in vars(metrics).values()
        if isinstance(metric, Counter | Gauge | Histogram)
    }
    there["identity_build_info"] = {"version", "schema"}
    assert listed == there


def test_the_alerts_ask_for_metrics_that_there_are() -> None:
    listed = set(re.findall(r"`(\w+)`", section(MONITOR, "Metrics")))
    asked = re.findall(r"\b(?:identity|http)_\w+", section(MONITOR, "Alerts"))
    assert len(asked) >= 7
    assert {name.removesuffix("_count") for name in asked} <= listed


# Import users


def test_the_users_of_the_guide_are_imported_and_log_in(tmp_path: Path, service: Service) -> None:
    guide = (ROOT / "docs/guides/import-users.md").read_text()
    (lines,) = blocks(guide, "json")
    (tmp_path / "users.jsonl").write_text(lines)
    shown, exported = blocks(guide, "console")
    commands: list[str] = []
    expected: list[str] = []
    for line in (shown + exported).splitlines():
        (commands if line.startswith("$ ") else expected).append(line)
    told = ""
    for typed in commands:
        command = [sys.executable, "-m", "identity_service", *typed.removeprefix("$ identity-service ").split()]
        done = subprocess.run(
            command, check=True, cwd=tmp_path, env=service.environment, stdout=subprocess.PIPE, text=True
        )
        told += done.stdout
    assert told.splitlines() == expected
    exported_names = {json.loads(line)["username"] for line in (tmp_path / "users-out.jsonl").read_text().splitlines()}
    assert exported_names >= {"ada", "ben", "cleo"}
    form = {"grant_type": "password", "username": "ben", "password": PASSWORD}
    assert service.post("/token", data=form).status_code == 200
    assert service.post("/token", data=form | {"username": "cleo"}).status_code == 400


# Other languages, and the README


def test_stock_pyjwt_accepts_access_tokens_only(tmp_path: Path, service: Service) -> None:
    stock = load(write(tmp_path, files(OTHERS), issuer=service.environment["IDENTITY_ISSUER_URL"]) / "stock.py")
    tokens = log_in(service)
    assert stock.verify(tokens["access_token"])["client_id"] == "first-party"
    with pytest.raises(jwt.InvalidTokenError, match="not an access token"):
        stock.verify(tokens["refresh_token"])


def test_the_verifier_beside_nginx_names_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sidecar = load(write(tmp_path, files(OTHERS)) / "sidecar.py")
    issuer = TestIssuer()
    monkeypatch.setattr(sidecar.auth, "verifier", issuer.verifier())
    client = TestClient(sidecar.app)
    answer = client.get("/verify", headers=bearer(issuer.token("alice", scope="a b")))
    assert (answer.status_code, answer.headers["x-caller"], answer.headers["x-caller-scope"]) == (204, "alice", "a b")
    assert client.get("/verify").status_code == 401


def test_the_service_of_the_readme_asks_for_a_token(tmp_path: Path, service: Service) -> None:
    orders = load(write(tmp_path, files(README), issuer=service.environment["IDENTITY_ISSUER_URL"]) / "orders.py")
    with TestClient(orders.app) as client:
        assert client.get("/orders").status_code == 401
        assert client.get("/orders", headers=bearer(log_in(service)["access_token"])).status_code == 200
        assert client.portal is not None
        client.portal.call(orders.auth.verifier.aclose)


@pytest.mark.parametrize(
    "path", ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
)
def test_links_lead_somewhere(path: str) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / path).read_text())
    missing = [
        link for link in links if not link.startswith("http") and not (ROOT / path).parent.joinpath(link).exists()
    ]
    assert missing == []


# The audit


def test_every_event_is_listed() -> None:
    guide = (ROOT / "docs/guides/audit.md").read_text()
    listed = [name for _, names in rows(guide, "Events") for name in re.findall(r"`([\w.]+)`", names)]
    assert sorted(listed) == sorted(Event)


# Administering


def test_every_exit_code_is_explained() -> None:
    guide = (ROOT / "docs/guides/administer.md").read_text()
    assert [int(code) for code, _ in rows(guide, "Exit codes")] == sorted({0, 1, *EXIT_CODES.values()})


def test_what_is_said_of_a_locked_account_is_the_rule() -> None:
    text = section((ROOT / "docs/guides/administer.md").read_text(), "Locked out")
    words = ("Five wrong", "sixth", "one\nsecond", "fifteen minutes", "hundredth on a day")
    assert [word for word in words if word not in text] == []
    rule = throttling.ACCOUNT
    delays = [rule.delay(failures) for failures in (5, 6, 7, 99, 100)]
    assert delays == [timedelta(seconds=seconds) for seconds in (0, 1, 2, 900, 86400)]


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="the guides use curl")


def run_blocks(name: str, service: Service, **variables: str) -> str:
    """Run the shell blocks of a guide as one script, and return what they print."""
    script = "set -eu\n" + "\n".join(blocks((ROOT / "docs" / "guides" / f"{name}.md").read_text(), "sh"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = service.environment | {"PATH": path, "ISSUER": service.url, "PASSWORD": PASSWORD} | variables
    done = subprocess.run(["/bin/sh", "-c", script], check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_curl
def test_an_administrator_does_what_the_guide_says(service: Service) -> None:
    printed = run_blocks("administer", service)
    assert '"event":"user.disabled"' in printed
    assert '"client_secret":"' in printed
    assert service.command("audit", "tail", "--event", "user.password_reset", "--json")


@needs_curl
def test_the_guide_logs_out_everywhere(service: Service) -> None:
    tokens = [log_in(service)["access_token"] for _ in range(2)]
    printed = run_blocks("log-out-everywhere", service, TOKEN=tokens[0])
    assert '"current":true' in printed
    assert printed.endswith("Ended 1 session.\n")
    assert {service.get("/users/me", headers=bearer(token)).status_code for token in tokens} == {401}
