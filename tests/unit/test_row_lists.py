"""Lists of many answers at once: piece by piece what `build_distribution` and `align` make of each alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mope_bb.chat_tokenizer import ChatTokenizer
from mope_bb.errors import AlignmentError, ContextLengthError, RequestError
from mope_bb.pcm.alignment import align
from mope_bb.pcm.heads import NoHead
from mope_bb.pcm.local_sampler import LocalSampler
from mope_bb.pcm.mixture import IMPOSSIBLE
from mope_bb.pcm.row_lists import END_KEY, NO_KEY, Feed, LocalModel, align_rows
from mope_bb.providers.base import build_distribution
from mope_bb.providers.local import load_model
from mope_bb.types import END, Message, Piece, TokenDistribution
from mope_bb.zoo.build import Zoo


def build_list(logprobs: list[float], *, top_k: int, ends: set[int]) -> TokenDistribution:
    """The top-k of one answer and expert, as a provider makes it."""
    entries = [(END if i in ends else Piece(b"%d" % i, i), value) for i, value in enumerate(logprobs)]
    return build_distribution(entries, top_k=top_k, end_ids=(END.token_id,), vocab_size=len(logprobs), expert="test")


def key_of(piece: Piece) -> int:
    """The key by which `align_rows` knows a piece."""
    return END_KEY if piece == END else piece.token_id if piece.token_id is not None else NO_KEY


@given(data=st.data())
def test_align_rows_equals_align(data: st.DataObject) -> None:
    """Same pieces in the same order, same logprobs, floors and tails, for lists of any lengths."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    vocab = data.draw(st.integers(3, 12))
    num_rows, num_experts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    ends = set(data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=3, unique=True)))
    size = vocab - len(ends) + 1
    tops = [data.draw(st.integers(1, vocab)) for _ in range(num_experts)]
    spread = data.draw(st.sampled_from((0.5, 3.0, 12.0)))
    width = min(max(tops), size)
    keys = torch.full((num_rows, num_experts, width), NO_KEY)
    values = torch.full((num_rows, num_experts, width), -math.inf, dtype=torch.float64)
    said: list[dict[int, TokenDistribution]] = []
    for b in range(num_rows):
        asked = data.draw(st.lists(st.integers(0, num_experts - 1), min_size=1, unique=True).map(sorted))
        said.append({})
        for n in asked:
            logprobs = torch.log_softmax(torch.from_numpy(spread * rng.standard_normal(vocab)), dim=-1).tolist()
            found = said[b][n] = build_list(logprobs, top_k=tops[n], ends=ends)
            length = len(found.pieces)
            keys[b, n, :length] = torch.tensor([key_of(piece) for piece in found.pieces])
            values[b, n, :length] = torch.tensor(found.logprobs, dtype=torch.float64)
    candidates, lists = align_rows(keys, values, vocab_sizes=[size] * num_experts)
    for b, by_expert in enumerate(said):
        expected = align(list(by_expert.values()))
        num_pieces = len(expected.pieces)
        assert candidates[b, :num_pieces].tolist() == [key_of(piece) for piece in expected.pieces]
        assert candidates[b, num_pieces:].tolist() == [NO_KEY] * (candidates.shape[1] - num_pieces)
        for place, n in enumerate(by_expert):
            assert lists.logprobs[b, n, :num_pieces].tolist() == expected.logprobs[place].tolist()
            assert float(lists.floors[b, n]) == pytest.approx(expected.floors[place], rel=1e-6)
            assert float(lists.tails[b, n]) == pytest.approx(expected.tails[place], abs=1e-12)
        assert bool(torch.isneginf(lists.logprobs[b, :, num_pieces:]).all())
        for n in set(range(num_experts)) - set(by_expert):
            assert bool(torch.isneginf(lists.logprobs[b, n]).all())
            assert (float(lists.floors[b, n]), float(lists.tails[b, n])) == (IMPOSSIBLE, 0.0)
    assert int((candidates != NO_KEY).sum(dim=-1).max()) == candidates.shape[1]


def test_a_whole_vocabulary_has_no_floor() -> None:
    """Who listed everything says that the rest is impossible."""
    keys = torch.tensor([[[END_KEY, 3, 5], [3, END_KEY, NO_KEY]]])
    values = torch.tensor([[[0.5, 0.3, 0.2], [0.6, 0.1, 0.0]]], dtype=torch.float64).log()
    candidates, lists = align_rows(keys, values, vocab_sizes=[3, 4])
    assert candidates.tolist() == [[END_KEY, 3, 5]]
    assert float(lists.floors[0, 0]) == -math.inf
    assert float(lists.floors[0, 1]) == pytest.approx(math.log(0.1))
    assert lists.tails[0].tolist() == pytest.approx([0.0, 0.3])


@pytest.fixture(scope="module")
def several_ends(nano: Zoo) -> ChatTokenizer:
    """The zoo's tokenizer with three tokens that end an answer."""
    from transformers import AutoTokenizer

    return ChatTokenizer(AutoTokenizer.from_pretrained(nano.folder("base")), source="nano", extra_end_ids=(300, 41))


@pytest.fixture(scope="module")
def expert(nano: Zoo, several_ends: ChatTokenizer) -> LocalModel:
    """A model of the zoo with that tokenizer."""
    return LocalModel(load_model(str(nano.folder("concise")), torch.device("cpu")).eval(), several_ends, None, 7)


def test_feed_gives_the_models_own_top_k(expert: LocalModel, several_ends: ChatTokenizer) -> None:
    """Each answer's list is `build_distribution` of the model's plain forward; all its end ids add up in END."""
    rows = [[65, 70, 80], [90], [66, 67]]
    feed = Feed(expert, torch.tensor([0, 2, 3]))  # answer 1 does not ask this expert

    def check(found: tuple[torch.Tensor, torch.Tensor] | None, rows: list[list[int]]) -> None:
        assert found is not None
        for keys, values, row in zip(*found, rows, strict=True):
            with torch.inference_mode():
                outputs = expert.model(input_ids=torch.tensor([row])).logits[0, -1]
            logprobs = torch.log_softmax(outputs.double(), dim=-1).tolist()
            expected = build_list(logprobs, top_k=7, ends=set(several_ends.end_ids))
            assert keys.tolist() == [key_of(piece) for piece in expected.pieces]
            np.testing.assert_allclose(values.tolist(), expected.logprobs, atol=1e-5)

    check(feed.start(rows), rows)
    assert len(several_ends.end_ids) == 3
    assert feed.vocab_size == expert.model.config.vocab_size - 2
    check(feed.advance(torch.tensor([100, -1, -1, 101])), [[65, 70, 80, 100], [66, 67, 101]])
    assert feed.rows.tolist() == [0, 3]
    check(feed.advance(torch.tensor([-1, 55, -1, 102])), [[66, 67, 101, 102]])
    assert feed.advance(torch.full((4,), -1)) is None


def test_prompts_that_do_not_fit_are_refused(expert: LocalModel) -> None:
    """Too long, or with a control token: an error that names the expert."""
    assert expert.encode((Message("user", "Hi"),), expert="concise")
    with pytest.raises(ContextLengthError, match="the model reads at most") as caught:
        expert.encode((Message("user", "bike " * 5000),), expert="concise")
    assert caught.value.expert == "concise"
    with pytest.raises(RequestError, match="control token") as refused:
        expert.encode((Message("user", "Hi <|end|>"),), expert="concise")
    assert refused.value.expert == "concise"


def test_system_prompt_of_an_expert_is_its_own(expert: LocalModel) -> None:
    """The expert's own system message stands in front of what it reads."""
    styled = LocalModel(expert.model, expert.tokenizer, "Be brief.", 7)
    messages = (Message("user", "Hi"),)
    assert styled.encode(messages, expert="x") == expert.encode((Message("system", "Be brief."), *messages), expert="x")


def test_different_tokenizers_are_refused(expert: LocalModel) -> None:
    """Merging needs one tokenizer."""

    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    source = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", chat_template="{{ messages }}")
    other = LocalModel(expert.model, ChatTokenizer(source, source="words"), None, 7)
    with pytest.raises(AlignmentError, match="different tokenizers"):
        LocalSampler({"one": expert, "two": other}, NoHead())
