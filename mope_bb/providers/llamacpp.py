"""llama.cpp's own server, through its native `/completion`: ids in, ids and bytes out, any k, raw logprobs.

Pitfalls that are handled here (each has a test):

- When the sampled token leaves an incomplete character, the reply holds no logprobs. The returned list is raw, so a
  harmless token is forced with `logit_bias`: the entry is always there, and the end of the answer cannot cut it off.
- The end of the answer has no text; only its id tells. A model may have several end tokens.
- A prompt that was cut silently (`truncated`, or fewer tokens evaluated than sent) is an error.
- Zero probability is written as -3.4e38.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from mope_bb.cache import DistributionCache
from mope_bb.chat_tokenizer import (
    FINGERPRINT_TEXTS,
    as_openai,
    fingerprint_of,
    load_chat_tokenizer,
    refuse_control_token,
)
from mope_bb.config import ExpertConfig
from mope_bb.errors import ContextLengthError, LogprobsUnavailableError, MalformedResponseError, MopeError
from mope_bb.providers.connect import open_client, required_url
from mope_bb.providers.dialects import NATIVE
from mope_bb.providers.endpoint import Ask, IdEndpoint, build_from_reply
from mope_bb.providers.wire import END_TOKENS, PieceReader, Position, Reply, build_position, checked_logprob
from mope_bb.transport import HttpClient
from mope_bb.types import Message, Piece, TokenDistribution

CAPABILITIES: Final = NATIVE["llamacpp"].capabilities
FORCE_BIAS: Final = 1000.0
MAX_LISTS: Final = 1
"""Requests with several prompts at a time: with more the lists become short, which costs more than the wait."""


def build_request(prompts: Sequence[Sequence[int]], *, top_k: int, forced_id: int) -> dict[str, Any]:
    """The body of one next-token question, or of several at once."""
    return {
        "prompt": list(prompts[0]) if len(prompts) == 1 else [list(ids) for ids in prompts],
        "n_predict": 1,
        "n_probs": top_k,
        "temperature": 1.0,
        "logit_bias": [[forced_id, FORCE_BIAS]],
        "post_sampling_probs": False,
        "cache_prompt": True,
        "stream": False,
        "return_tokens": True,
    }


def build_own_request(prompts: Sequence[Sequence[int]], ask: Ask) -> dict[str, Any]:
    """The same where the engine draws the tokens itself: nothing is forced, and `ask.num_tokens` are drawn."""
    body = build_request(prompts, top_k=ask.top_k, forced_id=0)
    return body | {"n_predict": ask.num_tokens, "temperature": ask.temperature or 0.0, "logit_bias": []}


def parse_reply(data: Any, reader: PieceReader, *, num_ids: int, expert: str) -> Reply:
    """A reply of `/completion`. Raises a ProviderError."""
    if not isinstance(data, dict):
        raise MalformedResponseError(f"the reply is {type(data).__name__}, expected an object", expert=expert)
    if data.get("truncated"):
        raise ContextLengthError(
            f"the server read {data.get('tokens_evaluated')} of {num_ids} tokens and cut the rest", expert=expert
        )
    try:
        positions = tuple(_parse_position(one, reader) for one in data.get("completion_probabilities") or ())
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise MalformedResponseError(
            f"`completion_probabilities` is not as llama.cpp writes it: {error!r}", expert=expert
        ) from None
    return Reply(positions, data.get("tokens_evaluated"), has_ended=data.get("stop_type") == "eos")


def parse_response(
    data: Any, *, num_ids: int, top_k: int, end_ids: Collection[int], vocab_size: int | None, expert: str
) -> TokenDistribution:
    """The distribution in a reply of `/completion`. Raises a ProviderError."""
    reply = parse_reply(data, PieceReader(None, end_ids=end_ids), num_ids=num_ids, expert=expert)
    if not reply.positions:
        raise LogprobsUnavailableError("the server answered without logprobs (`n_probs` was ignored)", expert=expert)
    return build_from_reply(reply, num_ids=num_ids, top_k=top_k, vocab_size=vocab_size, expert=expert)


def split_response(data: Any, num_prompts: int, *, expert: str) -> list[Any]:
    """The replies to several questions in their order. Raises MalformedResponseError."""
    if num_prompts == 1:
        return [data]
    try:
        found = {reply["index"]: reply for reply in data}
        return [found[index] for index in range(num_prompts)]
    except (KeyError, TypeError):
        count = f"{len(data)} replies" if isinstance(data, list) else type(data).__name__
        raise MalformedResponseError(
            f"a list of {num_prompts} prompts was answered by {count}, expected one for each", expert=expert
        ) from None


def _parse_position(position: Mapping[str, Any], reader: PieceReader) -> Position:
    entries = [_parse_entry(entry, reader) for entry in position["top_logprobs"]]
    # Without its logprob: it may be the token that we forced, which says nothing about the list.
    drawn = _parse_entry(position, reader)[0] if "id" in position else None
    return build_position(entries, (drawn, None), has_ids=True)


def _parse_entry(entry: Mapping[str, Any], reader: PieceReader) -> tuple[Piece, float | None]:
    token_id, data = entry["id"], entry["bytes"]
    if type(token_id) is not int or not isinstance(data, list):
        raise ValueError(f"id {token_id!r}, bytes {data!r}")
    piece = reader.read(None, data=bytes(data), token_id=token_id)
    assert piece is not None  # it has an id
    return piece, checked_logprob(entry["logprob"])


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
        self._forced_id = 0
        self._vocab_size: int | None = None

    async def encode_prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        if self._known_tokenizer is not None:
            return self._known_tokenizer.encode_chat(messages, expert=self.name)
        await self._refuse_control_tokens(messages)
        rendered = await self._client.post_json(
            "/apply-template", {"messages": [as_openai(message) for message in messages]}
        )
        return await self._tokenize(_field(rendered, "prompt", str, self.name), add_special=True, parse_special=True)

    async def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        """A text that holds a control token has other ids when control tokens are read as such."""
        for message in messages:
            as_text, as_control = await asyncio.gather(
                self._tokenize(message.content, parse_special=False),
                self._tokenize(message.content, parse_special=True),
            )
            if as_text != as_control:
                refuse_control_token(await self._name_control_token(as_control, as_text), expert=self.name)

    async def _name_control_token(self, as_control: Sequence[int], as_text: Sequence[int]) -> str:
        found = sorted(set(as_control) - set(as_text))
        data = await self._client.post_json("/detokenize", {"tokens": found[:1]})
        return str(data.get("content") or "a control token") if isinstance(data, dict) else "a control token"

    async def _tokenize(self, text: str, *, parse_special: bool, add_special: bool = False) -> tuple[int, ...]:
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        tokens = _field(await self._client.post_json("/tokenize", body), "tokens", list, self.name)
        if not all(isinstance(token, int) for token in tokens):
            raise MalformedResponseError("`tokens` of /tokenize are not ids", expert=self.name)
        return tuple(tokens)

    async def num_end_ids(self) -> int:
        return len(await self._set_up())

    async def vocab_size(self) -> int | None:
        await self._set_up()
        return self._vocab_size

    async def ask_prompts(self, prompts: Sequence[tuple[int, ...]], ask: Ask) -> list[Reply | MopeError]:
        reader = PieceReader(self._known_tokenizer, end_ids=await self._set_up())
        if ask.num_tokens == 1 and ask.temperature is None:
            body = build_request(prompts, top_k=ask.top_k, forced_id=self._forced_id)
        else:
            body = build_own_request(prompts, ask)
        if self._model is not None:
            body["model"] = self._model
        data = await self._client.post_json("/completion", body)
        replies = split_response(data, len(prompts), expert=self.name)
        return [self._parse(reply, reader, len(ids)) for reply, ids in zip(replies, prompts, strict=True)]

    def _parse(self, reply: Any, reader: PieceReader, num_ids: int) -> Reply | MopeError:
        try:
            return parse_reply(reply, reader, num_ids=num_ids, expert=self.name)
        except MopeError as error:
            return error

    async def served_models(self) -> list[str] | None:
        data = await self._client.get_json("/v1/models")
        try:
            return [str(card["id"]) for card in data["data"]]
        except (KeyError, TypeError):
            return None

    async def _set_up(self) -> frozenset[int]:
        """Learn the end tokens, a harmless token and the vocabulary's size, once."""
        async with self._engine_lock:
            if self._end_ids is None:
                self._forced_id = (await self._tokenize("a", parse_special=False))[-1]
                self._vocab_size = await self._ask_vocab_size()
                self._end_ids = await self._ask_end_ids()
            return self._end_ids

    async def _ask_vocab_size(self) -> int | None:
        data = await self._client.get_json("/v1/models")
        try:
            size = data["data"][0]["meta"]["n_vocab"]
        except (KeyError, TypeError, IndexError):
            return None
        return size if isinstance(size, int) else None

    async def _ask_end_ids(self) -> frozenset[int]:
        if self._known_tokenizer is not None:
            return self._known_tokenizer.end_ids
        props = await self._client.get_json("/props")
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

    async def fingerprint(self) -> str:
        if self._known_tokenizer is not None:
            return self._known_tokenizer.fingerprint
        encodings = await asyncio.gather(*(self._tokenize(text, parse_special=False) for text in FINGERPRINT_TEXTS))
        return fingerprint_of(encodings)


def _field(data: Any, name: str, kind: type, expert: str) -> Any:
    value = data.get(name) if isinstance(data, dict) else None
    if not isinstance(value, kind):
        raise MalformedResponseError(
            f"the reply has no {name!r} of type {kind.__name__}: {str(data)[:100]!r}", expert=expert
        )
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
