"""Which names are one name, and which addresses one address (PWD-9, F55, RFC 8265)."""

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from identity_service.accounts.registration import normalise_email, normalise_username
from identity_service.errors import EmailRejected, UsernameRejected
from tests.conftest import PASSWORD, Account, Api
from tests.web.answers import problem, seen

APP = "https://app.example.com"


def full_width(text: str) -> str:
    return "".join(chr(ord(character) + 0xFEE0) for character in text)


async def sign_up(api: Api, username: str) -> int:
    answer = await api.http.post("/users", json={"username": username, "password": PASSWORD})
    assert answer.status_code in (201, 409, 422), answer.text
    assert answer.status_code != 422 or answer.json()["code"] == "username_rejected"
    return int(answer.status_code)


async def forget_everyone(api: Api) -> None:
    async with api.database.connection() as db:
        await db.execute("DELETE FROM users")


# Two spellings that people take for one name, by what tells them apart.
TWINS = {
    "case": ("alice", "ALICE"),
    "full width": ("alice", full_width("alice")),
    "full width digits": ("agent007", "agent" + full_width("007")),
    "Kelvin sign": ("kelvin", "\u212aelvin"),
    "Angstrom sign": ("\u00e5ngstrom", "\u212bngstrom"),
    "Ohm sign": ("\u03c9mega", "\u2126mega"),
    "decomposed": ("caf\u00e9", "cafe\u0301"),
    "two marks in another order": ("a\u0323\u0307", "a\u0307\u0323"),
    "decomposed Hangul": ("\ud55c\uae00", "\u1112\u1161\u11ab\u1100\u1173\u11af"),
    "sharp s": ("strasse", "stra\u00dfe"),
    "capital sharp s": ("strasse", "stra\u1e9ee"),
    "dotless i": ("irmak", "\u0131rmak"),
    "dotted capital I": ("irmak", "\u0130rmak"),
    "i with one more dot": ("irmak", "i\u0307rmak"),
    "j with one more dot": ("jana", "j\u0307ana"),
    "long s": ("sam", "\u017fam"),
    "final sigma": ("\u03c3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2", "\u03c3\u03af\u03c3\u03c5\u03c6\u03bf\u03c3"),
    "micro sign": ("\u03bcm", "\u00b5m"),
    "iota below": ("\u03b1\u03b9", "\u1fb3"),
    "n behind an apostrophe": ("\u02bcn", "\u0149"),
    "ligature": ("fish", "\ufb01sh"),
    "Roman numeral": ("viii", "\u2167"),
    "circled letter": ("a", "\u24d0"),
    "mathematical letter": ("alice", "\U0001d41alice"),
    "superscript": ("x2", "x\u00b2"),
    "Arabic presentation form": ("\u0628", "\ufe91"),
    "zero-width space": ("alice", "al\u200bice"),
    "zero-width joiner": ("alice", "al\u200dice"),
    "zero-width non-joiner": ("alice", "al\u200cice"),
    "joiner where Indic scripts permit it": ("\u0915\u094d\u0937", "\u0915\u094d\u200d\u0937"),
    "non-joiner where Indic scripts permit it": ("\u0915\u094d\u0937", "\u0915\u094d\u200c\u0937"),
    "soft hyphen": ("alice", "al\u00adice"),
    "word joiner": ("alice", "al\u2060ice"),
    "byte order mark": ("alice", "\ufeffalice"),
    "variation selector": ("alice", "alice\ufe0f"),
    "grapheme joiner": ("alice", "al\u034fice"),
    "tag character": ("alice", "alice\U000e0061"),
    "Hangul filler": ("alice", "alice\u3164"),
    "Mongolian vowel separator": ("alice", "al\u180eice"),
    "trailing space": ("alice", "alice "),
    "leading space": ("alice", " alice"),
    "no-break space": ("alice", "alice\u00a0"),
    "ideographic space": ("alice", "alice\u3000"),
    "right-to-left override": ("alice", "\u202ealice"),
    "left-to-right mark": ("alice", "alice\u200e"),
    "isolate": ("alice", "\u2066alice\u2069"),
    "both directions": ("\u05d0\u05d1", "a\u05d0\u05d1"),
}


async def test_two_spellings_of_one_name_are_one_account_or_one_of_them_is_refused(api):
    wrong = {}
    for difference, twins in TWINS.items():
        assert twins[0] != twins[1]
        statuses = [await sign_up(api, name) for name in (*twins, *twins[::-1])]
        if statuses.count(201) != 1 or await api.scalar("SELECT count(*) FROM users") != 1:
            wrong[difference] = statuses
        await forget_everyone(api)
    assert wrong == {}


@pytest.mark.parametrize(
    ("registered", "entered"),
    [
        ("Alice", "aLICE"),
        ("alice", full_width("Alice")),
        ("\u212aelvin", "kelvin"),
        ("cafe\u0301", "CAF\u00c9"),
        ("alice@example.com", "Alice\uff20Example.com"),
    ],
)
async def test_every_spelling_that_is_one_name_logs_in_to_the_one_account(api, registered, entered):
    """The same function at the sign-up and at the login (F52)."""
    answer = await api.http.post("/users", json={"username": registered, "password": PASSWORD})
    user = answer.json()
    tokens = await Account(api, user["id"], entered, PASSWORD).log_in()
    assert (await api.me(tokens["access_token"])).json() == user
    body = {"username": entered, "password": PASSWORD}
    assert (await api.http.post("/login", json=body, headers={"Origin": APP})).status_code == 200


@pytest.mark.parametrize(
    "username",
    [
        "a",
        "alice",
        "alice-b.c_d",
        "alice@example.com",
        "o'brien",
        "x" * 254,
        "\u00e9milie",
        "\u5f20\u4f1f",
        "\u043c\u0430\u0440\u0438\u044f",
        "\u0645\u0631\u062d\u0628\u0627",
        "\u05e9\u05dc\u05d5\u05dd",
        "\ud55c\uae00",
        "\u30a2\u30ea\u30b9",
        "l\u00b7l",
        "007",
    ],
)
async def test_names_of_every_script_are_welcome_and_kept_as_they_are(api, username):
    answer = await api.http.post("/users", json={"username": username, "password": PASSWORD})
    assert (answer.status_code, answer.json()["username"]) == (201, username)
    await Account(api, "", username, PASSWORD).log_in()


@pytest.mark.parametrize(
    "username",
    [
        "al ice",
        "alice\u2003b",
        "alice\u2028",
        "\U0001f989",
        "alice\U0001f989",
        "\u2192",
        "\u20ac",
        "\ufdfd",
        "\ue000",
        "\U0010ffff",
        "\ufffd",
        "a\u00b7b",
        "\u0660\u06f0",
        "x" * 255,
        full_width("x") * 255,
        "\u0149" * 10,
        "6f1c1d3e-6c1c-4f0a-9c39-3f6d4a0f6a11",
        "6F1C1D3E-6C1C-4F0A-9C39-3F6D4A0F6A11",
    ],
)
async def test_what_is_no_name_is_refused_and_not_repaired(api, username):
    assert await sign_up(api, username) == 422
    assert await api.scalar("SELECT count(*) FROM users") == 0


@given(
    st.text(min_size=1, max_size=40)
    | st.text("iI\u0130\u0131\u0307jJsS\u017f\u00df\u212ak\u00e5\uff21aA.-_@", min_size=1)
)
@example("\u0130" * 200)
@example("\u1e9e")
@example("\uff21" * 254)
@settings(max_examples=400, deadline=None)
def test_a_name_that_was_accepted_is_accepted_again_as_itself(username):
    """What the account shows as its name is what its owner can log in with."""
    try:
        once = normalise_username(username)
    except UsernameRejected:
        return
    assert normalise_username(once) == once == unicodedata.normalize("NFC", once)
    assert len(once) <= 254


@given(
    st.text(min_size=1, max_size=12)
    | st.text("iI\u0130\u0131\u0307jJsS\u017f\u00df\u212ak\u00e5\u03c3\u03c2aA", min_size=1)
)
@example("\u0130")
@example("i\u0307")
@settings(max_examples=400, deadline=None)
def test_no_change_of_case_width_or_composition_makes_a_second_name(username):
    """Whatever upper-casing, lower-casing and the normal forms make of a name is that name or none."""
    try:
        name = normalise_username(username)
    except UsernameRejected:
        return
    variants = {username.upper(), username.lower(), username.casefold(), username.swapcase(), username.title()}
    variants |= {unicodedata.normalize(form, text) for form in ("NFC", "NFD") for text in (username, name.upper())}
    found = set()
    for variant in variants:
        try:
            found.add(normalise_username(variant))
        except UsernameRejected:
            continue
    assert found <= {name}


# E-mail


async def email_of(api: Api, email: str) -> str | None:
    """Return the address as it was stored, None when it was refused."""
    answer = await api.http.post("/users", json={"username": "alice", "password": PASSWORD, "email": email})
    await forget_everyone(api)
    if answer.status_code == 422:
        assert seen(answer) == problem(422, "email_rejected", "This is not an e-mail address that can be used.")
        return None
    assert answer.status_code == 201, answer.text
    stored: str = answer.json()["email"]
    return stored


ADDRESSES: dict[str, str | None] = {
    "alice@example.com": "alice@example.com",
    "Alice.B+tag@Example.COM": "Alice.B+tag@example.com",
    "alice@b\u00fccher.example": "alice@xn--bcher-kva.example",
    "alice@B\u00dcCHER.example": "alice@xn--bcher-kva.example",
    "alice@bu\u0308cher.example": "alice@xn--bcher-kva.example",
    "alice@xn--bcher-kva.example": "alice@xn--bcher-kva.example",
    "alice@XN--BCHER-KVA.example": "alice@xn--bcher-kva.example",
    "alice@fa\u00df.example": "alice@xn--fa-hia.example",
    "alice@example\u3002com": "alice@example.com",
    "\u00e9milie@example.com": "\u00e9milie@example.com",
    "e\u0301milie@example.com": "\u00e9milie@example.com",
    "o'brien@example.com": "o'brien@example.com",
    # Two addresses in one, of which a careless reader takes the second (F55).
    "alice@evil.example\uff20example.com": None,
    "alice\uff20evil.example@example.com": None,
    "alice@evil.example\ufe6bexample.com": None,
    "alice\uff20example.com": None,
    "alice@b@example.com": None,
    "alice@@example.com": None,
    '"alice@evil.example"@example.com': None,
    "alice@example.com,bob@example.com": None,
    "alice@example.com;bob@example.com": None,
    "alice@example.com bob@example.com": None,
    "alice@example.com>": None,
    "<alice@example.com>": None,
    "Alice <alice@example.com>": None,
    "mailto:alice@example.com": None,
    "alice@example.com?cc=bob@example.com": None,
    # Nothing is trimmed or guessed.
    " alice@example.com": None,
    "alice@example.com ": None,
    "alice@example.com\u00a0": None,
    "alice @example.com": None,
    "alice@ example.com": None,
    "al ice@example.com": None,
    "alice@exam ple.com": None,
    "alice\u200b@example.com": None,
    "alice@exam\u200bple.com": None,
    "alice@exam\u00adple.com": None,
    "\u202ealice@example.com": None,
    "alice@\u202eexample.com": None,
    "\ufeffalice@example.com": None,
    "alice\u2028@example.com": None,
    # Not an address, or not one that mail from here could reach.
    "": None,
    "@": None,
    "alice": None,
    "alice@": None,
    "@example.com": None,
    "alice@example": None,
    "alice@localhost": None,
    "alice@127.0.0.1": None,
    "alice@[127.0.0.1]": None,
    "alice@[IPv6:::1]": None,
    "alice@.example.com": None,
    "alice@example..com": None,
    "alice@example.com.": None,
    "alice@-example.com": None,
    "alice@example-.com": None,
    "alice@exam_ple.com": None,
    "alice@xn--.example": None,
    "alice@xn--zzz--.example": None,
    ".alice@example.com": None,
    "alice.@example.com": None,
    "al..ice@example.com": None,
    "alice(comment)@example.com": None,
    "alice@example.com(comment)": None,
    "alice@exam\u2100ple.com": None,
    "alice@example.com\uff0fevil.example": None,
    "alice@" + "x" * 64 + ".com": None,
    "alice@" + "x." * 130 + "com": None,
}


async def test_an_address_is_kept_in_one_spelling_or_refused(api):
    """PWD-9: NFC, one `@` after normalising, the domain as it is in the DNS, nothing trimmed."""
    kept = {address: await email_of(api, address) for address in ADDRESSES}
    assert {address: email for address, email in kept.items() if email != ADDRESSES[address]} == {}


async def test_a_changed_address_obeys_the_same_rules(api, alice):
    headers = {"Authorization": f"Bearer {(await alice.log_in())['access_token']}"}
    answer = await api.http.patch("/users/me", json={"email": "alice@B\u00dcCHER.example"}, headers=headers)
    assert answer.json()["email"] == "alice@xn--bcher-kva.example"
    refused = await api.http.patch("/users/me", json={"email": "alice@evil.example\uff20b.example"}, headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (422, "email_rejected")
    assert (await api.http.get("/users/me", headers=headers)).json()["email"] == "alice@xn--bcher-kva.example"


@given(
    st.emails()
    | st.tuples(st.text(max_size=8), st.text("a\u00fc\u00df\u0130\u0131\uff21.\u3002-", max_size=12)).map("@".join)
)
@example("a@\u0130.example")
@example("\u212b@example.com")
@settings(max_examples=300, deadline=None)
def test_an_address_that_was_accepted_is_accepted_again_as_itself(email):
    try:
        once = normalise_email(email)
    except EmailRejected:
        return
    assert normalise_email(once) == once
    local, _, domain = once.partition("@")
    assert unicodedata.normalize("NFC", local) == local
    assert domain.isascii()
    assert domain == domain.lower()
