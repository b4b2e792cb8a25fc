"""When tokens leave, what stops when a client leaves, and what a stream says that fails."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import httpx
import openai
import pytest

from mope_bb.config import parse_config
from tests.endpoints.gated import ANSWER, Gated, open_gated
from tests.server.serving import Served, chat_body, data_of, events_of, served, text_of

CHAT = "/v1/chat/completions"


def test_first_token_before_second() -> None:
    """The question for the second token waits at the gate until the client has read the first one."""

    async def run() -> list[Any]:
        async with open_gated("solo") as gated, httpx.AsyncClient(timeout=60) as client:
            gated.closes_after = 1
            async with in_thread(gated) as server:
                request = chat_body(stream=True, max_tokens=20)
                async with client.stream("POST", server.url + CHAT, json=request) as response:
                    found: list[Any] = []
                    async for event in events_of(response):
                        found.append(event)
                        if len(found) == 2:  # the role, the first token
                            await gated.wait_until(lambda gated: gated.num_waiting == 1)
                            assert text_of(found) == "o"
                            gated.open_gate()
                    return found

    found = asyncio.run(run())
    assert text_of(found) == ANSWER.decode()
    assert found[-1] == "[DONE]"


def in_thread(gated: Gated) -> Any:
    """Serve it without holding up this event loop."""
    return _InThread(gated)


class _InThread:
    def __init__(self, gated: Gated) -> None:
        self._served = served(gated.config)

    async def __aenter__(self) -> Served:
        return await asyncio.to_thread(self._served.__enter__)

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self._served.__exit__, None, None, None)


@pytest.mark.parametrize("is_streaming", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_client_that_leaves(n: int, *, is_streaming: bool) -> None:
    """Nothing more is asked for it: the questions under way are given up."""

    async def run() -> tuple[int, int]:
        async with open_gated("one", "two") as gated, in_thread(gated) as server:
            gated.closes_after = 2
            client = httpx.AsyncClient(timeout=60)
            request = chat_body(stream=is_streaming, max_tokens=20, n=n)
            asking = asyncio.create_task(client.post(server.url + CHAT, json=request))
            # Both answers say the same here, so that each expert is asked once for the two of them.
            await gated.wait_until(lambda gated: gated.num_waiting == 2)
            asked = gated.num_asked
            asking.cancel()
            await client.aclose()
            await gated.wait_until(lambda gated: gated.num_left == 2)
            gated.open_gate()
            # A whole other answer: were the first one still going on, its questions would be counted too.
            async with httpx.AsyncClient(timeout=60) as other:
                assert (await other.post(server.url + CHAT, json=chat_body(max_tokens=3))).status_code == 200
                metrics = (await other.get(server.url + "/metrics")).text
            assert "mope_open_answers 0.0" in metrics
            return asked, gated.num_asked

    before, after = asyncio.run(run())
    assert after == before + 3 * 2


def test_client_that_leaves_before_the_first_token() -> None:
    """The same where no head was sent yet."""

    async def run() -> None:
        async with open_gated("one") as gated, in_thread(gated) as server:
            gated.closes_after = 0
            client = httpx.AsyncClient(timeout=60)
            asking = asyncio.create_task(client.post(server.url + CHAT, json=chat_body(stream=True)))
            await gated.wait_until(lambda gated: gated.num_waiting == 1)
            asking.cancel()
            await client.aclose()
            await gated.wait_until(lambda gated: gated.num_left == 1)

    asyncio.run(run())


@pytest.mark.parametrize("is_streaming", [False, True])
def test_failure_before_the_first_token(*, is_streaming: bool) -> None:
    """A status of its own, that names the expert."""

    async def run() -> httpx.Response:
        async with open_gated("solo") as gated, in_thread(gated) as server, httpx.AsyncClient(timeout=60) as client:
            gated.fails_after = 0
            return await client.post(server.url + CHAT, json=chat_body(stream=is_streaming))

    response = asyncio.run(run())
    assert response.status_code == 502
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("expert_error", "expert_failed")
    assert "expert 'solo'" in error["message"]


def test_failure_in_mid_stream() -> None:
    """An event that says so, and no [DONE]; OpenAI's client raises it."""

    async def run() -> tuple[list[Any], str]:
        async with open_gated("solo") as gated, in_thread(gated) as server, httpx.AsyncClient(timeout=60) as client:
            gated.fails_after = 3
            async with client.stream("POST", server.url + CHAT, json=chat_body(stream=True)) as response:
                assert response.status_code == 200
                found = [event async for event in events_of(response)]
            async with server.async_sdk() as sdk:
                stream = await sdk.chat.completions.create(**chat_body(), stream=True)
                with pytest.raises(openai.APIError) as caught:
                    async for _ in stream:
                        pass
            return found, caught.value.message

    found, message = asyncio.run(run())
    assert text_of(found[:-1]) == ANSWER[:3].decode()
    assert found[-1]["error"]["code"] == "expert_failed"
    assert message == found[-1]["error"]["message"]


def test_one_of_several_fails() -> None:
    """The others end with it: half a reply is none."""

    async def run() -> list[Any]:
        async with open_gated("solo") as gated, in_thread(gated) as server, httpx.AsyncClient(timeout=60) as client:
            gated.fails_after = 4
            async with client.stream("POST", server.url + CHAT, json=chat_body(stream=True, n=3)) as response:
                return [event async for event in events_of(response)]

    found = asyncio.run(run())
    assert "error" in found[-1]
    assert all("error" not in event for event in found[:-1])


def test_many_streams_at_once(zoo_server: Served) -> None:
    """32 of them, each complete, and each the answer of its own seed."""

    async def run() -> list[list[Any]]:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:

            async def one(seed: int) -> list[Any]:
                request = chat_body(stream=True, max_tokens=10, seed=seed, model="mope:concise,friendly")
                async with client.stream("POST", zoo_server.url + CHAT, json=request) as response:
                    return [event async for event in events_of(response)]

            return await asyncio.gather(*map(one, range(32)))

    streams = asyncio.run(run())
    assert all(events[-1] == "[DONE]" for events in streams)
    assert all(events[-2]["choices"][0]["finish_reason"] for events in streams)
    assert len({text_of(events) for events in streams}) > 8


def test_too_many() -> None:
    """What comes on top is told to try again."""

    async def run() -> httpx.Response:
        async with open_gated("solo", max_open_answers=3, max_n=3) as gated, in_thread(gated) as server:
            gated.closes_after = 0
            async with httpx.AsyncClient(timeout=60) as client:
                first = asyncio.create_task(client.post(server.url + CHAT, json=chat_body(n=2)))
                await gated.wait_until(lambda gated: gated.num_waiting == 1)
                refused = await client.post(server.url + CHAT, json=chat_body(n=2))
                third = asyncio.create_task(client.post(server.url + CHAT, json=chat_body(n=1)))
                gated.open_gate()
                assert [(await one).status_code for one in (first, third)] == [200, 200]
                return refused

    refused = asyncio.run(run())
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "too_many_open_answers"


def test_client_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer is ended, or those who sleep would in the end leave no room for others."""
    monkeypatch.setattr("mope_bb.server.answers.SEND_WITHIN_S", 0.1)
    script = [{"a": 0.5, "b": 0.3, "c": 0.2}] * 20_000
    experts = [{"name": name, "dimension": name, "provider": "scripted", "script": script} for name in "abcdef"]
    settings = {"max_tokens": 20_000, "max_open_answers": 1, "max_n": 1}
    config = parse_config({"experts": experts, "cache": {"enabled": False}, "server": settings})
    request = json.dumps(chat_body(stream=True, max_tokens=20_000, trace="experts"))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with served(config) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", httpx.URL(server.url).port))
        client.sendall(f"{head}Content-Length: {len(request)}\r\n\r\n{request}".encode())
        while "mope_open_answers 1.0" not in server.get("/metrics").text:
            pass
        assert server.post(CHAT, chat_body(max_tokens=1)).status_code == 429
        while "mope_open_answers 0.0" not in server.get("/metrics").text:
            pass
        assert server.post(CHAT, chat_body(max_tokens=1)).status_code == 200


def test_steering() -> None:
    """From the next token on an open answer has another preference; the trace shows it. Then it cannot be steered."""

    async def run() -> tuple[list[Any], list[httpx.Response]]:
        async with open_gated("one", "two") as gated, in_thread(gated) as server:
            gated.closes_after = 1
            async with httpx.AsyncClient(timeout=60) as client:
                request = chat_body(stream=True, max_tokens=5, trace="weights", model="mope:one")
                found: list[Any] = []
                replies: list[httpx.Response] = []
                async with client.stream("POST", server.url + CHAT, json=request) as response:
                    async for event in events_of(response):
                        found.append(event)
                        if len(found) == 2:
                            address = f"{server.url}{CHAT}/{found[0]['mope']['answer_id']}/preference"
                            for preference, index in (("two", 0), ("nobody", 0), ("two", 1)):
                                body = {"preference": preference, "index": index}
                                replies.append(await client.post(address, json=body))
                            gated.open_gate()
                replies.append(await client.post(address, json={"preference": "two"}))
                return found, replies

    found, replies = asyncio.run(run())
    assert [reply.status_code for reply in replies] == [200, 400, 404, 404]
    assert replies[0].json() == {"weights": {"two": 1.0}}
    traces = [choice["trace"][0] for event in found[1:-1] for choice in event["choices"]]
    # The second question was on its way to the old expert.
    assert [list(trace["weights"]) for trace in traces] == [["one"]] * 2 + [["two"]] * 3
    assert "".join(trace["text"] for trace in traces) == ANSWER[:5].decode()


def test_trace(zoo_server: Served) -> None:
    """One entry a token, with weights, shares and what each expert would have said."""
    request = chat_body(trace="experts", model="mope:concise=0.7,grumpy=0.3", merge="product", seed=1)
    reply = zoo_server.post(CHAT, request).json()
    traced = reply["choices"][0]["trace"]
    assert len(traced) == reply["usage"]["completion_tokens"]
    assert "".join(entry["text"] for entry in traced) == reply["choices"][0]["message"]["content"]
    for entry in traced:
        assert set(entry["weights"]) == {"base", "concise", "grumpy"}
        assert set(entry["carriers"]) == {"concise", "grumpy"}
        assert sum(entry["carriers"].values()) == pytest.approx(1)
        assert entry["logprob"] <= 0
        assert not entry["is_forced"]
        for own in entry["experts"].values():
            tops = [top["logprob"] for top in own["top"]]
            assert len(tops) == 5
            assert tops == sorted(tops, reverse=True)
            assert own["logprob"] is None or own["logprob"] <= tops[0]


def test_streamed_trace_is_the_same(zoo_server: Served) -> None:
    """Chunk by chunk what the whole reply tells."""
    request = chat_body(trace="weights", seed=1, merge="geometric")
    whole = zoo_server.post(CHAT, request).json()["choices"][0]["trace"]
    lines = zoo_server.post(CHAT, {**request, "stream": True}).text.splitlines()
    chunks = [data_of(line) for line in lines if line][:-1]
    streamed = [entry for chunk in chunks for entry in chunk["choices"][0].get("trace", ())]
    assert len(streamed) == len(whole)
    for one, other in zip(streamed, whole, strict=True):
        assert one["bytes"] == other["bytes"]
        # llama.cpp computes a prompt that it has read before a little differently.
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-3)
        assert one["weights"] == pytest.approx(other["weights"], abs=1e-3)
        assert one["carriers"] == pytest.approx(other["carriers"], abs=1e-3)
