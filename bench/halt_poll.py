"""What the halt poll is for: wakes that come soon, with it and without, and with a vCPU that spins.

A device's interrupt a moment after the last, IPI ping-pong between sleeping vCPUs (``firmware/ipi_pingpong``), 4 KiB
disk reads of a Linux guest one at a time, and idle CPU (``firmware/idle`` at 10 Hz), in turns on the same machine.

python bench/halt_poll.py [-n 3] [-c 2 4]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import statistics
import tempfile
import time
from pathlib import Path

import uvloop
from idle_policies import HZ, PINGPONG, Spin, waking_by
from side_by_side import guest, headline, with_init
from wakeups import IMAGE, connect

import avmm
from avmm.vcpu.loop import VcpuLoop

READS = 2000
WAKES = 500
SCRIPT = f"""#!/bin/sh
dd if=/dev/vda of=/dev/null bs=4k count=200 iflag=direct 2>/dev/null
echo BEGIN; dd if=/dev/vda of=/dev/null bs=4k count={READS} iflag=direct 2>/dev/null; echo END
poweroff -f
"""


#: Name: the vCPU's class, and its halt poll.
WAYS = {"poll": (VcpuLoop, "200us"), "no poll": (VcpuLoop, 0), "spin": (Spin, 0)}


@contextlib.asynccontextmanager
async def booted(way: str, kernel: Path, initrd: Path | None = None, **options):
    """A guest whose vCPUs wait that way."""
    policy, halt_poll = WAYS[way]
    with waking_by(policy):
        async with avmm.boot(kernel, initrd, engine="softhv", halt_poll=halt_poll, **options) as vm:
            yield vm


async def hop(way: str, cpus: int) -> float:
    """Microseconds from one sleeping vCPU to the next."""
    async with booted(way, PINGPONG, memory="64M", cpus=cpus, append=f"n={100 if way == 'spin' else 1000}") as vm:
        await asyncio.wait_for(vm.wait(), 120)
        trips, ticks = (int(re.search(rb"ring_%s (\d+)" % key, vm.console.output)[1]) for key in (b"trips", b"ticks"))
        return ticks / 24 / trips / cpus


async def read(way: str, kernel: Path, initrd: Path, disk: Path) -> float:
    """Microseconds for a read of 4 KiB."""
    async with booted(way, kernel, initrd, append="avmm.init=/bench-init", drives=[str(disk)]) as vm:
        await vm.console.expect(rb"BEGIN", timeout=120)
        began = time.perf_counter()
        await vm.console.expect(rb"END", timeout=120)
        return (time.perf_counter() - began) / READS * 1e6


async def idle(way: str, cpus: int, seconds: float) -> float:
    """Percent of one CPU."""
    async with booted(way, IMAGE, memory="64M", cpus=cpus, append=f"hz={HZ}") as vm:
        await vm.console.expect(rb"idle\r\n", timeout=30)
        await asyncio.sleep(0.3)
        before, began = time.process_time(), time.monotonic()
        await asyncio.sleep(seconds)
        return (time.process_time() - before) / (time.monotonic() - began) * 100


async def soon(way: str) -> float:
    """Microseconds from a device's interrupt to its handler, 100 us after the last: inside the window."""
    async with booted(way, IMAGE, memory="64M", cpus=1, append=f"hz={HZ}") as vm:
        mailbox = connect(vm)
        await vm.console.expect(rb"idle\r\n", timeout=30)

        def poster() -> None:
            for _ in range(WAKES):
                until = time.perf_counter() + 100e-6
                while time.perf_counter() < until:
                    time.sleep(0)  # awake, so that what is measured is the vCPU's wake and not the poster's
                mailbox.post()
                if not mailbox.answered.acquire(timeout=30):
                    raise TimeoutError("the guest does not answer its interrupt")

        await asyncio.to_thread(poster)
        return statistics.median(mailbox.taken) / 1e3


def measure(rounds: int, cpus: list[int]) -> dict[tuple[str, str], float]:
    """Medians by what is measured and way, the ways taking turns."""
    fetched = guest()
    initrd = with_init(fetched.initrd, SCRIPT)
    rows: dict[tuple[str, str], list[float]] = {}

    def add(what: str, way: str, value: float) -> None:
        rows.setdefault((what, way), []).append(value)

    with tempfile.NamedTemporaryFile(suffix=".raw") as disk:
        disk.write(os.urandom(16 << 20))
        disk.flush()
        for _ in range(rounds):
            for way in WAYS:
                add("device interrupt 100 µs after the last, µs", way, uvloop.run(soon(way)))
                for each in cpus:
                    add(f"IPI hop, {each} vCPUs, µs", way, uvloop.run(hop(way, each)))
                latency = uvloop.run(read(way, fetched.kernel, initrd, Path(disk.name)))
                add("4 KiB disk read of a Linux guest, µs", way, latency)
                for each in (1, 4) if way != "spin" else ():
                    add(f"idle, {each} vCPU{'s' * (each > 1)}, % of one CPU", way, uvloop.run(idle(way, each, 2)))
    initrd.unlink()
    return {what: statistics.median(values) for what, values in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=3, help="rounds")
    parser.add_argument("-c", "--cpus", type=int, nargs="+", default=[2, 4])
    args = parser.parse_args()
    headline("halt poll: medians, in turns")
    rows = measure(args.n, args.cpus)
    for what in dict.fromkeys(what for what, _ in rows):
        found = {way: rows[what, way] for way in WAYS if (what, way) in rows}
        figures = "   ".join(f"{way} {value:8.2f}" for way, value in found.items())
        print(f"{what:44s} {figures}   poll / no poll {found['poll'] / found['no poll']:.2f}", flush=True)


if __name__ == "__main__":
    main()
