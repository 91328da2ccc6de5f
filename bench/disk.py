"""A guest's disk beside QEMU's, by fio in the guest: throughput, random 4 KiB IOPS, latency, of the same file.

python bench/disk.py [-n 3] [--size 64] [--format raw|qcow2] [--seconds 2]

The file is in the host's page cache (it has just been written), the guest's is bypassed (O_DIRECT): what is measured
is the path between the two.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from side_by_side import AVMM, QEMU, guest, headline, require_qemu

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.guest.rootfs import APPEND, initrd, rootfs

#: What fio does: name, its options.
JOBS = {
    "sequential read": "--rw=read --bs=1m --iodepth=4",
    "sequential write": "--rw=write --bs=1m --iodepth=4",
    "random read, depth 1": "--rw=randread --bs=4k --iodepth=1",
    "random read, depth 32": "--rw=randread --bs=4k --iodepth=32",
    "random write, depth 1": "--rw=randwrite --bs=4k --iodepth=1",
    "random write, depth 32": "--rw=randwrite --bs=4k --iodepth=32",
}
# Percentiles of the whole latency: fio's default leaves out the submission, in which a VMM may spend most of it.
FIO = "fio --name=job --filename=/dev/vdb --direct=1 --ioengine=libaio --thread --time_based --minimal"
FIO += " --lat_percentiles=1 --clat_percentiles=0"

# fio's terse output, version 3: where a direction's KiB/s and IOPS are.
READ, WRITE = 6, 47


def figures(name: str, line: str) -> dict[str, float]:
    """What one line of fio's terse output says of the job ``name``."""
    fields = line.split(";")
    at = WRITE if "write" in name else READ
    if name.startswith("sequential"):
        return {f"{name}, MiB/s": int(fields[at]) / 1024}
    found = {f"{name}, IOPS": float(fields[at + 1])}
    if name.endswith("depth 1"):
        percentiles = dict(re.findall(r"(\d+)\.\d+%=(\d+)", ";".join(fields[at : at + 40])))
        found |= {f"{name}, p{which}, us": float(percentiles[which]) for which in ("50", "99")}
    return found


def measure(argv: list[str], seconds: float) -> dict[str, float]:
    """Boot once and run every job."""
    commands = [f"{FIO} --runtime={seconds:g} {options}" for options in ("--rw=read --bs=1m", *JOBS.values())]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            if b"rootfs: ready" in line:
                break
        process.stdin.write("\n".join([*commands, "poweroff -f", ""]).encode())
        process.stdin.flush()
        printed = process.stdout.read().decode("latin-1")
    lines = re.findall(r"^3;fio-.*$", printed, re.MULTILINE)
    if len(lines) != len(commands):
        sys.exit(f"{argv[0]} ended with {process.returncode}: {printed[-2000:]}")
    found: dict[str, float] = {}
    for name, line in zip(JOBS, lines[1:], strict=True):  # the first warms up
        found |= figures(name, line)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=3, help="runs of each")
    parser.add_argument("--size", type=int, default=64, help="MiB")
    parser.add_argument("--format", choices=("raw", "qcow2"), default="raw")
    parser.add_argument("--seconds", type=float, default=2, help="for each job")
    args = parser.parse_args()
    require_qemu()
    fetched = guest()
    root, first = rootfs(["fio"]), initrd(fetched)
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / f"disk.{args.format}"
        raw = Path(folder) / "content"
        raw.write_bytes(os.urandom(args.size << 20))
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", args.format, raw, disk], check=True)
        ours = [
            *AVMM.command(fetched.kernel, first, 512, 1, APPEND),
            "-d",
            f"{root},snapshot,format=raw",
            "-d",
            str(disk),
        ]
        theirs = [*QEMU.command(fetched.kernel, first, 512, 1, APPEND), "-global", "virtio-mmio.force-legacy=false"]
        # QEMU fills its slots from the last: the disk first, so that the root is /dev/vda.
        for name, file, options in (("disk", disk, f"format={args.format}"), ("root", root, "format=raw,snapshot=on")):
            theirs += [
                "-drive",
                f"file={file},{options},if=none,id={name}",
                "-device",
                f"virtio-blk-device,drive={name}",
            ]
        headline(f"disk: {args.format}, {args.size} MiB, {fetched.version}")
        runs = [(measure(ours, args.seconds), measure(theirs, args.seconds)) for _ in range(args.n)]
    for name in runs[0][0]:
        a, b = (statistics.median(run[who][name] for run in runs) for who in (0, 1))
        print(f"{name:32s} avmm {a:9.1f}   QEMU TCG {b:9.1f}   ratio {a / b:.2f}", flush=True)


if __name__ == "__main__":
    main()
