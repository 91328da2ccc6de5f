"""What a served exit costs: the bare-metal guest ``exits``, on avmm and on QEMU TCG in turn.

python bench/exits.py [-n RUNS]

Figures are microseconds for one exit: the guest's own median over chunks of exits, less the empty loop's.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path

from side_by_side import headline, require_qemu

IMAGE = Path(__file__).parents[1] / "firmware" / "images" / "exits.bin"
KINDS = ("mmio_read", "mmio_write", "hypercall", "sysreg")
WORDS = "n=20000"
COMMANDS = {
    "avmm": [str(Path(sys.executable).with_name("avmm")), "boot", str(IMAGE), "-m", "128M", "--cmdline", WORDS],
    "QEMU TCG": [
        "qemu-system-aarch64", "-M", "virt,gic-version=3", "-cpu", "cortex-a57", "-m", "128", "-nographic",
        "-nic", "none", "-no-reboot", "-kernel", str(IMAGE), "-append", WORDS,
    ],
}  # fmt: skip


def run(argv: list[str]) -> dict[str, float]:
    """Microseconds by kind of exit."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=True)
    values = {name.decode(): int(value) for name, value in re.findall(rb"(?m)^(\w+) (\d+)\r?$", done.stdout)}
    tick = 1e6 / values["cntfrq"] / values["chunk"]
    return {kind: (values[f"{kind}_median"] - values["empty_median"]) * tick for kind in KINDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=5, help="runs of each")
    args = parser.parse_args()
    require_qemu()
    headline("cost of a served exit, microseconds")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in COMMANDS}
    for _ in range(args.n):
        for name, argv in COMMANDS.items():
            found[name].append(run(argv))
    for kind in KINDS:
        figures = {name: statistics.median(one[kind] for one in runs) for name, runs in found.items()}
        print(f"{kind:12s}" + "   ".join(f"{name} {value:7.2f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
