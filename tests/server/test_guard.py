"""Who may ask: key, Host, other pages; and what every answer bears."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from mope_bb.config import Config, ServerConfig
from mope_bb.keys import Key
from mope_bb.server.app import Surroundings
from mope_bb.server.guard import is_loopback
from mope_bb.server.run import RunFolder
from mope_bb.zoo.serving import ZooServer
from tests.server.serving import Served, chat_body, served

KEY = "a key of this server only"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def config(nano_experts: ZooServer) -> Config:
    """The real zoo."""
    return nano_experts.config()


@pytest.fixture(scope="module")
def open_to_all(config: Config) -> Iterator[Served]:
    """A server at all addresses of this machine, with a key."""
    settings = ServerConfig(host="0.0.0.0", cors_origins=("https://app.example.org",))
    with served(config, Surroundings(settings, Key(KEY))) as server:
        yield server


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        f"bearer {KEY}",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Basic {KEY}",
        KEY,
        "Bearer \u00fc",
    ],
)
def test_key(open_to_all: Served, header: str | None) -> None:
    """Without it everything but the page and /health is 401."""
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    is_right = header == f"bearer {KEY}"
    for path in ("/v1/models", "/mope/info", "/metrics", "/openapi.json", "/mope/run", "/nothing"):
        response = open_to_all.get(path, headers=headers)
        assert (response.status_code != 401) == is_right
        if not is_right:
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            assert KEY not in response.text
    assert (open_to_all.post(CHAT, chat_body(), headers=headers).status_code == 200) == is_right
    for path in ("/", "/health", "/page/app.js"):
        assert open_to_all.get(path, headers=headers).status_code == 200


def test_key_through_the_sdk(open_to_all: Served) -> None:
    """As OpenAI's."""
    ask: Any = [{"role": "user", "content": "Hi"}]
    assert open_to_all.sdk(api_key=KEY).chat.completions.create(model="mope", messages=ask, max_tokens=1).choices
    with pytest.raises(openai.AuthenticationError, match="the key is wrong"):
        open_to_all.sdk(api_key="other").models.list()


@pytest.mark.parametrize("path", ["/page/../v1/models", "/page/%2e%2e/v1/models", "//page/x", "/page/..%2fapp.py"])
def test_no_way_around(open_to_all: Served, path: str) -> None:
    """Paths that look like the page and are something else."""
    address = urlsplit(open_to_all.url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        reply = b"".join(iter(lambda: client.recv(65536), b""))
    assert reply.split(b" ", 2)[1] in (b"401", b"404")
    assert b'"id":"mope"' not in reply


def test_loopback_needs_no_key(zoo_server: Served) -> None:
    """Only this machine can reach it."""
    assert zoo_server.get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("host", "is_known"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("127.0.0.1:1", True),
        ("127.9.9.9", True),
        ("[::1]:8000", True),
        ("[::1]", True),
        ("mope.localhost", True),
        ("evil.example", False),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("127.0.0.1@evil.example", False),
        ("192.168.0.1", False),
        ("0.0.0.0", False),
        ("[::1].evil.example", False),
        ("evil.example/localhost", False),
    ],
)
def test_host(zoo_server: Served, host: str, *, is_known: bool) -> None:
    """On loopback a request for another name is one that a stranger's page made a browser send."""
    for path in ("/", "/health", "/v1/models", "/page/app.js"):
        response = zoo_server.get(path, headers={"host": host})
        assert response.status_code == (200 if is_known else 421)
    if not is_known:
        assert response.json()["error"]["code"] == "wrong_host"


def test_what_is_loopback() -> None:
    """By what the server is bound to."""
    assert all(map(is_loopback, ("127.0.0.1", "127.0.0.2", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.1", "example.org", "")))


def test_other_pages(zoo_server: Served, open_to_all: Served) -> None:
    """Browsers are told nothing, unless a page is named in the configuration."""
    origin = {"origin": "https://app.example.org"}
    asks = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for server, is_allowed in ((zoo_server, False), (open_to_all, True)):
        preflight = httpx.options(server.url + CHAT, headers=asks)
        assert (preflight.headers.get("access-control-allow-origin") == origin["origin"]) == is_allowed
        assert (preflight.status_code == 200) == is_allowed
        reply = server.get("/health", headers=origin)
        assert ("access-control-allow-origin" in reply.headers) == is_allowed
    other = open_to_all.get("/health", headers={"origin": "https://other.example.org"})
    assert "access-control-allow-origin" not in other.headers


def test_page(zoo_server: Served) -> None:
    """Its files come with a policy, and again only when they have changed."""
    for path, kind in (("/", "text/html"), ("/page/app.js", "text/javascript"), ("/page/page.css", "text/css")):
        found = zoo_server.get(path)
        assert found.headers["content-type"].startswith(kind)
        assert found.headers["content-security-policy"].startswith("default-src 'self'; frame-ancestors 'none'")
        assert found.headers["cache-control"] == "no-cache"
        again = zoo_server.get(path, headers={"if-none-match": found.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert zoo_server.get("/page/").status_code == 404
    assert zoo_server.get("/page/nothing.js").status_code == 404


def test_every_answer_is_hardened(zoo_server: Served) -> None:
    """Also refusals."""
    for path in ("/", "/health", "/nothing", "/v1/models", "/page/nothing"):
        assert zoo_server.get(path).headers["x-content-type-options"] == "nosniff"


def test_methods(zoo_server: Served) -> None:
    """HEAD as GET without a body; what a route does not take is 405 and says what it takes."""
    head = httpx.head(zoo_server.url + "/v1/models")
    assert (head.status_code, head.content) == (200, b"")
    for method, path in (
        ("OPTIONS", CHAT),
        ("GET", CHAT),
        ("DELETE", CHAT),
        ("POST", "/health"),
        ("PUT", "/v1/models"),
    ):
        response = httpx.request(method, zoo_server.url + path)
        assert response.status_code == 405
        assert response.json()["error"]["code"] == "method_not_allowed"
        assert response.headers["allow"]
    assert httpx.request("TRACE", zoo_server.url + "/nothing").status_code == 404


def test_run(config: Config, tmp_path: Path) -> None:
    """The folder of a run, while it grows; its report may do nothing."""
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {n}, "reward": 0.5, "length_bias": null, "name": "x"}}\n' for n in range(1, 1203))
        + '{"step": 12'
    )
    with served(config, Surroundings(ServerConfig(), run=RunFolder(tmp_path))) as server:
        found = server.get("/mope/run").json()
        assert (found["name"], found["has_report"]) == (tmp_path.name, False)
        steps = [row["step"] for row in found["metrics"]]
        assert steps == sorted(set(steps))
        assert steps[-1] == 1202
        assert 300 < len(steps) <= 500
        assert set(found["metrics"][0]) == {"step", "reward"}
        assert server.get("/mope/run/report").status_code == 404
        (tmp_path / "report.html").write_text("<p>Report</p>")
        report = server.get("/mope/run/report")
        assert report.text == "<p>Report</p>"
        assert report.headers["content-security-policy"].startswith("sandbox;")
        assert server.get("/mope/run").json()["has_report"]
        assert server.get("/mope/info").json()["has_run"]


def test_no_run(zoo_server: Served) -> None:
    """404, with what to do."""
    for path in ("/mope/run", "/mope/run/report"):
        response = zoo_server.get(path)
        assert response.status_code == 404
        assert "--run" in response.json()["error"]["message"]


def test_info(zoo_server: Served, config: Config) -> None:
    """What the page is built from."""
    info = zoo_server.get("/mope/info").json()
    assert [one["name"] for one in info["experts"]] == [one.name for one in config.experts]
    assert [one["name"] for one in info["dimensions"]] == [one.dimension for one in config.experts if not one.base]
    assert info["presets"] == config.presets
    assert info["merge_rules"] == ["linear", "geometric", "product"]
    assert info["max_tokens"] == 2048


def test_metrics(config: Config) -> None:
    """Requests by route and status, tokens, times, and what endpoints were asked."""
    with served(config) as server:
        replies = [server.post(CHAT, chat_body(seed=seed, n=2)).json() for seed in (1, 2)]
        server.post(CHAT, chat_body(n=0))
        server.get("/a stranger's address")
        text = server.get("/metrics").text
    numbers = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if not line.startswith("#")
    }
    assert numbers['mope_requests_total{route="/v1/chat/completions",status="200"}'] == 2
    assert numbers['mope_requests_total{route="/v1/chat/completions",status="422"}'] == 1
    assert numbers['mope_requests_total{route="other",status="404"}'] == 1
    num_tokens = sum(reply["usage"]["completion_tokens"] for reply in replies)
    assert numbers["mope_completion_tokens_total"] == num_tokens
    assert numbers["mope_first_token_seconds_count"] == 4
    assert numbers["mope_token_seconds_count"] == num_tokens - 4
    assert numbers["mope_drawn_tokens_total"] == sum(reply["mope"]["effort"]["num_generated"] for reply in replies)
    assert numbers['mope_endpoint_calls_total{expert="concise"}'] > 0
    assert numbers["mope_open_answers"] == 0
