"""The parsers of what lies on disk or comes from a user: configurations, prompts, caches, ledgers, checkpoints."""

from __future__ import annotations

import json
import math
import sqlite3
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load, save

from mope_bb.cache import decode_distribution, encode_distribution
from mope_bb.config import load_config, parse_config
from mope_bb.conversations import parse_conversation
from mope_bb.errors import MopeError
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.mixture import Lists, MergeRule
from mope_bb.pcm.rollouts import Rollout, RolloutRequest
from mope_bb.preferences import Preference, Roster, describe_preference, parse_preference
from mope_bb.rewards.base import References
from mope_bb.training.ledger import Dispatch, Ended, Ledger
from mope_bb.training.records import decode_rollout, encode_rollout
from mope_bb.training.runs import check_same_run, keep_rows
from mope_bb.training.tasks import load_prompts
from mope_bb.types import END, Message, Piece, TokenDistribution
from tests.fuzz import seeds
from tests.fuzz.parsers import Parser, check_distribution

PLAN: Final = Plan(MergeRule("linear"), ("concise", "friendly"), (0.5, 0.5), None, "")
REQUEST: Final = RolloutRequest((Message("user", "Hi"),), PLAN, 7)
ROSTER: Final = Roster(
    {"a": "concise", "b": "friendly", "base": None}, "base", {"short": {"concise": 1.0}}, ("concise",)
)
TOML: Final = (
    '[[experts]]\nname = "a"\ndimension = "concise"\nprovider = "vllm"\nbase_url = "http://x/v1"\ntop_k = 5\n'
    '[budget]\nmax_calls = 10\n[presets.short]\nconcise = 1.0\n[train]\nprompts = "p.txt"\n'
)
RUN: Final = {"rule": "linear", "train": {"eta": 1.0, "max_steps": 3}, "experts": {"a": {"provider": "vllm"}}}
FILE_WEIGHT: Final = 0.2
"""Parsers that read files take longer, so that they come less often."""


def example_rollout() -> Rollout:
    """A rollout of four steps, two experts and two candidates."""
    return Rollout(
        REQUEST,
        (Piece(b"a", 3), Piece("é".encode()[:1], None), Piece(b"", 9), END),
        "stop",
        Lists(
            torch.tensor([[[-0.1, -math.inf], [-0.3, -1e-30]]] * 4),
            torch.full((4, 2), -math.inf),
            torch.full((4, 2), 0.25),
        ),
        torch.tensor([0, 1, 1, 0]),
        torch.tensor([-0.1, -1 / 3, 0.0, -2.0], dtype=torch.float64),
        torch.full((4, 2), 0.5),
        torch.full((4,), 0.7),
        torch.tensor([3, 3, 4, 4]),
    )


def _rollout_tables() -> tuple[Any, ...]:
    """Its tensors as JSON: what a hostile ledger may hold of other shapes and kinds."""
    found = load(zlib.decompress(encode_rollout(example_rollout())))
    found["list_logprobs"], found["list_floors"] = (
        found["list_logprobs"].clamp(min=-9.0),
        found["list_floors"].clamp(min=-9.0),
    )
    return ({name: {"of": tensor.tolist(), "as": str(tensor.dtype)[6:]} for name, tensor in sorted(found.items())},)


class FileParsers:
    """They write what they are given into a folder, and read it as the toolkit does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ledger = Ledger(folder)
        self._ledger.dispatch([Dispatch(0, 0, "concise", "[]"), Dispatch(1, 0, "concise", "[]")])
        self._ledger.add_rollouts([(0, 0, "a", 1, b"x")])
        self._ledger.end([Ended(0, 0, (1.0, 2.0)), Ended(1, 0, None, "why")], {})
        self._ledger.put_references({"p": "text"})
        self._rows = sqlite3.connect(folder / "ledger.sqlite3", isolation_level=None)
        self._rows.execute("PRAGMA synchronous = OFF")

    def close(self) -> None:
        """Close the databases."""
        self._rows.close()
        self._ledger.close()

    def all(self) -> list[Parser]:
        """Every one of them."""
        lists = (
            TokenDistribution((Piece(b"a", 3), END), (-0.5, -1.5), 1280),
            TokenDistribution((Piece(b"\xc3"), Piece(b"b")), (-0.1, -3.0)),
            TokenDistribution((END,), (0.0,), None, is_guess=True),
        )
        stored = tuple(encode_distribution(one) for one in lists)
        trees = tuple(json.loads(one) for one in stored)
        rollout = encode_rollout(example_rollout())
        rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
        references = '{"messages": [{"role": "user", "content": "Hi"}], "text": "Yo"}\n'
        ledger = {"version": 1, "rewards": [0.5, None], "error": "why", "scores": '{"concise": 1.0}', "data": "x"}
        return [
            Parser("cache", stored, self._cache, "bytes", (ValueError,)),
            Parser("cache tree", trees, lambda tree: self._cache(_dump(tree)), "tree", (ValueError,)),
            Parser("preference", seeds.PREFERENCES, self._preference, "text"),
            Parser("preference weights", ({"concise": 0.7, "friendly": 1},), self._weights, "tree"),
            Parser("config", (seeds.CONFIG,), self._config, "tree"),
            Parser("config file", (TOML,), self._config_file, "text", weight=FILE_WEIGHT),
            Parser("prompts", seeds.PROMPTS, self._prompts, "text", weight=FILE_WEIGHT),
            Parser("conversation", seeds.CONVERSATIONS, self._conversation, "tree"),
            Parser("rollout", (rollout,), self._rollout, "bytes"),
            # Most damage to what is compressed is lost on its checksum.
            Parser(
                "rollout inside", (zlib.decompress(rollout),), lambda data: self._rollout(zlib.compress(data)), "bytes"
            ),
            Parser("rollout tensors", _rollout_tables(), self._rollout_tensors, "tree"),
            Parser("ledger", (ledger,), self._read_ledger, "tree", weight=FILE_WEIGHT),
            Parser("references", (references,), self._references, "text", weight=FILE_WEIGHT),
            Parser("run file", (RUN,), self._run, "tree", weight=FILE_WEIGHT),
            Parser("metrics", tuple(json.dumps(row) + "\n" for row in rows), self._metrics, "text", weight=FILE_WEIGHT),
        ]

    def _cache(self, data: bytes) -> None:
        check_distribution(decode_distribution(data), is_cached=True)

    def _preference(self, text: str) -> None:
        found = parse_preference(text, ROSTER.presets)
        self._check_preference(found)

    def _weights(self, tree: Any) -> None:
        if isinstance(tree, dict):
            self._check_preference(Preference.of(tree))

    def _check_preference(self, found: Preference) -> None:
        assert found.text is not None or math.isclose(math.fsum(found.weights.values()), 1.0, abs_tol=1e-9)
        describe_preference(found, {"concise": "Be concise."}).encode()
        resolved = ROSTER.resolve(found, reads_text=False)
        assert math.isclose(math.fsum(resolved.values()), 1.0, abs_tol=1e-9)

    def _config(self, tree: Any) -> None:
        found = parse_config(tree)
        found.roster().names()
        found.dimension_texts()
        assert all(one.replicas() for one in found.experts)

    def _config_file(self, text: str) -> None:
        load_config(self._write("mope.toml", text))

    def _prompts(self, text: str) -> None:
        _each_raises_only_ours(
            lambda: self._check_prompts("prompts.txt", text), lambda: self._check_prompts("prompts.jsonl", text)
        )

    def _check_prompts(self, name: str, text: str) -> None:
        for messages in load_prompts(self._write(name, text)):
            assert messages
            for message in messages:
                message.content.encode()

    def _conversation(self, tree: Any) -> None:
        for message in parse_conversation(tree):
            message.content.encode()
            assert message.tool_call_id is None or isinstance(message.tool_call_id, str)
            hash(message)

    def _rollout(self, data: bytes) -> None:
        self._check_rollout(decode_rollout(data, REQUEST))

    def _rollout_tensors(self, tree: Any) -> None:
        tensors = {}
        for name, one in tree.items() if isinstance(tree, dict) else ():
            try:
                tensors[name] = torch.tensor(one["of"], dtype=getattr(torch, str(one["as"])))
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError, IndexError):
                continue  # what is no tensor cannot stand in such a file
        self._check_rollout(decode_rollout(zlib.compress(save(tensors)), REQUEST))

    def _check_rollout(self, found: Rollout) -> None:
        steps = len(found)
        assert steps > 0
        num_experts = found.lists.logprobs.shape[1]
        assert found.lists.logprobs.shape[:2] == (steps, num_experts)
        assert found.lists.floors.shape == found.lists.tails.shape == (steps, num_experts)
        assert found.index.shape == found.logprobs.shape == found.policy_versions.shape == found.entropies.shape
        assert found.index.shape == (steps,)
        assert found.weights.shape[0] == steps
        assert 0 <= int(found.index.min()) <= int(found.index.max()) < found.lists.logprobs.shape[2]
        assert isinstance(found.text, str)
        decode_rollout(encode_rollout(replace(found)), REQUEST)

    def _read_ledger(self, tree: Any) -> None:
        def value(name: str) -> Any:
            found = tree.get(name) if isinstance(tree, dict) else tree
            is_plain = isinstance(found, str | int | float | None) and not (
                isinstance(found, int) and abs(found) >= 2**63
            )
            return found if is_plain else json.dumps(found)

        try:
            self._rows.execute("UPDATE pairs SET version = ?, first_reward = ?", (value("version"), value("rewards")))
            self._rows.execute("UPDATE pairs SET error = ? WHERE id = 1", (value("error"),))
            self._rows.execute("UPDATE reference_answers SET scores = ?", (value("scores"),))
            self._rows.execute("UPDATE rollouts SET data = ?", (value("data"),))
        except (sqlite3.IntegrityError, UnicodeEncodeError, RecursionError):
            return  # what the tables do not take cannot stand in them
        _each_raises_only_ours(self._check_restored, self._check_references, self._check_rollouts)

    def _check_restored(self) -> None:
        for one in self._ledger.restore(0, group_size=1).ended:
            assert type(one.version) is int
            assert one.rewards is None or all(type(reward) is float for reward in one.rewards)

    def _check_references(self) -> None:
        for text, scores in self._ledger.references().values():
            assert isinstance(text, str)
            assert all(type(score) is float and math.isfinite(score) for score in scores.values())

    def _check_rollouts(self) -> None:
        for data in self._ledger.rollouts(0).values():
            decode_rollout(data, REQUEST)

    def _references(self, text: str) -> None:
        References(self._write("references.jsonl", text))

    def _run(self, tree: Any) -> None:
        self._write("run.json", _dump(tree).decode())
        check_same_run(self._folder, RUN)

    def _metrics(self, text: str) -> None:
        keep_rows(self._write("metrics.jsonl", text), 1)

    def _write(self, name: str, text: str) -> Path:
        path = self._folder / name
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return path


def _each_raises_only_ours(*checks: Any) -> None:
    """All of `checks`; then the last refusal, if there was one."""
    refused = None
    for check in checks:
        try:
            check()
        except MopeError as error:
            refused = error
    if refused is not None:
        raise refused


def _dump(tree: Any) -> bytes:
    try:
        return json.dumps(tree).encode()
    except RecursionError:
        return b"[" * 5000
