"""Rollouts of experts behind any provider: many answers at once, each through `decode`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from mope_bb.errors import ConfigError, ContextLengthError, MopeError
from mope_bb.pcm.decode import decode
from mope_bb.pcm.gates import Gate, LinearGate
from mope_bb.pcm.model import PreferenceControlModel
from mope_bb.pcm.rollouts import FailedRollout, Progress, Rollout, RolloutRequest, Sampler, rollout_of
from mope_bb.pcm.runner import PcmScorer, Scorer, UserWeights
from mope_bb.providers.pool import ExpertPool
from mope_bb.types import END, Context, SamplingOptions, TokenStep

MAX_IN_FLIGHT: Final = 16


class PoolSampler(Sampler):
    """Samples through an `ExpertPool`, at most `max_in_flight` answers at a time.

    It runs an event loop of its own, so it is for code that does not await.
    """

    def __init__(
        self,
        pool: ExpertPool,
        runner: asyncio.Runner,
        pcm: PreferenceControlModel | None,
        *,
        gate: Gate | None = None,
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> None:
        """`gate` is what decides where there is no PCM; None: the user's own weights."""
        self._pool = pool
        self._runner = runner
        self._pcm = pcm
        self._gate = gate or LinearGate()
        self._max_in_flight = max_in_flight

    def sample(
        self, requests: Sequence[RolloutRequest], options: SamplingOptions, *, progress: Progress | None = None
    ) -> list[Rollout | FailedRollout]:
        return self._runner.run(self._sample(requests, options, progress))

    async def _sample(
        self, requests: Sequence[RolloutRequest], options: SamplingOptions, progress: Progress | None
    ) -> list[Rollout | FailedRollout]:
        # Whatever cannot even be opened concerns every answer, so it is raised.
        await self._pool.open(tuple(dict.fromkeys(name for request in requests for name in request.plan.asked)))
        scorer = await self._open_scorer()
        room = asyncio.Semaphore(self._max_in_flight)
        num_done = 0

        async def one(request: RolloutRequest) -> Rollout | FailedRollout:
            nonlocal num_done
            async with room:
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
        finally:
            await scorer.aclose()
        return [task.result() for task in tasks]

    async def _one(self, request: RolloutRequest, scorer: Scorer, options: SamplingOptions) -> Rollout | FailedRollout:
        steps: list[TokenStep] = []
        context = Context(request.messages)
        try:
            async for step in decode(context, request.plan, self._pool, scorer, options, seed=request.seed):
                steps.append(step)
        except ConfigError:
            raise
        except ContextLengthError as error:
            # The answer has grown to the end of an expert's context.
            if not steps:
                return FailedRollout(request, error)
        except MopeError as error:
            return FailedRollout(request, error)
        return rollout_of(request, steps, "stop" if steps[-1].piece == END else "length")

    async def _open_scorer(self) -> Scorer:
        """A new one each time: what an earlier one has cached belongs to weights that learning may have changed."""
        if self._pcm is None:
            return UserWeights(self._gate)
        return await asyncio.to_thread(PcmScorer, self._pcm, expert_fingerprint=self._pool.tokenizer_fingerprint)
