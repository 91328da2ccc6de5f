"""The bare-metal guests on every engine this machine has. QEMU's verdict on them is in test_firmware_images.py."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

import avmm
from avmm.devices.pl011 import Pl011
from avmm.hypervisor import available_engines

IMAGES = Path(__file__).parents[2] / "firmware" / "images"
TIMEOUT = 120


@pytest.fixture(params=available_engines())
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def machine(name: str, engine: str, cpus: int, **parameters: int) -> avmm.vm.Booting:
    words = " ".join(f"{key}={value}" for key, value in parameters.items())
    return avmm.boot(IMAGES / f"{name}.bin", memory="128M", cpus=cpus, engine=engine, cmdline=words, reboot=False)


async def report(name: str, engine: str, cpus: int, **parameters: int) -> list[str]:
    """Run a guest to its end; the lines it printed."""
    async with machine(name, engine, cpus, **parameters) as vm:
        outcome = await vm.wait()
        lines = vm.console.output.decode("ascii").splitlines()
        assert outcome.reason == "power-off", (outcome, lines[-20:])
        return lines


@pytest.mark.parametrize(
    ("name", "cpus", "parameters"),
    [
        ("timer_wfi", 1, {"n": 50, "hz": 500}),
        ("timer_wfi", 4, {"n": 50, "hz": 500}),
        ("ipi_pingpong", 1, {"n": 200}),
        ("ipi_pingpong", 2, {"n": 200}),
        ("ipi_pingpong", 4, {"n": 100}),
        ("ipi_pingpong", 8, {"n": 20}),
        ("exits", 1, {"n": 500}),
        ("faults", 1, {}),
        ("psci", 1, {}),
        ("psci", 2, {}),
        ("psci", 4, {}),
        ("gic", 1, {}),
        ("gic", 4, {}),
        ("atomics", 1, {"n": 1000}),
        ("atomics", 4, {"n": 1000}),
        ("mmio_widths", 1, {}),
        ("smc_code", 1, {"n": 200}),
        ("smc_code", 2, {"n": 200}),
        ("litmus", 1, {"ms": 20}),
        ("litmus", 2, {"ms": 100}),
        ("litmus", 4, {"ms": 50}),
        ("garbage_devices", 1, {"n": 20000, "seed": 1}),
        ("garbage_devices", 2, {"n": 20000, "seed": 2}),
    ],
)
async def test_every_check_passes(name: str, engine: str, cpus: int, parameters: dict[str, int]) -> None:
    lines = await report(name, engine, cpus, **parameters)
    assert not [line for line in lines if line.startswith("not ok")]
    passed = [line for line in lines if line.startswith("ok ")]
    assert f"1..{len(passed)}" in lines  # the plan, printed last: nothing was left out
    assert passed


@pytest.mark.skipif("softhv" not in available_engines(), reason="only softhv takes turns")
@pytest.mark.parametrize(
    ("name", "cpus", "parameters"),
    [
        ("psci", 4, {}), ("gic", 4, {}), ("atomics", 4, {"n": 200}), ("smc_code", 2, {"n": 100}),
        ("litmus", 2, {"ms": 20}), ("litmus", 4, {"ms": 20}), ("ipi_pingpong", 4, {"n": 50}),
    ],
)  # fmt: skip
async def test_side_by_side_as_in_turns(name: str, cpus: int, parameters: dict[str, int]) -> None:
    """vCPUs that take turns are the reference: what a guest finds is the same with vCPUs side by side, compiled or not.
    What it measures differs: only in parallel do stores without barriers overtake loads."""
    reports = [await report(name, f"softhv{how}", cpus, **parameters) for how in (",turns", "", ",interpreter")]
    in_turns, *side_by_side = ([line for line in lines if re.match(r"(not )?ok |1\.\.", line)] for lines in reports)
    assert in_turns
    assert side_by_side == [in_turns, in_turns]


async def test_hello(engine: str) -> None:
    assert await report("hello", engine, 1) == ["hello"]


async def test_reset(engine: str) -> None:
    async with machine("reset", engine, 1) as vm:
        assert (await vm.wait()).reason == "reset"
        assert vm.console.output == b"reset\n" or vm.console.output == b"reset\r\n"


@pytest.mark.parametrize(
    ("name", "printed"), [("scribble_tables", b"scribble"), ("jump_nowhere", b"jump"), ("exception_loop", b"loop")]
)
async def test_a_guest_gone_wild_is_stopped_at_once(name: str, printed: bytes, engine: str) -> None:
    """It cannot end by itself; avmm neither crashes nor hangs, and stops it when told to."""
    async with machine(name, engine, 1) as vm:
        await vm.console.expect(re.escape(printed), timeout=TIMEOUT)
        assert vm.outcome is None
        await vm.stop()
        assert (await vm.wait()).reason == "stopped"


@pytest.mark.parametrize("seed", range(8))
async def test_garbage_written_to_every_device(engine: str, seed: int) -> None:
    """Whatever a guest writes wherever a device is, avmm goes on; the guest's end is its own business."""
    async with machine("garbage_devices", engine, 1, n=5000, seed=100 + seed) as vm:
        outcome = await vm.wait()
    assert outcome.reason in ("power-off", "reset") or isinstance(outcome.error, avmm.GuestError)


async def test_a_defect_that_a_guest_finds_ends_that_guest_alone(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An assertion of ours that a guest makes fail is its GuestError; another VM of the process goes on."""
    write = Pl011.write
    hit: list[Pl011] = []

    def broken(self: Pl011, offset: int, size: int, value: int) -> None:
        if not hit or hit[0] is self:
            hit.append(self)
            raise AssertionError("a device's own")
        write(self, offset, size, value)

    monkeypatch.setattr(Pl011, "write", broken)
    async with machine("hello", engine, 1) as vm:
        outcome = await vm.wait()
        assert isinstance(outcome.error, avmm.GuestError)
        assert "MMIO_WRITE" in str(outcome.error)
        assert isinstance(outcome.error.__cause__, AssertionError)
    assert (await report("hello", engine, 1))[0]


async def test_output_is_prompt_without_another_exit(engine: str, tmp_path: Path) -> None:
    """A guest that prints and then computes for ever, its interrupts masked: all it printed arrives."""
    movz_x0_uart, movz_w1_a, strb_w1_x0, add_x1_x1_1, spin = 0xD2A12000, 0x52800C21, 0x39000001, 0x91000421, 0x14000000
    words = [movz_x0_uart, movz_w1_a, *[strb_w1_x0, add_x1_x1_1] * 26, *[strb_w1_x0] * 999, spin]
    header = struct.pack("<IIQQQQQQ4sI", 0x14000010, 0, 0, 0x10000, 0b1010, 0, 0, 0, b"ARM\x64", 0)
    image = tmp_path / "image"
    image.write_bytes(header + struct.pack(f"<{len(words)}I", *words))
    async with avmm.boot(image, memory="128M", engine=engine) as vm:
        await vm.console.expect(rb"abcdefghijklmnopqrstuvwxyz\{{999}", timeout=TIMEOUT)
        counters = vm.counters()
        assert counters["exits"]["mmio_write"] + counters["uart_batched"] == 26 + 999
        assert counters["uart_batched"]
