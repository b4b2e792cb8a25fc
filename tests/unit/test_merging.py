"""The token step against a plain reference: dictionaries and loops, one formula after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mope_bb.pcm.alignment import align_path
from mope_bb.pcm.gates import LinearGate, Router
from mope_bb.pcm.merging import Merged, Plan, merge_lists, merge_path, merge_step
from mope_bb.pcm.mixture import IMPOSSIBLE, Lists, MergeRule
from mope_bb.types import END, Piece, TokenDistribution

RULES = (MergeRule("linear"), MergeRule("geometric"), MergeRule("product"), MergeRule("product", plausibility=0.0))
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name}-{rule.plausibility:g}")


@dataclass
class Case:
    """M positions, at each a list of every expert, the base's first; what the head says, and the gate's weights."""

    path: list[list[TokenDistribution]]
    lambdas: list[float]
    head: Tensor
    """(M, E)."""
    feature_weights: list[float]

    def plan(self, rule: MergeRule) -> Plan:
        """A plan with as many experts."""
        names = tuple(f"e{i}" for i in range(len(self.lambdas)))
        return Plan(rule, names, tuple(self.lambdas), "base" if rule.needs_base else None, "")

    def asked(self, rule: MergeRule) -> list[list[TokenDistribution]]:
        """What those say whom `rule` asks."""
        return self.path if rule.needs_base else [position[1:] for position in self.path]

    def gate(self) -> LinearGate:
        """The gate that knows the feature weights."""
        return LinearGate(torch.tensor(self.feature_weights, dtype=torch.float64))


def random_list(
    rng: np.random.Generator, pieces: Sequence[Piece], *, spread: float, vocab_size: int | None
) -> TokenDistribution:
    """Any number of the most probable of `pieces`; sometimes all that is known is that the answer ends."""
    if rng.random() < 0.1:
        return TokenDistribution((END,), (0.0,), vocab_size, is_guess=True)
    values = spread * rng.standard_normal(len(pieces))
    values -= np.logaddexp.reduce(values)
    ranked = np.argsort(-values, kind="stable")[: rng.integers(1, len(pieces) + 1)]
    logprobs = tuple(min(0.0, float(values[i])) for i in ranked)
    return TokenDistribution(tuple(pieces[i] for i in ranked), logprobs, vocab_size)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Lists of ids or of bytes only, of one to four experts and a base, flat to extreme, whole ones among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_experts, num_pieces = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    has_ids, spread = draw(st.booleans()), draw(st.sampled_from((0.0, 1.0, 8.0, 80.0)))
    # Ids in no order, so that candidates are sorted by something else than the pieces' bytes.
    ids = rng.permutation(1000)[:num_pieces].tolist()
    pieces = [END, *(Piece(b"%d" % n, ids[n] if has_ids else None) for n in range(num_pieces))]
    vocab_size = draw(st.sampled_from((None, len(pieces), 50)))
    num_positions = draw(st.integers(1, 4))
    return Case(
        [
            [random_list(rng, pieces, spread=spread, vocab_size=vocab_size) for _ in range(num_experts + 1)]
            for _ in range(num_positions)
        ],
        rng.dirichlet(np.ones(num_experts)).tolist(),
        torch.from_numpy(2 * rng.standard_normal((num_positions, num_experts))),
        draw(st.sampled_from(([0.0, 0.0, 0.0], [0.5, -0.3, 0.2]))),
    )


@dataclass
class Expected:
    """What a step should come to."""

    pieces: list[Piece]
    probabilities: list[float]
    weights: list[float]
    missed_mass: float | None
    floor_mass: float


def merge_plainly(case: Case, rule: MergeRule, said: Sequence[TokenDistribution], head: Sequence[float]) -> Expected:
    """One step by the definitions of METHOD section 1."""
    known = [dict(zip(one.pieces, one.logprobs, strict=True)) for one in said]
    pieces = sorted({piece for one in known for piece in one}, key=lambda piece: (piece != END, piece.key))

    def value(n: int, piece: Piece) -> float:
        return known[n].get(piece, max(said[n].floor, IMPOSSIBLE))

    styled = range(1 if rule.needs_base else 0, len(said))
    scores = list(head)
    for place, n in enumerate(styled):
        entropy = divergence = 0.0
        for piece, logprob in known[n].items():
            p = math.exp(logprob)
            if p > 0.0:
                parts = zip(case.lambdas, styled, strict=True)
                mixture = math.fsum(part * math.exp(known[m].get(piece, -math.inf)) for part, m in parts)
                entropy -= p * logprob
                divergence += p * (logprob - (value(0, piece) if rule.needs_base else math.log(mixture)))
        features = (entropy, divergence, said[n].tail_mass)
        scores[place] += math.fsum(u * phi for u, phi in zip(case.feature_weights, features, strict=True))

    if rule.name == "product":
        num_experts = len(styled)
        weights = [
            num_experts * part * math.exp(rule.product_scale * math.tanh(score))
            for part, score in zip(case.lambdas, scores, strict=True)
        ]
    else:
        shares = [part * math.exp(score - max(scores)) for part, score in zip(case.lambdas, scores, strict=True)]
        weights = [share / math.fsum(shares) for share in shares]

    log_pi = []
    for piece in pieces:
        by_expert = list(zip(weights, styled, strict=True))
        if rule.name == "linear":
            mass = math.fsum(w * math.exp(known[n].get(piece, -math.inf)) for w, n in by_expert)
            log_pi.append(math.log(mass) if mass > 0.0 else -math.inf)
        elif rule.name == "geometric":
            log_pi.append(math.fsum(w * value(n, piece) for w, n in by_expert))
        else:
            base = value(0, piece)
            log_pi.append(base + math.fsum(w * (value(n, piece) - base) for w, n in by_expert))
    if rule.name == "product":
        mixtures = [math.fsum(math.exp(value(n, piece)) for n in range(len(said))) for piece in pieces]
        is_plausible = [mixture >= rule.plausibility * max(mixtures) for mixture in mixtures]
        log_pi = [one if plausible else -math.inf for one, plausible in zip(log_pi, is_plausible, strict=True)]
    shares = [math.exp(one - max(log_pi)) for one in log_pi]
    probabilities = [share / math.fsum(shares) for share in shares]
    is_whole = [all(piece in one for one in known) for piece in pieces]
    tails = math.fsum(w * said[n].tail_mass for w, n in zip(weights, styled, strict=True))
    return Expected(
        pieces,
        probabilities,
        weights,
        missed_mass=tails if rule.name == "linear" else None,
        floor_mass=math.fsum(p for p, whole in zip(probabilities, is_whole, strict=True) if not whole),
    )


def assert_is(found: Merged, expected: Expected) -> None:
    """`found` is `expected` to float64's rounding."""
    assert list(found.candidates.pieces) == expected.pieces
    np.testing.assert_allclose(found.log_pi.exp().numpy(), expected.probabilities, rtol=1e-8, atol=1e-14)
    np.testing.assert_allclose(found.weights.numpy(), expected.weights, rtol=1e-10, atol=1e-300)
    assert found.floor_mass == pytest.approx(expected.floor_mass, rel=1e-8, abs=1e-13)
    assert_bound(found.missed_mass, expected.missed_mass)


def assert_bound(found: float | None, expected: float | None) -> None:
    """Only the linear rule has one."""
    if expected is None:
        assert found is None
    else:
        assert found == pytest.approx(expected, rel=1e-10, abs=1e-15)


@every_rule
@given(case=cases())
def test_step_equals_the_plain_reference(rule: MergeRule, case: Case) -> None:
    """Pieces, probabilities, weights and both masses of every position."""
    plan, gate = case.plan(rule), case.gate()
    for said, head in zip(case.asked(rule), case.head, strict=True):
        assert_is(merge_step(plan, said, head, gate), merge_plainly(case, rule, said, head.tolist()))


@every_rule
@given(case=cases())
def test_path_equals_its_steps(rule: MergeRule, case: Case) -> None:
    """Merging a path at once is merging its positions one by one, however wide the others are."""
    plan, gate, path = case.plan(rule), case.gate(), case.asked(rule)
    together = merge_path(plan, path, case.head, gate)
    for found, said, head in zip(together, path, case.head, strict=True):
        alone = merge_step(plan, said, head, gate)
        assert found.candidates == alone.candidates
        torch.testing.assert_close(found.log_pi, alone.log_pi, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(found.weights, alone.weights, rtol=1e-12, atol=1e-300)
        assert found.floor_mass == pytest.approx(alone.floor_mass, rel=1e-11, abs=1e-14)
        assert_bound(found.missed_mass, alone.missed_mass)


@every_rule
@given(case=cases())
def test_sampling_in_numpy_is_learning_in_torch(rule: MergeRule, case: Case) -> None:
    """What is merged while an answer is written is what the learner recomputes from the same lists."""
    plan, gate, path = case.plan(rule), case.gate(), case.asked(rule)
    aligned = align_path(path)
    lists = Lists(*map(torch.from_numpy, (aligned.logprobs, aligned.floors, aligned.tails)))
    learned = merge_lists(rule, lists, plan.log_lambda, case.head, gate)
    for m, sampled in enumerate(merge_path(plan, path, case.head, gate)):
        num_pieces = len(sampled.candidates.pieces)
        torch.testing.assert_close(sampled.log_pi, learned.log_pi[m, :num_pieces], rtol=1e-11, atol=1e-11)
        assert bool(torch.isneginf(learned.log_pi[m, num_pieces:]).all())
        torch.testing.assert_close(sampled.weights, learned.weights[m], rtol=1e-12, atol=1e-300)


@every_rule
@given(case=cases())
def test_router_along_a_path_equals_its_steps(rule: MergeRule, case: Case) -> None:
    """A gate that looks at the lists alone chooses at each position by that position's lists."""
    plan, gate, path = case.plan(rule), Router("entropy"), case.asked(rule)
    for found, said, head in zip(merge_path(plan, path, case.head, gate), path, case.head, strict=True):
        alone = merge_step(plan, said, head, gate)
        torch.testing.assert_close(found.weights, alone.weights, rtol=1e-12, atol=1e-300)


@every_rule
@given(case=cases())
def test_features_of_weight_zero_may_be_left_out(rule: MergeRule, case: Case) -> None:
    """A gate whose feature weights are all 0 needs no features; one that learns them gets them, and merges the same."""
    plan, said = case.plan(rule), case.asked(rule)[0]
    still, learning = LinearGate(torch.zeros(3)), LinearGate(torch.zeros(3, requires_grad=True))
    assert (still.is_head_alone, learning.is_head_alone) == (True, False)
    found, other = (merge_step(plan, said, case.head[0], gate).log_pi for gate in (still, learning))
    torch.testing.assert_close(found, other.detach(), rtol=1e-12, atol=1e-12)


def test_features_that_are_learned_get_a_gradient_at_zero() -> None:
    """Weights of 0 are where learning them begins."""
    u = torch.zeros(3, requires_grad=True)
    lists = Lists(torch.tensor([[-0.1, -2.4], [-1.2, -0.4]]), torch.tensor([-3.0, -3.0]), torch.tensor([0.0, 0.02]))
    merged = merge_lists(RULES[0], lists, torch.tensor([0.5, 0.5]).log(), torch.zeros(2), LinearGate(u))
    (found,) = torch.autograd.grad(merged.log_pi[0], u)
    assert bool((found != 0).all())
