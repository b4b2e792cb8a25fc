"""The zoo's reward models: built, repaired and served like its experts; learned from pairs that the oracle ranks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForSequenceClassification

from mope_bb.config import RewardConfig, load_config
from mope_bb.errors import ConfigError
from mope_bb.rewards.classifier import open_classifier
from mope_bb.types import Message
from mope_bb.zoo.build import REWARDS, Zoo, build_zoo, is_built
from mope_bb.zoo.oracle import score
from mope_bb.zoo.reward_models import (
    PADDING,
    REWARD_RECIPES,
    RewardRecipe,
    draw_comparison,
    new_reward_model,
    reward_accuracy,
    train_reward,
)
from mope_bb.zoo.serving import ZooServer
from mope_bb.zoo.wording import DIMENSIONS

RECIPE = dataclasses.replace(REWARD_RECIPES["nano"], test_pairs=100)


def fresh(nano: Zoo) -> tuple[LlamaForSequenceClassification, AutoTokenizer]:
    """An untrained reward model on the nano base, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(nano.folder("base"))
    tokenizer.pad_token = PADDING
    return new_reward_model(nano.folder("base"), tokenizer), tokenizer


def trained(nano: Zoo, recipe: RewardRecipe, pole: str = "friendly", seed: int = 0) -> LlamaForSequenceClassification:
    """A reward model trained by `recipe`."""
    model, tokenizer = fresh(nano)
    train_reward(model, tokenizer, recipe, pole=pole, seed=seed)
    return model


def test_reward_models_are_a_part_of_the_zoo(nano: Zoo) -> None:
    """One per pole, with its accuracy and every file's hash in the manifest."""
    assert tuple(nano.rewards) == DIMENSIONS
    entries = json.loads((nano.root / "manifest.json").read_text())["rewards"]
    for pole, accuracy in nano.rewards.items():
        assert accuracy == entries[pole]["accuracy"]
        files = {path.relative_to(nano.root).as_posix() for path in nano.reward_model(pole).iterdir()}
        assert f"rewards/{pole}/model.safetensors" in files
        assert files == set(entries[pole]["files"])
        for path, known in entries[pole]["files"].items():
            assert known == hashlib.sha256((nano.root / path).read_bytes()).hexdigest()
    with pytest.raises(ConfigError, match="no reward model 'witty'"):
        nano.reward_model("witty")


def test_damage_is_repaired_to_the_same_bytes(own_nano: Zoo, tmp_path: Path) -> None:
    """Only the damaged reward model is trained again, and it is the same one."""
    weights = own_nano.reward_model("grumpy") / "model.safetensors"
    before, untouched = weights.read_bytes(), (own_nano.reward_model("simple") / "model.safetensors").stat().st_mtime_ns
    weights.write_bytes(b"damage")
    assert not is_built(size="nano", home=tmp_path)
    begun: list[str] = []
    again = build_zoo(
        size="nano", home=tmp_path, progress=lambda name, share: begun.append(name) if not share else None
    )
    assert begun == ["rewards/grumpy"]
    assert again == own_nano
    assert weights.read_bytes() == before
    assert (own_nano.reward_model("simple") / "model.safetensors").stat().st_mtime_ns == untouched
    assert is_built(size="nano", home=tmp_path)


def test_zoos_from_before_and_of_another_base_are_completed(own_nano: Zoo, tmp_path: Path) -> None:
    """A manifest without reward models gets them; one made from another base is built anew."""
    manifest_file = own_nano.root / "manifest.json"
    manifest = json.loads(manifest_file.read_text())
    rewards = manifest.pop("rewards")
    manifest_file.write_text(json.dumps(manifest))
    assert not is_built(size="nano", home=tmp_path)
    rewards["simple"]["made_from"] = "another base"
    manifest_file.write_text(json.dumps({**manifest, "rewards": rewards}))
    begun: list[str] = []
    build_zoo(size="nano", home=tmp_path, progress=lambda name, share: begun.append(name) if share == 0 else None)
    assert begun == ["rewards/simple"]
    assert begun[0] in REWARDS
    assert is_built(size="nano", home=tmp_path)


def test_training_is_reproducible_to_the_last_bit(nano: Zoo) -> None:
    """The same seed gives the same weights; another seed gives others; the threads are given back."""

    def digest(seed: int) -> str:
        weights = trained(nano, dataclasses.replace(RECIPE, steps=3), seed=seed).state_dict()
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in weights.values())).hexdigest()

    threads = torch.get_num_threads()
    assert digest(0) == digest(0)
    assert digest(0) != digest(1)
    assert threads == torch.get_num_threads()


def test_pairs_teach(nano: Zoo) -> None:
    """Some steps on the body of a bad speaker make a judge that is far better than chance on unseen questions."""
    model = trained(nano, dataclasses.replace(RECIPE, steps=30, questions=4))
    assert reward_accuracy(model, fresh(nano)[1], RECIPE, pole="friendly") > 0.8


def test_accuracy_counts_pairs_in_order(nano: Zoo) -> None:
    """A judge that says the same of all is never right; its opposite is right where it is wrong."""
    model, tokenizer = fresh(nano)
    assert reward_accuracy(model, tokenizer, RECIPE, pole="concise") == 0
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    share = reward_accuracy(model, tokenizer, RECIPE, pole="concise")
    assert 0 < share < 1
    with torch.no_grad():
        model.score.weight.neg_()
    assert reward_accuracy(model, tokenizer, RECIPE, pole="concise") == pytest.approx(1 - share)


@pytest.mark.parametrize("held_out", [False, True])
def test_comparisons(held_out: bool) -> None:
    """Answers to one question of the right set; ranked as the oracle does, ties left out, poles opposed."""
    rng = random.Random(0)
    for _ in range(50):
        drawn = draw_comparison(rng, 3, held_out=held_out)
        assert drawn.task.held_out == held_out
        assert [one[-1]["content"] for one in drawn.conversations()] == list(drawn.answers)
        assert drawn.prompt[-1]["role"] == "user"
        values = [score(text, drawn.task).concise for text in drawn.answers]
        ranked = drawn.ranked("concise")
        assert all(values[better] > values[worse] for better, worse in ranked)
        ties = sum(values[i] == values[j] for i in range(3) for j in range(i))
        assert len(ranked) == 3 - ties
        assert {(b, a) for a, b in drawn.ranked("friendly")} == set(drawn.ranked("grumpy"))


def test_plain_transformers_give_the_same_scores(nano: Zoo) -> None:
    """A folder used as any other sequence classifier, padded by its tokenizer, scores as the reward panel does."""
    folder = nano.reward_model("informative")
    rng = random.Random(0)
    asked = [one for _ in range(4) for one in draw_comparison(rng, 2).conversations()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer.apply_chat_template(asked, padding=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        plain = LlamaForSequenceClassification.from_pretrained(folder)(**encoded).logits[:, 0].tolist()
    model = open_classifier("informative", RewardConfig(kind="classifier", path=str(folder), device="cpu"))
    ours = model.score([tuple(Message(message["role"], message["content"]) for message in one) for one in asked])
    assert ours == pytest.approx(plain, abs=1e-5)
    assert max(plain) > min(plain)


def test_served_configuration_names_the_rewards(nano: Zoo, tmp_path: Path) -> None:
    """Every served dimension has its reward model, also through TOML; a zoo without reward models has none."""
    server = ZooServer(nano, dict.fromkeys(("base", "simple"), "http://127.0.0.1:1"), 0, tmp_path / "log")
    server.write_config(tmp_path / "mope.toml")
    config = load_config(tmp_path / "mope.toml")
    assert config == server.config()
    reward = RewardConfig(kind="classifier", path=str(nano.reward_model("simple")), device="cpu")
    assert {name: section.reward for name, section in config.dimensions.items()} == {"simple": reward}
    bare = dataclasses.replace(server, zoo=dataclasses.replace(nano, rewards={}))
    assert bare.config().dimensions["simple"].reward is None
