"""Blocking calls made awaitable: a few threads for one drive or one shared folder."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Final, TypeVar

#: Calls that one :class:`Threads` works on at a time.
THREADS: Final = 4

T = TypeVar("T")


@dataclass(slots=True)
class _Job:
    """A call on its way through a thread; ``left`` is what a caller waits for who has been cancelled meanwhile.

    Both sides clear what they have used: the work, and an error's frames, hold views of guest memory, which may be gone
    by the time that the thread lets go of its job.
    """

    work: Callable[[], Any] | None
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[Any] | None
    result: Any = None
    error: Exception | None = None
    left: asyncio.Future[None] | None = None
    done: bool = False

    def do(self) -> None:
        """On the thread."""
        assert self.work is not None
        try:
            self.result = self.work()
        except Exception as error:
            self.error = error
        self.work = None
        self.loop.call_soon_threadsafe(self._finish)

    def _finish(self) -> None:
        self.done = True
        answer, self.answer = self.answer, None
        error, self.error = self.error, None
        if answer is not None and not answer.done():
            if error is None:
                answer.set_result(self.result)
            else:
                answer.set_exception(error)
        if self.left is not None and not self.left.done():
            self.left.set_result(None)


class Threads:
    """Up to :data:`THREADS` threads. A round trip costs half an executor's, which is most of a small request."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._waiting = 0  # jobs that are queued or in work

    async def run(self, work: Callable[[], T]) -> T:
        """What ``work()`` returns, done on a thread. Cancelled, it returns no sooner than the thread, which is at work
        in guest memory."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        job = _Job(work, loop, answer)
        self._waiting += 1
        if self._waiting > len(self._threads) < THREADS:
            thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._jobs.put(job)
        try:
            return await answer
        except asyncio.CancelledError:
            while not job.done:
                job.left = loop.create_future()
                with contextlib.suppress(asyncio.CancelledError):
                    await job.left
            raise
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """End the threads; nothing may be in work."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.do()
