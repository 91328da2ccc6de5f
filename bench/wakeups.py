"""How fast a sleeping guest wakes, against what the machine itself can do in the same run.

Floors: a lock handed to another thread and back (two wakes), a bare timerfd. Beside them the guest ``firmware/idle``: a
device interrupt raised on the loop's thread or on another until the guest's handler runs, and its timer's lateness. The
moments are the guest's own counter readings; what is compared is measured in turns, some wakes of each at a time.

python bench/wakeups.py [-n 2000] [--hz 500] [--loop uvloop|asyncio] [-c 1]
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import random
import re
import statistics
import threading
import time
from pathlib import Path

import uvloop
from side_by_side import headline

import avmm

IMAGE = Path(__file__).parents[1] / "firmware" / "images" / "idle.bin"
MAILBOX = 0x0B00_0000
SPI = 10
BATCH = 100


def quantiles(nanoseconds: list[int]) -> str:
    """Median, 99th percentile and maximum, in microseconds."""
    ordered = sorted(nanoseconds)
    p99 = ordered[len(ordered) * 99 // 100]
    return f"p50 {statistics.median(ordered) / 1e3:7.1f}   p99 {p99 / 1e3:7.1f}   max {ordered[-1] / 1e3:8.1f} us"


def pauses(number: int) -> list[float]:
    """Seconds between two wakes, 0.5 to 3 ms, the same in every run: sleeping threads, not hot ones."""
    rng = random.Random(1)
    return [rng.uniform(0.0005, 0.003) for _ in range(number)]


def lock_round_trips(number: int) -> list[int]:
    """A lock handed to a thread that waits for it, and one handed back."""
    there, back = threading.Lock(), threading.Lock()
    there.acquire()
    back.acquire()

    def other() -> None:
        for _ in range(number):
            there.acquire()
            back.release()

    thread = threading.Thread(target=other)
    thread.start()
    taken = []
    for pause in pauses(number):
        time.sleep(pause)
        began = time.monotonic_ns()
        there.release()
        back.acquire()
        taken.append(time.monotonic_ns() - began)
    thread.join()
    return taken


def timerfd_lateness(number: int) -> list[int]:
    """How late a thread that reads a timerfd wakes."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_CLOEXEC)
    spec = (ctypes.c_long * 4)()
    late = []
    for pause in pauses(number):
        deadline = time.monotonic_ns() + int(pause * 1e9)
        spec[2], spec[3] = divmod(deadline, 10**9)
        libc.timerfd_settime(fd, 1, spec, None)
        os.read(fd, 8)
        late.append(time.monotonic_ns() - deadline)
    os.close(fd)
    return late


class Mailbox:
    """A device that raises an interrupt when told, and lowers it when the guest writes when it saw it."""

    def __init__(self, line, clock) -> None:
        self.line = line
        self.clock = clock
        self.answered = threading.Semaphore(0)
        self.on_answer = self.answered.release
        self.taken: list[int] = []
        self.posted = 0

    def post(self) -> None:
        self.posted = time.monotonic_ns()
        self.line.set(True)

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.line.set(False)
        seen = self.clock.timebase.to_ns(value + self.clock.offset)
        self.taken.append(seen - self.posted)
        self.on_answer()


def connect(vm) -> Mailbox:
    """A mailbox on the VM's bus; before the guest runs."""
    mailbox = Mailbox(vm._machine.board.gic.spi(SPI), vm._machine.clock)
    vm._machine.board.bus.add(MAILBOX, 0x1000, mailbox, "mailbox")
    return mailbox


async def post_from_thread(mailbox: Mailbox, number: int) -> list[int]:
    def poster() -> None:
        for pause in pauses(number):
            time.sleep(pause)
            mailbox.post()
            if not mailbox.answered.acquire(timeout=5):
                raise TimeoutError("the guest does not answer its interrupt")

    mailbox.taken = []
    mailbox.on_answer = mailbox.answered.release
    await asyncio.to_thread(poster)
    return mailbox.taken


async def post_from_loop(mailbox: Mailbox, number: int) -> list[int]:
    loop = asyncio.get_running_loop()
    answered = asyncio.Event()
    mailbox.taken = []
    mailbox.on_answer = lambda: loop.call_soon_threadsafe(answered.set)
    for pause in pauses(number):
        await asyncio.sleep(pause)
        answered.clear()
        mailbox.post()
        await answered.wait()
    return mailbox.taken


async def lateness(vm) -> tuple[float, ...]:
    """The guest's own figures of its timer, in microseconds: p50, p99, max."""
    vm.console.write(b"r")
    found = await vm.console.expect(rb"(?s)lateness_p50 (\d+).*_p99 (\d+).*_max (\d+).*report done", timeout=30)
    early = re.search(rb"early (\d+)", vm.console.output)
    if early is None or early[1] != b"0":
        raise SystemExit("an interrupt came before its time")
    return tuple(int(figure) * 125 / 3e3 for figure in found.groups())


def against(floor: list[int], ours: list[int]) -> str:
    """Ratios of p50 and p99."""
    a, b = sorted(floor), sorted(ours)
    p50 = statistics.median(b) / statistics.median(a)
    return f"   / floor {p50:5.2f}, {b[len(b) * 99 // 100] / a[len(a) * 99 // 100]:5.2f}"


async def interrupts(number: int, cpus: int) -> dict[str, list[int]]:
    """Nanoseconds: of the floor, and from a device's interrupt to its handler, raised by a thread and by the loop."""
    floor: list[int] = []
    ours: dict[str, list[int]] = {"thread": [], "loop": []}
    async with avmm.boot(IMAGE, memory="64M", cpus=cpus) as vm:
        mailbox = connect(vm)
        await vm.console.expect(rb"idle\r\n", timeout=30)
        for _ in range(number // BATCH):
            floor += await asyncio.to_thread(lock_round_trips, BATCH)
            ours["thread"] += await post_from_thread(mailbox, BATCH)
            ours["loop"] += await post_from_loop(mailbox, BATCH)
    return {"floor": floor, **ours}


async def timers(number: int, cpus: int, hz: int) -> tuple[list[int], tuple[float, ...]]:
    """How late a bare timerfd is, in nanoseconds, and the guest's timer: p50, p99, max in microseconds."""
    floor = timerfd_lateness(number // 2)
    async with avmm.boot(IMAGE, memory="64M", cpus=cpus, append=f"hz={hz}") as vm:
        await vm.console.expect(rb"idle\r\n", timeout=30)
        await asyncio.sleep(number / hz)
        guest = await lateness(vm)
    return floor + timerfd_lateness(number // 2), guest


def show_interrupts(found: dict[str, list[int]]) -> None:
    print(f"floor: lock there and back        {quantiles(found['floor'])}")
    for where in ("thread", "loop"):
        taken = found[where]
        print(f"device interrupt, from the {where:6s} {quantiles(taken)}{against(found['floor'], taken)}", flush=True)


def show_timers(floor: list[int], guest: tuple[float, ...]) -> None:
    p50, p99, most = guest
    ordered = sorted(floor)
    print(f"floor: bare timerfd               {quantiles(floor)}")
    ratios = p50 * 1e3 / statistics.median(ordered), p99 * 1e3 / ordered[len(ordered) * 99 // 100]
    print(f"guest timer lateness              p50 {p50:7.1f}   p99 {p99:7.1f}   max {most:8.1f} us   / floor "
          f"{ratios[0]:5.2f}, {ratios[1]:5.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=2000, help="wakes of each kind")
    parser.add_argument("-c", "--cpus", type=int, default=1)
    parser.add_argument("--hz", type=int, default=500, help="ticks a second of the guest's timer")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    args = parser.parse_args()
    headline(f"wakes, {args.cpus} vCPU, {args.loop}; ratios of p50, p99")
    run = uvloop.run if args.loop == "uvloop" else asyncio.run
    show_interrupts(run(interrupts(args.n, args.cpus)))
    show_timers(*run(timers(args.n, args.cpus, args.hz)))


if __name__ == "__main__":
    main()
