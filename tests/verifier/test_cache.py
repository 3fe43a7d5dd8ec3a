"""What is remembered of tokens, and what ends it."""

import pytest

from identity_service.verifier import TokenRejected
from identity_service.verifier.cache import TokenCache
from tests.verifier.conftest import Clock, Issuer


async def test_a_remembered_token_gives_the_same_claims(issuer: Issuer) -> None:
    verifier = issuer.verifier(follow_revocations=False)
    token = issuer.token()
    assert await verifier.verify(token) is await verifier.verify(token.encode())
    assert verifier.status().cached_tokens == 1


async def test_a_remembered_token_expires(issuer: Issuer, now: Clock) -> None:
    verifier = issuer.verifier(follow_revocations=False)
    token = issuer.token(lifetime=60)
    await verifier.verify(token)
    now.advance(89)
    await verifier.verify(token)
    now.advance(1)
    with pytest.raises(TokenRejected, match="expired"):
        await verifier.verify(token)
    assert verifier.status().cached_tokens == 0


async def test_a_remembered_token_is_revoked(issuer: Issuer) -> None:
    verifier = issuer.kit.verifier()
    token, other = issuer.token(sid="s1"), issuer.token(sid="s2")
    await verifier.verify(token)
    await verifier.verify(other)
    issuer.kit.revoke(token)
    with pytest.raises(TokenRejected, match="revoked"):
        await verifier.verify(token)
    with pytest.raises(TokenRejected, match="revoked"):
        await verifier.verify(issuer.token(sid="s1"))
    assert await verifier.verify(other)


async def test_switched_off_it_remembers_nothing(issuer: Issuer) -> None:
    verifier = issuer.verifier(cache_size=0, follow_revocations=False)
    token = issuer.token()
    assert await verifier.verify(token) is not await verifier.verify(token)
    assert verifier.status().cached_tokens == 0


async def test_it_is_bounded_and_keeps_what_is_used(issuer: Issuer) -> None:
    claims = await issuer.kit.verifier().verify(issuer.token())
    cache = TokenCache(100)
    hot = b"hot"
    cache.put(hot, claims)
    for number in range(1000):
        cache.put(str(number).encode(), claims)
        assert cache.get(hot) or cache.get_older(hot)
        assert len(cache) <= 100
    assert not cache.get(b"1")
    assert not cache.get_older(b"1")
    cache.remove(hot)
    cache.remove(hot)
    assert not cache.get(hot)
    assert not cache.get_older(hot)
    cache.clear()
    assert len(cache) == 0


async def test_a_key_that_goes_while_the_list_is_fetched_leaves_nothing_behind(issuer: Issuer) -> None:
    verifier = issuer.verifier()

    def answer(request: object) -> object:
        verifier._keys._keys = {}
        return issuer._list(request)  # type: ignore[arg-type]

    issuer.list_answer = answer  # type: ignore[assignment]
    await verifier.verify(issuer.token())
    assert verifier.status().cached_tokens == 0
    await verifier.aclose()
