"""vLLM's `/inference/v1/generate`: ids in, int ids out, for a server that is started with `--enable-scale-out`.

Pitfalls that are handled here (each has a test):

- Without that flag the route answers 403, which says nothing about keys: the error names the flag.
- The list is cut to k entries with the drawn token first; at temperature 0 that is the best one, so nothing is lost. A
  drawn token that has no value is written as -9999 with an empty list.
- -inf is written as -9999.
- One prompt a request; a prompt that was cut is an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from mope_bb.cache import DistributionCache
from mope_bb.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mope_bb.config import ExpertConfig
from mope_bb.errors import (
    AuthenticationError,
    MalformedResponseError,
    MopeError,
    ProviderError,
    RequestError,
)
from mope_bb.failures import shown
from mope_bb.providers.completions import ServedModel, choose_model, parse_models
from mope_bb.providers.connect import load_served_tokenizer, open_client, required_url
from mope_bb.providers.dialects import NATIVE
from mope_bb.providers.endpoint import Ask, IdEndpoint
from mope_bb.providers.wire import PieceReader, Reply, in_order, parse_openai_logprobs, parse_usage
from mope_bb.transport import HttpClient

ROUTE: Final = "/inference/v1/generate"


def build_request(ids: Sequence[int], ask: Ask, *, model: str) -> dict[str, Any]:
    """The body of one question."""
    return {
        "model": model,
        "token_ids": list(ids),
        "sampling_params": {
            "max_tokens": ask.num_tokens,
            "temperature": ask.temperature or 0.0,
            "logprobs": len(ask.named) or ask.top_k,
            **({"logprob_token_ids": list(ask.named)} if ask.named else {}),
        },
        "output_mode": "tokens",
    }


def parse_reply(data: Any, reader: PieceReader, *, expert: str) -> Reply:
    """The reply to one question. Raises LogprobsUnavailableError or MalformedResponseError."""
    if not isinstance(data, dict) or not isinstance(data.get("choices"), list):
        raise MalformedResponseError(f"the reply has no `choices`: {shown(data)}", expert=expert)
    choice = in_order(data["choices"], 1, expert=expert)[0]
    # Entries are those of a chat, with `token_id` in place of `token` and `bytes`.
    positions = parse_openai_logprobs(choice.get("logprobs"), reader, expert=expert)
    return Reply(positions, parse_usage(data), has_ended=choice.get("finish_reason") == "stop")


def explain_refusal(error: AuthenticationError) -> ProviderError:
    """A 403 of a server without scale-out as what it is; any other error as it came."""
    if error.status_code != 403 or "scale-out" not in error.message.lower():
        return error
    return RequestError(
        error.message,
        hint='Start vLLM with --enable-scale-out, or set provider = "vllm", which needs no flag.',
        provider=error.provider,
        expert=error.expert,
        status_code=error.status_code,
        request_id=error.request_id,
    )


class VllmGenerateExpert(IdEndpoint):
    """A model, or a LoRA adapter of it, behind vLLM's route for token ids."""

    _client: HttpClient

    def __init__(self, name: str, client: HttpClient, *, model: str | None = None, **settings: Any) -> None:
        """`settings` are those of IdEndpoint. Without `model` the only one that is served is meant."""
        super().__init__(name, capabilities=NATIVE["vllm-generate"].capabilities, **settings)
        self._client = client
        self._model = model
        self._served: ServedModel | None = None
        self._served_lock = asyncio.Lock()

    async def find_tokenizer(self) -> ChatTokenizer:
        root = (await self._find_model()).root
        if root is None:
            return await super().find_tokenizer()
        return await load_served_tokenizer(root, expert=self.name)

    async def ask_prompts(self, prompts: Sequence[tuple[int, ...]], ask: Ask) -> list[Reply | MopeError]:
        (ids,) = prompts
        reader = PieceReader(await self.tokenizer())
        body = build_request(ids, ask, model=(await self._find_model()).name)
        try:
            data = await self._client.post_json(ROUTE, body, num_entries=ask.num_entries())
        except AuthenticationError as error:
            raise explain_refusal(error) from None
        return [parse_reply(data, reader, expert=self.name)]

    async def identity(self) -> tuple[str, ...]:
        # Without a name it is whatever is served.
        served = [] if self._model is not None else [(await self._find_model()).name]
        return (*await super().identity(), *served)

    async def _find_model(self) -> ServedModel:
        async with self._served_lock:
            if self._served is None:
                models = parse_models(await self._client.get_json("/v1/models"), expert=self.name)
                self._served = choose_model(models, self._model, expert=self.name)
            return self._served

    async def served_models(self) -> list[str] | None:
        return [model.name for model in parse_models(await self._client.get_json("/v1/models"), expert=self.name)]


def open_expert(config: ExpertConfig, cache: DistributionCache | None) -> VllmGenerateExpert:
    """Connect to `base_url`, with or without "/v1". Raises ConfigError or AuthenticationError."""
    base_url = required_url(config).removesuffix("/v1")
    return VllmGenerateExpert(
        config.name,
        open_client(config, base_url),
        model=config.model,
        identity=(config.provider, config.identity or f"{base_url} {config.model or ''}"),
        tokenizer=load_chat_tokenizer(config.tokenizer) if config.tokenizer else None,
        system=config.system,
        cache=cache,
    )
