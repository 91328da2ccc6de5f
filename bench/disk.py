"""A guest's disk beside QEMU's: sequential reads and writes, and 4 KiB reads at random places, of the same file.

python bench/disk.py [-n 3] [--size 64] [--format raw|qcow2]

The file is in the host's page cache (it has just been written), the guest's is bypassed (O_DIRECT): what is measured
is the path between the two. dd works at queue depth 1; for depth 32 there are 32 of them.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from side_by_side import AVMM, QEMU, guest, headline, require_qemu, with_init

_SCRIPT = """#!/bin/sh
now() { read up rest </proc/uptime; echo $((${up%.*} * 100 + 1${up#*.} - 100)); }
report() { echo "RESULT $1 $(( $(now) - $2 ))"; }
size=SIZE
t=$(now); dd if=/dev/vda of=/dev/null bs=1M count=$size iflag=direct 2>/dev/null; report read $t
t=$(now); dd if=/dev/vda of=/dev/null bs=1M count=$size iflag=direct 2>/dev/null; report read $t
t=$(now); dd if=/dev/zero of=/dev/vda bs=1M count=$size oflag=direct conv=fsync 2>/dev/null; report write $t
t=$(now); dd if=/dev/vda of=/dev/null bs=4k count=2000 iflag=direct 2>/dev/null; report small-read $t
t=$(now); dd if=/dev/zero of=/dev/vda bs=4k count=1000 oflag=direct 2>/dev/null; report small-write $t
t=$(now)
i=0; while [ $i -lt 32 ]; do
    dd if=/dev/vda of=/dev/null bs=4k skip=$((i * 37 * size / 8)) count=125 iflag=direct 2>/dev/null &
    i=$((i + 1))
done; wait; report deep-read $t
poweroff -f
"""

#: What each figure is made of: unit, and amount as a function of the size in MiB.
_FIGURES: dict[str, tuple[str, Callable[[int], float]]] = {
    "read": ("MiB/s", lambda size: size),
    "write": ("MiB/s", lambda size: size),
    "small-read": ("IOPS", lambda size: 2000),
    "small-write": ("IOPS", lambda size: 1000),
    "deep-read": ("IOPS", lambda size: 4000),
}


def measure(argv: list[str], size: int) -> dict[str, float]:
    """Boot once; the figures. The last of several results of one name counts, the first warms up."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=600)
    found = {name: int(ticks) for name, ticks in re.findall(r"RESULT ([\w-]+) (\d+)\r", done.stdout.decode("latin-1"))}
    if found.keys() != _FIGURES.keys():
        sys.exit(f"{argv[0]} ended with {done.returncode}: {done.stdout[-1000:]!r} {done.stderr[-1000:]!r}")
    return {name: amount(size) / max(found[name], 1) * 100 for name, (_, amount) in _FIGURES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=3, help="runs of each")
    parser.add_argument("--size", type=int, default=64, help="MiB")
    parser.add_argument("--format", choices=("raw", "qcow2"), default="raw")
    args = parser.parse_args()
    require_qemu()
    fetched = guest()
    initrd = with_init(fetched.initrd, _SCRIPT.replace("SIZE", str(args.size)))
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / f"disk.{args.format}"
        raw = Path(folder) / "content"
        raw.write_bytes(os.urandom(args.size << 20))
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", args.format, raw, disk], check=True)
        append = "avmm.init=/bench-init"
        ours = [*AVMM.command(fetched.kernel, initrd, 512, 1, append), "-d", str(disk)]
        theirs = [
            *QEMU.command(fetched.kernel, initrd, 512, 1, append), "-global", "virtio-mmio.force-legacy=false",
            "-drive", f"file={disk},format={args.format},if=none,id=d", "-device", "virtio-blk-device,drive=d",
        ]  # fmt: skip
        headline(f"disk: {args.format}, {args.size} MiB, {fetched.version}")
        runs = [(measure(ours, args.size), measure(theirs, args.size)) for _ in range(args.n)]
    for name, (unit, _) in _FIGURES.items():
        a = statistics.median(run[0][name] for run in runs)
        b = statistics.median(run[1][name] for run in runs)
        print(f"{name:12s} avmm {a:9.1f} {unit:6s}  QEMU TCG {b:9.1f} {unit:6s}  ratio {a / b:.3f}", flush=True)
    initrd.unlink()


if __name__ == "__main__":
    main()
