"""A machine whose interrupt controller is inside the hypervisor: nothing of interrupts, timers and idling comes out."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

import avmm
from avmm.config import VmConfig
from avmm.errors import ConfigError, EngineError
from avmm.hypervisor import open_hypervisor
from avmm.vm import Booting
from tests.unit.test_faults import assert_never_early

IMAGES = Path(__file__).parents[2] / "firmware" / "images"


def machine(name: str, cpus: int = 1, engine: str = "softhv", **parameters: int) -> Booting:
    words = " ".join(f"{key}={value}" for key, value in parameters.items())
    return avmm.boot(
        IMAGES / f"{name}.bin", memory="64M", cpus=cpus, engine=engine, cmdline=words, irqchip="hypervisor"
    )


@pytest.mark.parametrize("engine", ["softhv", "softhv,interpreter", "softhv,turns"])
@pytest.mark.parametrize(
    ("name", "cpus", "parameters"),
    [
        ("gic", 1, {}),
        ("gic", 2, {}),
        ("gic", 4, {}),
        ("timer_wfi", 1, {"n": 50, "hz": 500}),
        ("timer_wfi", 2, {"n": 50, "hz": 500}),
        ("timer_wfi", 4, {"n": 50, "hz": 500}),
        ("ipi_pingpong", 2, {"n": 200}),
        ("ipi_pingpong", 4, {"n": 100}),
        ("psci", 1, {}),
        ("psci", 2, {}),
        ("psci", 4, {}),
        ("garbage_devices", 2, {"n": 20000, "seed": 2}),
    ],
)
async def test_every_check_passes(name: str, cpus: int, parameters: dict[str, int], engine: str) -> None:
    async with machine(name, cpus, engine, **parameters) as vm:
        assert (await vm.wait()).reason == "power-off"
        lines = vm.console.output.decode("ascii").splitlines()
    assert not [line for line in lines if line.startswith("not ok")]
    passed = [line for line in lines if line.startswith("ok ")]
    assert f"1..{len(passed)}" in lines
    exits = vm.counters()["exits"]
    assert {kind: exits[kind] for kind in ("wfi", "vtimer", "sysreg_read", "sysreg_write")} == {
        "wfi": 0, "vtimer": 0, "sysreg_read": 0, "sysreg_write": 0,
    }  # fmt: skip


async def quiet(vm: avmm.VirtualMachine) -> dict[str, int]:
    """The exits so far of a guest that makes none for half a second on end: for twenty seconds at most."""
    await vm.console.expect(rb"idle\r\n", timeout=60)
    for _ in range(40):
        before: dict[str, int] = vm.counters()["exits"]
        await asyncio.sleep(0.5)
        if vm.counters()["exits"] == before:
            return before
    raise AssertionError("the guest never stops exiting")


async def test_an_idle_guest_makes_no_exit() -> None:
    """It ticks a hundred times a second; its time stands still while it is paused; a byte typed wakes it inside."""
    async with machine("idle", hz=100) as vm:
        exits = await quiet(vm)
        await vm.pause()
        await vm.resume()
        kicked = vm.counters()["exits"]
        assert kicked == {**exits, "canceled": kicked["canceled"]}
        assert kicked["canceled"] > exits["canceled"]  # more than one by who was slow to come out and kicked again
        assert vm.stats()["vcpus"][0]["counters"]["parks"] == 0
        await assert_never_early(vm)


@pytest.mark.parametrize("cpus", [1, 2])
async def test_reset_makes_it_anew(cpus: int) -> None:
    async with machine("reset", cpus) as vm:
        for _ in range(3):
            await vm.console.expect(rb"reset\r?\n", timeout=60)
        assert vm.outcome is None


async def test_no_twin_and_no_snapshot(tmp_path: Path) -> None:
    async with machine("idle", hz=100) as vm:
        await vm.console.expect(rb"idle\r\n", timeout=60)
        with pytest.raises(ConfigError, match="--irqchip avmm"):
            await vm.fork()
        with pytest.raises(ConfigError, match="--irqchip avmm"):
            await vm.snapshot(tmp_path / "snapshot")
        vm.console.write(b"r")
        await vm.console.expect(rb"ticks (\d+)\r\n", timeout=60)


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="avmm, hypervisor"):
        VmConfig.resolve("kernel", irqchip="gicv2")
    with pytest.raises(ConfigError, match="--irqchip avmm"):
        VmConfig.resolve("kernel", irqchip="hypervisor", faults="unknown=0.1")


def test_dry_run_says_it() -> None:
    command = [sys.executable, "-m", "avmm.cli", "boot", str(IMAGES / "hello.bin"), "--dry-run"]
    for options, expected in ([], "avmm"), (["--irqchip", "hypervisor"], "hypervisor"):
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=True)
        assert json.loads(done.stdout)["irqchip"] == expected


def test_where_and_when_it_can_be_made() -> None:
    hypervisor = open_hypervisor("softhv")
    try:
        for bases in ((0x0800_0001, 0x080A_0000), (0x0800_0000, 0), (0x0800_0000, 0x0800_0000)):
            with pytest.raises(EngineError, match="HV_BAD_ARGUMENT"):
                hypervisor.gic(*bases)
        vcpu = hypervisor.create_vcpu()
        with pytest.raises(EngineError, match="HV_BUSY"):
            hypervisor.gic(0x0800_0000, 0x080A_0000)
        vcpu.close()
        chip = hypervisor.gic(0x0800_0000, 0x080A_0000)
        with pytest.raises(EngineError, match=r"INTIDs are 32\.\.255"):
            chip.spi(224)
    finally:
        hypervisor.close()
