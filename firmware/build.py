"""Build the bare-metal guests: every image, or the ones named, into firmware/images (or --output)."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
IMAGES = HERE / "images"
CROSS = "aarch64-linux-gnu-"
RUNTIME = ("lib/start.S", "lib/runtime.c", "lib/gic.c")
STANDALONE = frozenset({"hello", "jump_nowhere", "exception_loop"})  # these bring their own _start
FLAGS = [
    "-std=gnu11",
    "-Os",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffreestanding",
    "-nostdlib",
    "-fPIE",
    "-fno-ident",
    "-ffunction-sections",
    "-fdata-sections",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-march=armv8-a",
    "-mgeneral-regs-only",
    "-mstrict-align",
    "-mno-outline-atomics",
    "-fno-tree-loop-distribute-patterns",
    "-Ilib",
]
LINK = [
    "-pie",
    "-Wl,--no-dynamic-linker,--gc-sections,--build-id=none,--no-warn-rwx-segments",
    "-Wl,-z,norelro,-z,max-page-size=4096,-T,lib/guest.ld",
]


def guests() -> dict[str, Path]:
    """Every guest's name and source."""
    return {path.stem: path for path in sorted(HERE.glob("*.[cS]"))}


def toolchain() -> str | None:
    """The cross compiler's version line; None where there is no cross compiler."""
    try:
        done = subprocess.run([CROSS + "gcc", "--version"], check=True, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.splitlines()[0]


def build(name: str, output: Path) -> bytes:
    """Compile and link one guest; write ``output``/NAME.bin and return its bytes."""
    sources = ["lib/image.S", f"{name}{guests()[name].suffix}", *(() if name in STANDALONE else RUNTIME)]
    with tempfile.TemporaryDirectory() as scratch:
        elf = str(Path(scratch) / "guest.elf")
        # Relative paths from one directory: nothing of the host's can enter the image.
        subprocess.run([CROSS + "gcc", *FLAGS, *LINK, *sources, "-o", elf], check=True, cwd=HERE)
        image = Path(scratch) / "guest.bin"
        kept = [part for section in (".text", ".rodata", ".rela.dyn", ".data") for part in ("-j", section)]
        subprocess.run([CROSS + "objcopy", "-O", "binary", *kept, elf, str(image)], check=True)
        content = image.read_bytes()
    (output / f"{name}.bin").write_bytes(content)
    return content


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("guest", nargs="*", help=f"guests to build (default: all of {' '.join(guests())})")
    parser.add_argument("--output", type=Path, default=IMAGES, help="where the images go")
    options = parser.parse_args()
    version = toolchain()
    if version is None:
        print(f"{CROSS}gcc is missing: apt install gcc-aarch64-linux-gnu", file=sys.stderr)
        return 1
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    for name in options.guest or guests():
        print(f"{name} {len(build(name, output))} bytes")
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(output.glob("*.bin"))]
    (output / "SHA256SUMS").write_text("".join(sums))
    (output / "TOOLCHAIN").write_text(version + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
