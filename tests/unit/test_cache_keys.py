"""What identifies a distribution in the cache, and what does not."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mope_bb import cache as cache_module
from mope_bb.cache import DistributionCache, distribution_key
from mope_bb.config import parse_config
from mope_bb.providers.registry import open_expert
from mope_bb.types import Context, Message, Piece, TokenDistribution
from mope_bb.zoo.build import Zoo

LIST = TokenDistribution((Piece(b"yes", 1),), (-0.25,), 9)
KEY = distribution_key(["m"], [1, 2], 3)
QUESTION = Context((Message("user", "How do I fix a bike?"),))
ids_of = st.lists(st.integers(0, 2**31), max_size=6)
questions = st.tuples(st.lists(st.text(max_size=6), min_size=1, max_size=3), ids_of, st.integers(1, 100))


@given(first=questions, second=questions)
def test_the_key_is_equal_exactly_for_equal_questions(
    first: tuple[list[str], list[int], int], second: tuple[list[str], list[int], int]
) -> None:
    """Different identity, prompt or k: another key. The same in tuples or lists: the same key."""
    assert (distribution_key(*first) == distribution_key(*second)) is (first == second)
    assert distribution_key(tuple(first[0]), tuple(first[1]), first[2]) == distribution_key(*first)


@pytest.mark.parametrize(
    "other",
    [
        (["m", ""], [1, 2], 3),
        (["m"], [12], 3),
        (["m"], [1], 3),
        (["m"], [2, 1], 3),
        (["m"], [1, 2], 33),
        (["m"], "[1,2]", 3),
    ],
)
def test_neighbouring_questions_have_other_keys(other: tuple[list[str], Sequence[int] | str, int]) -> None:
    """No two questions run together in the hashed text."""
    assert distribution_key(*other) != KEY


def test_the_key_depends_on_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new format reads nothing of an old one."""
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
    assert distribution_key(["m"], [1, 2], 3) != KEY


class AskedKeys(DistributionCache):
    """A cache that knows every answer: experts ask nobody else, and their keys are noted."""

    keys: list[str]

    async def get(self, key: str) -> TokenDistribution | None:
        self.keys.append(key)
        return LIST


def key_of(
    folder: Path, table: Mapping[str, Any], context: Context = QUESTION, *, top_k: int = 5, others: Sequence[str] = ()
) -> str:
    """Under which key the expert of `table`, after `others` in the configuration, looks an answer up."""
    tables = [{"name": name, "provider": "scripted", "script": [{"a": 1.0}]} for name in others]
    config = parse_config({"experts": [*tables, {"name": "e", **table}]}).experts[-1]

    async def ask(cache: DistributionCache) -> None:
        expert = open_expert(config, cache)
        try:
            assert await expert.next_tokens(context, top_k=top_k) == LIST
            assert await expert.recall(context, top_k=top_k) == LIST
            assert expert.num_requests == 0
        finally:
            await expert.aclose()

    with closing(AskedKeys(folder / "cache", max_bytes=2**20)) as cache:
        cache.keys = []
        asyncio.run(ask(cache))
    first, second = cache.keys
    assert first == second
    return first


ID_PROVIDERS = ("vllm", "sglang", "llamacpp", "vllm-generate", "fireworks")
TEXT_PROVIDERS = ("completions", "tgi", "ollama", "chat", "vllm-chat", "openrouter", "gemini")
IDENTIFYING: dict[str, dict[str, Any]] = {
    "address": {"base_url": "http://127.0.0.1:2/v1"},
    "model": {"model": "other"},
    "identity": {"identity": "sha256:0"},
    "system prompt": {"system": "Be brief."},
}
NOT_IDENTIFYING: dict[str, dict[str, Any]] = {
    "name": {"name": "other"},
    "dimension": {"dimension": "concise"},
    "base": {"base": True},
    "deadlines": {"timeout_s": 5.0, "attempt_timeout_s": 1.0},
    "retries": {"max_retries": 0},
    "the key": {"api_key_env": "TEST_KEY"},
    "limits": {"max_in_flight": 1, "max_prompts": 1},
    "prices": {"input_price": 1.0, "output_price": 2.0},
}


def table_of(provider: str, zoo: Zoo) -> dict[str, Any]:
    """The settings of an expert that has all it needs without asking a server."""
    table = {"provider": provider, "base_url": "http://127.0.0.1:1/v1", "model": "m"}
    return table if provider == "gemini" else table | {"tokenizer": str(zoo.folder("base"))}


@pytest.mark.parametrize("provider", [*ID_PROVIDERS, *TEXT_PROVIDERS])
def test_what_identifies_a_distribution(provider: str, nano: Zoo, tmp_path: Path) -> None:
    """Each of it alone makes another key, and no two the same."""
    table = table_of(provider, nano)
    keys = [key_of(tmp_path, table | changed) for changed in ({}, *IDENTIFYING.values())]
    keys.append(key_of(tmp_path, table, top_k=6))
    keys.append(key_of(tmp_path, table, Context((Message("user", "How do I fix a boat?"),))))
    keys.append(
        key_of(tmp_path, table, Context((Message("user", "Hi"), Message("assistant", "Yo"), *QUESTION.messages)))
    )
    if provider != "gemini":  # it gives first tokens only
        keys.append(key_of(tmp_path, table, QUESTION.extended(Piece(b"Use", 300))))
    if provider in ("chat", "gemini", "openrouter", "vllm-chat"):
        keys.append(key_of(tmp_path, table | {"extra_body": {"provider": {"only": ["X"]}}}))
        keys.append(key_of(tmp_path, table | {"extra_body": {"provider": {"only": ["Y"]}}}))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("provider", [*ID_PROVIDERS, *TEXT_PROVIDERS])
def test_what_does_not(provider: str, nano: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How, when, by whom and for how much it is asked makes no other key."""
    monkeypatch.setenv("TEST_KEY", "secret")
    table = table_of(provider, nano)
    expected = key_of(tmp_path, table)
    found = {what: key_of(tmp_path, table | changed) for what, changed in NOT_IDENTIFYING.items()}
    found["another day"] = key_of(tmp_path, table)
    found["place among the experts"] = key_of(tmp_path, table, others=["x", "y"])
    if provider in ("chat", "gemini"):
        one, two = {"a": 1, "b": 2}, {"b": 2, "a": 1}
        assert key_of(tmp_path, table | {"extra_body": one}) == key_of(tmp_path, table | {"extra_body": two})
    assert found == dict.fromkeys(found, expected)


def test_providers_do_not_share(nano: Zoo, tmp_path: Path) -> None:
    """Adapters read lists in their own ways: what one was told is no answer for another."""
    keys = [key_of(tmp_path, table_of(provider, nano)) for provider in (*ID_PROVIDERS, *TEXT_PROVIDERS)]
    assert len(set(keys)) == len(keys)


def test_replicas_share(nano: Zoo, tmp_path: Path) -> None:
    """What one address of an expert has answered counts for all of them, and for the first alone."""
    table = table_of("vllm", nano)
    first, second = "http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"
    assert key_of(tmp_path, table | {"base_url": [first, second]}) == key_of(tmp_path, table | {"base_url": first})
    assert key_of(tmp_path, table | {"base_url": [second, first]}) == key_of(tmp_path, table | {"base_url": second})


@pytest.mark.parametrize("provider", [*ID_PROVIDERS, *(one for one in TEXT_PROVIDERS if one != "gemini"), "local"])
@pytest.mark.parametrize("changed", ["end tokens", "template"])
def test_the_tokenizer(provider: str, changed: str, nano: Zoo, tmp_path: Path) -> None:
    """Other end tokens are other pieces, and another template is another question."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(nano.folder("base"), folder)
    table = table_of(provider, nano) | {"tokenizer": str(folder)}
    if provider == "local":
        table |= {"model": str(nano.folder("base")), "base_url": None}
    before = key_of(tmp_path, table)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if changed == "template":
        # The same ids, so that only the template itself can tell.
        tokenizer.chat_template += "{# another #}"
        tokenizer.save_pretrained(folder)
    else:
        (folder / "generation_config.json").write_text('{"eos_token_id": [0, 1, 2, 3]}')
    assert key_of(tmp_path, table) != before


@pytest.mark.parametrize("provider", ["chat", "vllm-chat"])
def test_the_tokenizer_of_a_chat(provider: str, nano: Zoo, tmp_path: Path) -> None:
    """With one, pieces have ids: other entries."""
    table = table_of(provider, nano)
    assert key_of(tmp_path, table) != key_of(tmp_path, {**table, "tokenizer": None})
