"""Work inside the guest, in CPU seconds of the host: programs timed within one boot.

All are busybox's but two, which are compiled for the guest and left out where there is no cross compiler: sha256.c, and
"cold code", a program of 300,000 instructions that are run once.

python bench/guest_work.py [-n RUNS] [--flavour cloud|generic] [--only NAME ...] [--engine NAME]
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import AVMM, QEMU, Machine, cpu_seconds, guest, headline, require_qemu, with_init

WORK = {
    "shell loop": "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done",
    "md5": "head -c 20000000 /dev/zero | md5sum >/dev/null",
    "sha256": "head -c 10000000 /dev/zero | sha256sum >/dev/null",
    "sha256, SHA insns": "/sha256 100 >/dev/null",
    "cold code": "/cold",
    "gzip": "cat /bin/busybox /bin/busybox /bin/busybox /bin/busybox | gzip -c >/dev/null",
    "awk floats": "awk 'BEGIN { for (i = 1; i < 400000; i++) s += i / 3.5; print s }' >/dev/null",
    "fork+exec": "i=0; while [ $i -lt 200 ]; do /bin/true; i=$((i+1)); done",
    "400k syscalls": "dd if=/dev/zero of=/dev/null bs=1 count=200000 2>/dev/null",
    "memcpy 1 GiB": "dd if=/dev/zero of=/dev/null bs=1M count=1024 2>/dev/null",
}
MARK = b"@mark "


GCC = "aarch64-linux-gnu-gcc"


def sha256() -> bytes:
    """The program sha256.c, for the guest."""
    return build(Path(__file__).with_name("sha256.c"))


def build(source: Path) -> bytes:
    """A static program without a libc."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program"
        flags = ["-O2", "-march=armv8-a+crypto", "-static", "-nostdlib", "-ffreestanding"]
        subprocess.run([GCC, *flags, str(source), "-o", str(program)], check=True)
        return program.read_bytes()


def cold(instructions: int = 300_000) -> bytes:
    """A program that runs so many different instructions, each once: arithmetic, loads, stores and branches."""
    rng = random.Random(0)
    lines = [".globl _start", "_start: mov x20, sp"]
    for _ in range(instructions // 6):
        a, b, c = (rng.randrange(16) for _ in range(3))
        lines += [
            f"add x{a}, x{b}, #{rng.randrange(4096)}",
            f"str x{a}, [x20, #-{8 * rng.randrange(1, 32)}]",
            f"ldr x{b}, [x20, #-{8 * rng.randrange(1, 32)}]",
            f"{rng.choice(('eor', 'and', 'orr', 'sub'))} x{c}, x{a}, x{b}, lsl #{rng.randrange(64)}",
            f"cmp x{c}, x{a}",
            f"b.{rng.choice(('eq', 'hi', 'lt', 'pl'))} 1f\n1:",
        ]
    lines += ["mov x8, #93", "mov x0, #0", "svc #0", ""]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "cold.S"
        source.write_text("\n".join(lines))
        return build(source)


def script(names: list[str]) -> str:
    lines = ["#!/bin/sh", "mount -t proc proc /proc 2>/dev/null; mount -t devtmpfs dev /dev 2>/dev/null"]
    for name in names:
        lines += ["echo '@mark'", WORK[name], f"echo '@mark {name}'"]
    return "\n".join([*lines, "poweroff -f", ""])


def run(machine: Machine, kernel: Path, initrd: Path, extra: list[str]) -> dict[str, float]:
    """CPU seconds by name: ``boot`` up to the first line of the script, then each program."""
    argv = [*machine.command(kernel, initrd, 512, 1, "avmm.init=/bench-init quiet"), *extra]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    found: dict[str, float] = {}
    before = 0.0
    deadline = time.monotonic() + 900
    for raw in process.stdout:
        line = raw.strip()
        if line == b"@mark" or line.startswith(MARK):
            now = cpu_seconds(process.pid)
            if line != b"@mark":
                found[line[len(MARK) :].decode()] = now - before
            elif "boot" not in found:
                found["boot"] = now
            before = now
        if time.monotonic() > deadline:
            process.kill()
            sys.exit(f"{machine.name} takes too long")
    if process.wait():
        sys.exit(f"{machine.name} exited with {process.returncode}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=3, help="counted runs of each")
    parser.add_argument("--flavour", default="cloud")
    parser.add_argument("--only", nargs="*", default=list(WORK), choices=list(WORK))
    parser.add_argument("--engine", default="auto", help="avmm's")
    args = parser.parse_args()
    require_qemu()
    fetched = guest(args.flavour)
    programs: dict[str, bytes] = {}
    if shutil.which(GCC):
        programs = {"sha256": sha256(), "cold": cold()}
    else:
        args.only = [name for name in args.only if not WORK[name].startswith("/")]
    initrd = with_init(fetched.initrd, script(args.only), programs)
    headline(f"work in a guest, CPU seconds: {fetched.version} {args.flavour}, 512 MiB, 1 vCPU")
    runs: dict[str, list[dict[str, float]]] = {AVMM.name: [], QEMU.name: []}
    try:
        for _ in range(args.n):
            runs[AVMM.name].append(run(AVMM, fetched.kernel, initrd, ["--engine", args.engine]))
            runs[QEMU.name].append(run(QEMU, fetched.kernel, initrd, []))
    finally:
        os.unlink(initrd)
    print(f"{'':18s}{'avmm':>9s}{'QEMU TCG':>10s}{'ratio':>8s}")
    for name in ["boot", *args.only]:
        ours, theirs = (statistics.median(one[name] for one in runs[machine]) for machine in (AVMM.name, QEMU.name))
        print(f"{name:18s}{ours:9.3f}{theirs:10.3f}{ours / theirs:8.2f}")


if __name__ == "__main__":
    main()
