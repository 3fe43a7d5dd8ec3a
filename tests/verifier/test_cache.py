"""What is remembered of tokens, and what ends it."""

import pytest

from identity_service.verifier import TokenRejected
from identity_service.verifier.cache import FRESH_TOKENS, TokenCache
from identity_service.verifier.claims import StatusReference
from identity_service.verifier.revocations import SILENCE
from tests.verifier.conftest import LIST, Clock, Issuer, until


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


async def test_whatever_is_heard_makes_every_token_looked_at_again(issuer: Issuer) -> None:
    verifier = issuer.verifier(follow_revocations=False)
    token = issuer.token()
    await verifier.verify(token)
    assert not verifier._cache.fresh, "tokens that are seen once would push out those that are used"
    await verifier.verify(token)
    assert token in verifier._cache.fresh
    verifier.hear_revoked(StatusReference(LIST, 7), int(issuer.clock()) + 600)
    assert not verifier._cache.fresh
    await verifier.verify(token)
    assert token in verifier._cache.fresh


async def test_what_is_heard_while_a_token_is_looked_at_is_not_lost(issuer: Issuer) -> None:
    """In whichever order another thread speaks: what was asked before it spoke is not kept."""
    claims = await issuer.kit.verifier().verify(issuer.token())
    cache = TokenCache(100)
    asked = cache.fresh
    cache.forget_fresh()
    cache.keep_fresh(asked, "token", claims)
    assert not cache.fresh


async def test_a_list_that_changes_makes_every_token_looked_at_again(issuer: Issuer) -> None:
    async with issuer.verifier() as verifier:
        token = issuer.token()
        await verifier.verify(token)
        await until(lambda: verifier._revocations._lists[LIST].connection == 1)
        del verifier._revocations._lists[LIST]
        await verifier.verify(token)
        assert not verifier._cache.fresh, "it was asked about before its list was there"
        await verifier.verify(token)
        assert token in verifier._cache.fresh
        issuer.revoked = set(range(1024))
        issuer.requests.clear()
        verifier._revocations._lists[LIST].due_at = issuer.clock()
        await until(lambda: issuer.asked("/status-lists/1") > 0 and not verifier._cache.fresh)
        with pytest.raises(TokenRejected, match="revoked"):
            await verifier.verify(token)


async def test_silence_makes_every_token_looked_at_again(issuer: Issuer) -> None:
    """A task that hangs says nothing, and neither does one whose loop is gone."""
    async with issuer.verifier() as verifier:
        token = issuer.token()
        await verifier.verify(token)
        await until(lambda: verifier._revocations._lists[LIST].connection == 1)
        await verifier.verify(token)
        assert token in verifier._cache.fresh
        issuer.revoked = set(range(1024))
        issuer.clock.advance(SILENCE + 5)
        with pytest.raises(TokenRejected, match="revoked"):
            await verifier.verify(token)


async def test_the_fresh_ones_are_few_and_text(issuer: Issuer) -> None:
    claims = await issuer.kit.verifier().verify(issuer.token())
    cache = TokenCache(10_000)
    for number in range(1000):
        cache.keep_fresh(cache.fresh, str(number), claims)
        assert len(cache.fresh) <= FRESH_TOKENS
    verifier = issuer.verifier(follow_revocations=False)
    octets = issuer.token().encode()
    for _ in range(3):
        await verifier.verify(octets)
        assert not verifier._cache.fresh


async def test_who_rejects_when_nothing_is_heard_looks_every_time(issuer: Issuer) -> None:
    async with issuer.verifier(on_stale="reject") as verifier:
        token = issuer.token()
        for _ in range(3):
            await verifier.verify(token)
            assert not verifier._cache.fresh


async def test_a_remembered_token_starts_the_following_again_after_closing(issuer: Issuer) -> None:
    verifier = issuer.verifier()
    token = issuer.token()
    for _ in range(3):
        await verifier.verify(token)
    await until(lambda: verifier.status().stream_connected)
    await verifier.aclose()
    await verifier.verify(token)
    await until(lambda: verifier.status().stream_connected)
    await verifier.aclose()
