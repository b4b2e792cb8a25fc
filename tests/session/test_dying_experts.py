"""An expert whose endpoint fails: the answer ends, or goes on without it. Real llama.cpp servers behind a proxy."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from mope_bb import Answer, ServerError, open_session
from mope_bb.config import Config, parse_config
from mope_bb.providers.pool import ExpertPool
from mope_bb.types import Piece
from mope_bb.zoo.serving import ZooServer
from tests.proxy import Proxy, running

BOTH = {"concise": 0.3, "technical": 0.7}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"wheels": {"type": "integer", "minimum": 100, "maximum": 999}, "name": {"type": "string"}},
    "required": ["wheels", "name"],
}
FORMED: dict[str, Any] = {
    "max_tokens": 40,
    "temperature": 1.0,
    "seed": 1,
    "response_format": {"type": "json_schema", "json_schema": {"name": "bike", "schema": SCHEMA}},
}
NAMES = ("base", "concise", "friendly", "technical")


@pytest.fixture
def proxy(nano_experts: ZooServer) -> Iterator[Proxy]:
    """In front of "friendly" and the base."""
    with running(Proxy({name: nano_experts.base_urls[name] for name in ("friendly", "base")})) as found:
        yield found


def config_of(server: ZooServer, proxy: Proxy, *, policy: str = "drop", mode: str = "lockstep") -> Config:
    """Experts at their own addresses, those of the proxy at the proxy's, tried twice."""
    data = server.config_data()
    experts = [
        {**one, "max_retries": 1, **({"base_url": proxy.url(one["name"])} if one["name"] in proxy.targets else {})}
        for one in data["experts"]
        if one["name"] in NAMES
    ]
    dimensions = {name: data["dimensions"][name] for name in NAMES[1:]}
    decoding = {"mode": mode, "on_expert_failure": policy}
    return parse_config(
        {"experts": experts, "dimensions": dimensions, "decoding": decoding, "cache": {"enabled": False}}
    )


def answer_with_a_death(
    config: Config, proxy: Proxy, *, after: int, preference: dict[str, float], **options: Any
) -> Answer:
    """An answer during which the proxy's servers begin to fail after some tokens."""

    async def run() -> Answer:
        async with open_session(config) as session:
            asked = {"max_tokens": 24, "temperature": 0.0, **options}
            stream = session.stream("How do I fix a bike?", preference=preference, **asked)
            if after == 0:
                proxy.fault_rate = 1.0
            async for _ in stream:
                if len(stream.answer.steps) == after:
                    proxy.fault_rate = 1.0
            return stream.answer

    return asyncio.run(run())


@pytest.mark.parametrize("mode", ["lockstep", "draft", "auto"])
def test_an_answer_goes_on_without_the_expert_that_failed(
    nano_experts: ZooServer, proxy: Proxy, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    """With a warning, and with the other weights grown in proportion."""
    proxy.faults = ("500",)
    config = config_of(nano_experts, proxy, mode=mode)
    preference = {"concise": 0.3, "friendly": 0.6, "technical": 0.1}
    with caplog.at_level(logging.WARNING):
        answer = answer_with_a_death(config, proxy, after=2, preference=preference)
    assert answer.dropped == ("friendly",)
    assert "friendly" in answer.steps[0].experts
    assert set(answer.steps[-1].experts) == {"concise", "technical"}
    assert dict(zip(answer.steps[-1].experts, answer.steps[-1].weights, strict=True)) == pytest.approx(
        {"concise": 0.75, "technical": 0.25}
    )
    assert "the answer goes on without this expert" in caplog.text


@pytest.mark.parametrize("after", [1, 9, 19, 22])
def test_a_form_is_kept_when_an_expert_fails(nano_experts: ZooServer, after: int) -> None:
    """At whatever place."""
    with running(Proxy({"technical": nano_experts.base_urls["technical"]}, faults=("500",))) as proxy:
        config = config_of(nano_experts, proxy)
        check_form(answer_with_a_death(config, proxy, after=after, preference=BOTH, **(FORMED | {"seed": after})))


def test_a_form_is_kept_when_spelling_fails(
    nano_experts: ZooServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then a piece may have been drawn that is not told: it is drawn again."""
    spell = ExpertPool.spell
    num_left = 0

    async def spell_until(self: ExpertPool, name: str, data: bytes) -> tuple[Piece, ...]:
        nonlocal num_left
        num_left -= 1
        if num_left < 0 and name == "technical":
            raise ServerError("it fails", expert=name)
        return await spell(self, name, data)

    monkeypatch.setattr(ExpertPool, "spell", spell_until)
    config = config_of(nano_experts, proxy)
    # Where there is little room, every piece is followed by a look at what is still to come.
    options = FORMED | {"max_tokens": 28}
    for num_spelt in (1, 2, 3):
        num_left = num_spelt
        check_form(answer_with_a_death(config, proxy, after=1000, preference=BOTH, **options))


def check_form(answer: Answer) -> None:
    """It goes on without the expert, as if it had never been asked."""
    assert answer.dropped == ("technical",)
    jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert answer.text.encode() == b"".join(step.piece.data for step in answer.steps)


def test_an_expert_that_is_dead_from_the_start_is_left_out(nano_experts: ZooServer, proxy: Proxy) -> None:
    """Also where not even its tokenizer can be asked for; who was the only one cannot be left out."""
    proxy.targets = dict.fromkeys(proxy.targets, "http://127.0.0.1:9")  # nobody listens there: 502
    config = config_of(nano_experts, proxy)
    answer = answer_with_a_death(config, proxy, after=1000, preference={"concise": 0.5, "friendly": 0.5})
    assert answer.dropped == ("friendly",)
    assert {step.experts for step in answer.steps} == {("concise",)}
    with pytest.raises(ServerError):
        answer_with_a_death(config, proxy, after=1000, preference={"friendly": 1.0})


@pytest.mark.parametrize(
    ("policy", "merge"),
    [("end", "linear"), ("drop", "product")],
    ids=["not allowed", "the base of the product"],
)
def test_an_answer_ends_where_the_expert_cannot_be_left_out(
    nano_experts: ZooServer, proxy: Proxy, policy: str, merge: str
) -> None:
    """With the endpoint's own error; what was said before stays."""
    proxy.faults = ("500",)
    if merge == "product":
        proxy.targets = {"base": proxy.targets["base"], "friendly": proxy.targets["friendly"]}
    config = config_of(nano_experts, proxy, policy=policy)
    preference = {"concise": 0.5, "technical": 0.5} if merge == "product" else {"concise": 0.5, "friendly": 0.5}
    with pytest.raises(ServerError, match="500"):
        answer_with_a_death(config, proxy, after=3, preference=preference, merge=merge)


def test_the_next_answer_does_not_wait_for_what_is_down(nano_experts: ZooServer, proxy: Proxy) -> None:
    """Once the circuit is open the expert is left out before anything is asked, until it is time to try it again."""
    proxy.faults = ("500",)

    async def run() -> tuple[list[tuple[str, ...]], int]:
        async with open_session(config_of(nano_experts, proxy)) as session:
            preference = {"concise": 0.5, "friendly": 0.5}
            proxy.fault_rate = 1.0
            dropped = []
            # Two tries each: the third answer opens the circuit.
            for _ in range(3):
                dropped.append((await session.complete("hello", preference=preference, max_tokens=2)).dropped)
            num_asked = proxy.num_requests
            dropped.append((await session.complete("hello", preference=preference, max_tokens=2)).dropped)
            return dropped, proxy.num_requests - num_asked

    dropped, num_asked = asyncio.run(run())
    assert dropped == [("friendly",)] * 4
    assert num_asked == 0
