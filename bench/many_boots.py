"""Boots in a row: how many reach the shell, take a command and power off.

python bench/many_boots.py [-n 100] [-c CPUS]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time

from side_by_side import AVMM, guest, headline

SCRIPT = b"echo $((6*7)) is the answer\npoweroff -f\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=100, help="boots")
    parser.add_argument("-c", "--cpus", type=int, default=1)
    args = parser.parse_args()
    fetched = guest()
    headline(f"{args.n} boots in a row: {fetched.version}, {args.cpus} vCPU")
    argv = AVMM.command(fetched.kernel, fetched.initrd, 512, args.cpus, "")
    good, seconds = 0, []
    for number in range(args.n):
        began = time.perf_counter()
        try:
            done = subprocess.run(argv, input=SCRIPT, capture_output=True, timeout=120)
        except subprocess.TimeoutExpired as late:
            print(f"boot {number} hung: {(late.stdout or b'')[-200:]!r}", flush=True)
            continue
        seconds.append(time.perf_counter() - began)
        if done.returncode == 0 and b"\n42 is the answer" in done.stdout and b"reboot: Power down" in done.stdout:
            good += 1
        else:
            print(f"boot {number} failed: {done.returncode} {done.stdout[-200:]!r} {done.stderr[-200:]!r}", flush=True)
    print(f"{good} of {args.n} reached the shell and powered off; median {statistics.median(seconds):.2f} s, "
          f"max {max(seconds):.2f} s")  # fmt: skip


if __name__ == "__main__":
    main()
