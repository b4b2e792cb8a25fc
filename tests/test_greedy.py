"""All weight on one expert, temperature 0: the merge must be invisible."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable

import pytest

from mope_bb.session import open_session
from mope_bb.types import END, Answer
from mope_bb.zoo.language import example_questions
from mope_bb.zoo.serving import ZooServer
from tests.exactness.measure import build_config, kinds_of

NUM_PROMPTS = 100
MAX_TOKENS = 60
NEAR_TIE_NATS = 0.02
"""llama.cpp's own repeats differ by up to this much, so a smaller lead may turn around."""


def engine_answer(server: ZooServer, expert: str, ids: list[int]) -> list[int]:
    """llama.cpp's own greedy continuation, END included."""
    body = {"prompt": ids, "n_predict": MAX_TOKENS, "temperature": 0, "return_tokens": True, "cache_prompt": True}
    request = urllib.request.Request(  # noqa: S310  # loopback
        f"{server.base_urls[expert]}/completion", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:  # noqa: S310
        tokens: list[int] = json.load(reply)["tokens"]
    return tokens


def model_answers(server: ZooServer, expert: str) -> Callable[[list[int]], list[int]]:
    """Greedy `generate` of plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(server.zoo.folder(expert), dtype=torch.float32).eval()

    def answer(ids: list[int]) -> list[int]:
        prompt = torch.tensor([ids])
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=MAX_TOKENS)
        tokens: list[int] = found[0, len(ids) :].tolist()
        return tokens

    return answer


def first_difference(answer: Answer, expected: list[int], end_id: int) -> int | None:
    """Where the merged answer leaves the expert's own; None if nowhere. END is an id here."""
    found = [end_id if step.piece == END else step.piece.token_id for step in answer.steps]
    # Engines differ in whether they report the end token itself.
    if found and found[-1] == end_id and len(expected) == len(found) - 1:
        found = found[:-1]
    return next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None) or (
        None if len(found) == len(expected) else min(len(found), len(expected))
    )


@pytest.mark.parametrize("setup", ["local", "llamacpp"])
def test_one_expert_speaks_its_own_greedy_answer(
    nano_experts: ZooServer, setup: str, record_property: Callable[[str, object], None]
) -> None:
    """Token for token on 100 prompts; only a near tie of llama.cpp may differ, and those are counted."""
    from transformers import AutoTokenizer

    expert = "friendly"
    tokenizer = AutoTokenizer.from_pretrained(nano_experts.zoo.folder(expert))
    own = model_answers(nano_experts, expert) if setup == "local" else None
    questions = (list(example_questions()) * NUM_PROMPTS)[:NUM_PROMPTS]

    async def run() -> list[Answer]:
        async with open_session(build_config(nano_experts, kinds_of(setup), 5)) as session:
            return [
                await session.complete(question, preference=expert, temperature=0, max_tokens=MAX_TOKENS)
                for question in questions
            ]

    near_ties = 0
    for question, answer in zip(questions, asyncio.run(run()), strict=True):
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer.encode(rendered, add_special_tokens=False)
        expected = own(ids) if own is not None else engine_answer(nano_experts, expert, ids)
        difference = first_difference(answer, expected, tokenizer.eos_token_id)
        if difference is None:
            continue
        lead = answer.steps[difference].candidates.logprobs[0]
        first, second = sorted(lead)[-1], sorted(lead)[-2]
        assert setup == "llamacpp", f"{question!r} differs at {difference}"
        assert first - second < NEAR_TIE_NATS, f"{question!r} differs at {difference} with a lead of {first - second}"
        near_ties += 1
    record_property("near_ties", near_ties)
    print(f"{setup}: {NUM_PROMPTS} prompts, {near_ties} near ties")
