"""Run the same program on both sides and say what differs."""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cffi import FFI

from avmm.hypervisor import sysreg
from tests.oracle.cases import Case, Row, Table, Values, case, is_branch
from tests.oracle.exceptions import skip_of_case
from tests.oracle.machine import (
    BASE,
    HVC,
    PROGRAMS,
    PROGRAMS_MIDDLE,
    PROGRAMS_SIZE,
    SCRATCH,
    SCRATCH_SIZE,
    Outcome,
    Registers,
    Result,
)
from tests.oracle.reference import Reference
from tests.oracle.subject import Subject

FPSR_NAMES = {0: "IOC", 1: "DZC", 2: "OFC", 3: "UFC", 4: "IXC", 7: "IDC", 27: "QC"}
BATCH = 1024

_memcmp = FFI()
_memcmp.cdef("int memcmp(const void *, const void *, size_t);")


@dataclass
class Mismatch:
    """One case on which the sides disagree. ``memory`` lists (address, before, subject, reference) by bytes."""

    case: Case
    address: int
    subject: Result
    reference: Result
    differences: list[str]
    memory: list[tuple[int, int, int]] = field(default_factory=list)

    def __str__(self) -> str:
        before = self.case.before
        lines = [f"{self.case.row} at {self.address:#x}"]
        lines += [f"    {text}" for text in disassemble(self.case.words, self.address)]
        lines.append(f"  softhv   {describe(self.subject)}")
        lines.append(f"  unicorn  {describe(self.reference)}")
        lines.append(f"  differ: {', '.join(self.differences)}")
        for name in self.differences:
            lines += self._detail(name)
        for name, low in ("Rd/Rt", 0), ("Rn", 5), ("Ra/Rt2", 10), ("Rm/Rs", 16):
            number = self.case.words[-1] >> low & 31
            register, value = (f"x{number}", before.x[number]) if number < 31 else ("sp", before.sp)
            text = f"    {name} {register}={value:#018x}"
            if self.case.vectors:
                text += f"  v{number}={lane(before.v, number)}"
            lines.append(text)
        lines.append(f"    nzcv={before.nzcv >> 28:04b} fpcr={before.fpcr:#010x} fpsr={before.fpsr:#010x}")
        return "\n".join(lines)

    def _detail(self, name: str) -> Iterator[str]:
        before, ours, theirs = self.case.before, self.subject, self.reference
        if name[0] == "x" and name[1:].isdecimal():
            at = int(name[1:])
            yield f"    {name}: {before.x[at]:#018x} -> softhv {ours.x[at]:#018x}, unicorn {theirs.x[at]:#018x}"
        elif name[0] == "v":
            at = int(name[1:])
            yield f"    {name}: {lane(before.v, at)} ->"
            yield f"        softhv  {lane(ours.v, at)}"
            yield f"        unicorn {lane(theirs.v, at)}"
        elif name == "fpsr":
            yield f"    fpsr: {flags(before.fpsr)} -> softhv {flags(ours.fpsr)}, unicorn {flags(theirs.fpsr)}"
        elif name == "nzcv":
            yield f"    nzcv: {before.nzcv >> 28:04b} -> softhv {ours.nzcv >> 28:04b}, unicorn {theirs.nzcv >> 28:04b}"
        elif name == "sp":
            yield f"    sp: {before.sp:#x} -> softhv {ours.sp:#x}, unicorn {theirs.sp:#x}"
        elif name == "memory":
            for address, mine, other in self.memory[:32]:
                yield f"    [{address:#x}]: softhv {mine:02x}, unicorn {other:02x}"


def lane(vectors: bytes, number: int) -> str:
    """Q``number`` as one hexadecimal number, the highest byte first."""
    return f"{int.from_bytes(vectors[16 * number : 16 * number + 16], 'little'):032x}"


def flags(fpsr: int) -> str:
    """FPSR by the names of its bits."""
    return "|".join(name for bit, name in FPSR_NAMES.items() if fpsr >> bit & 1) or "0"


def describe(result: Result) -> str:
    """One line on how a side ended."""
    return f"{result.outcome.value}, pc {result.pc:#x} {result.detail}"


def disassemble(words: list[int], address: int) -> list[str]:
    """``words`` as text; without binutils for AArch64, in hexadecimal alone."""
    objdump = shutil.which("aarch64-linux-gnu-objdump")
    if objdump is None:
        return [f"{word:08x}" for word in words]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(word.to_bytes(4, "little") for word in words))
        file.flush()
        command = [objdump, "-D", "-b", "binary", "-m", "aarch64", f"--adjust-vma={address:#x}", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    return [line.split(":", 1)[1].strip().replace("\t", " ") for line in output.splitlines() if line.startswith(" ")]


@dataclass
class Report:
    """What a run of cases came to."""

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    mismatches: list[Mismatch] = field(default_factory=list)

    @property
    def compared(self) -> int:
        """Cases that ran on both sides."""
        return sum(self.outcomes.values())


class Comparison:
    """Both machines, and the tables to make cases from."""

    def __init__(self, compiled: bool) -> None:
        self.table = Table()
        self.reference = Reference()
        self.subject = Subject(compiled)
        self._libc = _memcmp.dlopen(None)
        offset = SCRATCH - BASE
        self._scratch = [
            _memcmp.from_buffer(memoryview(ram)[offset : offset + SCRATCH_SIZE])
            for ram in (self.subject.ram, self.reference.ram)
        ]
        self._fill = HVC.to_bytes(4, "little") * (PROGRAMS_SIZE // 4)
        # RMode, FZ, DN and AHP always; FZ16 where half precision arithmetic is (ID_AA64PFR0_EL1.FP).
        half = self.subject.id_register(sysreg(3, 0, 0, 4, 0)) >> 16 & 15 == 1
        self.fpcr_bits = 0x07C0_0000 | half << 19

    def close(self) -> None:
        """End the subject's VM."""
        self.subject.close()

    def row(self, row: Row, count: int, seed: int | str, *, stop_after: int = 3) -> Report:
        """``count`` cases of one row; the same seed gives the same cases."""
        rng = random.Random(f"{seed} {row.name}")
        self.reset_scratch(rng)
        words = self.table.words(row, rng)
        values = Values(rng)

        def cases() -> Iterator[Case]:
            for _, word in zip(range(count), words, strict=False):
                yield case(row, word, values, rng, self.fpcr_bits, self.peek)

        return self.run(cases(), stop_after=stop_after)

    def run(self, cases: Iterable[Case], *, stop_after: int = 3) -> Report:
        """Run cases on both sides, in batches, until there are none or ``stop_after`` mismatches."""
        report = Report()
        batch: list[Case] = []
        room = PROGRAMS_SIZE
        for one in cases:
            skip = skip_of_case(one)
            if skip is not None:
                report.skipped[skip.reason] += 1
                continue
            batch.append(one)
            room -= 4 * len(one.words) + 4
            # Branches run alone: they may land on each other.
            if is_branch(one.words[-1]) or room < 4096 or len(batch) == BATCH:
                self._batch(batch, report)
                batch, room = [], PROGRAMS_SIZE
                if len(report.mismatches) >= stop_after:
                    return report
        self._batch(batch, report)
        return report

    def reset_scratch(self, rng: random.Random) -> None:
        """New contents of SCRATCH, the same on both sides."""
        contents = rng.randbytes(SCRATCH_SIZE)
        for ram in (self.subject.ram, self.reference.ram):
            ram[SCRATCH - BASE : SCRATCH - BASE + SCRATCH_SIZE] = contents

    def peek(self, address: int, size: int) -> int:
        """What SCRATCH holds now."""
        return int.from_bytes(self.subject.ram[address - BASE : address - BASE + size], "little")

    def alone(self, words: list[int], before: Registers) -> Result:
        """What softhv makes of a program: for what Unicorn cannot judge. It starts at PROGRAMS_MIDDLE."""
        case = Case("alone", words, before, memory=True, vectors=True)
        for _, address in self._place([case]):
            result = self.subject.run(address, before, vectors=True)
        return result

    def _batch(self, cases: list[Case], report: Report) -> None:
        for one, address in self._place(cases):
            mismatch = self.compare(one, address, report)
            if mismatch is not None:
                report.mismatches.append(mismatch)

    def survivors(self, cases: list[Case]) -> list[Case]:
        """Those of up to BATCH cases that the reference runs to their end."""
        return [
            one
            for one, address in self._place(cases)
            if self.reference.run(address, one.before, one.vectors, count=len(one.words)).outcome is Outcome.DONE
        ]

    def not_undefined(self, cases: list[Case]) -> list[int]:
        """The first words of those of up to BATCH cases that are anything but UNDEFINED to softhv."""
        return [
            one.words[0]
            for one, address in self._place(cases)
            if self.subject.run(address, one.before, one.vectors).outcome is not Outcome.UNDEFINED
        ]

    def _place(self, cases: list[Case]) -> Iterator[tuple[Case, int]]:
        """Put programs into memory, yield each with its address, take them out again."""
        if not cases:
            return
        # In the middle when alone: a branch has HVC all around it.
        at = start = PROGRAMS_MIDDLE if len(cases) == 1 else PROGRAMS
        placed: list[tuple[Case, int]] = []
        image = bytearray()
        for one in cases:
            placed.append((one, at))
            image += b"".join(word.to_bytes(4, "little") for word in (*one.words, HVC))
            at += 4 * len(one.words) + 4
        low = start - BASE
        for ram in (self.subject.ram, self.reference.ram):
            ram[low : low + len(image)] = bytes(image)
        self.subject.loaded()
        self.reference.loaded()
        yield from placed
        for ram in (self.subject.ram, self.reference.ram):
            ram[low : low + len(image)] = self._fill[: len(image)]

    def compare(self, case: Case, address: int, report: Report) -> Mismatch | None:
        """Run one program that is in place already."""
        before: Registers = case.before
        length = len(case.words)
        if case.straight:
            theirs = self.reference.run(address, before, case.vectors, count=length)
        else:
            theirs = self.reference.run(address, before, case.vectors, until=address + 4 * length)
        ours = self.subject.run(address, before, case.vectors)
        report.outcomes[theirs.outcome] += 1
        if theirs.outcome is Outcome.FAULT and length == 1:
            # A fault changes no register; QEMU writes those it has loaded before it.
            theirs = Result(theirs.outcome, address, before.x, before.sp, before.nzcv, before.fpcr, before.fpsr, ours.v)
            theirs.v = before.v if case.vectors else b""
        differences = []
        if ours.outcome is not theirs.outcome:
            differences.append("outcome")
        elif ours.outcome is Outcome.DONE and ours.pc != theirs.pc:
            differences.append("pc")
        if ours.x != theirs.x:
            differences += [f"x{n}" for n in range(31) if ours.x[n] != theirs.x[n]]
        if ours.v != theirs.v:
            differences += [f"v{n}" for n in range(32) if lane(ours.v, n) != lane(theirs.v, n)]
        differences += [name for name in ("sp", "nzcv", "fpcr", "fpsr") if getattr(ours, name) != getattr(theirs, name)]
        memory = []
        if case.memory and self._libc.memcmp(*self._scratch, SCRATCH_SIZE):
            low, high = SCRATCH - BASE, SCRATCH - BASE + SCRATCH_SIZE
            mine, other = self.subject.ram[low:high], self.reference.ram[low:high]
            if theirs.outcome is not Outcome.FAULT:  # a store that faults half-way may have stored the first half
                differences.append("memory")
                memory = [(SCRATCH + n, a, b) for n, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b]
            self.subject.ram[low:high] = other
        if not differences:
            return None
        return Mismatch(case, address, ours, theirs, differences, memory)
