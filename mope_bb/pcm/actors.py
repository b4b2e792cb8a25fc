"""Actors: the policy that samples, while another copy of it learns.

An actor owns its copy of the PCM. `load` gives it newer weights at any time: local experts take them at the next batch,
others at the next token, and every piece of a rollout names the version that drew it.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from mope_bb.errors import BudgetError, ConfigError, ContextLengthError, MopeError
from mope_bb.pcm.decode import decode
from mope_bb.pcm.gates import Gate
from mope_bb.pcm.heads import NoHead, PcmRows
from mope_bb.pcm.local_sampler import LocalSampler
from mope_bb.pcm.model import PolicyWeights, PreferenceControlModel
from mope_bb.pcm.pacing import Pace
from mope_bb.pcm.rollouts import FailedRollout, Progress, Rollout, RolloutRequest, rollout_of
from mope_bb.pcm.row_lists import LocalModel
from mope_bb.pcm.runner import PcmScorer, Scorer, UserWeights
from mope_bb.providers.pool import ExpertPool
from mope_bb.threads import in_thread
from mope_bb.types import END, Context, SamplingOptions, TokenStep

END_WITHIN_S: Final = 10.0


class Actor(ABC):
    """Samples answers with a policy that can be replaced while it works."""

    samples_in_step: bool
    """Whether answers are sampled in batches that begin and end together."""

    @abstractmethod
    async def sample(
        self, requests: Sequence[RolloutRequest], options: SamplingOptions, *, progress: Progress | None = None
    ) -> list[Rollout | FailedRollout]:
        """One rollout per request, in order; a failure costs that rollout only. `options.seed` is not read.

        Raises ConfigError and BudgetError for what concerns every answer.
        """

    @abstractmethod
    async def load(self, weights: PolicyWeights) -> None:
        """Go on with `weights`."""

    async def aclose(self) -> None:  # noqa: B027  # not every actor holds something
        """Give back what it holds."""


class LocalActor(Actor):
    """Local experts: batches in step, on a thread."""

    samples_in_step = True

    def __init__(
        self,
        models: Mapping[str, LocalModel],
        pcm: PreferenceControlModel | None,
        *,
        is_context_free: bool = False,
    ) -> None:
        """`pcm` belongs to the actor from here on; None: the user's own weights."""
        self._pcm = pcm
        self._stop = threading.Event()
        head = NoHead() if pcm is None else PcmRows(pcm, is_context_free=is_context_free)
        self._sampler = LocalSampler(models, head, stop=self._stop)
        self._next: PolicyWeights | None = None
        self._lock = asyncio.Lock()
        self._idle = threading.Event()
        self._idle.set()

    async def sample(
        self, requests: Sequence[RolloutRequest], options: SamplingOptions, *, progress: Progress | None = None
    ) -> list[Rollout | FailedRollout]:
        async with self._lock:
            if self._next is not None and self._pcm is not None:
                self._next.load_into(self._pcm)
                self._next = None
            return await in_thread(lambda: self._sample(requests, options, progress), name="rollouts")

    def _sample(
        self, requests: Sequence[RolloutRequest], options: SamplingOptions, progress: Progress | None
    ) -> list[Rollout | FailedRollout]:
        self._idle.clear()
        try:
            return self._sampler.sample(requests, options, progress=progress)
        finally:
            self._idle.set()

    async def load(self, weights: PolicyWeights) -> None:
        self._next = weights

    async def aclose(self) -> None:
        self._stop.set()
        await in_thread(lambda: self._idle.wait(END_WITHIN_S), name="closing")


class PoolActor(Actor):
    """Experts behind any provider: many answers at once, each through `decode`."""

    samples_in_step = False

    def __init__(
        self,
        pool: ExpertPool,
        pcm: PreferenceControlModel | None,
        *,
        pace: Pace,
        gate: Gate | None = None,
        max_in_flight: int,
    ) -> None:
        """At most `max_in_flight` answers at a time. `gate` is what decides where there is no PCM."""
        self._pool = pool
        self._pace = pace
        self._pcm = pcm
        self._scorer: Scorer | None = None if pcm is not None else UserWeights(gate)
        self._opening = asyncio.Lock()
        self._max_in_flight = max_in_flight
        self._room = asyncio.Semaphore(max_in_flight)
        self._newest: PolicyWeights | None = None

    async def sample(
        self, requests: Sequence[RolloutRequest], options: SamplingOptions, *, progress: Progress | None = None
    ) -> list[Rollout | FailedRollout]:
        # Whatever cannot even be opened concerns every answer, so it is raised.
        await self._pool.open(tuple(dict.fromkeys(name for request in requests for name in request.plan.asked)))
        scorer = await self._open_scorer()
        num_done = 0

        async def one(request: RolloutRequest) -> Rollout | FailedRollout:
            nonlocal num_done
            async with self._room:
                found = await self._one(request, scorer, options)
            num_done += 1
            if progress is not None:
                progress(num_done, len(requests))
            return found

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(request)) for request in requests]
        except BaseExceptionGroup as error:
            raise error.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _one(self, request: RolloutRequest, scorer: Scorer, options: SamplingOptions) -> Rollout | FailedRollout:
        steps: list[TokenStep] = []
        context = Context(request.messages)
        try:
            answer = decode(context, request.plan, self._pool, scorer, options, seed=request.seed, pace=self._pace)
            async for step in answer:
                steps.append(step)
        except (BudgetError, ConfigError):
            raise
        except ContextLengthError as error:
            # The answer has grown to the end of an expert's context.
            if not steps:
                return FailedRollout(request, error)
        except MopeError as error:
            return FailedRollout(request, error)
        return rollout_of(request, steps, "stop" if steps[-1].piece == END else "length")

    async def _open_scorer(self) -> Scorer:
        async with self._opening:
            if self._scorer is None:
                assert self._pcm is not None
                pcm, fingerprint = self._pcm, self._pool.tokenizer_fingerprint
                build: Callable[[], PcmScorer] = lambda: PcmScorer(  # noqa: E731
                    pcm, expert_fingerprint=fingerprint, max_open_answers=self._max_in_flight
                )
                self._scorer = await in_thread(build, name="pcm")
                if self._newest is not None:
                    await self._scorer.load(self._newest)
            return self._scorer

    async def load(self, weights: PolicyWeights) -> None:
        self._newest = weights
        if isinstance(self._scorer, PcmScorer):
            await self._scorer.load(weights)

    async def aclose(self) -> None:
        if self._scorer is not None:
            await self._scorer.aclose()
