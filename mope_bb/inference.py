"""One worker thread that runs a causal model for many open answers: KV caches kept, requests micro-batched.

A request is the whole sequence of ids; the runner finds the cached sequence that it continues (`slots`), so callers
hold no session and cannot leak one. A request that extends a slot computes only its new ids; one that branches off
copies the shared part into another slot. All requests that wait when the worker becomes free travel in one forward, at
whatever lengths they are.

Used by the `local` experts and by the PCM. Left out on purpose: paged memory, `torch.compile`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from mope_bb.cached_model import CachedModel
from mope_bb.errors import ConfigError
from mope_bb.readings import Reading, Tensors, whole_rows
from mope_bb.slots import Slot, Slots

SHORT_STEP: Final = 40
"""Requests with at most this many new ids (a token, a draft) share forwards; longer ones (prompts) run alone."""
FORWARD_COST: Final = 32
"""What a forward costs beside its ids, in ids: on a CPU, where reading the weights takes as long as so many ids do.
Requests of different lengths share a forward while the padding that this needs costs less."""


@dataclass(eq=False, slots=True)
class _Request:
    ids: array[int]
    count: int
    num_settled: int
    reading: Reading
    future: Future[tuple[Tensors, Any]]


@dataclass(eq=False, slots=True)
class _Swap:
    load: Callable[[], Any]
    future: Future[None]


@dataclass(frozen=True, eq=False, slots=True)
class _Placed:
    """A request with its slot; `start` of its ids are computed already."""

    request: _Request
    slot: Slot
    start: int

    @property
    def num_new(self) -> int:
        return len(self.request.ids) - self.start


class BatchedModel:
    """A causal transformers model as a service: ids in, the outputs at the last of them out."""

    def __init__(self, model: Any, *, name: str, num_slots: int = 16, is_lm: bool = True, mark: Any = None) -> None:
        """`mark` is handed out with every row, until `swap` brings another."""
        self._mark = mark
        self._name = name
        self._stream = _new_stream(next(model.parameters()).device)
        self._slots = Slots(num_slots)
        self._model = CachedModel(model, self._slots.cache, name=name, num_slots=num_slots, is_lm=is_lm)
        self._queue: queue.SimpleQueue[_Request | _Swap | None] = queue.SimpleQueue()
        self._closed = False
        self.num_ids_computed = 0
        self.busy_s = 0.0
        with self._on_stream():
            self.num_outputs = self._model.check()
            """V."""
        self._thread = threading.Thread(target=self._work, name=f"mope-bb-{name}", daemon=True)
        self._thread.start()

    @property
    def max_length(self) -> int | None:
        """How many ids the model can read."""
        return self._model.max_length

    @property
    def num_forwards(self) -> int:
        """How many there were."""
        return self._model.num_forwards

    async def last_row(self, ids: Sequence[int]) -> Tensor:
        """The model's output at the last of `ids`: a float32 vector on the CPU."""
        return (await self.rows(ids, 1))[0]

    async def rows(self, ids: Sequence[int], count: int, *, num_settled: int | None = None) -> Tensor:
        """The model's outputs at the last `count` of `ids`, in one forward: (count, V), float32, on the CPU.

        `num_settled`: how many of `ids` the caller is sure of, by default all; the rest is a guess (a draft) that later
        requests of the same answer may contradict. They then go on from where they differ, in the same slot.
        Raises ValueError for a `count` that is not from 1 to the number of ids.
        """
        return (await self.marked_rows(ids, count, num_settled=num_settled))[0]

    async def marked_rows(
        self, ids: Sequence[int], count: int, *, num_settled: int | None = None
    ) -> tuple[Tensor, Any]:
        """`rows`, and the mark of the weights that computed them."""
        (rows,), mark = await self._ask(ids, count, num_settled, whole_rows)
        return rows, mark

    async def read(
        self, ids: Sequence[int], count: int, reading: Reading, *, num_settled: int | None = None
    ) -> Tensors:
        """What `reading` makes of `rows`, where they are: whole rows of a large vocabulary are slow to move."""
        return (await self._ask(ids, count, num_settled, reading))[0]

    async def _ask(
        self, ids: Sequence[int], count: int, num_settled: int | None, reading: Reading
    ) -> tuple[Tensors, Any]:
        if not 1 <= count <= len(ids):
            raise ValueError(f"a forward of {len(ids)} ids cannot give {count} rows; it needs at least one id")
        future: Future[tuple[Tensors, Any]] = Future()
        settled = len(ids) if num_settled is None else min(num_settled, len(ids))
        self._put(_Request(array("q", ids), count, settled, reading, future))
        return await asyncio.wrap_future(future)

    async def swap(self, load: Callable[[], Any]) -> None:
        """Call `load` between two forwards; it changes the weights and returns their mark.

        What was computed with the old weights is forgotten: open answers are read again from their beginning, so that
        every row is that of one set of weights.
        """
        future: Future[None] = Future()
        self._put(_Swap(load, future))
        await asyncio.wrap_future(future)

    def _put(self, item: _Request | _Swap) -> None:
        if self._closed:
            raise RuntimeError(f"the model {self._name!r} is closed")
        self._queue.put(item)

    def close(self) -> None:
        """End the worker thread; waiting requests are cancelled."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _work(self) -> None:
        with self._on_stream():
            self._serve_all()

    def _serve_all(self) -> None:
        while True:
            requests: list[_Request] = []
            item = self._queue.get()
            while isinstance(item, _Request):
                requests.append(item)
                if len(requests) == len(self._slots):
                    break
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
            self._serve([request for request in requests if request.future.set_running_or_notify_cancel()])
            if isinstance(item, _Swap):
                self._swap(item)
            elif item is None:
                return self._cancel_waiting()

    def _serve(self, requests: list[_Request]) -> None:
        began = time.perf_counter()
        try:
            taken: set[int] = set()
            short: list[_Placed] = []
            for request in requests:
                slot, start = self._slots.assign(request.ids, request.num_settled, request.count, taken)
                taken.add(slot.row)
                placed = _Placed(request, slot, start)
                if placed.num_new <= SHORT_STEP:
                    short.append(placed)
                else:
                    # At once, so that another request with the same prompt can take over what is computed.
                    self._forward([placed])
            for group in _grouped(short):
                self._forward(group)
        except BaseException as error:  # noqa: BLE001  # handed to the callers
            # Whatever went wrong belongs to those who wait; the slots' contents are no longer known.
            self._slots.forget()
            for request in requests:
                if not request.future.done():
                    request.future.set_exception(error)
        self.busy_s += time.perf_counter() - began

    def _swap(self, swap: _Swap) -> None:
        self._slots.forget()
        if swap.future.set_running_or_notify_cancel():
            try:
                self._mark = swap.load()
                swap.future.set_result(None)
            except BaseException as error:  # noqa: BLE001  # handed to the caller
                swap.future.set_exception(error)

    def _cancel_waiting(self) -> None:
        while not self._queue.empty():
            if (item := self._queue.get_nowait()) is not None:
                item.future.cancel()

    @torch.no_grad()
    def _forward(self, group: list[_Placed]) -> None:
        width = max(one.num_new for one in group)
        # Of all positions that someone asked for, the first one.
        first = min(one.num_new - one.request.count for one in group)
        outputs = self._model.run(
            [one.request.ids[one.start :] for one in group],
            [one.slot.row for one in group],
            [one.start for one in group],
            num_outputs=width - first,
        )
        first = width - outputs.shape[1]
        by_reading: dict[Reading, list[tuple[_Request, Tensor]]] = {}
        for row, one in zip(outputs, group, strict=True):
            one.slot.ids, one.slot.num_settled = one.request.ids, one.request.num_settled
            asked = row[one.num_new - one.request.count - first : one.num_new - first]
            self.num_ids_computed += one.num_new
            by_reading.setdefault(one.request.reading, []).append((one.request, asked))
        for reading, asks in by_reading.items():
            found = reading(torch.cat([rows for _, rows in asks]))
            parts = zip(*(torch.split(one, [len(rows) for _, rows in asks]) for one in found), strict=True)
            for (request, _), part in zip(asks, parts, strict=True):
                request.future.set_result((part, self._mark))


def _new_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream of the model's own on a GPU: there it waits for its own forwards only, not for those of other models."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))  # which loads the weights
    return stream


def _grouped(placed: list[_Placed]) -> Iterator[list[_Placed]]:
    """Who shares a forward, the shortest first; in the order of their rows."""
    group: list[_Placed] = []
    for one in sorted(placed, key=lambda one: one.num_new):
        if group and len(group) * (one.num_new - group[-1].num_new) > FORWARD_COST:
            yield sorted(group, key=lambda one: one.slot.row)
            group = []
        group.append(one)
    if group:
        yield sorted(group, key=lambda one: one.slot.row)


_LOADING = threading.Lock()


@contextmanager
def loading_weights() -> Iterator[None]:
    """Around every `from_pretrained` of a model: one at a time, without progress bars.

    Loading in transformers 5 goes through state of the whole process: two threads that load at once leave weights
    empty. Its bars and reports would run through the answers on a terminal; `check_loaded` reads the report instead.
    """
    from transformers.utils import logging

    with _LOADING:
        logging.disable_progress_bar()
        before = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(before)


def check_loaded(report: Mapping[str, Any], path: str, *, new: Collection[str] = ()) -> None:
    """Raise ConfigError if `from_pretrained(output_loading_info=True)` left weights random, but for the `new` ones."""
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(tuple(new)))
    broken = sorted(str(key) for key in report["mismatched_keys"])
    if missing or broken:
        raise ConfigError(
            f"the checkpoint {path!r} does not fill the model: {len(missing)} weights are missing, {len(broken)} have "
            f"another shape, the first is {(missing or broken)[0]!r}",
            hint="Is it the folder of a whole model, not of an adapter?",
        )


def choose_device(name: str) -> torch.device:
    """`auto` = cuda, else mps, else cpu. Raises ConfigError for a device this machine has not."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} is not available: {str(error).splitlines()[0]}") from None
    return device
