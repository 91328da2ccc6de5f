"""What it costs to start: importing avmm, and ``avmm boot --help``, beside a Python that does nothing.

python bench/startup.py [-n RUNS]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from side_by_side import headline

AVMM = str(Path(sys.executable).with_name("avmm"))
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "python -c 'import avmm'": [sys.executable, "-c", "import avmm"],
    "avmm boot --help": [AVMM, "boot", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=21, help="runs of each")
    args = parser.parse_args()
    headline("start-up, whole process, wall time")
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.n + 1):
        for name, argv in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
            times[name].append((time.perf_counter() - began) * 1000)
    for name, values in times.items():
        print(f"{name:26s} median {statistics.median(values[1:]):7.1f} ms   min {min(values[1:]):7.1f} ms")


if __name__ == "__main__":
    main()
