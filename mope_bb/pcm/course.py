"""What the ways of asking share: one answer on its way, with who is asked, what is known, and how it goes on."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from mope_bb.errors import ContextLengthError, LogprobsUnavailableError, MalformedResponseError, RequestError
from mope_bb.pcm.merging import Merged, Plan, merge_path
from mope_bb.pcm.pacing import AnswerPace, Pace, Request
from mope_bb.pcm.runner import PathJudgement, Scorer
from mope_bb.pcm.sampling import check_sampling, shape_distribution
from mope_bb.pcm.speculation import agreement_row
from mope_bb.providers.lookahead import Lookahead
from mope_bb.providers.pool import ExpertPool, together
from mope_bb.types import END, Context, Effort, Piece, SamplingOptions, TokenDistribution, TokenStep

T = TypeVar("T")
REFUSALS: Final = (RequestError, MalformedResponseError, LogprobsUnavailableError)
"""What an endpoint answers that does not do what was asked of it."""


class Course:
    """One answer on its way."""

    def __init__(
        self,
        context: Context,
        plan: Plan,
        pool: ExpertPool,
        scorer: Scorer,
        options: SamplingOptions,
        *,
        seed: int,
        pace: Pace,
    ) -> None:
        """`pace` is what the answers of one pool have measured together. Raises ConfigError."""
        check_sampling(options)
        self.context = context
        self.plan = plan
        self.pool = pool
        self.options = options
        self.shared_pace = pace
        self.effort = Effort()
        self.uses_drafts = False
        """Whether chance at an endpoint took part."""
        self.policy_version = 0
        """Of the PCM, when it judged last."""
        self.known: Lookahead
        self.pace: AnswerPace
        self._scorer = scorer
        self._generator = random.Random(seed)

    async def begin(self, *, is_repeatable: bool, is_bound: bool) -> None:
        """Ask the experts of the plan, which are open, from here on. `is_bound`: for an answer that has a form."""
        plan, pool, options = self.plan, self.pool, self.options
        if options.max_tokens > 1:
            pool.check_can_continue(plan.asked)
        self.known = Lookahead(plan.asked)
        self.pace = AnswerPace(
            self.shared_pace,
            [pool.seat(name) for name in plan.asked],
            key=(plan.asked, plan.rule.name, options.temperature, options.top_p, is_bound),
            # A form leaves little of what an expert drafts without knowing it.
            is_repeatable=(is_repeatable and options.temperature > 0) or is_bound,
        )
        # Who scores a draft would else begin only then to render the conversation.
        await together([pool.prepare(name, self.context) for name in plan.asked])

    @property
    def num_context(self) -> int:
        """Tokens so far, about four bytes each: good enough for what a question costs."""
        return sum(len(message.content) for message in self.context.messages) // 4 + len(self.context.response)

    def uniform(self) -> float:
        """The next of the answer's own random numbers in [0, 1)."""
        return self._generator.random()

    def draft_seed(self) -> int:
        """For what an endpoint draws."""
        return self._generator.getrandbits(31)

    # Asking

    async def ask_and_judge(self, num_ahead: int) -> tuple[list[list[TokenDistribution]], list[Piece], PathJudgement]:
        """What all are known to say from here on, the pieces that all expect between, and the PCM's word on both."""
        _, judged = await self.with_judging((), self._ask(num_ahead))
        lists, expected = self.known.common()
        return lists, expected, await self._judge(expected) if expected else judged

    async def _ask(self, num_ahead: int) -> None:
        depths = {name: self.known.depth(name) for name in self.plan.asked}
        if min(depths.values()) > 0:
            return
        self.count(num_round_trips=1)
        # Who knows little more is asked along, so that fewer waits follow each other.
        await together([self._ask_one(name, num_ahead) for name, depth in depths.items() if depth < 0.75 * num_ahead])

    async def _ask_one(self, name: str, num_ahead: int) -> None:
        if num_ahead > 1 and self.pool.seat(name).can_continue and self.shared_pace.can(name, "draft"):
            try:
                # The most probable pieces: the answer goes that way more often than any other.
                drafting = self.pool.draft(name, self.context, num_tokens=num_ahead, temperature=0.0)
                steps = await self.timed(name, "draft", drafting, len)
            except REFUSALS as error:
                if not isinstance(error, ContextLengthError):
                    self.shared_pace.give_up(name, "draft", error.message)
            else:
                self.count_generated(name, len(steps))
                return self.known.learn(name, steps)
        distribution = await self.timed(name, "ask", self.pool.ask_one(name, self.context), lambda _: 1)
        self.count_generated(name, 1)
        self.known.learn_one(name, distribution)
        return None

    async def with_judging(self, path: Sequence[Piece], asking: Awaitable[T]) -> tuple[T, PathJudgement]:
        """Experts and PCM at the same time; a failure of the experts cancels the PCM's work."""
        judging = asyncio.ensure_future(self._judge(path))
        try:
            return await asking, await judging
        finally:
            judging.cancel()

    async def _judge(self, path: Sequence[Piece]) -> PathJudgement:
        judging = self._scorer.judge_path(self.context, path, self.plan.preference_text, self.plan.experts)
        found = await self.timed("", "judge", judging, lambda found: len(found.head_scores))
        self.policy_version = found.policy_version
        return found

    async def timed(self, name: str, request: Request, work: Coroutine[Any, Any, T], count: Callable[[T], int]) -> T:
        """Await `work`; `count` tells for how many positions it was: a draft may end before its length is reached."""
        began = time.perf_counter()
        found = await work
        self.shared_pace.observe(name, request, count(found), time.perf_counter() - began)
        return found

    # Merging and going on

    def merge(self, lists: Sequence[Sequence[TokenDistribution]], judged: PathJudgement) -> tuple[Merged, ...]:
        """The merge at each position of `lists`."""
        return merge_path(self.plan, lists, judged.head_scores, judged.gate)

    def shape(self, log_pi: Tensor) -> Tensor:
        """Log probabilities (C) at the answer's temperature and top_p."""
        return shape_distribution(log_pi, temperature=self.options.temperature, top_p=self.options.top_p)

    def step(self, merged: Merged, shaped: Tensor, index: int, judged: PathJudgement) -> TokenStep:
        """The step in which candidate `index` was drawn from `shaped`."""
        return TokenStep(
            piece=merged.candidates.pieces[index],
            logprob=float(shaped[index]),
            experts=self.plan.asked,
            candidates=merged.candidates,
            index=index,
            weights=(*((0.0,) if self.plan.rule.needs_base else ()), *merged.weights.tolist()),
            missed_mass=merged.missed_mass,
            floor_mass=merged.floor_mass,
            entropy=float(torch.special.entr(shaped.exp()).sum()),
            policy_version=judged.policy_version,
        )

    def go_on(self, steps: Sequence[TokenStep], shapes: Sequence[Tensor] = ()) -> None:
        """The answer is longer by `steps`, drawn from `shapes`; none for steps that a form gave."""
        for step in steps:
            self.known.advance(step.piece)
        self.context = self.context.extended(*(step.piece for step in steps))
        self.pace.learn(
            [
                agreement_row(shaped.numpy(), step.candidates.logprobs, self.options.temperature) * (step.piece != END)
                for step, shaped in zip(steps, shapes, strict=False)  # given steps have none
            ]
        )

    def take_back(self, number: int) -> None:
        """The last `number` steps were not told to anyone."""
        response = self.context.response
        self.context = Context(self.context.messages, response[: len(response) - number])

    # Counting

    def count(self, **more: int) -> None:
        """Add to the effort."""
        sums = {name: getattr(self.effort, name) + number for name, number in more.items()}
        self.effort = replace(self.effort, **sums)

    def count_generated(self, name: str, number: int) -> None:
        """Add tokens that expert `name` generated."""
        self.pace.num_generated[name] += number
        self.count(num_generated=number)
