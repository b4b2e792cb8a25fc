"""What only a process of its own shows: imports, signals, broken pipes and the terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from mope_bb.config import load_config

if TYPE_CHECKING:
    from mope_bb.zoo import Zoo
    from tests.cli.conftest import StandIn

MOPE = [sys.executable, "-m", "mope_bb"]
HEAVY = ("torch", "transformers", "openai", "xllamacpp", "pydantic", "rich")


@pytest.mark.parametrize(
    "code",
    [
        "import mope_bb",
        "import mope_bb.zoo",
        "from mope_bb.cli.main import cli; cli.main(['--help'], standalone_mode=False)",
        "from mope_bb.cli.main import cli; cli.main(['chat', '--help'], standalone_mode=False)",
    ],
)
def test_what_is_imported(code: str) -> None:
    """Help and the package itself load nothing that takes long."""
    check = f"{code}\nimport sys\nfound = [name for name in {HEAVY!r} if name in sys.modules]\nassert not found, found"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_module_and_version() -> None:
    """`python -m mope_bb` is the command."""
    found = subprocess.run([*MOPE, "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("mope-bb, version ")


def test_reader_that_goes_away(scripted_config: str) -> None:
    """`mope-bb chat ... | head -c 1` is no error."""
    read, write = os.pipe()
    os.close(read)
    arguments = [*MOPE, "chat", "-c", scripted_config, "--once", "hi"]
    with os.fdopen(write, "wb") as stdout:
        found = subprocess.run(arguments, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    assert found.stderr == ""
    assert found.returncode == 0


def test_closed_standard_input(scripted_config: str) -> None:
    """Without a standard input there is nothing to answer."""
    arguments = f"exec {' '.join(MOPE)} chat -c {scripted_config} <&-"
    found = subprocess.run(["sh", "-c", arguments], capture_output=True, text=True, check=False)
    assert found.stderr.startswith("error: the prompt is empty\nhint: ")
    assert found.returncode == 2


def test_ctrl_c_ends_one_question(stand_in: StandIn) -> None:
    """Exit status 130, and no traceback."""
    stand_in.hangs = True
    arguments = [*MOPE, "chat", "-c", stand_in.config, "--once", "hi"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert stand_in.asked.wait(60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (out, err.strip()) == ("", "")
    assert process.returncode == 130


def test_ctrl_c_ends_the_served_zoo(nano: Zoo, zoo_home: Path, tmp_path: Path) -> None:
    """Ctrl-C is how `zoo serve` is meant to end: status 0, and the servers are gone."""
    config = tmp_path / "mope.toml"
    arguments = [*MOPE, "zoo", "serve", "--size", nano.size, "--config", str(config)]
    environment = {**os.environ, "MOPE_BB_HOME": str(zoo_home)}
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        assert any(line.startswith("Serving") for line in process.stderr)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert "base" in out and "Traceback" not in err
    assert process.returncode == 0
    address = httpx.URL(load_config(config).experts[0].addresses[0])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address.host, address.port or 0))


class Terminal:
    """A `mope-bb chat` in a terminal of its own."""

    def __init__(self, descriptor: int, process: subprocess.Popen[bytes]) -> None:
        self._descriptor = descriptor
        self.process = process
        self.shown = ""

    def read_until(self, text: str) -> str:
        """What is shown up to and with `text`."""
        deadline = time.monotonic() + 60
        while text not in self.shown:
            ready, _, _ = select.select([self._descriptor], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in {self.shown!r}"
            self.shown += os.read(self._descriptor, 4096).decode()
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def send(self, text: str) -> None:
        """Type `text`."""
        os.write(self._descriptor, text.encode())

    def interrupt_prompt(self) -> None:
        """Type Ctrl-C at an idle prompt, again until it is noticed.

        Between showing the prompt and waiting for a key, Python's readline keeps a signal until the next one; no
        person types that fast, a test does.
        """
        for _ in range(30):
            self.send("\x03")
            ready, _, _ = select.select([self._descriptor], [], [], 2.0)
            if ready:
                # The terminal echoes ^C at once, whether or not the program has seen it.
                self.shown += os.read(self._descriptor, 4096).decode()
                if "Ctrl-D" in self.shown or select.select([self._descriptor], [], [], 2.0)[0]:
                    return

    def ask(self, line: str) -> str:
        """Type a line; what is shown until the next prompt."""
        self.send(line + "\n")
        return self.read_until("\n> ")


@contextmanager
def open_terminal(*arguments: str) -> Iterator[Terminal]:
    """A conversation at its first prompt."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1"}
    with subprocess.Popen(
        ["setsid", "--ctty", "--wait", *MOPE, "chat", *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True,
    ) as process:  # fmt: skip
        os.close(theirs)
        try:
            terminal = Terminal(ours, process)
            terminal.read_until("> ")
            yield terminal
        finally:
            process.kill()
            os.close(ours)


def test_conversation(stand_in: StandIn) -> None:
    """Questions, commands, mistakes; Ctrl-C stops an answer and not the program; Ctrl-D ends it."""
    with open_terminal("-c", stand_in.config, "--temperature", "0") as terminal:
        assert "Ask something first." in terminal.ask("/why")
        assert "ok.\r\n" in terminal.ask("hi")
        why = terminal.ask("/why")
        assert "ok.⏹" in why and "solo" in why and "100%" in why

        stand_in.hangs = True
        stand_in.asked.clear()
        terminal.send("and now?\n")
        assert stand_in.asked.wait(60)
        terminal.send("\x03")
        assert "stopped" in terminal.read_until("\n> ")
        stand_in.hangs = False
        stand_in.released.set()
        assert "ok.\r\n" in terminal.ask("again")

        assert "unknown command '/nope'" in terminal.ask("/nope")
        assert "Did you mean 'concise'?" in terminal.ask("/pref concis")
        assert "Preference: concise=2 (solo 100%)." in terminal.ask("/pref concise=2")
        assert "Merge rule: geometric." in terminal.ask("/merge geometric")
        assert "unknown merge rule" in terminal.ask("/merge median")
        assert "Merge rule: geometric." in terminal.ask("/merge")
        assert "geometric" in terminal.ask("hi")
        assert "forgotten" in terminal.ask("/new")
        assert "/pref PREF" in terminal.ask("/help")
        terminal.interrupt_prompt()
        assert "Ctrl-D" in terminal.read_until("\n> ")
        stand_in.breaks_after = 2
        assert "ok\r\nerror: " in terminal.ask("hi")
        terminal.send("\x04")
        assert terminal.process.wait(60) == 0


def test_conversation_that_cannot_begin(scripted_config: str) -> None:
    """A wrong preference is told before the first question."""
    ours, theirs = pty.openpty()
    arguments = [*MOPE, "chat", "-c", scripted_config, "-p", "concis"]
    found = subprocess.run(arguments, stdin=theirs, capture_output=True, text=True, check=False)
    os.close(theirs)
    os.close(ours)
    assert found.stderr.startswith("error: 'concis'")
    assert found.returncode == 2
