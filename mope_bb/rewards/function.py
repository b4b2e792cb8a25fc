"""Rewards computed by a Python function of the user's: length, a pattern, a unit test, another service."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mope_bb.chat_tokenizer import as_openai
from mope_bb.config import RewardConfig
from mope_bb.errors import ConfigError, RewardError
from mope_bb.rewards.base import Conversation, RewardModel, checked_score

RewardFunction = Callable[[list[dict[str, Any]], str], float]
"""`f(messages, answer)`: the conversation up to the answer, as {"role": ..., "content": ...}, and the answer's text."""


class FunctionReward(RewardModel):
    """Calls a function once for each conversation."""

    def __init__(self, dimension: str, function: RewardFunction) -> None:
        self.dimension = dimension
        self._function = function

    def score(self, conversations: Sequence[Conversation]) -> list[float | RewardError]:
        return [self._score(conversation) for conversation in conversations]

    def close(self) -> None:
        """Nothing is held."""

    def _score(self, conversation: Conversation) -> float | RewardError:
        *messages, answer = conversation
        try:
            value = self._function([as_openai(message) for message in messages], answer.content)
        except Exception as error:  # noqa: BLE001  # the user's function may raise anything, and costs one answer
            return RewardError(f"the reward function of {self.dimension!r} raised {type(error).__name__}: {error}")
        return checked_score(value, self.dimension)


def open_function(dimension: str, config: RewardConfig) -> FunctionReward:
    """Import what `config.function` names, "package.module:name". Raises ConfigError.

    The current directory is searched last, so that nothing in it stands before an installed package.
    """
    path = str(config.function)
    module_name, _, name = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may fail in any way while it is imported
        raise ConfigError(
            f"dimension {dimension!r}: the module of the reward function {path!r} cannot be imported: {error}",
            hint=f"It is searched where Python's packages are and in {here}.",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [known for known in dir(module) if callable(getattr(module, known))]
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        raise ConfigError(
            f"dimension {dimension!r}: {module_name!r} has no function {name!r}",
            hint=f"Did you mean {nearest[0]!r}?" if nearest else None,
        )
    return FunctionReward(dimension, function)
