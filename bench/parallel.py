"""vCPUs side by side: two jobs at once, a storm of processes, shoot-downs and interrupts between vCPUs; beside QEMU.

python bench/parallel.py [-n RUNS] [-c CPUS] [--engine NAME]

The peer is QEMU with -smp N and its multi-threaded TCG. Work in the guest is in seconds of wall time, what a
firmware guest measures in microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from side_by_side import AVMM, QEMU, Machine, guest, headline, require_qemu, with_init

import avmm

IMAGES = Path(__file__).resolve().parents[1] / "firmware" / "images"

#: Two jobs; and what building software does to a kernel: fork, exec, pipes, page faults and unmapping, on all vCPUs.
WORK = {
    "one sha256": "head -c 20000000 /dev/zero | sha256sum >/dev/null",
    "two sha256": "for i in 1 2; do head -c 20000000 /dev/zero | sha256sum >/dev/null & done; wait",
    "storm": "for w in 1 2; do (i=0; while [ $i -lt 100 ]; do echo $i | cat | md5sum >/dev/null; "
    "ls / | sort -r | tail -1 >/dev/null; i=$((i+1)); done) & done; wait",
}
MARK = b"@mark "
TICKS = re.compile(rb"(?m)^(shoot_down_ticks|ring_ticks|ring_trips|cntfrq) (\d+)")


def script() -> str:
    lines = ["#!/bin/sh", "mount -t proc proc /proc 2>/dev/null; mount -t devtmpfs dev /dev 2>/dev/null"]
    for name, work in WORK.items():
        lines += ["echo '@mark'", work, f"echo '@mark {name}'"]
    return "\n".join([*lines, "poweroff -f", ""])


def work(machine: Machine, kernel: Path, initrd: Path, cpus: int, extra: list[str]) -> dict[str, float]:
    """Wall seconds by name."""
    argv = [*machine.command(kernel, initrd, 512, cpus, "avmm.init=/bench-init quiet"), *extra]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    found, before = {}, 0.0
    for raw in process.stdout:
        line, now = raw.strip(), time.perf_counter()
        if line.startswith(MARK):
            found[line[len(MARK) :].decode()] = now - before
        before = now
    if process.wait():
        sys.exit(f"{machine.name} exited with {process.returncode}")
    return found


def microseconds(output: bytes) -> dict[str, float]:
    """What litmus and ipi_pingpong report, of one shoot-down and of one hop."""
    told = {name.decode(): int(number) for name, number in TICKS.findall(output)}
    us = 1e6 / told["cntfrq"]
    if "shoot_down_ticks" in told:
        return {"TLB shoot-down": told["shoot_down_ticks"] * us}
    return {HOP: told["ring_ticks"] / told["ring_trips"] / 2 * us}


HOP = "IPI, one hop"
FIRMWARE = {"litmus": "ms=200", "ipi_pingpong": "n=2000"}


async def firmware_here(name: str, engine: str, irqchip: str = "avmm") -> bytes:
    image = IMAGES / f"{name}.bin"
    async with avmm.boot(
        image, memory="128M", cpus=2, engine=engine, irqchip=irqchip, cmdline=FIRMWARE[name], reboot=False
    ) as vm:
        await vm.wait()
        return vm.console.output


def firmware_there(name: str) -> bytes:
    command = [
        "qemu-system-aarch64",
        "-M",
        "virt,gic-version=3",
        "-cpu",
        "max",
        "-smp",
        "2",
        "-m",
        "128",
        "-nic",
        "none",
    ]
    command += ["-nographic", "-no-reboot", "-kernel", str(IMAGES / f"{name}.bin"), "-append", FIRMWARE[name]]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=120).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=3, help="counted runs of each")
    parser.add_argument("-c", "--cpus", type=int, default=2)
    parser.add_argument("--engine", default="auto", help="avmm's")
    args = parser.parse_args()
    require_qemu()
    fetched = guest()
    initrd = with_init(fetched.initrd, script())
    headline(f"vCPUs side by side: {fetched.version}, 512 MiB, {args.cpus} vCPUs; firmware on 2")
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    try:
        for _ in range(args.n):
            one = work(AVMM, fetched.kernel, initrd, args.cpus, ["--engine", args.engine])
            other = work(QEMU, fetched.kernel, initrd, args.cpus, [])
            for name in FIRMWARE:
                one |= microseconds(asyncio.run(firmware_here(name, args.engine)))
                other |= microseconds(firmware_there(name))
            inside = microseconds(asyncio.run(firmware_here("ipi_pingpong", args.engine, "hypervisor")))
            one |= {"IPI, engine's GIC": inside[HOP]}
            other |= {"IPI, engine's GIC": other[HOP]}
            ours.append(one)
            theirs.append(other)
    finally:
        os.unlink(initrd)
    print(f"{'':18s}{'avmm':>10s}{'QEMU TCG':>10s}{'ratio':>8s}")
    for name in ours[0]:
        a, b = (statistics.median(run[name] for run in runs) for runs in (ours, theirs))
        print(f"{name:18s}{a:10.2f}{b:10.2f}{a / b:8.2f}")


if __name__ == "__main__":
    main()
