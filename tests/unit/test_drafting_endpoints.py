"""Drafts and scores over the wire of stand-ins: how much is asked for, what is refused, what is kept."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import pytest

from mope_bb.config import parse_config
from mope_bb.errors import MalformedResponseError, PrefillError
from mope_bb.providers.base import Expert
from mope_bb.providers.registry import open_expert
from mope_bb.types import END, Context, Message, Piece, TokenDistribution
from tests.endpoints import openai_completions
from tests.endpoints.engine import StandIn, TinyEngine, serving
from tests.endpoints.stand_ins import StandIns

T = TypeVar("T")
QUESTION = Context((Message("user", "How do I fix a bike?"),))


def use(table: Mapping[str, object], run: Callable[[Expert], Awaitable[T]]) -> T:
    """Run something with an expert of its own."""

    async def main() -> T:
        expert = open_expert(parse_config({"experts": [{"name": "e", **table}]}).experts[0], None)
        try:
            return await run(expert)
        finally:
            await expert.aclose()

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("provider", "wanted", "given"),
    [
        ("vllm", 0.7, 0.7),
        ("llamacpp", 0.3, 0.3),
        # Its logprobs follow the temperature, but for 0 and 1.
        ("sglang", 0.0, 0.0),
        ("sglang", 0.4, 0.0),
        ("sglang", 0.7, 1.0),
        ("sglang", 1.5, 1.0),
        # Only lists are used: the path is the greedy one where that costs nothing.
        ("vllm-generate", 1.0, 0.0),
        ("fireworks", 1.0, 0.0),
        ("llamacpp-completions", 1.0, 0.0),
        ("tensorrt-llm", 1.0, 0.0),
        ("deepseek-completions", 0.0, 1.0),
        ("mistral", 0.0, 1.0),
        ("vllm-chat", 0.7, 0.0),
    ],
)
def test_the_temperature_at_which_lists_stay_the_model_s_own(
    provider: str, wanted: float, given: float, stand_ins: StandIns
) -> None:
    """By what is known of each wire."""
    table = {"base_url": "http://127.0.0.1:9", "model": "m", "tokenizer": stand_ins.table("vllm")["tokenizer"]}

    async def run(expert: Expert) -> float:
        return expert.draft_temperature(wanted)

    assert use({**table, "provider": provider}, run) == given


def test_one_request_for_a_draft_and_one_for_its_scores(stand_ins: StandIns) -> None:
    """That is what they are for."""

    async def run(expert: Expert) -> tuple[int, int, int]:
        await expert.next_tokens(QUESTION, top_k=5)
        before = expert.num_requests
        steps = await expert.draft(QUESTION, top_k=5, num_tokens=6, temperature=0.0)
        between = expert.num_requests
        await expert.score(QUESTION, [step.piece for step in steps if step.piece != END], top_k=5)
        return len(steps), between - before, expert.num_requests - between

    for provider in ("vllm", "sglang", "fireworks", "sglang-completions"):
        num_steps, num_drafting, num_scoring = use({"provider": provider, **stand_ins.table(provider)}, run)
        assert num_steps > 1, provider
        assert (num_drafting, num_scoring) == (1, 1), provider


def test_an_echo_of_other_tokens_is_malformed(stand_ins: StandIns) -> None:
    """An endpoint that ignores `echo_last` gives one list, which is none of the draft's."""
    original = openai_completions.ROUTES["fireworks"]
    ((route, handler),) = original.items()

    def forgetful(stand_in: StandIn, body: Mapping[str, Any], request: Any) -> Any:
        return handler(stand_in, {**body, "echo_last": 0}, request)

    async def run(expert: Expert) -> None:
        best = (await expert.next_tokens(QUESTION, top_k=5)).pieces[0]
        with pytest.raises(MalformedResponseError, match="echoed"):
            await expert.score(QUESTION, [best], top_k=5)

    with serving(StandIn(stand_ins.open("fireworks").engines, {route: forgetful})) as server:
        table = {**stand_ins.table("fireworks"), "base_url": f"{server.url}/inference/v1"}
        use({"provider": "fireworks", **table}, run)


def test_the_end_that_is_hidden_ends_a_draft_before_it(stand_ins: StandIns) -> None:
    """A draft holds what comes before an end without a list; one that would begin with it holds the guess alone."""
    table = stand_ins.table("chat")
    (engine,) = stand_ins.open("chat").engines.values()
    prompt = engine.encode(engine.render([{"role": "user", "content": "How do I fix a bike?"}]))
    tokens = next(found for found in map(partial(answer_that_ends, engine, prompt), range(200)) if found)

    def after(num_tokens: int) -> Context:
        return QUESTION.extended(Piece(b"".join(map(engine.data, tokens[:num_tokens]))))

    async def run(expert: Expert) -> None:
        steps = await expert.draft(after(len(tokens)), top_k=5, num_tokens=8, temperature=0.0)
        guess = TokenDistribution((END,), (0.0,), is_guess=True)
        assert [(step.distribution, step.piece, step.index) for step in steps] == [(guess, END, None)]
        steps = await expert.draft(after(len(tokens) - 1), top_k=5, num_tokens=8, temperature=0.0)
        assert [step.piece for step in steps] == [Piece(engine.data(tokens[-1]))]

    use({"provider": "chat", **table}, run)


def answer_that_ends(engine: TinyEngine, prompt: list[int], seed: int) -> list[int] | None:
    """A text whose last token and whose end are the most probable ones, if such a text comes of this seed."""
    source = random.Random(seed)
    ids: list[int] = []
    while len(ids) < 12:
        row = engine.row([*prompt, *ids])
        ids.append(source.choices(range(len(row)), list(map(math.exp, row)))[0])
        rows = [engine.row([*prompt, *ids[:length]]) for length in (len(ids) - 1, len(ids))]
        is_best = [row.index(max(row)) == token for row, token in zip(rows, (ids[-1], engine.end_id), strict=True)]
        if all(is_best) and engine.encode(engine.decode(ids)) == ids:
            return ids
    return None


def test_who_continues_nothing_drafts_nothing_further(stand_ins: StandIns) -> None:
    """The same error as for a single question."""

    async def run(expert: Expert) -> None:
        with pytest.raises(PrefillError):
            await expert.draft(QUESTION.extended(Piece(b"Use")), top_k=5, num_tokens=4)

    use({"provider": "openai", **stand_ins.table("openai")}, run)
