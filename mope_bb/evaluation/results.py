"""What an evaluation found, as plain frozen values with a JSON form: standard library only.

Everything that the table and the report show is computed from one `Evaluation`; nothing else is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Literal, TypedDict, get_args

from mope_bb.errors import ConfigError

FORMAT: Final = 1
"""Number of the JSON format; another number is refused."""
MethodKind = Literal["base", "training-free", "white-box", "reward-at-inference", "mope", "ceiling"]
"""What a method needs: the base alone; black-box experts and nothing learned; the experts' weights; reward models while
it answers; a trained PCM; or the truth itself, which no method has."""
KINDS: Final[tuple[MethodKind, ...]] = get_args(MethodKind)
"""The kinds, in the order in which they are shown."""


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """One answer of one method, with its scores."""

    method: str
    prompt: int
    """Index of the prompt: the unit of the bootstrap."""
    preference: str
    """The label of the preference, such as "concise,simple,friendly"."""
    sample: int
    text: str
    num_tokens: int
    entropy: float
    """Mean over the answer's tokens, in nats."""
    scores: dict[str, float]
    """The reward model's raw score, per requested dimension."""
    wins: dict[str, float]
    """Bradley-Terry probability of winning against the reference response, per requested dimension."""
    reward: float
    """The weighted mean of `wins`."""
    measures: dict[str, float] = field(default_factory=dict)
    """Further measures that some evaluations have: "oracle" (0 to 1), "fluency", "facts"."""


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """What a method is; raises `ConfigError` for an unknown kind."""

    name: str
    kind: MethodKind
    description: str
    """One line."""
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"method {self.name!r} has the kind {self.kind!r}; expected one of {', '.join(KINDS)}")

    @property
    def is_black_box_training_free(self) -> bool:
        """Whether the method asks only for logprobs and learns nothing: what a learned result must beat."""
        return self.kind in {"base", "training-free"}


class Plot(TypedDict):
    """How a study's table is drawn."""

    kind: Literal["line", "bar"]
    x: str
    """The column along the x axis."""
    y: list[str]
    """The columns that are drawn."""
    error: list[str] | None
    """For each column of `y` the column of the half-widths of its intervals."""


@dataclass(frozen=True, slots=True)
class Study:
    """A question on the side and its table; raises `ConfigError` where rows or plot do not fit the columns."""

    name: str
    title: str
    explanation: str
    """One or two sentences."""
    columns: list[str]
    rows: list[list[str | float | None]]
    plot: Plot | None = None

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ConfigError(f"study {self.name!r}: a row has {len(row)} cells, expected {len(self.columns)}")
        if self.plot is not None:
            drawn, error = self.plot["y"], self.plot["error"]
            if error is not None and len(error) != len(drawn):
                raise ConfigError(f"study {self.name!r}: {len(error)} error columns for {len(drawn)} drawn ones")
            for column in (self.plot["x"], *drawn, *(error or ())):
                if column not in self.columns:
                    raise ConfigError(f"study {self.name!r}: the plot needs the column {column!r}")


@dataclass(frozen=True, slots=True)
class Curve:
    """How a training went."""

    name: str
    rows: list[dict[str, float]]
    """One per step, from metrics.jsonl: "step", "reward" and whatever else was logged."""


class ColouredToken(TypedDict):
    """One token of an answer, and who carried it."""

    text: str
    shares: dict[str, float]
    """How much each expert carried the token, summing to 1."""
    weights: dict[str, float]
    """The mixture weight of each expert."""


@dataclass(frozen=True, slots=True)
class ColouredAnswer:
    """An answer with the experts' share in each token."""

    question: str
    preference: str
    method: str
    tokens: list[ColouredToken]


@dataclass(frozen=True, slots=True)
class WeightsOverAnswer:
    """How the mean weight of each expert goes from the beginning of an answer to its end."""

    method: str
    preference: str
    experts: dict[str, list[float]]
    """For each expert the mean weight in each tenth of the answer: 10 values."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything one evaluation found; raises `ConfigError` for a method named twice or an answer of none."""

    methods: list[MethodInfo]
    answers: list[ScoredAnswer]
    studies: list[Study] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    coloured: list[ColouredAnswer] = field(default_factory=list)
    weights: list[WeightsOverAnswer] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """What it ran on: machine, versions, zoo seed, seeds, counts, seconds. JSON values."""
    ideal: str | None = None
    """The method at the top of the headroom, a ceiling; None, or a method without answers: no shares are given."""
    bottom: str = "uniform mixture"
    """The method at the bottom of the headroom."""
    questions: list[str] = field(default_factory=list)
    """The prompts by index, where the report shall show them."""

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise ConfigError(f"two methods of one name among {', '.join(map(repr, names))}")
        if strangers := {answer.method for answer in self.answers} - set(names):
            raise ConfigError(f"answers of methods that are not listed: {', '.join(map(repr, sorted(strangers)))}")

    @property
    def dimensions(self) -> list[str]:
        """Every dimension that any answer was asked for, in the order in which they first appear."""
        return list(dict.fromkeys(dimension for answer in self.answers for dimension in answer.wins))


def to_json(evaluation: Evaluation) -> str:
    """The evaluation as JSON text that `from_json` reads; raises `ConfigError` for a number that is not finite."""
    try:
        return json.dumps({"format": FORMAT, **asdict(evaluation)}, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ConfigError(f"this evaluation holds a number that JSON cannot: {error}") from error


def from_json(text: str) -> Evaluation:
    """Read what `to_json` wrote; raises `ConfigError` for another format, missing or unknown fields."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"these results are not JSON: {error}") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise ConfigError(
            f"results of format {found!r}, expected {FORMAT}", hint="Run the evaluation again with this version."
        )
    table = {key: value for key, value in raw.items() if key != "format"}
    for name, kind in _PARTS.items():
        table[name] = [_build(kind, part) for part in table.get(name, [])]
    evaluation: Evaluation = _build(Evaluation, table)
    return evaluation


_PARTS: Final[Mapping[str, type]] = {
    "methods": MethodInfo,
    "answers": ScoredAnswer,
    "studies": Study,
    "curves": Curve,
    "coloured": ColouredAnswer,
    "weights": WeightsOverAnswer,
}


def _build(kind: type, table: Any) -> Any:
    """`kind` from a table with its fields' names."""
    if not isinstance(table, dict):
        raise ConfigError(f"results: a {kind.__name__} must be a table, not {type(table).__name__}")
    if unknown := set(table) - {known.name for known in fields(kind)}:
        raise ConfigError(f"results: a {kind.__name__} has unknown fields: {', '.join(sorted(unknown))}")
    try:
        return kind(**table)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"results: a {kind.__name__} is incomplete: {error}") from error
