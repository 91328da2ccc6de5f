"""Build the agent that avmm runs in Linux guests into avmm/guest (or --output), with its hash."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parents[1] / "avmm" / "guest"
CROSS = "aarch64-linux-gnu-"
SOURCES = ("agent.c", "tree.c")
FLAGS = [
    "-std=gnu11",
    "-Os",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffreestanding",
    "-fno-ident",
    "-ffunction-sections",
    "-fdata-sections",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-pic",
    "-march=armv8-a",
    "-mgeneral-regs-only",
    "-mno-outline-atomics",
    "-fno-tree-loop-distribute-patterns",
]
LINK = ["-nostdlib", "-static", "-no-pie", "-s", "-Wl,--gc-sections,--build-id=none,-z,norelro,-z,noseparate-code"]


def build(output: Path) -> bytes:
    """Compile and link; write ``output``/agent.elf and return its bytes."""
    program = output.resolve() / "agent.elf"
    # Relative paths from one directory: nothing of the host's can enter the program.
    subprocess.run([CROSS + "gcc", *FLAGS, *LINK, *SOURCES, "-o", str(program)], check=True, cwd=HERE)
    return program.read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=SHIPPED, help="where the agent goes")
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    try:
        program = build(output)
    except OSError:
        print(f"{CROSS}gcc is missing: apt install gcc-aarch64-linux-gnu", file=sys.stderr)
        return 1
    (output / "agent.sha256").write_text(f"{hashlib.sha256(program).hexdigest()}  agent.elf\n")
    print(f"agent.elf {len(program)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
