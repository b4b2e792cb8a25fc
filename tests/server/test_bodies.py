"""Bodies that are too large, malformed or hostile: a refusal in words, and the server goes on."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import pytest

from tests.server.serving import Served, chat_body

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def send(server: Served, content: Any, path: str = CHAT, **headers: str) -> httpx.Response:
    """Send raw bytes."""
    return httpx.post(server.url + path, content=content, headers={**JSON, **headers}, timeout=60)


def assert_refused(response: httpx.Response, status: int, words: str = "") -> None:
    """An error in OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]


def nested(depth: int) -> str:
    """A schema of this depth."""
    return '{"a":' * depth + "1" + "}" * depth


MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{'model': 'mope'}",
    "cut off": b'{"model": "mope", "messages": [',
    "no object": b'["mope"]',
    "null": b"null",
    "NaN": b'{"model":"mope","messages":[{"role":"user","content":"x"}],"temperature":NaN}',
    "Infinity": b'{"model":"mope","messages":[{"role":"user","content":"x"}],"temperature":Infinity}',
    "1e999": b'{"model":"mope","messages":[{"role":"user","content":"x"}],"temperature":1e999}',
    "half a surrogate pair": b'{"model":"mope","messages":[{"role":"user","content":"\\ud800"}]}',
    "not UTF-8": b'{"model":"mope","messages":[{"role":"user","content":"\xff"}]}',
    "UTF-16": '{"model":"mope"}'.encode("utf-16"),
    "deep": (b"[" * 100_000) + (b"]" * 100_000),
    "deep schema": json.dumps(chat_body()).encode()[:-1] + b',"tools":[' + nested(500).encode() + b"]}",
    "deep metadata": json.dumps(chat_body()).encode()[:-1] + b',"metadata":' + nested(80).encode() + b"}",
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed(zoo_server: Served, what: str) -> None:
    """422, whatever is wrong with the JSON."""
    for path in (CHAT, "/v1/completions", f"{CHAT}/x/preference"):
        assert_refused(send(zoo_server, MALFORMED[what], path), 422)


WRONG_VALUES: dict[str, tuple[dict[str, Any], int]] = {
    "n is huge": ({"n": 10**9}, 400),
    "n is beyond 64 bits": ({"n": 10**40}, 422),
    "n is 0": ({"n": 0}, 422),
    "n is text": ({"n": "2"}, 422),
    "n is true": ({"n": True}, 422),
    "max_tokens is huge": ({"max_tokens": 10**18}, 400),
    "max_tokens is negative": ({"max_tokens": -1}, 422),
    "seed is beyond 64 bits": ({"seed": 2**64 + 1}, 422),
    "temperature is huge": ({"temperature": 1e308}, 422),
    "top_logprobs is huge": ({"logprobs": True, "top_logprobs": 10**6}, 400),
    "top_p is 0": ({"top_p": 0}, 422),
    "stop is empty": ({"stop": ""}, 422),
    "stop has an empty one": ({"stop": ["a", ""]}, 422),
    "stop is long": ({"stop": ["a"] * 17}, 422),
    "stop is a number": ({"stop": 3}, 422),
    "many messages": ({"messages": [{"role": "user", "content": "x"}] * 257}, 400),
    "a role of another kind": ({"messages": [{"role": "function", "content": "x"}]}, 422),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 422),
    "no text in a part": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 422),
    "model is a number": ({"model": 3}, 422),
    "model is missing": ({"model": None}, 422),
    "weights are text": ({"preference": {"concise": "much"}}, 422),
    "weights are beyond floats": ({"preference": {"concise": 1e308, "friendly": 1e308}}, 400),
    "preference is a list": ({"preference": ["concise"]}, 422),
    "preference is empty": ({"preference": " "}, 400),
    "preference is long": ({"preference": "kind " * 100_000}, 400),
    "trace is unknown": ({"trace": "all"}, 422),
    "a tool without a name": ({"tools": [{"type": "function", "function": {}}]}, 400),
    "a tool that is chosen and not offered": ({"tool_choice": "required"}, 400),
    "an unknown format": ({"response_format": {"type": "yaml"}}, 400),
    "a schema that is none": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 7}}}},
        400,
    ),
}


@pytest.mark.parametrize("what", WRONG_VALUES)
def test_wrong_values(zoo_server: Served, what: str) -> None:
    """JSON that says what cannot be."""
    fields, status = WRONG_VALUES[what]
    assert_refused(zoo_server.post(CHAT, chat_body(**fields)), status)


def test_many_small_messages(zoo_server: Served) -> None:
    """100,000 messages are larger than a body may be, and 100,000 empty ones are malformed."""
    assert_refused(zoo_server.post(CHAT, chat_body(messages=[{"role": "user", "content": "x"}] * 100_000)), 413)
    assert_refused(zoo_server.post(CHAT, chat_body(messages=[{}] * 100_000)), 422, "messages.0.role")


def chunks_of(size: int) -> Iterator[bytes]:
    """A body that does not tell its length."""
    yield b'{"model": "'
    for _ in range(size // 1024):
        yield b"x" * 1024


@pytest.mark.parametrize("megabytes", [2, 8])
def test_too_large(zoo_server: Served, megabytes: int) -> None:
    """With a length and without one."""
    assert_refused(send(zoo_server, b" " * (megabytes * 2**20)), 413, "larger than 1,048,576 bytes")
    assert_refused(send(zoo_server, chunks_of(megabytes * 2**20)), 413, "larger than 1,048,576 bytes")


def test_endless_body(zoo_server: Served) -> None:
    """A body that never ends is not read for ever."""
    address = urlsplit(zoo_server.url)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=60) as client:
        client.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        block = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        sent = 0
        try:
            while sent < 2**28:
                client.sendall(block)
                sent += len(block)
        except (ConnectionResetError, BrokenPipeError):
            pass
    assert 2**20 < sent < 2**26


SLOW_HEAD: Final = "GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: "


def test_body_that_stops_half_way(zoo_server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for: 408, and the connection is closed."""
    monkeypatch.setattr("mope_bb.server.guard.BODY_WITHIN_S", 0.2)
    address = urlsplit(zoo_server.url)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=60) as client:
        client.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        reply = b"".join(iter(lambda: client.recv(4096), b""))
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert b"has not come whole within 0.2 s" in reply


@pytest.mark.parametrize(
    ("is_second", "sent"),
    [(False, ""), (False, "POST "), (False, SLOW_HEAD), (True, "POST "), (True, SLOW_HEAD)],
)
def test_head_that_stops_half_way(
    zoo_server: Served, monkeypatch: pytest.MonkeyPatch, sent: str, *, is_second: bool
) -> None:
    """The connection is closed, a new one as well as one that has been of use."""
    monkeypatch.setattr("mope_bb.server.listening.HEAD_WITHIN_S", 0.3)
    address = urlsplit(zoo_server.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as client:
        if is_second:
            client.sendall(f"GET /health HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
            assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
        client.sendall(sent.encode())
        while rest := client.recv(4096):
            assert b"HTTP/1.1" not in rest


def test_time_for_a_head_is_for_nothing_else(zoo_server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is there the body may take longer, and so may a kept connection until its next request."""
    monkeypatch.setattr("mope_bb.server.listening.HEAD_WITHIN_S", 0.2)
    body = json.dumps(chat_body()).encode()
    client = http.client.HTTPConnection(urlsplit(zoo_server.url).netloc, timeout=60)
    for _ in range(2):
        client.putrequest("POST", CHAT)
        client.putheader("Content-Type", "application/json")
        client.putheader("Content-Length", str(len(body)))
        client.endheaders()
        time.sleep(0.5)
        client.send(body)
        reply = client.getresponse()
        assert (reply.status, json.loads(reply.read())["model"]) == (200, "mope")
        time.sleep(0.5)
    client.close()


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_content_type(zoo_server: Served, kind: str | None) -> None:
    """What a page of a stranger could send without asking first is refused."""
    headers = {} if kind is None else {"content-type": kind}
    response = httpx.post(zoo_server.url + CHAT, content=json.dumps(chat_body()).encode(), headers=headers)
    assert_refused(response, 415)


def test_content_encoding(zoo_server: Served) -> None:
    """No bombs are unpacked."""
    assert_refused(send(zoo_server, b"x", **{"content-encoding": "gzip"}), 415, "compressed")
    assert send(zoo_server, json.dumps(chat_body()).encode(), **{"content-encoding": "identity"}).status_code == 200


def test_content_type_with_charset(zoo_server: Served) -> None:
    """As many clients send it."""
    kind = "Application/JSON; charset=utf-8"
    assert send(zoo_server, json.dumps(chat_body()).encode(), **{"content-type": kind}).status_code == 200


def test_tiny_temperature(zoo_server: Served) -> None:
    """It is greedy, and no division by nearly nothing."""
    texts = {
        zoo_server.post(CHAT, chat_body(temperature=temperature, seed=seed)).json()["choices"][0]["message"]["content"]
        for temperature, seed in ((0, 1), (5e-324, 2), (1e-9, 3))
    }
    assert len(texts) == 1


def test_prompts(zoo_server: Served) -> None:
    """Of raw text."""
    path = "/v1/completions"
    assert_refused(zoo_server.post(path, {"model": "mope", "prompt": ""}), 400, "empty")
    assert_refused(zoo_server.post(path, {"model": "mope", "prompt": []}), 422)
    assert_refused(zoo_server.post(path, {"model": "mope", "prompt": [1, 2]}), 422)
    assert_refused(zoo_server.post(path, {"model": "mope", "prompt": ["a"] * 65}), 400, "`prompt` is 65")
    assert_refused(zoo_server.post(path, {"model": "mope", "prompt": "a", "echo": True}), 400, "`echo`")


def test_after_all_that(zoo_server: Served) -> None:
    """No answer is left open."""
    assert "mope_open_answers 0.0" in zoo_server.get("/metrics").text
    assert 'status="500"' not in zoo_server.get("/metrics").text
