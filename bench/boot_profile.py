"""Where a boot's CPU time goes: one boot under `perf record`, by part.

python bench/boot_profile.py [--flavour cloud|generic]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from side_by_side import AVMM, guest, headline, with_init

SOFTHV = Path(__file__).parents[1] / "avmm" / "hypervisor" / "softhv"
SCRIPT = "#!/bin/sh\npoweroff -f\n"
CALLED = "instructions called or interpreted"
PARTS = {  # of softhv, by the file a function is in
    "jit_x64": "compiling", "decode": "decoding", "code": "finding blocks", "run": "finding blocks",
    "mmu": "TLB and page tables", "exec": CALLED, "fpu": CALLED,
}  # fmt: skip


def functions() -> dict[str, str]:
    """The part of softhv each of its functions belongs to."""
    found = {}
    for path in SOFTHV.glob("*.c"):
        part = next((part for start, part in PARTS.items() if path.name.startswith(start)), "the rest of softhv")
        for name in re.findall(r"^[a-z][^\n;=]*?\b(\w+)\([^\n;]*$", path.read_text(), re.MULTILINE):
            found.setdefault(name, part)
    return found


def part_of(library: str, symbol: str, known: dict[str, str]) -> str:
    """A line of `perf report` as one of our parts."""
    if "softhv-code" in library:
        return "compiled guest code"
    if "_softhv" in library:
        name = symbol.partition(".")[0]
        called = re.match(r"[pt]_|slow_(?!call)", name)
        return known.get(name, CALLED if called else "the rest of softhv")
    return "the kernel: page faults, files" if library.startswith("[kernel") else "Python: starting, exits, devices"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flavour", default="cloud")
    args = parser.parse_args()
    if shutil.which("perf") is None:
        sys.exit("this takes Linux's perf: install linux-perf")
    fetched = guest(args.flavour)
    initrd = with_init(fetched.initrd, SCRIPT)
    headline(f"where a boot goes: {fetched.version} {args.flavour}, 512 MiB, 1 vCPU, quiet")
    known, shares = functions(), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "perf.data")
        argv = AVMM.command(fetched.kernel, initrd, 512, 1, "avmm.init=/bench-init quiet")
        record = ["perf", "record", "-q", "-F", "2500", "-e", "cpu-clock", "-o", data, *argv]
        try:
            subprocess.run(record, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
        finally:
            os.unlink(initrd)
        report = ["perf", "report", "-i", data, "--stdio", "--sort", "dso,sym"]
        text = subprocess.run(report, capture_output=True, text=True, check=True).stdout
    for line in text.splitlines():
        if match := re.match(r"\s+([\d.]+)%\s+(\S+)(?: \(deleted\))?\s+\[.\] (\S+)", line):
            shares[part_of(match[2], match[3], known)] += float(match[1])
    for part, share in shares.most_common():
        print(f"{share:6.1f} %  {part}")


if __name__ == "__main__":
    main()
