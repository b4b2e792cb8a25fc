"""The zoo in one call: built if it is not there, with a progress bar, and served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mope_bb.zoo.build import NAMES, Zoo, build_zoo
from mope_bb.zoo.serving import ZooServer, serve_zoo


@contextmanager
def serve(
    *, size: str = "tiny", seed: int = 0, home: Path | None = None, names: Sequence[str] | None = None
) -> Iterator[ZooServer]:
    """Serve the zoo of `size` and `seed`; the first time it is built, with a progress bar on standard error."""
    with serve_zoo(build_with_bar(size=size, seed=seed, home=home), names=names) as server:
        yield server


def build_with_bar(*, size: str = "tiny", seed: int = 0, home: Path | None = None) -> Zoo:
    """`build_zoo` with a progress bar on standard error, which appears only when something must be built."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("building the zoo", total=len(NAMES), visible=False)

        def show(name: str, share: float) -> None:
            # A model that is found intact is reported as done at once: then there is nothing to show.
            building = share < 1 or None
            bar.update(
                task, description=f"building the zoo: {name}", completed=NAMES.index(name) + share, visible=building
            )

        return build_zoo(size=size, seed=seed, home=home, progress=show)
