"""The values that all layers pass around: frozen, comparable, standard library only (numpy where a value has an array).

Dimension letters used in the package: T response steps, E experts, K one expert's top-k, C candidates (the union of the
experts' pieces), L PCM ids, B answers in a batch, V vocabulary, F features of what an expert said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROUNDING_MASS: Final = 1e-7
"""Endpoints compute in float32: a tail below this cannot be told from rounding."""
FinishReason = Literal["stop", "length", "tool_calls"]
"""Why an answer ended: an END piece or a stop string; `max_tokens`, or the end of an expert's context; a tool call."""


class Piece(NamedTuple):
    """The bytes that one token adds to an answer, with the token's id where it is known."""

    data: bytes
    token_id: int | None = None

    @property
    def key(self) -> int | bytes:
        """What identifies this piece among the candidates of one merge."""
        return self.data if self.token_id is None else self.token_id


END: Final = Piece(b"", -1)
"""The piece that ends the answer. An expert's end tokens, however many it has, add up in this one piece."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation, in OpenAI's shape, so that agents' histories survive."""

    role: str
    content: str
    tool_calls: tuple[str, ...] = ()
    """Each call as its JSON text."""
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """What an expert is asked to continue: a conversation and the answer so far."""

    messages: tuple[Message, ...]
    response: tuple[Piece, ...] = ()

    def extended(self, *pieces: Piece) -> Context:
        """The context after more pieces of the answer."""
        return Context(self.messages, (*self.response, *pieces))


@dataclass(frozen=True, slots=True)
class TokenDistribution:
    """The top-k of one expert's next-token distribution, as `providers.base.build_distribution` makes it."""

    pieces: tuple[Piece, ...]
    """K different pieces."""
    logprobs: tuple[float, ...]
    """K natural logs of probabilities at temperature 1, descending."""
    vocab_size: int | None = None
    """How many pieces the expert knows, where the endpoint tells."""
    is_guess: bool = False
    """The endpoint told only which piece is its most probable one, as some do at the end of an answer: it counts as
    certain, and all that the endpoint knows as unseen."""

    @property
    def tail_mass(self) -> float:
        """Probability of everything that is not on the list, in [0, 1]: 1 - sum of the list, clamped."""
        return 1.0 if self.is_guess else self._unlisted

    @property
    def _unlisted(self) -> float:
        return min(1.0, max(0.0, 1.0 - math.fsum(math.exp(value) for value in self.logprobs)))

    @property
    def floor(self) -> float:
        """The logprob that stands for a piece outside the list: -inf where the list is the whole vocabulary.

        A missing piece has at most the smallest returned probability and at most the tail. Where the size of the
        vocabulary is known, the tail is shared evenly among the missing pieces instead: no bound, the better guess.
        """
        # A list can sum to 1 by rounding alone: what it leaves out is small then, but not impossible.
        tail = max(self._unlisted, ROUNDING_MASS)
        if self.vocab_size is not None:
            missing = self.vocab_size - len(self.pieces)
            if missing <= 0:
                return -math.inf
            tail /= missing
        return min(self.logprobs[-1], math.log(tail))


@dataclass(frozen=True, slots=True)
class DraftStep:
    """One position of what an expert wrote on its own: its distribution there, and what it drew."""

    distribution: TokenDistribution
    piece: Piece
    """What it drew."""
    index: int | None
    """The place of `piece` on the list; None where it is not on it, or cannot be known to be."""
    log_q: tuple[float, ...]
    """K natural logs, in the order of the list, of the distribution that `piece` comes from given that it is on the
    list: that of the drafting temperature, renormalised over the list."""


@dataclass(frozen=True, eq=False, slots=True)
class Candidates:
    """The support of one merge: every piece on any expert's list, with what each expert said of it."""

    pieces: tuple[Piece, ...]
    """C pieces, ordered by id, so that the order of the experts does not matter."""
    logprobs: NDArray[np.float64]
    """(E, C), not to be changed; -inf where a piece is not on that expert's list."""
    floors: tuple[float, ...]
    """E; see `TokenDistribution.floor`."""
    tails: tuple[float, ...]
    """E tail masses."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Candidates):
            return NotImplemented
        mine, theirs = ((one.pieces, one.floors, one.tails) for one in (self, other))
        # Equal pieces and floors, so the shapes are equal too.
        return mine == theirs and bool((self.logprobs == other.logprobs).all())

    def __hash__(self) -> int:
        return hash((self.pieces, self.floors, self.tails))


@dataclass(frozen=True, slots=True)
class TokenStep:
    """One drawn piece with all that is needed to recompute its log-probability for any PCM and any merge rule."""

    piece: Piece
    logprob: float
    """Natural log of the probability with which `piece` was drawn: after temperature and top_p. Not a number where an
    expert takes part that gives no logprobs."""
    experts: tuple[str, ...]
    """The E experts asked at this step, in the order of all the E-sized fields."""
    candidates: Candidates
    index: int
    """Which candidate was drawn."""
    weights: tuple[float, ...]
    """E: alpha, summing to 1 (linear, geometric), or beta (product; the base has none and stands as 0)."""
    missed_mass: float | None
    """Linear rule: an upper bound of the total variation between the merge of these lists and the merge of the whole
    distributions, before temperature and top_p. None for the other rules, where no such bound holds."""
    floor_mass: float
    """Probability, under the merge, of the pieces that at least one expert did not list."""
    entropy: float
    """Of the distribution that `piece` was drawn from, in nats; not a number where `logprob` is not."""
    policy_version: int = 0
    drawn_by: str | None = None
    """The expert that was drawn first and gave this piece alone: only where an expert takes part that gives no
    logprobs."""

    @property
    def is_forced(self) -> bool:
        """Given by the form of the answer: it left nothing else, or no expert listed anything that fits.

        E is 0, and C is 1.
        """
        return not self.experts

    def expert_logprob(self, expert: str) -> float | None:
        """What `expert` said of the drawn piece; None when it was not on its list."""
        value = float(self.candidates.logprobs[self.experts.index(expert), self.index])
        return None if value == -math.inf else value


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How a piece is drawn from the merged distribution."""

    temperature: float = 1.0
    """0 takes the most probable piece."""
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """One event of a streamed answer."""

    text: str
    """Text that became final with this piece: empty while a character is incomplete or a stop string possible."""
    step: TokenStep
    finish_reason: FinishReason | None = None
    """Set on the last token of an answer."""

    @property
    def weights(self) -> Mapping[str, float]:
        """The mixture weight of each expert asked, by name."""
        return dict(zip(self.step.experts, self.step.weights, strict=True))

    @property
    def expert_logprobs(self) -> Mapping[str, float | None]:
        """Each expert's own logprob of the drawn piece; None where it was not on its list."""
        return {name: self.step.expert_logprob(name) for name in self.step.experts}

    @property
    def missed_mass(self) -> float | None:
        """See `TokenStep.missed_mass`."""
        return self.step.missed_mass


@dataclass(frozen=True, slots=True)
class Effort:
    """What the experts did for an answer."""

    num_round_trips: int = 0
    """Waits for the network one after the other: a draft and its scores are two."""
    num_generated: int = 0
    """Tokens that experts drew, those that were not used among them; in lockstep one for each expert and token."""
    num_scored: int = 0
    """Positions of other experts' drafts that were scored."""
    num_drafted: int = 0
    """Drafted tokens that were put to the test,"""
    num_accepted: int = 0
    """and how many of them were kept."""
    num_unheard: int = 0
    """Pieces that the form of the answer gave, since no expert listed anything that fits."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of one of the tools that were offered."""

    call_id: str
    name: str
    arguments: str
    """A JSON object as text."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer."""

    text: str
    """What was said; of a tool call nothing."""
    steps: tuple[TokenStep, ...]
    finish_reason: FinishReason
    seed: int | None
    """With it the same endpoints give the same answer again; None where what endpoints drew took part."""
    merge: str
    effort: Effort = Effort()
    dropped: tuple[str, ...] = ()
    """Experts whose endpoints failed and without which the answer went on, in that order."""
    tool_calls: tuple[ToolCall, ...] = ()
    num_prompt_tokens: int = 0
    """What the experts read before the answer: of those asked the largest count, their system prompts included; a
    quarter of the bytes where no expert can tell."""

    @property
    def num_completion_tokens(self) -> int:
        """Tokens of the answer, its end among them."""
        return len(self.steps)

    @property
    def missed_mass_mean(self) -> float | None:
        """Mean over the steps of `TokenStep.missed_mass`; None where the rule has no bound."""
        values = self._missed()
        return math.fsum(values) / len(values) if values else None

    @property
    def missed_mass_max(self) -> float | None:
        """Largest `TokenStep.missed_mass` of the answer; None where the rule has no bound."""
        return max(self._missed(), default=None)

    def _missed(self) -> list[float]:
        return [step.missed_mass for step in self.steps if step.missed_mass is not None]
