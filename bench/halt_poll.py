"""What the halt poll is for: wakes that come soon, with it and without, and with a vCPU that spins.

IPI ping-pong between sleeping vCPUs (``firmware/ipi_pingpong``), 4 KiB disk reads of a Linux guest one at a time, and
idle CPU (``firmware/idle`` at 10 Hz), in turns on the same machine.

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
from idle_policies import HZ, PINGPONG, Spin
from side_by_side import guest, headline, with_init
from wakeups import IMAGE

import avmm
import avmm.vm
from avmm.vcpu.loop import VcpuLoop

READS = 2000
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
    avmm.vm.VcpuLoop, halt_poll = WAYS[way]
    try:
        async with avmm.boot(kernel, initrd, engine="softhv", halt_poll=halt_poll, **options) as vm:
            yield vm
    finally:
        avmm.vm.VcpuLoop = VcpuLoop


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=3, help="rounds")
    parser.add_argument("-c", "--cpus", type=int, nargs="+", default=[2, 4])
    args = parser.parse_args()
    fetched = guest()
    initrd = with_init(fetched.initrd, SCRIPT)
    headline("halt poll: medians, in turns")
    rows: dict[tuple[str, str], list[float]] = {}
    with tempfile.NamedTemporaryFile(suffix=".raw") as disk:
        disk.write(os.urandom(16 << 20))
        disk.flush()
        for _ in range(args.n):
            for name in WAYS:
                for cpus in args.cpus:
                    rows.setdefault((f"IPI hop, {cpus} vCPUs, us", name), []).append(uvloop.run(hop(name, cpus)))
                latency = uvloop.run(read(name, fetched.kernel, initrd, Path(disk.name)))
                rows.setdefault(("4 KiB disk read, us", name), []).append(latency)
                for cpus in (1, 4) if name != "spin" else ():
                    rows.setdefault((f"idle, {cpus} vCPUs, %", name), []).append(uvloop.run(idle(name, cpus, 1)))
    initrd.unlink()
    for what in dict.fromkeys(what for what, _ in rows):
        found = {name: statistics.median(rows[what, name]) for name in WAYS if (what, name) in rows}
        figures = "   ".join(f"{name} {value:8.2f}" for name, value in found.items())
        print(f"{what:24s} {figures}   poll / no poll {found['poll'] / found['no poll']:.2f}", flush=True)


if __name__ == "__main__":
    main()
