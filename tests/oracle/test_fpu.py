"""softhv's floating point against Unicorn: every operation, every FPCR mode, random and ugly operands.

Each operation runs in a loop inside Unicorn (one entry for thousands of cases) and over the same operands in
`fpu_shim.c`; results and cumulative flags are compared bit by bit.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

unicorn = pytest.importorskip("unicorn")
from unicorn import arm64_const as reg  # noqa: E402  (only once unicorn is known to be there)

ASSEMBLER, OBJCOPY = "aarch64-linux-gnu-as", "aarch64-linux-gnu-objcopy"
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(not shutil.which(ASSEMBLER), reason="needs binutils-aarch64-linux-gnu"),
]

SOURCES = Path(__file__).parents[2] / "avmm" / "hypervisor" / "softhv"
COUNT = int(os.environ.get("AVMM_FPU_CASES", "150"))  # per operation and mode
SEED = int(os.environ.get("AVMM_FPU_SEED", "1"))
FPCR_FZ, FPCR_DN, FPCR_AHP, FPSR_IXC = 1 << 24, 1 << 25, 1 << 26, 1 << 4
ROUNDING = {"n": 0, "p": 1, "m": 2, "z": 3, "a": 4}

CODE, DATA = 0x10000, 0x100000


@dataclass(frozen=True)
class Case:
    """`text` leaves its result in d0; the operands are d0, d1, d2, and x9 holds the first one too."""

    name: str
    text: str
    operation: str
    operand: str  # which generator: s, d, h, x (integers)
    b: int = -1
    c: int = -1
    half: bool = False  # the alternative half-precision format matters
    per_mode_rounding: bool = False  # the shim wants FPCR's rounding mode as a parameter


def cases() -> Iterator[Case]:
    for t, n in (("s", "32"), ("d", "64")):
        two = f"{t}0, {t}0, {t}1"
        for op in ("add", "sub", "mul", "div", "mulx", "max", "min", "maxnm", "minnm", "recps", "rsqrts"):
            mnemonic = {"recps": "frecps", "rsqrts": "frsqrts"}.get(op, "f" + op)
            yield Case(f"{mnemonic}_{t}", f"{mnemonic} {two}", op + n, t)
        yield Case(f"fmadd_{t}", f"fmadd {two}, {t}2", "muladd" + n, t)
        for op in ("cmp", "cmpe"):
            yield Case(f"f{op}_{t}", f"f{op} {t}0, {t}1\n mrs x9, nzcv\n fmov d0, x9", op + n, t)
        for op, mnemonic in (("sqrt", "fsqrt"), ("recpe", "frecpe"), ("rsqrte", "frsqrte"), ("recpx", "frecpx")):
            yield Case(f"{mnemonic}_{t}", f"{mnemonic} {t}0, {t}0", op + n, t)
        for letter, mode in ROUNDING.items():
            yield Case(f"frint{letter}_{t}", f"frint{letter} {t}0, {t}0", "rint" + n, t, b=mode)
        yield Case(f"frintx_{t}", f"frintx {t}0, {t}0", "rint" + n, t, b=8, per_mode_rounding=True)
        yield Case(f"frinti_{t}", f"frinti {t}0, {t}0", "rint" + n, t, b=0, per_mode_rounding=True)
        for sign, signed in (("s", 8), ("u", 0)):
            for w, wide in (("w", 0), ("x", 16)):
                after = "\n fmov d0, x9"
                for letter, mode in ROUNDING.items():
                    text = f"fcvt{letter}{sign} {w}9, {t}0" + after
                    yield Case(f"fcvt{letter}{sign}_{w}{t}", text, "toint" + n, t, b=0, c=mode | signed | wide)
                yield Case(f"{sign}cvtf_{w}{t}", f"{sign}cvtf {t}0, {w}9", "fromint" + n, "x", b=0, c=signed | wide)
                for fbits in (1, 7, 31, 32) + ((33, 63, 64) if wide else ()):
                    text = f"fcvtz{sign} {w}9, {t}0, #{fbits}" + after
                    yield Case(f"fcvtz{sign}_{w}{t}_{fbits}", text, "toint" + n, t, b=fbits, c=3 | signed | wide)
                    text = f"{sign}cvtf {t}0, {w}9, #{fbits}"
                    yield Case(f"{sign}cvtf_{w}{t}_{fbits}", text, "fromint" + n, "x", b=fbits, c=signed | wide)
        yield Case(f"fcvt_{t}h", f"fcvt {t}0, h0", "half_to_" + n, "h", half=True)
        yield Case(f"fcvt_h{t}", f"fcvt h0, {t}0", "half_from_" + n, t, half=True)
    yield Case("fcvt_ds", "fcvt d0, s0", "widen", "s")
    yield Case("fcvt_sd", "fcvt s0, d0", "narrow", "d")
    yield Case("fcvtxn", "fcvtxn s0, d0", "narrow_odd", "d")
    yield Case("urecpe", "urecpe v0.2s, v0.2s\n fmov w9, s0\n fmov s0, w9", "urecpe", "x")
    yield Case("ursqrte", "ursqrte v0.2s, v0.2s\n fmov w9, s0\n fmov s0, w9", "ursqrte", "x")


CASES = list(cases())


def floats(rng: random.Random, exponent_bits: int, fraction_bits: int) -> Callable[[], int]:
    """A generator of bit patterns: specials, denormals, powers of two and their neighbours, small integers, noise."""
    top = (1 << exponent_bits) - 1
    bias = top >> 1
    one = 1 << fraction_bits

    def pick() -> int:
        kind = rng.randrange(10)
        sign = rng.randrange(2) << (exponent_bits + fraction_bits)
        fraction = rng.randrange(one)
        half = one >> 1
        sparse = rng.choice((0, 1, half, one - 1, half - 1, half + 1, 1 << rng.randrange(fraction_bits)))
        if kind == 0:
            return sign | rng.choice((0, top)) << fraction_bits | sparse  # zero, denormals, infinity, NaNs
        if kind == 1:
            return sign | fraction >> rng.randrange(fraction_bits)  # denormals
        if kind == 2:
            exponent = rng.choice((0, 1, 2, bias - 1, bias, bias + 1, top - 2, top - 1, top))
            return sign | exponent << fraction_bits | sparse
        if kind in (3, 4):  # near one, so that sums, differences and products interact
            return sign | (bias + rng.randrange(-4, 5)) << fraction_bits | rng.choice((sparse, fraction))
        if kind == 5:  # around the ends of the integer ranges
            return sign | min(top, bias + rng.randrange(-2, 70)) << fraction_bits | rng.choice((sparse, fraction))
        if kind == 6:  # results near the ends of the exponent range
            exponent = rng.choice((bias // 2, bias + bias // 2)) + rng.randrange(-4, 5)
            return sign | exponent << fraction_bits | rng.choice((sparse, fraction))
        if kind == 7:  # half-precision's range, seen from any format
            return sign | max(0, bias + rng.randrange(-28, 18)) << fraction_bits | rng.choice((sparse, fraction))
        return sign | rng.randrange(top + 1) << fraction_bits | fraction

    return pick


def integers(rng: random.Random) -> Callable[[], int]:
    def pick() -> int:
        value = rng.getrandbits(64) >> rng.randrange(64)
        value = rng.choice((value, (1 << rng.randrange(64)) + rng.randrange(-2, 3), value & ~0 << rng.randrange(64)))
        return rng.choice((value, -value)) & (1 << 64) - 1

    return pick


def operands(kind: str, count: int, rng: random.Random) -> bytes:
    if kind == "x":
        pick = integers(rng)
    else:
        pick = floats(rng, *{"h": (5, 10), "s": (8, 23), "d": (11, 52)}[kind])
    pool = [pick() for _ in range(count)]
    triples = []
    for a in pool:
        b, c = rng.choice(pool), rng.choice(pool)
        if rng.randrange(8) == 0:  # equal or neighbouring operands: cancellation, exact results
            b = max(0, a + rng.randrange(-1, 2)) & (1 << 64) - 1
        triples.append(struct.pack("<4Q", a, b, c, 0))
    return b"".join(triples)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("fpu") / "fpu_shim.so"
    here = Path(__file__).parent
    sources = [here / "fpu_shim.c", SOURCES / "fpu.c"]
    subprocess.run(
        ["cc", "-std=c11", "-O2", "-shared", "-fPIC", f"-I{SOURCES}", *sources, "-lm", "-o", library], check=True
    )
    return ctypes.CDLL(str(library))


LOOP = """.balign 256
    msr fpcr, x3
1:  ldp d0, d1, [x0]
    ldp d2, d3, [x0, #16]
    ldr x9, [x0], #32
    msr fpsr, x4
    {}
    mrs x5, fpsr
    str d0, [x1], #8
    str x5, [x1], #8
    subs x2, x2, #1
    b.ne 1b
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every case's loop, assembled at once, each padded to 256 bytes."""
    folder = tmp_path_factory.mktemp("asm")
    source = [LOOP.format(case.text) for case in CASES]
    (folder / "a.s").write_text("\n".join(source) + "\n.balign 256\n")
    subprocess.run([ASSEMBLER, "-march=armv8.2-a", "-o", folder / "a.o", folder / "a.s"], check=True)
    subprocess.run([OBJCOPY, "-O", "binary", folder / "a.o", folder / "a.bin"], check=True)
    image = (folder / "a.bin").read_bytes()
    return {case.name: image[i * 256 : i * 256 + 256] for i, case in enumerate(CASES)}


def oracle(code: bytes, fpcr: int, fpsr: int, data: bytes) -> bytes:
    count = len(data) // 32
    uc = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
    uc.mem_map(CODE, 0x1000)
    size = (count * 48 + 0xFFF) & ~0xFFF
    uc.mem_map(DATA, size)
    uc.mem_write(CODE, code)
    uc.mem_write(DATA, data)
    out = DATA + len(data)
    for register, value in (
        (reg.UC_ARM64_REG_X0, DATA),
        (reg.UC_ARM64_REG_X1, out),
        (reg.UC_ARM64_REG_X2, count),
        (reg.UC_ARM64_REG_X3, fpcr),
        (reg.UC_ARM64_REG_X4, fpsr),
        (reg.UC_ARM64_REG_CPACR_EL1, 3 << 20),
    ):
        uc.reg_write(register, value)
    uc.emu_start(CODE, CODE + loop_end(code))
    return bytes(uc.mem_read(out, count * 16))


def loop_end(code: bytes) -> int:
    """The offset just after the loop's B.NE."""
    for offset in range(0, len(code), 4):
        if (int.from_bytes(code[offset : offset + 4], "little") & 0xFF80001F) == 0x54800001:
            return offset + 4
    raise AssertionError("no backward B.NE")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_unicorn(case: Case, shim: ctypes.CDLL, programs: dict[str, bytes]) -> None:
    rng = random.Random(f"{SEED} {case.name}")
    for mode in range(64 if case.half else 32):
        rounding = mode & 3
        fpcr = rounding << 22 | (mode & 4 and FPCR_FZ) | (mode & 8 and FPCR_DN) | (mode & 32 and FPCR_AHP)
        fpsr = mode & 16 and FPSR_IXC
        data = operands(case.operand, COUNT, rng)
        expected = oracle(programs[case.name], fpcr, fpsr, data)
        actual = ctypes.create_string_buffer(len(expected))
        b = case.b | rounding if case.per_mode_rounding else case.b
        assert shim.fpu_run(case.operation.encode(), fpcr, fpsr, ctypes.c_size_t(COUNT), data, b, case.c, actual) & 1
        if actual.raw != expected:
            wrong = [i for i in range(COUNT) if actual.raw[i * 16 : i * 16 + 16] != expected[i * 16 : i * 16 + 16]]
            first = wrong[0]
            a, b, c, _ = struct.unpack_from("<4Q", data, first * 32)
            result, flags = struct.unpack_from("<2Q", actual.raw, first * 16)
            right, right_flags = struct.unpack_from("<2Q", expected, first * 16)
            pytest.fail(
                f"{len(wrong)}/{COUNT} fpcr={fpcr:#x} fpsr={fpsr:#x} a={a:#x} b={b:#x} c={c:#x}: "
                f"{result:#x}/{flags:#x}, Unicorn {right:#x}/{right_flags:#x}"
            )
