"""REBEL: the loss by hand, its gradient, its minimiser in closed form, and what is reported beside it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mope_bb.errors import TrainingError
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.mixture import Lists, MergeRule
from mope_bb.pcm.model import build_pcm
from mope_bb.pcm.rollouts import Rollout, RolloutRequest
from mope_bb.training.learner import Recorded, recompute, sum_by_rollout
from mope_bb.training.rebel import RebelInputs, choose_eta, effective_sample_share, rebel_loss
from mope_bb.types import END, Message, Piece
from mope_bb.zoo.build import Zoo

ARMS = torch.tensor([1.0, -0.4, 0.3], dtype=torch.float64)
"""The rewards of a bandit."""


@st.composite
def inputs(draw: st.DrawFn) -> RebelInputs:
    """Pairs with any log-probabilities and rewards, some of them equal."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_pairs = draw(st.integers(1, 6))
    logprobs, old = (torch.from_numpy(-20 * rng.random((num_pairs, 2))) for _ in range(2))
    return RebelInputs(logprobs, old, torch.from_numpy(rng.integers(0, 4, (num_pairs, 2)) / 2.0))


def test_loss_by_hand() -> None:
    """Two pairs with eta 2: ((0.5 - -0.5)/2 - (1 - 0))^2 and ((0 - 1)/2 - (0.2 - 0.4))^2, averaged."""
    found = rebel_loss(
        RebelInputs(
            logprobs=torch.tensor([[-1.0, -2.5], [-3.0, -1.0]]),
            old_logprobs=torch.tensor([[-1.5, -2.0], [-3.0, -2.0]]),
            rewards=torch.tensor([[1.0, 0.0], [0.2, 0.4]]),
        ),
        eta=2.0,
    )
    assert found.ratio_difference.tolist() == [1.0, -1.0]
    assert found.reward_difference.tolist() == pytest.approx([1.0, -0.2])
    assert float(found.loss) == pytest.approx(((0.5 - 1.0) ** 2 + (-0.5 + 0.2) ** 2) / 2)
    assert found.sign_align == 1.0


@given(given_inputs=inputs(), eta=st.floats(0.1, 50.0))
def test_gradient_matches_differences(given_inputs: RebelInputs, eta: float) -> None:
    """Autograd through the loss is what finite differences find."""
    variable = given_inputs.logprobs.clone().requires_grad_()

    def loss(logprobs: Tensor) -> Tensor:
        return rebel_loss(RebelInputs(logprobs, given_inputs.old_logprobs, given_inputs.rewards), eta=eta).loss

    assert torch.autograd.gradcheck(loss, (variable,), eps=1e-6, atol=1e-4, rtol=1e-4)


@given(given_inputs=inputs(), eta=st.floats(0.1, 50.0))
def test_released_code_is_eta_squared_times_ours(given_inputs: RebelInputs, eta: float) -> None:
    """mean (D - eta dR)^2 and its gradient are eta^2 times the paper's form."""
    logprobs = given_inputs.logprobs.clone().requires_grad_()
    ours = rebel_loss(RebelInputs(logprobs, given_inputs.old_logprobs, given_inputs.rewards), eta=eta)
    ratios = logprobs - given_inputs.old_logprobs
    rewards = given_inputs.rewards
    released = (ratios[:, 0] - ratios[:, 1] - eta * (rewards[:, 0] - rewards[:, 1])).square().mean()
    assert float(released.detach()) == pytest.approx(eta**2 * float(ours.loss.detach()), rel=1e-9, abs=1e-12)
    (our_gradient,) = torch.autograd.grad(ours.loss, logprobs)
    (their_gradient,) = torch.autograd.grad(released, logprobs)
    torch.testing.assert_close(their_gradient, eta**2 * our_gradient, rtol=1e-9, atol=1e-9)


@given(given_inputs=inputs(), eta=st.floats(0.1, 50.0))
def test_both_forms_have_one_minimiser(given_inputs: RebelInputs, eta: float) -> None:
    """Where the log-ratios differ by eta dR the loss is 0, in both forms."""
    rewards = given_inputs.rewards
    best = given_inputs.old_logprobs + eta * rewards
    found = rebel_loss(RebelInputs(best, given_inputs.old_logprobs, rewards), eta=eta)
    assert float(found.loss) == pytest.approx(0.0, abs=1e-18)
    torch.testing.assert_close(found.ratio_difference, eta * (rewards[:, 0] - rewards[:, 1]))


def fit(old: Tensor, pairs: Tensor, *, eta: float) -> Tensor:
    """log pi (3,) of the softmax policy that minimises the loss on `pairs` of arms (P, 2), anchored to `old`."""
    logits = old.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimizer.zero_grad()
        policy = torch.log_softmax(logits, dim=-1)
        loss = rebel_loss(RebelInputs(policy[pairs], old[pairs], ARMS[pairs]), eta=eta).loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return torch.log_softmax(logits.detach(), dim=-1)


@pytest.mark.parametrize("eta", [0.5, 3.0])
def test_one_iteration_has_the_closed_form(eta: float) -> None:
    """Trained to convergence on every pair of arms, the policy is pi_old exp(eta r), normalised."""
    old = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64).log()
    found = fit(old, torch.cartesian_prod(torch.arange(3), torch.arange(3)), eta=eta)
    torch.testing.assert_close(found.exp(), torch.softmax(old + eta * ARMS, dim=-1), rtol=0, atol=1e-3)


def test_iterations_on_sampled_pairs_reach_the_best_arm() -> None:
    """Re-anchored to the policy that sampled, k iterations give pi_0 exp(k eta r)."""
    start = policy = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    generator = torch.Generator().manual_seed(0)
    expected_rewards = []
    for iteration in range(1, 5):
        pairs = torch.multinomial(policy.exp(), 128, replacement=True, generator=generator).reshape(-1, 2)
        policy = fit(policy, pairs, eta=0.5)
        closed = torch.softmax(start + 0.5 * iteration * ARMS, dim=-1)
        torch.testing.assert_close(policy.exp(), closed, rtol=0, atol=1e-3)
        expected_rewards.append(float(policy.exp() @ ARMS))
    assert expected_rewards == sorted(expected_rewards)
    assert int(policy.argmax()) == int(ARMS.argmax())


def test_eta_asks_the_usual_difference_for_the_target() -> None:
    """eta = target / root mean square of dR."""
    assert choose_eta([0.3, -0.4, 0.0, 0.0]) == pytest.approx(1 / 0.25)
    assert choose_eta([0.3, -0.4], target=3.0) == pytest.approx(3 / math.sqrt(0.125))
    assert choose_eta([-0.25]) == pytest.approx(4.0)


@given(differences=st.lists(st.floats(-10, 10).filter(lambda x: x == 0 or abs(x) > 1e-6), min_size=1))
def test_eta_is_positive_and_reaches_the_target(differences: list[float]) -> None:
    """eta times the usual difference is the target; without a difference it is an error."""
    if not any(differences):
        with pytest.raises(TrainingError, match="are equal"):
            choose_eta(differences)
    else:
        size = np.sqrt(np.mean(np.square(differences)))
        assert choose_eta(differences, target=2.0) * size == pytest.approx(2.0)


@pytest.mark.parametrize("differences", [[], [0.0, 0.0]])
def test_equal_rewards_are_an_error(differences: list[float]) -> None:
    """Nothing to learn from is a TrainingError that says what to look at."""
    with pytest.raises(TrainingError, match="all rewards of the first batches are equal") as caught:
        choose_eta(differences)
    assert "reward models" in str(caught.value.hint)


def outputs_of(ratios: list[float], rewards: list[float]) -> float:
    """sign_align of pairs with these differences."""
    new = torch.tensor([[value, 0.0] for value in ratios])
    pairs = torch.tensor([[value, 0.0] for value in rewards])
    return rebel_loss(RebelInputs(new, torch.zeros_like(new), pairs), eta=1.0).sign_align


def test_sign_align_counts_the_pairs_with_a_difference() -> None:
    """The share that moved the right way; pairs of equal reward say nothing, a pair that did not move is wrong."""
    assert outputs_of([1.0, -1.0, 2.0, -3.0], [1.0, 1.0, 0.0, -0.5]) == pytest.approx(2 / 3)
    assert outputs_of([0.0], [1.0]) == 0.0
    assert math.isnan(outputs_of([1.0], [0.0]))


@given(ratios=st.lists(st.floats(-700, 700), min_size=1, max_size=20), shift=st.floats(-100, 100))
def test_effective_sample_share_is_a_share(ratios: list[float], shift: float) -> None:
    """In (0, 1], at least one answer's worth, and the same for weights of any scale."""
    share = effective_sample_share(torch.tensor(ratios, dtype=torch.float64))
    assert 1 / len(ratios) - 1e-9 <= share <= 1.0 + 1e-9
    moved = effective_sample_share(torch.tensor(ratios, dtype=torch.float64) + shift)
    assert moved == pytest.approx(share, rel=1e-6)


def test_effective_sample_share_on_policy_is_one() -> None:
    """Where nothing has changed every answer counts fully; one that dominates counts alone."""
    assert effective_sample_share(torch.zeros(4, 2)) == pytest.approx(1.0)
    assert effective_sample_share(torch.tensor([100.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)


def random_rollout(rule: MergeRule, experts: tuple[str, ...], *, seed: int) -> Rollout:
    """An answer whose lists are random, with gaps."""
    rng = np.random.default_rng(seed)
    num_steps, num_rows, num_pieces = 5, len(experts) + rule.needs_base, 6
    logprobs = torch.from_numpy(rng.dirichlet(np.ones(num_pieces + 1), (num_steps, num_rows))[..., :-1]).log()
    logprobs[torch.from_numpy(rng.random(logprobs.shape) < 0.2)] = -math.inf
    logprobs[..., 0] = logprobs[..., 0].clamp_min(-1.0)  # every list has a piece, and all have this one
    plan = Plan(rule, experts, tuple(rng.dirichlet(np.ones(len(experts))).tolist()), "base", "Be brief.")
    pieces = [Piece(b"x", int(token)) for token in rng.integers(40, 60, num_steps - 1)]
    return Rollout(
        RolloutRequest((Message("user", "How do I fix a bike?"),), plan, seed),
        (*pieces, END),
        "stop",
        Lists(
            logprobs.float(),
            torch.from_numpy(rng.uniform(-9, -7, (num_steps, num_rows))).float(),
            torch.from_numpy(rng.uniform(0, 0.1, (num_steps, num_rows))).float(),
        ),
        torch.zeros(num_steps, dtype=torch.long),
        torch.from_numpy(rng.uniform(-2, -1, num_steps)),
        torch.zeros(num_steps, len(experts)),
        torch.zeros(num_steps),
        torch.zeros(num_steps, dtype=torch.long),
    )


@pytest.mark.parametrize("name", ["linear", "product"])
def test_gradient_through_recompute_matches_differences(nano: Zoo, name: str) -> None:
    """d loss / d (head weights, feature weights) of a real PCM on whole answers is what central differences find."""
    rule = MergeRule("linear") if name == "linear" else MergeRule("product")
    pcm = build_pcm(str(nano.folder("base")), ("concise", "technical", "friendly"))
    generator = torch.Generator().manual_seed(1)
    pcm.model.double()
    head = pcm.model.score.weight
    head.data.normal_(0.0, 0.2, generator=generator)
    pcm.feature_weights = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64, requires_grad=True)
    rosters = (("concise", "friendly"), ("concise", "friendly"), ("technical",), ("friendly", "concise", "technical"))
    recorded = Recorded([random_rollout(rule, names, seed=i) for i, names in enumerate(rosters)], pcm)
    lists = recorded.lists
    recorded.lists = Lists(lists.logprobs.double(), lists.floors.double(), lists.tails.double())
    recorded.log_lambda = recorded.log_lambda.double()
    old = sum_by_rollout(recorded.old_logprobs, recorded).reshape(-1, 2)
    rewards = torch.tensor([[0.2, 0.9], [0.6, 0.1]], dtype=torch.float64)

    def loss() -> Tensor:
        new = sum_by_rollout(recompute(pcm, recorded)[0], recorded).reshape(-1, 2)
        return rebel_loss(RebelInputs(new, old, rewards), eta=2.0).loss

    gradients = torch.autograd.grad(loss(), (head, pcm.feature_weights))
    for weights, gradient in zip((head, pcm.feature_weights), gradients, strict=True):
        for _ in range(3):
            direction = torch.randn(weights.shape, dtype=torch.float64, generator=generator)
            expected = float((gradient * direction).sum())
            step = 1e-3  # `recompute` reads the PCM's outputs as float32
            with torch.no_grad():
                weights.add_(direction, alpha=step)
                up = float(loss())
                weights.add_(direction, alpha=-2 * step)
                down = float(loss())
                weights.add_(direction, alpha=step)
            assert (up - down) / (2 * step) == pytest.approx(expected, rel=1e-3, abs=1e-3 * float(gradient.norm()))
            assert abs(expected) > 1e-4
