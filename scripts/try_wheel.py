#!/usr/bin/env python3
"""Boots firmware guests with the avmm that is installed, and says whether it did as it should.

python scripts/try_wheel.py firmware/images
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import avmm

#: Guests, their vCPUs and command lines; and what one prints that has done all it is made for.
GUESTS = [("hello", 1, ""), ("timer_wfi", 1, "n=20 hz=200"), ("ipi_pingpong", 2, "n=50")]


async def run(image: Path, cpus: int, cmdline: str) -> str:
    """The guest's output, after a clean power-off."""
    async with avmm.boot(image, memory="64M", cpus=cpus, cmdline=cmdline, engine="softhv", reboot=False) as vm:
        outcome = await asyncio.wait_for(vm.wait(), 60)
    if outcome.reason != "power-off":
        raise SystemExit(f"{image.name}: {outcome}")
    return vm.console.output.decode("ascii")


def main() -> None:
    """Run them all."""
    images = Path(sys.argv[1])
    checkout = images.resolve().parents[1]
    home = Path(avmm.__file__).resolve()
    if home.is_relative_to(checkout / "avmm"):
        raise SystemExit(f"{home} is the checkout's: run this where no avmm but the installed one is found")
    for name, cpus, cmdline in GUESTS:
        lines = asyncio.run(run(images / f"{name}.bin", cpus, cmdline)).splitlines()
        passed = sum(line.startswith("ok ") for line in lines)
        if lines != ["hello"] and (f"1..{passed}" not in lines or any(line.startswith("not ok") for line in lines)):
            raise SystemExit(f"{name}: {lines[-5:]}")
        print(f"{name}: fine")
    print(f"avmm {avmm.__version__} at {home.parent}")


if __name__ == "__main__":
    main()
