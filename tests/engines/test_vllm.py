"""Experts on the real vLLM: exact merges, chat, training with a remote reward model, one answer from three places."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from mope_bb.config import Config, parse_config
from mope_bb.errors import (
    AuthenticationError,
    ContextLengthError,
    LogprobsUnavailableError,
    ModelNotFoundError,
    PrefillError,
    ProviderError,
    TopKError,
)
from mope_bb.pcm.decode import decode
from mope_bb.pcm.gates import LinearGate
from mope_bb.pcm.merging import Plan, merge_step
from mope_bb.pcm.mixture import build_rule
from mope_bb.pcm.runner import UserWeights
from mope_bb.providers.base import Expert, IdExpert
from mope_bb.providers.pool import ExpertPool
from mope_bb.providers.registry import open_expert
from mope_bb.session import open_session
from mope_bb.types import END, Context, DraftStep, Message, Piece, SamplingOptions, TokenDistribution
from mope_bb.zoo.serving import ZooServer
from tests.command_line import Run
from tests.draws import P_VALUE, p_value
from tests.engines.adapters import load_merged
from tests.engines.servers import API_KEY, EngineServer
from tests.exactness.dense import Array, DenseModel, merge_dense, total_variation

EXACT = 1e-4
"""Of any probability of the merged distribution."""
LAMBDAS = {"one": 0.6, "two": 0.4}
BIKE = Context((Message("user", "How do I fix a bike?"),))
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
        "kind": {"enum": ["friend", "stranger"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
    },
    "required": ["name", "code", "kind", "tags"],
    "additionalProperties": False,
}
QUESTIONS = ("How do I fix a bike?", "How do I paint a door?", "How do I repair a café?")


def table(server: EngineServer, name: str, **more: object) -> dict[str, object]:
    """The `[[experts]]` table of one model of a vLLM; its tokenizer is found by the server's word."""
    return {"name": name, "provider": "vllm", "base_url": server.base_url + "/v1", "model": name, **more}


def three(server: EngineServer, **more: object) -> list[dict[str, object]]:
    """The base and the two adapters of one server."""
    return [
        table(server, "base", base=True, **more),
        *(table(server, name, dimension=name, **more) for name in ("one", "two")),
    ]


def config_of(*experts: Mapping[str, object], **more: object) -> Config:
    """A configuration without a cache."""
    return parse_config({"experts": list(experts), "cache": {"enabled": False}, **more})


@pytest.fixture(scope="module")
def dense(vllm: EngineServer) -> dict[str, DenseModel]:
    """The three models in float64."""
    found = {"base": DenseModel.load(vllm.folder)}
    for name, folder in vllm.adapters.items():
        found[name] = DenseModel(load_merged(vllm.folder, folder).double(), found["base"].tokenizer)
    return found


@pytest.mark.parametrize("provider", ["vllm", "vllm-generate"])
def test_merges_equal_the_dense_oracle(vllm: EngineServer, dense: dict[str, DenseModel], provider: str) -> None:
    """Full lists give the oracle's distribution under every rule; k = 5 and 20 stay within `missed_mass`."""
    size = dense["base"].model.config.vocab_size
    pools = {
        k: ExpertPool(config_of(*three(vllm, provider=provider, top_k=k)).experts, cache=None) for k in (5, 20, size)
    }
    gaps: dict[str, float] = {}
    excess, num_steps = -1.0, 0

    async def walk(question: str, seed: int) -> None:
        nonlocal excess, num_steps
        context = Context((Message("user", question),))
        linear = Plan(build_rule("linear"), tuple(LAMBDAS), tuple(LAMBDAS.values()), "base", "")
        options = SamplingOptions(max_tokens=40)
        steps = [s async for s in decode(context, linear, pools[size], UserWeights(), options, seed=seed)]
        ids = [s.piece.token_id for s in steps if s.piece != END and s.piece.token_id is not None]
        truth = {name: model.logprobs(question, ids) for name, model in dense.items()}
        for pool in pools.values():
            await pool.open(("base", *LAMBDAS))
        for position in range(len(ids) + 1):
            here = Context(context.messages, tuple(s.piece for s in steps[:position]))
            rows = {name: values[position] for name, values in truth.items()}
            told = {k: await pool.ask(("base", *LAMBDAS), here) for k, pool in pools.items()}
            for rule in ("linear", "geometric", "product"):
                expected = merge_dense(rule, rows, LAMBDAS, "base")
                gap = float(np.abs(merged(rule, told[size], size, dense)[0] - expected).max())
                gaps[rule] = max(gaps.get(rule, 0.0), gap)
            for k in (5, 20):
                found, bound = merged("linear", told[k], size, dense)
                excess = max(excess, total_variation(found, merge_dense("linear", rows, LAMBDAS, None)) - bound)
            num_steps += 1

    async def main() -> None:
        try:
            for seed, question in enumerate(QUESTIONS):
                await walk(question, seed)
        finally:
            for pool in pools.values():
                await pool.aclose()

    asyncio.run(main())
    print(f"{provider}: {num_steps} steps, largest gaps {gaps}, excess over missed_mass {excess:.2g}")
    assert num_steps >= 60
    assert max(gaps.values()) <= EXACT, gaps
    assert excess <= 1e-5


def merged(rule: str, told: list[TokenDistribution], size: int, dense: dict[str, DenseModel]) -> tuple[Array, float]:
    """pi over the whole vocabulary, and the reported missed mass."""
    plan = Plan(build_rule(rule, plausibility=0.0), tuple(LAMBDAS), tuple(LAMBDAS.values()), "base", "")
    found = merge_step(plan, told if plan.rule.needs_base else told[1:], torch.zeros(2), LinearGate())
    row = np.zeros(size)
    for piece, value in zip(found.candidates.pieces, found.log_pi.exp().tolist(), strict=True):
        row[dense["base"].tokenizer.eos_token_id if piece == END else piece.token_id] = value
    return row, found.missed_mass or 0.0


def test_greedy_on_one_expert_is_its_own_greedy_answer(vllm: EngineServer, dense: dict[str, DenseModel]) -> None:
    """Token by token over HTTP, against the model's own choice in float64."""

    async def main() -> None:
        async with open_session(config_of(*three(vllm))) as session:
            for question in QUESTIONS:
                answer = await session.complete(question, preference="one", temperature=0.0, max_tokens=30)
                ids = [step.piece.token_id for step in answer.steps if step.piece.token_id is not None]
                rows = dense["one"].logprobs(question, [token for token in ids if token >= 0])
                for token, row in zip(ids, rows, strict=False):
                    best = row.max()
                    assert row[dense["one"].tokenizer.eos_token_id if token < 0 else token] >= best - 1e-4

    asyncio.run(main())


def test_chat_on_the_command_line(vllm: EngineServer, mope: Run, tmp_path: Path) -> None:
    """The ML engineer's first minute: find the server, look at it, ask it."""
    path = str(tmp_path / "mope.toml")
    written = mope("init", vllm.base_url + "/v1", "-o", path)
    assert written.status == 0, written.err
    assert "vllm, models base, one, two" in written.err
    assert mope("doctor", "-c", path).status == 0
    answer = mope(
        "chat",
        "-c",
        path,
        "--pref",
        "one=0.7,two=0.3",
        "--once",
        "How do I fix a bike?",
        "--max-tokens",
        "12",
        "--json",
    )
    assert answer.status == 0, answer.err
    tokens = [json.loads(line) for line in answer.out.splitlines()]
    assert tokens[0]["weights"] == pytest.approx({"one": 0.7, "two": 0.3})


def test_one_answer_from_three_places(vllm: EngineServer, nano_experts: ZooServer) -> None:
    """In this process, behind llama.cpp, behind vLLM: one tokenizer, one answer."""
    config = config_of(
        {
            "name": "concise",
            "dimension": "concise",
            "provider": "local",
            "model": str(nano_experts.zoo.folder("concise")),
        },
        {
            "name": "friendly",
            "dimension": "friendly",
            "provider": "llamacpp",
            "base_url": nano_experts.base_urls["friendly"],
        },
        table(vllm, "one", dimension="plain"),
    )

    async def main() -> None:
        async with open_session(config) as session:
            answer = await session.complete("How do I fix a bike?", preference="concise,friendly,plain", seed=3)
        assert answer.text
        for step in answer.steps:
            assert step.experts == ("concise", "friendly", "one")
            assert step.weights == pytest.approx((1 / 3, 1 / 3, 1 / 3))
            assert all(max(row) > -10 for row in step.candidates.logprobs)

    asyncio.run(main())


@pytest.mark.parametrize("provider", ["vllm", "vllm-generate"])
def test_named_tokens_are_those_of_the_whole_list(vllm: EngineServer, provider: str) -> None:
    """Improbable ones too, and several at once: each has the logprob that a list of the whole vocabulary gives it."""

    async def run() -> None:
        pool = ExpertPool(config_of(*three(vllm, provider=provider, top_k=5)).experts, cache=None)
        try:
            await pool.open(("base", "one"))
            vocabulary = await pool.vocabulary("base")
            wanted = [END, *vocabulary[200:300]]
            named = await pool.ask_among(("base", "one"), BIKE, wanted)
            whole = await asyncio.gather(
                *(open_expert_of(pool, name).next_tokens(BIKE, top_k=len(vocabulary)) for name in ("base", "one"))
            )
            for found, known in zip(named, whole, strict=True):
                truth = dict(zip(known.pieces, known.logprobs, strict=True))
                # On the one route the drawn token stands in the place of the last one.
                assert set(wanted[:-1] if provider == "vllm-generate" else wanted) <= set(found.pieces)
                for piece, value in zip(found.pieces, found.logprobs, strict=True):
                    assert value == pytest.approx(truth[piece], abs=1e-3)
        finally:
            await pool.aclose()

    asyncio.run(run())


def open_expert_of(pool: ExpertPool, name: str) -> Expert:
    """The adapter itself."""
    return pool._experts[name]


@pytest.mark.parametrize("provider", ["vllm", "vllm-generate"])
def test_answers_have_the_form_that_is_asked_for(vllm: EngineServer, provider: str) -> None:
    """JSON that fits its schema, and a tool call, by lists of five tokens of models that have never seen either."""
    tool = {"type": "function", "function": {"name": "note", "parameters": PERSON}}

    async def run() -> None:
        async with open_session(config_of(*three(vllm, provider=provider, top_k=5))) as session:
            for seed in range(4):
                answer = await session.complete(
                    "How do I fix a bike?",
                    preference="one=0.6,two=0.4",
                    response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
                    max_tokens=120,
                    seed=seed,
                )
                jsonschema.validate(json.loads(answer.text), PERSON)
                assert answer.finish_reason == "stop"
            answer = await session.complete("Hi", preference="one", tools=[tool], tool_choice="required", seed=1)
            jsonschema.validate(json.loads(answer.tool_calls[0].arguments), PERSON)

    asyncio.run(run())


@pytest.mark.parametrize("provider", ["vllm", "vllm-generate", "vllm-chat"])
def test_drafts_and_scores_are_the_lists_of_single_questions(vllm: EngineServer, provider: str) -> None:
    """Also where the drawn piece is not among the best, which the real server then adds or lets in for another."""
    expert_table = table(vllm, "one", provider=provider, tokenizer=str(vllm.folder))
    config = config_of({**expert_table, "top_k": 5}).experts[0]

    async def main() -> None:
        expert = open_expert(config, None)
        try:
            steps = await expert.draft(BIKE, top_k=5, num_tokens=16, temperature=expert.draft_temperature(1.0), seed=4)
            assert len(steps) > 4
            assert provider != "vllm" or any(step.index is None for step in steps)
            path = [step.piece for step in steps]
            scored = await expert.score(BIKE, path[:-1], top_k=5)
            for position, (step, score) in enumerate(zip(steps, scored, strict=True)):
                alone = await expert.next_tokens(BIKE.extended(*path[:position]), top_k=5)
                for found in (step.distribution, score):
                    assert found.pieces == alone.pieces
                    assert found.logprobs == pytest.approx(alone.logprobs, abs=EXACT)
        finally:
            await expert.aclose()

    asyncio.run(main())


def test_drawn_pieces_follow_q(vllm: EngineServer) -> None:
    """400 drafts at 0.4, whose first pieces are drawn from q given that they are on a list of 8."""
    config = config_of(table(vllm, "base")).experts[0]

    async def main() -> list[DraftStep]:
        expert = open_expert(config, None)
        try:
            asked = [expert.draft(BIKE, top_k=8, num_tokens=1, temperature=0.4, seed=seed) for seed in range(400)]
            return [steps[0] for steps in await asyncio.gather(*asked)]
        finally:
            await expert.aclose()

    assert p_value(asyncio.run(main())) > P_VALUE


def test_a_draft_is_as_short_as_the_context_wants_it(vllm: EngineServer) -> None:
    """vLLM shortens it; what does not fit at all is refused as a single question is."""
    config = config_of({**table(vllm, "base"), "max_retries": 0}).experts[0]

    async def main() -> None:
        expert = open_expert(config, None)
        assert isinstance(expert, IdExpert)
        try:
            num_prompt = len(await expert.ids_of(BIKE))
            for num_left in (1, 3):
                long = BIKE.extended(*[Piece(b"", 5)] * (512 - num_left - num_prompt))
                steps = await expert.draft(long, top_k=5, num_tokens=24, temperature=1.0, seed=1)
                assert 1 <= len(steps) <= num_left
            with pytest.raises(ContextLengthError):
                await expert.draft(BIKE.extended(*[Piece(b"", 5)] * (512 - num_prompt)), top_k=5, num_tokens=24)
        finally:
            await expert.aclose()

    asyncio.run(main())


def test_three_training_steps_with_a_remote_reward_model(
    vllm: EngineServer, vllm_scorer: EngineServer, mope: Run, tmp_path: Path
) -> None:
    """Two experts on vLLM, a reward model of the zoo behind vLLM's /classify, `mope-bb train` as a user runs it."""
    reward = {"kind": "remote", "provider": "vllm", "base_url": vllm_scorer.base_url + "/v1", "model": vllm_scorer.name}
    (tmp_path / "prompts.txt").write_text("How do I fix a bike?\nHow do I paint a door?\n")
    lines = [f"[[experts]]\n{toml(one)}" for one in three(vllm)]
    lines += [f'[dimensions.{name}]\ntext = "{name}"\nreward = {{ {toml(reward, ", ")} }}\n' for name in ("one", "two")]
    lines += [
        f'[pcm]\nbackbone = {json.dumps(str(vllm.folder))}\ndevice = "cpu"\n',
        '[train]\nprompts = "prompts.txt"\nmax_steps = 3\nbatch_size = 4\nmax_tokens = 10\n',
        "[cache]\nenabled = false\n",
    ]
    path = tmp_path / "mope.toml"
    path.write_text("\n".join(lines))
    run = tmp_path / "run"
    result = mope("train", "-c", str(path), "--out", str(run))
    assert result.status == 0, result.err
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["num_dropped"] == 0 for step in steps)
    assert all(abs(step["logprob_gap"]) < 1e-3 for step in steps if "logprob_gap" in step)
    assert (
        mope(
            "chat",
            "-c",
            str(path),
            "--pcm",
            str(run / "checkpoints" / "last"),
            "--pref",
            "one,two",
            "--once",
            "How do I fix a bike?",
            "--max-tokens",
            "5",
        ).status
        == 0
    )


def toml(values: Mapping[str, object], separator: str = "\n") -> str:
    """Keys and values."""
    return separator.join(f"{key} = {json.dumps(value)}" for key, value in values.items()) + separator.strip(", ")


CELLS = {
    "vllm": {
        "token ids": "in and out",
        "trailing space": "kept (ids)",
        "drafts": "true samples",
        "scoring": "list of prefixes",
    },
    "vllm-generate": {
        "token ids": "in and out",
        "trailing space": "kept (ids)",
        "drafts": "lists only",
        "scoring": "token by token",
    },
    "vllm-chat": {
        "token ids": "out",
        "trailing space": "kept",
        "scoring": "token by token",
        "model": "not listed",
    },
}
ALIKE = {
    "model": "base",
    "logprobs": "given",
    "top-k": "20 of 20",
    "order": "drawn token first",
    "bytes": "exact",
    "prefill": "honoured",
    "end of answer": "on the list",
    "scale": "raw",
    "tokenizer": "known",
    "connection": "ok",
}


@pytest.mark.parametrize("provider", list(CELLS))
def test_the_doctor_on_vllm(vllm: EngineServer, mope: Run, tmp_path: Path, provider: str) -> None:
    """Cell by cell, on each of its routes."""
    document = examine(mope, tmp_path, table(vllm, "base", provider=provider, tokenizer=str(vllm.folder)))
    cells = {one["check"]: one["value"] for one in document["experts"][0]["findings"]}
    expected = {**ALIKE, **CELLS[provider]}
    assert {check: cells.get(check) for check in expected} == expected
    assert document["can_run"]


def test_the_doctor_on_a_locked_vllm(
    vllm_locked: EngineServer, mope: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the key nothing works; with it the cap on lists is named with the remedy."""
    closed = examine(mope, tmp_path, table(vllm_locked, "base"))
    assert finding(closed, "reachable")["verdict"] == "error"
    assert "api_key_env" in finding(closed, "reachable")["advice"]
    monkeypatch.setenv("LOCKED_KEY", API_KEY)
    capped = examine(mope, tmp_path, table(vllm_locked, "base", api_key_env="LOCKED_KEY", top_k=50))
    assert finding(capped, "top-k")["value"] == "refuses 50"
    assert "top_k = 20" in finding(capped, "top-k")["advice"]
    assert examine(mope, tmp_path, table(vllm_locked, "base", api_key_env="LOCKED_KEY"))["can_run"]


def test_the_doctor_on_a_reward_model_and_on_a_model_that_is_none(
    vllm: EngineServer, vllm_scorer: EngineServer, mope: Run, tmp_path: Path
) -> None:
    """A remote reward model gives a score; a model that writes text has no such route."""
    for server, verdict in ((vllm_scorer, "ok"), (vllm, "error")):
        reward = {"kind": "remote", "provider": "vllm", "base_url": server.base_url + "/v1", "model": server.name}
        more = f'[dimensions.one]\ntext = "x"\nreward = {{ {toml(reward, ", ")} }}\n'
        document = examine(mope, tmp_path, table(vllm, "one", dimension="one"), more=more)
        assert [one["verdict"] for one in document["rewards"]] == [verdict]
        assert document["can_run"] is (verdict == "ok")


@pytest.mark.parametrize("provider", ["completions", "chat"])
def test_the_doctor_on_transformers_serve(
    transformers_server: EngineServer, mope: Run, tmp_path: Path, provider: str
) -> None:
    """It answers, and gives no logprobs: reachable, and of no use as an expert."""
    expert = {
        **table(transformers_server, "e", provider=provider),
        "model": transformers_server.name,
        "tokenizer": str(transformers_server.folder),
    }
    document = examine(mope, tmp_path, expert)
    assert finding(document, "reachable")["verdict"] == "ok"
    assert (finding(document, "logprobs")["verdict"], finding(document, "logprobs")["value"]) == (
        "error",
        "LogprobsUnavailableError",
    )
    assert "vLLM" in finding(document, "logprobs")["advice"]
    assert not document["can_run"]


def examine(mope: Run, folder: Path, expert: Mapping[str, object], more: str = "") -> dict[str, Any]:
    """What `mope-bb doctor --json` says of one expert."""
    path = folder / "doctor.toml"
    path.write_text(f"[[experts]]\n{toml(expert)}\n{more}")
    document: dict[str, Any] = json.loads(mope("doctor", "-c", str(path), "--json").out)
    return document


def finding(document: dict[str, Any], check: str) -> dict[str, str]:
    """One cell of the only expert."""
    found: dict[str, str] = next(one for one in document["experts"][0]["findings"] if one["check"] == check)
    return found


def ask_wrongly(server: EngineServer, question: str = "Hi?", **changes: object) -> ProviderError:
    """The error of one question to a locked vLLM, with a table that is wrong in one way."""
    settings = {**table(server, "base"), "api_key_env": "LOCKED_KEY", "max_retries": 0, **changes}
    config = config_of(settings).experts[0]

    async def main() -> None:
        expert = open_expert(config, None)
        try:
            await expert.next_tokens(Context((Message("user", question),)), top_k=config.top_k)
        finally:
            await expert.aclose()

    with pytest.raises(ProviderError) as caught:
        asyncio.run(main())
    return caught.value


def test_refusals_are_typed_and_say_what_to_do(vllm_locked: EngineServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong key, wrong model, too long a list, too long a prompt, on the real server."""
    monkeypatch.setenv("LOCKED_KEY", "wrong")
    wrong_key = ask_wrongly(vllm_locked)
    assert type(wrong_key) is AuthenticationError
    assert "api_key_env" in str(wrong_key.hint)
    monkeypatch.setenv("LOCKED_KEY", API_KEY)
    wrong_model = ask_wrongly(vllm_locked, model="nope")
    assert type(wrong_model) is ModelNotFoundError
    assert "Served: base" in str(wrong_model.hint)
    too_many = ask_wrongly(vllm_locked, top_k=21)
    assert type(too_many) is TopKError
    assert "top_k = 20" in str(too_many.hint)
    for length in (600, 3000):
        too_long = ask_wrongly(vllm_locked, "bike " * length)
        assert type(too_long) is ContextLengthError
        assert "512" in str(too_long)
    closed = ask_wrongly(vllm_locked, provider="vllm-generate")
    assert "--enable-scale-out" in str(closed) + str(closed.hint)
    unknown = ask_wrongly(vllm_locked, provider="vllm-chat", model="nope")
    assert type(unknown) is ModelNotFoundError


def test_a_prompt_that_fills_the_context_is_too_long(
    vllm_locked: EngineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM then complains of `max_tokens`: to the last token it is still the context that is full."""
    monkeypatch.setenv("LOCKED_KEY", API_KEY)
    config = config_of({**table(vllm_locked, "base"), "api_key_env": "LOCKED_KEY", "max_retries": 0}).experts[0]

    async def main() -> None:
        expert = open_expert(config, None)
        assert hasattr(expert, "ask")
        try:
            assert (await expert.ask((5,) * 511, 5)).pieces
            with pytest.raises(ContextLengthError):
                await expert.ask((5,) * 512, 5)
        finally:
            await expert.aclose()

    asyncio.run(main())


def test_transformers_serve_cannot_be_merged(transformers_server: EngineServer) -> None:
    """No logprobs and no prefill, each named."""
    base = {"model": transformers_server.name, "tokenizer": str(transformers_server.folder), "max_retries": 0}
    for provider, kinds in (("completions", (LogprobsUnavailableError,)), ("vllm-chat", (PrefillError, ProviderError))):
        config = config_of({**table(transformers_server, "e", provider=provider), **base}).experts[0]

        async def main(config: Any = config) -> None:
            expert = open_expert(config, None)
            try:
                await expert.next_tokens(Context((Message("user", "Hi?"),)), top_k=5)
            finally:
                await expert.aclose()

        with pytest.raises(kinds):
            asyncio.run(main())
