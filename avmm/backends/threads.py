"""Blocking calls made awaitable: a few threads for one drive or one shared folder, and when none is worth its wakes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, TypeVar

#: Calls that one :class:`Threads` works on at a time.
THREADS: Final = 4

#: What is a wait, and for how long afterwards there is no more brief work, at least, in seconds.
_LONG: Final = 1e-3
_PATIENCE: Final = 1.0

#: File systems whose every call may wait for a network, or for a program: nothing is done on the event loop there.
_SLOW: Final = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "afs", "fuse", "fuseblk", "virtiofs", "autofs")

#: Which of getrusage's this is, where there is one of threads.
_THREAD: Final = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)

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


class Brief:
    """Work of one kind that a local file system does in memory in microseconds, sooner than two threads wake: done on
    the event loop, but not for a while after some has had to wait."""

    def __init__(self) -> None:
        self._waits_until = 0.0  # time.monotonic()

    def allowed(self) -> bool:
        """Whether it may be done here now."""
        return time.monotonic() >= self._waits_until

    def run(self, work: Callable[[], T]) -> T:
        """What ``work()`` returns; and remember if it has had to wait."""
        began = time.monotonic()
        waits = resource.getrusage(_THREAD).ru_nvcsw
        try:
            return work()
        finally:
            now = time.monotonic()
            took = now - began
            if took > _LONG and resource.getrusage(_THREAD).ru_nvcsw > waits:
                self._waits_until = now + max(_PATIENCE, 100 * took)  # waits are a hundredth of the time, at most


def is_slow(path: Path) -> bool:
    """Whether ``path`` is on a network, or behind a program (proc(5), mountinfo). Linux; elsewhere nobody can tell."""
    try:
        device = path.stat().st_dev
        with open("/proc/self/mountinfo") as lines:
            found = [line.split() for line in lines]
    except OSError:
        return True
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for words in found:
        if words[2] == wanted:
            kind = words[words.index("-") + 1]
            return kind in _SLOW or kind.startswith("fuse.")
    return True
