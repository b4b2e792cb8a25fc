"""Building the zoo: once per size and seed, resumable model by model, every file known by its hash.

    <home>/zoo/<size>-<seed>-v2/
        manifest.json        what was built, how, and the sha256 of every file
        base/ simple/ ...    Hugging Face folders
        base.gguf ...        the same models for llama.cpp
        pcm/                 an untrained Preference Control Model on the base's body
        rewards/simple ...   a reward model for each pole, see `reward_models`

A model is written to a temporary folder and renamed when it is complete, then the manifest is replaced. What is missing
or does not have its hash is built again. Torch is imported only when something must be trained.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from mope_bb.config import resolve_home
from mope_bb.errors import ConfigError
from mope_bb.preferences import PROMPT_LAYOUT
from mope_bb.zoo.reward_models import REWARD_RECIPES
from mope_bb.zoo.training import RECIPES, Recipe
from mope_bb.zoo.wording import DIMENSIONS

VERSION = "v2"
"""Of language and training; raised when a zoo built before is no longer what this code would build."""
NAMES = ("base", *DIMENSIONS)
PCM = "pcm"
REWARDS = tuple(f"rewards/{pole}" for pole in DIMENSIONS)
STAGES = (*NAMES, *REWARDS)
"""All that is trained, in order, by the names that progress is told with."""
Progress = Callable[[str, float], None]
"""Told the model's name and the share of it that is done."""


@dataclass(frozen=True)
class Zoo:
    """A built zoo on disk."""

    root: Path
    size: str
    seed: int
    names: tuple[str, ...]
    """The base and the experts."""
    hashes: Mapping[str, str]
    """Name -> sha256 of its GGUF file."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Pole -> how often its reward model ranks two answers as the grammar does, on questions held out of training."""

    def folder(self, name: str) -> Path:
        """The Hugging Face folder of a model."""
        return self.root / self._known(name)

    def gguf(self, name: str) -> Path:
        """The GGUF file of a model."""
        return self.root / f"{self._known(name)}.gguf"

    @property
    def pcm(self) -> Path:
        """The folder of the untrained PCM."""
        return self.root / PCM

    def reward_model(self, pole: str) -> Path:
        """The Hugging Face folder of the sequence classifier that judges `pole`."""
        if pole not in self.rewards:
            raise ConfigError(f"the zoo has no reward model {pole!r}", hint=f"It has {', '.join(self.rewards)}.")
        return self.root / "rewards" / pole

    def sha256(self, name: str) -> str:
        """The hash of a model's GGUF file."""
        return self.hashes[self._known(name)]

    def _known(self, name: str) -> str:
        if name not in self.names:
            raise ConfigError(f"the zoo has no model {name!r}", hint=f"It has {', '.join(self.names)}.")
        return name


def build_zoo(*, size: str = "tiny", seed: int = 0, home: Path | None = None, progress: Progress | None = None) -> Zoo:
    """Return the zoo of `size` and `seed` in `home` (default: `resolve_home()`), building what is not there.

    Two processes that build the same zoo wait for each other. Raises ConfigError for an unknown size, a folder that
    cannot be written, or missing packages.
    """
    if size not in RECIPES:
        raise ConfigError(f"unknown zoo size {size!r}", hint=f"Known sizes: {', '.join(RECIPES)}.")
    root = _zoos(home) / f"{size}-{seed}-{VERSION}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root.with_name(root.name + ".lock")):
            return _build(root, size, seed, progress or (lambda name, share: None))
    except PermissionError as error:
        raise ConfigError(
            f"the zoo cannot be written: {error}", hint="Set MOPE_BB_HOME to a folder that you can write."
        ) from None


def list_zoos(home: Path | None = None) -> list[Zoo]:
    """Every zoo that has been started in `home`; an unfinished one has fewer names. Hashes are not checked here."""
    manifests = (_read_manifest(file.parent) for file in sorted(_zoos(home).glob("*/manifest.json")))
    return [_zoo(Path(found["root"]), found) for found in manifests if found["models"]]


def clear_zoos(home: Path | None = None) -> list[Path]:
    """Delete every zoo in `home` and return their folders."""
    roots = [file.parent for file in sorted(_zoos(home).glob(f"*-{VERSION}/manifest.json"))]
    for root in roots:
        with FileLock(root.with_name(root.name + ".lock")):
            shutil.rmtree(root)
    return roots


def is_built(*, size: str = "tiny", seed: int = 0, home: Path | None = None) -> bool:
    """Whether `build_zoo` would find everything there, every file with its hash."""
    root = _zoos(home) / f"{size}-{seed}-{VERSION}"
    manifest = _read_manifest(root)
    return (
        size in RECIPES
        and all(_is_intact(root, name, manifest, RECIPES[size]) for name in NAMES)
        and _is_pcm_intact(root, manifest)
        and all(_is_reward_intact(root, pole, manifest, size) for pole in DIMENSIONS)
    )


def _zoos(home: Path | None) -> Path:
    return (home or resolve_home()) / "zoo"


def _build(root: Path, size: str, seed: int, progress: Progress) -> Zoo:
    recipe, manifest = RECIPES[size], _read_manifest(root)
    manifest |= {"size": size, "seed": seed, "version": VERSION}
    for name in NAMES:
        if not _is_intact(root, name, manifest, recipe):
            manifest["models"][name] = _build_model(root, name, manifest, progress)
            _write_manifest(root, manifest)
        progress(name, 1.0)
    if not _is_pcm_intact(root, manifest):
        manifest["pcm"] = _build_pcm(root, manifest)
        _write_manifest(root, manifest)
    for pole, name in zip(DIMENSIONS, REWARDS, strict=True):
        if not _is_reward_intact(root, pole, manifest, size):
            manifest["rewards"] = {
                **manifest.get("rewards", {}),
                pole: _build_reward(root, pole, manifest, partial(progress, name)),
            }
            _write_manifest(root, manifest)
        progress(name, 1.0)
    return _zoo(root, manifest)


def _zoo(root: Path, manifest: dict[str, Any]) -> Zoo:
    models = {name: manifest["models"][name] for name in NAMES if name in manifest["models"]}
    hashes = {name: model["files"][f"{name}.gguf"] for name, model in models.items()}
    judges = manifest.get("rewards", {})
    rewards = {pole: judges[pole]["accuracy"] for pole in DIMENSIONS if pole in judges}
    return Zoo(root, manifest["size"], manifest["seed"], tuple(models), hashes, rewards)


def _build_model(root: Path, name: str, manifest: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Train one model, write it in both formats, and return its entry of the manifest."""
    recipe, seed = RECIPES[manifest["size"]], manifest["seed"]
    for package in ("torch", "transformers", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"building the zoo needs {package!r}", hint="Install torch, transformers and gguf.")
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    from mope_bb.zoo.gguf_export import export_gguf
    from mope_bb.zoo.tokenizing import train_tokenizer
    from mope_bb.zoo.training import new_model, train

    started = time.monotonic()
    progress(name, 0.0)
    pole = None if name == "base" else name
    with _no_progress_bars():
        if pole is None:
            tokenizer = train_tokenizer(seed)
            model = new_model(recipe, tokenizer, seed)
        else:
            tokenizer = AutoTokenizer.from_pretrained(root / "base", trust_remote_code=False)
            model = LlamaForCausalLM.from_pretrained(root / "base")
        loss = train(model, tokenizer, recipe, pole=pole, seed=seed, progress=lambda share: progress(name, share))
        temporary = root / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary / name)
        tokenizer.save_pretrained(temporary / name)
        export_gguf(temporary / name, temporary / f"{name}.gguf")
    _move_in(temporary, root, name)
    return {
        "loss": loss,
        "seconds": round(time.monotonic() - started, 2),
        "torch": torch.__version__,
        "recipe": asdict(recipe),
        "made_from": _base_hash(manifest) if pole else None,
        "files": {path: _sha256(root / path) for path in _files(root, name)},
    }


def _build_pcm(root: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write an untrained PCM on the base's body, which knows where sentences end, and return its manifest entry."""
    from mope_bb.pcm.model import build_pcm

    temporary = root / ".pcm.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    with _no_progress_bars():
        build_pcm(str(root / "base"), tuple(DIMENSIONS)).save(temporary)
    shutil.rmtree(root / PCM, ignore_errors=True)
    temporary.replace(root / PCM)
    files = {path.relative_to(root).as_posix(): _sha256(path) for path in sorted((root / PCM).iterdir())}
    return {"made_from": _base_hash(manifest), "prompt_layout": PROMPT_LAYOUT, "files": files}


def _is_pcm_intact(root: Path, manifest: dict[str, Any]) -> bool:
    entry = manifest.get("pcm")
    if entry is None or (entry["made_from"], entry.get("prompt_layout")) != (_base_hash(manifest), PROMPT_LAYOUT):
        return False
    return _have_hashes(root, entry["files"])


def _build_reward(root: Path, pole: str, manifest: dict[str, Any], progress: Callable[[float], None]) -> dict[str, Any]:
    """Train and test the reward model of `pole` on the base's body, write it, and return its manifest entry."""
    import torch
    from transformers import AutoTokenizer

    from mope_bb.zoo.reward_models import PADDING, new_reward_model, reward_accuracy, train_reward

    started = time.monotonic()
    progress(0.0)
    recipe, seed, base = REWARD_RECIPES[manifest["size"]], manifest["seed"], root / "base"
    folder, temporary = root / "rewards" / pole, root / ".reward.tmp"
    with _no_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        tokenizer.pad_token = PADDING
        model = new_reward_model(base, tokenizer)
        loss = train_reward(model, tokenizer, recipe, pole=pole, seed=seed, progress=progress)
        accuracy = reward_accuracy(model, tokenizer, recipe, pole=pole, seed=seed)
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    temporary.replace(folder)
    return {
        "accuracy": round(accuracy, 4),
        "loss": loss,
        "seconds": round(time.monotonic() - started, 2),
        "torch": torch.__version__,
        "recipe": asdict(recipe),
        "made_from": _base_hash(manifest),
        "files": {path.relative_to(root).as_posix(): _sha256(path) for path in sorted(folder.iterdir())},
    }


def _is_reward_intact(root: Path, pole: str, manifest: dict[str, Any], size: str) -> bool:
    entry = manifest.get("rewards", {}).get(pole)
    if entry is None or entry["recipe"] != asdict(REWARD_RECIPES[size]) or entry["made_from"] != _base_hash(manifest):
        return False
    return _have_hashes(root, entry["files"])


def _have_hashes(root: Path, files: Mapping[str, str]) -> bool:
    return all((root / path).is_file() and _sha256(root / path) == known for path, known in files.items())


def _move_in(temporary: Path, root: Path, name: str) -> None:
    """Put a finished model in its place. A crash in between leaves files without a manifest entry: built again."""
    shutil.rmtree(root / name, ignore_errors=True)
    (temporary / name).replace(root / name)
    (temporary / f"{name}.gguf").replace(root / f"{name}.gguf")
    shutil.rmtree(temporary)


def _files(root: Path, name: str) -> list[str]:
    found = [path for path in (root / name).rglob("*") if path.is_file()]
    return [path.relative_to(root).as_posix() for path in sorted([*found, root / f"{name}.gguf"])]


def _is_intact(root: Path, name: str, manifest: dict[str, Any], recipe: Recipe) -> bool:
    """Whether the model is complete, made by this recipe from this base, and every file has its hash."""
    model = manifest["models"].get(name)
    if model is None or model["recipe"] != asdict(recipe):
        return False
    if name != "base" and model["made_from"] != _base_hash(manifest):
        return False
    return _have_hashes(root, model["files"])


def _base_hash(manifest: dict[str, Any]) -> str | None:
    base = manifest["models"].get("base")
    return base["files"]["base.gguf"] if base else None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of `root`; an empty one where it is missing or damaged, so that everything is built again."""
    try:
        manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
        if manifest["version"] == VERSION and isinstance(manifest["models"], dict):
            return {**manifest, "root": str(root)}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {"root": str(root), "models": {}}


def _write_manifest(root: Path, manifest: dict[str, Any]) -> None:
    content = {key: value for key, value in manifest.items() if key != "root"}
    temporary = root / "manifest.json.tmp"
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(root / "manifest.json")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers' bars for millisecond tasks off the terminal, where ours stands."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
