"""Who may ask, and with what: key, Host, type and size of the body. As plain ASGI, so that streams stay unbuffered."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from typing import Any, Final

import orjson
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mope_bb.keys import Key
from mope_bb.server.failures import RefusalError, error_response

MAX_DEPTH: Final = 64
"""Of JSON. Schemas nest deepest, and are passed on to code that recurses."""
DRAINED: Final = 16
"""Bodies this many times too large are read to their end, unkept: clients read an answer only when they have sent."""
BODY_WITHIN_S: Final = 60.0
"""How long a body may take to come: a connection is not held for ever by one that stops half-way."""
OPEN_PATHS: Final = frozenset({"/", "/health"})
_HEADERS: Final = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))


class Guard:
    """Middleware that lets through what may pass."""

    def __init__(self, app: ASGIApp, *, key: Key | None, checks_host: bool) -> None:
        """`checks_host` is for loopback: what a browser there is made to send bears the name of a stranger's page."""
        self._app = app
        self._key = None if key is None else key.reveal().encode()
        self._checks_host = checks_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        try:
            self._check(scope)
        except RefusalError as refusal:
            await error_response(refusal)(scope, receive, hardened)
        else:
            await self._app(scope, receive, hardened)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._checks_host:
            hosts = headers.getlist("host")
            if len(hosts) != 1 or not is_loopback(_name_of(hosts[0])):
                raise RefusalError(
                    421,
                    "wrong_host",
                    f"this server answers on this machine only, and was asked as {', '.join(hosts) or 'nothing'!r}",
                    hint="Use http://127.0.0.1 or http://localhost, or serve with --host and a key.",
                )
        path: str = scope["path"]
        if self._key is not None and path not in OPEN_PATHS and not path.startswith("/page/"):
            self._check_key(headers.get("authorization"), self._key)

    def _check_key(self, given: str | None, key: bytes) -> None:
        scheme, _, value = (given or "").partition(" ")
        # latin-1 is how a header's bytes became text.
        if scheme.lower() != "bearer" or not hmac.compare_digest(value.strip().encode("latin-1"), key):
            raise RefusalError(
                401,
                "invalid_api_key",
                "no key was given" if not given else "the key is wrong",
                hint="Send the header `Authorization: Bearer KEY`.",
                headers={"www-authenticate": "Bearer"},
            )


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, is this machine and cannot be reached from another one."""
    name = host.strip("[]").rstrip(".").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _name_of(host: str) -> str:
    """A Host header without its port."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() and (name.startswith("[") or ":" not in name) else host


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body of a request that says that it is JSON. Raises RefusalError: 408, 413 or 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RefusalError(415, "unsupported_media_type", "the body is compressed", hint="Send it as it is.")
    if kind != "application/json":
        raise RefusalError(
            415,
            "unsupported_media_type",
            f"the body is {kind!r}, expected 'application/json'" if kind else "the body has no type",
            hint="Send the header `Content-Type: application/json`.",
        )
    return await _read(request, max_bytes)


async def _read(request: Request, max_bytes: int) -> bytes:
    """The body, of which never more than `max_bytes` are held, whatever its length is said to be."""
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_WITHIN_S):
            async for part in request.stream():
                size += len(part)
                if size <= max_bytes:
                    parts.append(part)
                elif size > DRAINED * max_bytes:
                    break
    except TimeoutError:
        raise RefusalError(
            408,
            "body_too_slow",
            f"the body has not come whole within {BODY_WITHIN_S:g} s",
            hint="Send it at once.",
            headers={"connection": "close"},
        ) from None
    except ClientDisconnect:
        raise RefusalError(400, "client_left", "the body has not come whole") from None
    if size > max_bytes:
        raise RefusalError(
            413,
            "body_too_large",
            f"the body is larger than {max_bytes:,} bytes",
            hint="Send less, or raise `max_body_bytes` in the [server] table of the server's mope.toml.",
            # What still comes is not read, so nothing else can be asked on this connection.
            headers={"connection": "close"} if size > DRAINED * max_bytes else None,
        )
    return b"".join(parts)


def parse_json(body: bytes) -> Any:
    """What a body says. Raises RefusalError: 422."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RefusalError(422, "malformed_body", f"the body is not JSON: {error}") from None
    if _is_too_deep(data):
        raise RefusalError(
            422, "malformed_body", f"the body is nested more than {MAX_DEPTH} deep", hint="Make it flatter."
        )
    return data


def _is_too_deep(data: Any) -> bool:
    level = [data] if isinstance(data, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
