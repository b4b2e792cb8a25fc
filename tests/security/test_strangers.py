"""Files from strangers are data: whatever is hidden in them is refused or ignored, and never run.

What stands in a cache is tried in `tests/unit/test_cache_file.py`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sqlite3
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from mope_bb.chat_tokenizer import load_chat_tokenizer
from mope_bb.config import load_config
from mope_bb.errors import CheckpointError, ConfigError, MopeError, RewardError, TrainingError
from mope_bb.inference import choose_device
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.model import build_pcm, load_pcm
from mope_bb.pcm.rollouts import RolloutRequest
from mope_bb.providers.local import load_model
from mope_bb.rewards.base import References
from mope_bb.rewards.rendering import open_renderer
from mope_bb.training import records
from mope_bb.training.checkpoints import load_state
from mope_bb.training.ledger import Dispatch, Ledger
from mope_bb.training.tasks import load_prompts
from mope_bb.types import Message
from mope_bb.zoo.build import Zoo

REQUEST = RolloutRequest((Message("user", "Hi"),), Plan(MergeRule("linear"), ("a",), (1.0,), None, ""), 1)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self._path),)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """What must not be there at the end."""
    return tmp_path / "it was run"


@pytest.fixture
def payload(trap: Path) -> bytes:
    """A pickle that makes it."""
    return pickle.dumps(Payload(trap))


@pytest.fixture(scope="module")
def saved(nano: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good PCM folder."""
    folder = tmp_path_factory.mktemp("saved")
    build_pcm(str(nano.folder("base")), ["concise", "friendly"]).save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "pcm"))


def test_the_trap_works(payload: bytes, trap: Path) -> None:
    """Unpickled, the payload does what the other tests look for."""
    pickle.loads(payload)  # noqa: S301  # the trap itself
    assert trap.is_dir()


def refused(kind: type[MopeError], read: Callable[[], object], trap: Path) -> None:
    """It is a typed error, and nothing was run."""
    with pytest.raises(kind):
        read()
    assert not trap.exists()


def test_pickled_weights(folder: Path, payload: bytes, trap: Path) -> None:
    """In the place of the safetensors, and under the name of older formats, with every loader."""
    (folder / "model.safetensors").write_bytes(payload)
    refused(CheckpointError, lambda: load_pcm(str(folder)), trap)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(payload)
    refused(CheckpointError, lambda: load_pcm(str(folder)), trap)
    refused(ConfigError, lambda: load_model(str(folder), choose_device("cpu")), trap)


def test_weights_that_torch_would_unpickle(folder: Path, trap: Path) -> None:
    """The same in a file that `torch.save` wrote."""
    import torch

    (folder / "model.safetensors").unlink()
    torch.save({"score.weight": Payload(trap)}, folder / "pytorch_model.bin")
    refused(CheckpointError, lambda: load_pcm(str(folder)), trap)


def plant_code(folder: Path, trap: Path, *, model_type: str | None) -> None:
    """A module of its own beside config and tokenizer, which both name; `model_type` is then one that nobody knows."""
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(trap)!r})\nclass Evil: pass\n")
    for name, entries in (
        ("config.json", ("AutoConfig", "AutoModelForTokenClassification", "AutoModelForCausalLM", "AutoModel")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
    ):
        document = json.loads((folder / name).read_text())
        document["auto_map"] = {
            entry: "evil.Evil" if name == "config.json" else [None, "evil.Evil"] for entry in entries
        }
        if model_type is not None:
            document |= {"model_type": model_type, "tokenizer_class": "Evil", "architectures": ["Evil"]}
        (folder / name).write_text(json.dumps(document))


@pytest.mark.parametrize("model_type", [None, "evil"])
def test_code_beside_a_model(model_type: str | None, folder: Path, trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not run, nor is anybody asked whether it may be; a model that needs it is refused."""
    plant_code(folder, trap, model_type=model_type)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    loaders: tuple[tuple[type[MopeError], Callable[[], Any]], ...] = (
        (CheckpointError, lambda: load_pcm(str(folder))),
        (ConfigError, lambda: load_chat_tokenizer(str(folder))),
        (ConfigError, lambda: open_renderer(str(folder))),
        (ConfigError, lambda: load_model(str(folder), choose_device("cpu"))),
    )
    for kind, load in loaders:
        if model_type is None:
            with suppress(kind):
                load()
        else:
            with pytest.raises(kind):
                load()
        assert not trap.exists()
        assert sys.stdin.read(2) == "y\n"


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"[" * 5000, b'{"experts": 3}', b"null", "payload"])
def test_documents(content: bytes | str, folder: Path, payload: bytes, trap: Path) -> None:
    """Pickles and worse in the place of JSON and TOML."""
    data = payload if isinstance(content, str) else content
    for name in ("mope.json", "trainer.json", "mope.toml", "prompts.jsonl"):
        (folder / name).write_bytes(data)
    (folder / "references.jsonl").write_bytes(data.replace(b"\n", b"") + b"\n")
    refused(CheckpointError, lambda: load_pcm(str(folder)), trap)
    refused(CheckpointError, lambda: load_state(folder), trap)
    refused(ConfigError, lambda: load_config(folder / "mope.toml"), trap)
    refused(ConfigError, lambda: load_prompts(folder / "prompts.jsonl"), trap)
    refused(RewardError, lambda: References(folder / "references.jsonl"), trap)


def test_training_state(folder: Path, payload: bytes, trap: Path) -> None:
    """The optimizer's numbers are safetensors; a pickle there is refused, and other names are not read."""
    (folder / "trainer.json").write_text("{}")
    for name in ("optimizer.pt", "training_args.bin", "trainer.pt"):
        (folder / name).write_bytes(payload)
    refused(CheckpointError, lambda: load_state(folder), trap)
    (folder / "trainer.safetensors").write_bytes(payload)
    refused(CheckpointError, lambda: load_state(folder), trap)


def test_ledger(tmp_path: Path, payload: bytes, trap: Path) -> None:
    """Pickles in the place of answers, plain and compressed; a ledger that is no database."""
    with Ledger(tmp_path / "run") as ledger:
        ledger.dispatch([Dispatch(0, 0, "a", "[]")])
        ledger.add_rollouts([(0, 0, "a", 1, payload), (0, 1, "a", 1, zlib.compress(payload))])
        for data in ledger.rollouts(0).values():
            refused(TrainingError, lambda data=data: records.decode_rollout(data, REQUEST), trap)  # type: ignore[misc]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "ledger.sqlite3").write_bytes(payload * 50)
    refused(TrainingError, lambda: Ledger(tmp_path / "other"), trap)


def test_a_rollout_that_unpacks_without_end() -> None:
    """It is refused when it has reached the limit."""
    bomb = zlib.compress(b"\0" * 2**22)
    with patch.object(records, "MAX_BYTES", 2**20), pytest.raises(TrainingError, match="longer than 1048576 bytes"):
        records.decode_rollout(bomb, REQUEST)


def test_triggers_in_a_ledger(tmp_path: Path) -> None:
    """SQL that a stranger has put into the database can change that database, and nothing else."""
    with Ledger(tmp_path):
        pass
    with sqlite3.connect(tmp_path / "ledger.sqlite3") as rows:
        rows.execute("CREATE TRIGGER evil AFTER INSERT ON pairs BEGIN SELECT load_extension('evil'); END")
    rows.close()
    with (
        Ledger(tmp_path) as ledger,
        pytest.raises(TrainingError, match=r"load_extension|not authorized|no such function"),
    ):
        ledger.dispatch([Dispatch(0, 0, "a", "[]")])
