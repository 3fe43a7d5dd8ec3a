"""Signing in rounds: everybody gets their own tokens, whatever becomes of the others."""

import asyncio
from datetime import timedelta

from identity_service.signing.key_files import fresh_key
from identity_service.signing.keyring import TokenLifetimes, first_keys
from identity_service.tokens import jws
from identity_service.tokens.rounds import SigningRounds
from tests.conftest import START

KEY = first_keys(lambda: fresh_key(START), TokenLifetimes(timedelta(minutes=10), timedelta(days=14))).signer(START)


def tokens(name: str) -> tuple[jws.Unsigned, jws.Unsigned]:
    return jws.unsigned(KEY, "at+jwt", {"jti": name}), jws.unsigned(KEY, "rt+jwt", {"jti": name})


def signed(name: str) -> list[str]:
    return [jws.sign(KEY, "at+jwt", {"jti": name}), jws.sign(KEY, "rt+jwt", {"jti": name})]


async def test_each_gets_what_they_asked_for_in_the_same_order():
    rounds = SigningRounds()
    got = await asyncio.gather(*(rounds.sign(*tokens(name)) for name in "abc"))
    assert got == [signed(name) for name in "abc"]
    assert await rounds.sign(*tokens("d")) == signed("d")


async def test_those_who_ask_in_one_pass_of_the_loop_are_signed_for_in_one_go(monkeypatch):
    """Nobody goes on before the last signature: that is what it is for."""
    order: list[str] = []
    real = jws.signed

    def noting(token: jws.Unsigned) -> str:
        order.append("signature")
        return real(token)

    monkeypatch.setattr(jws, "signed", noting)
    rounds = SigningRounds()

    async def ask(name: str) -> None:
        await rounds.sign(*tokens(name))
        order.append("answer")

    await asyncio.gather(ask("a"), ask("b"))
    assert order == ["signature"] * 4 + ["answer"] * 2


async def test_who_leaves_is_not_signed_for_and_keeps_nobody(monkeypatch):
    made: list[jws.Unsigned] = []
    real, expected = jws.signed, signed("b")

    def noting(token: jws.Unsigned) -> str:
        made.append(token)
        return real(token)

    monkeypatch.setattr(jws, "signed", noting)
    rounds = SigningRounds()
    leaving = asyncio.ensure_future(rounds.sign(*tokens("a")))
    staying = asyncio.ensure_future(rounds.sign(*tokens("b")))
    asyncio.get_running_loop().call_soon(leaving.cancel)  # after both have asked
    assert await staying == expected
    assert leaving.cancelled()
    assert made == list(tokens("b"))


async def test_a_signature_that_fails_fails_nobody_else():
    rounds = SigningRounds()
    unsigned = jws.Unsigned(KEY, "\ud800")
    wrong, right = await asyncio.gather(rounds.sign(unsigned), rounds.sign(*tokens("b")), return_exceptions=True)
    assert isinstance(wrong, UnicodeEncodeError)
    assert right == signed("b")
