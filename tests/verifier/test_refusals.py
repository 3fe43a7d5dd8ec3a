"""Every way for a token to be wrong, and the reason that is given for it."""

import base64
import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, hmac, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from identity_service.verifier import TokenRejected, Verifier, jws
from identity_service.verifier.claims import SHARED_VALUES, Shared
from identity_service.verifier.keys import ALGORITHMS
from identity_service.verifier.testing import TestIssuer
from tests.verifier.conftest import AUDIENCE, ISSUER, LIST, Clock, Issuer


def b64(value: bytes | dict[str, Any] | str) -> str:
    if isinstance(value, dict):
        value = json.dumps(value)
    encoded = value.encode() if isinstance(value, str) else value
    return base64.urlsafe_b64encode(encoded).rstrip(b"=").decode()


def payload(issuer: Issuer, **claims: Any) -> dict[str, Any]:
    """Return the claims of a good token, some of them changed or (by None) left out."""
    return jws.parse_object(jws.take_apart(issuer.token(**claims).encode()).payload())


def raw_header(issuer: Issuer, header: str | dict[str, Any]) -> str:
    """Sign a good payload under any header."""
    signing_input = f"{b64(header)}.{b64(payload(issuer))}"
    signature = ALGORITHMS["RS256"].sign(signing_input.encode(), issuer.kit._key)
    return f"{signing_input}.{b64(signature)}"


def raw_payload(issuer: Issuer, text: bytes | str) -> str:
    """Sign any payload under a good header."""
    signing_input = f"{b64({'alg': 'RS256', 'typ': 'at+jwt', 'kid': issuer.kit.key_id})}.{b64(text)}"
    signature = ALGORITHMS["RS256"].sign(signing_input.encode(), issuer.kit._key)
    return f"{signing_input}.{b64(signature)}"


def header(issuer: Issuer, **members: Any) -> dict[str, Any]:
    return {"alg": "RS256", "typ": "at+jwt", "kid": issuer.kit.key_id} | members


def keyed(issuer: Issuer, algorithm: str, secret: bytes) -> str:
    """Sign with HMAC, as if the secret were shared."""
    digest = {"HS256": hashes.SHA256(), "HS384": hashes.SHA384(), "HS512": hashes.SHA512()}[algorithm]
    signing_input = f"{b64(header(issuer, alg=algorithm))}.{b64(payload(issuer))}"
    mac = hmac.HMAC(secret, digest)
    mac.update(signing_input.encode())
    return f"{signing_input}.{b64(mac.finalize())}"


def public_encodings(issuer: Issuer) -> list[bytes]:
    public = issuer.kit._key.public_key()
    form, coding = serialization.PublicFormat, serialization.Encoding
    return [
        public.public_bytes(coding.PEM, form.SubjectPublicKeyInfo),
        public.public_bytes(coding.PEM, form.PKCS1),
        public.public_bytes(coding.DER, form.SubjectPublicKeyInfo),
        public.public_bytes(coding.DER, form.PKCS1),
        public.public_bytes(coding.OpenSSH, form.OpenSSH),
        json.dumps(issuer.kit._jwk).encode(),
        json.dumps({"keys": [issuer.kit._jwk]}).encode(),
        b"\xef\xbb\xbf" + json.dumps([issuer.kit._jwk]).encode(),
        base64.b64encode(public.public_bytes(coding.DER, form.SubjectPublicKeyInfo)),
    ]


Wrong = Callable[[Issuer], str]


def last_bits(issuer: Issuer) -> str:
    """The same bytes in another spelling: the last character's unused bits are set."""
    token = issuer.token()
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return token[:-1] + alphabet[alphabet.index(token[-1]) + 1]


def changed_signature(issuer: Issuer) -> str:
    start, _, signature = issuer.token().rpartition(".")
    return f"{start}.{'A' if signature[0] != 'A' else 'B'}{signature[1:]}"


def status(reference: Any) -> dict[str, Any]:
    return {"status": {"status_list": reference}}


REFUSALS: dict[str, tuple[Wrong, str]] = {
    # RS-3, F7, F9: the charset and the shape
    "empty": (lambda i: "", "malformed"),
    "two_segments": (lambda i: i.token().rpartition(".")[0], "malformed"),
    "F7_four_segments": (lambda i: i.token() + ".AAAA", "malformed"),
    "F7_five_segments": (lambda i: i.token() + ".AAAA.AAAA", "malformed"),
    "F7_json_serialisation": (lambda i: json.dumps({"payload": "e30", "signature": "e30"}), "malformed"),
    "F7_polyglot": (lambda i: '{"a":"' + i.token() + '"}', "malformed"),
    "empty_header": (lambda i: "." + i.token().partition(".")[2], "malformed"),
    "empty_payload": (lambda i: "e30..e30", "malformed"),
    "empty_signature": (lambda i: i.token().rpartition(".")[0] + ".", "malformed"),
    "F9_padding": (lambda i: i.token() + "==", "malformed"),
    "F9_last_bits": (last_bits, "malformed"),
    "F9_newline": (lambda i: i.token() + "\n", "malformed"),
    "F9_space": (lambda i: " " + i.token(), "malformed"),
    "F9_standard_alphabet": (lambda i: i.token().replace("-", "+").replace("_", "/") + "+", "malformed"),
    "one_left_over_character": (lambda i: i.token() + "AAA", "malformed"),
    "not_ascii": (lambda i: i.token() + "é", "malformed"),
    "lone_surrogate": (lambda i: i.token() + "\ud800", "malformed"),
    "F10_a_megabyte": (lambda i: "A" * 1_000_000, "malformed"),
    "F10_a_long_header": (lambda i: raw_header(i, header(i, kid="k" * 1500)), "malformed"),
    # RS-1, F1 to F6, F15: the header
    "F15_alg_none": (lambda i: f"{b64({'alg': 'none', 'typ': 'at+jwt'})}.{b64(payload(i))}.", "wrong_algorithm"),
    "F15_alg_none_signed": (lambda i: raw_header(i, header(i, alg="none")), "wrong_algorithm"),
    "F15_alg_None": (lambda i: raw_header(i, header(i, alg="None")), "wrong_algorithm"),
    "F15_alg_nOnE": (lambda i: raw_header(i, header(i, alg="nOnE")), "wrong_algorithm"),
    "F15_alg_missing": (lambda i: raw_header(i, {"typ": "at+jwt", "kid": i.kit.key_id}), "wrong_algorithm"),
    "alg_not_a_string": (lambda i: raw_header(i, header(i, alg=["RS256"])), "wrong_algorithm"),
    "alg_lower_case": (lambda i: raw_header(i, header(i, alg="rs256")), "wrong_algorithm"),
    "alg_not_allowed_here": (lambda i: raw_header(i, header(i, alg="PS256")), "wrong_algorithm"),
    "F6_empty_hmac_key": (lambda i: keyed(i, "HS256", b""), "wrong_algorithm"),
    "typ_missing": (lambda i: raw_header(i, {"alg": "RS256", "kid": i.kit.key_id}), "wrong_type"),
    "typ_JWT": (lambda i: raw_header(i, header(i, typ="JWT")), "wrong_type"),
    "RS-6_refresh_token": (lambda i: raw_header(i, header(i, typ="rt+jwt")), "wrong_type"),
    "RS-6_status_list_token": (lambda i: i.list_token(), "wrong_type"),
    "typ_almost": (lambda i: raw_header(i, header(i, typ="application/application/at+jwt")), "wrong_type"),
    "typ_not_a_string": (lambda i: raw_header(i, header(i, typ=1)), "wrong_type"),
    "F4_crit": (lambda i: raw_header(i, header(i, crit=["x"])), "malformed"),
    "F4_crit_empty": (lambda i: raw_header(i, header(i, crit=[])), "malformed"),
    "F4_b64_false": (lambda i: raw_header(i, header(i, b64=False)), "malformed"),
    "F5_jwk": (lambda i: raw_header(i, header(i, jwk=i.kit._jwk)), "malformed"),
    "F5_jku": (lambda i: raw_header(i, header(i, jku="https://evil.example/jwks.json")), "malformed"),
    "F5_x5u": (lambda i: raw_header(i, header(i, x5u="https://evil.example/x")), "malformed"),
    "F5_x5c": (lambda i: raw_header(i, header(i, x5c=["MIIB"])), "malformed"),
    "kid_missing": (lambda i: raw_header(i, {"alg": "RS256", "typ": "at+jwt"}), "malformed"),
    "kid_empty": (lambda i: raw_header(i, header(i, kid="")), "malformed"),
    "kid_a_path": (lambda i: raw_header(i, header(i, kid="../../etc/passwd")), "malformed"),
    "kid_not_a_string": (lambda i: raw_header(i, header(i, kid=1)), "malformed"),
    "kid_long": (lambda i: raw_header(i, header(i, kid="k" * 129)), "malformed"),
    "kid_of_another": (lambda i: raw_header(i, header(i, kid="A" * 43)), "unknown_key"),
    "F7_repeated_header_member": (
        lambda i: raw_header(i, f'{{"alg":"none","alg":"RS256","typ":"at+jwt","kid":"{i.kit.key_id}"}}'),
        "malformed",
    ),
    "header_not_an_object": (lambda i: raw_header(i, "[]"), "malformed"),
    "header_not_json": (lambda i: raw_header(i, "{"), "malformed"),
    "header_not_utf8": (lambda i: b64(b"{\xff}") + ".e30.e30", "malformed"),
    "header_utf16": (lambda i: b64(json.dumps(header(i)).encode("utf-16")) + ".e30.e30", "malformed"),
    "header_with_a_byte_order_mark": (lambda i: raw_header(i, "\ufeff" + json.dumps(header(i))), "malformed"),
    "header_with_something_behind": (lambda i: raw_header(i, json.dumps(header(i)) + "{}"), "malformed"),
    # the signature
    "changed_signature": (changed_signature, "bad_signature"),
    "short_signature": (lambda i: i.token().rpartition(".")[0] + ".AAAA", "bad_signature"),
    "changed_payload": (
        lambda i: ".".join([(t := i.token().split("."))[0], b64(payload(i, scope="admin")), t[2]]),
        "bad_signature",
    ),
    # RS-2, RS-3, F8, F10: the claims
    "F8_iss_missing": (lambda i: i.token(iss=None), "missing_claim"),
    "F8_iss_prefix": (lambda i: i.token(iss=ISSUER[:-1]), "wrong_issuer"),
    "F8_iss_suffix": (lambda i: i.token(iss=ISSUER + ".evil.example"), "wrong_issuer"),
    "F8_iss_trailing_slash": (lambda i: i.token(iss=ISSUER + "/"), "wrong_issuer"),
    "F8_iss_case": (lambda i: i.token(iss=ISSUER.upper()), "wrong_issuer"),
    "F8_iss_list": (lambda i: i.token(iss=[ISSUER]), "wrong_issuer"),
    "aud_missing": (lambda i: i.token(aud=None), "missing_claim"),
    "RS-7_aud_of_another": (lambda i: i.token(aud=["billing"]), "wrong_audience"),
    "aud_empty": (lambda i: i.token(aud=[]), "wrong_audience"),
    "aud_a_string": (lambda i: i.token(aud=AUDIENCE), "wrong_audience"),
    "aud_substring": (lambda i: i.token(aud=[AUDIENCE + "-internal"]), "wrong_audience"),
    "aud_of_arrays": (lambda i: i.token(aud=[[AUDIENCE]]), "wrong_audience"),
    "aud_with_a_number": (lambda i: i.token(aud=[AUDIENCE, 1]), "wrong_audience"),
    "expired": (lambda i: i.token(expired=True), "expired"),
    "expired_by_the_leeway": (lambda i: i.token(exp=int(i.clock()) - 30, iat=int(i.clock()) - 600), "expired"),
    "iat_in_the_future": (lambda i: i.token(iat=int(i.clock()) + 31), "not_yet_valid"),
    "nbf_in_the_future": (lambda i: i.token(nbf=int(i.clock()) + 31), "not_yet_valid"),
    "nbf_a_string": (lambda i: i.token(nbf="1"), "missing_claim"),
    "exp_missing": (lambda i: i.token(exp=None), "missing_claim"),
    "iat_missing": (lambda i: i.token(iat=None), "missing_claim"),
    "exp_a_string": (lambda i: i.token(exp="1795000600"), "missing_claim"),
    "exp_a_float": (lambda i: i.token(exp=1795000600.5), "missing_claim"),
    "F10_exp_1e300": (lambda i: i.token(exp=1e300), "missing_claim"),
    "F10_exp_a_list": (lambda i: i.token(exp=[]), "missing_claim"),
    "exp_a_bool": (lambda i: i.token(exp=True), "missing_claim"),
    "exp_beyond_the_calendar": (lambda i: i.token(exp=253_402_300_800), "missing_claim"),
    "iat_negative": (lambda i: i.token(iat=-1), "missing_claim"),
    "exp_before_iat": (lambda i: i.token(exp=int(i.clock()) - 1), "malformed"),
    "only_exp_is_past": (lambda i: i.token(exp=int(i.clock()) - 31), "expired"),
    "only_iat_is_to_come": (lambda i: i.token(iat=int(i.clock()) + 3600), "not_yet_valid"),
    "past_and_lives_too_long": (lambda i: i.token(iat=1, exp=int(i.clock()) - 60), "expired"),
    "lives_too_long": (lambda i: i.token(lifetime=86_401), "malformed"),
    "sub_missing": (lambda i: raw_payload(i, json.dumps(payload(i) | {"sub": None})), "missing_claim"),
    "sub_empty": (lambda i: i.token(sub=""), "missing_claim"),
    "sub_a_number": (lambda i: i.token(sub=7), "missing_claim"),
    "client_id_missing": (lambda i: i.token(client_id=None), "missing_claim"),
    "client_id_empty": (lambda i: i.token(client_id=""), "missing_claim"),
    "jti_missing": (lambda i: i.token(jti=None), "missing_claim"),
    "jti_a_list": (lambda i: i.token(jti=["x"]), "missing_claim"),
    "sid_a_number": (lambda i: i.token(sid=7), "missing_claim"),
    "sid_empty": (lambda i: i.token(sid=""), "missing_claim"),
    "scope_missing": (lambda i: raw_payload(i, json.dumps(payload(i) | {"scope": None})), "missing_claim"),
    "scope_a_list": (lambda i: raw_payload(i, json.dumps(payload(i) | {"scope": ["a"]})), "missing_claim"),
    "roles_a_string": (lambda i: i.token(roles="admin"), "missing_claim"),
    "roles_of_numbers": (lambda i: i.token(roles=[1]), "missing_claim"),
    "TSL-1_status_a_string": (lambda i: i.token(status="revoked?"), "missing_claim"),
    "TSL-1_status_of_another_mechanism": (lambda i: i.token(status={"other": {}}), "missing_claim"),
    "TSL-1_idx_negative": (lambda i: i.token(**status({"idx": -1, "uri": LIST})), "missing_claim"),
    "TSL-1_idx_a_bool": (lambda i: i.token(**status({"idx": True, "uri": LIST})), "missing_claim"),
    "TSL-1_idx_missing": (lambda i: i.token(**status({"uri": LIST})), "missing_claim"),
    "TSL-1_idx_huge": (lambda i: i.token(**status({"idx": 1 << 40, "uri": LIST})), "missing_claim"),
    "TSL-5_uri_missing": (lambda i: i.token(**status({"idx": 1})), "missing_claim"),
    "TSL-5_uri_of_another_host": (
        lambda i: i.token(**status({"idx": 1, "uri": "https://evil.example/1"})),
        "missing_claim",
    ),
    "TSL-5_uri_with_the_issuer_as_user": (
        lambda i: i.token(**status({"idx": 1, "uri": ISSUER + "@evil.example/1"})),
        "missing_claim",
    ),
    "TSL-5_uri_of_a_longer_host": (
        lambda i: i.token(**status({"idx": 1, "uri": ISSUER + ".evil.example/1"})),
        "missing_claim",
    ),
    "TSL-5_uri_climbing_up": (lambda i: i.token(**status({"idx": 1, "uri": ISSUER + "/a/../b"})), "missing_claim"),
    "TSL-5_uri_with_a_query": (lambda i: i.token(**status({"idx": 1, "uri": LIST + "?x=1"})), "missing_claim"),
    "TSL-5_uri_a_file": (lambda i: i.token(**status({"idx": 1, "uri": "file:///etc/passwd"})), "missing_claim"),
    "TSL-5_uri_long": (lambda i: i.token(**status({"idx": 1, "uri": ISSUER + "/" + "a" * 2100})), "missing_claim"),
    "payload_not_an_object": (lambda i: raw_payload(i, "[]"), "malformed"),
    "payload_not_json": (lambda i: raw_payload(i, "nothing"), "malformed"),
    "payload_not_utf8": (lambda i: raw_payload(i, b'{"iss":"\xff"}'), "malformed"),
    "payload_utf16": (lambda i: raw_payload(i, json.dumps(payload(i)).encode("utf-16")), "malformed"),
    "payload_with_a_byte_order_mark": (lambda i: raw_payload(i, "\ufeff" + json.dumps(payload(i))), "malformed"),
    "payload_repeated_member": (
        lambda i: raw_payload(i, json.dumps(payload(i))[:-1] + ',"scope":"admin"}'),
        "malformed",
    ),
    "payload_repeated_member_inside": (
        lambda i: raw_payload(i, json.dumps(payload(i))[:-1] + ',"x":{"a":1,"a":2}}'),
        "malformed",
    ),
    "payload_nan": (lambda i: raw_payload(i, json.dumps(payload(i) | {"x": float("nan")})), "malformed"),
    "payload_infinity": (lambda i: raw_payload(i, json.dumps(payload(i) | {"x": float("inf")})), "malformed"),
    "payload_lone_surrogate": (lambda i: i.token(sub="\ud800"), "malformed"),
    "F10_nested_deeply": (lambda i: raw_payload(i, '{"x":' + "[" * 2500 + "]" * 2500 + "}"), "malformed"),
    "F10_nested_as_deeply_as_some_interpreters_read": (
        lambda i: raw_payload(i, '{"x":' + "[" * 500 + "]" * 500 + "}"),
        "malformed",
    ),
    "F10_a_number_of_5000_digits": (lambda i: raw_payload(i, '{"x":' + "9" * 5000 + "}"), "malformed"),
}


@pytest.mark.parametrize("wrong", REFUSALS)
async def test_refused(issuer: Issuer, verifier: Verifier, wrong: str) -> None:
    make, reason = REFUSALS[wrong]
    token = make(issuer)
    for _ in range(2):
        with pytest.raises(TokenRejected) as refused:
            await verifier.verify(token)
        assert refused.value.reason == reason
    assert verifier.status().cached_tokens == 0
    # F5, TSL-5: a token that is not valid makes us ask nobody but for the issuer's keys.
    assert {request.url.path for request in issuer.requests} <= {"/.well-known/jwks.json"}


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
async def test_f1_f2_hmac_with_the_public_key_as_secret_is_refused(
    issuer: Issuer, verifier: Verifier, algorithm: str
) -> None:
    for secret in public_encodings(issuer):
        with pytest.raises(TokenRejected) as refused:
            await verifier.verify(keyed(issuer, algorithm, secret))
        assert refused.value.reason == "wrong_algorithm"


async def test_f3_a_key_serves_its_own_algorithm_only(issuer: Issuer, other_key: rsa.RSAPrivateKey) -> None:
    issuer.keys[0] = issuer.keys[0] | {"alg": "PS256"}
    verifier = issuer.verifier(algorithms=("RS256", "PS256"))
    with pytest.raises(TokenRejected, match="wrong_algorithm"):
        await verifier.verify(issuer.token())


async def test_f5_a_key_of_the_attacker_under_our_kid_is_refused(
    issuer: Issuer, verifier: Verifier, other_key: rsa.RSAPrivateKey
) -> None:
    issuer.kit._key = other_key
    with pytest.raises(TokenRejected, match="bad_signature"):
        await verifier.verify(issuer.token())


@pytest.mark.parametrize("typ", ["at+jwt", "AT+JWT", "application/at+jwt", "Application/At+Jwt"])
async def test_rs1_the_type_in_every_spelling_of_the_rfc(issuer: Issuer, verifier: Verifier, typ: str) -> None:
    assert (await verifier.verify(raw_header(issuer, header(issuer, typ=typ)))).subject


@pytest.mark.parametrize(
    "claims",
    [
        {"roles": []},
        {"roles": ["admin"]},
        {"roles": None},
        {"sid": None},
        {"status": None},
        {"scope": ""},
        {"scope": "a  b"},
        {"nbf": 1_795_000_000},
        {"extra": {"deep": [1, None, {"é": "\ud83d\ude00"}]}},
        {"status": {"status_list": {"idx": 1, "uri": LIST, "more": 1}}},
        {"aud": ["billing", AUDIENCE]},
    ],
)
async def test_raw_is_what_the_token_says(issuer: Issuer, verifier: Verifier, claims: dict[str, Any]) -> None:
    token = issuer.kit.sign({n: v for n, v in (payload(issuer) | claims).items() if v is not None})
    raw = (await verifier.verify(token)).raw
    assert raw == jws.parse_object(jws.take_apart(token.encode()).payload())
    raw["aud"].append("changed")
    raw.setdefault("extra", {})["deep"] = "changed"
    assert (await verifier.verify(token)).raw == jws.parse_object(jws.take_apart(token.encode()).payload())


async def test_copies_of_claims_are_as_the_claims(issuer: Issuer, verifier: Verifier) -> None:
    claims = await verifier.verify(issuer.token("alice", scope="a b", email="alice@example.com"))
    for another in (copy.copy(claims), copy.deepcopy(claims), pickle.loads(pickle.dumps(claims))):  # noqa: S301 - our own
        assert (another, another.raw) == (claims, claims.raw)
        assert another.raw["email"] == "alice@example.com"
        assert hash(another) == hash(claims)
    others = issuer.kit.sign(claims.raw | {"email": "bob@example.com"})
    assert await verifier.verify(others) != claims
    assert claims != claims.raw


async def test_claims_are_typed_and_cannot_be_changed(issuer: Issuer, verifier: Verifier, now: Clock) -> None:
    claims = await verifier.verify(issuer.token("alice", scope="a b", role=("x", "y"), sid="s1", jti="t1"))
    assert (claims.subject, claims.client_id, claims.session_id, claims.token_id) == (
        "alice",
        "first-party",
        "s1",
        "t1",
    )
    assert (claims.scopes, claims.roles, claims.audience) == (("a", "b"), ("x", "y"), (AUDIENCE,))
    assert claims.issued_at.timestamp() == now()
    assert claims.expires_at.timestamp() == now() + 600
    assert claims.expires_at.tzinfo is not None
    with pytest.raises(AttributeError):
        claims.subject = "mallory"  # type: ignore[misc]


async def test_what_many_tokens_share_is_bounded(issuer: Issuer) -> None:
    """A client that invents scopes, audiences or lists must not fill the memory."""
    reader = issuer.verifier()._reader
    good = payload(issuer)
    for number in range(SHARED_VALUES + 1):
        claims = good | {"client_id": f"c{number}", "scope": f"s{number}", "roles": [f"r{number}"]}
        claims["status"] = {"status_list": {"idx": 1, "uri": f"{ISSUER}/status-lists/{number}"}}
        reader.read(json.dumps(claims).encode(), now=issuer.clock())
    sizes = [len(shared) for shared in vars(reader).values() if isinstance(shared, Shared)]
    assert len(sizes) == 4
    assert max(sizes) < 10, "each has been emptied once"


async def test_headers_of_strangers_do_not_push_out_the_known_ones(issuer: Issuer, verifier: Verifier) -> None:
    await verifier.verify(issuer.token())
    for number in range(200):
        with pytest.raises(TokenRejected):
            await verifier.verify(raw_header(issuer, header(issuer, kid=f"k{number}")))
    assert len(verifier._known_headers) == 1
    known: dict[bytes, jws.Header] = {}
    taken = jws.take_apart(issuer.token().encode())
    for number in range(100):
        jws.remember(known, taken._replace(header_segment=str(number).encode()))
    assert len(known) <= 64
    with pytest.raises(TokenRejected, match="too long"):
        jws.take_apart(b"A" * 8193)


async def test_a_payload_too_deep_to_keep_is_refused(issuer: Issuer) -> None:
    from identity_service.verifier.claims import _freeze

    nested: list[Any] = []
    for _ in range(3000):
        nested = [nested]
    with pytest.raises(TokenRejected, match="malformed"):
        _freeze({"x": nested})


def sign_anything(value: Any) -> str:
    return KIT.sign(value)


KIT = TestIssuer(ISSUER, AUDIENCE, now=Clock())
GOOD = KIT.token().encode()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200),
        st.builds(
            lambda position, byte: GOOD[:position] + bytes([byte]) + GOOD[position + 1 :],
            st.integers(0, len(GOOD) - 1),
            st.integers(0, 255),
        ),
        st.builds(lambda *parts: ".".join(b64(part) for part in parts), st.binary(), st.binary(), st.binary()),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["iss", "aud", "exp", "status"]), inner),
        ).map(sign_anything),
    )
)
async def test_f16_no_bytes_raise_anything_else(token: str | bytes) -> None:
    verifier = KIT.verifier()
    if token == GOOD:
        return
    with pytest.raises(TokenRejected):
        await verifier.verify(token)


@pytest.mark.parametrize("token", [None, 5, bytearray(b"x"), ["x"]])
async def test_f16_nothing_but_text_and_bytes_is_a_token(token: Any) -> None:
    with pytest.raises(TokenRejected, match="malformed"):
        await KIT.verifier().verify(token)


@pytest.mark.parametrize(
    ("issuer_url", "options"),
    [
        ("http://id.example.com", {}),
        ("file:///etc/passwd", {}),
        ("ftp://id.example.com", {}),
        ("https://", {}),
        ("https://user@id.example.com", {}),
        ("https://id.example.com?x=1", {}),
        ("https://id.example.com#x", {}),
        ("https://id.example.com/ x", {}),
        (ISSUER, {"jwks_uri": "file:///etc/passwd"}),
        (ISSUER, {"jwks_uri": "http://id.example.com/jwks"}),
        (ISSUER, {"algorithms": ("HS256",)}),
        (ISSUER, {"algorithms": ()}),
        (ISSUER, {"audience": ""}),
        (ISSUER, {"audience": ()}),
        (ISSUER, {"on_stale": "maybe"}),
        (ISSUER, {"leeway": 61}),
        (ISSUER, {"leeway": -1}),
    ],
)
def test_f12_a_verifier_that_could_not_be_trusted_is_not_made(issuer_url: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Verifier(issuer_url, **({"audience": AUDIENCE} | options))


@pytest.mark.parametrize("url", ["http://localhost:8000", "http://127.0.0.1", "http://[::1]:1", "http://a.localhost"])
def test_http_is_accepted_from_this_machine(url: str) -> None:
    assert Verifier(url, audience=AUDIENCE).issuer == url
