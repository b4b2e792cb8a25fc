"""Blocking calls beside an event loop, on threads that cannot keep the process from ending."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def in_thread(call: Callable[[], T], *, name: str) -> T:
    """The value of `call()`, computed on a daemon thread called `name`.

    Unlike `asyncio.to_thread` it has no pool whose threads Python waits for at exit: a reward function that hangs for
    ever does not make the process hang as well. A cancelled call runs on, unheard.
    """
    future: Future[T] = Future()

    def work() -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001  # handed to the caller
                future.set_exception(error)

    threading.Thread(target=work, name=f"mope-bb-{name}", daemon=True).start()
    return await asyncio.wrap_future(future)
