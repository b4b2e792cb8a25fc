"""What every expert is: a source of next-token distributions over one conversation and the answer so far."""

from __future__ import annotations

import asyncio
import math
import operator
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from mope_bb.cache import DistributionCache, distribution_key
from mope_bb.coalescing import SingleFlight
from mope_bb.errors import AlignmentError, LogprobsUnavailableError, MalformedResponseError
from mope_bb.types import END, Context, DraftStep, Message, Piece, TokenDistribution
from mope_bb.usage import Meter

SENTINEL_LOGPROB: Final = -9990.0
"""At or below this a number means "no value": -9999 (OpenAI, vLLM), -3.4e38 (llama.cpp), -inf."""
LOGPROB_SLACK: Final = 1e-3
"""Some endpoints return coarse numbers slightly above 0; more than this is a malformed reply."""
MASS_SLACK: Final = 0.02
"""Logprobs in half precision are off by 0.4 % of themselves; a list that adds up to more than this above 1 is none."""
PROMPTS_KEPT: Final = 64
LONGEST_LIST: Final = 2048
"""Asked for where an endpoint gives lists of any length."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an endpoint can do; facts, so that nothing ever checks a provider's name."""

    max_top_k: int | None = None
    """The longest list it returns; None = the whole vocabulary, or what the server was started with."""
    prefill: Literal["ids", "text", "messages", "pieces", "none"] = "ids"
    """How a partial answer is continued: by appending token ids, as text after the rendered template, as a last
    message of the assistant, by the pieces themselves; or not at all."""
    logprob_scale: Literal["raw", "scaled", "unknown"] = "raw"
    """Logprobs are those of the model, or of the distribution after the request's temperature."""
    ids_in: bool = True
    """Prompts are token ids, so nothing is tokenized twice."""
    ids_out: bool = True
    """Each piece comes with its token id."""
    byte_exact: bool = True
    """Pieces are the tokens' true bytes, half characters among them."""
    eos_visible: bool = True
    """The end of the answer is on the list; else it is known only where it is the most probable piece."""
    score: Literal["prefixes", "forced", "start_len", "echo", "none"] = "none"
    """How a drafted text can be scored in one request: a list of prefixes, forced decoding, logprobs of a prompt from
    a given position on, logprobs of the end of a prompt that is echoed."""
    logprob_noise: float = 0.0
    """Largest difference seen between two replies to one question, in nats."""
    gives_lists: bool = True
    """It gives next-token logprobs; else it can only be made to draw one piece after another."""
    max_named: int = 0
    """How many tokens can be asked for by name in one request, whether or not they are probable."""
    drafts: Literal["exact", "lists", "none"] = "none"
    """It goes on by itself for several tokens in one request, with a list at each; "exact": and what it draws are true
    samples, since the request switches off every other sampler."""


class Expert(ABC):
    """A frozen model that gives next-token distributions."""

    name: str
    capabilities: Capabilities

    @abstractmethod
    async def next_tokens(self, context: Context, *, top_k: int) -> TokenDistribution:
        """The `top_k` most probable next pieces after `context`. Raises ProviderError or AlignmentError."""

    async def prepare(self, context: Context) -> None:  # noqa: B027  # most experts render nothing
        """Make ready, once for an answer, what all its questions begin with. Raises ProviderError."""

    async def recall(self, context: Context, *, top_k: int) -> TokenDistribution | None:
        """What `next_tokens` would answer without asking anyone; None where that is not known."""
        return None

    def draft_temperature(self, wanted: float) -> float:
        """The temperature next to `wanted` at which it can draft while its lists stay the model's own."""
        return wanted if self.capabilities.logprob_scale == "raw" else 1.0

    async def draft(
        self, context: Context, *, top_k: int, num_tokens: int, temperature: float = 1.0, seed: int | None = None
    ) -> tuple[DraftStep, ...]:
        """What the expert writes after `context` on its own, up to END: at least one position, at most `num_tokens`.

        Fewer where the wire does not show more of them; where it does not tell what was drawn at the last one, that
        has the best piece and no index. `temperature` is one that `draft_temperature` gave. Not where
        `capabilities.drafts` is "none". Raises ProviderError or AlignmentError.
        """
        raise NotImplementedError(f"{self.name!r} does not draft")

    async def score(self, context: Context, draft: Sequence[Piece], *, top_k: int) -> tuple[TokenDistribution, ...]:
        """The distributions after every prefix of `draft`, the empty one and the whole among them: len(draft) + 1.

        One request where `capabilities.score` tells how, else one each, at the same time. END is no part of `draft`,
        since nothing follows it. Raises ProviderError or AlignmentError.
        """
        contexts = [Context(context.messages, (*context.response, *draft[:length])) for length in range(len(draft) + 1)]
        return tuple(await asyncio.gather(*(self.next_tokens(one, top_k=top_k) for one in contexts)))

    async def ask_among(self, context: Context, pieces: Sequence[Piece], *, top_k: int) -> TokenDistribution:
        """What it says of `pieces`, of which none is on the list of its `top_k` best; others may come along.

        Where the endpoint can, exactly these are asked for, at most `capabilities.max_named`, else its longest list.
        Raises ProviderError or AlignmentError.
        """
        longest = self.capabilities.max_top_k or min(LONGEST_LIST, len(await self.vocabulary()) or LONGEST_LIST)
        return await self.next_tokens(context, top_k=max(top_k, longest))

    async def spell(self, data: bytes) -> tuple[Piece, ...]:
        """Pieces that add `data` to an answer. Raises AlignmentError where there are none, or ProviderError."""
        return (Piece(data),)

    async def vocabulary(self) -> Sequence[Piece]:
        """Every piece that it may say, by token id; empty where that is not known."""
        return ()

    async def count_tokens(self, context: Context) -> int | None:
        """How many tokens it reads before the next one; None where it cannot tell. Raises ProviderError."""
        return None

    async def sample(self, context: Context) -> Piece:
        """One piece that the endpoint draws after `context` at temperature 1, where it gives no lists.

        Raises ProviderError, or AlignmentError for a piece that cannot be told from what was sent.
        """
        raise NotImplementedError(f"{self.name!r} is asked for its lists")

    @abstractmethod
    async def fingerprint(self) -> str:
        """Identifies the tokenizer: only experts with equal fingerprints can be merged."""

    @property
    def num_requests(self) -> int:
        """How often the endpoint was asked, retries included; 0 for a model in this process."""
        return 0

    @property
    def is_down(self) -> bool:
        """Its endpoint has failed several times in a row, and it is not yet time to try it again."""
        return False

    def charge(self, meter: Meter) -> None:  # noqa: B027  # a model in this process costs nothing
        """Count every request from now on."""

    @abstractmethod
    async def aclose(self) -> None:
        """Free connections and memory."""


class IdExpert(Expert):
    """An expert whose endpoint takes and returns token ids: the chat is rendered once, then only ids are appended."""

    def __init__(self, name: str, *, system: str | None, cache: DistributionCache | None) -> None:
        self.name = name
        self._system = system
        self._cache = cache
        self._prompts: OrderedDict[tuple[Message, ...], tuple[int, ...]] = OrderedDict()
        self._open_lists: SingleFlight[TokenDistribution] = SingleFlight()
        self._open_scores: SingleFlight[tuple[TokenDistribution, ...]] = SingleFlight()

    @abstractmethod
    async def encode_prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The ids of the rendered chat template, up to where the answer begins."""

    @abstractmethod
    async def encode_start(self) -> tuple[int, ...]:
        """The ids that stand before a text that is no chat."""

    @abstractmethod
    async def ask(self, ids: tuple[int, ...], top_k: int) -> TokenDistribution:
        """The distribution after `ids`, straight from the model."""

    async def count_tokens(self, context: Context) -> int | None:
        return len(await self.ids_of(context))

    @abstractmethod
    async def identity(self) -> tuple[str, ...]:
        """What identifies the model in the cache."""

    async def prepare(self, context: Context) -> None:
        await self._prompt_ids(context.messages)

    async def recall(self, context: Context, *, top_k: int) -> TokenDistribution | None:
        if self._cache is None:
            return None
        return await self._cache.get(distribution_key(await self.identity(), await self.ids_of(context), top_k))

    async def next_tokens(self, context: Context, *, top_k: int) -> TokenDistribution:
        ids = await self.ids_of(context)
        return await self._open_lists.ask((ids, top_k), lambda: self._next_tokens(ids, top_k))

    async def _next_tokens(self, ids: tuple[int, ...], top_k: int) -> TokenDistribution:
        if self._cache is None:
            return await self.ask(ids, top_k)
        key = distribution_key(await self.identity(), ids, top_k)
        found = await self._cache.get(key)
        if found is None:
            found = await self.ask(ids, top_k)
            await self._cache.put(key, found)
        return found

    async def score(self, context: Context, draft: Sequence[Piece], *, top_k: int) -> tuple[TokenDistribution, ...]:
        ids = await self.ids_of(context)
        return await self._open_scores.ask((ids, *draft, top_k), lambda: self._score(ids, draft, top_k))

    async def _score(self, ids: tuple[int, ...], draft: Sequence[Piece], top_k: int) -> tuple[TokenDistribution, ...]:
        if self._cache is None:
            return tuple(await self.score_ids(ids, draft, top_k))
        keys = await self._keys(ids, draft, top_k)
        found = [one for one in await self._cache.get_many(keys) if one is not None]
        if len(found) < len(keys):
            found = list(await self.score_ids(ids, draft, top_k))
            await self._cache.put_many(list(zip(keys, found, strict=True)))
        return tuple(found)

    async def score_ids(self, ids: tuple[int, ...], draft: Sequence[Piece], top_k: int) -> Sequence[TokenDistribution]:
        """The distributions after `ids` and every prefix of `draft`, straight from the model."""
        return await asyncio.gather(*(self.ask(prefix, top_k) for prefix in self.prefixes(ids, draft)))

    def prefixes(self, ids: tuple[int, ...], draft: Sequence[Piece]) -> list[tuple[int, ...]]:
        """`ids` with the ids of every prefix of `draft`, the empty one and the whole among them."""
        drafted = tuple(map(self._id_of, draft))
        return [(*ids, *drafted[:length]) for length in range(len(drafted) + 1)]

    async def remember(self, context: Context, steps: Sequence[DraftStep], top_k: int) -> None:
        """Keep the lists of a draft as the answers to single questions; what was drawn is not kept."""
        if self._cache is not None:
            keys = await self._keys(await self.ids_of(context), [step.piece for step in steps[:-1]], top_k)
            await self._cache.put_many([(key, step.distribution) for key, step in zip(keys, steps, strict=True)])

    async def _keys(self, ids: tuple[int, ...], draft: Sequence[Piece], top_k: int) -> list[str]:
        identity = await self.identity()
        return [distribution_key(identity, prefix, top_k) for prefix in self.prefixes(ids, draft)]

    async def ids_of(self, context: Context) -> tuple[int, ...]:
        """The ids of the prompt and of the answer so far."""
        ids = tuple(map(operator.attrgetter("token_id"), context.response))
        if None in ids or END.token_id in ids:
            ids = tuple(map(self._id_of, context.response))  # which says what is wrong
        return (*await self._prompt_ids(context.messages), *ids)

    async def _prompt_ids(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        known = self._prompts.get(messages)
        if known is None and not messages:
            known = self._prompts[messages] = await self.encode_start()
        if known is None:
            known = await self.encode_prompt(with_system(messages, self._system))
            self._prompts[messages] = known
            if len(self._prompts) > PROMPTS_KEPT:
                self._prompts.popitem(last=False)
        return known

    def _id_of(self, piece: Piece) -> int:
        if piece.token_id is None or piece == END:
            raise AlignmentError(f"expert {self.name!r} continues by token ids, but the piece {piece!r} has none")
        return piece.token_id


def with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """`messages` with an expert's own system prompt in front, joined to the conversation's if there is one."""
    if not system:
        return tuple(messages)
    if messages and messages[0].role == "system":
        return (Message("system", f"{system}\n\n{messages[0].content}"), *messages[1:])
    return (Message("system", system), *messages)


def build_distribution(
    entries: Iterable[tuple[Piece, float | None]],
    *,
    top_k: int,
    end_ids: Collection[int | None],
    vocab_size: int | None,
    expert: str,
) -> TokenDistribution:
    """The one way from an endpoint's list to a `TokenDistribution`: checks, drops sentinels, joins END, sorts, cuts.

    Raises MalformedResponseError for a NaN, an infinite or positive logprob, a token that stands twice, or
    probabilities of more than 1 in all, and LogprobsUnavailableError for a list that holds no value. Pieces without
    ids that have equal bytes add up: the wire cannot tell them apart.
    """
    entries = tuple(entries)
    if _needs_no_repair(entries, end_ids):
        values = tuple(logprob for _, logprob in entries[:top_k] if logprob is not None)
        _check_mass(values, expert)
        return TokenDistribution(tuple(piece for piece, _ in entries[:top_k]), values, vocab_size)
    found: dict[int | bytes, tuple[Piece, float]] = {}
    num_end = num_sentinels = 0
    ends: list[float] = []
    for piece, logprob in entries:
        if logprob is None or logprob <= SENTINEL_LOGPROB:
            num_sentinels += 1
            continue
        if not math.isfinite(logprob) or logprob > LOGPROB_SLACK:
            raise MalformedResponseError(
                f"the logprob of {piece.data!r} (id {piece.token_id}) is {logprob}, expected a finite number <= 0",
                expert=expert,
            )
        if piece.token_id in end_ids:
            ends.append(min(logprob, 0.0))
        elif piece.token_id is None and piece.key in found:
            found[piece.key] = (piece, _log_sum((found[piece.key][1], min(logprob, 0.0))))
        elif piece.key in found:
            raise MalformedResponseError(f"the token {piece.data!r} (id {piece.token_id}) stands twice", expert=expert)
        else:
            found[piece.key] = (piece, min(logprob, 0.0))
    if ends:
        num_end = len(ends)
        found[END.key] = (END, _log_sum(ends))
    if not found:
        raise LogprobsUnavailableError("the reply holds no next-token logprobs", expert=expert)
    if num_sentinels and [logprob for _, logprob in found.values()] == [0.0]:
        # No model is that certain: greedy sampling was applied before the logprobs were taken.
        raise LogprobsUnavailableError(
            f"one logprob is 0 and the other {num_sentinels} hold no value: they were taken after a temperature of 0",
            hint="Name the `provider` that serves this address, so that its own temperature is sent.",
            expert=expert,
        )
    # Sorted by value, then by id, so that ties do not depend on the order on the wire.
    ranked = sorted(found.values(), key=lambda entry: (-entry[1], _order(entry[0])))[:top_k]
    _check_mass([logprob for _, logprob in ranked], expert)
    return TokenDistribution(
        pieces=tuple(piece for piece, _ in ranked),
        logprobs=tuple(logprob for _, logprob in ranked),
        # END counts once among the pieces, though it may stand for several ids.
        vocab_size=None if vocab_size is None else vocab_size - max(0, num_end - 1),
    )


def _log_sum(logprobs: Sequence[float]) -> float:
    """The logprob of one or the other; probabilities may be too small for a number."""
    best = max(logprobs)
    return min(0.0, best + math.log(math.fsum(math.exp(logprob - best) for logprob in logprobs)))


def _check_mass(logprobs: Sequence[float], expert: str) -> None:
    total = sum(map(math.exp, logprobs))
    if total > 1.0 + MASS_SLACK:
        raise MalformedResponseError(f"the probabilities of a list add up to {total:.3f}", expert=expert)


def _needs_no_repair(entries: Sequence[tuple[Piece, float | None]], end_ids: Collection[int | None]) -> bool:
    """Whether a list is as it should be: the usual case, told in a tenth of the time that the repair takes."""
    if not entries:
        return False
    values = [value for _, value in entries if value is not None]
    ids = {piece.token_id for piece, _ in entries if piece.token_id is not None}
    return (
        len(values) == len(ids) == len(entries)
        and values[0] <= 0.0
        and values[-1] > SENTINEL_LOGPROB
        # Not true for a NaN either.
        and all(map(operator.gt, values, values[1:]))
        and ids.intersection(end_ids) <= {END.token_id}
    )


def _order(piece: Piece) -> tuple[int, bytes]:
    return (-2 if piece.token_id is None else piece.token_id, piece.data)
