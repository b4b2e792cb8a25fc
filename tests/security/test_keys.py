"""A key is sent to its endpoint, and stands nowhere else: whatever fails, and whatever the endpoint repeats."""

from __future__ import annotations

import asyncio
import io
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mope_bb.config import Config, parse_config
from mope_bb.errors import AuthenticationError, MopeError
from mope_bb.keys import HIDDEN, Key, redacted, redacted_body
from mope_bb.providers.connect import read_key
from mope_bb.session import build_session
from mope_bb.zoo.build import Zoo
from tests.command_line import Run
from tests.security.echo import KEY, MODES, PASSWORD, TRACES, EchoServer, Mode, serve_echo

PROVIDERS: dict[str, dict[str, Any]] = {
    "llamacpp": {},
    "vllm": {"model": "m"},
    "tgi": {"model": "m"},
    "chat": {"model": "m"},
    "azure": {"model": "m", "api_version": "2026-10-01"},
    "gemini": {"model": "m"},
}
NEED_TOKENIZER = {"vllm", "tgi"}


@pytest.fixture(scope="module")
def echo() -> Iterator[EchoServer]:
    """An endpoint that repeats everything."""
    with serve_echo() as server:
        yield server


@pytest.fixture(autouse=True)
def key_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where keys come from."""
    monkeypatch.setenv("CANARY", KEY)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that any library logs, from DEBUG on."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    quiet = [logging.getLogger(name) for name in ("httpx", "httpcore", "asyncio", "openai", "aiohttp")]
    before = [one.level for one in quiet]
    for one in quiet:
        one.setLevel(logging.DEBUG)
    yield stream
    for one, old in zip(quiet, before, strict=True):
        one.setLevel(old)
    root.setLevel(level)
    root.removeHandler(handler)


def assert_clean(what: str, text: str) -> None:
    """No key, and no half of one, in `text`."""
    for trace in TRACES:
        place = text.find(trace)
        assert place < 0, f"{what} holds a key: ...{text[max(0, place - 200) : place + 60]}"


def configured(echo: EchoServer, provider: str, nano: Zoo, *, in_address: bool = False) -> Config:
    """One expert at the echo, its key in the variable CANARY or, as a password, in its address."""
    secret = f"me:{PASSWORD}@" if in_address else ""
    expert = {
        "name": "solo",
        "dimension": "concise",
        "provider": provider,
        "base_url": f"http://{secret}127.0.0.1:{echo.port}/v1",
        "max_retries": 1 if echo.mode == "reset" else 0,
        **PROVIDERS[provider],
        **({} if in_address else {"api_key_env": "CANARY"}),
        **({"tokenizer": str(nano.folder("base"))} if provider in NEED_TOKENIZER else {}),
    }
    return parse_config({"experts": [expert], "cache": {"enabled": False}})


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it is shown with."""
    shown: BaseException | None = error
    while shown is not None:
        yield shown
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)


async def fail(config: Config) -> tuple[MopeError, dict[str, str]]:
    """Ask, and give the error back with what all objects on the way look like."""
    session = build_session(config)
    try:
        with pytest.raises(MopeError) as caught:
            await session.complete("Hi", max_tokens=1)
        objects = {"config": config, "session": session, "pool": session._pool, "account": session.account}
        for expert in session._pool._experts.values():
            client: Any = getattr(expert, "_client")  # noqa: B009
            objects |= {"expert": expert, "client": client, "http": getattr(client, "_session", None)}
            objects |= {"endpoint": client._endpoint, "http of the SDK": getattr(client, "_http", None)}
            objects |= {"SDK": getattr(client, "_sdk", None)}
        return caught.value, {name: repr(one) for name, one in objects.items()}
    finally:
        await session.aclose()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("in_address", [False, True], ids=["key", "password"])
def test_errors_logs_and_objects(
    provider: str, mode: Mode, *, in_address: bool, echo: EchoServer, nano: Zoo, log: io.StringIO
) -> None:
    """Every way of failing, in every way of sending a key: the error, with its local variables, and all logs."""
    echo.mode, echo.num_with_key = mode, 0
    error, objects = asyncio.run(fail(configured(echo, provider, nano, in_address=in_address)))
    assert echo.num_with_key > 0
    for one in chain(error):
        assert_clean("an error", f"{one} {one!r} {one.args} {getattr(one, '__notes__', '')} {vars(one)}")
    shown = traceback.TracebackException.from_exception(error, capture_locals=True)
    assert_clean("a traceback with local variables", "".join(shown.format()))
    for name, text in objects.items():
        assert_clean(f"the repr of {name}", text)
    assert_clean("the log", log.getvalue())
    assert not echo.redirected.is_set()


def write_config(folder: Path, echo: EchoServer, nano: Zoo) -> str:
    """A `mope.toml` of two experts at the echo, a reward model and a judge there, and a PCM to train."""
    expert = f'provider = "vllm"\nmodel = "m"\nbase_url = "http://127.0.0.1:{echo.port}/v1"\napi_key_env = "CANARY"\n'
    local = f'provider = "local"\nmodel = "{nano.folder("base")}"\ndevice = "cpu"\n'
    reward = f'kind = "remote", provider = "vllm", base_url = "http://127.0.0.1:{echo.port}", api_key_env = "CANARY"'
    judge = f'kind = "judge", model = "m", base_url = "http://me:{PASSWORD}@127.0.0.1:{echo.port}/v1", criterion = "x"'
    text = (
        f'[[experts]]\nname = "concise"\ndimension = "concise"\n{{concise}}tokenizer = "{nano.folder("base")}"\n'
        f'[[experts]]\nname = "friendly"\ndimension = "friendly"\n{local}'
        f'[[experts]]\nname = "base"\nbase = true\n{local}'
        f"[dimensions.concise]\nreward = {{{{ {reward}, max_retries = 0 }}}}\n"
        f"[dimensions.friendly]\nreward = {{{{ {judge}, max_retries = 0 }}}}\n"
        f'[pcm]\nbackbone = "{nano.folder("base")}"\ndevice = "cpu"\n[cache]\npath = "cache"\n'
        '[train]\nprompts = "prompts.txt"\nmax_steps = 1\nbatch_size = 2\nmax_tokens = 4\n'
    )
    (folder / "prompts.txt").write_text("How do I fix a bike?\nHello\n")
    for name, one in (("remote", f"{expert}max_retries = 0\n"), ("local", local)):
        (folder / f"{name}.toml").write_text(text.format(concise=one))
    return str(folder)


@pytest.mark.parametrize("mode", ["401", "500", "garbage", "other JSON"])
def test_commands(mode: Mode, echo: EchoServer, nano: Zoo, tmp_path: Path, *, mope: Run, log: io.StringIO) -> None:
    """Failing runs of `chat` and `train`: what they print, log and leave on disk."""
    echo.mode, echo.num_with_key = mode, 0
    folder = write_config(tmp_path, echo, nano)
    remote, local = f"{folder}/remote.toml", f"{folder}/local.toml"
    runs = [
        mope("--debug", "chat", "-c", remote, "--once", "Hi", "--pref", "concise"),
        mope("--debug", "train", "-c", remote, "-o", str(tmp_path / "remote")),
        mope("train", "-c", local, "-o", str(tmp_path / "local")),
    ]
    assert echo.num_with_key > len(runs)
    for run in runs:
        assert run.status != 0
        assert_clean("the output", run.out + run.err)
    assert_clean("the log", log.getvalue())
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".toml"]
    assert any(path.name.startswith("ledger.sqlite3") for path in left)
    for path in left:
        assert_clean(str(path.relative_to(tmp_path)), path.read_bytes().decode("latin-1"))


@pytest.mark.parametrize("value", [f"{KEY}\nX-Other: 1", f"{KEY}\0", f"{KEY}é", f"\ud800{KEY}"])
def test_what_is_no_key(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line break in a key would be a second header; the error names the variable and not its value."""
    monkeypatch.setattr("os.environ", {"CANARY": value})
    config = parse_config({"experts": [{"name": "a", "provider": "vllm", "api_key_env": "CANARY"}]}).experts[0]
    with pytest.raises(AuthenticationError, match="'CANARY' holds no key") as caught:
        read_key(config)
    assert_clean("the error", f"{caught.value} {caught.value.hint}")


def test_spaces_around_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line break at its end, as `echo` writes it into a file, is not part of it."""
    monkeypatch.setenv("CANARY", f" {KEY}\n")
    found = Key.of_variable("CANARY")
    assert found is not None
    assert found.reveal() == KEY
    assert repr(found) == f"Key({HIDDEN})"


def test_what_is_redacted() -> None:
    """Keys, as text and in bytes; a stand-in for a key is no secret, and other texts hold it by chance."""
    Key(KEY)
    Key("EMPTY")
    assert redacted(f"Bearer {KEY}, EMPTY") == f"Bearer {HIDDEN}, EMPTY"
    assert redacted_body(f'"{KEY}"'.encode()) == f'"{HIDDEN}"'.encode()
    error = MopeError(f"bad key {KEY}", hint=f"not {KEY}")
    assert (error.message, error.hint, error.args) == (f"bad key {HIDDEN}", f"not {HIDDEN}", (f"bad key {HIDDEN}",))
