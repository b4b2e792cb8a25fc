"""One open answer, token by token. Chat, server, evaluation and rollouts all come through here.

          ask the experts  |  score with the PCM          (at the same time)
          merge -> shape -> draw

Experts are asked ahead where that is faster (`pacing`). That changes how often they are asked, and never the
distribution that is sampled: a list that is known early is used only if the answer has gone the way it was asked for,
and a piece that an expert drafted is tested against the merged distribution (`speculation`).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from mope_bb.errors import (
    ConstraintError,
    ContextLengthError,
    LogprobsUnavailableError,
    MalformedResponseError,
    ProviderError,
    RequestError,
    TopKError,
)
from mope_bb.pcm import expert_first
from mope_bb.pcm.constraint import Constraint, forced_step
from mope_bb.pcm.fitting import Fitting
from mope_bb.pcm.merging import Merged, Plan, merge_fitting, merge_path
from mope_bb.pcm.opening import drop_failed, open_experts
from mope_bb.pcm.pacing import AnswerPace, Move, Pace, Request
from mope_bb.pcm.runner import PathJudgement, Scorer
from mope_bb.pcm.sampling import check_sampling, draw, shape_distribution
from mope_bb.pcm.speculation import agreement_row, verify
from mope_bb.providers.lookahead import Lookahead
from mope_bb.providers.pool import ExpertPool, together
from mope_bb.types import END, Context, DraftStep, Effort, Piece, SamplingOptions, TokenDistribution, TokenStep

T = TypeVar("T")
REFUSALS = (RequestError, MalformedResponseError, LogprobsUnavailableError)
"""What an endpoint answers that does not do what was asked of it."""


class OpenAnswer:
    """An answer that is being written: an async iterator of its steps, made by `decode`."""

    def __init__(
        self,
        context: Context,
        plan: Plan,
        pool: ExpertPool,
        scorer: Scorer,
        options: SamplingOptions,
        *,
        seed: int,
        pace: Pace | None = None,
        is_repeatable: bool = False,
        drops_failed: bool = False,
        constraint: Constraint | None = None,
    ) -> None:
        """The steps of one answer, END included, at most `options.max_tokens` pieces: `async for step in decode(...)`.

        `pace` is what the answers of one pool have measured together. `is_repeatable` keeps out what endpoints draw by
        themselves: there is then one uniform number per step from a generator of this answer's own, and equal seeds
        and equal distributions give equal answers. `drops_failed`: an expert whose endpoint is down, or keeps failing,
        is left out from there on; the base of a rule that needs one and the last expert are not. `constraint` is the
        form that the answer must have, as far as `max_tokens` allows. Raises ConfigError here; ProviderError,
        BudgetError, AlignmentError, ConstraintError, PcmError on the way.
        """
        check_sampling(options)
        self.effort = Effort()
        """What the experts did so far."""
        self.plan = plan
        """Who is asked: from an expert's failure on without it, where that is allowed."""
        self.uses_drafts = False
        """Whether chance at an endpoint took part: then the seed alone does not give this answer again."""
        self._context = context
        self._pool = pool
        self._scorer = scorer
        self._options = options
        self._generator = random.Random(seed)
        self._shared_pace = pace or Pace()
        self._is_repeatable = is_repeatable
        self._drops_failed = drops_failed
        self._form = None if constraint is None else Fitting(constraint, self._spell)
        self._was_heard = False
        self._held: list[TokenStep] = []
        self._next_plan: Plan | None = None
        self._may_be_cached = True
        self._policy_version = 0
        self.dropped: tuple[str, ...] = ()
        """Experts that failed and were left out."""
        self._begun: tuple[Move, asyncio.Task[tuple[DraftStep, ...]]] | None = None

    def __aiter__(self) -> AsyncGenerator[TokenStep, None]:
        return self._steps()

    def go_on_with(self, plan: Plan) -> None:
        """From the next step on, `plan` says who is asked."""
        self._next_plan = plan

    async def _steps(self) -> AsyncGenerator[TokenStep, None]:
        await self._going_on(self._begin)
        if self._form is not None:
            await self._form.begin(self._context.response, self._options.max_tokens)
        num_left = self._options.max_tokens
        self._shared_pace.num_open += 1
        try:
            while num_left > 0:
                if self._next_plan is not None:
                    await self._change_plan()
                steps = await self._going_on(partial(self._block, num_left))
                for number, step in enumerate(steps, 1):
                    num_left -= 1
                    yield step
                    if self._next_plan is not None and number < len(steps):
                        # What was drawn for the old plan and is not yet said is taken back.
                        self._take_back(len(steps) - number)
                        break
                if step.piece == END:
                    return
        finally:
            self._shared_pace.num_open -= 1
            await self._drop_begun()

    async def _begin(self) -> None:
        """Open the experts of the plan and make ready what they all begin with."""
        plan, options, pool = self.plan, self._options, self._pool
        await open_experts(pool, plan, waits=not self._drops_failed)
        if options.max_tokens > 1:
            pool.check_can_continue(plan.asked)
        self._known = Lookahead(plan.asked)
        self._pace = AnswerPace(
            self._shared_pace,
            [pool.seat(name) for name in plan.asked],
            key=(plan.asked, plan.rule.name, options.temperature, options.top_p, self._is_bound),
            # A form leaves little of what an expert drafts without knowing it.
            is_repeatable=(self._is_repeatable and options.temperature > 0) or self._is_bound,
        )
        self._unlisted = tuple(name for name in plan.asked if not pool.seat(name).gives_lists)
        if self._unlisted:
            expert_first.check_plan(plan, self._unlisted, options, is_bound=self._form is not None)
        # Who scores a draft would else begin only then to render the conversation.
        await together([pool.prepare(name, self._context) for name in plan.asked])

    async def _going_on(self, work: Callable[[], Awaitable[T]]) -> T:
        """What `work()` gives; where an expert fails that may be dropped, what it gives without that expert."""
        while True:
            try:
                return await work()
            except ProviderError as error:
                self.plan = drop_failed(self.plan, error, is_allowed=self._drops_failed)
                self.dropped = (*self.dropped, error.expert or "")
                await self._drop_begun()
                await self._going_on(self._begin)

    async def _change_plan(self) -> None:
        plan, self._next_plan = self._next_plan, None
        assert plan is not None
        self.plan = plan
        await self._drop_begun()
        await self._going_on(self._begin)

    def _take_back(self, number: int) -> None:
        """The last `number` steps were not told to anyone."""
        response = self._context.response
        self._context = Context(self._context.messages, response[: len(response) - number])
        if self._form is not None:
            self._form.restart(self._context.response)

    @property
    def _is_bound(self) -> bool:
        """There is a form, and it forbids something."""
        return self._form is not None and not self._form.constraint.is_free

    async def _block(self, num_left: int) -> list[TokenStep]:
        """The next steps, at least one and at most `num_left`."""
        if self._form is not None and self._is_bound:
            return await self._fit(self._form, num_left)
        if self._unlisted:
            return [await self._draw_expert_first()]
        if self._may_be_cached and (lists := await self._pool.recall(self.plan.asked, self._context)) is not None:
            for name, distribution in zip(self.plan.asked, lists, strict=True):
                self._known.learn_one(name, distribution)
            return await self._look_ahead(Move("lockstep"))
        # Beyond what an earlier answer has left, nothing is in the cache.
        self._may_be_cached = False
        if self._begun is not None:
            # Always used: a choice that knows how long it took would know something of what is in it.
            move, _ = self._begun
        else:
            move = self._pace.choose(num_left=num_left, num_context=self._num_context())
        if move.drafter is not None:
            try:
                return await self._draft_and_score(move, move.drafter, num_left)
            except REFUSALS as error:
                await self._drop_begun()
                if not isinstance(error, ContextLengthError):  # a draft may be too long where one token is not
                    name = error.expert or move.drafter
                    self._shared_pace.give_up(name, "draft" if name == move.drafter else "score", error.message)
                move = Move("lockstep")
        return await self._look_ahead(move)

    def _num_context(self) -> int:
        # About four bytes make a token: good enough for what a question costs.
        return sum(len(message.content) for message in self._context.messages) // 4 + len(self._context.response)

    # Lockstep and lookahead: everyone is asked for the next positions; pieces are drawn while all of them are known.

    async def _ask_and_judge(self, num_ahead: int) -> tuple[list[list[TokenDistribution]], list[Piece], PathJudgement]:
        """What all are known to say from here on, the pieces that all expect between, and the PCM's word on both."""
        _, judged = await self._with_judging((), self._ask(num_ahead))
        lists, expected = self._known.common()
        return lists, expected, await self._judge(expected) if expected else judged

    async def _look_ahead(self, move: Move) -> list[TokenStep]:
        lists, expected, judged = await self._ask_and_judge(move.num_ahead)
        steps: list[TokenStep] = []
        shapes: list[Tensor] = []
        merged = merge_path(self.plan, lists, judged.head_scores, judged.gate)
        for position, one in enumerate(merged):
            shapes.append(self._shaped(one))
            steps.append(self._step(one, shapes[-1], draw(shapes[-1], self._generator.random()), judged))
            if position == len(expected) or steps[-1].piece != expected[position]:
                break
        self._go_on(steps, shapes)
        return steps

    async def _ask(self, num_ahead: int) -> None:
        depths = {name: self._known.depth(name) for name in self.plan.asked}
        if min(depths.values()) > 0:
            return
        self._count(num_round_trips=1)
        # Who knows little more is asked along, so that fewer waits follow each other.
        await together([self._ask_one(name, num_ahead) for name, depth in depths.items() if depth < 0.75 * num_ahead])

    async def _ask_one(self, name: str, num_ahead: int) -> None:
        if num_ahead > 1 and self._pool.seat(name).can_continue and self._shared_pace.can(name, "draft"):
            try:
                # The most probable pieces: the answer goes that way more often than any other.
                drafting = self._pool.draft(name, self._context, num_tokens=num_ahead, temperature=0.0)
                steps = await self._timed(name, "draft", drafting, len)
            except REFUSALS as error:
                if not isinstance(error, ContextLengthError):
                    self._shared_pace.give_up(name, "draft", error.message)
            else:
                self._count_generated(name, len(steps))
                return self._known.learn(name, steps)
        distribution = await self._timed(name, "ask", self._pool.ask_one(name, self._context), lambda _: 1)
        self._count_generated(name, 1)
        self._known.learn_one(name, distribution)
        return None

    # A form: some pieces are given by it, the others are drawn among those that fit.

    async def _fit(self, form: Fitting, num_left: int) -> list[TokenStep]:
        num_left -= len(self._held)
        given = self._give(form, (await form.given(num_left))[:num_left])
        self._held += given
        # A conversation that no expert can read must not be answered by the form alone: until one has said something,
        # what is given is held back.
        if len(given) == num_left or (given and (self._was_heard or given[-1].piece == END)):
            return self._let_go([])
        try:
            steps, shapes = await self._draw_fitting(form, num_left - len(given))
        except ContextLengthError:
            # Nobody is needed to end the answer.
            if not self._was_heard or not (end := await form.end()):
                raise
            return self._let_go(self._give(form, end[:num_left]))
        self._was_heard = True
        self._go_on(steps, shapes)
        if not self._is_bound:
            await self._begin()
        return self._let_go(steps)

    def _let_go(self, steps: list[TokenStep]) -> list[TokenStep]:
        """`steps` behind those that were held back."""
        held, self._held = self._held, []
        return held + steps

    def _give(self, form: Fitting, pieces: Sequence[Piece]) -> list[TokenStep]:
        steps = [forced_step(piece, self._policy_version) for piece in pieces]
        for piece in pieces:
            form.advance(piece)
        self._go_on(steps, ())
        return steps

    async def _draw_fitting(self, form: Fitting, num_left: int) -> tuple[list[TokenStep], list[Tensor]]:
        move = self._pace.choose(num_left=num_left, num_context=self._num_context())
        lists, expected, judged = await self._ask_and_judge(move.num_ahead)
        steps: list[TokenStep] = []
        shapes: list[Tensor] = []
        for position, said in enumerate(lists):
            here = PathJudgement(judged.head_scores[position : position + 1], judged.gate, judged.policy_version)
            drawn = await self._draw_one(form, said, here, num_left - len(steps))
            if drawn is None and not steps:
                drawn = await self._draw_one(form, await self._ask_named(form), here, num_left)
                if drawn is None:
                    raise ConstraintError("no expert says anything that fits the form of the answer")
            if drawn is None:
                break
            steps.append(drawn[0])
            shapes.append(drawn[1])
            goes_on = position < len(expected) and steps[-1].piece == expected[position] and self._is_bound
            if not goes_on or await form.given(num_left - len(steps)):
                break
        return steps, shapes

    async def _draw_one(
        self, form: Fitting, said: Sequence[TokenDistribution], judged: PathJudgement, num_left: int
    ) -> tuple[TokenStep, Tensor] | None:
        lists, fits = await form.read(said), form.constraint.mask
        merged = merge_fitting(self.plan, lists, judged.head_scores[0], judged.gate, fits)
        drawn = merged and await form.draw(merged, self._shape, self._generator.random, num_left)
        return (self._step(merged, drawn[1], drawn[0], judged), drawn[1]) if merged and drawn else None

    async def _ask_named(self, form: Fitting) -> list[TokenDistribution]:
        """What all say of pieces that fit, where none of these is on any list."""
        names = self.plan.asked
        pieces = form.constraint.allowed_among(await self._pool.vocabulary(names[0]))
        self._count(num_round_trips=1, num_generated=len(names))
        try:
            return await self._pool.ask_among(names, self._context, pieces)
        except TopKError as error:
            raise ConstraintError(f"no expert lists anything that fits the form of the answer, and {error}") from error

    async def _spell(self, data: bytes) -> tuple[Piece, ...]:
        return await self._pool.spell(self.plan.asked[0], data)

    # Draft and score: one expert writes ahead, the others say what they think of it.

    async def _draft_and_score(self, move: Move, drafter: str, num_left: int) -> list[TokenStep]:
        draft = _testable(await self._take_draft(drafter, move))
        path = [step.piece for step in draft]
        num_next = min(move.num_ahead, num_left - len(path))
        if move.begins_next and num_next > 0 and draft[-1].index is not None and path[-1] != END:
            following = replace(move, num_ahead=num_next)
            drafting = self._draft(drafter, self._context.extended(*path), following)
            self._begun = following, asyncio.ensure_future(drafting)
        others = [name for name in self.plan.asked if name != drafter]
        asking = together([self._score(name, path[:-1]) for name in others])
        scores, judged = await self._with_judging(path[:-1], asking)
        said = {drafter: [step.distribution for step in draft], **dict(zip(others, scores, strict=True))}
        lists = [[said[name][position] for name in self.plan.asked] for position in range(len(draft))]
        if others:
            self._count(num_round_trips=1, num_scored=len(others) * len(draft))
        self.uses_drafts |= self._options.temperature > 0
        steps: list[TokenStep] = []
        shapes: list[Tensor] = []
        is_kept = True
        for step, one in zip(draft, merge_path(self.plan, lists, judged.head_scores, judged.gate), strict=True):
            shapes.append(self._shaped(one))
            uniforms = self._generator.random(), self._generator.random()
            verdict = verify(shapes[-1], one.candidates, step, uniforms)
            steps.append(self._step(one, shapes[-1], verdict.index, judged))
            is_kept = verdict.is_kept
            if not is_kept:
                break
        self._count(num_drafted=len(steps), num_accepted=len(steps) - (not is_kept))
        if not is_kept:
            await self._drop_begun()
        self._go_on(steps, shapes)
        return steps

    async def _take_draft(self, drafter: str, move: Move) -> tuple[DraftStep, ...]:
        begun, self._begun = self._begun, None
        self._count(num_round_trips=1)
        return await (begun[1] if begun else self._draft(drafter, self._context, move))

    async def _draft(self, drafter: str, context: Context, move: Move) -> tuple[DraftStep, ...]:
        # Counted at once: what is begun early and not used was generated all the same.
        self._count_generated(drafter, move.num_ahead)
        drafting = self._pool.draft(
            drafter,
            context,
            num_tokens=move.num_ahead,
            temperature=move.sharpness * self._options.temperature,
            seed=self._generator.getrandbits(31),
        )
        steps = await self._timed(drafter, "draft", drafting, len)
        self._count_generated(drafter, len(steps) - move.num_ahead)
        return steps

    async def _score(self, name: str, path: Sequence[Piece]) -> tuple[TokenDistribution, ...]:
        return await self._timed(name, "score", self._pool.score(name, self._context, path), len)

    async def _drop_begun(self) -> None:
        begun, self._begun = self._begun, None
        if begun is not None:
            _, drafting = begun
            drafting.cancel()
            await asyncio.gather(drafting, return_exceptions=True)

    # Some expert gives no lists: the expert is drawn first.

    async def _draw_expert_first(self) -> TokenStep:
        listed = [name for name in self.plan.asked if name not in self._unlisted]
        found, judged = await self._with_judging((), self._pool.ask(listed, self._context))
        lists = dict(zip(listed, found, strict=True))
        weights = expert_first.expert_weights(self.plan, lists, judged.head_scores[0], judged.gate)
        share = expert_first.shares(self.plan, lists, weights)
        name = self.plan.asked[draw(share.log(), self._generator.random())]
        if name in lists:
            logprobs = torch.tensor(lists[name].logprobs, dtype=torch.float64)
            piece = lists[name].pieces[draw(logprobs, self._generator.random())]
            self._count(num_round_trips=1)
        else:
            piece = await self._pool.sample(name, self._context)
            self.uses_drafts = True
            self._count(num_round_trips=2 if listed else 1)
        for one in {*listed, name}:
            self._count_generated(one, 1)
        self._context = self._context.extended(piece)
        return expert_first.step_of(self.plan, lists, weights, (name, piece), judged.policy_version)

    # What all share

    async def _with_judging(self, path: Sequence[Piece], asking: Awaitable[T]) -> tuple[T, PathJudgement]:
        """Experts and PCM at the same time; a failure of the experts cancels the PCM's work."""
        judging = asyncio.ensure_future(self._judge(path))
        try:
            return await asking, await judging
        finally:
            judging.cancel()

    async def _judge(self, path: Sequence[Piece]) -> PathJudgement:
        judging = self._scorer.judge_path(self._context, path, self.plan.preference_text, self.plan.experts)
        found = await self._timed("", "judge", judging, lambda found: len(found.head_scores))
        self._policy_version = found.policy_version
        return found

    async def _timed(self, name: str, request: Request, work: Coroutine[Any, Any, T], count: Callable[[T], int]) -> T:
        """Await `work`; `count` tells for how many positions it was: a draft may end before its length is reached."""
        began = time.perf_counter()
        found = await work
        self._shared_pace.observe(name, request, count(found), time.perf_counter() - began)
        return found

    def _shaped(self, merged: Merged) -> Tensor:
        return self._shape(merged.log_pi)

    def _shape(self, log_pi: Tensor) -> Tensor:
        return shape_distribution(log_pi, temperature=self._options.temperature, top_p=self._options.top_p)

    def _step(self, merged: Merged, shaped: Tensor, index: int, judged: PathJudgement) -> TokenStep:
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

    def _go_on(self, steps: Sequence[TokenStep], shapes: Sequence[Tensor]) -> None:
        """The answer is longer by `steps`."""
        for step in steps:
            self._known.advance(step.piece)
        self._context = self._context.extended(*(step.piece for step in steps))
        self._pace.learn(
            [
                agreement_row(shaped.numpy(), step.candidates.logprobs, self._options.temperature) * (step.piece != END)
                for step, shaped in zip(steps, shapes, strict=False)  # given steps have none
            ]
        )

    def _count(self, **more: int) -> None:
        sums = {name: getattr(self.effort, name) + number for name, number in more.items()}
        self.effort = replace(self.effort, **sums)

    def _count_generated(self, name: str, number: int) -> None:
        self._pace.num_generated[name] += number
        self._count(num_generated=number)


decode = OpenAnswer
"""The one code path: `async for step in decode(...)`."""


def _testable(draft: Sequence[DraftStep]) -> Sequence[DraftStep]:
    """The draft up to the first piece that is not on its own list: what was written after it is of no use."""
    for position, step in enumerate(draft):
        if step.index is None:
            return draft[: position + 1]
    return draft
