"""Run a coroutine test under the stock event loop and under uvloop."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop

_at_end: list[Callable[[], None]] = []


def at_end(callback: Callable[[], None]) -> None:
    """Call ``callback`` on the loop when the test that runs now is over."""
    _at_end.append(callback)


LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def on_both_loops(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Make ``test``, a coroutine function, a plain test that runs once per loop; other parameters stay."""

    def run(loop_name: str, **arguments: Any) -> None:
        async def body() -> None:
            try:
                await test(**arguments)
            finally:
                while _at_end:
                    _at_end.pop()()

        with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
            runner.run(body())

    mine = inspect.Parameter("loop_name", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    functools.update_wrapper(run, test)
    del run.__dict__["__wrapped__"]  # or pytest would see the coroutine function behind it
    run.__dict__["__signature__"] = inspect.Signature([mine, *inspect.signature(test).parameters.values()])
    parametrized: Callable[..., None] = pytest.mark.parametrize("loop_name", LOOPS)(run)
    return parametrized
