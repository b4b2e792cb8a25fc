"""Google's `generateContent`, of the Gemini API and of Vertex in express mode: the first token of an answer only.

Pitfalls that are handled here (each has a test):

- Many models answer 400 "Logprobs is not enabled" (or "supported"): an error of its own.
- The key goes into a header; in the address it would stand in every log.
- A model that thinks spends `maxOutputTokens` on thoughts and has no list: set
  `extra_body = {generationConfig = {thinkingConfig = {thinkingBudget = 0}}}`.
- Whether a last turn of the model is continued is unverified, so only the first token can be asked for.
- A blocked prompt has no candidates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from mope_bb.cache import DistributionCache
from mope_bb.config import ExpertConfig
from mope_bb.errors import LogprobsUnavailableError, MalformedResponseError, RequestError
from mope_bb.failures import shown
from mope_bb.providers.connect import open_client, required_model, required_url
from mope_bb.providers.dialects import NATIVE
from mope_bb.providers.endpoint import Ask
from mope_bb.providers.text_endpoint import TextEndpoint
from mope_bb.providers.wire import PieceReader, Reply, as_count, build_position, checked_logprob, refuse_repeated
from mope_bb.transport import HttpClient
from mope_bb.types import Message, Piece

ROLES: Final[Mapping[str, str]] = {"user": "user", "assistant": "model"}


def build_request(messages: Sequence[Message], ask: Ask, *, extra: Mapping[str, Any], expert: str) -> dict[str, Any]:
    """The body of one question; `extra` adds fields. Raises RequestError for a role that Gemini does not have."""
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    turns = [message for message in messages if message.role != "system"]
    if unknown := [message.role for message in turns if message.role not in ROLES]:
        raise RequestError(f"a message has the role {unknown[0]!r}, Gemini is sent user and assistant", expert=expert)
    settings = {"maxOutputTokens": ask.num_tokens, "temperature": ask.temperature or 0.0}
    settings |= {"responseLogprobs": True, "logprobs": ask.top_k} | extra.get("generationConfig", {})
    body = {"contents": [{"role": ROLES[turn.role], "parts": [{"text": turn.content}]} for turn in turns]}
    instruction = {"systemInstruction": {"parts": [{"text": system}]}} if system else {}
    return {**body, **instruction, **extra, "generationConfig": settings}


def parse_reply(data: Any, reader: PieceReader, *, expert: str) -> Reply:
    """The reply to one question. Raises a ProviderError."""
    try:
        if blocked := data.get("promptFeedback", {}).get("blockReason"):
            raise RequestError(f"Gemini blocked the prompt: {shown(blocked)}", expert=expert)
        candidate, usage = data["candidates"][0], data.get("usageMetadata", {})
        num_read, num_thoughts = as_count(usage.get("promptTokenCount")), as_count(usage.get("thoughtsTokenCount"))
        has_ended, result = candidate.get("finishReason") == "STOP", candidate.get("logprobsResult")
        if not result or not result.get("topCandidates"):
            if has_ended and not candidate.get("content", {}).get("parts"):
                return Reply((), num_read, has_ended=True)
            raise _no_logprobs(num_thoughts, expert)
        drawn, tops = result["chosenCandidates"], result["topCandidates"]
        for top in tops:
            # Without ids; two tokens may be of the same text, but hardly of the same logprob.
            refuse_repeated([(one["token"], one["logProbability"]) for one in top["candidates"]])
        positions = tuple(
            build_position([_read(other, reader) for other in top["candidates"]], _read(one, reader), has_ids=False)
            for one, top in zip(drawn, tops, strict=True)
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise MalformedResponseError(f"the reply is not as Gemini writes it: {shown(error)}", expert=expert) from None
    return Reply(positions, num_read, has_ended)


def _read(candidate: Mapping[str, Any], reader: PieceReader) -> tuple[Piece | None, float | None]:
    # `tokenId` is left alone: without the tokenizer, which nobody has, it would hide which tokens end an answer.
    return reader.read(candidate["token"]), checked_logprob(candidate["logProbability"])


def _no_logprobs(num_thoughts: int | None, expert: str) -> LogprobsUnavailableError:
    hint = "Switch thinking off: extra_body = {generationConfig = {thinkingConfig = {thinkingBudget = 0}}}."
    what = f" after {num_thoughts} tokens of thought" if num_thoughts else ""
    return LogprobsUnavailableError(
        f"Gemini answered without logprobs{what}", hint=hint if num_thoughts else None, expert=expert
    )


def _as_text(extra: Mapping[str, Any]) -> tuple[str, ...]:
    return (json.dumps(extra, sort_keys=True),) if extra else ()


class GeminiExpert(TextEndpoint):
    """A model of Google's, of which the first token of an answer can be seen."""

    _client: HttpClient

    def __init__(self, name: str, client: HttpClient, *, model: str, extra: Mapping[str, Any], **settings: Any) -> None:
        """`settings` are those of TextEndpoint."""
        super().__init__(name, capabilities=NATIVE["gemini"].capabilities, **settings)
        self._client, self._model, self._extra = client, model, extra

    async def ask_text(self, messages: Sequence[Message], answer: str, ask: Ask) -> Reply:
        body = build_request(messages, ask, extra=self._extra, expert=self.name)
        route = f"/models/{self._model}:generateContent"
        data = await self._client.post_json(route, body, num_entries=ask.num_entries())
        return parse_reply(data, PieceReader(None), expert=self.name)


def open_expert(config: ExpertConfig, cache: DistributionCache | None) -> GeminiExpert:
    """Connect to `base_url`, by default the Gemini API. Raises ConfigError or AuthenticationError."""
    base_url, model = required_url(config, NATIVE["gemini"].base_url), required_model(config)
    return GeminiExpert(
        config.name,
        open_client(config, base_url, key_header="x-goog-api-key"),
        model=model,
        extra=config.extra_body,
        identity=(config.provider, config.identity or f"{base_url} {model}", *_as_text(config.extra_body)),
        system=config.system,
        cache=cache,
    )
