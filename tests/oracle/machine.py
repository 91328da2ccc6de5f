"""What both sides of a comparison are: a CPU at EL1 with some RAM, and the state one program leaves behind.

Guest memory, identity mapped, normal write-back::

    CODE      4 MiB   filled with HVC #0, so that a branch to anywhere in it ends the program; programs in the middle
      VECTORS         the first 2 KiB: HVC #1
    DATA      2 MiB   accessible from EL0 too (LDTR and friends), not executable; the page tables at its start
      SCRATCH         the last 128 KiB: what memory instructions use and what is compared
    END               nothing is mapped from here on, nor anywhere else

For softhv each GRANULE of SCRATCH is somewhere else in the host's memory: an access that goes by another page's place
shows.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from enum import Enum

MIB = 1 << 20
BASE = 0x4000_0000
CODE, CODE_SIZE = BASE, 4 * MIB
VECTORS, VECTORS_SIZE = CODE, 0x800
PROGRAMS, PROGRAMS_SIZE = CODE + 2 * MIB - 0x1_0000, 0x2_0000
PROGRAMS_MIDDLE = PROGRAMS + PROGRAMS_SIZE // 2
DATA, DATA_SIZE = CODE + CODE_SIZE, 2 * MIB
TABLES = DATA
END = DATA + DATA_SIZE
SCRATCH, SCRATCH_SIZE = END - 0x2_0000, 0x2_0000
SIZE = END - BASE

HVC = 0xD400_0002
HVC_VECTOR = 0xD400_0022


class Outcome(Enum):
    """How a program ended, as far as both sides can tell."""

    DONE = "ran to its end"
    UNDEFINED = "undefined instruction"
    FAULT = "data abort"
    SVC = "SVC"
    BRK = "BRK"
    HVC = "HVC"
    SMC = "SMC"
    WAIT = "WFI, WFE or YIELD"
    TRAP = "another exception"
    FAILED = "the engine failed"


@dataclass
class Registers:
    """The state a program starts from. ``v`` holds Q0..Q31, 16 bytes each, little endian."""

    x: list[int]
    sp: int
    nzcv: int
    fpcr: int = 0
    fpsr: int = 0
    v: bytes = bytes(512)


@dataclass
class Result:
    """The state a program leaves; of an exception softhv's syndrome and fault address, Unicorn's own numbers."""

    outcome: Outcome
    pc: int
    x: list[int] = field(default_factory=list)
    sp: int = 0
    nzcv: int = 0
    fpcr: int = 0
    fpsr: int = 0
    v: bytes = b""
    esr: int = 0
    far: int = 0
    detail: str = ""


#: Attribute 0: normal, write-back. 39 bits, 4 KiB, TTBR1 off, 40-bit PAs. RES1 and SPAN, DZE, I, C, M.
MAIR_VALUE = 0xFF
TCR_VALUE = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 2 << 32
SCTLR_VALUE = 0x30D0_0800 | 1 << 14 | 1 << 12 | 1 << 2 | 1


def new_ram(file: int = -1) -> mmap.mmap:
    """RAM, or a file of it, with everything laid out; page tables, which of Unicorns only test_translation's uses."""
    ram = mmap.mmap(file, SIZE)
    ram[:CODE_SIZE] = HVC.to_bytes(4, "little") * (CODE_SIZE // 4)
    ram[:VECTORS_SIZE] = HVC_VECTOR.to_bytes(4, "little") * (VECTORS_SIZE // 4)
    block = 1 | 3 << 8 | 1 << 10  # a block, inner shareable, accessed, attribute 0 (Arm ARM D8.3)
    never_executed, user = 3 << 53, 1 << 6
    level2 = TABLES + 0x1000
    for at, entry in (
        (TABLES + 8 * (BASE >> 30), level2 | 3),
        (level2, CODE | block),
        (level2 + 8, CODE + 2 * MIB | block),
        (level2 + 16, DATA | block | never_executed | user),
    ):
        ram[at - BASE : at - BASE + 8] = entry.to_bytes(8, "little")
    return ram
