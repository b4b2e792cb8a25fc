"""Compares greedy merged answers, all weight on one expert, with that expert's own greedy answers."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field

from mope_bb.session import open_session
from mope_bb.types import END, Answer
from mope_bb.zoo.language import tasks
from mope_bb.zoo.serving import ZooServer
from tests.exactness.measure import build_config, kinds_of

MAX_TOKENS = 60
NEAR_TIE_NATS = 0.02
"""llama.cpp's own repeats differ by up to this much, so a smaller lead may turn around."""


def engine_answer(server: ZooServer, expert: str, ids: list[int]) -> list[int]:
    """llama.cpp's own greedy continuation, END included."""
    body = {"prompt": ids, "n_predict": MAX_TOKENS, "temperature": 0, "return_tokens": True, "cache_prompt": True}
    request = urllib.request.Request(  # loopback
        f"{server.base_urls[expert]}/completion", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        tokens: list[int] = json.load(reply)["tokens"]
    return tokens


def model_answers(server: ZooServer, expert: str) -> Callable[[list[int]], list[int]]:
    """Greedy `generate` of plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(server.zoo.folder(expert), dtype=torch.float32).eval()

    def answer(ids: list[int]) -> list[int]:
        prompt = torch.tensor([ids])
        found = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=MAX_TOKENS
        )
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


@dataclass
class Greedy:
    """What was compared and where it differed."""

    num_prompts: int = 0
    num_tokens: int = 0
    num_different: int = 0
    """Answers that leave the expert's own where it is no near tie."""
    num_near_ties: int = 0
    """Answers that leave it where the expert's two best pieces are closer than the engine's own noise."""
    near_tie_leads: list[float] = field(default_factory=list)


def compare_greedy(server: ZooServer, setup: str, *, num_prompts: int, expert: str = "friendly") -> Greedy:
    """Ask `num_prompts` questions of the merge at temperature 0 and of the expert alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(server.zoo.folder(expert))
    own = model_answers(server, expert) if setup == "local" else None
    questions = [task.question(form) for form in range(3) for task in tasks(held_out=True)]
    questions = questions[:num_prompts]

    async def run() -> list[Answer]:
        async with open_session(build_config(server, kinds_of(setup), 5)) as session:
            return [
                await session.complete(question, preference=expert, temperature=0, max_tokens=MAX_TOKENS)
                for question in questions
            ]

    found = Greedy(num_prompts=num_prompts)
    for question, answer in zip(questions, asyncio.run(run()), strict=True):
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer.encode(rendered, add_special_tokens=False)
        expected = own(ids) if own is not None else engine_answer(server, expert, ids)
        found.num_tokens += len(answer.steps)
        difference = first_difference(answer, expected, tokenizer.eos_token_id)
        if difference is None:
            continue
        second, first = sorted(answer.steps[difference].candidates.logprobs[0])[-2:]
        if setup == "llamacpp" and first - second < NEAR_TIE_NATS:
            found.num_near_ties += 1
            found.near_tie_leads.append(first - second)
        else:
            found.num_different += 1
    return found
