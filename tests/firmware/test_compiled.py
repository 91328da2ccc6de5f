"""The bare-metal guests with all code compiled before it first runs, and with next to no room for compiled code."""

from __future__ import annotations

import pytest

from avmm.hypervisor.softhv import Softhv, SofthvVcpu
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


async def test_a_guest_that_never_stops_writing_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of functions, each written, called and overwritten: memory for compiled code ends and starts anew."""
    limit, counted, close = 256 << 10, list[dict[str, int]](), SofthvVcpu.close

    def counting_close(vcpu: SofthvVcpu) -> None:
        if not counted:
            counted.append(vcpu.counters())
        close(vcpu)

    monkeypatch.setattr(Softhv, "COMPILE_AFTER", 0)
    monkeypatch.setattr(Softhv, "CODE_LIMIT", limit)
    monkeypatch.setattr(SofthvVcpu, "close", counting_close)
    async with machine("smc_code", "softhv", 1, n=1500) as vm:
        outcome = await vm.wait()
        lines = vm.console.output.decode("ascii").splitlines()
    assert outcome.reason == "power-off", (outcome, lines[-20:])
    assert f"1..{len([line for line in lines if line.startswith('ok ')])}" in lines
    assert counted[0]["compiled_bytes"] > 2 * limit, counted
    assert counted[0]["flushes"] >= 2, counted
