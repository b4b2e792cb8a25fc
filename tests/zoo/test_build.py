"""Building: reproducible, repaired by hash, the same tokenizer and template for both formats."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch

from mope_bb.errors import ConfigError
from mope_bb.zoo.build import NAMES, Zoo, build_zoo, clear_zoos, is_built, list_zoos
from mope_bb.zoo.tokenizing import train_tokenizer
from mope_bb.zoo.training import RECIPES, new_model, train


def test_training_is_reproducible_to_the_last_bit() -> None:
    """The same seed gives the same tokenizer and the same weights; another seed gives others."""

    def built(seed: int) -> tuple[str, str]:
        tokenizer = train_tokenizer(seed, conversations=300)
        recipe = dataclasses.replace(RECIPES["nano"], base_steps=6)
        model = new_model(recipe, tokenizer, seed)
        train(model, tokenizer, recipe, seed=seed)
        weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
        return tokenizer.backend_tokenizer.to_str(), hashlib.sha256(weights).hexdigest()

    threads = torch.get_num_threads()
    assert built(0) == built(0)
    assert built(0)[1] != built(1)[1]
    assert threads == torch.get_num_threads()


def test_zoo_is_complete(nano: Zoo, zoo_home: Path) -> None:
    """Seven models, both formats, every file in the manifest."""
    assert nano.names == NAMES
    manifest = json.loads((nano.root / "manifest.json").read_text())
    for name in NAMES:
        assert nano.gguf(name).is_file()
        assert (nano.folder(name) / "model.safetensors").is_file()
        assert nano.sha256(name) == hashlib.sha256(nano.gguf(name).read_bytes()).hexdigest()
        assert f"{name}/tokenizer.json" in manifest["models"][name]["files"]
    assert nano.root in [zoo.root for zoo in list_zoos(zoo_home)]
    assert is_built(size="nano", home=zoo_home)


def test_damage_is_noticed_and_repaired_to_the_same_bytes(own_nano: Zoo, tmp_path: Path) -> None:
    """A changed file and a missing file are built again; what is intact is kept; the result is the same zoo."""
    untouched = own_nano.gguf("simple").stat().st_mtime_ns
    with own_nano.gguf("grumpy").open("r+b") as stream:
        stream.write(b"damage")
    (own_nano.folder("friendly") / "tokenizer.json").unlink()
    assert not is_built(size="nano", home=tmp_path)
    trained: set[str] = set()
    again = build_zoo(size="nano", home=tmp_path, progress=lambda name, share: trained.add(name) if share < 1 else None)
    assert {"grumpy", "friendly"} == trained
    assert own_nano == again
    assert untouched == again.gguf("simple").stat().st_mtime_ns


def test_unknown_names_are_explained(nano: Zoo, tmp_path: Path) -> None:
    """A wrong size or model name is an error that lists the right ones."""
    with pytest.raises(ConfigError, match="unknown zoo size 'huge'"):
        build_zoo(size="huge", home=tmp_path)
    with pytest.raises(ConfigError, match="no model 'witty'"):
        nano.gguf("witty")


def test_clear_deletes_only_zoos(tmp_path: Path) -> None:
    """Only folders with a manifest go; an empty home is fine."""
    assert not clear_zoos(tmp_path)
    assert not list_zoos(tmp_path)
    root = tmp_path / "zoo" / "nano-0-v2"
    (tmp_path / "zoo" / "mine").mkdir(parents=True)
    root.mkdir()
    (root / "manifest.json").write_text("{broken")
    assert list_zoos(tmp_path) == []
    assert [root] == clear_zoos(tmp_path)
    assert (tmp_path / "zoo" / "mine").is_dir()
    assert not root.exists()
