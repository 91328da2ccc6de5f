"""The bare-metal guests with all code compiled before it first runs, and with next to no room for compiled code."""

from __future__ import annotations

import pytest

from avmm.hypervisor.softhv import Softhv
from tests.firmware.test_guests import machine

GUESTS = [
    ("timer_wfi", 1, {"n": 50, "hz": 500}),
    ("ipi_pingpong", 2, {"n": 100}),
    ("exits", 1, {"n": 200}),
    ("faults", 1, {}),
    ("psci", 2, {}),
    ("gic", 1, {}),
    ("atomics", 4, {"n": 1000}),
    ("mmio_widths", 1, {}),
    ("smc_code", 1, {"n": 400}),
    ("smc_code", 2, {"n": 200}),
    ("garbage_devices", 2, {"n": 20000, "seed": 3}),
]


@pytest.mark.parametrize("limit", [0, 256 << 10], ids=["room", "no-room"])
@pytest.mark.parametrize(("name", "cpus", "parameters"), GUESTS)
async def test_every_check_passes(
    monkeypatch: pytest.MonkeyPatch, name: str, cpus: int, parameters: dict[str, int], limit: int
) -> None:
    monkeypatch.setattr(Softhv, "COMPILE_AFTER", 0)
    monkeypatch.setattr(Softhv, "CODE_LIMIT", limit)
    async with machine(name, "softhv", cpus, **parameters) as vm:
        outcome = await vm.wait()
        lines = vm.console.output.decode("ascii").splitlines()
    assert outcome.reason == "power-off", (outcome, lines[-20:])
    assert not [line for line in lines if line.startswith("not ok")]
    assert f"1..{len([line for line in lines if line.startswith('ok ')])}" in lines
