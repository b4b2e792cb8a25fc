"""The Preference Control Model: untrained it is the user's own weights; on disk it is a plain Hugging Face folder."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch

from mope_bb.config import Config, parse_config
from mope_bb.errors import CheckpointError, PreferenceError
from mope_bb.pcm.model import PreferenceControlModel, build_pcm, load_pcm
from mope_bb.pcm.runner import PcmScorer, build_pcm_messages
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
