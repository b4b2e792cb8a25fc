"""llama.cpp's own server, through its native `/completion`: ids in, ids and bytes out, any k, raw logprobs.

Pitfalls that are handled here (each has a test):

- When the sampled token leaves an incomplete character, the reply holds no logprobs. The returned list is raw, so a
  harmless token is forced with `logit_bias`: the entry is always there, and the end of the answer cannot cut it off.
- The end of the answer has no text; only its id tells. A model may have several end tokens.
- A prompt that was cut silently (`truncated`, or fewer tokens evaluated than sent) is an error.
- Zero probability is written as -3.4e38.
- A draft has no list where it ends inside a character, but `tokens` tells what was drawn there: that list is asked for.
- What ends a draft early must not depend on what is drawn, so none is asked for that does not fit into the context.
- A draft is scored by forcing it with a grammar. One that forbids everything ends the request, and with some samplers
  the whole server: pieces that are not whole characters are never forced.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from mope_bb.cache import DistributionCache
from mope_bb.chat_tokenizer import (
    FINGERPRINT_TEXTS,
    as_openai,
    fingerprint_of,
    load_chat_tokenizer,
    refuse_control_token,
    texts_of,
)
from mope_bb.config import ExpertConfig
from mope_bb.errors import (
    AlignmentError,
    ContextLengthError,
    LogprobsUnavailableError,
    MalformedResponseError,
    MopeError,
    RequestError,
)
from mope_bb.failures import shown
from mope_bb.providers.comparing import first_position
from mope_bb.providers.connect import open_client, required_url
from mope_bb.providers.dialects import NATIVE
from mope_bb.providers.endpoint import Ask, IdEndpoint, check_all_read
from mope_bb.providers.llamacpp_wire import (
    build_own_request,
    build_request,
    build_score_request,
    can_be_forced,
    parse_draft,
    parse_reply,
    parse_spelling,
    split_response,
)
from mope_bb.providers.wire import END_TOKENS, PieceReader, Reply, checked_id
from mope_bb.transport import HttpClient
from mope_bb.types import Context, Message, Piece, TokenDistribution

CAPABILITIES: Final = NATIVE["llamacpp"].capabilities
MAX_LISTS: Final = 1
"""Requests with several prompts at a time: with more the lists become short, which costs more than the wait."""


class LlamaCppExpert(IdEndpoint):
    """A model behind llama.cpp's server."""

    _client: HttpClient

    def __init__(
        self, name: str, client: HttpClient, *, model: str | None = None, max_prompts: int = 1, **settings: Any
    ) -> None:
        """`settings` are those of IdEndpoint. Without a tokenizer the server's own routes are used."""
        super().__init__(name, max_prompts=max_prompts, max_lists=MAX_LISTS, **settings)
        self.own_temperature = 1.0
        self._client = client
        self._model = model
        self._engine_lock = asyncio.Lock()
        self._end_ids: frozenset[int] | None = None
        self._known_reader: PieceReader | None = None
        self._forced_id = 0
        self._vocab_size: int | None = None
        self._context_length: int | None = None
        self._model_path = ""
        self._can_force = True

    async def encode_prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        if self._known_tokenizer is not None:
            return self._known_tokenizer.encode_chat(messages, expert=self.name)
        body = {"messages": [as_openai(message) for message in messages]}
        # Together: behind a far server every trip counts.
        _, rendered = await asyncio.gather(
            self._refuse_control_tokens(messages), self._client.post_json("/apply-template", body)
        )
        return await self._tokenize(_field(rendered, "prompt", str, self.name), add_special=True, parse_special=True)

    async def encode_start(self) -> tuple[int, ...]:
        if self._known_tokenizer is not None:
            return await super().encode_start()
        return await self._tokenize("", add_special=True, parse_special=False)

    async def spell(self, data: bytes) -> tuple[Piece, ...]:
        if self._known_tokenizer is not None:
            return await super().spell(data)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise AlignmentError(f"{data!r} is no text, which expert {self.name!r} cannot tokenize") from None
        body = {"content": text, "add_special": False, "parse_special": False, "with_pieces": True}
        return parse_spelling(await self._client.post_json("/tokenize", body), data, expert=self.name)

    async def vocabulary(self) -> Sequence[Piece]:
        return () if self._known_tokenizer is None else await super().vocabulary()

    async def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        """A text that holds a control token has other ids when control tokens are read as such."""
        encoded = await asyncio.gather(
            *(
                self._tokenize(text, parse_special=special)
                for one in messages
                for text in (texts_of(one) if one.tool_calls or one.tool_call_id else (one.content,))
                for special in (False, True)
            )
        )
        for as_text, as_control in zip(encoded[::2], encoded[1::2], strict=True):
            if as_text != as_control:
                refuse_control_token(await self._name_control_token(as_control, as_text), expert=self.name)

    async def _name_control_token(self, as_control: Sequence[int], as_text: Sequence[int]) -> str:
        found = sorted(set(as_control) - set(as_text))
        data = await self._client.post_json("/detokenize", {"tokens": found[:1]})
        name = data.get("content") if isinstance(data, dict) else None
        return name if isinstance(name, str) and name else "a control token"

    async def _tokenize(self, text: str, *, parse_special: bool, add_special: bool = False) -> tuple[int, ...]:
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        tokens = _field(await self._client.post_json("/tokenize", body), "tokens", list, self.name)
        try:
            found = tuple(map(checked_id, tokens))
        except ValueError as error:
            raise MalformedResponseError(f"`tokens` of /tokenize are not ids: {error}", expert=self.name) from None
        if text and not found:
            raise MalformedResponseError("/tokenize gave no token for a text", expert=self.name)
        return found

    async def num_end_ids(self) -> int:
        return len(await self._set_up())

    async def vocab_size(self) -> int | None:
        await self._set_up()
        return self._vocab_size

    async def ask_prompts(self, prompts: Sequence[tuple[int, ...]], ask: Ask) -> list[Reply | MopeError]:
        reader = await self._reader()
        if ask.is_draft:
            body, parse = build_own_request(prompts, ask), parse_draft
        else:
            body, parse = build_request(prompts, top_k=ask.top_k, forced_id=self._forced_id), parse_reply
        data = await self._complete(body, ask.num_entries(len(prompts)))
        replies = split_response(data, len(prompts), expert=self.name)
        found: list[Reply | MopeError] = []
        for reply, ids in zip(replies, prompts, strict=True):
            try:
                found.append(parse(reply, reader, num_ids=len(ids), expert=self.name))
            except MopeError as error:
                found.append(error)
        return found

    async def write(self, context: Context, ask: Ask) -> Reply:
        await self._set_up()
        if self._context_length is not None:
            room = self._context_length - 1 - len(await self.ids_of(context))
            ask = replace(ask, num_tokens=max(1, min(ask.num_tokens, room)))
        reply = await super().write(context, ask)
        if reply.unlisted is None:
            return reply
        drawn = [position.drawn for position in reply.positions if position.drawn is not None]
        here = first_position(await self.observe(context.extended(*drawn), Ask(ask.top_k)))
        same = [entry for entry in here.entries if entry[0].token_id == reply.unlisted.token_id]
        piece, value = same[0] if same else (reply.unlisted, None)
        return replace(reply, positions=(*reply.positions, replace(here, drawn=piece, drawn_logprob=value)))

    async def score_ids(self, ids: tuple[int, ...], draft: Sequence[Piece], top_k: int) -> Sequence[TokenDistribution]:
        reader = await self._reader()
        forced = (*self.prefixes((), draft)[-1], self._forced_id)
        fits = self._context_length is None or len(ids) + len(forced) < self._context_length
        if not (draft and self._can_force and fits and all(can_be_forced(piece) for piece in draft)):
            return await super().score_ids(ids, draft, top_k)
        ask = Ask(await self.num_asked(top_k), len(forced))
        body = build_score_request(ids, forced, top_k=ask.top_k)
        try:
            data = await self._complete(body, ask.num_entries())
            reply = parse_reply(data, reader, num_ids=len(ids), expert=self.name)
        except ContextLengthError:
            raise
        except RequestError:
            # A server from before grammars had tokens: it is asked for a list of prefixes.
            self._can_force = False
            return await super().score_ids(ids, draft, top_k)
        check_all_read(reply, len(ids), expert=self.name)
        if [position.drawn and position.drawn.token_id for position in reply.positions] != list(forced):
            raise MalformedResponseError("the server did not generate what its grammar forces", expert=self.name)
        return await self.build_lists(reply.positions, top_k)

    async def _reader(self) -> PieceReader:
        if self._known_reader is None:
            self._known_reader = PieceReader(self._known_tokenizer, end_ids=await self._set_up())
        return self._known_reader

    async def _complete(self, body: dict[str, Any], num_entries: int) -> Any:
        if self._model is not None:
            body["model"] = self._model
        return await self._client.post_json("/completion", body, num_entries=num_entries)

    async def served_models(self) -> list[str] | None:
        data = await self._client.get_json("/v1/models")
        try:
            return [card["id"] for card in data["data"] if isinstance(card["id"], str)]
        except (KeyError, TypeError):
            return None

    async def _set_up(self) -> frozenset[int]:
        """Learn the end tokens, a harmless token and the sizes of vocabulary and context, once."""
        async with self._engine_lock:
            if self._end_ids is None:
                self._forced_id = (await self._tokenize("a", parse_special=False))[-1]
                self._vocab_size = await self._ask_vocab_size()
                props = await self._client.get_json("/props")
                self._context_length = _context_length(props)
                self._model_path = str(props.get("model_path") or "") if isinstance(props, dict) else ""
                self._end_ids = await self._find_end_ids(props)
            return self._end_ids

    async def _ask_vocab_size(self) -> int | None:
        data = await self._client.get_json("/v1/models")
        try:
            size = data["data"][0]["meta"]["n_vocab"]
        except (KeyError, TypeError, IndexError):
            return None
        return size if type(size) is int and size > 0 else None

    async def _find_end_ids(self, props: Any) -> frozenset[int]:
        if self._known_tokenizer is not None:
            return self._known_tokenizer.end_ids
        eos = props.get("eos_token") if isinstance(props, dict) else None
        names = dict.fromkeys([*([eos] if isinstance(eos, str) and eos else []), *END_TOKENS])
        encoded = await asyncio.gather(*(self._tokenize(name, parse_special=True) for name in names))
        as_text = await asyncio.gather(*(self._tokenize(name, parse_special=False) for name in names))
        # One id, and another encoding as text: a control token of this model.
        found = frozenset(ids[0] for ids, text in zip(encoded, as_text, strict=True) if len(ids) == 1 and ids != text)
        if not found:
            raise LogprobsUnavailableError(
                "the model names no token that ends an answer",
                hint="Set `tokenizer` to the model's Hugging Face folder or hub name.",
                expert=self.name,
            )
        return found

    async def identity(self) -> tuple[str, ...]:
        if self._known_tokenizer is not None:
            return await super().identity()
        if self._model is not None:
            return self._identity
        # Without a name it is whatever is served.
        await self._set_up()
        return (*self._identity, self._model_path)

    async def fingerprint(self) -> str:
        if self._known_tokenizer is not None:
            return self._known_tokenizer.fingerprint
        encodings = await asyncio.gather(*(self._tokenize(text, parse_special=False) for text in FINGERPRINT_TEXTS))
        return fingerprint_of(encodings)


def _context_length(props: Any) -> int | None:
    """How many tokens a slot holds, where the server tells."""
    try:
        length = props["default_generation_settings"]["n_ctx"]
    except (KeyError, TypeError):
        return None
    return length if type(length) is int and length > 0 else None


def _field(data: Any, name: str, kind: type, expert: str) -> Any:
    value = data.get(name) if isinstance(data, dict) else None
    if not isinstance(value, kind):
        raise MalformedResponseError(f"the reply has no {name!r} of type {kind.__name__}: {shown(data)}", expert=expert)
    return value


def open_expert(config: ExpertConfig, cache: DistributionCache | None) -> LlamaCppExpert:
    """Connect to `base_url`. Raises ConfigError or AuthenticationError; the server is first asked when needed."""
    base_url = required_url(config).removesuffix("/v1")
    return LlamaCppExpert(
        config.name,
        open_client(config, base_url),
        capabilities=CAPABILITIES,
        identity=("llamacpp", config.identity or f"{base_url} {config.model or ''}"),
        model=config.model,
        system=config.system,
        tokenizer=load_chat_tokenizer(config.tokenizer) if config.tokenizer else None,
        cache=cache,
        max_prompts=config.max_prompts,
    )
