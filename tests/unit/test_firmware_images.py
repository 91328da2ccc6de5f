"""The bare-metal guests: the images are the ones their hashes and sources say, and QEMU agrees with what they check."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import struct
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

FIRMWARE = Path(__file__).parents[2] / "firmware"
IMAGES = FIRMWARE / "images"
QEMU = shutil.which("qemu-system-aarch64")

# Checks that fail on QEMU 7.2 though the Arm ARM is on their side, and why.
QEMU_DEVIATIONS = {
    "faults": {
        "load_reserved_l0_el1": "a level 0 block is taken as valid (reserved for 4 KiB without LPA2, D8.3.1)",
        "load_reserved_l0_el0": "the same",
        "device_unaligned_el1": "unaligned accesses to Device memory are let through (B2.7.2)",
        "device_unaligned_el0": "the same",
        "pc_alignment_before_translation": "the fetch's abort wins over the misaligned PC (D1.3.5)",
        "sp_alignment_el1t": "SP alignment is not checked (D1.3.6)",
        "sp_alignment_el0": "the same",
        "sp_alignment_pair_el0": "the same",
        "step_locked": "software step goes on while the OS lock is closed (D2.4)",
        "daifset_el0": "the syndrome's op1 and op2 are exchanged (D17.2.37, ISS for EC 0x18)",
    },
    "litmus": {  # each depends on timing
        "patched_code": "a CPU may run once more what another's IC IVAU has dropped (B2.4.4)",
        "store_exclusive_changed_back": "a store-exclusive does not see that a value changed and changed back (B2.9.2)",
        "lock_free_stack": "the same, by chance",
        "store_buffering_release_acquire": "an LDAR may overtake an earlier STLR (B2.3.11)",
    },
    "psci": {"cpu_on_again": "two CPU_ON in a row may both succeed (DEN0022, 5.6.3); depends on timing"},
}
# Guest, CPU model, number of CPUs: everything that powers off by itself and reports.
RUNS = [
    ("timer_wfi", "cortex-a57", 1),
    ("ipi_pingpong", "cortex-a57", 1),
    ("ipi_pingpong", "cortex-a57", 4),
    ("exits", "cortex-a57", 1),
    ("faults", "cortex-a57", 1),
    ("faults", "max", 1),
    ("psci", "cortex-a57", 1),
    ("psci", "cortex-a57", 2),
    ("gic", "cortex-a57", 1),
    ("gic", "cortex-a57", 2),
    ("atomics", "cortex-a57", 2),
    ("atomics", "max", 2),
    ("mmio_widths", "max", 1),
    ("smc_code", "cortex-a57", 2),
    ("litmus", "max", 2),
    ("garbage_devices", "cortex-a57", 1),
]


def builder() -> ModuleType:
    """firmware/build.py as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location("firmware_build", FIRMWARE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = sorted(builder().guests())


def run_on_qemu(name: str, cpu: str, cpus: int) -> list[str]:
    """Boot an image until it powers off; the lines of its console."""
    if QEMU is None:
        pytest.skip("qemu-system-aarch64 is not installed")
    command = [QEMU, "-M", "virt,gic-version=3", "-cpu", cpu, "-smp", str(cpus), "-m", "128", "-nic", "none"]
    command += [
        "-nographic",
        "-no-reboot",
        "-kernel",
        str(IMAGES / f"{name}.bin"),
        "-append",
        "n=20" if name == "timer_wfi" else "n=1000",
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=True)
    return done.stdout.decode("ascii").splitlines()


def test_hashes_name_every_image() -> None:
    lines = (IMAGES / "SHA256SUMS").read_text().splitlines()
    recorded = {name: digest for digest, name in (line.split() for line in lines)}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in IMAGES.glob("*.bin")}
    assert found == recorded
    assert sorted(found) == [f"{name}.bin" for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_image_header(name: str) -> None:
    image = (IMAGES / f"{name}.bin").read_bytes()
    text_offset, image_size, flags = struct.unpack_from("<QQQ", image, 8)
    assert image[56:60] == b"ARM\x64"
    assert text_offset == 0
    assert image_size >= len(image)
    assert flags == 0b1010  # little-endian, 4 KiB pages, anywhere in memory
    assert len(image) < 32 * 1024


@pytest.mark.parametrize("name", NAMES)
def test_sources_build_the_image(name: str, tmp_path: Path) -> None:
    build = builder()
    compiler, recorded = build.toolchain(), (IMAGES / "TOOLCHAIN").read_text().strip()
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-gcc")
    if compiler != recorded:
        pytest.skip(f"the images were made by {recorded}, here is {compiler}")
    assert build.build(name, tmp_path) == (IMAGES / f"{name}.bin").read_bytes()


def test_hello_on_qemu() -> None:
    assert run_on_qemu("hello", "cortex-a57", 1) == ["hello"]


def test_reset_on_qemu() -> None:
    assert run_on_qemu("reset", "cortex-a57", 1) == ["reset"]  # -no-reboot: a reset ends it


@pytest.mark.parametrize(("name", "cpu", "cpus"), RUNS)
def test_qemu_agrees(name: str, cpu: str, cpus: int) -> None:
    lines = run_on_qemu(name, cpu, cpus)
    verdicts = [match for line in lines if (match := re.match(r"(ok|not ok) (\w+)", line))]
    assert verdicts, lines
    assert lines[-1] == f"1..{len(verdicts)}", lines[-3:]
    failed = {match[2] for match in verdicts if match[1] == "not ok"}
    assert failed <= set(QEMU_DEVIATIONS.get(name, {})), lines
    if cpus > 1 and name != "psci" and name != "gic":
        assert f"cpus {cpus}" in lines
