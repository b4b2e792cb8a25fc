"""Answers that are being written: whole or as they are drawn, several at a time, until they end or nobody listens."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, Final

import orjson
from starlette.types import Receive, Scope, Send

from mope_bb.errors import MopeError
from mope_bb.events import Finished
from mope_bb.pcm.merging import Plan
from mope_bb.preferences import PreferenceLike
from mope_bb.providers.pool import together
from mope_bb.server.failures import RefusalError, error_body
from mope_bb.server.metrics import Metrics
from mope_bb.server.replies import Choice, Delta, Writer
from mope_bb.server.token_details import Details, Wanted
from mope_bb.streams import AnswerStream
from mope_bb.types import TokenStep

_log = logging.getLogger(__name__)
SEND_WITHIN_S: Final = 60.0
"""How long a client may read nothing of what waits for it. One that sleeps would keep its answer open for ever."""
Keep = Callable[[int, AnswerStream, BaseException | None], None]
"""Takes the number of an answer, the answer, and what ended it before its end."""
NO_STORE: Final = (b"cache-control", b"no-store")


class OpenAnswers:
    """The answers of one application that are not over, by the id that their clients know."""

    def __init__(self, max_open: int, metrics: Metrics) -> None:
        self.metrics = metrics
        self._max_open = max_open
        self._num_open = 0
        self._open: dict[str, Answering] = {}
        self._is_ending = False

    @contextmanager
    def holding(self, answering: Answering) -> Iterator[None]:
        """Count the answers of a request as open. Raises RefusalError where there are too many, or the server ends."""
        number = len(answering.streams)
        if self._is_ending:
            raise _ending()
        if self._num_open + number > self._max_open:
            raise RefusalError(
                429,
                "too_many_open_answers",
                f"{self._num_open} answers are under way, at most {self._max_open} can be",
                hint="Try again in a moment, or raise `max_open_answers` in the [server] table.",
                headers={"retry-after": "1"},
            )
        self._num_open += number
        self.metrics.open_answers.inc(number)
        self._open[answering.answer_id] = answering
        try:
            yield
        finally:
            del self._open[answering.answer_id]
            self._num_open -= number
            self.metrics.open_answers.dec(number)

    def steer(self, answer_id: str, index: int, preference: PreferenceLike) -> Plan:
        """Let an open answer go on with another preference. Raises RefusalError and PreferenceError."""
        answering = self._open.get(answer_id)
        if answering is None or not answering.is_open(index):
            raise RefusalError(
                404,
                "answer_not_open",
                f"choice {index} of the answer {answer_id!r} is not open",
                hint="Only an answer that is still being written can be steered.",
            )
        return answering.streams[index].steer(preference)

    def end(self) -> None:
        """End all that are open, with an error, and take no more."""
        self._is_ending = True
        for answering in list(self._open.values()):
            answering.end()


class Answering:
    """The answers to one request: an ASGI application that sends them."""

    def __init__(
        self,
        answer_id: str,
        streams: Sequence[AnswerStream],
        writer: Writer,
        wanted: Wanted,
        open_answers: OpenAnswers,
        *,
        num_prompts: int = 1,
        is_streaming: bool,
        tells_usage: bool,
        keep: Keep | None = None,
    ) -> None:
        """`keep` is called at the end, in a thread."""
        self.answer_id = answer_id
        self.streams = streams
        self._writer = writer
        self._wanted = wanted
        self._open_answers = open_answers
        self._num_prompts = num_prompts
        self._is_streaming = is_streaming
        self._tells_usage = tells_usage
        self._keep = keep
        self._choices = [Choice() for _ in streams]
        self._began = time.perf_counter()
        self._task: asyncio.Task[None] | None = None
        self._is_left = False
        self._is_ended = False

    def is_open(self, index: int) -> bool:
        """Whether this choice goes on."""
        return index < len(self._choices) and self._choices[index].answer is None

    def end(self) -> None:
        """End it with an error, because the server ends."""
        self._is_ended = True
        if self._task is not None:
            self._task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI. An error before the first token is raised, and becomes an answer with its status."""
        with self._open_answers.holding(self):
            try:
                await self._send(receive, send)
            finally:
                for stream in self.streams:
                    self._open_answers.metrics.count(stream.answer)
                if self._keep is not None:
                    await asyncio.to_thread(self._keep_all, self._keep)

    def _keep_all(self, keep: Keep) -> None:
        for index, (stream, choice) in enumerate(zip(self.streams, self._choices, strict=True)):
            keep(index, stream, choice.error)

    async def _send(self, receive: Receive, send: Send) -> None:
        events = _EventSender(send)
        self._task = asyncio.create_task(self._stream(events) if self._is_streaming else self._whole(send))
        watcher = asyncio.create_task(self._watch(receive))
        try:
            await self._task
        except asyncio.CancelledError:
            if self._is_ended:
                await events.fail(_ending())
            elif not self._is_left:
                raise
        except _StuckError:
            _log.info("a client has not read for %g s: its answer is ended", SEND_WITHIN_S)
        except Exception as error:  # noqa: BLE001  # whatever it is, a stream that has begun must say that it failed
            await events.fail(error)
        finally:
            watcher.cancel()

    async def _watch(self, receive: Receive) -> None:
        """Cancel the answers, and with them what experts were asked, when the client goes away."""
        while (await receive())["type"] != "http.disconnect":
            pass
        assert self._task is not None
        self._is_left = self._task.cancel()

    async def _stream(self, events: _EventSender) -> None:
        await _all([self._draw(index, events) for index in range(len(self.streams))])
        if self._tells_usage:
            answers = [choice.answer for choice in self._choices if choice.answer is not None]
            await events.send(self._writer.closing(answers, self._num_prompts))
        await events.close()

    async def _whole(self, send: Send) -> None:
        await _all([self._draw(index, None) for index in range(len(self.streams))])
        tells_trace = self._wanted.trace is not None
        body = orjson.dumps(self._writer.whole(self._choices, self._num_prompts, tells_trace=tells_trace))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            NO_STORE,
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _draw(self, index: int, events: _EventSender | None) -> None:
        stream, choice, metrics = self.streams[index], self._choices[index], self._open_answers.metrics
        last: TokenStep | None = None
        told = self._began
        try:
            async with aclosing(stream), aclosing(stream.events()) as drawn:
                async for event in drawn:
                    if isinstance(event, Finished):
                        choice.answer = event.answer
                        continue
                    now = time.perf_counter()
                    (metrics.token_s if last else metrics.first_token_s).observe(now - told)
                    told = now
                    await self._tell(index, event, last, events)
                    last = event.token.step
        except BaseException as error:
            choice.error = error
            raise

    async def _tell(self, index: int, event: Delta, last: TokenStep | None, events: _EventSender | None) -> None:
        # An answer that has outgrown an expert's context ends with its last step once more: no new token.
        is_new = event.token.step is not last
        details = self._wanted.of(event.token, self.streams[index].plan.rule) if is_new else Details()
        if events is not None:
            opening = [self._writer.opening(index)] if last is None else []
            await events.send(*opening, self._writer.chunk(index, event, details))
        elif details != Details():
            self._choices[index].details.append(details)


class _StuckError(Exception):
    """The client does not read what it is sent."""


class _EventSender:
    """Server-sent events; the head goes out with the first of them."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_begun = False
        self._turn = asyncio.Lock()

    async def send(self, *payloads: Mapping[str, Any]) -> None:
        """Send each as an event."""
        await self._write(b"".join(b"data: %b\n\n" % orjson.dumps(payload) for payload in payloads))

    async def close(self) -> None:
        """Say that the stream is complete."""
        await self._write(b"data: [DONE]\n\n", is_last=True)

    async def fail(self, error: Exception) -> None:
        """Say why it is not, or raise the error while nothing is sent."""
        if not self._is_begun:
            raise error
        if not isinstance(error, MopeError):
            _log.error("an answer failed", exc_info=error)
        await self._write(b"data: %b\n\n" % orjson.dumps(error_body(error)), is_last=True)

    async def _write(self, data: bytes, *, is_last: bool = False) -> None:
        try:
            async with asyncio.timeout(SEND_WITHIN_S):
                await self._write_in_turn(data, is_last=is_last)
        except TimeoutError:
            raise _StuckError from None

    async def _write_in_turn(self, data: bytes, *, is_last: bool) -> None:
        async with self._turn:
            if not self._is_begun:
                self._is_begun = True
                headers = [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    NO_STORE,
                    # For a proxy (nginx) that would otherwise collect what comes.
                    (b"x-accel-buffering", b"no"),
                ]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})


async def _all(calls: Sequence[Coroutine[Any, Any, None]]) -> None:
    if len(calls) == 1:
        await calls[0]
    else:
        await together(calls)


def _ending() -> RefusalError:
    return RefusalError(503, "server_is_ending", "the server is being stopped", hint="Ask again when it is back.")
