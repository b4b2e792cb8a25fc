"""LoRA: only the adapter and the head learn; what is saved is a plain PCM with the adapter beside it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mope_bb.errors import ConfigError
from mope_bb.pcm.model import PreferenceControlModel, load_pcm
from mope_bb.training.checkpoints import save_checkpoint
from mope_bb.training.lora import add_lora
from mope_bb.zoo.build import Zoo

RANK = 4


@torch.no_grad()
def scores(pcm: PreferenceControlModel) -> Tensor:
    """What the PCM says about some ids."""
    found: Tensor = pcm.model(input_ids=torch.arange(20, 44)[None]).logits
    return found


@pytest.fixture
def adapted(nano: Zoo) -> PreferenceControlModel:
    """A PCM with an adapter that has taken a few steps of any training."""
    pcm = load_pcm(str(nano.pcm))
    add_lora(pcm, rank=RANK)
    trained = [parameter for parameter in pcm.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    target = torch.randn(1, 24, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        (pcm.model(input_ids=torch.arange(20, 44)[None]).logits - target).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    pcm.policy_version, pcm.rule = 3, "linear"
    return pcm


def test_a_fresh_adapter_changes_nothing(nano: Zoo) -> None:
    """Before learning the scores are those of the PCM alone, which for a new one are 0."""
    pcm = load_pcm(str(nano.pcm))
    pcm.model.score.weight.data.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(0))
    before = scores(pcm)
    add_lora(pcm, rank=RANK)
    assert torch.equal(scores(pcm), before)
    assert not pcm.model.training


def test_only_adapter_and_head_learn(nano: Zoo, adapted: PreferenceControlModel) -> None:
    """Every linear layer of the body has an adapter of the rank; the body itself stays as it was, bit by bit."""
    names = {name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad}
    adapters = {name for name in names if "lora_" in name}
    heads = {name for name in names if ".score." in name}
    assert names == adapters | heads
    assert not adapters & heads
    assert len(heads) == 2
    plain = load_pcm(str(nano.pcm)).model
    linear = [layer for layer in plain.model.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(adapters) == 2 * len(linear)
    moved = dict(adapted.model.named_parameters())
    assert all(min(moved[name].shape) == RANK for name in adapters)
    assert any(bool(moved[name].any()) for name in adapters if "lora_B" in name)
    body = {name: value for name, value in moved.items() if "base_layer" in name or "embed_tokens" in name}
    assert len(body) == len(linear) + 1
    for name, value in body.items():
        own = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(value, plain.get_parameter(own))


def test_saved_and_loaded_scores_are_equal(adapted: PreferenceControlModel, tmp_path: Path) -> None:
    """A checkpoint is the merged PCM, loaded without peft; saving leaves the one that learns as it is."""
    before = scores(adapted)
    folder = save_checkpoint(adapted, tmp_path, step=5)
    assert float(before.abs().max()) > 0.01
    assert torch.equal(scores(adapted), before)
    again = load_pcm(str(folder))
    torch.testing.assert_close(scores(again), before, rtol=1e-4, atol=1e-5)
    assert not hasattr(again.model, "peft_config")
    assert (again.policy_version, again.rule, again.experts) == (3, "linear", adapted.experts)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_adapter_alone_is_kept(nano: Zoo, adapted: PreferenceControlModel, tmp_path: Path) -> None:
    """The folder `adapter` is peft's own: on the PCM that it was trained on it gives the same scores."""
    from peft import PeftModel

    folder = save_checkpoint(adapted, tmp_path, step=5)
    plain = load_pcm(str(nano.pcm))
    plain.model = PeftModel.from_pretrained(plain.model, str(folder / "adapter")).eval()
    torch.testing.assert_close(scores(plain), scores(adapted), rtol=1e-4, atol=1e-5)


def test_without_peft_there_is_a_hint(nano: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft is optional: its absence is one ConfigError that says what to install."""
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="needs the package peft") as caught:
        add_lora(load_pcm(str(nano.pcm)), rank=RANK)
    assert "pip install" in str(caught.value.hint)
