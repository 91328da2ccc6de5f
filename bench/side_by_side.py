"""What every bench shares: the guest, the two machines, alternated runs, medians and ratios.

A bench runs avmm and its peer, QEMU under TCG, in turn on the same kernel, initrd, memory and command line, so that a
drift of the host's speed falls on both. Figures are medians; what counts is the ratio.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from avmm.bootloader import cpio
from avmm.debian import Fetched, fetch_debian

CMDLINE = "console=ttyAMA0 panic=-1"

# Users' Pythons keep what they compiled: ours do, whatever the shell says.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def guest(flavour: str = "cloud") -> Fetched:
    """Debian's kernel and the busybox initrd, from the user's cache."""
    return fetch_debian(flavour=flavour, progress=lambda text: None)


def with_init(initrd: Path, script: str, programs: dict[str, bytes] | None = None) -> Path:
    """A copy of ``initrd`` whose /bench-init (boot it with ``avmm.init=/bench-init``) is ``script``, and programs."""
    files = {"bench-init": script.encode()} | (programs or {})
    archive = cpio.pack([cpio.file(name, data, 0o755) for name, data in files.items()])
    handle, name = tempfile.mkstemp(suffix=".initrd")
    with os.fdopen(handle, "wb") as file:
        file.write(cpio.append(initrd.read_bytes(), archive))
    return Path(name)


@dataclass(frozen=True, slots=True)
class Machine:
    """One way to boot a guest: ``command(kernel, initrd, memory in MiB, cpus, append)`` is an argv."""

    name: str
    command: Callable[[Path, Path, int, int, str], list[str]]


def _avmm(kernel: Path, initrd: Path, memory: int, cpus: int, append: str) -> list[str]:
    command = [sys.executable, "-m", "avmm.cli", "boot", str(kernel), str(initrd)]
    return [*command, "-m", f"{memory}M", "-c", str(cpus), "-a", append, "--net", "none"]


def _qemu(kernel: Path, initrd: Path, memory: int, cpus: int, append: str) -> list[str]:
    return [
        "qemu-system-aarch64", "-M", "virt,gic-version=3", "-cpu", "cortex-a57", "-nographic", "-nodefaults",
        "-serial", "stdio", "-no-reboot", "-net", "none", "-m", str(memory), "-smp", str(cpus),
        "-kernel", str(kernel), "-initrd", str(initrd), "-append", f"{CMDLINE} {append}",
    ]  # fmt: skip


AVMM = Machine("avmm", _avmm)
QEMU = Machine("QEMU TCG", _qemu)


def require_qemu() -> None:
    """End the program with a hint where there is no QEMU to compare with."""
    if shutil.which("qemu-system-aarch64") is None:
        sys.exit("this bench compares with QEMU: install qemu-system-arm")


def timed(argv: list[str], expect: bytes, timeout: float = 300) -> float:
    """Seconds of wall time that ``argv`` takes; it must print ``expect`` and exit with 0."""
    began = time.perf_counter()
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout)
    elapsed = time.perf_counter() - began
    if done.returncode or expect not in done.stdout:
        sys.stderr.buffer.write(done.stdout[-2000:] + done.stderr[-2000:])
        sys.exit(f"{argv[0]} exited with {done.returncode}")
    return elapsed


@contextlib.contextmanager
def running(argv: list[str], until: bytes, timeout: float = 120) -> Iterator[subprocess.Popen[bytes]]:
    """A guest that has printed ``until`` and goes on running; killed at the end. stdin is a pipe nobody writes to."""
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        seen = b""
        deadline = time.monotonic() + timeout
        while until not in seen:
            piece = os.read(process.stdout.fileno(), 65536)
            if not piece or time.monotonic() > deadline:
                sys.exit(f"{argv[0]} did not print {until!r}; it printed {seen[-500:]!r}")
            seen += piece
        yield process
    finally:
        process.kill()
        process.communicate()


def cpu_seconds(pid: int) -> float:
    """CPU time of the process and all its threads so far, user and system, without the 10 ms ticks of /proc/PID/stat.

    Linux's number for another process's CPU clock, which clock_getcpuclockid(3) would give, is this.
    """
    return time.clock_gettime(~pid << 3 | 2)


def resident_mib(pid: int) -> dict[str, float]:
    """Resident memory of the process in MiB: ``anon`` (its own), ``file`` and ``shmem`` pages."""
    wanted = {b"RssAnon": "anon", b"RssFile": "file", b"RssShmem": "shmem"}
    found = {}
    for line in Path(f"/proc/{pid}/status").read_bytes().splitlines():
        key, _, value = line.partition(b":")
        if key in wanted:
            found[wanted[key]] = int(value.split()[0]) / 1024
    return found


def alternate(runs: int, ours: Callable[[], float], theirs: Callable[[], float], unit: str = "s") -> None:
    """Run the two in turn after one warm-up each; print medians, spreads and the ratio of medians and of pairs."""
    ours()
    theirs()
    pairs = [(ours(), theirs()) for _ in range(runs)]
    for name, values in (("avmm", [a for a, _ in pairs]), ("QEMU TCG", [b for _, b in pairs])):
        print(f"{name:10s} median {statistics.median(values):8.3f} {unit}   "
              f"min {min(values):8.3f}   max {max(values):8.3f}   n={runs}")  # fmt: skip
    ratio = statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)
    paired = statistics.median(a / b for a, b in pairs)
    print(f"ratio avmm/QEMU: of medians {ratio:.3f}, median of pairs {paired:.3f}", flush=True)


def headline(title: str) -> None:
    """Say what is measured, and on what."""
    version = subprocess.run(["qemu-system-aarch64", "--version"], capture_output=True, text=True).stdout
    print(f"# {title}\n{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
          f"{version.splitlines()[0] if version else 'no QEMU'}", flush=True)  # fmt: skip
