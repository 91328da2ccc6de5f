"""Bad input gets one line that says what to do, exit code 2 and no traceback."""

from __future__ import annotations

import gzip
import os
import shlex
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest


def image(size: int = 0x10000, image_size: int | None = None) -> bytes:
    """A well-formed arm64 Image with nothing in it (Linux, Documentation/arch/arm64/booting.rst)."""
    header = struct.pack("<IIQQQQQQ4sI", 0x14000010, 0, 0, image_size or size, 0b1010, 0, 0, 0, b"ARM\x64", 0)
    return header.ljust(size, b"\0")


AVMM = [sys.executable, "-m", "avmm.cli"]


def avmm(*args: object) -> subprocess.CompletedProcess[str]:
    command = [*AVMM, *map(str, args)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "Image"
    path.write_bytes(image())
    return path


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("avmm: ")
    for word in words:
        assert word in line


KERNELS = {
    "empty": b"",
    "truncated header": image()[:40],
    "x86 bzImage": bytes(0x1FE) + b"\x55\xaa" + b"\xeb\x66HdrS" + bytes(4096),
    "32-bit zImage": bytes(0x24) + struct.pack("<I", 0x016F2818) + bytes(4096),
    "x86 ELF": b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, 62) + bytes(4096),
    "arm64 ELF": b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, 183) + bytes(4096),
    "text": b"hello, I am not a kernel\n" * 10,
    "truncated gzip": gzip.compress(image())[:-20],
    "damaged gzip": gzip.compress(b"x" * 100)[:10] + b"\xff" * 90,
}


@pytest.mark.parametrize("content", KERNELS.values(), ids=KERNELS.keys())
def test_not_a_kernel(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(content)
    refused(avmm("boot", path), str(path))


def test_missing_kernel(tmp_path: Path) -> None:
    refused(avmm("boot", tmp_path / "none"), "no such")


def test_folder_as_kernel(tmp_path: Path) -> None:
    refused(avmm("boot", tmp_path), "folder")


def test_missing_initrd(good: Path, tmp_path: Path) -> None:
    refused(avmm("boot", good, tmp_path / "none"), "no such")


def test_kernel_larger_than_memory(tmp_path: Path) -> None:
    path = tmp_path / "Image"
    path.write_bytes(image(image_size=64 << 20))
    refused(avmm("boot", path, "-m", "32M"), "memory")


def test_initrd_that_does_not_fit(good: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(bytes(31 << 20))
    refused(avmm("boot", good, initrd, "-m", "32M"), "memory")


@pytest.mark.parametrize("size", ["0", "1M", "-512M", "lots", "512Q", "", "9999999G", "1000001"])
def test_bad_memory(good: Path, size: str) -> None:
    refused(avmm("boot", good, f"--memory={size}"))


@pytest.mark.parametrize("cpus", ["0", "1000", "-1", "two"])
def test_bad_cpus(good: Path, cpus: str) -> None:
    refused(avmm("boot", good, f"--cpus={cpus}"))


def test_bad_irqchip(good: Path) -> None:
    refused(avmm("boot", good, "--irqchip=gicv2"), "avmm, hypervisor")


@pytest.mark.parametrize("time", ["-1us", "2ms", "fast", "200"])
def test_bad_halt_poll(good: Path, time: str) -> None:
    refused(avmm("boot", good, f"--halt-poll={time}"), "us")


@pytest.mark.parametrize("arguments", [["--mem=64M"], ["--"], ["initrd", "too-much"], ["--timeout=soon"]], ids=" ".join)
def test_bad_usage(good: Path, arguments: list[str]) -> None:
    refused(avmm("boot", good, *arguments))


def test_empty_paths(good: Path) -> None:
    refused(avmm("boot", ""), "kernel")
    refused(avmm("boot", good, ""), "initrd")
    refused(avmm("boot", good, "-d", ""), "path")


def test_missing_disk(good: Path, tmp_path: Path) -> None:
    refused(avmm("boot", good, "-d", tmp_path / "none"), "none", "truncate")


OTHERS = [
    ["fetch", "debian", "--rel=bookworm"],
    ["fetch", "slackware"],
    ["top", "--interval=no"],
    ["snapshot"],
    ["restore", "none"],
    ["resume", "none"],
    ["doctor", "--engine=x"],
]


@pytest.mark.parametrize("command", OTHERS, ids=" ".join)
def test_other_commands(command: list[str]) -> None:
    refused(avmm(*command))


def test_unknown_engine(good: Path) -> None:
    refused(avmm("boot", good, "--engine", "qemu"), "softhv")


def test_bad_timeout(good: Path) -> None:
    refused(avmm("boot", good, "--timeout", "-1"))


def test_command_line_too_long(good: Path) -> None:
    refused(avmm("boot", good, "-a", "x" * 3000), "2047")


def test_no_command() -> None:
    refused(avmm())


def test_device_tree_to_nowhere(good: Path, tmp_path: Path) -> None:
    refused(avmm("boot", good, "--dump-dtb", tmp_path / "no" / "where"), "cannot write")


def test_output_to_a_full_disk(good: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*AVMM, "boot", good, "--dry-run"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 3
    assert done.stderr.splitlines() == ["avmm: the output: No space left on device"]


def test_output_that_nobody_reads(good: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        done = subprocess.run(
            [*AVMM, "boot", good, "--dry-run"], stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams(good: Path, closed: str) -> None:
    """Nothing we open may take their place: libuv aborts the process when it closes one of the three."""
    command = f"{shlex.join([*AVMM, 'boot', str(good), '--timeout', '0.1'])} {closed}"
    assert subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, timeout=60).returncode == 124


def test_dry_run_resolves_everything(good: Path) -> None:
    result = avmm("boot", good, "-m", "1G", "-c", "3", "-a", "quiet", "--no-reboot", "--dry-run")
    assert result.returncode == 0, result.stderr
    import json

    shown = json.loads(result.stdout)
    assert shown["memory"] == 1 << 30
    assert shown["cpus"] == 3
    assert shown["cmdline"] == "console=ttyAMA0 panic=-1 quiet"
    assert shown["reboot"] is False
