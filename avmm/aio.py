"""What asyncio leaves to its users."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from avmm.errors import WaitTimeout


async def outlast(task: asyncio.Task[None]) -> None:
    """Await ``task`` to its end, however often we are cancelled meanwhile; then pass a cancellation on."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


async def cancel(*tasks: asyncio.Task[object]) -> None:
    """Cancel ``tasks`` and wait until they have ended; what they raise besides CancelledError is raised."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result


@asynccontextmanager
async def within(timeout: float | None, what: str) -> AsyncIterator[None]:
    """``timeout`` in seconds as a WaitTimeout that says what did not end; a TimeoutError of the caller's stays one."""
    began = time.monotonic()
    scope = asyncio.timeout(timeout)
    try:
        async with scope:
            yield
    except TimeoutError:
        if not scope.expired():
            raise
        elapsed = time.monotonic() - began
        raise WaitTimeout(f"{what} after {elapsed:.1f} s", elapsed=elapsed) from None
