"""An agent of pydantic-ai that calls a function and answers with a typed value.

    mope-bb serve                                       # in another terminal; the zoo, or your experts: -c mope.toml
    python pydantic_ai_agent.py "Which part does my bike need?"

BASE_URL is the endpoint, by default http://127.0.0.1:8000/v1; API_KEY its key, if it wants one.
"""

from __future__ import annotations

import os
import sys
from typing import Final, Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelSettings, RunContext
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.usage import UsageLimits

MODEL: Final = "mope:concise=0.7,friendly=0.3"
PRICES: Final = {"chain": 24.5, "tire": 31.0, "wheel": 89.0}


class Offer(BaseModel):
    """What the agent answers with."""

    part: Literal["chain", "tire", "wheel"]
    quantity: int = Field(ge=1, le=9)
    reason: str = Field(max_length=60)


def settings(context: RunContext[None]) -> ModelSettings:
    """First a call, then the answer. Experts that know of tools need no `tool_choice`; the zoo's do not know."""
    return ModelSettings(max_tokens=300, tool_choice=["price_of"] if context.run_step == 1 else "none")


model = OpenAIChatModel(
    MODEL,
    provider=OpenAIProvider(
        base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1"), api_key=os.environ.get("API_KEY", "none")
    ),
)
agent = Agent(model, output_type=Offer, model_settings=settings, instructions="Sell spare parts.")


@agent.tool_plain
def price_of(part: Literal["chain", "tire", "wheel"]) -> float:
    """The price of a spare part, in euros."""
    print(f"call: price_of({part!r}) = {PRICES[part]}")
    return PRICES[part]


def main(question: str) -> None:
    """Print what is called, and the typed answer."""
    result = agent.run_sync(question, usage_limits=UsageLimits(request_limit=4))
    print(f"offer: {result.output!r}")
    print(f"{result.usage.requests} requests, {result.usage.total_tokens} tokens")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "Which part does my bike need?")
