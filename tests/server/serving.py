"""The real application on a real socket, in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import openai

from mope_bb.config import Config
from mope_bb.server.answers import OpenAnswers
from mope_bb.server.app import Surroundings, build_app
from mope_bb.server.listening import address_of, bind, listen
from mope_bb.session import Session, open_session
from mope_bb.types import Answer

READY_WITHIN_S = 60.0


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    url: str
    session: Session
    open_answers: OpenAnswers
    stop: Callable[[], None]
    """What a signal does."""
    loop: asyncio.AbstractEventLoop

    def in_process(self, **options: Any) -> Answer:
        """What the library answers, without HTTP."""
        return asyncio.run_coroutine_threadsafe(self.session.complete(**options), self.loop).result(60)

    def sdk(self, **options: Any) -> openai.OpenAI:
        """OpenAI's own client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def async_sdk(self, **options: Any) -> openai.AsyncOpenAI:
        """The same, not waiting."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Send a JSON body."""
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        """Ask for an address."""
        return httpx.get(self.url + path, timeout=60, **options)


@contextmanager
def served(config: Config, surroundings: Surroundings | None = None) -> Iterator[Served]:
    """Serve `config` at a free port until the block is left; what is open then may end."""
    around = surroundings or Surroundings(config.server)
    ready: queue.Queue[Served | BaseException] = queue.Queue()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        async with open_session(config) as session:
            app, open_answers = build_app(session, around, host=around.settings.host)

            def tell(stop: Callable[[], None]) -> None:
                ready.put(Served(url, session, open_answers, partial(_call_in, loop, stop), loop))

            with bind(around.settings.host, 0) as listener:
                url = address_of(listener)
                await listen(app, listener, open_answers, shutdown_timeout_s=30, on_ready=tell)

    def run_and_tell() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:  # noqa: BLE001  # the test's thread raises it
            ready.put(error)

    thread = threading.Thread(target=run_and_tell, daemon=True)
    thread.start()
    server = ready.get(timeout=READY_WITHIN_S)
    if isinstance(server, BaseException):
        raise server
    try:
        yield server
    finally:
        server.stop()
        thread.join(READY_WITHIN_S)
    assert not thread.is_alive()
    # An error after the start.
    assert ready.empty(), ready.get()


def _call_in(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> None:
    # A server that a test has stopped has no loop any more.
    if not loop.is_closed():
        loop.call_soon_threadsafe(stop)


def chat_body(text: str = "How do I fix a bike?", /, **fields: Any) -> dict[str, Any]:
    """A request."""
    return {"model": "mope", "messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}


def data_of(line: str) -> Any:
    """What a line of a stream holds."""
    text = line.removeprefix("data: ")
    return text if text == "[DONE]" else json.loads(text)


async def events_of(response: httpx.Response) -> AsyncIterator[Any]:
    """Its events as they come."""
    async for line in response.aiter_lines():
        if line:
            yield data_of(line)


def text_of(events: Sequence[Any]) -> str:
    """The answer in the events of a stream."""
    chunks = [event for event in events if event != "[DONE]"]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
