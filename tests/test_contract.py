"""What every adapter must keep: one suite, all adapters, real engines."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

import pytest

from mope_bb.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mope_bb.config import parse_config
from mope_bb.errors import ContextLengthError, PrefillError, RequestError
from mope_bb.providers import local, scripted
from mope_bb.providers.base import Expert, IdExpert
from mope_bb.providers.dialects import CHAT, COMPLETIONS, NATIVE
from mope_bb.providers.registry import PROVIDERS, open_expert
from mope_bb.types import END, Context, Message, Piece, TokenDistribution
from mope_bb.zoo.build import Zoo
from mope_bb.zoo.serving import ZooServer, serve_zoo
from tests.agents.serving import serve_mope
from tests.endpoints.stand_ins import StandIns

T = TypeVar("T")
QUESTION = Context((Message("user", "How do I fix a bike?"),))
CONTEXT_LENGTH = 1024
"""Of the zoo's models, and of a slot of the server."""
SCRIPT = [{"Use": 0.5, "Try": 0.25, "Just": 0.125, "<end>": 0.0625}, {" it": 0.7, " é": 0.2}]


FACTS = {
    "local": local.CAPABILITIES,
    "scripted": scripted.CAPABILITIES,
    **{name: dialect.capabilities for table in (NATIVE, COMPLETIONS, CHAT) for name, dialect in table.items()},
}
LISTING = sorted(name for name, facts in FACTS.items() if facts.gives_lists)
DRAFTING = sorted(name for name, facts in FACTS.items() if facts.drafts != "none")
CONTINUING = [name for name in LISTING if FACTS[name].prefill not in ("none", "pieces")]


def test_facts_are_known_of_every_adapter() -> None:
    """The lists above leave nobody out."""
    assert FACTS.keys() == PROVIDERS.keys()


@pytest.fixture(params=LISTING)
def provider(request: pytest.FixtureRequest) -> str:
    """Every adapter that gives lists: a new one joins the suite by being registered."""
    return str(request.param)


@pytest.fixture(scope="module")
def mope_url(nano: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real `mope-bb serve` in front of one real expert."""
    config_path = tmp_path_factory.mktemp("mope") / "mope.toml"
    with serve_zoo(nano, names=["concise"]) as experts:
        experts.write_config(config_path)
        with serve_mope(config_path) as url:
            yield f"{url}/v1"


@pytest.fixture
def ask(
    request: pytest.FixtureRequest, provider: str, nano_experts: ZooServer, stand_ins: StandIns
) -> Callable[[Callable[[Expert], Awaitable[T]]], T]:
    """Open an expert of this adapter, run something with it, close it."""
    folder = str(nano_experts.zoo.folder("concise"))
    tables: dict[str, dict[str, object]] = {
        "llamacpp": {"base_url": nano_experts.base_urls["concise"]},
        "llamacpp-completions": {
            "base_url": nano_experts.base_urls["concise"],
            "model": "concise",
            "tokenizer": folder,
        },
        "llamacpp-chat": {"base_url": nano_experts.base_urls["concise"], "model": "concise", "tokenizer": folder},
        "local": {"model": folder, "device": "cpu"},
        "scripted": {"script": SCRIPT},
    }
    if provider == "mope":
        tables["mope"] = {"base_url": request.getfixturevalue("mope_url"), "model": "mope", "tokenizer": folder}
    # What cannot run here speaks through a stand-in with the same model behind it.
    table = tables.get(provider) or stand_ins.table(provider)
    config = parse_config({"experts": [{"name": "e", "provider": provider, **table}]}).experts[0]

    def run(use: Callable[[Expert], Awaitable[T]]) -> T:
        async def main() -> T:
            expert = open_expert(config, None)
            try:
                return await use(expert)
            finally:
                await expert.aclose()

        return asyncio.run(main())

    return run


Ask = Callable[[Callable[[Expert], Awaitable[object]]], object]


async def refuses_to_continue(expert: Expert) -> None:
    """An endpoint that gives first tokens only says so, and gives them."""
    first = (await expert.next_tokens(QUESTION, top_k=5)).pieces[0]
    with pytest.raises(PrefillError):
        await expert.next_tokens(QUESTION.extended(first), top_k=5)


def test_list_is_a_distribution(ask: Ask) -> None:
    """At most k different pieces, descending logprobs at or below 0, mass at most 1."""

    async def use(expert: Expert) -> None:
        for top_k in (1, 3, 50):
            found = await expert.next_tokens(QUESTION, top_k=top_k)
            assert 1 <= len(found.pieces) <= top_k
            assert len(set(found.pieces)) == len(found.pieces)
            assert list(found.logprobs) == sorted(found.logprobs, reverse=True)
            assert all(-math.inf < value <= 0 for value in found.logprobs)
            assert 0 <= found.tail_mass <= 1

    ask(use)


def test_shorter_list_is_the_head_of_a_longer_one(ask: Ask) -> None:
    """k changes how much is seen, not what is said."""

    async def use(expert: Expert) -> None:
        short = await expert.next_tokens(QUESTION, top_k=3)
        longer = await expert.next_tokens(QUESTION, top_k=40)
        known = dict(zip(longer.pieces, longer.logprobs, strict=True))
        for piece, logprob in zip(short.pieces, short.logprobs, strict=True):
            assert known[piece] == pytest.approx(logprob, abs=max(1e-6, expert.capabilities.logprob_noise))

    ask(use)


def test_answers_grow_by_pieces(ask: Ask) -> None:
    """The most probable pieces lead to END or on; every piece goes back in as it came out."""

    async def use(expert: Expert) -> None:
        if expert.capabilities.prefill == "none":
            await refuses_to_continue(expert)
            return
        context = QUESTION
        for _ in range(30):
            best = (await expert.next_tokens(context, top_k=5)).pieces[0]
            if best == END:
                break
            context = context.extended(best)
        text = b"".join(piece.data for piece in context.response)
        assert text.decode(errors="replace").strip()

    ask(use)


def test_end_is_a_piece(ask: Ask) -> None:
    """The end of the answer is a piece like any other: on a full list always, on a short one where an answer ends."""

    async def use(expert: Expert) -> None:
        if expert.capabilities.max_top_k is None and expert.capabilities.eos_visible:
            assert END in (await expert.next_tokens(QUESTION, top_k=5000)).pieces
        if expert.capabilities.prefill == "none":
            await refuses_to_continue(expert)
            return
        context = QUESTION
        for _ in range(400):
            pieces = (await expert.next_tokens(context, top_k=3)).pieces
            if END in pieces:
                return
            # The second choice, where there is one: a model in a loop never ends.
            context = context.extended(pieces[len(context.response) % 7 == 6 and len(pieces) > 1])
        pytest.fail("END was on no list of an answer of 400 pieces")

    ask(use)


def test_many_questions_at_once_equal_one_by_one(ask: Ask) -> None:
    """Concurrency never mixes up answers."""

    async def use(expert: Expert) -> None:
        start = (await expert.next_tokens(QUESTION, top_k=4)).pieces
        contexts = [QUESTION, *(QUESTION.extended(piece) for piece in start if piece != END)] * 5
        if expert.capabilities.prefill == "none":
            contexts = [QUESTION, Context((Message("user", "Tell me about the moon."),))] * 5
        together = await asyncio.gather(*(expert.next_tokens(context, top_k=10) for context in contexts))
        for context, found in zip(contexts, together, strict=True):
            alone = await expert.next_tokens(context, top_k=10)
            noise = max(1e-5, expert.capabilities.logprob_noise)
            assert found.logprobs == pytest.approx(alone.logprobs, abs=noise)

    ask(use)


def test_fingerprint_is_stable(ask: Ask) -> None:
    """Asked twice, the tokenizer is the same."""

    async def use(expert: Expert) -> None:
        assert await expert.fingerprint() == await expert.fingerprint()

    ask(use)


def test_too_long_a_context_is_its_own_error(ask: Ask, provider: str) -> None:
    """An endless prompt is refused with both numbers, never cut."""
    if provider == "scripted":
        pytest.skip("a script has no context length")

    async def use(expert: Expert) -> None:
        with pytest.raises(ContextLengthError, match=r"\d{4}"):
            await expert.next_tokens(Context((Message("user", "bike " * 3000),)), top_k=5)

    ask(use)


def test_control_tokens_in_a_message_are_refused(ask: Ask, provider: str) -> None:
    """What a user types never becomes a control token."""
    if provider == "scripted":
        pytest.skip("a script has no control tokens")

    async def use(expert: Expert) -> None:
        with pytest.raises(RequestError, match=r"<\|end\|>"):
            await expert.next_tokens(Context((Message("user", "hi <|end|> there"),)), top_k=5)

    ask(use)


def assert_same_list(found: TokenDistribution, alone: TokenDistribution, noise: float) -> None:
    """Two replies to one question: equal but for noise, which may also swap what stands at the end of the list."""
    assert found.logprobs == pytest.approx(alone.logprobs, abs=noise)
    known = dict(zip(alone.pieces, alone.logprobs, strict=True))
    assert known.get(found.pieces[0], -math.inf) == pytest.approx(found.logprobs[0], abs=noise)
    for piece, value in zip(found.pieces, found.logprobs, strict=True):
        assert known.get(piece, alone.logprobs[-1]) == pytest.approx(value, abs=noise)


def as_tokenized(path: Sequence[Piece], tokenizer: ChatTokenizer) -> bool:
    """Whether the text of a path is made of the path's own tokens: an endpoint that takes text then reads them."""
    data = b"".join(piece.data for piece in path)
    try:
        ids = tokenizer.encode_text(data.decode())
    except UnicodeDecodeError:
        return False
    return [tokenizer.piece(token_id).data for token_id in ids] == [piece.data for piece in path]


@pytest.mark.parametrize("provider", DRAFTING, indirect=True)
def test_lists_along_a_draft_are_those_of_single_questions(ask: Ask, nano: Zoo) -> None:
    """Whatever was drawn: position by position what `next_tokens` says after the same pieces."""
    tokenizer = load_chat_tokenizer(str(nano.folder("concise")))

    async def compare(expert: Expert, temperature: float) -> None:
        steps = await expert.draft(QUESTION, top_k=5, num_tokens=8, temperature=temperature, seed=7)
        assert 1 <= len(steps) <= 8
        num_compared = 0
        for position, step in enumerate(steps):
            path = [one.piece for one in steps[:position]]
            if expert.capabilities.ids_in or as_tokenized(path, tokenizer):
                alone = await expert.next_tokens(QUESTION.extended(*path), top_k=5)
                assert_same_list(step.distribution, alone, max(1e-5, expert.capabilities.logprob_noise))
                num_compared += 1
        assert num_compared >= min(3, len(steps))

    async def use(expert: Expert) -> None:
        for temperature in {expert.draft_temperature(wanted) for wanted in (0.0, 1.0)}:
            await compare(expert, temperature)

    ask(use)


@pytest.mark.parametrize("provider", DRAFTING, indirect=True)
def test_a_draft_is_drawn_from_what_it_says(ask: Ask) -> None:
    """q is the list at the drafting temperature; the drawn piece stands where it says; nothing follows END."""

    async def use(expert: Expert) -> None:
        for temperature in {expert.draft_temperature(wanted) for wanted in (0.0, 0.7, 1.0)}:
            steps = await expert.draft(QUESTION, top_k=5, num_tokens=16, temperature=temperature, seed=7)
            assert END not in [step.piece for step in steps[:-1]]
            for step in steps:
                listed = step.distribution
                assert step.index is None or listed.pieces[step.index] == step.piece
                if temperature > 0.0:
                    powers = [math.exp(value / temperature) for value in listed.logprobs]
                    expected = [math.log(power / math.fsum(powers)) for power in powers]
                    assert step.log_q == pytest.approx(expected, abs=1e-9)
                else:
                    assert [math.exp(value) for value in step.log_q] == [
                        float(place == step.index) for place in range(len(listed.pieces))
                    ]

    ask(use)


@pytest.mark.parametrize("provider", CONTINUING, indirect=True)
def test_scores_are_those_of_single_questions(ask: Ask) -> None:
    """After every prefix of a draft, the empty one and the whole among them."""

    async def use(expert: Expert) -> None:
        temperature = expert.draft_temperature(0.0)
        steps = await expert.draft(QUESTION, top_k=5, num_tokens=8, temperature=temperature, seed=7)
        for pieces in ([], [step.piece for step in steps if step.piece != END]):
            found = await expert.score(QUESTION, pieces, top_k=5)
            assert len(found) == len(pieces) + 1
            for position, one in enumerate(found):
                alone = await expert.next_tokens(QUESTION.extended(*pieces[:position]), top_k=5)
                assert_same_list(one, alone, max(1e-5, expert.capabilities.logprob_noise))

    ask(use)


@pytest.mark.parametrize("num_left", [2, 5])
@pytest.mark.parametrize("provider", [name for name in DRAFTING if FACTS[name].ids_in], indirect=True)
def test_a_draft_is_as_short_as_the_context_wants_it(ask: Ask, nano: Zoo, num_left: int) -> None:
    """Where one more token fits, a draft of many does not fail; what does not fit at all is its own error."""
    word = next(p for p in load_chat_tokenizer(str(nano.folder("concise"))).pieces if p.data == b" bike")

    async def use(expert: Expert) -> None:
        assert isinstance(expert, IdExpert)
        temperature, num_asked = expert.draft_temperature(1.0), 24
        num_words = CONTEXT_LENGTH - num_left - len(await expert.ids_of(QUESTION))
        long, too_long = (QUESTION.extended(*[word] * number) for number in (num_words, num_words + 10))
        alone = await expert.next_tokens(long, top_k=5)
        steps = await expert.draft(long, top_k=5, num_tokens=num_asked, temperature=temperature, seed=1)
        assert 1 <= len(steps) <= num_left + 1
        assert_same_list(steps[0].distribution, alone, max(1e-5, expert.capabilities.logprob_noise))
        with pytest.raises(ContextLengthError):
            await expert.draft(too_long, top_k=5, num_tokens=num_asked, temperature=temperature)

    ask(use)


def test_all_bytes_of_accents_and_emoji_are_kept(nano_experts: ZooServer) -> None:
    """llama.cpp and the local model agree on the bytes of the whole vocabulary, partial characters included."""
    url, folder = nano_experts.base_urls["friendly"], str(nano_experts.zoo.folder("friendly"))
    config = parse_config(
        {
            "experts": [
                {"name": "remote", "provider": "llamacpp", "base_url": url},
                {"name": "here", "provider": "local", "model": folder},
            ]
        }
    )

    async def main() -> tuple[set[object], set[object], set[str]]:
        experts = [open_expert(expert, None) for expert in config.experts]
        lists = [await expert.next_tokens(QUESTION, top_k=100_000) for expert in experts]
        fingerprints = {await expert.fingerprint() for expert in experts}
        for expert in experts:
            await expert.aclose()
        return set(lists[0].pieces), set(lists[1].pieces), fingerprints

    remote, here, fingerprints = asyncio.run(main())
    assert remote == here
    assert len(fingerprints) == 1
