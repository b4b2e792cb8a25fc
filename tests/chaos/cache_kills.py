"""Processes that share a cache are killed at any moment: what was committed is there, is right, and is paid for once.

A worker does as an answer does: it looks questions up, pays for those that are missing, puts what it got, and notes in
a log of its own, flushed to the disk, that they are committed. Killed ones are replaced at once. The clock is that of
the whole machine, so that logs can be compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from mope_bb.cache import FORMAT, DistributionCache, distribution_key, open_entry
from mope_bb.cache_file import FILE_NAME, CacheFile
from mope_bb.errors import ConfigError
from mope_bb.types import Piece, TokenDistribution

ROOT: Final = Path(__file__).parents[2]
MAX_BYTES: Final = 2**34
SHARE_OF_SCORES: Final = 0.3
"""How often several questions are looked up at a time, as a draft is scored."""
SHARE_OF_YOUNG: Final = 0.2
"""How often a process is killed soon after its start, while it opens the cache."""
MAX_AGE_OF_YOUNG_S: Final = 0.5


@dataclass(frozen=True)
class Kills:
    """What was seen."""

    num_processes: int
    num_kills: int
    num_kills_in_put: int
    """Between the beginning of a put and the note that it is committed."""
    num_kills_while_opening: int
    num_lookups: int
    num_paid: int
    num_committed: int
    num_corrupt: int
    """Entries that cannot be read, or say something else than was paid for; at the end, or in a worker's hands."""
    num_lost: int
    """Entries noted as committed that are not there."""
    num_paid_twice: int
    """Calls paid for a question that somebody had noted as committed before it was looked up."""
    num_stray_files: int
    num_warnings: int
    file_damage: str | None
    seconds: float

    @property
    def is_sound(self) -> bool:
        """Nothing was lost, nothing is wrong, nothing was paid twice."""
        return self.file_damage is None and not any(
            (self.num_corrupt, self.num_lost, self.num_paid_twice, self.num_stray_files, self.num_warnings)
        )


def truth(number: int) -> TokenDistribution:
    """What a paid call answers to question `number`; every hundredth time a long list."""
    chance = random.Random(number)
    length = 4_000 if number % 100 == 0 else 20
    logprobs = sorted((-12.0 * chance.random() for _ in range(length)), reverse=True)
    return TokenDistribution(tuple(Piece(b"%d" % n, n) for n in range(length)), tuple(logprobs), 128_000)


@cache
def key_of(number: int) -> str:
    """Where question `number` is kept."""
    return distribution_key(["kills"], [number], 20)


class LateCache(DistributionCache):
    """A wrong cache, to show that it is noticed: it writes when ten batches have come together."""

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        super().__init__(path, max_bytes=max_bytes)
        self._waiting: list[tuple[str, TokenDistribution]] = []
        self._num_waiting = 0

    async def put_many(self, entries: Sequence[tuple[str, TokenDistribution]]) -> None:
        self._waiting.extend(entries)
        self._num_waiting += 1
        if self._num_waiting % 10 == 0:
            await super().put_many(self._waiting)
            self._waiting.clear()


OPEN_TOGETHER: Final = """
import asyncio, sys
from contextlib import closing
from pathlib import Path
from mope_bb.cache import DistributionCache
from tests.chaos.cache_kills import key_of, truth

number = int(sys.argv[1])
for folder in sys.argv[2:]:
    print("ready", flush=True)
    sys.stdin.readline()
    with closing(DistributionCache(Path(folder), max_bytes=2**30)) as opened:
        asyncio.run(opened.put(key_of(number), truth(number)))
"""


def open_together(folders: Sequence[Path], num_processes: int) -> list[str]:
    """Let so many processes open each of `folders`, which are not there, at one moment, and put question `n` each.

    What they complained of.
    """
    arguments = [str(folder) for folder in folders]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    workers = [
        subprocess.Popen([sys.executable, "-c", OPEN_TOGETHER, str(n), *arguments], cwd=ROOT, text=True, **pipes)
        for n in range(num_processes)
    ]
    for _ in folders:
        for worker in workers:
            assert worker.stdout is not None
            worker.stdout.readline()
        for worker in workers:
            assert worker.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended with an error, which is told below
                worker.stdin.write("go\n")
                worker.stdin.flush()
    return [line for worker in workers for line in worker.communicate()[1].splitlines()]


def measure_kills(
    num_processes: int = 8,
    num_kills: int = 20,
    *,
    num_questions: int = 60_000,
    mean_wait_s: float = 1.0,
    seed: int = 0,
    writes_late: bool = False,
) -> dict[str, Any]:
    """Kill `num_kills` workers among `num_processes`, one every `mean_wait_s` or so; what `Kills` has, and `is_sound`.

    Raises RuntimeError where a worker ends by itself. `writes_late`: with `LateCache`.
    """
    started, chance = time.monotonic(), random.Random(seed)
    num_in_put = num_opening = 0
    with tempfile.TemporaryDirectory(prefix="cache-kills-") as scratch:
        crew = _Crew(Path(scratch), num_questions, writes_late=writes_late)
        with crew.at_work(num_processes) as workers:
            for _ in range(num_kills):
                place, wait_s = chance.randrange(num_processes), chance.uniform(0.0, 2.0 * mean_wait_s)
                if chance.random() < SHARE_OF_YOUNG:
                    place = max(range(num_processes), key=lambda one: workers[one].number)
                    wait_s = chance.uniform(0.0, MAX_AGE_OF_YOUNG_S)
                else:
                    workers[place].wait_until_opened()
                workers[place].kill_after(wait_s)
                num_in_put += workers[place].last_event() == "put"
                num_opening += not workers[place].has_opened()
                workers[place] = crew.hire()
        found = _examine(crew)
    result = Kills(
        num_processes=num_processes,
        num_kills=num_kills,
        num_kills_in_put=num_in_put,
        num_kills_while_opening=num_opening,
        **found,
        seconds=round(time.monotonic() - started, 1),
    )
    return {**asdict(result), "is_sound": result.is_sound}


class _Worker:
    """A process with its log."""

    def __init__(self, number: int, arguments: Sequence[str], scratch: Path) -> None:
        self.number = number
        self.log_path = scratch / f"{number}.log"
        self.error_path = scratch / f"{number}.err"
        with self.error_path.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.cache_kills", str(self.log_path), str(number), *arguments],
                cwd=ROOT,
                stderr=errors,
            )

    def wait_until_opened(self) -> None:
        """Until it has opened the cache. Raises RuntimeError where it ends."""
        while not self.has_opened():
            self._live_for(0.02)

    def kill_after(self, wait_s: float) -> None:
        """SIGKILL. Raises RuntimeError where it has ended by itself."""
        self._live_for(wait_s)
        self._process.kill()
        self._process.wait()

    def _live_for(self, wait_s: float) -> None:
        try:
            status = self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            return
        raise RuntimeError(f"a worker ended with status {status}: {self.error_path.read_text()[-2000:]}")

    def events(self) -> list[dict[str, Any]]:
        """All that it noted, but for a line that it could not end."""
        lines = self.log_path.read_bytes().split(b"\n")[:-1] if self.log_path.exists() else []
        return [json.loads(line) for line in lines]

    def last_event(self) -> str | None:
        events = self.events()
        return events[-1]["event"] if events else None

    def has_opened(self) -> bool:
        return self.log_path.exists() and self.log_path.stat().st_size > 0


class _Crew:
    """All workers, those that were killed too."""

    def __init__(self, scratch: Path, num_questions: int, *, writes_late: bool) -> None:
        self.folder = scratch / "cache"
        self.workers: list[_Worker] = []
        self._scratch = scratch
        self._arguments = [str(self.folder), str(num_questions), str(int(writes_late))]

    def hire(self) -> _Worker:
        self.workers.append(_Worker(len(self.workers), self._arguments, self._scratch))
        return self.workers[-1]

    @contextlib.contextmanager
    def at_work(self, num_processes: int) -> Iterator[list[_Worker]]:
        """So many workers, who all open a folder that is not there yet; killed at the end."""
        working = [self.hire() for _ in range(num_processes)]
        try:
            yield working
        finally:
            for worker in working:
                worker.kill_after(0.0)


def _examine(crew: _Crew) -> dict[str, Any]:
    """Compare the logs with each other and with the file."""
    events = [event for worker in crew.workers for event in worker.events()]
    committed: dict[int, int] = {}
    for event in events:
        if event["event"] == "committed":
            for number in event["numbers"]:
                committed[number] = min(event["at"], committed.get(number, event["at"]))
    paid = [(number, event["at"]) for event in events if event["event"] == "put" for number in event["numbers"]]
    strangers = {FILE_NAME, f"{FILE_NAME}-wal", f"{FILE_NAME}-shm"}
    num_stray_files = sum(path.name not in strangers for path in crew.folder.iterdir())
    numbers = {key_of(number): number for number, _ in paid}
    kept, num_corrupt = set[int](), sum(event["event"] == "wrong" for event in events)
    with closing(CacheFile(crew.folder, version=FORMAT)) as file:
        damage = None
        try:
            file.examine()
        except ConfigError as error:
            damage = str(error)
        for row in file.rows():
            kept.add(numbers.get(row.key, -1))
            num_corrupt += not _is_true(row.key, row.value, numbers)
    return {
        "num_lookups": sum(event["event"] in ("hit", "put") for event in events),
        "num_paid": len(paid),
        "num_committed": len(committed),
        "num_corrupt": num_corrupt,
        "num_lost": len(committed.keys() - kept),
        "num_paid_twice": sum(number in committed and committed[number] < asked_at for number, asked_at in paid),
        "num_stray_files": num_stray_files,
        "num_warnings": sum(len(worker.error_path.read_text().splitlines()) for worker in crew.workers),
        "file_damage": damage,
    }


def _is_true(key: str, value: bytes | None, numbers: dict[str, int]) -> bool:
    try:
        return key in numbers and open_entry(key, value or b"") == truth(numbers[key])
    except ValueError:
        return False


async def work(log_path: Path, seed: int, folder: Path, num_questions: int, *, writes_late: bool) -> None:
    """Ask and pay until the end comes."""
    chance = random.Random(seed)
    kept = (LateCache if writes_late else DistributionCache)(folder, max_bytes=MAX_BYTES)
    descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: str, numbers: Sequence[int] = (), at: int | None = None) -> None:
        line = {"event": event, "numbers": numbers, "at": time.monotonic_ns() if at is None else at}
        os.write(descriptor, json.dumps(line).encode() + b"\n")
        os.fsync(descriptor)

    note("opened")
    while True:
        count = 8 if chance.random() < SHARE_OF_SCORES else 1
        numbers = chance.sample(range(num_questions), count)
        asked_at = time.monotonic_ns()
        found = await kept.get_many([key_of(number) for number in numbers])
        wrong = [number for number, one in zip(numbers, found, strict=True) if one not in (None, truth(number))]
        missing = [number for number, one in zip(numbers, found, strict=True) if one is None]
        if wrong:
            note("wrong", wrong)
        if not missing:
            note("hit", numbers)
        else:
            note("put", missing, asked_at)
            await kept.put_many([(key_of(number), truth(number)) for number in missing])
            note("committed", missing)


if __name__ == "__main__":
    own_log, number, shared, questions, late = sys.argv[1:]
    asyncio.run(work(Path(own_log), int(number), Path(shared), int(questions), writes_late=late == "1"))
