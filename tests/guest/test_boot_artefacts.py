"""What `avmm fetch` makes and what the loader writes boots on a machine that is not ours: QEMU's virt."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from avmm import fdt
from avmm.bootloader import cpio, initrd, loader, machine
from avmm.bootloader.image import load_kernel
from avmm.debian import Fetched
from avmm.memory import GuestMemory, Region
from tests.guest.conftest import fetch_or_skip

QEMU = "qemu-system-aarch64"
MEMORY = 512 << 20
DEADLINE = 240.0  # seconds until a guest that says nothing is given up

pytestmark = [pytest.mark.guest, pytest.mark.skipif(not shutil.which(QEMU), reason=f"needs {QEMU}")]


@pytest.fixture(scope="module", params=["cloud", "generic"])
def fetched(request: pytest.FixtureRequest) -> Fetched:
    return fetch_or_skip(request.param)


class Console:
    """The serial console of a QEMU guest."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin
        assert process.stdout
        self._out, self._in = process.stdout, process.stdin
        self.text = b""

    def until(self, wanted: bytes) -> bytes:
        """Read on until ``wanted``; everything up to its end that was not read before."""
        while wanted not in self.text:
            piece = os.read(self._out.fileno(), 4096)
            assert piece, f"QEMU ended before {wanted!r}: {self.text[-2000:].decode(errors='replace')}"
            self.text += piece
        before, wanted, self.text = self.text.partition(wanted)
        return before + wanted

    def type(self, line: bytes) -> None:
        self._in.write(line + b"\n")
        self._in.flush()


@contextmanager
def qemu(*arguments: str) -> Iterator[tuple[Console, subprocess.Popen[bytes]]]:
    command = [QEMU, "-M", "virt,gic-version=3", "-cpu", "cortex-a57", "-m", str(MEMORY >> 20), "-nographic"]
    command += ["-nic", "none", "-no-reboot", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        watchdog = threading.Timer(DEADLINE, process.kill)
        watchdog.start()
        try:
            yield Console(process), process
        finally:
            watchdog.cancel()
            process.kill()


def test_the_initrd_gives_a_shell_and_powers_off(fetched: Fetched) -> None:
    devices = ["-device", "virtio-rng-device", "-device", "virtio-serial-device", "-netdev", "user,id=n"]
    devices += ["-device", "virtio-net-device,netdev=n"]
    files = ["-kernel", str(fetched.kernel), "-initrd", str(fetched.initrd), "-append", "console=ttyAMA0"]
    with qemu(*files, *devices) as (console, process):
        console.until(f"avmm: Debian {fetched.version} ready".encode())
        console.until(b"~ # ")
        console.type(b"hostname; lsmod | cut -d' ' -f1 | sort | tr '\\n' ' '; ls /sys/class/net; echo done-$((6*7))")
        said = console.until(b"done-42\r\n")
        assert b"avmm\r\n" in said
        assert b"net_failover virtio" in said
        assert b"virtio_console virtio_mmio virtio_net virtio_r" in said
        assert b"eth0" in said
        # No driver was loaded for what is not there; what a request names is.
        assert b"virtio_blk" not in said
        assert b"vsock" not in said
        console.type(
            b"modprobe vsock && mkdir m && mount -t virtiofs none m; cut -d' ' -f1 /proc/modules; echo end-$((6*7))"
        )
        loaded = console.until(b"end-42\r\n").split()
        assert {b"vsock", b"virtiofs", b"fuse"} <= set(loaded)
        console.type(b"poweroff -f")
        console.until(b"reboot: Power down")
        assert process.wait(DEADLINE) == 0


def test_leaving_the_shell_powers_off(fetched: Fetched) -> None:
    files = ["-kernel", str(fetched.kernel), "-initrd", str(fetched.initrd), "-append", "console=ttyAMA0"]
    with qemu(*files) as (console, process):
        console.until(b"~ # ")
        console.type(b"exit")
        console.until(b"reboot: Power down")
        assert process.wait(DEADLINE) == 0


def node(name: str, placement: fdt.Placement, **properties: fdt.Value) -> fdt.Node:
    return fdt.Node(f"{name}@{placement.base:x}", {"reg": placement.reg, **properties})


def test_what_the_loader_writes_boots(fetched: Fetched, tmp_path: Path) -> None:
    """Memory as our loader leaves it and our device tree, run by QEMU; the guest tells what it saw."""
    script = cpio.file(
        "report",
        b"#!/bin/sh\n"
        b"cat /proc/cmdline; nproc; ls /sys/bus/virtio/devices /sys/class/rtc; grep MemTotal /proc/meminfo\n"
        b"wc -c </sys/firmware/devicetree/base/chosen/linux,initrd-end; cat /proc/interrupts\n"
        b"poweroff -f\n",
        0o755,
    )
    archive = cpio.append(fetched.initrd.read_bytes(), cpio.pack([script]))
    clocks: dict[str, fdt.Value] = {"clocks": fdt.cells(fdt.CLOCK_PHANDLE), "clock-names": "apb_pclk"}
    uart_clocks: dict[str, fdt.Value] = {
        "clocks": fdt.cells(fdt.CLOCK_PHANDLE) * 2,
        "clock-names": ["uartclk", "apb_pclk"],
    }
    slot = machine.virtio_slot(31)  # where QEMU puts the first device
    devices = [
        node("pl011", machine.PL011, compatible=["arm,pl011", "arm,primecell"],
             interrupts=machine.PL011.interrupts(fdt.LEVEL), **uart_clocks),
        node("pl031", machine.PL031, compatible=["arm,pl031", "arm,primecell"],
             interrupts=machine.PL031.interrupts(fdt.LEVEL), **clocks),
        node("virtio_mmio", slot, compatible="virtio,mmio", interrupts=slot.interrupts(fdt.EDGE)),
    ]  # fmt: skip
    memory = GuestMemory()
    base = machine.RAM_BASE + (2 << 20)  # QEMU's own device tree is below, whether it is wanted or not
    memory.add(Region(base, mmap.mmap(-1, MEMORY - (2 << 20))))
    entry = loader.load_linux(
        memory,
        load_kernel(fetched.kernel, MEMORY),
        archive,
        cmdline="console=ttyAMA0 avmm.init=/report",
        cpus=[0, 1],
        devices=devices,
        entropy=bytes(range(loader.ENTROPY_SIZE)),
    )
    # QEMU starts us with x0 = 0: ldr x0, [pc+16]; ldr x4, [pc+20]; br x4
    stub_at = machine.RAM_BASE + MEMORY - 0x1000
    memory.write(stub_at, struct.pack("<4IQQ", 0x58000080, 0x580000A4, 0xD61F0080, 0xD503201F, entry.x0, entry.pc))
    end = entry.x0 + (2 << 20) + len(archive)  # the initrd follows the device tree's 2 MiB
    (tmp_path / "low").write_bytes(memory.read(base, end - base))
    (tmp_path / "stub").write_bytes(memory.read(stub_at, 32))
    memory.close()
    load = ["-device", f"loader,file={tmp_path}/low,addr={base:#x},force-raw=on"]
    load += ["-device", f"loader,file={tmp_path}/stub,addr={stub_at:#x},force-raw=on"]
    load += ["-device", f"loader,addr={stub_at:#x},cpu-num=0", "-smp", "2", "-device", "virtio-rng-device"]
    with qemu(*load) as (console, process):
        said = console.until(b"reboot: Power down").decode(errors="replace")
        assert process.wait(DEADLINE) == 0
    assert "Machine model: linux,dummy-virt" in said
    assert "psci: PSCIv1" in said
    assert "GICv3: CPU1: found redistributor 1" in said
    assert "SMP: Total of 2 processors activated" in said
    assert "KASLR disabled" not in said
    assert "console=ttyAMA0 avmm.init=/report\r\n2\r\n" in said
    assert "virtio0" in said
    assert "rtc0" in said
    assert "uart-pl011" in said
    assert "arch_timer" in said
    assert "random: crng init done" in said


def test_the_initrd_is_as_small_as_it_looks(fetched: Fetched) -> None:
    """It is unpacked and copied by every guest that starts: a driver more is a decision, not an accident."""
    files = {entry.name for entry in cpio.unpack(fetched.initrd.read_bytes())}
    present = {name.rpartition("/")[2].removesuffix(".ko").replace("-", "_") for name in files if name.endswith(".ko")}
    needed = {"virtio", "virtio_ring", "failover", "net_failover", "libcrc32c", "mbcache", "jbd2", "crc16"}
    assert present <= {*initrd.WANTED, *needed, "vmw_vsock_virtio_transport_common"}
    assert {"virtio_blk", "virtio_net", "virtiofs", "vmw_vsock_virtio_transport"} <= present
