"""What a guest's freed memory costs its host: resident memory before, with, and after 256 MiB in the guest.

python bench/balloon.py [--size 256]

QEMU beside it has virtio-balloon with free-page-reporting=on. The guest writes a file of random bytes into its tmpfs,
and removes it; Linux reports free memory some seconds later.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from side_by_side import AVMM, QEMU, guest, headline, require_qemu, resident_mib, with_init

_SCRIPT = """#!/bin/sh
echo 'BOOTED'; read line
dd if=/dev/urandom of=/tmp/filled bs=1M count=SIZE 2>/dev/null; echo 'FILLED'; read line
rm /tmp/filled; sleep 8; echo 'FREED'; read line
poweroff -f
"""


def measure(argv: list[str]) -> list[float]:
    """Resident MiB at each of the three points."""
    found = []
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for word in (b"BOOTED", b"FILLED", b"FREED"):
            while not (line := process.stdout.readline()).startswith(word):
                if not line:
                    sys.exit(f"{argv[0]} ended before it was {word.decode()}")
            if word == b"BOOTED":
                time.sleep(5)  # what was free from the start has been reported
            found.append(sum(resident_mib(process.pid).values()))
            process.stdin.write(b"\n")
            process.stdin.flush()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="MiB")
    args = parser.parse_args()
    require_qemu()
    fetched = guest()
    initrd = with_init(fetched.initrd, _SCRIPT.replace("SIZE", str(args.size)))
    append = "quiet avmm.init=/bench-init"
    headline(f"memory given back: {args.size} MiB in a guest of 1 GiB, {fetched.version}")
    ours = measure(AVMM.command(fetched.kernel, initrd, 1024, 1, append))
    theirs = measure(
        [*QEMU.command(fetched.kernel, initrd, 1024, 1, append), "-global", "virtio-mmio.force-legacy=false",
         "-device", "virtio-balloon-device,free-page-reporting=on"]
    )  # fmt: skip
    print(f"{'resident MiB':12s}  booted  filled   freed")
    for name, values in (("avmm", ours), ("QEMU TCG", theirs)):
        print(f"{name:12s} " + " ".join(f"{value:7.0f}" for value in values), flush=True)
    initrd.unlink()


if __name__ == "__main__":
    main()
