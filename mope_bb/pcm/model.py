"""The Preference Control Model: a small causal token classifier with one label per expert.

On disk it is a Hugging Face folder (safetensors, loads in plain transformers) with a `mope.json` beside it. Its head
starts at zero, so an untrained PCM is exactly the user's own weighted mixture or product.

    s_i = head_i(h_t) + u . phi_i        phi: see `pcm.features`; u is shared by the experts and starts at zero
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from mope_bb.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mope_bb.errors import CheckpointError
from mope_bb.inference import check_loaded, loading_weights
from mope_bb.pcm.features import FEATURES
from mope_bb.preferences import PROMPT_LAYOUT

FORMAT: Final = 1
HEADS: Final = ("score", "classifier")
"""What transformers calls the last layer of a token classifier."""


@dataclass(eq=False)
class PreferenceControlModel:
    """Backbone, head and feature weights, with the names that the head's rows belong to."""

    model: Any
    """An `AutoModelForTokenClassification` with a causal backbone."""
    tokenizer: ChatTokenizer
    tokenizer_source: Any
    """The transformers tokenizer, to be saved with the model."""
    experts: tuple[str, ...]
    """Names of the head's rows."""
    feature_weights: Tensor
    """u, (F,)."""
    policy_version: int = 0
    """Learner steps behind these weights; 0 = untrained."""
    rule: str | None = None
    """The merge rule that it was trained for; None while it is untrained."""

    @property
    def is_trained(self) -> bool:
        """Whether the scores depend on anything."""
        return self.policy_version > 0

    def save(self, folder: Path) -> None:
        """Write the folder; plain transformers can load it. A LoRA adapter is merged, and kept beside it."""
        model = self.model
        if hasattr(model, "merge_and_unload"):
            model.save_pretrained(folder / "adapter")
            model = deepcopy(model).merge_and_unload()
        model.save_pretrained(folder)
        self.tokenizer_source.save_pretrained(folder)
        document = {
            "format": FORMAT,
            "experts": list(self.experts),
            "features": dict(zip(FEATURES, self.feature_weights.tolist(), strict=True)),
            "prompt_layout": PROMPT_LAYOUT,
            "policy_version": self.policy_version,
            "rule": self.rule,
        }
        (folder / "mope.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, eq=False)
class PolicyWeights:
    """A copy of all that training changes in a PCM, at one version."""

    tensors: Mapping[str, Tensor]
    """Parameters by name, on the CPU."""
    feature_weights: Tensor
    policy_version: int

    @classmethod
    def of(cls, pcm: PreferenceControlModel) -> PolicyWeights:
        """The present weights of `pcm`: of its trainable parameters, of all of them where none is frozen."""
        tensors = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in pcm.model.named_parameters()
            if parameter.requires_grad
        }
        return cls(tensors, pcm.feature_weights.detach().clone(), pcm.policy_version)

    @torch.no_grad()
    def load_into(self, pcm: PreferenceControlModel) -> None:
        """Give `pcm` these weights. It is the same model as the one that they come from, or a copy of it."""
        parameters = dict(pcm.model.named_parameters())
        for name, tensor in self.tensors.items():
            parameters[name].copy_(tensor)
        pcm.feature_weights.copy_(self.feature_weights)
        pcm.policy_version = self.policy_version


def build_pcm(backbone: str, experts: Sequence[str], *, device: torch.device | None = None) -> PreferenceControlModel:
    """An untrained PCM on the body of `backbone` (a folder or hub name). Raises CheckpointError."""
    labels = dict(enumerate(experts))
    names = {"id2label": labels, "label2id": {name: row for row, name in labels.items()}}
    model = _load(backbone, is_new=True, num_labels=len(experts), **names)
    head = _head(model, len(experts), backbone)
    nn.init.zeros_(head.weight)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return _assemble(model, backbone, tuple(experts), features=torch.zeros(len(FEATURES)), version=0, device=device)


def load_pcm(path: str, *, device: torch.device | None = None) -> PreferenceControlModel:
    """Load a folder that `PreferenceControlModel.save` wrote. Raises CheckpointError."""
    file = Path(path) / "mope.json"
    try:
        document = parse_document(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path!r} is not a PCM folder: it has no mope.json") from None
    except (OSError, UnicodeDecodeError, CheckpointError) as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error}", hint=getattr(error, "hint", None)) from None
    model = _load(path)
    if model.config.num_labels != len(document.experts):
        raise CheckpointError(
            f"{path!r} has {model.config.num_labels} labels, but mope.json names {len(document.experts)} experts"
        )
    features = torch.tensor(document.features)
    pcm = _assemble(model, path, document.experts, features=features, version=document.policy_version, device=device)
    pcm.rule = document.rule
    return pcm


@dataclass(frozen=True, slots=True)
class PcmDocument:
    """What `mope.json` says of the model beside it."""

    experts: tuple[str, ...]
    features: tuple[float, ...]
    """F weights, in the order of FEATURES."""
    policy_version: int
    rule: str | None


def parse_document(text: str) -> PcmDocument:
    """The content of a `mope.json`. Raises CheckpointError."""
    try:
        found = json.loads(text)
        if (found["format"], found["prompt_layout"]) != (FORMAT, PROMPT_LAYOUT):
            raise CheckpointError(
                f"it has format {found['format']!r:.50}, layout {found['prompt_layout']!r:.50}; expected {FORMAT} and "
                f"{PROMPT_LAYOUT!r}",
                hint="It was written by another version of mope-bb.",
            )
        experts, version, rule = found["experts"], found["policy_version"], found.get("rule")
        features = tuple(float(found["features"][name]) for name in FEATURES)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"not what mope-bb writes there: {error!r:.200}") from None
    is_sound = (
        isinstance(experts, list)
        and all(isinstance(name, str) for name in experts)
        and 0 < len(set(experts)) == len(experts)
        and all(map(math.isfinite, features))
        and type(version) is int
        and version >= 0
        and (rule is None or isinstance(rule, str))
    )
    if not is_sound:
        raise CheckpointError("not what mope-bb writes there: names, numbers or version are of another kind")
    return PcmDocument(tuple(experts), features, version, rule)


def _assemble(
    model: Any, source: str, experts: tuple[str, ...], *, features: Tensor, version: int, device: torch.device | None
) -> PreferenceControlModel:
    from transformers import AutoTokenizer

    _switch_off_dropout(model)
    model.eval()
    _check_causal(model, source)
    if device is not None:
        model.to(device)
        if device.type == "cuda":
            round_weights(model)
    tokenizer = load_chat_tokenizer(source)
    return PreferenceControlModel(
        model,
        tokenizer,
        AutoTokenizer.from_pretrained(source, trust_remote_code=False),
        experts,
        features,
        policy_version=version,
    )


def round_weights(model: nn.Module) -> None:
    """Let `model` compute in bfloat16, as one that is loaded in it: its parameters change their type.

    Its buffers do not, as they would by `model.to(torch.bfloat16)`: the frequencies of rotary positions have too many
    digits for it, and a thousand tokens on, a rounded one is a whole turn off.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def _load(path: str, *, is_new: bool = False, **options: Any) -> Any:
    from transformers import AutoModelForTokenClassification

    options |= {"dtype": torch.float32, "output_loading_info": True}
    try:
        with loading_weights():
            model, report = AutoModelForTokenClassification.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # noqa: BLE001  # transformers raises whatever its parsers raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"the PCM backbone {path!r} cannot be loaded: {reason}") from None
    check_loaded(report, path, new=HEADS if is_new else ())
    return model


def _head(model: Any, num_experts: int, source: str) -> nn.Linear:
    for name in HEADS:
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear) and head.out_features == num_experts:
            return head
    raise CheckpointError(f"{source!r} ({type(model).__name__}) has no linear token-classification head")


def _switch_off_dropout(model: nn.Module) -> None:
    """Sampling and learning must compute the same numbers, so nothing may be random in training mode either."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]  # a plain float in transformers' layers


@torch.inference_mode()
def _check_causal(model: Any, source: str) -> None:
    """Refuse encoders: a score must not depend on what comes later."""
    first, second = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 4]])
    one, other = (model.base_model(input_ids=ids.to(model.device)).last_hidden_state[0, :2] for ids in (first, second))
    if not torch.allclose(one, other, atol=1e-5):
        raise CheckpointError(
            f"the PCM backbone {source!r} ({type(model).__name__}) is not causal",
            hint="Use a decoder such as Llama, Qwen or Mistral.",
        )
