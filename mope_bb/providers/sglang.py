"""SGLang's native `/generate`: ids in and out, lists of prompts, any k.

Pitfalls that are handled here (each has a test):

- Logprobs follow the temperature, but a greedy request is computed at 1: at 0 and at 1 they are the model's own. A
  server older than that writes one 0 and -3.4e38, which is an error.
- Entries are triples of logprob, id and text; only ids are read, so that no text needs to be written (it is null).
- What the scheduler gives up comes with status 200 and `finish_reason.type` "abort": an error, and only that prompt's.
- A server with `--allow-auto-truncate` cuts prompts silently: it must have read as many tokens as were sent.
- GET /model_info tells where the tokenizer is. `root` of GET /v1/models does not, it repeats the served name; but an
  adapter (LoRA) is known by its `parent` there, and is named in `lora_path`, since `/generate` has no `model`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from mope_bb.cache import DistributionCache
from mope_bb.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mope_bb.config import ExpertConfig
from mope_bb.errors import LogprobsUnavailableError, MalformedResponseError, MopeError
from mope_bb.failures import classify_status, readable, shown
from mope_bb.providers.completions import choose_model, parse_models
from mope_bb.providers.connect import load_served_tokenizer, open_client, required_url
from mope_bb.providers.dialects import NATIVE
from mope_bb.providers.endpoint import Ask, IdEndpoint, check_all_read
from mope_bb.providers.wire import PieceReader, Reply, build_position, checked_id, checked_logprob, refuse_repeated
from mope_bb.transport import HttpClient
from mope_bb.types import Piece, TokenDistribution

NOTHING_FILTERED: Final[Mapping[str, Any]] = {
    "top_k": -1,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Settings that a model's generation_config may have otherwise."""


def build_request(prompts: Sequence[Sequence[int]], ask: Ask, *, adapter: str | None = None) -> dict[str, Any]:
    """The body of one or several questions; `adapter` is the name of a LoRA adapter that is served."""
    sampling = {"max_new_tokens": ask.num_tokens, "temperature": ask.temperature or 0.0}
    body: dict[str, Any] = {
        "input_ids": [list(ids) for ids in prompts],
        "sampling_params": {**sampling, **NOTHING_FILTERED} if ask.is_draft else sampling,
        "return_logprob": True,
        "top_logprobs_num": ask.top_k,
        # Of the answer only: any other start costs the prefix cache from there on.
        "logprob_start_len": -1,
        "return_text_in_logprobs": False,
    }
    return body if adapter is None else body | {"lora_path": adapter}


def build_score_request(ids: Sequence[int], draft: Sequence[int], top_k: int, adapter: str | None) -> dict[str, Any]:
    """The body of a question for the lists after `ids` and along `draft`: the prefix cache is used up to its start."""
    body = build_request([(*ids, *draft)], Ask(top_k), adapter=adapter)
    return body | {"logprob_start_len": len(ids) - 1}


def parse_scores(data: Any, draft: Sequence[int], reader: PieceReader, *, expert: str) -> Reply:
    """The positions after every prefix of `draft`, from the reply to its question. Raises a ProviderError.

    Rows of the input begin with one that is null; then come those of the draft's tokens, and the output's own.
    """
    (reply,) = parse_response(data, reader, 1, expert=expert)
    if isinstance(reply, MopeError):
        raise reply
    meta = data[0]["meta_info"] if isinstance(data, list) else data["meta_info"]
    try:
        given, tops = meta["input_token_logprobs"], meta["input_top_logprobs"]
        if [token_id for _, token_id, _ in given[1:]] != list(draft) or len(tops) != len(given):
            raise ValueError(f"{len(tops)} lists of {len(given)} input tokens for a draft of {len(draft)}")
        scored = [
            build_position(_read_list(top, reader), _read(one, reader), has_ids=True)
            for one, top in zip(given[1:], tops[1:], strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedResponseError(
            f"the input's logprobs are not as SGLang writes them: {shown(error)}", expert=expert
        ) from None
    return replace(reply, positions=(*scored, *reply.positions))


def parse_reply(data: Any, reader: PieceReader, *, expert: str) -> Reply:
    """The reply to one prompt. Raises a ProviderError."""
    try:
        meta = data["meta_info"]
        finish, prompt_tokens = meta.get("finish_reason") or {}, meta["prompt_tokens"]
        if type(prompt_tokens) is not int:
            raise ValueError(f"prompt_tokens {shown(prompt_tokens)}")
        if finish.get("type") == "abort":
            raise _aborted(finish, expert)
        drawn, tops = meta.get("output_token_logprobs"), meta.get("output_top_logprobs")
        if not drawn or not tops or None in tops:
            raise LogprobsUnavailableError("the server answered without lists of logprobs", expert=expert)
        positions = tuple(
            build_position(_read_list(top, reader), _read(one, reader), has_ids=True)
            for one, top in zip(drawn, tops, strict=True)
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MalformedResponseError(f"`meta_info` is not as SGLang writes it: {shown(error)}", expert=expert) from None
    return Reply(positions, prompt_tokens, has_ended=finish.get("type") == "stop")


def _read_list(triples: Sequence[Sequence[Any]], reader: PieceReader) -> list[tuple[Piece | None, float | None]]:
    refuse_repeated([token_id for _, token_id, _ in triples])
    return [_read(triple, reader) for triple in triples]


def _read(triple: Sequence[Any], reader: PieceReader) -> tuple[Piece | None, float | None]:
    logprob, token_id, _ = triple
    return reader.read(None, token_id=checked_id(token_id)), checked_logprob(logprob)


def _aborted(finish: Mapping[str, Any], expert: str) -> MopeError:
    message, status = finish.get("message"), finish.get("status_code")
    reason = readable(message) if isinstance(message, str) and message else "no reason given"
    kind, hint = classify_status(status if type(status) is int else 500, reason.encode())
    return kind(f"the server gave the request up: {reason}", hint=hint, expert=expert)


def parse_response(data: Any, reader: PieceReader, num_prompts: int, *, expert: str) -> list[Reply | MopeError]:
    """The replies in the order of the prompts, an error in the place of one that has no list.

    Raises MalformedResponseError where it is not one reply for each prompt.
    """
    replies = [data] if isinstance(data, dict) and num_prompts == 1 else data
    if not isinstance(replies, list) or len(replies) != num_prompts:
        count = f"{len(replies)} replies" if isinstance(replies, list) else type(replies).__name__
        raise MalformedResponseError(
            f"{num_prompts} prompts were answered by {count}, expected one for each", expert=expert
        )
    found: list[Reply | MopeError] = []
    for reply in replies:
        try:
            found.append(parse_reply(reply, reader, expert=expert))
        except MopeError as error:
            found.append(error)
    return found


def find_adapter(models: Any, wanted: str, *, expert: str) -> str | None:
    """`wanted` if GET /v1/models lists it as an adapter, None if it is the model itself.

    Raises ModelNotFoundError or MalformedResponseError.
    """
    served = choose_model(parse_models(models, expert=expert), wanted, expert=expert)
    is_adapter = any(card["id"] == served.name and card.get("parent") for card in models["data"])
    return served.name if is_adapter else None


def find_tokenizer_path(model_info: Any, *, expert: str) -> str:
    """Where the tokenizer is, from GET /model_info. Raises MalformedResponseError."""
    if isinstance(model_info, dict):
        path = model_info.get("tokenizer_path") or model_info.get("model_path")
        if isinstance(path, str):
            return path
    raise MalformedResponseError(f"/model_info names no tokenizer: {shown(model_info)}", expert=expert)


class SglangExpert(IdEndpoint):
    """A model, or a LoRA adapter of it, behind SGLang."""

    _client: HttpClient

    def __init__(self, name: str, client: HttpClient, *, model: str | None = None, **settings: Any) -> None:
        """`settings` are those of IdEndpoint. Without `model` no adapter is used."""
        super().__init__(name, capabilities=NATIVE["sglang"].capabilities, **settings)
        self._client = client
        self._model = model
        self._adapter: str | None = None
        self._has_looked = model is None
        self._look_lock = asyncio.Lock()

    async def find_tokenizer(self) -> ChatTokenizer:
        path = find_tokenizer_path(await self._client.get_json("/model_info"), expert=self.name)
        return await load_served_tokenizer(path, expert=self.name)

    async def ask_prompts(self, prompts: Sequence[tuple[int, ...]], ask: Ask) -> list[Reply | MopeError]:
        reader = PieceReader(await self.tokenizer())
        body = build_request(prompts, ask, adapter=await self._find_adapter())
        data = await self._client.post_json("/generate", body, num_entries=ask.num_entries(len(prompts)))
        return parse_response(data, reader, len(prompts), expert=self.name)

    async def score_ids(self, ids: tuple[int, ...], draft: Sequence[Piece], top_k: int) -> Sequence[TokenDistribution]:
        reader, adapter = PieceReader(await self.tokenizer()), await self._find_adapter()
        drafted = self.prefixes((), draft)[-1]
        num_asked = await self.num_asked(top_k)
        body = build_score_request(ids, drafted, num_asked, adapter)
        data = await self._client.post_json("/generate", body, num_entries=num_asked * (len(drafted) + 1))
        reply = parse_scores(data, drafted, reader, expert=self.name)
        check_all_read(reply, len(ids) + len(drafted), expert=self.name)
        return await self.build_lists(reply.positions, top_k)

    async def _find_adapter(self) -> str | None:
        async with self._look_lock:
            if not self._has_looked:
                assert self._model is not None
                models = await self._client.get_json("/v1/models")
                self._adapter = find_adapter(models, self._model, expert=self.name)
                self._has_looked = True
            return self._adapter

    async def served_models(self) -> list[str] | None:
        return [model.name for model in parse_models(await self._client.get_json("/v1/models"), expert=self.name)]


def open_expert(config: ExpertConfig, cache: DistributionCache | None) -> SglangExpert:
    """Connect to `base_url`, with or without "/v1". Raises ConfigError or AuthenticationError."""
    base_url = required_url(config).removesuffix("/v1")
    return SglangExpert(
        config.name,
        open_client(config, base_url),
        model=config.model,
        identity=(config.provider, config.identity or f"{base_url} {config.model or ''}"),
        tokenizer=load_chat_tokenizer(config.tokenizer) if config.tokenizer else None,
        system=config.system,
        cache=cache,
        max_prompts=config.max_prompts,
    )
