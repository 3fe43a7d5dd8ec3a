"""The whole tour over HTTP: sign up, log in, verify with stock PyJWT, refresh, retry, log out, and be refused.

`make demo` runs it against the service at IDENTITY_ISSUER_URL (http://localhost:8000). When nobody answers there, it
starts a service of its own with a database and keys in a temporary folder, and stops it at the end.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import jwt

USERNAME = f"demo-{secrets.token_hex(4)}"
PASSWORD = secrets.token_urlsafe(24)


def main() -> None:
    with service() as issuer, httpx2.Client(base_url=issuer, timeout=10) as http:
        tour(issuer, http)


def tour(issuer: str, http: httpx2.Client) -> None:
    step("Sign up", f"POST /users as {USERNAME}")
    user = answer(http.post("/users", json={"username": USERNAME, "password": PASSWORD}), 201)
    show("id", user["id"])

    step("Log in", "POST /token, grant_type=password")
    form = {"grant_type": "password", "username": USERNAME, "password": PASSWORD}
    tokens = answer(http.post("/token", data=form), 200)
    show("access token", f"{tokens['access_token'][:40]}...")
    show("lives for", f"{tokens['expires_in']} seconds")

    step("Verify locally", "stock PyJWT and the JWKS, as any other service would")
    claims = verify(issuer, tokens["access_token"])
    show("sub", claims["sub"])
    show("aud", " ".join(claims["aud"]))
    show("kid", jwt.get_unverified_header(tokens["access_token"])["kid"])

    step("Refresh", "POST /token, grant_type=refresh_token")
    renewed = answer(http.post("/token", data=refresh_form(tokens)), 200)
    show("refresh token", "a new one; the old one is spent")

    step("Retry the refresh", "as if the answer had been lost on the way")
    retried = answer(http.post("/token", data=refresh_form(tokens)), 200)
    same = retried["refresh_token"] == renewed["refresh_token"]
    show("refresh token", "the same successor: nobody is logged out" if same else "ANOTHER ONE")
    if not same:
        sys.exit("demo: the retry forked the session")

    step("Use the account API", "GET /users/me")
    me = answer(http.get("/users/me", headers=bearer(renewed)), 200)
    show("username", me["username"])

    step("Log out", "POST /revoke")
    answer(http.post("/revoke", data={"token": renewed["refresh_token"]}), 200)

    step("Be refused", "the refresh token and the access token, at once")
    refused = answer(http.post("/token", data=refresh_form(renewed)), 400)
    show("refresh", refused["error"])
    refused = answer(http.get("/users/me", headers=bearer(renewed)), 401)
    show("account API", refused["code"])
    print("\nAll of it worked.")


def verify(issuer: str, access_token: str) -> dict[str, Any]:
    """Verify an access token with a stock library; `identity_service.verifier` checks more."""
    keys = jwt.PyJWKClient(f"{issuer}/.well-known/jwks.json")
    claims: dict[str, Any] = jwt.decode(
        access_token,
        keys.get_signing_key_from_jwt(access_token),
        algorithms=["RS256"],
        issuer=issuer,
        audience="api",
        options={"require": ["exp", "iat", "sub", "jti", "client_id"]},
    )
    return claims


def refresh_form(tokens: dict[str, Any]) -> dict[str, str]:
    return {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]}


def bearer(tokens: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {tokens['access_token']}"}


def answer(response: httpx2.Response, expected: int) -> dict[str, Any]:
    """Return the body of an answer that was expected, or end the demo with what came instead."""
    if response.status_code != expected:
        sys.exit(f"demo: expected {expected}, got {response.status_code}: {response.text}")
    body: dict[str, Any] = response.json()
    return body


@contextmanager
def service() -> Iterator[str]:
    """Yield the issuer of a running service, started here if there is none."""
    issuer = os.environ.get("IDENTITY_ISSUER_URL", "http://localhost:8000")
    if is_up(issuer):
        print(f"Using the service at {issuer}.")
        yield issuer
        return
    print(f"Nothing answers at {issuer}: starting a service of our own for the demo ...")
    with tempfile.TemporaryDirectory(prefix="identity-demo-") as folder, socket.socket() as free:
        Path(folder).chmod(0o755)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        own = {
            "IDENTITY_BIND": f"127.0.0.1:{port}",
            "IDENTITY_ISSUER_URL": f"http://localhost:{port}",
            "IDENTITY_EMBEDDED_DIR": f"{folder}/postgres",
            "IDENTITY_KEYS_DIR": f"{folder}/keys",
            "IDENTITY_LOG_LEVEL": "warning",
            "IDENTITY_MIGRATE_ON_START": "on",
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("IDENTITY_")}
        kept.pop("DATABASE_URL", None)
        command = [sys.executable, "-m", "identity_service", "serve"]
        process = subprocess.Popen(command, env=kept | own, stdout=subprocess.DEVNULL)  # noqa: S603 - our own service
        try:
            wait_for(own["IDENTITY_ISSUER_URL"], process)
            yield own["IDENTITY_ISSUER_URL"]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


def is_up(issuer: str) -> bool:
    try:
        return httpx2.get(f"{issuer}/readyz", timeout=2).status_code == 200
    except httpx2.HTTPError:
        return False


def wait_for(issuer: str, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(300):
        if is_up(issuer):
            return
        if process.poll() is not None:
            sys.exit("demo: the service did not start; see the lines above")
        time.sleep(0.1)
    sys.exit("demo: the service did not answer within 30 seconds")


def step(title: str, how: str) -> None:
    print(f"\n{title}  ({how})")


def show(name: str, value: str) -> None:
    print(f"    {name:14} {value}")


if __name__ == "__main__":
    main()
