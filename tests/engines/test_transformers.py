"""`transformers serve`, which gives no logprobs, as an expert: true samples, chat beside llama.cpp, what cannot be."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mope_bb.chat_tokenizer import load_chat_tokenizer
from mope_bb.config import Config, parse_config
from mope_bb.errors import AlignmentError, PrefillError
from mope_bb.providers.registry import open_expert
from mope_bb.providers.wire import is_whole_text
from mope_bb.session import open_session
from mope_bb.types import END, Context, Message, Piece
from mope_bb.types import Answer as WrittenAnswer
from mope_bb.zoo.serving import ZooServer
from tests.command_line import Run
from tests.engines.servers import EngineServer
from tests.speculation.measure import THRESHOLD, Answer, chi_square

QUESTION = Context((Message("user", "How do I fix a bike?"),))
BEGUN = "Use a hammer."
"""An answer that may have come to its end."""
NUM_DRAWS = 300


def table(server: EngineServer, provider: str = "transformers") -> dict[str, object]:
    """The expert `short`."""
    served = {"base_url": server.base_url + "/v1", "model": server.name, "tokenizer": str(server.folder)}
    return {"name": "short", "dimension": "short", "provider": provider, "logprobs": False, **served}


def config_of(*experts: Mapping[str, object]) -> Config:
    """A configuration without a cache."""
    return parse_config({"experts": list(experts), "cache": {"enabled": False}})


def test_draws_are_samples_of_the_model(transformers_server: EngineServer) -> None:
    """After a begun answer they follow the distribution of the same model in this process, by a chi-square test.

    The end is one of them, though this server calls every end that is the last token "length".
    """
    tokenizer = load_chat_tokenizer(str(transformers_server.folder))
    begun = QUESTION.extended(*map(tokenizer.piece, tokenizer.encode_text(BEGUN)))
    model = AutoModelForCausalLM.from_pretrained(transformers_server.folder, dtype=torch.float64)
    ids = [*tokenizer.encode_chat(begun.messages), *tokenizer.encode_text(BEGUN)]
    with torch.no_grad():
        row = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).tolist()

    async def main() -> list[Piece | None]:
        expert = open_expert(config_of(table(transformers_server)).experts[0], None)
        drawn: list[Piece | None] = []
        for _ in range(NUM_DRAWS):
            try:
                drawn.append(await expert.sample(begun))
            except AlignmentError:  # half a character
                drawn.append(None)
        await expert.aclose()
        return drawn

    exact: dict[Answer, float] = defaultdict(float)
    for token_id, value in enumerate(row):
        piece = tokenizer.piece(token_id)
        exact[number(piece if piece == END or is_whole_text(piece.data) else None),] += math.exp(value)
    assert 0.05 < exact[number(END),] < 0.95
    drawn: Counter[Answer] = Counter((number(piece),) for piece in asyncio.run(main()))
    assert chi_square(drawn, exact).p_value > THRESHOLD


def number(piece: Piece | None) -> int:
    """Its id; -1 for the end, -2 for what cannot be told."""
    return -2 if piece is None or piece.token_id is None else piece.token_id


def test_chat_beside_llamacpp(transformers_server: EngineServer, nano_experts: ZooServer) -> None:
    """Both write one answer."""
    listed = {"name": "long", "dimension": "long", "provider": "llamacpp", "base_url": nano_experts.base_urls["base"]}

    async def main() -> list[WrittenAnswer]:
        async with open_session(config_of(listed, table(transformers_server))) as session:
            answers = []
            for seed in range(8):
                stream = session.stream(QUESTION.messages, preference="long,short", max_tokens=12, seed=seed)
                try:
                    async for _ in stream:
                        pass
                except AlignmentError:  # half a character
                    continue
                answers.append(stream.answer)
            return answers

    answers = asyncio.run(main())
    assert any(len(answer.text) > 10 for answer in answers)
    assert {step.drawn_by for answer in answers for step in answer.steps} == {"long", "short"}


def test_chat_completions_are_not_continued(transformers_server: EngineServer, mope: Run, tmp_path: Path) -> None:
    """The flag for it is refused as such; without the flag the doctor finds it, and that the server is greedy."""

    async def main() -> None:
        expert = open_expert(config_of(table(transformers_server, "vllm-chat")).experts[0], None)
        try:
            await expert.sample(QUESTION.extended(Piece(b"Use")))
        finally:
            await expert.aclose()

    with pytest.raises(PrefillError, match="continue_final_message"):
        asyncio.run(main())
    found = doctor(mope, tmp_path, table(transformers_server, "chat"))
    assert found["prefill"][0] == "error"
    assert found["logprobs"] == ("warning", "draws only, always the same")


def test_the_doctor(transformers_server: EngineServer, mope: Run, tmp_path: Path) -> None:
    """By its own name it draws, and goes on with what others have begun."""
    found = doctor(mope, tmp_path, table(transformers_server))
    assert found["logprobs"] == ("ok", "draws only, no logprobs (chat, linear rule)")
    assert found["prefill"] == ("ok", "honoured")


def doctor(mope: Run, folder: Path, expert: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """Check -> verdict and value."""
    path = folder / "doctor.toml"
    path.write_text(
        "[[experts]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in expert.items()), encoding="utf-8"
    )
    (report,) = json.loads(mope("doctor", "-c", str(path), "--json").out)["experts"]
    return {one["check"]: (one["verdict"], one["value"]) for one in report["findings"]}
