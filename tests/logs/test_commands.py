"""`mope-bb chat` records, and `mope-bb logs` shows, finds, exports and deletes."""

from __future__ import annotations

import json
import os
import pty
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mope_bb.config import load_config
from mope_bb.keys import HIDDEN
from mope_bb.logs import open_log
from tests.command_line import Run
from tests.logs.entries import FULL, TOKENS, asking
from tests.security.echo import KEY, TRACES, serve_echo

if TYPE_CHECKING:
    from tests.cli.conftest import StandIn

MOPE = [sys.executable, "-m", "mope_bb"]
CONTROLS = "\x1b[31mred\x07\x9b2J\u202e\r\x08"


def objects(out: str) -> list[dict[str, Any]]:
    """The objects of JSON lines."""
    return [json.loads(line) for line in out.splitlines()]


def exported(mope: Run, *arguments: str) -> list[dict[str, Any]]:
    """What `logs export` writes."""
    result = mope("logs", "export", *arguments)
    assert (result.status, result.err) == (0, "")
    return objects(result.out)


def test_what_is_imported(scripted_config: str) -> None:
    """Looking at chats does not wait for what answers them, help not even for the configuration."""
    open_log().record(FULL)
    for command, heavy in (("--help", ("torch", "pydantic", "rich")), ("list", ("torch", "transformers"))):
        code = f"from mope_bb.cli.main import cli; cli.main(['logs', {command!r}], standalone_mode=False)"
        check = (
            f"{code}\nimport sys\nfound = [name for name in {heavy} if name in sys.modules]\nassert not found, found"
        )
        found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr


def test_an_empty_log(mope: Run, home: Path) -> None:
    """It says so, and how it is filled; nothing is made on disk, and that is no error."""
    for command in ([], ["list"], ["show", "last"], ["search", "x"], ["export"], ["stats"], ["delete", "--all"]):
        result = mope("logs", *command)
        assert (result.status, result.out) == (0, "")
        assert "There is no log at" in result.err and "mope-bb chat" in result.err
    assert not home.exists()
    assert mope("logs", "path").out == f"{home / 'logs.db'}\n"


def test_chat_of_real_experts(mope: Run, zoo_config: str) -> None:
    """All that is known of an answer, down to who carried which token."""
    arguments = ["chat", "-c", zoo_config, "-p", "concise=3,grumpy=1", "--once", "How do I fix a bike?", "--seed", "5"]
    said = mope(*arguments, "--max-tokens", "6", "--temperature", "0.7", "--system", "Be kind.").out
    [found] = exported(mope)
    assert found["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "How do I fix a bike?"},
    ]
    assert found["preference"] == "concise=3,grumpy=1"
    assert found["lambdas"] == {"concise": 0.75, "grumpy": 0.25}
    assert found["options"] == {"temperature": 0.7, "top_p": 1.0, "max_tokens": 6, "stop": [], "seed": 5}
    assert (found["source"], found["model"], found["seed"], found["merge"]) == ("chat", zoo_config, 5, "linear")
    assert (found["finish_reason"], found["error_class"], found["cost"]) == ("length", None, None)
    assert found["num_completion_tokens"] == len(found["trace"]) == 6
    assert found["num_prompt_tokens"] > 6
    assert found["effort"]["num_generated"] >= 6
    assert found["answer"] + "\n" == said
    assert bytes(byte for token in found["trace"] for byte in token["bytes"]).decode(errors="replace") + "\n" == said
    for token in found["trace"]:
        assert set(token["carriers"]) == set(token["weights"]) == {"concise", "grumpy"}
        assert sum(token["carriers"].values()) == pytest.approx(1.0, abs=1e-5)
        assert token["token_id"] >= 0 and token["logprob"] <= 0 and 0 <= token["missed_mass"] <= 1


def test_no_log(mope: Run, scripted_config: str, home: Path) -> None:
    """Neither with the flag nor where the configuration says so is there a file."""
    mope("chat", "-c", scripted_config, "--once", "hi", "--no-log")
    path = Path(scripted_config)
    path.write_text(path.read_text() + "[logs]\nenabled = false\n")
    assert mope("chat", "-c", scripted_config, "--once", "hi").status == 0
    assert not home.exists()


def test_the_configured_path(mope: Run, scripted_config: str, tmp_path: Path) -> None:
    """`[logs] path` is where chat writes and `logs -c` reads."""
    path = Path(scripted_config)
    path.write_text(path.read_text() + f'[logs]\npath = "{tmp_path / "other" / "mine.db"}"\n')
    mope("chat", "-c", scripted_config, "--once", "hi")
    assert str(load_config(scripted_config).logs.path) + "\n" == mope("logs", "path", "-c", scripted_config).out
    assert len(exported(mope, "-c", scripted_config)) == 1
    assert "There is no log" in mope("logs").err


def test_preferences_side_by_side(mope: Run, scripted_config: str) -> None:
    """One record each, of one conversation."""
    mope("chat", "-c", scripted_config, "--once", "hi", "-p", "concise", "-p", "friendly", "--temperature", "0")
    found = exported(mope)
    assert {one["preference"]: one["answer"] for one in found} == {"concise": "Hi there", "friendly": "Yo there"}
    assert len({one["conversation"] for one in found}) == 1


def test_turns_share_a_conversation(mope: Run, scripted_config: str) -> None:
    """Until /new; a later turn holds the earlier ones."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*MOPE, "chat", "-c", scripted_config, "--temperature", "0"],
        stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        os.write(ours, b"one\n/pref friendly\ntwo\n/new\nthree\n/quit\n")
        process.communicate(timeout=120)
    os.close(ours)
    os.close(theirs)
    first, second, third = exported(mope)
    assert first["conversation"] == second["conversation"] != third["conversation"]
    assert [message["content"] for message in second["messages"]] == ["one", first["answer"], "two"]
    assert [len(one["messages"]) for one in (first, third)] == [1, 1]
    assert [one["preference"] for one in (first, second, third)] == [None, "friendly", "friendly"]


def test_ctrl_c(mope: Run, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said before is recorded, as stopped."""
    reply, is_waiting = stand_in.reply, threading.Event()

    def slow(path: str, body: dict[str, Any]) -> Any:
        if path == "/completion" and bytes(body["prompt"][-2:]) == b"ok":
            is_waiting.set()
            stand_in.released.wait()
        return reply(path, body)

    monkeypatch.setattr(stand_in, "reply", slow)
    with subprocess.Popen([*MOPE, "chat", "-c", stand_in.config, "--once", "hi"], stdout=subprocess.PIPE) as process:
        assert is_waiting.wait(60)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate()
    assert (out, process.returncode) == (b"ok\n", 130)
    [found] = exported(mope)
    assert (found["answer"], found["finish_reason"], found["error_class"]) == ("ok", "stopped", None)
    assert len(found["trace"]) == 2


def test_errors_are_recorded(mope: Run, no_server_config: str) -> None:
    """Their class and message, and the list says so."""
    assert mope("chat", "-c", no_server_config, "--once", "hi").status == 3
    [found] = exported(mope)
    assert (found["error_class"], found["finish_reason"], found["answer"]) == ("ProviderConnectionError", None, "")
    assert "expert 'solo'" in found["error_message"]
    assert "(ProviderConnectionError)" in mope("logs").out
    assert "ProviderConnectionError: expert 'solo'" in mope("logs", "show", "last").out


def test_no_key_lands_in_it(mope: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint quotes the key in its refusal."""
    monkeypatch.setenv("SECRET", KEY)
    with serve_echo() as echo:
        config = tmp_path / "echo.toml"
        config.write_text(
            '[[experts]]\nname = "solo"\ndimension = "concise"\nprovider = "llamacpp"\nmax_retries = 0\n'
            f'base_url = "http://127.0.0.1:{echo.port}"\napi_key_env = "SECRET"\n[cache]\nenabled = false\n'
        )
        assert mope("chat", "-c", str(config), "--once", "hi").status != 0
        assert echo.num_with_key > 0
    [found] = exported(mope)
    assert HIDDEN in found["error_message"]
    left = b"".join(path.read_bytes() for path in home.iterdir()).decode("latin-1")
    assert not any(trace in left for trace in TRACES)


@pytest.mark.parametrize("how", ["garbage", "newer"])
def test_chat_goes_on_without_a_log(mope: Run, scripted_config: str, home: Path, how: str) -> None:
    """A file that cannot be used is refused by `logs` with what to do; `chat` warns and answers."""
    path = home / "logs.db"
    with closing(open_log()) as log:
        log.record(FULL)
    if how == "garbage":
        path.write_bytes(b"garbage" * 1000)
    else:
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA user_version = 99")
    before = path.read_bytes()
    for command in ("list", "stats", "export"):
        mope("logs", command).assert_refused(2, {"garbage": "is damaged", "newer": "format 99"}[how], "hint: ")
    arguments = [*MOPE, "chat", "-c", scripted_config, "--once", "hi", "--temperature", "0", "-p", "friendly"]
    found = subprocess.run([*arguments, "-p", "concise"], capture_output=True, text=True, check=True)
    assert "Yo there" in found.stdout and "Hi there" in found.stdout
    assert found.stderr.count("WARNING: answers are not logged: ") == 1
    assert path.read_bytes() == before


WORDS = [
    "AND",
    "a OR b",
    "NOT",
    '"',
    'x"y',
    "NEAR(",
    "*",
    "answer:so",
    "-minus",
    "^caret",
    "(",
    "it's",
    "100%",
    "_",
    ";--",
]
UNICODE = ["Grüße", "naïve", "日本", "本語", "🙂", "данные"]


def test_search(mope: Run) -> None:
    """Words are words, whatever they mean to SQLite; accents and case do not matter, nor does how a word ends."""
    log = open_log()
    sayings = {log.record(asking(f"please say {word} now")): word for word in WORDS}
    sayings |= {log.record(asking("and?", f"that is 日本語 {word} indeed")): word for word in UNICODE}
    log.close()
    for answer_id, word in sayings.items():
        result = mope("logs", "search", "--json", "--", word)
        assert answer_id in [one["id"] for one in objects(result.out)], word
        assert (result.status, result.err) == (0, "")
    assert "[Grüße]" in mope("logs", "search", "gruße").out
    assert "[naïve]" in mope("logs", "search", "NAIV").out
    assert mope("logs", "search", "please", "nowhere").err == "Nothing was found.\n"
    assert mope("logs", "search", "nowhere\0", "").err == "Nothing was found.\n"


def test_the_best_is_first(mope: Run) -> None:
    """By how much of a text the words are; with equal words the newest."""
    log = open_log()
    long = log.record(asking("bike " + "and so on " * 40))
    short = log.record(asking("bike bike"))
    newer = log.record(asking("bike bike"))
    found = objects(mope("logs", "search", "bike", "--json").out)
    assert [one["id"] for one in found] == [newer, short, long]
    assert len(objects(mope("logs", "search", "bike", "--json", "-n", "1").out)) == 1


def test_export_round_trips(mope: Run, tmp_path: Path) -> None:
    """Everything that was recorded, by id, by time and by source, and the file is the user's alone."""
    log = open_log()
    full = log.record(FULL)
    older = log.record(asking("old", started_at="2025-01-01T12:00:00.000Z", source="chat"))
    log.close()
    trace = [
        {
            "bytes": list(token.data),
            **{name: getattr(token, name) for name in ("token_id", "logprob", "weights", "carriers", "missed_mass")},
            "is_forced": token.is_forced,
            "drawn_by": token.drawn_by,
        }
        for token in FULL.trace or ()
    ]
    fields = {name: getattr(FULL, name) for name in FULL.__dataclass_fields__}
    calls = [{"call_id": "call_1", "name": "look", "arguments": '{"x": 1}'}]
    assert exported(mope, str(full)) == [{**fields, "id": full, "tool_calls": calls, "trace": trace}]
    for arguments, ids in (
        ([], [full, older]),
        (["--source", "chat"], [older]),
        (["--since", "2025-01-02"], [full]),
        (["--until", "2025-01-02"], [older]),
        (["--until", "2025-01-02T00:00:00Z", "--since", "2025-01-01T12:00:00Z"], [older]),
        ([str(older), str(full)], [older, full]),
    ):
        assert [one["id"] for one in exported(mope, *arguments)] == ids
    output = tmp_path / "out.jsonl"
    assert "Wrote 2 answers" in mope("logs", "export", "-o", str(output)).err
    assert objects(output.read_text()) == exported(mope)
    assert output.stat().st_mode & 0o777 == 0o600


def test_a_failed_export_costs_nothing(mope: Run, tmp_path: Path) -> None:
    """The file of before stays, and nothing is left beside it."""
    log = open_log()
    log.record(FULL)
    with closing(sqlite3.connect(log.path)) as database, database:
        database.execute("UPDATE answers SET messages = '{'")
    output = tmp_path / "folder" / "out.jsonl"
    output.parent.mkdir()
    output.write_text("before")
    mope("logs", "export", "-o", str(output)).assert_refused(2, "answer 1 in the log cannot be read", "logs delete 1")
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]
    assert output.read_text() == "before"
    assert "Deleted 1" in mope("logs", "delete", "1", "--yes").err


def test_delete(mope: Run) -> None:
    """By id, by date, all; never without a yes, and nothing where an id is wrong."""
    log = open_log()
    for day in range(1, 5):
        log.record(asking("hi", started_at=f"2026-01-0{day}T12:00:00.000Z"))
    mope("logs", "delete", "--all").assert_refused(2, "--yes")
    mope("logs", "delete", "--all", "1", "--yes").assert_refused(2, "one of them")
    mope("logs", "delete", "--yes").assert_refused(2, "one of them")
    mope("logs", "delete", "1", "9", "--yes").assert_refused(2, "no answer 9")
    mope("logs", "delete", "--before", "soon", "--yes").assert_refused(2, "'soon'")
    assert len(exported(mope)) == 4
    assert mope("logs", "delete", "1", "1", "--yes").err == "Deleted 1 answers.\n"
    assert mope("logs", "delete", "--before", "2026-01-03", "--yes").err == "Deleted 1 answers.\n"
    assert [one["id"] for one in exported(mope)] == [3, 4]
    assert mope("logs", "delete", "--all", "--yes").err == "Deleted 2 answers.\n"
    assert "is empty" in mope("logs").err


def test_bad_input(mope: Run) -> None:
    """Each is named, with what to do."""
    open_log().record(FULL)
    mope("logs", "show", "9").assert_refused(2, "no answer 9", "mope-bb logs")
    mope("logs", "show", "x\x1b").assert_refused(2, "no id of an answer")
    mope("logs", "export", "1", "--source", "chat").assert_refused(2, "--source")
    mope("logs", "export", "-o", "/nowhere/x").assert_refused(2, "'/nowhere/x'")
    mope("logs", "list", "--since", "13").assert_refused(2, "'13'")
    mope("logs", "stats", "-c", "a", "--path", "b").assert_refused(2, "--config and --path")
    mope("logs", "stats", "--path", "/").assert_refused(2, "is not a file")
    mope("logs", "nothing").assert_refused(2, "nothing")


def test_stats_and_trace(mope: Run) -> None:
    """Counts, and an answer in the colours of its experts."""
    log = open_log()
    for source in ("chat", "serve", "serve"):
        log.record(asking("hi", source=source))
    found = json.loads(mope("logs", "stats", "--json").out)
    assert (found["num_answers"], found["by_source"], found["num_tokens"]) == (3, {"chat": 1, "serve": 2}, 9)
    assert (found["first"], found["last"]) == (FULL.started_at, FULL.started_at)
    assert found["num_bytes"] > found["num_trace_bytes"] > 0
    assert "chat 1, serve 2" in mope("logs", "stats").out
    shown = [line.split() for line in mope("logs", "show", "last", "--trace").out.splitlines()]
    assert ["a", "1", "50%", "25%"] in shown
    assert ["b", "1", "50%", "75%"] in shown
    log.record(asking("hi", trace=None))
    mope("logs", "show", "1")
    assert "has no trace" in mope("logs", "show", "last", "--trace").err


@contextmanager
def terminal_output(*arguments: str) -> Iterator[str]:
    """What a command shows in a terminal."""
    ours, theirs = pty.openpty()
    shown = b""
    environment = {**os.environ, "COLUMNS": "200"}
    with subprocess.Popen([*MOPE, *arguments], stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL, env=environment):
        os.close(theirs)
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    yield shown.decode()


@pytest.mark.parametrize(
    "command",
    [["list"], ["list", "--json"], ["search", "red"], ["show", "1"], ["show", "1", "--trace"], ["export"], ["stats"]],
    ids=" ".join,
)
def test_a_terminal_obeys_nothing_that_was_said(command: list[str]) -> None:
    """Neither to colours nor to the bell, nor to what turns the direction of text."""
    open_log().record(
        asking(
            f"{CONTROLS} [bold]?",
            CONTROLS,
            preference=CONTROLS,
            model=CONTROLS,
            source=CONTROLS,
            error_class=CONTROLS,
            lambdas={CONTROLS: 1.0},
            trace=[replace(TOKENS[0], data=CONTROLS.encode(), weights={CONTROLS: 1.0}, carriers={CONTROLS: 1.0})],
        )
    )
    with terminal_output("logs", *command) as shown:
        assert "red" in shown
        assert not any(trace in shown for trace in ("\x1b[31mred", "\x07", "\x9b", "\u202e", "\r\x08", "\x08"))
        assert command == ["stats"] or "bold" in shown
