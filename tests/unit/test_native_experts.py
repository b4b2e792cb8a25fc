"""The adapters of native routes on stand-ins: what is found out first, and what goes over the wire in between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from mope_bb.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mope_bb.config import parse_config
from mope_bb.errors import (
    ConfigError,
    ContextLengthError,
    LogprobsUnavailableError,
    ModelNotFoundError,
    RequestError,
    TopKError,
)
from mope_bb.providers.base import Expert
from mope_bb.providers.ollama import OllamaExpert
from mope_bb.providers.registry import open_expert
from mope_bb.providers.tgi import TgiExpert
from mope_bb.transport import HttpClient
from mope_bb.types import Context, Message, TokenDistribution
from tests.endpoints import native
from tests.endpoints.engine import StandIn, serving
from tests.endpoints.stand_ins import MODEL, StandIns

T = TypeVar("T")
QUESTION = Context((Message("user", "How do I fix a bike?"),))
LONG = Context((Message("user", "bike " * 3000),))


def stand_in(stand_ins: StandIns, provider: str, **settings: Any) -> StandIn:
    """A server of this kind of its own, not yet running."""
    return StandIn(stand_ins.open(provider).engines, native.ROUTES[provider], **settings)


def ask(server: StandIn, provider: str, use: Callable[[Expert], Awaitable[T]], **settings: Any) -> T:
    """Run `use` with an expert that `server` serves."""
    table = {"name": "e", "provider": provider, "base_url": server.url, "max_retries": 0, **settings}

    async def main() -> T:
        expert = open_expert(parse_config({"experts": [table]}).experts[0], None)
        try:
            return await use(expert)
        finally:
            await expert.aclose()

    return asyncio.run(main())


async def best(expert: Expert) -> TokenDistribution:
    """The best pieces of one answer."""
    return await expert.next_tokens(QUESTION, top_k=20)


@pytest.mark.parametrize("provider", ["sglang", "vllm-generate", "ollama", "tgi"])
def test_numbers_are_those_of_the_model(provider: str, stand_ins: StandIns) -> None:
    """Whatever the wire: the values of whole characters are the model's own."""
    folder = stand_ins.table(provider)["tokenizer"]
    with serving(stand_in(stand_ins, provider)) as server:
        found = ask(server, provider, best, model=MODEL, tokenizer=folder)
        engine = server.engines[MODEL]
    row = engine.generate(engine.encode(engine.render([{"role": "user", "content": "How do I fix a bike?"}])), 1)[0]
    assert len(found.pieces) >= 15
    for piece, value in zip(found.pieces, found.logprobs, strict=True):
        token_id = engine.end_id if piece.token_id == -1 else piece.token_id
        assert token_id is not None
        assert value == pytest.approx(row.logprobs[token_id])


def test_sglang_tells_its_tokenizer(stand_ins: StandIns) -> None:
    """Without `model` and `tokenizer` all is found out, once."""

    async def use(expert: Expert) -> None:
        await asyncio.gather(*(expert.next_tokens(QUESTION, top_k=k) for k in (1, 2, 3)))

    with serving(stand_in(stand_ins, "sglang")) as server:
        ask(server, "sglang", use)
        paths = [path for path, _ in server.requests]
    assert paths.count("/model_info") == 1
    assert "/v1/models" not in paths


def test_sglang_serves_an_adapter(stand_ins: StandIns) -> None:
    """A `model` that is an adapter is named in every question; one that nobody serves is an error."""

    def models(server: StandIn, body: Any, request: Any) -> tuple[int, Any]:
        return 200, {"data": [{"id": MODEL, "root": MODEL}, {"id": "kind", "root": "/loras/kind", "parent": MODEL}]}

    with serving(stand_in(stand_ins, "sglang")) as server:
        server.routes = {**server.routes, ("GET", "/v1/models"): models}
        # The stand-in has loaded none, and says so as the real one does.
        with pytest.raises(RequestError, match="kind"):
            ask(server, "sglang", best, model="kind")
        with pytest.raises(ModelNotFoundError, match="other"):
            ask(server, "sglang", best, model="other")
        ask(server, "sglang", best, model=MODEL)
        sent = [body.get("lora_path") for path, body in server.requests if path == "/generate"]
    assert sent == ["kind", None]


def test_sglang_refuses_only_what_is_too_long(stand_ins: StandIns) -> None:
    """A list is refused as a whole for one prompt of it; the others are answered all the same."""

    async def use(expert: Expert) -> list[TokenDistribution | BaseException]:
        contexts = [QUESTION, LONG, QUESTION.extended((await best(expert)).pieces[0])]
        questions = (expert.next_tokens(context, top_k=5) for context in contexts)
        return await asyncio.gather(*questions, return_exceptions=True)

    with serving(stand_in(stand_ins, "sglang")) as server:
        first, second, third = ask(server, "sglang", use)
        lists = [len(body["input_ids"]) for path, body in server.requests if path == "/generate"]
    assert isinstance(first, TokenDistribution)
    assert isinstance(second, ContextLengthError)
    assert isinstance(third, TokenDistribution)
    assert max(lists) > 1


def test_sglang_that_cuts_prompts_is_caught(stand_ins: StandIns) -> None:
    """`--allow-auto-truncate` answers with status 200: what was read tells."""
    cutting = stand_in(stand_ins, "sglang", faults=frozenset({"truncating"}))
    with serving(cutting), pytest.raises(ContextLengthError, match=r"read \d+ of \d+ tokens"):
        ask(cutting, "sglang", lambda expert: expert.next_tokens(LONG, top_k=5))


def test_vllm_without_scale_out_names_the_flag(stand_ins: StandIns) -> None:
    """Not a matter of keys, as the status says."""
    closed = stand_in(stand_ins, "vllm-generate", faults=frozenset({"no scale-out"}))
    with serving(closed), pytest.raises(RequestError, match="Scale-out") as caught:
        ask(closed, "vllm-generate", best)
    assert "--enable-scale-out" in str(caught.value.hint)
    assert caught.value.expert == "e"


def test_tgi_tells_its_limit(stand_ins: StandIns) -> None:
    """A list longer than the server gives is refused with the number it gives."""
    folder = stand_ins.table("tgi")["tokenizer"]
    with serving(stand_in(stand_ins, "tgi", max_logprobs=5)) as server, pytest.raises(TopKError) as caught:
        ask(server, "tgi", best, tokenizer=folder)
    assert "top_k = 5" in str(caught.value.hint)


@pytest.mark.parametrize("provider", ["ollama", "tgi"])
def test_the_template_must_be_known(provider: str) -> None:
    """Who is sent rendered text needs a tokenizer."""
    table = {"name": "e", "provider": provider, "base_url": "http://127.0.0.1:1", "model": "m"}
    with pytest.raises(ConfigError, match="`tokenizer` is missing"):
        open_expert(parse_config({"experts": [table]}).experts[0], None)


@pytest.mark.parametrize(
    ("provider", "kind", "field"), [("ollama", OllamaExpert, "prompt"), ("tgi", TgiExpert, "inputs")]
)
def test_bos_is_left_to_the_server(provider: str, kind: type[Any], field: str, stand_ins: StandIns) -> None:
    """A template that begins with the BOS is sent without it, since the server puts one before every text."""
    tokenizer = load_chat_tokenizer(str(stand_ins.table(provider)["tokenizer"]))._tokenizer
    tokenizer.bos_token = "<|system|>"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    settings = {"identity": ("x",), "tokenizer": ChatTokenizer(tokenizer, source="x")}
    settings |= {"model": MODEL} if kind is OllamaExpert else {}

    async def main(url: str) -> None:
        client = HttpClient(url, provider=provider, expert="e", max_retries=0)
        expert = kind("e", client, **settings)
        await expert.next_tokens(QUESTION, top_k=5)
        await expert.aclose()

    with serving(stand_in(stand_ins, provider)) as server:
        asyncio.run(main(server.url))
        ((_, body),) = server.requests
    assert body[field] == "<|user|>How do I fix a bike?<|end|><|assistant|>"


@pytest.mark.parametrize("provider", ["sglang", "vllm-generate", "ollama", "tgi", "gemini"])
def test_no_logprobs_is_an_error(provider: str, stand_ins: StandIns) -> None:
    """An endpoint that gives none is told from one that fails."""
    folder = stand_ins.table(provider)["tokenizer"]
    path = native.BASE_PATHS.get(provider, "")
    server = stand_in(stand_ins, provider, faults=frozenset({"null"}))
    with serving(server), pytest.raises(LogprobsUnavailableError):
        ask(server, provider, best, base_url=server.url + path, model=MODEL, tokenizer=folder)
