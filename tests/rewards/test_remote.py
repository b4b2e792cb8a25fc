"""Reward models behind HTTP: the whole path to a server that has bad days, and what they cost."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from mope_bb import transport
from mope_bb.config import RewardConfig, load_config, parse_config
from mope_bb.errors import ConfigError, RewardError
from mope_bb.keys import Key
from mope_bb.rewards.base import Scored, win_probability
from mope_bb.rewards.registry import open_reward_panel
from mope_bb.rewards.remote import (
    RemoteReward,
    open_remote,
)
from mope_bb.rewards.rendering import ChatRenderer
from mope_bb.threads import in_thread
from tests.rewards.conftest import build_tokenizer, conversation
from tests.rewards.test_remote_bodies import PROVIDERS, TALK, pooling, sglang, sigmoid, tei, vllm
from tests.unit.test_transport import serving

EXPERT: dict[str, Any] = {"name": "short", "provider": "scripted", "dimension": "polite"}


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come at once."""
    monkeypatch.setattr(transport, "_backoff", lambda state: 0.0)


# The whole path


class StandIn:
    """Four servers in one. The score of an answer is the number that it is; some words make trouble."""

    def __init__(self) -> None:
        self.url = ""
        self.key: str | None = None
        """The one that it wants."""
        self.is_squashing = False
        """Whether it does not know the settings for raw scores."""
        self.num_labels = 1
        self.asked: list[tuple[str, str, bool]] = []
        """Path, answer and whether it was asked raw, for each request."""
        self.troubles: dict[str, list[web.Response]] = {}
        """By answer, replies that come before the good ones; the last one for ever if it is the only one."""
        self.num_in_flight = self.most_in_flight = 0
        self.gate: Callable[[str], Any] | None = None
        """Awaited before a reply."""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Any route."""
        body = await request.json()
        self.num_in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
        try:
            return await self._reply(request, body)
        finally:
            self.num_in_flight -= 1

    async def _reply(self, request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
        text = body["messages"][-1]["content"] if "messages" in body else self._last_answer(body)
        raw = body.get("raw_scores", not body.get("use_activation", "messages" in body) or "text" in body)
        self.asked.append((request.path, text, raw))
        if self.gate is not None and raw:
            await self.gate(text)
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        if (waiting := self.troubles.get(text)) is not None and waiting:
            trouble = waiting[0] if len(waiting) == 1 and waiting[0].status != 429 else waiting.pop(0)
            return web.Response(status=trouble.status, body=trouble.body, headers={"retry-after": "0"})
        score = float(text)
        shown = score if raw and not self.is_squashing else sigmoid(score)
        return web.json_response(self._good(request.path, body, shown))

    @staticmethod
    def _last_answer(body: dict[str, Any]) -> str:
        [text] = body["text"] if "text" in body else [body["inputs"]]
        return str(text).rsplit("<|assistant|>", 1)[1].removesuffix("<|end|>")

    def _good(self, path: str, body: dict[str, Any], score: float) -> Any:
        if path == "/classify" and "messages" in body:
            return vllm(score, probs=[score] * self.num_labels, num_classes=self.num_labels)
        if path == "/pooling" and body["task"] == "classify":
            return pooling(score, data=[score] * self.num_labels)
        return {"/classify": sglang, "/predict": tei}[path](score)


def scored(stand_in: StandIn, score: Callable[[], Any]) -> Any:
    """What `score()` returns on a thread, as in training, while `stand_in` serves."""

    async def run() -> Any:
        async with serving(stand_in.handle) as url:
            stand_in.url = url
            return await in_thread(score, name="test")

    return asyncio.run(run())


def model_of(stand_in: StandIn, provider: str = "vllm", *, api_key: str | None = None, **options: Any) -> RemoteReward:
    """A reward model that is served by `stand_in`."""
    needs_text = provider in ("sglang", "tei")
    settings = {"base_url": stand_in.url, "max_retries": 1, **({"tokenizer": "rm"} if needs_text else {}), **options}
    config = RewardConfig.model_validate({"kind": "remote", "provider": provider, **settings})
    renderer = ChatRenderer(build_tokenizer(), source="rm") if config.tokenizer else None
    return RemoteReward("polite", config, api_key=None if api_key is None else Key(api_key), renderer=renderer)


def ask(stand_in: StandIn, answers: Sequence[str], provider: str = "vllm", **options: Any) -> list[Any]:
    """The scores of `answers` to one question."""
    talks = [conversation("Why?", answer) for answer in answers]
    found: list[Any] = scored(stand_in, lambda: model_of(stand_in, provider, **options).score(talks))
    return found


@pytest.mark.parametrize(
    ("provider", "path"),
    [("vllm", "/classify"), ("vllm-pooling", "/pooling"), ("sglang", "/classify"), ("tei", "/predict")],
)
@pytest.mark.parametrize("suffix", ["", "/", "/v1"])
def test_scores_stand_where_their_conversations_stood(provider: str, path: str, suffix: str) -> None:
    """Raw scores in the order of the conversations, from the right route whatever the address ends in."""
    stand_in = StandIn()
    answers = [str(number / 4) for number in range(-20, 20)]
    talks = [conversation("Why?", answer) for answer in answers]

    def score() -> list[float | RewardError]:
        return model_of(stand_in, provider, base_url=stand_in.url + suffix).score(talks)

    assert scored(stand_in, score) == [float(answer) for answer in answers]
    assert {asked[0] for asked in stand_in.asked} == {path}


def test_replies_may_come_in_any_order() -> None:
    """The last question is answered first, the first one last."""
    stand_in, answers = StandIn(), ["1", "2", "3", "4", "5"]
    arrived, done = asyncio.Condition(), {"6"}

    async def last_first(text: str) -> None:
        async with arrived:
            done.add(f"{text} is there")
            arrived.notify_all()
            await arrived.wait_for(lambda: len(done) > 5 and str(int(text) + 1) in done)
            done.add(text)
            arrived.notify_all()

    stand_in.gate = last_first
    assert ask(stand_in, answers) == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_so_many_are_asked_at_a_time() -> None:
    """No more than `max_in_flight`, and no fewer: each waits here for two others."""
    stand_in = StandIn()

    barrier = asyncio.Barrier(3)

    async def together(text: str) -> None:
        await barrier.wait()

    stand_in.gate = together
    assert ask(stand_in, [str(n) for n in range(9)], "sglang", max_in_flight=3) == [float(n) for n in range(9)]
    assert stand_in.most_in_flight == 3


TOO_LONG = b'{"error": {"message": "This model\'s maximum context length is 4096 tokens", "code": 400}}'


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("trouble", "message", "num_requests"),
    [
        (web.Response(status=400, body=TOO_LONG), "maximum context length", 1),
        (web.Response(status=500, body=b"out of memory"), "out of memory", 2),
        (web.Response(status=413, body=b'{"error": "`inputs` must have less than 512 tokens"}'), "less than 512", 1),
        (web.Response(body=b"<html>Welcome</html>"), "not JSON", 1),
        (web.Response(body=b'{"data": [{"index": 0, "probs": [NaN], "num_classes": 1}]}'), "not JSON", 2),
        (web.Response(body=b"[]"), "polite", 1),
        (web.Response(body=b'{"detail": "Not Found"}'), "polite", 1),
        (web.Response(body=b'[{"embedding": [1e999], "score": 1e999}]'), "not JSON", 2),
    ],
)
def test_one_bad_conversation_costs_no_other(
    provider: str, trouble: web.Response, message: str, num_requests: int
) -> None:
    """The first of three fails in every way; the error names the dimension, and the others have their scores."""
    stand_in = StandIn()
    stand_in.troubles["7"] = [trouble]
    error, *others = ask(stand_in, ["7", "-2", "3"], provider)
    assert others == [-2.0, 3.0]
    assert isinstance(error, RewardError)
    assert "the reward model of 'polite'" in str(error)
    assert message in str(error)
    assert [text for _, text, _ in stand_in.asked].count("7") == num_requests


@pytest.mark.parametrize("status", [429, 503])
def test_what_passes_is_asked_again(status: int) -> None:
    """A server that is overloaded for a moment costs nothing."""
    stand_in = StandIn()
    stand_in.troubles["2"] = [web.Response(status=status), web.Response(status=429)]
    assert ask(stand_in, ["2"], "sglang", max_retries=2) == [2.0]
    assert len(stand_in.asked) == 3


def test_the_key_is_sent() -> None:
    """The right one opens; without it each conversation has the error, and the hint where the key is set."""
    stand_in = StandIn()
    stand_in.key = "sk-1"
    assert ask(stand_in, ["2"], api_key="sk-1") == [2.0]
    for error in ask(stand_in, ["2", "3"], api_key="sk-2"):
        assert isinstance(error, RewardError)
        assert "401" in str(error)
        assert "api_key_env" in str(error.hint)


def test_nobody_there() -> None:
    """A port where nobody listens is an error for each conversation."""
    config = RewardConfig(kind="remote", provider="vllm", base_url="http://127.0.0.1:1", max_retries=1)
    model = RemoteReward("polite", config)
    for error in model.score([TALK, TALK[1:]]):
        assert isinstance(error, RewardError)
        assert "no connection to http://127.0.0.1:1/classify" in str(error)


def test_a_server_that_hangs_costs_the_deadline() -> None:
    """The conversation that hangs has the error; the other one its score."""
    stand_in = StandIn()

    async def hang(text: str) -> None:
        if text == "1":
            await asyncio.Event().wait()

    stand_in.gate = hang
    error, score = ask(stand_in, ["1", "2"], timeout_s=0.5)
    assert score == 2.0
    assert isinstance(error, RewardError)
    assert "within 0.5 s" in str(error)


@pytest.mark.parametrize("provider", ["vllm", "vllm-pooling"])
def test_a_model_of_two_labels_is_refused(provider: str) -> None:
    """It has no score."""
    stand_in = StandIn()
    stand_in.num_labels = 2
    [error] = ask(stand_in, ["2"], provider)
    assert isinstance(error, RewardError)
    assert "2" in str(error)
    assert error.hint is not None


@pytest.mark.parametrize("provider", ["vllm", "vllm-pooling", "tei"])
def test_a_server_that_squashes_is_refused_until_it_does_not(provider: str) -> None:
    """Not one squashed number gets through; and with raw scores the question in two ways is asked once for all."""
    stand_in = StandIn()
    stand_in.is_squashing = True
    talks = [conversation("Why?", answer) for answer in ("-3", "0", "5")]

    def score() -> tuple[list[Any], list[Any], list[Any]]:
        model = model_of(stand_in, provider)
        squashed = model.score(talks)
        stand_in.is_squashing = False
        stand_in.asked.clear()
        return squashed, model.score(talks), model.score(talks)

    squashed, first, second = scored(stand_in, score)
    for error in squashed:
        assert isinstance(error, RewardError)
        assert "squash" in str(error)
    assert first == second == [-3.0, 0.0, 5.0]
    assert [raw for _, _, raw in stand_in.asked].count(False) == 1


def test_scores_of_which_nothing_is_learnt_leave_the_question_open() -> None:
    """A first answer that is its own sigmoid does not make a server trusted that squashes."""
    stand_in = StandIn()
    stand_in.is_squashing = True
    fixed, error = ask(stand_in, [str(math.log(0.659 / 0.341)), "5"], max_in_flight=1)
    assert fixed == pytest.approx(0.659)
    assert isinstance(error, RewardError)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_control_token_is_not_sent(provider: str) -> None:
    """With vLLM if the tokenizer is known, which it need not be."""
    stand_in = StandIn()
    error, score = ask(stand_in, ["<|end|>", "2"], provider, tokenizer="rm")
    assert score == 2.0
    assert isinstance(error, RewardError)
    assert "the reward model of 'polite'" in str(error)
    assert {text for _, text, _ in stand_in.asked} == {"2"}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_text_that_no_encoding_has(provider: str) -> None:
    """Half a surrogate pair costs its conversation."""
    error, score = ask(StandIn(), ["\ud800", "2"], provider)
    assert score == 2.0
    assert isinstance(error, RewardError)
    assert "cannot be sent" in str(error)


def test_a_closed_model_asks_nothing() -> None:
    """As many errors as conversations."""
    model = RemoteReward("polite", RewardConfig(kind="remote", provider="vllm", base_url="http://127.0.0.1:1"))
    model.close()
    model.close()
    [error] = model.score([TALK])
    assert isinstance(error, RewardError)
    assert "closed" in str(error)
    assert model.score([]) == []


# Configuration


def test_the_configuration_opens_a_panel(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of two servers; the tokenizer's path is relative to the file, the key comes from the environment."""
    monkeypatch.setenv("RM_KEY", "sk-1")
    (tmp_path / "rm").symlink_to(llama_folder)
    stand_in = StandIn()
    stand_in.key = "sk-1"

    def score() -> Any:
        file = tmp_path / "mope.toml"
        file.write_text(
            '[[experts]]\nname = "short"\nprovider = "scripted"\ndimension = "polite"\n'
            f'[dimensions.polite]\nreward = {{ kind = "remote", provider = "vllm", base_url = "{stand_in.url}", '
            'model = "rm", api_key_env = "RM_KEY" }\n'
            f'[dimensions.short]\nreward = {{ kind = "remote", provider = "sglang", base_url = "{stand_in.url}", '
            'tokenizer = "rm", api_key_env = "RM_KEY" }\n'
        )
        panel = open_reward_panel(load_config(file), ["polite", "short"])
        return panel.wins([conversation("Why?")], ["2"], ["1"], [["polite", "short"]])

    [found] = scored(stand_in, score)
    assert found == Scored({"polite": 2.0, "short": 2.0}, dict.fromkeys(("polite", "short"), win_probability(2, 1)))


def test_a_key_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is asked."""
    monkeypatch.delenv("RM_KEY", raising=False)
    config = RewardConfig(kind="remote", provider="vllm", base_url="http://x", api_key_env="RM_KEY")
    with pytest.raises(ConfigError, match="'polite': the environment variable 'RM_KEY'"):
        open_remote("polite", config)


REMOTE: dict[str, Any] = {"kind": "remote", "provider": "vllm", "base_url": "http://x"}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"kind": "remote", "base_url": "http://x"}, "needs `provider`"),
        ({"kind": "remote", "provider": "vllm"}, "needs `base_url`"),
        ({**REMOTE, "provider": "sglang"}, "'sglang' needs `tokenizer`"),
        ({**REMOTE, "provider": "tei"}, "'tei' needs `tokenizer`"),
        ({**REMOTE, "provider": "ollama"}, "provider"),
        ({**REMOTE, "path": "x"}, "'remote' has no `path`"),
        ({**REMOTE, "criterion": "x"}, "'remote' has no `criterion`"),
        ({**REMOTE, "mode": "graded"}, "'remote' has no `mode`"),
        ({**REMOTE, "batch_size": 2}, "'remote' has no `batch_size`"),
        ({**REMOTE, "max_in_flight": 0}, "max_in_flight"),
        ({**REMOTE, "timeout_s": 0}, "timeout_s"),
        ({"kind": "classifier", "path": "x", "base_url": "http://x"}, "'classifier' has no `base_url`"),
        ({"kind": "function", "function": "a:b", "device": "cpu"}, "'function' has no `device`"),
    ],
)
def test_wrong_settings_are_named(reward: dict[str, Any], message: str) -> None:
    """What is missing, and what belongs to another kind."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config({"experts": [EXPERT], "dimensions": {"polite": {"reward": reward}}})


def test_a_run_is_the_same_when_its_server_moves() -> None:
    """Address, key and limits are not among what a run is recognised by; the model is."""
    moved = {**REMOTE, "base_url": "http://y", "api_key_env": "K", "timeout_s": 1, "max_in_flight": 2}
    here, there, other = (
        RewardConfig.model_validate(one).model_dump() for one in (REMOTE, moved, {**REMOTE, "model": "other"})
    )
    assert here == there != other
