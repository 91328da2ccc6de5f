"""Which kernel is the first on which a command fails? Boots as few of them as it takes.

    python examples/bisect_kernel.py --initrd initrd build/Image-* -- sh -c 'uname -v | grep -q Debian'

KERNELs are given from the oldest to the newest; the first must be good and the last bad. One that does not come up, or
on which the command ends with 125 (as `git bisect run` has it), is skipped. For `git bisect run`, give one kernel only:
the exit code is 0 (good), 1 (bad) or 125.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import avmm

GOOD, BAD, SKIP = 0, 1, 125


async def verdict(kernel: Path, initrd: Path, command: Sequence[str], timeout: float = 120) -> int:
    """GOOD, BAD or SKIP for one kernel."""
    try:
        async with avmm.boot(kernel, initrd, memory="256M", append="quiet", reboot=False) as vm:
            code = (await vm.run(*command, timeout=timeout)).returncode
    except (avmm.GuestError, avmm.WaitTimeout, avmm.ImageError) as error:
        print(f"{kernel}: skipped: {str(error).splitlines()[0]}", flush=True)
        return SKIP
    found = SKIP if code == SKIP else BAD if code else GOOD
    print(f"{kernel}: {'skipped' if found == SKIP else 'bad' if found else 'good'}", flush=True)
    return found


async def first_bad(kernels: Sequence[Path], initrd: Path, command: Sequence[str]) -> list[Path]:
    """The first bad one; several when those between the last good and the first bad were all skipped."""
    left = list(kernels)  # left[0] is good and left[-1] bad, or so it is said
    while len(left) > 2:
        # From the middle outwards, until one says something.
        order = sorted(range(1, len(left) - 1), key=lambda at: abs(2 * at - len(left) + 1))
        for at in order:
            found = await verdict(left[at], initrd, command)
            if found != SKIP:
                left = left[at:] if found == GOOD else left[: at + 1]
                break
        else:
            break
    return left[1:]


def main() -> int:
    """From the command line."""
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--initrd", type=Path, required=True)
    parser.add_argument("kernels", metavar="KERNEL", type=Path, nargs="+")
    options = parser.parse_args(words[:split])
    command = words[split + 1 :]
    if not command:
        parser.error("which command? put it after --")
    if len(options.kernels) == 1:
        return asyncio.run(verdict(options.kernels[0], options.initrd, command))
    found = asyncio.run(first_bad(options.kernels, options.initrd, command))
    print("first bad: " + (" or ".join(map(str, found))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
