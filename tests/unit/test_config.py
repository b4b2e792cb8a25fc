"""The configuration file: what is accepted, and what an error says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mope_bb.config import Config, ExpertConfig, load_config, parse_config, resolve_home
from mope_bb.errors import ConfigError

EXPERT: dict[str, Any] = {"name": "short", "provider": "scripted", "dimension": "concise"}
MINIMAL = '[[experts]]\nname = "short"\nprovider = "scripted"\ndimension = "concise"\n'


def write(folder: Path, text: str) -> Path:
    """A configuration file with `text`."""
    file = folder / "mope.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_minimal_file(tmp_path: Path) -> None:
    """One expert is a configuration; everything else has a default."""
    config = load_config(write(tmp_path, MINIMAL))
    assert [expert.name for expert in config.experts] == ["short"]
    assert config == parse_config({"experts": [EXPERT]})
    assert (config.merge.rule, config.cache.enabled, config.pcm.path) == (None, True, None)


@pytest.mark.parametrize(
    ("text", "where", "near"),
    [
        (MINIMAL + 'base_ulr = "http://x"\n', "experts.0.base_ulr", "base_url"),
        (MINIMAL + "[merge]\nrules = 'linear'\n", "merge.rules", "rule"),
        (MINIMAL + "[cache]\nmaxbytes = 3\n", "cache.maxbytes", "max_bytes"),
        (MINIMAL + "[pcm]\npaht = 'x'\n", "pcm.paht", "path"),
        (MINIMAL + "[dimensions.concise]\ntxt = 'x'\n", "dimensions.concise.txt", "text"),
        ("[[expert]]\nname = 'a'\n" + MINIMAL, "expert", "experts"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path: Path, text: str, where: str, near: str) -> None:
    """A mistyped key is shown with its place, and the nearest known key is the hint."""
    with pytest.raises(ConfigError, match=f"unknown key '{where}'") as caught:
        load_config(write(tmp_path, text))
    assert caught.value.hint == f"Did you mean {near!r}?"


def test_unknown_key_without_a_near_one_has_no_hint() -> None:
    """No guess is better than a wrong one."""
    with pytest.raises(ConfigError, match="'zzzzqqqq'") as caught:
        parse_config({"experts": [EXPERT], "zzzzqqqq": 1})
    assert caught.value.hint is None


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A path without a file is shown as the user wrote it."""
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(tmp_path / "none.toml")


def test_broken_toml_tells_the_line(tmp_path: Path) -> None:
    """The message of the TOML parser, with its line, reaches the user."""
    with pytest.raises(ConfigError, match=r"not valid TOML.*line 2"):
        load_config(write(tmp_path, "[merge]\nrule = linear\n"))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 are a ConfigError."""
    file = tmp_path / "mope.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(file)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    """A folder in place of a file is a ConfigError."""
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": []}, "experts"),
        ({"experts": [{"provider": "scripted"}]}, "'experts.0.name' is missing"),
        ({"experts": [EXPERT, EXPERT]}, "two experts have the name 'short'"),
        ({"experts": [{**EXPERT, "name": "a b"}]}, "experts.0.name"),
        ({"experts": [{**EXPERT, "name": "a", "base": True}, {**EXPERT, "base": True}]}, "only one expert"),
        ({"experts": [{**EXPERT, "top_k": 0}]}, "experts.0.top_k"),
        ({"experts": [{**EXPERT, "timeout_s": 0}]}, "experts.0.timeout_s"),
        ({"experts": [{**EXPERT, "max_retries": -1}]}, "experts.0.max_retries"),
        ({"experts": [{**EXPERT, "max_in_flight": 0}]}, "experts.0.max_in_flight"),
        ({"experts": [{**EXPERT, "base_url": []}]}, "`base_url` is an empty list"),
        ({"experts": [{**EXPERT, "base_url": ["http://a", "http://a/"]}]}, "`base_url` names an address twice"),
        ({"merge": {"rule": "mean"}}, "merge.rule.*'mean'"),
        ({"merge": {"product_scale": -1}}, "merge.product_scale"),
        ({"cache": {"max_bytes": -1}}, "cache.max_bytes"),
        ({"presets": {"boss": {"nobody": 1.0}}}, "preset 'boss' names 'nobody'"),
        ({"presets": {"boss": {"concise": "much"}}}, "presets.boss.concise"),
        ({"experts": "short"}, "experts"),
    ],
)
def test_wrong_values_are_named(change: dict[str, Any], message: str) -> None:
    """The first wrong thing is named with its place."""
    with pytest.raises(ConfigError, match=message):
        parse_config({"experts": [EXPERT], **change}, source="here")


@pytest.mark.parametrize("field", ["timeout_s"])
@pytest.mark.parametrize("value", [float("nan")])
def test_not_a_number_is_refused(field: str, value: float) -> None:
    """A deadline must be a number above 0, and NaN is none."""
    with pytest.raises(ConfigError, match=field):
        parse_config({"experts": [{**EXPERT, field: value}]})


def test_error_names_the_source() -> None:
    """The file stands in front of the message."""
    with pytest.raises(ConfigError, match=r"^here: "):
        parse_config({}, source="here")


def test_an_expert_may_have_several_addresses() -> None:
    """Each is an expert with the same place in the cache; one that is written as text stays what it is."""

    def expert(base_url: object, **settings: object) -> ExpertConfig:
        return parse_config({"experts": [{**EXPERT, "model": "m", "base_url": base_url, **settings}]}).experts[0]

    alone = expert("http://a")
    assert (alone.addresses, alone.replicas()) == (("http://a",), (alone,))
    several = expert(["http://a", "http://b"])
    assert several.addresses == ("http://a", "http://b")
    assert [(one.base_url, one.identity) for one in several.replicas()] == [
        ("http://a", "http://a m"),
        ("http://b", "http://a m"),
    ]
    assert {one.identity for one in expert(["http://a", "http://b"], identity="own").replicas()} == {"own"}
    nowhere = parse_config({"experts": [EXPERT]}).experts[0]
    assert (nowhere.addresses, nowhere.replicas()) == ((), (nowhere,))


def test_presets_may_name_dimensions_experts_and_unserved_dimensions() -> None:
    """A preset's names are those of dimensions and experts."""
    config = parse_config(
        {
            "experts": [EXPERT],
            "dimensions": {"polite": {"text": "Be polite."}},
            "presets": {"boss": {"concise": 2, "short": 1, "polite": 1}},
        }
    )
    assert config.presets == {"boss": {"concise": 2.0, "short": 1.0, "polite": 1.0}}
    assert config.dimension_texts() == {"polite": "Be polite."}


def test_roster() -> None:
    """The roster knows who serves what, the base, the presets and all dimensions."""
    config = parse_config(
        {
            "experts": [{"name": "plain", "provider": "scripted", "base": True}, EXPERT],
            "dimensions": {"polite": {}},
            "presets": {"boss": {"concise": 1}},
        }
    )
    roster = config.roster()
    assert roster.dimension_of == {"plain": None, "short": "concise"}
    assert roster.base == "plain"
    assert roster.presets == {"boss": {"concise": 1.0}}
    assert roster.dimensions == ("concise", "polite")


def test_relative_paths_belong_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths that exist beside the file become absolute, wherever the program runs."""
    for name in ("tok", "weights", "control"):
        (tmp_path / name).mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    text = (
        '[[experts]]\nname = "a"\nprovider = "local"\nmodel = "weights"\ntokenizer = "tok"\n'
        '[[experts]]\nname = "b"\nprovider = "llamacpp"\nmodel = "weights"\ntokenizer = "org/hub-name"\n'
        '[pcm]\npath = "control"\n[cache]\npath = "new-cache"\n'
    )
    config = load_config(write(tmp_path, text))
    local, served = config.experts
    assert (local.model, local.tokenizer) == (str(tmp_path / "weights"), str(tmp_path / "tok"))
    assert (served.model, served.tokenizer) == ("weights", "org/hub-name")
    assert config.pcm.path == str(tmp_path / "control")
    assert config.cache.path == str(tmp_path / "new-cache")


def test_absolute_paths_stay(tmp_path: Path) -> None:
    """An absolute path means itself."""
    config = load_config(write(tmp_path, MINIMAL + '[cache]\npath = "/somewhere/else"\n'))
    assert config.cache.path == "/somewhere/else"


def test_without_a_file_paths_stay() -> None:
    """`parse_config` of plain data has no folder to be relative to."""
    assert parse_config({"experts": [EXPERT], "cache": {"path": "x"}}).cache.path == "x"


def test_configuration_is_frozen() -> None:
    """A configuration cannot be changed behind the back of those who read it."""
    config = parse_config({"experts": [EXPERT]})
    with pytest.raises(ValueError, match="frozen"):
        config.merge.rule = "product"
    assert isinstance(config, Config)


def test_key_itself_is_no_field() -> None:
    """A key in the file is refused: its field takes the name of an environment variable."""
    with pytest.raises(ConfigError, match="api_key") as caught:
        parse_config({"experts": [{**EXPERT, "api_key": "sk-1"}]})
    assert caught.value.hint == "Did you mean 'api_key_env'?"
    assert "sk-1" not in str(caught.value)


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MOPE_BB_HOME, then XDG_CACHE_HOME, then ~/.cache."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("MOPE_BB_HOME", "~/kept")
    assert resolve_home() == tmp_path / "kept"
    monkeypatch.setenv("MOPE_BB_HOME", "")
    assert resolve_home() == tmp_path / ".cache" / "mope-bb"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert resolve_home() == tmp_path / "x" / "mope-bb"
