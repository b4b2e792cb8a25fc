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
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from os import PathLike
from typing import Any, TypeVar

from mope_bb.cache import DistributionCache, open_cache
from mope_bb.config import Config, PcmConfig, load_config
from mope_bb.errors import ConfigError, ContextLengthError, PreferenceError, ProviderError
from mope_bb.inference import choose_device
from mope_bb.pcm.decode import OpenAnswer, decode, drop_failed, open_experts
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.model import PreferenceControlModel, load_pcm
from mope_bb.pcm.pacing import Pace
from mope_bb.pcm.plans import build_plan, configured_rule
from mope_bb.pcm.runner import PcmScorer, Scorer, UserWeights
from mope_bb.pcm.sampling import check_sampling
from mope_bb.preferences import Preference
from mope_bb.providers.pool import ExpertPool
from mope_bb.text import TextAssembler
from mope_bb.types import Answer, Context, Effort, FinishReason, Message, SamplingOptions, Token, TokenStep
from mope_bb.usage import Account

T = TypeVar("T")
Conversation = str | Sequence[Message | Mapping[str, Any]]
PreferenceLike = str | Preference | Mapping[str, float] | None
END_WITHIN_S = 5.0
ROLES = ("system", "user", "assistant", "tool")


class AnswerStream:
    """Tokens as they are drawn: `async for token in stream`; afterwards `stream.answer` is the whole.

    Leaving the loop early, or cancelling the task, cancels the requests that are under way.
    """

    def __init__(
        self, open_answer: Callable[[], Awaitable[OpenAnswer]], *, options: SamplingOptions, seed: int, plan: Plan
    ) -> None:
        self._open_answer = open_answer
        self._opened: OpenAnswer | None = None
        self._seed = seed
        self._plan = plan
        self._steps: list[TokenStep] = []
        self._texts: list[str] = []
        self._finish_reason: FinishReason | None = None
        self._tokens = self._run(options)

    def __aiter__(self) -> AsyncIterator[Token]:
        return self._tokens

    @property
    def plan(self) -> Plan:
        """Who is asked, with which weights."""
        return self._plan

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    @property
    def answer(self) -> Answer:
        """The answer as far as it came; `finish_reason` is "length" for one that was left early."""
        opened, asked = self._opened, self._plan.asked
        return Answer(
            self.text,
            tuple(self._steps),
            self._finish_reason or "length",
            None if opened is not None and opened.uses_drafts else self._seed,
            self._plan.rule.name,
            Effort() if opened is None else opened.effort,
            () if opened is None else tuple(name for name in asked if name not in opened.plan.asked),
        )

    async def aclose(self) -> None:
        """End the answer here."""
        await self._tokens.aclose()

    async def _run(self, options: SamplingOptions) -> AsyncGenerator[Token, None]:
        assembler = TextAssembler(options.stop)
        self._opened = await self._open_answer()
        steps = aiter(self._opened)
        try:
            async for step in steps:
                self._steps.append(step)
                text = assembler.feed(step.piece)
                reason: FinishReason | None = None
                if assembler.is_stopped or len(self._steps) == options.max_tokens:
                    reason = "stop" if assembler.is_stopped else "length"
                    # What was held back as a possible stop string is text after all.
                    text += assembler.flush()
                yield self._told(Token(text, step, reason))
                if reason is not None:
                    return
        except ContextLengthError:
            # If the prompt did fit, the answer has grown to the end of an expert's context.
            if not self._steps:
                raise
            yield self._told(Token(assembler.flush(), self._steps[-1], "length"))
        finally:
            await steps.aclose()

    def _told(self, token: Token) -> Token:
        self._texts.append(token.text)
        self._finish_reason = token.finish_reason
        return token


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
    ) -> AnswerStream:
        """Answer `conversation` (a question, or messages in OpenAI's shape), token by token.

        `preference` is what `preferences.parse_preference` reads, weights by name, or None for every dimension alike.
        Raises ConfigError at once for bad arguments; ProviderError and others while streaming.
        """
        options = SamplingOptions(
            temperature, top_p, max_tokens, (stop,) if isinstance(stop, str) else tuple(stop), seed
        )
        check_sampling(options)
        context = Context(parse_conversation(conversation))
        plan = self.plan(preference, merge=merge)
        drawn_seed = random.SystemRandom().getrandbits(32) if seed is None else seed
        return AnswerStream(
            lambda: self._open_answer(context, plan, options, drawn_seed), options=options, seed=drawn_seed, plan=plan
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

    async def _open_answer(self, context: Context, plan: Plan, options: SamplingOptions, seed: int) -> OpenAnswer:
        drops_failed = self.config.decoding.on_expert_failure == "drop"
        plan = await self._open_experts(plan, drops_failed=drops_failed)
        return decode(
            context,
            plan,
            self._pool,
            await self._open_scorer(),
            options,
            seed=seed,
            pace=self._pace,
            # Who gives a seed wants the answer that belongs to it.
            is_repeatable=options.seed is not None,
            drops_failed=drops_failed,
        )

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


def parse_conversation(conversation: Conversation) -> tuple[Message, ...]:
    """A question, or messages, as messages. Raises ConfigError for an empty or malformed one."""
    if isinstance(conversation, str):
        conversation = [Message("user", conversation)]
    if isinstance(conversation, Mapping) or not isinstance(conversation, Sequence):
        raise ConfigError(
            f"a conversation is text or a list of messages, got {type(conversation).__name__}",
            hint='Pass "How ...?", or [{"role": "user", "content": "How ...?"}].',
        )
    messages = tuple(_parse_message(message) for message in conversation)
    if not messages:
        raise ConfigError("the conversation is empty", hint="Ask something.")
    last = messages[-1]
    if last.role == "user" and not last.content.strip():
        raise ConfigError("the prompt is empty", hint="Ask something.")
    return messages


def _parse_message(message: object) -> Message:
    if isinstance(message, Message):
        parsed = message
    elif not isinstance(message, Mapping):
        raise ConfigError(f"a message is {type(message).__name__}, expected a dictionary with role and content")
    else:
        call = message.get("tool_call_id")
        parsed = Message(
            _text(message, "role"),
            _text(message, "content") if message.get("content") else "",
            (),
            None if call is None else _text(message, "tool_call_id"),
        )
    if parsed.role not in ROLES:
        raise ConfigError(f"a message has the role {parsed.role!r}", hint=f"Known: {', '.join(ROLES)}.")
    try:
        f"{parsed.content}{parsed.tool_call_id}".encode()
    except UnicodeEncodeError:
        raise ConfigError("a message holds half of a surrogate pair, which is no text") from None
    return parsed


def _text(message: Mapping[Any, Any], name: str) -> str:
    value = message.get(name)
    if not isinstance(value, str):
        raise ConfigError(f"the {name} of a message is {type(value).__name__}, expected text")
    return value


def _open_pcm(config: PcmConfig) -> PreferenceControlModel | None:
    return None if config.path is None else load_pcm(config.path, device=choose_device(config.device))
