"""Budgets on real llama.cpp servers: counted by a proxy in front of them, and ended at the limit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from mope_bb import Answer, open_session
from mope_bb.config import Config, parse_config
from mope_bb.errors import BudgetError
from mope_bb.usage import Account
from mope_bb.zoo.serving import ZooServer
from tests.proxy import Proxy, running

NAMES = ("concise", "friendly")


@pytest.fixture
def proxy(nano_experts: ZooServer) -> Iterator[Proxy]:
    """In front of two experts."""
    with running(Proxy({name: nano_experts.base_urls[name] for name in NAMES})) as found:
        yield found


def config_of(server: ZooServer, proxy: Proxy, **sections: Any) -> Config:
    """Two experts behind the proxy, asked in lockstep, with prices."""
    data = server.config_data()
    prices = {"input_price": 2.0, "output_price": 10.0}
    experts = [{**one, **prices, "base_url": proxy.url(one["name"])} for one in data["experts"] if one["name"] in NAMES]
    return parse_config({"experts": experts, "decoding": {"mode": "lockstep"}, "cache": {"enabled": False}, **sections})


def ask(config: Config, **options: Any) -> tuple[Answer, Account, BudgetError | None]:
    """One answer as far as the budget lets it come."""

    async def run() -> tuple[Answer, Account, BudgetError | None]:
        async with open_session(config) as session:
            stream = session.stream("How do I fix a bike?", preference="concise,friendly", seed=1, **options)
            try:
                async for _ in stream:
                    pass
            except BudgetError as error:
                return stream.answer, session.account, error
            return stream.answer, session.account, None

    return asyncio.run(run())


def test_usage_is_what_the_servers_saw(nano_experts: ZooServer, proxy: Proxy) -> None:
    """One question per expert and token; the prompt is read anew for each, and billed so."""
    answer, account, error = ask(config_of(nano_experts, proxy), max_tokens=8)
    assert error is None
    assert proxy.num_requests == 2 * len(answer.steps)
    assert account.total.output_tokens == 2 * len(answer.steps)
    lengths = [prompt.count(",") + 1 for name, prompt in proxy.questions]
    assert account.total.input_tokens == sum(lengths)
    assert account.total.cost == pytest.approx((2.0 * sum(lengths) + 10.0 * 2 * len(answer.steps)) / 1e6)


@pytest.mark.parametrize("name", ["max_calls", "max_tokens_billed", "max_cost"])
def test_an_answer_ends_where_the_budget_does(nano_experts: ZooServer, proxy: Proxy, name: str) -> None:
    """What was said stays; of tokens and cost, at most what was under way comes on top."""

    def spent(account: Account) -> float:
        total = account.total
        return {"max_calls": total.num_calls, "max_tokens_billed": total.num_tokens, "max_cost": total.cost}[name]

    # On a busy machine a connection may break, and what is asked again is a call more: the cheaper of two has none.
    freely = [ask(config_of(nano_experts, proxy), max_tokens=8) for _ in range(2)]
    whole, free, _ = min(freely, key=lambda one: spent(one[1]))
    # The last question to each of two experts is the dearest.
    share = spent(free) if name == "max_calls" else 0.8 * spent(free)
    limit = share - 3 if name == "max_calls" else int(share) if name == "max_tokens_billed" else share
    answer, account, error = ask(config_of(nano_experts, proxy, budget={name: limit}), max_tokens=8)
    assert error is not None
    assert name in str(error)
    assert answer.text
    assert whole.text.startswith(answer.text)
    assert limit <= spent(account) <= (limit if name == "max_calls" else spent(free))


def test_the_cache_costs_nothing(nano_experts: ZooServer, proxy: Proxy, tmp_path: Any) -> None:
    """The same answer again asks no next-token question at all."""
    config = config_of(nano_experts, proxy, cache={"path": str(tmp_path)})
    first, _, _ = ask(config, max_tokens=8)
    num_requests = proxy.num_requests
    again, account, _ = ask(config, max_tokens=8)
    assert again.text == first.text
    assert proxy.num_requests == num_requests
    assert account.total.output_tokens == 0
