"""Rollouts of `local` experts, all answers in step: one forward per model and token for the whole batch.

The numbers are those of `decode` (the same `merge_lists`, the same draws from the same seeds); what differs is that
nothing waits for anything else. Answers that need another provider go through `PoolSampler`.

Shapes: B open answers, N experts of all plans (the base first where the rule needs it), K one expert's top-k, C
candidates.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mope_bb.errors import AlignmentError, MopeError
from mope_bb.pcm.heads import HeadRows
from mope_bb.pcm.merging import merge_lists
from mope_bb.pcm.mixture import Lists, MergeRule
from mope_bb.pcm.rollouts import FailedRollout, Progress, Rollout, RolloutRequest, Sampler
from mope_bb.pcm.row_lists import END_KEY, NO_KEY, Feed, LocalModel, align_rows
from mope_bb.pcm.sampling import draw_rows, shape_distribution
from mope_bb.types import END, FinishReason, SamplingOptions


class SamplingStoppedError(Exception):
    """The answers were not wanted any more."""


class LocalSampler(Sampler):
    """Samples from local experts, at most `batch_size` answers at a time."""

    def __init__(
        self,
        models: Mapping[str, LocalModel],
        head: HeadRows,
        *,
        batch_size: int = 192,
        stop: threading.Event | None = None,
    ) -> None:
        """When `stop` is set, `sample` ends within a token by SamplingStoppedError.

        Raises AlignmentError if the models' tokenizers differ.
        """
        fingerprints = {model.tokenizer.fingerprint for model in models.values()}
        if len(fingerprints) > 1:
            raise AlignmentError(
                f"the experts {sorted(models)} have different tokenizers and cannot be merged",
                hint="Use experts that were fine-tuned from one base model.",
            )
        self._models = models
        self._head = head
        self._batch_size = batch_size
        self._stop = stop or threading.Event()

    def sample(
        self, requests: Sequence[RolloutRequest], options: SamplingOptions, *, progress: Progress | None = None
    ) -> list[Rollout | FailedRollout]:
        found: list[Rollout | FailedRollout | None] = [None] * len(requests)
        # Conversations of similar length together: the others would pay for the longest.
        order = sorted(range(len(requests)), key=lambda i: sum(len(m.content) for m in requests[i].messages))
        for first in range(0, len(order), self._batch_size):
            chosen = order[first : first + self._batch_size]
            batch = _Batch([requests[i] for i in chosen], self._models, self._head, options, self._stop)
            for i, rollout in zip(chosen, batch.run(), strict=True):
                found[i] = rollout
            if progress is not None:
                progress(first + len(chosen), len(requests))
        return [rollout for rollout in found if rollout is not None]


class _Batch:
    """One batch of answers, from the prompts to the last piece."""

    def __init__(
        self,
        requests: Sequence[RolloutRequest],
        models: Mapping[str, LocalModel],
        head: HeadRows,
        options: SamplingOptions,
        stop: threading.Event,
    ) -> None:
        self._stop = stop
        self._requests = requests
        self._options = options
        self._head = head
        self._rule: MergeRule = requests[0].plan.rule
        styled = dict.fromkeys(name for request in requests for name in request.plan.experts)
        self._names = tuple(styled)
        base = requests[0].plan.base
        self._columns = (*((base,) if base is not None and self._rule.needs_base else ()), *styled)
        self._models = [models[name] for name in self._columns]
        self._generators = [random.Random(request.seed) for request in requests]
        self._limits = [options.max_tokens] * len(requests)
        self._failed: dict[int, MopeError] = {}
        self._log_lambda = torch.stack([self._row_of(request) for request in requests])
        self._steps: list[_Step] = []

    def run(self) -> list[Rollout | FailedRollout]:
        """Sample them all."""
        prompts = self._encode_prompts()
        alive = torch.tensor([i for i in range(len(self._requests)) if i not in self._failed], dtype=torch.long)
        if len(alive):
            self._decode(alive, prompts)
        where = self._where()
        return [
            FailedRollout(request, self._failed[i]) if i in self._failed else self._rollout(request, where[i])
            for i, request in enumerate(self._requests)
        ]

    def _row_of(self, request: RolloutRequest) -> Tensor:
        """log lambda in the columns' order; -inf for who is not asked."""
        found = torch.full((len(self._names),), -math.inf, dtype=torch.float64)
        for name, value in zip(request.plan.experts, request.plan.log_lambda, strict=True):
            found[self._names.index(name)] = value
        return found

    def _encode_prompts(self) -> list[list[tuple[int, ...]]]:
        """Ids per column and request; what does not fit fails, or is cut at the end of the context."""
        prompts = [
            [self._encode_prompt(i, name, model) for i in range(len(self._requests))]
            for name, model in zip(self._columns, self._models, strict=True)
        ]
        for i, request in enumerate(self._requests):
            if i not in self._failed:
                try:
                    self._limits[i] = min(self._limits[i], self._head.room(request))
                except MopeError as error:
                    self._failed[i] = error
        return prompts

    def _encode_prompt(self, i: int, name: str, model: LocalModel) -> tuple[int, ...]:
        request = self._requests[i]
        if name not in request.plan.asked or i in self._failed:
            return ()
        try:
            ids = model.encode(request.messages, expert=name)
        except MopeError as error:
            self._failed[i] = error
            return ()
        self._limits[i] = min(self._limits[i], model.max_length - len(ids) + 1)
        return ids

    def _decode(self, alive: Tensor, prompts: list[list[tuple[int, ...]]]) -> None:
        asked = [[name in request.plan.asked for name in self._columns] for request in self._requests]
        is_asked = torch.tensor(asked)
        feeds = [Feed(model, alive[is_asked[alive, c]]) for c, model in enumerate(self._models)]
        lists = [
            feed.start([prompts[c][i] for i in feed.rows.tolist()]) if len(feed.rows) else None
            for c, feed in enumerate(feeds)
        ]
        scores = self._head.start([self._requests[i] for i in alive.tolist()], self._names)
        while True:
            if self._stop.is_set():
                raise SamplingStoppedError
            step = self._draw(alive, feeds, self._align(alive, feeds, lists), scores)
            self._steps.append(step)
            limits = torch.tensor([self._limits[i] for i in alive.tolist()])
            going = ((step.drawn != END_KEY) & (len(self._steps) < limits)).nonzero()[:, 0]
            if len(going) == 0:
                return
            if len(going) < len(alive):
                self._head.keep(going)
            alive, drawn = alive[going], step.drawn[going]
            next_ids = torch.full((len(self._requests),), -1).index_copy(0, alive, drawn)
            lists = [feed.advance(next_ids) for feed in feeds]
            scores = self._head.advance(drawn)

    def _align(
        self, alive: Tensor, feeds: Sequence[Feed], lists: Sequence[tuple[Tensor, Tensor] | None]
    ) -> tuple[Tensor, Lists]:
        """Candidates' keys (B, C) and the lists over them, from what each model said to its own answers."""
        width = max(found[0].shape[1] for found in lists if found is not None)
        shape = (len(alive), len(self._columns), width)
        keys, values = torch.full(shape, NO_KEY), torch.full(shape, -math.inf, dtype=torch.float64)
        position = torch.full((len(self._requests),), -1).index_copy(0, alive, torch.arange(len(alive)))
        for c, (feed, found) in enumerate(zip(feeds, lists, strict=True)):
            if found is not None:
                rows = position[feed.rows]
                keys[rows, c, : found[0].shape[1]], values[rows, c, : found[1].shape[1]] = found
        return align_rows(keys, values, vocab_sizes=[feed.vocab_size for feed in feeds])

    def _draw(self, alive: Tensor, feeds: Sequence[Feed], aligned: tuple[Tensor, Lists], scores: Tensor) -> _Step:
        candidates, lists = aligned
        merged = merge_lists(self._rule, lists, self._log_lambda[alive], scores.double(), self._head.gate)
        shaped = shape_distribution(merged.log_pi, temperature=self._options.temperature, top_p=self._options.top_p)
        uniforms = torch.tensor([self._generators[i].random() for i in alive.tolist()], dtype=torch.float64)
        index = draw_rows(shaped, uniforms)
        return _Step(
            rows=alive,
            lists=Lists(lists.logprobs.float(), lists.floors.float(), lists.tails.float()),
            index=index,
            drawn=candidates.gather(1, index[:, None])[:, 0],
            logprobs=merged.log_pi.gather(1, index[:, None])[:, 0],
            weights=merged.weights.float(),
            entropies=torch.special.entr(shaped.exp()).sum(dim=-1).float(),
        )

    def _where(self) -> list[list[tuple[_Step, int]]]:
        """For each answer its steps, each with the answer's row in it."""
        where: list[list[tuple[_Step, int]]] = [[] for _ in self._requests]
        for step in self._steps:
            for row, i in enumerate(step.rows.tolist()):
                where[i].append((step, row))
        return where

    def _rollout(self, request: RolloutRequest, steps: Sequence[tuple[_Step, int]]) -> Rollout:
        """The rollout of one answer, with the columns of its own experts in its plan's order."""
        asked = torch.tensor([self._columns.index(name) for name in request.plan.asked])
        styled = torch.tensor([self._names.index(name) for name in request.plan.experts])
        parts = [step.lists.logprobs[row][asked] for step, row in steps]
        width = max(int((~torch.isneginf(part)).any(dim=0).nonzero()[-1]) + 1 for part in parts)
        logprobs = torch.full((len(parts), len(asked), width), -math.inf)
        for target, part in zip(logprobs, parts, strict=True):
            used = min(width, part.shape[1])
            target[:, :used] = part[:, :used]
        ids = [int(step.drawn[row]) for step, row in steps]
        finish_reason: FinishReason = "stop" if ids[-1] == END_KEY else "length"
        pieces = self._models[0].tokenizer.pieces
        return Rollout(
            request,
            tuple(END if key == END_KEY else pieces[key] for key in ids),
            finish_reason,
            Lists(
                logprobs,
                torch.stack([step.lists.floors[row][asked] for step, row in steps]),
                torch.stack([step.lists.tails[row][asked] for step, row in steps]),
            ),
            torch.stack([step.index[row] for step, row in steps]),
            torch.stack([step.logprobs[row] for step, row in steps]),
            torch.stack([step.weights[row][styled] for step, row in steps]),
            torch.stack([step.entropies[row] for step, row in steps]),
            torch.full((len(ids),), self._head.policy_version),
        )


@dataclass(frozen=True, eq=False)
class _Step:
    """What happened at one step; every tensor has a row for each answer that was still open, named in `rows`."""

    rows: Tensor
    lists: Lists
    index: Tensor
    drawn: Tensor
    logprobs: Tensor
    weights: Tensor
    entropies: Tensor
