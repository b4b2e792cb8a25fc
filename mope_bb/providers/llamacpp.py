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
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from mope_bb.cache import DistributionCache
from mope_bb.chat_tokenizer import (
    FINGERPRINT_TEXTS,
    ChatTokenizer,
    as_openai,
    fingerprint_of,
    load_chat_tokenizer,
    refuse_control_token,
)
from mope_bb.coalescing import Coalescer
from mope_bb.config import ExpertConfig
from mope_bb.errors import (
    AuthenticationError,
    ConfigError,
    ContextLengthError,
    LogprobsUnavailableError,
    MalformedResponseError,
    MopeError,
    RequestError,
)
from mope_bb.providers.base import Capabilities, IdExpert, build_distribution
from mope_bb.transport import HttpClient
from mope_bb.types import Message, Piece, TokenDistribution

CAPABILITIES: Final = Capabilities(max_top_k=None, prefill="ids", byte_exact=True, eos_visible=True, logprob_noise=0.02)
FORCE_BIAS: Final = 1000.0
MAX_LISTS: Final = 1
"""Requests with several prompts at a time: with more the lists become short, which costs more than the wait."""
END_TOKENS: Final = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<EOT>",
    "</s>",
    "<|end_of_text|>",
    "<turn|>",
    "<end_of_utterance>",
    "<|return|>",
    "<|call|>",
    "<eos>",
    "<|END_OF_TURN_TOKEN|>",
)
"""Tokens that end an answer whatever the model's metadata say, as in llama.cpp's own list."""


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


def parse_response(
    data: Any, *, num_ids: int, top_k: int, end_ids: Collection[int], vocab_size: int | None, expert: str
) -> TokenDistribution:
    """The distribution in a reply of `/completion`. Raises a ProviderError."""
    if not isinstance(data, dict):
        raise MalformedResponseError(f"the reply is {type(data).__name__}, expected an object", expert=expert)
    if data.get("truncated") or data.get("tokens_evaluated", num_ids) != num_ids:
        raise ContextLengthError(
            f"the server read {data.get('tokens_evaluated')} of {num_ids} tokens and cut the rest", expert=expert
        )
    positions = data.get("completion_probabilities")
    if not positions:
        raise LogprobsUnavailableError("the server answered without logprobs (`n_probs` was ignored)", expert=expert)
    try:
        entries = [_parse_entry(entry) for entry in positions[0]["top_logprobs"]]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise MalformedResponseError(
            f"`completion_probabilities` is not as llama.cpp writes it: {error!r}", expert=expert
        ) from None
    return build_distribution(entries, top_k=top_k, end_ids=end_ids, vocab_size=vocab_size, expert=expert)


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


def _parse_entry(entry: Mapping[str, Any]) -> tuple[Piece, float | None]:
    token_id, logprob, data = entry["id"], entry["logprob"], entry["bytes"]
    if type(token_id) is not int or token_id < 0 or not isinstance(data, list):
        raise ValueError(f"id {token_id!r}, bytes {data!r}")
    if not (logprob is None or type(logprob) in (int, float)):
        raise ValueError(f"logprob {logprob!r}")
    return Piece(bytes(data), token_id), logprob


class LlamaCppExpert(IdExpert):
    """A model behind llama.cpp's server."""

    capabilities = CAPABILITIES

    def __init__(
        self,
        name: str,
        client: HttpClient,
        *,
        identity: tuple[str, ...],
        model: str | None = None,
        system: str | None = None,
        tokenizer: ChatTokenizer | None = None,
        cache: DistributionCache | None = None,
        max_prompts: int = 1,
    ) -> None:
        super().__init__(name, system=system, cache=cache)
        self._client = client
        self._identity = identity
        self._model = model
        self._tokenizer = tokenizer
        self._setup_lock = asyncio.Lock()
        self._end_ids: frozenset[int] | None = None
        self._forced_id = 0
        self._vocab_size: int | None = None
        self._questions: Coalescer[tuple[tuple[int, ...], int], TokenDistribution] = Coalescer(
            self._ask_together, max_size=max_prompts, max_running=MAX_LISTS if max_prompts > 1 else None
        )

    async def encode_prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        if self._tokenizer is not None:
            return self._tokenizer.encode_chat(messages, expert=self.name)
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

    async def ask(self, ids: tuple[int, ...], top_k: int) -> TokenDistribution:
        return await self._questions.ask((ids, top_k))

    async def _ask_together(
        self, questions: Sequence[tuple[tuple[int, ...], int]]
    ) -> list[TokenDistribution | Exception]:
        """Several questions in one request. One that the server refuses does not cost the others."""
        try:
            return await self._ask_list(questions)
        except RequestError as error:
            if len(questions) == 1:
                return [error]
            found = await asyncio.gather(*(self._ask_together([one]) for one in questions))
            return [answer for (answer,) in found]

    async def _ask_list(self, questions: Sequence[tuple[tuple[int, ...], int]]) -> list[TokenDistribution | Exception]:
        end_ids = await self._set_up()
        # Several end tokens join in one piece: ask for as many more, so that k pieces remain.
        asked = max(top_k for _, top_k in questions) + max(0, len(end_ids) - 1)
        body = build_request([ids for ids, _ in questions], top_k=asked, forced_id=self._forced_id)
        if self._model is not None:
            body["model"] = self._model
        data = await self._client.post_json("/completion", body)
        return [
            self._parse(reply, len(ids), top_k, end_ids)
            for reply, (ids, top_k) in zip(
                split_response(data, len(questions), expert=self.name), questions, strict=True
            )
        ]

    def _parse(self, reply: Any, num_ids: int, top_k: int, end_ids: Collection[int]) -> TokenDistribution | Exception:
        try:
            return parse_response(
                reply,
                num_ids=num_ids,
                top_k=top_k,
                end_ids=end_ids,
                vocab_size=self._vocab_size,
                expert=self.name,
            )
        except MopeError as error:
            return error

    async def _set_up(self) -> frozenset[int]:
        """Learn the end tokens, a harmless token and the vocabulary's size, once."""
        async with self._setup_lock:
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
        if self._tokenizer is not None:
            return self._tokenizer.end_ids
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
        if self._tokenizer is not None:
            return self._tokenizer.fingerprint
        encodings = await asyncio.gather(*(self._tokenize(text, parse_special=False) for text in FINGERPRINT_TEXTS))
        return fingerprint_of(encodings)

    async def identity(self) -> tuple[str, ...]:
        return self._identity

    @property
    def num_requests(self) -> int:
        return self._client.num_requests

    async def aclose(self) -> None:
        await self._questions.aclose()
        await self._client.aclose()


def _field(data: Any, name: str, kind: type, expert: str) -> Any:
    value = data.get(name) if isinstance(data, dict) else None
    if not isinstance(value, kind):
        raise MalformedResponseError(
            f"the reply has no {name!r} of type {kind.__name__}: {str(data)[:100]!r}", expert=expert
        )
    return value


def open_expert(config: ExpertConfig, cache: DistributionCache | None) -> LlamaCppExpert:
    """Connect to `base_url`. Raises ConfigError or AuthenticationError; the server is first asked when needed."""
    if config.base_url is None:
        raise ConfigError(f"expert {config.name!r}: `base_url` is missing", hint='Expected "http://host:port".')
    base_url = config.base_url.rstrip("/").removesuffix("/v1")
    client = HttpClient(
        base_url,
        provider=config.provider,
        expert=config.name,
        api_key=_read_key(config),
        timeout_s=config.timeout_s,
        attempt_timeout_s=config.attempt_timeout_s,
        max_retries=config.max_retries,
    )
    return LlamaCppExpert(
        config.name,
        client,
        identity=("llamacpp", config.identity or f"{base_url} {config.model or ''}"),
        model=config.model,
        system=config.system,
        tokenizer=load_chat_tokenizer(config.tokenizer) if config.tokenizer else None,
        cache=cache,
        max_prompts=config.max_prompts,
    )


def _read_key(config: ExpertConfig) -> str | None:
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env)
    if not key:
        raise AuthenticationError(f"the environment variable {config.api_key_env!r} is not set", expert=config.name)
    return key
