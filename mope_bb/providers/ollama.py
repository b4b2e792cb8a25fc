"""Ollama's `/api/generate` in raw mode: the rendered template and the answer as text, at most 20 pieces.

Pitfalls that are handled here (each has a test):

- `raw` keeps Ollama's own template away; `truncate` and `shift` are off, or a long prompt is cut silently.
- The logprobs are the model's own whatever is drawn, but what is drawn decides whether there are any: penalties,
  filters and stop strings of the Modelfile are switched off, so that the best piece is drawn and none is held back.
- A drawn end has no logprobs, only `done_reason` "stop": `is_guess` says so. The end is never on a list.
- A best piece that is half a character has neither text nor logprobs, with `done_reason` "length": an error.
- `bytes` are made from the text: half characters are U+FFFD, control tokens "", and neither names a token.
- Versions before 0.12.11 and Ollama's cloud answer without logprobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from mope_bb.cache import DistributionCache
from mope_bb.chat_tokenizer import load_chat_tokenizer
from mope_bb.config import ExpertConfig
from mope_bb.errors import ConfigError, LogprobsUnavailableError, MalformedResponseError
from mope_bb.failures import shown
from mope_bb.providers.connect import open_client, required_model, required_url
from mope_bb.providers.dialects import NATIVE
from mope_bb.providers.drawing import DrawAsk
from mope_bb.providers.endpoint import Ask
from mope_bb.providers.text_endpoint import TextEndpoint
from mope_bb.providers.wire import REPLACEMENT, PieceReader, Reply, parse_openai_logprobs
from mope_bb.transport import HttpClient
from mope_bb.types import Message

DEFAULT_URL: Final = "http://127.0.0.1:11434"
NOTHING_FILTERED: Final[Mapping[str, Any]] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "stop": [],
}
"""Options that a Modelfile may set otherwise."""


def build_request(prompt: str, ask: Ask, *, model: str) -> dict[str, Any]:
    """The body of one question."""
    body = build_draw_request(prompt, DrawAsk(ask.num_tokens, ask.temperature or 0.0), model=model)
    return body | {"logprobs": True, "top_logprobs": ask.top_k}


def build_draw_request(prompt: str, ask: DrawAsk, *, model: str) -> dict[str, Any]:
    """The body of a question for what the endpoint draws, without logprobs."""
    return {
        "model": model,
        "prompt": prompt,
        "raw": True,
        "stream": False,
        "truncate": False,
        "shift": False,
        "options": {"num_predict": ask.num_tokens, "temperature": ask.temperature, **NOTHING_FILTERED},
    }


def parse_reply(data: Any, reader: PieceReader, *, expert: str) -> Reply:
    """The reply to one question. Raises LogprobsUnavailableError or MalformedResponseError."""
    drawn = parse_draw(data, expert=expert)
    text, has_ended = drawn.text or "", drawn.has_ended
    logprobs = data.get("logprobs")
    if not logprobs:
        if has_ended and not text:
            return Reply((), has_ended=True)
        raise _no_logprobs(text, expert)
    # What was read (`prompt_eval_count`) leaves out in some versions what was in the cache, so it proves nothing.
    positions = parse_openai_logprobs({"content": logprobs}, reader, expert=expert)
    return Reply(positions, has_ended=has_ended, text=text)


def parse_draw(data: Any, *, expert: str) -> Reply:
    """What was drawn, without lists. Raises MalformedResponseError."""
    text = data.get("response") if isinstance(data, dict) else None
    if not isinstance(text, str):
        raise MalformedResponseError(f"the reply has no text `response`: {shown(data)}", expert=expert)
    return Reply((), has_ended=data.get("done_reason") == "stop", text=text)


def _no_logprobs(text: str, expert: str) -> LogprobsUnavailableError:
    if text.strip(REPLACEMENT):
        return LogprobsUnavailableError(
            f"Ollama answered {text[:20]!r} without logprobs",
            hint="It gives them from version 0.12.11 on, and not for models of its cloud.",
            expert=expert,
        )
    return LogprobsUnavailableError(
        "the most probable piece is half a character or a control token, for which Ollama gives no logprobs",
        hint='Serve the same GGUF file with llama.cpp\'s own server (provider "llamacpp"), which gives them always.',
        expert=expert,
    )


class OllamaExpert(TextEndpoint):
    """A model behind Ollama."""

    _client: HttpClient
    takes_plain_text = True

    def __init__(self, name: str, client: HttpClient, *, model: str, **settings: Any) -> None:
        """`settings` are those of TextEndpoint, a tokenizer among them."""
        super().__init__(name, capabilities=NATIVE["ollama"].capabilities, **settings)
        self._client = client
        self._model = model

    async def ask_text(self, messages: Sequence[Message], answer: str, ask: Ask) -> Reply:
        body = build_request(self.render(messages, answer), ask, model=self._model)
        data = await self._client.post_json("/api/generate", body, num_entries=ask.num_entries())
        return parse_reply(data, PieceReader(self._tokenizer), expert=self.name)

    async def draw_text(self, messages: Sequence[Message], answer: str, ask: DrawAsk) -> Reply:
        body = build_draw_request(self.render(messages, answer), ask, model=self._model)
        return parse_draw(await self._client.post_json("/api/generate", body), expert=self.name)


def open_expert(config: ExpertConfig, cache: DistributionCache | None) -> OllamaExpert:
    """Connect to `base_url`, by default Ollama's on this machine. Raises ConfigError or AuthenticationError."""
    base_url = required_url(config, DEFAULT_URL).removesuffix("/v1").removesuffix("/api")
    model = required_model(config)
    if config.tokenizer is None:
        raise ConfigError(
            f"expert {config.name!r}: `tokenizer` is missing: Ollama is sent the rendered chat template",
            hint="Name the Hugging Face folder or hub name of the tokenizer of the model that was made into the GGUF.",
        )
    return OllamaExpert(
        config.name,
        open_client(config, base_url),
        model=model,
        identity=(config.provider, config.identity or f"{base_url} {model}"),
        tokenizer=load_chat_tokenizer(config.tokenizer),
        system=config.system,
        cache=cache,
    )
