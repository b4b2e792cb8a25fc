"""The recipes as they are printed, with the zoo in place of the weights and a stand-in in place of the judge."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from examples.recipes.psoups.prepare import write_prompts
from mope_bb.config import load_config
from mope_bb.zoo.serving import ZooServer
from tests.command_line import Run
from tests.endpoints.engine import Reply, StandIn, serving

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
NAMES = ("psoups", "hosted", "single-gpu")


def judge(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
    """A judge whose verdict depends on what it reads, and on nothing else."""
    verdict = "AB"[hashlib.sha256(json.dumps(body["messages"]).encode()).digest()[0] % 2]
    message = {"role": "assistant", "content": json.dumps({"verdict": verdict})}
    return 200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


def classify(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
    """A reward model of vLLM: the length of the answer, as a logit or after its activation."""
    score = float(len(body["messages"][-1]["content"])) / 7 - 3
    if body.get("use_activation") is not False:
        score = 1 / (1 + 2.718281828459045**-score)
    return 200, {"data": [{"index": 0, "label": "LABEL_0", "probs": [score], "num_classes": 1}]}


@pytest.fixture(scope="module")
def judges() -> Iterator[StandIn]:
    """Both in one place."""
    with serving(StandIn({}, {("POST", "/v1/chat/completions"): judge, ("POST", "/classify"): classify})) as found:
        yield found


def shown(value: object) -> str:
    """A value as TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {shown(inner)}" for key, inner in value.items()) + " }"
    return json.dumps(value)


def with_zoo(recipe: Path, folder: Path, zoo: ZooServer, judges: StandIn) -> None:
    """The recipe's `mope.toml` in `folder`: only who serves what, and how long it takes, is another."""
    data = tomllib.loads((recipe / "mope.toml").read_text(encoding="utf-8"))
    models = [name for name in zoo.base_urls if name != "base"]
    for place, expert in enumerate(data["experts"]):
        served = "base" if expert.get("base") else models[place % len(models)]
        for name in ("tokenizer", "api_key_env"):
            expert.pop(name, None)
        expert |= {"provider": "llamacpp", "base_url": zoo.base_urls[served], "model": served}
    for section in data["dimensions"].values():
        section["reward"].pop("api_key_env", None)
        section["reward"]["base_url"] = judges.url + "/v1"
    data["pcm"] = {"backbone": str(zoo.zoo.folder("base")), "device": "cpu"}
    data["train"] |= {"max_steps": 1, "batch_size": 2, "max_tokens": 6}
    data["cache"] = {"enabled": False}
    tables = ["\n".join(f"{key} = {shown(value)}" for key, value in one.items()) for one in data.pop("experts")]
    lines = [f"[[experts]]\n{table}" for table in tables]
    for name, section in data.items():
        lines.append(f"[{name}]\n" + "\n".join(f"{key} = {shown(value)}" for key, value in section.items()))
    (folder / "mope.toml").write_text("\n\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_is_valid_as_it_stands(name: str) -> None:
    """With its real names: every key is known, every dimension is scored."""
    config = load_config(RECIPES / name / "mope.toml")
    assert len([expert for expert in config.experts if expert.dimension]) >= 3
    assert all(section.reward for section in config.dimensions.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_command_of_the_recipe_runs(
    mope: Run, nano_experts: ZooServer, judges: StandIn, tmp_path: Path, name: str
) -> None:
    """Each `mope-bb` line of its README, in its order, beside the recipe's own files."""
    recipe = RECIPES / name
    if (recipe / "prompts.txt").exists():
        shutil.copy(recipe / "prompts.txt", tmp_path)
    else:
        source = tmp_path / "list.json"
        source.write_text(json.dumps([{"id": str(n), "prompt": f"How do I fix a {n}?"} for n in "abc"]))
        for target in ("prompts.jsonl", "koala.jsonl"):
            assert write_prompts(source, tmp_path / target) == 3
    with_zoo(recipe, tmp_path, nano_experts, judges)
    commands = re.findall(r"^    (mope-bb .*?)(?:\s+#.*)?$", (recipe / "README.md").read_text(), re.MULTILINE)
    assert len(commands) >= 4
    with contextlib.chdir(tmp_path):
        for command in commands:
            arguments = shlex.split(command)[1:]
            if arguments[0] == "eval":
                continue  # minutes, whatever is evaluated: tests/cli/test_eval.py runs it
            question = "" if "--once" in arguments or arguments[0] != "chat" else "Why is the sky blue?"
            short = ["--max-tokens", "8"] if arguments[0] == "chat" else []
            result = mope(*arguments, *short, stdin=question.encode())
            assert result.status == 0, (command, result.err, result.out)


def test_tulus_template_puts_the_style_after_the_instruction(nano_experts: ZooServer) -> None:
    """As P-SOUPS's adapters were trained: "{instruction} {preference}", then the assistant's turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(nano_experts.zoo.folder("base"))
    tokenizer.chat_template = (RECIPES / "psoups" / "tulu.jinja").read_text(encoding="utf-8")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    found = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert found == "<|user|>\nWhy? Be brief.\n<|assistant|>\n"
