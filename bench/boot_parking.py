"""Does parking cost boot time? Debian's kernel to power-off, a vCPU that spins through WFI and ours in turn.

python bench/boot_parking.py [-n 7] [-c 1]
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import time
from collections.abc import Iterator

import structlog
import uvloop
from boot import INIT
from idle_policies import Spin, waking_by
from side_by_side import guest, headline, with_init

import avmm
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


def measure(number: int, cpus: int) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Pairs of what :func:`boot` returns: parking, spinning; after one pair that does not count."""
    fetched = guest()
    initrd = with_init(fetched.initrd, INIT)
    pairs = []
    try:
        for _ in range(number + 1):
            pair = []
            for policy in (VcpuLoop, Spin):
                with waking_by(policy):
                    pair.append(uvloop.run(boot(fetched.kernel, initrd, cpus)))
            pairs.append((pair[0], pair[1]))
    finally:
        initrd.unlink()
    return pairs[1:]


def summary(pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> Iterator[tuple[str, float, float, float]]:
    """For wall and CPU time: medians parking and spinning, and the median ratio of pairs."""
    for at, kind in enumerate(("wall", "CPU")):
        parked, spun = ([pair[who][at] for pair in pairs] for who in (0, 1))
        ratio = statistics.median(a / b for a, b in zip(parked, spun, strict=True))
        yield kind, statistics.median(parked), statistics.median(spun), ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=7, help="counted pairs")
    parser.add_argument("-c", "--cpus", type=int, default=1)
    args = parser.parse_args()
    headline(f"boot to power-off, {args.cpus} vCPU: parking against spinning")
    for kind, parked, spun, ratio in summary(measure(args.n, args.cpus)):
        print(f"{kind:4s} s: parking median {parked:.3f}, spinning {spun:.3f}, "
              f"median ratio of pairs {ratio:.3f}   n={args.n}")  # fmt: skip


if __name__ == "__main__":
    main()
