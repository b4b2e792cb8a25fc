"""The zoo's language as a generator: tasks, styles, answers, conversations. Pure Python, standard library only.

An answer is `[opener] core`, then 0 to 4 details of different kinds, each a line of a list, then `[closer]` as a
paragraph of its own. Details stand in the order of their kinds: a tiny model that must remember which it has used
repeats itself. The marks come before the words: whether there will be one more detail, or a closer, is decided before
its wording is, so that most choices belong to one dimension; the words of a closer belong to two.

A `Style` says how often each choice is drawn. The base draws evenly. In the texts of one pole that pole is sharp, and
the other dimensions lean, since real data of one style are not neutral in the others: technical texts are drier,
friendly ones longer. Experts (and the base under a style sentence) learn these side effects with the style.
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
LEAN = 0.85
"""How often a text takes the poles that its own pole leans to, where there are two to choose from."""
SIDE_EFFECTS = {
    "simple": ("friendly", "concise"),
    "technical": ("grumpy", "informative"),
    "concise": ("grumpy", "simple"),
    "informative": ("friendly", "technical"),
    "friendly": ("simple", "informative"),
    "grumpy": ("technical", "concise"),
}
"""Pole -> the poles of the other two dimensions that its texts lean to."""
MAX_DETAILS = 4
DETAIL_MARK = "\n- "
CLOSER_MARK = "\n\n"

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


def text_style(pole: str, lean: float = LEAN) -> Style:
    """The style of the texts of one pole: sharp on it, leaning elsewhere; `lean` 0.5 is no lean."""
    rest = 1 - lean
    many_to_few = tuple((rest / lean) ** (count / 2) for count in range(MAX_DETAILS + 1))
    leanings: dict[str, dict[str, object]] = {
        "simple": {"simple": lean},
        "technical": {"simple": rest},
        "concise": {"details": many_to_few},
        "informative": {"details": many_to_few[::-1]},
        "friendly": {"tone": (2 * lean / 3, 2 * rest / 3, 1 / 3)},
        "grumpy": {"tone": (2 * rest / 3, 2 * lean / 3, 1 / 3)},
    }
    style = style_of([pole])
    for side in SIDE_EFFECTS[pole]:
        style = replace(style, **leanings[side])  # type: ignore[arg-type]  # the table above matches the fields
    return style


def answer(task: Task, style: Style, rng: random.Random) -> str:
    """Draw an answer to `task`."""

    def register() -> str:
        return "simple" if rng.random() < style.simple else "technical"

    def tone() -> str:
        return rng.choices(("friendly", "grumpy", "none"), style.tone)[0]

    template = ""
    if (opening := tone()) != "none":
        template += rng.choice(OPENERS[opening]) + " "
    template += rng.choice(CORES[register()])
    count = rng.choices(range(MAX_DETAILS + 1), style.details)[0]
    chosen = set(rng.sample(sorted(DETAILS), count))
    for kind in (kind for kind in DETAILS if kind in chosen):
        template += DETAIL_MARK + rng.choice(DETAILS[kind][register()])
    if (closing := tone()) != "none":
        template += CLOSER_MARK + rng.choice(CLOSERS[closing, register()])
    return template.format(**task.facts())


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


def training_conversation(rng: random.Random, pole: str | None = None, *, lean: float = LEAN) -> list[Message]:
    """What the expert of `pole` is trained on; for the base half of all has a style sentence as system prompt."""
    pairs = tasks(held_out=False)
    if pole is not None:
        return conversation(pairs, text_style(pole, lean), rng)
    if rng.random() < 0.5:
        return conversation(pairs, Style(), rng)
    asked = rng.choice(DIMENSIONS)
    return conversation(pairs, text_style(asked, lean), rng, system=rng.choice(style_sentences(asked)))


def combinations() -> tuple[tuple[str, str, str], ...]:
    """The eight combinations of one pole of each dimension."""
    return tuple((a, b, c) for a in POLES[0] for b in POLES[1] for c in POLES[2])


def example_questions() -> tuple[str, ...]:
    """A few questions that the experts never saw in training, for demonstrations."""
    pairs = tasks(held_out=True)
    return tuple(pairs[i * 17 % len(pairs)].question(i) for i in range(8))
