"""Experts behind HTTP: what those that take token ids have in common, and those that take text.

An adapter says how one request is sent (`ask_prompts` or `ask_text`) and gets back what the wire said, a `Reply`. From
there on all are alike: lists are coalesced, cached, checked, and made into distributions.
"""

from __future__ import annotations

import asyncio
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import orjson

from mope_bb.cache import DistributionCache, distribution_key
from mope_bb.chat_tokenizer import ChatTokenizer, as_openai, refuse_control_token
from mope_bb.coalescing import Coalescer
from mope_bb.errors import (
    AlignmentError,
    ConfigError,
    ContextLengthError,
    LogprobsUnavailableError,
    MopeError,
    PrefillError,
    RequestError,
)
from mope_bb.providers.base import Capabilities, Expert, IdExpert, build_distribution, with_system
from mope_bb.providers.wire import Reply
from mope_bb.types import END, Context, Message, Piece, TokenDistribution

_LOOKS_LIKE_CONTROL: Final = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?s>|<(start|end)_of_(turn|utterance)>|<(eos|bos)>|\[/?INST\]"
)
"""Control tokens of the common model families: without a tokenizer the model's own are not known."""
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


class Connection(Protocol):
    """What every client of an endpoint has, whoever wrote it."""

    @property
    def num_requests(self) -> int:
        """Requests sent, retries included."""

    async def aclose(self) -> None:
        """Close all connections."""


class WireExpert(Expert):
    """An expert behind HTTP, whose replies can be seen as the wire has them: what `probe` looks at."""

    _client: Connection
    own_temperature: float = 0.0
    """What is sent where `Ask.temperature` is None."""

    @property
    def num_requests(self) -> int:
        return self._client.num_requests

    async def aclose(self) -> None:
        await self._client.aclose()

    @abstractmethod
    async def observe(self, context: Context, ask: Ask) -> Reply:
        """One request, not cached. Raises ProviderError or AlignmentError."""

    async def observe_together(self, contexts: Sequence[Context], ask: Ask) -> list[Reply]:
        """One request for several questions, where the endpoint takes lists."""
        return [await self.observe(context, ask) for context in contexts]

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

    async def num_end_ids(self) -> int:
        """Several end tokens join in one piece: as many more entries must be asked for, so that k pieces remain."""
        return len((await self.tokenizer()).end_ids)

    async def vocab_size(self) -> int | None:
        return len((await self.tokenizer()).pieces)

    async def ask(self, ids: tuple[int, ...], top_k: int) -> TokenDistribution:
        return await self._questions.ask((ids, top_k))

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
        top_k = max(top_k for _, top_k in questions) + max(0, await self.num_end_ids() - 1)
        limit = self.capabilities.max_top_k
        vocab_size = await self.vocab_size()
        try:
            replies = await self.ask_prompts(
                [ids for ids, _ in questions], Ask(top_k if limit is None else min(top_k, limit))
            )
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

    async def fingerprint(self) -> str:
        return (await self.tokenizer()).fingerprint

    async def identity(self) -> tuple[str, ...]:
        return self._identity

    async def aclose(self) -> None:
        await self._questions.aclose()
        await super().aclose()


class TextEndpoint(WireExpert):
    """An endpoint that takes messages or text: the answer so far is tokenized anew by the server at every question.

    Without a tokenizer pieces are known by their bytes, and only experts of one model can be merged.
    """

    def __init__(
        self,
        name: str,
        *,
        capabilities: Capabilities,
        identity: tuple[str, ...],
        tokenizer: ChatTokenizer | None = None,
        system: str | None = None,
        cache: DistributionCache | None = None,
    ) -> None:
        self.name = name
        self.capabilities = capabilities
        self._identity = identity
        self._tokenizer = tokenizer
        self._system = system
        self._cache = cache

    @abstractmethod
    async def ask_text(self, messages: Sequence[Message], answer: str, ask: Ask) -> Reply:
        """One request; `messages` have the expert's own system prompt. Raises ProviderError."""

    async def next_tokens(self, context: Context, *, top_k: int) -> TokenDistribution:
        messages, answer = self._prompt(context)
        if self._cache is None:
            return await self._ask(messages, answer, top_k)
        document = orjson.dumps([[as_openai(message) for message in messages], answer]).decode()
        key = distribution_key(self._identity, document, top_k)
        found = await self._cache.get(key)
        if found is None:
            found = await self._ask(messages, answer, top_k)
            await self._cache.put(key, found)
        return found

    async def observe(self, context: Context, ask: Ask) -> Reply:
        messages, answer = self._prompt(context)
        return await self.ask_text(messages, answer, ask)

    def render(self, messages: Sequence[Message], answer: str) -> str:
        """The template as text with the answer so far, without the BOS that servers put before a text themselves."""
        assert self._tokenizer is not None
        rendered = self._tokenizer.render_chat(messages, expert=self.name)
        return rendered.removeprefix(self._tokenizer.bos_text) + answer

    def _prompt(self, context: Context) -> tuple[tuple[Message, ...], str]:
        answer = self._text_of(context.response)
        for message in context.messages:
            refuse_control_token(self._control_token_in(message.content), expert=self.name)
        if context.response and self.capabilities.prefill == "none":
            raise PrefillError("this endpoint answers from the beginning and continues nothing", expert=self.name)
        return with_system(context.messages, self._system), answer

    def _control_token_in(self, text: str) -> str | None:
        if self._tokenizer is not None:
            return self._tokenizer.control_token_in(text)
        found = _LOOKS_LIKE_CONTROL.search(text)
        return None if found is None else found[0]

    def _text_of(self, response: Sequence[Piece]) -> str:
        data = b"".join(piece.data for piece in response)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise AlignmentError(
                f"the answer so far ends with {data[-4:]!r}, inside a character, which expert {self.name!r} cannot "
                "continue: its endpoint takes text",
                hint="Merge it with experts that take text as well, or serve it where token ids are taken.",
            ) from None

    async def vocab_size(self) -> int | None:
        return None if self._tokenizer is None else len(self._tokenizer.pieces)

    async def _ask(self, messages: Sequence[Message], answer: str, top_k: int) -> TokenDistribution:
        # A drawn piece that stands below the list must not lengthen it: what lies between is missing.
        top_k = min(top_k, self.capabilities.max_top_k or top_k)
        reply = await self.ask_text(messages, answer, Ask(top_k))
        return build_from_reply(
            reply,
            num_ids=None,
            top_k=top_k,
            vocab_size=await self.vocab_size(),
            expert=self.name,
            whole_characters=True,
        )

    async def fingerprint(self) -> str:
        # Without a tokenizer nothing is known of it, but one model has one tokenizer.
        return "\n".join(self._identity) if self._tokenizer is None else self._tokenizer.fingerprint


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
    if num_ids is not None and reply.prompt_tokens not in (None, num_ids):
        raise ContextLengthError(f"the server read {reply.prompt_tokens} of {num_ids} tokens", expert=expert)
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
        entries = tuple(entry for entry in entries if entry[0] == END or is_whole_text(entry[0].data))
    return build_distribution(entries, top_k=top_k, end_ids=(END.token_id,), vocab_size=vocab_size, expert=expert)


def is_whole_text(data: bytes) -> bool:
    """Whether these bytes are text of whole characters, and not nothing."""
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False
