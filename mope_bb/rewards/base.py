"""Rewards: one model per preference dimension, which says how likely an answer is preferred to a reference answer.

Most models score an answer alone, and the difference of two scores is normalised by Bradley-Terry. Pairwise models see
both answers and tell the chance themselves; they have no raw scores.

A score that could not be had is a `RewardError` in the place of the number, so that it costs one answer and nothing
else; there is no default score. Pure Python: torch comes in with the models that need it.
"""

from __future__ import annotations

import json
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mope_bb.chat_tokenizer import as_openai
from mope_bb.errors import RewardError
from mope_bb.types import Message
from mope_bb.usage import Meter

Conversation = tuple[Message, ...]
Comparison = tuple[Conversation, Conversation]
"""An answer and its reference: two conversations that differ in their last message, the assistant's."""


class RewardModel(ABC):
    """Scores answers in one dimension."""

    dimension: str

    @abstractmethod
    def score(self, conversations: Sequence[Conversation]) -> list[float | RewardError]:
        """One raw score for each conversation, higher is better; its last message is the assistant's answer.

        Scores are finite. Whatever goes wrong with one conversation is a RewardError in its place: nothing is raised.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back what the model holds; it cannot score afterwards. A second call does nothing."""

    def charge(self, meter: Meter) -> None:  # noqa: B027  # a model in this process costs nothing
        """Count every request from now on; `score` raises BudgetError where nothing is left."""


class PairwiseRewardModel(ABC):
    """Compares answers with their references in one dimension."""

    dimension: str

    @abstractmethod
    def compare(self, comparisons: Sequence[Comparison]) -> list[float | RewardError]:
        """For each comparison the chance that the answer is preferred to the reference, in [0, 1].

        Whatever goes wrong with one comparison is a RewardError in its place: nothing is raised.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back what the model holds; it cannot compare afterwards. A second call does nothing."""

    def charge(self, meter: Meter) -> None:  # noqa: B027  # a model in this process costs nothing
        """Count every request from now on; `compare` raises BudgetError where nothing is left."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What the reward models say about one answer, by dimension."""

    scores: Mapping[str, float]
    """Raw scores of the answer, where the model of the dimension gives any: a pairwise one does not."""
    wins: Mapping[str, float]
    """Chance that the answer is preferred to the reference, in [0, 1]."""


def win_probability(score: float, reference: float) -> float:
    """The Bradley-Terry chance that an answer is preferred to the reference: sigmoid of the difference of scores."""
    gap = score - reference
    if gap >= 0:
        return 1 / (1 + math.exp(-gap))
    # exp of a large positive number overflows; of a large negative one it is 0.
    odds = math.exp(gap)
    return odds / (1 + odds)


def scalarise(wins: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The mean of `wins` under `weights` (>= 0, of any sum above 0): the reward of one answer.

    Dimensions of weight 0 do not count and may be missing. Raises RewardError for a dimension without a win, and for
    weights that are negative or all 0.
    """
    total = math.fsum(weights.values())
    if not total > 0 or any(weight < 0 for weight in weights.values()):
        raise RewardError(f"the weights {dict(weights)} must not be negative, and one must be above 0")
    counted = {dimension: weight for dimension, weight in weights.items() if weight > 0}
    if missing := [dimension for dimension in counted if dimension not in wins]:
        raise RewardError(f"the answer was not scored in the dimension {missing[0]!r}")
    return math.fsum(weight * wins[dimension] for dimension, weight in counted.items()) / total


def checked_score(value: object, dimension: str) -> float | RewardError:
    """`value` as a finite number, or the RewardError that names what it is instead."""
    try:
        # float() would read the text "1", which no reward model means to return.
        number = None if isinstance(value, str | bytes) else float(value)  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001  # a reward function may return anything, whose conversion may raise anything
        number = None
    if number is None:
        return RewardError(f"the reward of {dimension!r} is {value!r}, not a number")
    if not math.isfinite(number):
        return RewardError(f"the reward of {dimension!r} is {number}, not a finite number")
    return number


def checked_chance(value: object, dimension: str) -> float | RewardError:
    """`value` as a number in [0, 1], or the RewardError that names what it is instead."""
    number = checked_score(value, dimension)
    if isinstance(number, RewardError) or 0 <= number <= 1:
        return number
    return RewardError(f"the chance of winning in {dimension!r} is {number}, not in [0, 1]")


class RewardPanel:
    """One reward model for each dimension. Calls from several threads wait for each other."""

    def __init__(self, models: Mapping[str, RewardModel | PairwiseRewardModel]) -> None:
        self._models = dict(models)
        self._references: dict[tuple[str, Conversation], float] = {}
        self._lock = threading.Lock()

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The dimensions that can be scored."""
        return tuple(self._models)

    def wins(
        self,
        prompts: Sequence[Sequence[Message]],
        answers: Sequence[str],
        references: Sequence[str],
        dimensions: Sequence[Collection[str]],
    ) -> list[Scored | RewardError]:
        """Judge each answer against its reference, under its own `dimensions` only.

        All four have one entry per answer; a prompt is the conversation before the answer. Each model is called once,
        without repetitions; scores of references are kept for later calls. An answer that is its own reference wins by
        a half, unasked where the model is pairwise. If one dimension of an answer cannot be scored, that answer's entry
        is the RewardError. Raises RewardError for a dimension without a model.
        """
        for name in (name for names in dimensions for name in names):
            if name not in self._models:
                raise RewardError(f"there is no reward model for {name!r}", hint=f"Known: {', '.join(self._models)}.")
        rows = [
            (_answered(prompt, answer), _answered(prompt, reference), frozenset(names))
            for prompt, answer, reference, names in zip(prompts, answers, references, dimensions, strict=True)
        ]
        with self._lock:
            found = {
                name: self._ask(
                    name, model, [(answer, reference) for answer, reference, names in rows if name in names]
                )
                for name, model in self._models.items()
            }
        return [_scored(answer, reference, names, found) for answer, reference, names in rows]

    def reference_scores(self, prompt: Sequence[Message], reference: str) -> dict[str, float]:
        """What is known by now of a reference answer: dimension -> raw score."""
        conversation = _answered(prompt, reference)
        with self._lock:
            found = {name: self._references.get((name, conversation)) for name in self._models}
        return {name: score for name, score in found.items() if score is not None}

    def keep_reference_scores(self, prompt: Sequence[Message], reference: str, scores: Mapping[str, float]) -> None:
        """Take over what another panel of the same models said of a reference answer."""
        conversation = _answered(prompt, reference)
        with self._lock:
            self._references |= {(name, conversation): score for name, score in scores.items()}

    def close(self) -> None:
        """Close all models."""
        with self._lock:
            for model in self._models.values():
                model.close()

    def _ask(
        self, dimension: str, model: RewardModel | PairwiseRewardModel, asked: Sequence[Comparison]
    ) -> dict[Comparison, _Verdict | RewardError]:
        """What one model says about all comparisons that it is asked for."""
        if isinstance(model, RewardModel):
            scores = self._scores(dimension, model, asked)
            return {(one, other): _verdict(scores[one], scores[other]) for one, other in asked}
        new = list(dict.fromkeys((one, other) for one, other in asked if one != other))
        chances = [checked_chance(value, dimension) for value in model.compare(new)] if new else []
        told = (one if isinstance(one, RewardError) else _Verdict(None, one) for one in chances)
        return dict.fromkeys(asked, _Verdict(None, 0.5)) | dict(zip(new, told, strict=True))

    def _scores(
        self, dimension: str, model: RewardModel, asked: Sequence[Comparison]
    ) -> dict[Conversation, float | RewardError]:
        """The scores of all answers and references; those of references are kept."""
        known = {
            reference: self._references[dimension, reference]
            for _, reference in asked
            if (dimension, reference) in self._references
        }
        new = list(dict.fromkeys(one for pair in asked for one in pair if one not in known))
        results = dict(zip(new, model.score(new), strict=True)) if new else {}
        for _, reference in asked:
            if isinstance(value := results.get(reference), float):
                self._references[dimension, reference] = value
        return {**known, **results}


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What one model says about one comparison."""

    score: float | None
    """Of the answer; None from a pairwise model."""
    win: float


def _verdict(score: float | RewardError, reference: float | RewardError) -> _Verdict | RewardError:
    if isinstance(score, RewardError):
        return score
    if isinstance(reference, RewardError):
        return RewardError(f"the reference answer could not be scored: {reference}", hint=reference.hint)
    return _Verdict(score, win_probability(score, reference))


def _answered(prompt: Sequence[Message], text: str) -> Conversation:
    return (*prompt, Message("assistant", text))


def _scored(
    answer: Conversation,
    reference: Conversation,
    dimensions: frozenset[str],
    found: Mapping[str, Mapping[Comparison, _Verdict | RewardError]],
) -> Scored | RewardError:
    scores, wins = {}, {}
    for name in sorted(dimensions):
        verdict = found[name][answer, reference]
        if isinstance(verdict, RewardError):
            return verdict
        wins[name] = verdict.win
        if verdict.score is not None:
            scores[name] = verdict.score
    return Scored(scores, wins)


class References:
    """The reference answer of each prompt, sampled once by the caller and kept, so that all use the same ones.

    With a path they are kept in a JSONL file, {"messages": [...], "text": ...} per line, to which one process appends
    at a time. One file belongs to one model that answers. Without a path they last as long as this object.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Read the file, if there is one. Raises RewardError for a file that is damaged before its last line."""
        self._path = path
        self._texts: dict[str, str] = {}
        self._lock = threading.Lock()
        self._torn_at: int | None = None
        if path is not None:
            self._read(path)

    def __len__(self) -> int:
        return len(self._texts)

    def get(self, messages: Sequence[Message]) -> str | None:
        """The reference answer to `messages`; None where there is none yet."""
        return self._texts.get(_key([as_openai(message) for message in messages]))

    def put(self, messages: Sequence[Message], text: str) -> str:
        """Keep `text` as the reference answer to `messages`, and return the one that counts.

        The first one counts: where another was kept already, it stays. Raises RewardError for a file that cannot be
        written.
        """
        shown = [as_openai(message) for message in messages]
        key = _key(shown)
        with self._lock:
            if key not in self._texts:
                if self._path is not None:
                    self._append(self._path, json.dumps({"messages": shown, "text": text}))
                self._texts[key] = text
            return self._texts[key]

    def _read(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise RewardError(f"the references {str(path)!r} cannot be read: {error}") from None
        *lines, rest = content.split(b"\n")
        if rest:
            # The process that wrote it was killed within the line. The next `put` takes its place.
            self._torn_at = len(content) - len(rest)
        for number, line in enumerate(lines, start=1):
            try:
                found = json.loads(line)
                self._texts.setdefault(_key(found["messages"]), str(found["text"]))
            except (ValueError, KeyError, TypeError, RecursionError):
                raise RewardError(
                    f"{str(path)!r}, line {number} is not a reference answer",
                    hint="Delete this line; its answer is then sampled again.",
                ) from None

    def _append(self, path: Path, line: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as stream:
                if self._torn_at is not None:
                    stream.truncate(self._torn_at)
                    self._torn_at = None
                stream.write(line.encode() + b"\n")
        except OSError as error:
            raise RewardError(f"the references {str(path)!r} cannot be written: {error}") from None


def _key(messages: object) -> str:
    return json.dumps(messages, sort_keys=True)
