"""Who is asking, behind proxies that we trust and behind others (BRW-7, F51)."""

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity_service.throttling import token_attempt
from identity_service.web.proxies import TrustedProxies
from tests.conftest import PASSWORD, StartApi
from tests.throttling.conftest import asking_from, with_failures

PROXIES = TrustedProxies([ip_network("10.0.0.0/8"), ip_network("192.0.2.1"), ip_network("fd00::/8")])


def client_of(peer: str | None, *forwarded: str, name: bytes = b"x-forwarded-for") -> str | None:
    scope: dict[str, Any] = {
        "headers": [(b"host", b"id.example.com"), *((name, value.encode("latin-1")) for value in forwarded)],
        "client": (peer, 1) if peer is not None else None,
    }
    return PROXIES.client_of(scope)


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("203.0.113.7", [], "203.0.113.7"),
        ("203.0.113.7", ["198.51.100.1"], "203.0.113.7"),
        ("203.0.113.7", ["10.0.0.1"], "203.0.113.7"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["8.8.8.8, 198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["8.8.8.8, 198.51.100.1, 10.1.1.1,192.0.2.1"], "198.51.100.1"),
        ("10.0.0.1", ["8.8.8.8", "198.51.100.1", "10.1.1.1"], "198.51.100.1"),
        ("10.0.0.1", ["8.8.8.8", ""], "10.0.0.1"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", ["8.8.8.8, nonsense"], "10.0.0.1"),
        ("10.0.0.1", ["8.8.8.8, nonsense, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", ["8.8.8.8,"], "10.0.0.1"),
        ("10.0.0.1", ["unknown"], "10.0.0.1"),
        ("10.0.0.1", ["for=198.51.100.1"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1:50123"], "198.51.100.1"),
        ("10.0.0.1", ["[2001:db8::7]:50123"], "2001:db8::7"),
        ("10.0.0.1", ["[2001:db8::7]"], "2001:db8::7"),
        ("10.0.0.1", ["2001:DB8:0::7"], "2001:db8::7"),
        ("10.0.0.1", ["::ffff:198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["\t198.51.100.1 "], "198.51.100.1"),
        ("10.0.0.1", ["198.051.100.1"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1/32"], "10.0.0.1"),
        ("10.0.0.1", ["x" * 60_000], "10.0.0.1"),
        ("10.0.0.1", ["\xb2.1.1.1"], "10.0.0.1"),
        ("::ffff:10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("::ffff:203.0.113.7", ["198.51.100.1"], "203.0.113.7"),
        ("fd00::1", ["fe80::1%eth0"], "fe80::1"),
        ("fe80::1%eth0", [], "fe80::1"),
        (None, ["198.51.100.1"], None),
        ("unix", ["198.51.100.1"], None),
    ],
)
def test_the_way_is_followed_through_trusted_proxies_and_no_further(peer, forwarded, expected):
    assert client_of(peer, *forwarded) == expected


@pytest.mark.parametrize("name", [b"x-real-ip", b"forwarded", b"x-client-ip", b"x-forwarded-host"])
def test_no_other_header_is_read_even_from_a_trusted_proxy(name):
    """A proxy that writes one of them passes the others on as the client sent them."""
    assert client_of("10.0.0.1", "198.51.100.1", name=name) == "10.0.0.1"


def test_a_long_way_is_cut_at_proxies_of_ours():
    many = ", ".join(["8.8.8.8"] + ["10.0.0.2"] * 5000)
    assert client_of("10.0.0.1", many) == "10.0.0.2"


@given(forged=st.lists(st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=30), max_size=20))
def test_whatever_a_client_sends_its_proxy_has_the_last_word(forged):
    assert client_of("10.0.0.1", *forged, "198.51.100.1") == "198.51.100.1"
    assert client_of("198.51.100.1", *forged) == "198.51.100.1"


@given(entry=st.ip_addresses(), peer=st.ip_addresses())
def test_every_address_comes_out_in_one_spelling(entry, peer):
    assert ip_address(client_of("10.0.0.1", str(entry)) or "").version in (4, 6)
    assert client_of("10.0.0.1", str(entry)) == client_of("10.0.0.1", f"[{entry.exploded}]:1")
    assert client_of(str(peer)) == client_of(peer.exploded)


async def test_sessions_and_the_audit_know_the_client_and_not_the_proxy(start_api: StartApi):
    async with start_api(trusted_proxies="10.0.0.0/8") as api, asking_from(api.app, "10.0.0.1") as proxy:
        await api.sign_up()
        form = {"grant_type": "password", "username": "alice", "password": PASSWORD}
        headers = {"X-Forwarded-For": "8.8.8.8, 198.51.100.1"}
        assert (await proxy.post("/token", data=form, headers=headers)).status_code == 200
        assert await api.scalar("SELECT address FROM sessions") == "198.51.100.1"
        assert await api.scalar("SELECT address FROM audit_events WHERE event = 'user.login'") == "198.51.100.1"


async def test_clients_behind_a_trusted_proxy_are_slowed_one_by_one(start_api: StartApi):
    async with start_api(trusted_proxies="10.0.0.0/8") as api, asking_from(api.app, "10.0.0.1") as proxy:
        await api.sign_up()

        async def log_in(username: str, forwarded: str) -> int:
            form = {"grant_type": "password", "username": username, "password": PASSWORD}
            return (await proxy.post("/token", data=form, headers={"X-Forwarded-For": forwarded})).status_code

        await with_failures(api.database, token_attempt("198.51.100.1", exempt=()), 95)
        for number in range(6):
            # What the client wrote by itself stands to the left.
            assert await log_in(f"user{number}", f"8.8.8.{number}, 198.51.100.1") == 400
        assert await log_in("alice", "198.51.100.1") == 429
        assert await log_in("alice", "198.51.100.2") == 200
