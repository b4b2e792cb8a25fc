"""Scores for open answers: the PCM behind an interface that an untrained mixture fits as well."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, groupby
from typing import Final

import torch
from torch import Tensor

from mope_bb.inference import BatchedModel
from mope_bb.pcm.gates import Gate, LinearGate
from mope_bb.pcm.model import PolicyWeights, PreferenceControlModel
from mope_bb.types import END, Context, Message, Piece

PROMPTS_KEPT: Final = 64
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, slots=True)
class Judgement:
    """What one policy says about the experts at one step."""

    head_scores: Tensor
    """head_i(h_t), (E,)."""
    gate: Gate
    """From head scores and the experts' features to scores."""
    policy_version: int


@dataclass(frozen=True, eq=False, slots=True)
class PathJudgement:
    """What one policy says about the experts at M positions of one answer."""

    head_scores: Tensor
    """(M, E)."""
    gate: Gate
    policy_version: int


class Scorer(ABC):
    """Gives each expert a score; 0 leaves the user's own weight as it is."""

    reads_text: bool = False
    """Whether a preference given as a sentence has an effect."""

    @abstractmethod
    async def judge(self, context: Context, preference_text: str, experts: Sequence[str]) -> Judgement:
        """What it says about `experts` after the preference, the conversation and the answer so far."""

    @abstractmethod
    async def judge_path(
        self, context: Context, path: Sequence[Piece], preference_text: str, experts: Sequence[str]
    ) -> PathJudgement:
        """What it says after every prefix of `path`, the empty one and the whole among them: M = len(path) + 1.

        `path` is a guess at how the answer in `context` goes on; at END it ends. All by one policy.
        """

    async def aclose(self) -> None:  # noqa: B027  # most scorers hold nothing
        """Free memory."""


class UserWeights(Scorer):
    """No PCM: the head says nothing, so the user's own weights act, or a gate that reads only what the experts say."""

    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate or LinearGate()

    async def judge(self, context: Context, preference_text: str, experts: Sequence[str]) -> Judgement:
        return Judgement(torch.zeros(len(experts)), self._gate, policy_version=0)

    async def judge_path(
        self, context: Context, path: Sequence[Piece], preference_text: str, experts: Sequence[str]
    ) -> PathJudgement:
        return PathJudgement(torch.zeros(len(path) + 1, len(experts)), self._gate, policy_version=0)


class PcmScorer(Scorer):
    """A PCM with one KV cache per open answer; the answers of many tasks share its forwards."""

    def __init__(
        self, pcm: PreferenceControlModel, *, expert_fingerprint: str | None, max_open_answers: int = 16
    ) -> None:
        """`expert_fingerprint` is that of the experts' tokenizer: if it is the PCM's own, ids are taken as they are.

        More than `max_open_answers` at a time are served too, but are read again and again from their beginning.
        """
        self.reads_text = pcm.is_trained
        self._pcm = pcm
        self._row_of = {name: row for row, name in enumerate(pcm.experts)}
        self._runner = BatchedModel(pcm.model, name="pcm", num_slots=max_open_answers, is_lm=False, mark=_policy(pcm))
        self._same_ids = expert_fingerprint == pcm.tokenizer.fingerprint
        self._max_prompts = max(PROMPTS_KEPT, max_open_answers)
        self._prompts: OrderedDict[tuple[str, tuple[Message, ...]], tuple[int, ...]] = OrderedDict()
        self._warned: set[str] = set()
        self._encode_text = lru_cache(maxsize=65536)(pcm.tokenizer.encode_text)

    @property
    def seconds_per_forward(self) -> float:
        """Mean time of a forward so far: of one step of all answers that were open then."""
        return self._runner.busy_s / max(1, self._runner.num_forwards)

    async def judge(self, context: Context, preference_text: str, experts: Sequence[str]) -> Judgement:
        found = await self.judge_path(context, (), preference_text, experts)
        return Judgement(found.head_scores[0], found.gate, found.policy_version)

    async def judge_path(
        self, context: Context, path: Sequence[Piece], preference_text: str, experts: Sequence[str]
    ) -> PathJudgement:
        grown = grown_ids((*context.response, *path), None if self._same_ids else self._encode_text)
        ids = list(self._prompt_ids(preference_text, context.messages))
        ids += chain.from_iterable(grown[: len(context.response)])
        lengths = list(accumulate(map(len, grown[len(context.response) :]), initial=len(ids)))
        ids += chain.from_iterable(grown[len(context.response) :])
        rows, (gate, version) = await self._read(ids, lengths)
        return PathJudgement(torch.stack([self._scores(rows, name) for name in experts], dim=1), gate, version)

    async def _read(self, ids: list[int], lengths: list[int]) -> tuple[Tensor, tuple[Gate, int]]:
        """The rows after the first n of `ids`, for each n of the ascending `lengths`, and the policy of all of them."""
        while True:
            rows, marks = [], []
            for start, group in groupby(lengths, key=self._first_read):
                ends = list(group)
                found, mark = await self._runner.marked_rows(
                    ids[start : ends[-1]], ends[-1] - ends[0] + 1, num_settled=max(0, lengths[0] - start)
                )
                rows.append(found[[end - ends[0] for end in ends]])
                marks.append(mark)
            if all(mark is marks[0] for mark in marks):  # else new weights came between two windows
                return torch.cat(rows), marks[0]

    def _first_read(self, length: int) -> int:
        """Where the PCM begins to read a text of `length` ids.

        Beyond its context it reads the end of the text; a weight is better than an error here. The window moves by a
        quarter of the context at a time, so that in between what was read stays read.
        """
        limit = self._runner.max_length
        if limit is None or length <= limit:
            return 0
        stride = max(1, limit // 4)
        return -(-(length - limit) // stride) * stride

    async def load(self, weights: PolicyWeights) -> None:
        """Go on with other weights, also within answers; each step tells the version that acted."""

        def replace() -> tuple[Gate, int]:
            weights.load_into(self._pcm)
            return _policy(self._pcm)

        await self._runner.swap(replace)

    def _scores(self, rows: Tensor, name: str) -> Tensor:
        index = self._row_of.get(name)
        if index is not None:
            return rows[:, index]
        if name not in self._warned:
            self._warned.add(name)
            _log.warning("the PCM does not know the expert %r: its weight stays the user's", name)
        return torch.zeros(len(rows))

    def _prompt_ids(self, preference_text: str, messages: tuple[Message, ...]) -> tuple[int, ...]:
        key = (preference_text, messages)
        if key not in self._prompts:
            self._prompts[key] = self._pcm.tokenizer.encode_chat(build_pcm_messages(preference_text, messages))
            if len(self._prompts) > self._max_prompts:
                self._prompts.popitem(last=False)
        return self._prompts[key]

    async def aclose(self) -> None:
        await asyncio.to_thread(self._runner.close)


def _policy(pcm: PreferenceControlModel) -> tuple[Gate, int]:
    # Sampling builds no graph, even where the PCM is being trained.
    return LinearGate(pcm.feature_weights.detach().clone()), pcm.policy_version


def build_pcm_messages(preference_text: str, messages: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation as the PCM reads it: prompt layout "chat-2". Before a text that is no chat, one says nothing."""
    own = [message.content for message in messages if message.role == "system"]
    rest = [message for message in messages if message.role != "system"]
    system = "\n\n".join(text for text in (preference_text, *own) if text)
    return (*([Message("system", system)] if system else []), *(rest if messages else [Message("user", "")]))


def response_ids(pcm: PreferenceControlModel, response: Sequence[Piece], *, same_ids: bool) -> list[list[int]]:
    """The ids by which the PCM's text grows with each piece, one list per piece.

    `same_ids`: the experts' tokenizer is the PCM's own. Else they are those of the text that became whole.
    """
    return [list(ids) for ids in grown_ids(response, None if same_ids else pcm.tokenizer.encode_text)]


def grown_ids(response: Sequence[Piece], encode_text: Callable[[str], Sequence[int]] | None) -> list[Sequence[int]]:
    """`response_ids`, given the function that makes ids of a text; None where the pieces' own ids are taken."""
    if encode_text is None:
        return [() if piece.token_id is None or piece == END else (piece.token_id,) for piece in response]
    return [encode_text(text) if text else () for text in grown_texts(response)]


def complete_texts(response: Sequence[Piece]) -> list[str]:
    """Cut the answer's bytes into texts, each as short as possible and of whole characters.

    A cut once made stays where it is when the answer grows, so ids made text by text are append-only. Bytes of a
    character that is not complete yet are left out; bytes that never become one are replaced when they are known to be
    wrong.
    """
    return [text for text in grown_texts(response) if text]


def grown_texts(response: Sequence[Piece]) -> Iterator[str]:
    """For each piece the text that it made whole: "" where a character is not complete yet. See `complete_texts`."""
    waiting = b""
    for piece in response:
        waiting += piece.data
        text = ""
        try:
            text = waiting.decode()
            waiting = b""
        except UnicodeDecodeError as error:
            # A character has at most 4 bytes: a longer rest, or one that does not end inside a character, is broken.
            if error.reason != "unexpected end of data" or len(waiting) - error.start > 3:
                text = waiting.decode(errors="replace")
                waiting = b""
        yield text
