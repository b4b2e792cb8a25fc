"""`Session`: exact answers of scripted experts, arguments, and many tasks on one session."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mope_bb import Answer, Config, ConfigError, Message, Preference, PreferenceError, open_session, open_session_sync
from mope_bb.types import TokenStep
from mope_bb.zoo import example_questions
from tests.endpoints.gated import open_gated

if TYPE_CHECKING:
    from mope_bb.zoo import ZooServer

Scripted = Callable[..., Config]
LEFT = [{"Hi": 0.9, "Yo": 0.1}, {" there": 0.6, " you": 0.4}]
RIGHT = [{"Hi": 0.2, "Yo": 0.8}, {" there": 1.0}]
ASK: dict[str, Any] = {"preference": "left,right", "temperature": 0.0}


def complete(config: Config, conversation: Any = "hi", **options: Any) -> Answer:
    """One answer."""
    with open_session_sync(config) as session:
        return session.complete(conversation, **options)


def test_merged_distribution_is_exact(scripted: Scripted) -> None:
    """Weights, logprobs and texts are those of the linear mixture."""
    answer = complete(scripted(left=LEFT, right=RIGHT), preference="left=0.25,right=0.75", seed=1)
    first = answer.steps[0]
    hi = math.log(0.25 * 0.9 + 0.75 * 0.2)
    yo = math.log(0.25 * 0.1 + 0.75 * 0.8)
    assert first.experts == ("left", "right")
    assert first.weights == pytest.approx((0.25, 0.75))
    assert first.logprob == pytest.approx(hi if first.piece.data == b"Hi" else yo)
    assert answer.merge == "linear"
    assert answer.seed == 1


@pytest.mark.parametrize("rule", ["linear", "geometric", "product"])
def test_rules(scripted: Scripted, rule: str) -> None:
    """A rule that needs the base asks it; one expert of weight 1 is that expert under the other rules."""
    config = scripted(base="plain", plain=[{"Hi": 0.5, "Yo": 0.5}], left=LEFT)
    answer = complete(config, preference="left", merge=rule, temperature=0.0)
    assert answer.steps[0].experts == (("plain", "left") if rule == "product" else ("left",))
    assert answer.steps[0].candidates.pieces[answer.steps[0].index].data == b"Hi"
    assert answer.merge == rule


@pytest.mark.parametrize(
    "preference",
    ["left=1,right=3", {"left": 0.25, "right": 0.75}, Preference.of({"left": 10, "right": 30})],
    ids=["text", "mapping", "Preference"],
)
def test_forms_of_a_preference(scripted: Scripted, preference: str | dict[str, float] | Preference) -> None:
    """Text, mapping and object mean the same."""
    answer = complete(scripted(left=LEFT, right=RIGHT), preference=preference, temperature=0.0)
    assert answer.steps[0].weights == pytest.approx((0.25, 0.75))
    assert answer.text == "Yo there"


def test_no_preference_is_every_dimension_alike(scripted: Scripted) -> None:
    """Without a preference all dimensions count the same, and the base is left out."""
    config = scripted(base="plain", plain=LEFT, left=LEFT, right=RIGHT)
    answer = complete(config, temperature=0.0)
    assert answer.steps[0].experts == ("left", "right")
    assert answer.steps[0].weights == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize("preference", ["lefd", {"left": -1.0}, {"left": 0.0}, {"nobody": 1.0}, {"left": math.nan}, ""])
def test_wrong_preferences(scripted: Scripted, preference: Any) -> None:
    """They are refused before anything is asked, with a hint or an explanation."""
    with open_session_sync(scripted(left=LEFT)) as session, pytest.raises(PreferenceError):
        session.complete("hi", preference=preference)


@pytest.mark.parametrize(
    ("conversation", "part"),
    [
        ("", "prompt is empty"),
        (" \n", "prompt is empty"),
        ([], "conversation is empty"),
        ([{"role": "user", "content": ""}], "prompt is empty"),
        ([{"role": "usr", "content": "hi"}], "role 'usr'"),
        ([{"content": "hi"}], "role"),
        ([{"role": "user", "content": ["hi"]}], "expected text"),
    ],
)
def test_wrong_conversations(scripted: Scripted, conversation: Any, part: str) -> None:
    """Empty prompts, unknown roles and contents that are no text are named."""
    with open_session_sync(scripted(left=LEFT)) as session, pytest.raises(ConfigError, match=part):
        session.complete(conversation)


@pytest.mark.parametrize(
    "option",
    [{"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 0.0}, {"max_tokens": 0}, {"stop": ""}, {"merge": "x"}],
)
def test_wrong_options(scripted: Scripted, option: dict[str, Any]) -> None:
    """They are refused when the stream is made, not when it is read."""
    with open_session_sync(scripted(left=LEFT)) as session, pytest.raises(ConfigError):
        session.session.stream("hi", **option)


def test_conversations_as_messages_or_mappings() -> None:
    """Messages, dictionaries and a bare question are one conversation, rendered once; a system message is not."""

    async def run() -> list[Any]:
        async with open_gated("left") as server, open_session(server.config) as session:
            await session.complete("hi")
            await session.complete([{"role": "user", "content": "hi"}])
            await session.complete([Message("user", "hi")])
            await session.complete([Message("system", "Be brief."), {"role": "user", "content": "hi"}])
            return server.conversations

    user = {"role": "user", "content": "hi"}
    assert asyncio.run(run()) == [[user], [{"role": "system", "content": "Be brief."}, user]]


def test_end_beside_other_pieces(scripted: Scripted) -> None:
    """The end of the answer is a candidate like any other, though it has no bytes."""
    answer = complete(scripted(left=[{"Hi": 0.4, "<end>": 0.6}], right=[{"Hi": 1.0}]), **(ASK | {"preference": "left"}))
    assert (answer.text, answer.finish_reason) == ("", "stop")
    assert answer.steps[0].logprob == 0.0


def test_equal_seeds_give_equal_answers(scripted: Scripted) -> None:
    """The seed that an answer reports draws it again; different seeds differ."""
    config = scripted(left=[dict.fromkeys("abcde", 0.2)] * 20)
    with open_session_sync(config) as session:
        first = session.complete("hi")
        assert session.complete("hi", seed=first.seed) == first
        texts = Counter(session.complete("hi", seed=seed).text for seed in range(5))
    assert len(texts) == 5


def test_finish_reasons(scripted: Scripted) -> None:
    """An END piece and a stop string stop; max_tokens is a length, also where END would have come next."""
    config = scripted(left=[{"one ": 1.0}, {"two ": 1.0}, {"three": 1.0}])
    with open_session_sync(config) as session:
        tokens = list(session.stream("hi"))
        stopped = session.complete("hi", stop="o t")
        limited = session.complete("hi", max_tokens=3)
    assert [token.finish_reason for token in tokens] == [None, None, None, "stop"]
    assert [token.text for token in tokens] == ["one ", "two ", "three", ""]
    assert (stopped.text, stopped.finish_reason, len(stopped.steps)) == ("one tw", "stop", 3)
    assert (limited.text, limited.finish_reason) == ("one two three", "length")


def test_stop_strings_across_pieces(scripted: Scripted) -> None:
    """Nothing of a stop string is ever streamed; what only looked like one is."""
    config = scripted(left=[{"a<": 1.0}, {"b<|": 1.0}, {"x|>": 1.0}, {"c": 1.0}])
    with open_session_sync(config) as session:
        texts = [token.text for token in session.stream("hi", stop=["<|x|>", "never"])]
        held = session.complete("hi", stop="<|y", max_tokens=2)
    assert texts == ["a", "<b", ""]
    assert held.text == "a<b<|"


def test_incomplete_character_at_the_limit(scripted: Scripted) -> None:
    """Text is whole characters only."""
    answer = complete(scripted(left=[{"ü": 1.0}]), max_tokens=1)
    assert answer.text == "ü"


def test_many_tasks_on_one_session(scripted: Scripted) -> None:
    """Answers drawn at once are exactly those drawn one after another."""
    config = scripted(left=[dict.fromkeys("abcde", 0.2)] * 9, right=[dict.fromkeys("defgh", 0.2)] * 9)
    options: list[dict[str, Any]] = [
        {"preference": ("left", "right", "left,right")[seed % 3], "seed": seed} for seed in range(12)
    ]

    async def run() -> None:
        async with open_session(config) as session:
            together = await asyncio.gather(*(session.complete("hi", **option) for option in options))
            assert together == [await session.complete("hi", **option) for option in options]
            assert len({answer.text for answer in together}) == len(options)

    asyncio.run(run())


def test_many_tasks_on_real_servers(nano_experts: ZooServer) -> None:
    """At once or alone, a question has the same distribution, within the engine's own noise."""
    questions, preferences = list(islice(example_questions(), 3)), ("concise", "friendly", "concise,friendly")
    asked = list(product(questions, preferences))

    async def run() -> None:
        async with open_session(nano_experts.config()) as session:

            async def first_step(question: str, preference: str) -> TokenStep:
                answer = await session.complete(question, preference=preference, max_tokens=4, seed=1)
                return answer.steps[0]

            together = await asyncio.gather(*(first_step(*pair) for pair in asked))
            for pair, step in zip(asked, together, strict=True):
                alone = await first_step(*pair)
                assert step.experts == alone.experts == tuple(pair[1].split(","))
                assert step.candidates.tails == pytest.approx(alone.candidates.tails, abs=0.02)

    asyncio.run(run())


def test_the_readme_in_a_running_loop(scripted: Scripted) -> None:
    """`open_session` where there is a loop; `open_session_sync` there too, as in a notebook."""
    config = scripted(left=LEFT, right=RIGHT)

    async def in_loop() -> tuple[str, str]:
        text = ""
        async with open_session(config) as session:
            async for token in session.stream("hi", **ASK):
                text += token.text
        with open_session_sync(config) as blocking:
            return text, "".join(token.text for token in blocking.stream("hi", **ASK))

    assert asyncio.run(in_loop()) == ("Hi there", "Hi there")


def test_leaving_the_loop_early(scripted: Scripted) -> None:
    """The answer so far stays readable, and the session serves the next question."""
    config = scripted(left=[{"a": 1.0}] * 50)

    async def leave() -> tuple[Answer, Answer]:
        async with open_session(config) as session:
            stream = session.stream("hi")
            async for _ in stream:
                break
            await stream.aclose()
            return stream.answer, await session.complete("hi", max_tokens=2)

    answer, following = asyncio.run(leave())
    assert (answer.text, answer.finish_reason, len(answer.steps)) == ("a", "length", 1)
    assert following.text == "aa"


def test_leaving_the_loop_early_without_a_loop(scripted: Scripted) -> None:
    """So in the synchronous form."""
    with open_session_sync(scripted(left=[{"a": 1.0}] * 50)) as session:
        for token in session.stream("hi"):
            assert token.text == "a"
            break
        assert session.complete("hi", max_tokens=2).text == "aa"


def test_a_path_opens_a_session(nano_experts: ZooServer, tmp_path: Path) -> None:
    """A `mope.toml` may be named instead of a Config; one that does not exist is a ConfigError."""
    nano_experts.write_config(tmp_path / "mope.toml")
    with open_session_sync(tmp_path / "mope.toml") as session:
        assert session.complete("How do I fix a bike?", preference="concise", max_tokens=1).steps
    with pytest.raises(ConfigError), open_session_sync(str(tmp_path / "absent.toml")):
        pass


def test_next_to_nothing_is_greedy(scripted: Scripted) -> None:
    """The coldest temperature that can be written is still one at which numbers stay numbers."""
    answer = complete(scripted(left=LEFT), preference="left", temperature=5e-324)
    assert answer.text == "Hi there"
