"""PSCI: the calls, their errors and the power states (Arm DEN 0022)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avmm.vcpu.psci import Action, Power, Psci
from avmm.vcpu.sysregs import mpidr

RAM = 0x4000_0000
U64 = (1 << 64) - 1

CPU_ON = 0xC400_0003
CPU_OFF = 0x8400_0002
AFFINITY_INFO = 0xC400_0004
FEATURES = 0x8400_000A


def make(cpus: int = 2) -> tuple[Psci, list[int]]:
    psci = Psci(lambda address: RAM <= address < RAM + (1 << 30))
    woken: list[int] = []
    for index in range(cpus):
        psci.connect(mpidr(index), lambda index=index: woken.append(index))  # type: ignore[misc]  # as above
    psci.power_on(0, RAM, 0)
    assert psci.starting(0) == (RAM, 0)
    woken.clear()
    return psci, woken


def call(psci: Psci, function: int, *args: int, index: int = 0) -> int | Action:
    return psci.call(index, [function, *args, *[0] * (7 - len(args))])


def test_versions() -> None:
    psci, _ = make()
    assert call(psci, 0x8400_0000) == 0x1_0001
    assert call(psci, 0x8000_0000) == 0x1_0001
    assert call(psci, FEATURES, 0x8000_0000) == 0
    assert call(psci, 0x8000_0001, 0x8000_0001) == 0
    assert call(psci, 0x8000_0001, 0x8000_8000) == -1  # ARCH_WORKAROUND_1
    assert call(psci, 0x8400_0006) == 2


def test_a_secondary_goes_on_and_off() -> None:
    psci, woken = make()
    assert call(psci, AFFINITY_INFO, 1, 0) == Power.OFF
    assert psci.starting(1) is None
    assert call(psci, CPU_ON, 1, RAM + 0x80, 0xABCD_0000_0001) == 0
    assert woken == [1]
    assert call(psci, AFFINITY_INFO, 1, 0) == Power.ON_PENDING
    assert call(psci, CPU_ON, 1, RAM, 0) == -5
    assert psci.starting(1) == (RAM + 0x80, 0xABCD_0000_0001)
    assert psci.starting(1) is None
    assert call(psci, AFFINITY_INFO, 1, 0) == Power.ON
    assert call(psci, CPU_ON, 1, RAM, 0) == -4
    assert call(psci, CPU_OFF, index=1) is Action.OFF
    assert call(psci, AFFINITY_INFO, 1, 0) == Power.OFF
    assert call(psci, CPU_ON, 1, RAM, 0) == 0
    assert woken == [1, 1]


@pytest.mark.parametrize(
    ("target", "entry", "answer"),
    [
        (2, RAM, -2),  # no such CPU
        (0x100, RAM, -2),
        (1 << 24 | 1, RAM, -2),  # reserved bits name no CPU
        (1, 0x900_0000, -9),
        (1, 0, -9),
        (1, U64, -9),
        (1, RAM + 2, -9),
        (0, 0, -4),  # the state comes before the address
    ],
)
def test_cpu_on_refuses(target: int, entry: int, answer: int) -> None:
    psci, woken = make()
    assert call(psci, CPU_ON, target, entry, 0) == answer
    assert woken == []
    assert psci.power(1) is Power.OFF


def test_32_bit_calls_see_32_bits() -> None:
    psci, _ = make()
    assert call(psci, 0xDEAD_0000_8400_0003, 1 << 32 | 1, 1 << 40 | RAM, 7 << 32 | 5) == 0
    assert psci.starting(1) == (RAM, 5)


def test_affinity_levels() -> None:
    psci, _ = make(18)
    assert mpidr(17) & 0xFFFF == 0x101
    assert call(psci, AFFINITY_INFO, 0x101, 0) == Power.OFF
    assert call(psci, AFFINITY_INFO, 0x100, 1) == Power.OFF
    assert call(psci, AFFINITY_INFO, 0x000, 1) == Power.ON
    assert call(psci, AFFINITY_INFO, 0x000, 2) == Power.ON
    assert call(psci, AFFINITY_INFO, 0x000, 3) == Power.ON
    assert call(psci, CPU_ON, 0x101, RAM, 0) == 0
    assert call(psci, AFFINITY_INFO, 0x100, 1) == Power.ON_PENDING
    assert call(psci, AFFINITY_INFO, 0x200, 1) == -2
    assert call(psci, AFFINITY_INFO, 0, 4) == -2


def test_suspend_and_system() -> None:
    psci, _ = make()
    assert call(psci, 0xC400_0001, 0) is Action.STANDBY
    assert call(psci, 0x8400_0001, 1 << 16, RAM) is Action.STANDBY
    assert call(psci, 0x8400_0001, 1 << 31) == -2
    assert call(psci, 0x8400_0008) is Action.POWER_OFF
    assert call(psci, 0x8400_0009) is Action.RESET
    assert call(psci, 0xC400_0012, 0) is Action.RESET
    assert call(psci, 0xC400_0012, 1) == -2
    assert call(psci, 0xC400_000E, RAM) == -1  # SYSTEM_SUSPEND


@given(st.integers(0, U64), st.lists(st.integers(0, U64), min_size=7, max_size=7))
def test_features_tells_the_truth(function: int, args: list[int]) -> None:
    """What PSCI_FEATURES does not know answers NOT_SUPPORTED, and any call gets an answer x0 can hold."""
    psci, _ = make()
    answer = psci.call(0, [function, *args])
    assert isinstance(answer, Action) or -10 < answer <= 0x1_0001
    if call(psci, FEATURES, function & 0xFFFF_FFFF) == -1 and function & 0xFFFF_FFFF != 0x8000_0001:
        assert answer == -1


@pytest.mark.parametrize("low", [*range(0x20)])
@pytest.mark.parametrize("base", [0x8400_0000, 0xC400_0000, 0x8000_0000, 0x8600_0000])
def test_features_by_function(base: int, low: int) -> None:
    known = {
        0x8400_0000: {0, 1, 2, 3, 4, 6, 8, 9, 10, 0x12},
        0xC400_0000: {1, 3, 4, 0x12},
        0x8000_0000: {0},
        0x8600_0000: set(),
    }[base]
    psci, _ = make()
    assert call(psci, FEATURES, base | low) == (0 if low in known else -1)
    implemented = low in known or base | low == 0x8000_0001  # SMCCC_ARCH_FEATURES is for SMCCC_VERSION to announce
    assert (call(psci, base | low, 0x8000_0000) != -1) == implemented
