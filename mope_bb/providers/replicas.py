"""One expert served at several addresses: each question goes to one of them, and to another one where that fails.

Whole questions are shared out, not requests: each replica gathers its own lists, keeps its own limit, and sees the
questions of an answer one after the other, so that their common beginning stays in its cache.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TypeVar

from mope_bb.errors import AlignmentError, ProviderConnectionError, ProviderError, ProviderTimeoutError
from mope_bb.providers.base import Expert
from mope_bb.transport import retry
from mope_bb.types import Context, DraftStep, Message, Piece, TokenDistribution
from mope_bb.usage import Meter

T = TypeVar("T")
SLACK: Final = 4
"""So many more questions, on top of twice as many, may a replica have than the least busy one before a conversation
that it knows goes elsewhere: reading a prompt anew costs more than a short wait."""
AVOIDED_S: Final = 10.0
"""For so long a replica that could not be reached is asked only where there is no other."""
CONVERSATIONS_KEPT: Final = 4096


class Balancer:
    """Which replica a question goes to: the one that knows its conversation, else the least busy one."""

    def __init__(self, num_replicas: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds that only rise."""
        self._clock = clock
        self._outstanding = [0] * num_replicas
        self._num_asked = [0] * num_replicas
        self._avoided_until = [0.0] * num_replicas
        self._homes: OrderedDict[int, int] = OrderedDict()

    def choose(self, conversation: int, tried: Collection[int] = (), down: Collection[int] = ()) -> int:
        """The replica for a question of `conversation`: where there is another, none of those `tried` or `down`."""
        untried = [index for index in range(len(self._outstanding)) if index not in tried]
        known = untried or range(len(self._outstanding))
        now = self._clock()
        allowed = [index for index in known if self._avoided_until[index] <= now and index not in down] or known
        idlest = min(allowed, key=lambda index: (self._outstanding[index], self._num_asked[index]))
        home = self._homes.get(conversation)
        if home is None or home not in allowed:
            self._homes[conversation] = home = idlest
            if len(self._homes) > CONVERSATIONS_KEPT:
                self._homes.popitem(last=False)
        self._homes.move_to_end(conversation)
        return home if self._outstanding[home] <= 2 * self._outstanding[idlest] + SLACK else idlest

    @contextmanager
    def asking(self, replica: int) -> Iterator[None]:
        """Counts a question to `replica`; one that cannot be reached is avoided for a while."""
        self._outstanding[replica] += 1
        self._num_asked[replica] += 1
        try:
            yield
        except (ProviderConnectionError, ProviderTimeoutError):
            self._avoided_until[replica] = self._clock() + AVOIDED_S
            raise
        finally:
            self._outstanding[replica] -= 1


class ReplicatedExpert(Expert):
    """Several adapters of one model as one expert."""

    def __init__(self, replicas: Sequence[Expert], *, timeout_s: float, max_retries: int) -> None:
        """`replicas` do not retry themselves; a question is asked `max_retries` times more, until `timeout_s`."""
        self.name = replicas[0].name
        self.capabilities = replicas[0].capabilities
        self._replicas = replicas
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._balancer = Balancer(len(replicas))

    async def next_tokens(self, context: Context, *, top_k: int) -> TokenDistribution:
        return await self._ask(context.messages, lambda one: one.next_tokens(context, top_k=top_k))

    async def prepare(self, context: Context) -> None:
        await self._ask(context.messages, lambda expert: expert.prepare(context))

    async def recall(self, context: Context, *, top_k: int) -> TokenDistribution | None:
        # They share a cache, but an endpoint may be needed to find the key.
        return await self._ask(context.messages, lambda one: one.recall(context, top_k=top_k))

    def draft_temperature(self, wanted: float) -> float:
        return self._replicas[0].draft_temperature(wanted)

    async def draft(
        self, context: Context, *, top_k: int, num_tokens: int, temperature: float = 1.0, seed: int | None = None
    ) -> tuple[DraftStep, ...]:
        return await self._ask(
            context.messages,
            lambda one: one.draft(context, top_k=top_k, num_tokens=num_tokens, temperature=temperature, seed=seed),
        )

    async def score(self, context: Context, draft: Sequence[Piece], *, top_k: int) -> tuple[TokenDistribution, ...]:
        return await self._ask(context.messages, lambda one: one.score(context, draft, top_k=top_k))

    async def ask_among(self, context: Context, pieces: Sequence[Piece], *, top_k: int) -> TokenDistribution:
        return await self._ask(context.messages, lambda one: one.ask_among(context, pieces, top_k=top_k))

    async def spell(self, data: bytes) -> tuple[Piece, ...]:
        return await self._ask((), lambda one: one.spell(data))

    async def vocabulary(self) -> Sequence[Piece]:
        return await self._ask((), lambda one: one.vocabulary())

    async def count_tokens(self, context: Context) -> int | None:
        return await self._ask(context.messages, lambda one: one.count_tokens(context))

    async def sample(self, context: Context) -> Piece:
        return await self._ask(context.messages, lambda one: one.sample(context))

    async def fingerprint(self) -> str:
        """That of all replicas that can be reached. Raises AlignmentError where they differ."""
        found = await asyncio.gather(*(one.fingerprint() for one in self._replicas), return_exceptions=True)
        known = [one for one in found if isinstance(one, str)]
        for one in found:
            if isinstance(one, BaseException) and not (known and isinstance(one, ProviderError) and one.retryable):
                raise one
        if len(set(known)) > 1:
            raise AlignmentError(
                f"the addresses of expert {self.name!r} serve models with different tokenizers",
                hint="Several addresses in `base_url` must serve the same model.",
            )
        return known[0]

    @property
    def num_requests(self) -> int:
        return sum(one.num_requests for one in self._replicas)

    @property
    def is_down(self) -> bool:
        return all(one.is_down for one in self._replicas)

    def charge(self, meter: Meter) -> None:
        for one in self._replicas:
            one.charge(meter)

    async def aclose(self) -> None:
        for one in self._replicas:
            await one.aclose()

    async def _ask(self, messages: tuple[Message, ...], ask: Callable[[Expert], Awaitable[T]]) -> T:
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        conversation = hash(messages)
        tried: list[int] = []

        async def send() -> T:
            # One that is down is no longer, as soon as it is time for a question to try it.
            down = [index for index, one in enumerate(self._replicas) if one.is_down]
            index = self._balancer.choose(conversation, tried, down)
            tried.append(index)
            with self._balancer.asking(index):
                return await ask(self._replicas[index])

        try:
            return await send()
        except ProviderError as error:
            if not error.retryable or not self._max_retries:
                raise
            failures = [error]
        try:
            async with asyncio.timeout_at(deadline):
                return await retry(
                    send,
                    after=failures,
                    max_retries=self._max_retries,
                    at_once=lambda: len(tried) < len(self._replicas),
                )
        except TimeoutError:
            raise ProviderTimeoutError(
                f"no answer within {self._timeout_s:g} s; the last failure was: {failures[-1].message}",
                expert=self.name,
            ) from None
