"""A stream that is cancelled, closed or failing leaves no request behind."""

from __future__ import annotations

import asyncio

import pytest

from mope_bb import Answer, ContextLengthError, ProviderConnectionError, Token, open_session
from mope_bb.config import parse_config
from tests.endpoints.gated import ANSWER, open_gated


def test_cancelling_closes_the_requests_at_once() -> None:
    """Both experts' requests are given up while they hang, and the session still serves."""

    async def run() -> tuple[list[str], Answer, str]:
        async with open_gated("left", "right", mode="auto") as server, open_session(server.config) as session:
            server.closes_after = 2
            stream, texts = session.stream("hi"), list[str]()

            async def read() -> None:
                async for token in stream:
                    texts.append(token.text)

            task = asyncio.create_task(read())
            await server.wait_until(lambda seen: seen.num_waiting == 2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await server.wait_until(lambda seen: seen.num_left == 2)
            server.closes_after = 1000
            return texts, stream.answer, (await session.complete("hi")).text

    texts, answer, following = asyncio.run(run())
    assert texts == ["o", "k"]
    assert (answer.text, answer.finish_reason) == ("ok", "length")
    assert following == ANSWER.decode()


def test_cancelling_one_stream_leaves_the_others() -> None:
    """Streams of one session are independent."""

    async def run() -> str:
        async with open_gated("left", mode="auto") as server, open_session(server.config) as session:
            kept = session.stream("hi")
            tokens = aiter(kept)
            await anext(tokens)
            server.closes_after = 0
            task = asyncio.create_task(session.complete("hi"))
            await server.wait_until(lambda seen: seen.num_waiting == 1)
            task.cancel()
            await server.wait_until(lambda seen: seen.num_left == 1)
            server.closes_after = 1000
            return kept.text + "".join([token.text async for token in tokens])

    assert asyncio.run(run()) == ANSWER.decode()


def test_a_failing_expert_cancels_the_others() -> None:
    """One expert's failure does not wait for the slow ones."""

    async def run() -> None:
        async with open_gated("slow", mode="auto") as slow, open_gated("short", mode="auto") as short:
            experts = [*slow.config.experts, *short.config.experts]
            config = parse_config({"experts": [expert.model_dump() for expert in experts], "cache": {"enabled": False}})
            async with open_session(config) as session:
                await session.complete("hi", max_tokens=1)
                slow.closes_after = 0
                stream = asyncio.create_task(session.complete("hi"))
                short.context = 0
                with pytest.raises(ContextLengthError, match="'short'"):
                    await stream
                await slow.wait_until(lambda seen: seen.num_waiting == 0)

    asyncio.run(run())


def test_answer_that_reaches_the_end_of_the_context() -> None:
    """It ends with the length limit, as far as it came; a prompt that does not fit at all is an error."""

    async def run() -> tuple[list[Token], Answer]:
        async with open_gated("left", mode="auto") as server, open_session(server.config) as session:
            server.context = len("user: hi\n") + 1
            stream = session.stream("hi", stop="k!")
            tokens = [token async for token in stream]
            with pytest.raises(ContextLengthError):
                await session.complete("hi there")
            return tokens, stream.answer

    tokens, answer = asyncio.run(run())
    assert [token.finish_reason for token in tokens] == [None, None, "length"]
    assert (answer.text, answer.finish_reason, len(answer.steps)) == ("ok", "length", 2)


def test_no_server() -> None:
    """A server that is gone is named with its expert."""

    async def run() -> None:
        async with open_gated("left", mode="auto") as server:
            config = server.config
        async with open_session(config) as session:
            with pytest.raises(ProviderConnectionError, match="'left'") as caught:
                await session.complete("hi")
            assert caught.value.expert == "left"

    asyncio.run(run())
