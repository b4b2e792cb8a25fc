"""`mope-bb init` writes a configuration that is right as it stands, from servers that are really there."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from mope_bb.config import load_config
from mope_bb.zoo.serving import ZooServer
from tests.command_line import Run
from tests.endpoints.stand_ins import MODEL, StandIns


def test_llamacpp_servers_become_experts_that_answer(mope: Run, nano_experts: ZooServer, tmp_path: Path) -> None:
    """The whole way: find the real servers, write the file, look at them, ask them."""
    path = str(tmp_path / "mope.toml")
    urls = [nano_experts.base_urls[name] for name in ("base", "concise", "friendly")]
    written = mope("init", *urls, "-o", path)
    assert written.status == 0
    assert "llamacpp, models concise" in written.err
    assert f"next: mope-bb doctor -c {path}" in written.out
    base, concise, friendly = load_config(path).experts
    assert (base.name, base.base, base.dimension) == ("base", True, None)
    assert (concise.provider, concise.base_url, concise.model) == ("llamacpp", urls[1], "concise")
    assert friendly.dimension == "friendly"
    assert mope("doctor", "-c", path).status == 0
    answer = mope(
        "chat", "-c", path, "--once", "How do I fix a bike?", "--pref", "concise,friendly", "--max-tokens", "5"
    )
    assert answer.status == 0
    assert answer.out.strip()


def test_one_model_becomes_three_experts(mope: Run, stand_ins: StandIns, tmp_path: Path) -> None:
    """With a system prompt each, since one expert alone has nothing to be merged with."""
    path = tmp_path / "mope.toml"
    assert mope("init", stand_ins.open("vllm").url + "/v1", "-o", str(path)).status == 0
    config = load_config(path)
    assert [expert.dimension for expert in config.experts] == ["concise", "informative", "friendly"]
    assert {expert.model for expert in config.experts} == {MODEL}
    assert len({expert.system for expert in config.experts}) == 3


@pytest.mark.parametrize("provider", ["sglang", "ollama", "tgi"])
def test_every_server_is_known_by_its_own_routes(mope: Run, stand_ins: StandIns, tmp_path: Path, provider: str) -> None:
    """The provider that is written down is the software that answers."""
    path = tmp_path / "mope.toml"
    result = mope("init", stand_ins.open(provider).url, "-o", str(path))
    assert result.status == 0, result.err
    assert {expert.provider for expert in load_config(path).experts} == {provider}


@pytest.mark.parametrize(
    ("url", "provider"),
    [
        ("https://api.fireworks.ai/inference/v1", "fireworks"),
        ("https://api.deepseek.com/beta", "deepseek"),
        ("https://api.openai.com/v1", "openai"),
        ("https://mine.openai.azure.com", "azure"),
    ],
)
def test_hosted_apis_are_known_by_name(
    mope: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, provider: str
) -> None:
    """Nothing is sent to them; the key's variable is written, the key is not."""
    monkeypatch.setenv("SOME_KEY", "sk-very-secret")
    path = tmp_path / "mope.toml"
    assert mope("init", url, "-o", str(path), "--api-key-env", "SOME_KEY").status == 0
    text = path.read_text()
    assert "sk-very-secret" not in text
    expert = tomllib.loads(text)["experts"][0]
    assert (expert["provider"], expert["base_url"], expert["api_key_env"]) == (provider, url, "SOME_KEY")


def test_a_file_that_is_there_is_kept(mope: Run, nano_experts: ZooServer, tmp_path: Path) -> None:
    """Unless it is to be replaced."""
    path = tmp_path / "mope.toml"
    path.write_text("mine")
    url = nano_experts.base_urls["concise"]
    mope("init", url, "-o", str(path)).assert_refused(2, str(path), "--force")
    assert path.read_text() == "mine"
    assert mope("init", url, "-o", str(path), "--force").status == 0
    assert load_config(path).experts


def test_nobody_there(mope: Run, tmp_path: Path, no_server_config: str) -> None:
    """The address is named, and no file is written; one dead address does not cost the others."""
    dead = str(tomllib.loads(Path(no_server_config).read_text())["experts"][0]["base_url"])
    path = tmp_path / "new.toml"
    result = mope("init", dead, "-o", str(path))
    assert result.status == 3
    assert dead in result.err
    assert "Traceback" not in result.err
    assert not path.exists()


def test_a_key_that_is_not_set(mope: Run, tmp_path: Path) -> None:
    """Said before anybody is asked."""
    result = mope("init", "http://localhost:1", "--api-key-env", "NOT_SET_ANYWHERE", "-o", str(tmp_path / "m.toml"))
    assert result.status == 3
    assert "NOT_SET_ANYWHERE" in result.err


def test_the_comments_are_toml_when_they_are_used(mope: Run, nano_experts: ZooServer, tmp_path: Path) -> None:
    """Every commented line of the file parses once its mark is taken off."""
    path = tmp_path / "mope.toml"
    mope("init", nano_experts.base_urls["concise"], "-o", str(path))
    tail = path.read_text().split("# Who scores answers")[1].splitlines()[1:]
    tables: list[str] = []
    for line in tail:
        shown = line.removeprefix("# ")
        if shown.startswith("reward ="):
            tables.append(f"[dimensions.d{len(tables)}]\n{shown}")
        elif shown.startswith("["):
            tables.append(shown.replace("NAME", "x", 1))
        else:
            tables[-1:] = [tables[-1] + "\n" + shown] if tables else []
    document = tomllib.loads("\n".join(tables))
    assert {one["reward"]["kind"] for one in document["dimensions"].values() if "reward" in one} == {
        "classifier",
        "remote",
        "judge",
    }
    assert json.dumps(document["presets"])
