"""Time per token at 2,000 tokens of context against 64: what is added to the engine's own growth.

One model (4 layers, grouped heads) on two engines: `local` and llama.cpp's server, two experts each; and a model as
small as the zoo's on llama.cpp, where nearly all the time is that of requests. The context is a short prompt and a long
answer so far, which is what this package carries along itself; it has been read before the clock starts. Beside it one
expert's plain answer on the same engine, without this package: how the engine itself grows.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.claims import Claim, at_most, median_interval, rounded
from benchmarks.models import CONTEXT, VOCAB_SIZE, local_experts, prompt_of, save_experts
from mope_bb.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mope_bb.config import DecodingConfig, parse_config
from mope_bb.pcm.decode import decode
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.pacing import Pace
from mope_bb.pcm.runner import UserWeights
from mope_bb.providers.pool import ExpertPool
from mope_bb.types import Context, Message, Piece, SamplingOptions
from mope_bb.zoo.build import Zoo
from mope_bb.zoo.gguf_export import export_gguf
from mope_bb.zoo.serving import serve_zoo
from tests.evidence import machine_facts, tell

LENGTHS: Final = (64, 2000)
NUM_PROMPT_IDS: Final = 32
NUM_TOKENS: Final = 48
NUM_ROUNDS: Final = 5
TARGET: Final = 1.15
MODES: Final = ("lockstep", "auto")
GROUPED: Final = {"num_key_value_heads": 2, "tie_word_embeddings": True}
"""As in the models of today: with as many as there are heads a model this small would be all KV cache."""
TINY: Final = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
"""As in the zoo."""


def main() -> None:
    """Measure and write the JSON beside this file."""
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        models = save_experts(Path(folder) / "models", 2, shape=GROUPED)
        tiny = save_experts(Path(folder) / "tiny", 2, shape=TINY)
        engines = {
            "local": asyncio.run(measure(local_experts(models), models, PlainLocal(models[0]))),
            "llamacpp": measure_served(models),
            "llamacpp, tiny": measure_served(tiny),
        }
    results = {
        "command": "python -m benchmarks.context",
        "machine": machine_facts(),
        "lengths": LENGTHS,
        "num_tokens": NUM_TOKENS,
        "num_rounds": NUM_ROUNDS,
        "engines": engines,
        "seconds": time.monotonic() - began,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")


def measure_served(folders: Sequence[Path]) -> dict[str, Any]:
    """llama.cpp's server with these models."""
    for one in folders:
        export_gguf(one, one.with_suffix(".gguf"))
    names = tuple(one.name for one in folders)
    zoo = Zoo(folders[0].parent, "benchmark", 0, names, dict.fromkeys(names, ""))
    with serve_zoo(zoo, n_ctx_per_slot=CONTEXT, parallel=2) as server:
        data = local_experts(folders)
        for one in data["experts"]:
            url = server.base_urls[one["name"]]
            one.update({"provider": "llamacpp", "base_url": url, "tokenizer": one["model"]})
        return asyncio.run(measure(data, folders, PlainServer(server.base_urls[names[0]])))


async def measure(data: Mapping[str, Any], folders: Sequence[Path], plain: PlainLocal | PlainServer) -> dict[str, Any]:
    """One engine: in every round each side at each length, in random order."""
    config = parse_config(data)
    tokenizer = load_chat_tokenizer(str(folders[0]))
    names = tuple(folder.name for folder in folders)
    pool = ExpertPool(config.experts, cache=None)
    plan = Plan(MergeRule("linear"), names, (1 / len(names),) * len(names), None, "")
    paces = {mode: Pace(DecodingConfig(mode=mode)) for mode in MODES}
    seconds: dict[tuple[str, int], list[float]] = {(side, n): [] for side in (*MODES, "plain") for n in LENGTHS}
    order = list(seconds)
    try:
        for number in range(NUM_ROUNDS + 1):
            random.Random(number).shuffle(order)
            for side, length in order:
                context = context_of(tokenizer, length, number)
                if side == "plain":
                    took = await plain.seconds(ids_of(tokenizer, context))
                else:
                    await write(plan, pool, context, 1, paces[side])
                    began = time.perf_counter()
                    num_tokens = await write(plan, pool, context, NUM_TOKENS, paces[side])
                    took = (time.perf_counter() - began) / num_tokens
                seconds[side, length].append(took)
    finally:
        await pool.aclose()
    # The first round warms up.
    growths = {
        side: [long / short for short, long in zip(*(seconds[side, n][1:] for n in LENGTHS), strict=True)]
        for side in (*MODES, "plain")
    }
    found = {
        side: {
            "ms_per_token": {str(n): median_interval([1000 * one for one in seconds[side, n][1:]]) for n in LENGTHS},
            "growth": median_interval(growth),
            "growth_beyond_plain": median_interval(
                [ours / own for ours, own in zip(growth, growths["plain"], strict=True)]
            ),
        }
        for side, growth in growths.items()
    }
    tell(json.dumps(rounded(found, 3)))
    return found


async def write(plan: Plan, pool: ExpertPool, context: Context, num_tokens: int, pace: Pace) -> int:
    """How many tokens an answer got."""
    options = SamplingOptions(max_tokens=num_tokens)
    return len([step async for step in decode(context, plan, pool, UserWeights(), options, seed=0, pace=pace)])


def context_of(tokenizer: ChatTokenizer, length: int, number: int) -> Context:
    """A prompt, and an answer of random pieces that makes up the rest of `length` ids."""
    generator = random.Random(f"{length} {number}")
    ids = [generator.randrange(VOCAB_SIZE // 2, VOCAB_SIZE) for _ in range(length - NUM_PROMPT_IDS)]
    pieces: tuple[Piece, ...] = tuple(tokenizer.piece(token_id) for token_id in ids)
    return Context((Message("user", prompt_of(NUM_PROMPT_IDS, number)),), pieces)


def ids_of(tokenizer: ChatTokenizer, context: Context) -> list[int]:
    """The context as an engine reads it."""
    return [*tokenizer.encode_chat(context.messages), *(piece.token_id or 0 for piece in context.response)]


class PlainLocal:
    """A loop written by hand with transformers: one model, its own cache."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    async def seconds(self, ids: Sequence[int]) -> float:
        """Per token, after the context was read."""
        cache = DynamicCache(config=self._model.config)
        row = self._next(torch.tensor([ids]), cache)
        began = time.perf_counter()
        for _ in range(NUM_TOKENS):
            row = self._next(torch.multinomial(torch.softmax(row, dim=-1), 1)[None], cache)
        return (time.perf_counter() - began) / NUM_TOKENS

    def _next(self, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        row: torch.Tensor = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[
            0, -1
        ]
        return row


class PlainServer:
    """One expert of the server alone, which writes all tokens for one request."""

    def __init__(self, base_url: str) -> None:
        self._url = f"{base_url}/completion"

    async def seconds(self, ids: Sequence[int]) -> float:
        """Per token, after the context was read."""
        async with aiohttp.ClientSession() as session:
            await self._write(session, ids, 1)
            began = time.perf_counter()
            num_tokens = await self._write(session, ids, NUM_TOKENS)
            return (time.perf_counter() - began) / num_tokens

    async def _write(self, session: aiohttp.ClientSession, ids: Sequence[int], num_tokens: int) -> int:
        """How many tokens an answer got."""
        body = {"prompt": list(ids), "n_predict": num_tokens, "temperature": 1.0, "id_slot": 0}
        async with session.post(self._url, json=body) as reply:
            reply.raise_for_status()
            return int((await reply.json())["tokens_predicted"])


def claims(results: Mapping[str, Any]) -> list[Claim]:
    """What the results say."""
    engines = results["engines"]
    text = f"time per token at {results['lengths'][1]} tokens of context against {results['lengths'][0]}, lockstep"
    return [
        at_most(TARGET).claim(text, {name: engines[name]["lockstep"]["growth"] for name in ("local", "llamacpp")}),
        at_most(TARGET).claim(
            "the same for each of the growth of the engine alone",
            {name: one["lockstep"]["growth_beyond_plain"] for name, one in engines.items()},
        ),
    ]


if __name__ == "__main__":
    main()
