"""System instructions and registers, which Unicorn and softhv do not share: against the Arm ARM."""

from __future__ import annotations

import random

import pytest

from avmm.hypervisor import sysreg
from tests.oracle.compare import Comparison
from tests.oracle.machine import BASE, CODE, PROGRAMS_MIDDLE, SCRATCH, Outcome, Registers
from tests.oracle.subject import ELR, SPSR

pytestmark = pytest.mark.oracle

NOP = 0xD503_201F
PERMISSION_LEVEL_2 = 0b001110  # DFSC (D17.2.37)


def registers(**values: int) -> Registers:
    """x0.. by name, everything else zero."""
    x = [0] * 31
    for name, value in values.items():
        x[int(name[1:])] = value
    return Registers(x, sp=SCRATCH, nzcv=0)


def mrs(encoding: int, target: int) -> int:
    """The instruction that reads a system register into x``target``."""
    return 0xD520_0000 | encoding << 5 | target


def test_zeroing_clears_the_block_dczid_names(comparison: Comparison) -> None:
    read = comparison.alone([mrs(sysreg(3, 3, 0, 0, 7), 1)], registers())
    block = 4 << (read.x[1] & 15)
    assert not read.x[1] >> 4 & 1  # DZP
    at = SCRATCH + 0x1000
    low = at - BASE
    before = random.Random(1).randbytes(3 * block)
    comparison.subject.ram[low : low + 3 * block] = before
    result = comparison.alone([0xD50B_7420], registers(x0=at + block + 5))  # dc zva, x0
    assert result.outcome is Outcome.DONE
    after = comparison.subject.ram[low : low + 3 * block]
    assert after == before[:block] + bytes(block) + before[2 * block :]


def test_privileged_access_never(comparison: Comparison) -> None:
    """With PSTATE.PAN set, EL1 may touch what EL0 may only by LDTR and STTR (D8.4.1)."""
    set_pan = 0xD500_419F  # msr pan, #1
    for word in (0xF9400001, 0xF9000001, 0xC85F7C01, 0xF8210002):  # ldr, str, ldxr, ldadd on [x0]
        result = comparison.alone([set_pan, word], registers(x0=SCRATCH))
        assert result.outcome is Outcome.FAULT
        assert result.esr & 0x3F == PERMISSION_LEVEL_2
    for word in (0xF8400801, 0xF8000801):  # ldtr, sttr x1, [x0]
        assert comparison.alone([set_pan, word], registers(x0=SCRATCH)).outcome is Outcome.DONE
        result = comparison.alone([word], registers(x0=CODE + 0x1000))  # EL1's own
        assert result.outcome is Outcome.FAULT
        assert result.esr & 0x3F == PERMISSION_LEVEL_2


def test_exception_return(comparison: Comparison) -> None:
    subject = comparison.subject
    target = PROGRAMS_MIDDLE + 0x400
    subject.vcpu.set_sysreg(ELR, target)
    subject.vcpu.set_sysreg(SPSR, 0x6000_03C5)
    result = comparison.alone([0xD69F_03E0], registers())
    assert (result.outcome, result.pc, result.nzcv) == (Outcome.DONE, target, 0x6000_0000)


@pytest.mark.parametrize(("set_it", "bit"), [(0xD503_415F, 1 << 24), (0xD503_413F, 1 << 12)], ids=["dit", "ssbs"])
def test_pstate_bits_go_through_exceptions(comparison: Comparison, set_it: int, bit: int) -> None:
    """MSR DIT, #1 and MSR SSBS, #1 are kept in SPSR_EL1 by an exception and come back by ERET (D1.3.3, D1.4.3)."""
    subject = comparison.subject
    read = mrs(sysreg(3, 3, 4, 2, 5 if bit >> 24 else 6), 1)
    result = comparison.alone([set_it, 0x0000_0000], registers())  # UDF
    assert result.outcome is Outcome.UNDEFINED
    assert subject.vcpu.get_sysreg(SPSR) & bit
    for saved in (bit, 0):
        subject.vcpu.set_sysreg(ELR, PROGRAMS_MIDDLE + 4)
        subject.vcpu.set_sysreg(SPSR, 0x3C5 | saved)
        assert comparison.alone([0xD69F_03E0, read], registers(x1=7)).x[1] == saved


@pytest.mark.parametrize("spsr", [0x3C6, 0x3C8, 0x3C9, 0x3CD, 0x3D5, 0x3C1])
def test_illegal_exception_return(comparison: Comparison, spsr: int) -> None:
    """To EL2, EL3, AArch32 or M[1]: sets PSTATE.IL, and the next instruction is an Illegal Execution (D1.6)."""
    subject = comparison.subject
    target = PROGRAMS_MIDDLE + 0x400
    subject.vcpu.set_sysreg(ELR, target)
    subject.vcpu.set_sysreg(SPSR, spsr)
    result = comparison.alone([0xD69F_03E0], registers())
    assert (result.outcome, result.esr >> 26, result.pc) == (Outcome.UNDEFINED, 0x0E, target)


def test_interrupt_masks(comparison: Comparison) -> None:
    """MSR DAIFSet and DAIFClr set and clear what they name (C5.2.2)."""
    set_all, clear_all, set_6, clear_9 = 0xD503_4FDF, 0xD503_4FFF, 0xD503_46DF, 0xD503_49FF
    read = mrs(sysreg(3, 3, 4, 2, 1), 1)
    for words, masked in (
        ([set_all, read], 0x3C0),
        ([clear_all, read], 0),
        ([set_all, clear_9, read], 0x180),
        ([clear_all, set_6, read], 0x180),
    ):
        assert comparison.alone(words, registers()).x[1] == masked


def test_a_program_that_rewrites_itself(comparison: Comparison) -> None:
    """Stores to code take effect after DC CVAU, DSB, IC IVAU, DSB, ISB (B2.4.4)."""
    words = [
        0xB900_0001,  # str w1, [x0]
        0xD50B_7B20,  # dc cvau, x0
        0xD503_3B9F,  # dsb ish
        0xD50B_7520,  # ic ivau, x0
        0xD503_3B9F,  # dsb ish
        0xD503_3FDF,  # isb
        NOP,
        0xD280_0022,  # mov x2, #1: becomes mov x2, #2
    ]
    replaced = PROGRAMS_MIDDLE + 4 * (len(words) - 1)
    result = comparison.alone(words, registers(x0=replaced, x1=0xD280_0042))
    assert result.outcome is Outcome.DONE
    assert result.x[2] == 2


ID_AA64PFR0, ID_AA64PFR1, ID_AA64DFR0 = sysreg(3, 0, 0, 4, 0), sysreg(3, 0, 0, 4, 1), sysreg(3, 0, 0, 5, 0)
ID_AA64ISAR0, ID_AA64ISAR1, ID_AA64ISAR2 = sysreg(3, 0, 0, 6, 0), sysreg(3, 0, 0, 6, 1), sysreg(3, 0, 0, 6, 2)
ID_AA64MMFR1, ID_AA64MMFR2 = sysreg(3, 0, 0, 7, 1), sysreg(3, 0, 0, 7, 2)


@pytest.mark.parametrize(
    ("register", "low", "least", "word"),
    [
        (ID_AA64ISAR0, 4, 1, 0x4E28_4820),  # AES: aese v0.16b, v1.16b
        (ID_AA64ISAR0, 4, 2, 0x0EE1_E000),  # PMULL: pmull v0.1q, v0.1d, v1.1d
        (ID_AA64ISAR0, 8, 1, 0x5E28_0820),  # SHA1: sha1h s0, s1
        (ID_AA64ISAR0, 12, 1, 0x5E28_2820),  # SHA256: sha256su0 v0.4s, v1.4s
        (ID_AA64ISAR0, 12, 2, 0xCEC0_8020),  # SHA512: sha512su0 v0.2d, v1.2d
        (ID_AA64ISAR0, 16, 1, 0x1AC1_4000),  # CRC32: crc32b w0, w0, w1
        (ID_AA64ISAR0, 20, 2, 0xB820_0020),  # Atomic: ldadd w0, w0, [x1]
        (ID_AA64ISAR0, 28, 1, 0x2E81_8400),  # RDM: sqrdmlah v0.2s, v0.2s, v1.2s
        (ID_AA64ISAR0, 32, 1, 0xCE01_0C00),  # SHA3: eor3 v0.16b, v0.16b, v1.16b, v3.16b
        (ID_AA64ISAR0, 36, 1, 0xCE41_8400),  # SM3: sm3tt1a
        (ID_AA64ISAR0, 40, 1, 0xCEC0_8420),  # SM4: sm4e v0.4s, v1.4s
        (ID_AA64ISAR0, 44, 1, 0x0E81_9400),  # DP: sdot v0.2s, v0.8b, v1.8b
        (ID_AA64ISAR0, 48, 1, 0x0E21_EC00),  # FHM: fmlal v0.2s, v0.2h, v1.2h
        (ID_AA64ISAR0, 52, 1, 0xD500_401F),  # TS: cfinv
        (ID_AA64ISAR0, 52, 1, 0xBA01_0400),  # TS: rmif x0, #2, #0
        (ID_AA64ISAR0, 52, 1, 0x3A00_080D),  # TS: setf8 w0
        (ID_AA64ISAR0, 52, 1, 0x3A00_480D),  # TS: setf16 w0
        (ID_AA64ISAR0, 52, 2, 0xD500_405F),  # TS: axflag
        (ID_AA64ISAR0, 56, 1, 0xD508_811F),  # TLB: tlbi vmalle1os
        (ID_AA64ISAR0, 56, 2, 0xD508_8621),  # TLB: tlbi rvae1, x1
        (ID_AA64ISAR0, 60, 1, 0xD53B_2401),  # RNDR: mrs x1, rndr
        (ID_AA64ISAR1, 0, 1, 0xD50B_7C21),  # DPB: dc cvap, x1
        (ID_AA64ISAR1, 0, 2, 0xD50B_7D21),  # DPB: dc cvadp, x1
        (ID_AA64ISAR1, 24, 1, 0x9AC1_3000),  # GPA: pacga x0, x0, x1
        (ID_AA64ISAR1, 40, 1, 0xD50B_7381),  # SPECRES: cfp rctx, x1
        (ID_AA64ISAR1, 60, 1, 0xF83F_D020),  # LS64: ld64b x0, [x1]
        (ID_AA64ISAR2, 0, 2, 0xD503_1001),  # WFxT: wfet x1
        (ID_AA64ISAR2, 16, 1, 0x1901_0440),  # MOPS: cpyfp [x0]!, [x1]!, x2!
        (ID_AA64ISAR2, 20, 1, 0x5400_0030),  # BC: bc.eq
        (ID_AA64ISAR2, 52, 1, 0xDAC0_2020),  # CSSC: abs x0, x1
        (ID_AA64ISAR1, 4, 1, 0xDAC1_0820),  # APA: pacda x0, x1
        (ID_AA64ISAR1, 12, 1, 0x1E7E_0000),  # JSCVT: fjcvtzs w0, d0
        (ID_AA64ISAR1, 16, 1, 0x2E81_E400),  # FCMA: fcadd v0.2s, v0.2s, v1.2s, #90
        (ID_AA64ISAR1, 20, 1, 0xB8BF_C020),  # LRCPC: ldapr w0, [x1]
        (ID_AA64ISAR1, 20, 2, 0x9940_0020),  # LRCPC: ldapur w0, [x1]
        (ID_AA64ISAR1, 32, 1, 0x1E28_4020),  # FRINTTS: frint32z s0, s1
        (ID_AA64ISAR1, 36, 1, 0xD503_30FF),  # SB: sb
        (ID_AA64ISAR1, 44, 1, 0x6E41_EC00),  # BF16: bfmmla v0.4s, v0.8h, v1.8h
        (ID_AA64ISAR1, 52, 1, 0x4E81_A400),  # I8MM: smmla v0.4s, v0.16b, v1.16b
        (ID_AA64PFR0, 16, 1, 0x1EE1_2800),  # FP: fadd h0, h0, h1
        (ID_AA64PFR0, 20, 1, 0x0E41_1400),  # AdvSIMD: fadd v0.4h, v0.4h, v1.4h
        (ID_AA64PFR0, 24, 1, 0xD538_CCA1),  # GIC: mrs x1, icc_sre_el1
        (ID_AA64PFR0, 28, 1, 0xD538_5301),  # RAS: mrs x1, erridr_el1
        (ID_AA64PFR0, 32, 1, 0x0420_0000),  # SVE: add z0.b, z0.b, z0.b
        (ID_AA64PFR0, 40, 1, 0xD538_A501),  # MPAM: mrs x1, mpam1_el1
        (ID_AA64PFR0, 44, 1, 0xD53B_D201),  # AMU: mrs x1, amcr_el0
        (ID_AA64PFR0, 48, 1, 0xD53B_42A1),  # DIT: mrs x1, dit
        (ID_AA64PFR0, 48, 1, 0xD503_405F),  # DIT: msr dit, #0
        (ID_AA64PFR0, 56, 2, 0xD53B_D0E1),  # CSV2: mrs x1, scxtnum_el0
        (ID_AA64PFR0, 56, 2, 0xD538_D0E1),  # CSV2: mrs x1, scxtnum_el1
        (ID_AA64PFR1, 4, 2, 0xD53B_42C1),  # SSBS: mrs x1, ssbs
        (ID_AA64PFR1, 4, 2, 0xD503_403F),  # SSBS: msr ssbs, #0
        (ID_AA64PFR1, 24, 1, 0xD53B_4241),  # SME: mrs x1, svcr
        (ID_AA64DFR0, 0, 6, 0xD530_0241),  # DebugVer: mrs x1, mdscr_el1
        (ID_AA64DFR0, 8, 1, 0xD53B_9C01),  # PMUVer: mrs x1, pmcr_el0
        (ID_AA64DFR0, 12, 1, 0xD530_0081),  # BRPs: mrs x1, dbgbvr0_el1
        (ID_AA64DFR0, 20, 1, 0xD530_00C1),  # WRPs: mrs x1, dbgwvr0_el1
        (ID_AA64DFR0, 32, 1, 0xD538_9901),  # PMSVer: mrs x1, pmscr_el1
        (ID_AA64DFR0, 40, 1, 0xD538_1221),  # TraceFilt: mrs x1, trfcr_el1
        (ID_AA64PFR1, 8, 1, 0x9AC1_1000),  # MTE: irg x0, x0, x1
        (ID_AA64MMFR1, 16, 1, 0xD538_A401),  # LO: mrs x1, lorsa_el1
        (ID_AA64MMFR1, 20, 1, 0xD500_409F),  # PAN: msr pan, #0
        (ID_AA64MMFR1, 20, 2, 0xD508_7901),  # PAN: at s1e1rp, x1
        (ID_AA64MMFR2, 4, 1, 0xD500_407F),  # UAO: msr uao, #0
    ],
)
def test_id_registers_say_what_is_there(comparison: Comparison, register: int, low: int, least: int, word: int) -> None:
    """A feature is advertised exactly when its instruction is there; 15 (FP, AdvSIMD) stands for less than nothing."""
    field = comparison.subject.id_register(register) >> low & 15
    advertised = least <= field < 15
    result = comparison.alone([word], registers(x0=1, x1=SCRATCH))
    assert (result.outcome is not Outcome.UNDEFINED) == advertised


@pytest.mark.parametrize(
    ("write", "read", "modelled"),
    [
        (0xD51B_4400, 0xD53B_4401, 0x07C0_0000),  # FPCR: AHP, DN, FZ, RMode; FZ16 is RES0 without FEAT_FP16 (C5.2.8)
        (0xD51B_4420, 0xD53B_4421, 0x0800_009F),  # FPSR: QC and the cumulative flags (C5.2.10)
        (0xD51B_4200, 0xD53B_4201, 0xF000_0000),  # NZCV
        (0xD51B_42A0, 0xD53B_42A1, 0x0100_0000),  # DIT
        (0xD51B_42C0, 0xD53B_42C1, 0x0000_1000),  # SSBS
    ],
)
def test_what_of_a_register_is_modelled(comparison: Comparison, write: int, read: int, modelled: int) -> None:
    """All ones written come back where there is something, and zeros clear it."""
    for value, wanted in (((1 << 64) - 1, modelled), (0, 0)):
        result = comparison.alone([write, read], registers(x0=value))
        assert (result.outcome, result.x[1]) == (Outcome.DONE, wanted)


def test_debug_registers_are_there_and_do_nothing(comparison: Comparison) -> None:
    """Linux finds and clears as many as DFR0 says; none of them ever matches."""
    dfr0 = comparison.subject.id_register(ID_AA64DFR0)
    for op2, field in ((4, 12), (5, 12), (6, 20), (7, 20)):
        for index in range((dfr0 >> field & 15) + 1):
            write = 0xD510_0000 | index << 8 | op2 << 5
            result = comparison.alone([write, NOP, NOP], registers(x0=PROGRAMS_MIDDLE + 8 if op2 == 4 else 0x1E7))
            assert result.outcome is Outcome.DONE
            assert comparison.alone([write], registers()).outcome is Outcome.DONE


def test_unallocated_id_registers_read_as_zero(comparison: Comparison) -> None:
    """op0 3, op1 0, CRn 0, CRm 2..7 is reserved, RAZ (D17.1.1): kernels newer than we are read them."""
    for crm in range(2, 8):
        for op2 in range(8):
            assert comparison.alone([mrs(sysreg(3, 0, 0, crm, op2), 1)], registers(x1=1)).outcome is Outcome.DONE
    assert comparison.alone([mrs(sysreg(3, 0, 0, 7, 7), 1)], registers(x1=1)).x[1] == 0


@pytest.mark.parametrize("encoding", [sysreg(3, 7, 15, 15, 7), sysreg(3, 4, 1, 1, 0), sysreg(3, 6, 1, 1, 0)])
def test_registers_that_are_not_there_are_undefined(comparison: Comparison, encoding: int) -> None:
    """Implementation defined, HCR_EL2 and SCR_EL3."""
    assert comparison.alone([mrs(encoding, 1)], registers()).outcome is Outcome.UNDEFINED
