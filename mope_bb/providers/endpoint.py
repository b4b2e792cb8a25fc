"""Experts behind HTTP: what all have in common, and those that take token ids; text is taken in `text_endpoint`.

An adapter says how one request is sent (`ask_prompts` or `ask_text`) and gets back what the wire said, a `Reply`. From
there on all are alike: lists are coalesced, cached, checked, and made into distributions and drafts.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from mope_bb.cache import DistributionCache
from mope_bb.chat_tokenizer import ChatTokenizer
from mope_bb.coalescing import Coalescer
from mope_bb.errors import (
    ConfigError,
    ContextLengthError,
    LogprobsUnavailableError,
    MopeError,
    RequestError,
)
from mope_bb.providers.base import Capabilities, Expert, IdExpert, build_distribution
from mope_bb.providers.drafting import build_step, build_steps, certain_positions, undrawn_entries, whole_entries
from mope_bb.providers.drawing import ONE_DRAW, DrawAsk, piece_of_draw
from mope_bb.providers.wire import Position, Reply
from mope_bb.types import END, Context, DraftStep, Message, Piece, TokenDistribution
from mope_bb.usage import Meter

Question = tuple[tuple[int, ...], int]
"""The ids of a prompt with the answer so far, and k."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked of an endpoint, beside the prompt."""

    top_k: int
    num_tokens: int = 1
    """How far the endpoint goes on by itself."""
    temperature: float | None = None
    """Of what the endpoint draws; None = the one at which it returns the model's own logprobs."""
    seed: int | None = None
    """Of what the endpoint draws, where it takes one."""
    named: tuple[int, ...] = ()
    """Tokens that are listed in place of the `top_k` best, beside the one that is drawn."""

    @property
    def is_draft(self) -> bool:
        """What the endpoint draws matters, and not the first list alone."""
        return self.num_tokens > 1 or self.temperature is not None

    def num_entries(self, num_prompts: int = 1) -> int:
        """How many entries the lists of the reply may have in all."""
        return num_prompts * self.num_tokens * max(self.top_k, len(self.named) + 1)


class Connection(Protocol):
    """What every client of an endpoint has, whoever wrote it."""

    @property
    def num_requests(self) -> int:
        """Requests sent, retries included."""

    @property
    def is_down(self) -> bool:
        """See `Expert.is_down`."""

    def charge(self, meter: Meter) -> None:
        """Count every request from now on."""

    async def aclose(self) -> None:
        """Close all connections."""


class WireExpert(Expert):
    """An expert behind HTTP, whose replies can be seen as the wire has them: what `probe` looks at."""

    _client: Connection
    own_temperature: float = 0.0
    """What is sent where `Ask.temperature` is None."""
    whole_characters: bool = False
    """See `build_from_reply`."""

    @property
    def num_requests(self) -> int:
        return self._client.num_requests

    @property
    def is_down(self) -> bool:
        return self._client.is_down

    def charge(self, meter: Meter) -> None:
        self._client.charge(meter)

    async def aclose(self) -> None:
        await self._client.aclose()

    @abstractmethod
    async def observe(self, context: Context, ask: Ask) -> Reply:
        """One request, not cached. Raises ProviderError or AlignmentError."""

    async def observe_together(self, contexts: Sequence[Context], ask: Ask) -> list[Reply]:
        """One request for several questions, where the endpoint takes lists."""
        return [await self.observe(context, ask) for context in contexts]

    def draft_temperature(self, wanted: float) -> float:
        capabilities = self.capabilities
        if capabilities.drafts == "lists":
            # Only its lists are used: the most probable path is the one that an answer follows most often.
            return 0.0 if capabilities.logprob_scale == "raw" else self.own_temperature
        if capabilities.logprob_scale == "raw":
            return wanted
        return min((self.own_temperature, 1.0), key=lambda temperature: abs(temperature - wanted))

    async def draft(
        self, context: Context, *, top_k: int, num_tokens: int, temperature: float = 1.0, seed: int | None = None
    ) -> tuple[DraftStep, ...]:
        num_asked = await self.num_asked(top_k)
        ask = Ask(num_asked, num_tokens, temperature, seed)
        try:
            reply = await self.write(context, ask)
        except ContextLengthError:
            if num_tokens == 1:
                raise
            # One token may fit where more do not. They were refused before any was drawn, so this chooses nothing.
            reply = await self.write(context, replace(ask, num_tokens=1))
        is_exact = self.capabilities.drafts == "exact"
        steps = build_steps(
            reply.positions if is_exact else certain_positions(reply, whole_characters=self.whole_characters),
            num_asked=num_asked,
            top_k=min(top_k, num_asked),
            temperature=temperature,
            vocab_size=await self.vocab_size(),
            expert=self.name,
        )
        if steps:
            return steps[:num_tokens]  # an endpoint may write more than it is asked for
        if is_exact:
            raise LogprobsUnavailableError("the endpoint wrote ahead without logprobs", expert=self.name)
        # The wire shows nothing of the first piece, as it may at the end of an answer: the list must do.
        found = await self.next_tokens(context, top_k=top_k)
        entries = tuple(zip(found.pieces, found.logprobs, strict=True))
        return (build_step(Position(entries), entries, found, temperature),)

    async def write(self, context: Context, ask: Ask) -> Reply:
        """What the endpoint writes by itself, with all that can be known of it."""
        return await self.observe(context, ask)

    async def draw(self, context: Context, ask: DrawAsk = ONE_DRAW) -> Reply:
        """One request without logprobs, not cached: what the endpoint draws. Raises ProviderError or AlignmentError."""
        raise NotImplementedError(f"{self.name!r} is asked for its lists")

    async def read_draw(self, reply: Reply) -> Piece:
        """The piece of the one token that was drawn. Raises AlignmentError."""
        return piece_of_draw(reply, await self.drawn_with(), expert=self.name)

    async def drawn_with(self) -> ChatTokenizer | None:
        """The tokenizer in which drawn texts are looked up, where it is known."""
        return None

    async def sample(self, context: Context) -> Piece:
        return await self.read_draw(await self.draw(context))

    async def num_asked(self, top_k: int) -> int:
        """How many entries are asked for, so that `top_k` pieces remain."""
        return min(top_k, self.capabilities.max_top_k or top_k)

    async def served_models(self) -> list[str] | None:
        """The names that the endpoint lists; None where it has no list."""
        return None

    async def vocab_size(self) -> int | None:
        """How many tokens the model has, where that is known."""
        return None


class IdEndpoint(IdExpert, WireExpert):
    """An endpoint that takes token ids; with `max_prompts` above 1 it takes lists of prompts."""

    def __init__(
        self,
        name: str,
        *,
        capabilities: Capabilities,
        identity: tuple[str, ...],
        tokenizer: ChatTokenizer | None = None,
        system: str | None = None,
        cache: DistributionCache | None = None,
        max_prompts: int = 1,
        max_lists: int | None = None,
    ) -> None:
        """`max_lists` is how many requests with lists may be under way at a time; None: any number."""
        super().__init__(name, system=system, cache=cache)
        self.capabilities = capabilities
        self._identity = identity
        self._known_tokenizer = tokenizer
        self._setup_lock = asyncio.Lock()
        self._questions: Coalescer[Question, TokenDistribution] = Coalescer(
            self._ask_together, max_size=max_prompts, max_running=max_lists if max_prompts > 1 else None
        )

    @abstractmethod
    async def ask_prompts(self, prompts: Sequence[tuple[int, ...]], ask: Ask) -> list[Reply | MopeError]:
        """One request. An error that concerns a single prompt stands in its place. Raises ProviderError."""

    async def find_tokenizer(self) -> ChatTokenizer:
        """Called once, where the configuration names none. Raises ConfigError or ProviderError."""
        raise ConfigError(
            f"expert {self.name!r}: `tokenizer` is missing",
            hint="Name the Hugging Face folder or hub name of the tokenizer of the model that is served there.",
        )

    async def tokenizer(self) -> ChatTokenizer:
        """The tokenizer of the model that is served."""
        async with self._setup_lock:
            if self._known_tokenizer is None:
                self._known_tokenizer = await self.find_tokenizer()
            return self._known_tokenizer

    async def encode_prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return (await self.tokenizer()).encode_chat(messages, expert=self.name)

    async def encode_start(self) -> tuple[int, ...]:
        return (await self.tokenizer()).start_ids

    async def spell(self, data: bytes) -> tuple[Piece, ...]:
        return (await self.tokenizer()).spell(data)

    async def vocabulary(self) -> Sequence[Piece]:
        return (await self.tokenizer()).pieces

    async def num_end_ids(self) -> int:
        """Several end tokens join in one piece: as many more entries must be asked for, so that k pieces remain."""
        return len((await self.tokenizer()).end_ids)

    async def num_asked(self, top_k: int) -> int:
        return await super().num_asked(top_k + max(0, await self.num_end_ids() - 1))

    async def vocab_size(self) -> int | None:
        return len((await self.tokenizer()).pieces)

    async def ask(self, ids: tuple[int, ...], top_k: int) -> TokenDistribution:
        return await self._questions.ask((ids, top_k))

    async def draft(
        self, context: Context, *, top_k: int, num_tokens: int, temperature: float = 1.0, seed: int | None = None
    ) -> tuple[DraftStep, ...]:
        steps = await super().draft(context, top_k=top_k, num_tokens=num_tokens, temperature=temperature, seed=seed)
        await self.remember(context, steps, top_k)
        return steps

    async def ask_among(self, context: Context, pieces: Sequence[Piece], *, top_k: int) -> TokenDistribution:
        if not self.capabilities.max_named:
            return await super().ask_among(context, pieces, top_k=top_k)
        ends = tuple((await self.tokenizer()).end_ids)
        ids = [token_id for piece in pieces for token_id in (ends if piece == END else (piece.token_id,))]
        named = [token_id for token_id in ids if token_id is not None][: self.capabilities.max_named]
        if not named:
            return await super().ask_among(context, pieces, top_k=top_k)
        reply = await self.observe(context, Ask(top_k, named=tuple(named)))
        return build_from_reply(
            reply,
            num_ids=len(await self.ids_of(context)),
            top_k=len(named) + 1,
            vocab_size=await self.vocab_size(),
            expert=self.name,
        )

    async def write(self, context: Context, ask: Ask) -> Reply:
        reply = await super().write(context, ask)
        check_all_read(reply, len(await self.ids_of(context)), expert=self.name)
        return reply

    async def score_ids(self, ids: tuple[int, ...], draft: Sequence[Piece], top_k: int) -> Sequence[TokenDistribution]:
        if self.capabilities.score != "prefixes":
            return await super().score_ids(ids, draft, top_k)
        found = []
        for answer in await self._ask_together([(prefix, top_k) for prefix in self.prefixes(ids, draft)]):
            if isinstance(answer, Exception):
                raise answer
            found.append(answer)
        return found

    async def build_lists(self, positions: Sequence[Position], top_k: int) -> list[TokenDistribution]:
        """The distributions at the positions of a draft that was scored."""
        num_asked, vocab_size = await self.num_asked(top_k), await self.vocab_size()
        return [
            build_distribution(
                undrawn_entries(position, num_asked),
                top_k=top_k,
                end_ids=(END.token_id,),
                vocab_size=vocab_size,
                expert=self.name,
            )
            for position in positions
        ]

    async def observe(self, context: Context, ask: Ask) -> Reply:
        return (await self.observe_together([context], ask))[0]

    async def observe_together(self, contexts: Sequence[Context], ask: Ask) -> list[Reply]:
        found = []
        for reply in await self.ask_prompts([await self.ids_of(context) for context in contexts], ask):
            if isinstance(reply, MopeError):
                raise reply
            found.append(reply)
        return found

    async def _ask_together(self, questions: Sequence[Question]) -> list[TokenDistribution | Exception]:
        """Several questions in one request. One that the server refuses does not cost the others."""
        num_asked = await self.num_asked(max(top_k for _, top_k in questions))
        vocab_size = await self.vocab_size()
        try:
            replies = await self.ask_prompts([ids for ids, _ in questions], Ask(num_asked))
        except RequestError as error:
            if len(questions) == 1:
                return [error]
            found = await asyncio.gather(*(self._ask_together([one]) for one in questions))
            return [answer for (answer,) in found]
        return [
            reply if isinstance(reply, MopeError) else self._distribution(reply, len(ids), top_k, vocab_size)
            for reply, (ids, top_k) in zip(replies, questions, strict=True)
        ]

    def _distribution(
        self, reply: Reply, num_ids: int, top_k: int, vocab_size: int | None
    ) -> TokenDistribution | MopeError:
        try:
            return build_from_reply(reply, num_ids=num_ids, top_k=top_k, vocab_size=vocab_size, expert=self.name)
        except MopeError as error:
            return error

    async def drawn_with(self) -> ChatTokenizer | None:
        return await self.tokenizer()

    async def fingerprint(self) -> str:
        return (await self.tokenizer()).fingerprint

    async def identity(self) -> tuple[str, ...]:
        return (*self._identity, (await self.tokenizer()).identity)

    async def aclose(self) -> None:
        await self._questions.aclose()
        await super().aclose()


def build_from_reply(
    reply: Reply,
    *,
    num_ids: int | None,
    top_k: int,
    vocab_size: int | None,
    expert: str,
    whole_characters: bool = False,
) -> TokenDistribution:
    """The distribution at the first position of a reply.

    `num_ids` is how many tokens were sent, where that is known. `whole_characters` leaves out what the endpoint could
    not continue. Raises ContextLengthError where the server read another number of tokens, and what
    `build_distribution` raises.
    """
    if num_ids is not None:
        check_all_read(reply, num_ids, expert=expert)
    if not reply.positions:
        if reply.has_ended:
            return TokenDistribution((END,), (0.0,), vocab_size, is_guess=True)
        raise LogprobsUnavailableError("the server answered without logprobs", expert=expert)
    position = reply.positions[0]
    entries = position.entries
    drawn = position.drawn
    # Some list the drawn token although it is not among the k best, some do not: its logprob is known either way.
    if drawn is not None and position.drawn_logprob is not None and all(drawn.key != one.key for one, _ in entries):
        entries = (*entries, (drawn, position.drawn_logprob))
    if whole_characters:
        entries = whole_entries(entries)
    return build_distribution(entries, top_k=top_k, end_ids=(END.token_id,), vocab_size=vocab_size, expert=expert)


def check_all_read(reply: Reply, num_ids: int, *, expert: str) -> None:
    """Raise ContextLengthError where the server read another number of tokens than were sent."""
    if reply.prompt_tokens not in (None, num_ids):
        raise ContextLengthError(f"the server read {reply.prompt_tokens} of {num_ids} tokens", expert=expert)
