"""The command line in this process."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from mope_bb.cli.main import main


@dataclass(frozen=True)
class Result:
    """What a run of the command line left behind."""

    status: int
    out: str
    err: str

    def assert_refused(self, status: int, *parts: str) -> None:
        """One `error:` line with `parts`, one `hint:` line, and this exit status; before them perhaps the cost."""
        lines = [line for line in self.err.splitlines() if " tokens read, " not in line]
        assert [line.split(":")[0] for line in lines] == ["error", "hint"], self.err
        assert all(part in self.err for part in parts), self.err
        assert "Traceback" not in self.err + self.out
        assert self.out == ""
        assert self.status == status


Run = Callable[..., Result]


@pytest.fixture
def mope(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `mope-bb ARGUMENTS` in this process, with `stdin` piped in."""

    def run(*arguments: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["mope-bb", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Result(int(ended.value.code or 0), out, err)

    return run
