"""Gates and the weights they lead to: who is chosen, who is left out, and gradients that stay finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mope_bb.pcm.features import FEATURES, expert_features
from mope_bb.pcm.gates import LinearGate, Router
from mope_bb.pcm.merging import merge_lists
from mope_bb.pcm.mixture import IMPOSSIBLE, Lists, MergedLists, MergeRule

RULES = (MergeRule("linear"), MergeRule("geometric"), MergeRule("product"), MergeRule("product", plausibility=0.0))
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name}-{rule.plausibility:g}")
ENTROPY, DIVERGENCE, TAIL = (FEATURES.index(name) for name in ("entropy", "divergence", "tail_mass"))


def random_lists(rng: np.random.Generator, *, num_rows: int, num_pieces: int) -> Lists:
    """Lists with gaps; every candidate is on at least one of them, and every list has at least one piece."""
    logprobs = torch.from_numpy(rng.dirichlet(np.ones(num_pieces + 1), num_rows)[:, :-1]).clamp_min(1e-9).log()
    is_missing = torch.from_numpy(rng.random(logprobs.shape) < 0.3)
    is_missing[torch.from_numpy(rng.integers(num_rows, size=num_pieces)), torch.arange(num_pieces)] = False
    is_missing[:, 0] = False
    logprobs = logprobs.masked_fill(is_missing, -math.inf)
    tails = 1 - logprobs.exp().sum(-1)
    return Lists(logprobs, torch.minimum(logprobs.masked_fill(is_missing, 0.0).amin(-1), tails.log()), tails)


def with_gaps(rule: MergeRule, lists: Lists, *, masked: int, padding: int) -> Lists:
    """`lists` with a row for an expert that is not asked at place `masked` and `padding` candidates behind."""
    place = masked + rule.needs_base
    num_rows, num_pieces = lists.logprobs.shape

    def insert(values: Tensor, new: Tensor) -> Tensor:
        return torch.cat([values[:place], new, values[place:]])

    wide = torch.full((num_rows, num_pieces + padding), -math.inf, dtype=lists.logprobs.dtype)
    wide[:, :num_pieces] = lists.logprobs
    return Lists(
        insert(wide, torch.full_like(wide[:1], -math.inf)),
        insert(lists.floors, torch.full_like(lists.floors[:1], IMPOSSIBLE)),
        insert(lists.tails, torch.zeros_like(lists.tails[:1])),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.random.Generator, int, int]:
    """A generator, a number of experts and a number of candidates."""
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1))), draw(st.integers(1, 4)), draw(st.integers(1, 8))


def merge(
    rule: MergeRule, lists: Lists, log_lambda: Tensor, head: Tensor, *, gate: LinearGate | Router | None = None
) -> MergedLists:
    """`merge_lists` with a gate whose features count."""
    return merge_lists(rule, lists, log_lambda, head, gate or LinearGate(torch.tensor([0.5, -0.3, 0.2])))


@given(case=cases())
def test_linear_gate_adds_the_weighted_features(case: tuple[np.random.Generator, int, int]) -> None:
    """s_i = head_i + u . phi_i, for every leading dimension, asked or not."""
    rng, num_experts, _ = case
    head, phi = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((2, num_experts), (2, num_experts, 3)))
    u = torch.from_numpy(rng.standard_normal(3))
    found = LinearGate(u).scores(head, phi, torch.ones(2, num_experts, dtype=torch.bool))
    expected = [[head[b, i] + (u * phi[b, i]).sum() for i in range(num_experts)] for b in range(2)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_linear_gate_without_features_is_the_head() -> None:
    """A fresh gate leaves the head's scores as they are."""
    head = torch.tensor([0.3, -1.0])
    assert torch.equal(LinearGate().scores(head, torch.rand(2, 3), torch.tensor([True, True])), head)


@given(case=cases(), feature=st.sampled_from(("entropy", "divergence")))
def test_router_takes_the_best_of_those_asked(case: tuple[np.random.Generator, int, int], feature: str) -> None:
    """Smallest entropy or largest divergence, whatever the others, who are not asked, would have."""
    rng, num_experts, _ = case
    phi = torch.from_numpy(rng.standard_normal((num_experts + 1, 3)))
    asked = torch.ones(num_experts + 1, dtype=torch.bool)
    asked[int(rng.integers(num_experts + 1))] = False
    router = Router("entropy") if feature == "entropy" else Router("divergence")
    scores = router.scores(torch.zeros(num_experts + 1), phi, asked)
    places = [i for i in range(num_experts + 1) if asked[i]]
    if feature == "entropy":
        best = min(places, key=lambda i: float(phi[i, ENTROPY]))
    else:
        best = max(places, key=lambda i: float(phi[i, DIVERGENCE]))
    assert scores.tolist() == [0.0 if i == best else -math.inf for i in range(num_experts + 1)]


@given(case=cases(), feature=st.sampled_from(("entropy", "divergence")))
def test_router_has_weight_one_under_the_linear_rule(case: tuple[np.random.Generator, int, int], feature: str) -> None:
    """One expert speaks: its weight is 1 and the merge is its own list, renormalised."""
    rng, num_experts, num_pieces = case
    lists = random_lists(rng, num_rows=num_experts, num_pieces=num_pieces)
    log_lambda = torch.from_numpy(rng.dirichlet(np.ones(num_experts))).log()
    router = Router("entropy") if feature == "entropy" else Router("divergence")
    found = merge(RULES[0], lists, log_lambda, torch.zeros(num_experts), gate=router)
    chosen = int(found.weights.argmax())
    assert found.weights.tolist() == [float(i == chosen) for i in range(num_experts)]
    own = torch.log_softmax(lists.logprobs[chosen], dim=-1)
    torch.testing.assert_close(found.log_pi, own, rtol=1e-12, atol=1e-12)
    phi = expert_features(lists.logprobs, log_lambda, lists.tails)
    best = phi[:, ENTROPY].min() if feature == "entropy" else phi[:, DIVERGENCE].max()
    assert phi[chosen, ENTROPY if feature == "entropy" else DIVERGENCE] == best


@every_rule
@given(case=cases(), data=st.data())
def test_who_is_not_asked_has_no_influence(
    rule: MergeRule, case: tuple[np.random.Generator, int, int], data: st.DataObject
) -> None:
    """An expert with log lambda -inf has weight 0, and the merge, padding apart, is that of the others alone."""
    rng, num_experts, num_pieces = case
    masked, padding = data.draw(st.integers(0, num_experts)), data.draw(st.integers(0, 3))
    lists = random_lists(rng, num_rows=num_experts + rule.needs_base, num_pieces=num_pieces)
    log_lambda = torch.from_numpy(rng.dirichlet(np.ones(num_experts))).log()
    head = torch.from_numpy(rng.standard_normal(num_experts))

    def insert(values: Tensor, new: float) -> Tensor:
        return torch.cat([values[:masked], torch.tensor([new], dtype=values.dtype), values[masked:]])

    alone = merge(rule, lists, log_lambda, head)
    wider = with_gaps(rule, lists, masked=masked, padding=padding)
    found = merge(rule, wider, insert(log_lambda, -math.inf), insert(head, float(rng.standard_normal())))
    torch.testing.assert_close(found.weights, insert(alone.weights, 0.0), rtol=1e-12, atol=1e-12)
    assert float(found.weights[masked]) == 0.0
    torch.testing.assert_close(found.log_pi[:num_pieces], alone.log_pi, rtol=1e-11, atol=1e-11)
    assert found.log_pi[num_pieces:].tolist() == [-math.inf] * padding


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(case=cases(), data=st.data())
def test_gradients_are_finite(
    rule: MergeRule, dtype: torch.dtype, case: tuple[np.random.Generator, int, int], data: st.DataObject
) -> None:
    """Experts not asked, padded candidates and a weight that underflows to 0 give no NaN, and 0 where masked."""
    rng, num_experts, num_pieces = case
    masked = data.draw(st.integers(0, num_experts))
    lists = with_gaps(
        rule, random_lists(rng, num_rows=num_experts + rule.needs_base, num_pieces=num_pieces), masked=masked, padding=2
    )
    lists = Lists(lists.logprobs.to(dtype), lists.floors.to(dtype), lists.tails.to(dtype))
    log_lambda = torch.from_numpy(rng.dirichlet(np.ones(num_experts + 1))).log().to(dtype)
    log_lambda[masked] = -math.inf
    asked = [i for i in range(num_experts + 1) if i != masked]
    head = torch.from_numpy(rng.standard_normal(num_experts + 1)).to(dtype)
    if len(asked) > 1:
        # Softmax underflows at such a score, the product's weight at such a lambda.
        head[asked[0]], log_lambda[asked[0]] = -2000.0, -800.0
    head.requires_grad_()
    u = torch.tensor([0.5, -0.3, 0.2], dtype=dtype, requires_grad=True)
    found = merge_lists(rule, lists, log_lambda, head, LinearGate(u))
    for drawn in (~torch.isneginf(found.log_pi)).nonzero()[:, 0].tolist():
        by_head, by_features = torch.autograd.grad(found.log_pi[drawn], (head, u), retain_graph=True)
        assert bool(torch.isfinite(by_head).all())
        assert bool(torch.isfinite(by_features).all())
        assert float(by_head[masked]) == 0.0
    assert len(asked) == 1 or float(found.weights[asked[0]].detach()) == 0.0


def test_even_a_floor_of_a_masked_expert_does_not_count() -> None:
    """The product's n is the number of experts asked, not of columns."""
    log_lambda = torch.tensor([0.5, 0.5, 0.0]).log()
    weights = RULES[2].weights(log_lambda, torch.zeros(3))
    assert weights.tolist() == [1.0, 1.0, 0.0]


@given(case=cases(), share=st.sampled_from((0.01, 0.1, 0.5, 1.0)))
def test_plausibility_cuts_what_nobody_thinks_likely(case: tuple[np.random.Generator, int, int], share: float) -> None:
    """Exactly the candidates below the share of the even mixture's best have probability 0; one always remains."""
    rng, num_experts, num_pieces = case
    logprobs = torch.from_numpy(rng.dirichlet(0.3 * np.ones(num_pieces), num_experts + 1)).clamp_min(1e-12).log()
    mixture = logprobs.exp().mean(dim=0)
    weights = torch.from_numpy(rng.random(num_experts) * 3)
    pi = MergeRule("product", plausibility=share).merge(logprobs, weights).exp()
    whole = MergeRule("product", plausibility=0.0).merge(logprobs, weights).exp()
    ratio = mixture / mixture.max()
    assert bool((pi[ratio < share * (1 - 1e-9)] == 0).all())
    kept = ratio > share * (1 + 1e-9)
    assert bool((pi[kept] > 0).eq(whole[kept] > 0).all())
    assert pi.sum().item() == pytest.approx(1.0)
    assert pi[mixture.argmax()].item() > 0 or whole[mixture.argmax()].item() == 0
    if bool(kept.any()) and whole[pi > 0].sum() > 0:
        torch.testing.assert_close(pi[pi > 0], (whole / whole[pi > 0].sum())[pi > 0], rtol=1e-7, atol=1e-12)


@given(case=cases())
def test_the_cut_does_not_depend_on_scores(case: tuple[np.random.Generator, int, int]) -> None:
    """Two PCMs cut the same candidates: otherwise learning could not recompute what was sampled."""
    rng, num_experts, num_pieces = case
    lists = random_lists(rng, num_rows=num_experts + 1, num_pieces=num_pieces)
    log_lambda = torch.from_numpy(rng.dirichlet(np.ones(num_experts))).log()
    cuts = [
        torch.isneginf(
            merge(RULES[2], lists, log_lambda, torch.from_numpy(rng.standard_normal(num_experts) * 3)).log_pi
        )
        for _ in range(2)
    ]
    assert torch.equal(cuts[0], cuts[1])
    assert not bool(cuts[0].all())


@given(case=cases())
def test_without_plausibility_every_candidate_takes_part(case: tuple[np.random.Generator, int, int]) -> None:
    """plausibility 0 is the plain product: log p_0 + sum beta (log p_i - log p_0), normalised."""
    rng, num_experts, num_pieces = case
    logprobs = torch.from_numpy(rng.dirichlet(np.ones(num_pieces), num_experts + 1)).clamp_min(1e-9).log()
    weights = torch.from_numpy(rng.random(num_experts) * 2)
    expected = logprobs[0] + (weights[:, None] * (logprobs[1:] - logprobs[0])).sum(dim=0)
    found = RULES[3].merge(logprobs, weights)
    torch.testing.assert_close(found, expected - torch.logsumexp(expected, dim=-1), rtol=1e-9, atol=1e-9)
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("rule", RULES[:2], ids=lambda rule: rule.name)
def test_other_rules_cut_nothing(rule: MergeRule) -> None:
    """Plausibility is the product's alone."""
    logprobs = torch.tensor([[0.999, 0.001], [0.999, 0.001]]).log()
    assert bool(torch.isfinite(rule.merge(logprobs, torch.tensor([0.5, 0.5]))).all())
