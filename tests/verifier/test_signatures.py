"""F17: the classes of defects in Wycheproof's vectors for JSON Web Signatures, with keys and tokens of our own.

A genuine token of each algorithm passes first, so that no refusal is for another reason. All forgeries are made with
the private key: what is wrong is the form of the signature, which a lenient reader would complete by itself.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx2
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from identity_service.verifier import TokenRejected, Verifier
from identity_service.verifier.jws import encode_base64url
from identity_service.verifier.testing import _public_jwk
from tests.verifier.conftest import AUDIENCE, ISSUER, Clock

RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
ED25519_ORDER = 2**252 + 27742317777372353535851937790883648493
SHA256_INFO = bytes.fromhex("3031300d060960864801650304020105000420")


def ec_jwk() -> dict[str, str]:
    numbers = EC.public_key().public_numbers()
    return {
        "kty": "EC",
        "crv": "P-256",
        "x": encode_base64url(numbers.x.to_bytes(32, "big")),
        "y": encode_base64url(numbers.y.to_bytes(32, "big")),
    }


def ed_jwk() -> dict[str, str]:
    public = ED.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return {"kty": "OKP", "crv": "Ed25519", "x": encode_base64url(public)}


def raw_rsa(encoded: bytes) -> bytes:
    """Apply the private key to any number at all, as only its owner can."""
    numbers = RSA.private_numbers()
    number: int = pow(int.from_bytes(encoded, "big"), numbers.d, numbers.public_numbers.n)
    return number.to_bytes(256, "big")


def pss(message: bytes, salt_length: int) -> bytes:
    return RSA.sign(message, padding.PSS(padding.MGF1(hashes.SHA256()), salt_length), hashes.SHA256())


def halves(message: bytes) -> tuple[int, int]:
    return decode_dss_signature(EC.sign(message, ec.ECDSA(hashes.SHA256())))


def raw_ec(r: int, s: int, length: int = 32) -> bytes:
    return r.to_bytes(length, "big") + s.to_bytes(length, "big")


def edwards_twin(message: bytes) -> bytes:
    """The same point and a scalar one group order further on."""
    signature = ED.sign(message)
    scalar = int.from_bytes(signature[32:], "little") + ED25519_ORDER
    return signature[:32] + scalar.to_bytes(32, "little")


GENUINE: dict[str, tuple[Callable[[], dict[str, str]], Callable[[bytes], bytes]]] = {
    "RS256": (lambda: _public_jwk(RSA), lambda m: RSA.sign(m, padding.PKCS1v15(), hashes.SHA256())),
    "PS256": (lambda: _public_jwk(RSA), lambda m: pss(m, 32)),
    "ES256": (ec_jwk, lambda m: raw_ec(*halves(m))),
    "Ed25519": (ed_jwk, ED.sign),
}


def padded(
    message: bytes,
    *,
    kind: bytes = b"\0\1",
    fill: bytes = b"\xff",
    separator: bytes = b"\0",
    info: bytes = SHA256_INFO,
    digest: bytes | None = None,
    after: bytes = b"",
) -> bytes:
    """EMSA-PKCS1-v1_5 (RFC 8017 9.2) with a part of it as somebody would like it."""
    tail = separator + info + (hashlib.sha256(message).digest() if digest is None else digest) + after
    return kind + fill * (256 - len(kind) - len(tail)) + tail


def short_padding(message: bytes) -> bytes:
    tail = b"\0\1" + b"\xff" * 8 + b"\0" + SHA256_INFO + hashlib.sha256(message).digest()
    return tail + bytes(256 - len(tail))


PADDINGS: dict[str, Callable[[bytes], bytes]] = {
    "without the null parameter": lambda m: padded(m, info=bytes.fromhex("302f300b06096086480165030402010420")),
    "with other parameters": lambda m: padded(m, info=bytes.fromhex("3032300e06096086480165030402010401000420")),
    "length in long form": lambda m: padded(m, info=bytes.fromhex("308131300d060960864801650304020105000420")),
    "indefinite length": lambda m: padded(m, info=bytes.fromhex("3080300d060960864801650304020105000420")),
    "named SHA-1": lambda m: padded(m, info=bytes.fromhex("3021300906052b0e03021a05000414")),
    "named SHA-384": lambda m: padded(m, info=bytes.fromhex("3041300d060960864801650304020205000430")),
    "the digest alone": lambda m: padded(m, info=b""),
    "digest of SHA-1": lambda m: padded(
        m,
        info=bytes.fromhex("3021300906052b0e03021a05000414"),
        digest=hashlib.sha1(m).digest(),  # noqa: S324 - to be refused
    ),
    "a shorter digest": lambda m: padded(m, digest=hashlib.sha256(m).digest()[:31]),
    "something after the digest": lambda m: padded(m, after=b"\0"),
    "much after the digest": short_padding,
    "block type 0": lambda m: padded(m, kind=b"\0\0"),
    "block type 2": lambda m: padded(m, kind=b"\0\2"),
    "first octet not 0": lambda m: padded(m, kind=b"\1\1"),
    "filled with zeros": lambda m: padded(m, fill=b"\0"),
    "filled with something else": lambda m: padded(m, fill=b"\xfe"),
    "no separator": lambda m: padded(m, separator=b""),
    "separator not 0": lambda m: padded(m, separator=b"\1"),
    "no padding at all": lambda m: hashlib.sha256(m).digest().rjust(256, b"\0"),
}


def signed_as(form: Callable[[bytes], bytes], message: bytes) -> bytes:
    return raw_rsa(form(message))


DEFECTS: dict[str, dict[str, Callable[[bytes], bytes]]] = {
    "RS256": {name: partial(signed_as, form) for name, form in PADDINGS.items()},
    "PS256": {
        "no salt": lambda m: pss(m, 0),
        "shorter salt": lambda m: pss(m, 20),
        "longest salt": lambda m: pss(m, 222),
        "other mask": lambda m: RSA.sign(m, padding.PSS(padding.MGF1(hashes.SHA512()), 32), hashes.SHA256()),
        "other digest": lambda m: RSA.sign(m, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA512()),
        "PKCS #1 1.5": GENUINE["RS256"][1],
    },
    "ES256": {
        "DER": lambda m: encode_dss_signature(*halves(m)),
        "both zero": lambda _: raw_ec(0, 0),
        "r zero": lambda m: raw_ec(0, halves(m)[1]),
        "s zero": lambda m: raw_ec(halves(m)[0], 0),
        "r the order": lambda m: raw_ec(P256_ORDER, halves(m)[1]),
        "s the order": lambda m: raw_ec(halves(m)[0], P256_ORDER),
        "both one": lambda _: raw_ec(1, 1),
        "s and r": lambda m: raw_ec(*reversed(halves(m))),
        "longer halves": lambda m: raw_ec(*halves(m), length=33),
        "another digest": lambda m: raw_ec(*decode_dss_signature(EC.sign(m, ec.ECDSA(hashes.SHA512())))),
    },
    "Ed25519": {
        "scalar plus the order": edwards_twin,
        "all zero": lambda _: bytes(64),
        "point of small order": lambda _: b"\1" + bytes(63),
        "of the digest": lambda m: ED.sign(hashlib.sha512(m).digest()),
        "a byte short": lambda m: ED.sign(m)[:-1],
    },
}


@dataclass
class Signer:
    """An issuer of one algorithm, and a verifier that knows its key."""

    algorithm: str
    clock: Clock
    verifier: Verifier
    jwk: dict[str, str]

    def segments(self, **header: Any) -> tuple[str, str]:
        now = int(self.clock())
        claims = {
            "iss": ISSUER, "aud": [AUDIENCE], "sub": "s", "client_id": "c", "jti": "j", "scope": "",
            "iat": now, "exp": now + 600,
        }  # fmt: skip
        head = {"alg": self.algorithm, "typ": "at+jwt", "kid": "k"} | header
        return encode_base64url(json.dumps(head).encode()), encode_base64url(json.dumps(claims).encode())

    def token(self, sign: Callable[[bytes], bytes], **header: Any) -> str:
        signing_input = ".".join(self.segments(**header))
        return f"{signing_input}.{encode_base64url(sign(signing_input.encode()))}"

    def genuine(self, **header: Any) -> str:
        return self.token(GENUINE[self.algorithm][1], **header)

    async def refuses(self, token: str) -> str:
        with pytest.raises(TokenRejected) as refused:
            await self.verifier.verify(token)
        assert (await self.verifier.verify(self.genuine())).subject == "s"
        return refused.value.reason


def signer_of(algorithm: str) -> Signer:
    clock = Clock()
    jwk = GENUINE[algorithm][0]() | {"kid": "k", "use": "sig", "alg": algorithm}
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, json={"keys": [jwk]}))
    verifier = Verifier(ISSUER, audience=AUDIENCE, algorithms=tuple(GENUINE), http=transport, now=clock)
    return Signer(algorithm, clock, verifier, jwk)


@pytest.fixture(params=GENUINE)
def signer(request: pytest.FixtureRequest) -> Signer:
    return signer_of(request.param)


@pytest.mark.parametrize(
    ("algorithm", "defect"), [(algorithm, defect) for algorithm, forms in DEFECTS.items() for defect in forms]
)
async def test_f17_a_signature_of_another_form_is_refused(algorithm: str, defect: str) -> None:
    signer = signer_of(algorithm)
    assert await signer.refuses(signer.token(DEFECTS[algorithm][defect])) == "bad_signature"


async def test_f17_the_forgers_own_padding_done_right_passes() -> None:
    """The control of the table above: it is the form that is refused, not the way it was made."""
    signer = signer_of("RS256")
    assert await signer.verifier.verify(signer.token(lambda message: raw_rsa(padded(message))))


async def test_f17_a_token_with_a_part_missing_changed_or_added_is_refused(signer: Signer) -> None:
    header, payload, signature = signer.genuine().split(".")
    other = "A" if signature[0] != "A" else "B"
    for forged in (
        f"{header}.{payload}.{other}{signature[1:]}",
        f"{header}.{payload}.",
        f"{header}.{payload}",
        f"{header}.{payload[:-4]}.{signature}",
        f"{header}..{signature}",
        f"{header}.{signature}",
        f"{signer.segments(kid='K')[0]}.{payload}.{signature}",
        f".{payload}.{signature}",
        f"{payload}.{signature}",
        f".{payload}.",
        payload,
        "",
        f"{header}.{payload}.{signature}.",
        f"{header}.{payload}.{signature}.foo",
        f"{signer.segments(alg='none')[0]}.{payload}.",
        json.dumps({"payload": payload, "protected": header, "signature": signature}),
        json.dumps({"payload": payload, "signatures": [{"protected": header, "signature": signature}]}),
    ):
        await signer.refuses(forged)


async def test_f17_another_algorithm_than_the_keys_is_refused(signer: Signer) -> None:
    """In name, in deed, and in both; each by the owner of all keys."""
    for other in GENUINE.keys() - {signer.algorithm}:
        await signer.refuses(signer.genuine(alg=other))
        await signer.refuses(signer.token(GENUINE[other][1]))
        await signer.refuses(signer.token(GENUINE[other][1], alg=other))


async def test_f17_a_key_in_the_header_is_refused(signer: Signer) -> None:
    """Even the right one: nobody asks a token how to check it."""
    assert await signer.refuses(signer.genuine(jwk=signer.jwk)) == "malformed"
