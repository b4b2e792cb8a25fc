"""The Preference Control Model: untrained it is the user's own weights; on disk it is a plain Hugging Face folder."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mope_bb.config import Config, parse_config
from mope_bb.errors import CheckpointError, PreferenceError
from mope_bb.pcm.model import PolicyWeights, PreferenceControlModel, build_pcm, load_pcm, round_weights
from mope_bb.pcm.runner import PathJudgement, PcmScorer, UserWeights, build_pcm_messages
from mope_bb.session import open_session
from mope_bb.types import END, Answer, Context, Message, Piece
from mope_bb.zoo import DIMENSIONS
from mope_bb.zoo.build import Zoo

QUESTION = "How do I fix a bike?"
EXPERTS = tuple(DIMENSIONS)


def local_config(nano: Zoo, pcm: Path | None) -> Config:
    """Three experts and the base in this process: the same numbers on every run."""
    experts = [
        {"name": name, "provider": "local", "device": "cpu", "model": str(nano.folder(name))}
        | ({"base": True} if name == "base" else {"dimension": name})
        for name in ("base", "concise", "technical", "friendly")
    ]
    table = {"experts": experts, "cache": {"enabled": False}}
    return parse_config(table if pcm is None else table | {"pcm": {"path": str(pcm), "device": "cpu"}})


def answer(config: Config, rule: str, preference: str = "concise=0.6,friendly=0.4") -> Answer:
    """One seeded answer."""

    async def run() -> Answer:
        async with open_session(config) as session:
            return await session.complete(QUESTION, preference=preference, merge=rule, seed=3, max_tokens=40)

    return asyncio.run(run())


@pytest.fixture
def trained(nano: Zoo, tmp_path: Path) -> Path:
    """A PCM whose head and feature weights are not zero, as after training."""
    pcm = build_pcm(str(nano.folder("base")), EXPERTS)
    generator = torch.Generator().manual_seed(0)
    pcm.model.score.weight.data.normal_(0.0, 0.5, generator=generator)
    pcm.feature_weights = torch.tensor([0.3, -0.2, 1.0])
    pcm.policy_version = 7
    pcm.save(tmp_path / "trained")
    return tmp_path / "trained"


@pytest.mark.parametrize("rule", ["linear", "geometric", "product"])
def test_untrained_pcm_is_the_users_own_weights(nano: Zoo, rule: str) -> None:
    """With a fresh PCM every piece, weight and logprob is exactly that of no PCM at all."""
    with_pcm = answer(local_config(nano, nano.pcm), rule)
    without = answer(local_config(nano, None), rule)
    assert with_pcm.steps == without.steps
    expected = (0.6, 0.4) if rule != "product" else (0.0, 1.2, 0.8)
    assert without.steps[0].weights == pytest.approx(expected)


@pytest.mark.parametrize("rule", ["linear", "geometric", "product"])
def test_trained_pcm_changes_the_weights_along_the_answer(nano: Zoo, trained: Path, rule: str) -> None:
    """Scores depend on the context, so the weights are no longer constant."""
    found = answer(local_config(nano, trained), rule)
    assert len({step.weights for step in found.steps}) > 1
    assert {step.policy_version for step in found.steps} == {7}


def test_scores_of_a_growing_answer_equal_one_forward(nano: Zoo, trained: Path) -> None:
    """Append-only ids and the KV cache give what learning will compute in one pass, position by position."""
    pcm = load_pcm(str(trained))
    messages = (Message("user", QUESTION),)
    pieces = tuple(piece for piece in pcm.tokenizer.pieces[40:90] if piece != END and piece.token_id is not None)
    prompt = pcm.tokenizer.encode_chat(build_pcm_messages("Be concise.", messages))

    async def grow() -> torch.Tensor:
        scorer = PcmScorer(pcm, expert_fingerprint=pcm.tokenizer.fingerprint)
        rows = [
            (await scorer.judge(Context(messages, pieces[:n]), "Be concise.", EXPERTS)).head_scores
            for n in range(len(pieces) + 1)
        ]
        await scorer.aclose()
        return torch.stack(rows)

    grown = asyncio.run(grow())
    ids = [*prompt, *(piece.token_id for piece in pieces)]
    with torch.inference_mode():
        whole = pcm.model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 :]
    assert torch.allclose(grown, whole, atol=1e-4)
    assert grown.std(dim=0).min() > 1e-3


def test_another_tokenizer_reads_the_bytes(nano: Zoo, trained: Path) -> None:
    """Where the experts' ids mean nothing to the PCM, it reads whole characters as they become complete."""
    pcm = load_pcm(str(trained))
    accents = tuple(Piece(bytes([byte]), None) for byte in "é🚲ok".encode())

    async def score() -> list[torch.Tensor]:
        scorer = PcmScorer(pcm, expert_fingerprint="another")
        found = [
            (await scorer.judge(Context((Message("user", "Hi"),), accents[:n]), "Be brief.", EXPERTS)).head_scores
            for n in range(len(accents) + 1)
        ]
        await scorer.aclose()
        return found

    rows = asyncio.run(score())
    assert torch.allclose(rows[0], rows[1], atol=1e-5)  # half of an accent says nothing yet
    assert not torch.allclose(rows[1], rows[2], atol=1e-5)


def judged(
    pcm: PreferenceControlModel, fingerprint: str, response: Sequence[Piece], path: Sequence[Piece]
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Scores along `path` by `judge_path`, and by a judgement of its own at each position; forwards of the former."""
    context = Context((Message("user", QUESTION),), tuple(response))

    async def run() -> tuple[torch.Tensor, torch.Tensor, int]:
        scorer, single = (PcmScorer(pcm, expert_fingerprint=fingerprint) for _ in range(2))
        await scorer.judge(context, "Be concise.", EXPERTS)
        before = scorer._runner.num_forwards
        along = await scorer.judge_path(context, path, "Be concise.", EXPERTS)
        num_forwards = scorer._runner.num_forwards - before
        assert scorer.seconds_per_forward > 0
        one_by_one = [
            (await single.judge(context.extended(*path[:n]), "Be concise.", EXPERTS)).head_scores
            for n in range(len(path) + 1)
        ]
        assert along.policy_version == 7
        for one in (scorer, single):
            await one.aclose()
        return along.head_scores, torch.stack(one_by_one), num_forwards

    return asyncio.run(run())


def text_pieces(pcm: PreferenceControlModel, first: int, last: int) -> tuple[Piece, ...]:
    """Pieces of the tokenizer, END left out."""
    return tuple(piece for piece in pcm.tokenizer.pieces[first:last] if piece != END)


def test_a_path_is_judged_in_one_forward(trained: Path) -> None:
    """Along a drafted path the scores are those of one judgement at each position; behind END there is nothing new."""
    pcm = load_pcm(str(trained))
    path = (*text_pieces(pcm, 60, 75), END)
    along, one_by_one, num_forwards = judged(pcm, pcm.tokenizer.fingerprint, text_pieces(pcm, 40, 50), path)
    assert along.shape == (len(path) + 1, len(EXPERTS))
    torch.testing.assert_close(along, one_by_one, rtol=1e-4, atol=1e-4)
    assert num_forwards == 1
    assert along[:-1].std(dim=0).min() > 1e-3
    assert torch.equal(along[-1], along[-2])


def test_a_path_in_another_tokenizer(trained: Path) -> None:
    """The path begins inside a character and ends inside one: a position without new text has the scores before it."""
    pcm = load_pcm(str(trained))
    pieces = [Piece(bytes([byte]), None) for byte in "aé🚲 okÿ".encode("latin-1", "ignore") + "é🚲 ok€".encode()[:-1]]
    along, one_by_one, num_forwards = judged(pcm, "another", pieces[:5], pieces[5:])
    torch.testing.assert_close(along, one_by_one, rtol=1e-4, atol=1e-4)
    assert num_forwards == 1
    assert torch.equal(along[-1], along[-2])


def test_a_path_beyond_the_context_of_the_pcm(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the PCM reads the end of the text only, a path is judged as its positions are, and in few forwards."""
    pcm = load_pcm(str(trained))
    prompt = len(pcm.tokenizer.encode_chat(build_pcm_messages("Be concise.", (Message("user", QUESTION),))))
    monkeypatch.setattr(pcm.model.config, "max_position_embeddings", prompt + 12)
    response, path = text_pieces(pcm, 40, 50), text_pieces(pcm, 60, 92)
    along, one_by_one, num_forwards = judged(pcm, pcm.tokenizer.fingerprint, response, path)
    torch.testing.assert_close(along, one_by_one, rtol=1e-4, atol=1e-4)
    assert 2 <= num_forwards < len(path) / 2


def test_a_path_is_judged_by_one_policy(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New weights that come between the two windows of a path: all of it is judged by them."""
    pcm = load_pcm(str(trained))
    weights = PolicyWeights.of(pcm)
    newer = replace(weights, tensors={name: 2 * one for name, one in weights.tensors.items()}, policy_version=8)
    prompt = len(pcm.tokenizer.encode_chat(build_pcm_messages("", (Message("user", QUESTION),))))
    monkeypatch.setattr(pcm.model.config, "max_position_embeddings", prompt + 4)
    context, path = Context((Message("user", QUESTION),)), text_pieces(pcm, 60, 70)

    async def run() -> tuple[PathJudgement, PathJudgement]:
        scorer = PcmScorer(pcm, expert_fingerprint=pcm.tokenizer.fingerprint)
        read = scorer._runner.marked_rows

        async def load_behind(*args: Any, **options: Any) -> Any:
            monkeypatch.setattr(scorer._runner, "marked_rows", read)
            found = await read(*args, **options)
            await scorer.load(newer)
            return found

        monkeypatch.setattr(scorer._runner, "marked_rows", load_behind)
        interrupted = await scorer.judge_path(context, path, "", EXPERTS)
        again = await scorer.judge_path(context, path, "", EXPERTS)
        await scorer.aclose()
        return interrupted, again

    interrupted, again = asyncio.run(run())
    assert interrupted.policy_version == 8
    torch.testing.assert_close(interrupted.head_scores, again.head_scores, rtol=1e-4, atol=1e-4)


def test_a_contradicted_path_costs_no_other_answer_its_place(trained: Path) -> None:
    """Answers as many as may be open: one whose paths are rejected again and again does not drive out the other."""
    pcm = load_pcm(str(trained))
    one, other = (Context((Message("user", question),)) for question in ("How do I fix a bike?", "Where is the key?"))
    drafts = [text_pieces(pcm, first, first + 5) for first in (60, 70, 80)]

    async def run() -> int:
        scorer = PcmScorer(pcm, expert_fingerprint=pcm.tokenizer.fingerprint, max_open_answers=2)
        await scorer.judge(other, "", EXPERTS)
        for draft in drafts:
            await scorer.judge_path(one, draft, "", EXPERTS)
        before = scorer._runner.num_ids_computed
        await scorer.judge(other.extended(drafts[0][0]), "", EXPERTS)
        await scorer.aclose()
        return scorer._runner.num_ids_computed - before

    assert asyncio.run(run()) == 1


def test_user_weights_along_a_path() -> None:
    """Without a PCM every position has scores of zero."""
    found = asyncio.run(UserWeights().judge_path(Context(()), (Piece(b"a", 1),) * 3, "", EXPERTS))
    assert torch.equal(found.head_scores, torch.zeros(4, len(EXPERTS)))


def test_folder_loads_in_plain_transformers(trained: Path) -> None:
    """No code of ours is needed to read a checkpoint."""
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(trained)
    assert tuple(model.config.id2label[row] for row in range(len(EXPERTS))) == EXPERTS
    again = load_pcm(str(trained))
    assert torch.equal(model.score.weight, again.model.score.weight)
    assert again.feature_weights.tolist() == pytest.approx([0.3, -0.2, 1.0])


def test_sentence_needs_a_trained_pcm(nano: Zoo, trained: Path) -> None:
    """Only a PCM that has learned can read a sentence; otherwise opposite poles would be mixed."""
    sentence = "please keep it short"
    with pytest.raises(PreferenceError, match="names no dimension"):
        answer(local_config(nano, nano.pcm), "linear", sentence)
    assert len(answer(local_config(nano, trained), "linear", sentence).steps[0].experts) == 3


def test_unknown_experts_keep_their_weight(nano: Zoo, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A PCM meets a changed roster by name: a new expert starts with score 0, and a warning says so once."""
    pcm: PreferenceControlModel = build_pcm(str(nano.folder("base")), ["concise", "gone"])
    pcm.save(tmp_path / "other")
    found = answer(local_config(nano, tmp_path / "other"), "linear")
    assert found.steps[0].weights == pytest.approx((0.6, 0.4))
    assert [record.message for record in caplog.records if "friendly" in record.message] == [
        "the PCM does not know the expert 'friendly': its weight stays the user's"
    ]


def test_broken_folders_are_refused(nano: Zoo, trained: Path, tmp_path: Path) -> None:
    """Each one clear error: no mope.json, not JSON, another format, labels that do not fit, an encoder."""
    with pytest.raises(CheckpointError, match=r"has no mope\.json"):
        load_pcm(str(nano.folder("base")))
    document = json.loads((trained / "mope.json").read_text())
    for content, reason in (
        ("{", "cannot be read"),
        (json.dumps(document | {"format": 99}), "another version|has format 99"),
        (json.dumps(document | {"experts": ["one"]}), "6 labels"),
    ):
        (trained / "mope.json").write_text(content)
        with pytest.raises(CheckpointError, match=reason):
            load_pcm(str(trained))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        build_pcm(str(tmp_path / "nothing"), ["a"])


def test_encoder_is_refused(nano: Zoo, tmp_path: Path) -> None:
    """A backbone that looks ahead cannot give weights per token."""
    from transformers import AutoTokenizer, BertConfig, BertForTokenClassification

    config = BertConfig(
        vocab_size=2000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    BertForTokenClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(nano.folder("base")).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is not causal"):
        build_pcm(str(tmp_path), ["a", "b"])


def test_bfloat16_is_that_of_plain_transformers(trained: Path) -> None:
    """On a GPU only the weights are rounded, so that far positions are told apart as well as near ones."""
    from transformers import AutoModelForTokenClassification

    pcm = load_pcm(str(trained))
    round_weights(pcm.model)
    plain = AutoModelForTokenClassification.from_pretrained(trained, dtype=torch.bfloat16).eval()
    ids = torch.arange(4, 804)[None]
    with torch.no_grad():
        found, expected = pcm.model(input_ids=ids).logits, plain(input_ids=ids).logits
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
