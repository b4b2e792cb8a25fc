"""API keys: read from the environment by the name of a variable, sent to their endpoint, shown nowhere else.

A key is wrapped so that no `repr`, and no traceback with local variables, writes it out. What endpoints answer may
repeat what they were sent, so keys are also taken out of replies and of the messages of errors.
"""

from __future__ import annotations

import os
from typing import Final, Self
from urllib.parse import unquote, urlsplit

MIN_LENGTH: Final = 12
"""Of a secret. What is shorter is a stand-in, as "EMPTY" is, and stands in other texts by chance."""
HIDDEN: Final = "[key]"
_secrets: Final[set[str]] = set()


class Key:
    """A key that is not written out by accident."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        """Raises ValueError for what no header can hold; the message does not show it."""
        if not (value.isascii() and value.isprintable()):
            raise ValueError("it holds a line break or a character that is not ASCII")
        self._value = value
        keep_secret(value)

    @classmethod
    def of_variable(cls, name: str) -> Self | None:
        """The key in the environment variable `name`, None where there is none. Raises ValueError."""
        value = os.environ.get(name, "").strip()
        return cls(value) if value else None

    def reveal(self) -> str:
        """The key itself, for the header that it is sent in."""
        return self._value

    def __repr__(self) -> str:
        return f"Key({HIDDEN})"


def keep_secret(text: str) -> None:
    """Hide `text` from now on wherever `redacted` is asked."""
    if len(text) >= MIN_LENGTH:
        _secrets.add(text)


def keep_password(url: str) -> None:
    """The same for the password in an address."""
    try:
        password = urlsplit(url).password
    except ValueError:  # no address; who connects to it says so
        return
    if password:
        keep_secret(password)
        keep_secret(unquote(password))


def redacted(text: str) -> str:
    """`text` without any key."""
    for secret in _secrets:
        if secret in text:
            text = text.replace(secret, HIDDEN)
    return text


def redacted_body(body: bytes) -> bytes:
    """The body of a reply without any key."""
    for secret in _secrets:
        if (found := secret.encode()) in body:
            body = body.replace(found, HIDDEN.encode())
    return body
