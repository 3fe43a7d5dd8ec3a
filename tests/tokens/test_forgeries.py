"""Tokens that look like ours: every way a signature, a header, an envelope or a claim can lie (F1 to F16, RS-3).

Each forgery is shown to both readers of tokens, the account API and the token endpoint, by someone who holds all that
is public. Where only a claim or a header lies, it is signed with our own key: the reader may not rely on the forger's
lack of it. The genuine token passes in the same test, so none of the refusals is for another reason.
"""

import asyncio
import hmac
import json
import math
from base64 import b64encode, urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx2
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from identity_service.errors import TokenRejected
from identity_service.signing.jwks import thumbprint
from identity_service.signing.key_files import KeyFolder
from identity_service.signing.keyring import Keyring, TokenLifetimes
from identity_service.tokens import access, refresh
from tests.conftest import ISSUER, PASSWORD, START, Account, Api, StartApi

NOW = int(START.timestamp())
LIFETIMES = TokenLifetimes(timedelta(minutes=10), timedelta(days=14))
CHALLENGE = (
    'Bearer realm="identity", error="invalid_token", error_description="The token is invalid, expired or revoked."'
)
REFUSALS: dict[str, tuple[Any, ...]] = {
    "access": (401, CHALLENGE, "invalid_token"),
    "refresh": (400, {"error": "invalid_grant", "error_description": "The session has ended; log in again."}),
}
ATTACKER = rsa.generate_private_key(65537, 2048)
Json = dict[str, Any]


def base64url(value: bytes) -> str:
    return urlsafe_b64encode(value).rstrip(b"=").decode()


def decode(segment: str) -> bytes:
    return urlsafe_b64decode(segment + "=" * (-len(segment) % 4))


def as_json(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":")).encode()


def rs256(key: rsa.RSAPrivateKey, header: Any, claims: Any) -> str:
    """Sign whatever it is; bytes are taken as they are."""
    signing_input = f"{base64url(as_json(header))}.{base64url(as_json(claims))}"
    return f"{signing_input}.{base64url(key.sign(signing_input.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


def jwk(public: rsa.RSAPublicKey) -> dict[str, str]:
    numbers = public.public_numbers()
    n, e = (base64url(value.to_bytes((value.bit_length() + 7) // 8, "big")) for value in (numbers.n, numbers.e))
    return {"kty": "RSA", "use": "sig", "alg": "RS256", "kid": thumbprint(public), "n": n, "e": e}


def short(value: Any) -> str:
    """A name for a row, never the same for two of them."""
    shown = repr(value).encode("ascii", "backslashreplace").decode()
    return shown if len(shown) <= 90 else f"{shown[:40]} ... {shown[-40:]} ({len(shown)})"


@dataclass(frozen=True)
class Target:
    """One of our readers, a genuine token that it accepts, and what a forger could know or steal."""

    api: Api
    kind: str
    token: str
    jwks: bytes

    @property
    def header(self) -> Json:
        header: Json = json.loads(decode(self.token.split(".")[0]))
        return header

    @property
    def claims(self) -> Json:
        claims: Json = json.loads(decode(self.token.split(".")[1]))
        return claims

    @property
    def key(self) -> rsa.RSAPrivateKey:
        private = self.api.keys.current.signer(self.api.clock()).private
        assert private is not None
        return private

    def signed(self, *, header: Any = None, claims: Any = None) -> str:
        """Return the token with another header or other claims, signed with our own key."""
        return rs256(self.key, self.header if header is None else header, self.claims if claims is None else claims)

    async def present(self, token: str) -> httpx2.Response:
        raw = token.encode()
        if self.kind == "access":
            return await self.api.http.get("/users/me", headers=[(b"Authorization", b"Bearer " + raw)])
        return await self.api.http.post(
            "/token",
            content=urlencode({"grant_type": "refresh_token", "refresh_token": raw}),
            headers={"Content-Type": "application/x-www-form-urlencoded"},
        )

    async def refuses(self, forgeries: str | Mapping[str, str]) -> None:
        """Every one of them, in the very words for what is no token of ours, and goes on to accept the genuine one."""
        wrongly = {}
        for name, forged in {"forged": forgeries}.items() if isinstance(forgeries, str) else forgeries.items():
            answer = await self.present(forged)
            if self._said(answer) != REFUSALS[self.kind]:
                wrongly[name] = (answer.status_code, answer.text)
        assert wrongly == {}
        assert (await self.present(self.token)).status_code == 200

    def _said(self, answer: httpx2.Response) -> tuple[Any, ...]:
        body = answer.json()
        if self.kind == "access":
            return answer.status_code, answer.headers.get("www-authenticate"), body.get("code")
        return answer.status_code, body


@pytest.fixture(scope="module")
async def targets(shared_api: Api) -> dict[str, Target]:
    tokens = await (await shared_api.sign_up("alice")).log_in()
    return await targets_at(shared_api, tokens)


async def targets_at(api: Api, tokens: Json) -> dict[str, Target]:
    jwks = (await api.http.get("/.well-known/jwks.json")).content
    return {kind: Target(api, kind, tokens[f"{kind}_token"], jwks) for kind in ("access", "refresh")}


@pytest.fixture(params=["access", "refresh"])
def target(request: pytest.FixtureRequest, targets: dict[str, Target]) -> Target:
    return targets[request.param]


@pytest.fixture
def access_target(targets: dict[str, Target]) -> Target:
    return targets["access"]


@pytest.fixture
def refresh_target(targets: dict[str, Target]) -> Target:
    return targets["refresh"]


async def test_what_the_forgers_tools_sign_unchanged_passes(target):
    """Without this no refusal below would mean anything."""
    assert target.signed() == target.token
    assert (await target.present(target.signed())).status_code == 200
    respelled = target.signed(claims=json.dumps(target.claims, indent=2).encode())
    assert respelled != target.token
    assert (await target.present(respelled)).status_code == 200


# Signatures


SECRETS: dict[str, Callable[[Target], bytes]] = {
    "SPKI PEM": lambda t: t.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    "SPKI PEM, trimmed": lambda t: SECRETS["SPKI PEM"](t).strip(),
    "SPKI DER": lambda t: t.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
    "PKCS1 PEM": lambda t: t.key.public_key().public_bytes(Encoding.PEM, PublicFormat.PKCS1),
    "PKCS1 DER": lambda t: t.key.public_key().public_bytes(Encoding.DER, PublicFormat.PKCS1),
    "SSH": lambda t: t.key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
    "JWK": lambda t: as_json(json.loads(t.jwks)["keys"][0]),
    "JWK, spaced": lambda t: json.dumps(json.loads(t.jwks)["keys"][0]).encode(),
    "JWK in an array": lambda t: as_json(json.loads(t.jwks)["keys"]),
    "JWKS as served": lambda t: t.jwks,
    "JWKS behind a BOM": lambda t: b"\xef\xbb\xbf" + t.jwks,
    "base64 of the DER": lambda t: b64encode(SECRETS["SPKI DER"](t)),
    "base64 of the JWKS": lambda t: b64encode(t.jwks),
    "modulus": lambda t: decode(json.loads(t.jwks)["keys"][0]["n"]),
    "modulus as text": lambda t: json.loads(t.jwks)["keys"][0]["n"].encode(),
    "kid": lambda t: t.header["kid"].encode(),
    "issuer": lambda _: ISSUER.encode(),
    "empty": lambda _: b"",
    "a zero": lambda _: b"\0",
}


@pytest.mark.parametrize("secret", SECRETS)
async def test_an_hmac_keyed_with_something_public_is_no_signature(target, secret):
    """F1, F2, F6: and neither is one that calls itself RS256."""

    def forge(algorithm: str, digest: str) -> str:
        signing_input = f"{base64url(as_json(target.header | {'alg': algorithm}))}.{target.token.split('.')[1]}"
        return f"{signing_input}.{base64url(hmac.digest(SECRETS[secret](target), signing_input.encode(), digest))}"

    digests = {"HS256": "sha256", "HS384": "sha384", "HS512": "sha512"}
    await target.refuses(
        {algorithm: forge(algorithm, digest) for algorithm, digest in digests.items()}
        | {f"{algorithm} called RS256": forge("RS256", digest) for algorithm, digest in digests.items()}
    )


ALGORITHMS: list[Any] = [
    *("none", "None", "nOnE", "NONE", "", "rs256", "RS256 ", "RS256\0", "\uff32\uff33256", "HS256", "RS1", "RSA"),
    *(["RS256"], ["none", "RS256"], {"RS256": True}, 256, True, None, ...),
]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)
async def test_an_algorithm_that_is_not_exactly_rs256_is_refused(target, algorithm):
    """F15: unsigned, with the signature of the genuine token, and even rightly signed. Three dots: left out."""
    header = {name: value for name, value in target.header.items() if name != "alg"}
    signed = target.signed(header=header if algorithm is ... else header | {"alg": algorithm})
    unsigned = signed.rpartition(".")[0]
    genuine = target.token.rpartition(".")[2]
    await target.refuses({"signed": signed, "unsigned": f"{unsigned}.", "genuine": f"{unsigned}.{genuine}"})


def _ecdsa(message: bytes) -> bytes:
    r, s = decode_dss_signature(ec.generate_private_key(ec.SECP256R1()).sign(message, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _pss(key: rsa.RSAPrivateKey, message: bytes) -> bytes:
    return key.sign(message, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())


SIGNERS: dict[str, Callable[[Target, bytes], bytes]] = {
    "PS256": lambda t, message: _pss(t.key, message),
    "RS384": lambda t, message: t.key.sign(message, padding.PKCS1v15(), hashes.SHA384()),
    "RS512": lambda t, message: t.key.sign(message, padding.PKCS1v15(), hashes.SHA512()),
    "ES256": lambda _, message: _ecdsa(message),
    "EdDSA": lambda _, message: ed25519.Ed25519PrivateKey.generate().sign(message),
    "RS256 of a stranger": lambda _, message: ATTACKER.sign(message, padding.PKCS1v15(), hashes.SHA256()),
}


@pytest.mark.parametrize("signer", SIGNERS)
async def test_a_signature_of_another_algorithm_or_key_is_refused(target, signer):
    """F3: by our own key where the algorithm allows it, and under its own or a false name."""

    def forge(algorithm: str) -> str:
        signing_input = f"{base64url(as_json(target.header | {'alg': algorithm}))}.{target.token.split('.')[1]}"
        return f"{signing_input}.{base64url(SIGNERS[signer](target, signing_input.encode()))}"

    await target.refuses({"under its name": forge(signer.partition(" ")[0]), "called RS256": forge("RS256")})


def right(target: Target) -> bytes:
    return decode(target.token.rpartition(".")[2])


def modulus(target: Target) -> int:
    return target.key.public_key().public_numbers().n


SIGNATURES: dict[str, Callable[[Target], bytes]] = {
    "first bit off": lambda t: bytes([right(t)[0] ^ 128]) + right(t)[1:],
    "last bit off": lambda t: right(t)[:-1] + bytes([right(t)[-1] ^ 1]),
    "a byte short": lambda t: right(t)[:-1],
    "a byte long": lambda t: right(t) + b"\0",
    "behind a zero": lambda t: b"\0" + right(t),
    "one byte": lambda _: b"\1",
    "all zeros": lambda _: bytes(256),
    "the number one": lambda _: bytes(255) + b"\1",
    "all ones": lambda _: b"\xff" * 256,
    "the modulus": lambda t: modulus(t).to_bytes(256, "big"),
    "the modulus less one": lambda t: (modulus(t) - 1).to_bytes(256, "big"),
    "negated": lambda t: (modulus(t) - int.from_bytes(right(t), "big")).to_bytes(256, "big"),
    "twice": lambda t: right(t) * 2,
    "of other claims": lambda t: decode(t.signed(claims={}).rpartition(".")[2]),
}


async def test_a_signature_that_was_tampered_with_is_refused(target):
    unsigned = target.token.rpartition(".")[0]
    await target.refuses({name: f"{unsigned}.{base64url(tamper(target))}" for name, tamper in SIGNATURES.items()})


def _until(target: Target, wanted: Callable[[int], bool]) -> tuple[str, int]:
    """Sign the same claims in other spellings until the signature is as wanted."""
    for spaces in range(4000):
        token = target.signed(claims=as_json(target.claims)[:-1] + b" " * spaces + b"}")
        number = int.from_bytes(decode(token.rpartition(".")[2]), "big")
        if wanted(number):
            return token, number
    raise AssertionError("no such signature")


async def test_a_signature_plus_the_modulus_is_refused(target):
    """The same number modulo n, and so another spelling that is right to whoever leaves out the range check."""
    n = modulus(target)
    token, number = _until(target, lambda signature: signature + n < 1 << 2048)
    assert (await target.present(token)).status_code == 200
    await target.refuses(f"{token.rpartition('.')[0]}.{base64url((number + n).to_bytes(256, 'big'))}")


async def test_a_signature_without_its_leading_zero_is_refused(target):
    token, number = _until(target, lambda signature: signature < 1 << 2040)
    assert (await target.present(token)).status_code == 200
    await target.refuses(f"{token.rpartition('.')[0]}.{base64url(number.to_bytes(255, 'big'))}")


# Headers


EXTRA_HEADERS: dict[str, Callable[[str], Json]] = {
    "jwk": lambda _: {"jwk": jwk(ATTACKER.public_key())},
    "small jwk": lambda _: {"jwk": {"kty": "RSA", "e": "AQAB", "n": "AQ"}},
    "symmetric jwk": lambda _: {"jwk": {"kty": "oct", "k": ""}},
    "jku": lambda url: {"jku": f"{url}/jwks.json"},
    "jku of a file": lambda _: {"jku": "file:///dev/null"},
    "jku of ours and a stranger": lambda url: {"jku": f"{ISSUER}@{url.removeprefix('http://')}/jwks.json"},
    "x5u": lambda url: {"x5u": f"{url}/chain.pem"},
    "x5c": lambda _: {"x5c": [b64encode(b"a certificate").decode()]},
    "x5t": lambda _: {"x5t": base64url(bytes(20)), "x5t#S256": base64url(bytes(32))},
    "crit of nothing": lambda _: {"crit": []},
    "crit of something unknown": lambda _: {"crit": ["x"], "x": 1},
    "crit without its member": lambda _: {"crit": ["x"]},
    "crit of exp": lambda _: {"crit": ["exp"], "exp": 1},
    "crit as text": lambda _: {"crit": "b64"},
    "crit of null": lambda _: {"crit": None},
    "unencoded": lambda _: {"crit": ["b64"], "b64": False},
    "unencoded, not critical": lambda _: {"b64": False},
    "encoded": lambda _: {"crit": ["b64"], "b64": True},
    "compressed": lambda _: {"zip": "DEF"},
    "encrypted": lambda _: {"enc": "A256GCM"},
    "nested": lambda _: {"cty": "JWT"},
    "another issuer": lambda _: {"iss": ISSUER},
    "nonce": lambda _: {"nonce": "x"},
    "prototype": lambda _: {"__proto__": {"alg": "none"}},
}


@pytest.mark.parametrize("extra", EXTRA_HEADERS)
async def test_a_header_with_anything_more_is_refused_and_nothing_is_fetched(target, extra):
    """F4, F5: keys come from the keyring and nowhere else. Somebody listens at every address that is named."""
    connected: asyncio.Queue[None] = asyncio.Queue()

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.put_nowait(None)
        writer.close()

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        url = "http://127.0.0.1:{1}".format(*server.sockets[0].getsockname())
        header = target.header | EXTRA_HEADERS[extra](url)
        stranger = thumbprint(ATTACKER.public_key())
        await target.refuses(
            {
                "signed by us": rs256(target.key, header, target.claims),
                "signed by a stranger": rs256(ATTACKER, header, target.claims),
                "naming the stranger": rs256(ATTACKER, header | {"kid": stranger}, target.claims),
            }
        )
        assert connected.empty()
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.close()
        async with asyncio.timeout(5):
            await connected.get()


TYPES: list[Any] = [
    *("JWT", "jwt", "at+jwt ", "at+jwt,rt+jwt", "at jwt", "at%2Bjwt", "statuslist+jwt", "logout+jwt", "secevent+jwt"),
    *("dpop+jwt", "id+jwt", "", ["at+jwt", "rt+jwt"], {"at+jwt": "rt+jwt"}, 0, True, None),
]


async def test_any_other_type_is_refused(target):
    """RS-1, RS-3: rightly signed."""
    untyped = {name: value for name, value in target.header.items() if name != "typ"}
    forgeries = {short(typ): target.signed(header=untyped | {"typ": typ}) for typ in TYPES}
    await target.refuses({**forgeries, "left out": target.signed(header=untyped)})


@pytest.mark.parametrize("kind", ["access", "refresh"])
async def test_the_other_kinds_type_over_the_same_claims_is_refused(targets, kind):
    """RS-6: rightly signed; the claims betray it."""
    other = targets["refresh" if kind == "access" else "access"]
    await targets[kind].refuses(targets[kind].signed(claims=other.claims))


KEY_IDS: list[Callable[[str], Any]] = [
    lambda _: thumbprint(ATTACKER.public_key()),
    lambda _: "A" * 43,
    lambda kid: kid.swapcase(),
    lambda kid: kid[:-1],
    lambda kid: f"{kid}=",
    lambda kid: f"{kid}A",
    lambda kid: f" {kid}",
    lambda kid: f"{kid}\n",
    lambda kid: f"{kid}\0",
    lambda kid: f"./{kid}",
    lambda kid: f"{kid}.pem",
    lambda kid: [kid],
    lambda kid: {kid: kid},
    lambda _: "../../../../../../dev/null",
    lambda _: "/dev/null",
    lambda _: "keyring.json",
    lambda _: "' OR 1=1 --",
    lambda _: "\r\nSet-Cookie: a=b",
    lambda _: "x" * 260,
    lambda _: "x" * 5000,
    lambda _: "",
    lambda _: 0,
    lambda _: 1e308,
    lambda _: None,
    lambda _: True,
]


async def test_a_key_id_that_is_not_exactly_ours_is_refused(target):
    """KEY-6: rightly signed, and never more than a look into the keyring."""
    nameless = {name: value for name, value in target.header.items() if name != "kid"}
    kids = [spell(target.header["kid"]) for spell in KEY_IDS]
    assert target.header["kid"] not in kids
    forgeries = {short(kid): target.signed(header=nameless | {"kid": kid}) for kid in kids}
    await target.refuses({**forgeries, "left out": target.signed(header=nameless)})


HEADERS = [
    '{{"alg":"none",{members}}}',
    '{{{members},"alg":"RS256"}}',
    '{{"typ":"JWT",{members}}}',
    '{{"\\u0061lg":"none",{members}}}',
    '{{{members},"kid":"A"}}',
    "{{{members}}}x",
    "{{{members},}}",
    "{{{members}}}{{{members}}}",
    "[{{{members}}}]",
    "\ufeff{{{members}}}",
    "{{{members}}}\0",
    "{{}}",
    "[]",
    "null",
    "0",
    '""',
    "",
    "{{",
    "[" * 120,
    '{{"a":' * 60,
]


async def test_a_header_that_is_not_one_plain_object_is_refused(target):
    """F7, F10: repeated members above all, of which every reader takes another. Rightly signed."""
    members = as_json(target.header).decode()[1:-1]
    headers = [header.format(members=members).encode() for header in HEADERS]
    await target.refuses({short(header): target.signed(header=header) for header in headers})


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
async def test_a_header_or_payload_in_another_encoding_is_refused(target, encoding):
    """RS-3."""
    header, claims = (as_json(part).decode().encode(encoding) for part in (target.header, target.claims))
    await target.refuses({"header": target.signed(header=header), "payload": target.signed(claims=claims)})


# Envelopes


def _flattened(token: str) -> Json:
    return dict(zip(("protected", "payload", "signature"), token.split("."), strict=True))


ENVELOPES: dict[str, Callable[[str], str]] = {
    "one segment": lambda token: token.replace(".", ""),
    "two segments": lambda token: token.rpartition(".")[0],
    "no signature": lambda token: token.rpartition(".")[0] + ".",
    "no payload": lambda token: token.split(".")[0] + ".." + token.split(".")[2],
    "no header": lambda token: token[token.index(".") :],
    "only dots": lambda _: "..",
    "four segments": lambda token: f"{token}.e30",
    "five segments": lambda token: f"{token}.e30.e30",
    "a dot before": lambda token: f".{token}",
    "a dot behind": lambda token: f"{token}.",
    "twice": lambda token: token * 2,
    "twice with a dot": lambda token: f"{token}.{token}",
    "twice with a comma": lambda token: f"{token},{token}",
    "swapped segments": lambda token: ".".join((token.split(".")[1], token.split(".")[0], token.split(".")[2])),
    "reversed": lambda token: token[::-1],
    "upper case": str.upper,
    "its scheme again": lambda token: f"Bearer {token}",
    "quoted": lambda token: f'"{token}"',
    "braced": lambda token: f"{{{token}}}",
    "percent-encoded": lambda token: token.replace(".", "%2E"),
    "flattened JSON": lambda token: json.dumps(_flattened(token)),
    "general JSON": lambda token: json.dumps({"payload": token.split(".")[1], "signatures": [_flattened(token)]}),
    "JSON with an unprotected header": lambda token: json.dumps(_flattened(token) | {"header": {"alg": "none"}}),
    "polyglot": lambda token: json.dumps({f"  {token}": ""} | _flattened(token)),
    "polyglot, the other way": lambda token: json.dumps(_flattened(token)) + f".{token}",
    "padded header": lambda token: token.replace(".", "=.", 1),
    "padded signature": lambda token: f"{token}==",
    "over-padded signature": lambda token: f"{token}====",
    "standard alphabet": lambda token: token.replace("-", "+").replace("_", "/"),
    "mixed alphabet": lambda token: token[:-342] + token[-342:].replace("-", "+", 1).replace("_", "/", 1),
    "a space inside": lambda token: token.replace(".", ". ", 1),
    "a tilde behind": lambda token: f"{token}~",
    "a BOM before": lambda token: f"\ufeff{token}",
    "a full-width stop": lambda token: token.replace(".", "\uff0e"),
    "an ideographic stop": lambda token: token.replace(".", "\u3002"),
    "full-width letters": lambda token: token.replace("a", "\uff41"),
    "a no-break space behind": lambda token: f"{token}\u00a0",
    "a zero-width space inside": lambda token: token.replace(".", "\u200b.", 1),
    "a line separator behind": lambda token: f"{token}\u2028",
    "a character short": lambda token: token[:-1],
    "a character long": lambda token: f"{token}A",
    "16 kB": lambda token: token + "A" * 16_000,
    "60 kB": lambda token: "A" * 60_000 + token,
    "60 kB of dots": lambda token: token + "." * 60_000,
    "60 kB of brackets": lambda token: f"{base64url(b'[' * 45_000)}.{token.partition('.')[2]}",
    "nothing but a header": lambda token: token.split(".")[0],
}


async def test_any_other_spelling_of_a_genuine_token_is_refused(target):
    """F7, F9, F10: one token is one string of bytes."""
    forgeries = {name: respell(target.token) for name, respell in ENVELOPES.items()}
    assert target.token not in forgeries.values()
    await target.refuses(forgeries)


@pytest.mark.parametrize(("segment", "count"), [(0, 18), (1, 18), (2, 45)])
async def test_the_unused_bits_of_a_segment_must_be_zero(target, segment, count):
    """F9: base64url has up to sixteen last characters for the same bytes, whatever the length modulo three."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    forgeries = {}
    for spaces in (b"", b" ", b"  "):
        token = rs256(target.key, *(as_json(part)[:-1] + spaces + b"}" for part in (target.header, target.claims)))
        assert (await target.present(token)).status_code == 200
        parts = token.split(".")
        for letter in letters:
            twin = parts[segment][:-1] + letter
            if twin != parts[segment] and decode(twin) == decode(parts[segment]):
                forgeries[twin] = ".".join((*parts[:segment], twin, *parts[segment + 1 :]))
    assert len(forgeries) == count
    await target.refuses(forgeries)


CONTROLS = ["\n", "\r\n", "\t", "\0", "\x0b", "\x1f", "\x7f"]


@pytest.mark.parametrize("control", CONTROLS, ids=repr)
@pytest.mark.parametrize("place", ["before", "inside", "behind"])
async def test_a_token_with_a_control_character_is_refused(target, control, place):
    """F9: by the form already, or by the reader where HTTP lets it through."""
    before, dot, behind = target.token.partition(".")
    forged = {
        "before": f"{control}{target.token}",
        "inside": f"{before}{dot}{control}{behind}",
        "behind": f"{target.token}{control}",
    }[place]
    answer = await target.present(forged)
    assert answer.status_code == (401 if target.kind == "access" else 400)
    expected = "invalid_token" if target.kind == "access" else "invalid_request"
    assert expected in (answer.json().get("code"), answer.json().get("error"))
    assert (await target.present(target.token)).status_code == 200


async def test_a_token_of_a_megabyte_is_turned_away_in_no_time(targets):
    """F10."""
    async with asyncio.timeout(8):
        await targets["access"].refuses("A" * 1_000_000)
        await targets["access"].refuses("." * 1_000_000)
        answer = await targets["refresh"].present("A" * 1_000_000)
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


# Claims


class Missing:
    def __repr__(self) -> str:
        return "missing"


class Raw(str):
    """JSON as it is to be sent, where Python's writer would not."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"raw {self[:20]}"


MISSING = Missing()
SOMEONE = "01890a5d-ac96-774b-bcce-b302099a8057"
NOT_TEXT: list[Any] = [MISSING, None, "", 0, 7, 1.5, True, [], ["x"], {}]
NOT_ID: list[Any] = [
    *NOT_TEXT,
    *("x", "../../etc/passwd", "0", SOMEONE, f"{SOMEONE}\0", "\ud800", "'; --", "-" * 36, "0" * 5000),
]
NOT_TIME: list[Any] = [
    *(MISSING, None, "", str(NOW + 60), [], [NOW + 60], {}, True),
    *(-1, -NOW, NOW + 60.5, float(NOW + 60), 1e300, -1e300, math.nan, math.inf, -math.inf, -0.0),
    *(253_402_300_800, 2**63, 2**64, 10**30, 10**400, Raw("1" + "0" * 4999), Raw("1e99999")),
]
NOT_TEXTS: list[Any] = [MISSING, None, "", "pwd", 0, True, {}, {"pwd": 1}, [1], [None], ["pwd", 0], [["pwd"]]]
OTHER_ISSUERS: list[Any] = [
    *(f"{ISSUER}/", f"{ISSUER}:443", f"{ISSUER}.evil.example", f"{ISSUER}@evil.example", f"{ISSUER}/login"),
    *(ISSUER.upper(), ISSUER.title(), ISSUER[:-1], ISSUER[8:], f" {ISSUER}", f"{ISSUER} ", f"{ISSUER}\0", f"{ISSUER}#"),
    *("http://id.example.com", "https://evil.example/https://id.example.com", "//id.example.com", "https://"),
    *("https://id\u2024example.com", "https://\u0456d.example.com", [ISSUER], [ISSUER, ISSUER], {ISSUER: ISSUER}),
]

ACCESS_LIES: dict[str, list[Any]] = {
    "iss": [*NOT_TEXT, *OTHER_ISSUERS],
    "aud": [MISSING, None, "", ISSUER, "api", ["api"], [], [[ISSUER]], [ISSUER, 1], {ISSUER: 1}, 0, [f"{ISSUER}/"]],
    "sub": [*NOT_ID, ISSUER, "first-party"],
    "sid": [*NOT_ID, ISSUER],
    "client_id": NOT_TEXT,
    "jti": [*NOT_TEXT, "\0", "a\0b", "\ud800"],
    "iat": [*NOT_TIME, NOW + 31, NOW + 600],
    "exp": [*NOT_TIME, NOW, NOW - 1, 0],
    "auth_time": NOT_TIME,
    "amr": NOT_TEXTS,
    "scope": [MISSING, None, 0, True, [], ["identity:admin"], {}],
    "roles": NOT_TEXTS,
}
GENERATIONS = [
    *("", "-1", "-0", "+0", " 0", "0 ", "0.0", "0x0", "0e0", "1e0", "0_0", "\u0660", "\u00b2", "\uff10", "x", "None"),
    *("7", str(2**31), str(2**32), str(2**63), str(2**64), "9" * 400, "9" * 4500),
]
REFRESH_LIES: dict[str, list[Any]] = {
    "iss": [*NOT_TEXT, *OTHER_ISSUERS],
    "aud": [*NOT_TEXT, "api", [ISSUER], [ISSUER, "api"], f"{ISSUER}/", {ISSUER: 1}],
    "sub": [*NOT_ID, ISSUER, "first-party"],
    "sid": [*NOT_ID, ISSUER],
    "client_id": [*NOT_TEXT, "other", "First-Party", "first-party ", "first-party\0", ["first-party"]],
    "jti": [*NOT_TEXT, "0", ".", ".0", f"{SOMEONE}.0", "\ud800.0"],
    "iat": [*NOT_TIME],
    "exp": [*NOT_TIME, NOW, NOW - 1, 0],
}


def lying(claims: Json, claim: str, value: Any) -> bytes:
    if isinstance(value, Raw):
        return as_json(claims | {claim: "@raw@"}).replace(b'"@raw@"', value.encode())
    told = {name: kept for name, kept in claims.items() if name != claim}
    return as_json(told if value is MISSING else told | {claim: value})


@pytest.mark.parametrize("claim", ACCESS_LIES)
async def test_an_access_token_whose_claim_is_missing_or_wrong_is_refused(access_target, claim):
    """RS-2, RS-3, F8, F10: rightly signed, and everything else is true."""
    claims, lies = access_target.claims, ACCESS_LIES[claim]
    await access_target.refuses({short(lie): access_target.signed(claims=lying(claims, claim, lie)) for lie in lies})


@pytest.mark.parametrize("claim", REFRESH_LIES)
async def test_a_refresh_token_whose_claim_is_missing_or_wrong_is_refused(refresh_target, claim):
    """RS-3, F8, F10: rightly signed, and everything else is true."""
    claims, lies = refresh_target.claims, REFRESH_LIES[claim]
    await refresh_target.refuses({short(lie): refresh_target.signed(claims=lying(claims, claim, lie)) for lie in lies})


async def test_a_refresh_token_of_an_impossible_generation_is_refused(refresh_target):
    """F10: numbers that no column holds, and numbers that only Python takes for one."""
    claims = refresh_target.claims
    jtis = [f"{claims['sid']}.{generation}" for generation in GENERATIONS]
    await refresh_target.refuses({jti[36:86]: refresh_target.signed(claims=claims | {"jti": jti}) for jti in jtis})


async def test_every_claim_has_a_row(targets):
    """A new claim must come with its lies."""
    assert targets["access"].claims.keys() - {"status"} == ACCESS_LIES.keys()
    assert targets["refresh"].claims.keys() == REFRESH_LIES.keys()


PAYLOADS = [
    '{{{members},"sub":"01890a5d-ac96-774b-bcce-b302099a8057"}}',
    '{{"sub":"01890a5d-ac96-774b-bcce-b302099a8057",{members}}}',
    '{{"exp":9999999999,{members}}}',
    '{{"\\u0069ss":"https://evil.example",{members}}}',
    '{{{members},"x":1,"x":1}}',
    '{{{members},"x":{{"y":1,"y":2}}}}',
    "{{{members}}}x",
    "{{{members},}}",
    "[{{{members}}}]",
    "\ufeff{{{members}}}",
    "{{}}",
    "[]",
    "null",
    "true",
    '"{{}}"',
    "",
    "{{",
    "[" * 5000,
    '{{"a":' * 900,
]


async def test_a_payload_that_is_not_one_plain_object_is_refused(target):
    """RS-3, F10: rightly signed."""
    members = as_json(target.claims).decode()[1:-1]
    payloads = [payload.format(members=members).encode() for payload in PAYLOADS]
    forgeries = {short(payload): target.signed(claims=payload) for payload in payloads}
    await target.refuses(forgeries)


async def test_claims_nested_beyond_reason_are_refused(target):
    """F10: as deep as the longest token allows."""
    deep = Raw("[" * 2400 + "]" * 2400)
    await target.refuses(target.signed(claims=lying(target.claims, "iss", deep)))


async def test_a_clock_may_run_thirty_seconds_ahead_and_no_more(target):
    """KEY-7: the other side of the table above."""
    assert (await target.present(target.signed(claims=target.claims | {"iat": NOW + 30}))).status_code == 200
    late = target.signed(claims=target.claims | {"iat": NOW + 31})
    if target.kind == "access":
        await target.refuses(late)
    else:  # we signed it, so a clock of ours is wrong, which must log nobody out
        answer = await target.present(late)
        assert (answer.status_code, answer.json()["error"]) == (503, "temporarily_unavailable")


async def test_the_last_second_of_a_token_still_counts(target):
    assert (await target.present(target.signed(claims=target.claims | {"exp": NOW + 1}))).status_code == 200
    await target.refuses(target.signed(claims=target.claims | {"exp": NOW}))


@pytest.mark.parametrize("claim", ["sub", "sid"])
async def test_one_users_session_does_not_carry_another_user(shared_api, target, claim):
    """F32: rightly signed, both halves true, and not of each other."""
    bob = await shared_api.sign_up(f"bob-{target.kind}-{claim}")
    theirs = (await targets_at(shared_api, await bob.log_in()))[target.kind].claims
    mixed = target.claims | {claim: theirs[claim]}
    if target.kind == "refresh":
        mixed["jti"] = f"{mixed['sid']}.0"
    await target.refuses(target.signed(claims=mixed))


# Keys


@pytest.fixture(params=["access", "refresh"])
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


async def test_everything_a_revoked_key_signed_is_refused_at_once(api: Api, alice: Account, kind):
    target = (await targets_at(api, await alice.log_in()))[kind]
    stolen, kid = target.key, target.header["kid"]
    assert (await target.present(target.token)).status_code == 200
    api.keys.folder.revoke(kid, now=api.clock())
    api.keys.tend(api.clock())
    fresh = (await targets_at(api, await alice.log_in()))[kind]
    assert fresh.header["kid"] != kid
    assert kid.encode() not in fresh.jwks
    await fresh.refuses({"old": target.token, "new": rs256(stolen, target.header, fresh.claims)})


async def test_a_key_that_has_retired_signs_nothing_any_more(api: Api, alice: Account, kind):
    """KEY-2: someone kept the private half that we destroyed."""
    target = (await targets_at(api, await alice.log_in()))[kind]
    stolen, header = target.key, target.header
    api.clock.advance(seconds=1)
    api.keys.folder.rotate(requested_at=api.clock(), now=api.clock(), publish_window=timedelta(0), at_once=True)
    api.keys.tend(api.clock())
    api.clock.advance(days=14, seconds=61)
    fresh = (await targets_at(api, await alice.log_in()))[kind]
    assert fresh.header["kid"] != header["kid"]
    await fresh.refuses(rs256(stolen, header, fresh.claims))


async def test_the_key_in_waiting_counts_because_a_replicas_clock_may_be_ahead(api: Api, alice: Account, kind):
    target = (await targets_at(api, await alice.log_in()))[kind]
    standby = api.keys.current.standby(api.clock())
    assert standby is not None
    assert standby.private is not None
    token = rs256(standby.private, target.header | {"kid": standby.kid}, target.claims)
    assert (await target.present(token)).status_code == 200
    await target.refuses(
        {
            "in the active key's name": rs256(standby.private, target.header, target.claims),
            "in the other one's name": rs256(target.key, target.header | {"kid": standby.kid}, target.claims),
        }
    )


@pytest.mark.parametrize("keys", ["its own", "ours"])
async def test_a_token_of_another_issuer_is_refused(
    api: Api, alice: Account, start_api: StartApi, tmp_path: Path, kind, keys
):
    """F8: even one that shares our database, and even one that shares our keys."""
    target = (await targets_at(api, await alice.log_in()))[kind]
    folder = tmp_path / "other"
    KeyFolder(folder, LIFETIMES).create(now=START)
    changed = {"keys_dir": folder} if keys == "its own" else {}
    async with start_api(issuer_url="https://other.example.com", allowed_hosts="id.example.com", **changed) as other:
        answer = await other.token(grant_type="password", username="alice", password=PASSWORD)
        foreign = (await targets_at(other, answer.json()))[kind]
        assert (await foreign.present(foreign.token)).status_code == 200
        await target.refuses(foreign.token)


# Anything at all


@pytest.fixture(scope="module")
def ring(made_keys: Path) -> Keyring:
    return KeyFolder(made_keys, LIFETIMES).read()


@pytest.fixture(scope="module")
def minted(ring: Keyring) -> dict[str, str]:
    """A good token of each kind, as this file knows them without asking the service."""
    common = {
        "iss": ISSUER,
        "sub": SOMEONE,
        "client_id": "first-party",
        "sid": SOMEONE,
        "iat": NOW,
        "exp": NOW + 600,
    }
    claims = {
        "access": common
        | {"aud": ["api", ISSUER], "jti": "x", "auth_time": NOW, "amr": ["pwd"], "scope": "", "roles": []},
        "refresh": common | {"aud": ISSUER, "jti": f"{SOMEONE}.0"},
    }
    types = {"access": "at+jwt", "refresh": "rt+jwt"}
    key = ring.signer(START)
    assert key.private is not None
    return {
        kind: rs256(key.private, {"alg": "RS256", "typ": types[kind], "kid": key.kid}, claims[kind]) for kind in claims
    }


READERS: dict[str, Callable[..., object]] = {"access": access.read, "refresh": refresh.read}
REASONS = {
    *("malformed", "wrong_type", "wrong_algorithm", "unknown_key", "bad_signature", "wrong_issuer", "wrong_audience"),
    *("expired", "not_yet_valid", "missing_claim"),
}


def reason(kind: str, token: str, ring: Keyring) -> str | None:
    """Why the reader refuses the token, None when it does not. Any other error passes through and fails the test."""
    try:
        READERS[kind](token, ring, issuer=ISSUER, now=START)
    except TokenRejected as error:
        return error.reason
    return None


fuzzed = hypothesis_settings(max_examples=100, deadline=None)
signed_and_fuzzed = hypothesis_settings(max_examples=50, deadline=None)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("kind", READERS)
@given(text=st.text() | st.text("abcXYZ019-_.=", max_size=60))
@example(text="e30.e30.e30")
@example(text="..")
@example(text="\ud800.\ud800.\ud800")
@fuzzed
def test_no_text_is_a_token(ring, kind, text):
    assert reason(kind, text, ring) in REASONS


@pytest.mark.parametrize("kind", READERS)
@given(data=st.binary(max_size=200))
@fuzzed
def test_no_bytes_are_a_token(ring, kind, data):
    assert reason(kind, data.decode("latin-1"), ring) in REASONS
    assert reason(kind, f"{base64url(data)}.{base64url(data)}.{base64url(data)}", ring) in REASONS


@pytest.mark.parametrize("kind", READERS)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 2000), st.integers(0, 3), st.text(max_size=3) | st.sampled_from(list("AZaz09-_.=+/"))),
        min_size=1,
        max_size=4,
    )
)
@fuzzed
def test_no_edit_of_a_good_token_passes(ring, minted, kind, edits):
    good = minted[kind]
    assert reason(kind, good, ring) is None
    token = good
    for place, removed, inserted in edits:
        at = place % (len(token) + 1)
        token = token[:at] + inserted + token[at + removed :]
    assert reason(kind, token, ring) in (REASONS if token != good else {None})


@pytest.mark.parametrize("kind", READERS)
@given(payload=json_values | st.binary(max_size=60))
@signed_and_fuzzed
def test_nothing_signed_by_accident_is_a_token(ring, minted, kind, payload):
    """Whatever our key were made to sign, the reader answers, and answers no."""
    header = json.loads(decode(minted[kind].split(".")[0]))
    assert reason(kind, rs256(ring.signer(START).private, header, payload), ring) in REASONS


@pytest.mark.parametrize("kind", READERS)
@given(data=st.data())
@signed_and_fuzzed
def test_a_claim_of_any_value_is_answered(ring, minted, kind, data):
    """One claim replaced by anything: read or refused, and nothing else."""
    header, claims = (json.loads(decode(segment)) for segment in minted[kind].split(".")[:2])
    claim = data.draw(st.sampled_from(sorted(claims)))
    replaced = claims | {claim: data.draw(json_values)}
    assert reason(kind, rs256(ring.signer(START).private, header, replaced), ring) in {None, *REASONS}
    del replaced[claim]
    assert reason(kind, rs256(ring.signer(START).private, header, replaced), ring) in REASONS


@pytest.mark.parametrize("kind", READERS)
@given(header=json_values | st.dictionaries(st.sampled_from(["alg", "typ", "kid", "crit", "jwk"]), json_values))
@signed_and_fuzzed
def test_no_header_but_our_own_is_read(ring, minted, kind, header):
    payload = decode(minted[kind].split(".")[1])
    assert reason(kind, rs256(ring.signer(START).private, header, payload), ring) in REASONS
