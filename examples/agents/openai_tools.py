"""The tool loop of the openai SDK, as it is written for any endpoint: ask, call, tell the result, ask again.

    mope-bb serve                                       # in another terminal; the zoo, or your experts: -c mope.toml
    python openai_tools.py "What does a new chain cost?"

BASE_URL is the endpoint, by default http://127.0.0.1:8000/v1; API_KEY its key, if it wants one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

from openai import OpenAI
from openai.types.chat import ChatCompletionToolParam

MODEL: Final = "mope:concise=0.7,friendly=0.3"
"""The preference stands in the name; `extra_body={"preference": ...}` says it too."""
MAX_TURNS: Final = 4
PRICES: Final = {"chain": 24.5, "tire": 31.0, "wheel": 89.0}
TOOL: Final[ChatCompletionToolParam] = {
    "type": "function",
    "function": {
        "name": "price_of",
        "description": "The price of a spare part, in euros.",
        "parameters": {
            "type": "object",
            "properties": {
                "part": {"type": "string", "enum": list(PRICES)},
                "quantity": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["part", "quantity"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


def price_of(part: str, quantity: int) -> float:
    """What is called."""
    return PRICES[part] * quantity


FUNCTIONS: Final[Mapping[str, Callable[..., object]]] = {"price_of": price_of}


def main(question: str) -> None:
    """Print what is called, what comes of it, and the answer."""
    client = OpenAI(
        base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1"), api_key=os.environ.get("API_KEY", "none")
    )
    messages: list[Any] = [{"role": "user", "content": question}]
    for turn in range(MAX_TURNS):
        reply = client.chat.completions.create(
            model=MODEL,
            messages=messages,
            tools=[TOOL],
            # Leave this out where the experts know when to call: the zoo's have never heard of tools.
            tool_choice="required" if turn == 0 else "none",
            max_tokens=200,
        )
        message = reply.choices[0].message
        if not message.tool_calls:
            print(f"answer: {message.content}")
            break
        messages.append(message)
        for call in message.tool_calls:
            assert call.type == "function"
            # The arguments fit the schema, whatever the experts know of it.
            result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
            print(f"call: {call.function.name}({call.function.arguments}) = {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
    if reply.usage is not None:
        print(f"tokens of the last turn: {reply.usage.prompt_tokens} read, {reply.usage.completion_tokens} written")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "What does a new chain cost?")
