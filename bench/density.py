"""Many idle VMs in one process and one event loop: CPU, memory, and how fast one of them wakes.

Each has 64 MiB and one vCPU that ticks ten times a second, as an idle Linux does (``firmware/idle``; with --linux,
Debian's kernel at its shell).

python bench/density.py [-n 1 10 100] [--seconds 5] [--linux]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import time

import structlog
import uvloop
from side_by_side import guest, headline, resident_mib
from wakeups import IMAGE, connect, lock_round_trips, post_from_thread, quantiles

import avmm

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))

WAKES = 300
AT_ONCE = 4  # more would only queue for the processors


async def started(vm, linux: bool) -> None:
    await vm.console.expect(rb"ready" if linux else rb"idle\r\n", timeout=600)


async def measure(number: int, seconds: float, linux: bool) -> dict:
    """What ``number`` idle VMs take: seconds till all are up, CPU in percent, WFIs a second, MiB, wakes in ns."""
    fetched = guest() if linux else None
    images = (fetched.kernel, fetched.initrd) if fetched else (IMAGE,)
    append = "" if linux else "hz=10"
    async with contextlib.AsyncExitStack() as stack:
        began = time.perf_counter()
        vms = []
        mailbox = None
        gate = asyncio.Semaphore(AT_ONCE)

        async def one() -> None:
            nonlocal mailbox
            async with gate:
                vm = await stack.enter_async_context(avmm.boot(*images, memory="64M", append=append, engine="softhv"))
                if mailbox is None and not linux:
                    mailbox = connect(vm)
                vms.append(vm)
                await started(vm, linux)

        await asyncio.gather(*(one() for _ in range(number)))
        up = time.perf_counter() - began
        await asyncio.sleep(3 if linux else 0.5)
        ticks = sum(vm.counters()["exits"]["wfi"] for vm in vms)
        cpu, began = time.process_time(), time.monotonic()
        await asyncio.sleep(seconds)
        elapsed = time.monotonic() - began
        percent = (time.process_time() - cpu) / elapsed * 100
        rate = (sum(vm.counters()["exits"]["wfi"] for vm in vms) - ticks) / elapsed
        rss = resident_mib(os.getpid())
        wakes = [] if mailbox is None else await post_from_thread(mailbox, WAKES)
        mib = rss["anon"] + rss["file"]
        return {"VMs": number, "up": up, "idle": percent, "WFIs": rate, "MiB": mib, "wakes": wakes}


def show(row: dict) -> None:
    print(f"{row['VMs']:4d} VMs  up in {row['up']:6.2f} s   idle {row['idle']:6.2f} % of one CPU "
          f"({row['idle'] / row['VMs']:5.3f} each, {row['WFIs']:7.0f} WFI/s)   "
          f"resident {row['MiB']:6.0f} MiB", flush=True)  # fmt: skip
    if row["wakes"]:
        print(f"          device interrupt to one of them: {quantiles(row['wakes'])}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, nargs="+", default=[1, 10, 100], help="VMs")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--linux", action="store_true")
    args = parser.parse_args()
    headline(f"density: VMs of 64 MiB and 1 vCPU, {'Debian at its shell' if args.linux else 'ticking at 10 Hz'}")
    print(f"floor: lock there and back        {quantiles(lock_round_trips(WAKES))}")
    for number in args.n:
        show(uvloop.run(measure(number, args.seconds, args.linux)))


if __name__ == "__main__":
    main()
