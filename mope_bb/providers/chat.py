"""OpenAI's chat completions: OpenAI, Azure, Mistral, DeepSeek, OpenRouter, vLLM and others; see `dialects.CHAT`.

The endpoint renders its own template: the conversation is sent as messages, and the answer so far as a last message of
the assistant, which each dialect has its own way to leave open. Some have none: they give first tokens only.

Pitfalls that are handled here (each has a test):

- An empty last message is never sent: llama.cpp then leaves out the header of the answer.
- `logprobs: null`, no lists, and logprobs of the drawn token only, with status 200, are errors that say what to do.
- A model that thinks first answers with a thought, or with nothing: that is its own error.
- vLLM cuts the list to k with the drawn token in front: at temperature 0 nothing is lost.
- DeepSeek takes logprobs after the temperature: 1 is sent, and wherever it is not known whether they are.
- Where the end of the answer is not listed, it counts only where it is the most probable piece, not where it was drawn.
- `mope-bb serve` writes the end as the token without bytes: a text that looks like an end is none there.
- llama.cpp tells the end by its id alone, so it needs a tokenizer; half characters cost it the list, so a harmless
  token is forced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import orjson

from mope_bb.cache import DistributionCache
from mope_bb.chat_tokenizer import ChatTokenizer, as_openai, load_chat_tokenizer
from mope_bb.config import ExpertConfig
from mope_bb.errors import (
    AlignmentError,
    ConfigError,
    LogprobsUnavailableError,
    MalformedResponseError,
    RequestError,
)
from mope_bb.failures import shown
from mope_bb.providers.base import Capabilities
from mope_bb.providers.connect import read_key, required_model, required_url
from mope_bb.providers.dialects import CHAT, ChatDialect
from mope_bb.providers.drawing import ENDED, DrawAsk, check_num_drawn, parse_drawn_ids
from mope_bb.providers.endpoint import Ask
from mope_bb.providers.text_endpoint import TextEndpoint
from mope_bb.providers.wire import PieceReader, Reply, parse_openai_logprobs, parse_usage
from mope_bb.types import Message

if TYPE_CHECKING:
    from mope_bb.openai_client import OpenAIClient

FORCE_BIAS: Final = 100.0
"""OpenAI's range of `logit_bias` ends here; it is enough, since no logit of a model is that large."""
MAX_DRAWS: Final = 16
"""How often a list is asked for where the end was drawn although another piece is more probable: each draw hits the
end with a probability below one half."""
OUR_FIELDS: Final = frozenset(
    ("model", "messages", "logprobs", "top_logprobs", "max_tokens", "max_completion_tokens", "n", "stream")
)
"""What `extra_body` must not set: the adapter lives on them."""
_THINKS_HINT: Final = (
    "Turn thinking off with `extra_body`: {chat_template_kwargs = {enable_thinking = false}} for vLLM, SGLang and "
    'llama.cpp, {reasoning_effort = "none"} for OpenAI; or take a model that does not think.'
)


def build_request(
    messages: Sequence[Message],
    answer: str,
    ask: Ask,
    *,
    dialect: ChatDialect,
    model: str,
    extra_body: Mapping[str, Any] | None = None,
    with_ids: bool = False,
    forced_id: int | None = None,
) -> dict[str, Any]:
    """The body of one question. `with_ids`: see `ChatDialect.id_fields`; `forced_id`: see `ChatDialect.forces_token`.

    Fields of `extra_body` come on top, tables merged with tables; only a temperature of `ask` goes before its own.
    """
    body = {
        **_conversation(messages, answer, dialect=dialect, model=model),
        dialect.max_tokens_field: ask.num_tokens,
        "temperature": dialect.temperature,
        "logprobs": True,
        "top_logprobs": ask.top_k,
        **dialect.extra,
        **(dialect.id_fields if with_ids else {}),
    }
    if forced_id is not None:
        body["logit_bias"] = {str(forced_id): FORCE_BIAS}
    body = _merged(body, extra_body or {})
    if ask.temperature is not None:
        body["temperature"] = ask.temperature
    return body


def build_draw_request(
    messages: Sequence[Message],
    answer: str,
    ask: DrawAsk,
    *,
    dialect: ChatDialect,
    model: str,
    extra_body: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The body of a question for what the endpoint draws, without logprobs; `extra_body` changes no probability."""
    body = {
        **_conversation(messages, answer, dialect=dialect, model=model),
        dialect.max_tokens_field: ask.num_tokens,
        **dialect.extra,
        **dialect.shows_drawn,
    }
    sampling = {"temperature": ask.temperature, "top_p": 1.0, **dialect.nothing_filtered}
    return _merged(body, extra_body or {}) | sampling


def _conversation(messages: Sequence[Message], answer: str, *, dialect: ChatDialect, model: str) -> dict[str, Any]:
    """The fields that say what is to be continued."""
    body: dict[str, Any] = {"model": model, "messages": [as_openai(message) for message in messages]}
    if answer:
        assert dialect.prefill != "none"  # TextEndpoint refuses it
        flag = {"prefix": True} if dialect.prefill == "prefix" else {}
        body["messages"].append({"role": "assistant", "content": answer, **flag})
        if dialect.prefill == "continue_final_message":
            body |= {"continue_final_message": True, "add_generation_prompt": False}
    return body


def _merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for name, value in extra.items():
        old = found.get(name)
        found[name] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return found


def parse_response(data: Any, reader: PieceReader, *, expert: str, answer: str = "", hint: str | None = None) -> Reply:
    """What a chat completion says. `answer` is the answer so far, which some endpoints repeat; `hint` is what to do
    where there are no logprobs. Raises LogprobsUnavailableError or MalformedResponseError.
    """
    choice = _choice(data, expert)
    prompt_tokens = parse_usage(data)
    has_ended = choice.get("finish_reason") == "stop"
    logprobs = choice.get("logprobs")
    if _lists_nothing(logprobs):
        message = choice.get("message")
        message = message if isinstance(message, dict) else {}
        if _thinks(message, data):
            raise LogprobsUnavailableError(
                "the model thinks before it answers, and its answer has no logprobs", hint=_THINKS_HINT, expert=expert
            )
        if has_ended and (logprobs is not None or (message.get("content") or "") in ("", answer)):
            return Reply((), prompt_tokens, has_ended=True)
        raise LogprobsUnavailableError(
            f"the endpoint answered without logprobs (finish_reason {shown(choice.get('finish_reason'))})",
            hint=hint,
            expert=expert,
        )
    positions = parse_openai_logprobs(_with_lists(logprobs, hint=hint, expert=expert), reader, expert=expert)
    return Reply(positions, prompt_tokens, has_ended, text=_new_text(choice, answer))


def parse_draw(data: Any, *, dialect: ChatDialect, num_tokens: int, expert: str, answer: str = "") -> Reply:
    """What was drawn, at most `num_tokens`; `answer` is the answer so far. Raises MalformedResponseError, or
    AlignmentError for a thought, and for more than was asked for.
    """
    choice = _choice(data, expert)
    message = choice.get("message")
    if isinstance(message, dict) and _thinks(message, data):
        raise AlignmentError(f"expert {expert!r} thinks before it answers", hint=_THINKS_HINT)
    check_num_drawn(data, num_tokens, expert=expert)
    return Reply(
        (),
        parse_usage(data),
        has_ended=choice.get("finish_reason") in ENDED,
        text=_new_text(choice, "" if dialect.repeats_answer is False else answer),
        token_ids=parse_drawn_ids(choice, expert=expert),
    )


def _new_text(choice: Mapping[str, Any], answer: str) -> str | None:
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    return content.removeprefix(answer) if isinstance(content, str) else None


def _choice(data: Any, expert: str) -> Mapping[str, Any]:
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise MalformedResponseError(f"the reply has not one element of `choices`: {shown(data)}", expert=expert)
    return choices[0]


def _lists_nothing(logprobs: Any) -> bool:
    """Null, or an object with nothing in either of its two shapes."""
    return logprobs is None or (
        isinstance(logprobs, dict) and logprobs.get("content") in (None, []) and logprobs.get("tokens") in (None, [])
    )


def _with_lists(logprobs: Any, *, hint: str | None, expert: str) -> Any:
    """`logprobs`, if the first token has a list. Raises LogprobsUnavailableError if only its own number is given."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    first = content[0] if isinstance(content, list) and content else None
    if isinstance(first, dict) and first.get("top_logprobs") in (None, []):
        message = "the endpoint gives the logprob of the drawn token only"
        raise LogprobsUnavailableError(message, hint=hint, expert=expert)
    return logprobs


def _thinks(message: Mapping[str, Any], data: Mapping[str, Any]) -> bool:
    """The reply holds a thought: as a field of its own, as text, or as a number of hidden tokens."""
    usage = data.get("usage")
    details = usage.get("completion_tokens_details") if isinstance(usage, dict) else None
    content = message.get("content")
    return bool(
        message.get("reasoning_content")
        or message.get("reasoning")
        or (isinstance(content, str) and content.lstrip().startswith("<think>"))
        or (isinstance(details, dict) and details.get("reasoning_tokens"))
    )


class ChatExpert(TextEndpoint):
    """A model behind a chat API."""

    _client: OpenAIClient

    def __init__(
        self,
        name: str,
        client: OpenAIClient,
        dialect: ChatDialect,
        *,
        model: str,
        tokenizer: ChatTokenizer | None = None,
        extra_body: Mapping[str, Any] | None = None,
        address: str | None = None,
        **settings: Any,
    ) -> None:
        """`settings` are those of TextEndpoint; `address` tells which models have one tokenizer, see `ChatDialect`."""
        super().__init__(
            name, capabilities=_capabilities(dialect, tokenizer is not None), tokenizer=tokenizer, **settings
        )
        self._client = client
        self._dialect = dialect
        self._model = model
        self._extra_body = dict(extra_body or {})
        self._address = address
        self._reader = PieceReader(tokenizer, are_pieces=dialect.writes_pieces)
        self._forced_id = tokenizer.encode_text("a")[-1] if dialect.forces_token and tokenizer is not None else None
        self.own_temperature = self._extra_body.get("temperature", dialect.temperature)

    async def ask_text(self, messages: Sequence[Message], answer: str, ask: Ask) -> Reply:
        reply = await self._ask_once(messages, answer, ask)
        if reply.positions or ask.is_draft or self.own_temperature == 0:
            return reply
        # The end was drawn and is on no list. At a temperature that says little: what is the most probable piece?
        greedy = await self._ask_once(messages, answer, replace(ask, temperature=0.0))
        if not greedy.positions:
            return greedy
        for _ in range(MAX_DRAWS):
            reply = await self._ask_once(messages, answer, ask)
            if reply.positions:
                return reply
        raise LogprobsUnavailableError(
            f"the endpoint ended the answer {MAX_DRAWS} times, though not at temperature 0, and listed nothing",
            expert=self.name,
        )

    async def draw_text(self, messages: Sequence[Message], answer: str, ask: DrawAsk) -> Reply:
        body = build_draw_request(
            messages, answer, ask, dialect=self._dialect, model=self._model, extra_body=self._extra_body
        )
        return parse_draw(
            await self._client.chat(body),
            dialect=self._dialect,
            num_tokens=ask.num_tokens,
            expert=self.name,
            answer=answer,
        )

    async def fingerprint(self) -> str:
        if self._tokenizer is None and self._dialect.has_one_tokenizer and self._address is not None:
            return self._address
        return await super().fingerprint()

    async def _ask_once(self, messages: Sequence[Message], answer: str, ask: Ask) -> Reply:
        body = build_request(
            messages,
            answer,
            ask,
            dialect=self._dialect,
            model=self._model,
            extra_body=self._extra_body,
            with_ids=self._tokenizer is not None,
            forced_id=None if ask.is_draft else self._forced_id,
        )
        try:
            data = await self._client.chat(body)
        except (LogprobsUnavailableError, RequestError) as error:
            says_so = isinstance(error, LogprobsUnavailableError) or "nsupported" in error.message
            if self._dialect.hint is not None and says_so and error.hint == error.default_hint:
                error.hint = self._dialect.hint
            raise
        return parse_response(data, self._reader, expert=self.name, answer=answer, hint=self._dialect.hint)


def _capabilities(dialect: ChatDialect, has_tokenizer: bool) -> Capabilities:
    if not dialect.id_fields or has_tokenizer:
        return dialect.capabilities
    return replace(dialect.capabilities, ids_out=False, byte_exact=False)


def open_expert(config: ExpertConfig, cache: DistributionCache | None) -> ChatExpert:
    """Connect to the chat API that `provider` names. Raises ConfigError or AuthenticationError."""
    from mope_bb.openai_client import OpenAIClient

    dialect = CHAT[config.provider]
    _check_settings(config, dialect)
    base_url = required_url(config, dialect.base_url)
    if dialect.base_url is None and not dialect.needs_version and urlsplit(base_url).path == "":
        base_url += "/v1"
    model = required_model(config)
    tokenizer = load_chat_tokenizer(config.tokenizer) if config.tokenizer else None
    # All that changes the distributions changes where they are kept.
    identity = (
        config.provider,
        config.identity or f"{base_url} {model}",
        *([orjson.dumps(config.extra_body, option=orjson.OPT_SORT_KEYS).decode()] if config.extra_body else []),
    )
    client = OpenAIClient(
        base_url,
        provider=config.provider,
        expert=config.name,
        api_key=read_key(config),
        api_version=config.api_version,
        timeout_s=config.timeout_s,
        attempt_timeout_s=config.attempt_timeout_s,
        max_retries=config.max_retries,
        max_in_flight=config.max_in_flight,
    )
    return ChatExpert(
        config.name,
        client,
        dialect,
        model=model,
        extra_body=config.extra_body,
        address=config.identity or base_url,
        identity=identity,
        tokenizer=tokenizer,
        system=config.system,
        cache=cache,
    )


def _check_settings(config: ExpertConfig, dialect: ChatDialect) -> None:
    where = f"expert {config.name!r}: "
    if dialect.needs_version and not config.api_version:
        raise ConfigError(
            f"{where}`api_version` is missing: it stands in every address of Azure's API",
            hint='Copy it from the deployment\'s page, such as "2024-10-21".',
        )
    if config.api_version and not dialect.needs_version:
        raise ConfigError(f"{where}`api_version` is Azure's, provider is {config.provider!r}")
    if dialect.needs_tokenizer and config.tokenizer is None:
        raise ConfigError(
            f"{where}`tokenizer` is missing: this endpoint tells the end of an answer by its token id alone",
            hint='Name the Hugging Face folder or hub name of its model, or use provider = "llamacpp", which asks the '
            "server.",
        )
    if ours := sorted(OUR_FIELDS & config.extra_body.keys()):
        raise ConfigError(f"{where}`extra_body` must not set {ours[0]!r}", hint="The other settings decide on it.")
