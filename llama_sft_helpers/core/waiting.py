"""Calls that are given up after some time."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")


def within(seconds: float, call: Callable[[], _Result]) -> _Result:
    """Run a call in a thread of its own and give it up after some seconds.

    Neither a slow name server nor a hanging proxy knows of a client's time limits.

    Raises:
        TimeoutError: There was no answer in time; whatever the call raises is raised here too.
    """
    future: concurrent.futures.Future[_Result] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # an executor would wait for it at the end
    concurrent.futures.wait([future], timeout=seconds)
    if not future.done():
        raise TimeoutError(f"no answer in {seconds:g} s")
    return future.result()
