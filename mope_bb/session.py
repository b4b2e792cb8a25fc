"""The library's face: a `Session` opened from a configuration answers questions with merged experts.

    async with open_session("mope.toml") as session:
        async for token in session.stream("How do I fix a bike?", preference="concise,friendly"):
            print(token.text, end="")

One session serves any number of tasks at once. `open_session_sync` is the same for code without an event loop of its
own, and may be used while one is running.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import Any, TypeVar

from mope_bb.cache import DistributionCache, open_cache
from mope_bb.config import Config, PcmConfig, load_config
from mope_bb.conversations import Conversation, parse_conversation
from mope_bb.errors import ConfigError, PreferenceError, ProviderError
from mope_bb.inference import choose_device
from mope_bb.pcm.decode import decode
from mope_bb.pcm.grammar import build_constraint
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.model import PreferenceControlModel, load_pcm
from mope_bb.pcm.opening import drop_failed, open_experts
from mope_bb.pcm.pacing import Pace
from mope_bb.pcm.plans import build_plan, configured_rule
from mope_bb.pcm.runner import PcmScorer, Scorer, UserWeights
from mope_bb.pcm.sampling import check_sampling
from mope_bb.preferences import Preference, PreferenceLike
from mope_bb.providers.pool import ExpertPool
from mope_bb.streams import AnswerStream, Opened
from mope_bb.tools import Form, parse_form, told_messages
from mope_bb.types import Answer, Context, Message, SamplingOptions, Token
from mope_bb.usage import Account

T = TypeVar("T")
END_WITHIN_S = 5.0
LEAST_TEMPERATURE = 1e-6
"""What is colder is greedy: numbers would overflow."""


@dataclass(frozen=True, slots=True)
class _Question:
    """What an answer is begun with."""

    messages: tuple[Message, ...]
    begun: bytes
    """How the answer begins."""
    options: SamplingOptions
    form: Form


class Session:
    """Experts and PCM, open. Made by `open_session`."""

    def __init__(self, config: Config, *, cache: DistributionCache | None) -> None:
        self.config = config
        self.roster = config.roster()
        self.account = Account.of(config)
        """What was asked of endpoints so far, and what it cost."""
        self._pool = ExpertPool(config.experts, cache=cache, account=self.account)
        self._pace = Pace(config.decoding)
        self._cache = cache
        self._pcm = _open_pcm(config.pcm)
        self._scorer: Scorer | None = None if self._pcm is not None else UserWeights()
        self._scorer_lock = asyncio.Lock()

    def stream(
        self,
        conversation: Conversation,
        *,
        preference: PreferenceLike = None,
        merge: str | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = False,
        response_format: Mapping[str, Any] | None = None,
        answer_so_far: str = "",
    ) -> AnswerStream:
        """Answer `conversation` (a question, or messages in OpenAI's shape), token by token.

        `preference` is what `preferences.parse_preference` reads, weights by name, or None for every dimension alike.
        `tools`, `tool_choice` and `response_format` are OpenAI's: a call fits its tool's schema, JSON the one that is
        given, whatever the experts know of it. With `parallel_tool_calls` an answer may hold several calls.
        `answer_so_far` is how the answer begins; it does not come again.
        Raises ConfigError at once for bad arguments; ProviderError and others while streaming.
        """
        form = parse_form(tools, tool_choice, response_format, parallel_tool_calls=parallel_tool_calls)
        messages = told_messages(parse_conversation(conversation), form, style=self.config.decoding.tool_messages)
        options = _options(temperature, top_p, max_tokens, stop, seed)
        return self._stream(_Question(messages, _encoded(answer_so_far), options, form), preference, merge)

    def stream_text(
        self,
        text: str,
        *,
        preference: PreferenceLike = None,
        merge: str | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
    ) -> AnswerStream:
        """Continue `text` as it is, without chat templates and system prompts; see `stream`.

        Experts whose endpoints take messages only refuse it with a RequestError.
        """
        if not text:
            raise ConfigError("the text to continue is empty")
        options = _options(temperature, top_p, max_tokens, stop, seed)
        return self._stream(_Question((), _encoded(text), options, Form()), preference, merge)

    def _stream(self, question: _Question, preference: PreferenceLike, merge: str | None) -> AnswerStream:
        seed = question.options.seed
        seed = random.SystemRandom().getrandbits(32) if seed is None else seed
        return AnswerStream(
            partial(self._open_answer, question, seed),
            options=question.options,
            seed=seed,
            plan=self.plan(preference, merge=merge),
            make_plan=partial(self.plan, merge=merge),
            form=question.form,
        )

    async def complete(self, conversation: Conversation, **options: Any) -> Answer:
        """The whole answer; arguments as for `stream`."""
        stream = self.stream(conversation, **options)
        async for _ in stream:
            pass
        return stream.answer

    def plan(self, preference: PreferenceLike = None, *, merge: str | None = None) -> Plan:
        """Who would be asked for `preference`, and with which weights. Raises ConfigError."""
        pcm = self._pcm
        rule = configured_rule(self.config, merge, trained=None if pcm is None else pcm.rule)
        reads_text = pcm is not None and pcm.is_trained
        return build_plan(self.config, self._parse(preference), rule, reads_text=reads_text)

    def _parse(self, preference: PreferenceLike) -> Preference:
        if isinstance(preference, Preference):
            return preference
        if isinstance(preference, str):
            return self.roster.parse(preference)
        if isinstance(preference, Mapping):
            return Preference.of(preference)
        if preference is not None:
            raise PreferenceError(f"a preference is text or weights by name, got {type(preference).__name__}")
        served = [dimension for dimension in self.roster.dimension_of.values() if dimension is not None]
        if not served:
            raise PreferenceError("no preference was given, and no expert has a dimension", hint="Name experts.")
        return Preference.of(dict.fromkeys(served, 1.0))

    async def _open_answer(self, question: _Question, seed: int, plan: Plan) -> Opened:
        drops_failed = self.config.decoding.on_expert_failure == "drop"
        # A grammar may take long to read: not on the event loop.
        constraint = await asyncio.to_thread(build_constraint, question.form)
        asked = plan.asked
        plan = await self._open_experts(plan, drops_failed=drops_failed)
        dropped = tuple(name for name in asked if name not in plan.asked)
        begun = await self._pool.spell(plan.asked[0], question.begun) if question.begun else ()
        context = Context(question.messages, begun)
        count = await self._pool.count_tokens(plan.asked, context)
        if count is None:
            texts = [question.begun, *(message.content.encode() for message in question.messages)]
            count = sum(map(len, texts)) // 4
        answer = decode(
            context,
            plan,
            self._pool,
            await self._open_scorer(),
            question.options,
            seed=seed,
            pace=self._pace,
            # Who gives a seed wants the answer that belongs to it.
            is_repeatable=question.options.seed is not None,
            drops_failed=drops_failed,
            constraint=constraint,
        )
        return Opened(answer, count, dropped)

    async def _open_experts(self, plan: Plan, *, drops_failed: bool) -> Plan:
        """The plan with those of its experts that could be opened."""
        while True:
            try:
                await open_experts(self._pool, plan, waits=not drops_failed)
            except ProviderError as error:
                plan = drop_failed(plan, error, is_allowed=drops_failed)
            else:
                return plan

    async def _open_scorer(self) -> Scorer:
        """The PCM's runner is built when the experts' tokenizer is known."""
        async with self._scorer_lock:
            if self._scorer is None:
                assert self._pcm is not None
                fingerprint = self._pool.tokenizer_fingerprint
                self._scorer = await asyncio.to_thread(PcmScorer, self._pcm, expert_fingerprint=fingerprint)
            return self._scorer

    @property
    def cache_hits(self) -> int:
        """Questions that the cache has answered so far."""
        return 0 if self._cache is None else self._cache.num_hits

    async def aclose(self) -> None:
        """Close connections, models and the cache."""
        await self._pool.aclose()
        if self._scorer is not None:
            await self._scorer.aclose()
        if self._cache is not None:
            self._cache.close()


@asynccontextmanager
async def open_session(config: Config | str | PathLike[str]) -> AsyncIterator[Session]:
    """Open the session that `config` (or the `mope.toml` at that path) describes. Raises ConfigError."""
    session = await asyncio.to_thread(build_session, config)
    try:
        yield session
    finally:
        await session.aclose()


def build_session(config: Config | str | PathLike[str]) -> Session:
    """What `open_session` opens; the caller closes it. Loads the PCM, contacts no expert."""
    loaded = config if isinstance(config, Config) else load_config(config)
    return Session(loaded, cache=open_cache(loaded.cache))


class SyncSession:
    """A `Session` on an event loop of its own thread. Made by `open_session_sync`."""

    def __init__(self, session: Session, call: Callable[[Awaitable[Any]], Any], is_closed: Callable[[], bool]) -> None:
        self.session = session
        self._call = call
        self._is_closed = is_closed

    def complete(self, conversation: Conversation, **options: Any) -> Answer:
        """See `Session.complete`."""
        answer: Answer = self._call(self.session.complete(conversation, **options))
        return answer

    def stream(self, conversation: Conversation, **options: Any) -> Iterator[Token]:
        """See `Session.stream`; leaving the loop early ends the answer."""
        stream = self.session.stream(conversation, **options)
        tokens = aiter(stream)
        try:
            while True:
                try:
                    yield self._call(anext(tokens))
                except StopAsyncIteration:
                    return
        finally:
            if not self._is_closed():
                self._call(stream.aclose())


@contextmanager
def open_session_sync(config: Config | str | PathLike[str]) -> Iterator[SyncSession]:
    """`open_session` for code that does not await; also inside a running event loop, which it blocks meanwhile."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="mope-bb-session", daemon=True)
    thread.start()

    def call(awaitable: Awaitable[T]) -> T:
        ended = threading.Event()

        async def awaited() -> T:
            try:
                return await awaitable
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(awaited(), loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C reaches this thread, not the loop's: let the call unwind there before anything else is asked.
            future.cancel()
            ended.wait(END_WITHIN_S)
            raise

    try:
        session = build_session(config)
        try:
            yield SyncSession(session, call, loop.is_closed)
        finally:
            call(loop.shutdown_asyncgens())
            call(session.aclose())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _options(
    temperature: float, top_p: float, max_tokens: int, stop: str | Sequence[str], seed: int | None
) -> SamplingOptions:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    options = SamplingOptions(temperature, top_p, max_tokens, stops, seed)
    check_sampling(options)
    return options if temperature >= LEAST_TEMPERATURE else replace(options, temperature=0.0)


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ConfigError("the text to continue holds half of a surrogate pair, which is no text") from None


def _open_pcm(config: PcmConfig) -> PreferenceControlModel | None:
    return None if config.path is None else load_pcm(config.path, device=choose_device(config.device))
