"""Steps padded to the sizes of graphs, run without a graph on the CPU: the rows of the plain forward all the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mope_bb.cuda_graphs import MAX_IDS, StepGraphs, pack
from mope_bb.inference import BatchedModel
from tests.unit.test_inference import VOCAB, check_rows, every_model, gpt2, llama, rows_together, start

__all__ = ["start"]  # a fixture


class Unrecorded(StepGraphs):
    """Runs each step as it would be recorded."""

    num_run = num_left = 0

    def run(self, new_ids: Sequence[Sequence[int]], rows: Sequence[int], starts: Sequence[int]) -> Tensor | None:
        width = max(map(len, new_ids))
        size = self.size_of(len(rows), width, max(starts))
        if size is None:
            self.num_left += 1
            return None
        self.num_run += 1
        return self.step(pack(new_ids, rows, starts, size), size)[: len(rows), :width]


def with_steps(runner: BatchedModel) -> Unrecorded:
    """Let `runner` pad its steps."""
    model, slots = runner._model, runner._slots
    steps = Unrecorded(model.padded_step, slots.cache, torch.device("cpu"), name="tiny", max_rows=len(slots))
    model.graphs = steps
    return steps


@every_model
@pytest.mark.parametrize("seed", range(2))
def test_padded_steps(build: Callable[[], Any], start: Callable[..., BatchedModel], seed: int) -> None:
    """Answers of different lengths that grow by drafts, of which some are kept, at random turns, beyond a growth."""
    model, generator = build(), random.Random(seed)
    runner = start(model, num_slots=5)
    steps = with_steps(runner)
    answers = [[generator.randrange(VOCAB) for _ in range(generator.randint(1, 30))] for _ in range(5)]
    for _ in range(20):
        asks = []
        for index in generator.sample(range(5), generator.randint(1, 5)):
            drafted = [*answers[index], *(generator.randrange(VOCAB) for _ in range(generator.choice((0, 1, 3, 20))))]
            asks.append((drafted, len(drafted) - len(answers[index]) + 1, len(answers[index])))
            kept = drafted[: generator.randint(len(answers[index]), len(drafted))]
            answers[index] = [*kept, generator.randrange(VOCAB)]
        check_rows(model, asks, rows_together(runner, asks))
    assert steps.num_run > 20
    long = [generator.randrange(VOCAB) for _ in range(MAX_IDS + 1)]
    check_rows(model, [(long, 2, len(long))], rows_together(runner, [(long, 2, len(long))]))
    assert steps.num_left > 0


def test_padding_stays_within_the_positions_that_a_model_knows(start: Callable[..., BatchedModel]) -> None:
    """A step at the end of learned positions is padded beyond them, alone and beside another."""
    model, generator = gpt2(), random.Random(2)
    runner = start(model, num_slots=4)
    steps = with_steps(runner)
    full, short = ([generator.randrange(VOCAB) for _ in range(num)] for num in (59, 5))
    for asks in ([(full, 1, 59)], [([*full, 1, 2, 3], 4, 59)], [([*full, 1, 2, 3, 4, 5], 6, 59), (short, 3, 3)]):
        check_rows(model, asks, rows_together(runner, asks))
    assert steps.num_run >= 3


def test_sizes_are_few(start: Callable[..., BatchedModel]) -> None:
    """Every step of up to 16 answers of up to 500 ids has one of 15 sizes, and there is room for its padding."""
    runner = start(llama(), num_slots=16)
    steps = with_steps(runner)
    assert steps.size_of(1, 1, 600) is not None
    sizes = {steps.size_of(rows, 1, last) for rows in range(1, 17) for last in range(500)}
    assert sizes == {(rows, 1, length) for rows in (1, 2, 4, 8, 16) for length in (128, 256, 512)}
    assert steps.size_of(16, 3, 0) == (16, 4, 128)
    assert steps.size_of(16, 5, 0) is None
    last = steps.size_of(1, 32, runner._slots.cache.capacity - 10)
    assert last is not None
    assert runner._slots.cache.capacity >= last[2]


def test_without_graphs_it_goes_on(start: Callable[..., BatchedModel], caplog: pytest.LogCaptureFixture) -> None:
    """Where a graph cannot be recorded, as on the CPU, every row is right, and one warning says so."""
    model, generator = llama(), random.Random(3)
    runner = start(model, num_slots=4)
    runner._model.graphs = StepGraphs(
        runner._model.padded_step, runner._slots.cache, torch.device("cpu"), name="tiny", max_rows=4
    )
    ids = [generator.randrange(VOCAB) for _ in range(5)]
    for _ in range(6):
        ids = [*ids, generator.randrange(VOCAB)]
        check_rows(model, [(ids, 1, len(ids))], rows_together(runner, [(ids, 1, len(ids))]))
    assert runner._model.graphs.num_graphs == 0
    (record,) = caplog.records
    assert "'tiny' goes on without CUDA graphs" in record.getMessage()
