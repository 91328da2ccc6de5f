"""Stage 1 translation against QEMU: random tables behind TTBR1, asked by AT, compared as PAR_EL1.

(Unicorn cannot judge this: its AT sees 32 bits of the address.)
"""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.oracle.compare import Comparison
from tests.oracle.machine import BASE, DATA, MIB, PROGRAMS, SCRATCH, SCTLR_VALUE, TABLES, TCR_VALUE, Outcome, Registers

CROSS = "aarch64-linux-gnu-"
QEMU = "qemu-system-aarch64"
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(not shutil.which(QEMU), reason=f"needs {QEMU}"),
    pytest.mark.skipif(not shutil.which(f"{CROSS}as"), reason="needs binutils-aarch64-linux-gnu"),
]

TABLE_SIZE = 0x1_0000  # the largest: 64 KiB granule
LEVELS = DATA + 0x4_0000  # a table per level
CASES, CASE_SIZE = DATA + 0x10_0000, 128
RESULTS = DATA + 0x18_0000
NOWHERE = DATA + 0x1F_0000  # where the descriptors of levels that a walk has not go
ACCESSES = ("s1e1r", "s1e1w", "s1e0r", "s1e0w")  # as translation.S numbers them
#: Where blocks may be (D8.3.1, table D8-15). Elsewhere they are reserved, which QEMU does not know before 8.0.
BLOCK_LEVELS = {12: (1, 2), 14: (2,), 16: (2,)}
#: PAR_EL1.NS is UNKNOWN to a Non-secure state (D17.2.103).
COMPARED = ~(1 << 9)
OUTPUT_BITS = 40  # TCR_EL1.IPS
MAIR = 0xFF44_BB04_00F0_4FFF
MASK64 = (1 << 64) - 1


@dataclass
class Space:
    """A translation regime: ``granule`` and ``size`` of its addresses in bits."""

    granule: int
    size: int
    top_byte_ignored: bool

    @property
    def stride(self) -> int:
        """Bits of the address that one level resolves."""
        return self.granule - 3

    @property
    def start(self) -> int:
        """The level the walk begins at (D8.2.5)."""
        return 4 - -(-(self.size - self.granule) // self.stride)

    def shift(self, level: int) -> int:
        """log2 of what an entry of ``level`` covers."""
        return self.granule + (3 - level) * self.stride

    def entry(self, level: int, va: int) -> int:
        """Address of the descriptor for ``va`` in the table of ``level``."""
        high = min(self.shift(level) + self.stride, self.size)
        return LEVELS + level * TABLE_SIZE + 8 * ((va & (1 << high) - 1) >> self.shift(level))

    def tcr(self) -> int:
        """TCR_EL1 with this behind TTBR1, its walks cacheable."""
        granule = {12: 2, 14: 1, 16: 3}[self.granule]
        return TCR_VALUE & ~(1 << 23) | 64 - self.size << 16 | 0x35 << 24 | granule << 30 | self.top_byte_ignored << 38


def descriptor(space: Space, level: int, rng: random.Random) -> int:
    """What a walk may find: mostly a table or an address, with every attribute; sometimes neither, or the wrong one."""
    dice = rng.random()
    if dice < 0.06:
        return rng.getrandbits(64) & ~1
    beyond = 1 << rng.randrange(OUTPUT_BITS, 48) if rng.random() < 0.04 else 0
    if level < 3 and (dice < 0.75 or level not in BLOCK_LEVELS[space.granule]):
        hierarchical = rng.getrandbits(5) << 59 if rng.random() < 0.4 else 0  # APTable and friends
        return LEVELS + (level + 1) * TABLE_SIZE | 3 | hierarchical | beyond
    accessed = (rng.random() < 0.9) << 10
    attributes = (rng.getrandbits(10) << 2 & ~(1 << 10)) | rng.getrandbits(4) << 51 | accessed
    output = rng.getrandbits(OUTPUT_BITS) >> space.shift(level) << space.shift(level)
    right = 3 if level == 3 else 1
    return output | beyond | attributes | (right if rng.random() < 0.9 else 1)


def cases(granule: int, count: int, rng: random.Random) -> tuple[bytes, list[str]]:
    """Records for translation.S, and a description of each."""
    records, texts = [], []
    for _ in range(count):
        space = Space(granule, rng.randrange(25, 49), rng.random() < 0.3)
        va = MASK64 >> space.size << space.size | rng.getrandbits(space.size)
        if rng.random() < 0.1:
            va ^= 1 << rng.randrange(space.size, 64)
        if not va >> 55 & 1:
            va |= 1 << 55  # behind TTBR1 it stays
        path = {level: descriptor(space, level, rng) for level in range(space.start, 4)}
        how = rng.randrange(len(ACCESSES))
        records.append(record(space, va, how, path))
        tables = ", ".join(f"level {level}: {value:#x}" for level, value in path.items())
        texts.append(f"{ACCESSES[how]} {va:#x} in {space}, {tables}")
    return b"".join(records), texts


def assemble(folder: Path, count: int, semihosting: bool) -> bytes:
    """translation.S as it lies at PROGRAMS."""
    symbols = {
        "MAIR": MAIR, "TABLES": TABLES, "TCR": TCR_VALUE, "SCTLR": SCTLR_VALUE, "CASES": CASES, "COUNT": count,
        "RESULTS": RESULTS, "SEMIHOSTING": int(semihosting),
    }  # fmt: skip
    source = Path(__file__).with_name("translation.S")
    built, linked, flat = folder / "t.o", folder / "t.elf", folder / "t.bin"
    defines = [f"--defsym={name}={value:#x}" for name, value in symbols.items()]
    subprocess.run([f"{CROSS}as", *defines, "-o", built, source], check=True, timeout=60)
    subprocess.run([f"{CROSS}ld", f"-Ttext={PROGRAMS:#x}", "-o", linked, built], check=True, timeout=60)
    subprocess.run([f"{CROSS}objcopy", "-O", "binary", linked, flat], check=True, timeout=60)
    return flat.read_bytes()


def ask_qemu(folder: Path, ram: bytes, count: int) -> tuple[int, ...]:
    """PAR_EL1 of every case, by a Neoverse N1 of QEMU's (it has all three granules)."""
    (folder / "ram").write_bytes(ram[PROGRAMS - BASE :])  # below, QEMU has put its device tree
    command = [
        QEMU, "-M", "virt", "-cpu", "neoverse-n1", "-m", "64", "-nic", "none", "-display", "none", "-monitor", "none",
        "-serial", "none", "-semihosting-config", "enable=on,target=native",
        "-device", f"loader,file=ram,addr={PROGRAMS:#x},force-raw=on",
        "-device", f"loader,addr={PROGRAMS:#x},cpu-num=0",
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=120, cwd=folder)
    return struct.unpack(f"<{count}Q", (folder / "par").read_bytes())


def install(comparison: Comparison, program: bytes, records: bytes) -> None:
    """Program, cases and empty tables into softhv's memory."""
    ram = comparison.subject.ram
    for address, data in ((PROGRAMS, program), (CASES, records), (LEVELS, bytes(4 * TABLE_SIZE))):
        ram[address - BASE : address - BASE + len(data)] = data


def ask_softhv(comparison: Comparison, folder: Path, records: bytes) -> tuple[int, ...]:
    """PAR_EL1 of every case; its memory is put back."""
    subject = comparison.subject
    count = len(records) // CASE_SIZE
    contents = bytes(subject.ram)
    install(comparison, assemble(folder, count, semihosting=False), records)
    try:
        subject.loaded()
        assert subject.run(PROGRAMS, Registers([0] * 31, SCRATCH, 0), vectors=False).outcome is Outcome.DONE
        return struct.unpack_from(f"<{count}Q", subject.ram, RESULTS - BASE)
    finally:
        subject.translate()
        subject.ram[:] = contents
        subject.loaded()


def record(space: Space, va: int, how: int, path: dict[int, int]) -> bytes:
    """One case for translation.S."""
    writes = [(space.entry(level, va), path[level]) if level in path else (NOWHERE, 0) for level in range(4)]
    words = [va, space.tcr(), LEVELS + space.start * TABLE_SIZE, how, *(word for pair in writes for word in pair)]
    return struct.pack("<12Q", *words).ljust(CASE_SIZE, b"\0")


@pytest.mark.parametrize("granule", [12, 14, 16], ids=["4K", "16K", "64K"])
def test_translation(comparison: Comparison, granule: int, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    count = min(20 * pytestconfig.getoption("--oracle-cases"), 4000)
    rng = random.Random(f"{pytestconfig.getoption('--oracle-seed')} translation {granule}")
    records, texts = cases(granule, count, rng)
    contents = bytes(comparison.subject.ram)
    install(comparison, assemble(tmp_path, count, semihosting=True), records)
    theirs = ask_qemu(tmp_path, bytes(comparison.subject.ram), count)
    comparison.subject.ram[:] = contents
    ours = ask_softhv(comparison, tmp_path, records)
    different = [
        f"{text}: softhv {mine:#x}, qemu {other:#x}"
        for text, mine, other in zip(texts, ours, theirs, strict=True)
        if (mine ^ other) & (COMPARED if not mine & 1 else -1)
    ]
    assert not different, f"{len(different)} of {count}\n" + "\n".join(different[:10])
    kinds = Counter(par >> 1 & 0x3F if par & 1 else None for par in ours)
    assert len(kinds) > 10, f"the cases are too much alike: {kinds}"


@pytest.mark.parametrize(("granule", "level"), [(12, 0), (14, 0), (14, 1), (16, 1)])
def test_reserved_blocks_are_translation_faults(
    comparison: Comparison, granule: int, level: int, tmp_path: Path
) -> None:
    space = Space(granule, 48, top_byte_ignored=False)
    va = 0xFFFF_8000_0000_0000
    path = {above: LEVELS + (above + 1) * TABLE_SIZE | 3 for above in range(space.start, level)}
    path[level] = 1 | 1 << 10
    (par,) = ask_softhv(comparison, tmp_path, record(space, va, 0, path))
    assert par & 1
    assert par >> 1 & 0x3F == 0b000100 | level  # a translation fault (D17.2.103)


def test_the_layout_fits() -> None:
    assert LEVELS + 4 * TABLE_SIZE <= CASES
    assert CASES + 4000 * CASE_SIZE <= RESULTS
    assert RESULTS + 4000 * 8 <= NOWHERE < SCRATCH + MIB
