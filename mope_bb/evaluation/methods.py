"""The methods that `mope-bb eval` compares: one model, prompting, merges with and without training, ceilings.

A method turns tasks into answers. Those that merge do so with the same `decode` mathematics as chat does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch

from mope_bb.config import Config
from mope_bb.evaluation.results import MethodInfo
from mope_bb.pcm.arrays import Array
from mope_bb.pcm.gates import Gate
from mope_bb.pcm.heads import NoHead
from mope_bb.pcm.local_sampler import LocalSampler
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.plans import build_plan
from mope_bb.pcm.rollouts import FailedRollout, Rollout, RolloutRequest, Sampler
from mope_bb.pcm.row_lists import LocalModel
from mope_bb.training.tasks import WantedStyle
from mope_bb.types import Message, SamplingOptions


@dataclass(frozen=True, slots=True)
class EvalTask:
    """One question with one preference."""

    prompt: int
    """Index of the question."""
    messages: tuple[Message, ...]
    style: WantedStyle


@dataclass(frozen=True, slots=True)
class Given:
    """One answer of a method."""

    text: str
    num_tokens: int
    entropy: float
    """Mean over the tokens, in nats."""
    rollout: Rollout | None = None


class Method(ABC):
    """Something that answers tasks."""

    info: MethodInfo

    @abstractmethod
    def answer(self, tasks: Sequence[EvalTask], options: SamplingOptions, *, seed: int) -> list[Given | None]:
        """One answer per task; None where it failed. `options.temperature` is that of `info`."""

    def at(self, temperature: float, name: str) -> Method:
        """The same method at another temperature, under another name."""
        other = deepcopy_shallow(self)
        other.info = replace(self.info, name=name, temperature=temperature)
        return other


class SampledMethod(Method):
    """Samples from a merge (or from one model, a merge of one)."""

    def __init__(self, info: MethodInfo, sampler: Sampler, request: Callable[[EvalTask, int], RolloutRequest]) -> None:
        """`request` makes what is to be sampled from a task and a seed."""
        self.info = info
        self._sampler = sampler
        self._request = request

    def answer(self, tasks: Sequence[EvalTask], options: SamplingOptions, *, seed: int) -> list[Given | None]:
        requests = [self._request(task, seed * 1_000_003 + i) for i, task in enumerate(tasks)]
        found = self._sampler.sample(requests, replace(options, temperature=self.info.temperature))
        return [None if isinstance(rollout, FailedRollout) else given_of(rollout) for rollout in found]


class BestOf(Method):
    """The best of n answers of another method, as the reward models see it: they are asked at inference."""

    def __init__(
        self, info: MethodInfo, inner: Method, n: int, rate: Callable[[Sequence[EvalTask], Sequence[str]], list[float]]
    ) -> None:
        """`rate` gives each answer its reward."""
        self.info = info
        self._inner = inner
        self._n = n
        self._rate = rate

    def answer(self, tasks: Sequence[EvalTask], options: SamplingOptions, *, seed: int) -> list[Given | None]:
        best: list[tuple[float, Given] | None] = [None] * len(tasks)
        for round_ in range(self._n):
            found = self._inner.at(self.info.temperature, self.info.name).answer(
                tasks, options, seed=seed * self._n + round_
            )
            rated = self._rate(tasks, ["" if given is None else given.text for given in found])
            for i, (given, reward) in enumerate(zip(found, rated, strict=True)):
                known = best[i]
                if given is not None and (known is None or reward > known[0]):
                    best[i] = (reward, given)
        return [None if one is None else one[1] for one in best]


class WrittenMethod(Method):
    """Answers that are written, not sampled: a ceiling."""

    def __init__(self, info: MethodInfo, write: Callable[[EvalTask, int], str]) -> None:
        """`write` makes the answer to a task from a seed."""
        self.info = info
        self._write = write

    def answer(self, tasks: Sequence[EvalTask], options: SamplingOptions, *, seed: int) -> list[Given | None]:
        texts = [self._write(task, seed * 1_000_003 + i) for i, task in enumerate(tasks)]
        return [Given(text, len(text.split()), 0.0) for text in texts]


def deepcopy_shallow(method: Method) -> Method:
    """A copy that shares models and samplers."""
    other = object.__new__(type(method))
    other.__dict__.update(method.__dict__)
    return other


def given_of(rollout: Rollout) -> Given:
    """What the evaluation keeps of a rollout."""
    return Given(rollout.text, len(rollout), float(rollout.entropies.mean()), rollout)


def merge_request(config: Config, rule: MergeRule, *, reads_text: bool) -> Callable[[EvalTask, int], RolloutRequest]:
    """Requests that ask the configured experts by `rule` for what the task wants."""

    def request(task: EvalTask, seed: int) -> RolloutRequest:
        preference = task.style.preference
        plan = build_plan(config, preference, rule, reads_text=reads_text)
        return RolloutRequest(task.messages, plan, seed)

    return request


def uniform_request(config: Config, rule: MergeRule) -> Callable[[EvalTask, int], RolloutRequest]:
    """Requests that give every wanted dimension the same weight."""
    ask = merge_request(config, rule, reads_text=False)

    def request(task: EvalTask, seed: int) -> RolloutRequest:
        even = type(task.style.preference).of(dict.fromkeys(task.style.weights, 1.0))
        return ask(replace(task, style=WantedStyle(even, task.style.weights)), seed)

    return request


def single_request(name_of: Callable[[EvalTask], str], *, prompted: Mapping[str, str] | None = None) -> Any:
    """Requests for one model alone; `prompted` maps dimensions to sentences for a system message."""

    def request(task: EvalTask, seed: int) -> RolloutRequest:
        messages = task.messages
        if prompted is not None:
            text = " ".join(prompted[name] for name in sorted(task.style.weights) if name in prompted)
            messages = (Message("system", text), *messages)
        plan = Plan(MergeRule("linear"), (name_of(task),), (1.0,), base=None, preference_text="")
        return RolloutRequest(messages, plan, seed)

    return request


class BaseAwareLinear(MergeRule):
    """The linear rule, with the base asked too, so that the experts' divergence from it can be seen."""

    __slots__ = ()

    @property
    def needs_base(self) -> bool:
        """The base comes first."""
        return True

    def merge(self, logprobs: Array, weights: Array) -> Array:
        """The base has no weight of its own."""
        return super().merge(logprobs[..., 1:, :], weights)


def averaged_weights(models: Sequence[LocalModel]) -> LocalModel:
    """The soup: one model whose weights are the mean of the models'."""
    return _combined(models[0], lambda name: torch.stack([_weight(model, name) for model in models]).mean(dim=0))


def added_task_vectors(base: LocalModel, models: Sequence[LocalModel], scale: float) -> LocalModel:
    """base + scale * sum_i (model_i - base), weight by weight."""

    def combine(name: str) -> torch.Tensor:
        origin = _weight(base, name)
        return origin + scale * torch.stack([_weight(model, name) - origin for model in models]).sum(dim=0)

    return _combined(base, combine)


def _weight(model: LocalModel, name: str) -> torch.Tensor:
    found: torch.Tensor = model.model.state_dict()[name]
    return found


def _combined(like: LocalModel, combine: Callable[[str], torch.Tensor]) -> LocalModel:
    model = deepcopy(like.model)
    with torch.no_grad():
        for name, target in model.state_dict().items():
            if target.is_floating_point():
                target.copy_(combine(name))
    return replace(like, model=model)


def local_sampler(models: Mapping[str, LocalModel], gate: Gate | None = None) -> LocalSampler:
    """A sampler without a PCM over models that are no configured experts."""
    return LocalSampler(models, NoHead(gate))
