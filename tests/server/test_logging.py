"""Every answer is kept in the log, once, as it ended; a bad log costs no answer."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from mope_bb.logs import open_log
from mope_bb.server.app import Surroundings
from mope_bb.zoo.serving import ZooServer
from tests.endpoints.gated import open_gated
from tests.server.serving import chat_body, served

CHAT = "/v1/chat/completions"


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What was kept, oldest first."""
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        table = next(name for name in tables if "finish_reason" in _columns(connection, name))
        return [dict(row) for row in connection.execute(f'SELECT * FROM "{table}" ORDER BY id')]


def _columns(connection: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]


def test_answers_are_kept(nano_experts: ZooServer, tmp_path: Path) -> None:
    """Whole, streamed, several, and raw text; a server that ends has kept them all."""
    named = {"metadata": {"conversation": "tea-time"}}
    config = nano_experts.config()
    with closing(open_log(tmp_path / "logs.db")) as log, served(config, Surroundings(config.server, log=log)) as server:
        first = server.post(CHAT, chat_body(model="mope:concise", seed=1, **named)).json()
        server.post(CHAT, chat_body(stream=True, preference={"friendly": 2}, temperature=0.5, **named))
        server.post(CHAT, chat_body("Two?", n=2, seed=8))
        server.post("/v1/completions", {"model": "mope", "prompt": ["A", "B"], "max_tokens": 2})
        server.post(CHAT, chat_body(n=0))
    rows = rows_of(tmp_path / "logs.db")
    assert len(rows) == 6
    assert rows[0]["answer"] == first["choices"][0]["message"]["content"]
    assert rows[0]["num_completion_tokens"] == first["usage"]["completion_tokens"]
    assert (rows[0]["source"], rows[0]["model"], rows[0]["preference"]) == ("serve", "mope:concise", "concise")
    assert [row["conversation"] for row in rows[:2]] == ["tea-time"] * 2
    assert json.loads(rows[1]["preference"]) == {"friendly": 2}
    assert json.loads(rows[1]["options"])["temperature"] == 0.5
    assert rows[2]["conversation"] == rows[3]["conversation"] != "tea-time"
    assert [row["seed"] for row in rows[2:4]] == ["8", "9"]
    assert [json.loads(row["messages"])[0]["content"] for row in rows[4:]] == ["A", "B"]


def test_how_answers_end(tmp_path: Path) -> None:
    """One that failed has its error; one that nobody waited for has stopped."""

    async def run() -> None:
        async with open_gated("solo") as gated, httpx.AsyncClient(timeout=60) as client:
            with closing(open_log(tmp_path / "logs.db")) as log:
                context = served(gated.config, Surroundings(gated.config.server, log=log))
                server = await asyncio.to_thread(context.__enter__)
                gated.fails_after = 2
                await client.post(server.url + CHAT, json=chat_body(stream=True))
                gated.fails_after, gated.closes_after = 1_000, 3
                other = httpx.AsyncClient(timeout=60)
                asking = asyncio.create_task(other.post(server.url + CHAT, json=chat_body(stream=True)))
                await gated.wait_until(lambda gated: gated.num_waiting == 1)
                asking.cancel()
                await other.aclose()
                await gated.wait_until(lambda gated: gated.num_left == 1)
                await asyncio.to_thread(context.__exit__, None, None, None)

    asyncio.run(run())
    failed, stopped = rows_of(tmp_path / "logs.db")
    assert (failed["answer"], failed["finish_reason"], failed["error_class"]) == ("ok", None, "ServerError")
    assert (stopped["answer"], stopped["finish_reason"], stopped["error_class"]) == ("ok,", "stopped", None)


def test_bad_log(nano_experts: ZooServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that is no log is told once, and answers are given as ever."""
    path = tmp_path / "logs.db"
    path.write_bytes(b"no database" * 1_000)
    config = nano_experts.config()
    with closing(open_log(path)) as log, served(config, Surroundings(config.server, log=log)) as server:
        replies = [server.post(CHAT, chat_body(seed=1)) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200] * 3
    assert sum("not logged" in record.message for record in caplog.records) == 1
    assert path.read_bytes() == b"no database" * 1_000
