"""Experts in this process: any transformers causal LM, KV-cached, all open answers in one forward."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from mope_bb.cache import DistributionCache
from mope_bb.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mope_bb.config import ExpertConfig
from mope_bb.errors import ConfigError, ContextLengthError, ProviderTimeoutError
from mope_bb.inference import BatchedModel, check_loaded, choose_device, loading_weights
from mope_bb.providers.base import Capabilities, IdExpert, build_distribution
from mope_bb.providers.drafting import build_step
from mope_bb.providers.wire import Entry, Position
from mope_bb.readings import Reading, Tensors, exact
from mope_bb.types import END, Context, DraftStep, Message, Piece, TokenDistribution

CAPABILITIES: Final = Capabilities(score="start_len", logprob_noise=1e-5, drafts="exact")


@dataclass(frozen=True, slots=True)
class Top:
    """A `Reading`: the logprobs of the `width` best ids, and these ids, (N, width) each, the best first."""

    width: int

    def __call__(self, rows: Tensor) -> Tensors:
        # The best are found among the model's own numbers, which takes a fraction of the time.
        values, ids = torch.topk(rows, self.width)
        return (exact(values).cpu() - log_totals(rows).cpu(), ids.cpu())


@dataclass(frozen=True, slots=True)
class TopAndDrawn:
    """A `Reading`: what `top` gives, and an id drawn as `draw_token` does with its logprob, (N, 1) each."""

    top: Top
    temperature: float
    uniform: float

    def __call__(self, rows: Tensor) -> Tensors:
        logits = exact(rows)
        drawn = torch.tensor([[draw_token(row, self.temperature, self.uniform)] for row in logits])
        return (*self.top(rows), drawn, logits.gather(1, drawn.to(logits.device)).cpu() - log_totals(rows).cpu())


def log_totals(rows: Tensor) -> Tensor:
    """What turns logits (N, V) into logprobs by subtraction, (N, 1) in float64."""
    return torch.logsumexp(exact(rows), dim=-1, keepdim=True)


class _List(NamedTuple):
    """One position."""

    entries: tuple[Entry, ...]
    distribution: TokenDistribution


class LocalExpert(IdExpert):
    """A causal LM loaded here."""

    capabilities = CAPABILITIES

    def __init__(
        self,
        name: str,
        model: BatchedModel,
        tokenizer: ChatTokenizer,
        *,
        source: str,
        system: str | None = None,
        timeout_s: float = 60.0,
        cache: DistributionCache | None = None,
    ) -> None:
        super().__init__(name, system=system, cache=cache)
        self._model = model
        self._tokenizer = tokenizer
        self._source = source
        self._timeout_s = timeout_s

    async def encode_prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return self._tokenizer.encode_chat(messages, expert=self.name)

    async def encode_start(self) -> tuple[int, ...]:
        return self._tokenizer.start_ids

    async def spell(self, data: bytes) -> tuple[Piece, ...]:
        return self._tokenizer.spell(data)

    async def vocabulary(self) -> Sequence[Piece]:
        return self._tokenizer.pieces

    async def ask(self, ids: tuple[int, ...], top_k: int) -> TokenDistribution:
        values, listed = await self._read(ids, 1, self._top(top_k))
        (found,) = self._lists(values, listed, top_k)
        return found.distribution

    async def score_ids(self, ids: tuple[int, ...], draft: Sequence[Piece], top_k: int) -> Sequence[TokenDistribution]:
        path = self.prefixes(ids, draft)[-1]
        values, listed = await self._read(path, len(draft) + 1, self._top(top_k), num_settled=len(ids))
        return [one.distribution for one in self._lists(values, listed, top_k)]

    async def draft(
        self, context: Context, *, top_k: int, num_tokens: int, temperature: float = 1.0, seed: int | None = None
    ) -> tuple[DraftStep, ...]:
        ids = path = await self.ids_of(context)
        if self._model.max_length is not None:
            num_tokens = max(1, min(num_tokens, self._model.max_length + 1 - len(ids)))
        generator = random.Random(seed)
        steps: list[DraftStep] = []
        while len(steps) < num_tokens and not (steps and steps[-1].piece == END):
            reading = TopAndDrawn(self._top(top_k), temperature, generator.random())
            values, listed, drawn, logprob = await self._read(path, 1, reading, num_settled=len(ids))
            (found,) = self._lists(values, listed, top_k)
            token_id = int(drawn)
            position = Position(found.entries, self._tokenizer.piece(token_id), float(logprob))
            steps.append(build_step(position, found.entries, found.distribution, temperature))
            path = (*path, token_id)
        await self.remember(context, steps, top_k)
        return tuple(steps)

    def _top(self, top_k: int) -> Top:
        # One more than asked per extra end token, since several of them join in one piece: the tokenizer already gives
        # END for each of them.
        return Top(min(self._model.num_outputs, top_k + max(0, len(self._tokenizer.end_ids) - 1)))

    async def _read(
        self, ids: tuple[int, ...], count: int, reading: Reading, *, num_settled: int | None = None
    ) -> Tensors:
        """`reading` of what follows each of the last `count` of `ids`; `num_settled` as for `rows`."""
        limit = self._model.max_length
        if limit is not None and len(ids) > limit:
            raise ContextLengthError(
                f"prompt and answer have {len(ids)} tokens, the model reads at most {limit}",
                expert=self.name,
                provider="local",
            )
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._model.read(ids, count, reading, num_settled=num_settled)
        except TimeoutError:
            raise ProviderTimeoutError(
                f"no answer within {self._timeout_s:g} s", expert=self.name, provider="local"
            ) from None

    def _lists(self, values: Tensor, listed: Tensor, top_k: int) -> Iterator[_List]:
        for ids, row in zip(listed.tolist(), values.tolist(), strict=True):
            entries = tuple(zip(map(self._tokenizer.piece, ids), row, strict=True))
            distribution = build_distribution(
                entries, top_k=top_k, end_ids=(END.token_id,), vocab_size=self._model.num_outputs, expert=self.name
            )
            yield _List(entries, distribution)

    async def fingerprint(self) -> str:
        return self._tokenizer.fingerprint

    async def identity(self) -> tuple[str, ...]:
        return ("local", self._source, self._tokenizer.identity)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._model.close)


def draw_token(logprobs: Tensor, temperature: float, uniform: float) -> int:
    """A token by its logprobs or logits (V) at `temperature`; `uniform` is a number from [0, 1)."""
    if temperature == 0.0:
        return int(logprobs.argmax())
    # Several times faster than torch.multinomial on a large vocabulary.
    cumulative = torch.softmax(logprobs / temperature, dim=-1).cumsum(dim=-1)
    place = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    return min(place, len(logprobs) - 1)


def open_expert(config: ExpertConfig, cache: DistributionCache | None) -> LocalExpert:
    """Load the folder or hub name in `model`. Raises ConfigError."""
    if config.model is None:
        raise ConfigError(f"expert {config.name!r}: `model` is missing", hint="Name a Hugging Face folder.")
    device = choose_device(config.device)
    model = load_model(config.model, device)
    tokenizer = load_chat_tokenizer(config.tokenizer or config.model)
    return LocalExpert(
        config.name,
        BatchedModel(model, name=config.name),
        tokenizer,
        source=" ".join(
            (
                config.identity or _folder_identity(config.model),
                str(model.dtype),  # on a GPU numbers are coarser
                getattr(model.config, "_commit_hash", None) or "",  # the revision, of a hub name
            )
        ),
        system=config.system,
        timeout_s=config.timeout_s,
        # A local forward is cheaper than the disk only for tiny models, but never wrong: honour the setting.
        cache=cache,
    )


def load_model(path: str, device: torch.device) -> Any:
    """The causal LM in the folder, or of the hub name, `path`. Raises ConfigError."""
    from transformers import AutoModelForCausalLM

    try:
        # float32 on the CPU, where half precision is slow and inexact; the model's own type on a GPU.
        dtype = torch.float32 if device.type == "cpu" else "auto"
        with loading_weights():
            model, report = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
    except Exception as error:  # noqa: BLE001  # transformers raises whatever its parsers raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"the model {path!r} cannot be loaded: {reason}") from None
    check_loaded(report, path)
    return model.to(device)


def _folder_identity(path: str) -> str:
    """Name and state of a folder's weights and settings: sizes and times, since hashing gigabytes would take long."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json"))
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{folder.resolve()}:{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"
