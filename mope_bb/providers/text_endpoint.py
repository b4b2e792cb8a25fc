"""Experts behind HTTP whose endpoints take messages or text, and so know no token ids of an answer."""

from __future__ import annotations

import re
import unicodedata
from abc import abstractmethod
from collections.abc import Sequence
from typing import Final

import orjson

from mope_bb.cache import DistributionCache, distribution_key
from mope_bb.chat_tokenizer import ChatTokenizer, as_openai, refuse_control_token, texts_of
from mope_bb.coalescing import SingleFlight
from mope_bb.errors import AlignmentError, PrefillError, RequestError
from mope_bb.providers.base import Capabilities, with_system
from mope_bb.providers.drawing import ONE_DRAW, DrawAsk
from mope_bb.providers.endpoint import Ask, WireExpert, build_from_reply
from mope_bb.providers.wire import Reply
from mope_bb.types import Context, Message, Piece, TokenDistribution

_LOOKS_LIKE_CONTROL: Final = re.compile(
    r"<[|｜][^|｜<>\s]{1,40}[|｜]>|<\|?turn\|?>|</?s>|<(start|end)_of_(turn|utterance)>|<(eos|bos|EOT)>|\[/?INST\]"
)
"""Control tokens of the common model families: without a tokenizer the model's own are not known."""


class TextEndpoint(WireExpert):
    """An endpoint that takes messages or text: the answer so far is tokenized anew by the server at every question.

    Without a tokenizer pieces are known by their bytes, and only experts of one model can be merged. The lists of a
    draft are not kept: they hold for the tokens that were drawn, which the same text may not be made of.
    """

    whole_characters = True
    takes_plain_text = False
    """It continues a text that is no chat."""

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
        self._open_lists: SingleFlight[TokenDistribution] = SingleFlight()

    @abstractmethod
    async def ask_text(self, messages: Sequence[Message], answer: str, ask: Ask) -> Reply:
        """One request; `messages` have the expert's own system prompt. Raises ProviderError."""

    async def recall(self, context: Context, *, top_k: int) -> TokenDistribution | None:
        return None if self._cache is None else await self._cache.get(self._key(*self._prompt(context), top_k))

    async def next_tokens(self, context: Context, *, top_k: int) -> TokenDistribution:
        messages, answer = self._prompt(context)
        return await self._open_lists.ask((messages, answer, top_k), lambda: self._next_tokens(messages, answer, top_k))

    async def _next_tokens(self, messages: Sequence[Message], answer: str, top_k: int) -> TokenDistribution:
        if self._cache is None:
            return await self._ask(messages, answer, top_k)
        key = self._key(messages, answer, top_k)
        found = await self._cache.get(key)
        if found is None:
            found = await self._ask(messages, answer, top_k)
            await self._cache.put(key, found)
        return found

    def _key(self, messages: Sequence[Message], answer: str, top_k: int) -> str:
        document = orjson.dumps([[as_openai(message) for message in messages], answer]).decode()
        # The template that is rendered, and the pieces that are told apart, depend on it.
        tokenizer = [] if self._tokenizer is None else [self._tokenizer.identity]
        return distribution_key([*self._identity, *tokenizer], document, top_k)

    async def observe(self, context: Context, ask: Ask) -> Reply:
        messages, answer = self._prompt(context)
        return await self.ask_text(messages, answer, ask)

    async def draw_text(self, messages: Sequence[Message], answer: str, ask: DrawAsk) -> Reply:
        """One request without logprobs; `messages` have the expert's own system prompt. Raises ProviderError."""
        raise NotImplementedError(f"{self.name!r} is asked for its lists")

    async def draw(self, context: Context, ask: DrawAsk = ONE_DRAW) -> Reply:
        return await self.draw_text(*self._prompt(context), ask)

    async def drawn_with(self) -> ChatTokenizer | None:
        return self._tokenizer

    def render(self, messages: Sequence[Message], answer: str) -> str:
        """The template as text with the answer so far, without the BOS that servers put before a text themselves."""
        assert self._tokenizer is not None
        rendered = self._tokenizer.render_chat(messages, expert=self.name) if messages else ""
        return rendered.removeprefix(self._tokenizer.bos_text) + answer

    def _prompt(self, context: Context) -> tuple[tuple[Message, ...], str]:
        answer = self._text_of(context.response)
        for message in context.messages:
            for text in texts_of(message):
                refuse_control_token(self._control_token_in(text), expert=self.name)
        if context.response and self.capabilities.prefill == "none":
            raise PrefillError("this endpoint answers from the beginning and continues nothing", expert=self.name)
        if not context.messages and not self.takes_plain_text:
            raise RequestError("this endpoint takes messages, and no text without any", expert=self.name)
        return with_system(context.messages, self._system) if context.messages else (), answer

    def _control_token_in(self, text: str) -> str | None:
        if self._tokenizer is not None:
            return self._tokenizer.control_token_in(text)
        # As tokenizers may read it that put characters together, or leave out what is not seen.
        plain = unicodedata.normalize("NFKC", text)
        seen = "".join(char for char in plain if unicodedata.category(char) != "Cf")
        found = next(filter(None, map(_LOOKS_LIKE_CONTROL.search, (text, plain, seen))), None)
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

    async def spell(self, data: bytes) -> tuple[Piece, ...]:
        return await super().spell(data) if self._tokenizer is None else self._tokenizer.spell(data)

    async def vocabulary(self) -> Sequence[Piece]:
        return () if self._tokenizer is None else self._tokenizer.pieces

    async def count_tokens(self, context: Context) -> int | None:
        if self._tokenizer is None:
            return None
        messages, answer = self._prompt(context)
        rendered = self._tokenizer.render_chat(messages, expert=self.name) if messages else ""
        return len(self._tokenizer.encode_text(rendered + answer))

    async def _ask(self, messages: Sequence[Message], answer: str, top_k: int) -> TokenDistribution:
        # A drawn piece that stands below the list must not lengthen it: what lies between is missing.
        top_k = await self.num_asked(top_k)
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
