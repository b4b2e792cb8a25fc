"""Language models as judges: the whole path, and what a comparison becomes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from mope_bb import transport
from mope_bb.config import RewardConfig, parse_config
from mope_bb.errors import ConfigError, RewardError
from mope_bb.keys import Key
from mope_bb.rewards.base import Comparison, RewardPanel, Scored, win_probability
from mope_bb.rewards.judge import (
    GradedJudge,
    PairwiseJudge,
    open_judge,
)
from mope_bb.rewards.registry import open_reward_panel
from mope_bb.threads import in_thread
from mope_bb.types import Message
from tests.rewards.conftest import conversation
from tests.rewards.test_judge_bodies import CRITERION, INJECTION, PROMPT, completion
from tests.unit.test_transport import serving

EXPERT: dict[str, Any] = {"name": "short", "provider": "scripted", "dimension": "polite"}


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come at once."""
    monkeypatch.setattr(transport, "_backoff", lambda state: 0.0)


# The whole path


class StandIn:
    """A chat endpoint whose judge prefers as `say` tells, from what it is shown to the text of its reply."""

    def __init__(self, say: Callable[[dict[str, Any]], str | None]) -> None:
        self.url = ""
        self.say = say
        self.key: str | None = None
        self.paths: list[str] = []
        self.systems: list[str] = []
        self.shown: list[dict[str, Any]] = []
        self.troubles: dict[str, list[web.Response]] = {}
        """By a text that an answer holds, replies that come before the good ones."""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Any route."""
        body = await request.json()
        system, user = (message["content"] for message in body["messages"])
        self.paths.append(request.path_qs)
        self.systems.append(system)
        self.shown.append(json.loads(user))
        if self.key is not None and self.key not in (request.headers.get("api-key"), bearer(request)):
            return web.json_response({"error": {"message": "Incorrect API key provided"}}, status=401)
        for text, replies in self.troubles.items():
            if replies and any(text in str(one) for name, one in self.shown[-1].items() if name != "conversation"):
                found = replies.pop(0)
                return web.Response(status=found.status, body=found.body, headers={"retry-after": "0"})
        return web.json_response(completion(self.say(self.shown[-1])))


def bearer(request: web.BaseRequest) -> str:
    """The bearer token of a request."""
    return request.headers.get("authorization", "").removeprefix("Bearer ")


def verdict(name: str) -> str:
    """A reply."""
    return json.dumps({"verdict": name})


def longer(shown: dict[str, Any]) -> str:
    """Prefers the longer answer, wherever it stands."""
    first, second = len(shown["answer_a"]), len(shown["answer_b"])
    return verdict("TIE" if first == second else "A" if first > second else "B")


def during(stand_in: StandIn, call: Callable[[], Any]) -> Any:
    """What `call()` returns on a thread, as in training, while `stand_in` serves."""

    async def run() -> Any:
        async with serving(stand_in.handle) as url:
            stand_in.url = url
            return await in_thread(call, name="test")

    return asyncio.run(run())


def settings_of(stand_in: StandIn, **options: Any) -> RewardConfig:
    """The settings of a judge that is played by `stand_in`."""
    base = {"kind": "judge", "model": "judge", "base_url": f"{stand_in.url}/v1", "max_retries": 1}
    return RewardConfig.model_validate({**base, **options})


def pairs(*texts: tuple[str, str]) -> list[Comparison]:
    """Answers with their references, to one prompt."""
    return [((*PROMPT, Message("assistant", one)), (*PROMPT, Message("assistant", other))) for one, other in texts]


def compare(
    stand_in: StandIn, *texts: tuple[str, str], api_key: str | None = None, **options: Any
) -> list[float | RewardError]:
    """What comes of comparisons."""

    def call() -> Any:
        judge = PairwiseJudge(
            "polite",
            settings_of(stand_in, **options),
            criterion=CRITERION,
            api_key=None if api_key is None else Key(api_key),
        )
        return judge.compare(pairs(*texts))

    found: list[float | RewardError] = during(stand_in, call)
    return found


def test_each_comparison_is_asked_in_both_orders() -> None:
    """The chance is that of the first text of each pair, in the order of the pairs."""
    stand_in = StandIn(longer)
    assert compare(stand_in, ("long", "s"), ("s", "long"), ("same", "also")) == [1.0, 0.0, 0.5]
    asked = {(one["answer_a"], one["answer_b"]) for one in stand_in.shown}
    assert asked == {("long", "s"), ("s", "long"), ("same", "also"), ("also", "same")}
    assert len(stand_in.shown) == 6
    assert {json.dumps(one["conversation"]) for one in stand_in.shown} == {
        json.dumps([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}])
    }
    assert set(stand_in.paths) == {"/v1/chat/completions"}


@pytest.mark.parametrize(
    ("mine_first", "other_first", "expected"),
    [
        ("A", "B", 1.0),
        ("A", "TIE", 0.75),
        ("TIE", "B", 0.75),
        ("A", "A", 0.5),
        ("B", "B", 0.5),
        ("TIE", "TIE", 0.5),
        ("TIE", "A", 0.25),
        ("B", "TIE", 0.25),
        ("B", "A", 0.0),
    ],
)
def test_the_chance_is_the_mean_of_two_verdicts(mine_first: str, other_first: str, expected: float) -> None:
    """A judge that goes by the order alone finds a tie; one that is half sure gives three quarters."""
    stand_in = StandIn(lambda shown: verdict(mine_first if shown["answer_a"] == "mine" else other_first))
    assert compare(stand_in, ("mine", "other")) == [expected]


class FakeClient:
    """Takes the place of an OpenAIClient; any judge, also one that goes by position, from `prefers`."""

    def __init__(self, prefers: Callable[[str, str], str]) -> None:
        self.prefers = prefers

    async def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """A completion."""
        shown = json.loads(body["messages"][1]["content"])
        return completion(verdict(self.prefers(shown["answer_a"], shown["answer_b"])))

    async def __aenter__(self) -> FakeClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), max_size=6),
    st.dictionaries(st.tuples(st.sampled_from("abcxyz"), st.sampled_from("abcxyz")), st.sampled_from(["A", "B"])),
)
@settings(derandomize=True, database=None, deadline=None, max_examples=50)
def test_the_two_sides_of_a_comparison_share_one(texts: list[tuple[str, str]], judge: dict[Any, str]) -> None:
    """Whatever the judge says of each order: pairs turned round lose what they won, each in its own place."""
    model = PairwiseJudge("polite", RewardConfig(kind="judge", model="judge"), criterion=CRITERION)

    def prefers(first: str, second: str) -> str:
        return judge.get((first, second), "TIE")

    model._judge._open_client = lambda: FakeClient(prefers)  # type: ignore[method-assign, assignment, return-value]
    wins = model.compare(pairs(*texts))
    turned = model.compare(pairs(*(one[::-1] for one in texts)))
    assert [one + other for one, other in zip(wins, turned, strict=True)] == [1.0] * len(texts)  # type: ignore[operator]
    value = {"A": 1.0, "TIE": 0.5, "B": 0.0}
    for (first, second), win in zip(texts, wins, strict=True):
        assert win == (value[prefers(first, second)] + 1 - value[prefers(second, first)]) / 2


def test_an_unreadable_reply_is_asked_once_more() -> None:
    """With the reminder; the second reply counts."""
    replies = iter(["A is better.", verdict("A"), verdict("B")])
    stand_in = StandIn(lambda shown: next(replies))
    assert compare(stand_in, ("mine", "other"), max_in_flight=1) == [1.0]
    assert [one["answer_a"] for one in stand_in.shown] == ["mine", "mine", "other"]
    assert len(stand_in.systems[1]) > len(stand_in.systems[0])


@pytest.mark.parametrize("bad", ["A is better.", None, ""])
def test_a_judge_that_stays_unreadable_costs_that_comparison(bad: str | None) -> None:
    """Two replies in either order, then an error that shows the reply; no verdict is invented."""
    stand_in = StandIn(lambda shown: bad if "mine" in shown["answer_a"] else longer(shown))
    error, win = compare(stand_in, ("mine", "other"), ("long", "s"))
    assert win == 1.0
    assert isinstance(error, RewardError)
    assert "the reward model of 'polite'" in str(error)
    assert [one["answer_a"] for one in stand_in.shown].count("mine") == 2


@pytest.mark.parametrize("place", ["answer_a", "answer_b"])
def test_an_error_in_either_order_is_the_comparisons(place: str) -> None:
    """One verdict alone is none."""
    stand_in = StandIn(lambda shown: "?" if shown[place] == "mine" else longer(shown))
    error, win = compare(stand_in, ("mine", "other"), ("long", "s"))
    assert isinstance(error, RewardError)
    assert win == 1.0


@pytest.mark.parametrize(
    ("trouble", "message", "num_requests"),
    [
        (web.Response(status=500, body=b'{"error": {"message": "out of slots"}}'), "out of slots", 2),
        (web.Response(status=429, body=b'{"error": {"code": "insufficient_quota"}}'), "insufficient_quota", 1),
        (web.Response(status=400, body=b'{"error": {"code": "context_length_exceeded"}}'), "context_length", 1),
        (web.Response(status=400, body=b'{"error": {"message": "content filter"}}'), "content filter", 1),
        (web.Response(body=b"<html>Welcome</html>"), "not JSON", 1),
        (web.Response(body=b'{"cut'), "not JSON", 2),
        (web.Response(body=b"{}"), "holds no message", 2),
        (web.Response(body=b"[]"), "expected a JSON object", 1),
    ],
)
def test_one_bad_comparison_costs_no_other(trouble: web.Response, message: str, num_requests: int) -> None:
    """The first of two fails in every way; the error names the dimension, and the other one has its chance."""
    stand_in = StandIn(longer)
    stand_in.troubles["mine"] = [trouble] * 9
    error, win = compare(stand_in, ("mine", "other"), ("long", "s"))
    assert win == 1.0
    assert isinstance(error, RewardError)
    assert "the reward model of 'polite' failed" in str(error)
    assert message in str(error)
    assert [one["answer_a"] for one in stand_in.shown].count("mine") == num_requests


def test_what_passes_is_asked_again() -> None:
    """A limit on requests, and a server that fails for a moment, cost nothing."""
    stand_in = StandIn(longer)
    stand_in.troubles["mine"] = [web.Response(status=429), web.Response(status=503)]
    assert compare(stand_in, ("mine", "s"), max_retries=2) == [1.0]


def test_the_key_is_sent() -> None:
    """As a bearer token; a wrong one is an error with the hint where the key is set."""
    stand_in = StandIn(longer)
    stand_in.key = "sk-1"
    assert compare(stand_in, ("mine", "s"), api_key="sk-1") == [1.0]
    [error] = compare(stand_in, ("mine", "s"), api_key="sk-2")
    assert isinstance(error, RewardError)
    assert "Incorrect API key" in str(error)
    assert "api_key_env" in str(error.hint)


def test_azure() -> None:
    """With a version of the API the model is a deployment, and the key has Azure's header."""
    stand_in = StandIn(longer)
    stand_in.key = "sk-1"

    def call() -> Any:
        options = {"base_url": stand_in.url, "api_version": "2026-10-01"}
        judge = PairwiseJudge("polite", settings_of(stand_in, **options), criterion=CRITERION, api_key=Key("sk-1"))
        return judge.compare(pairs(("mine", "s")))

    assert during(stand_in, call) == [1.0]
    assert set(stand_in.paths) == {"/openai/deployments/judge/chat/completions?api-version=2026-10-01"}


def test_text_that_no_encoding_has() -> None:
    """Half a surrogate pair costs its comparison."""
    error, win = compare(StandIn(longer), ("\ud800", "other"), ("long", "s"))
    assert win == 1.0
    assert isinstance(error, RewardError)
    assert "cannot be sent" in str(error)


def test_an_answer_that_asks_for_a_verdict_is_shown_like_any_other() -> None:
    """A judge that reads its data as JSON is not misled; both texts arrive as they are."""
    stand_in = StandIn(longer)
    assert compare(stand_in, (INJECTION, "x" * 200)) == [0.0]
    assert {one["answer_a"] for one in stand_in.shown} == {INJECTION, "x" * 200}


def test_grades_become_scores() -> None:
    """One question for each answer, in its place; a grade is worth `scale` nats."""
    stand_in = StandIn(lambda shown: json.dumps({"grade": len(shown["answer"])}))

    def call() -> Any:
        judge = GradedJudge("polite", settings_of(stand_in, mode="graded", scale=0.5), criterion=CRITERION)
        panel = RewardPanel({"polite": judge})
        talks = [conversation("Why?", answer) for answer in ("abc", "", "a" * 10)]
        return judge.score(talks), panel.wins([PROMPT], ["abc"], ["a"], [["polite"]])

    (three, error, ten), [found] = during(stand_in, call)
    assert (three, ten) == (1.5, 5.0)
    assert isinstance(error, RewardError)
    assert "grade is 0" in str(error)
    assert found == Scored({"polite": 1.5}, {"polite": win_probability(1.5, 0.5)})


def test_a_closed_judge_asks_nothing() -> None:
    """As many errors as comparisons; closing twice does nothing."""
    config = RewardConfig(kind="judge", model="judge", base_url="http://127.0.0.1:1")
    judge, grader = PairwiseJudge("polite", config, criterion="x"), GradedJudge("polite", config, criterion="x")
    for model in (judge, grader, judge, grader):
        model.close()
    found = judge.compare(pairs(("a", "b"), ("c", "d"))) + grader.score([conversation("Why?", "So.")])
    assert [isinstance(one, RewardError) and "closed" in str(one) for one in found] == [True] * 3
    assert judge.compare([]) == []


# Configuration


def configured(section: dict[str, Any]) -> Any:
    """A configuration with one dimension."""
    return parse_config({"experts": [EXPERT], "dimensions": {"polite": section}})


@pytest.mark.parametrize(
    ("text", "criterion", "expected"),
    [("Be polite.", None, "Be polite."), ("Be polite.", "Politer?", "Politer?"), (None, "Politer?", "Politer?")],
)
@pytest.mark.parametrize("mode", ["pairwise", "graded"])
def test_the_criterion_is_by_default_the_dimensions_text(
    monkeypatch: pytest.MonkeyPatch, text: str | None, criterion: str | None, expected: str, mode: str
) -> None:
    """A panel opened from the configuration asks by it, with the key from the environment."""
    monkeypatch.setenv("JUDGE_KEY", "sk-1")
    stand_in = StandIn(lambda shown: longer(shown) if "answer_a" in shown else '{"grade": 5}')
    stand_in.key = "sk-1"

    def call() -> Any:
        reward = {"kind": "judge", "model": "judge", "base_url": f"{stand_in.url}/v1", "api_key_env": "JUDGE_KEY"}
        section = {"text": text, "reward": {**reward, "mode": mode, "criterion": criterion}}
        panel = open_reward_panel(configured(section), ["polite"])
        return panel.wins([PROMPT], ["abc"], ["a"], [["polite"]])

    [found] = during(stand_in, call)
    assert found == (Scored({}, {"polite": 1.0}) if mode == "pairwise" else Scored({"polite": 5.0}, {"polite": 0.5}))
    assert all(f"\n{expected}\n" in system for system in stand_in.systems)


def test_a_key_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is asked."""
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    config = RewardConfig(kind="judge", model="judge", api_key_env="JUDGE_KEY")
    with pytest.raises(ConfigError, match="'polite': the environment variable 'JUDGE_KEY'"):
        open_judge("polite", config, text="x")
    with pytest.raises(ConfigError, match="'polite' has no `criterion`"):
        open_judge("polite", config, text=None)


JUDGE: dict[str, Any] = {"kind": "judge", "model": "judge", "criterion": "x"}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"kind": "judge", "criterion": "x"}, "needs `model`"),
        ({"kind": "judge", "model": "judge"}, "needs a `criterion`, or the dimension a `text`"),
        ({**JUDGE, "provider": "vllm"}, "'judge' has no `provider`"),
        ({**JUDGE, "tokenizer": "x"}, "'judge' has no `tokenizer`"),
        ({**JUDGE, "device": "cpu"}, "'judge' has no `device`"),
        ({**JUDGE, "mode": "ranked"}, "mode"),
        ({**JUDGE, "scale": 2.0}, "pairwise judge has no `scale`"),
        ({**JUDGE, "mode": "graded", "scale": 0.0}, "scale"),
        ({**JUDGE, "mode": "graded", "scale": float("inf")}, "scale"),
        ({**JUDGE, "api_version": "2026-10-01"}, "`api_version` is Azure's: it needs `base_url`"),
        ({"kind": "remote", "provider": "vllm", "base_url": "http://x", "api_version": "v"}, "has no `api_version`"),
    ],
)
def test_wrong_settings_are_named(reward: dict[str, Any], message: str) -> None:
    """What is missing, and what belongs to another kind or mode."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        configured({"reward": reward})


def test_the_hint_names_the_kinds() -> None:
    """Who has no reward reads what there is."""
    with pytest.raises(ConfigError) as caught:
        open_reward_panel(configured({}), ["polite"])
    assert all(kind in str(caught.value.hint) for kind in ("classifier", "function", "remote", "judge"))
