"""The scripts of examples/agents as users run them, each a process of its own, against a real server on the zoo."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parents[2] / "examples" / "agents"
ENDS_WITHIN_S: Final = 240.0
"""A deadline against a defect."""


def run(script: str, *arguments: str, base_url: str = "") -> str:
    """What the script prints; it must end well and say nothing on standard error."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments],
        capture_output=True,
        text=True,
        timeout=ENDS_WITHIN_S,
        env={**os.environ, "BASE_URL": base_url},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_every_script_is_run_here_and_told_of() -> None:
    """One that nobody runs would rot."""
    scripts = {path.name for path in FOLDER.glob("*.py")}
    here = Path(__file__).read_text(encoding="utf-8")
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert scripts
    for name in scripts:
        assert f'run("{name}"' in here
        assert f"[{name}]({name})" in page


def test_openai_tools(mope_url: str) -> None:
    """One call with arguments that fit, its result, an answer in words, and what it cost."""
    out = run("openai_tools.py", "What does a new wheel cost?", base_url=mope_url)
    call, answer, *_, cost = out.splitlines()
    found = re.fullmatch(r'call: price_of\(\{"part": "(chain|tire|wheel)", "quantity": ([1-9])\}\) = ([\d.]+)', call)
    assert found is not None, out
    assert float(found[3]) == {"chain": 24.5, "tire": 31.0, "wheel": 89.0}[found[1]] * int(found[2])
    assert answer.startswith("answer: "), out
    counted = re.fullmatch(r"tokens of the last turn: (\d+) read, (\d+) written", cost)
    assert counted is not None, out
    assert int(counted[1]) > int(counted[2]) > 0


def test_pydantic_ai_agent(mope_url: str) -> None:
    """One call of the function, then the typed value: two requests."""
    out = run("pydantic_ai_agent.py", base_url=mope_url)
    call, offer, cost = out.splitlines()
    assert re.fullmatch(r"call: price_of\('(chain|tire|wheel)'\) = [\d.]+", call), out
    assert re.fullmatch(r"offer: Offer\(part='(chain|tire|wheel)', quantity=[1-9], reason=.*\)", offer), out
    assert re.fullmatch(r"2 requests, \d{2,} tokens", cost), out


def test_library_asyncio(zoo_config_path: Path) -> None:
    """Three answers at once, a call and what follows it, and an answer that changes who speaks."""
    out = run("library_asyncio.py", str(zoo_config_path))
    lines = out.splitlines()
    for question, line in zip(("fix a bike", "clean a lamp", "paint a chair"), lines, strict=False):
        assert re.fullmatch(rf"How do I {question}\? ['\"].+['\"] \((stop|length), \d+ tokens\)", line), out
    call, result = lines[3:5]
    assert re.fullmatch(r'calls price_of with \{"part": "(chain|tire|wheel)"\} \(tool_calls\)', call), out
    assert re.fullmatch(r"result (24\.5|31\.0|89\.0)", result), out
    assert any(line.endswith((" (stop)", " (length)")) for line in lines[5:]), out
    assert " | " in out
    assert lines[-2:] == ["asked concise", "asked friendly"]
