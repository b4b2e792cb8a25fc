"""What only the embedded zoo can add to an evaluation: its oracle, its ideal answers, ceilings, unseen wordings."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mope_bb.evaluation.evaluator import Evaluator
    from mope_bb.evaluation.methods import EvalTask, Method, WrittenMethod
    from mope_bb.evaluation.suite import Suite
    from mope_bb.zoo.ceilings import Table
    from mope_bb.zoo.judging import ZooJudge


def oracle_of(judge: ZooJudge) -> Any:
    """The zoo's oracle as a measure."""
    return lambda task, text, reference: judge.measures(task.messages, task.style.weights, text, reference)


def ideal_method(judge: ZooJudge) -> WrittenMethod:
    """The grammar's own answers, the top of the headroom."""
    from mope_bb.evaluation.methods import WrittenMethod
    from mope_bb.evaluation.results import MethodInfo
    from mope_bb.evaluation.suite import IDEAL

    return WrittenMethod(
        MethodInfo(IDEAL, "ceiling", "written by the grammar with every wanted pole"),
        lambda task, seed: judge.ideal(task.messages, tuple(task.style.weights), seed),
    )


def ceiling_method(
    rule_name: str,
    judge: ZooJudge,
    suite: Suite,
    evaluator: Evaluator,
    tasks: Sequence[EvalTask],
    *,
    tell: Callable[[str], None],
) -> Method:
    """What the weights of one rule can reach: chosen by the grammar's state, tuned by the oracle on `tasks`."""
    from mope_bb.evaluation.methods import SampledMethod, merge_request
    from mope_bb.evaluation.results import MethodInfo
    from mope_bb.evaluation.suite import ceiling_name
    from mope_bb.pcm.local_sampler import LocalSampler
    from mope_bb.pcm.plans import configured_rule
    from mope_bb.zoo.ceilings import GrammarHead, detail_pole, tune_table

    rule = configured_rule(suite.config, rule_name)
    tokenizer = next(iter(suite.bench.models.values())).tokenizer
    info = MethodInfo(
        ceiling_name(rule_name), "ceiling", f"{rule_name} rule, weights by an oracle that knows the grammar"
    )

    def method(table: Table) -> SampledMethod:
        sampler = LocalSampler(suite.bench.models, GrammarHead(table, tokenizer, rule))
        return SampledMethod(info, sampler, merge_request(suite.config, rule, reads_text=True))

    def rate(table: Table) -> dict[str, float]:
        scores: dict[str, list[float]] = {}
        given = method(table).answer(tasks, evaluator.options, seed=evaluator.seed)
        for task, one in zip(tasks, given, strict=True):
            reference = evaluator.references.get(task.messages) or ""
            text = "" if one is None else one.text
            found = judge.measures(task.messages, task.style.weights, text, reference)
            scores.setdefault(detail_pole(tuple(task.style.weights)), []).append(found["oracle"])
        return {pole: sum(values) / len(values) for pole, values in scores.items()}

    return method(tune_table(rule, rate, progress=lambda text: tell(f"ceiling: {text}")))


def in_words(tasks: Sequence[EvalTask], *, held_out: bool) -> list[EvalTask]:
    """The same tasks, each dimension asked for by one of the zoo's sentences."""
    from mope_bb.training.tasks import WantedStyle, sentence_for
    from mope_bb.zoo.wording import DIMENSIONS, style_sentences

    rng = random.Random("words")
    wordings = {name: style_sentences(name, held_out=held_out) for name in DIMENSIONS}
    return [
        replace(
            task,
            style=WantedStyle(sentence_for(sorted(task.style.weights), wordings, rng), task.style.weights),
        )
        for task in tasks
    ]
