"""Rewards of a Hugging Face sequence classifier with one label, in this process.

The whole conversation is rendered with the model's own chat template and scored at its true last token, whatever the
batch. Shapes: B conversations of a batch, T tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final

import torch

from mope_bb.chat_tokenizer import ChatTokenizer, as_openai
from mope_bb.config import RewardConfig
from mope_bb.errors import RewardError
from mope_bb.inference import check_loaded, choose_device, loading_weights
from mope_bb.rewards.base import Conversation, RewardModel, checked_score

SELF_CHECK_TOLERANCE: Final = 1e-3
"""Largest gap between a score in a padded batch and alone, relative to the scores; wider in half precision."""


class ClassifierReward(RewardModel):
    """Scores conversations of similar length together, the longest first."""

    def __init__(self, dimension: str, model: Any, tokenizer: Any, *, source: str, batch_size: int = 64) -> None:
        """`model` is a sequence classifier on its device, `tokenizer` the transformers tokenizer of `source`.

        Raises RewardError for a model with another number of labels, or whose scores depend on the padding;
        ConfigError for a tokenizer without chat template.
        """
        _check_labels(model.config, source)
        self.dimension = dimension
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._controls = ChatTokenizer(tokenizer, source=source)
        self._source = source
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length: int = min(positions or tokenizer.model_max_length, tokenizer.model_max_length)
        """The most tokens that the model reads."""
        self._batch_size = batch_size
        # Padding is a setting of the model (see `_forward`), so batches go one at a time.
        self._lock = threading.Lock()
        self._self_check()

    def score(self, conversations: Sequence[Conversation]) -> list[float | RewardError]:
        encoded = [self._encode(conversation) for conversation in conversations]
        scores: dict[int, float | RewardError] = {
            place: one for place, one in enumerate(encoded) if isinstance(one, RewardError)
        }
        rows = [(place, ids) for place, ids in enumerate(encoded) if not isinstance(ids, RewardError)]
        rows.sort(key=lambda row: -len(row[1]))  # longest first: what does not fit into memory shows at once
        with self._lock:
            for start in range(0, len(rows), self._batch_size):
                batch = rows[start : start + self._batch_size]
                found = self._score_batch([ids for _, ids in batch])
                scores |= zip((place for place, _ in batch), found, strict=True)
        return [scores[place] for place in range(len(encoded))]

    def close(self) -> None:
        with self._lock:
            self._model = None

    def _encode(self, conversation: Conversation) -> list[int] | RewardError:
        """The ids of the conversation."""
        for message in conversation:
            if (token := self._controls.control_token_in(message.content)) is not None:
                return RewardError(
                    f"the reward model of {self.dimension!r} cannot score a message that holds {token!r}, one of its "
                    "control tokens"
                )
        try:
            rendered = self._tokenizer.apply_chat_template(
                [as_openai(message) for message in conversation], tokenize=False, add_generation_prompt=False
            )
            ids: list[int] = self._tokenizer.encode(rendered, add_special_tokens=False, verbose=False)
        except Exception as error:  # noqa: BLE001  # templates raise what they like, such as "no system role"
            return RewardError(f"the chat template of {self._source!r} refuses this conversation: {_reason(error)}")
        if not 0 < len(ids) <= self.max_length:
            return RewardError(
                f"the conversation has {len(ids)} tokens, the reward model of {self.dimension!r} reads 1 to "
                f"{self.max_length}"
            )
        return ids

    def _score_batch(self, batch: Sequence[list[int]]) -> list[float | RewardError]:
        if self._model is None:
            return [RewardError(f"the reward model of {self.dimension!r} is closed") for _ in batch]
        try:
            values = self._forward(batch)
        except RuntimeError as error:  # such as no memory left; costs this batch
            failed = RewardError(f"the reward model of {self.dimension!r} failed: {_reason(error)}")
            return [failed for _ in batch]
        return [checked_score(value, self.dimension) for value in values]

    @torch.inference_mode()
    def _forward(self, batch: Sequence[list[int]]) -> list[float]:
        """B scores. Decoders read the last token that is not padding: the padding must be an id that no text holds.

        A tokenizer's own padding will not do: often it is the end token, which closes the conversation too.
        """
        config = self._model.config.get_text_config()
        used = {token for ids in batch for token in ids}
        padding = next((token for token in range(config.vocab_size) if token not in used), None)
        config.pad_token_id = padding
        if padding is None and len(batch) > 1:
            # A tiny vocabulary, all of it in use: a row alone needs no padding.
            return [score for ids in batch for score in self._forward([ids])]
        width = max(len(ids) for ids in batch)
        ids = torch.tensor([[*ids, *[padding] * (width - len(ids))] for ids in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in batch])
        outputs = self._model(input_ids=ids.to(self._model.device), attention_mask=mask.to(self._model.device))
        scores: list[float] = outputs.logits[:, 0].float().tolist()
        return scores

    def _self_check(self) -> None:
        """Refuse models that read another token than the last, or see the padding: compare with one row alone."""
        short = [1 + n % 5 for n in range(7)]
        try:
            together, alone = self._forward([short, short * 3])[0], self._forward([short])[0]
        except Exception as error:  # an architecture may fail in any way
            raise self._refusal(_reason(error)) from error
        tolerance = SELF_CHECK_TOLERANCE * max(1.0, abs(alone))
        if not abs(together - alone) <= (tolerance if self._model.dtype == torch.float32 else 50 * tolerance):
            raise self._refusal(f"a score is {alone:.4g} alone and {together:.4g} in a batch")

    def _refusal(self, reason: str) -> RewardError:
        return RewardError(f"the reward model {self._source!r} ({type(self._model).__name__}) cannot score: {reason}")


def open_classifier(dimension: str, config: RewardConfig) -> ClassifierReward:
    """Load the folder or hub name `config.path`. Raises RewardError, and ConfigError for a missing device."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    path, device = str(config.path), choose_device(config.device)
    # float32 on the CPU, where half precision is slow and inexact; the model's own type on a GPU.
    dtype = torch.float32 if device.type == "cpu" else "auto"
    try:
        _check_labels(AutoConfig.from_pretrained(path, trust_remote_code=False), path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        with loading_weights():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
    except RewardError:
        raise
    except Exception as error:  # noqa: BLE001  # transformers raises whatever its parsers raise
        raise RewardError(
            f"dimension {dimension!r}: the reward model {path!r} cannot be loaded: {_reason(error)}",
            hint="`path` is the folder of a Hugging Face sequence classifier.",
        ) from None
    check_loaded(report, path)
    return ClassifierReward(dimension, model.to(device), tokenizer, source=path, batch_size=config.batch_size)


def _check_labels(config: Any, source: str) -> None:
    if config.num_labels != 1:
        raise RewardError(
            f"the model {source!r} has {config.num_labels} labels, a reward model has 1",
            hint="Name a sequence classifier that was trained with num_labels=1, not a causal or a multi-class model.",
        )


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
