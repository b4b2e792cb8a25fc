"""How all parsers fare with damaged input: `python -m tests.fuzz.measure NUMBER SEED [--save]`.

Whatever comes, a parser accepts it or raises an error of ours. What else happens is a failure, and is kept, one for
each place in the code, in `corpus/`, which `test_fuzz.py` goes through at every run.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import orjson

from mope_bb.chat_tokenizer import ChatTokenizer
from mope_bb.errors import MopeError
from mope_bb.zoo.tokenizing import train_tokenizer
from tests.fuzz.file_parsers import FileParsers
from tests.fuzz.mutations import mutate_bytes, mutate_text, mutate_tree
from tests.fuzz.parsers import Parser, ReplyParsers, check_message

CORPUS: Final = Path(__file__).parent / "corpus"
WIRE_SHARE: Final = 0.3
"""Of the replies, how many come as bytes."""


class Fuzzer:
    """Makes inputs from a seed, and feeds them to the parsers."""

    def __init__(self, replies: ReplyParsers, parsers: Sequence[Parser]) -> None:
        self._replies = replies
        self.parsers = {parser.name: parser for parser in parsers}

    def make(self, parser: Parser, rng: random.Random) -> Any:
        """One input: bytes, text or a tree."""
        seed = parser.seeds[int(rng.random() * len(parser.seeds))]
        if parser.kind == "bytes":
            return mutate_bytes(seed, rng)
        if parser.kind == "text":
            return mutate_text(seed, rng)
        body = orjson.dumps(seed)
        if parser.kind == "reply" and rng.random() < WIRE_SHARE:
            return mutate_bytes(body, rng)
        return mutate_tree(orjson.loads(body), rng, parser.seeds)

    def feed(self, parser: Parser, data: Any) -> str:
        """What became of `data`: "accepted", or the error's name. Raises what no parser may raise."""
        try:
            tree = self._replies.decode(data) if parser.kind == "reply" and isinstance(data, bytes) else data
            parser.parse(tree)
        except parser.refusals as error:
            check_message(error)
            return type(error).__name__
        except MopeError as error:  # of the reply's bytes
            check_message(error)
            return type(error).__name__
        return "accepted"


@contextmanager
def open_fuzzer() -> Iterator[Fuzzer]:
    """A fuzzer of every parser, with a tokenizer of its own."""
    tokenizer = ChatTokenizer(train_tokenizer(0, conversations=200), source="fuzz")
    with tempfile.TemporaryDirectory() as folder:
        replies, files = ReplyParsers(tokenizer), FileParsers(Path(folder))
        parsers = [*replies.all(), *files.all()]
        try:
            yield Fuzzer(replies, parsers)
        finally:
            replies.close()
            files.close()


def measure(num_inputs: int, seed: int, *, corpus: Path | None = None, names: Collection[str] = ()) -> dict[str, Any]:
    """Feed `num_inputs` inputs, the same for the same `seed`: how many each parser accepted and refused, by class.

    Failures are told once for each place in the code, and with `corpus` kept there. `names` are the parsers that take
    part, all by default.
    """
    begun = time.perf_counter()
    rng = random.Random()
    outcomes: dict[str, Counter[str]] = {}
    failures: dict[tuple[str, ...], str] = {}
    slowest_s, slowest = 0.0, ""
    with open_fuzzer() as fuzzer:
        parsers = [parser for parser in fuzzer.parsers.values() if not names or parser.name in names]
        weights = [parser.weight for parser in parsers]
        for number in range(num_inputs):
            rng.seed(seed << 32 | number)  # each input for itself, so that it can be had again alone
            parser = rng.choices(parsers, weights)[0]
            data = fuzzer.make(parser, rng)
            counts = outcomes.setdefault(parser.name, Counter())
            started = time.perf_counter()
            try:
                counts[fuzzer.feed(parser, data)] += 1
            except Exception as error:  # noqa: BLE001  # whatever it is, it is what is looked for
                counts["failed"] += 1
                where = _place(error)
                if (parser.name, *where) not in failures:
                    failures[parser.name, *where] = f"{parser.name}: {' at '.join(where)}: {str(error)[:150]}"
                    if corpus is not None:
                        keep(corpus, parser, data, f"{type(error).__name__} at {where[-1]}")
            if (took_s := time.perf_counter() - started) > slowest_s:
                slowest_s, slowest = took_s, parser.name
    return {
        "num_inputs": num_inputs,
        "seed": seed,
        "parsers": {name: _summary(outcomes[name]) for name in sorted(outcomes)},
        "failures": sorted(failures.values()),
        "slowest_input_s": round(slowest_s, 4),
        "slowest_parser": slowest,
        "wall_s": round(time.perf_counter() - begun, 1),
    }


def _summary(counts: Counter[str]) -> dict[str, Any]:
    refused = {name: number for name, number in sorted(counts.items()) if name not in ("accepted", "failed")}
    total = sum(counts.values())
    return {"inputs": total, "accepted": counts["accepted"], "failed": counts["failed"], "refused": refused}


def _place(error: BaseException) -> tuple[str, str]:
    """The error's class and the innermost line of the package, or of the checks, that it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/mope_bb/" in frame.filename] or frames
    if isinstance(error, AssertionError):
        ours = frames
    return type(error).__name__, f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


def keep(folder: Path, parser: Parser, data: Any, why: str) -> None:
    """Write an input down, so that it is tried at every run."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)  # trees may be deeper than the writer likes
    try:
        shown = {"bytes": data.decode("latin-1")} if isinstance(data, bytes) else {"json": json.dumps(data)}
    finally:
        sys.setrecursionlimit(limit)
    text = json.dumps({"parser": parser.name, "why": why, **shown}, indent=1) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    (folder / f"{parser.name.replace(' ', '_')}_{digest}.json").write_text(text, encoding="utf-8")


def read_kept(path: Path) -> tuple[str, Any]:
    """The parser's name and the input in a file of the corpus."""
    document = json.loads(path.read_text(encoding="utf-8"))
    if "bytes" in document:
        return document["parser"], document["bytes"].encode("latin-1")
    try:
        return document["parser"], orjson.loads(document["json"])  # deep ones
    except orjson.JSONDecodeError:
        return document["parser"], json.loads(document["json"])  # NaN, huge numbers, half surrogate pairs


if __name__ == "__main__":
    found = measure(int(sys.argv[1]), int(sys.argv[2]), corpus=CORPUS if "--save" in sys.argv else None)
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["failures"]))
