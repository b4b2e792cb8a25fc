"""The oracle: reads an answer by the grammar and scores it. Never used in training the experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from mope_bb.zoo.facts import THINGS, VERBS
from mope_bb.zoo.language import DETAIL_MARK, MAX_DETAILS, Task
from mope_bb.zoo.wording import CLOSERS, CORES, DETAILS, OPENERS


@dataclass(frozen=True)
class Sentence:
    """One sentence of an answer as the grammar reads it."""

    role: str
    """opener, core, detail, closer; or unknown, when no template fits."""
    kind: str = ""
    """Of a detail: which fact it states."""
    register: str = ""
    tone: str = ""
    slots: tuple[tuple[str, str], ...] = ()
    """Slot and filling, as written, true or not."""


@dataclass(frozen=True)
class Scores:
    """What the oracle says about one answer."""

    register: float
    """-1 (all technical) to 1 (all simple): the mean over the sentences that have a register."""
    concise: float
    """1 for a bare core, less a quarter for each further sentence that is neither opener nor closer; 0 without core."""
    informative: float
    """Share of the four possible details that are there, each kind counted once; 0 without core."""
    tone: float
    """Friendly minus grumpy sentences."""
    fluency: float
    """Share of the sentences that the grammar allows where they stand."""
    facts: float
    """Share of the slots that are filled with the truth; 1 for an answer without slots."""

    def of(self, pole: str) -> float:
        """The score as seen by one pole, higher is better."""
        return {
            "simple": self.register,
            "technical": -self.register,
            "concise": self.concise,
            "informative": self.informative,
            "friendly": self.tone,
            "grumpy": -self.tone,
        }[pole]


def parse(text: str) -> list[Sentence]:
    """Cut `text` into sentences of the grammar; what fits no template becomes an unknown sentence."""
    text, position, found = text.strip(), 0, []
    while position < len(text):
        for pattern, sentence in _patterns():
            if match := pattern.match(text, position):
                slots = tuple(match.groupdict().items())
                found.append(Sentence(sentence.role, sentence.kind, sentence.register, sentence.tone, slots))
                position = match.end()
                break
        else:
            found.append(Sentence("unknown"))
            boundary = re.compile(r"[.!?](?: [^\w\s¡-]+)?(?:\s+|$)").search(text, position)
            position = boundary.end() if boundary else len(text)
    return found


def score(text: str, task: Task) -> Scores:
    """Score `text` as an answer to `task`."""
    sentences = parse(text)
    registers = [1.0 if s.register == "simple" else -1.0 for s in sentences if s.register]
    has_core = any(s.role == "core" for s in sentences)
    kinds = {s.kind for s in sentences if s.role == "detail"}
    content = sum(s.role in {"core", "detail", "unknown"} for s in sentences)
    truth = task.facts()
    slots = [truth[slot] == filling for s in sentences for slot, filling in s.slots]
    return Scores(
        register=_mean(registers, 0.0),
        concise=1 - (content - 1) / MAX_DETAILS if has_core else 0.0,
        informative=min(len(kinds), MAX_DETAILS) / MAX_DETAILS if has_core else 0.0,
        tone=float(sum((s.tone == "friendly") - (s.tone == "grumpy") for s in sentences)),
        fluency=_fluency(sentences),
        facts=_mean([float(right) for right in slots], 1.0),
    )


def _mean(values: list[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _fluency(sentences: list[Sentence]) -> float:
    """An opener comes first, one core next, then details in the order of their kinds, at most one closer, last."""
    stage, legal, order = 0, 0, list(DETAILS)
    last_kind, num_details = -1, 0
    for sentence in sentences:
        place = {"opener": 1, "core": 2, "detail": 3, "closer": 4}.get(sentence.role, 0)
        follows = {1: stage == 0, 2: stage <= 1, 3: stage in {2, 3}, 4: stage in {2, 3}}.get(place, False)
        if place == 3:
            kind = order.index(sentence.kind)
            follows = follows and kind > last_kind and num_details < MAX_DETAILS
            last_kind, num_details = max(kind, last_kind), num_details + 1
        if follows:
            legal, stage = legal + 1, place
    whole = max(len(sentences), 1) if any(s.role == "core" for s in sentences) else len(sentences) + 1
    return legal / whole


@lru_cache(maxsize=1)
def _patterns() -> tuple[tuple[re.Pattern[str], Sentence], ...]:
    """Every template as a pattern, with what it means."""
    every = [Task(verb, thing).facts() for verb in VERBS for thing in THINGS]
    fillings = {slot: {facts[slot] for facts in every} for slot in every[0]}
    sentences: list[tuple[str, Sentence]] = []
    for register, templates in CORES.items():
        sentences += [(t, Sentence("core", register=register)) for t in templates]
    for kind, by_register in DETAILS.items():
        for register, templates in by_register.items():
            sentences += [(DETAIL_MARK.lstrip() + t, Sentence("detail", kind, register)) for t in templates]
    for tone, templates in OPENERS.items():
        sentences += [(t, Sentence("opener", tone=tone)) for t in templates]
    for (tone, register), templates in CLOSERS.items():
        sentences += [(t, Sentence("closer", register=register, tone=tone)) for t in templates]
    return tuple((_compile(template, fillings), sentence) for template, sentence in sentences)


def _compile(template: str, fillings: Mapping[str, set[str]]) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    for slot, values in fillings.items():
        # Longest first, so that "twenty-one" is not read as "twenty".
        either = "|".join(re.escape(value) for value in sorted(values, key=lambda v: (-len(v), v)))
        pattern = pattern.replace("{" + slot + "}", f"(?P<{slot}>{either})")
    return re.compile(pattern + r"(?:\s+|$)")
