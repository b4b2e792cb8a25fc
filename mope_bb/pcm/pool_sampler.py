"""Rollouts of experts behind any provider, for code that does not await."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from mope_bb.pcm.actors import PoolActor
from mope_bb.pcm.gates import Gate
from mope_bb.pcm.model import PreferenceControlModel
from mope_bb.pcm.pacing import Pace
from mope_bb.pcm.rollouts import FailedRollout, Progress, Rollout, RolloutRequest, Sampler
from mope_bb.providers.pool import ExpertPool
from mope_bb.types import SamplingOptions

MAX_IN_FLIGHT: Final = 16


class PoolSampler(Sampler):
    """Samples through an `ExpertPool` on an event loop of its own, at most `max_in_flight` answers at a time."""

    def __init__(
        self,
        pool: ExpertPool,
        runner: asyncio.Runner,
        pcm: PreferenceControlModel | None,
        *,
        pace: Pace,
        gate: Gate | None = None,
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> None:
        """`gate` is what decides where there is no PCM; None: the user's own weights."""
        self._pool = pool
        self._runner = runner
        self._pcm = pcm
        self._pace = pace
        self._gate = gate
        self._max_in_flight = max_in_flight

    def sample(
        self, requests: Sequence[RolloutRequest], options: SamplingOptions, *, progress: Progress | None = None
    ) -> list[Rollout | FailedRollout]:
        return self._runner.run(self._sample(requests, options, progress))

    async def _sample(
        self, requests: Sequence[RolloutRequest], options: SamplingOptions, progress: Progress | None
    ) -> list[Rollout | FailedRollout]:
        # A new one each time: what an earlier one has cached belongs to weights that may have changed since.
        actor = PoolActor(self._pool, self._pcm, pace=self._pace, gate=self._gate, max_in_flight=self._max_in_flight)
        try:
            return await actor.sample(requests, options, progress=progress)
        finally:
            await actor.aclose()
