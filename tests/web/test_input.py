"""Hostile input to every route: a refusal of the right shape, no failure, no echo (FPS-5, PWD-3, F60, F61).

What a request must look like to reach a rule is decided here; what the rules then say is in the tests of each route.
"""

import json
import re
from collections.abc import Iterator
from itertools import product
from string import ascii_letters
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import PASSWORD, Api, bearer
from tests.web.answers import ENDLESS, problem, seen

APP = "https://app.example.com"
MARK = "Zx9markerQ"

# A body that each route would take, by method and path.
JSON_ROUTES: dict[tuple[str, str], dict[str, str]] = {
    ("POST", "/users"): {"username": "mallory", "password": PASSWORD, "email": "mallory@example.com"},
    ("PATCH", "/users/me"): {"username": "mallory", "email": "mallory@example.com"},
    ("PUT", "/users/me/password"): {"current_password": PASSWORD, "new_password": "purple elephants dance at dusk"},
    ("DELETE", "/users/me"): {"current_password": PASSWORD},
    ("POST", "/password-reset"): {"token": "abc", "new_password": "purple elephants dance at dusk"},
    ("POST", "/login"): {"username": "alice", "password": PASSWORD, "scope": "identity:admin"},
    ("POST", "/refresh"): {},
    ("POST", "/logout"): {},
}
BODY_MAY_BE_ABSENT = {("POST", "/refresh"), ("POST", "/logout")}
NULL_IS_A_VALUE = {"email"}
MEMBERS = [(method, path, member) for (method, path), body in JSON_ROUTES.items() for member in body]

FORM_ROUTES: dict[str, list[dict[str, str]]] = {
    "/token": [
        {"grant_type": "password", "username": "alice", "password": PASSWORD, "scope": "a", "client_id": "first-party"},
        {"grant_type": "refresh_token", "refresh_token": "a.b.c", "scope": "a", "client_id": "first-party"},
        {"grant_type": "client_credentials", "scope": "a", "client_id": "robot", "client_secret": "x"},
    ],
    "/revoke": [{"token": "a.b.c", "token_type_hint": "refresh_token", "client_id": "first-party"}],
    "/introspect": [
        {"token": "a.b.c", "token_type_hint": "refresh_token", "client_id": "robot", "client_secret": "x"},
    ],
}

MALFORMED = problem(400, "malformed_json", "The body is not valid JSON in UTF-8.")
CONTROLS = problem(422, "validation_failed", "Text must not contain control characters or lone surrogates.")


def invalid(*errors: tuple[str, str]) -> Any:
    return problem(
        422,
        "validation_failed",
        "The request has members that are missing or wrong.",
        errors=[{"pointer": pointer, "detail": detail} for pointer, detail in errors],
    )


def body_with(body: dict[str, str], member: str, raw: bytes) -> bytes:
    """Return the body as JSON, with one member's value written as given."""
    members = [
        json.dumps(name).encode() + b": " + (raw if name == member else json.dumps(value).encode())
        for name, value in body.items()
    ]
    return b"{" + b", ".join(members) + b"}"


class Sender:
    """Sends bodies to the JSON routes as somebody who is logged in on a page of ours."""

    def __init__(self, api: Api, token: str) -> None:
        self._api = api
        self._headers = {"Origin": APP, "Content-Type": "application/json", **bearer(token)}

    async def __call__(self, method: str, path: str, body: bytes) -> httpx2.Response:
        return await self._api.http.request(method, path, content=body, headers=self._headers)


@pytest.fixture
async def send(api, alice):
    """Sends hostile bodies; afterwards everything in the database is as it was."""
    token = (await alice.log_in())["access_token"]

    async def everything() -> list[Any]:
        return [await api.scalar(sql) for sql in EVERY_ROW]

    before = await everything()
    yield Sender(api, token)
    assert await everything() == before


EVERY_ROW = [
    "SELECT array_agg(t::text ORDER BY t::text) FROM users AS t",
    "SELECT array_agg(t::text ORDER BY t::text) FROM sessions AS t",
    "SELECT array_agg(t::text ORDER BY t::text) FROM revoked_tokens AS t",
]


async def test_the_tables_here_name_every_route_that_takes_a_body(api):
    operations = {
        (method.upper(), path): set(operation["requestBody"]["content"])
        for path, item in api.app.openapi()["paths"].items()
        for method, operation in item.items()
        if "requestBody" in operation and not path.startswith("/admin/")  # those are read in `test_admin`
    }
    assert {key for key, types in operations.items() if types == {"application/json"}} == set(JSON_ROUTES)
    assert {path for (_, path), types in operations.items() if types != {"application/json"}} == set(FORM_ROUTES)


# JSON, one member at a time

NOT_TEXT: list[bytes] = [
    b"0",
    b"-1",
    b"918273645546372819",
    b"1.5",
    b"1e999",
    b"true",
    b"false",
    b"[]",
    b"{}",
    b'["%s"]' % MARK.encode(),
    b'{"value": "%s"}' % MARK.encode(),
    b"[" * 200 + b"]" * 200,
]

ESCAPED_CONTROLS = [f'"{MARK}\\u{code:04x}{MARK}"'.encode() for code in (*range(0x20), *range(0x7F, 0xA0))]
RAW_C1 = [b'"' + MARK.encode() + chr(code).encode() + b'"' for code in (0x7F, 0x80, 0x85, 0x9F)]
SURROGATES = [
    f'"{MARK}{escape}"'.encode()
    for escape in ("\\ud800", "\\udfff", "\\uDBFF", "\\udc00\\ud800", "\\ud800\\u0041", "\\ud83e", "a\\udd89")
]

NOT_JSON_TEXT: list[bytes] = [
    *(b'"' + MARK.encode() + bytes([code]) + b'"' for code in range(0x20)),  # raw controls
    b'"%s\xc3"' % MARK.encode(),  # cut off
    b'"%s\xe9"' % MARK.encode(),  # Latin-1
    b'"%s\xc0\x80"' % MARK.encode(),  # overlong NUL
    b'"%s\xed\xa0\x80"' % MARK.encode(),  # a surrogate in UTF-8
    b'"%s\xf4\x90\x80\x80"' % MARK.encode(),  # beyond Unicode
    b'"%s\xff\xfe"' % MARK.encode(),
    b'"%s\\ud8"' % MARK.encode(),
    b'"%s\\x00"' % MARK.encode(),
    b'"%s' % MARK.encode(),
    b"'%s'" % MARK.encode(),
    MARK.encode(),
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"01",
    b"1" * 5000,
    b"[" * 10_000 + b"]" * 10_000,
    b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    b'{"a": 1, "a": 2}',
    b"",
]


async def test_what_is_not_text_is_refused_without_repeating_it(send):
    """FPS-5: the framework's own refusal contains the password."""
    for method, path, member in MEMBERS:
        for raw in NOT_TEXT if member in NULL_IS_A_VALUE else [b"null", *NOT_TEXT]:
            answer = await send(method, path, body_with(JSON_ROUTES[method, path], member, raw))
            assert seen(answer) == invalid((f"/{member}", "Input should be a valid string")), (method, path, raw)
            assert MARK not in answer.text


async def test_controls_and_lone_surrogates_are_refused_in_every_text(send):
    """PWD-3, F61: Postgres cannot hold NUL, and UTF-8 no surrogate."""
    for method, path, member in MEMBERS:
        for raw in (*ESCAPED_CONTROLS, *RAW_C1, *SURROGATES):
            answer = await send(method, path, body_with(JSON_ROUTES[method, path], member, raw))
            assert seen(answer) == CONTROLS, (method, path, member, raw)
            assert MARK not in answer.text


async def test_a_value_that_is_not_json_spoils_the_body(send):
    for method, path, member in MEMBERS:
        for raw in NOT_JSON_TEXT:
            answer = await send(method, path, body_with(JSON_ROUTES[method, path], member, raw))
            assert seen(answer) == MALFORMED, (method, path, member, raw[:80])
            assert MARK not in answer.text


async def test_a_huge_text_is_refused_without_repeating_it(send):
    """F60"""
    owls = "\U0001f989".encode()
    for method, path, member in MEMBERS:
        for raw in (f'"{MARK * 5000}"'.encode(), b'"' + owls * 12_000 + b'"', b'"' + b"\\u0061" * 9000 + b'"'):
            answer = await send(method, path, body_with(JSON_ROUTES[method, path], member, raw))
            assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
            assert len(answer.content) < 1000
            assert MARK not in answer.text


# JSON, the body as a whole


async def test_a_body_that_is_not_an_object_is_refused(send):
    """The pointer to a whole document is the empty string (RFC 6901 5)."""
    expected = invalid(("", "Input should be a valid dictionary or object to extract fields from"))
    mark = MARK.encode()
    for method, path in JSON_ROUTES:
        for raw in (b"[]", b'"%s"' % mark, b"0", b"true", b'["username", "%s"]' % mark, b"[{}]"):
            answer = await send(method, path, raw)
            assert seen(answer) == expected, (method, path, raw)
            assert MARK not in answer.text


async def test_a_body_that_is_needed_cannot_be_left_out(send):
    no_object = "Input should be a valid dictionary or object to extract fields from"
    for method, path in JSON_ROUTES.keys() - BODY_MAY_BE_ABSENT:
        assert seen(await send(method, path, b"")) == invalid(("", "Field required"))
        assert seen(await send(method, path, b"null")) == invalid(("", no_object))


async def test_a_body_that_is_not_json_in_utf8_is_refused(send):
    for (method, path), template in JSON_ROUTES.items():
        for raw in broken(json.dumps(template | {"a": MARK})):
            answer = await send(method, path, raw)
            assert seen(answer) == MALFORMED, (method, path, raw[:60])
            assert MARK not in answer.text


def broken(plain: str) -> Iterator[bytes]:
    """Return what a careless reader might still make something of."""
    good = plain.encode()
    yield b"\xef\xbb\xbf" + good
    yield from (plain.encode(encoding) for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"))
    yield good.replace(MARK.encode(), b"\xe9")
    yield from (good[:-1], good + b"}", good + good, good + b"\x00", good[:-1] + b",}", good.replace(b'"', b"'"))
    yield from (b"/* */" + good, b"{,}", b"{", b"\x00", b"\xff", b" ")
    yield from (b"[" * 30_000, b"[" * 30_000 + b"]" * 30_000, b'{"a":' * 10_000 + b"1" + b"}" * 10_000)
    yield b"username=alice&password=" + MARK.encode()
    yield b'--x\r\nContent-Disposition: form-data; name="username"\r\n\r\nalice\r\n--x--\r\n'


async def test_nesting_around_the_interpreters_own_limit_is_a_refusal_too(send):
    """F10: one reader gives up at a depth that another still takes."""
    not_text = invalid(("/username", "Input should be a valid string"))
    for depth in (50, 400, 600, 800, *range(880, 1010, 10), 2000):
        for opening, closing in [(b"[", b"]"), (b'{"a":', b"}")]:
            raw = body_with(JSON_ROUTES["POST", "/login"], "username", opening * depth + b"1" + closing * depth)
            assert seen(await send("POST", "/login", raw)) in (MALFORMED, not_text), depth


async def test_a_member_given_twice_is_refused(send):
    """Two readers of one body must not see two bodies."""
    for (method, path), template in JSON_ROUTES.items():
        for member in template or ["a"]:
            own = template.get(member, "")
            rest = "".join(f", {json.dumps(n)}: {json.dumps(v)}" for n, v in template.items() if n != member)
            spelled = "".join(f"\\u{ord(character):04x}" for character in member)
            for first, second in [(MARK, own), (own, MARK), (MARK, MARK)]:
                for name in (member, spelled):
                    raw = f'{{"{member}": "{first}", "{name}": "{second}"{rest}}}'
                    answer = await send(method, path, raw.encode())
                    assert seen(answer) == MALFORMED, raw
                    assert MARK not in answer.text


async def test_an_unknown_member_is_named_and_its_value_is_not(send):
    """FPS-1, FPS-5; the pointer is escaped, so that it points where it says (RFC 6901 3)."""
    names = {
        "extra": "/extra",
        "": "/",
        "a/b": "/a~1b",
        "m~n": "/m~0n",
        "Password": "/Password",
        "password ": "/password ",
        "\u00e9": "/\u00e9",
        "<script>": "/<script>",
        "__proto__": "/__proto__",
        "0": "/0",
    }
    for (method, path), template in JSON_ROUTES.items():
        for name, pointer in names.items():
            answer = await send(method, path, json.dumps(template | {name: MARK}).encode())
            assert seen(answer) == invalid((pointer, "Extra inputs are not permitted"))
            assert MARK not in answer.text


async def test_a_member_name_may_not_hold_controls_either(send):
    for (method, path), template in JSON_ROUTES.items():
        for name in ("\\u0000", "\\n", "\\ud800", "user\\u0000name", "\\u0085"):
            raw = json.dumps(template)[:-1] + (", " if template else "")
            answer = await send(method, path, f'{raw}"{name}": "{MARK}"}}'.encode())
            assert seen(answer) == CONTROLS


async def test_what_is_missing_is_named(send):
    required = {
        ("POST", "/users"): ["username", "password"],
        ("PUT", "/users/me/password"): ["current_password", "new_password"],
        ("DELETE", "/users/me"): ["current_password"],
        ("POST", "/login"): ["username", "password"],
    }
    for (method, path), members in required.items():
        for member in members:
            body = {name: value for name, value in JSON_ROUTES[method, path].items() if name != member}
            answer = await send(method, path, json.dumps(body).encode())
            assert seen(answer) == invalid((f"/{member}", "Field required"))
        nothing = await send(method, path, b"{}")
        assert seen(nothing) == invalid(*((f"/{name}", "Field required") for name in members))


async def test_ten_megabytes_are_refused_unread(send):
    """F60: for known and unknown paths alike, whatever they claim to be."""
    body = b'{"username": "alice", "password": "' + b"x" * 10_000_000 + b'"}'
    paths = ("/users", "/users/me", "/users/me/password", "/login", "/token", "/nowhere")
    for method, path in product(("POST", "PUT", "PATCH", "DELETE"), paths):
        assert seen(await send(method, path, body)) == problem(
            413, "body_too_large", "The body must have at most 65536 bytes."
        )


# Forms

FORM_CASES = [(path, form, name) for path, forms in FORM_ROUTES.items() for form in forms for name in form]
NOT_FORM_TEXT = [
    *(f"%{code:02x}" for code in (*range(0x20), 0x7F)),  # C0 and DEL
    *(f"%c2%{code:02x}" for code in range(0x80, 0xA0)),  # C1
    "%ff",
    "%e9",
    "%c3",
    "%c0%80",
    "%ed%a0%80",
    "%f4%90%80%80",
    "%80",
]


def encoded(form: dict[str, str], name: str, raw: str) -> bytes:
    pairs = {key: str(httpx2.QueryParams({"": value}))[1:] for key, value in form.items()} | {name: raw}
    return "&".join(f"{key}={value}" for key, value in pairs.items()).encode()


async def post_form(api: Api, path: str, body: bytes, **headers: str) -> httpx2.Response:
    own = {"Content-Type": "application/x-www-form-urlencoded"} | headers
    return await api.http.post(path, content=body, headers=own)


def assert_oauth_error(answer: httpx2.Response, status: int, error: str) -> None:
    """RFC 6749 5.2: these members, these characters (TOK-5), stored nowhere (TOK-4)."""
    assert answer.headers["content-type"] == "application/json"
    assert (answer.headers["cache-control"], answer.headers["pragma"]) == ("no-store", "no-cache")
    assert answer.json().keys() == {"error", "error_description"}
    assert (answer.status_code, answer.json()["error"]) == (status, error)
    assert re.fullmatch(r"[\x20-\x21\x23-\x5B\x5D-\x7E]+", answer.json()["error_description"])
    assert MARK not in answer.text


async def test_controls_and_broken_utf8_are_refused_in_every_parameter(api):
    """PWD-3, F61"""
    for (path, form, name), raw in product(FORM_CASES, NOT_FORM_TEXT):
        for value in (raw, f"{MARK}{raw}{MARK}"):
            assert_oauth_error(await post_form(api, path, encoded(form, name, value)), 400, "invalid_request")


async def test_a_parameter_given_twice_is_refused(api):
    """TOK-2"""
    for path, form, name in FORM_CASES:
        plain = encoded(form, name, MARK)
        for again in (f"&{name}={MARK}", f"&{name}=", f"&{name}", f"&%{ord(name[0]):02x}{name[1:]}=x"):
            assert_oauth_error(await post_form(api, path, plain + again.encode()), 400, "invalid_request")


STRANGE = [
    MARK,
    MARK * 6000,
    "%F0%9F%A6%89" * 5000,
    "a" * 60_000,
    "%EF%BF%BF",
    "%22%5C",
    "%3Cscript%3E",
    "'%20OR%201%3D1--",
    "%25s%25n",
    "../../etc/passwd",
    "%E2%80%AE",
    "[]",
    "{}",
    "null",
    "+",
    "%",
    "%zz",
    "%u0000",
]


async def test_a_strange_value_is_a_refusal_and_never_a_failure(api, alice):
    for (path, form, name), raw in product(FORM_CASES, STRANGE):
        await api.forget_failures()
        answer = await post_form(api, path, encoded(form, name, raw))
        assert answer.status_code in (200, 400, 401), (path, name, raw[:60])
        if answer.status_code == 200:  # a token nobody issued is revoked, a scope nobody has is not given
            assert answer.json() == {} if path == "/revoke" else (name, answer.json()["scope"]) == ("scope", "")
        else:
            assert_oauth_error(answer, answer.status_code, answer.json()["error"])


@pytest.mark.parametrize("path", FORM_ROUTES)
async def test_a_body_that_is_not_a_form_is_refused(api, path):
    """TOK-1: one shape of refusal, not the framework's."""
    form = b"grant_type=password&username=alice&password=" + MARK.encode() + b"&token=" + MARK.encode()
    for media_type in (
        "",
        "text/plain",
        "application/json",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded; charset=utf-16",
        "application/x-www-form-urlencoded, text/plain",
        "application/x-www-form-urlencodedx",
        "x/application/x-www-form-urlencoded",
        "application/x-www-form-urlencoded\u00e9",
    ):
        own = [(b"Content-Type", media_type.encode())]
        answer = await api.http.post(path, content=form, headers=own)
        assert_oauth_error(answer, 400, "invalid_request")
    assert_oauth_error(await api.http.post(path), 400, "invalid_request")
    multipart = {"grant_type": (None, "password"), "username": (None, "alice"), "token": (None, MARK)}
    assert_oauth_error(await api.http.post(path, files=multipart), 400, "invalid_request")


@pytest.mark.parametrize("path", FORM_ROUTES)
async def test_a_form_that_is_no_form_inside_is_refused(api, path):
    for body in (
        b"",
        b"&",
        b"&" * 60_000,
        b"=" * 60_000,
        b"=x",
        b"grant_type",
        b"grant_type=",
        b"token=",
        b"\xef\xbb\xbfgrant_type=password",
        "grant_type=password&token=x".encode("utf-16"),
        b"grant_type=password&username=\xff",
        "grant_type=password&username=\u00e9".encode(),
        b"grant_type=pass\x00word&token=\x00",
        b"&".join(b"a%d=%s" % (number, MARK.encode()) for number in range(3000)),
        b'{"grant_type": "password", "token": "x"}',
        b"[" * 60_000,
        b"grant_type[]=password&token[]=x",
        b"GRANT_TYPE=password&TOKEN=x",
        b"%00=x",
        b"%ff=x",
    ):
        assert_oauth_error(await post_form(api, path, body), 400, "invalid_request")


async def test_a_semicolon_separates_nothing(api, alice):
    """What splits there and what does not would read two different forms."""
    body = f"grant_type=password;username=alice;password={PASSWORD.replace(' ', '+')}"
    assert_oauth_error(await post_form(api, "/token", body.encode()), 400, "unsupported_grant_type")


STRANGE_CREDENTIALS = [
    "Basic",
    "Basic ",
    "Basic \u00e9",
    "Basic !!!!",
    "Basic Zmlyc3QtcGFydHk",
    "Basic Zmlyc3QtcGFydHk=",
    "Basic Zmlyc3QtcGFydHk6=",
    "Basic Oh==",
    "Basic /////w==",
    "Basic AAA6AAA=",
    "Basic " + "QUFB" * 15_000,
    "Basic JWZmOng=",
    "Bearer x",
    "Digest x",
    "x" * 10_000,
    ":",
]


async def test_strange_client_credentials_are_a_refusal(api):
    """TOK-6, TOK-7, F47"""
    for authorization in STRANGE_CREDENTIALS:
        for path, forms in FORM_ROUTES.items():
            form = {name: value for name, value in forms[0].items() if not name.startswith("client_")}
            answer = await api.http.post(path, data=form, headers=[(b"Authorization", authorization.encode())])
            assert_oauth_error(answer, 401, "invalid_client")
            assert answer.headers["www-authenticate"] == 'Basic realm="identity", charset="UTF-8"'


# Paths, queries and headers

ODD_SEGMENTS = [
    "%2e%2e",
    "..%2f..",
    "%2f",
    "%5c",
    "%00",
    "me%00",
    "me%0a",
    "ME",
    "me.",
    "me%20",
    "m%65x",
    "0",
    "-1",
    "1e9",
    "null",
    "undefined",
    "None",
    "*",
    "'",
    "%22",
    "%ff",
    "%c0%ae%c0%ae",
    "%f0%9f%a6%89",
    "00000000-0000-0000-0000-000000000000",
    "00000000-0000-7000-8000-00000000000g",
    "a" * 3000,
    "{id}",
    "%7Bid%7D",
]


async def test_an_odd_segment_reaches_no_account(api, alice):
    """F80: whoever is asked for by a path of their own making is not there."""
    token = (await alice.log_in())["access_token"]
    reached = []
    for segment in ODD_SEGMENTS:
        for path in (f"/users/{segment}", f"/users/{segment}/password", f"/users/me/{segment}", f"/{segment}/users"):
            for method in ("GET", "PUT", "PATCH", "DELETE"):
                answer = await api.http.request(method, path, headers=bearer(token))
                if answer.status_code not in (400, 404, 405):
                    reached.append((method, path, answer.status_code))
    assert reached == []


@pytest.mark.parametrize(
    "query",
    [
        "%00",
        "%ff=%ff",
        "a=%0d%0aX:1",
        "&" * 5000,
        "a=" + "x" * 20_000,
        "__proto__[x]=1",
        "\u00e9",
        "access_token={token}",
        "token={token}&username=alice",
        "client_id=unknown&client_id=unknown",
    ],
)
async def test_a_query_changes_nothing_anywhere(api, alice, query):
    """RS-5, TOK-2: nothing is read from there, least of all a token."""
    token = (await alice.log_in())["access_token"]
    asked = query.replace("{token}", token)
    for path in (
        "/",
        "/health",
        "/readyz",
        "/.well-known/jwks.json",
        "/.well-known/oauth-authorization-server",
        "/docs",
    ):
        plain, answer = await api.http.get(path), await api.http.get(f"{path}?{asked}")
        assert (answer.status_code, answer.content) == (plain.status_code, plain.content)
    assert (await api.http.get(f"/users/me?{asked}")).json()["code"] == "authentication_required"
    assert (await api.http.get(f"/users/me?{asked}", headers=bearer(token))).json()["id"] == alice.id
    assert_oauth_error(await api.http.post(f"/token?grant_type=password&{asked}"), 400, "invalid_request")
    assert_oauth_error(await post_form(api, f"/token?grant_type=password&{asked}", b"a=b"), 400, "invalid_request")


# Everything at once

text = st.text(
    st.characters(codec=None) | st.sampled_from('\x00\x1f\x7f\x85\ud800\udfff\u200d\ufeff\uff20\u0130/~"\\%&=;')
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=6
)
member_names = st.sampled_from(sorted({member for _, _, member in MEMBERS} | {"roles", "refresh_token", "token", "id"}))
objects = st.dictionaries(member_names, documents, max_size=4)
mutations = st.sampled_from([*NOT_TEXT, *SURROGATES, *NOT_JSON_TEXT, *ESCAPED_CONTROLS])
form_names = st.sampled_from(sorted({name for _, form, _ in FORM_CASES for name in form} | {"client_secret", "x"}))
forms = st.lists(
    st.tuples(form_names, text | st.sampled_from([PASSWORD, "alice", "password", "refresh_token"])), max_size=6
)


def form_bytes(pairs: list[tuple[str, str]]) -> bytes:
    """Percent-encode without asking whether it can be UTF-8."""
    return b"&".join(
        name.encode() + b"=" + "".join(f"%{byte:02x}" for byte in value.encode("utf-8", "surrogatepass")).encode()
        for name, value in pairs
    )


bodies = (
    st.binary(max_size=200)
    | (documents | objects).map(lambda value: json.dumps(value).encode())
    | forms.map(form_bytes)
    | st.tuples(st.sampled_from(MEMBERS), mutations).map(
        lambda case: body_with(JSON_ROUTES[case[0][0], case[0][1]], case[0][2], case[1])
    )
)
header_values = st.binary(max_size=40).map(lambda value: re.sub(rb"[\r\n\x00]", b"?", value)) | st.sampled_from(
    [
        b"application/json",
        b"application/x-www-form-urlencoded",
        b"multipart/form-data; boundary=x",
        b"application/json; charset*=utf-8''%ff",
        b"Basic Zmlyc3QtcGFydHk6",
        b"Bearer a.b.c",
        b"Bearer e30.e30.e30",
        b"https://app.example.com",
        b'__Host-identity-refresh="\\377"',
        b"__Host-identity-refresh=e30.e30.e30",
        b'W/"x", "y"',
    ]
)
header_names = st.sampled_from(
    [
        b"Authorization",
        b"Content-Type",
        b"Content-Length",
        b"Cookie",
        b"Origin",
        b"Host",
        b"If-None-Match",
        b"X-Request-ID",
        b"Range",
        b"Accept",
        b"Access-Control-Request-Method",
        b"Transfer-Encoding",
    ]
)
segments = st.binary(max_size=6).map(lambda value: quote(value, safe=""))


@given(
    operation=st.integers(0, 9999),
    in_path=segments,
    shaped=st.booleans(),
    more=st.lists(st.tuples(header_names, header_values), max_size=3),
    logged_in=st.booleans(),
    body=bodies,
)
@settings(
    max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
async def test_no_request_at_all_is_a_failure_of_ours(api, operation, in_path, shaped, more, logged_in, body):
    """F61: any body with any headers to any operation of the description, half of them in the right shape."""
    operations = [
        ("HEAD" if path == ENDLESS else method.upper(), path)
        for path, item in api.app.openapi()["paths"].items()
        for method in item
    ]
    method, path = operations[operation % len(operations)]
    media_type = b"application/x-www-form-urlencoded" if path in FORM_ROUTES else b"application/json"
    headers = [(b"content-type", media_type), (b"origin", APP.encode())] if shaped else []
    if logged_in:
        token = (await a_session(api))["access_token"]
        headers.append((b"Authorization", b"Bearer " + token.encode()))
    answer = await api.http.request(
        method, re.sub(r"{\w+}", lambda _: in_path, path), content=body, headers=[*headers, *more]
    )
    assert answer.status_code < 500
    if answer.status_code >= 400 and method != "HEAD":
        kind = answer.headers["content-type"]
        assert kind in ("application/problem+json", "application/json")
        assert answer.json().keys() >= ({"code", "request_id"} if "problem" in kind else {"error", "error_description"})


async def a_session(api: Api) -> dict[str, Any]:
    """Return tokens of an account that may be gone again in the next example."""
    form = {"grant_type": "password", "username": "fuzzed", "password": PASSWORD}
    answer = await api.http.post("/token", data=form)
    if answer.status_code != 200:
        async with api.database.connection() as db:
            await db.execute("DELETE FROM users")
        await api.sign_up("fuzzed")
        answer = await api.http.post("/token", data=form)
    tokens: dict[str, Any] = answer.json()
    return tokens


@given(username=text, password=text, email=text)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_name_password_or_address_is_a_failure_of_ours(api, username, password, email):
    """What gets past the reader goes all the way: policy, hash and database."""
    body = {"username": username or ascii_letters, "password": (password + PASSWORD)[:300], "email": email or None}
    headers = {"Content-Type": "application/json", "Origin": APP}
    answer = await api.http.post("/users", content=json.dumps(body), headers=headers)
    assert answer.status_code in (201, 409, 422)
    del body["email"]
    await api.forget_failures()
    answer = await api.http.post("/login", content=json.dumps(body), headers=headers)
    assert answer.status_code in (200, 401, 422)
