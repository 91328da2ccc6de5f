"""GICv3 and PL011 against QEMU's: the same random register accesses, made by a bare-metal program.

A script is made by driving our model, so that it avoids what the architecture calls UNPREDICTABLE (an EOI of something
that is not active, say); it becomes straight-line A64 code that leaves every value it read on the serial port.
"""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from avmm.bus import Device
from avmm.devices.gicv3 import GICR_STRIDE, Gicv3
from avmm.devices.pl011 import Pl011

QEMU = shutil.which("qemu-system-aarch64")
pytestmark = pytest.mark.skipif(QEMU is None, reason="qemu-system-aarch64 is not installed")

GICD = 0x0800_0000
GICR = 0x080A_0000
UART = 0x0900_0000
ENTRY = 0x4020_0000
RESULTS = 0x4400_0000
MARKER = 0x6B72_616D_2E67_6963

ISR = 0xC608
PMR, RPR, DIR = 0xC230, 0xC65B, 0xC659
IAR = (0xC640, 0xC660)
EOIR = (0xC641, 0xC661)
HPPIR = (0xC642, 0xC662)
BPR = (0xC643, 0xC663)
AP = (0xC644, 0xC648)
SGIR = (0xC65F, 0xC65D)
CTLR, SRE = 0xC664, 0xC665
IGRPEN = (0xC666, 0xC667)

# QEMU's GIC has 16 INTID bits, LPIs and no 1-of-N (TYPER); its FR has the modem lines down.
MASKS = {GICD + 4: 0x0500_041F, UART + 0x18: 0xFFF8, GICR: 0, GICR + GICR_STRIDE: 0}


class Sink:
    level = False
    offered: int | None = None
    taken = False

    def irq_changed(self, level: bool) -> None:
        assert level is not self.level
        self.level = level

    def stir(self) -> None: ...

    def offer(self, intid: int) -> None:
        self.offered = intid

    def retract(self) -> bool:
        taken, self.offered, self.taken = self.taken, None, False
        return taken

    def take(self) -> int | None:
        """ICC_IAR1_EL1 is read: the answer, where one is on offer."""
        if self.offered is None:
            return None
        self.taken = True
        intid, self.offered = self.offered, None
        return intid


class Quiet:
    async def read(self, limit: int) -> bytes:
        return b""

    def write(self, data: bytes) -> None:
        pass


@dataclass
class Script:
    """Our model, the code of what was done to it, and the values it gave."""

    code: list[int] = field(default_factory=list)
    values: list[tuple[int, int, int]] = field(default_factory=list)  # place in the log, mask, expected
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        lock = threading.RLock()
        self.sink = Sink()
        self.gic = Gicv3(lock, 2)
        self.gic.connect(0, 0x8000_0000, self.sink)
        self.gic.connect(1, 0x8000_0001, Sink())
        self.uart = Pl011(lock, self.gic.spi(1), Quiet())
        self._constant(2, RESULTS)

    def _constant(self, register: int, value: int) -> None:
        self.code.append(0xD2800000 | (value & 0xFFFF) << 5 | register)
        for half in (1, 2, 3):
            if part := value >> 16 * half & 0xFFFF:
                self.code.append(0xF2800000 | half << 21 | part << 5 | register)

    def _result(self, what: str, mask: int, value: int) -> None:
        self.code.append(0xF8008440)  # str x0, [x2], #8
        self.values.append((len(self.log), mask, value & mask))
        self.log.append(f"{what} -> {value:#x}")

    def _model(self, address: int) -> tuple[Device, int]:
        if address >= UART:
            return self.uart, address - UART
        if address >= GICR:
            return self.gic.redistributors, address - GICR
        return self.gic.distributor, address - GICD

    def load(self, address: int, size: int = 4) -> int:
        device, offset = self._model(address)
        self._constant(1, address)
        self.code.append({1: 0x39400020, 4: 0xB9400020, 8: 0xF9400020}[size])
        value = device.read(offset, size)
        self._result(f"[{address:#x}]", MASKS.get(address, -1), value)
        return value

    def store(self, address: int, value: int, size: int = 4) -> None:
        device, offset = self._model(address)
        self._constant(0, value)
        self._constant(1, address)
        self.code += [{1: 0x39000020, 4: 0xB9000020, 8: 0xF9000020}[size], 0xD5033F9F]
        self.log.append(f"[{address:#x}] = {value:#x}")
        device.write(offset, size, value)

    def mrs(self, encoding: int) -> int:
        # As the engine does it: what is on offer is taken, and the model hears of it later.
        value = self.sink.take() if encoding == IAR[1] else None
        if value is None:
            value = self.gic.read_sysreg(0, encoding)
        assert value is not None
        self.code.append(0xD5200000 | encoding << 5)
        self._result(f"S{encoding:#x}", -1, value)
        return value

    def msr(self, encoding: int, value: int) -> None:
        self._constant(0, value)
        self.log.append(f"S{encoding:#x} = {value:#x}")
        self.code += [0xD5000000 | encoding << 5, 0xD5033FDF]
        assert self.gic.write_sysreg(0, encoding, value)

    def irq(self) -> None:
        """Compare the IRQ input of the CPU."""
        self.gic.settle(0)
        self.code.append(0xD5200000 | ISR << 5)
        self._result("ISR_EL1.I", 0x80, 0x80 if self.sink.level else 0)

    def image(self) -> bytes:
        """The whole program: results go out after the marker, then the machine is turned off."""
        code = list(self.code)
        tail = Script()
        tail.code.clear()
        tail._constant(0, MARKER)
        tail.code.append(0xF9000040)  # str x0, [x2]: read back from just behind the results
        tail._constant(1, UART)
        tail.code += [0xAA0203E3, 0x91002044]  # mov x3, x2; add x4, x2, #8
        emit = [0x38401460, 0xB9000020, 0xEB04007F, 0x54FFFFA1]  # ldrb w0, [x3], #1; str w0, [x1]; cmp x3, x4; b.ne
        tail.code += emit
        tail._constant(3, RESULTS)
        tail.code.append(0xAA0203E4)  # mov x4, x2
        tail.code += emit
        tail._constant(0, 0x8400_0008)
        tail.code += [0xD4000002, 0x14000000]  # hvc #0; b .
        code += tail.code
        return struct.pack(f"<{len(code)}I", *code)

    def check(self, folder: Path) -> None:
        """Run it on QEMU and compare every value."""
        image, serial = folder / "script.bin", folder / "serial"
        image.write_bytes(self.image())
        assert QEMU is not None
        subprocess.run(
            [QEMU, "-M", "virt,gic-version=3", "-cpu", "cortex-a57", "-smp", "2", "-m", "128", "-nic", "none",
             "-display", "none", "-monitor", "none", "-serial", f"file:{serial}",
             "-device", f"loader,file={image},addr={ENTRY:#x},cpu-num=0"],
            check=True, timeout=120,
        )  # fmt: skip
        _, marker, results = serial.read_bytes().partition(struct.pack("<Q", MARKER))
        assert marker
        assert len(results) == 8 * len(self.values)
        for number, (theirs,) in enumerate(struct.iter_unpack("<Q", results)):
            at, mask, ours = self.values[number]
            assert theirs & mask & (1 << 64) - 1 == ours & (1 << 64) - 1, (
                f"QEMU has {theirs:#x} at the end of {self.log[max(0, at - 24) : at + 1]}"
            )


def test_reset_values(tmp_path: Path) -> None:
    script = Script()
    for offset in (0x0, 0x4, 0x8, 0x80, 0x84, 0x104, 0x184, 0x204, 0x304, 0x420, 0xC04, 0xC08, 0xD04, 0xE04):
        script.load(GICD + offset)
    for frame in (GICD, GICR, GICR + GICR_STRIDE):
        for offset in (0xFFD0, *range(0xFFE0, 0x10000, 4)):
            script.load(frame + offset)
    for offset in (4, 0xC, 0x14, 0x10080, 0x10100, 0x10200, 0x10300, 0x10400, 0x10C00, 0x10C04):
        script.load(GICR + offset)
        script.load(GICR + GICR_STRIDE + offset)
    script.load(GICD + 0x6100, 8)
    for offset in (*range(0x18, 0x4C, 4), *range(0xFE0, 0x1000, 4)):
        script.load(UART + offset)
    for encoding in (PMR, RPR, *IAR, *HPPIR, *BPR, *AP, *IGRPEN, SRE):
        script.mrs(encoding)
    script.irq()
    script.check(tmp_path)


def test_affinity_in_typer() -> None:
    gic = Script().gic
    assert gic.redistributors.read(8, 8) == 0
    assert gic.redistributors.read(GICR_STRIDE + 8, 8) == 1 << 32 | 1 << 8 | 1 << 4  # QEMU's, without the LPI bits


@pytest.mark.parametrize("eoi_split", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_random_accesses(seed: int, eoi_split: bool, tmp_path: Path) -> None:
    rng = random.Random(seed)
    script = Script()
    active: list[tuple[int, int]] = []  # (INTID, group), innermost last
    dropped: list[int] = []  # priority dropped, still active (EOImode 1)
    script.store(GICR + 0x14, 0)
    script.msr(CTLR, eoi_split << 1)
    script.msr(PMR, 0xF8)
    for word in (GICR + 0x10400, GICD + 0x420):
        for offset in range(0, 32, 4):
            script.store(word + offset, rng.getrandbits(32) & 0xF8F8F8F8)

    def bits() -> int:
        some = rng.getrandbits(32)
        return rng.choice((0xFFFFFFFF, some, some & rng.getrandbits(32), 1 << rng.randrange(32)))

    def bank(offset: int) -> int:
        """The address of register ``offset`` for SGIs and PPIs, or for one of the first SPIs."""
        word = rng.randrange(3)
        return GICD + offset + 4 * word if word else GICR + 0x10000 + offset

    def mmio() -> None:
        offset = rng.choice((0x80, 0x100, 0x100, 0x180, 0x200, 0x200, 0x280, 0x400, 0x400, 0x420, 0xC00, 0x6000, 0))
        if offset == 0:
            script.store(GICD, rng.choice((1, 2, 3, 3, 3)))
            script.load(GICD)
        elif offset == 0x80:
            # The group of an active interrupt stays: an EOI to the other group's register is UNPREDICTABLE.
            if not active and not dropped:
                script.store(bank(offset), rng.choice((0xFFFFFFFF, 0xFFFFFFFF, bits())))
        elif offset == 0x280:
            script.store(bank(offset), bits() & bits())
        elif offset in (0x400, 0x420):
            address = rng.choice((GICR + 0x10400 + rng.randrange(32), GICD + 0x420 + rng.randrange(64)))
            script.store(address, rng.randrange(32) * 8, 1)  # QEMU keeps the unimplemented bits in the distributor
            script.load(address, 1)
            script.load(address & ~3)
        elif offset == 0xC00:
            # Only while disabled: UNPREDICTABLE otherwise.
            spis = rng.randrange(2)
            script.store(GICD + 0x184 if spis else GICR + 0x10180, 0xFFFFFFFF)
            address = GICD + 0xC08 if spis else GICR + 0x10C04
            script.store(address, bits() & 0xAAAAAAAA)
            script.load(address)
        elif offset == 0x6000:
            address = GICD + 0x6000 + 8 * rng.randrange(32, 96)
            script.store(address, rng.choice((0, 0, 0, 1, 0x100)), 8)
            script.load(address, 8)
        else:  # pending a few at a time, rising in priority now and then: preemption
            script.store(bank(offset), 1 << rng.randrange(32) if offset == 0x200 else bits())

    def uart() -> None:
        kind = rng.randrange(3)
        if kind == 0:
            script.store(UART + 0x38, rng.getrandbits(11))
        elif kind == 1:
            script.store(UART, ord("."))
        else:
            script.store(UART + 0x44, rng.getrandbits(11))
        script.load(UART + 0x3C)
        script.load(UART + 0x40)

    def interface() -> None:
        kind = rng.randrange(8)
        if kind == 0:
            script.msr(PMR, rng.choice((0xFF, 0xF8, 0x80, rng.randrange(256))))
        elif kind == 1 and not active:
            # The same split for both groups: against another group's running priority QEMU compares fewer bits.
            point = rng.randrange(7)
            script.msr(CTLR, eoi_split << 1)  # with CBPR set a write to BPR1 would be ignored
            script.msr(BPR[0], point)
            script.msr(BPR[1], point + 1)
        elif kind == 2:
            # Both at once: in QEMU an interrupt of a group that only ICC_IGRPENn disables hides the other group's.
            enable = rng.choice((0, 1, 1, 1))
            for encoding in IGRPEN:
                script.msr(encoding, enable)
        elif kind == 3:
            targets = rng.choice((1, 3, 2, 1 << 40))
            script.msr(SGIR[rng.choice((0, 1, 1, 1))], targets | rng.randrange(16) << 24)
        elif kind == 4 and not active:
            script.msr(CTLR, eoi_split << 1 | rng.randrange(2))
        else:
            for encoding in (PMR, *BPR, *AP, *IGRPEN, RPR):
                script.mrs(encoding)

    def acknowledge() -> None:
        group = rng.choice((0, 1, 1, 1))
        intid = script.mrs(IAR[group])
        if intid < 1020:
            active.append((intid, group))

    def end() -> None:
        if active:
            intid, group = active.pop()
            script.msr(EOIR[group], intid)
            if eoi_split:
                dropped.append(intid)

    def deactivate() -> None:
        if dropped:
            script.msr(DIR, dropped.pop(rng.randrange(len(dropped))))

    for _ in range(2500):
        rng.choice((mmio, mmio, uart, interface, acknowledge, acknowledge, end, deactivate))()
        script.irq()
        script.mrs(HPPIR[0])
        script.mrs(HPPIR[1])
        script.mrs(RPR)
        script.load(bank(rng.choice((0x80, 0x100, 0x180, 0x200, 0x280, 0x300, 0x380))))
        script.load(GICR + GICR_STRIDE + 0x10200)
    script.check(tmp_path)
