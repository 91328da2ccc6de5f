"""Builds engine.c with the engine's own C under sanitizers; ``python -m tests.fuzz.build [OPTION ...]`` runs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "avmm" / "hypervisor"
FLAGS = ["-std=c11", "-O1", "-g", "-fno-strict-aliasing", "-fno-omit-frame-pointer", "-pthread", f"-I{ENGINE}"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread", "-Wno-tsan"],  # which would warn of fences: it does not know them
    "none": [],
}
# Atomics on guest memory order the guest's threads: what they order must not hide the engine's own races.
UNSEEN = {("thread", "exec_atomic.c")}


def compiler(sanitizer: str = "address") -> str | None:
    """A C compiler that has the sanitizer's library."""
    for name in ("gcc", "clang", "cc"):
        if shutil.which(name) is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [name, *SANITIZERS[sanitizer], "-x", "c", "-", "-o", f"{folder}/a"]
            if not subprocess.run(command, input=b"int main(void) { return 0; }", capture_output=True).returncode:
                return name
    return None


def build(folder: Path, sanitizer: str = "address", program: str = "engine") -> Path:
    """``program``.c in ``folder``; what has not changed since the last time is not compiled again."""
    command = [compiler(sanitizer) or "cc", *FLAGS]
    sources = [*sorted((ENGINE / "softhv").glob("*.c")), Path(__file__).with_name(f"{program}.c")]
    headers = max(path.stat().st_mtime for path in [*ENGINE.rglob("*.h"), *ENGINE.rglob("*.def")])

    def one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime < max(headers, source.stat().st_mtime):
            watched = [] if (sanitizer, source.name) in UNSEEN else SANITIZERS[sanitizer]
            subprocess.run([*command, *watched, "-c", source, "-o", target], check=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(one, sources))
    subprocess.run([*command, *SANITIZERS[sanitizer], *objects, "-lm", "-o", folder / program], check=True)
    return folder / program


if __name__ == "__main__":
    where = Path(tempfile.gettempdir()) / f"avmm-fuzz-{os.getuid()}"
    where.mkdir(exist_ok=True)
    sys.exit(subprocess.run([build(where), *sys.argv[1:]]).returncode)
