"""Every parser of what others wrote, each with good bodies to start from and with what must hold of what it accepts."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal
from unittest.mock import patch

import orjson

from mope_bb.cache import decode_distribution, encode_distribution
from mope_bb.chat_tokenizer import ChatTokenizer
from mope_bb.errors import MopeError
from mope_bb.pcm.model import parse_document
from mope_bb.providers import (
    chat,
    completions,
    discover,
    gemini,
    llamacpp,
    llamacpp_wire,
    ollama,
    sglang,
    tgi,
    vllm_generate,
)
from mope_bb.providers.dialects import CHAT
from mope_bb.providers.drafting import build_steps, certain_positions, undrawn_entries
from mope_bb.providers.drawing import piece_of_draw
from mope_bb.providers.endpoint import Ask, build_from_reply
from mope_bb.providers.wire import END_TOKENS, MAX_PIECE_BYTES, MAX_TOKEN_ID, PieceReader, Reply
from mope_bb.rewards import judge, remote
from mope_bb.rewards.base import checked_score
from mope_bb.transport import Endpoint
from mope_bb.types import END, Context, DraftStep, Message, Piece, TokenDistribution
from mope_bb.usage import Account
from tests.fuzz import seeds

MASS_SLACK: Final = 0.06
"""How far the probabilities of an accepted list may add up to more than 1."""
MAX_MESSAGE: Final = 2_000
"""No message of an error may be longer, whatever it quotes."""
TOP_K: Final = 20
URL: Final = "http://fuzz"


@dataclass(frozen=True, slots=True)
class Parser:
    """One parser under test."""

    name: str
    seeds: tuple[Any, ...]
    parse: Callable[[Any], None]
    """Raises one of `refusals` for what it does not accept; AssertionError where it accepts what it must not."""
    kind: Literal["reply", "tree", "text", "bytes"] = "reply"
    """What it reads: the JSON of a reply, which may also come as bytes; another tree; text; bytes."""
    refusals: tuple[type[Exception], ...] = (MopeError,)
    weight: float = 1.0
    """How often it is chosen."""


def check_distribution(found: TokenDistribution, *, is_cached: bool = False) -> None:
    """What everything behind the adapters relies on; and the cache gives back what it was given.

    Of what was in the cache nobody asks again how probable it is.
    """
    ids = [piece.token_id for piece in found.pieces]
    assert 0 < len(found.pieces) == len(found.logprobs) <= TOP_K
    assert len({piece.key for piece in found.pieces}) == len(found.pieces), "a piece stands twice"
    assert all(type(value) is float and math.isfinite(value) and value <= 0.0 for value in found.logprobs)
    assert list(found.logprobs) == sorted(found.logprobs, reverse=True), "not sorted"
    total = math.fsum(map(math.exp, found.logprobs))
    assert is_cached or total <= 1.0 + MASS_SLACK, "more probability than there is"
    largest = 2**63 - 1 if is_cached else MAX_TOKEN_ID
    assert all(one is None or (type(one) is int and -1 <= one <= largest) for one in ids)
    longest = max(len(piece.data) for piece in found.pieces)
    assert is_cached or longest <= MAX_PIECE_BYTES, "a piece that is no token"
    assert 0.0 <= found.tail_mass <= 1.0
    assert found.floor <= 0.0
    assert decode_distribution(encode_distribution(found)) == found


def check_reply(reply: Reply, *, num_ids: int | None = None) -> None:
    """All that is made of a reply: a distribution, the lists of a scored draft, the steps of a draft of our own."""
    for whole_characters in (False, True):
        positions = certain_positions(reply, whole_characters=True) if whole_characters else reply.positions
        found = _unless_refused(
            build_from_reply,
            reply,
            num_ids=num_ids,
            top_k=TOP_K,
            vocab_size=1280,
            expert="e",
            whole_characters=whole_characters,
        )
        if found is not None:
            check_distribution(found)
        for temperature in (0.0, 0.5, 1.0):
            steps = _unless_refused(
                build_steps,
                positions,
                num_asked=TOP_K,
                top_k=TOP_K,
                temperature=temperature,
                vocab_size=None,
                expert="e",
            )
            for step in steps or ():
                _check_step(step, is_greedy=temperature == 0.0)
    for position in reply.positions[:1]:
        undrawn_entries(position, TOP_K)


def _check_step(step: DraftStep, *, is_greedy: bool) -> None:
    check_distribution(step.distribution)
    assert step.index is None or step.distribution.pieces[step.index].key == step.piece.key
    assert len(step.log_q) == len(step.distribution.pieces)
    assert not any(map(math.isnan, step.log_q))
    if not is_greedy or step.index is not None:
        assert math.isclose(math.fsum(map(math.exp, step.log_q)), 1.0, abs_tol=1e-6)


def _unless_refused(build: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return build(*arguments, **options)
    except MopeError as error:
        check_message(error)
        return None


def check_message(error: Exception) -> None:
    """An error is for people: short, and nothing in it that a terminal would obey."""
    text = str(error) + str(getattr(error, "hint", None) or "")
    assert len(text) <= MAX_MESSAGE, f"a message of {len(text)} characters"
    assert "\x1b" not in text, "a message holds an escape sequence"


class _Client:
    """A client whose replies are given; what is not given is refused, as an endpoint does it."""

    num_requests = 0
    is_down = False

    def __init__(self, replies: Any) -> None:
        self._replies = replies

    async def get_json(self, path: str) -> Any:
        """The reply of this path."""
        if not isinstance(self._replies, dict) or path not in self._replies:
            raise MopeError(f"{path} is not served")
        return self._replies[path]

    async def post_json(self, path: str, body: Mapping[str, Any], *, num_entries: int = 0) -> Any:
        """The same; what ends an answer has other ids when it is read as a control token."""
        is_end = body.get("parse_special") and body.get("content") in END_TOKENS
        return await self.get_json(f"{path} of an end" if is_end else path)

    async def __aenter__(self) -> _Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing to close."""


class ReplyParsers:
    """The parsers of all that endpoints answer."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._readers = (PieceReader(tokenizer), PieceReader(None, end_ids=(0,)))
        self._endpoint = Endpoint("fuzz", "e", 1.0, 1.0, 0, meter=Account().meter("e"))
        self._loop = asyncio.new_event_loop()

    def close(self) -> None:
        """End the event loop."""
        self._loop.close()

    def decode(self, body: bytes) -> Any:
        """The JSON of a good reply, as every adapter gets it."""
        return self._endpoint.decode(body, URL)

    def all(self) -> list[Parser]:
        """Every one of them."""
        vllm = seeds.recorded_like("vllm_completion*")
        chats = (*seeds.recorded_like("vllm_chat*"), seeds.CHAT_MISTRAL, seeds.CHAT_LEGACY, seeds.CHAT_REFUSED)
        draws = (seeds.DRAWN, *seeds.recorded_like("transformers_serve_draw*"), *vllm[:2])
        lists = seeds.recorded("normal", "with_end", "end_sampled", "half_character", "scored", "draft", "draft_half")
        sglangs = (seeds.SGLANG, seeds.SGLANG_ABORTED, [seeds.SGLANG])
        models = (
            *seeds.recorded("vllm_models", "transformers_serve_models"),
            {"model_path": "m", "tokenizer_path": "t"},
        )
        gemini_bodies = (seeds.GEMINI, seeds.GEMINI_BLOCKED, seeds.GEMINI_ENDED)
        return [
            Parser("completions", vllm, self._completions),
            Parser("completions list", seeds.recorded("vllm_completion_list", "vllm_completion_three"), self._list),
            Parser("completions draw", draws, self._completions_draw),
            Parser("chat", chats, self._chat),
            Parser("chat draw", (*draws, seeds.CHAT_MISTRAL), self._chat_draw),
            Parser("llamacpp", lists, self._llamacpp),
            Parser("llamacpp list", ([{**one, "index": n} for n, one in enumerate(lists[:2])],), self._llamacpp_list),
            Parser("llamacpp draft", lists, self._llamacpp_draft),
            Parser("llamacpp routes", ({**seeds.LLAMACPP_ROUTES, "/completion": lists[0]},), self._llamacpp_routes),
            Parser("sglang", sglangs, self._sglang),
            Parser("sglang scores", (seeds.SGLANG_SCORED,), self._sglang_scores),
            Parser("vllm-generate", seeds.recorded_like("vllm_generate*"), self._vllm_generate),
            Parser("ollama", (seeds.OLLAMA, seeds.OLLAMA_ENDED), self._ollama),
            Parser("tgi", (seeds.TGI,), self._tgi),
            Parser("gemini", gemini_bodies, self._gemini),
            Parser("models", models, self._models),
            Parser("discover", seeds.DISCOVERED, self._discover),
            Parser("errors", seeds.ERRORS, self._errors),
            Parser("error bodies", tuple(map(orjson.dumps, seeds.ERRORS)), self._error_body, kind="bytes"),
            Parser("retry-after", seeds.RETRY_AFTER, self._retry_after, kind="text"),
            Parser("rewards", tuple(seeds.REWARDS.values()), self._rewards),
            Parser("judge replies", (*draws[:1], *chats[:2]), self._judge_reply),
            Parser("judge", seeds.JUDGED, self._judge, kind="text"),
            Parser("pcm folder", (seeds.PCM_DOCUMENT,), lambda tree: _discard(parse_document(_as_text(tree))), "tree"),
        ]

    def _completions(self, data: Any) -> None:
        for reader in self._readers:
            self._check_all(completions.parse_response(data, reader, 1, expert="e"), num_ids=12)

    def _list(self, data: Any) -> None:
        self._check_all(completions.parse_response(data, self._readers[0], 3, expert="e", num_tokens=36))

    def _check_all(self, replies: Sequence[Reply | MopeError], num_ids: int | None = None) -> None:
        for reply in replies:
            if isinstance(reply, MopeError):
                check_message(reply)
            else:
                check_reply(reply, num_ids=num_ids)

    def _check_draw(self, reply: Reply) -> None:
        for tokenizer in (self._tokenizer, None):
            piece = _unless_refused(piece_of_draw, reply, tokenizer, expert="e")
            if piece is not None:
                assert type(piece.token_id) in (int, type(None))
                assert piece == END or piece.token_id is None or 0 <= piece.token_id <= MAX_TOKEN_ID
                assert tokenizer is None or piece.token_id is not None

    def _completions_draw(self, data: Any) -> None:
        self._check_draw(completions.parse_draw(data, num_tokens=2, expert="e"))

    def _chat(self, data: Any) -> None:
        for reader in self._readers:
            check_reply(chat.parse_response(data, reader, expert="e", answer="a"))

    def _chat_draw(self, data: Any) -> None:
        self._check_draw(chat.parse_draw(data, dialect=CHAT["vllm-chat"], num_tokens=1, expert="e", answer="a"))

    def _llamacpp(self, data: Any) -> None:
        for reader in self._readers:
            check_reply(llamacpp_wire.parse_reply(data, reader, num_ids=12, expert="e"), num_ids=12)

    def _llamacpp_list(self, data: Any) -> None:
        for one in llamacpp_wire.split_response(data, 2, expert="e"):
            check_reply(llamacpp_wire.parse_reply(one, self._readers[1], num_ids=12, expert="e"))

    def _llamacpp_draft(self, data: Any) -> None:
        for reader in self._readers:
            check_reply(llamacpp_wire.parse_draft(data, reader, num_ids=12, expert="e"))

    def _llamacpp_routes(self, data: Any) -> None:
        client: Any = _Client(data)
        expert = llamacpp.LlamaCppExpert(
            "e", client, capabilities=llamacpp.CAPABILITIES, identity=("llamacpp", "m"), max_prompts=1
        )
        context = Context((Message("user", "Hi"),), (Piece(b"a", 5),))

        async def ask() -> None:
            await expert.fingerprint()
            await expert.served_models()
            reply = await expert.observe(context, Ask(TOP_K))
            size = await expert.vocab_size()
            assert size is None or size > 0
            assert all(type(one) is int and 0 <= one <= MAX_TOKEN_ID for one in await expert.ids_of(context))
            check_reply(reply)

        self._loop.run_until_complete(ask())

    def _sglang(self, data: Any) -> None:
        self._check_all(sglang.parse_response(data, self._readers[0], 1, expert="e"))

    def _sglang_scores(self, data: Any) -> None:
        check_reply(sglang.parse_scores(data, (99, 7), self._readers[0], expert="e"))

    def _vllm_generate(self, data: Any) -> None:
        check_reply(vllm_generate.parse_reply(data, self._readers[0], expert="e"))

    def _ollama(self, data: Any) -> None:
        _unless_refused(lambda: self._check_draw(ollama.parse_draw(data, expert="e")))
        check_reply(ollama.parse_reply(data, self._readers[0], expert="e"))

    def _tgi(self, data: Any) -> None:
        _unless_refused(lambda: self._check_draw(tgi.parse_draw(data, expert="e")))
        check_reply(tgi.parse_reply(data, self._readers[0], expert="e"))

    def _gemini(self, data: Any) -> None:
        check_reply(gemini.parse_reply(data, self._readers[1], expert="e"))

    def _models(self, data: Any) -> None:
        _unless_refused(lambda: sglang.find_adapter(data, "base", expert="e"))
        path = _unless_refused(lambda: sglang.find_tokenizer_path(data, expert="e"))
        assert path is None or isinstance(path, str)
        found = completions.parse_models(data, expert="e")
        assert all(type(one.name) is str for one in found)
        assert all(one.root is None or isinstance(one.root, str) for one in found)
        assert all(one.max_length is None or type(one.max_length) is int for one in found)
        completions.choose_model(found, "base", expert="e")

    def _discover(self, data: Any) -> None:
        with patch.object(discover, "HttpClient", lambda *_, **__: _Client(data)):
            found = self._loop.run_until_complete(discover.discover(URL))
        assert all(type(name) is str for name in found.models)

    def _errors(self, data: Any) -> None:
        self._error_body(_as_text(data).encode("utf-8", "surrogatepass"))

    def _error_body(self, body: bytes) -> None:
        for status in (400, 429, 500):
            check_message(self._endpoint.status_error(status, {}, body, URL))
        raise self._endpoint.status_error(404, {}, body, URL)

    def _retry_after(self, value: str) -> None:
        for header in ("retry-after", "retry-after-ms"):
            error = self._endpoint.status_error(429, {header: value}, b"{}", URL)
            assert error.retry_after_s is None or 0.0 <= error.retry_after_s < math.inf
        raise error

    def _rewards(self, data: Any) -> None:
        for parse in (remote.parse_vllm_pooling, remote.parse_sglang, remote.parse_tei, remote.parse_vllm_classify):
            score = _unless_refused(lambda read: checked_score(read(data), "d"), parse)
            assert score is None or isinstance(score, MopeError) or (type(score) is float and math.isfinite(score))
        remote.parse_vllm_classify(data)

    def _judge_reply(self, data: Any) -> None:
        assert isinstance(judge.parse_content(data), str)

    def _judge(self, text: str) -> None:
        verdict = _unless_refused(lambda: judge.parse_verdict(text))
        assert verdict in (None, 0.0, 0.5, 1.0)
        assert 1.0 <= judge.parse_grade(text) <= judge.MAX_GRADE


def _discard(value: object) -> None:
    """For what has nothing to check but that it comes."""


def _as_text(tree: Any) -> str:
    """JSON as others may write it: also with NaN and huge numbers, which a strict writer refuses."""
    try:
        return json.dumps(tree)
    except RecursionError:
        return "[" * 5000
