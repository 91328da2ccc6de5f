"""Does parking cost boot time? Debian's kernel to power-off, a vCPU that spins through WFI and ours in turn.

python bench/boot_parking.py [-n 7] [-c 1]
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import time

import structlog
import uvloop
from boot import INIT
from idle_policies import Spin
from side_by_side import guest, headline, with_init

import avmm
import avmm.vm
from avmm.vcpu.loop import VcpuLoop

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


async def boot(kernel, initrd, cpus: int) -> tuple[float, float]:
    """Wall and CPU seconds from start to power-off."""
    began, cpu = time.perf_counter(), time.process_time()
    async with avmm.boot(kernel, initrd, cpus=cpus, engine="softhv", append="avmm.init=/bench-init") as vm:
        outcome = await asyncio.wait_for(vm.wait(), 300)
    if outcome.reason != "power-off":
        raise SystemExit(f"the guest ended with {outcome}")
    return time.perf_counter() - began, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=7, help="counted pairs")
    parser.add_argument("-c", "--cpus", type=int, default=1)
    args = parser.parse_args()
    fetched = guest()
    initrd = with_init(fetched.initrd, INIT)
    headline(f"boot to power-off, {args.cpus} vCPU: parking against spinning")
    pairs = []
    try:
        for _ in range(args.n + 1):
            pair = []
            for policy in (VcpuLoop, Spin):
                avmm.vm.VcpuLoop = policy
                pair.append(uvloop.run(boot(fetched.kernel, initrd, args.cpus)))
            pairs.append(pair)
    finally:
        initrd.unlink()
    for at, kind in enumerate(("wall", "CPU")):
        parked, spun = ([pair[who][at] for pair in pairs[1:]] for who in (0, 1))
        ratio = statistics.median(a / b for a, b in zip(parked, spun, strict=True))
        print(f"{kind:4s} s: parking median {statistics.median(parked):.3f}, spinning {statistics.median(spun):.3f}, "
              f"median ratio of pairs {ratio:.3f}   n={args.n}")  # fmt: skip


if __name__ == "__main__":
    main()
