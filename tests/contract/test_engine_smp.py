"""Several vCPUs in one VM: atomicity, fairness, TLB shoot-down, and a memory map that changes under them."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from avmm.errors import EngineError
from avmm.hypervisor import ExitKind, Vcpu, available_engines, open_hypervisor, sysreg
from avmm.memory import GRANULE, Region
from tests.contract.test_engine_abi import DATA, HVC, RAM, SPIN, TIMEOUT, Guest

VCPUS = 6
SCTLR_EL1, TTBR0_EL1, TCR_EL1 = sysreg(3, 0, 1, 0, 0), sysreg(3, 0, 2, 0, 0), sysreg(3, 0, 2, 0, 2)
MAIR_EL1, MPIDR_EL1 = sysreg(3, 0, 10, 2, 0), sysreg(3, 0, 0, 0, 5)

LDADD_LOOP = (
    0xD2800022,  # mov x2, #1
    0xF8220001,  # 0: ldadd x2, x1, [x0]
    0xD1000463,  # sub x3, x3, #1
    0xB5FFFFC3,  # cbnz x3, 0b
    HVC,
)
EXCLUSIVE_LOOP = (
    0xC85F7C01,  # 0: ldxr x1, [x0]
    0x91000421,  # add x1, x1, #1
    0xC8027C01,  # stxr w2, x1, [x0]
    0x35FFFFA2,  # cbnz w2, 0b
    0xD1000463,  # sub x3, x3, #1
    0xB5FFFF63,  # cbnz x3, 0b
    HVC,
)
WAIT_FOR_CHANGE = (
    0xF9000402,  # str x2, [x0, #8]: it runs
    0xF9400001,  # 0: ldr x1, [x0]
    0xEB02003F,  # cmp x1, x2
    0x54FFFFC0,  # b.eq 0b
    HVC,
)


@pytest.fixture(params=available_engines())
def guest(request: pytest.FixtureRequest) -> Iterator[Callable[..., Guest]]:
    """A VM whose first vCPU belongs to the test's thread."""
    guests: list[Guest] = []

    def start(*words: int) -> Guest:
        guests.append(Guest(open_hypervisor(request.param), *words))
        return guests[-1]

    yield start
    for one in guests:
        one.close()


@pytest.fixture
def threads() -> Iterator[list[ThreadPoolExecutor]]:
    """A thread for each of the other vCPUs."""
    pools = [ThreadPoolExecutor(1) for _ in range(VCPUS)]
    yield pools
    for pool in pools:
        pool.shutdown()


def start_on(pool: ThreadPoolExecutor, guest: Guest, prepare: Callable[[Vcpu], None]) -> Future[int]:
    """Run a new vCPU on ``pool`` to its first exit and destroy it; the result is the exit's kind."""

    def work() -> int:
        vcpu = guest.start()
        prepare(vcpu)
        kind = vcpu.run()
        vcpu.close()
        return kind

    return pool.submit(work)


@pytest.mark.parametrize("words", [LDADD_LOOP, EXCLUSIVE_LOOP], ids=["ldadd", "exclusives"])
def test_no_increment_is_lost(
    guest: Callable[..., Guest], threads: list[ThreadPoolExecutor], words: tuple[int, ...]
) -> None:
    vm = guest(*words)
    rounds = 300_000

    def prepare(vcpu: Vcpu) -> None:
        vcpu.set_reg(0, DATA)
        vcpu.set_reg(3, rounds)

    others = [start_on(pool, vm, prepare) for pool in threads]
    prepare(vm.vcpu)
    assert vm.vcpu.run() == ExitKind.HVC
    assert [other.result(TIMEOUT) for other in others] == [ExitKind.HVC] * VCPUS
    assert vm.peek(DATA) == (VCPUS + 1) * rounds


def test_everybody_gets_a_turn(guest: Callable[..., Guest], threads: list[ThreadPoolExecutor]) -> None:
    """Endless loops do not keep others from theirs: each counts in a word of its own until all have counted."""
    vm = guest(0xF9000002, 0x91000442, 0x17FFFFFE)  # 0: str x2, [x0]; add x2, x2, #1; b 0b
    started: list[Vcpu] = []

    def prepare_at(index: int) -> Callable[[Vcpu], None]:
        def prepare(vcpu: Vcpu) -> None:
            vcpu.set_reg(0, DATA + 8 * index)
            vcpu.set_reg(2, 1)
            started.append(vcpu)

        return prepare

    others = [start_on(pool, vm, prepare_at(index)) for index, pool in enumerate(threads)]
    while not all(vm.peek(DATA + 8 * index) > 1000 for index in range(VCPUS)):
        assert not any(other.done() for other in others)
    for vcpu in started:
        vcpu.kick()
    assert [other.result(TIMEOUT) for other in others] == [ExitKind.CANCELED] * VCPUS


def test_affinity_is_settable(guest: Callable[..., Guest]) -> None:
    vcpu = guest(HVC).vcpu
    vcpu.set_sysreg(MPIDR_EL1, 0x8000_0103)
    assert vcpu.get_sysreg(MPIDR_EL1) & 0xFF_FFFF == 0x103


def test_memory_map_changes_under_a_running_vcpu(
    guest: Callable[..., Guest], threads: list[ThreadPoolExecutor]
) -> None:
    vm = guest(*WAIT_FOR_CHANGE)
    old, new = (Region(0x8000_0000, mmap.mmap(-1, GRANULE)) for _ in range(2))
    old.buffer[0], new.buffer[0] = 1, 2
    vm.hypervisor.map(old)

    def prepare(vcpu: Vcpu) -> None:
        vcpu.set_reg(0, old.base)
        vcpu.set_reg(2, 1)

    other = start_on(threads[0], vm, prepare)
    while old.buffer[8] != 1:
        assert not other.done()
    vm.hypervisor.unmap(old)  # from here on it may exit with MMIO_READ, or see the new page
    vm.hypervisor.map(new)
    assert other.result(TIMEOUT) in (ExitKind.HVC, ExitKind.MMIO_READ)
    old.buffer.close()


def test_tlb_shootdown_reaches_the_other_vcpu(guest: Callable[..., Guest], threads: list[ThreadPoolExecutor]) -> None:
    """One vCPU remaps a page with TLBI VAE1IS while another reads it in a loop."""
    vm = guest(*WAIT_FOR_CHANGE)
    level1, level2, level3 = RAM + 0xC000, RAM + 0xD000, RAM + 0xE000
    page = 3 | 3 << 8 | 1 << 10  # a page, inner shareable, accessed
    remap = RAM + 0x100
    vm.poke(
        remap,
        0xF9000003,  # str x3, [x0]: the new descriptor
        0xD5033B9F,  # dsb ish
        0xD5088324,  # tlbi vae1is, x4
        0xD5033B9F,  # dsb ish
        0xD5033FDF,  # isb
        HVC,
    )

    def describe(table: int, index: int, value: int) -> None:
        vm.poke(table + 8 * index, value & 0xFFFF_FFFF, value >> 32)

    describe(level1, RAM >> 30, level2 | 3)
    describe(level2, 0, level3 | 3)
    for index in range(16):
        describe(level3, index, RAM + 0x1000 * index | page)
    vm.poke(RAM + 0xB000, 2)  # what DATA's page will be replaced with
    vm.poke(DATA, 1)

    def translate(vcpu: Vcpu) -> None:
        for register, value in (
            (MAIR_EL1, 0xFF),
            (TCR_EL1, 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 2 << 32),
            (TTBR0_EL1, level1),
            (SCTLR_EL1, 0x30D0_0800 | 1 << 12 | 1 << 2 | 1),
        ):
            vcpu.set_sysreg(register, value)

    def prepare(vcpu: Vcpu) -> None:
        translate(vcpu)
        vcpu.set_reg(0, DATA)
        vcpu.set_reg(2, 1)

    other = start_on(threads[0], vm, prepare)
    while vm.peek(DATA + 8) != 1:
        assert not other.done()
    translate(vm.vcpu)
    for register, value in ((0, level3 + 8 * 8), (3, RAM + 0xB000 | page), (4, DATA >> 12), (31, remap)):
        vm.vcpu.set_reg(register, value)
    assert vm.vcpu.run() == ExitKind.HVC
    assert other.result(TIMEOUT) == ExitKind.HVC


def test_one_vcpu_per_thread(guest: Callable[..., Guest]) -> None:
    vm = guest(HVC)
    with pytest.raises(EngineError):
        vm.start()
    assert vm.vcpu.run() == ExitKind.HVC


def test_vcpus_come_and_go_while_others_run(guest: Callable[..., Guest], threads: list[ThreadPoolExecutor]) -> None:
    vm = guest(SPIN)
    vm.poke(RAM + 0x100, HVC)

    def come_and_go() -> None:
        for _ in range(50):
            vcpu = vm.start(RAM + 0x100)
            assert vcpu.run() == ExitKind.HVC
            vcpu.close()

    others = [pool.submit(come_and_go) for pool in threads[:2]]

    def end() -> None:
        try:
            for other in others:
                other.result(TIMEOUT)
        finally:
            vm.vcpu.kick()

    ender = threads[2].submit(end)
    assert vm.vcpu.run() == ExitKind.CANCELED
    ender.result(TIMEOUT)
