"""`mope-bb serve` as a process: what it prints, what it refuses, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from mope_bb.cli.serve import run_server
from mope_bb.config import load_config
from mope_bb.server.listening import bind
from mope_bb.zoo.serving import ZooServer
from tests.command_line import Run
from tests.endpoints.gated import ANSWER, Gated, open_gated
from tests.server.serving import chat_body, events_of, text_of

CHAT = "/v1/chat/completions"


class Process:
    """A running `mope-bb serve`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: dict[str, str] = {}
        """What it said when it was ready."""

    async def read_lines(self) -> None:
        """Wait until it is ready."""
        assert self.process.stdout is not None
        while "Try" not in self.lines:
            line = (await self.process.stdout.readline()).decode()
            assert line, "it ended"
            name, _, text = line.strip().partition(": ")
            self.lines[name] = text

    @property
    def url(self) -> str:
        """Where it is."""
        return self.lines["Page"].rstrip("/")

    async def end(self) -> tuple[int, str]:
        """The exit status, and what stood on standard error."""
        async with asyncio.timeout(60):
            _, err = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, err.decode()


@asynccontextmanager
async def process_of(*arguments: str, **environment: str) -> AsyncIterator[Process]:
    """Start it and wait until it is ready."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mope_bb", "serve", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    try:
        running = Process(process)
        async with asyncio.timeout(120):
            await running.read_lines()
        yield running
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def write_config(gated: Gated, path: Path, **server: Any) -> str:
    """The configuration of one expert as a file."""
    expert = gated.config.experts[0]
    settings = "".join(f"{name} = {json.dumps(value)}\n" for name, value in server.items())
    path.write_text(
        f'[[experts]]\nname = "{expert.name}"\ndimension = "{expert.name}"\nprovider = "llamacpp"\nmax_retries = 0\n'
        f'base_url = "{expert.base_url}"\n[cache]\nenabled = false\n[logs]\npath = "logs.db"\n'
        f'[decoding]\nmode = "lockstep"\n[server]\n{settings}'
    )
    return str(path)


async def wait_until_refused(url: str) -> None:
    """Return when nobody listens there any more."""
    address = httpx.URL(url)
    async with asyncio.timeout(60):
        while True:
            try:
                _, writer = await asyncio.open_connection(address.host, address.port)
            except (ConnectionRefusedError, ConnectionResetError):  # as the listener is closed
                return
            writer.close()
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_graceful_end(tmp_path: Path, number: signal.Signals) -> None:
    """An open stream is finished, nothing new is taken, and the exit status is 0."""

    async def run() -> tuple[list[Any], int, str]:
        async with open_gated("solo") as gated:
            gated.closes_after = 1
            config = write_config(gated, tmp_path / "mope.toml")
            async with process_of("-c", config, "--port", "0") as server, httpx.AsyncClient(timeout=60) as client:
                request = chat_body(stream=True, max_tokens=20)
                async with client.stream("POST", server.url + CHAT, json=request) as response:
                    found: list[Any] = []
                    async for event in events_of(response):
                        found.append(event)
                        if len(found) == 2:
                            server.process.send_signal(number)
                            await wait_until_refused(server.url)
                            gated.open_gate()
                return found, *(await server.end())

    found, status, err = asyncio.run(run())
    assert text_of(found) == ANSWER.decode()
    assert found[-1] == "[DONE]"
    assert (status, err) == (0, "")
    assert (tmp_path / "logs.db").exists()


@pytest.mark.parametrize("is_streaming", [True, False])
def test_end_that_cannot_wait(tmp_path: Path, *, is_streaming: bool) -> None:
    """What is still open after `shutdown_timeout_s` ends with an error, not in silence."""

    async def run() -> tuple[httpx.Response, int, str]:
        async with open_gated("solo") as gated:
            gated.closes_after = 1
            config = write_config(gated, tmp_path / "mope.toml", shutdown_timeout_s=0.2)
            async with process_of("-c", config, "--port", "0", "--no-log") as server:
                async with httpx.AsyncClient(timeout=60) as client:
                    request = chat_body(stream=is_streaming)
                    asking = asyncio.create_task(client.post(server.url + CHAT, json=request))
                    await gated.wait_until(lambda gated: gated.num_waiting == 1)
                    server.process.send_signal(signal.SIGTERM)
                    response = await asking
                return response, *(await server.end())

    response, status, err = asyncio.run(run())
    error = json.loads(response.text.split("\n\n")[-2].removeprefix("data: ")) if is_streaming else response.json()
    assert error["error"]["code"] == "server_is_ending"
    assert response.status_code == (200 if is_streaming else 503)
    assert (status, err) == (0, "")
    assert not (tmp_path / "logs.db").exists()


def test_second_signal(tmp_path: Path) -> None:
    """Ctrl-C twice does not wait."""

    async def run() -> tuple[str, int, str]:
        async with open_gated("solo") as gated:
            gated.closes_after = 1
            config = write_config(gated, tmp_path / "mope.toml", shutdown_timeout_s=3600)
            async with process_of("-c", config, "--port", "0") as server:
                async with httpx.AsyncClient(timeout=60) as client:
                    asking = asyncio.create_task(client.post(server.url + CHAT, json=chat_body(stream=True)))
                    await gated.wait_until(lambda gated: gated.num_waiting == 1)
                    server.process.send_signal(signal.SIGINT)
                    await wait_until_refused(server.url)
                    server.process.send_signal(signal.SIGINT)
                    text = (await asking).text
                return text, *(await server.end())

    text, status, err = asyncio.run(run())
    assert "server_is_ending" in text
    assert (status, err) == (0, "")


def test_what_it_prints(nano_experts: ZooServer, tmp_path: Path) -> None:
    """The command that it shows works as it stands, with the key in the environment."""
    nano_experts.write_config(tmp_path / "mope.toml")
    environment = {"MOPE_KEY": "a key for this one"}

    async def run() -> tuple[str, str, int]:
        arguments = ("-c", str(tmp_path / "mope.toml"), "--host", "0.0.0.0", "--port", "0", "--api-key-env", "MOPE_KEY")
        async with process_of(*arguments, "--no-log", **environment) as server:
            shell = await asyncio.create_subprocess_exec(
                *("sh", "-c", server.lines["Try"]),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **environment},
            )
            out, _ = await shell.communicate()
            without = await asyncio.to_thread(httpx.get, f"{server.url}/v1/models")
            server.process.send_signal(signal.SIGTERM)
            status, err = await server.end()
            assert err == ""
            return out.decode(), shlex.join(server.lines.values()), without.status_code * 10 + status

    out, lines, status = asyncio.run(run())
    assert json.loads(out)["choices"][0]["message"]["content"]
    assert "$MOPE_KEY" in lines
    assert "a key for this one" not in lines
    assert status == 4010


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_no_key_beyond_loopback(mope: Run, host: str, tmp_path: Path) -> None:
    """Refused before anything is started: the configuration's endpoint does not even exist."""
    config = tmp_path / "mope.toml"
    config.write_text(
        '[[experts]]\nname = "a"\ndimension = "a"\nprovider = "llamacpp"\nbase_url = "http://127.0.0.1:9"\n'
    )
    mope("serve", "-c", str(config), "--host", host).assert_refused(2, "there is no key", "--api-key-env")
    mope("serve", "--host", host).assert_refused(2, "there is no key")


def test_wrong_flags(mope: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with a line and a hint, before a zoo is built."""
    monkeypatch.delenv("MOPE_KEY", raising=False)
    mope("serve", "--api-key-env", "MOPE_KEY").assert_refused(2, "'MOPE_KEY' is not set")
    monkeypatch.setenv("MOPE_KEY", "two\nlines")
    mope("serve", "--api-key-env", "MOPE_KEY").assert_refused(2, "'MOPE_KEY' holds no key")
    mope("serve", "--run", str(tmp_path)).assert_refused(2, "holds neither metrics.jsonl nor report.html")
    mope("serve", "--port", "70000").assert_refused(2, "70000")
    mope("serve", "-c", str(tmp_path / "none.toml")).assert_refused(2, "there is no configuration file")
    monkeypatch.setenv("MOPE_KEY", "a key")
    mope("serve", "--host", "no.such.host.invalid", "--api-key-env", "MOPE_KEY").assert_refused(
        2, "there is no address"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        mope("serve", "--port", port).assert_refused(2, f"port {port}", "another --port")


@pytest.mark.parametrize("missing", ["uvicorn", "starlette", "prometheus_client"])
def test_missing_package(missing: str) -> None:
    """The extra that has it is named."""
    trap = f"import sys; sys.modules[{missing!r}] = None; sys.argv[1:] = ['serve']"
    code = f"{trap}; from mope_bb.cli.main import main; main()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: serving needs '{missing}")
    assert "mope-bb[server]" in run.stderr


def test_help_is_quick() -> None:
    """It loads nothing of the server."""
    code = (
        "import sys; from mope_bb.cli.main import cli; cli.main(['serve', '--help'], standalone_mode=False); "
        "print([name for name in ('starlette', 'uvicorn', 'pydantic', 'torch') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_settings(mope: Run, tmp_path: Path) -> None:
    """Of the [server] table."""
    config = tmp_path / "mope.toml"
    expert = '[[experts]]\nname = "a"\ndimension = "a"\nprovider = "scripted"\nscript = [{"x" = 1.0}]\n[server]\n'
    for line, words in (
        ("max_n = 100", "`max_n` is more than `max_open_answers`"),
        ('cors_origins = ["*"]', "cors_origins"),
        ("max_token = 3", "Did you mean 'max_tokens'"),
        ('api_key = "secret"', "Did you mean 'api_key_env'"),
    ):
        config.write_text(expert + line)
        mope("serve", "-c", str(config)).assert_refused(2, words)


def test_what_stays_is_not_collected_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it begins to listen, garbage collections do not look at what was loaded for it."""
    config = tmp_path / "mope.toml"
    config.write_text(
        '[[experts]]\nname = "a"\nprovider = "scripted"\nscript = [{ a = 1.0 }]\n[logs]\nenabled = false\n'
    )
    counts: list[int] = []

    async def listen(*_: object, **__: object) -> None:
        counts.append(gc.get_freeze_count())

    monkeypatch.setattr("mope_bb.server.listening.listen", listen)
    gc.unfreeze()
    with bind("127.0.0.1", 0) as listener:
        asyncio.run(run_server(load_config(str(config)), listener, None, None))
    assert counts[0] > 10_000
