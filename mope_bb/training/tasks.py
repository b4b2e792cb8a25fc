"""What a run trains on: prompts, and preferences drawn from many combinations, weights and wordings."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any, Final

from mope_bb.config import Config, PreferenceMixConfig
from mope_bb.errors import ConfigError
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.plans import build_plan
from mope_bb.pcm.rollouts import RolloutRequest
from mope_bb.preferences import Preference
from mope_bb.types import Message

ROLES: Final = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class WantedStyle:
    """A preference as the user writes it, and the dimensions that its reward is made of."""

    preference: Preference
    weights: Mapping[str, float]
    """Dimension -> weight in the reward; positive, summing to 1."""

    @property
    def label(self) -> str:
        """The dimensions, for people."""
        return ",".join(sorted(self.weights))


class StyleSource:
    """Draws preferences: single dimensions, pairs, triples, random weights; as names, weights or sentences."""

    def __init__(self, config: Config, dimensions: Sequence[str], mix: PreferenceMixConfig) -> None:
        """`dimensions` are those that have experts and rewards. Raises ConfigError for unknown ones in the axes and in
        what is left out, and where no preference is left to draw.
        """
        self._mix = mix
        self._texts = {name: section.wordings for name, section in config.dimensions.items() if section.wordings}
        axes = [tuple(axis) for axis in mix.axes] or [(name,) for name in dimensions]
        for key, groups in (("axes", axes), ("leave_out", mix.leave_out)):
            for name in (name for names in groups for name in names):
                if name not in dimensions:
                    raise ConfigError(
                        f"`{key}` of [train.preferences] names the dimension {name!r}, which has no expert",
                        hint=f"Known: {', '.join(dimensions)}.",
                    )
        left_out = {frozenset(names) for names in mix.leave_out}
        self._opposites = [pair for axis in axes for pair in permutations(axis, 2) if frozenset(pair) not in left_out]
        self._by_size = {
            size: [
                names
                for chosen in combinations(axes, size)
                for names in product(*chosen)
                if frozenset(names) not in left_out
            ]
            for size in range(1, min(3, len(axes)) + 1)
        }
        if not any(mix.sizes[size - 1] for size, found in self._by_size.items() if found):
            raise ConfigError(
                "[train.preferences] leaves no preference to draw",
                hint="`leave_out` excludes every combination of the `axes` that has a share in `sizes`.",
            )

    def draw(self, rng: random.Random) -> WantedStyle:
        """One preference."""
        if self._opposites and rng.random() < self._mix.opposites:
            first, second = rng.choice(self._opposites)
            share = round(rng.uniform(0.05, 0.95), 2)
            slider = Preference.of({first: share, second: 1 - share})
            return WantedStyle(slider, slider.weights)
        sizes = [size for size in self._by_size if self._by_size[size]]
        shares = [self._mix.sizes[size - 1] for size in sizes]
        names = rng.choice(self._by_size[rng.choices(sizes, shares)[0]])
        forms = {"names": self._mix.names, "weights": self._mix.weights, "sentences": self._mix.sentences}
        if not all(name in self._texts for name in names):
            # Nobody can say it in words.
            forms["sentences"] = 0.0
            if not any(forms.values()):
                forms["names"] = 1.0
        form = rng.choices(list(forms), list(forms.values()))[0]
        if form == "weights" and len(names) > 1:
            drawn = [rng.uniform(0.2, 1.0) for _ in names]
            weighted = Preference.of({name: round(value, 2) for name, value in zip(names, drawn, strict=True)})
            return WantedStyle(weighted, weighted.weights)
        even = Preference.of(dict.fromkeys(names, 1.0))
        if form == "sentences":
            return WantedStyle(sentence_for(names, self._texts, rng), even.weights)
        return WantedStyle(even, even.weights)


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt with one preference, to be answered twice."""

    pair_id: int
    messages: tuple[Message, ...]
    style: WantedStyle
    plan: Plan
    seeds: tuple[int, int]
    """Of the two answers."""

    @property
    def requests(self) -> tuple[RolloutRequest, RolloutRequest]:
        """The two answers to be sampled."""
        first, second = self.seeds
        return RolloutRequest(self.messages, self.plan, first), RolloutRequest(self.messages, self.plan, second)


class TaskSource:
    """The tasks of a run: each a function of the run's seed and the pair's number, whenever it is asked for."""

    def __init__(self, config: Config, rule: MergeRule, prompts: Sequence[tuple[Message, ...]], styles: StyleSource):
        self._config = config
        self._rule = rule
        self._prompts = prompts
        self._styles = styles

    def task(self, pair_id: int) -> Task:
        """Task number `pair_id`, from 0."""
        rng = random.Random(f"{self._config.train.seed} pair {pair_id}")
        style = self._styles.draw(rng)
        plan = build_plan(self._config, style.preference, self._rule, reads_text=True)
        return Task(pair_id, rng.choice(self._prompts), style, plan, (rng.getrandbits(32), rng.getrandbits(32)))


def open_tasks(config: Config, rule: MergeRule, prompts: Sequence[tuple[Message, ...]]) -> TaskSource:
    """The tasks of the run that `config` describes. Raises ConfigError."""
    styles = StyleSource(config, served_dimensions(config), config.train.preferences)
    return TaskSource(config, rule, prompts, styles)


def served_dimensions(config: Config) -> list[str]:
    """Dimensions that have an expert, in the configuration's order. Raises ConfigError if there is none."""
    served = [expert.dimension for expert in config.experts if expert.dimension is not None and not expert.base]
    if not served:
        raise ConfigError("no expert has a dimension, so there is nothing to train", hint="Set `dimension`.")
    return list(dict.fromkeys(served))


def reference_expert(config: Config) -> str:
    """Whose answer the rewards are measured against. Raises ConfigError."""
    name = config.train.reference or config.roster().base
    if name is None:
        raise ConfigError(
            "rewards are measured against a reference response, and no expert is the base",
            hint="Set `reference` in [train] to an expert's name, or `base = true` at an expert.",
        )
    if name not in {expert.name for expert in config.experts}:
        raise ConfigError(f"`reference` in [train] is {name!r}, which is no expert")
    return name


def sentence_for(names: Collection[str], wordings: Mapping[str, Sequence[str]], rng: random.Random) -> Preference:
    """A sentence that asks for these dimensions, each in one of its wordings, in any order."""
    order = list(names)
    rng.shuffle(order)
    return Preference(text=" ".join(rng.choice(wordings[name]) for name in order))


def load_prompts(path: Path) -> tuple[tuple[Message, ...], ...]:
    """Prompts from a text file (one a line), JSONL ({"prompt": text} or {"messages": [...]} a line), or the folder of a
    Hugging Face dataset with such columns (`Dataset.save_to_disk`).

    Raises ConfigError that names the line; an empty file is an error too.
    """
    if path.is_dir():
        return _load_dataset(path)
    try:
        # Not `splitlines`: JSON may hold its other line ends, such as U+2028, inside of texts.
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise ConfigError(f"there is no prompt file {str(path)!r}", hint="Set `prompts` in [train].") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the prompt file {str(path)!r} cannot be read: {error}") from None
    is_json = path.suffix in (".jsonl", ".json")
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{str(path)!r}, line {number}"
            prompts.append(_parse_line(line, where) if is_json else (Message("user", line.strip()),))
    if not prompts:
        raise ConfigError(f"the prompt file {str(path)!r} holds no prompt", hint="Write one prompt a line.")
    return tuple(prompts)


def _load_dataset(path: Path) -> tuple[tuple[Message, ...], ...]:
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"reading the dataset {str(path)!r} needs datasets", hint="pip install datasets") from None
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} is not the folder of a dataset: {error}") from None
    if isinstance(found, datasets.DatasetDict):
        raise ConfigError(
            f"{str(path)!r} holds several datasets: {', '.join(found)}",
            hint=f"Name one: {str(path / next(iter(found)))!r}.",
        )
    columns = [name for name in ("prompt", "messages") if name in found.column_names]
    if not columns or not len(found):
        raise ConfigError(
            f"the dataset {str(path)!r} has {len(found)} rows and the columns {found.column_names}",
            hint="It needs rows with a column `prompt` (text) or `messages`.",
        )
    return tuple(
        _parse_prompt({name: row[name] for name in columns}, f"{str(path)!r}, row {number}")
        for number, row in enumerate(found)
    )


def _parse_line(line: str, where: str) -> tuple[Message, ...]:
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None
    return _parse_prompt(found, where)


def _parse_prompt(found: Any, where: str) -> tuple[Message, ...]:
    hint = 'Write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}.'
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: {type(found).__name__}, expected an object", hint=hint)
    if isinstance(found.get("prompt"), str) and found["prompt"].strip():
        return _checked((Message("user", found["prompt"]),), where)
    messages = found.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{where}: neither `prompt` nor `messages`", hint=hint)
    parsed = []
    for message in messages:
        is_text = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not is_text or message.get("role") not in ROLES:
            raise ConfigError(f"{where}: a message needs a role ({', '.join(ROLES)}) and content", hint=hint)
        parsed.append(Message(message["role"], message["content"]))
    if parsed[-1].role != "user":
        raise ConfigError(f"{where}: the last message is the {parsed[-1].role}'s, expected the user's", hint=hint)
    return _checked(tuple(parsed), where)


def _checked(messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    for message in messages:
        try:
            message.content.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{where}: a message holds half of a surrogate pair, which is no text") from None
    return messages
