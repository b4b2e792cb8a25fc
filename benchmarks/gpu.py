"""`local` experts and a PCM on a GPU: as exact as on the CPU, right under load, and how fast.

    python -m benchmarks.gpu              # needs a CUDA device; without one it says so and measures nothing
    python -m benchmarks.gpu --rehearsal  # tiny models on the CPU: whether the program works; writes nothing

The weights are random and made on the spot. Exactness is measured on small models against float32 on the CPU, speed on
Llamas of 1.5 billion parameters (16 layers, a vocabulary of 128k) with a PCM of 160 million (24 layers). Every ratio is
of one round, in which all sides take turns. The loop by hand keeps transformers' own KV caches and averages the
log-probabilities of the experts.
"""

from __future__ import annotations

import asyncio
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.claims import Claim, at_least, at_most, median_interval, rounded
from benchmarks.gpu_exactness import Facts, compare_heads, compare_lists, measure_learner
from benchmarks.local import encode
from benchmarks.merge import measure as measure_merge
from benchmarks.models import local_experts, prompt_of, save_experts
from mope_bb.config import DecodingConfig, parse_config
from mope_bb.pcm.decode import decode
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.model import build_pcm
from mope_bb.pcm.pacing import Pace
from mope_bb.pcm.readout import merged_logprobs
from mope_bb.pcm.runner import PcmScorer, Scorer, UserWeights
from mope_bb.providers.pool import ExpertPool
from mope_bb.types import Context, Message, Piece, SamplingOptions, TokenStep
from tests.evidence import tell

LARGE: Final = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
PCM: Final = {
    "vocab_size": 128_256,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 24,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
TINY: Final[dict[str, Any]] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
NUM_EXPERTS: Final = 3
NUM_IDS: Final = 64
NUM_TOKENS: Final = 64
NUM_OPEN: Final = 16
NUM_ROUNDS: Final = 3
RULE: Final = MergeRule("geometric")
Steps = list[TokenStep]


def main() -> None:
    """Measure, and write the JSON beside this file."""
    is_rehearsal = "--rehearsal" in sys.argv[1:]
    if not is_rehearsal and not torch.cuda.is_available():
        tell("benchmarks.gpu needs a CUDA device and there is none: nothing was measured")
        return
    results: dict[str, Any] = {"command": "python -m benchmarks.gpu", "machine": machine_facts()}
    began = time.monotonic()
    for name, part in measure(is_rehearsal=is_rehearsal):
        results |= {name: part, "seconds": time.monotonic() - began}
        text = json.dumps(rounded(results), indent=1) + "\n"
        tell(json.dumps(rounded({name: part}, 3)))
        if not is_rehearsal:  # after each part: a machine may be lent for minutes
            Path(__file__).with_suffix(".json").write_text(text, encoding="utf-8")


def measure(*, is_rehearsal: bool) -> Iterator[tuple[str, Any]]:
    """Each part's name and results; that of speed after each round."""
    device = "cpu" if is_rehearsal else "cuda"
    yield "merge_ms", measure_merge(MergeRule("linear"), NUM_EXPERTS)["step_ms"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small: dict[str, Any] = TINY if is_rehearsal else {}
        plain = save_experts(folder / "small", NUM_EXPERTS, shape=small)
        coarse = save_experts(folder / "small-bfloat16", NUM_EXPERTS, dtype=torch.bfloat16, shape=small)
        yield "lists", compare_lists(plain, {"float32": plain, "bfloat16": coarse}, device)
        yield "heads", compare_heads(plain[0], device)
        yield "learner", measure_learner(plain, coarse, device)
        with Ours(plain, device) as ours:
            exact = ours.open_pcm(plain[0], is_exact=True)
            yield "load_float32", compare_load(ours, exact)
            ours.close_scorer(exact)
        shape, pcm_shape = (TINY, TINY) if is_rehearsal else (LARGE, PCM)
        large = save_experts(folder / "large", NUM_EXPERTS, device=device, dtype=torch.bfloat16, shape=shape)
        backbone = save_experts(folder / "pcm", 1, device=device, dtype=torch.bfloat16, shape=pcm_shape)[0]
        with Ours(large, device) as ours:
            scorer = ours.open_pcm(backbone)
            yield "load_bfloat16", compare_load(ours, scorer)
            for speed in measure_speed(ours, HandWritten(large, device), scorer):
                yield "speed", speed
            ours.close_scorer(scorer)


def machine_facts() -> Facts:
    """What the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


class Ours:
    """`decode` on a pool of local experts, as a session does it."""

    def __init__(self, folders: Sequence[Path], device: str) -> None:
        config = parse_config(local_experts(folders, device=device))
        self._device = device
        self._names = tuple(folder.name for folder in folders)
        self._loop = asyncio.new_event_loop()
        self._pool = ExpertPool(config.experts, cache=None)

    def __enter__(self) -> Ours:
        self._loop.run_until_complete(self._pool.open(self._names))
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run_until_complete(self._pool.aclose())
        self._loop.close()
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def open_pcm(self, backbone: Path, *, is_exact: bool = False) -> PcmScorer:
        """A PCM with random scores, all experts known to it; `is_exact`: in float32, else as it is loaded."""
        pcm = build_pcm(str(backbone), self._names, device=torch.device(self._device))
        if is_exact:
            pcm.model.float()
        pcm.model.score.weight.data.normal_(0.0, 0.02, generator=torch.Generator(self._device).manual_seed(0))
        pcm.policy_version = 1
        return PcmScorer(pcm, expert_fingerprint=self._pool.tokenizer_fingerprint, max_open_answers=NUM_OPEN)

    def close_scorer(self, scorer: Scorer) -> None:
        """End its thread."""
        self._loop.run_until_complete(scorer.aclose())

    def answers(
        self,
        prompts: Sequence[str],
        scorer: Scorer,
        *,
        mode: str = "lockstep",
        temperature: float = 0.0,
        num_experts: int = NUM_EXPERTS,
    ) -> list[Steps]:
        """The answers to `prompts`, all at once."""
        names = self._names[:num_experts]
        plan = Plan(RULE, names, (1 / num_experts,) * num_experts, None, "")
        options = SamplingOptions(temperature=temperature, max_tokens=NUM_TOKENS)
        pace = Pace(DecodingConfig.model_validate({"mode": mode}))

        async def one(seed: int, prompt: str) -> Steps:
            context = Context((Message("user", prompt),))
            steps = decode(context, plan, self._pool, scorer, options, seed=seed, pace=pace)
            return [step async for step in steps]

        async def run() -> list[Steps]:
            return await asyncio.gather(*(one(seed, prompt) for seed, prompt in enumerate(prompts)))

        return self._loop.run_until_complete(run())


def compare_load(ours: Ours, scorer: Scorer) -> dict[str, Any]:
    """Greedy answers at once against the same ones alone, up to where they part, and why they do."""
    prompts = [prompt_of(NUM_IDS - 2 * (number % 5), number) for number in range(NUM_OPEN)]
    alone = [ours.answers([prompt], scorer)[0] for prompt in prompts]
    at_once = ours.answers(prompts, scorer)
    noise, partings = 0.0, []
    for one, other in zip(alone, at_once, strict=True):
        for step, same in zip(one, other, strict=True):
            if step.piece != same.piece:
                partings.append((step, same))
                break
            noise = max(noise, abs(logprob_of(step) - logprob_of(same)))
    reasons = [reason_of(step, same, noise) for step, same in partings]
    return {
        "num_answers": NUM_OPEN,
        "num_tokens": NUM_TOKENS,
        "largest_noise_nats": noise,
        "num_near_ties": reasons.count("near tie"),
        "num_list_edges": reasons.count("list edge"),
        "num_different": reasons.count("different"),
        "leads_nats": [lead_of(step) for step, _ in partings],
    }


def reason_of(step: TokenStep, same: TokenStep, noise: float) -> str:
    """Why two answers part: the best two pieces were no further apart than `noise` may move both of them; or one of the
    rivals stands at the edge of an expert's list, on it in one answer and not in the other, where it has the floor."""
    if lead_of(step) <= 2 * noise:
        return "near tie"
    is_edge = any(listed(step, piece) != listed(same, piece) for piece in (step.piece, same.piece))
    return "list edge" if is_edge else "different"


def logprob_of(step: TokenStep) -> float:
    """Merged, of the drawn piece."""
    return float(merged_logprobs(step, RULE)[step.index])


def lead_of(step: TokenStep) -> float:
    """How far the best piece is ahead of the second, in nats."""
    second, first = sorted(merged_logprobs(step, RULE).tolist())[-2:]
    return float(first - second)


def listed(step: TokenStep, piece: Piece) -> list[bool]:
    """By expert, whether `piece` is on its list."""
    if piece not in step.candidates.pieces:
        return [False] * len(step.experts)
    said = step.candidates.logprobs[:, step.candidates.pieces.index(piece)]
    return [value > -math.inf for value in said.tolist()]


def measure_speed(ours: Ours, hand: HandWritten, scorer: PcmScorer) -> Iterator[dict[str, Any]]:
    """Time for each token that is written, side by side, and the ratios, after each round."""

    def one(number: int) -> list[str]:
        return [prompt_of(NUM_IDS, number)]

    def many(number: int) -> list[str]:
        return [prompt_of(NUM_IDS, 100 * number + n) for n in range(NUM_OPEN)]

    def write(prompts: Callable[[int], list[str]], scorer: Scorer, **how: Any) -> Callable[[int], int]:
        return lambda number: sum(map(len, ours.answers(prompts(number), scorer, **how)))

    alone = UserWeights()
    sides: dict[str, Callable[[int], int]] = {}
    for num in range(1, NUM_EXPERTS + 1):
        sides[f"hand_{num}"] = partial(hand.answer, num_experts=num)
        sides[f"lockstep_{num}"] = write(one, alone, num_experts=num)
    sides["lockstep_pcm"] = write(one, scorer)
    sides["lockstep_16"] = write(many, alone)
    sides["lockstep_pcm_16"] = write(many, scorer)
    for mode in ("lockstep", "draft", "auto"):
        sides[f"drawn_{mode}"] = write(one, scorer, mode=mode, temperature=1.0)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(NUM_ROUNDS + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            num_tokens = side(number)
            if number:  # the first one warms up
                seconds[name].append((time.perf_counter() - began) / num_tokens)
        if number:
            yield {**ratios_of(seconds), "pcm_ms_per_forward": 1000 * scorer.seconds_per_forward}


def ratios_of(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What the rounds so far say."""

    def against(one: str, other: str) -> dict[str, float]:
        return median_interval([a / b for a, b in zip(seconds[one], seconds[other], strict=True)])

    return {
        "num_rounds": len(seconds["hand_1"]),
        "ms_per_token": {name: median_interval([1000 * one for one in values]) for name, values in seconds.items()},
        "time_against_hand": {str(n): against(f"lockstep_{n}", f"hand_{n}") for n in range(1, NUM_EXPERTS + 1)},
        "tokens_per_s_16_against_1": against("lockstep_3", "lockstep_16"),
        "tokens_per_s_16_against_1_pcm": against("lockstep_pcm", "lockstep_pcm_16"),
        "time_with_pcm_against_without": against("lockstep_pcm", "lockstep_3"),
        "time_with_pcm_against_without_16": against("lockstep_pcm_16", "lockstep_16"),
        "tokens_per_s_draft_against_lockstep": against("drawn_lockstep", "drawn_draft"),
        "tokens_per_s_auto_against_lockstep": against("drawn_lockstep", "drawn_auto"),
    }


class HandWritten:
    """What one writes with transformers: models, caches, one argmax."""

    def __init__(self, folders: Sequence[Path], device: str) -> None:
        self._device = device
        self._models = [AutoModelForCausalLM.from_pretrained(one, dtype="auto").eval().to(device) for one in folders]
        self._tokenizer = AutoTokenizer.from_pretrained(folders[0])

    @torch.inference_mode()
    def answer(self, number: int, num_experts: int) -> int:
        """Write an answer with the first `num_experts`; returns how many tokens it has."""
        models = self._models[:num_experts]
        caches = [DynamicCache(config=model.config) for model in models]
        ids = encode(self._tokenizer, prompt_of(NUM_IDS, number)).to(self._device)
        tokens: list[int] = []
        for _ in range(NUM_TOKENS):
            rows = [
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
                for model, cache in zip(models, caches, strict=True)
            ]
            merged = torch.stack([torch.log_softmax(row.float(), dim=-1) for row in rows]).mean(dim=0)
            ids = merged.argmax()[None, None]
            tokens.append(int(ids))
        return len(tokens)


def claims(results: Mapping[str, Any]) -> list[Claim]:
    """What the results say."""
    lists, gaps, speed = results["lists"], results["learner"], results["speed"]
    num_different = results["load_float32"]["num_different"] + results["load_bfloat16"]["num_different"]
    return [
        at_most(1e-4).claim(
            "on a GPU in float32, largest difference of any probability", {"": {"value": lists["float32"]["largest"]}}
        ),
        at_most(0.05).claim("the same in bfloat16", {"": {"value": lists["bfloat16"]["largest"]}}),
        at_most(0.05).claim("a PCM's scores in bfloat16", {"": {"value": results["heads"]["bfloat16"]}}),
        at_most(1e-4).claim("the learner's logprob against the sampler's, PCM in float32", gap_of(gaps, "float32")),
        at_most(0.05).claim("the same, PCM in bfloat16", gap_of(gaps, "bfloat16")),
        at_most(0).claim("of 32 greedy answers, those that differ when 16 are open", {"": {"value": num_different}}),
        at_most(1.15).claim(
            "local experts on a GPU against a loop by hand, time per token",
            {f"{n} experts": one for n, one in speed["time_against_hand"].items()},
        ),
        at_least(4).claim("tokens per second of 16 answers against one", {"": speed["tokens_per_s_16_against_1"]}),
    ]


def gap_of(gaps: Mapping[str, Any], dtype: str) -> dict[str, dict[str, float]]:
    """Largest gap of each rule, in nats."""
    return {rule: {"value": found["largest_nats"]} for rule, found in gaps[dtype].items()}


if __name__ == "__main__":
    main()
