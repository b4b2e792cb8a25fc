"""What replies say that they cost, in every wire's own words; budgets and prices."""

from __future__ import annotations

from typing import Any

import pytest

from mope_bb.config import BudgetConfig, parse_config
from mope_bb.errors import BudgetError
from mope_bb.usage import Account, Usage, billed_tokens, describe_usage, reward_name


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ({"usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}}, (7, 2)),
        ({"tokens_evaluated": 300, "tokens_predicted": 16}, (300, 16)),
        ([{"tokens_evaluated": 3, "tokens_predicted": 1}, {"tokens_evaluated": 4, "tokens_predicted": 1}], (7, 2)),
        ([{"meta_info": {"prompt_tokens": 5, "completion_tokens": 1}}], (5, 1)),
        ({"usageMetadata": {"promptTokenCount": 4, "candidatesTokenCount": 3}}, (4, 3)),
        ({"prompt_eval_count": 11, "eval_count": 2}, (11, 2)),
        ({"details": {"generated_tokens": 3, "prefill": []}}, (0, 3)),
        ({"data": [{"id": "model"}]}, None),
        ({"usage": None}, None),
        ({"usage": {"prompt_tokens": -5, "completion_tokens": "2"}}, (0, 0)),
        ("text", None),
    ],
)
def test_every_wire_tells_its_tokens(reply: Any, expected: tuple[int, int] | None) -> None:
    """What is no count counts as nothing; a reply that tells nothing is told from one of no tokens."""
    assert billed_tokens(reply) == expected


def test_calls_are_counted_before_they_are_sent() -> None:
    """`max_calls` is exact: the call that would be one too many is not made."""
    account = Account(BudgetConfig(max_calls=3))
    meters = [account.meter("one"), account.meter("two")]
    for meter in (*meters, meters[0]):
        meter.begin_call()
    with pytest.raises(BudgetError, match=r"3 of max_calls = 3") as caught:
        meters[1].begin_call()
    assert "[budget]" in str(caught.value.hint)
    assert account.by_name == {"one": Usage(num_calls=2), "two": Usage(num_calls=1)}


@pytest.mark.parametrize("limit", [BudgetConfig(max_tokens_billed=100), BudgetConfig(max_cost=0.001)])
def test_tokens_and_cost_end_it_afterwards(limit: BudgetConfig) -> None:
    """What a call took is known when it is over: the next one is refused."""
    config = parse_config(
        {
            "experts": [{"name": "one", "provider": "llamacpp", "input_price": 5.0, "output_price": 20.0}],
            "budget": limit.model_dump(exclude_none=True),
        }
    )
    account = Account.of(config)
    meter = account.meter("one")
    meter.begin_call()
    meter.read({"usage": {"prompt_tokens": 90, "completion_tokens": 9}})
    meter.begin_call()
    meter.read({"usage": {"prompt_tokens": 110, "completion_tokens": 1}})
    total = account.total
    assert (total.num_calls, total.num_told, total.input_tokens, total.output_tokens) == (2, 2, 200, 10)
    assert total.cost == pytest.approx(0.0012)
    with pytest.raises(BudgetError):
        meter.begin_call()


def test_judges_have_prices_of_their_own() -> None:
    """A judge counts apart from the expert of the same name."""
    judge = {"kind": "judge", "model": "m", "criterion": "short", "input_price": 1.0, "output_price": 0.0}
    config = parse_config(
        {
            "experts": [{"name": "concise", "provider": "llamacpp", "dimension": "concise"}],
            "dimensions": {"concise": {"reward": judge}},
        }
    )
    account = Account.of(config)
    for name in ("concise", reward_name("concise")):
        account.meter(name).read({"usage": {"prompt_tokens": 1_000_000, "completion_tokens": 0}})
    assert [account.by_name[name].cost for name in ("concise", reward_name("concise"))] == [0.0, 1.0]
    assert "cost 1 ·" in describe_usage(account)


def test_the_line_for_people() -> None:
    """No cost where there are no prices; what the cache answered stands apart."""
    account = Account()
    account.add("one", Usage(1234, 1200, 56789, 1200))
    assert describe_usage(account, cache_hits=7) == (
        "1,234 calls · 56,789 tokens read, 1,200 generated · 7 questions answered from the cache"
    )
