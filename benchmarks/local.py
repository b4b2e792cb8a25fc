"""Two `local` experts, merged greedily, against the same in a loop written by hand and in MoCo's released code.

The hand-written loop keeps the KV caches of both models (transformers' own) and averages their log-probabilities. MoCo
(the package `modelco`) averages raw logits, the geometric rule up to normalisation, and keeps no caches. All three
must give the same tokens. They take turns in one process, with all of its cores, and with one thread for each model.

MoCo's code is imported from where it is installed, or from the folder in the environment variable MOCO_PATH (its
unpacked source distribution); without it the benchmark does without.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.claims import Claim, at_most, median_interval, rounded
from benchmarks.models import local_experts, prompt_of, save_experts
from mope_bb.config import DecodingConfig, parse_config
from mope_bb.pcm.decode import decode
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.pacing import Pace
from mope_bb.pcm.runner import UserWeights
from mope_bb.providers.pool import ExpertPool
from mope_bb.types import Context, Message, SamplingOptions
from tests.evidence import machine_facts, tell

NUM_IDS: Final = (64, 256, 1024)
"""Lengths of the prompts."""
NUM_TOKENS: Final = 64
NUM_TOKENS_MOCO: Final = {64: 16, 256: 8, 1024: 3}
"""Without caches every token costs the whole sequence; by so many the cost of one is known."""
NUM_ROUNDS: Final = 5
TARGET: Final = 1.15
Tokens = list[int]
Side = Callable[[str, int], Tokens]
"""From a prompt and a number of tokens to the answer."""


def main() -> None:
    """Measure and write the JSON beside this file."""
    num_cores = torch.get_num_threads()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folders = save_experts(Path(folder), 2)
        ours, hand, moco = Ours(folders), HandWritten(folders), open_moco(folders)
        sides: dict[str, Side] = {"hand": hand.answer, "lockstep": ours.in_lockstep, "auto": ours.as_it_likes}
        slow: dict[str, Side] = {} if moco is None else {"moco": moco.answer}
        try:
            settings = [compare(sides | slow, num_ids, num_cores) for num_ids in NUM_IDS]
            settings += [compare(sides, num_ids, 1) for num_ids in NUM_IDS] if num_cores > 1 else []
        finally:
            ours.close()
    results = {
        "command": "python -m benchmarks.local",
        "machine": machine_facts(),
        "moco": "not installed" if moco is None else "modelco, its models turned to float32",
        "num_tokens": NUM_TOKENS,
        "num_rounds": NUM_ROUNDS,
        "settings": settings,
        "seconds": time.monotonic() - began,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")


def compare(sides: Mapping[str, Side], num_ids: int, num_threads: int) -> dict[str, Any]:
    """All sides, in turns, on prompts of one length; seconds per token with the prompt's share."""
    torch.set_num_threads(num_threads)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    num_equal = dict.fromkeys(sides, 0)
    for number in range(NUM_ROUNDS + 1):
        prompt = prompt_of(num_ids, number)
        answers: dict[str, Tokens] = {}
        for name, answer in sides.items():
            num_tokens = NUM_TOKENS_MOCO[num_ids] if name == "moco" else NUM_TOKENS
            began = time.perf_counter()
            answers[name] = answer(prompt, num_tokens)
            seconds[name].append((time.perf_counter() - began) / num_tokens)
            assert len(answers[name]) == num_tokens
        for name, tokens in answers.items():
            num_equal[name] += tokens == answers["hand"][: len(tokens)]
    rounds = {name: values[1:] for name, values in seconds.items()}  # the first one warms up
    found = {
        "num_prompt_ids": num_ids,
        "num_threads": num_threads,
        "num_answers": NUM_ROUNDS + 1,
        "num_equal_to_hand": num_equal,
        "ms_per_token": {name: median_interval([1000 * one for one in values]) for name, values in rounds.items()},
        "time_against_hand": {
            name: median_interval([one / other for one, other in zip(values, rounds["hand"], strict=True)])
            for name, values in rounds.items()
        },
    }
    tell(json.dumps(rounded(found, 3)))
    return found


def claims(results: Mapping[str, Any]) -> list[Claim]:
    """What the results say."""
    settings = results["settings"]
    found = []
    for num_threads in dict.fromkeys(one["num_threads"] for one in settings):
        figures = {
            f"{one['num_prompt_ids']} ids": one["time_against_hand"]["lockstep"]
            for one in settings
            if one["num_threads"] == num_threads
        }
        text = f"two local experts in lockstep against a loop by hand, time per token, threads per model: {num_threads}"
        found.append(at_most(TARGET).claim(text, figures))
    unequal = sum(one["num_answers"] - num for one in settings for num in one["num_equal_to_hand"].values())
    return [*found, at_most(0).claim("of these answers, greedy ones that differ", {"": {"value": unequal}})]


class Ours:
    """`decode` on a pool of local experts, as a session does it."""

    def __init__(self, folders: list[Path]) -> None:
        config = parse_config(local_experts(folders))
        names = tuple(folder.name for folder in folders)
        self._loop = asyncio.new_event_loop()
        self._pool = ExpertPool(config.experts, cache=None)
        self._plan = Plan(MergeRule("geometric"), names, (1 / len(names),) * len(names), None, "")
        self._lockstep = Pace(DecodingConfig(mode="lockstep"))
        self._auto = Pace(DecodingConfig(mode="auto"))
        self._loop.run_until_complete(self._pool.open(names))

    def in_lockstep(self, prompt: str, num_tokens: int) -> Tokens:
        """Ids of the answer, one question to each expert for each of them."""
        return self._loop.run_until_complete(self._answer(prompt, num_tokens, self._lockstep))

    def as_it_likes(self, prompt: str, num_tokens: int) -> Tokens:
        """Ids of the answer in the mode that is the default."""
        return self._loop.run_until_complete(self._answer(prompt, num_tokens, self._auto))

    async def _answer(self, prompt: str, num_tokens: int, pace: Pace) -> Tokens:
        context = Context((Message("user", prompt),))
        options = SamplingOptions(temperature=0.0, max_tokens=num_tokens)
        steps = decode(context, self._plan, self._pool, UserWeights(), options, seed=0, pace=pace)
        return [step.piece.token_id or 0 async for step in steps]

    def close(self) -> None:
        """End the models' threads."""
        self._loop.run_until_complete(self._pool.aclose())
        self._loop.close()


class HandWritten:
    """What one writes with transformers: two models, two caches, one argmax."""

    def __init__(self, folders: list[Path]) -> None:
        self._models = [AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32).eval() for one in folders]
        self._tokenizer = AutoTokenizer.from_pretrained(folders[0])

    @torch.inference_mode()
    def answer(self, prompt: str, num_tokens: int) -> Tokens:
        """Ids of the answer."""
        caches = [DynamicCache(config=model.config) for model in self._models]
        ids = encode(self._tokenizer, prompt)
        tokens: Tokens = []
        for _ in range(num_tokens):
            rows = [
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
                for model, cache in zip(self._models, caches, strict=True)
            ]
            merged = torch.stack([torch.log_softmax(row, dim=-1) for row in rows]).mean(dim=0)
            ids = merged.argmax()[None, None]
            tokens.append(int(ids))
        return tokens


class Moco:
    """`LogitArithmetic.generate` as it was released."""

    def __init__(self, logit_arithmetic: Any, folders: list[Path]) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folders[0])
        self._merging = logit_arithmetic.LogitArithmetic(
            [str(one) for one in folders], ["cpu"] * len(folders), self._tokenizer
        )
        # It loads them in bfloat16, in which the same weights give other tokens.
        self._merging.models = [model.float() for model in self._merging.models]

    @torch.inference_mode()
    def answer(self, prompt: str, num_tokens: int) -> Tokens:
        """Ids of the answer."""
        ids = encode(self._tokenizer, prompt)
        found = self._merging.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
        )
        tokens: Tokens = found[0, ids.shape[1] :].tolist()
        return tokens


def open_moco(folders: list[Path]) -> Moco | None:
    """MoCo's code, or None where it is not installed."""
    if "MOCO_PATH" in os.environ:
        sys.path.append(os.environ["MOCO_PATH"])
    try:
        module = importlib.import_module("model_collaboration.utils.logit_arithmetic")
    except ImportError as error:
        tell(f"going on without MoCo: {error}")
        return None
    return Moco(module, folders)


def encode(tokenizer: Any, prompt: str) -> torch.Tensor:
    """(1, L) ids of the rendered chat."""
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return torch.tensor([tokenizer.encode(rendered, add_special_tokens=False)])


if __name__ == "__main__":
    main()
