"""The zoo in one call: built if it is not there, with a progress bar, and served."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mope_bb.zoo.build import STAGES, Zoo, build_zoo, is_built
from mope_bb.zoo.serving import ZooServer, serve_zoo


@contextmanager
def serve(
    *, size: str = "tiny", seed: int = 0, home: Path | None = None, names: Sequence[str] | None = None
) -> Iterator[ZooServer]:
    """Serve the zoo of `size` and `seed`; the first time it is built, with a progress bar on standard error."""
    with serve_zoo(build_with_bar(size=size, seed=seed, home=home), names=names) as server:
        yield server


def build_with_bar(*, size: str = "tiny", seed: int = 0, home: Path | None = None) -> Zoo:
    """`build_zoo` with progress on standard error: a bar on a terminal, else a line for each model that is trained."""
    from rich.console import Console
    from rich.progress import Progress

    if is_built(size=size, seed=seed, home=home):
        return build_zoo(size=size, seed=seed, home=home)
    console = Console(stderr=True)
    if not console.is_terminal:
        return build_zoo(size=size, seed=seed, home=home, progress=_tell)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("building the zoo (once)", total=len(STAGES))

        def show(name: str, share: float) -> None:
            bar.update(task, description=f"building the zoo (once): {name}", completed=STAGES.index(name) + share)

        return build_zoo(size=size, seed=seed, home=home, progress=show)


def _tell(name: str, share: float) -> None:
    if share == 0.0:
        place = f"{STAGES.index(name) + 1} of {len(STAGES)}"
        print(f"building the zoo (once): {name}, {place}", file=sys.stderr, flush=True)
