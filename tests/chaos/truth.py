"""What the model really says, and whether an expert's answer agrees with it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from mope_bb.config import ExpertConfig, parse_config
from mope_bb.providers.dialects import CHAT, COMPLETIONS, NATIVE
from mope_bb.providers.wire import is_whole_text
from mope_bb.types import END, Context, Message, Piece, TokenDistribution
from tests.chaos.engine import QuickEngine, RankedRow
from tests.chaos.server import BASE_PATHS
from tests.endpoints.stand_ins import MODEL

TOLERANCE: Final = 1e-6
DIALECTS: Final = ("llamacpp", "vllm", "sglang", "tgi", "openai", "vllm-chat")
"""Ids and text, lists of prompts and none, each shape of lists, our own client and OpenAI's."""
WITHOUT_TOKENIZER: Final = frozenset(("llamacpp", "openai"))
"""Those whose pieces are what the wire says."""
ACTIONS: Final = ("fix", "clean", "paint", "repair", "sell", "move")
THINGS: Final = ("bike", "piano", "door", "café table", "garden", "boat", "roof", "lamp")
ANSWERS: Final = ("Use a soft brush and warm water.", "Ask a friend in the café 🙂 to help you with it.", "Just do it")
LENGTHS: Final = range(3, 13)
SCORE_LENGTHS: Final = (13, 14, 15)
DRAFT_LENGTHS: Final = (16, 17, 18)
"""Of the lists that are asked for. They have none in common, so that a request that comes again is a retry."""
NUM_DRAFTED: Final = 5

Kind = Literal["next", "score", "draft"]


@dataclass(frozen=True)
class Question:
    """One call."""

    kind: Kind
    context: Context
    top_k: int
    draft: tuple[Piece, ...] = ()
    """What is scored."""


class Truth:
    """The model of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._engine = QuickEngine(folder)
        self._pieces = {by_bytes: self._all_pieces(by_bytes=by_bytes) for by_bytes in (False, True)}
        self._tokens = {
            by_bytes: {piece.key: token for token, piece in enumerate(pieces)}
            for by_bytes, pieces in self._pieces.items()
        }
        assert {len(one) for one in self._tokens.values()} == {self._engine.vocab_size}

    def config(self, dialect: str, url: str, life: str, **settings: object) -> ExpertConfig:
        """An expert behind the chaos server."""
        tokenizer = {} if dialect in WITHOUT_TOKENIZER else {"tokenizer": str(self.folder)}
        table = {
            "name": f"{dialect}-{life}",
            "provider": dialect,
            "base_url": f"{url}/{dialect}/{life}{BASE_PATHS.get(dialect, '/v1')}",
            "model": MODEL,
            **tokenizer,
            **settings,
        }
        return parse_config({"experts": [table]}).experts[0]

    def questions(self, dialect: str, rng: random.Random) -> list[Question]:
        """Different calls in any order, always the same ones; some contexts end inside a character."""
        facts = (NATIVE.get(dialect) or COMPLETIONS.get(dialect) or CHAT[dialect]).capabilities
        found: list[Question] = []
        for place, (action, thing) in enumerate(itertools.product(ACTIONS, THINGS)):
            messages = (Message("user", f"How do I {action} a {thing}?"),)
            found += [Question("next", Context(messages), top_k) for top_k in LENGTHS]
            if facts.prefill == "none":
                continue
            answer = self._answer(ANSWERS[place % len(ANSWERS)], needs_text=not facts.ids_in)
            length = 1 + place % (len(answer) - 1)
            begun = Context(messages, answer[:length])
            found += [Question("next", begun, top_k) for top_k in LENGTHS]
            drafted = answer[length : length + NUM_DRAFTED]
            found += [Question("score", begun, top_k, drafted) for top_k in SCORE_LENGTHS]
            if facts.drafts != "none":
                found += [Question("draft", begun, top_k) for top_k in DRAFT_LENGTHS]
        rng.shuffle(found)
        return found

    def _answer(self, text: str, *, needs_text: bool) -> tuple[Piece, ...]:
        pieces = [self._engine.chat.piece(token) for token in self._engine.chat.encode_text(text)]
        if not needs_text:
            return tuple(pieces)
        # An endpoint that takes text makes its own tokens of it: only where they are these the truth is known.
        for length in range(1, len(pieces) + 1):
            data = b"".join(piece.data for piece in pieces[:length])
            ids = self._engine.chat.encode_text(data.decode(errors="replace"))
            if [self._engine.chat.piece(token) for token in ids] != pieces[:length]:
                return tuple(pieces[: length - 1])
        return tuple(pieces)

    def verdict(
        self, found: Sequence[TokenDistribution], question: Question, dialect: str, path: Sequence[Piece]
    ) -> str:
        """ "right", "short" (right, with fewer pieces than there should be), or what is wrong.

        `found` holds the distributions after `question.context` and every prefix of `path`.
        """
        is_short = False
        for place, one in enumerate(found):
            context = question.context.extended(*path[:place])
            verdict = self._compare(one, context, question.top_k, dialect)
            if verdict not in ("right", "short"):
                return f"position {place}: {verdict}"
            is_short |= verdict == "short"
        return "short" if is_short else "right"

    def _compare(self, found: TokenDistribution, context: Context, top_k: int, dialect: str) -> str:
        # Who knows no ids knows pieces by their bytes.
        by_bytes = dialect == "openai"
        pieces, tokens = self._pieces[by_bytes], self._tokens[by_bytes]
        row = self._row(context)
        if found.vocab_size not in (None, len(row)):
            return f"a vocabulary of {found.vocab_size} pieces, expected {len(row)}"
        ranked = [pieces[token] for token in row.ranking[:top_k]]
        if found.is_guess:
            return "right" if found.pieces == (ranked[0],) else f"{found.pieces} as most probable, not {ranked[0]}"
        for piece, value in zip(found.pieces, found.logprobs, strict=True):
            token = tokens.get(piece.key)
            if token is None or pieces[token] != piece:
                known = None if token is None else pieces[token]
                return f"{piece} is no piece of the model; of this id it has {known}"
            if not abs(value - row[token]) <= TOLERANCE:
                return f"{piece} has the logprob {value}, expected {row[token]}"
        takes_text = dialect in ("tgi", "openai", "vllm-chat")
        expected = [piece for piece in ranked if piece == END or not takes_text or is_whole_text(piece.data)]
        return "right" if set(expected) <= set(found.pieces) else "short"

    def _row(self, context: Context) -> RankedRow:
        engine = self._engine
        ids = engine.encode(engine.render([{"role": one.role, "content": one.content} for one in context.messages]))
        return engine.row([*ids, *(piece.token_id for piece in context.response if piece.token_id is not None)])

    def _all_pieces(self, *, by_bytes: bool) -> list[Piece]:
        """All V pieces by token id."""
        engine = self._engine
        pieces = [engine.chat.piece(token) for token in range(engine.vocab_size)]
        if not by_bytes:
            return pieces
        # Control tokens are written by name there.
        texts = [piece.data or engine.text(token).encode() for token, piece in enumerate(pieces)]
        return [one if one == END else Piece(text) for one, text in zip(pieces, texts, strict=True)]
