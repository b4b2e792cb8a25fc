"""A mope endpoint as an expert of another mope: two levels on real sockets, against the inner level in this process."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from mope_bb.config import Config, load_config, parse_config
from mope_bb.pcm.readout import merged_logprobs
from mope_bb.providers.wire import is_whole_text
from mope_bb.session import Session, open_session
from mope_bb.types import END, Piece
from mope_bb.zoo.build import Zoo
from tests.agents.serving import serve_mope, write_config
from tests.command_line import Run

QUESTIONS: Final = ("How do I fix a bike?", "How do I clean a lamp?", "How do I paint a chair?")
PREFERENCES: Final = {"brief": "concise=0.7,friendly=0.3", "kind": "friendly=0.9,grumpy=0.1"}
LOCKSTEP: Final = {"mode": "lockstep"}
"""Text that was drawn ahead may be read as other tokens than those that were drawn."""


@pytest.fixture(scope="module")
def inner_path(nano: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inner level: models without noise, so that two processes say the same."""
    experts = [
        {"name": name, "dimension": name, "provider": "local", "model": str(nano.folder(name)), "device": "cpu"}
        for name in ("concise", "friendly", "grumpy")
    ]
    return write_config(tmp_path_factory.mktemp("inner") / "mope.toml", experts)


@pytest.fixture(scope="module")
def inner_url(inner_path: Path) -> Iterator[str]:
    """Its endpoint."""
    with serve_mope(inner_path) as url:
        yield f"{url}/v1"


def outer_experts(url: str, **settings: Any) -> list[dict[str, Any]]:
    """One mixture of the endpoint for each preference, said in either way."""
    brief = {"model": "mope", "extra_body": {"preference": PREFERENCES["brief"]}}
    kind = {"model": f"mope:{PREFERENCES['kind']}"}
    shared = {"provider": "mope", "base_url": url, **settings}
    return [{"name": name, "dimension": name, **shared, **own} for name, own in (("brief", brief), ("kind", kind))]


def outer(url: str, **settings: Any) -> Config:
    """The outer level."""
    return parse_config({"experts": outer_experts(url, **settings), "cache": {"enabled": False}, "decoding": LOCKSTEP})


async def inner_list(session: Session, question: str, begun: bytes, preference: str) -> dict[Piece, float]:
    """The merged distribution of the inner level, computed here."""
    stream = session.stream(question, preference=preference, answer_so_far=begun.decode(), max_tokens=1)
    async for _ in stream:
        pass
    (step,) = stream.answer.steps
    return dict(zip(step.candidates.pieces, merged_logprobs(step, stream.plan.rule).tolist(), strict=True))


@pytest.mark.parametrize("name", PREFERENCES)
def test_an_endpoint_says_its_merged_distribution(name: str, inner_url: str, inner_path: Path, nano: Zoo) -> None:
    """Position by position, the end of the answer among the pieces, with ids."""

    async def main() -> tuple[int, int, set[Piece]]:
        num_positions = num_pieces = 0
        drawn: set[Piece] = set()
        config = outer(inner_url, tokenizer=str(nano.folder("base")))
        async with open_session(config) as session, open_session(load_config(inner_path)) as inner:
            for seed, question in enumerate(QUESTIONS):
                begun = b""
                for step in (await session.complete(question, preference=name, max_tokens=40, seed=seed)).steps:
                    expected = await inner_list(inner, question, begun, PREFERENCES[name])
                    listed = zip(step.candidates.pieces, step.candidates.logprobs[0].tolist(), strict=True)
                    for piece, logprob in listed:
                        assert logprob == pytest.approx(expected[piece], abs=1e-6)
                        num_pieces += 1
                    drawn.add(step.piece)
                    num_positions += 1
                    begun += step.piece.data
        return num_positions, num_pieces, drawn

    num_positions, num_pieces, drawn = asyncio.run(main())
    assert num_positions >= 20
    assert num_pieces >= 10 * num_positions
    assert END in drawn
    assert all(piece.token_id is not None for piece in drawn)


def test_a_mixture_of_mixtures_is_one(inner_url: str, inner_path: Path, nano: Zoo) -> None:
    """Two preferences of one endpoint, merged half and half."""

    async def compare(session: Session, inner: Session, question: str) -> int:
        answer = await session.complete(question, preference="brief=0.5,kind=0.5", max_tokens=24, seed=3)
        begun = b""
        for step in answer.steps:
            lists = [await inner_list(inner, question, begun, one) for one in PREFERENCES.values()]
            for piece, *said in zip(step.candidates.pieces, *step.candidates.logprobs.tolist(), strict=True):
                for found, expected in zip(said, lists, strict=True):
                    # Questions that come together are one batch to the models, and round otherwise.
                    assert found == -math.inf or found == pytest.approx(expected[piece], abs=1e-5)
            assert step.weights == pytest.approx((0.5, 0.5))
            # Lists of 64 hold all that the inner experts list, but for half characters, which text cannot continue.
            whole = {piece for one in lists for piece in one if piece == END or is_whole_text(piece.data)}
            lost = [math.exp(value) for one in lists for piece, value in one.items() if piece not in whole]
            assert set(step.candidates.pieces) == whole
            assert step.missed_mass == pytest.approx(math.fsum(lost) / 2, abs=1e-5)
            begun += step.piece.data
        assert begun.decode() == answer.text
        return len(answer.steps)

    async def main() -> int:
        config = outer(inner_url, top_k=64, tokenizer=str(nano.folder("base")))
        async with open_session(config) as session, open_session(load_config(inner_path)) as inner:
            return sum([await compare(session, inner, question) for question in QUESTIONS])

    assert asyncio.run(main()) >= 15


def test_chat_and_doctor(inner_url: str, tmp_path: Path, mope: Run) -> None:
    """Without a `tokenizer` both answer together on the command line; what doctor finds of each is what there is."""
    path = str(write_config(tmp_path / "mope.toml", outer_experts(inner_url)))
    asked = mope("chat", "-c", path, "--pref", "brief,kind", "--once", QUESTIONS[0], "--seed", "1")
    assert asked.status == 0, asked.err
    assert len(asked.out.split()) >= 3
    found = mope("doctor", "-c", path)
    assert found.status == 0, found.out + found.err
    cells = {line.split("  ")[0]: line for line in found.out.splitlines()}
    expected = {
        "top-k": "20 of 20",
        "token ids": "out",
        "bytes": "exact",
        "prefill": "honoured",
        "trailing space": "kept",
        "end of answer": "on the list",
        "scale": "raw",
        "together": "kept apart",
        "tokenizer": "the same",
    }
    for check, value in expected.items():
        assert cells[check].count(value) == 2, found.out
