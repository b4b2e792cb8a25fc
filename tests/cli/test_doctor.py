"""`mope-bb doctor` says the truth, cell by cell: of the real llama.cpp, and of servers that misbehave in known ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mope_bb.providers.comparing import same_course
from mope_bb.providers.wire import Position, Reply
from mope_bb.types import Piece
from mope_bb.zoo.serving import ZooServer
from tests.command_line import Run
from tests.endpoints.stand_ins import StandIns


def write_config(path: Path, *experts: Mapping[str, object]) -> str:
    """A `mope.toml` of these experts."""
    tables = [
        "[[experts]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in one.items()) for one in experts
    ]
    path.write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    return str(path)


def cells_of(document: dict[str, Any], expert: int = 0) -> dict[str, tuple[str, str]]:
    """Check -> verdict and value, of one expert."""
    return {one["check"]: (one["verdict"], one["value"]) for one in document["experts"][expert]["findings"]}


def advice_of(document: dict[str, Any], check: str) -> str:
    """What is said about one check of the only expert."""
    return str(next(one["advice"] for one in document["experts"][0]["findings"] if one["check"] == check))


HEALTHY = {
    "model": ("ok", "concise"),
    "logprobs": ("ok", "given"),
    "top-k": ("ok", "20 of 20"),
    "order": ("ok", "descending"),
    "token ids": ("ok", "in and out"),
    "bytes": ("ok", "exact"),
    "prefill": ("ok", "honoured"),
    "trailing space": ("ok", "kept (ids)"),
    "end of answer": ("ok", "on the list"),
    "scale": ("ok", "raw"),
    "drafts": ("ok", "true samples"),
    "scoring": ("ok", "forced decoding"),
    "tokenizer": ("ok", "the same"),
    "connection": ("ok", "ok"),
}


def test_every_cell_of_llamacpp(mope: Run, nano_experts: ZooServer, tmp_path: Path) -> None:
    """Two experts on the real engine: what it can do, and how long it takes."""
    experts = [
        {
            "name": name,
            "dimension": name,
            "provider": "llamacpp",
            "base_url": nano_experts.base_urls[name],
            "model": name,
        }
        for name in ("concise", "friendly")
    ]
    config = write_config(tmp_path / "mope.toml", *experts)
    result = mope("doctor", "-c", config, "--json")
    document = json.loads(result.out)
    assert result.status == 0
    assert document["can_run"]
    cells = cells_of(document)
    assert {check: cells[check] for check in HEALTHY} == HEALTHY
    assert cells["reachable"][1].endswith("s at first")
    assert cells["latency"][1].endswith("ms a token")
    assert cells_of(document, 1)["model"] == ("ok", "friendly")
    shown = mope("doctor", "-c", config)
    assert shown.status == 0
    assert "This configuration can run." in shown.out
    assert "forced decoding" in shown.out


def test_llamacpp_serves_what_it_likes(mope: Run, nano_experts: ZooServer, tmp_path: Path) -> None:
    """A wrong model name is accepted in silence by that server, not by the doctor."""
    table = {"name": "e", "provider": "llamacpp", "base_url": nano_experts.base_urls["concise"], "model": "other"}
    document = json.loads(mope("doctor", "-c", write_config(tmp_path / "mope.toml", table), "--json").out)
    assert cells_of(document)["model"] == ("warning", "concise, not other")
    assert "no 'other'" in advice_of(document, "model")


@dataclass(frozen=True)
class Fault:
    """What a server does wrong, and what is to be said of it."""

    name: str
    check: str
    verdict: str
    value: str
    words: str
    can_run: bool


FAULTS = (
    Fault("short", "top-k", "warning", "5 of 20", "Set top_k = 5", can_run=True),
    Fault("scaled", "scale", "error", "scaled", "after the temperature", can_run=False),
    Fault("collisions", "token ids", "error", "not given", "fall together", can_run=False),
    Fault("unsorted", "order", "warning", "unsorted", "sorted here", can_run=True),
    Fault("drawn first", "order", "ok", "drawn token first", "takes the place of the last piece", can_run=True),
    Fault("drawn first", "drafts", "warning", "other lists", 'mode = "lockstep"', can_run=True),
    Fault("null", "logprobs", "error", "LogprobsUnavailableError", "logprobs: null", can_run=False),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.name} {fault.check}")
def test_every_fault_is_named(mope: Run, stand_ins: StandIns, tmp_path: Path, fault: Fault) -> None:
    """A server that claims to be vLLM, with one fault."""
    server = stand_ins.open("vllm")
    config = write_config(tmp_path / "mope.toml", {"name": "e", "provider": "vllm", **stand_ins.table("vllm")})
    healthy = json.loads(mope("doctor", "-c", config, "--json").out)
    assert cells_of(healthy)[fault.check][0] == "ok"
    assert cells_of(healthy)[fault.check][1] != fault.value
    server.faults = frozenset({fault.name})
    try:
        result = mope("doctor", "-c", config, "--json")
    finally:
        server.faults = frozenset()
    document = json.loads(result.out)
    assert cells_of(document)[fault.check] == (fault.verdict, fault.value)
    assert fault.words in advice_of(document, fault.check)
    assert document["can_run"] is fault.can_run
    assert result.status == (0 if fault.can_run else 1)


def test_text_collisions_shorten_the_list(mope: Run, stand_ins: StandIns, tmp_path: Path) -> None:
    """Where ids are not even promised, long lists lose the tokens whose texts are equal."""
    table = {"name": "e", "provider": "completions", **stand_ins.table("completions"), "top_k": 900}
    document = json.loads(mope("doctor", "-c", write_config(tmp_path / "mope.toml", table), "--json").out)
    cells = cells_of(document)
    assert cells["top-k"][0] == "warning"
    assert "fall together" in advice_of(document, "top-k")
    assert cells["bytes"] == ("warning", "some lost")


def test_logprobs_after_temperature_are_known_as_such(mope: Run, stand_ins: StandIns, tmp_path: Path) -> None:
    """DeepSeek's are; its adapter asks at temperature 1, where they are the model's own."""
    table = {"name": "e", "provider": "deepseek-completions", **stand_ins.table("deepseek-completions")}
    document = json.loads(mope("doctor", "-c", write_config(tmp_path / "mope.toml", table), "--json").out)
    assert document["can_run"]
    assert cells_of(document)["scale"] == ("ok", "scaled")
    assert cells_of(document)["trailing space"] == ("ok", "kept")
    assert cells_of(document)["token ids"] == ("ok", "none")


def test_a_cap_of_the_server_is_named_with_the_remedy(mope: Run, stand_ins: StandIns, tmp_path: Path) -> None:
    """vLLM refuses more than it was started with."""
    server = stand_ins.open("vllm")
    server.max_logprobs = 10
    try:
        config = write_config(tmp_path / "mope.toml", {"name": "e", "provider": "vllm", **stand_ins.table("vllm")})
        result = mope("doctor", "-c", config, "--json")
    finally:
        server.max_logprobs = None
    document = json.loads(result.out)
    assert result.status == 1
    assert cells_of(document)["top-k"] == ("error", "refuses 20")
    assert "top_k = 10" in advice_of(document, "top-k")


def test_every_address_is_asked(mope: Run, nano_experts: ZooServer, tmp_path: Path) -> None:
    """An expert at two addresses, at one of which nobody is: a column each, named by the address."""
    here, gone = nano_experts.base_urls["concise"], "http://127.0.0.1:9"
    table = {"name": "e", "provider": "llamacpp", "base_url": [here, gone], "model": "concise", "max_retries": 0}
    result = mope("doctor", "-c", write_config(tmp_path / "mope.toml", table), "--json")
    document = json.loads(result.out)
    assert [one["name"] for one in document["experts"]] == [f"e at {here}", f"e at {gone}"]
    assert [one["can_run"] for one in document["experts"]] == [True, False]
    assert cells_of(document, 1)["reachable"] == ("error", "ProviderConnectionError")
    assert result.status == 1


def test_nobody_there_and_a_key_that_is_not_set(mope: Run, no_server_config: str, tmp_path: Path) -> None:
    """Each expert that cannot be asked is named, and the others are looked at all the same."""
    result = mope("doctor", "-c", no_server_config)
    assert result.status == 1
    assert "no connection" in result.out
    assert "This configuration cannot run." in result.out
    table = {
        "name": "e",
        "provider": "vllm",
        "base_url": ["http://example.invalid/v1"],
        "api_key_env": "NOT_SET_ANYWHERE",
    }
    here = {"name": "s", "provider": "scripted"}
    document = json.loads(mope("doctor", "-c", write_config(tmp_path / "mope.toml", table, here), "--json").out)
    cells = cells_of(document)
    assert cells["reachable"] == ("error", "not set up")
    assert "NOT_SET_ANYWHERE" in advice_of(document, "reachable")
    assert cells["connection"][0] == "warning"
    assert "unencrypted" in advice_of(document, "connection")
    assert cells_of(document, 1)["reachable"] == ("ok", "in this process")


def test_only_what_is_named(mope: Run, scripted_config: str) -> None:
    """`--only` takes names of experts; an unknown one is an error."""
    document = json.loads(mope("doctor", "-c", scripted_config, "--only", "left", "--json").out)
    assert [one["name"] for one in document["experts"]] == ["left"]
    mope("doctor", "-c", scripted_config, "--only", "middle").assert_refused(2, "'middle'", "left, right")


def test_models_that_a_server_mixes_up_are_told_apart() -> None:
    """Lists must agree as long as both courses drew the same pieces; a near tie may part them afterwards."""

    def course(*steps: tuple[bytes, float]) -> Reply:
        pieces = [(Piece(data), value) for data, value in steps]
        return Reply(tuple(Position((entry, (Piece(b"z"), -3.0)), entry[0]) for entry in pieces))

    alone = course((b"a", -0.5), (b"b", -0.6))
    assert same_course(alone, course((b"a", -0.51), (b"b", -0.6)))
    assert not same_course(alone, course((b"a", -0.5), (b"b", -1.6)))
    assert not same_course(alone, course((b"x", -0.1), (b"b", -0.6)))
