"""The experts' colours can be told apart with every kind of colour vision, and stand out from what is behind them."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import mope_bb

Array = npt.NDArray[np.float64]
STYLE = (Path(mope_bb.__file__).parent / "server/page/page.css").read_text(encoding="utf-8")
# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
VISION = {
    "usual": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_CONES = np.array(
    [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
     [0.0883024619, 0.2817188376, 0.6299787005]]
)  # fmt: skip
TO_OKLAB = np.array(
    [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
     [0.0259040371, 0.7827717662, -0.8086757660]]
)  # fmt: skip


def linear(colour: str) -> Array:
    """(3,) of "#rrggbb"."""
    values = np.array([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def oklab(colour: Array) -> Array:
    """(3,) in which distances are as large as they look."""
    found: Array = TO_OKLAB @ np.cbrt(np.maximum(TO_CONES @ colour, 0))
    return found


def contrast(first: str, second: str) -> float:
    """WCAG's ratio."""
    bright, dark = sorted(
        (float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (first, second)), reverse=True
    )
    return (bright + 0.05) / (dark + 0.05)


def both_themes(name: str) -> tuple[str, str]:
    """A variable's colour in the light and in the dark theme."""
    found = re.search(rf"--{name}: light-dark\((#\w{{6}}), (#\w{{6}})\);", STYLE)
    assert found is not None
    return found[1], found[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_experts_can_be_told_apart(theme: int) -> None:
    colours = [both_themes(f"e{number}")[theme] for number in range(8)]
    for matrix in VISION.values():
        seen = [oklab(matrix @ linear(colour)) for colour in colours]
        nearest = min(float(np.linalg.norm(one - other)) for one, other in combinations(seen, 2))
        # The palette of Okabe and Ito, made for this, reaches 0.076.
        assert nearest > 0.09
    assert min(contrast(colour, both_themes("surface")[theme]) for colour in colours) >= 3


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read(theme: int) -> None:
    for ink in ("ink", "soft", "danger"):
        assert contrast(both_themes(ink)[theme], both_themes("surface")[theme]) >= 4.5
        assert contrast(both_themes(ink)[theme], both_themes("page")[theme]) >= 4.5
    # On the strongest ground that a token can have, 40 % of its expert's colour.
    surface = linear_bytes(both_themes("surface")[theme])
    for number in range(8):
        mixed = 0.4 * linear_bytes(both_themes(f"e{number}")[theme]) + 0.6 * surface
        ground = "#" + "".join(f"{round(value):02x}" for value in mixed)
        assert contrast(both_themes("ink")[theme], ground) >= 4.5


def linear_bytes(colour: str) -> Array:
    """(3,) from 0 to 255, as colours are mixed in sRGB."""
    return np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)], dtype=np.float64)
