"""The two things asyncio leaves to its users."""

from __future__ import annotations

import asyncio


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
