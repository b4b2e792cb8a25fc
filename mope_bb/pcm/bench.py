"""The experts of a configuration, opened for sampling many answers with one policy after another."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine, Sequence
from copy import deepcopy
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar

from torch import Tensor

from mope_bb.cache import open_cache
from mope_bb.config import Config, ExpertConfig
from mope_bb.errors import ConfigError
from mope_bb.pcm.actors import Actor, LocalActor, PoolActor
from mope_bb.pcm.gates import Gate
from mope_bb.pcm.heads import NoHead, PcmRows
from mope_bb.pcm.local_models import are_local, open_local_models
from mope_bb.pcm.local_sampler import LocalSampler
from mope_bb.pcm.model import PreferenceControlModel
from mope_bb.pcm.pacing import Pace
from mope_bb.pcm.pool_sampler import PoolSampler
from mope_bb.pcm.rollouts import Sampler
from mope_bb.providers.pool import ExpertPool
from mope_bb.usage import Account

T = TypeVar("T")


class ExpertBench:
    """Local experts answer in step, batch by batch; others through the pool, many answers at once."""

    def __init__(self, config: Config, names: Collection[str], account: Account | None = None) -> None:
        """Opens the experts `names` if they are all local; others are opened when they are first asked.

        `account` is what their requests are counted against. Raises ConfigError where one of them gives no logprobs.
        """
        chosen = [expert for expert in config.experts if expert.name in names]
        check_logprobs(chosen)
        self._names = tuple(expert.name for expert in chosen)
        self.models = open_local_models(chosen) if are_local(chosen) else {}
        """The local experts by name; empty when some expert is not local."""
        self._cache = None if self.models else open_cache(config.cache)
        self._pool = ExpertPool(chosen, cache=self._cache, account=account)
        self._pace = Pace(config.decoding)
        self._runner = asyncio.Runner()

    def sampler(
        self, pcm: PreferenceControlModel | None = None, *, gate: Gate | None = None, is_context_free: bool = False
    ) -> Sampler:
        """A sampler whose weights come from `pcm`, or from `gate`, or are the user's own.

        Raises AlignmentError, and ConfigError for a context-free PCM on experts that are not local.
        """
        if self.models and (pcm is None or self.reads_expert_ids(pcm)):
            head = NoHead(gate) if pcm is None else PcmRows(pcm, is_context_free=is_context_free)
            return LocalSampler(self.models, head)
        if is_context_free:
            raise _context_free_error()
        return PoolSampler(self._pool, self._runner, pcm, pace=self._pace, gate=gate)

    def actor(
        self, pcm: PreferenceControlModel | None = None, *, max_in_flight: int, is_context_free: bool = False
    ) -> Actor:
        """An actor on a copy of `pcm`, or on the user's own weights, for code that `run` runs. Raises as `sampler`."""
        copy = None if pcm is None else replace(pcm, model=deepcopy(pcm.model), feature_weights=_copied(pcm))
        if self.models and (copy is None or self.reads_expert_ids(copy)):
            return LocalActor(self.models, copy, is_context_free=is_context_free)
        if is_context_free:
            raise _context_free_error()
        return PoolActor(self._pool, copy, pace=self._pace, max_in_flight=max_in_flight)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work` on the experts' own event loop."""
        return self._runner.run(work)

    @property
    def num_requests(self) -> int:
        """How often an endpoint was asked, retries included; 0 for local experts."""
        return self._pool.num_requests

    @property
    def cache_hits(self) -> int:
        """How often the cache answered."""
        return 0 if self._cache is None else self._cache.num_hits

    async def open(self) -> str:
        """Open all experts and return the fingerprint of their tokenizer. Raises ProviderError and AlignmentError."""
        if self.models:
            return next(iter(self.models.values())).tokenizer.fingerprint
        await self._pool.open(self._names)
        fingerprint = self._pool.tokenizer_fingerprint
        assert fingerprint is not None
        return fingerprint

    def reads_expert_ids(self, pcm: PreferenceControlModel) -> bool:
        """Whether the PCM's tokenizer is that of the experts; known for pool experts once one was asked."""
        if self.models:
            fingerprints = {model.tokenizer.fingerprint for model in self.models.values()}
            return fingerprints == {pcm.tokenizer.fingerprint}
        return self._pool.tokenizer_fingerprint == pcm.tokenizer.fingerprint

    def close(self) -> None:
        """Free connections and models."""
        with self._runner:
            self._runner.run(self._pool.aclose())
        if self._cache is not None:
            self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_logprobs(experts: Sequence[ExpertConfig]) -> None:
    """Raise ConfigError where one of `experts` gives no logprobs: nothing can be learned from what it draws."""
    for expert in experts:
        if not expert.logprobs:
            raise ConfigError(
                f"expert {expert.name!r} gives no logprobs (`logprobs = false`), and training and evaluation need them",
                hint="Leave it out of this configuration: it can take part in `mope-bb chat` only.",
            )


def _copied(pcm: PreferenceControlModel) -> Tensor:
    return pcm.feature_weights.detach().clone()


def _context_free_error() -> ConfigError:
    return ConfigError(
        "a context-free PCM needs local experts and their tokenizer",
        hint="It is an ablation: run it on the embedded zoo, without --config.",
    )
