"""A real tiny model behind stand-ins for endpoints that cannot run here: only the wire is imitated, not the numbers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from aiohttp import web

from mope_bb.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mope_bb.inference import loading_weights

Row = list[float]
Reply = tuple[int, Any]
"""Status and JSON."""
Handler = Callable[["StandIn", Mapping[str, Any], web.Request], Reply]


@dataclass(frozen=True)
class Drawn:
    """One generated token."""

    token_id: int
    logprobs: Row
    """V natural logprobs of the model itself."""

    def top(self, k: int) -> list[tuple[int, float]]:
        """The k most probable tokens, descending."""
        order = sorted(range(len(self.logprobs)), key=lambda one: -self.logprobs[one])[:k]
        return [(one, self.logprobs[one]) for one in order]


class TinyEngine:
    """A causal LM in this process that generates as servers do."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        with loading_weights():
            self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.folder = folder
        self.chat: ChatTokenizer = load_chat_tokenizer(str(folder))
        self.tokenizer: Any = self.chat._tokenizer
        self.end_id: int = self.tokenizer.eos_token_id
        self.vocab_size: int = self._model.config.vocab_size
        self.max_length: int = self._model.config.max_position_embeddings
        self._row = lru_cache(maxsize=4096)(self._forward)

    @torch.inference_mode()
    def _forward(self, ids: tuple[int, ...]) -> Row:
        logits = self._model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        found: Row = torch.log_softmax(logits, dim=-1).tolist()
        return found

    def row(self, ids: Sequence[int]) -> Row:
        """The model's own logprobs after `ids`."""
        return self._row(tuple(ids))

    def generate(
        self,
        ids: Sequence[int],
        num_tokens: int,
        *,
        temperature: float = 0.0,
        bias: Mapping[int, float] | None = None,
        seed: int | None = None,
    ) -> list[Drawn]:
        """Draw until `num_tokens` or the end, which is drawn as well; `bias` changes what is drawn, not the lists.

        Without a `seed` equal questions draw equally.
        """
        generator = torch.Generator().manual_seed(len(ids) if seed is None else seed)
        found: list[Drawn] = []
        while len(found) < num_tokens and not (found and found[-1].token_id == self.end_id):
            row = self._row((*ids, *(one.token_id for one in found)))
            biased = torch.tensor(row)
            for token_id, value in (bias or {}).items():
                biased[token_id] += value
            if temperature == 0.0:
                token_id = int(biased.argmax())
            else:
                shares = torch.softmax(biased / temperature, dim=-1)
                token_id = int(torch.multinomial(shares, 1, generator=generator))
            found.append(Drawn(token_id, row))
        return found

    def render(self, messages: Sequence[Mapping[str, Any]], *, continue_final: bool = False) -> str:
        """The chat template as text; `continue_final` leaves the last message, the assistant's, open."""
        if not continue_final:
            found: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            return found
        *before, last = messages
        return self.render(before) + str(last["content"])

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered template."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def data(self, token_id: int) -> bytes:
        """The bytes of a token; b"" for control tokens."""
        piece = self.chat.piece(token_id)
        return piece.data

    def text(self, token_id: int, *, special: bool = True) -> str:
        """The token as it is decoded alone: U+FFFD for half characters, control tokens by name if `special`."""
        return str(self.tokenizer.decode([token_id], skip_special_tokens=not special))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, without control tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


@dataclass(eq=False)
class StandIn:
    """A server whose routes are pure functions of the request."""

    engines: Mapping[str, TinyEngine]
    """Served name -> model."""
    routes: Mapping[tuple[str, str], Handler]
    """(Method, path) -> handler."""
    key: str | None = None
    """What must stand in the authorization header, as "Bearer KEY"."""
    faults: frozenset[str] = frozenset()
    """See the handlers."""
    max_logprobs: int | None = None
    requests: list[tuple[str, Any]] = field(default_factory=list)
    """Path and body of every request."""
    port: int = 0

    @property
    def url(self) -> str:
        """Its address, without a path."""
        return f"http://127.0.0.1:{self.port}"

    def engine(self, name: object) -> TinyEngine | None:
        """The model of this name."""
        return self.engines.get(str(name))

    async def handle(self, request: web.Request) -> web.Response:
        """Any route."""
        body = await request.json() if request.can_read_body else {}
        self.requests.append((request.path, body))
        handler = self.routes.get((request.method, request.path))
        if handler is None:
            return web.json_response({"detail": "Not Found"}, status=404)
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        status, reply = await asyncio.to_thread(handler, self, body, request)
        return web.json_response(reply, status=status)


@contextmanager
def serving(stand_in: StandIn) -> Iterator[StandIn]:
    """Run it on a thread of its own, on a free port of loopback."""
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    stop = asyncio.Event()

    async def serve() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", stand_in.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        stand_in.port = runner.addresses[0][1]
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield stand_in
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        loop.close()
