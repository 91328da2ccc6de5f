"""vCPUs on the real engine: bare-metal guests that sleep, wake each other, and are paused, saved and restored."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

import avmm
from avmm.hypervisor.base import ExitKind, Reg, Vcpu
from avmm.vcpu import sysregs
from avmm.vcpu.park import Mode
from avmm.vcpu.psci import Power

IMAGES = Path(__file__).parents[2] / "firmware" / "images"


def report(vm: avmm.VirtualMachine) -> list[str]:
    """What the guest printed, which must be a complete and clean TAP report."""
    lines = [line.decode().strip() for line in vm.console.output.splitlines()]
    assert [line for line in lines if line.startswith("not ok")] == []
    passed = [line for line in lines if line.startswith("ok ")]
    assert f"1..{len(passed)}" in lines
    return lines


@pytest.mark.parametrize(("guest", "cpus"), [("timer_wfi", 1), ("ipi_pingpong", 2), ("ipi_pingpong", 4), ("psci", 2)])
async def test_guest(guest: str, cpus: int) -> None:
    async with avmm.boot(IMAGES / f"{guest}.bin", memory="64M", cpus=cpus) as vm:
        assert (await asyncio.wait_for(vm.wait(), 60)).reason == "power-off"
        report(vm)


@pytest.mark.parametrize(("guest", "cpus"), [("timer_wfi", 1), ("ipi_pingpong", 2)])
async def test_guest_that_polls_before_it_sleeps(guest: str, cpus: int) -> None:
    async with avmm.boot(IMAGES / f"{guest}.bin", memory="64M", cpus=cpus, halt_poll="1ms") as vm:
        assert (await asyncio.wait_for(vm.wait(), 60)).reason == "power-off"
        report(vm)


async def test_one_park_a_tick() -> None:
    """Were a wake early, the guest would find its timer not due and sleep again."""
    async with avmm.boot(IMAGES / "timer_wfi.bin", memory="64M", append="n=50") as vm:
        await asyncio.wait_for(vm.wait(), 60)
        counters = vm.counters()["vcpus"][0]
        assert 0 < counters["parks"] <= 2 * 50
        assert counters["wake_timer"] == counters["parks"]


def scramble(vcpu: Vcpu) -> None:
    """Nothing of the guest's is left in the registers."""
    for number in range(31):
        vcpu.set_reg(number, 0xDEAD_0000 + number)
    vcpu.set_reg(Reg.PC, 0)
    for number in range(32):
        vcpu.set_simd(number, bytes(range(16)))
    for encoding in sysregs.SAVED.values():
        vcpu.set_sysreg(encoding, 0)
    vcpu.set_sysreg(sysregs.CNTV_CTL_EL0, 3)
    vcpu.set_sysreg(sysregs.CNTV_CVAL_EL0, (1 << 64) - 1)


async def test_guest_goes_on_from_its_saved_state() -> None:
    async with avmm.boot(IMAGES / "timer_wfi.bin", memory="64M", append="n=100") as vm:
        (vcpu,) = vm._machine.vcpus
        modes = set()
        for tick in range(20, 60):
            while vcpu.counters.exits[ExitKind.WFI] < tick:  # a counter has no event to wait for
                await asyncio.sleep(0)
                assert vm.outcome is None
            await vm.pause()
            modes.add(vcpu.mode)
            state = await vcpu.save()
            assert state.power is Power.ON
            await vcpu.call(scramble)
            await vcpu.restore(state)
            assert await vcpu.save() == state
            await vm.resume()
        await asyncio.wait_for(vm.wait(), 60)
        report(vm)
        assert Mode.PARKED in modes


async def test_another_version_is_refused() -> None:
    async with avmm.boot(IMAGES / "timer_wfi.bin", memory="64M") as vm:
        await vm.console.expect(rb"cntfrq", timeout=60)
        await vm.pause()
        (vcpu,) = vm._machine.vcpus
        state = await vcpu.save()
        with pytest.raises(avmm.ConfigError, match="version 2"):
            await vcpu.restore(replace(state, version=2))
        await vm.resume()
        await asyncio.wait_for(vm.wait(), 60)
        report(vm)


@pytest.mark.parametrize("guest", ["exception_loop", "jump_nowhere"])
async def test_hopeless_guests_stop(guest: str) -> None:
    """A guest that never exits on its own, or only faults, is stopped and paused like any other."""
    async with avmm.boot(IMAGES / f"{guest}.bin", memory="64M") as vm:
        await vm.console.expect(rb"loop|jump", timeout=60)
        await asyncio.wait_for(vm.pause(), 60)
        await vm.resume()
        await asyncio.wait_for(vm.stop(), 60)
        assert vm.outcome == avmm.Outcome("stopped")
