"""The batched runner against the plain forward of tiny random models: same rows, fewer forwards, clean ends."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mope_bb.errors import ConfigError
from mope_bb.inference import SHORT_STEP, BatchedModel, choose_device
from mope_bb.slots import MIN_CAPACITY

VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


def seeded(build: Callable[[], Any]) -> Any:
    """A model with weights that are the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return build().eval()


def llama() -> Any:
    """Full attention, grouped heads."""
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**SIZES)))


def mistral() -> Any:
    """Every layer sees the last 6 positions only."""
    return seeded(lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)))


def qwen() -> Any:
    """Biases in attention; full attention."""
    return seeded(lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)))


def qwen_mixed() -> Any:
    """One layer of full attention, one that sees the last 5 positions only."""
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    assert config.layer_types == ["full_attention", "sliding_attention"]
    return seeded(lambda: Qwen2ForCausalLM(config))


def gpt2() -> Any:
    """Learned positions: there is none beyond the 64th."""
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    return seeded(lambda: GPT2LMHeadModel(config))


every_model = pytest.mark.parametrize("build", [llama, mistral, qwen, qwen_mixed])


@torch.inference_mode()
def plain_rows(model: Any, ids: Sequence[int]) -> Tensor:
    """All rows of the model's own forward, without any cache."""
    found: Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()
    return found


def plain(model: Any, ids: Sequence[int]) -> Tensor:
    """The last of them."""
    return plain_rows(model, ids)[-1]


@pytest.fixture
def start() -> Iterator[Callable[..., BatchedModel]]:
    """Builds runners and closes them at the end."""
    opened: list[BatchedModel] = []

    def build(model: Any, **options: Any) -> BatchedModel:
        opened.append(BatchedModel(model, name="tiny", **options))
        return opened[-1]

    yield build
    for runner in opened:
        runner.close()


Ask = tuple[Sequence[int], int, int]
"""The arguments of `rows`: ids, how many rows, how many ids are settled."""


def rows_together(runner: BatchedModel, asks: Sequence[Ask]) -> list[Tensor]:
    """Ask for several rows of each at once."""

    async def run() -> list[Tensor]:
        return await asyncio.gather(*(runner.rows(ids, count, num_settled=settled) for ids, count, settled in asks))

    return asyncio.run(run())


def check_rows(model: Any, asks: Sequence[Ask], found: Sequence[Tensor]) -> None:
    """They are those of the plain forward."""
    for (ids, count, _), rows in zip(asks, found, strict=True):
        torch.testing.assert_close(rows, plain_rows(model, ids)[-count:], rtol=1e-4, atol=1e-4)


def together(runner: BatchedModel, requests: Sequence[Sequence[int]]) -> list[Tensor]:
    """Ask for all rows at once."""

    async def run() -> list[Tensor]:
        return await asyncio.gather(*(runner.last_row(ids) for ids in requests))

    return asyncio.run(run())


def check(model: Any, requests: Sequence[Sequence[int]], rows: Sequence[Tensor]) -> None:
    """Every row is that of the plain forward."""
    for ids, row in zip(requests, rows, strict=True):
        torch.testing.assert_close(row, plain(model, ids), rtol=1e-4, atol=1e-4)


class Held:
    """Stops the worker before its next batch until all requests wait, so that batches do not depend on timing."""

    def __init__(self, runner: BatchedModel) -> None:
        self._runner = runner
        self._gate, self._reached = threading.Event(), threading.Event()

    async def ask(self, requests: Sequence[Sequence[int]]) -> list[asyncio.Future[Tensor]]:
        """Queue a first request whose forward waits at the gate, then all `requests`."""
        runner, forward = self._runner, self._runner._forward

        def held(group: Any) -> None:
            runner._forward = forward  # type: ignore[method-assign]
            self._reached.set()
            assert self._gate.wait(30)
            forward(group)

        runner._forward = held  # type: ignore[method-assign]
        blocker = asyncio.ensure_future(runner.last_row([1]))
        await asyncio.to_thread(self._reached.wait, 30)
        asked = [asyncio.ensure_future(runner.last_row(ids)) for ids in requests]
        await asyncio.sleep(0)  # one turn of the loop: each task runs up to where it waits for its row
        assert runner._queue.qsize() == len(requests)
        return [blocker, *asked]

    def release(self) -> None:
        """Let the worker go on."""
        self._gate.set()


@every_model
@pytest.mark.parametrize("seed", range(3))
def test_interleaved_answers(build: Callable[[], Any], start: Callable[..., BatchedModel], seed: int) -> None:
    """Answers of different lengths, growing by one or a few ids in random turns, with branches: every row is right."""
    model, generator = build(), random.Random(seed)
    runner = start(model, num_slots=4)
    answers = [[generator.randrange(VOCAB) for _ in range(generator.randint(1, 30))] for _ in range(4)]
    for _ in range(25):
        chosen = generator.sample(range(4), generator.randint(1, 4))
        for index in chosen:
            if generator.random() < 0.2:
                other = generator.choice(answers)
                answers[index] = other[: generator.randint(1, len(other))]
            answers[index] = answers[index] + [
                generator.randrange(VOCAB) for _ in range(generator.choice((1, 1, 1, 3, 12)))
            ]
        requests = [answers[index] for index in chosen]
        check(model, requests, together(runner, requests))


@every_model
@pytest.mark.parametrize("seed", range(3))
def test_interleaved_drafts(build: Callable[[], Any], start: Callable[..., BatchedModel], seed: int) -> None:
    """Answers that grow by what is kept of drafts, at random turns: at every position the row is right."""
    model, generator = build(), random.Random(seed)
    runner = start(model, num_slots=4)

    def draft() -> list[int]:
        return [generator.randrange(VOCAB) for _ in range(generator.choice((0, 1, 3, 8, 20)))]

    answers = [[generator.randrange(VOCAB) for _ in range(generator.randint(1, 30))] for _ in range(4)]
    for _ in range(20):
        chosen = generator.sample(range(4), generator.randint(1, 4))
        asks = []
        for index in chosen:
            drafted = [*answers[index], *draft()]
            asks.append((drafted, len(drafted) - len(answers[index]) + 1, len(answers[index])))
            kept = drafted[: generator.randint(len(answers[index]), len(drafted))]
            answers[index] = [*kept, generator.randrange(VOCAB)]
        check_rows(model, asks, rows_together(runner, asks))


def test_a_rejected_draft_stays_in_its_slot(start: Callable[..., BatchedModel]) -> None:
    """However often an answer's draft is contradicted, it costs what is new, and a neighbour is not forgotten."""
    model, generator = llama(), random.Random(4)
    runner = start(model, num_slots=2)
    one, other = ([generator.randrange(VOCAB) for _ in range(50)] for _ in range(2))
    together(runner, [one, other])
    for _ in range(5):
        draft = [generator.randrange(VOCAB) for _ in range(6)]
        before = runner.num_ids_computed
        ask = ([*one, *draft], 7, len(one))
        check_rows(model, [ask], rows_together(runner, [ask]))
        assert runner.num_ids_computed - before == 7  # the last settled id is read again for its row
        # One drafted id is kept, and another one follows.
        one = [*one, draft[0], (draft[1] + 1) % VOCAB]
    before = runner.num_ids_computed
    check(model, [[*other, 5]], together(runner, [[*other, 5]]))
    assert runner.num_ids_computed - before == 1


def test_rows_of_what_is_computed_already(start: Callable[..., BatchedModel]) -> None:
    """Several rows at the end of a known sequence are computed again: those positions, not the ones before."""
    model = qwen_mixed()
    runner = start(model)
    ids = list(range(1, 60))
    together(runner, [ids])
    before = runner.num_ids_computed
    check_rows(model, [(ids, 9, 59)], rows_together(runner, [(ids, 9, 59)]))
    assert runner.num_ids_computed - before == 9


@every_model
def test_more_answers_than_slots(build: Callable[[], Any], start: Callable[..., BatchedModel]) -> None:
    """Nine answers share three slots: slower, never wrong."""
    model, generator = build(), random.Random(5)
    runner = start(model, num_slots=3)
    answers = [[n, *(generator.randrange(VOCAB) for _ in range(n))] for n in range(1, 10)]
    for _ in range(5):
        check(model, answers, together(runner, answers))
        answers = [[*answer, generator.randrange(VOCAB)] for answer in answers]


@every_model
def test_capacity_grows(build: Callable[[], Any], start: Callable[..., BatchedModel]) -> None:
    """An answer far beyond the first capacity keeps what was computed before, and so do its neighbours."""
    model, generator = build(), random.Random(6)
    runner = start(model, num_slots=2)
    long, short = [generator.randrange(VOCAB) for _ in range(100)], [3, 1, 4]
    check(model, [long, short], together(runner, [long, short]))
    long += [generator.randrange(VOCAB) for _ in range(200)]
    assert len(long) > 2 * MIN_CAPACITY
    before = runner.num_ids_computed
    check(model, [long, [*short, 1]], together(runner, [long, [*short, 1]]))
    assert runner.num_ids_computed - before == 201


@every_model
def test_the_same_sequence_again_and_a_shorter_one(
    build: Callable[[], Any], start: Callable[..., BatchedModel]
) -> None:
    """Asking twice, twice at once, and for a beginning gives the right rows each time."""
    model = build()
    runner = start(model, num_slots=3)
    ids = list(range(1, 20))
    requests = [ids, ids, ids[:7], ids[:1], [*ids, 5], ids]
    for _ in range(2):
        check(model, requests, together(runner, requests))
        for request in requests:
            check(model, [request], together(runner, [request]))


def test_only_new_ids_are_computed(start: Callable[..., BatchedModel]) -> None:
    """An answer that grows by one id costs one id; a branch costs what is after the fork."""
    model = llama()
    runner = start(model, num_slots=4)
    ids = list(range(1, 41))
    together(runner, [ids])
    counted = runner.num_ids_computed
    assert counted == 40
    together(runner, [[*ids, 7]])
    assert runner.num_ids_computed == counted + 1
    branch = [*ids[:30], 90, 91]
    check(model, [branch], together(runner, [branch]))
    assert runner.num_ids_computed == counted + 1 + 2
    # The branch left the first answer as it was.
    check(model, [[*ids, 7, 8]], together(runner, [[*ids, 7, 8]]))
    assert runner.num_ids_computed == counted + 1 + 2 + 1


def test_requests_that_wait_travel_together(start: Callable[..., BatchedModel]) -> None:
    """Eight short requests that wait when the worker becomes free cost one forward; alone they cost eight."""
    model = llama()
    runner = start(model, num_slots=16)
    requests = [[n, n + 1, n + 2] for n in range(10, 90, 10)]

    async def run() -> list[Tensor]:
        held = Held(runner)
        asked = await held.ask(requests)
        before = runner.num_forwards
        held.release()
        _, *rows = await asyncio.gather(*asked)
        assert runner.num_forwards - before == 2  # the held one, and one for all eight
        return rows

    check(model, requests, asyncio.run(run()))
    before = runner.num_forwards
    for n in range(10, 90, 10):
        together(runner, [[n, n + 1, n + 2, 5]])
    assert runner.num_forwards - before == len(requests)
    assert runner.busy_s > 0


def travelling(runner: BatchedModel, requests: Sequence[Sequence[int]]) -> tuple[list[Tensor], int]:
    """The rows of requests that wait together, and the number of their forwards."""

    async def run() -> tuple[list[Tensor], int]:
        held = Held(runner)
        asked = await held.ask(requests)
        before = runner.num_forwards
        held.release()
        _, *rows = await asyncio.gather(*asked)
        return rows, runner.num_forwards - before - 1  # the held one

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("num_ids", "num_forwards"),
    [
        ([1, 2, 8, 3], 1),
        ([20, 30, 25], 1),
        ([1, 1, 1, 1, 30], 2),  # four single ids do not wait for a draft, nor are they padded to it
        ([1, 2, SHORT_STEP + 1, SHORT_STEP + 2], 3),  # prompts run alone
    ],
)
def test_similar_lengths_travel_together(
    start: Callable[..., BatchedModel], num_ids: list[int], num_forwards: int
) -> None:
    """Steps of different widths share padded forwards where the padding is cheap; all rows are right."""
    model, generator = mistral(), random.Random(1)
    requests = [[generator.randrange(VOCAB) for _ in range(num)] for num in num_ids]
    rows, found = travelling(start(model, num_slots=8), requests)
    check(model, requests, rows)
    assert found == num_forwards


def test_one_prompt_that_waits_twice_is_read_once(start: Callable[..., BatchedModel]) -> None:
    """Two answers to one long prompt, asked for together: the second takes over what the first has computed."""
    model = llama()
    runner = start(model, num_slots=4)
    prompt = list(range(SHORT_STEP + 10))
    rows, _ = travelling(runner, [prompt, prompt])
    check(model, [prompt, prompt], rows)
    assert runner.num_ids_computed == 1 + len(prompt) + 1  # the held one in front, one id behind
    both = [[*prompt, 7], [*prompt, 8]]
    check(model, both, together(runner, both))
    assert runner.num_ids_computed == 1 + len(prompt) + 1 + 2


def test_padding_at_the_last_position(start: Callable[..., BatchedModel]) -> None:
    """A row that ends where the model's learned positions end is padded beyond them beside a longer step."""
    model, generator = gpt2(), random.Random(2)
    runner = start(model, num_slots=4)
    full, short = ([generator.randrange(VOCAB) for _ in range(num)] for num in (63, 5))
    check(model, [full, short], together(runner, [full, short]))
    requests = [[*full, 1], [*short, *range(12)]]
    rows, num_forwards = travelling(runner, requests)
    check(model, requests, rows)
    assert num_forwards == 1


def test_a_cancelled_request_does_not_disturb_others(start: Callable[..., BatchedModel]) -> None:
    """Requests that are cancelled while they wait are dropped, and the others of the batch are right."""
    model = llama()
    runner = start(model, num_slots=4)
    requests = [[n, 2, 3] for n in range(20, 26)]

    async def run() -> tuple[list[Tensor], int]:
        held = Held(runner)
        blocker, *asked = await held.ask(requests)
        before = runner.num_ids_computed
        for task in asked[::2]:
            task.cancel()
        for _ in range(3):  # a cancellation needs a turn of the loop to reach the worker's future
            await asyncio.sleep(0)
        held.release()
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        await blocker
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[::2])
        rows = [outcome for outcome in outcomes[1::2] if isinstance(outcome, Tensor)]
        return rows, runner.num_ids_computed - before

    rows, num_computed = asyncio.run(run())
    check(model, requests[1::2], rows)
    assert num_computed == 1 + 3 * 3  # the blocker, and nothing for those who left
    check(model, requests, together(runner, requests))


def test_a_failure_reaches_those_who_wait_and_no_one_else(start: Callable[..., BatchedModel]) -> None:
    """An id outside the vocabulary fails its request; afterwards the runner works, with nothing left of the failure."""
    model = llama()
    runner = start(model, num_slots=4)
    good = [1, 2, 3]
    together(runner, [good])
    with pytest.raises(IndexError):
        together(runner, [[1, 2, VOCAB + 5]])
    check(model, [[*good, 4]], together(runner, [[*good, 4]]))


def test_close_ends_the_thread_and_refuses_more(start: Callable[..., BatchedModel]) -> None:
    """After `close` the worker thread has ended, closing again is harmless, and a request is refused."""
    runner = start(llama())
    together(runner, [[1, 2]])
    runner.close()
    assert not runner._thread.is_alive()
    runner.close()
    with pytest.raises(RuntimeError, match="'tiny' is closed"):
        together(runner, [[1, 2]])


def test_close_cancels_or_answers_everyone_who_waits(
    start: Callable[..., BatchedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for ever: each request that was queued before `close` gets a row or is cancelled."""
    model = llama()
    runner = start(model, num_slots=2)

    async def run() -> list[Any]:
        held = Held(runner)
        asked = await held.ask([[n, 2] for n in range(30, 38)])
        joining, join = threading.Event(), runner._thread.join

        def join_and_tell() -> None:
            joining.set()
            join()

        monkeypatch.setattr(runner._thread, "join", join_and_tell)
        closing = asyncio.create_task(asyncio.to_thread(runner.close))
        await asyncio.to_thread(joining.wait, 30)
        held.release()
        async with asyncio.timeout(20):
            await closing
            return list(await asyncio.gather(*asked, return_exceptions=True))

    outcomes = asyncio.run(run())
    assert len(outcomes) == 9
    assert all(isinstance(outcome, Tensor | asyncio.CancelledError) for outcome in outcomes)


def test_no_ids_are_refused(start: Callable[..., BatchedModel]) -> None:
    """There is no row after nothing."""
    runner = start(llama())
    with pytest.raises(ValueError, match="at least one id"):
        together(runner, [[]])
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"2 ids cannot give {count} rows"):
            rows_together(runner, [([1, 2], count, 2)])


def test_an_encoder_is_refused() -> None:
    """A bidirectional model cannot share a KV cache; the error says which model, and what works."""
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    model = seeded(lambda: BertForTokenClassification(BertConfig(**sizes, num_labels=3)))
    with pytest.raises(ConfigError, match=r"'tiny' .BertForTokenClassification. cannot run") as caught:
        BatchedModel(model, name="tiny", is_lm=False)
    assert "Decoder-only" in str(caught.value.hint)


def test_a_token_classifier_on_a_decoder(start: Callable[..., BatchedModel]) -> None:
    """The PCM's kind of model gives its labels' row, as the plain forward does."""
    model = seeded(lambda: LlamaForTokenClassification(LlamaConfig(**SIZES, num_labels=3)))
    runner = start(model, is_lm=False)
    requests = [[1, 2, 3], list(range(20)), [4]]
    rows = together(runner, requests)
    assert all(row.shape == (3,) for row in rows)
    check(model, requests, rows)


def test_rows_belong_to_the_caller(start: Callable[..., BatchedModel]) -> None:
    """A row is a float32 copy: changing it changes nothing in the runner."""
    model = llama()
    runner = start(model)
    (row,) = together(runner, [[1, 2, 3]])
    assert (row.dtype, row.device.type) == (torch.float32, "cpu")
    with torch.inference_mode():
        row.zero_()
    check(model, [[1, 2, 3]], together(runner, [[1, 2, 3]]))


def test_max_length(start: Callable[..., BatchedModel]) -> None:
    """The runner tells how many ids the model can read."""
    assert start(llama()).max_length == 512


def test_unknown_device_is_refused() -> None:
    """A device that this machine has not is an error of the configuration."""
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "gpu"):
        with pytest.raises(ConfigError, match=name):
            choose_device(name)


def test_new_weights_between_two_forwards() -> None:
    """After `swap` rows are those of the new weights alone, also for answers that were half read, and say so."""
    model = llama()
    runner = BatchedModel(model, name="tiny", mark="old")
    ids = list(range(1, 20))

    def load() -> str:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        return "new"

    async def run() -> list[tuple[Tensor, str]]:
        first = await runner.marked_rows(ids[:-1], 1)
        before, _, after = await asyncio.gather(
            runner.marked_rows(ids[:-1], 1), runner.swap(load), runner.marked_rows(ids, 1)
        )
        return [first, before, after]

    try:
        expected_before = plain(model, ids[:-1])
        first, before, after = asyncio.run(run())
        assert [mark for _, mark in (first, before, after)] == ["old", "old", "new"]
        torch.testing.assert_close(first[0][0], expected_before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(before[0][0], expected_before, rtol=1e-4, atol=1e-4)
        check(model, [ids], list(after[0]))
        with pytest.raises(ZeroDivisionError):
            asyncio.run(runner.swap(lambda: 1 // 0))
    finally:
        runner.close()
