"""Rules on our own code that a machine checks: what could run what others wrote is not there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAG = "trust_remote_code"


def places_that_trust(source: str) -> list[int]:
    """Lines that let transformers run a repository's own code, or that leave it to ask the user.

    Without the argument it asks on the terminal, and takes a "y" for a yes.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value == FLAG:
            found.append(node.lineno)  # as the key of a dictionary or the name of an attribute
        if not isinstance(node, ast.Call):
            continue
        named = [keyword.value for keyword in node.keywords if keyword.arg == FLAG]
        is_off = any(isinstance(value, ast.Constant) and value.value is False for value in named)
        function = node.func
        loads = isinstance(function, ast.Attribute) and function.attr in ("from_pretrained", "from_config")
        is_auto = loads and isinstance(function.value, ast.Name) and function.value.id.startswith("Auto")  # type: ignore[attr-defined]
        if (named or is_auto) and not is_off:
            found.append(node.lineno)
    return found


def test_no_code_of_repositories_is_run() -> None:
    """Neither here nor in the examples."""
    files = [path for folder in ("mope_bb", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert [(str(path), line) for path in files for line in places_that_trust(path.read_text())] == []


@pytest.mark.parametrize(
    "planted",
    [
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=chosen)",
        "AutoModel.from_pretrained(path)",
        "AutoConfig.from_pretrained(path, **options)",
        "load(path, trust_remote_code=1)",
        "options = {'trust_remote_code': True}",
        "setattr(options, 'trust_remote_code', True)",
    ],
)
def test_the_check_finds_it(planted: str) -> None:
    """Each way to switch it on, or to leave it open."""
    assert places_that_trust(f"x = 1\n{planted}\n") == [2]
    assert places_that_trust("AutoModel.from_pretrained(path, trust_remote_code=False)") == []


@pytest.mark.parametrize(
    ("planted", "rule"),
    [
        ("import pickle", "TID251"),
        ("from torch import load", "TID251"),
        ("import torch\n\ntorch.load('x')", "TID251"),
        ("import numpy as np\n\nnp.load('x', allow_pickle=True)", "TID251"),
        ("import shelve", "TID251"),
        ("import dill", "TID251"),
        ("import marshal", "TID251"),
        ("import pickle\n\npickle.loads(b'')", "S301"),
        ("import marshal\n\nmarshal.loads(b'')", "S302"),
        ("eval('1')", "S307"),
        ("exec('1')", "S102"),
        ("import yaml\n\nyaml.load('')", "S506"),
        ("import subprocess\n\nsubprocess.run('ls', shell=True)", "S602"),
        ("import os\n\nos.system('ls')", "S605"),
        ("import tempfile\n\ntempfile.mktemp()", "S306"),
        ("import httpx\n\nhttpx.get('https://x', verify=False)", "S501"),
        ("import ssl\n\nssl._create_unverified_context()", "S323"),
    ],
)
def test_the_linter_forbids_it(planted: str, rule: str) -> None:
    """`make check` fails for each of them within the package."""
    command = [str(Path(sys.executable).parent / "ruff"), "check", "--output-format", "concise", "--no-cache"]
    command += ["--stdin-filename", str(ROOT / "mope_bb" / "planted.py"), "-"]
    done = subprocess.run(command, input=planted, capture_output=True, text=True, cwd=ROOT, check=False)
    assert f" {rule} " in done.stdout


def test_the_page_names_tests_that_exist() -> None:
    """Each promise of docs/security.md is shown by a file that is there."""
    named = re.findall(r"`((?:tests|mope_bb)/[\w/.]+)`", (ROOT / "docs" / "security.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []
