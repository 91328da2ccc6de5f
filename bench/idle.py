"""Host CPU of a guest that sits at its shell prompt, and how often its vCPUs really idle (WFI exits a second).

python bench/idle.py [--seconds 10] [-c 1 4] [-n 3] [--everything] [--irqchip hypervisor]

With --everything avmm's guest has a disk, a network, a shared folder and sockets as well; QEMU's stays as it is.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path

from side_by_side import AVMM, QEMU, cpu_seconds, guest, headline, require_qemu, resident_mib, running

import avmm

READY = b"ready"  # the last line the initrd prints before its shell's prompt


def idle(argv: list[str], seconds: float) -> tuple[float, dict[str, float]]:
    """Percent of one CPU over ``seconds``, and resident memory, once the guest is at its prompt."""
    with running(argv, READY) as process:
        time.sleep(3)  # the prompt, and the kernel's last deferred work
        before = cpu_seconds(process.pid)
        time.sleep(seconds)
        return (cpu_seconds(process.pid) - before) / seconds * 100, resident_mib(process.pid)


async def wfi_rate(kernel: str, initrd: str, cpus: int, seconds: float, irqchip: str) -> float:
    """WFI exits a second over all vCPUs of an idle guest."""
    async with avmm.boot(kernel, initrd, cpus=cpus, irqchip=irqchip) as vm:
        await vm.console.expect(READY, timeout=120)
        await asyncio.sleep(3)
        before = vm.counters()["exits"]["wfi"]
        await asyncio.sleep(seconds)
        return (vm.counters()["exits"]["wfi"] - before) / seconds


def everything(folder: Path) -> list[str]:
    """Options of avmm boot for a device of each kind."""
    disk, shared = folder / "disk.img", folder / "shared"
    shared.mkdir()
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    return ["-d", str(disk), "--share", f"{shared}:it:rw", "--vsock", f"1024={folder}/socket"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("-c", "--cpus", type=int, nargs="+", default=[1, 4])
    parser.add_argument("-n", type=int, default=3, help="runs of each")
    parser.add_argument("--irqchip", default="avmm", help="avmm or hypervisor")
    parser.add_argument("--everything", action="store_true", help="attach one device of each kind")
    args = parser.parse_args()
    require_qemu()
    fetched = guest()
    headline(f"idle at the shell for {args.seconds:g} s: {fetched.version}, 512 MiB")
    scratch = tempfile.TemporaryDirectory()
    more = everything(Path(scratch.name)) if args.everything else []
    for cpus in args.cpus:
        ours, theirs = [], []
        for _ in range(args.n):
            command = AVMM.command(fetched.kernel, fetched.initrd, 512, cpus, "")
            if args.everything:
                command[command.index("--net") + 1] = "user"
            command += ["--irqchip", args.irqchip]
            ours.append(idle([*command, *more], args.seconds))
            theirs.append(idle(QEMU.command(fetched.kernel, fetched.initrd, 512, cpus, ""), args.seconds))
        kernel, initrd = os.fspath(fetched.kernel), os.fspath(fetched.initrd)
        rate = asyncio.run(wfi_rate(kernel, initrd, cpus, args.seconds, args.irqchip))
        print(f"\n{cpus} vCPU; WFI exits a second with avmm: {rate:.1f}")
        for name, runs in (("avmm", ours), ("QEMU TCG", theirs)):
            memory = runs[-1][1]
            print(f"{name:10s} median {statistics.median(r[0] for r in runs):6.2f} % of one CPU   "
                  f"max {max(r[0] for r in runs):6.2f} %   resident MiB: "
                  + ", ".join(f"{k} {v:.0f}" for k, v in memory.items()))  # fmt: skip


if __name__ == "__main__":
    main()
