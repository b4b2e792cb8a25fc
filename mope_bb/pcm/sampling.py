"""Drawing one candidate from a merged distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from mope_bb.errors import ConfigError
from mope_bb.types import SamplingOptions


def check_sampling(options: SamplingOptions) -> None:
    """Raise ConfigError for options outside their range."""
    for name, value, kinds in (
        ("temperature", options.temperature, (int, float)),
        ("top_p", options.top_p, (int, float)),
        ("max_tokens", options.max_tokens, (int,)),
        *(("stop", stop, (str,)) for stop in options.stop),
    ):
        if not isinstance(value, kinds):
            raise ConfigError(f"{name} is {value!r}, expected {' or '.join(kind.__name__ for kind in kinds)}")
    if not 0.0 <= options.temperature < float("inf"):
        raise ConfigError(
            f"temperature is {options.temperature:g}, expected 0 or more",
            hint="1 samples as the experts do, 0 is greedy.",
        )
    if not 0.0 < options.top_p <= 1.0:
        raise ConfigError(f"top_p is {options.top_p:g}, expected above 0 and at most 1", hint="1 is off.")
    if options.max_tokens < 1:
        raise ConfigError(f"max_tokens is {options.max_tokens}, expected 1 or more", hint="256 is the default.")
    if any(not stop for stop in options.stop):
        raise ConfigError("a stop string is empty", hint="Leave it out to stop at the end of the answer only.")


def shape_distribution(log_pi: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """log pi (..., C) after temperature, then top_p, normalised; temperature 0 puts everything on the first maximum.

    top_p keeps the smallest set of most probable candidates whose mass reaches top_p.
    """
    if temperature == 0.0:
        best = log_pi.argmax(dim=-1, keepdim=True)
        return torch.full_like(log_pi, -torch.inf).scatter(-1, best, 0.0)
    shaped = torch.log_softmax(log_pi / temperature, dim=-1) if temperature != 1.0 else log_pi
    if top_p < 1.0:
        ranked, order = torch.sort(shaped, descending=True, stable=True)
        before = ranked.exp().cumsum(dim=-1) - ranked.exp()
        is_cut = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        shaped = torch.log_softmax(shaped.masked_fill(is_cut, -torch.inf), dim=-1)
    return shaped


def draw(log_pi: Tensor, uniform: float) -> int:
    """The candidate at which the cumulative probability passes `uniform` in [0, 1): one number, one draw."""
    # A number below 1 times the whole rounds to less than the whole, so a candidate with any probability is found.
    cumulative = log_pi.double().exp().cumsum(dim=-1).numpy()
    return int(cumulative.searchsorted(uniform * cumulative[-1], side="right"))


def draw_rows(log_pi: Tensor, uniforms: Tensor) -> Tensor:
    """`draw` for every row: (B,) from log pi (B, C) and one number each, (B,) float64."""
    cumulative = log_pi.double().exp().cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
