"""Measures how exact the merge is, step by step, against `dense`. Used by the tests and by `make evidence`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mope_bb.config import Config, parse_config
from mope_bb.pcm.decode import decode
from mope_bb.pcm.gates import LinearGate
from mope_bb.pcm.merging import Plan, merge_step
from mope_bb.pcm.mixture import build_rule
from mope_bb.pcm.runner import UserWeights
from mope_bb.providers.pool import ExpertPool
from mope_bb.types import END, Context, Message, SamplingOptions, TokenDistribution
from mope_bb.zoo.build import Zoo
from mope_bb.zoo.serving import ZooServer
from mope_bb.zoo.wording import DIMENSIONS
from tests.exactness.dense import Array, DenseModel, merge_dense, total_variation

RULES = ("linear", "geometric", "product")
PREFERENCES: tuple[dict[str, float], ...] = (
    {"concise": 0.5, "technical": 0.2, "friendly": 0.3},
    {"informative": 0.6, "simple": 0.1, "friendly": 0.3},
    {"grumpy": 1 / 3, "technical": 1 / 3, "informative": 1 / 3},
    {"friendly": 0.9, "simple": 0.1},
)
QUESTIONS = ("How do I fix a bike?", "How do I clean a piano?", "How do I paint a door?", "How do I repair a café?")


@dataclass
class Exactness:
    """Largest differences seen, and what they were measured on."""

    num_steps: int = 0
    num_steps_not_ascii: int = 0
    """Steps whose context holds, or whose drawn piece is, a byte above 127."""
    probability_gap: float = 0.0
    """k = full: largest |pi - oracle| over all steps, rules and pieces."""
    logprob_gap: float = 0.0
    """k = full: largest |log pi - log oracle| over pieces with a probability of 1e-4 or more."""
    tv_excess: float = -1.0
    """k = 5 and 20, linear: largest true total variation minus the reported bound; at most 0 when the bound holds."""
    missed_mass: dict[int, list[float]] = field(default_factory=dict)
    tv: dict[int, list[float]] = field(default_factory=dict)


def build_config(server: ZooServer, kinds: dict[str, str], top_k: int) -> Config:
    """The zoo's experts, each behind llama.cpp or in this process, as `kinds` says."""
    experts = []
    for expert in server.config().experts:
        table = expert.model_dump(exclude_defaults=True) | {"top_k": top_k}
        if kinds.get(expert.name, "llamacpp") == "local":
            table |= {"provider": "local", "model": str(server.zoo.folder(expert.name)), "device": "cpu"}
            table.pop("base_url")
        experts.append(table)
    return parse_config({"experts": experts, "cache": {"enabled": False}})


@dataclass(frozen=True)
class Tolerance:
    """What may differ."""

    full: float
    """k = full: any probability of the merged distribution."""
    tv_slack: float
    """k = 5 and 20: by how much the true total variation may exceed the bound."""


TOLERANCES = {"local": Tolerance(1e-5, 1e-6), "llamacpp": Tolerance(0.02, 1e-4), "mixed": Tolerance(0.02, 1e-4)}


def kinds_of(setup: str) -> dict[str, str]:
    """Which experts are in this process: all, none, or some."""
    local = {"local": ("base", *DIMENSIONS), "llamacpp": (), "mixed": ("base", "technical", "friendly")}[setup]
    return dict.fromkeys(local, "local")


class Measurement:
    """Walks along sampled answers and compares every step."""

    def __init__(self, server: ZooServer, kinds: dict[str, str], *, noisy_engine: bool) -> None:
        self._zoo: Zoo = server.zoo
        self._dense = {name: DenseModel.load(self._zoo.folder(name)) for name in self._zoo.names}
        tokenizer = self._dense["base"].tokenizer
        self._vocab_size = self._dense["base"].model.config.vocab_size
        self._end_id = tokenizer.eos_token_id
        self._pools = {
            k: ExpertPool(build_config(server, kinds, k).experts, cache=None) for k in (5, 20, self._vocab_size)
        }
        self._noisy_engine = noisy_engine
        self.result = Exactness()

    async def run(self, num_steps: int, *, progress: Callable[[str], None] | None = None) -> Exactness:
        """Measure at least `num_steps` steps."""
        try:
            answer = 0
            while self.result.num_steps < num_steps:
                question = QUESTIONS[answer % len(QUESTIONS)]
                lambdas = PREFERENCES[answer % len(PREFERENCES)]
                await self._walk(question, lambdas, seed=answer)
                answer += 1
                if progress is not None and answer % 10 == 0:
                    progress(f"  {self.result.num_steps} of {num_steps} steps")
        finally:
            for pool in self._pools.values():
                await pool.aclose()
        return self.result

    async def _walk(self, question: str, lambdas: dict[str, float], seed: int) -> None:
        context = Context((Message("user", question),))
        # The product over the experts of a friendly preference visits emoji; every rule is judged at each context.
        full = self._pools[self._vocab_size]
        plan = self._plan("linear", lambdas)
        options = SamplingOptions(max_tokens=120)
        steps = [step async for step in decode(context, plan, full, UserWeights(), options, seed=seed)]
        response = [step.piece for step in steps if step.piece != END]
        ids = [piece.token_id for piece in response if piece.token_id is not None]
        dense = {name: self._dense[name].logprobs(question, ids) for name in ("base", *lambdas)}
        await asyncio.gather(*(pool.open(("base", *lambdas)) for pool in self._pools.values()))
        for position in range(len(response) + 1):
            here = Context(context.messages, tuple(response[:position]))
            rows = {name: values[position] for name, values in dense.items()}
            # Only the product needs the base, and it is judged on full lists.
            asked = {k: (("base",) if k == self._vocab_size else ()) + tuple(lambdas) for k in self._pools}
            told = await asyncio.gather(*(pool.ask(asked[k], here) for k, pool in self._pools.items()))
            by_k = dict(zip(self._pools, told, strict=True))
            self._compare_full(by_k[self._vocab_size], rows, lambdas)
            self._compare_truncated(by_k, rows, lambdas)
            seen = b"".join(piece.data for piece in response[: position + 1])
            self.result.num_steps += 1
            self.result.num_steps_not_ascii += any(byte > 127 for byte in seen)

    def _plan(self, rule: str, lambdas: dict[str, float]) -> Plan:
        return Plan(build_rule(rule, plausibility=0.0), tuple(lambdas), tuple(lambdas.values()), "base", "")

    def _merged(self, rule: str, told: Sequence[TokenDistribution], lambdas: dict[str, float]) -> tuple[Array, float]:
        plan = self._plan(rule, lambdas)
        asked = told if plan.rule.needs_base else told[-len(lambdas) :]
        merged = merge_step(plan, asked, torch.zeros(len(lambdas)), LinearGate())
        dense = np.zeros(self._vocab_size)
        for piece, value in zip(merged.candidates.pieces, merged.log_pi.exp().tolist(), strict=True):
            dense[self._end_id if piece == END else piece.token_id] = value
        return dense, merged.missed_mass if merged.missed_mass is not None else 0.0

    def _compare_full(
        self, told: Sequence[TokenDistribution], rows: dict[str, Array], lambdas: dict[str, float]
    ) -> None:
        for rule in RULES:
            expected = merge_dense(rule, rows, lambdas, "base")
            found, _ = self._merged(rule, told, lambdas)
            likely = expected >= 1e-4
            self.result.probability_gap = max(self.result.probability_gap, float(np.abs(found - expected).max()))
            gap = np.abs(np.log(np.maximum(found[likely], 1e-300)) - np.log(expected[likely])).max()
            self.result.logprob_gap = max(self.result.logprob_gap, float(gap))

    def _compare_truncated(
        self, by_k: dict[int, list[TokenDistribution]], rows: dict[str, Array], lambdas: dict[str, float]
    ) -> None:
        if self._noisy_engine:
            # llama.cpp differs from transformers by up to 0.02: the truth about truncation is its own full list.
            rows = {
                name: self._whole(told) for name, told in zip(("base", *lambdas), by_k[self._vocab_size], strict=True)
            }
        truth = merge_dense("linear", rows, lambdas, None)
        for k in (5, 20):
            found, bound = self._merged("linear", by_k[k], lambdas)
            tv = total_variation(found, truth)
            self.result.tv_excess = max(self.result.tv_excess, tv - bound)
            self.result.missed_mass.setdefault(k, []).append(bound)
            self.result.tv.setdefault(k, []).append(tv)

    def _whole(self, told: TokenDistribution) -> Array:
        row = np.full(self._vocab_size, -np.inf)
        for piece, logprob in zip(told.pieces, told.logprobs, strict=True):
            row[self._end_id if piece == END else piece.token_id] = logprob
        return row
