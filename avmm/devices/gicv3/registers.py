"""The memory-mapped registers: GICD_* and GICR_* (IHI 0069, 12.8 to 12.11).

One security state (GICD_CTLR.DS is RAO/WI) and affinity routing only (ARE is RAO/WI); no LPIs. The SGI frame of a
redistributor has the layout of the distributor's first registers, so both use the same code on their own bank.
Accesses of a width the architecture does not allow, and reserved offsets, read as zero and ignore writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from avmm.devices.gicv3.interrupts import PRIORITY_MASK, PRIVATE, SGI_MASK, Bank, Cpu

if TYPE_CHECKING:
    from avmm.devices.gicv3.gic import Gicv3

GICD_SIZE: Final = 0x10000
#: Bytes of the redistributor window for each vCPU: the RD and the SGI frame.
GICR_STRIDE: Final = 0x20000
_FRAME: Final = 0x10000

_IIDR: Final = 0x0000043B  # implementer Arm, as guests expect of a GICv3 without quirks
_PIDR: Final = {  # 12.1.4; PIDR2.ArchRev is 3
    0xFFD0: 0x44, 0xFFE4: 0xB4, 0xFFE8: 0x3B,
    0xFFF0: 0x0D, 0xFFF4: 0xF0, 0xFFF8: 0x05, 0xFFFC: 0xB1,
}  # fmt: skip
_GICD_PIDR0: Final = 0x92
_GICR_PIDR0: Final = 0x93
_PIDR0: Final = 0xFFE0

_CTLR_FIXED: Final = 1 << 6 | 1 << 4  # DS, ARE
# GICD_TYPER without ITLinesNumber: A3V; IDbits 9 (ten INTID bits: no LPIs). RSS, No1N, MBIS, LPIS are zero.
_TYPER_FIXED: Final = 1 << 24 | 9 << 19
_IROUTER: Final = 0x6000
IROUTER_MASK: Final = 0xFF_80FF_FFFF  # Aff3, IRM, Aff2..Aff0
_WAKER_SLEEP: Final = 1 << 1
_WAKER_CHILDREN: Final = 1 << 2


def _spread(bits: int) -> int:
    """Sixteen bits to the odd positions of a word: ICFGR's edge bits."""
    word = 0
    for n in range(16):
        word |= (bits >> n & 1) << (2 * n + 1)
    return word


def _gather(word: int) -> int:
    """The inverse of :func:`_spread`."""
    bits = 0
    for n in range(16):
        bits |= (word >> (2 * n + 1) & 1) << n
    return bits


def _bank_read(bank: Bank, offset: int, size: int) -> int:
    """IGROUPR to ICFGR (offsets 0x80..0xcff) of ``bank``."""
    if 0x400 <= offset < 0x800:
        return int.from_bytes(bank.priority[offset - 0x400 : offset - 0x400 + size], "little")
    if size != 4 or offset & 3:
        return 0
    if 0x080 <= offset < 0x400:
        bits = (
            bank.group, bank.enabled, bank.enabled, bank.pending(), bank.pending(), bank.active, bank.active,
        )[(offset >> 7) - 1]  # fmt: skip
        return bits >> (offset & 0x7F) * 8 & 0xFFFFFFFF
    if 0xC00 <= offset < 0xD00:
        return _spread(bank.edge >> (offset & 0xFF) * 4 & 0xFFFF)
    return 0


def _bank_write(bank: Bank, offset: int, size: int, value: int) -> bool:
    """Write IGROUPR to ICFGR of ``bank``; False when nothing can have changed."""
    if 0x400 <= offset < 0x800:
        for intid in range(offset - 0x400, offset - 0x400 + size):
            if bank.valid >> intid & 1:
                bank.priority[intid] = value & PRIORITY_MASK
            value >>= 8
        return True
    if size != 4 or offset & 3:
        return False
    if 0x080 <= offset < 0x400:
        shift = (offset & 0x7F) * 8
        bits = value << shift & bank.valid
        register = offset >> 7
        if register == 1:
            bank.group = bank.group & ~(0xFFFFFFFF << shift) | bits
        elif register == 2:
            bank.enabled |= bits
        elif register == 3:
            bank.enabled &= ~bits
        elif register == 4:
            bank.latch |= bits
        elif register == 5:
            bank.latch &= ~bits
        elif register == 6:
            bank.active |= bits
        else:
            bank.active &= ~bits
    elif 0xC00 <= offset < 0xD00:
        shift = (offset & 0xFF) * 4
        writable = 0xFFFF << shift & bank.valid & ~SGI_MASK
        bank.edge = bank.edge & ~writable | _gather(value) << shift & writable
    else:
        return False
    bank.refresh()
    return True


class Distributor:
    """The GICD window (:data:`GICD_SIZE` bytes)."""

    def __init__(self, gic: Gicv3) -> None:
        self._gic = gic

    def read(self, offset: int, size: int) -> int:
        """See :class:`avmm.bus.Device`."""
        gic = self._gic
        gic.settle_all()
        if 0x080 <= offset < 0xD00:
            return _bank_read(gic.shared, offset, size)
        if _IROUTER <= offset < _IROUTER + 8 * gic.intids:
            if size < 4 or offset % size:
                return 0
            return gic.router[offset - _IROUTER >> 3] >> (offset & 4) * 8 & (1 << size * 8) - 1
        if size != 4:
            return 0
        if offset == 0x0000:
            return _CTLR_FIXED | gic.enables
        if offset == 0x0004:
            return _TYPER_FIXED | gic.intids // 32 - 1
        if offset == 0x0008:
            return _IIDR
        return _GICD_PIDR0 if offset == _PIDR0 else _PIDR.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        """See :class:`avmm.bus.Device`."""
        gic = self._gic
        gic.settle_all()
        if 0x080 <= offset < 0xD00:
            if _bank_write(gic.shared, offset, size, value):
                if offset < 0x100:  # 1-of-N participation is per group
                    gic.participation_changed()
                gic.evaluate_all()
        elif _IROUTER + 8 * PRIVATE <= offset < _IROUTER + 8 * gic.intids:
            if size < 4 or offset % size:
                return
            intid = offset - _IROUTER >> 3
            shift = (offset & 4) * 8
            kept = gic.router[intid] & ~((1 << size * 8) - 1 << shift)
            gic.route(intid, (kept | value << shift) & IROUTER_MASK)
            gic.evaluate_all()
        elif offset == 0x0000 and size == 4:
            gic.enables = value & 3
            for cpu in gic.cpus:
                cpu.groups = cpu.enables & gic.enables
            gic.evaluate_all()


class Redistributors:
    """The GICR window: :data:`GICR_STRIDE` bytes for each vCPU, by index."""

    def __init__(self, gic: Gicv3) -> None:
        self._gic = gic

    def read(self, offset: int, size: int) -> int:
        """See :class:`avmm.bus.Device`."""
        self._gic.settle_all()
        cpu, offset = self._locate(offset)
        if offset >= _FRAME:
            offset -= _FRAME
            return _bank_read(cpu.private, offset, size) if 0x080 <= offset < 0xD00 else 0
        if 0x0008 <= offset < 0x0010:
            if size < 4 or offset % size:
                return 0
            return self._typer(cpu) >> (offset & 4) * 8 & (1 << size * 8) - 1
        if size != 4:
            return 0
        if offset == 0x0004:
            return _IIDR
        if offset == 0x0014:
            return _WAKER_SLEEP | _WAKER_CHILDREN if cpu.asleep else 0
        return _GICR_PIDR0 if offset == _PIDR0 else _PIDR.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        """See :class:`avmm.bus.Device`."""
        self._gic.settle_all()
        cpu, offset = self._locate(offset)
        if offset >= _FRAME:
            offset -= _FRAME
            if 0x080 <= offset < 0xD00 and _bank_write(cpu.private, offset, size, value):
                cpu.evaluate()
        elif offset == 0x0014 and size == 4:
            # ChildrenAsleep follows at once. A sleeping interface still gets what is sent to it alone: the wake
            # request (11.1) is the same signal here, and power is PSCI's business.
            cpu.asleep = bool(value & _WAKER_SLEEP)
            self._gic.participation_changed()
            self._gic.evaluate_all()

    def _locate(self, offset: int) -> tuple[Cpu, int]:
        return self._gic.cpus[offset // GICR_STRIDE], offset % GICR_STRIDE

    def _typer(self, cpu: Cpu) -> int:
        last = cpu is self._gic.cpus[-1]
        return cpu.affinity << 32 | cpu.index << 8 | last << 4
