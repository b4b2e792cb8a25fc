"""The zoo behind the real llama.cpp server: the same model as in Hugging Face, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from mope_bb.config import load_config
from mope_bb.errors import ConfigError, ProviderConnectionError
from mope_bb.zoo import serving
from mope_bb.zoo.build import Zoo
from mope_bb.zoo.serving import ZooServer, serve_zoo

TOLERANCE = 0.02
"""Of llama.cpp's log-probabilities against float32: repeats of one request already differ by half of it."""
TEXTS = (
    "How do I fix a bike?",
    "Olé señor Ödön, Łukasz! 😊🎉 naïve château",
    "  two  spaces\n\nlines\t日本 👩‍🚀 1234567 don't I'LL",
    "<|user|>Be brief.<|end|><|assistant|>",
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How do I fix a bike? 😊"},
    {"role": "assistant", "content": "Grab a wrench and start."},
    {"role": "user", "content": "  Olé\n"},
]


def post(url: str, body: dict[str, Any]) -> Any:
    """The JSON reply of the server."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ends(pid: int, within_s: float = 10.0) -> bool:
    """Wait for a process that is not our child."""
    deadline = time.monotonic() + within_s
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_hugging_face(nano_server: ZooServer, text: str) -> None:
    """llama.cpp cuts text into the same ids, also within emoji, accents and control tokens."""
    tokenizer = AutoTokenizer.from_pretrained(nano_server.zoo.folder("base"))
    url = nano_server.base_urls["base"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == post(f"{url}/tokenize", {"content": text, "parse_special": True})["tokens"]
    assert text == post(f"{url}/detokenize", {"tokens": ids})["content"] or "<|" in text


@pytest.mark.parametrize("messages", [MESSAGES[1:2], MESSAGES[:2], MESSAGES])
def test_template_is_that_of_hugging_face(nano_server: ZooServer, messages: list[dict[str, str]]) -> None:
    """Both render a conversation as the same string."""
    tokenizer = AutoTokenizer.from_pretrained(nano_server.zoo.folder("base"))
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert wanted == post(f"{nano_server.base_urls['base']}/apply-template", {"messages": messages})["prompt"]


@pytest.mark.parametrize("name", ["base", "concise"])
def test_logprobs_are_those_of_hugging_face(nano_server: ZooServer, name: str) -> None:
    """The GGUF is the same model: log-probabilities within the engine's own tolerance."""
    folder = nano_server.zoo.folder(name)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder).eval()
    for messages in (MESSAGES[1:2], MESSAGES):
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        body = {"prompt": ids, "n_predict": 1, "n_probs": 100}
        reply = post(f"{nano_server.base_urls[name]}/completion", body)
        top = reply["completion_probabilities"][0]["top_logprobs"]
        assert len(top) == 100
        assert max(abs(entry["logprob"] - float(wanted[entry["id"]])) for entry in top) < TOLERANCE


def test_too_long_a_prompt_is_refused(nano_server: ZooServer) -> None:
    """Beyond a slot's context there is an error, never a silent cut."""
    body = {"prompt": [5] * 1100, "n_predict": 1}
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(f"{nano_server.base_urls['base']}/completion", body)
    with caught.value as reply:
        assert reply.code == 400
        assert json.load(reply)["error"]["type"] == "exceed_context_size_error"


def test_config_round_trips_through_toml(nano_server: ZooServer, tmp_path: Path) -> None:
    """The written file is the configuration, with identities that do not depend on ports."""
    nano_server.write_config(tmp_path / "mope.toml")
    config = nano_server.config()
    assert config == load_config(tmp_path / "mope.toml")
    assert [expert.name for expert in config.experts] == ["base", "concise"]
    assert f"sha256:{nano_server.zoo.sha256('concise')}" == config.experts[1].identity
    assert config.roster().base == "base"


def test_leaving_the_block_stops_the_servers(nano: Zoo) -> None:
    """Also after an error within the block; the log goes too."""
    with pytest.raises(ZeroDivisionError), serve_zoo(nano, names=["base"], parallel=1) as server:
        assert is_alive(server.pid)
        raise ZeroDivisionError
    assert not is_alive(server.pid)
    assert not server.log.exists()


def test_no_orphan_after_sigkill_of_the_parent(nano: Zoo) -> None:
    """A parent that is killed cannot clean up; the servers end all the same."""
    code = (
        "import sys, time; from pathlib import Path; from mope_bb.zoo.build import build_zoo\n"
        "from mope_bb.zoo.serving import serve_zoo\n"
        "with serve_zoo(build_zoo(size='nano', home=Path(sys.argv[1])), names=['base'], parallel=1) as server:\n"
        "    print(server.pid, flush=True); time.sleep(60)\n"
    )
    home = nano.root.parents[1]
    environment = {**os.environ, "PYTHONPATH": str(Path(serving.__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", code, str(home)], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_alive(child)
        parent.send_signal(signal.SIGKILL)
    assert ends(child)


def test_a_file_that_is_no_model_is_explained(nano: Zoo, tmp_path: Path) -> None:
    """The error carries the end of llama.cpp's log."""
    (tmp_path / "base.gguf").write_bytes(b"not a model")
    broken = Zoo(tmp_path, "nano", 0, ("base",), {"base": "0"})
    with pytest.raises(ProviderConnectionError, match="log ends with"), serve_zoo(broken):
        pass


def test_missing_wheel_is_explained(nano: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without xllamacpp the error names the package."""
    (tmp_path / "xllamacpp.py").write_text("raise ImportError('no such wheel')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConfigError, match="xllamacpp"), serve_zoo(nano, names=["base"]):
        pass
