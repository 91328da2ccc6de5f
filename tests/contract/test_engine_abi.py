"""The manners of the ``hv_*`` ABI, on every engine this machine has: what the vCPU loop relies on.

Guests here are a few instructions at EL1 with the MMU off.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest

from avmm.errors import EngineError
from avmm.hypervisor import ExitKind, Finish, Hypervisor, Reg, Vcpu, available_engines, open_hypervisor, sysreg
from avmm.memory import GRANULE, Region

RAM = 0x4000_0000
DATA = RAM + 0x8000
VECTORS = RAM + 0x4000
MMIO = 0x0900_0000
RAM_SIZE = 4 * GRANULE
TIMEOUT = 60  # of a wait that is over at once when nothing is broken

HV_BUSY, HV_BAD_ARGUMENT = 0xFAE94002, 0xFAE94003

NOP, WFI, WFE = 0xD503201F, 0xD503207F, 0xD503205F
HVC, HVC_1, SMC = 0xD4000002, 0xD4000022, 0xD4000003
SPIN, UDF = 0x14000000, 0
LDR_X1_X0, STR_X1_X0, STR_XZR_X0 = 0xF9400001, 0xF9000001, 0xF900001F
LDP_X1_X2_X0 = 0xA9400801
MRS_X0_CNTVCT, MRS_X3_ICC_IAR1, MSR_ICC_EOIR1_X4 = 0xD53BE040, 0xD538CC03, 0xD518CC24
MSR_DAIFCLR_IRQ = 0xD50342FF
ADD_X2_X2_1 = 0x91000442

VBAR_EL1, ESR_EL1, ELR_EL1 = sysreg(3, 0, 12, 0, 0), sysreg(3, 0, 5, 2, 0), sysreg(3, 0, 4, 0, 1)
CNTV_CTL_EL0, CNTV_CVAL_EL0 = sysreg(3, 3, 14, 3, 1), sysreg(3, 3, 14, 3, 2)
TPIDR_EL0, TPIDR_EL1, SP_EL1 = sysreg(3, 3, 13, 0, 2), sysreg(3, 0, 13, 0, 4), sysreg(3, 4, 4, 1, 0)
EL1H_MASKED = 0x3C5


class Guest:
    """A VM with 64 KiB of RAM, and one vCPU on the calling thread that is about to run ``words``."""

    def __init__(self, hypervisor: Hypervisor, *words: int) -> None:
        self.hypervisor = hypervisor
        self.region = Region(RAM, mmap.mmap(-1, RAM_SIZE))
        for offset in range(0, 0x800, 0x80):
            self.poke(VECTORS + offset, HVC_1)
        self.poke(RAM, *words)
        hypervisor.map(self.region)
        self.vcpu: Vcpu = self.start()

    def start(self, pc: int = RAM) -> Vcpu:
        """A vCPU of the calling thread at ``pc``, interrupts masked."""
        vcpu = self.hypervisor.create_vcpu()
        vcpu.set_reg(Reg.PC, pc)
        vcpu.set_reg(Reg.CPSR, EL1H_MASKED)
        vcpu.set_sysreg(VBAR_EL1, VECTORS)
        return vcpu

    def poke(self, gpa: int, *words: int) -> None:
        """Store instructions or data."""
        at = gpa - RAM
        self.region.buffer[at : at + 4 * len(words)] = b"".join(word.to_bytes(4, "little") for word in words)

    def peek(self, gpa: int) -> int:
        """Load eight bytes."""
        return int.from_bytes(self.region.buffer[gpa - RAM : gpa - RAM + 8], "little")

    def run(self, pc: int, registers: dict[int, int]) -> None:
        """From ``pc`` to the next HVC."""
        for register, value in (*registers.items(), (Reg.PC, pc), (Reg.CPSR, EL1H_MASKED)):
            self.vcpu.set_reg(register, value)
        assert self.vcpu.run() == ExitKind.HVC

    def close(self) -> None:
        """vCPU, VM and RAM, in this order."""
        self.vcpu.close()
        self.hypervisor.close()
        self.region.buffer.close()


@pytest.fixture(params=available_engines())
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def boot(engine: str) -> Iterator[Callable[..., Guest]]:
    guests: list[Guest] = []

    def start(*words: int) -> Guest:
        guests.append(Guest(open_hypervisor(engine), *words))
        return guests[-1]

    yield start
    for guest in guests:
        guest.close()


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    """One more thread that can own a vCPU."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


def resume(vcpu: Vcpu, finish: Finish = Finish.ADVANCE, result: int = 0) -> int:
    vcpu.frame.finish = finish
    vcpu.frame.result = result
    return vcpu.run()


# ---- Exits -----------------------------------------------------------------------------------------------------------


def test_hvc_leaves_pc_behind_it_and_brings_its_arguments(boot: Callable[..., Guest]) -> None:
    vcpu = boot(HVC, HVC).vcpu
    for index in range(8):
        vcpu.set_reg(index, 0x8400_0000 + index)
    assert vcpu.run() == ExitKind.HVC
    assert list(vcpu.frame.args) == [0x8400_0000 + index for index in range(8)]
    assert vcpu.frame.pc == vcpu.get_reg(Reg.PC) == RAM + 4
    vcpu.set_reg(0, 7)
    assert resume(vcpu, Finish.NONE) == ExitKind.HVC
    assert vcpu.frame.args[0] == 7
    assert vcpu.get_reg(Reg.PC) == RAM + 8


@pytest.mark.parametrize(("word", "kind"), [(SMC, ExitKind.SMC), (WFI, ExitKind.WFI), (WFE, ExitKind.WFE)])
def test_exit_with_pc_at_the_instruction(boot: Callable[..., Guest], word: int, kind: ExitKind) -> None:
    vcpu = boot(word, HVC).vcpu
    assert vcpu.run() == kind
    assert vcpu.frame.pc == vcpu.get_reg(Reg.PC) == RAM
    assert resume(vcpu) == ExitKind.HVC
    assert vcpu.get_reg(Reg.PC) == RAM + 8


def test_wfi_brings_the_timer(boot: Callable[..., Guest]) -> None:
    vcpu = boot(WFI, HVC).vcpu
    vcpu.set_sysreg(CNTV_CVAL_EL0, (1 << 64) - 1)
    vcpu.set_sysreg(CNTV_CTL_EL0, 1)
    assert vcpu.run() == ExitKind.WFI
    assert vcpu.frame.vtimer_ctl & 7 == 1
    assert vcpu.frame.vtimer_cval == (1 << 64) - 1


@pytest.mark.parametrize(
    ("word", "size", "delivered", "seen"),
    [
        (0x39400001, 1, 0xFF, 0xFF),  # ldrb w1, [x0]
        (0x39800001, 1, 0x80, 0xFFFF_FFFF_FFFF_FF80),  # ldrsb x1, [x0]
        (0x39C00001, 1, 0x80, 0xFFFF_FF80),  # ldrsb w1, [x0]
        (0x79400001, 2, 0xFFFF, 0xFFFF),  # ldrh w1, [x0]
        (0x79800001, 2, 0x8000, 0xFFFF_FFFF_FFFF_8000),  # ldrsh x1, [x0]
        (0xB9400001, 4, 0xFFFF_FFFF, 0xFFFF_FFFF),  # ldr w1, [x0]
        (0xB9800001, 4, 0x8000_0000, 0xFFFF_FFFF_8000_0000),  # ldrsw x1, [x0]
        (LDR_X1_X0, 8, 0x8000_0000_0000_0001, 0x8000_0000_0000_0001),
    ],
)
def test_mmio_read(boot: Callable[..., Guest], word: int, size: int, delivered: int, seen: int) -> None:
    vcpu = boot(word, HVC).vcpu
    vcpu.set_reg(0, MMIO + 0x18)
    vcpu.set_reg(1, 0x5555_5555_5555_5555)
    assert vcpu.run() == ExitKind.MMIO_READ
    assert (vcpu.frame.address, vcpu.frame.size, vcpu.frame.reg) == (MMIO + 0x18, size, 1)
    assert vcpu.get_reg(Reg.PC) == RAM
    assert resume(vcpu, Finish.RESULT, delivered) == ExitKind.HVC
    assert vcpu.get_reg(1) == seen


@pytest.mark.parametrize(
    ("word", "size", "value"),
    [
        (0x39000001, 1, 0xF0),  # strb w1, [x0]
        (0x79000001, 2, 0xDEF0),  # strh w1, [x0]
        (0xB9000001, 4, 0x9ABC_DEF0),  # str w1, [x0]
        (STR_X1_X0, 8, 0x1234_5678_9ABC_DEF0),
        (STR_XZR_X0, 8, 0),
    ],
)
def test_mmio_write(boot: Callable[..., Guest], word: int, size: int, value: int) -> None:
    vcpu = boot(word, HVC).vcpu
    vcpu.set_reg(0, MMIO)
    vcpu.set_reg(1, 0x1234_5678_9ABC_DEF0)
    assert vcpu.run() == ExitKind.MMIO_WRITE
    assert (vcpu.frame.address, vcpu.frame.size, vcpu.frame.value) == (MMIO, size, value)
    assert resume(vcpu) == ExitKind.HVC
    assert vcpu.get_reg(Reg.PC) == RAM + 8


def test_mmio_read_into_xzr_is_dropped(boot: Callable[..., Guest]) -> None:
    vcpu = boot(0xF940001F, HVC).vcpu  # ldr xzr, [x0]
    vcpu.set_reg(0, MMIO)
    vcpu.set_sysreg(SP_EL1, 0x1000)
    assert vcpu.run() == ExitKind.MMIO_READ
    assert vcpu.frame.reg == 31
    assert resume(vcpu, Finish.RESULT, 5) == ExitKind.HVC
    assert vcpu.get_sysreg(SP_EL1) == 0x1000


def test_pair_to_mmio_has_no_decoded_access(boot: Callable[..., Guest]) -> None:
    vcpu = boot(LDP_X1_X2_X0, HVC).vcpu
    vcpu.set_reg(0, MMIO)
    assert vcpu.run() == ExitKind.ABORT
    assert vcpu.frame.syndrome >> 26 == 0x24
    assert not vcpu.frame.syndrome >> 24 & 1  # ISS.ISV
    assert vcpu.get_reg(Reg.PC) == RAM
    assert resume(vcpu) == ExitKind.HVC


def test_interrupt_controller_registers_exit(boot: Callable[..., Guest]) -> None:
    vcpu = boot(MRS_X3_ICC_IAR1, MSR_ICC_EOIR1_X4, HVC).vcpu
    vcpu.set_reg(4, 27)
    assert vcpu.run() == ExitKind.SYSREG_READ
    assert (vcpu.frame.address, vcpu.frame.reg) == (sysreg(3, 0, 12, 12, 0), 3)
    assert resume(vcpu, Finish.RESULT, 1023) == ExitKind.SYSREG_WRITE
    assert (vcpu.frame.address, vcpu.frame.value) == (sysreg(3, 0, 12, 12, 1), 27)
    assert resume(vcpu) == ExitKind.HVC
    assert vcpu.get_reg(3) == 1023


def test_fetch_from_nowhere_is_an_abort(boot: Callable[..., Guest]) -> None:
    vcpu = boot(0xD61F0000).vcpu  # br x0
    vcpu.set_reg(0, MMIO)
    assert vcpu.run() == ExitKind.ABORT
    assert vcpu.frame.syndrome >> 26 == 0x20
    assert vcpu.frame.pc == MMIO


def test_undefined_instruction_is_the_guest_s_own_business(boot: Callable[..., Guest]) -> None:
    vcpu = boot(UDF).vcpu
    assert vcpu.run() == ExitKind.HVC
    assert vcpu.get_reg(Reg.PC) == VECTORS + 0x200 + 4  # synchronous, from EL1 with SP_EL1
    assert vcpu.get_sysreg(ELR_EL1) == RAM
    assert vcpu.get_sysreg(ESR_EL1) == 1 << 25  # EC 0, IL


# ---- Interrupt lines -------------------------------------------------------------------------------------------------


def pending(vcpu: Vcpu) -> bool:
    native = cast(Any, vcpu)
    line = native._ffi.new("bool *")
    assert native._lib.hv_vcpu_get_pending_interrupt(native._handle, 0, line) == 0
    return bool(line[0])


def test_lines_are_cleared_when_run_returns(boot: Callable[..., Guest]) -> None:
    vcpu = boot(HVC, HVC, HVC).vcpu
    native = cast(Any, vcpu)
    assert native._lib.hv_vcpu_set_pending_interrupt(native._handle, 0, True) == 0
    assert pending(vcpu)
    assert native._lib.hv_vcpu_run(native._handle) == 0
    assert not pending(vcpu)


def test_irq_is_taken_when_unmasked(boot: Callable[..., Guest]) -> None:
    vcpu = boot(NOP, MSR_DAIFCLR_IRQ, SPIN).vcpu
    vcpu.frame.irq = 1
    assert vcpu.run() == ExitKind.HVC
    assert vcpu.get_reg(Reg.PC) == VECTORS + 0x280 + 4
    assert vcpu.get_sysreg(ELR_EL1) == RAM + 8


def test_masked_irq_waits(boot: Callable[..., Guest]) -> None:
    vcpu = boot(NOP, HVC).vcpu
    vcpu.frame.irq = 1
    assert vcpu.run() == ExitKind.HVC
    assert vcpu.get_reg(Reg.PC) == RAM + 8


def test_line_of_the_frame_is_a_level(boot: Callable[..., Guest]) -> None:
    vcpu = boot(HVC, MSR_DAIFCLR_IRQ, SPIN).vcpu
    vcpu.frame.irq = 1
    assert vcpu.run() == ExitKind.HVC
    assert resume(vcpu, Finish.NONE) == ExitKind.HVC
    assert vcpu.get_reg(Reg.PC) == VECTORS + 0x280 + 4


def test_eret_into_unmasked_takes_the_interrupt_before_anything_else(boot: Callable[..., Guest]) -> None:
    guest = boot(0xD69F03E0)  # eret
    guest.poke(RAM + 0x100, ADD_X2_X2_1, SPIN)
    vcpu = guest.vcpu
    vcpu.set_sysreg(ELR_EL1, RAM + 0x100)
    vcpu.set_sysreg(sysreg(3, 0, 4, 0, 0), 0x345)  # SPSR_EL1: EL1h, all but I masked
    vcpu.set_reg(2, 0)
    vcpu.frame.irq = 1
    assert vcpu.run() == ExitKind.HVC
    assert vcpu.get_sysreg(ELR_EL1) == RAM + 0x100
    assert vcpu.get_reg(2) == 0


# ---- Kicks -----------------------------------------------------------------------------------------------------------


def test_kick_before_run_sticks(boot: Callable[..., Guest]) -> None:
    vcpu = boot(HVC).vcpu
    vcpu.kick()
    vcpu.kick()
    assert vcpu.run() == ExitKind.CANCELED
    assert vcpu.get_reg(Reg.PC) == RAM
    assert vcpu.run() == ExitKind.HVC


def test_kick_ends_an_endless_loop(boot: Callable[..., Guest], thread: ThreadPoolExecutor) -> None:
    guest = boot(0xF9000402, ADD_X2_X2_1, 0x17FFFFFE)  # 0: str x2, [x0, #8]; add x2, x2, #1; b 0b
    vcpu = guest.vcpu
    vcpu.set_reg(0, DATA)
    vcpu.set_reg(2, 0)

    def kick_once_it_runs() -> None:
        while guest.peek(DATA + 8) < 1000:
            pass
        vcpu.kick()

    kicker = thread.submit(kick_once_it_runs)
    assert vcpu.run() == ExitKind.CANCELED
    kicker.result(TIMEOUT)
    at = guest.peek(DATA + 8)
    assert at >= 1000
    assert vcpu.get_reg(2) - at in (0, 1)  # precise: between two instructions


def test_state_survives_many_kicks(boot: Callable[..., Guest], thread: ThreadPoolExecutor) -> None:
    # 0: ldr x1, [x0]; add x1, x1, #1; str x1, [x0]; sub x2, x2, #1; cbnz x2, 0b; hvc #0
    guest = boot(0xF9400001, 0x91000421, 0xF9000001, 0xD1000442, 0xB5FFFF82, HVC)
    vcpu = guest.vcpu
    rounds = 3_000_000
    vcpu.set_reg(0, DATA)
    vcpu.set_reg(2, rounds)
    done = threading.Event()

    def keep_kicking() -> None:
        while not done.is_set():
            vcpu.kick()

    kicker = thread.submit(keep_kicking)
    canceled = 0
    while (kind := vcpu.run()) == ExitKind.CANCELED:
        canceled += 1
        done.wait(0.0001)  # let the guest get somewhere
        if canceled == 300:
            done.set()
    done.set()
    kicker.result(TIMEOUT)
    assert kind == ExitKind.HVC
    assert guest.peek(DATA) == rounds


def test_kick_after_close_is_nothing(boot: Callable[..., Guest]) -> None:
    vcpu = boot(HVC).vcpu
    vcpu.close()
    vcpu.kick()


# ---- The virtual timer -----------------------------------------------------------------------------------------------


def test_vtimer_exit_masks_until_unmasked(boot: Callable[..., Guest]) -> None:
    vcpu = boot(HVC, HVC, HVC).vcpu
    vcpu.set_sysreg(CNTV_CVAL_EL0, 0)
    vcpu.set_sysreg(CNTV_CTL_EL0, 1)
    assert vcpu.run() == ExitKind.VTIMER
    assert vcpu.frame.vtimer_masked == 1
    assert vcpu.frame.vtimer_ctl & 7 == 5
    assert vcpu.run() == ExitKind.HVC  # masked: no second exit
    vcpu.frame.unmask_vtimer = 1
    assert vcpu.run() == ExitKind.VTIMER  # it is a level
    assert vcpu.frame.unmask_vtimer == 0
    vcpu.set_sysreg(CNTV_CTL_EL0, 0)
    vcpu.frame.unmask_vtimer = 1
    assert vcpu.run() == ExitKind.HVC
    assert vcpu.frame.vtimer_masked == 0


def test_vtimer_interrupts_a_loop_at_its_deadline(boot: Callable[..., Guest]) -> None:
    vcpu = boot(MRS_X0_CNTVCT, HVC, SPIN).vcpu
    assert vcpu.run() == ExitKind.HVC
    deadline = vcpu.get_reg(0) + 24_000
    vcpu.set_sysreg(CNTV_CVAL_EL0, deadline)
    vcpu.set_sysreg(CNTV_CTL_EL0, 1)
    assert vcpu.run() == ExitKind.VTIMER
    assert vcpu.get_reg(Reg.PC) == RAM + 8
    vcpu.set_reg(Reg.PC, RAM)
    assert vcpu.run() == ExitKind.HVC
    assert vcpu.get_reg(0) >= deadline


def test_vtimer_masked_by_the_guest_does_not_exit(boot: Callable[..., Guest]) -> None:
    vcpu = boot(HVC).vcpu
    vcpu.set_sysreg(CNTV_CVAL_EL0, 0)
    vcpu.set_sysreg(CNTV_CTL_EL0, 3)  # ENABLE, IMASK
    assert vcpu.run() == ExitKind.HVC
    assert vcpu.get_sysreg(CNTV_CTL_EL0) & 7 == 7  # ISTATUS says it expired all the same


def test_offset_is_subtracted_from_the_counter(boot: Callable[..., Guest]) -> None:
    vcpu = boot(MRS_X0_CNTVCT, HVC, MRS_X0_CNTVCT, HVC).vcpu
    vcpu.set_vtimer_offset(0)
    assert vcpu.run() == ExitKind.HVC
    first = vcpu.get_reg(0)
    vcpu.set_vtimer_offset(first - (1 << 50) & (1 << 64) - 1)
    assert resume(vcpu, Finish.NONE) == ExitKind.HVC
    second = vcpu.get_reg(0)
    assert vcpu.get_vtimer_offset() == first - (1 << 50) & (1 << 64) - 1
    assert 0 <= second - (1 << 50) < 1 << 40


# ---- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "size"), [(0x1000, GRANULE), (0x8000_1000, GRANULE), (0x8000_0000, 0x1000)])
def test_mapping_is_granular(boot: Callable[..., Guest], base: int, size: int) -> None:
    guest = boot(HVC)
    region = Region(base, mmap.mmap(-1, size))
    with pytest.raises(EngineError) as caught:
        guest.hypervisor.map(region)
    assert caught.value.code == HV_BAD_ARGUMENT
    region.buffer.close()  # would fail with BufferError, were it still held


def test_mapping_beyond_the_address_space_fails(boot: Callable[..., Guest]) -> None:
    guest = boot(HVC)
    limit = 1 << guest.hypervisor.capabilities.ipa_bits
    with pytest.raises(EngineError):
        guest.hypervisor.map(Region(limit, mmap.mmap(-1, GRANULE)))
    with pytest.raises(EngineError):
        guest.hypervisor.map(Region(limit - GRANULE, mmap.mmap(-1, 2 * GRANULE)))
    last = Region(limit - GRANULE, mmap.mmap(-1, GRANULE))
    guest.hypervisor.map(last)
    guest.hypervisor.unmap(last)


def test_unmapping_what_is_not_mapped_fails(boot: Callable[..., Guest]) -> None:
    guest = boot(HVC)
    with pytest.raises(EngineError):
        guest.hypervisor.unmap(Region(0x8000_0000, mmap.mmap(-1, GRANULE)))


def test_unmapped_memory_is_mmio_and_comes_back(boot: Callable[..., Guest]) -> None:
    guest = boot(LDR_X1_X0, HVC, LDR_X1_X0, HVC)
    extra = Region(0x8000_0000, mmap.mmap(-1, GRANULE))
    extra.buffer[0] = 0x42
    guest.hypervisor.map(extra)
    vcpu = guest.vcpu
    vcpu.set_reg(0, extra.base)
    vcpu.set_reg(1, 0)
    assert vcpu.run() == ExitKind.HVC
    assert vcpu.get_reg(1) == 0x42
    guest.hypervisor.unmap(extra)
    assert vcpu.run() == ExitKind.MMIO_READ
    assert vcpu.frame.address == extra.base
    guest.hypervisor.map(extra)
    assert vcpu.run() == ExitKind.HVC
    guest.hypervisor.unmap(extra)
    extra.buffer.close()


def test_read_only_memory_is_read_and_its_writes_exit(boot: Callable[..., Guest]) -> None:
    guest = boot(LDR_X1_X0, STR_X1_X0, HVC)
    rom = Region(0x8000_0000, mmap.mmap(-1, GRANULE))
    rom.buffer[0] = 0x42
    guest.hypervisor.map(rom, read_only=True)
    vcpu = guest.vcpu
    vcpu.set_reg(0, rom.base)
    assert vcpu.run() == ExitKind.MMIO_WRITE
    assert (vcpu.frame.address, vcpu.frame.value) == (rom.base, 0x42)
    assert resume(vcpu) == ExitKind.HVC


def test_host_writes_to_code_take_effect(boot: Callable[..., Guest]) -> None:
    guest = boot(0x91000400, HVC)  # add x0, x0, #1
    vcpu = guest.vcpu
    vcpu.set_reg(0, 0)
    assert vcpu.run() == ExitKind.HVC
    guest.poke(RAM, 0x91002800)  # add x0, x0, #10
    guest.hypervisor.host_wrote(RAM, 4)
    vcpu.set_reg(Reg.PC, RAM)
    assert vcpu.run() == ExitKind.HVC
    assert vcpu.get_reg(0) == 11


# ---- Registers -------------------------------------------------------------------------------------------------------


def test_general_registers_keep_their_values(boot: Callable[..., Guest]) -> None:
    vcpu = boot(HVC).vcpu
    for index in range(31):
        vcpu.set_reg(index, (1 << 63) + index)
    vcpu.set_reg(Reg.FPCR, 0x0300_0000)
    vcpu.set_reg(Reg.FPSR, 0x0800_001F)
    assert vcpu.run() == ExitKind.HVC
    assert [vcpu.get_reg(index) for index in range(31)] == [(1 << 63) + index for index in range(31)]
    assert vcpu.get_reg(Reg.FPCR) == 0x0300_0000
    assert vcpu.get_reg(Reg.FPSR) == 0x0800_001F
    assert vcpu.get_reg(Reg.CPSR) & 0x3CF == EL1H_MASKED


def test_vector_registers_keep_their_values(boot: Callable[..., Guest]) -> None:
    vcpu = boot(HVC).vcpu
    values = [bytes(range(index, index + 16)) for index in range(32)]
    for index, value in enumerate(values):
        vcpu.set_simd(index, value)
    assert vcpu.run() == ExitKind.HVC
    assert [vcpu.get_simd(index) for index in range(32)] == values
    with pytest.raises(ValueError, match="16 bytes"):
        vcpu.set_simd(0, bytes(8))


@pytest.mark.parametrize("encoding", [TPIDR_EL0, TPIDR_EL1, SP_EL1, ELR_EL1, VBAR_EL1, CNTV_CVAL_EL0])
def test_system_registers_keep_their_values(boot: Callable[..., Guest], encoding: int) -> None:
    vcpu = boot(HVC).vcpu
    vcpu.set_sysreg(encoding, 0xFFFF_0000_1234_5800)
    assert vcpu.get_sysreg(encoding) == 0xFFFF_0000_1234_5800


def test_unknown_registers_are_refused(boot: Callable[..., Guest]) -> None:
    vcpu = boot(HVC).vcpu
    with pytest.raises(EngineError) as caught:
        vcpu.get_sysreg(sysreg(3, 7, 15, 15, 7))
    assert caught.value.code == HV_BAD_ARGUMENT
    with pytest.raises(EngineError):
        vcpu.get_reg(35)
    with pytest.raises(EngineError):
        vcpu.set_reg(35, 0)
    with pytest.raises(EngineError):
        vcpu.get_simd(32)


# ---- Threads, vCPUs and VMs ------------------------------------------------------------------------------------------


def test_only_the_owner_may_touch_a_vcpu(boot: Callable[..., Guest], thread: ThreadPoolExecutor) -> None:
    vcpu = boot(HVC).vcpu
    with pytest.raises(EngineError):
        thread.submit(vcpu.get_reg, 0).result(TIMEOUT)
    with pytest.raises(EngineError):
        thread.submit(vcpu.set_sysreg, TPIDR_EL1, 0).result(TIMEOUT)
    assert thread.submit(vcpu.run).result(TIMEOUT) == ExitKind.ERROR
    with pytest.raises(EngineError):
        thread.submit(vcpu.close).result(TIMEOUT)
    assert vcpu.run() == ExitKind.HVC


def test_two_vcpus_take_turns(boot: Callable[..., Guest], thread: ThreadPoolExecutor) -> None:
    # 0: ldar x1, [x0]; cmp x1, x3; b.ne 0b; add x1, x1, #1; stlr x1, [x0]; add x3, x3, #2; sub x4, x4, #1; cbnz x4, 0b;
    # hvc #0: each waits for its own parity of one counter
    loop = (0xC8DFFC01, 0xEB03003F, 0x54FFFFC1, 0x91000421, 0xC89FFC01, 0x91000863, 0xD1000484, 0xB5FFFF24, HVC)
    guest = boot(*loop)
    rounds = 50  # each takes a time slice where both share a processor

    def other() -> int:
        vcpu = guest.start()
        for index, value in ((0, DATA), (3, 1), (4, rounds)):
            vcpu.set_reg(index, value)
        kind = vcpu.run()
        vcpu.close()
        return kind

    peer = thread.submit(other)
    for index, value in ((0, DATA), (3, 0), (4, rounds)):
        guest.vcpu.set_reg(index, value)
    assert guest.vcpu.run() == ExitKind.HVC
    assert peer.result(TIMEOUT) == ExitKind.HVC
    assert guest.peek(DATA) == 2 * rounds


def test_kick_reaches_a_vcpu_whatever_the_others_do(boot: Callable[..., Guest], thread: ThreadPoolExecutor) -> None:
    guest = boot(SPIN)
    started: list[Vcpu] = []
    there = threading.Event()

    def other() -> int:
        vcpu = guest.start()
        started.append(vcpu)
        there.set()
        kind = vcpu.run()
        vcpu.close()
        return kind

    peer = thread.submit(other)
    assert there.wait(TIMEOUT)

    def kick_one_after_the_other() -> None:
        started[0].kick()
        peer.result(TIMEOUT)
        guest.vcpu.kick()

    killer = threading.Thread(target=kick_one_after_the_other)
    killer.start()
    assert guest.vcpu.run() == ExitKind.CANCELED
    killer.join(TIMEOUT)
    assert peer.result(TIMEOUT) == ExitKind.CANCELED


def test_vm_outlives_its_vcpus(engine: str) -> None:
    guest = Guest(open_hypervisor(engine), HVC)
    with pytest.raises(EngineError) as caught:
        guest.hypervisor.close()
    assert caught.value.code == HV_BUSY
    assert guest.vcpu.run() == ExitKind.HVC
    guest.close()
    guest.vcpu.close()
    guest.hypervisor.close()  # a second time is nothing


def test_many_vms_in_one_process(engine: str, thread: ThreadPoolExecutor) -> None:
    first = Guest(open_hypervisor(engine), 0xD2800020, HVC)  # mov x0, #1
    if not first.hypervisor.capabilities.many_vms:
        with pytest.raises(EngineError, match="one VM per process"):
            open_hypervisor(engine)
        first.close()
        return
    second = thread.submit(lambda: Guest(open_hypervisor(engine), 0xD2800040, HVC)).result(TIMEOUT)  # mov x0, #2
    assert first.vcpu.run() == ExitKind.HVC
    assert thread.submit(second.vcpu.run).result(TIMEOUT) == ExitKind.HVC
    assert first.vcpu.get_reg(0) == 1
    assert thread.submit(second.vcpu.get_reg, 0).result(TIMEOUT) == 2
    first.close()
    thread.submit(second.close).result(TIMEOUT)


def test_machine_after_machine(engine: str) -> None:
    for _ in range(50):
        guest = Guest(open_hypervisor(engine), HVC)
        assert guest.vcpu.run() == ExitKind.HVC
        guest.close()


@pytest.mark.skipif("softhv" not in available_engines(), reason="only softhv counts")
def test_softhv_counts() -> None:
    guest = Guest(open_hypervisor("softhv"), NOP, UDF)
    guest.vcpu.run()
    counters = guest.vcpu.counters()
    assert counters["instructions"] >= 2
    assert counters["exceptions"] == 1
    assert counters["undefined"] == 1
    assert counters["undefined_insn"] == UDF
    guest.close()
