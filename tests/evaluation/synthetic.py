"""Made-up evaluations whose truth is known, for the tests of statistics, table and report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from mope_bb.evaluation.results import (
    ColouredAnswer,
    Curve,
    Evaluation,
    MethodInfo,
    MethodKind,
    ScoredAnswer,
    Study,
    WeightsOverAnswer,
)

POLES = (("concise", "informative"), ("simple", "technical"), ("friendly", "grumpy"))
PREFERENCES = tuple(",".join(poles) for poles in itertools.product(*POLES))
EXPERTS = tuple(itertools.chain(*POLES))
WORDS = ("Ugh,", "realign", "the", "derailleur", "with", "a", "hex", "key", "<b>now</b>", "and", "go", "away.")
QUALITY: dict[str, tuple[MethodKind, float]] = {
    "base": ("base", 0.0),
    "best single expert": ("training-free", 0.25),
    "style prompt": ("training-free", 0.3),
    "uniform mixture": ("training-free", 0.2),
    "geometric": ("training-free", 0.4),
    "product (untrained)": ("training-free", 0.95),
    "product without base": ("training-free", 0.9),
    "router by entropy": ("training-free", 0.6),
    "averaged soup": ("white-box", 0.45),
    "task vectors": ("white-box", 0.85),
    "best of 4": ("reward-at-inference", 1.0),
    "MoPE linear": ("mope", 0.65),
    "MoPE product": ("mope", 1.15),
    "ideal": ("ceiling", 1.6),
}
"""Each method's kind and its true mean, in logits."""


def evaluation_of(
    quality: Mapping[str, tuple[MethodKind, float]] = QUALITY,
    *,
    num_prompts: int = 20,
    preferences: Sequence[str] = PREFERENCES,
    num_samples: int = 1,
    prompt_spread: float = 0.6,
    noise: float = 0.5,
    seed: int = 0,
) -> Evaluation:
    """Answers whose scores are quality + the prompt's own ease (shared by all methods) + noise."""
    rng = np.random.default_rng(seed)
    ease = rng.normal(0, prompt_spread, num_prompts)
    answers = []
    for name, (_, mean) in quality.items():
        for prompt, preference, sample in itertools.product(range(num_prompts), preferences, range(num_samples)):
            centre = mean + ease[prompt]
            scores = {dimension: centre + float(rng.normal(0, noise)) for dimension in preference.split(",")}
            wins = {dimension: 1 / (1 + math.exp(-score)) for dimension, score in scores.items()}
            reward = sum(wins.values()) / len(wins)
            answers.append(
                ScoredAnswer(
                    method=name,
                    prompt=prompt,
                    preference=preference,
                    sample=sample,
                    text=f"Answer of {name} to prompt {prompt}: unscrew it & pull.",
                    num_tokens=int(rng.integers(20, 60)),
                    entropy=float(rng.uniform(0.2, 1.5)),
                    scores=scores,
                    wins=wins,
                    reward=reward,
                    measures={"oracle": reward**2, "fluency": 1.0, "facts": float(rng.uniform(0.8, 1))},
                )
            )
    methods = [MethodInfo(name, kind, f"What {name} does.") for name, (kind, _) in quality.items()]
    return Evaluation(methods=methods, answers=answers, ideal="ideal")


def whole_evaluation(quality: Mapping[str, tuple[MethodKind, float]] = QUALITY) -> Evaluation:
    """An evaluation that has something for every section of the report."""
    plain = evaluation_of(quality)
    rng = np.random.default_rng(1)
    ks: list[list[str | float | None]] = [["5", 0.55, 0.02], ["20", 0.71, 0.02], ["full", 0.72, 0.02]]
    slider: list[list[str | float | None]] = [[x / 10, x / 12, 1 - x / 15] for x in range(11)]
    ablation: list[list[str | float | None]] = [["without phi", 0.7, None], ["without backbone", 0.65, 12.0]]
    return Evaluation(
        methods=plain.methods,
        answers=plain.answers,
        studies=[
            Study(
                "truncation",
                "Seeing only the top k",
                "How much is lost when the experts show k pieces.",
                ["k", "product", "±"],
                ks,
                {"kind": "bar", "x": "k", "y": ["product"], "error": ["±"]},
            ),
            Study(
                "slider",
                "The weight as a slider",
                "The score of each pole as its weight goes from 0 to 1.",
                ["weight of concise", "concise", "informative"],
                slider,
                {"kind": "line", "x": "weight of concise", "y": ["concise", "informative"], "error": None},
            ),
            Study("ablation", "Ablations", "What each part is good for.", ["without", "reward", "steps"], ablation),
        ],
        curves=[
            Curve(
                name,
                [
                    {
                        "step": step,
                        "reward": 0.5 + 0.2 * (1 - math.exp(-step / 15)) + float(rng.normal(0, 0.02)),
                        "loss": 1,
                    }
                    for step in range(60)
                ],
            )
            for name in ("MoPE linear", "MoPE product")
        ],
        coloured=[
            ColouredAnswer(
                "How do I fix a bike?",
                "concise,technical,grumpy",
                "MoPE product",
                [
                    {
                        "text": word + " ",
                        "shares": dict(zip(EXPERTS[i % 3 :: 2][:3], (0.6, 0.3, 0.1), strict=False)),
                        "weights": dict.fromkeys(EXPERTS[i % 3 :: 2][:3], 1 / 3),
                    }
                    for i, word in enumerate(WORDS)
                ],
            )
        ],
        weights=[
            WeightsOverAnswer(
                method,
                preference,
                {
                    name: [1 / 3 + 0.1 * math.sin(i + tenth / 3) for tenth in range(10)]
                    for i, name in enumerate(preference.split(","))
                },
            )
            for method in ("MoPE linear", "MoPE product")
            for preference in PREFERENCES
        ],
        facts={"machine": "2 cores", "versions": {"torch": "2.13.0"}, "zoo seed": 0, "seconds": 12.5},
        ideal="ideal",
        questions=[f"How do I fix thing {prompt}?" for prompt in range(20)],
    )
