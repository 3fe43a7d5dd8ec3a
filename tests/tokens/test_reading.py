"""The service reads its own tokens as the verifier does, pins more than it, and speaks its own errors."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from identity_service.errors import TokenRejected
from identity_service.signing.key_files import fresh_key
from identity_service.signing.keyring import Keyring, TokenLifetimes, first_keys
from identity_service.tokens import access, jws, refresh
from identity_service.verifier.claims import StatusReference
from identity_service.verifier.jws import encode_base64url
from tests.conftest import ISSUER, START

RING = first_keys(lambda: fresh_key(START), TokenLifetimes(timedelta(minutes=10), timedelta(days=14)))
SUBJECT, SESSION = "0190a3c2-0000-7000-8000-000000000001", "0190a3c2-0000-7000-8000-000000000002"
NOW = int(START.timestamp())
COMMON = {"iss": ISSUER, "sub": SUBJECT, "client_id": "first-party", "sid": SESSION, "iat": NOW, "exp": NOW + 600}
ACCESS = COMMON | {"aud": ["api", ISSUER], "jti": "t1", "scope": "a", "roles": ["r"], "auth_time": NOW, "amr": ["pwd"]}
REFRESH = COMMON | {"aud": ISSUER, "jti": f"{SESSION}.7"}
Read = Callable[[str], Any]


def read_access(token: str, ring: Keyring = RING) -> access.AccessClaims:
    return access.read(token, ring, issuer=ISSUER, now=START)


def read_refresh(token: str) -> refresh.RefreshClaims:
    return refresh.read(token, RING, issuer=ISSUER, now=START)


def token(typ: str, claims: dict[str, Any], **changed: Any) -> str:
    return jws.sign(RING.signer(START), typ, claims | changed)


def test_each_kind_is_read_as_what_it_is() -> None:
    assert read_access(token("at+jwt", ACCESS)).subject == UUID(SUBJECT)
    assert read_refresh(token("rt+jwt", REFRESH)).generation == 7
    claims = read_access(token("at+jwt", ACCESS))
    assert (
        read_access(access.mint(RING.signer(START), claims, StatusReference(f"{ISSUER}/status-lists/0", 7))) == claims
    )
    known = read_refresh(token("rt+jwt", REFRESH))
    assert read_refresh(refresh.mint(RING.signer(START), known)) == known


def changed_alg(good: str) -> str:
    header = encode_base64url(f'{{"alg":"PS256","typ":"at+jwt","kid":"{RING.signer(START).kid}"}}'.encode())
    return header + "." + good.partition(".")[2]


def stranger(_good: str) -> str:
    other = first_keys(lambda: fresh_key(START), TokenLifetimes(timedelta(minutes=10), timedelta(days=14)))
    return jws.sign(other.signer(START), "at+jwt", ACCESS)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda good: good + "==", "malformed"),
        (lambda good: good + "é", "malformed"),
        (lambda good: good + "\ud800", "malformed"),
        (lambda good: good.rpartition(".")[0] + ".AAAA", "bad_signature"),
        (changed_alg, "wrong_algorithm"),
        (stranger, "unknown_key"),
        (lambda good: token("rt+jwt", REFRESH), "wrong_type"),
        (lambda good: token("application/at+jwt", ACCESS), "wrong_type"),
        (lambda good: token("at+jwt", ACCESS, iss="x"), "wrong_issuer"),
        (lambda good: token("at+jwt", ACCESS, aud=["api"]), "wrong_audience"),
        (lambda good: token("at+jwt", ACCESS, aud=ISSUER), "wrong_audience"),
        (lambda good: token("at+jwt", ACCESS, iat=NOW - 600, exp=NOW), "expired"),
        (lambda good: token("at+jwt", ACCESS, iat=NOW + 31), "not_yet_valid"),
        (lambda good: token("at+jwt", ACCESS, iat=True), "missing_claim"),
        (lambda good: token("at+jwt", ACCESS, scope=None), "missing_claim"),
        (lambda good: token("at+jwt", ACCESS, jti=""), "missing_claim"),
        (lambda good: token("at+jwt", ACCESS, sub="alice"), "missing_claim"),
        (lambda good: token("at+jwt", ACCESS, roles=None), "missing_claim"),
        (lambda good: token("at+jwt", ACCESS, exp=NOW + 86_401), "malformed"),
        (lambda good: jws.sign(RING.signer(START), "at+jwt", {**ACCESS, "sid": 7}), "missing_claim"),
    ],
)
def test_an_access_token_is_refused(wrong: Callable[[str], str], reason: str) -> None:
    with pytest.raises(TokenRejected) as refused:
        read_access(wrong(token("at+jwt", ACCESS)))
    assert refused.value.reason == reason


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"iss": "x"}, "wrong_issuer"),
        ({"aud": [ISSUER]}, "wrong_audience"),
        ({"jti": SESSION}, "missing_claim"),
        ({"jti": f"{SUBJECT}.7"}, "missing_claim"),
        ({"jti": f"{SESSION}.-7"}, "missing_claim"),
    ],
)
def test_a_refresh_token_is_refused(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(TokenRejected) as refused:
        read_refresh(token("rt+jwt", REFRESH, **changed))
    assert refused.value.reason == reason


def test_a_refresh_token_is_no_access_token() -> None:
    with pytest.raises(TokenRejected, match="invalid"):
        read_refresh(token("at+jwt", ACCESS))
