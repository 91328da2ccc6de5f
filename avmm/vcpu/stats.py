"""What a vCPU's sleeps looked like, as plain numbers: cheap enough to be always on, readable at any time."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from typing import Final

#: Histograms have this many buckets. Bucket n counts the durations of n bits: 2**(n-1) <= nanoseconds < 2**n; the
#: last one counts the longer ones too (four minutes and more).
BUCKETS: Final = 39


class WakeStats:
    """A vCPU's sleeps and the way out of them. One clock read at either end, under the VM's lock.

    ``latency`` and ``lateness`` are histograms, see :data:`BUCKETS`: of the way from the wake to the guest, whatever
    the cause, and of the time the guest is behind its timer's deadline when it was the timer. ``..._ns`` are
    their sums in nanoseconds; ``woken`` is when the latest wake was decided, on the monotonic clock.
    """

    __slots__ = (
        "_deadline", "_parked_at", "_parked_ns", "_waking", "latency", "latency_ns", "lateness", "lateness_ns", "woken",
    )  # fmt: skip

    def __init__(self) -> None:
        self.latency = [0] * BUCKETS
        self.lateness = [0] * BUCKETS
        self.latency_ns = 0
        self.lateness_ns = 0
        self.woken = 0
        self._parked_at = 0
        self._parked_ns = 0
        self._waking = False
        self._deadline: int | None = None

    def park(self) -> None:
        """A sleep in WFI begins now."""
        self._parked_at = time.monotonic_ns()

    def wake(self, now: int, deadline: int | None) -> None:
        """A sleep ends at ``now``, in nanoseconds of the monotonic clock; ``deadline``: by the timer, set to this."""
        self.woken = now
        if self._parked_at:
            self._parked_ns += self.woken - self._parked_at
            self._parked_at = 0
        self._deadline = deadline
        self._waking = True

    def entering(self, now: int | None = None) -> None:
        """The vCPU is about to enter the guest, or did so at ``now``, in nanoseconds of the monotonic clock."""
        if not self._waking:
            return
        self._waking = False
        if now is None:
            now = time.monotonic_ns()
        latency = now - self.woken
        self.latency[_bucket(latency)] += 1
        self.latency_ns += latency
        if self._deadline is not None:
            lateness = now - self._deadline
            self.lateness[_bucket(lateness)] += 1
            self.lateness_ns += lateness

    @property
    def parked_ns(self) -> int:
        """How long the vCPU has been parked altogether, a sleep it is in included."""
        return self._parked_ns + (time.monotonic_ns() - self._parked_at if self._parked_at else 0)


def _bucket(ns: int) -> int:
    return min(max(ns, 0).bit_length(), BUCKETS - 1)


if sys.platform == "darwin":
    _PROC_PIDTHREADID64INFO: Final = 15  # <sys/proc_info.h>

    class _ThreadInfo(ctypes.Structure):
        """struct proc_threadinfo of <sys/proc_info.h>."""

        _fields_ = (
            ("user_time", ctypes.c_uint64),  # nanoseconds
            ("system_time", ctypes.c_uint64),
            ("rest", ctypes.c_uint8 * 96),
        )

    def thread_cpu_ns(thread: threading.Thread) -> int | None:
        """The CPU time ``thread`` has used, in nanoseconds; None when it has ended or the system does not tell."""
        import os

        info = _ThreadInfo()
        size = ctypes.sizeof(info)
        if not thread.is_alive() or thread.native_id is None:
            return None
        read = ctypes.CDLL(None).proc_pidinfo(
            os.getpid(), _PROC_PIDTHREADID64INFO, ctypes.c_uint64(thread.native_id), ctypes.byref(info), size
        )
        return info.user_time + info.system_time if read == size else None

else:

    def thread_cpu_ns(thread: threading.Thread) -> int | None:
        """The CPU time ``thread`` has used, in nanoseconds; None when it has ended."""
        if not thread.is_alive() or thread.ident is None:
            return None
        return time.clock_gettime_ns(time.pthread_getcpuclockid(thread.ident))
