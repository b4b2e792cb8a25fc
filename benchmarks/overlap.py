"""A PCM of 160 million parameters beside experts on a network: time per token against the slower of the two alone.

The PCM has the shape of a Llama of 160M and random weights, and runs here. The experts are stand-ins in this process
that wait as long as a request takes and give a list: what is measured is how well the PCM's work hides behind the wait.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from unittest import mock

from benchmarks.claims import Claim, at_most, median_interval, rounded
from benchmarks.models import VOCAB_SIZE, prompt_of, save_experts
from mope_bb.config import DecodingConfig, ExpertConfig, parse_config
from mope_bb.pcm.decode import decode
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.model import build_pcm
from mope_bb.pcm.pacing import Pace
from mope_bb.pcm.runner import PcmScorer, Scorer, UserWeights
from mope_bb.providers import pool as pools
from mope_bb.providers.base import Capabilities, Expert
from mope_bb.providers.pool import ExpertPool
from mope_bb.types import Context, Message, Piece, SamplingOptions, TokenDistribution
from tests.evidence import machine_facts, tell

SHAPE: Final = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 32_000,
}
DELAYS_S: Final = (0.02, 0.1, 0.3)
NAMES: Final = ("first", "second", "third")
TOP_K: Final = 20
NUM_PROMPT_IDS: Final = 128
NUM_TOKENS: Final = 16
NUM_ROUNDS: Final = 7
TARGET: Final = 1.05


class WaitingExpert(Expert):
    """Waits, and gives a list that depends on the position alone."""

    capabilities = Capabilities()

    def __init__(self, name: str, delay_s: float, fingerprint: str) -> None:
        self.name = name
        self._delay_s = delay_s
        self._fingerprint = fingerprint

    async def next_tokens(self, context: Context, *, top_k: int) -> TokenDistribution:
        await asyncio.sleep(self._delay_s)
        ids = random.Random(f"{self.name} {len(context.response)}").sample(range(3, 3 + 2 * TOP_K), top_k)
        total = sum(math.exp(-0.3 * rank) for rank in range(top_k))
        return TokenDistribution(
            pieces=tuple(Piece(b"a", token_id) for token_id in ids),
            logprobs=tuple(-0.3 * rank - math.log(1.1 * total) for rank in range(top_k)),
            vocab_size=VOCAB_SIZE,
        )

    async def fingerprint(self) -> str:
        return self._fingerprint

    async def aclose(self) -> None:
        """Nothing to free."""


def main() -> None:
    """Measure and write the JSON beside this file."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        (backbone,) = save_experts(Path(folder), 1, shape=SHAPE)
        pcm = build_pcm(str(backbone), NAMES)
    fingerprint = pcm.tokenizer.fingerprint
    results = {
        "command": "python -m benchmarks.overlap",
        "machine": machine_facts(),
        "num_parameters": sum(one.numel() for one in pcm.model.parameters()),
        "num_tokens": NUM_TOKENS,
        "num_rounds": NUM_ROUNDS,
        "delays": asyncio.run(measure(PcmScorer(pcm, expert_fingerprint=fingerprint), fingerprint)),
        "seconds": time.monotonic() - began,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")


async def measure(scorer: PcmScorer, fingerprint: str) -> dict[str, Any]:
    """Every delay: in each round the network alone, the PCM alone, and both."""
    found = {f"{delay:g} s": await measure_delay(scorer, fingerprint, delay) for delay in DELAYS_S}
    await scorer.aclose()
    return found


async def measure_delay(scorer: PcmScorer, fingerprint: str, delay_s: float) -> dict[str, Any]:
    """One delay."""
    seconds: dict[str, list[float]] = {"network": [], "pcm": [], "both": []}
    for number in range(NUM_ROUNDS + 1):
        seconds["network"].append(await write(UserWeights(), fingerprint, delay_s, number))
        seconds["pcm"].append(await write(scorer, fingerprint, 0.0, number))
        seconds["both"].append(await write(scorer, fingerprint, delay_s, number))
    rounds = {name: values[1:] for name, values in seconds.items()}  # the first one warms up
    alone = map(max, rounds["network"], rounds["pcm"])
    found = {
        "ms_per_token": {name: median_interval([1000 * one for one in values]) for name, values in rounds.items()},
        "time_against_slower": median_interval([b / a for b, a in zip(rounds["both"], alone, strict=True)]),
    }
    tell(f"{delay_s} s: {json.dumps(rounded(found, 3))}")
    return found


async def write(scorer: Scorer, fingerprint: str, delay_s: float, number: int) -> float:
    """Seconds per token of an answer in lockstep, after its first one, for which the prompt is read."""

    def open_expert(config: ExpertConfig, cache: object) -> Expert:
        return WaitingExpert(config.name, delay_s, fingerprint)

    config = parse_config(
        {
            "experts": [{"name": name, "dimension": name, "provider": "scripted", "top_k": TOP_K} for name in NAMES],
            "dimensions": {name: {"text": name} for name in NAMES},
        }
    )
    plan = Plan(MergeRule("linear"), NAMES, (1 / len(NAMES),) * len(NAMES), None, "")
    context = Context((Message("user", prompt_of(NUM_PROMPT_IDS, number)),))
    options, pace = SamplingOptions(max_tokens=NUM_TOKENS + 1), Pace(DecodingConfig(mode="lockstep"))
    with mock.patch.object(pools, "open_expert", open_expert):
        pool = ExpertPool(config.experts, cache=None)
        times = [
            time.perf_counter() async for _ in decode(context, plan, pool, scorer, options, seed=number, pace=pace)
        ]
        await pool.aclose()
    return (times[-1] - times[0]) / (len(times) - 1)


def claims(results: Mapping[str, Any]) -> list[Claim]:
    """What the results say."""
    text = "PCM and network, time per token against the slower of the two alone"
    return [at_most(TARGET).claim(text, {name: one["time_against_slower"] for name, one in results["delays"].items()})]


if __name__ == "__main__":
    main()
