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
    "thread": ["-fsanitize=thread"],
    "none": [],
}


def compiler() -> str | None:
    """A C compiler that has the sanitizers' libraries."""
    for name in ("gcc", "clang", "cc"):
        if shutil.which(name) is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [name, *SANITIZERS["address"], "-x", "c", "-", "-o", f"{folder}/a"]
            if not subprocess.run(command, input=b"int main(void) { return 0; }", capture_output=True).returncode:
                return name
    return None


def build(folder: Path, sanitizer: str = "address") -> Path:
    """The program, in ``folder``; what has not changed since the last time is not compiled again."""
    command = [compiler() or "cc", *FLAGS, *SANITIZERS[sanitizer]]
    sources = [*sorted((ENGINE / "softhv").glob("*.c")), Path(__file__).with_name("engine.c")]
    headers = max(path.stat().st_mtime for path in [*ENGINE.rglob("*.h"), *ENGINE.rglob("*.def")])

    def one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime < max(headers, source.stat().st_mtime):
            subprocess.run([*command, "-c", source, "-o", target], check=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(one, sources))
    program = folder / "engine"
    subprocess.run([*command, *objects, "-lm", "-o", program], check=True)
    return program


if __name__ == "__main__":
    where = Path(tempfile.gettempdir()) / f"avmm-fuzz-{os.getuid()}"
    where.mkdir(exist_ok=True)
    sys.exit(subprocess.run([build(where), *sys.argv[1:]]).returncode)
