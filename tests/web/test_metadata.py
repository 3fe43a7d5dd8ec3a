"""What everyone may know: the JWKS, the metadata of RFC 8414, and the page at the root."""

import asyncio
import hashlib
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from cryptography.hazmat.primitives.hashes import SHA256

from identity_service.signing import jwks
from tests.conftest import ISSUER, PASSWORD, Api, bearer, register
from tests.web.answers import problem, seen

JWKS = "/.well-known/jwks.json"
METADATA = "/.well-known/oauth-authorization-server"
CACHING = "public, max-age=300, stale-while-revalidate=60, stale-if-error=3600"
VECTORS = Path(__file__).parent.parent / "vectors"

# Every grant type and client authentication method that has a registered name and could be asked for.
GRANT_TYPES = {
    "authorization_code",
    "client_credentials",
    "implicit",
    "password",
    "refresh_token",
    "urn:ietf:params:oauth:grant-type:device_code",
    "urn:ietf:params:oauth:grant-type:jwt-bearer",
    "urn:ietf:params:oauth:grant-type:saml2-bearer",
    "urn:ietf:params:oauth:grant-type:token-exchange",
    "urn:openid:params:grant-type:ciba",
}


def decode(segment: str) -> bytes:
    return urlsafe_b64decode(segment + "=" * (-len(segment) % 4))


def thumbprint(jwk: dict[str, str]) -> str:
    """RFC 7638 3, written down once more: required members, in order, without white space."""
    text = f'{{"e":"{jwk["e"]}","kty":"{jwk["kty"]}","n":"{jwk["n"]}"}}'
    return urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


async def published(api: Api) -> list[dict[str, str]]:
    answer = await api.http.get(JWKS)
    assert answer.status_code == 200
    keys: list[dict[str, str]] = answer.json()["keys"]
    return keys


def rotate(api: Api, *, at_once: bool) -> None:
    """Rotate as the command does, and let the running service notice."""
    now = api.clock()
    api.keys.folder.rotate(requested_at=now, now=now, publish_window=api.keys.publish_window, at_once=at_once)
    api.keys.tend(now)


def signer_of(token: str) -> Any:
    return json.loads(decode(token.partition(".")[0]))["kid"]


# The JWKS


async def test_a_key_shows_its_public_half_and_nothing_else(api):
    """JWK-1, F65: asked for by name, since an RSA key in JSON may carry `d p q dp dq qi` as well."""
    answer = await api.http.get(JWKS)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json().keys() == {"keys"}
    keys = answer.json()["keys"]
    assert len(keys) == 2
    for key in keys:
        assert list(key) == ["kty", "use", "alg", "kid", "n", "e"]
        assert (key["kty"], key["use"], key["alg"], key["e"]) == ("RSA", "sig", "RS256", "AQAB")
        modulus = decode(key["n"])
        assert "=" not in key["n"]
        assert modulus[0] != 0
        assert urlsafe_b64encode(modulus).rstrip(b"=").decode() == key["n"]
        assert int.from_bytes(modulus, "big").bit_length() >= 2048


async def test_a_key_is_named_by_its_thumbprint(api):
    """JWK-2"""
    keys = await published(api)
    assert [key["kid"] for key in keys] == [thumbprint(key) for key in keys]
    assert len({key["kid"] for key in keys}) == len(keys)


def test_the_thumbprint_of_the_rfcs_own_key_is_the_rfcs():
    """JWK-2"""
    vector = json.loads((VECTORS / "rfc7638-section-3.1.json").read_text())
    numbers = RSAPublicNumbers(*(int.from_bytes(decode(vector["jwk"][name]), "big") for name in ("e", "n")))
    assert vector["thumbprint"] == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"
    assert thumbprint(vector["jwk"]) == vector["thumbprint"]
    assert jwks.thumbprint(numbers.public_key()) == vector["thumbprint"]


async def test_the_first_key_is_the_one_that_signs_and_it_verifies_with_nothing_but_the_jwks(api, alice):
    keys = await published(api)
    token = (await alice.log_in())["access_token"]
    assert signer_of(token) == keys[0]["kid"]
    head, _, signature = token.rpartition(".")
    numbers = RSAPublicNumbers(*(int.from_bytes(decode(keys[0][name]), "big") for name in ("e", "n")))
    numbers.public_key().verify(decode(signature), head.encode(), PKCS1v15(), SHA256())


async def test_the_jwks_may_be_kept_for_five_minutes_and_is_compared_by_a_strong_validator(api):
    """JWK-3"""
    answer = await api.http.get(JWKS)
    assert answer.headers["cache-control"] == CACHING
    assert answer.headers["etag"].startswith('"')
    assert answer.headers["etag"].endswith('"')
    assert "set-cookie" not in answer.headers
    again = await api.http.get(JWKS)
    assert (again.content, again.headers["etag"]) == (answer.content, answer.headers["etag"])


async def test_whoever_has_the_current_jwks_is_not_sent_it_again(api):
    """JWK-3, RFC 9110 13.1.2: any of a list, compared weakly."""
    etag = (await api.http.get(JWKS)).headers["etag"]
    for given in (
        etag,
        f"W/{etag}",
        "*",
        f'"other", {etag}',
        f'{etag} , "other"',
        f'W/"other",W/{etag}',
        f'"a,b", {etag}',
        f" {etag} ",
    ):
        answer = await api.http.get(JWKS, headers={"If-None-Match": given})
        assert (answer.status_code, answer.content) == (304, b""), given
        assert answer.headers["etag"] == etag
        assert answer.headers["cache-control"] == CACHING
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "content-type" not in answer.headers
    for lines in (('"other"', etag), (etag, '"other"')):
        answer = await api.http.get(JWKS, headers=[("If-None-Match", line) for line in lines])
        assert answer.status_code == 304


async def test_whoever_has_something_else_is_sent_the_jwks(api):
    etag = (await api.http.get(JWKS)).headers["etag"]
    for given in ('"other"', "", f"{etag}x", f"x{etag}", '"', f"w/{etag}", etag.strip('"'), '"*"', '*, "x"', "\u00e9"):
        answer = await api.http.get(JWKS, headers=[(b"If-None-Match", given.encode())])
        assert (answer.status_code, len(answer.json()["keys"])) == (200, 2), given


@pytest.mark.parametrize("path", [JWKS, METADATA, "/"])
async def test_asking_for_the_head_gets_the_headers_of_the_whole(api, path):
    """JWK-3"""
    head, whole = await api.http.head(path), await api.http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    del head.headers["x-request-id"], whole.headers["x-request-id"]
    assert head.headers == whole.headers
    assert int(whole.headers["content-length"]) == len(whole.content)


async def test_a_rotation_changes_the_jwks_only_when_its_keys_or_their_order_change(api, alice):
    """KEY-2: the successor has been in it all along; the old key stays until what it signed has expired."""
    old, standby = [key["kid"] for key in await published(api)]
    before = (await api.http.get(JWKS)).headers["etag"]
    api.clock.advance(seconds=1)
    rotate(api, at_once=True)
    new, fresh, retiring = [key["kid"] for key in await published(api)]
    assert (new, retiring) == (standby, old)
    assert fresh not in (old, standby)
    assert signer_of((await alice.log_in())["access_token"]) == standby
    after = (await api.http.get(JWKS)).headers["etag"]
    assert after != before
    stale = await api.http.get(JWKS, headers={"If-None-Match": before})
    assert (stale.status_code, len(stale.json()["keys"])) == (200, 3)
    api.clock.advance(seconds=600 + 300 + 60 - 1)  # access lifetime, age of a copy of the JWKS, skew
    assert [key["kid"] for key in await published(api)] == [new, fresh, old]
    assert (await api.http.get(JWKS)).headers["etag"] == after
    api.clock.advance(seconds=1)
    assert [key["kid"] for key in await published(api)] == [new, fresh]
    assert (await api.http.get(JWKS)).headers["etag"] not in (before, after)


async def test_a_scheduled_rotation_takes_effect_by_the_clock_alone(api, alice):
    """Nobody has to look at the folder again: a reader of the JWKS had the whole window to fetch the successor."""
    old, standby = [key["kid"] for key in await published(api)]
    api.clock.advance(seconds=1)
    rotate(api, at_once=False)
    assert (await published(api))[0]["kid"] == old
    api.clock.advance(seconds=api.settings.key_publish_window / timedelta(seconds=1) - 2)
    assert signer_of((await alice.log_in())["access_token"]) == old
    api.clock.advance(seconds=1)
    assert signer_of((await alice.log_in())["access_token"]) == standby
    assert (await published(api))[0]["kid"] == standby


async def test_a_revoked_key_is_gone_from_the_jwks_at_once(api, alice):
    compromised, standby = [key["kid"] for key in await published(api)]
    token = (await alice.log_in())["access_token"]
    api.clock.advance(seconds=1)
    api.keys.folder.revoke(compromised, now=api.clock())
    api.keys.tend(api.clock())
    kids = [key["kid"] for key in await published(api)]
    assert kids[0] == standby
    assert compromised not in kids
    assert seen(await api.me(token)) == problem(401, "invalid_token", "The token is invalid, expired or revoked.")


async def test_the_jwks_needs_no_database(api):
    """It is served from memory, and verifiers everywhere wait for it."""
    async with AsyncExitStack() as stack:
        for _ in range(api.settings.database_pool_size):
            await stack.enter_async_context(api.database.connection())
        for path in (JWKS, METADATA, "/", "/health"):
            assert (await api.http.get(path)).status_code == 200


# RFC 8414


async def metadata(api: Api) -> Any:
    answer = await api.http.get(METADATA)
    assert answer.status_code == 200
    return answer.json()


async def test_the_metadata_says_what_is_offered_and_where(api):
    """MET-1"""
    answer = await api.http.get(METADATA)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "public, max-age=300"
    assert answer.json() == {
        "issuer": ISSUER,
        "token_endpoint": f"{ISSUER}/token",
        "jwks_uri": f"{ISSUER}/.well-known/jwks.json",
        "revocation_endpoint": f"{ISSUER}/revoke",
        "introspection_endpoint": f"{ISSUER}/introspect",
        "status_list_aggregation_endpoint": f"{ISSUER}/status-lists",
        "grant_types_supported": ["password", "refresh_token", "client_credentials"],
        "response_types_supported": [],
        "scopes_supported": ["identity:admin"],
        "token_endpoint_auth_methods_supported": ["none", "client_secret_basic", "client_secret_post"],
        "revocation_endpoint_auth_methods_supported": ["none", "client_secret_basic", "client_secret_post"],
        "introspection_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post"],
        "service_documentation": f"{ISSUER}/docs",
    }


async def test_the_issuer_of_the_metadata_is_the_issuer_of_the_tokens(api, alice):
    """MET-1: byte for byte."""
    token = (await alice.log_in())["access_token"]
    claims = json.loads(decode(token.split(".")[1]))
    assert (await metadata(api))["issuer"] == claims["iss"] == ISSUER


async def test_every_address_in_the_metadata_and_at_the_root_answers(api):
    """MET-2"""
    documents = [await metadata(api), (await api.http.get("/")).json()]
    addresses = {
        value
        for document in documents
        for value in document.values()
        if isinstance(value, str) and value.startswith("http")
    }
    assert len(addresses) == 8
    for address in addresses:
        assert address == ISSUER or address.startswith(f"{ISSUER}/")
        answer = await api.http.get(address)
        if answer.status_code == 405:
            assert answer.headers["allow"] == "POST"
            answer = await api.http.post(address, data={})
            assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
        else:
            assert answer.status_code == 200


@pytest.mark.parametrize("password_grant", ["on", "off"])
async def test_the_grant_types_listed_are_those_that_are_offered(start_api, password_grant):
    """MET-2, TOK-8"""
    async with start_api(password_grant=password_grant) as api:
        listed = (await metadata(api))["grant_types_supported"]
        errors = {}
        for grant_type in GRANT_TYPES | set(listed):
            answer = await api.token(grant_type=grant_type)
            errors[grant_type] = answer.json()["error"]
        assert {name for name, error in errors.items() if error != "unsupported_grant_type"} == set(listed)
        assert ("password" in listed) is (password_grant == "on")
        assert errors.pop("client_credentials") == "invalid_client"  # offered, to confidential clients
        assert {errors[name] for name in errors if name in listed} == {"invalid_request"}  # and more is needed


async def test_every_client_authentication_listed_is_taken_and_no_other(api, alice):
    """MET-2: `none` is for the built-in client, which has no secret."""
    secret = (await register(api, "robot")).secret
    form = {"grant_type": "client_credentials"}
    bearing = bearer((await alice.log_in())["access_token"])
    taken = {
        "none": await api.token(grant_type="password", username="alice", password=PASSWORD, client_id="first-party"),
        "client_secret_basic": await api.http.post("/token", data=form, auth=("robot", secret)),
        "client_secret_post": await api.token(**form, client_id="robot", client_secret=secret),
    }
    assert [answer.status_code for answer in taken.values()] == [200] * 3
    assert (await metadata(api))["token_endpoint_auth_methods_supported"] == list(taken)
    refused: list[httpx2.Response] = [
        await api.token(**form, client_id="robot"),
        await api.token(grant_type="password", username="alice", password=PASSWORD, client_secret="x"),
        await api.http.post("/token", data=form, auth=("first-party", "x")),
        await api.http.post("/token", data=form | {"client_id": "robot"}, headers=bearing),
    ]
    assert {(answer.status_code, answer.json()["error"]) for answer in refused} == {(401, "invalid_client")}


async def test_every_scope_listed_can_be_had(api, alice):
    async with api.database.connection() as db:
        await db.execute("UPDATE users SET roles = '{admin}'")
    for scope in (await metadata(api))["scopes_supported"]:
        assert (await alice.log_in(scope=scope))["scope"] == scope


async def test_the_scopes_listed_are_those_that_roles_give_and_outlive_the_database(api):
    """They are looked up by the clock and never by a request, which must answer while the database is away."""
    await api.scalar(
        "INSERT INTO roles VALUES ('clerk', '{orders:read,b}', now()), ('guest', '{b}', now()) RETURNING 1"
    )
    async with api.database.connection() as db:
        await api.runtime.offered_scopes.look(db, of_clients=())
        await db.execute("ALTER TABLE roles RENAME TO hidden")
    try:
        assert (await metadata(api))["scopes_supported"] == ["b", "identity:admin", "orders:read"]
    finally:
        await api.scalar("ALTER TABLE hidden RENAME TO roles")


async def test_a_service_learns_which_scopes_there_are_when_it_starts(api, start_api):
    await api.scalar("INSERT INTO roles VALUES ('clerk', '{orders:read}', now()) RETURNING name")
    async with start_api() as later:
        for _ in range(100):
            if (found := (await metadata(later))["scopes_supported"]) != ["identity:admin"]:
                break
            await asyncio.sleep(0.02)
    assert found == ["identity:admin", "orders:read"]


@pytest.mark.parametrize("issuer", ["http://localhost:8000", "https://login.example.org:8443"])
async def test_addresses_follow_the_configured_issuer(start_api, issuer):
    async with start_api(issuer_url=issuer) as api:
        api.http.base_url = httpx2.URL(issuer)
        document = await metadata(api)
        assert document["issuer"] == issuer
        assert document["token_endpoint"] == f"{issuer}/token"
        assert (await api.http.get("/")).json()["jwks_uri"] == f"{issuer}/.well-known/jwks.json"


# The root


async def test_the_root_says_where_to_go_from_here(api):
    answer = await api.http.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "issuer": ISSUER,
        "jwks_uri": f"{ISSUER}/.well-known/jwks.json",
        "metadata": f"{ISSUER}/.well-known/oauth-authorization-server",
        "docs": f"{ISSUER}/docs",
    }
