"""OpenAI's text completions: vLLM, SGLang, TensorRT-LLM, Fireworks, Together and others; see `dialects.COMPLETIONS`.

Where the endpoint takes token ids the chat template is rendered here, once, and only ids are appended. Elsewhere the
rendered template and the answer are sent as text.

Pitfalls that are handled here (each has a test):

- A list keyed by text loses tokens: vLLM is asked for "token_id:17" keys, and a drawn token that is not among the k
  best comes on top of them.
- Servers put a BOS before texts: where one is sent as text, the template's own is left out.
- A prompt that was cut silently is an error: the endpoint must have read as many tokens as were sent.
- Null logprobs, and logprobs of the drawn token only, are errors.
- An answer that ends at once has no list; `is_guess` says so.
- `transformers serve` gives no logprobs, is greedy unless told otherwise, and hides an end that is the last token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from mope_bb.cache import DistributionCache
from mope_bb.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mope_bb.config import ExpertConfig
from mope_bb.errors import ConfigError, MalformedResponseError, ModelNotFoundError, MopeError
from mope_bb.failures import shown
from mope_bb.providers.connect import load_served_tokenizer, open_client, required_model, required_url
from mope_bb.providers.dialects import COMPLETIONS, CompletionsDialect
from mope_bb.providers.drawing import ENDED, ONE_DRAW, DrawAsk, check_num_drawn, parse_drawn_ids
from mope_bb.providers.endpoint import Ask, IdEndpoint, check_all_read
from mope_bb.providers.text_endpoint import TextEndpoint
from mope_bb.providers.wire import PieceReader, Reply, as_count, in_order, parse_openai_logprobs, parse_usage
from mope_bb.transport import HttpClient
from mope_bb.types import Context, Message, Piece, TokenDistribution

FORCE_BIAS: Final = 100.0
"""OpenAI's range of `logit_bias` ends here; it is enough, since no logit of a model is that large."""
PLAIN_SAMPLING: Final[Mapping[str, Any]] = {
    "top_k": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
"""What is left out of a `generation_config` is taken from the model's own."""


def build_request(
    prompt: str | Sequence[Sequence[int]], ask: Ask, *, dialect: CompletionsDialect, model: str, forced_id: int | None
) -> dict[str, Any]:
    """The body of one question in text, or of one or several in ids. `forced_id`: see `forces_token`."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt if isinstance(prompt, str) else _ids(prompt),
        "max_tokens": ask.num_tokens,
        "temperature": dialect.temperature if ask.temperature is None else ask.temperature,
        **dialect.extra,
    }
    if dialect.logprobs == "number":
        body["logprobs"] = ask.top_k
    else:
        body |= {"logprobs": True, "top_logprobs": ask.top_k}
    if ask.named:
        body["logprob_token_ids"] = list(ask.named)
    if forced_id is not None:
        body["logit_bias"] = {str(forced_id): FORCE_BIAS}
    if ask.is_draft and dialect.capabilities.drafts == "exact":
        body |= dialect.nothing_filtered if ask.seed is None else {**dialect.nothing_filtered, "seed": ask.seed}
    return body


def build_draw_request(
    prompt: str | Sequence[int],
    ask: DrawAsk,
    *,
    dialect: CompletionsDialect,
    model: str,
    end_ids: Collection[int],
) -> dict[str, Any]:
    """The body of a question for what the endpoint draws, without logprobs."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": ask.num_tokens,
        "temperature": ask.temperature,
        "top_p": 1.0,
        **dialect.extra,
        **dialect.nothing_filtered,
        **dialect.shows_drawn,
    }
    if dialect.takes_generation_config:
        # One token more, which is made the end: an answer that has ended before it is then told from one that has not.
        ends = sorted(end_ids)
        config = {**PLAIN_SAMPLING, "do_sample": ask.temperature > 0, "eos_token_id": ends, "forced_eos_token_id": ends}
        body |= {"max_tokens": ask.num_tokens + 1, "generation_config": orjson.dumps(config).decode()}
    return body


def parse_draw(data: Any, *, num_tokens: int, expert: str) -> Reply:
    """What was drawn, at most `num_tokens`. Raises MalformedResponseError or AlignmentError."""
    (choice,) = in_order(_choices(data, expert), 1, expert=expert)
    check_num_drawn(data, num_tokens, expert=expert)
    text = choice.get("text")
    return Reply(
        (),
        parse_usage(data),
        has_ended=choice.get("finish_reason") in ENDED,
        text=text if isinstance(text, str) else None,
        token_ids=parse_drawn_ids(choice, expert=expert),
    )


def _choices(data: Any, expert: str) -> list[Any]:
    if not isinstance(data, dict) or not isinstance(data.get("choices"), list):
        raise MalformedResponseError(f"the reply has no `choices`: {shown(data)}", expert=expert)
    choices: list[Any] = data["choices"]
    return choices


def _ids(prompts: Sequence[Sequence[int]]) -> list[Any]:
    return list(prompts[0]) if len(prompts) == 1 else [list(ids) for ids in prompts]


def parse_choice(choice: Mapping[str, Any], reader: PieceReader, prompt_tokens: int | None, *, expert: str) -> Reply:
    """One element of `choices`. Raises LogprobsUnavailableError or MalformedResponseError."""
    has_ended = choice.get("finish_reason") == "stop"
    logprobs = choice.get("logprobs")
    if logprobs is None and has_ended and not choice.get("text"):
        return Reply((), prompt_tokens, has_ended=True)
    positions = parse_openai_logprobs(logprobs, reader, expert=expert)
    text = choice.get("text")
    return Reply(positions, prompt_tokens, has_ended, text=text if isinstance(text, str) else None)


def parse_response(
    data: Any, readers: PieceReader, num_prompts: int, *, expert: str, num_tokens: int | None = None
) -> list[Reply | MopeError]:
    """The replies to `num_prompts` questions in their order, an error in the place of one that has no list.

    `num_tokens` is how many tokens all prompts have together; where the endpoint counted others, the first reply
    tells its count. Raises MalformedResponseError where it is not one choice for each question.
    """
    choices = _choices(data, expert)
    read = parse_usage(data)
    # The endpoint adds the prompts up, so only for one question its count is that of the question.
    counted = read if num_prompts == 1 else None
    if num_prompts > 1 and None not in (read, num_tokens) and read != num_tokens:
        raise MalformedResponseError(
            f"the endpoint read {read} of {num_tokens} tokens of {num_prompts} prompts", expert=expert
        )
    found: list[Reply | MopeError] = []
    for choice in in_order(choices, num_prompts, expert=expert):
        try:
            found.append(parse_choice(choice, readers, counted, expert=expert))
        except MopeError as error:
            found.append(error)
    return found


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model of GET /v1/models."""

    name: str
    root: str | None
    """Its folder or hub name, where the endpoint tells; for a LoRA adapter that of the model it belongs to."""
    max_length: int | None


def parse_models(data: Any, *, expert: str) -> list[ServedModel]:
    """The models that an endpoint lists. Raises MalformedResponseError."""
    try:
        cards = {card["id"]: card for card in data["data"]}
        found = []
        for name, card in cards.items():
            base = cards.get(card.get("parent"), card)
            root = base.get("root")
            if not isinstance(name, str) or not (root is None or isinstance(root, str)):
                raise TypeError("a name that is no text")
            found.append(ServedModel(name, root, as_count(base.get("max_model_len"))))
    except (KeyError, TypeError, AttributeError):
        raise MalformedResponseError(f"/models is not as OpenAI's: {shown(data)}", expert=expert) from None
    return found


class IdCompletions(IdEndpoint):
    """A completions endpoint that takes token ids."""

    _client: HttpClient

    def __init__(
        self, name: str, client: HttpClient, dialect: CompletionsDialect, *, model: str | None, **settings: Any
    ) -> None:
        """`settings` are those of IdEndpoint. Without `model` the only one that is served is meant."""
        super().__init__(name, capabilities=dialect.capabilities, **settings)
        self.own_temperature = dialect.temperature
        self._client = client
        self._dialect = dialect
        self._model = model
        self._served: ServedModel | None = None
        self._served_lock = asyncio.Lock()

    async def find_tokenizer(self) -> ChatTokenizer:
        if not self._dialect.tells_tokenizer:
            return await super().find_tokenizer()
        root = (await self._find_model()).root
        if root is None:
            return await super().find_tokenizer()
        return await load_served_tokenizer(root, expert=self.name)

    async def ask_prompts(self, prompts: Sequence[tuple[int, ...]], ask: Ask) -> list[Reply | MopeError]:
        tokenizer = await self.tokenizer()
        forced = self._dialect.forces_token and not ask.is_draft
        body = build_request(
            prompts,
            ask,
            dialect=self._dialect,
            model=await self._model_name(),
            forced_id=tokenizer.encode_text("a")[-1] if forced else None,
        )
        return parse_response(
            await self._client.post_json("/completions", body, num_entries=ask.num_entries(len(prompts))),
            PieceReader(tokenizer),
            len(prompts),
            expert=self.name,
            num_tokens=sum(map(len, prompts)),
        )

    async def draw(self, context: Context, ask: DrawAsk = ONE_DRAW) -> Reply:
        ids = await self.ids_of(context)
        body = build_draw_request(
            ids,
            ask,
            dialect=self._dialect,
            model=await self._model_name(),
            end_ids=(await self.tokenizer()).end_ids,
        )
        data = await self._client.post_json("/completions", body)
        reply = parse_draw(data, num_tokens=body["max_tokens"], expert=self.name)
        check_all_read(reply, len(ids), expert=self.name)
        return reply

    async def score_ids(self, ids: tuple[int, ...], draft: Sequence[Piece], top_k: int) -> Sequence[TokenDistribution]:
        if self.capabilities.score != "echo" or not draft:
            return await super().score_ids(ids, draft, top_k)
        drafted = self.prefixes((), draft)[-1]
        ask = Ask(await self.num_asked(top_k))
        body = build_request(
            [(*ids, *drafted)],
            ask,
            dialect=self._dialect,
            model=await self._model_name(),
            forced_id=None,
        )
        # The last tokens of the prompt come back as if they had been drawn, each with the list that it stood on.
        body["echo_last"] = len(drafted)
        data = await self._client.post_json("/completions", body, num_entries=ask.num_entries(len(drafted) + 1))
        (reply,) = parse_response(data, PieceReader(await self.tokenizer()), 1, expert=self.name)
        if isinstance(reply, MopeError):
            raise reply
        check_all_read(reply, len(ids) + len(drafted), expert=self.name)
        echoed = [position.drawn and position.drawn.token_id for position in reply.positions[:-1]]
        if echoed != list(drafted):
            raise MalformedResponseError(
                f"{len(drafted)} tokens of the prompt were to be echoed, and {echoed} came", expert=self.name
            )
        return await self.build_lists(reply.positions, top_k)

    async def identity(self) -> tuple[str, ...]:
        # Without a name it is whatever is served.
        served = [] if self._model is not None else [await self._model_name()]
        return (*await super().identity(), *served)

    async def _model_name(self) -> str:
        if self._dialect.tells_tokenizer:
            return (await self._find_model()).name
        if self._model is None:
            raise ConfigError(f"expert {self.name!r}: `model` is missing", hint="Name it as the endpoint does.")
        return self._model

    async def _find_model(self) -> ServedModel:
        """What the endpoint serves under our name."""
        async with self._served_lock:
            if self._served is None:
                self._served = choose_model(await self._list_models(), self._model, expert=self.name)
            return self._served

    async def _list_models(self) -> list[ServedModel]:
        return parse_models(await self._client.get_json("/models"), expert=self.name)

    async def served_models(self) -> list[str] | None:
        return [model.name for model in await self._list_models()] if self._dialect.tells_tokenizer else None


def choose_model(models: Sequence[ServedModel], wanted: str | None, *, expert: str) -> ServedModel:
    """The model called `wanted`; without a name the only one. Raises ModelNotFoundError or ConfigError."""
    served = ", ".join(model.name for model in models) or "none"
    if wanted is None:
        if len(models) == 1:
            return models[0]
        raise ConfigError(f"expert {expert!r}: `model` is missing", hint=f"Served there: {served}.")
    for model in models:
        if model.name == wanted:
            return model
    raise ModelNotFoundError(f"no model {wanted!r} is served there", hint=f"Served: {served}.", expert=expert)


class TextCompletions(TextEndpoint):
    """A completions endpoint that takes text: the rendered template, then the answer so far."""

    _client: HttpClient
    takes_plain_text = True

    def __init__(
        self, name: str, client: HttpClient, dialect: CompletionsDialect, *, model: str, **settings: Any
    ) -> None:
        """`settings` are those of TextEndpoint, a tokenizer among them."""
        super().__init__(name, capabilities=dialect.capabilities, **settings)
        self.own_temperature = dialect.temperature
        self._client = client
        self._dialect = dialect
        self._model = model

    async def ask_text(self, messages: Sequence[Message], answer: str, ask: Ask) -> Reply:
        body = build_request(
            self.render(messages, answer), ask, dialect=self._dialect, model=self._model, forced_id=None
        )
        data = await self._client.post_json("/completions", body, num_entries=ask.num_entries())
        reply = parse_response(data, PieceReader(self._tokenizer), 1, expert=self.name)[0]
        if isinstance(reply, MopeError):
            raise reply
        return reply

    async def draw_text(self, messages: Sequence[Message], answer: str, ask: DrawAsk) -> Reply:
        assert self._tokenizer is not None
        body = build_draw_request(
            self.render(messages, answer),
            ask,
            dialect=self._dialect,
            model=self._model,
            end_ids=self._tokenizer.end_ids,
        )
        data = await self._client.post_json("/completions", body)
        return parse_draw(data, num_tokens=body["max_tokens"], expert=self.name)


def open_expert(config: ExpertConfig, cache: DistributionCache | None) -> IdCompletions | TextCompletions:
    """Connect to `base_url` in the dialect that `provider` names. Raises ConfigError or AuthenticationError."""
    dialect = COMPLETIONS[config.provider]
    if config.logprobs and not dialect.capabilities.gives_lists:
        raise ConfigError(
            f"expert {config.name!r}: {config.provider} gives no logprobs",
            hint="Set `logprobs = false` to use it in chat, or serve the model with an engine that gives them.",
        )
    base_url = required_url(config, dialect.base_url)
    client = open_client(config, base_url if "/v1" in base_url or dialect.base_url else f"{base_url}/v1")
    tokenizer = load_chat_tokenizer(config.tokenizer) if config.tokenizer else None
    identity = (config.provider, config.identity or f"{base_url} {config.model or ''}")
    if dialect.capabilities.ids_in:
        return IdCompletions(
            config.name,
            client,
            dialect,
            model=config.model,
            identity=identity,
            tokenizer=tokenizer,
            system=config.system,
            cache=cache,
            max_prompts=config.max_prompts if dialect.takes_lists else 1,
        )
    if tokenizer is None:
        raise ConfigError(
            f"expert {config.name!r}: `tokenizer` is missing: text completions need the model's chat template",
            hint="Name the Hugging Face folder or hub name of the model's tokenizer, or use a chat provider.",
        )
    return TextCompletions(
        config.name,
        client,
        dialect,
        model=required_model(config),
        identity=identity,
        tokenizer=tokenizer,
        system=config.system,
        cache=cache,
    )
