"""The embedded zoo: a tiny language, a base and six experts trained on it here, served by llama.cpp.

One set of experts among others: nothing outside this package depends on it. Importing it imports no torch, no
transformers and no xllamacpp; the functions do, when they need them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from mope_bb.zoo.language import example_questions
from mope_bb.zoo.wording import DIMENSIONS

if TYPE_CHECKING:
    from mope_bb.zoo.build import Zoo, build_zoo, clear_zoos, is_built, list_zoos
    from mope_bb.zoo.demo import serve
    from mope_bb.zoo.serving import ZooServer, serve_zoo

# Read when torch is loaded: without it the threads of tiny operations spin while they wait for each other, which on a
# machine that also runs the servers costs up to ten times the time of the work itself (docs/design-notes.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_HOMES = {
    "Zoo": "build",
    "build_zoo": "build",
    "clear_zoos": "build",
    "is_built": "build",
    "list_zoos": "build",
    "serve": "demo",
    "serve_zoo": "serving",
    "ZooServer": "serving",
}

__all__ = [
    "DIMENSIONS",
    "Zoo",
    "ZooServer",
    "build_zoo",
    "clear_zoos",
    "example_questions",
    "is_built",
    "list_zoos",
    "serve",
    "serve_zoo",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
