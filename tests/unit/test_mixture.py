"""Merging: each rule against its definition, a dense numpy oracle and METHOD's bounds and gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mope_bb.errors import ConfigError
from mope_bb.pcm.alignment import align
from mope_bb.pcm.features import FEATURES, expert_features
from mope_bb.pcm.gates import LinearGate
from mope_bb.pcm.merging import Plan, merge_step
from mope_bb.pcm.mixture import MergeRule, build_rule, carriers, fill_missing, missed_mass
from mope_bb.providers.base import build_distribution
from mope_bb.types import Piece, TokenDistribution

RULES = (MergeRule("linear"), MergeRule("geometric"), MergeRule("product", plausibility=0.0))
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
Array = NDArray[np.float64]


@dataclass
class Case:
    """Random full lists: `probs` is (E + 1) x V with the base in row 0, `lambdas` and `scores` are (E)."""

    probs: Array
    lambdas: Array
    scores: Array
    rng: np.random.Generator

    def rows(self, rule: MergeRule) -> Array:
        """The rows that `rule` merges: the product's begin with the base."""
        return self.probs if rule.needs_base else self.probs[1:]


@st.composite
def cases(draw: st.DrawFn, min_experts: int = 1) -> Case:
    """Distributions from flat to peaked over 1 to 12 pieces, for 1 to 4 experts and a base."""
    num_experts, vocab = draw(st.integers(min_experts, 4)), draw(st.integers(1, 12))
    spread = draw(st.sampled_from((0.0, 0.5, 3.0, 8.0)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return Case(
        probs=softmax(spread * rng.standard_normal((num_experts + 1, vocab))),
        lambdas=softmax(rng.standard_normal(num_experts)),
        scores=rng.standard_normal(num_experts) * 2,
        rng=rng,
    )


def softmax(values: Array) -> Array:
    """Softmax over the last dimension."""
    powers = np.exp(values - values.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def top_k(probs: Array, k: int, *, vocab_size: int | None = None) -> TokenDistribution:
    """The k most probable of `probs` as an endpoint would list them."""
    entries = [(Piece(b"%d" % i, i), math.log(p)) for i, p in enumerate(probs)]
    return build_distribution(entries, top_k=k, end_ids=(), vocab_size=vocab_size, expert="test")


def plan_of(rule: MergeRule, lambdas: Sequence[float]) -> Plan:
    """A plan with experts e0, e1, ... and the base where the rule needs it."""
    names = tuple(f"e{i}" for i in range(len(lambdas)))
    return Plan(rule, names, tuple(lambdas), "base" if rule.needs_base else None, "")


def merged(rule: MergeRule, rows: Array, lambdas: Array, scores: Array) -> Array:
    """Log pi by the package."""
    weights = rule.weights(torch.from_numpy(lambdas).log(), torch.from_numpy(scores))
    return rule.merge(torch.from_numpy(rows).log(), weights).numpy()


def oracle(rule: MergeRule, case: Case, *, scale: float = 1.5) -> Array:
    """Pi straight from the definitions, in probability space wherever that is possible."""
    base, styled, lambdas = case.probs[0], case.probs[1:], case.lambdas
    if rule.name == "product":
        beta = len(lambdas) * lambdas * np.exp(scale * np.tanh(case.scores))
        value = np.log(base) + sum(b * (np.log(p) - np.log(base)) for b, p in zip(beta, styled, strict=True))
        return softmax(np.asarray(value))
    alpha = lambdas * np.exp(case.scores)
    alpha = alpha / alpha.sum()
    if rule.name == "linear":
        return np.asarray(sum(a * p for a, p in zip(alpha, styled, strict=True)))
    return softmax(np.asarray(sum(a * np.log(p) for a, p in zip(alpha, styled, strict=True))))


@every_rule
@given(case=cases())
def test_merge_sums_to_one(rule: MergeRule, case: Case) -> None:
    """The merge of any lists is a distribution."""
    total = np.exp(merged(rule, case.rows(rule), case.lambdas, case.scores)).sum()
    assert total == pytest.approx(1.0, abs=1e-12)


@every_rule
@given(case=cases())
def test_truncated_merge_sums_to_one(rule: MergeRule, case: Case) -> None:
    """Lists of different pieces and lengths also merge into one distribution."""
    k = int(case.rng.integers(1, case.probs.shape[1] + 1))
    lists = [top_k(row, k, vocab_size=case.probs.shape[1]) for row in case.rows(rule)]
    found = merge_step(plan_of(rule, case.lambdas.tolist()), lists, torch.from_numpy(case.scores), LinearGate())
    assert float(found.log_pi.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    assert 0.0 <= found.floor_mass <= 1.0 + 1e-12


@every_rule
@given(case=cases(min_experts=2))
def test_order_of_experts_does_not_matter(rule: MergeRule, case: Case) -> None:
    """Permuting the (non-base) experts with their weights and scores leaves candidates and merge unchanged."""
    order = case.rng.permutation(len(case.lambdas))
    k = int(case.rng.integers(1, case.probs.shape[1] + 1))

    def run(indices: Sequence[int]) -> tuple[tuple[Piece, ...], Tensor]:
        rows = [*([case.probs[0]] if rule.needs_base else []), *(case.probs[1 + i] for i in indices)]
        lists = [top_k(row, k, vocab_size=20) for row in rows]
        scores = torch.tensor([case.scores[i] for i in indices])
        found = merge_step(plan_of(rule, [case.lambdas[i] for i in indices]), lists, scores, LinearGate())
        return found.candidates.pieces, found.log_pi

    (pieces, first), (permuted_pieces, second) = run(range(len(order))), run(order.tolist())
    assert permuted_pieces == pieces
    torch.testing.assert_close(second, first, rtol=1e-11, atol=1e-11)


@every_rule
@given(case=cases(min_experts=2))
def test_all_weight_on_one_expert_gives_that_expert(rule: MergeRule, case: Case) -> None:
    """With a one-hot weight the merge is that expert's own list, renormalised over what it listed."""
    chosen = int(case.rng.integers(len(case.lambdas)))
    weights = torch.zeros(len(case.lambdas), dtype=torch.float64)
    weights[chosen] = 1.0
    k = int(case.rng.integers(1, case.probs.shape[1] + 1))
    found = align([top_k(row, k) for row in case.rows(rule)])
    filled = fill_missing(rule, torch.tensor(found.logprobs).double(), torch.tensor(found.floors).double())
    own = filled[chosen + rule.needs_base]
    expected = own.exp() / own.exp().sum()
    torch.testing.assert_close(rule.merge(filled, weights).exp(), expected, rtol=1e-6, atol=1e-12)


@every_rule
def test_one_hot_in_log_space_is_exact(rule: MergeRule) -> None:
    """A lambda of nearly all the mass gives the expert's list to the last digits that matter."""
    rows = np.array([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]])
    rows = np.vstack([np.full(3, 1 / 3), rows]) if rule.needs_base else rows
    weights = torch.tensor([0.0, 1.0], dtype=torch.float64)
    pi = rule.merge(torch.from_numpy(rows).log(), weights).exp()
    torch.testing.assert_close(pi, torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), rtol=1e-12, atol=0)


@every_rule
@given(case=cases(), batch=st.sampled_from([(1,), (3,), (2, 3)]))
def test_batched_equals_single(rule: MergeRule, case: Case, batch: tuple[int, ...]) -> None:
    """Leading dimensions are computed as if each element stood alone, by every function of the module."""
    num_experts, vocab = len(case.lambdas), case.probs.shape[1]
    num_rows = num_experts + rule.needs_base
    logprobs = torch.from_numpy(softmax(3 * case.rng.standard_normal((*batch, num_rows, vocab)))).log()
    logprobs[torch.from_numpy(case.rng.random(logprobs.shape) < 0.3)] = -math.inf
    logprobs[..., -1, :] = -1.0  # `align` gives no candidate that nobody listed
    floors = torch.from_numpy(-10 - case.rng.random((*batch, num_rows)))
    tails = torch.from_numpy(case.rng.random((*batch, num_experts)))
    log_lambda = torch.from_numpy(softmax(case.rng.standard_normal((*batch, num_experts)))).log()
    scores = torch.from_numpy(case.rng.standard_normal((*batch, num_experts)))

    def compute(at: tuple[int, ...]) -> tuple[Tensor, ...]:
        weights = rule.weights(log_lambda[at], scores[at])
        filled = fill_missing(rule, logprobs[at], floors[at])
        styled = logprobs[at][..., -num_experts:, :]
        return (
            weights,
            filled,
            rule.merge(filled, weights),
            carriers(rule, filled, weights),
            missed_mass(weights, tails[at]),
            expert_features(styled, log_lambda[at], tails[at]),
        )

    together = compute(())
    for at in np.ndindex(batch):
        for whole, single in zip(together, compute(at), strict=True):
            torch.testing.assert_close(whole[at], single, rtol=1e-12, atol=1e-12, equal_nan=False)


@every_rule
@given(case=cases())
def test_zero_scores_give_the_users_weights(rule: MergeRule, case: Case) -> None:
    """An untrained PCM is the user's own mixture (lambda) or product (n lambda)."""
    factor = len(case.lambdas) if rule.name == "product" else 1
    found = rule.weights(torch.from_numpy(case.lambdas).log(), torch.zeros(len(case.lambdas), dtype=torch.float64))
    np.testing.assert_allclose(found.numpy(), factor * case.lambdas, rtol=1e-12)


@every_rule
@given(case=cases())
def test_merge_step_equals_the_dense_oracle(rule: MergeRule, case: Case) -> None:
    """On whole vocabularies, in any order of the lists, the merge is the rule's definition."""
    vocab = case.probs.shape[1]
    lists = [top_k(row, vocab, vocab_size=vocab) for row in case.rows(rule)]
    found = merge_step(plan_of(rule, case.lambdas.tolist()), lists, torch.from_numpy(case.scores), LinearGate())
    assert [piece.token_id for piece in found.candidates.pieces] == list(range(vocab))
    np.testing.assert_allclose(found.log_pi.exp().numpy(), oracle(rule, case), rtol=1e-9, atol=1e-12)
    assert found.floor_mass == 0.0


def test_product_scale_bounds_the_weights() -> None:
    """A PCM multiplies beta by at most exp(c), whatever its score."""
    rule = build_rule("product", product_scale=0.7, plausibility=0.0)
    weights = rule.weights(torch.tensor([0.5, 0.5]).log(), torch.tensor([1e6, -1e6]))
    np.testing.assert_allclose(weights.numpy(), [math.exp(0.7), math.exp(-0.7)], rtol=1e-6)


def test_unknown_rule_is_refused() -> None:
    """A rule that does not exist is named in a ConfigError."""
    with pytest.raises(ConfigError, match="'mean'"):
        build_rule("mean")


@given(case=cases(), data=st.data())
def test_linear_truncation_is_within_missed_mass(case: Case, data: st.DataObject) -> None:
    """The total variation between the truncated and the whole linear merge is at most `missed_mass`."""
    rule, vocab = RULES[0], case.probs.shape[1]
    ks = [data.draw(st.integers(1, vocab)) for _ in case.lambdas]
    lists = [top_k(row, k) for row, k in zip(case.probs[1:], ks, strict=True)]
    found = merge_step(plan_of(rule, case.lambdas.tolist()), lists, torch.from_numpy(case.scores), LinearGate())
    truncated = np.zeros(vocab)
    for piece, value in zip(found.candidates.pieces, found.log_pi.exp().tolist(), strict=True):
        assert piece.token_id is not None
        truncated[piece.token_id] = value
    distance = 0.5 * np.abs(truncated - oracle(rule, case)).sum()
    assert found.missed_mass is not None
    assert distance <= found.missed_mass + 1e-12


def test_missed_mass_bound_is_tight() -> None:
    """Where all tails lie outside the candidates the distance is the bound itself: no smaller one would hold."""
    first, second = np.array([0.4, 0.2, 0.2, 0.2]), np.array([0.7, 0.1, 0.1, 0.1])
    found = merge_step(
        plan_of(RULES[0], [0.25, 0.75]), [top_k(first, 1), top_k(second, 1)], torch.zeros(2), LinearGate()
    )
    distance = 0.5 * np.abs(np.array([1.0, 0, 0, 0]) - (0.25 * first + 0.75 * second)).sum()
    assert found.missed_mass == pytest.approx(0.25 * 0.6 + 0.75 * 0.3)
    assert distance == pytest.approx(found.missed_mass)


def test_missed_mass_is_none_for_rules_without_a_bound() -> None:
    """Only the linear rule claims a bound."""
    rows = [top_k(np.array([0.6, 0.4]), 1)] * 2
    for rule, expected in zip(RULES, (True, False, False), strict=True):
        lambdas = [1.0] if rule.needs_base else [0.5, 0.5]
        found = merge_step(plan_of(rule, lambdas), rows, torch.zeros(len(lambdas)), LinearGate())
        assert (found.missed_mass is not None) is expected


@given(case=cases(), data=st.data())
def test_gradient_of_linear_log_pi(case: Case, data: st.DataObject) -> None:
    """METHOD section 3: d log pi(y) / d s_i = alpha_i (p_i(y)/N - mass_i(C)/Z), truncated lists included."""
    rule, vocab = RULES[0], case.probs.shape[1]
    k = data.draw(st.integers(1, vocab))
    logprobs = torch.tensor(align([top_k(row, k) for row in case.probs[1:]]).logprobs, dtype=torch.float64)
    drawn = data.draw(st.integers(0, logprobs.shape[1] - 1))
    scores = torch.from_numpy(case.scores).requires_grad_()
    alpha = rule.weights(torch.from_numpy(case.lambdas).log(), scores)
    (found,) = torch.autograd.grad(rule.merge(logprobs, alpha)[drawn], scores)
    a, p = alpha.detach(), logprobs.exp()
    mass = p.sum(-1)
    expected = a * (p[:, drawn] / (a @ p[:, drawn]) - mass / (a @ mass))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", RULES[1:], ids=lambda rule: rule.name)
@given(case=cases())
def test_gradient_of_other_rules_matches_differences(rule: MergeRule, case: Case) -> None:
    """The autograd gradient of log pi with respect to the scores is that of central differences."""
    drawn = int(case.rng.integers(case.probs.shape[1]))
    scores = torch.from_numpy(case.scores).requires_grad_()
    logprobs = torch.from_numpy(case.rows(rule)).log()
    weights = rule.weights(torch.from_numpy(case.lambdas).log(), scores)
    (found,) = torch.autograd.grad(rule.merge(logprobs, weights)[drawn], scores)
    step = 1e-5
    for i in range(len(case.scores)):
        shift = np.zeros_like(case.scores)
        shift[i] = step
        up, down = (merged(rule, case.rows(rule), case.lambdas, case.scores + s)[drawn] for s in (shift, -shift))
        assert float(found[i]) == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-6)


def test_gradient_is_finite_where_lists_differ() -> None:
    """-inf entries of the linear rule give no NaN in the gradient."""
    logprobs = torch.tensor([[-0.5, -math.inf, -3.0], [-math.inf, -0.2, -math.inf]], dtype=torch.float64)
    scores = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    rule = RULES[0]
    rule.merge(logprobs, rule.weights(torch.tensor([0.5, 0.5]).double().log(), scores)).sum().backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert bool(torch.isfinite(scores.grad).all())


@pytest.mark.parametrize("score", [-80.0, -95.0, -2000.0])
def test_gradient_is_finite_where_a_weight_is_nearly_zero(score: float) -> None:
    """In float32 such a weight is tiny, then a subnormal number, then 0; only that expert lists the second piece."""
    logprobs = torch.tensor([[-0.5, -1.0], [-0.2, -math.inf]])
    scores = torch.tensor([score, 0.0], requires_grad=True)
    weights = RULES[0].weights(torch.tensor([0.5, 0.5]).log(), scores)
    for drawn in range(2):
        (found,) = torch.autograd.grad(RULES[0].merge(logprobs, weights)[drawn], scores, retain_graph=True)
        assert bool(torch.isfinite(found).all())


@every_rule
@given(case=cases())
def test_carriers_sum_to_one(rule: MergeRule, case: Case) -> None:
    """The carriers of every candidate share out exactly 1."""
    k = int(case.rng.integers(1, case.probs.shape[1] + 1))
    found = align([top_k(row, k, vocab_size=30) for row in case.rows(rule)])
    filled = fill_missing(rule, torch.tensor(found.logprobs).double(), torch.tensor(found.floors).double())
    weights = rule.weights(torch.from_numpy(case.lambdas).log(), torch.from_numpy(case.scores))
    share = carriers(rule, filled, weights)
    assert share.shape == (len(case.lambdas), len(found.pieces))
    torch.testing.assert_close(share.sum(-2), torch.ones(len(found.pieces)).double(), rtol=1e-12, atol=1e-12)


@given(case=cases())
def test_linear_carriers_are_the_posterior(case: Case) -> None:
    """Bayes: carrier i of v is alpha_i p_i(v) / pi(v)."""
    rule = RULES[0]
    alpha = rule.weights(torch.from_numpy(case.lambdas).log(), torch.from_numpy(case.scores))
    share = carriers(rule, torch.from_numpy(case.probs[1:]).log(), alpha).numpy()
    joint = alpha.numpy()[:, None] * case.probs[1:]
    np.testing.assert_allclose(share, joint / joint.sum(0), rtol=1e-9, atol=1e-12)


def test_product_carrier_is_the_expert_that_lifts() -> None:
    """The expert that raises a piece above the base carries it; one that agrees with the base does not."""
    logprobs = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.1, 0.9]]).log()
    share = carriers(RULES[2], logprobs, torch.tensor([1.0, 1.0]))
    assert float(share[0, 0]) == pytest.approx(8 / 9, abs=1e-6)


def test_fill_missing_leaves_the_linear_rule_alone() -> None:
    """Linear: an unlisted piece has probability 0."""
    logprobs = torch.tensor([[-1.0, -math.inf]])
    assert torch.equal(fill_missing(RULES[0], logprobs, torch.tensor([-5.0])), logprobs)


@pytest.mark.parametrize("rule", RULES[1:], ids=lambda rule: rule.name)
def test_fill_missing_uses_each_experts_floor(rule: MergeRule) -> None:
    """Other rules: the expert's own floor, and a finite number where the floor is -inf."""
    logprobs = torch.tensor([[-1.0, -math.inf], [-math.inf, -2.0], [-math.inf, -3.0]])
    filled = fill_missing(rule, logprobs, torch.tensor([-5.0, -6.0, -math.inf]))
    assert filled[:2].tolist() == [[-1.0, -5.0], [-6.0, -2.0]]
    assert math.isfinite(float(filled[2, 0]))
    assert float(filled[2, 0]) < -700  # exp of it is 0 in float64


@pytest.mark.parametrize("vocab_size", [None, 1000])
def test_product_survives_a_base_that_is_certain(vocab_size: int | None) -> None:
    """A base sure of one piece (sum 1 by rounding) must not turn what it did not list into the answer."""
    a, b, c = Piece(b"a", 5), Piece(b"b", 3), Piece(b"c", 9)
    base = TokenDistribution((a, b), (0.0, -20.0), vocab_size)  # probability 1 to float32's digits
    styled = [TokenDistribution((a, c), (-1e-7, -18.0), vocab_size)] * 2
    found = merge_step(plan_of(RULES[2], [0.5, 0.5]), [base, *styled], torch.zeros(2), LinearGate())
    assert float(found.log_pi.exp()[found.candidates.pieces.index(a)]) > 0.99


def test_features_are_entropy_divergence_and_tail() -> None:
    """Phi against the textbook formulas, with a piece that one expert did not list."""
    logprobs = torch.tensor([[0.5, 0.25, 0.0], [0.2, 0.2, 0.4]], dtype=torch.float64).log()
    lambdas, tails = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.25, 0.2], dtype=torch.float64)
    phi = expert_features(logprobs, lambdas.log(), tails)
    first, second, mixture = [0.5, 0.25], [0.2, 0.2, 0.4], [0.35, 0.225, 0.2]
    expected = [
        [-sum(p * math.log(p) for p in row), sum(p * math.log(p / m) for p, m in zip(row, mixture, strict=False)), tail]
        for row, tail in ((first, 0.25), (second, 0.2))
    ]
    assert phi.shape == (2, len(FEATURES))
    np.testing.assert_allclose(phi.numpy(), expected, rtol=1e-12)


@every_rule
@given(case=cases())
def test_feature_weights_enter_the_scores(rule: MergeRule, case: Case) -> None:
    """merge_step adds u . phi to the head's scores: the same as giving that sum as the scores."""
    vocab = case.probs.shape[1]
    lists = [top_k(row, max(1, vocab // 2)) for row in case.rows(rule)]
    plan, head, u = plan_of(rule, case.lambdas.tolist()), torch.from_numpy(case.scores), torch.tensor([0.5, -0.3, 0.2])
    found = merge_step(plan, lists, head, LinearGate(u))
    styled = slice(1 if rule.needs_base else 0, None)
    rows = torch.tensor(found.candidates.logprobs).double()
    filled = fill_missing(rule, rows, torch.tensor(found.candidates.floors).double())
    phi = expert_features(
        rows[styled],
        torch.from_numpy(case.lambdas).log(),
        torch.tensor(found.candidates.tails).double()[styled],
        filled[0] if rule.needs_base else None,
    )
    again = merge_step(plan, lists, head + phi @ u.double(), LinearGate())
    torch.testing.assert_close(found.log_pi, again.log_pi, rtol=1e-6, atol=1e-6)
