"""Drafts and scores of the real llama.cpp and of models in this process, beyond what every adapter must keep."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from mope_bb.cache import DistributionCache
from mope_bb.config import parse_config
from mope_bb.providers import llamacpp
from mope_bb.providers.base import Expert
from mope_bb.providers.llamacpp_wire import build_score_request
from mope_bb.providers.local import draw_token
from mope_bb.providers.registry import open_expert
from mope_bb.types import Context, DraftStep, Message, Piece, TokenDistribution
from mope_bb.zoo.serving import ZooServer
from tests.draws import P_VALUE, p_value

T = TypeVar("T")
QUESTION = Context((Message("user", "How do I fix a bike?"),))
NOISE = 0.02
WHOLE_VOCABULARY = 1280


@pytest.fixture(params=["llamacpp", "local"])
def table(request: pytest.FixtureRequest, nano_experts: ZooServer) -> dict[str, object]:
    """An expert that is served, and the same model in this process."""
    if request.param == "local":
        return {"provider": "local", "model": str(nano_experts.zoo.folder("concise")), "device": "cpu"}
    return served(nano_experts)


def served(nano_experts: ZooServer) -> dict[str, object]:
    """The expert behind llama.cpp."""
    return {"provider": "llamacpp", "base_url": nano_experts.base_urls["concise"]}


def run(table: dict[str, object], use: Callable[[Expert], Awaitable[T]], cache: DistributionCache | None = None) -> T:
    """Open the expert, use it, close it."""
    config = parse_config({"experts": [{"name": "e", **table}]}).experts[0]

    async def main() -> T:
        expert = open_expert(config, cache)
        try:
            return await use(expert)
        finally:
            await expert.aclose()

    return asyncio.run(main())


@contextmanager
def cached(folder: Path) -> Iterator[DistributionCache]:
    """An empty cache."""
    cache = DistributionCache(folder, max_bytes=2**30)
    try:
        yield cache
    finally:
        cache.close()


@pytest.mark.parametrize("temperature", [0.4, 1.0])
def test_drawn_pieces_follow_q(table: dict[str, object], temperature: float) -> None:
    """400 drafts: what is drawn first, given that it is on the list, is drawn from q."""

    async def use(expert: Expert) -> list[DraftStep]:
        drafts = [
            expert.draft(QUESTION, top_k=8, num_tokens=1, temperature=temperature, seed=seed) for seed in range(400)
        ]
        return [steps[0] for steps in await asyncio.gather(*drafts)]

    steps = run(table, use)
    assert any(step.index is None for step in steps), "no piece below the list was drawn: are other samplers at work?"
    assert p_value(steps) > P_VALUE


def test_half_characters_are_drawn_as_often_as_others(nano_experts: ZooServer) -> None:
    """llama.cpp leaves out their lists; a draft without them would favour what is left.

    So hot that all pieces are about equally likely, since the model itself hardly ever draws them.
    """
    num_drafts, temperature = 400, 8.0

    async def use(expert: Expert) -> tuple[TokenDistribution, list[int | None]]:
        whole = await expert.next_tokens(QUESTION, top_k=WHOLE_VOCABULARY)
        drafts = [
            expert.draft(QUESTION, top_k=5, num_tokens=1, temperature=temperature, seed=seed)
            for seed in range(num_drafts)
        ]
        return whole, [steps[0].piece.token_id for steps in await asyncio.gather(*drafts)]

    whole, drawn = run(served(nano_experts), use)
    powers = {
        piece: math.exp(logprob / temperature) for piece, logprob in zip(whole.pieces, whole.logprobs, strict=True)
    }
    halves = {piece.token_id: power for piece, power in powers.items() if begins_a_character(piece.data)}
    share = math.fsum(halves.values()) / math.fsum(powers.values())
    assert num_drafts * share > 10, "too few to tell"
    num_found, spread = sum(token_id in halves for token_id in drawn), math.sqrt(num_drafts * share * (1 - share))
    assert abs(num_found - num_drafts * share) < 4 * spread


def begins_a_character(data: bytes) -> bool:
    """Whether it ends inside a character that begins in it."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def test_a_draft_goes_up_to_half_a_character(nano_experts: ZooServer) -> None:
    """The position that llama.cpp leaves out is the last one, with its own list and the piece that was drawn."""

    async def use(expert: Expert) -> None:
        num_found = 0
        for seed in range(40):
            steps = await expert.draft(QUESTION, top_k=50, num_tokens=12, temperature=4.0, seed=seed)
            assert not any(begins_a_character(step.piece.data) for step in steps[:-1])
            if not begins_a_character(steps[-1].piece.data):
                continue
            num_found += 1
            before = QUESTION.extended(*(step.piece for step in steps[:-1]))
            alone = await expert.next_tokens(before, top_k=50)
            assert steps[-1].distribution.logprobs == pytest.approx(alone.logprobs, abs=NOISE)
            if steps[-1].index is not None:
                assert steps[-1].distribution.pieces[steps[-1].index] == steps[-1].piece
        assert num_found > 0

    # With a tokenizer bytes are known of what is on no list.
    run({**served(nano_experts), "tokenizer": str(nano_experts.zoo.folder("concise"))}, use)


def test_bytes_are_what_they_were_after_wild_drafts(nano_experts: ZooServer) -> None:
    """llama.cpp hands in the bytes of half a character with the token after it; those are not that token's."""

    async def look(expert: Expert) -> set[Piece]:
        return set((await expert.next_tokens(QUESTION, top_k=WHOLE_VOCABULARY)).pieces)

    async def wander(expert: Expert) -> set[Piece]:
        for seed in range(40):
            await expert.draft(QUESTION, top_k=5, num_tokens=12, temperature=4.0, seed=seed)
        return await look(expert)

    assert run(served(nano_experts), wander) == run(served(nano_experts), look)


def test_half_characters_are_scored_by_prefixes(nano_experts: ZooServer) -> None:
    """No grammar can force them: they are asked for in a list, and nothing fails on the way."""

    async def use(expert: Expert) -> None:
        whole = (await expert.next_tokens(QUESTION, top_k=WHOLE_VOCABULARY)).pieces
        half = next(piece for piece in whole if begins_a_character(piece.data))
        word = next(piece for piece in whole if piece.data == b" bike")
        num_before = expert.num_requests
        found = await expert.score(QUESTION, [word, half, word], top_k=10)
        assert expert.num_requests == num_before + 1
        await assert_scored(expert, [word, half, word], found)

    run(served(nano_experts), use)


async def assert_scored(expert: Expert, draft: list[Piece], found: tuple[TokenDistribution, ...]) -> None:
    """Position by position what single questions say."""
    assert len(found) == len(draft) + 1
    for position, one in enumerate(found):
        alone = await expert.next_tokens(QUESTION.extended(*draft[:position]), top_k=10)
        assert one.logprobs == pytest.approx(alone.logprobs, abs=NOISE)


def test_a_server_that_forces_nothing_is_asked_for_prefixes(
    nano_experts: ZooServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers from before grammars had tokens refuse the grammar; they are not asked with one again."""
    asked: list[int] = []

    def refused(*args: Any, **options: Any) -> dict[str, Any]:
        asked.append(1)
        return {**build_score_request(*args, **options), "grammar": "root ::= <[7"}

    monkeypatch.setattr(llamacpp, "build_score_request", refused)

    async def use(expert: Expert) -> None:
        best = (await expert.next_tokens(QUESTION, top_k=10)).pieces[:3]
        for _ in range(2):
            await assert_scored(expert, list(best), await expert.score(QUESTION, best, top_k=10))

    run(served(nano_experts), use)
    assert len(asked) == 1


def test_many_drafts_and_scores_at_once(table: dict[str, object]) -> None:
    """Sixteen answers that go on at the same time are not mixed up."""

    async def use(expert: Expert) -> None:
        starts = (await expert.next_tokens(QUESTION, top_k=16)).pieces
        contexts = [QUESTION.extended(piece) for piece in starts if piece.data]
        drafts = await asyncio.gather(
            *(expert.draft(one, top_k=5, num_tokens=8, temperature=1.0, seed=1) for one in contexts)
        )
        paths = [[step.piece for step in steps[:-1]] for steps in drafts]
        scores = await asyncio.gather(
            *(expert.score(one, path, top_k=5) for one, path in zip(contexts, paths, strict=True))
        )
        for steps, lists in zip(drafts, scores, strict=True):
            for step, one in zip(steps, lists, strict=True):
                assert step.distribution.logprobs == pytest.approx(one.logprobs, abs=NOISE)

    run(table, use)


def test_lists_of_drafts_and_scores_are_kept(table: dict[str, object], tmp_path: Path) -> None:
    """What a draft or a score has shown is not asked for again; what was drawn is drawn anew."""

    async def use(expert: Expert) -> None:
        first = await expert.draft(QUESTION, top_k=10, num_tokens=6, temperature=1.0, seed=1)
        path = [step.piece for step in first[:-1]]
        num_misses = cache.num_misses
        for position, step in enumerate(first):
            assert await expert.next_tokens(QUESTION.extended(*path[:position]), top_k=10) == step.distribution
        assert await expert.score(QUESTION, path, top_k=10) == tuple(step.distribution for step in first)
        assert cache.num_misses == num_misses
        second = await expert.draft(QUESTION, top_k=10, num_tokens=6, temperature=1.0, seed=2)
        assert [step.piece for step in second] != [step.piece for step in first]
        # One list of these is not known yet, so all are asked for, and kept.
        other = [*path, (await expert.next_tokens(QUESTION.extended(*path), top_k=10)).pieces[1]]
        scored = await expert.score(QUESTION, other, top_k=10)
        num_misses = cache.num_misses
        assert await expert.next_tokens(QUESTION.extended(*other), top_k=10) == scored[-1]
        assert cache.num_misses == num_misses

    with cached(tmp_path) as cache:
        run(table, use, cache)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_by_their_probability(temperature: float) -> None:
    """Each token's share of the numbers from 0 to 1 is its probability at the temperature."""
    logprobs = torch.log_softmax(torch.tensor([0.0, 2.0, -math.inf, -1.0, 0.5], dtype=torch.float64), dim=-1)
    num_draws = 20_000
    drawn = Counter(draw_token(logprobs, temperature, (n + 0.5) / num_draws) for n in range(num_draws))
    for token_id, share in enumerate(torch.softmax(logprobs / temperature, dim=-1).tolist()):
        assert drawn[token_id] / num_draws == pytest.approx(share, abs=2 / num_draws)
    assert draw_token(logprobs, 0.0, 0.9) == 1
