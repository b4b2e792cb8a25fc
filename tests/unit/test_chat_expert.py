"""The chat adapter against stand-ins with a real model: what it asks, and that what comes is the model's own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from mope_bb.cache import DistributionCache
from mope_bb.config import ExpertConfig, parse_config
from mope_bb.errors import AlignmentError, AuthenticationError, PrefillError
from mope_bb.providers.chat import ChatExpert, open_expert
from mope_bb.providers.dialects import CHAT
from mope_bb.providers.endpoint import Ask
from mope_bb.providers.pool import ExpertPool
from mope_bb.types import END, Context, Message, Piece
from tests.endpoints.engine import StandIn
from tests.endpoints.openai_chat import AZURE_KEY, ROUTES
from tests.endpoints.stand_ins import StandIns

T = TypeVar("T")
QUESTION = Context((Message("user", "How do I fix a bike?"),))
ANSWER = QUESTION.extended(Piece(b"Use")).extended(Piece(b" it"))
CONTINUING = [name for name in CHAT if CHAT[name].prefill != "none"]


def configured(provider: str, table: Mapping[str, Any], **more: Any) -> ExpertConfig:
    """One expert's configuration."""
    return parse_config({"experts": [{"name": "e", "provider": provider, **table, **more}]}).experts[0]


def use(config: ExpertConfig, work: Callable[[ChatExpert], Awaitable[T]], cache: DistributionCache | None = None) -> T:
    """Open, work, close."""

    async def main() -> T:
        expert = open_expert(config, cache)
        try:
            return await work(expert)
        finally:
            await expert.aclose()

    return asyncio.run(main())


def expected(stand_in: StandIn, answer: str, top_k: int) -> dict[bytes, float]:
    """What the model itself says after `answer`, in whole characters."""
    engine = stand_in.engines["tiny"]
    ids = engine.encode(engine.render([{"role": "user", "content": "How do I fix a bike?"}]) + answer)
    (drawn,) = engine.generate(ids, 1)
    return {engine.data(token): value for token, value in drawn.top(top_k)}


@pytest.mark.parametrize(
    ("provider", "has_tokenizer"),
    [(name, there) for name in CONTINUING for there in (True, False) if there or not CHAT[name].needs_tokenizer],
)
def test_answer_is_continued(provider: str, has_tokenizer: bool, stand_ins: StandIns) -> None:
    """The numbers are those of the model after the template and the answer so far, with ids or with bytes."""
    stand_in, table = stand_ins.open(provider), stand_ins.table(provider)
    folder = str(stand_in.engines["tiny"].folder)
    config = configured(provider, table | {"tokenizer": folder if has_tokenizer else None})
    found = use(config, lambda expert: expert.next_tokens(ANSWER, top_k=8))
    model = expected(stand_in, "Use it", 9)
    assert len(found.pieces) == 8
    assert found.pieces[0].data == max(model, key=lambda data: model[data])
    for piece, logprob in zip(found.pieces, found.logprobs, strict=True):
        assert model[piece.data] == pytest.approx(logprob, abs=1e-9)
        assert (piece.token_id is not None) == (has_tokenizer or provider == "mistral" or piece == END)


@pytest.mark.parametrize("provider", CONTINUING)
def test_an_answer_left_closed_is_not_continued(provider: str, stand_ins: StandIns) -> None:
    """The stand-ins tell the flags apart: without them another distribution comes, or a refusal, or the same if a last
    message of the assistant is continued anyway."""
    stand_in = stand_ins.open(provider)
    table = stand_ins.table(provider)
    use(configured(provider, table), lambda expert: expert.next_tokens(ANSWER, top_k=8))
    path, body = stand_in.requests[-1]
    first = httpx.post(stand_in.url + path, json=body, trust_env=False).json()
    body.pop("continue_final_message", None)
    body.pop("add_generation_prompt", None)
    body["messages"][-1].pop("prefix", None)
    second = httpx.post(stand_in.url + path, json=body, trust_env=False).json()
    lists = [
        [one["logprob"] for one in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]]
        if "choices" in reply
        else None
        for reply in (first, second)
    ]
    assert lists[0] is not None
    assert (lists[0] == lists[1]) == (CHAT[provider].prefill == "trailing")


@pytest.mark.parametrize("provider", ["openai", "azure", "xai"])
def test_first_tokens_only(provider: str, stand_ins: StandIns) -> None:
    """What answers from the beginning is asked nothing else, and its list is capped at what it gives."""
    stand_in = stand_ins.open(provider)
    config = configured(provider, stand_ins.table(provider))
    found = use(config, lambda expert: expert.next_tokens(QUESTION, top_k=100))
    assert len(found.pieces) == len(expected(stand_in, "", CHAT[provider].capabilities.max_top_k or 0))
    asked = len(stand_in.requests)
    with pytest.raises(PrefillError):
        use(config, lambda expert: expert.next_tokens(ANSWER, top_k=5))
    assert len(stand_in.requests) == asked


@pytest.mark.parametrize("provider", CHAT)
def test_an_empty_answer_adds_no_message(provider: str, stand_ins: StandIns) -> None:
    """llama.cpp would leave out the header of the answer."""
    stand_in = stand_ins.open(provider)
    use(configured(provider, stand_ins.table(provider)), lambda expert: expert.next_tokens(QUESTION, top_k=5))
    assert stand_in.requests[-1][1]["messages"] == [{"role": "user", "content": "How do I fix a bike?"}]


def pool_of(*configs: ExpertConfig) -> ExpertPool:
    """Experts side by side."""
    return ExpertPool(configs, cache=None)


def test_system_prompts_on_one_model_merge(stand_ins: StandIns) -> None:
    """Three experts of one endpoint need no tokenizer: one model has one."""
    table = stand_ins.table("deepseek")
    configs = [configured("deepseek", table, name=name, system=f"Be {name}.") for name in ("brief", "kind", "exact")]

    async def main() -> list[bytes]:
        pool = pool_of(*configs)
        try:
            await pool.open(["brief", "kind", "exact"])
            pool.check_can_continue(["brief", "kind", "exact"])
            lists = await pool.ask(["brief", "kind", "exact"], ANSWER)
        finally:
            await pool.aclose()
        assert len({found.logprobs for found in lists}) == 3
        return [lists[0].pieces[0].data]

    requests = stand_ins.open("deepseek").requests
    before = len(requests)
    asyncio.run(main())
    # Where the end was drawn the same is asked again.
    sent = [body["messages"][0] for _, body in requests[before:]]
    assert {message["content"] for message in sent} == {"Be brief.", "Be kind.", "Be exact."}


@pytest.mark.parametrize(
    ("provider", "changed"),
    [("deepseek", {"model": "other"}), ("openrouter", {"extra_body": {"provider": {"only": ["X"]}}})],
)
def test_different_models_need_a_tokenizer(provider: str, changed: dict[str, Any], stand_ins: StandIns) -> None:
    """Bytes of unknown tokenizers are not merged; the hint says how they can be."""
    table = stand_ins.table(provider)
    configs = [configured(provider, table, name="one"), configured(provider, table | changed, name="two")]

    async def main() -> None:
        pool = pool_of(*configs)
        try:
            await pool.open(["one", "two"])
        finally:
            await pool.aclose()

    with pytest.raises(AlignmentError, match="'one' and 'two'") as caught:
        asyncio.run(main())
    assert "same `tokenizer`" in str(caught.value.hint)


def test_what_changes_the_answer_is_cached_apart(stand_ins: StandIns, tmp_path: Path) -> None:
    """Another provider behind OpenRouter, and pieces with ids, are other entries; what was asked is not asked again."""
    table = stand_ins.table("openrouter")
    folder = str(stand_ins.open("openrouter").engines["tiny"].folder)
    cache = DistributionCache(tmp_path / "cache", max_bytes=2**20)

    async def ask(expert: ChatExpert) -> tuple[int, int | None]:
        found = await expert.next_tokens(QUESTION, top_k=5)
        return expert.num_requests, found.pieces[0].token_id

    pinned = {"extra_body": {"provider": {"only": ["X"]}}}
    for changed, num_requests in (({}, 1), ({}, 0), (pinned, 1), (pinned, 0), ({"tokenizer": folder}, 1)):
        counted, token_id = use(configured("openrouter", table | changed), ask, cache)
        assert counted == num_requests
        assert (token_id is not None) == ("tokenizer" in changed)


@pytest.mark.parametrize(("provider", "key"), [("mistral", "right"), ("azure", AZURE_KEY)])
def test_keys(provider: str, key: str, stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of the named variable is sent as the endpoint wants it; a wrong one is an error of its own."""
    stand_in = stand_ins.open(provider)
    config = configured(provider, stand_ins.table(provider), api_key_env="TEST_KEY")
    with pytest.raises(AuthenticationError, match="TEST_KEY"):
        use(config, lambda expert: expert.next_tokens(QUESTION, top_k=5))
    if provider != "azure":
        monkeypatch.setattr(stand_in, "key", key)
    monkeypatch.setenv("TEST_KEY", key)
    assert use(config, lambda expert: expert.next_tokens(QUESTION, top_k=5)).pieces
    monkeypatch.setenv("TEST_KEY", "wrong")
    with pytest.raises(AuthenticationError) as caught:
        use(config, lambda expert: expert.next_tokens(QUESTION, top_k=5))
    assert caught.value.status_code == 401
    assert "wrong" not in str(caught.value)


def test_a_token_is_forced_only_for_our_own_question(stand_ins: StandIns) -> None:
    """Where the endpoint draws for itself, its draws are its own."""
    stand_in = stand_ins.open("llamacpp-chat")

    async def work(expert: ChatExpert) -> None:
        await expert.next_tokens(QUESTION, top_k=5)
        (forced,) = stand_in.requests[-1][1]["logit_bias"]
        assert stand_in.engines["tiny"].data(int(forced)) == b"a"
        for ask in (Ask(5, num_tokens=3), Ask(5, temperature=1.0)):
            await expert.observe(QUESTION, ask)
            assert "logit_bias" not in stand_in.requests[-1][1]

    use(configured("llamacpp-chat", stand_ins.table("llamacpp-chat")), work)


def test_every_dialect_has_a_stand_in() -> None:
    """A new one joins the contract suite by being registered."""
    assert set(ROUTES) == set(CHAT)
