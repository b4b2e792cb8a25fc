"""`mope-bb chat` with one question."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mope_bb.zoo import serve

if TYPE_CHECKING:
    from mope_bb.zoo import Zoo
    from tests.cli.conftest import StandIn
from tests.command_line import Run

QUESTION = "How do I fix a bike?"


def tokens_of(out: str) -> list[dict[str, Any]]:
    """The objects of --json."""
    return [json.loads(line) for line in out.splitlines()]


def test_exact_answer(mope: Run, scripted_config: str) -> None:
    """At temperature 0 the merged maximum is said; standard output holds the answer and nothing else."""
    result = mope("chat", "-c", scripted_config, "--once", "hi", "--temperature", "0", "-p", "concise=0.3,friendly=0.7")
    assert result.out == "Yo there\n"
    assert result.err.startswith("3 tokens · linear · ")
    assert result.status == 0


def test_piped_question(mope: Run, scripted_config: str) -> None:
    """A question in the pipe is one in the flag; the flag wins."""
    arguments = ["chat", "-c", scripted_config, "--temperature", "0", "-p", "concise"]
    assert mope(*arguments, stdin="Grüße?\n".encode()).out == "Hi there\n"
    assert mope(*arguments, "--once", "hi", stdin=b"\xff").out == "Hi there\n"


def test_json_holds_everything_about_a_token(mope: Run, scripted_config: str) -> None:
    """Text, weights by expert name, each expert's logprob, missed mass; null where an expert did not list the token."""
    result = mope(
        "chat", "-c", scripted_config, "--once", "hi", "--json", "--temperature", "0", "-p", "concise,friendly"
    )
    first, *_, last = tokens_of(result.out)
    assert set(first) == {
        *("text", "token_id", "bytes", "logprob", "weights"),
        *("expert_logprobs", "missed_mass", "floor_mass", "drawn_by", "finish_reason"),
    }
    assert first["text"] == "Hi"
    assert first["bytes"] == [72, 105]
    assert first["weights"] == {"left": 0.5, "right": 0.5}
    assert first["expert_logprobs"] == {"left": pytest.approx(math.log(0.9)), "right": pytest.approx(math.log(0.2))}
    assert first["missed_mass"] == pytest.approx(0.0)
    assert first["drawn_by"] is None
    assert first["finish_reason"] is None
    assert last["finish_reason"] == "stop"
    assert result.err == ""


@pytest.mark.parametrize("seed", range(3))
def test_json_and_text_are_one_answer(mope: Run, scripted_config: str, seed: int) -> None:
    """With one seed the texts of --json, joined, are the plain answer, and a third run says the same."""
    arguments = ["chat", "-c", scripted_config, "--once", QUESTION, "--seed", str(seed)]
    plain = mope(*arguments)
    tokens = tokens_of(mope(*arguments, "--json").out)
    assert "".join(token["text"] for token in tokens) + "\n" == plain.out
    assert plain.err.endswith(f"· seed {seed}\n")
    assert mope(*arguments) == plain


def test_json_of_real_experts(mope: Run, zoo_config: str) -> None:
    """Weights sum to 1, the missed mass is a probability, and the bytes are those of the text."""
    arguments = ["chat", "-c", zoo_config, "-p", "concise,grumpy", "--once", QUESTION, "--max-tokens", "8"]
    tokens = tokens_of(mope(*arguments, "--json").out)
    assert all(set(token["weights"]) == {"concise", "grumpy"} for token in tokens)
    assert all(sum(token["weights"].values()) == pytest.approx(1.0) for token in tokens)
    assert all(0 <= token["missed_mass"] <= 1 for token in tokens)
    data = bytes(value for token in tokens for value in token["bytes"])
    assert "".join(token["text"] for token in tokens) == data.decode("utf-8", "replace")


def test_temperature_0_needs_no_seed(mope: Run, zoo_config: str) -> None:
    """The most probable answer is the same each time."""
    arguments = ["chat", "-c", zoo_config, "-p", "friendly", "--once", QUESTION, "--temperature", "0"]
    first = mope(*arguments, "--max-tokens", "4", "--seed", "1")
    assert first.out == mope(*arguments, "--max-tokens", "4").out
    assert first.status == 0


def test_stop_and_length(mope: Run, stand_in: StandIn) -> None:
    """The stop text is cut off; an answer at the length limit is told as such."""
    arguments = ["chat", "-c", stand_in.config, "--once", "hi"]
    assert mope(*arguments).out == "ok.\n"
    assert mope(*arguments, "--stop", ".", "--stop", "never").out == "ok\n"
    limited = mope(*arguments, "--max-tokens", "1")
    assert limited.out == "o\n"
    assert "cut at the length limit" in limited.err


def test_merge_rules(mope: Run, zoo_config: str) -> None:
    """Each rule answers; only the linear one has a bound on what the lists missed."""
    arguments = ["chat", "-c", zoo_config, "-p", "concise,grumpy", "--once", QUESTION, "--max-tokens", "3"]
    for rule in ("linear", "geometric", "product"):
        result = mope(*arguments, "--merge", rule)
        assert f" · {rule} · " in result.err
        assert ("missed mass" in result.err) == (rule == "linear")
        assert result.status == 0


def test_product_needs_a_base(mope: Run, scripted_config: str) -> None:
    """Without a base expert the product rule is refused."""
    mope("chat", "-c", scripted_config, "--once", "hi", "--merge", "product").assert_refused(2, "base expert")


def test_preferences_side_by_side(mope: Run, scripted_config: str) -> None:
    """Each preference has a column; what looks like markup in a question is text."""
    arguments = ["chat", "-c", scripted_config, "--temperature", "0", "--once", "[bold]hi[/x]"]
    result = mope(*arguments, "-p", "concise", "-p", "friendly")
    lines = [line.split() for line in result.out.splitlines()]
    assert "[bold]hi[/x]" in lines[0]
    assert ["┃", "concise", "┃", "friendly", "┃"] in lines
    assert ["│", "Hi", "there", "│", "Yo", "there", "│"] in lines
    assert result.status == 0


def test_without_a_configuration_the_zoo_answers(
    mope: Run, nano: Zoo, zoo_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The zoo is served for this one run."""
    monkeypatch.setattr("mope_bb.zoo.serve", functools.partial(serve, size=nano.size, home=zoo_home))
    result = mope("chat", "-p", "concise", "--once", QUESTION, "--max-tokens", "3", "--json")
    assert [token["weights"] for token in tokens_of(result.out)] == [{"concise": 1.0}] * 3
    assert result.status == 0
