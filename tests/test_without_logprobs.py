"""Experts without logprobs over HTTP: what adapters draw, chat beside an expert with lists, and all that is refused."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from mope_bb.chat_tokenizer import load_chat_tokenizer
from mope_bb.cli.why import print_why
from mope_bb.config import Config, parse_config
from mope_bb.errors import AlignmentError, PrefillError
from mope_bb.providers.base import Expert
from mope_bb.providers.dialects import CHAT
from mope_bb.providers.registry import DRAWING, open_expert
from mope_bb.providers.wire import is_whole_text
from mope_bb.session import open_session
from mope_bb.types import END, Context, Message, Piece, TokenDistribution
from mope_bb.zoo.build import Zoo
from mope_bb.zoo.serving import ZooServer
from tests.command_line import Run
from tests.endpoints.engine import StandIn
from tests.endpoints.stand_ins import StandIns
from tests.speculation.measure import THRESHOLD, Answer, chi_square

T = TypeVar("T")
CONFIGURATION = 2
QUESTION = Context((Message("user", "How do I fix a bike?"),))
ANSWER = QUESTION.extended(Piece(b"Use"), Piece(b" it"))
NUM_DRAWS = 400
CONTINUING = sorted(name for name in DRAWING if name not in CHAT or CHAT[name].prefill != "none")


def use(config: Config, work: Callable[[Expert], Awaitable[T]]) -> T:
    """Open the first expert, work, close it."""

    async def main() -> T:
        expert = open_expert(config.experts[0], None)
        try:
            return await work(expert)
        finally:
            await expert.aclose()

    return asyncio.run(main())


async def told(expert: Expert, context: Context) -> Piece | None:
    """What it draws; None where that cannot be told, as of half a character."""
    try:
        return await expert.sample(context)
    except AlignmentError:
        return None


def drawing(stand_ins: StandIns, provider: str, **more: object) -> dict[str, object]:
    """The table of an expert without logprobs at a stand-in that has forgotten what it was asked."""
    stand_ins.open(provider).requests.clear()
    table = {"name": "short", "provider": provider, **stand_ins.table(provider), "logprobs": False, **more}
    return {name: value for name, value in table.items() if value is not None}


def mentions_logprobs(value: Any) -> bool:
    """Whether a request has a field about lists, at any depth."""
    if isinstance(value, dict):
        return any("logprob" in name or "top_n" in name or mentions_logprobs(inner) for name, inner in value.items())
    return isinstance(value, list) and any(map(mentions_logprobs, value))


def bodies_of(stand_in: StandIn) -> list[Any]:
    """What was asked for tokens."""
    return [body for _, body in stand_in.requests if body]


@pytest.mark.parametrize("provider", CONTINUING)
def test_every_adapter_draws(provider: str, stand_ins: StandIns, nano: Zoo) -> None:
    """The first token of an answer and the next one, pieces of the model with their ids, without a word of lists."""
    tokenizer = load_chat_tokenizer(str(nano.folder("concise")))
    begun = QUESTION.extended(*map(tokenizer.piece, tokenizer.encode_text("Use it")))
    config = parse_config({"experts": [drawing(stand_ins, provider, tokenizer=str(nano.folder("concise")))]})

    async def work(expert: Expert) -> list[Piece | None]:
        return [await told(expert, context) for context in (QUESTION, begun) for _ in range(4)]

    pieces = set(use(config, work)) - {None}
    assert pieces
    assert pieces <= set(tokenizer.pieces)
    bodies = bodies_of(stand_ins.open(provider))
    assert len(bodies) == 8
    assert not any(map(mentions_logprobs, bodies))


@pytest.mark.parametrize("provider", ["chat", "transformers"])
def test_draws_are_samples_of_the_model(provider: str, stand_ins: StandIns) -> None:
    """After an answer that others have begun they follow the model's own distribution, by a chi-square test.

    What has no text of its own is an error, as often as it is drawn.
    """
    config = parse_config({"experts": [drawing(stand_ins, provider)]})
    engine = stand_ins.open(provider).engines["tiny"]
    ids = engine.encode(engine.render([{"role": "user", "content": "How do I fix a bike?"}]) + "Use it")
    shown = [engine.data(token) if token != engine.end_id else END.data for token in range(engine.vocab_size)]
    place = {data: number for number, data in enumerate(shown) if is_whole_text(data)} | {END.data: engine.end_id}
    exact: dict[Answer, float] = defaultdict(float)
    for data, value in zip(shown, engine.row(ids), strict=True):
        exact[place.get(data, -1),] += math.exp(value)

    async def work(expert: Expert) -> list[Piece | None]:
        return [await told(expert, ANSWER) for _ in range(NUM_DRAWS)]

    drawn: Counter[Answer] = Counter((-1 if piece is None else place[piece.data],) for piece in use(config, work))
    assert chi_square(drawn, exact).p_value > THRESHOLD


@pytest.mark.parametrize("provider", ["llamacpp-chat", "llamacpp-completions"])
def test_draws_of_the_real_llamacpp(provider: str, nano_experts: ZooServer) -> None:
    """They follow the lists that the same server gives by its own route: nothing is filtered, no answer is repeated."""
    tokenizer = load_chat_tokenizer(str(nano_experts.zoo.folder("concise")))
    begun = QUESTION.extended(*map(tokenizer.piece, tokenizer.encode_text("Use it")))
    place = {"base_url": nano_experts.base_urls["concise"], "model": "concise"}
    without = {"provider": provider, "tokenizer": str(nano_experts.zoo.folder("concise")), "logprobs": False}
    rows = [{"name": "long", "provider": "llamacpp", **place}, {"name": "short", **without, **place}]
    config = parse_config({"experts": rows, "cache": {"enabled": False}})
    unreadable = len(tokenizer.pieces)

    def number(piece: Piece | None) -> int:
        if piece is None or piece.token_id is None:
            return unreadable
        return piece.token_id if piece == END or is_whole_text(piece.data) else unreadable

    async def main() -> tuple[TokenDistribution, list[Piece | None]]:
        experts = [open_expert(one, None) for one in config.experts]
        try:
            listed = await experts[0].next_tokens(begun, top_k=len(tokenizer.pieces))
            return listed, await asyncio.gather(*(told(experts[1], begun) for _ in range(NUM_DRAWS)))
        finally:
            for expert in experts:
                await expert.aclose()

    listed, drawn = asyncio.run(main())
    exact: dict[Answer, float] = defaultdict(float)
    for piece, logprob in zip(listed.pieces, listed.logprobs, strict=True):
        exact[number(piece),] += math.exp(logprob)
    counts: Counter[Answer] = Counter((number(piece),) for piece in drawn)
    assert chi_square(counts, exact).p_value > THRESHOLD


def test_a_begun_answer_needs_an_endpoint_that_goes_on(stand_ins: StandIns) -> None:
    """OpenAI's does not: refused before it is asked; a single token it could give."""
    config = parse_config({"experts": [drawing(stand_ins, "openai", dimension="short")], "cache": {"enabled": False}})

    async def main(max_tokens: int) -> str:
        async with open_session(config) as session:
            return (await session.complete("hi", preference="short", max_tokens=max_tokens)).text

    with pytest.raises(PrefillError, match="'short'"):
        asyncio.run(main(2))
    assert bodies_of(stand_ins.open("openai")) == []
    asyncio.run(main(1))
    assert len(bodies_of(stand_ins.open("openai"))) == 1


@pytest.fixture
def configured(stand_ins: StandIns, nano_experts: ZooServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """`mope.toml` here: `long` is the real llama.cpp, `short` gives no logprobs; and all that training would need."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = nano_experts.zoo.folder("concise")
    long = {
        "name": "long",
        "dimension": "long",
        "provider": "llamacpp",
        "base_url": nano_experts.base_urls["informative"],
    }
    short = drawing(stand_ins, "vllm-chat", tokenizer=str(folder), dimension="short")
    (tmp_path / "prompts.txt").write_text("How do I fix a bike?\n")
    (tmp_path / "rewards_without_logprobs.py").write_text("def fair(messages, answer):\n    return 0.0\n")
    reward = {"kind": "function", "function": "rewards_without_logprobs:fair"}
    data: dict[str, Any] = {
        "experts": [long, short],
        "cache": {"enabled": False},
        "merge": {"rule": "linear"},
        "pcm": {"backbone": str(folder), "device": "cpu"},
        "train": {"prompts": "prompts.txt", "reference": "long"},
        "dimensions": {name: {"reward": reward} for name in ("long", "short")},
    }
    (tmp_path / "mope.toml").write_text(as_toml(data))
    return parse_config(data)


def as_toml(data: dict[str, Any]) -> str:
    """One line for each key: a JSON value is a TOML one, but for tables."""
    return "".join(f"{name} = {inline(value)}\n" for name, value in data.items())


def inline(value: Any) -> str:
    """An inline table, a list of them, or a JSON value."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {inline(inner)}" for name, inner in value.items()) + "}"
    return "[" + ", ".join(map(inline, value)) + "]" if isinstance(value, list) else json.dumps(value)


@pytest.mark.usefixtures("configured")
def test_chat_says_that_experts_were_drawn(mope: Run, stand_ins: StandIns) -> None:
    """An answer of both, in text and as JSON; the label names who drew, and no seed is promised."""
    arguments = ["chat", "-c", "mope.toml", "-p", "long,short", "--once", "How do I fix a bike?", "--max-tokens", "12"]
    arguments += ["--seed", "1"]
    plain = mope(*arguments)
    assert plain.status == 0, plain.err
    assert plain.out.strip()
    assert "experts drawn one at a time, without logprobs (long, short)" in plain.err
    assert "seed" not in plain.err  # it would not give this answer again
    tokens = [json.loads(line) for line in mope(*arguments, "--json").out.splitlines()]
    assert {token["drawn_by"] for token in tokens} == {"long", "short"}
    assert {token["logprob"] for token in tokens} == {None}
    assert {token["expert_logprobs"]["short"] for token in tokens} == {None}
    assert all(token["weights"] == {"long": 0.5, "short": 0.5} for token in tokens)
    assert not any(map(mentions_logprobs, bodies_of(stand_ins.open("vllm-chat"))))


def test_why_names_who_drew(configured: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """Each token was carried by one expert alone, which is said."""

    async def main() -> None:
        async with open_session(configured) as session:
            stream = session.stream("How do I fix a bike?", preference="long,short", max_tokens=10, seed=1)
            async for _ in stream:
                pass
            drawers = Counter(step.drawn_by for step in stream.answer.steps)
            print_why(stream.answer, stream.plan)
            lines = [line.split() for line in capsys.readouterr().out.splitlines()]
            share = f"{drawers['short'] / drawers.total():.0%}"
            assert ["short", str(drawers["short"]), share, "50%"] in lines
            assert lines[-1][:2] == ["Without", "logprobs:"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--merge", "geometric"], "the merge rule 'geometric' needs them"),
        (["--temperature", "0.5"], "temperature 0.5"),
        (["--top-p", "0.5"], "top_p 0.5"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("configured")
def test_chat_refuses_what_needs_probabilities(mope: Run, stand_ins: StandIns, flags: list[str], words: str) -> None:
    """Exit status 2, and the expert is named; the endpoint was not asked."""
    refused = mope("chat", "-c", "mope.toml", "-p", "long,short", "--once", "hi", *flags)
    refused.assert_refused(CONFIGURATION, "'short' gives no logprobs", words)
    assert bodies_of(stand_ins.open("vllm-chat")) == []
    assert mope("chat", "-c", "mope.toml", "-p", "long", "--once", "hi", "--max-tokens", "2", *flags).status == 0


@pytest.mark.parametrize(
    "arguments",
    [["train", "mope.toml", "-o", "run"], ["train", "mope.toml", "--dry-run"], ["eval", "-c", "mope.toml", "--quick"]],
    ids=" ".join,
)
@pytest.mark.usefixtures("configured")
def test_training_and_evaluation_refuse_it(mope: Run, stand_ins: StandIns, arguments: list[str]) -> None:
    """Exit status 2 before anything is asked."""
    mope(*arguments).assert_refused(CONFIGURATION, "'short' gives no logprobs", "training and evaluation")
    assert bodies_of(stand_ins.open("vllm-chat")) == []


def cells(result_out: str) -> dict[str, tuple[str, str]]:
    """Check -> verdict and value, of the only expert."""
    (expert,) = json.loads(result_out)["experts"]
    return {one["check"]: (one["verdict"], one["value"]) for one in expert["findings"]}


@pytest.mark.parametrize("provider", ["chat", "mistral", "vllm", "transformers"])
def test_the_doctor_knows_what_draws_need(mope: Run, stand_ins: StandIns, tmp_path: Path, provider: str) -> None:
    """It samples and goes on with an answer: that is all."""
    (tmp_path / "mope.toml").write_text(as_toml({"experts": [drawing(stand_ins, provider)]}))
    result = mope("doctor", "-c", str(tmp_path / "mope.toml"), "--json")
    found = cells(result.out)
    assert found["logprobs"] == ("ok", "draws only, no logprobs (chat, linear rule)")
    assert found["prefill"] == ("ok", "honoured")
    assert found["latency"][1].endswith("ms a token")
    assert result.status == 0
    assert not any(map(mentions_logprobs, bodies_of(stand_ins.open(provider))))


def test_the_doctor_finds_greedy_draws_and_answers_that_are_not_continued(
    mope: Run, stand_ins: StandIns, tmp_path: Path
) -> None:
    """`transformers serve` by another name does not sample; OpenAI's way with a last message begins a new turn."""
    config = tmp_path / "mope.toml"
    greedy = drawing(stand_ins, "completions") | {"base_url": stand_ins.table("transformers")["base_url"]}
    config.write_text(as_toml({"experts": [greedy]}))
    result = mope("doctor", "-c", str(config), "--json")
    assert cells(result.out)["logprobs"] == ("warning", "draws only, always the same")
    ignoring = drawing(stand_ins, "chat") | {"base_url": stand_ins.table("xai")["base_url"]}
    config.write_text(as_toml({"experts": [ignoring]}))
    result = mope("doctor", "-c", str(config), "--json")
    assert cells(result.out)["prefill"][0] == "error"
    assert "not continued" in result.out
    assert result.status == 1
