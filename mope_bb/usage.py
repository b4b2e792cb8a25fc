"""What was asked of endpoints, what it cost, and the budget that ends it.

Calls are counted as they are sent, retries among them. Tokens are what the endpoints themselves report, since that is
what they bill; a call that was given up, or whose reply tells nothing, counts as a call alone.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any, Self

from mope_bb.config import BudgetConfig, Config
from mope_bb.errors import BudgetError


@dataclass(slots=True)
class Usage:
    """Of one expert or reward model, or of several together."""

    num_calls: int = 0
    """HTTP requests, retries among them."""
    num_told: int = 0
    """Replies that told how many tokens they cost."""
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    """By the prices in the configuration, in their currency."""

    @property
    def num_tokens(self) -> int:
        """Read and generated."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, slots=True)
class Prices:
    """Of a million tokens."""

    input: float = 0.0
    output: float = 0.0


class Account:
    """What all endpoints of one session or run have cost, and how much they may. Any thread may use it."""

    def __init__(self, limits: BudgetConfig | None = None, prices: Mapping[str, Prices] | None = None) -> None:
        """`prices` by name; what has none is free."""
        self._limits = limits or BudgetConfig()
        self._prices = dict(prices or {})
        self._lock = threading.Lock()
        self._by_name: dict[str, Usage] = {}
        self._total = Usage()

    @classmethod
    def of(cls, config: Config) -> Self:
        """The account of a configuration; nothing is spent yet."""
        prices = {one.name: Prices(one.input_price, one.output_price) for one in config.experts}
        for name, dimension in config.dimensions.items():
            if (reward := dimension.reward) is not None:
                prices[reward_name(name)] = Prices(reward.input_price, reward.output_price)
        return cls(config.budget, prices)

    @property
    def total(self) -> Usage:
        """Of all together."""
        return self._total

    @property
    def by_name(self) -> Mapping[str, Usage]:
        """Of each expert, and of each reward model by `reward_name`."""
        return dict(self._by_name)

    @property
    def has_prices(self) -> bool:
        """Whether anything has a price."""
        return any(prices != Prices() for prices in self._prices.values())

    def meter(self, name: str) -> Meter:
        """What counts for `name`."""
        return Meter(self, name, self._prices.get(name, Prices()))

    def check(self) -> None:
        """Raise BudgetError where nothing is left."""
        limits, total = self._limits, self._total
        for name, limit, spent in (
            ("max_calls", limits.max_calls, total.num_calls),
            ("max_tokens_billed", limits.max_tokens_billed, total.num_tokens),
            ("max_cost", limits.max_cost, total.cost),
        ):
            if limit is not None and spent >= limit:
                raise BudgetError(f"the budget is used up: {spent:,.6g} of {name} = {limit:,.6g}")

    def add(self, name: str, usage: Usage) -> None:
        """Count what was spent for `name`."""
        with self._lock:
            self._by_name[name] = self._by_name.get(name, Usage()) + usage
            self._total += usage


@dataclass(frozen=True, slots=True)
class Meter:
    """Counts for one name of an account."""

    account: Account
    name: str
    prices: Prices

    def begin_call(self) -> None:
        """Count a request that is about to be sent. Raises BudgetError where nothing is left.

        Of tokens and cost it is known afterwards only what a call took: those that are under way when a limit is
        reached still come on top of it.
        """
        self.account.check()
        self.account.add(self.name, Usage(num_calls=1))

    def read(self, reply: Any) -> None:
        """Count the tokens that a reply tells."""
        found = billed_tokens(reply)
        if found is not None:
            read, drawn = found
            cost = (read * self.prices.input + drawn * self.prices.output) / 1e6
            self.account.add(self.name, Usage(0, 1, read, drawn, cost))


def reward_name(dimension: str) -> str:
    """Under which name an account has the reward model or judge of a dimension."""
    return f"reward of {dimension}"


_SHAPES: tuple[tuple[str, str, str], ...] = (
    ("usage", "prompt_tokens", "completion_tokens"),  # OpenAI, vLLM and who copies them
    ("meta_info", "prompt_tokens", "completion_tokens"),  # SGLang
    ("usageMetadata", "promptTokenCount", "candidatesTokenCount"),  # Gemini
    ("details", "prompt_tokens", "generated_tokens"),  # TGI, which does not tell what it read
    ("", "tokens_evaluated", "tokens_predicted"),  # llama.cpp
    ("", "prompt_eval_count", "eval_count"),  # Ollama
)
"""Where replies tell their tokens: the object that holds them ("" = the reply itself), then read and generated."""


def billed_tokens(reply: Any) -> tuple[int, int] | None:
    """Tokens read and generated, as the reply tells them; None where it tells neither. Lists are added up."""
    if isinstance(reply, list):
        # Lists of replies are one deep; what is deeper is none, and could be as deep as it likes.
        found = [one for one in (billed_tokens(one) for one in reply if isinstance(one, dict)) if one is not None]
        return (sum(read for read, _ in found), sum(drawn for _, drawn in found)) if found else None
    if not isinstance(reply, dict):
        return None
    for place, read_key, drawn_key in _SHAPES:
        told = reply.get(place) if place else reply
        if isinstance(told, dict) and (read_key in told or drawn_key in told):
            return _count(told.get(read_key)), _count(told.get(drawn_key))
    return None


def _count(value: object) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else 0


def describe_usage(account: Account, *, cache_hits: int = 0) -> str:
    """One line for people: calls, tokens, cost where there are prices, and answers from the cache apart."""
    total = account.total
    parts = [f"{total.num_calls:,} calls", f"{total.input_tokens:,} tokens read, {total.output_tokens:,} generated"]
    if account.has_prices:
        parts.append(f"cost {total.cost:,.4g}")
    return " · ".join([*parts, f"{cache_hits:,} questions answered from the cache"])
