"""What a run will ask for, counted by hand."""

from __future__ import annotations

import pytest

from mope_bb.config import parse_config
from mope_bb.pcm.mixture import MergeRule
from mope_bb.training.estimate import estimate_run
from mope_bb.training.tasks import open_tasks
from mope_bb.types import Message

PROMPTS = tuple((Message("user", text),) for text in ("one", "two"))


def test_counted_by_hand() -> None:
    """3 batches of 5 pairs for the one dimension there is: 30 answers by base and expert, 2 references by the base."""
    config = parse_config(
        {
            "experts": [
                {"name": "plain", "provider": "scripted", "base": True, "input_price": 1.0, "output_price": 4.0},
                {"name": "short", "provider": "scripted", "dimension": "concise", "output_price": 8.0},
            ],
            "train": {"max_steps": 3, "batch_size": 5},
        }
    )
    rule = MergeRule("product")
    outline = estimate_run(
        config,
        open_tasks(config, rule, PROMPTS),
        PROMPTS,
        reference="plain",
        count_tokens=lambda messages: 7,
        lengths=[4],
    )
    assert (outline.num_answers, outline.num_references, outline.prompt_tokens) == (30, 2, 7.0)
    assert outline.share_asked == {"plain": 1.0, "short": 1.0}
    (found,) = outline.estimates
    assert found.questions == {"plain": 32 * 4, "short": 30 * 4}
    # 7 + 8 + 9 + 10 tokens are read for each answer.
    assert found.tokens_read == {"plain": 32 * 34, "short": 30 * 34}
    assert found.cost == pytest.approx((32 * 34 * 1.0 + 32 * 4 * 4.0 + 30 * 4 * 8.0) / 1e6)
