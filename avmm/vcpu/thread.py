"""A vCPU's own thread: an executor of one, made for short trips.

A :class:`concurrent.futures.ThreadPoolExecutor` would do, but every park costs a trip, and half of a trip's price
would be its futures and locks.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import struct
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from avmm.vcpu.stats import thread_cpu_ns

T = TypeVar("T")

#: Signals that a fault of this very thread raises; blocking them would only hide where it happened.
_OWN_FAULTS: Final = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT})

_PR_SET_TIMERSLACK: Final = 29

#: The number of sched_setattr(2), which the C library has no function for, by machine.
_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}

#: How long, in nanoseconds, a vCPU runs at a time where others want its processor. Linux's default is 0.7 to 2.8 ms.
_SLICE_NS: Final = 500_000


def _wake_on_time() -> None:
    """Let the kernel end this thread's waits when they are over, and run it then.

    Linux ends them up to 50 us late, to save a wake (prctl(2), PR_SET_TIMERSLACK). And a thread that is woken on the
    waker's own processor first waits until that one sleeps, unless it asks for shorter slices (sched_setattr(2), since
    6.12; older kernels ignore it): it has the interrupt of whoever woke it. Its share of the processor stays the same.
    macOS has no such call for one thread; where it coalesces, a timer is late by as much.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.PyDLL(None)
    libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    number = _SCHED_SETATTR.get(os.uname().machine)
    if number is not None and os.sched_getscheduler(0) == os.SCHED_OTHER:  # not if the user has chosen otherwise
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        # struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period
        attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, _SLICE_NS, 0, 0)
        libc.syscall(number, 0, attributes, 0)


class VcpuThread:
    """Runs one function at a time, in order, on a thread of its own. Used on the loop's thread only."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._work: SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = SimpleQueue()
        # Daemon: a program that abandons its event loop must still be able to end.
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    @property
    def cpu_ns(self) -> int | None:
        """CPU time used, in nanoseconds; None once it has ended."""
        return thread_cpu_ns(self._thread)

    def submit(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Call ``function`` on the thread. Cancelling the future does not keep it from being called."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._work.put((function, future))
        return future

    def join(self) -> None:
        """End the thread after what has been submitted."""
        self._work.put(None)
        self._thread.join()

    def _main(self) -> None:
        # A signal handled here would make the engine return for nothing (UNKNOWN on macOS).
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.valid_signals()) - _OWN_FAULTS)
        _wake_on_time()
        get = self._work.get
        post = self._loop.call_soon_threadsafe
        while (work := get()) is not None:
            function, future = work
            try:
                result = function()
            except BaseException as error:
                post(_fail, future, error)
            else:
                post(_succeed, future, result)
            del function, future, work  # hold nothing while idle


def _succeed(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
