"""The envelope of every token: JWS in compact serialisation (RFC 7515 3.1), in the one spelling we accept.

The reading is our own because PyJWT's defaults accept what RFC 8725 says to refuse: any `typ`, repeated members,
padding, several spellings of one token. This is the only place that takes a JWT apart, for other services and for the
issuer itself. What checks signatures is in `keys`, what the claims must say in `claims`.
"""

import json
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable, MutableMapping
from json import JSONDecoder
from json.scanner import make_scanner
from typing import Any, Final, NamedTuple

from identity_service.verifier.rejection import TokenRejected

MAX_LENGTH = 8192
MAX_HEADER_LENGTH = 1024
_KNOWN_HEADERS = 64
_MOST_BRACKETS = 500

ALGORITHMS: Final = (
    *("RS256", "RS384", "RS512"),
    *("PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512"),
    *("EdDSA", "Ed25519"),
)
"""Every algorithm a key may be prepared for. All are asymmetric: nothing here takes a shared secret."""

SignatureCheck = Callable[[bytes, bytes], bool]
"""Takes the signing input and the signature; made once per key."""


class Header(NamedTuple):
    """The protected header, which has exactly these members. Nothing in it has been authenticated yet."""

    algorithm: str
    typ: str
    key_id: str


class Unverified(NamedTuple):
    """A token taken apart: well formed, and that is all."""

    header: Header
    signing_input: bytes
    signature: bytes
    header_segment: bytes
    payload_segment: bytes

    def payload(self) -> bytes:
        """Return the decoded payload. Ask only once the signature has been checked."""
        return decode_base64url(self.payload_segment)


def take_apart(
    unverified_token: bytes,
    known_headers: MutableMapping[bytes, Header] | None = None,
    *,
    max_length: int = MAX_LENGTH,
) -> Unverified:
    """Take a token apart without believing any of it.

    Args:
        known_headers: headers that `remember` put aside, which saves reading the same few headers again and again.

    Raises:
        TokenRejected: with reason malformed, wrong_algorithm or wrong_type.
    """
    signing_input, header, payload, signature = split(unverified_token, max_length=max_length)
    read = known_headers.get(header) if known_headers is not None else None
    return Unverified(read or read_header(header), signing_input, decode_base64url(signature), header, payload)


def split(unverified_token: bytes, *, max_length: int = MAX_LENGTH) -> tuple[bytes, bytes, bytes, bytes]:
    """Return what has been signed, and the three segments: header, payload and signature. Nothing has been decoded.

    Raises:
        TokenRejected: malformed; wrong_algorithm when it is unsigned and says so.
    """
    if len(unverified_token) > max_length:
        raise TokenRejected("malformed", "too long")
    signing_input, _, signature = unverified_token.rpartition(b".")
    header, _, payload = signing_input.partition(b".")
    if not signature or not payload or not header or b"." in payload:
        if not signature and payload and b"." not in payload:
            read_header(header)  # unsigned, and it says so: `alg` none
        raise TokenRejected("malformed", "not three segments with something in each")
    return signing_input, header, payload, signature


def remember(known_headers: MutableMapping[bytes, Header], verified: Unverified) -> None:
    """Put a header aside, after its signature has held: what strangers send must not push out what is used."""
    if verified.header_segment in known_headers:
        return
    if len(known_headers) >= _KNOWN_HEADERS:
        known_headers.clear()
    known_headers[verified.header_segment] = verified.header


def is_type(unverified_typ: str, typ: str) -> bool:
    """Tell whether a header's `typ` means this type; neither case nor `application/` counts (RFC 7515 4.1.9)."""
    return unverified_typ == typ or unverified_typ.lower().removeprefix("application/") == typ


def decode_base64url(segment: bytes) -> bytes:
    """Decode base64url, refusing every spelling but the one without padding and without unused bits.

    Raises:
        TokenRejected: malformed.
    """
    rest = len(segment) & 3
    # A last character may carry two or four bits that decoders ignore: two spellings of one token are two tokens.
    if rest and (rest == 1 or segment[-1] not in _LAST_CHARACTERS[rest]):
        raise TokenRejected("malformed", "not canonical base64url")
    try:
        return a2b_base64(segment.translate(_TO_STANDARD_ALPHABET) + _PADDING[rest], strict_mode=True)
    except ValueError:
        raise TokenRejected("malformed", "not base64url") from None


def encode_base64url(octets: bytes) -> str:
    """Encode octets without padding (RFC 7515 2)."""
    return b2a_base64(octets, newline=False).translate(_TO_URL_ALPHABET, b"=").decode()


def parse_object(encoded: bytes) -> dict[str, Any]:
    """Return a JSON object, refusing repeated members, NaN, other encodings and whatever else has two readings.

    White space around the object is refused too: nobody who signs tokens writes it.

    Raises:
        TokenRejected: malformed.
    """
    try:
        text = encoded.decode()
        # How deep is too deep must not depend on the interpreter.
        shallow = len(text) <= _MOST_BRACKETS or text.count("[") + text.count("{") <= _MOST_BRACKETS
        value, end = _scan(text, 0) if shallow else (None, 0)
        if "\\" in text:
            # An escaped lone surrogate is a str that nobody can encode again: a crash somewhere downstream.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, StopIteration, RecursionError):
        raise TokenRejected("malformed", "not a strict JSON object") from None
    if not isinstance(value, dict) or end != len(text):
        raise TokenRejected("malformed", "not one JSON object")
    return value


def read_header(segment: bytes) -> Header:
    """Return a header that has the members we write and no others.

    Raises:
        TokenRejected: with reason malformed, wrong_algorithm or wrong_type.
    """
    if len(segment) > MAX_HEADER_LENGTH:
        raise TokenRejected("malformed", "header too long")
    header = parse_object(decode_base64url(segment))
    algorithm, typ, key_id = header.get("alg"), header.get("typ"), header.get("kid")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise TokenRejected("wrong_algorithm")
    if not isinstance(typ, str):
        raise TokenRejected("wrong_type")
    # No crit, b64, jwk, jku, x5c or x5u: a token does not say how it wants to be checked.
    if not isinstance(key_id, str) or len(header) != 3 or not is_key_id(key_id):
        raise TokenRejected("malformed", "header members other than alg, typ and kid")
    return Header(algorithm, typ, key_id)


def is_key_id(value: str) -> bool:
    """Tell whether this can name a key: short and of characters that mean nothing anywhere."""
    return 0 < len(value) <= 128 and value.isascii() and value.replace("-", "").replace("_", "").isalnum()


class RepeatedMember(ValueError):
    """One name of a JSON object says two things, and two readers would each take another."""


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its members: an `object_pairs_hook` for JSON.

    Raises:
        RepeatedMember: one is there twice.
    """
    members = dict(pairs)
    if len(members) != len(pairs):
        raise RepeatedMember("a member is there twice")
    return members


def refuse_constant(constant: str) -> None:
    """Refuse NaN and Infinity, which are not JSON: a `parse_constant`."""
    raise ValueError(constant)


# Without `decode` around it, which looks for white space before and after with two regular expressions.
_decoder: Any = JSONDecoder(object_pairs_hook=each_once, parse_constant=refuse_constant)
_scan: Callable[[str, int], tuple[Any, int]] = make_scanner(_decoder)
_TO_URL_ALPHABET = bytes.maketrans(b"+/", b"-_")
_TO_STANDARD_ALPHABET = bytes.maketrans(b"-_+/=", b"+/!!!")
_PADDING = (b"", b"", b"==", b"=")
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_LAST_CHARACTERS = (b"", b"", _ALPHABET[::16], _ALPHABET[::4])
