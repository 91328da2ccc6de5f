"""An engine that misbehaves on demand: guests that check themselves run through every fault, and idle all the same."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import avmm
from avmm.faults import Faults

IMAGES = Path(__file__).parents[2] / "firmware" / "images"

#: Each fault alone, the count that shows it has happened with one of the guests, and all at once.
EVERYTHING = (
    "spurious-wfi=0.5,early-wfi=0.5,lose-kick=0.3,late-kick=100us,double-kick=0.3,unknown=0.3,late-vtimer=300us,"
    "double-vtimer=0.5,sticky-kick=no,fast-counter=yes,host-sleep=50ms@10ms"
)
FAULTS = {
    "spurious-wfi=0.5": "spurious_wfis",
    "spurious-wfi=0": "",
    "early-wfi=0.9": "early_wfis",
    "lose-kick=0.5": "",  # whether a kick is needed depends on the moment
    "lose-kick=1": "",
    "late-kick=200us": "",
    "double-kick=1": "",
    "sticky-kick=no": "",
    "unknown=0.5": "unknowns",
    "late-vtimer=2ms": "late_vtimers",
    "double-vtimer=1": "double_vtimers",
    "fast-counter=yes": "",
    "host-sleep=200ms@10ms": "host_sleeps",
    EVERYTHING: "unknowns",
}


async def run(guest: str, cpus: int, faults: str | None, append: str = "") -> dict[str, int]:
    """Run a guest to its end; how often each fault happened."""
    async with avmm.boot(
        IMAGES / f"{guest}.bin", memory="64M", cpus=cpus, engine="softhv", append=append, faults=faults
    ) as vm:
        assert (await asyncio.wait_for(vm.wait(), 60)).reason == "power-off"
    lines = [line.decode().strip() for line in vm.console.output.splitlines()]
    assert [line for line in lines if line.startswith("not ok")] == []
    passed = [line for line in lines if line.startswith("ok ")]
    assert f"1..{len(passed)}" in lines
    counts: dict[str, int] = vm.counters()["faults"]
    return counts


@pytest.mark.parametrize("faults", FAULTS)
async def test_guests_come_through(faults: str) -> None:
    ticks = await run("timer_wfi", 1, faults, "n=50")
    pings = await run("ipi_pingpong", 2, faults, "n=100")
    power = await run("psci", 2, faults)
    if FAULTS[faults]:
        assert sum(counts[FAULTS[faults]] for counts in (ticks, pings, power)) > 0


async def test_a_good_engine_counts_nothing() -> None:
    assert await run("timer_wfi", 1, None) == {}


async def test_the_same_seed_gives_the_same_dice() -> None:
    """One vCPU whose WFIs alone are drawn for: what happens depends on nothing else."""
    first = await run("ipi_pingpong", 1, "early-wfi=0.5,seed=7", "n=200")
    assert await run("ipi_pingpong", 1, "early-wfi=0.5,seed=7", "n=200") == first
    assert await run("ipi_pingpong", 1, "early-wfi=0.5,seed=8", "n=200") != first


@pytest.mark.parametrize(
    ("faults", "count"),
    [
        ("lose-kick=0.8", "lost_kicks"),
        ("late-kick=300us", "late_kicks"),
        ("late-kick=300us,sticky-kick=no", "late_kicks"),
        ("double-kick=1", "double_kicks"),
    ],
)
async def test_kicks(faults: str, count: str) -> None:
    """A guest that never exits by itself comes out for nothing but kicks: lost ones are repeated."""
    async with avmm.boot(IMAGES / "exception_loop.bin", memory="64M", engine="softhv", faults=faults) as vm:
        await vm.console.expect(rb"loop", timeout=60)
        for _ in range(20):
            await asyncio.wait_for(vm.pause(), 60)
            await vm.resume()
        await asyncio.wait_for(vm.stop(), 60)
    assert vm.counters()["faults"][count] > 0


async def assert_never_early(vm: avmm.VirtualMachine) -> None:
    """The guest (``firmware/idle``) has counted more than twenty ticks, none before its time."""
    ticks = 0
    while ticks <= 20:  # the first time, but where the host has much else to do
        vm.console.write(b"r")
        report = await vm.console.expect(rb"ticks (\d+)\r\nearly (\d+)\r\n", timeout=60)
        ticks += int(report.group(1))
        assert int(report.group(2)) == 0


@pytest.mark.parametrize(
    "faults", ["spurious-wfi=1", "spurious-wfi=0.5", "early-wfi=0.5", "late-vtimer=5ms", "double-vtimer=1", EVERYTHING]
)
async def test_idle_is_idle_on_a_bad_engine(faults: str) -> None:
    """A guest that ticks a hundred times a second: a handful of exits a tick, whatever the engine does."""
    async with avmm.boot(
        IMAGES / "idle.bin", memory="64M", cpus=1, engine="softhv", append="hz=100", faults=faults
    ) as vm:
        await vm.console.expect(rb"idle\r\n", timeout=60)
        before, began = vm.counters(), time.monotonic()
        ticks = 0
        while ticks < 50:
            await asyncio.sleep(0.1)
            ticks = int((time.monotonic() - began) * 100)
        after = vm.counters()
        exits = sum(after["exits"].values()) - sum(before["exits"].values())
        slept = sum(after["faults"].values())  # an engine that waits inside itself makes no exit
        assert exits + slept > 0
        assert exits <= 25 * (ticks + 10)
        await assert_never_early(vm)


def test_specification() -> None:
    assert Faults.parse("") == Faults()
    assert Faults.parse("spurious-wfi=0.5, late-kick=200us") == Faults(spurious_wfi=0.5, late_kick=200_000)
    assert Faults.parse("host-sleep=1.5s@20ms,seed=9") == Faults(host_sleep=(1_500_000_000, 20_000_000), seed=9)
    assert Faults.parse("sticky-kick=no,fast-counter=yes") == Faults(sticky_kick=False, fast_counter=True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nonsense=1", "no fault named 'nonsense'; there are spurious-wfi"),
        ("unknown", "needs a value"),
        ("unknown=", "at most 0.99|probability"),
        ("unknown=1", "at most 0.99"),
        ("lose-kick=1.1", "probability from 0 to 1, not '1.1'"),
        ("lose-kick=nan", "probability"),
        ("lose-kick=-0.1", "probability"),
        ("late-kick=5", "a duration like 200us"),
        ("late-kick=0us", "a duration like 200us"),
        ("late-vtimer=61s", "up to 60s"),
        ("sticky-kick=maybe", "yes or no"),
        ("host-sleep=1s", "LENGTH@START"),
        ("seed=-1", "below 2\\*\\*64"),
        ("unknown=0.1,unknown=0.2", "twice"),
    ],
)
def test_bad_specification(text: str, says: str) -> None:
    with pytest.raises(avmm.ConfigError, match=says):
        Faults.parse(text)


def test_only_softhv_misbehaves() -> None:
    from avmm.hypervisor import open_hypervisor

    with pytest.raises(avmm.ConfigError, match="softhv"):
        open_hypervisor("framework", Faults())


def test_command_line() -> None:
    boot = [
        sys.executable,
        "-c",
        "from avmm.cli import main; raise SystemExit(main())",
        "boot",
        str(IMAGES / "hello.bin"),
        "-m",
        "64M",
        "--dry-run",
        "--fault",
    ]
    done = subprocess.run([*boot, "unknown=0.1"], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["faults"]["unknown"] == 0.1
    bad = subprocess.run([*boot, "unknown=2"], capture_output=True, text=True, timeout=60)
    assert bad.returncode == 2
    assert len(bad.stderr.splitlines()) == 1
    assert "probability" in bad.stderr
