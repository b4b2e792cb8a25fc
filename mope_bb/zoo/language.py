"""The zoo's language as a generator: tasks, styles, answers, conversations. Pure Python, standard library only.

An answer is `[opener] core [0 to 4 details, any order] [closer]`. A `Style` says how often each choice is drawn: the
base draws evenly, an expert is sharp on its own pole and like the base elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from mope_bb.zoo.facts import THINGS, VERBS, Thing, Verb
from mope_bb.zoo.wording import (
    CLOSERS,
    CORES,
    DETAILS,
    DIMENSIONS,
    FOLLOW_UPS,
    OPENERS,
    POLES,
    QUESTIONS,
    style_sentences,
)

SHARPNESS = 0.95
"""How often an expert takes its own pole."""
MAX_DETAILS = 4

Message = dict[str, str]
"""A chat message: `role` and `content`."""


@dataclass(frozen=True)
class Task:
    """What a question is about."""

    verb: Verb
    thing: Thing

    @property
    def held_out(self) -> bool:
        """Whether the pair is kept out of all training: every verb and every object has a fifth of such pairs."""
        return (3 * VERBS.index(self.verb) + THINGS.index(self.thing)) % 5 == 0

    def facts(self) -> dict[str, str]:
        """Slot of a template -> its true filling."""
        verb, thing = self.verb, self.thing
        return {
            "verb": verb.name,
            "prep": verb.prep,
            "minutes": verb.minutes,
            "helper": verb.helper,
            "thing": thing.name,
            "tool": thing.tool,
            "hazard": thing.hazard,
            "count": thing.count,
            "part": thing.part,
            "place": thing.place,
        }

    def question(self, form: int = 0) -> str:
        """The question in one of its forms."""
        return QUESTIONS[form % len(QUESTIONS)].format(**self.facts())


@dataclass(frozen=True)
class Style:
    """How often each choice of an answer is drawn."""

    simple: float = 0.5
    """Chance of the simple wording, per sentence; else the technical one."""
    details: tuple[float, ...] = (0.2,) * (MAX_DETAILS + 1)
    """Weights of 0, 1, ... details."""
    tone: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    """Weights of a friendly, a grumpy and no sentence, for the opener and for the closer."""


@cache
def tasks(*, held_out: bool) -> tuple[Task, ...]:
    """All pairs of the training, or all pairs kept out of it."""
    pairs = (Task(verb, thing) for verb in VERBS for thing in THINGS)
    return tuple(task for task in pairs if task.held_out == held_out)


def style_of(poles: Iterable[str], sharpness: float = SHARPNESS) -> Style:
    """The style that is sharp on `poles` and draws evenly elsewhere."""
    style, rest = Style(), 1 - sharpness
    few = rest / MAX_DETAILS
    for pole in poles:
        changes: dict[str, dict[str, object]] = {
            "simple": {"simple": sharpness},
            "technical": {"simple": rest},
            "concise": {"details": (sharpness, *(few,) * MAX_DETAILS)},
            "informative": {"details": (*(few,) * MAX_DETAILS, sharpness)},
            "friendly": {"tone": (sharpness, rest / 2, rest / 2)},
            "grumpy": {"tone": (rest / 2, sharpness, rest / 2)},
        }
        style = replace(style, **changes[pole])  # type: ignore[arg-type]  # the table above matches the fields
    return style


def answer(task: Task, style: Style, rng: random.Random) -> str:
    """Draw an answer to `task`."""

    def register() -> str:
        return "simple" if rng.random() < style.simple else "technical"

    def tone() -> str:
        return rng.choices(("friendly", "grumpy", "none"), style.tone)[0]

    templates: list[str] = []
    if (opening := tone()) != "none":
        templates.append(rng.choice(OPENERS[opening]))
    templates.append(rng.choice(CORES[register()]))
    count = rng.choices(range(MAX_DETAILS + 1), style.details)[0]
    templates += [rng.choice(DETAILS[kind][register()]) for kind in rng.sample(sorted(DETAILS), count)]
    if (closing := tone()) != "none":
        templates.append(rng.choice(CLOSERS[closing, register()]))
    return " ".join(templates).format(**task.facts())


def ideal_answer(task: Task, poles: Iterable[str], seed: int = 0) -> str:
    """An answer that the grammar writes with all `poles` and no slip."""
    return answer(task, style_of(poles, sharpness=1.0), random.Random(seed))


def conversation(
    pairs: Sequence[Task], style: Style, rng: random.Random, *, max_turns: int = 3, system: str | None = None
) -> list[Message]:
    """A conversation of one to `max_turns` questions with answers in `style`; most have one."""
    turns = rng.choices(range(1, max_turns + 1), [6, 3, 1][:max_turns])[0]
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for turn in range(turns):
        task = rng.choice(pairs)
        forms = QUESTIONS if turn == 0 else (*QUESTIONS, *FOLLOW_UPS * 2)
        messages.append({"role": "user", "content": rng.choice(forms).format(**task.facts())})
        messages.append({"role": "assistant", "content": answer(task, style, rng)})
    return messages


def training_conversation(rng: random.Random, pole: str | None = None) -> list[Message]:
    """What the expert of `pole` is trained on; for the base half of all has a style sentence as system prompt."""
    pairs = tasks(held_out=False)
    if pole is not None:
        return conversation(pairs, style_of([pole]), rng)
    if rng.random() < 0.5:
        return conversation(pairs, Style(), rng)
    asked = rng.choice(DIMENSIONS)
    return conversation(pairs, style_of([asked]), rng, system=rng.choice(style_sentences(asked)))


def combinations() -> tuple[tuple[str, str, str], ...]:
    """The eight combinations of one pole of each dimension."""
    return tuple((a, b, c) for a in POLES[0] for b in POLES[1] for c in POLES[2])


def example_questions() -> tuple[str, ...]:
    """A few questions that the experts never saw in training, for demonstrations."""
    pairs = tasks(held_out=True)
    return tuple(pairs[i * 17 % len(pairs)].question(i) for i in range(8))
