"""The whole tour over HTTP: sign up, log in, verify with stock PyJWT, refresh, retry, log out, and be refused.

`make demo` runs it against the service at IDENTITY_ISSUER_URL (http://localhost:8000). When nobody answers there, it
starts a service of its own with a database and keys in a temporary folder, and stops it at the end.
"""

import secrets
import sys
from typing import Any

import httpx2
import jwt

from examples.start import service

USERNAME = f"demo-{secrets.token_hex(4)}"
PASSWORD = secrets.token_urlsafe(24)


def main() -> None:
    with service() as running, httpx2.Client(base_url=running.issuer, timeout=10) as http:
        tour(running.issuer, http)


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


def step(title: str, how: str) -> None:
    print(f"\n{title}  ({how})")


def show(name: str, value: str) -> None:
    print(f"    {name:14} {value}")


if __name__ == "__main__":
    main()
