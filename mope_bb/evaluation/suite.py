"""The list of methods for a configuration, and their run: what can be compared fairly is, the rest is left out.

White-box methods and "one model with N system prompts" need local models; methods with a base need a base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from mope_bb.config import Config
from mope_bb.evaluation.evaluator import Evaluator
from mope_bb.evaluation.methods import (
    BaseAwareLinear,
    BestOf,
    EvalTask,
    Method,
    SampledMethod,
    added_task_vectors,
    averaged_weights,
    local_sampler,
    merge_request,
    single_request,
    uniform_request,
)
from mope_bb.evaluation.results import MethodInfo, MethodKind, ScoredAnswer
from mope_bb.pcm.bench import ExpertBench
from mope_bb.pcm.gates import Router
from mope_bb.pcm.model import PreferenceControlModel
from mope_bb.pcm.plans import configured_rule
from mope_bb.training.tasks import served_dimensions

UNIFORM: Final = "uniform mixture"
WEIGHTED: Final = "user-weighted mixture"
GEOMETRIC: Final = "geometric (MOD)"
STATIC: Final = "static product"
UNTRAINED: Final = {"linear": WEIGHTED, "geometric": GEOMETRIC, "product": STATIC}
"""Merge rule -> the method that it is while every score is 0."""
IDEAL: Final = "ideal answer"
SCALES: Final = (0.4, 0.6, 0.8, 1.0)
"""Of the task-vector sum."""
Tell = Callable[[str], None]


def mope_name(rule: str) -> str:
    """What a trained PCM's method is called."""
    return f"MoPE {rule}"


def ceiling_name(rule: str) -> str:
    """What the best weights of a rule are called."""
    return f"ceiling of {rule}"


@dataclass(frozen=True, eq=False)
class Suite:
    """What methods are made from."""

    config: Config
    bench: ExpertBench
    pcms: Mapping[str, PreferenceControlModel]
    """Merge rule -> the PCM that was trained for it."""
    is_context_free: bool = False
    """Whether the PCMs' scores before the first token hold for the whole answer."""
    num_best_of: int = 8

    def method(
        self, name: str, kind: MethodKind, description: str, rule: str, *, gate: Router | None = None
    ) -> SampledMethod:
        """A merge of the configured experts without a PCM."""
        return SampledMethod(
            MethodInfo(name, kind, description),
            self.bench.sampler(gate=gate),
            merge_request(self.config, configured_rule(self.config, rule), reads_text=True),
        )

    def mope(self, rule: str) -> SampledMethod:
        """The trained PCM of `rule`."""
        return SampledMethod(
            MethodInfo(mope_name(rule), "mope", f"the trained PCM, {rule} rule"),
            self.bench.sampler(self.pcms[rule], is_context_free=self.is_context_free),
            merge_request(self.config, configured_rule(self.config, rule), reads_text=True),
        )

    def uniform(self) -> SampledMethod:
        """Every wanted expert with the same weight."""
        info = MethodInfo(UNIFORM, "training-free", "linear rule, the wanted experts alike")
        return SampledMethod(
            info, self.bench.sampler(), uniform_request(self.config, configured_rule(self.config, "linear"))
        )

    def static_product(self) -> SampledMethod:
        """The product with the user's own weights."""
        return self.method(STATIC, "training-free", "product rule, the user's own weights", "product")

    def black_box(self) -> list[Method]:
        """Everything that needs nothing but logprobs, and no training."""
        base = self.config.roster().base
        found: list[Method] = [self.uniform()]
        found.append(self.method(WEIGHTED, "training-free", "linear rule, the user's weights", "linear"))
        found.append(self.method(GEOMETRIC, "training-free", "geometric rule, the user's weights", "geometric"))
        found.append(
            self.method(
                "router by entropy",
                "training-free",
                "each token from the surest expert",
                "linear",
                gate=Router("entropy"),
            )
        )
        if base is None:
            return found
        found.append(self.static_product())
        by_divergence = SampledMethod(
            MethodInfo("router by divergence", "training-free", "each token from the expert farthest from the base"),
            self.bench.sampler(gate=Router("divergence")),
            merge_request(self.config, BaseAwareLinear("linear"), reads_text=True),
        )
        texts = self.config.dimension_texts()
        sampler = self.bench.sampler()
        return [
            SampledMethod(
                MethodInfo("base", "base", "the base alone, told nothing"), sampler, single_request(lambda task: base)
            ),
            SampledMethod(
                MethodInfo("prompting", "training-free", "the base alone, the preference as its system message"),
                sampler,
                single_request(lambda task: base, prompted=texts),
            ),
            *self._system_prompts(base, texts),
            *found,
            by_divergence,
        ]

    def _system_prompts(self, base: str, texts: Mapping[str, str]) -> list[Method]:
        """One model, one system prompt per expert: the usual hosted case."""
        models, served = self.bench.models, served_dimensions(self.config)
        if not models or not all(name in texts for name in served):
            return []
        prompted = {
            expert.name: replace(models[base], system=texts[expert.dimension])
            for expert in self.config.experts
            if expert.dimension is not None
        }
        sampler = local_sampler({base: models[base], **prompted})
        return [
            SampledMethod(
                MethodInfo(
                    f"N system prompts, {rule}", "training-free", f"one model with N system prompts, {rule} rule"
                ),
                sampler,
                merge_request(self.config, configured_rule(self.config, rule), reads_text=True),
            )
            for rule in ("linear", "product")
        ]

    def best_single(self, evaluator: Evaluator, tasks: Sequence[EvalTask]) -> Method:
        """For each preference the wanted expert with the highest reward on validation tasks."""
        sampler = self.bench.sampler()
        names = {expert.dimension: expert.name for expert in self.config.experts if expert.dimension is not None}
        rewards: dict[str, dict[str, list[float]]] = {}
        wanted = [(task, name) for task in tasks for name in task.style.weights if name in names]
        chosen = iter([names[name] for _, name in wanted])
        method = SampledMethod(
            MethodInfo("best single expert", "training-free", "the best of the wanted experts, chosen on validation"),
            sampler,
            single_request(lambda task: next(chosen)),
        )
        asked = [task for task, _ in wanted]
        given = method.answer(asked, evaluator.options, seed=17)
        rated = evaluator.rate(asked, ["" if one is None else one.text for one in given])
        for (task, name), one, rate in zip(wanted, given, rated, strict=True):
            reward = -1.0 if one is None else rate
            rewards.setdefault(task.style.label, {}).setdefault(name, []).append(reward)
        best = {
            label: names[max(found, key=lambda name: sum(found[name]) / len(found[name]))]
            for label, found in rewards.items()
        }
        return SampledMethod(method.info, sampler, single_request(lambda task: best[task.style.label]))

    def white_box(self, evaluator: Evaluator, tasks: Sequence[EvalTask], labels: Sequence[EvalTask]) -> list[Method]:
        """Methods that need the experts' weights: one new model for each preference of `labels`."""
        models, base = self.bench.models, self.config.roster().base
        if not models or base is None:
            return []
        of_dimension = {e.dimension: models[e.name] for e in self.config.experts if e.dimension is not None}
        wanted = {task.style.label: [of_dimension[name] for name in sorted(task.style.weights)] for task in labels}
        soup = SampledMethod(
            MethodInfo("averaged soup", "white-box", "one model, the mean of the wanted experts' weights"),
            local_sampler({label: averaged_weights(chosen) for label, chosen in wanted.items()}),
            single_request(lambda task: task.style.label),
        )

        def vectors(scale: float) -> Method:
            return SampledMethod(
                MethodInfo("task-vector sum", "white-box", f"base + {scale:g} x sum of the experts' differences"),
                local_sampler(
                    {label: added_task_vectors(models[base], chosen, scale) for label, chosen in wanted.items()}
                ),
                single_request(lambda task: task.style.label),
            )

        return [soup, max((vectors(scale) for scale in SCALES), key=lambda one: evaluator.mean_reward(one, tasks))]

    def best_of(self, evaluator: Evaluator) -> Method:
        """The best of n uniform answers as the reward models see them."""
        info = MethodInfo(
            f"best of {self.num_best_of}", "reward-at-inference", "uniform mixture, chosen by the reward models"
        )
        return BestOf(info, self.uniform(), self.num_best_of, evaluator.rate)


def run_all(
    suite: Suite,
    evaluator: Evaluator,
    tasks: Sequence[EvalTask],
    validation: Sequence[EvalTask],
    *,
    extra: Sequence[Method] = (),
    num_samples: int = 1,
    tell: Tell = lambda text: None,
) -> tuple[list[MethodInfo], list[ScoredAnswer]]:
    """The whole table: every method at temperature 1, and every one that merges or samples at a matched temperature.

    Matched is as random per token as the best trained PCM is at temperature 1, measured on `validation`. The static
    product also stands at the temperature that is best for it there.
    """
    methods: list[Method] = [*suite.black_box()]
    tell("choosing the best single expert")
    methods.append(suite.best_single(evaluator, validation))
    tell("tuning the task-vector sum")
    white = suite.white_box(evaluator, validation, tasks)
    trained: list[Method] = [suite.mope(rule) for rule in suite.pcms]
    matched = matched_methods(evaluator, [*methods, *white, *trained], trained, validation, tell=tell)
    for one in list(methods):
        if one.info.name in (STATIC, "N system prompts, product"):
            tell(f"tuning the temperature of {one.info.name}")
            matched.append(one.at(evaluator.tune_temperature(one, validation), f"{one.info.name} @tuned"))
    for one in trained:
        tell(f"tuning the temperature of {one.info.name}")
        matched.append(one.at(evaluator.tune_temperature(one, validation), f"{one.info.name} @tuned"))
    methods += [*white, suite.best_of(evaluator), *trained, *matched, *extra]
    return ask_all(methods, evaluator, tasks, num_samples=num_samples, tell=tell)


def ask_all(
    methods: Sequence[Method], evaluator: Evaluator, tasks: Sequence[EvalTask], *, num_samples: int, tell: Tell
) -> tuple[list[MethodInfo], list[ScoredAnswer]]:
    """Every method on every task, one method after the other."""
    answers: list[ScoredAnswer] = []
    for number, method in enumerate(methods, start=1):
        tell(f"{method.info.name} ({number} of {len(methods)})")
        answers += evaluator.run(method, tasks, num_samples=num_samples)
    return [method.info for method in methods], answers


def matched_methods(
    evaluator: Evaluator,
    methods: Sequence[Method],
    trained: Sequence[Method],
    validation: Sequence[EvalTask],
    *,
    tell: Tell = lambda text: None,
) -> list[Method]:
    """`methods` as random per token as the best of `trained` is at temperature 1, measured on `validation`."""
    if not trained:
        return []
    best = max(trained, key=lambda one: evaluator.mean_reward(one, validation))
    entropy = evaluator.mean_entropy(best, validation)
    found = []
    for one in methods:
        if one.info.name != best.info.name:
            tell(f"matching the temperature of {one.info.name}")
            value = evaluator.match_temperature(one, validation, entropy)
            found.append(one.at(round(value, 2), f"{one.info.name} @matched"))
    return found
