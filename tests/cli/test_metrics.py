"""What a scraper is told: what was counted, by one process and by several, and never on the main port."""

import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from identity_service.web.middleware import SECURITY_HEADERS
from tests.cli.conftest import StartService
from tests.conftest import PASSWORD
from tests.services import Service, free_port, log_in, refresh, sign_up


@pytest.fixture
def bind() -> str:
    return f"127.0.0.1:{free_port()}"


def scrape(bind: str) -> dict[str, float]:
    """Return each series with its value."""
    answer = httpx2.get(f"http://{bind}/metrics", timeout=10)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = (line for line in answer.text.splitlines() if not line.startswith("#"))
    return {series: float(value) for series, _, value in (line.rpartition(" ") for line in lines)}


def use(service: Service) -> None:
    """Log in twice, fail once, refresh, retry, use an old refresh token, and log out."""
    first = sign_up(service)
    second = log_in(service)
    service.post("/token", data={"grant_type": "password", "username": "alice", "password": "a wrong one"})
    successor = refresh(service, first)
    refresh(service, successor)
    refresh(service, successor)
    old = {"grant_type": "refresh_token", "refresh_token": first["refresh_token"]}
    assert service.post("/token", data=old).status_code == 400
    assert service.post("/revoke", data={"token": second["refresh_token"]}).status_code == 200


USED = {
    'identity_logins_total{outcome="success",reason=""}': 2,
    'identity_logins_total{outcome="failure",reason="wrong_password"}': 1,
    'identity_tokens_issued_total{grant="password"}': 2,
    'identity_tokens_issued_total{grant="refresh_token"}': 3,
    'identity_refresh_total{outcome="rotated"}': 2,
    'identity_refresh_total{outcome="retried"}': 1,
    'identity_refresh_total{outcome="reused"}': 1,
    'identity_refresh_total{outcome="ended"}': 0,
    'identity_refusals_total{error="InvalidCredentials"}': 1,
    'identity_refusals_total{error="RefreshTokenReused"}': 1,
    'identity_revocations_total{reason="reuse"}': 1,
    'identity_revocations_total{reason="revoked"}': 1,
    'identity_audit_events_total{event="session.ended",outcome="success"}': 2,
    "identity_password_hash_seconds_count": 4,
    'http_server_request_duration_seconds_count{method="POST",route="/token",status="200"}': 5,
    'http_server_request_duration_seconds_count{method="POST",route="/token",status="400"}': 2,
    'identity_keys{state="active"}': 1,
    'identity_keys{state="standby"}': 1,
}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_one_scrape_tells_what_all_processes_did(serve: StartService, bind: str, workers: str):
    service = serve("--workers", workers, IDENTITY_METRICS_BIND=bind)
    use(service)
    for _ in range(100):  # one worker answers while another is still starting
        seen = scrape(bind)
        if seen.get("identity_db_pool_size") == 20 * int(workers):
            break
        time.sleep(0.1)
    assert {name: seen.get(name) for name in USED} == USED
    assert seen["identity_db_pool_size"] == 20 * int(workers)
    assert 3600 < seen["identity_active_key_age_seconds"] < 4000
    assert [value for name, value in seen.items() if name.startswith("identity_build_info{")] == [1]
    assert service.get("/metrics").status_code == 404
    assert httpx2.get(f"http://{bind}/token", timeout=10).status_code == 404
    refused = {405: ("method_not_allowed", "GET, HEAD"), 404: ("not_found", None)}
    for method, path, status in (
        ("GET", "/metrics", 200),
        ("HEAD", "/metrics", 200),
        ("GET", "/", 404),
        ("POST", "/metrics", 405),
        ("FOO", "/metrics", 405),
    ):
        answer = httpx2.request(method, f"http://{bind}{path}", timeout=10)
        assert answer.status_code == status
        if status in refused:
            assert answer.headers["content-type"] == "application/problem+json"
            assert (answer.json()["code"], answer.headers.get("allow")) == refused[status]
            assert answer.json()["request_id"] == answer.headers["x-request-id"]
        elif method == "HEAD":
            assert answer.content == b""
            assert int(answer.headers["content-length"]) > 1000
        assert answer.headers["x-request-id"]
        assert {name: answer.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
        assert "server" not in answer.headers


def test_what_is_no_request_is_refused_by_the_scraped_address_too(serve: StartService, bind: str):
    serve(IDENTITY_METRICS_BIND=bind)
    host, _, port = bind.rpartition(":")
    for nonsense in (b"\x16\x03\x01\r\n\r\n", b"GET /metrics HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 70_000 + b"\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(nonsense)
            answer = b""
            with suppress(ConnectionError):
                while part := connection.recv(65536):
                    answer += part
        assert answer.startswith(b"HTTP/1.0 400 ")
        assert b'"code": "bad_request"' in answer


def test_nothing_in_a_scrape_names_who_asked(serve: StartService, bind: str):
    """Neither a person nor an address, and nothing that a caller can make up: each would make series without end."""
    service = serve(IDENTITY_METRICS_BIND=bind)
    use(service)
    service.ask("TRACE", "/token")
    service.get("/nowhere/at/all")
    service.get("/status-lists/12345678")
    service.post("/token", data={"grant_type": "made_up", "username": "mallory", "password": PASSWORD})
    text = httpx2.get(f"http://{bind}/metrics", timeout=10).text
    for word in ("alice", "mallory", "127.0.0.1", "first-party", "TRACE", "nowhere", "12345678", "made_up"):
        assert word not in text
    assert 'method="other",route="/token",status="405"' in text
    assert 'method="GET",route="none",status="404"' in text
    assert 'route="/status-lists/{number}",status="404"' in text


def workers_of(service: Service) -> list[int]:
    pid = service.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.skipif(sys.platform != "linux", reason="the children of another process can be asked for on Linux only")
def test_a_worker_that_died_takes_its_levels_along_and_leaves_its_counts(serve: StartService, bind: str):
    service = serve("--workers", "2", IDENTITY_METRICS_BIND=bind)
    use(service)
    before = scrape(bind)
    os.kill(workers_of(service)[0], signal.SIGKILL)
    end = time.monotonic() + 20
    while scrape(bind)["identity_db_pool_size"] != 20:
        assert time.monotonic() < end
        time.sleep(0.05)
    while scrape(bind)["identity_db_pool_size"] != 40:
        assert time.monotonic() < end
        time.sleep(0.05)
    after = scrape(bind)
    assert after['identity_refresh_total{outcome="rotated"}'] == before['identity_refresh_total{outcome="rotated"}']


def test_a_service_that_nobody_asked_for_metrics_listens_once(running: Service):
    assert running.get("/metrics").status_code == 404
    assert "IDENTITY_METRICS_BIND" not in running.environment


def test_the_folder_of_the_workers_is_private_and_goes_with_them(serve: StartService, bind: str, tmp_path):
    service = serve("--workers", "2", IDENTITY_METRICS_BIND=bind, TMPDIR=str(tmp_path))
    (folder,) = tmp_path.glob("identity-metrics-*")
    assert folder.stat().st_mode & 0o777 == 0o700
    service.stop()
    assert not folder.exists()


def test_a_taken_address_for_metrics_is_said_in_one_line(serve: StartService, running: Service):
    taken = running.environment["IDENTITY_BIND"]
    service = serve(ready=False, IDENTITY_METRICS_BIND=taken)
    _, err = service.finish()
    assert service.process.returncode == 2
    assert err.startswith(f"identity-service: {taken} cannot be bound (Address already in use)")
