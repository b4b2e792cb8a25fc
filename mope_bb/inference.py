"""One worker thread that runs a causal model for many open answers: KV caches kept, requests micro-batched.

A request is the whole sequence of ids; the runner finds the cached sequence that it continues, so callers hold no
session and cannot leak one. Each open answer owns a slot (a row of the KV tensors). A request that extends a slot
computes only its new ids; one that branches off copies the shared part into another slot. All requests that wait when
the worker becomes free travel in one forward, at whatever lengths they are.

Used by the `local` experts and by the PCM. Left out on purpose: paged memory, CUDA graphs.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from transformers import Cache

from mope_bb.errors import ConfigError

SHORT_STEP: Final = 8
"""Requests with at most this many new ids share a forward; longer ones (prompts) run alone, without padding."""
MIN_CAPACITY: Final = 128
SELF_CHECK_TOLERANCE: Final = 1e-2


@dataclass(eq=False, slots=True)
class _Slot:
    row: int
    ids: list[int] = field(default_factory=list)
    last_used: int = 0


@dataclass(eq=False, slots=True)
class _Request:
    ids: list[int]
    future: Future[tuple[Tensor, Any]]


@dataclass(eq=False, slots=True)
class _Swap:
    load: Callable[[], Any]
    future: Future[None]


class SlotCache(Cache):  # type: ignore[misc]  # untyped base
    """KV tensors of shape (slots, heads, capacity, head size) per layer; each row has its own length."""

    def __init__(self, num_slots: int) -> None:
        super().__init__(layers=[])
        self._num_slots = num_slots
        self._kv: list[tuple[Tensor, Tensor] | None] = []
        self._capacity = 0
        self._rows: Tensor | None = None
        self._positions: Tensor | None = None
        self._length = 0

    def prepare(self, rows: Tensor, positions: Tensor, length: int) -> None:
        """The next forward writes at `positions` (B x q) of `rows` (B) and attends to the first `length` positions."""
        self._rows, self._positions, self._length = rows, positions, length
        if length > self._capacity:
            self._capacity = max(MIN_CAPACITY, 2 * length)
            self._kv = [None if pair is None else (self._grown(pair[0]), self._grown(pair[1])) for pair in self._kv]

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(*old.shape[:2], self._capacity, old.shape[3])
        new[:, :, : old.shape[2]] = old
        return new

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (B x heads x q x size); return those of the whole sequences."""
        assert self._rows is not None and self._positions is not None
        while len(self._kv) <= layer_idx:
            self._kv.append(None)
        pair = self._kv[layer_idx]
        if pair is None:
            shape = (self._num_slots, key_states.shape[1], self._capacity)
            pair = (
                key_states.new_zeros(*shape, key_states.shape[3]),
                value_states.new_zeros(*shape, value_states.shape[3]),
            )
            self._kv[layer_idx] = pair
        for store, new in zip(pair, (key_states, value_states), strict=True):
            store[self._rows[:, None], :, self._positions] = new.transpose(1, 2)
        return pair[0][self._rows, :, : self._length], pair[1][self._rows, :, : self._length]

    @torch.no_grad()
    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give row `target` the first `length` positions of row `source`."""
        for pair in self._kv:
            if pair is not None:
                for store in pair:
                    store[target, :, :length] = store[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given explicitly, so this is never used to count."""
        return 0


class BatchedModel:
    """A causal transformers model as a service: ids in, the output row of the last position out."""

    def __init__(self, model: Any, *, name: str, num_slots: int = 16, is_lm: bool = True, mark: Any = None) -> None:
        """`mark` is handed out with every row, until `swap` brings another."""
        self._model = model.eval()
        self._mark = mark
        self._name = name
        self._is_lm = is_lm
        self._device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype
        self._cache = SlotCache(num_slots)
        self._slots = [_Slot(row) for row in range(num_slots)]
        self._clock = 0
        self._queue: queue.SimpleQueue[_Request | _Swap | None] = queue.SimpleQueue()
        self._closed = False
        self.num_forwards = 0
        self.num_ids_computed = 0
        self._self_check()
        self._thread = threading.Thread(target=self._work, name=f"mope-bb-{name}", daemon=True)
        self._thread.start()

    @property
    def max_length(self) -> int | None:
        """How many ids the model can read."""
        limit = getattr(self._model.config, "max_position_embeddings", None)
        return int(limit) if limit else None

    async def last_row(self, ids: Sequence[int]) -> Tensor:
        """The model's output at the last of `ids`: a float32 vector on the CPU."""
        return (await self.marked_row(ids))[0]

    async def marked_row(self, ids: Sequence[int]) -> tuple[Tensor, Any]:
        """`last_row`, and the mark of the weights that computed it."""
        if not ids:
            raise ValueError("a forward needs at least one id")
        future: Future[tuple[Tensor, Any]] = Future()
        self._put(_Request(list(ids), future))
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

    def _work(self) -> None:
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
        try:
            for group in self._grouped(requests):
                self._forward(group)
        except BaseException as error:  # noqa: BLE001  # handed to the callers
            # Whatever went wrong belongs to those who wait; the slots' contents are no longer known.
            self._forget()
            for request in requests:
                if not request.future.done():
                    request.future.set_exception(error)

    def _swap(self, swap: _Swap) -> None:
        self._forget()
        if swap.future.set_running_or_notify_cancel():
            try:
                self._mark = swap.load()
                swap.future.set_result(None)
            except BaseException as error:  # noqa: BLE001  # handed to the caller
                swap.future.set_exception(error)

    def _forget(self) -> None:
        for slot in self._slots:
            slot.ids = []

    def _cancel_waiting(self) -> None:
        while not self._queue.empty():
            if (item := self._queue.get_nowait()) is not None:
                item.future.cancel()

    def _grouped(self, requests: list[_Request]) -> list[list[tuple[_Request, _Slot, int]]]:
        """Give each request a slot and a start; short ones together, long ones each alone."""
        taken: set[int] = set()
        short: list[tuple[_Request, _Slot, int]] = []
        groups: list[list[tuple[_Request, _Slot, int]]] = []
        for request in requests:
            slot, start = self._assign(request.ids, taken)
            taken.add(slot.row)
            if len(request.ids) - start <= SHORT_STEP:
                short.append((request, slot, start))
            else:
                groups.append([(request, slot, start)])
        return [*groups, short] if short else groups

    def _assign(self, ids: list[int], taken: set[int]) -> tuple[_Slot, int]:
        self._clock += 1
        best = max(self._slots, key=lambda slot: _common(slot.ids, ids))
        shared = min(_common(best.ids, ids), len(ids) - 1)
        if best.row in taken or len(best.ids) > shared + 1:
            # The best match belongs to an answer that went elsewhere: branch off into the slot unused for longest.
            target = min((slot for slot in self._slots if slot.row not in taken), key=lambda slot: slot.last_used)
            if target is not best and shared:
                self._cache.copy_prefix(best.row, target.row, shared)
            best = target
        # From here on the slot holds what is computed already; the forward adds the rest.
        best.ids = ids[:shared]
        best.last_used = self._clock
        return best, shared

    @torch.no_grad()
    def _forward(self, group: list[tuple[_Request, _Slot, int]]) -> None:
        num_new = [len(request.ids) - start for request, _, start in group]
        width = max(num_new)
        starts = torch.tensor([start for _, _, start in group], device=self._device)
        rows = torch.tensor([slot.row for _, slot, _ in group], device=self._device)
        padded = [
            request.ids[start:] + [0] * (width - n) for (request, _, start), n in zip(group, num_new, strict=True)
        ]
        outputs = self._run(torch.tensor(padded, device=self._device), rows, starts, last_only=len(group) == 1)
        self.num_ids_computed += sum(num_new)
        for i, ((request, slot, _), n) in enumerate(zip(group, num_new, strict=True)):
            slot.ids = request.ids
            row = outputs[i, -1 if outputs.shape[1] == 1 else n - 1]
            request.future.set_result((row.to("cpu", torch.float32, copy=True), self._mark))

    def _run(self, ids: Tensor, rows: Tensor, starts: Tensor, *, last_only: bool) -> Tensor:
        """One forward of B x q new ids; B x q outputs, or only the last of one row."""
        width = ids.shape[1]
        positions = starts[:, None] + torch.arange(width, device=self._device)
        length = int(positions.max()) + 1
        self._cache.prepare(rows, positions, length)
        self.num_forwards += 1
        outputs = self._model(
            input_ids=ids,
            attention_mask=causal_masks(self._model.config, positions, length, self._dtype),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **({"logits_to_keep": 1} if self._is_lm and last_only else {}),
        )
        logits: Tensor = outputs.logits
        return logits

    @torch.no_grad()
    def _self_check(self) -> None:
        """Refuse architectures that this runner would compute wrongly: compare with the model's plain forward."""
        probe = torch.arange(1, 13, device=self._device)[None] % self._model.config.vocab_size
        row, zero = (
            torch.zeros(1, dtype=torch.long, device=self._device),
            torch.zeros(1, dtype=torch.long, device=self._device),
        )
        try:
            self._run(probe[:, :7], row, zero, last_only=False)
            cached = self._run(probe[:, 7:], row, zero + 7, last_only=False)[0, -1].float()
            plain = self._model(input_ids=probe, use_cache=False).logits[0, -1].float()
        except Exception as error:  # an architecture may fail in any way
            raise self._refusal(str(error)) from error
        gap = float((cached - plain).abs().max())
        scale = SELF_CHECK_TOLERANCE * max(1.0, float(plain.abs().max()))
        if not gap <= (scale if self._dtype == torch.float32 else 20 * scale):
            raise self._refusal(f"outputs differ by {gap:.3g} from the model's own forward")

    def _refusal(self, reason: str) -> ConfigError:
        return ConfigError(
            f"the model {self._name!r} ({type(self._model).__name__}) cannot run with a shared KV cache: {reason}",
            hint="Decoder-only attention models work (Llama, Qwen, Mistral, ...); serve others behind an engine.",
        )


def causal_masks(config: Any, positions: Tensor, length: int, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """Additive causal masks (B x 1 x q x length) for new ids at `positions` (B x q), one per kind of layer.

    Padding at the end of a row lies after its last true position, so no true position ever sees it.
    """

    def additive(allowed: Tensor) -> Tensor:
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
            ~allowed, torch.finfo(dtype).min
        )

    keys = torch.arange(length, device=positions.device)
    allowed = keys <= positions[:, None, :, None]
    window = getattr(config, "sliding_window", None)
    near = allowed if window is None else allowed & (keys > positions[:, None, :, None] - window)
    if getattr(config, "layer_types", None):
        return {"full_attention": additive(allowed), "sliding_attention": additive(near)}
    return additive(near)


def _common(left: list[int], right: list[int]) -> int:
    """Length of the common prefix."""
    shorter = min(len(left), len(right))
    if left[:shorter] == right[:shorter]:
        return shorter
    low, high = 0, shorter
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle)
    return low


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
