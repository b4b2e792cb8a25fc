"""Text Generation Inference, `/generate`: text in, ids out.

Pitfalls that are handled here (each has a test):

- Logprobs are taken after temperature and filters: a greedy request without a temperature gives the model's own.
- `top_n_tokens` is refused above the server's `--max-top-n-tokens`, 5 by default; where values are equal more come.
- The end of the answer has no text of its own, only its id and `special`: ids tell.
- A BOS is put before every text (`add_special_tokens` cannot be set over HTTP), so the template's own is left out.
- A prompt that is too long is a 422 in TGI's own words.
- Without top tokens (`details` ignored by something in between) there is no list, which is an error.
- `model` is not sent: the server has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mope_bb.cache import DistributionCache
from mope_bb.chat_tokenizer import load_chat_tokenizer
from mope_bb.config import ExpertConfig
from mope_bb.errors import ConfigError, LogprobsUnavailableError, MalformedResponseError
from mope_bb.failures import shown
from mope_bb.providers.connect import open_client, required_url
from mope_bb.providers.dialects import NATIVE
from mope_bb.providers.drawing import DrawAsk
from mope_bb.providers.endpoint import Ask
from mope_bb.providers.text_endpoint import TextEndpoint
from mope_bb.providers.wire import PieceReader, Reply, build_position, checked_id, checked_logprob, refuse_repeated
from mope_bb.transport import HttpClient
from mope_bb.types import Message, Piece


def build_request(prompt: str, ask: Ask) -> dict[str, Any]:
    """The body of one question."""
    body = build_draw_request(prompt, DrawAsk(ask.num_tokens, ask.temperature or 0.0))
    return {**body, "parameters": {**body["parameters"], "top_n_tokens": ask.top_k}}


def build_draw_request(prompt: str, ask: DrawAsk) -> dict[str, Any]:
    """The body of a question for what the endpoint draws, without lists."""
    parameters: dict[str, Any] = {"max_new_tokens": ask.num_tokens, "details": True, "do_sample": False}
    if ask.temperature:  # 0 is refused, and so is a top_p of 1
        parameters |= {"do_sample": True, "temperature": ask.temperature}
    return {"inputs": prompt, "parameters": parameters}


def parse_reply(data: Any, reader: PieceReader, *, expert: str) -> Reply:
    """The reply to one question. Raises LogprobsUnavailableError or MalformedResponseError."""
    if not isinstance(data, dict) or "generated_text" not in data:
        raise MalformedResponseError(f"the reply has no `generated_text`: {shown(data)}", expert=expert)
    details = data.get("details")
    try:
        if details is None or not details.get("top_tokens"):
            raise LogprobsUnavailableError("the server answered without `details.top_tokens`", expert=expert)
        positions = tuple(
            build_position(_read_list(top, reader), _read(token, reader), has_ids=True)
            for token, top in zip(details["tokens"], details["top_tokens"], strict=True)
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MalformedResponseError(f"`details` is not as TGI writes it: {shown(error)}", expert=expert) from None
    return Reply(positions, has_ended=details.get("finish_reason") == "eos_token")


def parse_draw(data: Any, *, expert: str) -> Reply:
    """What was drawn, without lists. Raises MalformedResponseError."""
    try:
        details, text = data["details"], data["generated_text"]
        ids = tuple(checked_id(token["id"]) for token in details["tokens"])
        if not isinstance(text, str):
            raise ValueError(f"generated_text {shown(text)}")
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedResponseError(f"the reply is not as TGI writes it: {shown(error)}", expert=expert) from None
    return Reply((), has_ended=details.get("finish_reason") == "eos_token", text=text, token_ids=ids)


def _read_list(tokens: Sequence[Any], reader: PieceReader) -> list[tuple[Piece | None, float | None]]:
    refuse_repeated([token["id"] for token in tokens])
    return [_read(token, reader) for token in tokens]


def _read(token: Mapping[str, Any], reader: PieceReader) -> tuple[Piece | None, float | None]:
    return reader.read(None, token_id=checked_id(token["id"])), checked_logprob(token["logprob"])


class TgiExpert(TextEndpoint):
    """A model behind Text Generation Inference."""

    _client: HttpClient
    takes_plain_text = True

    def __init__(self, name: str, client: HttpClient, **settings: Any) -> None:
        """`settings` are those of TextEndpoint, a tokenizer among them."""
        super().__init__(name, capabilities=NATIVE["tgi"].capabilities, **settings)
        self._client = client

    async def ask_text(self, messages: Sequence[Message], answer: str, ask: Ask) -> Reply:
        body = build_request(self.render(messages, answer), ask)
        data = await self._client.post_json("/generate", body, num_entries=ask.num_entries())
        return parse_reply(data, PieceReader(self._tokenizer), expert=self.name)

    async def draw_text(self, messages: Sequence[Message], answer: str, ask: DrawAsk) -> Reply:
        data = await self._client.post_json("/generate", build_draw_request(self.render(messages, answer), ask))
        return parse_draw(data, expert=self.name)


def open_expert(config: ExpertConfig, cache: DistributionCache | None) -> TgiExpert:
    """Connect to `base_url`, with or without "/v1". Raises ConfigError or AuthenticationError."""
    base_url = required_url(config).removesuffix("/v1")
    if config.tokenizer is None:
        raise ConfigError(
            f"expert {config.name!r}: `tokenizer` is missing: TGI is sent the rendered chat template",
            hint="Name the Hugging Face folder or hub name of the model that is served there.",
        )
    return TgiExpert(
        config.name,
        open_client(config, base_url),
        identity=(config.provider, config.identity or f"{base_url} {config.model or ''}"),
        tokenizer=load_chat_tokenizer(config.tokenizer),
        system=config.system,
        cache=cache,
    )
