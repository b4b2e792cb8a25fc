"""What a broken or hostile endpoint may make of a good reply: changes of the tree of its JSON, and of its bytes."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any, Final

DEEP: Final = 1_000
"""Below the depth that the JSON decoder allows, above the one at which Python gives up on writing a value out."""
LONG: Final = 3_000


def _deep_list() -> Any:
    found: Any = 0
    for _ in range(DEEP):
        found = [found]
    return found


def _deep_table() -> Any:
    found: Any = 0
    for _ in range(DEEP):
        found = {"message": found}
    return found


STRANGE: Final[Sequence[Callable[[], Any]]] = (
    *(lambda value=value: value for value in (None, True, False, 0, 1, -1, 2, 255, 256, 2**31, 2**63, 2**64, 10**400)),
    *(
        lambda value=value: value
        for value in (-(10**400), 0.0, -0.0, 0.5, 1.5, -1e-320, 1e308, -9999.0, -800.0, -3.4e38)
    ),
    *(lambda value=value: value for value in (float("nan"), float("inf"), float("-inf"))),
    *(lambda text=text: text for text in ("", " ", "x", "\0", "\ud800", "\ufffd", "\x1b[31m", "é", "0", "-0.5", "NaN")),
    *(
        lambda text=text: text
        for text in ("token_id:", "token_id:-1", "token_id:7", "token_id:٧", "token_id:" + "9" * 30)
    ),
    *(lambda text=text: text for text in ("<|end|>", "<|im_end|>", "</s>", "stop", "length", "abort", "token_id:x")),
    lambda: "a" * LONG,
    lambda: [],
    lambda: {},
    lambda: [[]],
    lambda: [None],
    lambda: [1, 2, 3],
    lambda: [-1],
    lambda: [256],
    lambda: [97] * 2000,
    lambda: {"error": {"message": {"a": ["b"]}, "code": "429"}},
)
"""Values that stand where others are expected."""
HUGE: Final[Sequence[Callable[[], Any]]] = (
    _deep_list,
    _deep_table,
    lambda: [0.5] * LONG,
    lambda: {str(n): n for n in range(999)},
)
"""The same, but slow to make."""


def strange_value(rng: random.Random) -> Any:
    """One of the values above."""
    return rng.choice(HUGE if rng.random() < 0.02 else STRANGE)()


def mutate_tree(tree: Any, rng: random.Random, others: Sequence[Any] = ()) -> Any:
    """`tree` with one to four changes, made in place; `others` are trees that parts may be taken from."""
    root = [tree]
    for _ in range(1 + min(3, int(rng.expovariate(1.0)))):
        holder, key = _choose_place(root, rng)
        _CHANGES[int(rng.random() * len(_CHANGES))](holder, key, rng, others)
        if not root:
            return strange_value(rng)
    return root[0]


def _choose_place(root: list[Any], rng: random.Random) -> tuple[Any, Any]:
    """A container within `root`, and one of its keys; deeper ones are as likely as those at the top."""
    holder: Any = root
    key: Any = 0
    while True:
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.15:
            return holder, key
        holder = inner
        key = rng.choice(list(inner)) if isinstance(inner, dict) else int(rng.random() * len(inner))


def _replace(holder: Any, key: Any, rng: random.Random, others: Sequence[Any]) -> None:
    holder[key] = strange_value(rng)


def _drop(holder: Any, key: Any, rng: random.Random, others: Sequence[Any]) -> None:
    del holder[key]


def _repeat(holder: Any, key: Any, rng: random.Random, others: Sequence[Any]) -> None:
    if isinstance(holder, list):
        holder.insert(int(rng.random() * (len(holder) + 1)), holder[key])
    else:
        holder[f"{key}s"] = holder[key]


def _wrap(holder: Any, key: Any, rng: random.Random, others: Sequence[Any]) -> None:
    holder[key] = [holder[key]] if rng.random() < 0.5 else {"content": holder[key]}


def _swap(holder: Any, key: Any, rng: random.Random, others: Sequence[Any]) -> None:
    other = rng.choice(list(holder)) if isinstance(holder, dict) else int(rng.random() * len(holder))
    holder[key], holder[other] = holder[other], holder[key]


def _shuffle(holder: Any, key: Any, rng: random.Random, others: Sequence[Any]) -> None:
    if isinstance(holder[key], list):
        rng.shuffle(holder[key])
    elif isinstance(holder, list):
        del holder[key + 1 :]


def _bend(holder: Any, key: Any, rng: random.Random, others: Sequence[Any]) -> None:
    """A value of the same type, near the old one."""
    value = holder[key]
    if isinstance(value, bool):
        holder[key] = not value
    elif isinstance(value, int):
        near = (-value, value + 1, value * 10**6, str(value), bool(value))
        holder[key] = float(value) if abs(value) < 2**53 and rng.random() < 0.2 else rng.choice(near)
    elif isinstance(value, float):
        holder[key] = rng.choice((-value, value * 1000, value / 1e6, int(value) if abs(value) < 1e9 else 0, str(value)))
    elif isinstance(value, str):
        holder[key] = rng.choice(
            (value + value, value[:-1], value.upper(), f"token_id:{value}", value + "\ud800", [value])
        )
    else:
        holder[key] = None


def _graft(holder: Any, key: Any, rng: random.Random, others: Sequence[Any]) -> None:
    """Something of another reply."""
    if others:
        found_in, place = _choose_place([rng.choice(others)], rng)
        holder[key] = copy.deepcopy(found_in[place])


_CHANGES: Final = (_replace, _replace, _replace, _drop, _repeat, _wrap, _swap, _shuffle, _bend, _bend, _graft)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to four changes: bits flipped, pieces cut out, repeated or put in, or cut off."""
    found = bytearray(data)
    for _ in range(1 + min(3, int(rng.expovariate(1.0)))):
        start = int(rng.random() * (len(found) + 1))
        end = start + int(rng.expovariate(0.2))
        kind = int(rng.random() * 5.1)
        if kind == 0 and start < len(found):
            found[start] ^= 1 << int(rng.random() * 8)
        elif kind == 1:
            del found[start:end]
        elif kind == 2:
            found[start:start] = found[start:end] * int(1 + rng.random() * 3)
        elif kind == 3:
            found[start:start] = rng.choice(_SNIPPETS)
        elif kind == 4:
            del found[start:]
        else:
            found[:] = b"[" * DEEP + found + b"]" * DEEP
    return bytes(found)


_SNIPPETS: Final = (
    *(b"[" * 2000, b'{"a":' * 1500, b"\xff\xfe", b"\x00", b'"', b"}", b"]", b",", b"\\ud800", b"\n", b"\xe2\x80\xa8"),
    *(b"NaN", b"Infinity", b"-", b"1e999", b"-1e309", b"9" * 400, b"9" * 5000, b"true", b"null", b"0.0", b"''"),
    *(b" \t", b"=", b"\x1b[2J", "٧".encode(), b"Mon, 01 Jan 0001 00:00:00 GMT", b"9" * 20, b"+9999", b"%00"),
)


def mutate_text(text: str, rng: random.Random) -> str:
    """`text` with changes as `mutate_bytes` makes them; what is no UTF-8 then becomes half surrogate pairs."""
    return mutate_bytes(text.encode("utf-8", "surrogatepass"), rng).decode("utf-8", "surrogateescape")
