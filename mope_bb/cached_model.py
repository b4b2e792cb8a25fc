"""One forward of a causal transformers model on the KV caches of `slots`, and whether it computes what it should.

Shapes: B rows of a forward, q new ids of each, n positions whose outputs are wanted, V outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from mope_bb.cuda_graphs import StepGraphs
from mope_bb.errors import ConfigError
from mope_bb.slots import SlotCache, causal_masks

TOLERANCE: Final = 1e-2


class CachedModel:
    """The model. It runs one forward at a time, on a GPU those of short steps as CUDA graphs."""

    def __init__(self, model: Any, cache: SlotCache, *, name: str, num_slots: int, is_lm: bool) -> None:
        self._model = model.eval()
        self._cache = cache
        self._name = name
        self._num_slots = num_slots
        self._is_lm = is_lm
        self._device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype
        self._num_ids = int(model.get_input_embeddings().weight.shape[0])
        self.graphs: StepGraphs | None = None
        if self._device.type == "cuda":
            self.graphs = StepGraphs(self.padded_step, cache, self._device, name=name, max_rows=num_slots)
        self.num_forwards = 0

    @property
    def max_length(self) -> int | None:
        """How many ids the model can read."""
        limit = getattr(self._model.config, "max_position_embeddings", None)
        return int(limit) if limit else None

    def run(
        self, new_ids: Sequence[Sequence[int]], rows: Sequence[int], starts: Sequence[int], *, num_outputs: int
    ) -> Tensor:
        """One forward of B rows, padded to q ids; the outputs (B, n, V) at the last `num_outputs` of q or at all q.

        They last until the next forward. Raises IndexError for an id that the model does not know.
        """
        lengths = [len(ids) for ids in new_ids]
        width = max(lengths)
        if (largest := max(map(max, new_ids))) >= self._num_ids:
            # On a GPU, to look it up would be the end of the process's use of that GPU.
            raise IndexError(f"the model {self._name!r} knows the ids below {self._num_ids}, and was given {largest}")
        self.num_forwards += 1
        if self.graphs is not None and (found := self.graphs.run(new_ids, rows, starts)) is not None:
            return found
        self._cache.prepare(rows, starts, width, self._device)
        positions = torch.tensor(starts, device=self._device)[:, None] + torch.arange(width, device=self._device)
        mask = None
        if len(rows) > 1:
            mask = causal_masks(self._model.config, positions, max(starts) + width, self._dtype)
            # Padding may reach beyond the last position that a model knows.
            ends = [start + length - 1 for start, length in zip(starts, lengths, strict=True)]
            positions = positions.minimum(torch.tensor(ends, device=self._device)[:, None])
        outputs = self._model(
            input_ids=torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in new_ids], device=self._device),
            # One row stands in the cache as in transformers' own, whose mask is at least as quick: for one id, none.
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **({"logits_to_keep": num_outputs} if self._is_lm else {}),
        )
        logits: Tensor = outputs.logits
        return logits

    def padded_step(self, ids: Tensor, positions: Tensor, known: Tensor, length: int) -> Tensor:
        """See `cuda_graphs.Forward`."""
        outputs = self._model(
            input_ids=ids,
            attention_mask=causal_masks(self._model.config, positions, length, self._dtype),
            position_ids=known,
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = outputs.logits
        return logits

    @torch.no_grad()
    def check(self) -> int:
        """Refuse architectures that would be computed wrongly: compare with the model's plain forward. Returns V.

        Raises ConfigError.
        """
        probe = [n % self._model.config.vocab_size for n in range(1, 13)]
        try:
            plain = self._model(input_ids=torch.tensor([probe], device=self._device), use_cache=False).logits[0].float()
            self.run([probe[:4]], [0], [0], num_outputs=1)
            found = [self.run([probe[4:7]], [0], [4], num_outputs=3)[0].clone()]
            expected = [plain[4:7]]
            if self._num_slots > 1:  # beside another row, of another length
                mixed = self.run([probe[7:], probe[:9]], [0, 1], [7, 0], num_outputs=9)
                found += [mixed[0, :5], mixed[1]]
                expected += [plain[7:], plain[:9]]
            gap = float((torch.cat(found).float() - torch.cat(expected)).abs().max())
        except Exception as error:  # an architecture may fail in any way
            raise self._refusal(str(error)) from error
        scale = TOLERANCE * max(1.0, float(plain.abs().max()))
        if not gap <= (scale if self._dtype == torch.float32 else 20 * scale):
            raise self._refusal(f"outputs differ by {gap:.3g} from the model's own forward")
        return int(plain.shape[-1])

    def _refusal(self, reason: str) -> ConfigError:
        return ConfigError(
            f"the model {self._name!r} ({type(self._model).__name__}) cannot run with a shared KV cache: {reason}",
            hint="Decoder-only attention models work (Llama, Qwen, Mistral, ...); serve others behind an engine.",
        )
