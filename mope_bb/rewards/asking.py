"""From a reward model that is asked synchronously to an endpoint that is asked many things at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

import orjson

from mope_bb.config import RewardConfig
from mope_bb.errors import ConfigError, ProviderError, RewardError
from mope_bb.keys import Key

Client = TypeVar("Client")
Question = TypeVar("Question")


def ask_all(
    open_client: Callable[[], AbstractAsyncContextManager[Client]],
    ask: Callable[[Client, Question], Awaitable[float]],
    questions: Sequence[Question],
    *,
    dimension: str,
    max_in_flight: int,
) -> list[float | RewardError]:
    """What `ask` says to each question, `max_in_flight` at a time; blocks until all are answered.

    A ProviderError or RewardError that `ask` raises is a RewardError in the place of that answer.
    """

    async def ask_each() -> list[float | RewardError]:
        gate = asyncio.Semaphore(max_in_flight)
        async with open_client() as client:

            async def answer(question: Question) -> float | RewardError:
                async with gate:
                    try:
                        return await ask(client, question)
                    except (ProviderError, RewardError) as error:
                        return failed(dimension, error.message, hint=error.hint)
                    except (UnicodeError, orjson.JSONEncodeError) as error:  # half a surrogate pair, for one
                        return failed(dimension, f"the text cannot be sent: {error}")

            return await asyncio.gather(*map(answer, questions))

    # A loop and a client for this call alone. Connections belong to the loop that opened them, and reward models are
    # called from threads that come and go, without a loop: one that lasts would need a thread of its own, which
    # somebody has to end. A call asks a batch, so that opening its connections is a small part of it.
    return asyncio.run(ask_each()) if questions else []


def failed(dimension: str, reason: str, *, hint: str | None = None) -> RewardError:
    """The error of a reward model that could not score."""
    return RewardError(f"the reward model of {dimension!r} failed: {reason}", hint=hint)


def read_key(dimension: str, config: RewardConfig) -> Key | None:
    """The key that `api_key_env` names, if it names one. Raises ConfigError where there is none."""
    if config.api_key_env is None:
        return None
    what = f"dimension {dimension!r}: the environment variable {config.api_key_env!r}"
    try:
        key = Key.of_variable(config.api_key_env)
    except ValueError as error:
        raise ConfigError(f"{what} holds no key: {error}") from None
    if key is not None:
        return key
    raise ConfigError(
        f"{what} is not set",
        hint="Set it to the key, or leave `api_key_env` out for a server that wants none.",
    )
