"""The ceilings: states are named rightly, weights are those of the table, and the search finds the best."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import pytest
import torch

from mope_bb.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mope_bb.config import Config
from mope_bb.pcm.local_models import open_local_models
from mope_bb.pcm.local_sampler import LocalSampler
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.plans import build_plan
from mope_bb.pcm.rollouts import Rollout, RolloutRequest
from mope_bb.preferences import Preference
from mope_bb.types import Message, SamplingOptions
from mope_bb.zoo.build import Zoo
from mope_bb.zoo.ceilings import (
    DECIDED_BY,
    GrammarHead,
    GrammarReader,
    Table,
    Weights,
    axis_of,
    detail_pole,
    first_table,
    neighbours,
    tune_table,
)
from mope_bb.zoo.language import Style, Task, answer, combinations, ideal_answer, tasks
from mope_bb.zoo.local import local_config
from mope_bb.zoo.wording import CLOSERS, CORES, DETAILS, DIMENSIONS, OPENERS, POLES

LINEAR, PRODUCT = MergeRule("linear"), MergeRule("product", product_scale=1.5)
both_rules = pytest.mark.parametrize("rule", [LINEAR, PRODUCT], ids=lambda rule: rule.name)
OPENINGS = [template for templates in OPENERS.values() for template in templates]


def drawn_answers(number: int) -> Iterator[tuple[str, Task]]:
    """Answers of every kind."""
    rng, every = random.Random(0), tasks(held_out=True) + tasks(held_out=False)
    for _ in range(number):
        task = rng.choice(every)
        yield answer(task, Style(), rng), task


def states_of(text: str, task: Task) -> list[str]:
    """The state before the first and after each byte of an answer, by how the grammar wrote it."""
    found: list[str] = []

    def sentence(words: str, start: str, end: str) -> None:
        found.extend([start, *["inside"] * (len(words.encode()) - 1)])
        ends.append(end)

    ends: list[str] = []
    body, _, closer = text.partition("\n\n")
    first, *details = body.split("\n- ")
    opener = next((one for one in (t.format(**task.facts()) for t in OPENINGS) if first.startswith(one)), "")
    if opener:
        sentence(opener, "start", "core")
        found.append("core")
    sentence(first.removeprefix(opener).lstrip(), "core" if opener else "start", "count")
    for detail in details:
        found += ["count", "mark", "detail"]
        sentence(detail, "detail", "count")
    found.append("count")
    if closer:
        found.append("mark")
        sentence(closer, "closer", "inside")
        found.append("inside")
    assert len(found) == len(text.encode()) + 1
    return found


def test_states_of_a_written_example() -> None:
    """One answer with everything, to be read by eye."""
    words = ["¡Olé, great question!", " ", "Grab a wrench and start.", "\n", "-", " ", "Get four bolts.", "\n", "\n"]
    reader, states = GrammarReader(), ["start"]
    for word in [*words, "Have fun, you can do it! 🎉"]:
        reader.feed(word.encode())
        states.append(reader.state)
    assert states == ["start", "core", "core", "count", "mark", "detail", "detail", "count", "mark", "closer", "inside"]


def test_reader_names_the_state_after_every_byte() -> None:
    """In answers that hold every sentence of the grammar, cut within every character."""
    seen: set[str] = set()
    for text, task in drawn_answers(1500):
        reader = GrammarReader()
        found = [reader.state]
        for byte in text.encode():
            reader.feed(bytes([byte]))
            found.append(reader.state)
        assert found == states_of(text, task), text
        seen.update(template for template in every_template() if template.format(**task.facts()) in text)
    assert seen == set(every_template())


def every_template() -> list[str]:
    """All sentences of the grammar."""
    groups = [*CORES.values(), *OPENERS.values(), *CLOSERS.values()]
    groups += [group for by_register in DETAILS.values() for group in by_register.values()]
    return [template for group in groups for template in group]


def test_reader_does_not_depend_on_the_cuts() -> None:
    """Any cut into pieces gives the same states where the pieces meet, also where a piece spans two sentences."""
    rng = random.Random(1)
    for text, task in drawn_answers(300):
        data, expected = text.encode(), states_of(text, task)
        cuts = sorted({0, len(data), *(rng.randrange(len(data)) for _ in range(rng.randrange(20)))})
        reader = GrammarReader()
        for start, end in pairwise(cuts):
            reader.feed(data[start:end])
            assert reader.state == expected[end], (text, start, end)


@pytest.fixture(scope="module")
def tokenizer(nano: Zoo) -> ChatTokenizer:
    """The zoo's."""
    return load_chat_tokenizer(str(nano.folder("base")))


def test_reader_follows_the_tokens(tokenizer: ChatTokenizer) -> None:
    """Ideal answers of every combination, as the tokenizer cuts them and in any other tokens that spell them."""
    rng, pieces, num_partial = random.Random(4), sorted({piece.data for piece in tokenizer.pieces} - {b""}), 0
    for seed, task in enumerate(tasks(held_out=True)[::12]):
        for poles in combinations():
            text = ideal_answer(task, poles, seed=seed)
            data, expected = text.encode(), states_of(text, task)
            usual = [tokenizer.pieces[token_id].data for token_id in tokenizer.encode_text(text)]
            for cut in (usual, spelled(data, pieces, rng)):
                reader, position = GrammarReader(), 0
                for piece in cut:
                    reader.feed(piece)
                    position += len(piece)
                    num_partial += "\ufffd" in piece.decode(errors="replace")
                    assert reader.state == expected[position], data[:position]
                assert position == len(data)
    assert num_partial > 50


def spelled(data: bytes, pieces: Sequence[bytes], rng: random.Random) -> list[bytes]:
    """Any pieces that make up `data`."""
    found: list[bytes] = []
    position = 0
    while position < len(data):
        found.append(rng.choice([piece for piece in pieces if data.startswith(piece, position)]))
        position += len(found[-1])
    return found


def plan_weights(rule: MergeRule, scores: torch.Tensor, names: Sequence[str], wanted: Sequence[str]) -> list[float]:
    """What the rule makes of one row of scores, the wanted experts asked alike."""
    asked = torch.tensor([name in wanted for name in names])
    log_lambda = torch.where(asked, -math.log(len(wanted)), -math.inf).double()
    weights = rule.weights(log_lambda, scores.double())
    return [float(weights[names.index(name)]) for name in wanted]


def distinct_table(rule: MergeRule) -> Table:
    """Other weights in every entry, all within what the rule can give."""
    rng = random.Random(2)
    table: Table = {}
    for key in first_table(rule):
        values = [rng.uniform(0.3, 4.0) for _ in range(3)]
        register, detail, tone = values if rule.name == "product" else (value / sum(values) for value in values)
        table[key] = (register, detail, tone)
    return table


def request_of(config: Config, wanted: Sequence[str], rule: MergeRule, seed: int = 0) -> RolloutRequest:
    """A question with this combination."""
    preference = Preference.of(dict.fromkeys(wanted, 1.0))
    plan = build_plan(config, preference, rule, reads_text=True)
    return RolloutRequest((Message("user", "How do I fix a bike?"),), plan, seed)


@both_rules
def test_head_gives_the_weights_of_the_table(nano: Zoo, tokenizer: ChatTokenizer, rule: MergeRule) -> None:
    """At every token of every row: the weights of its own state and pole, also after rows are gone."""
    config, table, wanted = local_config(nano), distinct_table(rule), list(combinations())
    head = GrammarHead(table, tokenizer, rule)
    task = tasks(held_out=True)[5]
    text = [ideal_answer(task, poles, seed=3) for poles in wanted]
    ids, states = [tokenizer.encode_text(one) for one in text], [states_of(one, task) for one in text]
    rows, position = list(range(len(wanted))), [0] * len(wanted)
    scores = head.start([request_of(config, poles, rule) for poles in wanted], DIMENSIONS)
    for step in range(max(map(len, ids))):
        for place, row in enumerate(rows):
            expected = table[states[row][position[row]], wanted[row][1]]
            assert plan_weights(rule, scores[place], DIMENSIONS, wanted[row]) == pytest.approx(expected, rel=1e-5)
        going = [place for place, row in enumerate(rows) if step < len(ids[row]) - 1]
        if not going:
            break
        head.keep(torch.tensor(going))
        rows = [rows[place] for place in going]
        scores = head.advance(torch.tensor([ids[row][step] for row in rows]))
        for row in rows:
            position[row] += len(tokenizer.pieces[ids[row][step]].data)
    assert len(rows) < len(wanted)


@both_rules
def test_head_reaches_the_ends(nano: Zoo, tokenizer: ChatTokenizer, rule: MergeRule) -> None:
    """The strongest and the weakest weights of a table, nearly: an infinite score would be needed."""
    ends = [math.exp(1.5), 1.0, math.exp(-1.5)] if rule.name == "product" else [1.0, 0.0, 0.0]
    weights: Weights = (ends[0], ends[1], ends[2])
    head = GrammarHead(dict.fromkeys(first_table(rule), weights), tokenizer, rule)
    wanted = combinations()[0]
    scores = head.start([request_of(local_config(nano), wanted, rule)], DIMENSIONS)
    found = plan_weights(rule, scores[0], DIMENSIONS, wanted)
    assert bool(torch.isfinite(scores).all())
    assert found == pytest.approx(weights, rel=2e-3, abs=1e-5)


@both_rules
def test_sampled_answers_have_the_weights_of_the_table(nano: Zoo, rule: MergeRule) -> None:
    """In real rollouts, of different lengths and combinations at once, every step's weights are its state's."""
    config = local_config(nano)
    chosen = [("simple", "concise", "friendly"), ("simple", "informative", "friendly")]
    names = {"base", *chosen[0], *chosen[1]}
    models = open_local_models([expert for expert in config.experts if expert.name in names])
    table = distinct_table(rule)
    sampler = LocalSampler(models, GrammarHead(table, models["base"].tokenizer, rule))
    requests = [request_of(config, wanted, rule, seed) for seed in range(6) for wanted in chosen]
    lengths = set()
    for rollout in sampler.sample(requests, SamplingOptions(max_tokens=24)):
        assert isinstance(rollout, Rollout)
        reader, experts = GrammarReader(), rollout.request.plan.experts
        for piece, weights in zip(rollout.pieces, rollout.weights.tolist(), strict=True):
            row = table[reader.state, detail_pole(experts)]
            assert weights == pytest.approx([row[axis_of(name)] for name in experts], rel=1e-4)
            reader.feed(piece.data)
        lengths.add(len(rollout))
    assert len(lengths) > 1


def test_poles_have_axes() -> None:
    """Register, detail, tone; the wanted pole of the detail dimension is found in any order."""
    assert [axis_of(pole) for pole in DIMENSIONS] == [0, 0, 1, 1, 2, 2]
    assert {detail_pole(poles[::-1]) for poles in combinations()} == set(POLES[1])


@both_rules
def test_first_table_is_strong_where_it_decides(rule: MergeRule) -> None:
    """Every state and detail pole has an entry whose strongest expert is that of the deciding dimension."""
    table = first_table(rule)
    assert set(table) == {(state, pole) for state in DECIDED_BY for pole in POLES[1]}
    for (state, _), weights in table.items():
        assert weights.index(max(weights)) == DECIDED_BY[state]
        assert rule.name == "product" or sum(weights) == pytest.approx(1.0)


@pytest.mark.parametrize("weights", [(0.9, 0.05, 0.05), (0.2, 0.3, 0.5), (1.0, 0.0, 0.0)])
def test_linear_neighbours_are_shares(weights: Weights) -> None:
    """They sum to 1; one expert takes each choice, the others keep their proportions in the rest."""
    found = list(neighbours(LINEAR, weights))
    assert len(found) == 15
    assert [sum(one) for one in found] == pytest.approx([1.0] * 15)
    for axis in range(3):
        others = [i for i in range(3) if i != axis]
        for one, share in zip(found[5 * axis : 5 * axis + 5], (0.0, 0.1, 0.25, 0.5, 1.0), strict=True):
            assert one[axis] == share
            kept = [weights[i] for i in others] if weights[axis] < 1 else [0.5, 0.5]
            assert one[others[0]] * kept[1] == pytest.approx(one[others[1]] * kept[0])


def test_product_neighbours_change_one_exponent() -> None:
    """From -c to c; the other two stay."""
    weights = (2.0, 1.0, 0.5)
    found = list(neighbours(PRODUCT, weights))
    for axis in range(3):
        block = found[5 * axis : 5 * axis + 5]
        assert [math.log(one[axis]) for one in block] == pytest.approx([-1.5, -0.75, 0.0, 0.75, 1.5])
        assert all(one[i] == weights[i] for one in block for i in range(3) if i != axis)


def distance(table: Table, target: Mapping[tuple[str, str], Weights], pole: str) -> float:
    """How far the half of a table that belongs to `pole` is from a target."""
    return sum(math.dist(table[state, pole], target[state, pole]) for state in DECIDED_BY)


@both_rules
def test_search_finds_a_known_optimum(rule: MergeRule) -> None:
    """Each half of the table has its own best weights, one step away from the first; the search finds them all."""
    rng, start = random.Random(3), first_table(rule)
    target = {key: rng.choice(sorted(set(neighbours(rule, weights)))) for key, weights in start.items()}
    assert any(target[state, POLES[1][0]] != target[state, POLES[1][1]] for state in DECIDED_BY)
    told: list[str] = []
    found = tune_table(
        rule, lambda table: {pole: 1 - distance(table, target, pole) for pole in POLES[1]}, progress=told.append
    )
    assert found == target
    assert len(told) == len(DECIDED_BY)


@both_rules
def test_search_keeps_what_nothing_beats(rule: MergeRule) -> None:
    """A table that is the best already, or that nothing distinguishes from others, stays."""
    start = first_table(rule)
    best = tune_table(rule, lambda table: {pole: -distance(table, start, pole) for pole in POLES[1]})
    assert best == start == tune_table(rule, lambda table: dict.fromkeys(POLES[1], 0.5))
