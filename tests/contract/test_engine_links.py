"""Compiled code goes on from block to block by itself, whatever was dropped: softhv counts how often it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.contract.test_engine_abi import HVC, RAM, Guest, boot

__all__ = ["boot"]  # a fixture

ROUNDS = 5000
CALLER, CALLEES = RAM, (RAM + 0x1000, RAM + 0x2000)
DROP = RAM + 0x3000
ADD_1, RET = 0x91000400, 0xD65F03C0  # ADD X0, X0, #1
IC_IVAU_X1, DSB, ISB = 0xD50B7521, 0xD5033F9F, 0xD5033FDF
SUB_1, NEXT = 0xD1000694, 0xB5000014  # SUB X20, X20, #1; CBNZ X20
SWAP = (0xAA0203E4, 0xAA0303E2, 0xAA0403E3)  # MOV X4, X2; MOV X2, X3; MOV X3, X4
BLR_X2 = 0xD63F0040


def bl(at: int, to: int) -> int:
    return 0x94000000 | (to - at) // 4 & 0x3FFFFFF


def loop(*body: int) -> list[int]:
    """``body`` X20 times."""
    return [*body, SUB_1, NEXT | (-len(body) - 1 & 0x7FFFF) << 5, HVC]


CALLS = {
    "direct": loop(bl(CALLER, CALLEES[0])),
    "two callers": loop(bl(CALLER, CALLEES[0]), bl(CALLER + 4, CALLEES[0])),
    "by register": loop(BLR_X2),
    "by register, to two": loop(BLR_X2, *SWAP),
}


@pytest.fixture
def engine() -> str:
    return "softhv"


@pytest.mark.parametrize("name", CALLS)
def test_calls_and_returns_need_no_dispatcher(boot: Callable[..., Guest], name: str) -> None:
    guest = boot(*CALLS[name])
    for number, callee in enumerate(CALLEES):
        guest.poke(callee, *[ADD_1] * (number + 1), RET)
    guest.poke(DROP, IC_IVAU_X1, DSB, ISB, HVC)
    vcpu = guest.vcpu

    def rounds() -> int:
        """How often they needed the dispatcher."""
        before = vcpu.counters()["block_runs"]
        guest.run(CALLER, {0: 0, 2: CALLEES[0], 3: CALLEES[1], 20: ROUNDS})
        per_round = {"direct": 1, "two callers": 2, "by register": 1}.get(name, 1.5)
        assert vcpu.get_reg(0) == per_round * ROUNDS
        return vcpu.counters()["block_runs"] - before

    rounds()
    assert rounds() < ROUNDS / 50
    for callee in CALLEES:
        guest.run(DROP, {1: callee})
    rounds()  # compiled once more
    assert rounds() < ROUNDS / 50
