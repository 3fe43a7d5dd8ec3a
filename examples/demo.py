"""The whole tour over HTTP: sign up, log in, verify locally, refresh, retry, log out, and be refused everywhere.

`make demo` runs it against the service at IDENTITY_ISSUER_URL (http://localhost:8000). When nobody answers there, it
starts a service of its own with a database and keys in a temporary folder, and stops it at the end.
"""

import asyncio
import secrets
import sys
import time
from typing import Any

import httpx2
import jwt

from examples.start import service
from identity_service.verifier import TokenRejected, Verifier

USERNAME = f"demo-{secrets.token_hex(4)}"
PASSWORD = secrets.token_urlsafe(24)
LONGEST_WAIT = 5.0


def main() -> None:
    with service() as running:
        asyncio.run(visit(running.issuer))


async def visit(issuer: str) -> None:
    async with httpx2.AsyncClient(base_url=issuer, timeout=10) as http, Verifier(issuer, audience="api") as verifier:
        await tour(issuer, http, verifier)


async def tour(issuer: str, http: httpx2.AsyncClient, verifier: Verifier) -> None:
    step("Sign up", f"POST /users as {USERNAME}")
    user = answer(await http.post("/users", json={"username": USERNAME, "password": PASSWORD}), 201)
    show("id", user["id"])

    step("Log in", "POST /token, grant_type=password")
    form = {"grant_type": "password", "username": USERNAME, "password": PASSWORD}
    tokens = answer(await http.post("/token", data=form), 200)
    show("access token", f"{tokens['access_token'][:40]}...")
    show("lives for", f"{tokens['expires_in']} seconds")

    step("Verify locally", "identity_service.verifier, as any other service would")
    claims = await verifier.verify(tokens["access_token"])
    show("sub", claims.subject)
    show("aud", " ".join(claims.audience))

    step("Verify with any library", "stock PyJWT and the JWKS, which hear of no logout")
    stock = await asyncio.to_thread(verify_with_pyjwt, issuer, tokens["access_token"])
    show("sub", stock["sub"])
    show("kid", jwt.get_unverified_header(tokens["access_token"])["kid"])

    step("Refresh", "POST /token, grant_type=refresh_token")
    renewed = answer(await http.post("/token", data=refresh_form(tokens)), 200)
    show("refresh token", "a new one; the old one is spent")

    step("Retry the refresh", "as if the answer had been lost on the way")
    retried = answer(await http.post("/token", data=refresh_form(tokens)), 200)
    same = retried["refresh_token"] == renewed["refresh_token"]
    show("refresh token", "the same successor: nobody is logged out" if same else "ANOTHER ONE")
    if not same:
        sys.exit("demo: the retry forked the session")

    step("Use the account API", "GET /users/me")
    me = answer(await http.get("/users/me", headers=bearer(renewed)), 200)
    show("username", me["username"])

    step("Log out", "POST /revoke")
    await verifier.verify(renewed["access_token"])  # until now it is good
    sent = time.monotonic()
    answer(await http.post("/revoke", data={"token": renewed["refresh_token"]}), 200)
    heard = await refusal(verifier, renewed["access_token"], sent)

    step("Be refused", "by other services as soon as they hear of it, by this one at once")
    show("verifier", heard)
    refused = answer(await http.post("/token", data=refresh_form(renewed)), 400)
    show("refresh", refused["error"])
    refused = answer(await http.get("/users/me", headers=bearer(renewed)), 401)
    show("account API", refused["code"])
    print("\nAll of it worked.")


async def refusal(verifier: Verifier, access_token: str, sent: float) -> str:
    """Verify the token of a session that has ended until it is refused; say why, and how soon after the logout."""
    while (waited := time.monotonic() - sent) < LONGEST_WAIT:
        try:
            await verifier.verify(access_token)
        except TokenRejected as error:
            return f"{error.reason}, heard after {waited * 1000:.0f} ms"
        await asyncio.sleep(0.001)
    sys.exit(f"demo: the verifier did not hear of the logout within {LONGEST_WAIT:.0f} seconds")


def verify_with_pyjwt(issuer: str, access_token: str) -> dict[str, Any]:
    """Verify an access token with a stock library, which must be told to look at the type."""
    if jwt.get_unverified_header(access_token).get("typ") != "at+jwt":  # the same keys sign other tokens too
        sys.exit("demo: this is no access token")
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
