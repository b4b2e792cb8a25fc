"""Each method gives what its name says: one model, prompts, merged weights, the best of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from mope_bb.config import Config, parse_config
from mope_bb.evaluation.methods import (
    BaseAwareLinear,
    BestOf,
    EvalTask,
    Given,
    Method,
    SampledMethod,
    WrittenMethod,
    added_task_vectors,
    averaged_weights,
    local_sampler,
    merge_request,
    single_request,
    uniform_request,
)
from mope_bb.evaluation.results import MethodInfo
from mope_bb.pcm.bench import ExpertBench
from mope_bb.pcm.gates import Router
from mope_bb.pcm.merging import merge_lists
from mope_bb.pcm.mixture import Lists, MergeRule
from mope_bb.pcm.row_lists import LocalModel
from mope_bb.preferences import Preference
from mope_bb.training.tasks import WantedStyle
from mope_bb.types import Message, SamplingOptions
from tests.evaluation.conftest import BAD_PROMPT, tasks_of, wanting

INFO = MethodInfo("method", "training-free", "What it does.", temperature=0.9)
OPTIONS = SamplingOptions(max_tokens=12)


def texts(method: Method, *, num_prompts: int = 4, seed: int = 0) -> list[str]:
    """What a method answers."""
    found = [given for given in method.answer(tasks_of(num_prompts), OPTIONS, seed=seed) if given is not None]
    assert len(found) == 2 * num_prompts
    return [given.text for given in found]


def alone(model: LocalModel) -> Method:
    """A method that is one model."""
    return SampledMethod(INFO, local_sampler({"it": model}), single_request(lambda task: "it"))


def weights_of(model: LocalModel) -> dict[str, torch.Tensor]:
    """Name -> weight."""
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def test_soup_of_one_model_is_that_model(bench: ExpertBench) -> None:
    """To the last bit, in a copy."""
    model = bench.models["friendly"]
    soup = averaged_weights([model])
    assert soup.model is not model.model
    assert all(torch.equal(value, weights_of(model)[name]) for name, value in weights_of(soup).items())
    assert texts(alone(soup)) == texts(alone(model)) != texts(alone(bench.models["grumpy"]))


def test_soup_is_the_mean(bench: ExpertBench) -> None:
    """Every weight is the mean of the models', which stay as they were."""
    models = [bench.models[name] for name in ("concise", "friendly", "simple")]
    before = [weights_of(model) for model in models]
    for name, value in weights_of(averaged_weights(models)).items():
        torch.testing.assert_close(value, sum(weights[name] for weights in before) / 3)
    for model, weights in zip(models, before, strict=True):
        assert all(torch.equal(value, weights[name]) for name, value in weights_of(model).items())


def test_task_vectors_of_scale_zero_are_the_base(bench: ExpertBench) -> None:
    """Whatever the experts are."""
    base = bench.models["base"]
    summed = added_task_vectors(base, [bench.models["concise"], bench.models["grumpy"]], 0.0)
    assert all(torch.equal(value, weights_of(base)[name]) for name, value in weights_of(summed).items())
    assert texts(alone(summed)) == texts(alone(base))


def test_task_vector_of_one_expert_is_that_expert(bench: ExpertBench) -> None:
    """At scale 1, up to rounding."""
    base, expert = bench.models["base"], bench.models["grumpy"]
    summed = added_task_vectors(base, [expert], 1.0)
    for name, value in weights_of(summed).items():
        torch.testing.assert_close(value, weights_of(expert)[name], rtol=0, atol=1e-6)
    assert texts(alone(summed)) == texts(alone(expert)) != texts(alone(base))


def test_task_vectors_add_up(bench: ExpertBench) -> None:
    """base + scale x the sum of the differences."""
    base, one, other = (weights_of(bench.models[name]) for name in ("base", "concise", "grumpy"))
    summed = added_task_vectors(bench.models["base"], [bench.models["concise"], bench.models["grumpy"]], 0.4)
    for name, value in weights_of(summed).items():
        expected = base[name] + 0.4 * (one[name] - base[name]) + 0.4 * (other[name] - base[name])
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


class Rounds(Method):
    """Answers by the seed that it is asked with; "-" is a failure."""

    def __init__(self, rounds: Sequence[str]) -> None:
        """The letters of a round are the answers to the tasks."""
        self.info = replace(INFO, name="inner", temperature=0.3)
        self.rounds = rounds
        self.seeds: list[int] = []
        self.asked_at: list[float] = []

    def answer(self, tasks: Sequence[EvalTask], options: SamplingOptions, *, seed: int) -> list[Given | None]:
        self.seeds.append(seed)
        self.asked_at.append(self.info.temperature)
        return [None if text == "-" else Given(text, 1, 0.0) for text in self.rounds[seed % len(self.rounds)]]


def test_best_of_keeps_the_highest_reward() -> None:
    """Each task its own best of all rounds; a failure never wins, however its absence is rated."""
    inner = Rounds(["a-cd", "bb--", "-ab-"])
    rewards = {"a": 0.1, "b": 0.2, "c": 0.3, "d": -1.0, "": 0.9}
    best = BestOf(INFO, inner, 3, lambda tasks, found: [rewards[text] for text in found])
    found = best.answer(tasks_of(), OPTIONS, seed=2)
    assert [given and given.text for given in found] == ["b", "b", "c", "d"]
    assert sorted(inner.seeds) == [6, 7, 8]
    assert inner.asked_at == [0.9, 0.9, 0.9]


def test_best_of_failures_is_a_failure() -> None:
    """Where every round failed there is no answer."""
    best = BestOf(INFO, Rounds(["-a", "-a"]), 2, lambda tasks, found: [1.0] * len(found))
    assert [given and given.text for given in best.answer(tasks_of(1), OPTIONS, seed=0)] == [None, "a"]


def test_at_changes_temperature_and_name_only(bench: ExpertBench) -> None:
    """The copy shares everything else and the method itself stays as it was."""
    method = alone(bench.models["base"])
    cold = method.at(0.0, "cold")
    assert cold.info == replace(INFO, name="cold", temperature=0.0)
    assert method.info == INFO
    assert {name for name in vars(method) if vars(method)[name] is not vars(cold)[name]} == {"info"}
    assert texts(cold, seed=1) == texts(cold, seed=2)
    assert texts(method, seed=1) != texts(method, seed=2)


def test_a_failure_is_no_answer(bench: ExpertBench) -> None:
    """A prompt that cannot be read costs its own answer only; the others carry their tokens and mean entropy."""
    (good, other) = tasks_of(1)
    found = alone(bench.models["base"]).answer([good, replace(other, messages=BAD_PROMPT)], OPTIONS, seed=0)
    assert found[1] is None
    assert found[0] is not None
    assert found[0].rollout is not None
    assert found[0].text == found[0].rollout.text
    assert found[0].num_tokens == len(found[0].rollout.pieces)
    assert found[0].entropy == pytest.approx(float(found[0].rollout.entropies.sum()) / found[0].num_tokens)


def test_every_answer_has_its_own_seed() -> None:
    """No two answers of an evaluation are written from one seed."""
    method = WrittenMethod(INFO, lambda task, seed: f"seed is {seed}")
    found = [given for seed in (0, 1, 2) for given in method.answer(tasks_of(), OPTIONS, seed=seed)]
    assert len({given.text for given in found if given is not None}) == 12
    assert [given and (given.num_tokens, given.entropy) for given in found] == [(3, 0.0)] * 12


def test_single_request_asks_one_model() -> None:
    """The conversation as it is, one expert whose weight is 1, whatever the preference."""
    (task, *_) = tasks_of()
    request = single_request(lambda task: f"number {task.prompt}")(replace(task, prompt=3), 11)
    assert (request.messages, request.seed) == (task.messages, 11)
    assert (request.plan.asked, request.plan.lambdas, request.plan.rule) == (("number 3",), (1.0,), MergeRule("linear"))


def test_single_request_prompts_with_a_system_message() -> None:
    """The sentences of the wanted dimensions come first, as one system message."""
    (task, *_) = tasks_of(1, [("grumpy", "concise", "simple")])
    prompted = {"concise": "Be brief.", "grumpy": "Be rude.", "friendly": "Be kind."}
    request = single_request(lambda task: "base", prompted=prompted)(task, 0)
    assert request.messages == (Message("system", "Be brief. Be rude."), *task.messages)


def test_uniform_request_ignores_the_users_weights(config: Config) -> None:
    """The wanted experts alike, by weights and by sentence; `merge_request` follows the weights."""
    (task, *_) = tasks_of(1)
    weighted = replace(task, style=wanting({"concise": 0.7, "grumpy": 0.2, "simple": 0.1}))
    spoken = replace(task, style=WantedStyle(Preference(text="any words"), weighted.style.weights))
    for asked in (weighted, spoken):
        plan = uniform_request(config, MergeRule("linear"))(asked, 0).plan
        assert plan.experts == ("simple", "concise", "grumpy")
        assert plan.lambdas == pytest.approx((1 / 3,) * 3)
    plan = merge_request(config, MergeRule("linear"), reads_text=True)(weighted, 0).plan
    assert plan.lambdas == pytest.approx((0.1, 0.7, 0.2))


def random_lists(rng: np.random.Generator, *, num_experts: int, num_pieces: int, listed: int) -> Lists:
    """The `listed` most probable of `num_pieces` pieces of each expert."""
    logprobs = torch.from_numpy(rng.dirichlet(np.ones(num_pieces), num_experts)).log()
    smallest = logprobs.topk(listed).values[:, -1:]
    shown = logprobs.masked_fill(logprobs < smallest, -math.inf)
    return Lists(shown, smallest[:, 0], 1 - shown.exp().sum(-1))


def test_base_aware_linear_is_the_linear_rule() -> None:
    """Asking the base changes nothing in what is merged, also where only the base lists a piece."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        lists = random_lists(rng, num_experts=4, num_pieces=9, listed=4)
        log_lambda = torch.from_numpy(rng.dirichlet(np.ones(3))).log()
        weights = BaseAwareLinear("linear").weights(log_lambda, torch.from_numpy(rng.standard_normal(3)))
        aware = BaseAwareLinear("linear").merge(lists.logprobs, weights)
        torch.testing.assert_close(aware, MergeRule("linear").merge(lists.logprobs[1:], weights))


def test_base_aware_linear_answers_like_the_linear_rule(bench: ExpertBench, config: Config) -> None:
    """The base is asked, and the answers are the same."""
    aware, plain = (
        SampledMethod(INFO, bench.sampler(gate=Router("entropy")), merge_request(config, rule, reads_text=True))
        for rule in (BaseAwareLinear("linear"), MergeRule("linear"))
    )
    (task, *_) = tasks_of(1)
    asked = merge_request(config, BaseAwareLinear("linear"), reads_text=True)(task, 0).plan.asked
    assert asked == ("base", "concise", "friendly")
    assert texts(aware) == texts(plain)


def test_router_by_divergence_takes_the_farthest_from_the_base() -> None:
    """The expert whose list is farthest from the base's speaks, also where the base did not list a piece."""
    rng, first = np.random.default_rng(1), 0
    for _ in range(50):
        lists = random_lists(rng, num_experts=4, num_pieces=9, listed=4)
        # The first expert says almost what the base says, but for one piece that the base did not list.
        lists.logprobs[1] = lists.logprobs[0]
        lists.logprobs[1, lists.logprobs[0].isneginf().nonzero()[0]] = -9.0
        found = merge_lists(BaseAwareLinear("linear"), lists, torch.zeros(3), torch.zeros(3), Router("divergence"))
        first += int(found.weights.argmax()) == 0
    assert first == 0


def test_router_by_divergence_goes_through_the_pool() -> None:
    """Experts behind endpoints are routed as local ones are."""
    said = {"base": {"a": 0.5, "b": 0.5}, "concise": {"a": 0.51, "b": 0.49}, "friendly": {"a": 0.01, "b": 0.99}}
    config = parse_config(
        {
            "experts": [
                {"name": name, "provider": "scripted", "script": [words]}
                | ({"base": True} if name == "base" else {"dimension": name})
                for name, words in said.items()
            ],
            "cache": {"enabled": False},
        }
    )
    request = merge_request(config, BaseAwareLinear("linear"), reads_text=True)
    with ExpertBench(config, list(said)) as scripted:
        method = SampledMethod(INFO, scripted.sampler(gate=Router("divergence")), request)
        found = method.answer(tasks_of(4, [("concise", "friendly")]), OPTIONS, seed=0)
    rollouts = [given.rollout for given in found if given is not None and given.rollout is not None]
    assert [rollout.weights[0].tolist() for rollout in rollouts] == [[0.0, 1.0]] * 4
