"""The whole table on the nano zoo, and what is left of it where there is less to compare."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest

from mope_bb.config import Config, parse_config
from mope_bb.evaluation.evaluator import Evaluator
from mope_bb.evaluation.methods import EvalTask, WrittenMethod
from mope_bb.evaluation.results import Evaluation, MethodInfo, ScoredAnswer
from mope_bb.evaluation.suite import IDEAL, STATIC, UNIFORM, Suite, run_all
from mope_bb.pcm.bench import ExpertBench
from mope_bb.pcm.model import PreferenceControlModel, load_pcm
from mope_bb.types import SamplingOptions
from mope_bb.zoo.build import Zoo
from tests.evaluation.conftest import MAX_TOKENS, evaluator_of, prepared, tasks_of, wanting

BLACK_BOX = [UNIFORM, "user-weighted mixture", "geometric (MOD)", "router by entropy"]
"""What needs neither a base nor weights."""
WITH_BASE = ["base", "prompting", *BLACK_BOX, STATIC, "router by divergence"]
SYSTEM_PROMPTS = ["N system prompts, linear", "N system prompts, product"]
WHITE_BOX = ["averaged soup", "task-vector sum"]


def pcm_of(nano: Zoo, rule: str) -> PreferenceControlModel:
    """The zoo's untrained PCM, as if it had been trained for `rule`."""
    pcm = load_pcm(str(nano.pcm))
    pcm.rule, pcm.policy_version = rule, 1
    return pcm


@dataclass(frozen=True)
class Table:
    """What `run_all` gave."""

    tasks: list[EvalTask]
    methods: list[MethodInfo]
    answers: list[ScoredAnswer]
    told: list[str]

    @property
    def names(self) -> list[str]:
        """Of the methods."""
        return [method.name for method in self.methods]


@pytest.fixture(scope="module")
def table(nano: Zoo, bench: ExpertBench, config: Config) -> Table:
    """Two prompts, two preferences, PCMs for two rules, and a grid of two temperatures."""
    tasks, validation = tasks_of(2), tasks_of(1, first=2)
    evaluator = prepared(evaluator_of(bench), [*tasks, *validation])
    evaluator.options = SamplingOptions(max_tokens=4)
    suite = Suite(config, bench, {rule: pcm_of(nano, rule) for rule in ("linear", "product")}, num_best_of=2)
    ideal = WrittenMethod(MethodInfo(IDEAL, "ceiling", ""), lambda task, seed: "written")
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mope_bb.evaluation.evaluator.TEMPERATURES", (0.5, 1.0))
        methods, answers = run_all(suite, evaluator, tasks, validation, extra=[ideal], tell=told.append)
    return Table(tasks, methods, answers, told)


def test_every_method_answers_every_task(table: Table) -> None:
    """Once each, and nobody else answers: the whole is an evaluation, whose names are unique."""
    expected = Counter((name, task.prompt, task.style.label) for name in table.names for task in table.tasks)
    assert Counter((one.method, one.prompt, one.preference) for one in table.answers) == expected
    assert len(Evaluation(table.methods, table.answers).methods) == len(table.names) > 20


def test_the_table_has_every_kind_of_method(table: Table) -> None:
    """All that can be compared at temperature 1, then the trained ones, then other temperatures, then the extra one."""
    plain = [name for name in table.names if "@" not in name]
    trained = ["MoPE linear", "MoPE product"]
    single = ["base", "prompting", *SYSTEM_PROMPTS, *WITH_BASE[2:], "best single expert"]
    assert plain == [*single, *WHITE_BOX, "best of 2", *trained, IDEAL]
    assert {method.temperature for method in table.methods if "@" not in method.name} == {1.0}
    assert len(table.told) > len(table.names)


def test_matched_and_tuned_rows_exist(table: Table) -> None:
    """At a matched temperature all but the best PCM, the best of n and the extra one; tuned the product's relatives."""
    by_name = {method.name: method for method in table.methods}
    matched = {name.removesuffix(" @matched") for name in table.names if name.endswith(" @matched")}
    tuned = {name.removesuffix(" @tuned") for name in table.names if name.endswith(" @tuned")}
    plain = {name for name in table.names if "@" not in name}
    (best,) = {"MoPE linear", "MoPE product"} - matched
    assert matched == plain - {best, "best of 2", IDEAL}
    assert tuned == {STATIC, "N system prompts, product", "MoPE linear", "MoPE product"}
    for name in tuned:
        assert by_name[f"{name} @tuned"].temperature in (0.5, 1.0)
    for name in matched:
        row = by_name[f"{name} @matched"]
        assert row == replace(by_name[name], name=row.name, temperature=row.temperature)
        assert 0.5 <= row.temperature <= 1.0


def scripted(*, base: str | None = "plain", **said: str) -> Config:
    """Experts of the dimensions `said`, each of which always says its word; the base says `base`."""
    words = {**({} if base is None else {"base": base}), **said}
    experts: list[dict[str, Any]] = [
        {"name": f"{name}-expert" if name in said else name, "provider": "scripted", "script": [{word: 1.0}]}
        | ({"dimension": name} if name in said else {"base": True})
        for name, word in words.items()
    ]
    return parse_config({"experts": experts, "cache": {"enabled": False}})


def opened(config: Config) -> ExpertBench:
    """All of its experts."""
    return ExpertBench(config, [expert.name for expert in config.experts])


def names_of(suite: Suite) -> list[str]:
    """The black-box methods."""
    return [method.info.name for method in suite.black_box()]


def test_black_box_list_shrinks(bench: ExpertBench, config: Config) -> None:
    """Local models can play several experts by system prompts; without a base only the plain merges are left."""
    assert names_of(Suite(config, bench, {})) == [*WITH_BASE[:2], *SYSTEM_PROMPTS, *WITH_BASE[2:]]
    wordless = config.model_copy(update={"dimensions": {}})
    assert names_of(Suite(wordless, bench, {})) == WITH_BASE
    for base, expected in (("plain", WITH_BASE), (None, BLACK_BOX)):
        said = scripted(base=base, concise="a", friendly="b")
        with opened(said) as endpoints:
            assert names_of(Suite(said, endpoints, {})) == expected


def test_a_table_without_base_or_pcm() -> None:
    """Endpoints without a base: no white box, no matching, and still an answer to every task."""
    said = scripted(base=None, concise="a", friendly="b")
    tasks = tasks_of(2, [("concise", "friendly"), ("friendly",)])
    with opened(said) as endpoints:
        evaluator = prepared(evaluator_of(endpoints), tasks)
        methods, answers = run_all(Suite(said, endpoints, {}), evaluator, tasks, tasks)
    assert [method.name for method in methods] == [*BLACK_BOX, "best single expert", "best of 8"]
    assert len(answers) == len(methods) * len(tasks)
    assert not evaluator.failures


def liking(likes: dict[str, dict[str, float]], endpoints: ExpertBench, tasks: list[EvalTask]) -> Evaluator:
    """An evaluator whose reward model of a dimension likes words as `likes` says."""
    return prepared(evaluator_of(endpoints, lambda dimension, word: likes[dimension].get(word, 0.0)), tasks)


def test_best_single_is_the_best_of_the_wanted() -> None:
    """By the mean reward on the validation tasks, for each preference its own; unwanted experts do not count."""
    said = scripted(concise="a", friendly="b", simple="c")
    both, alone = ("concise", "friendly"), ("concise", "simple")
    likes = {
        "concise": {"a": 1.0, "b": -2.0, "c": 0.5},
        "friendly": {"a": 1.0, "b": 9.0, "c": 9.0},
        "simple": {"a": -3.0, "b": 9.0, "c": 1.0},
    }
    tasks = tasks_of(3, [both, alone])
    with opened(said) as endpoints:
        best = Suite(said, endpoints, {}).best_single(liking(likes, endpoints, tasks), tasks)
        found = best.answer(tasks, SamplingOptions(max_tokens=MAX_TOKENS), seed=0)
    # Wins: a has sigmoid(1) twice, b has sigmoid(-2) and sigmoid(9), which is less; c is better than a.
    assert [given and given.text for given in found] == ["a", "c"] * 3


def test_best_single_is_chosen_by_the_mean() -> None:
    """Each expert is the best for one weighting: what counts is the mean over the validation tasks."""
    said = scripted(concise="a", friendly="b")
    likes = {"concise": {"a": 2.0, "b": -2.0}, "friendly": {"a": -2.0, "b": 2.0}}
    (task, *_) = tasks_of(1, [("concise", "friendly")])
    for share, expected in ((0.9, "a"), (0.6, "b")):
        weights = ({"concise": share, "friendly": 1 - share}, {"concise": 0.3, "friendly": 0.7})
        tasks = [replace(task, style=wanting(one)) for one in weights]
        with opened(said) as endpoints:
            best = Suite(said, endpoints, {}).best_single(liking(likes, endpoints, tasks), tasks)
            found = best.answer([task], SamplingOptions(max_tokens=MAX_TOKENS), seed=0)
        assert [given and given.text for given in found] == [expected]


def test_best_single_is_never_one_that_fails(config: Config) -> None:
    """An expert that gives no answer is not chosen, even by a reward model that likes silence."""
    experts = [
        expert.model_copy(update={"system": "<|end|>"} if expert.name == "concise" else {})
        for expert in config.experts
        if expert.name in ("concise", "friendly")
    ]
    broken = config.model_copy(update={"experts": tuple(experts)})
    tasks = tasks_of(2, [("concise", "friendly")])
    with opened(broken) as local:
        evaluator = prepared(evaluator_of(local, lambda dimension, answer: -len(answer)), tasks)
        best = Suite(broken, local, {}).best_single(evaluator, tasks)
        found = best.answer(tasks, SamplingOptions(max_tokens=MAX_TOKENS), seed=0)
    assert all(given is not None for given in found)
