"""All experts of a configuration: opened on first use, asked together, refused when their tokenizers differ."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mope_bb.cache import DistributionCache
from mope_bb.config import ExpertConfig
from mope_bb.errors import AlignmentError, MopeError, PrefillError, ProviderConnectionError, TopKError
from mope_bb.providers.base import Capabilities, Expert
from mope_bb.providers.registry import open_expert
from mope_bb.types import Context, DraftStep, Piece, TokenDistribution
from mope_bb.usage import Account

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Seat:
    """What an expert can do, and what it costs."""

    name: str
    gives_lists: bool
    """It gives logprobs at all."""
    can_draft: bool
    """What it draws are true samples."""
    can_continue: bool
    """It gives lists along a path of its own."""
    scores_at_once: bool
    """It scores a draft in one request."""
    input_price: float = 0.0
    """Of a million tokens."""
    output_price: float = 0.0
    can_sharpen: bool = False
    """It can draft at other temperatures than 1 while its lists stay the model's own."""


class ExpertPool:
    """The experts by name. Only those that are asked are ever contacted."""

    def __init__(
        self, configs: Sequence[ExpertConfig], *, cache: DistributionCache | None, account: Account | None = None
    ) -> None:
        """`account` is what their requests are counted against."""
        self._account = account
        self._configs = {config.name: config for config in configs}
        self._cache = cache
        self._experts: dict[str, Expert] = {}
        self._top_k: dict[str, int] = {}
        self._verified: set[str] = set()
        self._fingerprint: tuple[str, str] | None = None
        self._opening = asyncio.Lock()

    async def open(self, names: Sequence[str]) -> None:
        """Open these experts and check that all experts in use share one tokenizer. Raises MopeError."""
        async with self._opening:
            for name in names:
                if name not in self._experts:
                    # A local model takes seconds to load: not on the event loop.
                    expert = await asyncio.to_thread(open_expert, self._configs[name], self._cache)
                    if self._account is not None:
                        expert.charge(self._account.meter(name))
                    self._experts[name] = expert
                    self._top_k[name] = allowed_top_k(self._configs[name], expert.capabilities)
            new = [name for name in names if name not in self._verified]
            fingerprints = await together([self._experts[name].fingerprint() for name in new])
            for name, fingerprint in zip(new, fingerprints, strict=True):
                first, expected = self._fingerprint or (name, fingerprint)
                if fingerprint != expected:
                    raise AlignmentError(
                        f"the experts {first!r} and {name!r} have different tokenizers and cannot be merged",
                        hint="Use experts that were fine-tuned from one base model; where endpoints take text, set the "
                        "same `tokenizer` for all.",
                    )
                self._fingerprint = (first, expected)
                self._verified.add(name)

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """The tokenizer that the experts in use share; None before the first is open."""
        return None if self._fingerprint is None else self._fingerprint[1]

    @property
    def num_requests(self) -> int:
        """How often their endpoints were asked, retries included."""
        return sum(expert.num_requests for expert in self._experts.values())

    async def ask(self, names: Sequence[str], context: Context) -> list[TokenDistribution]:
        """The next-token distributions of `names`, in that order. A failure cancels the others and is raised."""
        return await together([self.ask_one(name, context) for name in names])

    async def ask_one(self, name: str, context: Context) -> TokenDistribution:
        """The next-token distribution of one expert."""
        return await self._experts[name].next_tokens(context, top_k=self._top_k[name])

    async def prepare(self, name: str, context: Context) -> None:
        """See `Expert.prepare`."""
        await self._experts[name].prepare(context)

    async def recall(self, names: Sequence[str], context: Context) -> list[TokenDistribution] | None:
        """What `ask` would answer, where all of it is in the cache."""
        if self._cache is None:
            return None
        calls = [self._experts[name].recall(context, top_k=self._top_k[name]) for name in names]
        found = [one for one in await together(calls) if one is not None]
        return found if len(found) == len(names) else None

    async def draft(
        self, name: str, context: Context, *, num_tokens: int, temperature: float, seed: int | None = None
    ) -> tuple[DraftStep, ...]:
        """See `Expert.draft`; the expert's own nearest temperature is taken."""
        expert = self._experts[name]
        return await expert.draft(
            context,
            top_k=self._top_k[name],
            num_tokens=num_tokens,
            temperature=expert.draft_temperature(temperature),
            seed=seed,
        )

    async def score(self, name: str, context: Context, draft: Sequence[Piece]) -> tuple[TokenDistribution, ...]:
        """See `Expert.score`."""
        return await self._experts[name].score(context, draft, top_k=self._top_k[name])

    def can_say_more(self, names: Sequence[str]) -> bool:
        """Whether `ask_among` would ask one of `names` for anything but its list again."""
        facts = [(self._experts[name].capabilities, self._top_k[name]) for name in names]
        return any(one.max_named or one.max_top_k is None or top_k < one.max_top_k for one, top_k in facts)

    async def ask_among(
        self, names: Sequence[str], context: Context, pieces: Sequence[Piece]
    ) -> list[TokenDistribution]:
        """What each of `names` says of `pieces`, see `Expert.ask_among`."""
        calls = [self._experts[name].ask_among(context, pieces, top_k=self._top_k[name]) for name in names]
        return await together(calls)

    async def spell(self, name: str, data: bytes) -> tuple[Piece, ...]:
        """See `Expert.spell`."""
        return await self._experts[name].spell(data)

    async def vocabulary(self, name: str) -> Sequence[Piece]:
        """See `Expert.vocabulary`."""
        return await self._experts[name].vocabulary()

    async def count_tokens(self, names: Sequence[str], context: Context) -> int | None:
        """The largest of what `names` count; None where none can tell."""
        found = await together([self._experts[name].count_tokens(context) for name in names])
        return max((count for count in found if count is not None), default=None)

    async def sample(self, name: str, context: Context) -> Piece:
        """See `Expert.sample`."""
        return await self._experts[name].sample(context)

    def seat(self, name: str) -> Seat:
        """What an open expert can do, and what it costs."""
        capabilities, config = self._experts[name].capabilities, self._configs[name]
        return Seat(
            name,
            gives_lists=capabilities.gives_lists,
            can_draft=capabilities.drafts == "exact",
            can_continue=capabilities.drafts != "none",
            scores_at_once=capabilities.score != "none",
            input_price=config.input_price,
            output_price=config.output_price,
            can_sharpen=capabilities.logprob_scale == "raw",
        )

    def check_not_down(self, names: Sequence[str]) -> None:
        """Raise ProviderConnectionError for the first of `names` that would have to be waited for, being down."""
        for name in names:
            if name in self._experts and self._experts[name].is_down:
                raise ProviderConnectionError("its endpoint is down", expert=name)

    def check_can_continue(self, names: Sequence[str]) -> None:
        """Raise PrefillError, before anything is paid, if one of `names` gives first tokens only."""
        for name in names:
            if self._experts[name].capabilities.prefill == "none":
                raise PrefillError(
                    f"{self._configs[name].provider} does not continue an answer that others have begun", expert=name
                )

    async def aclose(self) -> None:
        """Close every expert that was opened."""
        experts = list(self._experts.values())
        self._experts.clear()
        self._verified.clear()
        for expert in experts:
            await expert.aclose()


def allowed_top_k(config: ExpertConfig, capabilities: Capabilities) -> int:
    """How many pieces are asked for: what the configuration says; its default gives way to a smaller limit.

    Raises TopKError for a configured number above what the endpoint gives.
    """
    limit = capabilities.max_top_k
    if limit is None or config.top_k <= limit:
        return config.top_k
    if "top_k" in config.model_fields_set:
        raise TopKError(
            f"top_k is {config.top_k}, {config.provider} gives at most {limit}",
            hint=f"Set top_k = {limit}.",
            expert=config.name,
        )
    return limit


async def together(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run `calls` at the same time; on a failure cancel the rest and raise the failure itself, not a group."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except BaseExceptionGroup as group_error:
        ours = [error for error in group_error.exceptions if isinstance(error, MopeError)]
        raise (ours or group_error.exceptions)[0] from None
    return [task.result() for task in tasks]
