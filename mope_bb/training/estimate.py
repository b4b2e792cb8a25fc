"""What a run will ask for, before anything is paid.

One next-token question per token and expert: an answer of T tokens to a prompt of P tokens makes each expert that is
asked read P + (P + 1) + ... + (P + T - 1) tokens and generate T. An endpoint that caches prefixes computes fewer of
them; hosted ones bill them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mope_bb.config import Config
from mope_bb.training.tasks import TaskSource
from mope_bb.types import Message

NUM_DRAWN = 200
"""Pairs that are drawn to see which experts the preferences ask."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """For answers of one length."""

    num_tokens: int
    """Of an answer."""
    questions: Mapping[str, float]
    """Expert -> next-token questions, those of the reference answers among them."""
    tokens_read: Mapping[str, float]
    cost: float
    """By the prices in the configuration; 0 where there are none."""


@dataclass(frozen=True, slots=True)
class Outline:
    """What does not depend on the answers' length."""

    num_answers: int
    num_references: int
    """At most."""
    share_asked: Mapping[str, float]
    """Expert -> share of the answers for which it is asked."""
    prompt_tokens: float
    """Mean length of a prompt, as the PCM's tokenizer counts."""
    estimates: Sequence[Estimate]


def estimate_run(
    config: Config,
    source: TaskSource,
    prompts: Sequence[tuple[Message, ...]],
    *,
    reference: str,
    count_tokens: Callable[[tuple[Message, ...]], int],
    lengths: Sequence[int],
) -> Outline:
    """What the run that `config` describes will ask, for answers of each of `lengths`."""
    options = config.train
    num_pairs = options.max_steps * options.batch_size
    drawn = [source.task(pair_id) for pair_id in range(min(NUM_DRAWN, num_pairs))]
    names = [expert.name for expert in config.experts]
    share = {name: sum(name in task.plan.asked for task in drawn) / len(drawn) for name in names}
    mean_prompt = sum(count_tokens(task.messages) for task in drawn) / len(drawn)
    num_references = min(len(prompts), num_pairs)
    found = []
    for length in lengths:
        answers = {name: 2 * num_pairs * share[name] + (num_references if name == reference else 0) for name in names}
        questions = {name: answers[name] * length for name in names}
        read = {name: answers[name] * length * (mean_prompt + (length - 1) / 2) for name in names}
        cost = sum(read[one.name] * one.input_price + questions[one.name] * one.output_price for one in config.experts)
        found.append(Estimate(length, questions, read, cost / 1e6))
    return Outline(2 * num_pairs, num_references, share, mean_prompt, found)
