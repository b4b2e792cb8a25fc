"""For `benchmarks.gpu`: how far numbers computed on a GPU are from those of the CPU, and learner from sampler.

Shapes: M positions, V vocabulary, E experts.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.models import VOCAB_SIZE, local_experts, prompt_of
from mope_bb.config import TrainConfig, parse_config
from mope_bb.pcm.bench import ExpertBench
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.model import PreferenceControlModel, build_pcm
from mope_bb.pcm.rollouts import Rollout, RolloutRequest
from mope_bb.pcm.runner import PcmScorer
from mope_bb.providers.local import open_expert
from mope_bb.training.learner import LessonPlan, Pair, Recorded, open_learner, prepare_pcm, recompute
from mope_bb.types import Context, Message, Piece, SamplingOptions, TokenDistribution

PROMPT_LENGTHS: Final = (16, 64, 256)
DRAFT: Final = 32
NUM_BATCHES: Final = 3
NUM_PAIRS: Final = 8
RULES: Final = (MergeRule("linear"), MergeRule("geometric"))
Facts = dict[str, str]
Path_ = tuple[Context, list[Piece]]


def compare_lists(plain: Sequence[Path], others: Mapping[str, Sequence[Path]], device: str) -> dict[str, Any]:
    """Largest difference of any probability between `plain` on the CPU and each of `others` on `device`."""
    paths: list[Path_] = []
    expected = [probabilities(folder, "cpu", paths) for folder in plain]
    found = {}
    for name, folders in others.items():
        gaps = [(probabilities(one, device, paths) - other).abs() for one, other in zip(folders, expected, strict=True)]
        found[name] = {
            "largest": max(float(gap.max()) for gap in gaps),
            "largest_total_variation": max(float(gap.sum(dim=1).max()) / 2 for gap in gaps),
            "num_positions": sum(len(gap) for gap in gaps),
        }
    return found


def probabilities(folder: Path, device: str, paths: list[Path_]) -> Tensor:
    """(M, V) along `paths`, which are drawn where there are none yet."""
    config = parse_config(local_experts([folder], device=device)).experts[0]

    async def run() -> list[TokenDistribution]:
        expert = open_expert(config, None)
        try:
            for number, length in enumerate(PROMPT_LENGTHS if not paths else ()):
                context = Context((Message("user", prompt_of(length, number)),))
                steps = await expert.draft(context, top_k=1, num_tokens=DRAFT, seed=number)
                paths.append((context, [step.piece for step in steps]))
            return [one for context, path in paths for one in await expert.score(context, path, top_k=VOCAB_SIZE)]
        finally:
            await expert.aclose()

    found = asyncio.run(run())
    dense = torch.zeros(len(found), VOCAB_SIZE + 1, dtype=torch.float64)
    for row, distribution in zip(dense, found, strict=True):
        ids = torch.tensor([piece.token_id for piece in distribution.pieces])
        row[ids] = torch.tensor(distribution.logprobs, dtype=torch.float64).exp()
    return dense


def random_pcm(backbone: Path, names: Sequence[str], device: str) -> PreferenceControlModel:
    """A PCM whose scores depend on what it reads, the same on every device."""
    pcm = build_pcm(str(backbone), names, device=torch.device(device))
    head = torch.empty(pcm.model.score.weight.shape).normal_(0.0, 0.05, generator=torch.Generator().manual_seed(0))
    pcm.model.score.weight.data.copy_(head.bfloat16())
    pcm.feature_weights = torch.tensor([0.3, -0.2, 1.0])
    return pcm


def compare_heads(backbone: Path, device: str) -> dict[str, float]:
    """Largest difference of a head's score, which is of the order of 1, from that on the CPU, by type."""
    names = ["one", "two", "three"]
    generator = random.Random(0)
    context = Context((Message("user", prompt_of(64, 0)),))

    def scores(pcm: PreferenceControlModel) -> Tensor:
        async def run() -> Tensor:
            scorer = PcmScorer(pcm, expert_fingerprint=pcm.tokenizer.fingerprint)
            pieces = [pcm.tokenizer.piece(generator.randrange(300, 8000)) for _ in range(DRAFT)]
            try:
                return (await scorer.judge_path(context, pieces, "", names)).head_scores
            finally:
                await scorer.aclose()

        generator.seed(0)
        return asyncio.run(run())

    expected = scores(random_pcm(backbone, names, "cpu"))
    single, coarse = random_pcm(backbone, names, device), random_pcm(backbone, names, device)
    single.model.float()
    return {
        "float32": float((scores(single) - expected).abs().max()),
        "bfloat16": float((scores(coarse) - expected).abs().max()),
        "largest_score": float(expected.abs().max()),
    }


def measure_learner(plain: Sequence[Path], coarse: Sequence[Path], device: str) -> dict[str, Any]:
    """Largest |logprob by the learner - by the sampler| of a drawn piece, by the PCM's type and the rule.

    In float32 the whole PCM is trained, in bfloat16 a LoRA adapter of it: as training does.
    """
    return {
        dtype: {rule.name: learner_gap(folders, rule, lora_rank, device) for rule in RULES}
        for dtype, folders, lora_rank in (("float32", plain, 0), ("bfloat16", coarse, 8))
    }


def learner_gap(folders: Sequence[Path], rule: MergeRule, lora_rank: int, device: str) -> dict[str, float]:
    """Of one training: what was sampled under each version, recomputed under it."""
    config = parse_config(local_experts(folders, device=device))
    names = tuple(folder.name for folder in folders)
    options = TrainConfig(lora_rank=lora_rank, learning_rate=1e-3)
    pcm = random_pcm(folders[0], names, device)
    prepare_pcm(pcm, options, rule)
    learner = open_learner(pcm, options, LessonPlan(eta=1.0, same_ids=True))
    plan = Plan(rule, names, (1 / len(names),) * len(names), None, "")
    generator = random.Random(0)
    gaps: list[Tensor] = []
    kls: list[float] = []
    with ExpertBench(config, names) as bench:
        sampler = bench.sampler(pcm)
        for batch in range(NUM_BATCHES):
            requests = [
                RolloutRequest((Message("user", prompt_of(16 + 8 * (n // 2), batch)),), plan, seed=100 * batch + n)
                for n in range(2 * NUM_PAIRS)
            ]
            rollouts = sampler.sample(requests, SamplingOptions(max_tokens=DRAFT))
            sampled = [one for one in rollouts if isinstance(one, Rollout)]
            assert len(sampled) == len(requests)
            with torch.no_grad():
                recorded = Recorded(sampled, pcm)
                logprobs, _ = recompute(pcm, recorded)
            gaps.append((logprobs.double() - recorded.old_logprobs).abs())
            pairs = [
                Pair(one, other, (generator.random(), generator.random()))
                for one, other in zip(sampled[::2], sampled[1::2], strict=True)
            ]
            kls.append(learner.step(pairs, seed=batch, share_done=0.0).approx_kl)
    every = torch.cat(gaps)
    return {
        "largest_nats": float(every.max()),
        "mean_nats": float(every.mean()),
        "num_tokens": len(every),
        "largest_kl_of_a_batch": max(kls),
    }
