"""Several questions at once, a tool, and another preference in mid-answer: the library in asyncio, without a server.

python library_asyncio.py                # the zoo: tiny models, built the first time
python library_asyncio.py mope.toml      # your own experts
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from mope_bb import Finished, Session, TextDelta, ToolCallDelta, open_session

FIRST, SECOND = "concise", "friendly"
"""Two preferences of the configuration."""
QUESTIONS = ("How do I fix a bike?", "How do I clean a lamp?", "How do I paint a chair?")
PRICES = {"chain": 24.5, "tire": 31.0, "wheel": 89.0}
PRICE_OF = {
    "type": "function",
    "function": {
        "name": "price_of",
        "description": "The price of a spare part, in euros.",
        "parameters": {
            "type": "object",
            "properties": {"part": {"type": "string", "enum": list(PRICES)}},
            "required": ["part"],
            "additionalProperties": False,
        },
    },
}
MAX_TURNS = 3
STEERED_AFTER = 3
"""Tokens."""


async def ask_several(session: Session) -> None:
    """One session answers any number of questions at the same time."""
    answers = await asyncio.gather(
        *(session.complete(question, preference=FIRST, max_tokens=60) for question in QUESTIONS)
    )
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"{question} {answer.text!r} ({answer.finish_reason}, {answer.num_completion_tokens} tokens)")


async def call_a_tool(session: Session) -> None:
    """Ask, call what the answer wants called, tell the result, and ask again, until there is an answer in words."""
    conversation: list[dict[str, Any]] = [{"role": "user", "content": "What does a new part for my bike cost?"}]
    for turn in range(MAX_TURNS):
        stream = session.stream(
            conversation,
            preference=f"{FIRST},{SECOND}",
            tools=[PRICE_OF],
            # Leave this out where the experts know when to call: the zoo's have never heard of tools.
            tool_choice="required" if turn == 0 else "none",
            max_tokens=120,
        )
        async for event in stream.events():
            match event:
                case ToolCallDelta(name=str(name), arguments=arguments):
                    print(f"calls {name} with {arguments}", end="")
                case ToolCallDelta(arguments=arguments):
                    print(arguments, end="", flush=True)
                case TextDelta(text=text):
                    print(text, end="", flush=True)
                case Finished(answer=answer):
                    print(f" ({answer.finish_reason})")
        calls = stream.answer.tool_calls
        if not calls:
            return
        shown = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
        conversation.append({"role": "assistant", "content": "", "tool_calls": shown})
        for call in calls:
            result = PRICES[json.loads(call.arguments)["part"]]
            print(f"result {result}")
            conversation.append({"role": "tool", "tool_call_id": call.call_id, "content": str(result)})


async def steer(session: Session) -> None:
    """Begin with one preference and go on with another."""
    stream = session.stream(QUESTIONS[0], preference=FIRST, max_tokens=60)
    num_tokens = 0
    async for token in stream:
        print(token.text, end="", flush=True)
        num_tokens += 1
        if num_tokens == STEERED_AFTER:
            stream.steer(SECOND)
            print(" | ", end="")
    print()
    for step in (stream.answer.steps[0], stream.answer.steps[-1]):
        print(f"asked {', '.join(step.experts)}")


async def main(config: Any) -> None:
    """All three, with one session."""
    async with open_session(config) as session:
        await ask_several(session)
        await call_a_tool(session)
        await steer(session)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(main(sys.argv[1]))
    else:
        from mope_bb.zoo.demo import serve

        with serve() as zoo:
            asyncio.run(main(zoo.config()))
