"""What a live endpoint really does, found out by asking it: the cells of `mope-bb doctor`.

Every check works through the adapter that would be used, on what the wire said before anything was repaired. None
relies on what a model knows: an endpoint is compared with itself. A continued answer, for one, must be continued as the
endpoint continued it when it drew the same tokens itself.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final

from mope_bb.config import ExpertConfig
from mope_bb.errors import (
    AlignmentError,
    AuthenticationError,
    ConfigError,
    LogprobsUnavailableError,
    MopeError,
    ProviderError,
    TopKError,
)
from mope_bb.providers.base import Expert, IdExpert
from mope_bb.providers.comparing import (
    agree,
    best_piece,
    by_value,
    descends,
    first_position,
    length,
    same_course,
    slope,
)
from mope_bb.providers.connect import connection_warnings
from mope_bb.providers.endpoint import Ask, WireExpert, build_from_reply
from mope_bb.providers.findings import DRAFTS, NOT_NEEDED, SCORING, ExpertReport, Verdict
from mope_bb.providers.pool import allowed_top_k
from mope_bb.providers.probe_ahead import drafts_as_asked, scores_as_asked
from mope_bb.providers.probe_draws import DrawProbe
from mope_bb.providers.registry import open_expert
from mope_bb.providers.wire import Entry, Reply, is_whole_text
from mope_bb.types import END, Context, Message, Piece

QUESTIONS: Final = ("How do I fix a bike?", "What is a good name for a cat?", "Tell me about the moon.")
WALK: Final = 128
"""Tokens within which an answer is expected to end."""
NUM_DRAWS: Final = 4
"""How often chance is tried until it has shown what there is to see."""
TOGETHER: Final = 24
"""Tokens that the models of one server draw at the same time."""
NUM_TIMED: Final = 5


async def probe_experts(
    configs: Sequence[ExpertConfig], progress: Callable[[str], None] = lambda _: None
) -> list[ExpertReport]:
    """Ask every expert at every address, one after the other, and compare their tokenizers.

    Raises nothing that an endpoint caused.
    """
    reports = []
    configs = [replica for config in configs for replica in _replicas_by_name(config)]
    for config in configs:
        progress(config.name)
        reports.append(await probe_expert(config))
    await _probe_together(configs, reports)
    known = [report for report in reports if report.fingerprint is not None]
    for report in known:
        others = [other.name for other in known if other.fingerprint != report.fingerprint]
        if others:
            report.add(
                "tokenizer",
                "error",
                f"not that of {others[0]}",
                f"{report.name} and {', '.join(others)} have different tokenizers and cannot be merged. Use experts "
                "fine-tuned from one base model; where endpoints take text, set the same `tokenizer` for all.",
            )
        elif len(known) > 1:
            report.add("tokenizer", "ok", "the same")
    return reports


def _replicas_by_name(config: ExpertConfig) -> list[ExpertConfig]:
    replicas = config.replicas()
    if len(replicas) == 1:
        return list(replicas)
    return [one.model_copy(update={"name": f"{one.name} at {one.base_url}"}) for one in replicas]


async def _probe_together(configs: Sequence[ExpertConfig], reports: Sequence[ExpertReport]) -> None:
    """Does one server keep its models apart when they are asked at the same time? Not all do (vllm#48421)."""
    by_address: dict[str, list[tuple[ExpertConfig, ExpertReport]]] = {}
    for config, report in zip(configs, reports, strict=True):
        if config.addresses and report.can_run and config.logprobs:
            by_address.setdefault(config.addresses[0].rstrip("/"), []).append((config, report))
    for group in by_address.values():
        if len({config.model for config, _ in group}) > 1:
            await _compare_together(group)


async def _compare_together(group: Sequence[tuple[ExpertConfig, ExpertReport]]) -> None:
    experts = [await asyncio.to_thread(open_expert, config, None) for config, _ in group]
    context = Context((Message("user", QUESTIONS[0]),))
    asks = [
        Ask(allowed_top_k(config, one.capabilities), TOGETHER, 0.0)
        for (config, _), one in zip(group, experts, strict=True)
    ]
    try:
        wired = [one for one in experts if isinstance(one, WireExpert)]
        alone = [await one.observe(context, ask) for one, ask in zip(wired, asks, strict=True)]
        together = await asyncio.gather(*(one.observe(context, ask) for one, ask in zip(wired, asks, strict=True)))
    except MopeError as error:
        for _, report in group:
            report.add("together", "error", type(error).__name__, error.in_words)
        return
    finally:
        for one in experts:
            await one.aclose()
    for (config, report), first, second in zip(group, alone, together, strict=True):
        if same_course(first, second):
            report.add("together", "ok", "kept apart")
        else:
            report.add(
                "together",
                "error",
                "mixed up",
                f"Asked at the same time as the other models of this server, {config.model!r} gives other lists than "
                "alone. vLLM on CPU does so with a base beside its adapters: start it with --max-loras one above their "
                "number, or serve the base from a server of its own.",
            )


async def probe_expert(config: ExpertConfig) -> ExpertReport:
    """Ask one expert."""
    report = ExpertReport(config.name, config.provider)
    warnings = connection_warnings(config)
    report.add("connection", "warning" if warnings else "ok", "see below" if warnings else "ok", " ".join(warnings))
    try:
        expert = await asyncio.to_thread(open_expert, config, None)
    except MopeError as error:
        report.add("reachable", "error", "not set up", error.in_words)
        return report
    try:
        top_k = allowed_top_k(config, expert.capabilities)
        if isinstance(expert, WireExpert):
            await _Probe(expert, config, top_k, report).run()
        else:
            await _probe_here(expert, top_k, report)
    except MopeError as error:
        report.add("reachable", "error", "not set up", error.in_words)
    finally:
        await expert.aclose()
    return report


async def _probe_here(expert: Expert, top_k: int, report: ExpertReport) -> None:
    """A model in this process has no wire that could be wrong."""
    report.fingerprint = await expert.fingerprint()
    started = time.perf_counter()
    found = await expert.next_tokens(Context((Message("user", QUESTIONS[0]),)), top_k=top_k)
    report.add("reachable", "ok", "in this process")
    report.add("top-k", "ok", f"{len(found.pieces)} of {top_k}")
    report.add("latency", "ok", f"{1000 * (time.perf_counter() - started):.0f} ms")
    report.add("tokenizer", "ok", "known")


class _Probe:
    """The checks of one endpoint."""

    def __init__(self, expert: WireExpert, config: ExpertConfig, top_k: int, report: ExpertReport) -> None:
        self._expert = expert
        self._config = config
        self._top_k = top_k
        self._report = report
        self._walked: Reply | None = None

    async def run(self) -> None:
        """All checks; what fails costs only its own cell, unless nothing can be asked at all."""
        if not await self._is_reachable():
            return
        checks: Sequence[tuple[str, Callable[[], Awaitable[None]]]] = (
            ("model", self._model),
            ("tokenizer", self._tokenizer),
            *(
                (("logprobs", self._logprobs),)
                if self._expert.capabilities.gives_lists
                else DrawProbe(self._expert, self._questions(), self._report).checks()
            ),
        )
        for check, look in checks:
            await self._guarded(check, look)
        if not self._expert.capabilities.gives_lists:
            return
        if self._report.findings["logprobs"].verdict == "error":
            # Where numbers are given at all, their scale may be the reason.
            with suppress(MopeError):
                await self._scale()
            return
        for check, look in (
            ("top-k", self._list_length),
            ("order", self._order),
            ("token ids", self._ids),
            ("bytes", self._bytes),
            ("prefill", self._prefill),
            ("trailing space", self._trailing_space),
            ("end of answer", self._end),
            ("scale", self._scale),
            ("drafts", self._drafts),
            ("scoring", self._scoring),
            ("latency", self._latency),
        ):
            await self._guarded(check, look)

    async def _guarded(self, check: str, look: Callable[[], Awaitable[None]]) -> None:
        try:
            await look()
        except MopeError as error:
            verdict: Verdict = "warning" if check in NOT_NEEDED else "error"
            self._report.add(check, verdict, type(error).__name__, error.in_words)

    def _add(self, check: str, verdict: Verdict, value: str, advice: str = "") -> None:
        self._report.add(check, verdict, value, advice)

    async def _observe(self, ask: Ask, response: tuple[Piece, ...] = (), question: int = 0) -> Reply:
        return await self._expert.observe(Context((Message("user", QUESTIONS[question]),), response), ask)

    async def _is_reachable(self) -> bool:
        started = time.perf_counter()
        try:
            if self._expert.capabilities.gives_lists:
                await self._observe(Ask(1))
            else:
                await self._expert.draw(self._question())
        except (AuthenticationError, ConfigError) as error:
            self._add("reachable", "error", "not set up", error.in_words)
            return False
        except (ProviderError, AlignmentError) as error:
            # An answer that holds no distribution is an answer; a refusal, or none at all, is not.
            if not isinstance(error, LogprobsUnavailableError | TopKError | AlignmentError):
                self._add("reachable", "error", type(error).__name__, error.in_words)
                return False
        self._add("reachable", "ok", f"{time.perf_counter() - started:.2f} s at first")
        return True

    async def _model(self) -> None:
        served, wanted = await self._expert.served_models(), self._config.model
        if served is None:
            self._add("model", "unknown", "not listed")
        elif wanted is None or wanted in served:
            self._add("model", "ok", wanted or served[0])
        else:
            self._add(
                "model",
                "warning",
                f"{served[0]}, not {wanted}",
                f"The server answers, but serves {', '.join(served)} and no {wanted!r}. Set `model`, or `base_url`.",
            )

    async def _tokenizer(self) -> None:
        self._report.fingerprint = await self._expert.fingerprint()
        self._add("tokenizer", "ok", "known")

    async def _logprobs(self) -> None:
        reply = await self._observe(Ask(min(self._top_k, 5)))
        build_from_reply(reply, num_ids=None, top_k=self._top_k, vocab_size=None, expert=self._expert.name)
        self._add("logprobs", "ok", "given")

    async def _list_length(self) -> None:
        try:
            given = length(first_position(await self._observe(Ask(self._top_k))))
        except TopKError as error:
            self._add("top-k", "error", f"refuses {self._top_k}", error.in_words)
            return
        if given >= self._top_k or given >= (await self._vocab_size() or math.inf):
            self._add("top-k", "ok", f"{self._top_k} of {self._top_k}")
            return
        longer = first_position(await self._observe(Ask(max(1, (given + self._top_k) // 2))))
        if longer.has_ids or length(longer) == given:
            advice = f"It gives {given} pieces where {self._top_k} are asked for. Set top_k = {given}."
            self._add("top-k", "warning", f"{given} of {self._top_k}", advice)
        else:
            advice = "Entries are missing: tokens of equal text fall together in a list that is keyed by text."
            self._add("top-k", "warning", f"{given} of {self._top_k}", advice)

    async def _vocab_size(self) -> int | None:
        return await self._expert.vocab_size()

    async def _walk(self) -> Reply:
        """An answer that the endpoint draws itself, at temperature 1, so that not only best pieces are drawn."""
        for _ in range(NUM_DRAWS):
            if self._walked is None or all(one.drawn == best_piece(one) for one in self._walked.positions):
                self._walked = await self._observe(Ask(self._top_k, num_tokens=WALK, temperature=1.0))
        assert self._walked is not None
        return self._walked

    async def _list_when_drawing(self, temperature: float) -> Sequence[Entry]:
        """The list beside a drawn token; some leave it out where the end or half a character is drawn."""
        for _ in range(NUM_DRAWS):
            reply = await self._observe(Ask(self._top_k, temperature=temperature))
            if reply.positions:
                break
        return first_position(reply).entries

    async def _order(self) -> None:
        lists = [(position, [value for _, value in position.entries]) for position in (await self._walk()).positions]
        telling = [
            (position, values) for position, values in lists if position.drawn not in (None, best_piece(position))
        ]
        if not telling:
            self._add("order", "unknown", "only best pieces drawn")
        elif all(descends(values) for _, values in lists):
            self._add("order", "ok", "descending")
        elif all(position.entries[0][0] == position.drawn and descends(values[1:]) for position, values in telling):
            is_cut = any(length(position) <= self._top_k for position, _ in telling)
            advice = "The drawn token stands first" + (
                " and takes the place of the last piece of the list." if is_cut else ", the list is whole behind it."
            )
            harmless = self._expert.own_temperature == 0
            advice += " Nothing is lost: at temperature 0 the drawn token is the best one." if harmless else ""
            self._add("order", "ok" if harmless else "warning", "drawn token first", advice)
        else:
            self._add("order", "warning", "unsorted", "Lists come unsorted; they are sorted here, so nothing is lost.")

    async def _ids(self) -> None:
        promised = self._expert.capabilities
        reply = await self._observe(Ask(self._top_k))
        has_ids = first_position(reply).has_ids
        if promised.ids_out and not has_ids:
            advice = (
                "Token ids were asked for, and the list is keyed by text: tokens of equal text fall together. Is "
                f"{self._config.provider!r} the software that serves this address, and its version recent?"
            )
            self._add("token ids", "error", "not given", advice)
            return
        if promised.ids_in and isinstance(self._expert, IdExpert):
            sent = len(await self._expert.ids_of(Context((Message("user", QUESTIONS[0]),))))
            if reply.prompt_tokens not in (None, sent):
                advice = f"{sent} token ids were sent, and the endpoint read {reply.prompt_tokens}."
                self._add("token ids", "error", "not read as sent", advice)
                return
        words = [word for word, there in (("in", promised.ids_in), ("out", has_ids)) if there]
        advice = "" if promised.ids_in else "The answer so far is tokenized anew at each step; boundaries may move."
        self._add("token ids", "ok", " and ".join(words) or "none", advice)

    async def _bytes(self) -> None:
        unreadable = sum(position.num_unreadable for position in (await self._walk()).positions)
        if unreadable:
            advice = (
                f'{unreadable} entries named no token ("" or a broken character): their probability counts as unseen.'
            )
            self._add("bytes", "warning", "some lost", advice)
        elif self._expert.capabilities.byte_exact:
            self._add("bytes", "ok", "exact")
        else:
            advice = "Half characters have no text of their own: their probability counts as unseen."
            self._add("bytes", "ok", "whole characters", advice)

    async def _prefill(self) -> None:
        if self._expert.capabilities.prefill == "none":
            advice = (
                f"{self._config.provider} answers from the beginning and continues nothing: it cannot be an expert. "
                "Use it as a judge, or serve the model where an answer can be continued."
            )
            self._add("prefill", "error", "none", advice)
            return
        for question in range(len(QUESTIONS)):
            own = await self._observe(Ask(self._top_k, num_tokens=2), question=question)
            drawn = own.positions[0].drawn if len(own.positions) > 1 else None
            if drawn is None or drawn == END or not is_whole_text(drawn.data):
                continue
            continued = first_position(await self._observe(Ask(self._top_k), (drawn,), question)).entries
            if agree(own.positions[1].entries, continued):
                self._add("prefill", "ok", "honoured")
                return
            ignored = agree(own.positions[0].entries, continued)
            advice = "The answer so far is " + ("ignored." if ignored else "not continued as the endpoint itself does.")
            advice += " Use text completions of this server, or name the `provider` that serves this address."
            self._add("prefill", "error", "ignored" if ignored else "not honoured", advice)
            return
        self._add("prefill", "unknown", "no token to continue", "Its answers end at once, or begin inside a character.")

    async def _trailing_space(self) -> None:
        if self._expert.capabilities.prefill not in ("text", "messages"):
            self._add("trailing space", "ok", "kept (ids)" if self._expert.capabilities.ids_in else "-")
            return
        drawn = first_position(await self._observe(Ask(self._top_k))).drawn
        if drawn is None or drawn == END or not is_whole_text(drawn.data):
            self._add("trailing space", "unknown", "-")
            return
        without = first_position(await self._observe(Ask(self._top_k), (drawn,))).entries
        with_space = first_position(await self._observe(Ask(self._top_k), (drawn, Piece(b" ")))).entries
        if agree(without, with_space):
            advice = "A space at the end of the answer so far is cut off, and what follows it is asked for wrongly."
            self._add("trailing space", "warning", "cut off", advice)
        else:
            self._add("trailing space", "ok", "kept")

    async def _end(self) -> None:
        reply = await self._observe(Ask(self._top_k, num_tokens=WALK))
        replies = (reply, await self._walk())
        if any(piece == END for one in replies for position in one.positions for piece, _ in position.entries):
            self._add("end of answer", "ok", "on the list")
        elif any(one.has_ended for one in replies):
            advice = "The end is seen only where it is the most probable piece, and then counts as certain."
            self._add("end of answer", "warning", "hidden", advice)
        else:
            self._add("end of answer", "unknown", f"none in {WALK} tokens")

    async def _scale(self) -> None:
        at_one, at_half = await self._list_when_drawing(1.0), await self._list_when_drawing(0.5)
        growth = slope(at_one, at_half)
        if growth is None:
            self._add("scale", "unknown", "too few pieces")
            return
        named = "raw" if abs(growth - 1) < 0.1 else "scaled" if abs(growth - 2) < 0.3 else f"unclear ({growth:.2f})"
        try:
            own = first_position(await self._observe(Ask(self._top_k))).entries
            fits = agree(at_one, own) and any(value is not None and -9000 < value < -1e-6 for _, value in own)
        except LogprobsUnavailableError:
            fits = False
        if fits:
            advice = "" if named == "raw" else "Logprobs follow the temperature; the adapter asks where they are raw."
            self._add("scale", "ok", named, advice)
        else:
            advice = (
                f"Logprobs are taken after the temperature, and {self._config.provider!r} sends "
                f"{self._expert.own_temperature:g}: what comes is not the model's own distribution. "
                "Name the `provider` that serves this address; your own server may have a setting for raw logprobs."
            )
            self._add("scale", "error", named, advice)

    async def _drafts(self) -> None:
        kind, ids_in = self._expert.capabilities.drafts, self._expert.capabilities.ids_in
        # A text may be read as other tokens than those that were drawn, so there lists may differ.
        if kind == "none" or not ids_in or await drafts_as_asked(self._expert, self._question(), self._top_k):
            self._add("drafts", "ok", DRAFTS[kind])
        else:
            advice = 'Lists along a draft are not those of single questions: set [decoding] mode = "lockstep".'
            self._add("drafts", "warning", "other lists", advice)

    async def _scoring(self) -> None:
        how = self._expert.capabilities.score
        if how == "none" or await scores_as_asked(self._expert, self._question(), self._top_k):
            self._add("scoring", "ok", SCORING[how])
        else:
            advice = 'A draft is scored with other lists than single questions give: set [decoding] mode = "lockstep".'
            self._add("scoring", "warning", "other lists", advice)

    def _question(self) -> Context:
        return self._questions()[0]

    def _questions(self) -> list[Context]:
        return [Context((Message("user", question),)) for question in QUESTIONS]

    async def _latency(self) -> None:
        grows = self._expert.capabilities.prefill != "none"
        seconds = []
        response: tuple[Piece, ...] = ()
        for _ in range(NUM_TIMED):
            started = time.perf_counter()
            position = first_position(await self._observe(Ask(self._top_k), response))
            seconds.append(time.perf_counter() - started)
            whole = next(
                (p for p, _ in sorted(position.entries, key=by_value) if p != END and is_whole_text(p.data)), None
            )
            if whole is not None and grows:
                response = (*response, whole)
        self._add("latency", "ok", f"{1000 * statistics.median(seconds):.0f} ms a token")
