"""llama.cpp's replies as its server wrote them (see bodies/README.md), and the same replies damaged."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mope_bb.errors import (
    ContextLengthError,
    LogprobsUnavailableError,
    MalformedResponseError,
    ProviderError,
)
from mope_bb.failures import classify_status
from mope_bb.providers.endpoint import Ask
from mope_bb.providers.llamacpp_wire import (
    FORCE_BIAS,
    build_own_request,
    build_request,
    build_score_request,
    can_be_forced,
    parse_draft,
    parse_response,
)
from mope_bb.providers.wire import PieceReader, Reply
from mope_bb.types import END, Piece, TokenDistribution

BODIES = Path(__file__).parent / "bodies"


def load(name: str) -> dict[str, Any]:
    """One recorded exchange."""
    document: dict[str, Any] = json.loads((BODIES / f"{name}.json").read_text(encoding="utf-8"))
    return document


def parse(document: dict[str, Any], *, top_k: int = 20, reply: Any = None) -> TokenDistribution:
    """The distribution in the recorded reply, or in `reply` in its place."""
    facts = document["facts"]
    return parse_response(
        document["reply"] if reply is None else reply,
        num_ids=facts["num_ids"],
        top_k=top_k,
        end_ids={facts["end_id"]},
        vocab_size=facts["vocab"],
        expert="short",
    )


def test_the_recorded_request_is_what_the_adapter_sends() -> None:
    """The recording is of this adapter: its request has not changed since."""
    document = load("normal")
    sent = document["sent"]
    assert sent == build_request([sent["prompt"]], top_k=20, forced_id=document["facts"]["forced_id"])
    assert len(sent["prompt"]) == document["facts"]["num_ids"]


def test_normal_reply() -> None:
    """Twenty pieces with ids and bytes, descending, below 1 in sum, equal to the numbers on the wire."""
    document = load("normal")
    found = parse(document)
    wire = document["reply"]["completion_probabilities"][0]["top_logprobs"]
    assert len(found.pieces) == len(wire) == 20
    assert [piece.token_id for piece in found.pieces] == [entry["id"] for entry in wire]
    assert [piece.data for piece in found.pieces] == [bytes(entry["bytes"]) for entry in wire]
    assert found.logprobs == tuple(entry["logprob"] for entry in wire)
    assert 0.0 < found.tail_mass < 1.0
    assert found.vocab_size == document["facts"]["vocab"]


def test_forcing_leaves_the_list_raw() -> None:
    """The forced token was sampled, and yet has its own small probability: `logit_bias` does not reach the list."""
    document = load("normal")
    facts, position = document["facts"], document["reply"]["completion_probabilities"][0]
    assert document["reply"]["tokens"] == [facts["forced_id"]]
    assert position["logprob"] < -1.0
    other = load("end_sampled")["reply"]["completion_probabilities"][0]["top_logprobs"]
    assert [(e["id"], e["logprob"]) for e in other] == [(e["id"], e["logprob"]) for e in position["top_logprobs"]]


def test_the_list_is_cut_to_k() -> None:
    """An endpoint that lists more than asked gives the k most probable."""
    assert parse(load("normal"), top_k=5).pieces == parse(load("normal")).pieces[:5]


def test_end_is_known_by_its_id() -> None:
    """The end token has no bytes on the wire; its id makes it END, with its own logprob."""
    document = load("with_end")
    wire = document["reply"]["completion_probabilities"][0]["top_logprobs"][-1]
    assert (wire["id"], wire["bytes"]) == (document["facts"]["end_id"], [])
    found = parse(document, top_k=1000)
    assert found.pieces[-1] == END
    assert found.logprobs[-1] == wire["logprob"]
    assert sum(piece == END for piece in found.pieces) == 1


def test_another_token_without_bytes_is_not_the_end() -> None:
    """Control tokens have no bytes either, but do not end the answer."""
    document = load("with_end")
    wire = document["reply"]["completion_probabilities"][0]["top_logprobs"]
    others = {entry["id"] for entry in wire if not entry["bytes"]} - {document["facts"]["end_id"]}
    assert others
    found = parse(document, top_k=1000)
    assert {piece.token_id for piece in found.pieces if not piece.data and piece != END} == others


def test_several_end_ids_of_one_reply_add_up() -> None:
    """Two end tokens of a model join in END, and the vocabulary counts them once."""
    document = load("with_end")
    wire = document["reply"]["completion_probabilities"][0]["top_logprobs"]
    found = parse_response(
        document["reply"],
        num_ids=document["facts"]["num_ids"],
        top_k=1000,
        end_ids={wire[0]["id"], wire[-1]["id"]},
        vocab_size=1280,
        expert="short",
    )
    value = dict(zip(found.pieces, found.logprobs, strict=True))[END]
    assert math.exp(value) == pytest.approx(math.exp(wire[0]["logprob"]) + math.exp(wire[-1]["logprob"]))
    assert found.vocab_size == 1279


def test_half_a_character_leaves_no_logprobs() -> None:
    """Why a harmless token is forced: this reply has no list, which is an error and not an empty distribution."""
    document = load("half_character")
    assert "completion_probabilities" not in document["reply"]
    assert document["sent"]["logit_bias"] == [[document["facts"]["half_id"], FORCE_BIAS]]
    with pytest.raises(LogprobsUnavailableError, match="without logprobs"):
        parse(document)


def test_too_long_a_prompt() -> None:
    """The server's own words and type for a full context are understood."""
    document = load("context")
    assert document["reply"]["error"]["type"] == "exceed_context_size_error"
    kind, _ = classify_status(document["status"], json.dumps(document["reply"]).encode())
    assert kind is ContextLengthError


def entries_of(reply: dict[str, Any]) -> list[dict[str, Any]]:
    """The list in a reply."""
    found: list[dict[str, Any]] = reply["completion_probabilities"][0]["top_logprobs"]
    return found


def change_first(**values: Any) -> Callable[[dict[str, Any]], None]:
    """A mutation of the first entry."""
    return lambda reply: entries_of(reply)[0].update(values)


def drop_first(name: str) -> Callable[[dict[str, Any]], None]:
    """A mutation that takes a field off the first entry."""

    def mutate(reply: dict[str, Any]) -> None:
        del entries_of(reply)[0][name]

    return mutate


def set_field(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A mutation of the reply itself."""
    return lambda reply: reply.update({name: value})


def repeat_first(reply: dict[str, Any]) -> None:
    """A mutation: one token twice."""
    entries_of(reply).append(entries_of(reply)[0])


@pytest.mark.parametrize(
    ("mutate", "expected"),
    [
        (set_field("truncated", True), ContextLengthError),
        (set_field("tokens_evaluated", 11), ContextLengthError),
        (set_field("tokens_evaluated", 13), ContextLengthError),
        (set_field("completion_probabilities", []), LogprobsUnavailableError),
        (set_field("completion_probabilities", None), LogprobsUnavailableError),
        (set_field("completion_probabilities", [{}]), MalformedResponseError),
        (set_field("completion_probabilities", [None]), MalformedResponseError),
        (set_field("completion_probabilities", "text"), MalformedResponseError),
        (set_field("completion_probabilities", {"0": 1}), MalformedResponseError),
        (set_field("completion_probabilities", [{"top_logprobs": None}]), MalformedResponseError),
        (set_field("completion_probabilities", [{"top_logprobs": [1]}]), MalformedResponseError),
        (set_field("completion_probabilities", [{"top_logprobs": []}]), LogprobsUnavailableError),
        (set_field("completion_probabilities", [{"top_probs": []}]), MalformedResponseError),
        (drop_first("id"), MalformedResponseError),
        (drop_first("bytes"), MalformedResponseError),
        (drop_first("logprob"), MalformedResponseError),
        (change_first(id="7"), MalformedResponseError),
        (change_first(id=None), MalformedResponseError),
        (change_first(logprob="-1"), MalformedResponseError),
        (change_first(logprob=math.nan), MalformedResponseError),
        (change_first(logprob=math.inf), MalformedResponseError),
        (change_first(logprob=0.5), MalformedResponseError),
        (change_first(bytes=None), MalformedResponseError),
        (change_first(bytes="abc"), MalformedResponseError),
        (change_first(bytes=[256]), MalformedResponseError),
        (change_first(bytes=[-1]), MalformedResponseError),
        (change_first(bytes=["a"]), MalformedResponseError),
        (change_first(bytes=3), MalformedResponseError),
        (change_first(id=True), MalformedResponseError),
        (change_first(id=-1), MalformedResponseError),
        (repeat_first, MalformedResponseError),
    ],
)
def test_damaged_replies(mutate: Callable[[dict[str, Any]], None], expected: type[ProviderError]) -> None:
    """Each damage is one specific error that names the expert, never another exception or a wrong list."""
    document = load("normal")
    reply = copy.deepcopy(document["reply"])
    mutate(reply)
    with pytest.raises(expected) as caught:
        parse(document, reply=reply)
    assert type(caught.value) is expected
    assert caught.value.expert == "short"


@pytest.mark.parametrize("reply", [[], "text", 3, False])
def test_a_reply_that_is_no_object(reply: Any) -> None:
    """JSON of another shape is malformed."""
    with pytest.raises(MalformedResponseError, match="expected an object"):
        parse(load("normal"), reply=reply)


def test_zero_probability_is_dropped() -> None:
    """llama.cpp writes -3.4e38 for a probability of 0: the piece leaves the list."""
    document = load("normal")
    reply = copy.deepcopy(document["reply"])
    gone = entries_of(reply)[3]
    gone["logprob"] = -3.4028234663852886e38
    found = parse(document, reply=reply)
    assert len(found.pieces) == 19
    assert gone["id"] not in [piece.token_id for piece in found.pieces]


def draft_of(document: dict[str, Any], reply: Any = None) -> Reply:
    """The recorded draft, or `reply` in its place."""
    facts = document["facts"]
    reader = PieceReader(None, end_ids={facts["end_id"]})
    return parse_draft(document["reply"] if reply is None else reply, reader, num_ids=facts["num_ids"], expert="short")


@pytest.mark.parametrize(("name", "temperature"), [("draft", 1.0), ("draft_half", 4.0)])
def test_a_draft_is_asked_for_with_nothing_filtered(name: str, temperature: float) -> None:
    """The recorded request: the temperature is the only sampler, whatever the server was started with."""
    sent = load(name)["sent"]
    ask = Ask(3, num_tokens=sent["n_predict"], temperature=temperature, seed=sent["seed"])
    assert sent == build_own_request([sent["prompt"]], ask)
    assert sent["samplers"] == ["temperature"]
    assert sent["logit_bias"] == []
    assert "seed" not in build_own_request([[1]], Ask(3, 8, 1.0))


def test_a_draft() -> None:
    """All positions up to the end, each with what was drawn and its logprob."""
    document = load("draft")
    found = draft_of(document)
    assert found.unlisted is None
    assert [position.drawn and position.drawn.token_id for position in found.positions[:-1]] == document["reply"][
        "tokens"
    ][:-1]
    assert found.positions[-1].drawn == END
    wired = [position["logprob"] for position in document["reply"]["completion_probabilities"]]
    assert [position.drawn_logprob for position in found.positions] == wired


def test_a_draft_ends_before_half_a_character() -> None:
    """The third list of six is missing, so what stands in its place is the fourth: only two are certain."""
    document = load("draft_half")
    tokens = document["reply"]["tokens"]
    assert len(document["reply"]["completion_probabilities"]) == len(tokens) - 1
    found = draft_of(document)
    assert [position.drawn and position.drawn.token_id for position in found.positions] == tokens[:2]
    assert found.unlisted is not None
    assert found.unlisted.token_id == tokens[2]


def test_bytes_of_half_a_character_are_no_part_of_the_next_token() -> None:
    """The wire hands them in with the fourth token: no reader may remember that token so."""
    document = load("draft_half")
    fourth = document["reply"]["completion_probabilities"][2]
    assert len(bytes(fourth["bytes"])) > len(bytes(fourth["bytes"]).decode(errors="ignore").encode())
    reader = PieceReader(None, end_ids={document["facts"]["end_id"]})
    parse_draft(document["reply"], reader, num_ids=document["facts"]["num_ids"], expert="short")
    assert fourth["id"] not in reader.known


@pytest.mark.parametrize(
    ("mutate", "expected"),
    [
        (set_field("tokens", []), LogprobsUnavailableError),
        (set_field("tokens", None), LogprobsUnavailableError),
        (set_field("tokens", 3), MalformedResponseError),
        (set_field("tokens", ["x"]), MalformedResponseError),
        (lambda reply: reply["completion_probabilities"][0].pop("id"), MalformedResponseError),
        (lambda reply: reply["completion_probabilities"][0].update(logprob="x"), MalformedResponseError),
    ],
)
def test_damaged_drafts(mutate: Callable[[dict[str, Any]], None], expected: type[ProviderError]) -> None:
    """Without the ids of what was drawn nothing is certain."""
    document = load("draft")
    reply = copy.deepcopy(document["reply"])
    mutate(reply)
    with pytest.raises(expected) as caught:
        draft_of(document, reply)
    assert type(caught.value) is expected


def test_a_draft_is_scored_by_forcing_it() -> None:
    """The recorded request forces what it names; the lists are raw, those of the model."""
    document = load("scored")
    tokens = document["reply"]["tokens"]
    assert document["sent"] == build_score_request(document["sent"]["prompt"], tokens, top_k=3)
    scored = [position["top_logprobs"] for position in document["reply"]["completion_probabilities"]]
    drafted = [position["top_logprobs"] for position in load("draft")["reply"]["completion_probabilities"]]
    assert len(scored) == len(tokens)
    for one, other in zip(scored, drafted, strict=False):
        assert {entry["id"]: entry["logprob"] for entry in one} == pytest.approx(
            {entry["id"]: entry["logprob"] for entry in other}, abs=0.02
        )


def test_tokens_that_come_again_are_biased_by_their_first_place() -> None:
    """One bias for each token, the first the highest, all above what a model says."""
    sent = build_score_request([1, 2], [7, 8, 7, 9], top_k=3)
    assert sent["logit_bias"] == [[7, 4000.0], [8, 3000.0], [9, 1000.0]]
    assert sent["grammar"] == "root ::= <[7]> <[8]> <[7]> <[9]>"
    assert sent["presence_penalty"] > 4000.0


@pytest.mark.parametrize(
    ("data", "can"),
    [(b" bike", True), ("é".encode(), True), (b"\xc3", False), (b"\xa9", False), (b"", False), (b"\0", False)],
)
def test_what_a_grammar_lets_through(data: bytes, can: bool) -> None:
    """Whole characters; anything else would end the request with status 500."""
    assert can_be_forced(Piece(data, 5)) is can
