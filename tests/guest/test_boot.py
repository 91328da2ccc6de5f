"""A real Linux boots, talks, pastes, reboots, panics and powers off; nothing is left behind."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import avmm
from avmm.backends import serial
from avmm.debian import Fetched
from tests.guest.conftest import READY, booted_only, held

pytestmark = pytest.mark.guest


@pytest.mark.parametrize("cpus", [1, 4])
@pytest.mark.parametrize("flavour", ["cloud", "generic"])
async def test_debian_reaches_its_shell_and_powers_off(flavour: str, cpus: int, request: pytest.FixtureRequest) -> None:
    guest: Fetched = request.getfixturevalue("debian" if flavour == "cloud" else "debian_generic")
    async with avmm.boot(guest.kernel, guest.initrd, cpus=cpus) as vm:
        await vm.console.expect(READY, timeout=120)
        vm.console.write(b"echo $(nproc) of $(uname -m)\n")
        assert (await vm.console.expect(rb"\n(\d+) of (\w+)\W", timeout=60)).groups() == (b"%d" % cpus, b"aarch64")
        vm.console.write(b"poweroff -f\n")
        assert await vm.wait() == avmm.Outcome("power-off")
        with pytest.raises(avmm.GuestGone, match="powered off"):
            await vm.console.expect(rb"never", timeout=60)


@booted_only("the state of the hypervisor's own interrupt controller cannot be saved")
@pytest.mark.parametrize("cpus", [1, 2])
async def test_debian_with_the_hypervisor_s_interrupt_controller(debian: Fetched, cpus: int) -> None:
    async with avmm.boot(debian.kernel, debian.initrd, cpus=cpus, irqchip="hypervisor") as vm:
        for _ in range(2):
            await vm.console.expect(READY, timeout=120)
            vm.console.write(b"echo $(nproc) of $(uname -m)\n")
            assert (await vm.console.expect(rb"\n(\d+) of (\w+)\W", timeout=60)).groups() == (b"%d" % cpus, b"aarch64")
            await vm.pause()
            await vm.resume()
            vm.console.write(b"reboot -f\n")
        await vm.console.expect(READY, timeout=120)
        vm.console.write(b"poweroff -f\n")
        assert await vm.wait() == avmm.Outcome("power-off")
        assert vm.counters()["exits"]["wfi"] == 0


async def test_a_pasted_megabyte_arrives_whole(debian: Fetched) -> None:
    text = b"".join(b"%07d\n" % number for number in range(131072))
    async with avmm.boot(debian.kernel, debian.initrd) as vm:
        await vm.console.expect(READY, timeout=120)
        vm.console.write(b"stty raw -echo; head -c 1048576 | md5sum; stty sane; echo DONE\n")
        await vm.console.expect(rb"stty sane", timeout=60)
        vm.console.write(text)
        found = await vm.console.expect(rb"([0-9a-f]{32})  -", timeout=300)
        assert found[1].decode() == hashlib.md5(text).hexdigest()


async def test_reset_reboots_with_memory_loaded_afresh(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd) as vm:
        for _ in range(2):
            await vm.console.expect(READY, timeout=120)
            vm.console.write(b"reboot -f\n")
        await vm.console.expect(READY, timeout=120)
        assert vm.outcome is None


@booted_only("a restored VM knows its kernel by name")
async def test_reset_reads_the_kernel_that_was_booted(debian: Fetched, tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    shutil.copyfile(debian.kernel, kernel)
    before = held()["mappings"]
    async with avmm.boot(kernel, debian.initrd) as vm:
        await vm.console.expect(READY, timeout=120)
        kernel.rename(tmp_path / "vmlinuz.old")
        kernel.touch()  # what has its name now
        vm.console.write(b"reboot -f\n")
        await vm.console.expect(READY, timeout=120)
        with (tmp_path / "vmlinuz.old").open("r+b") as stream:
            stream.write(b"MZ")  # which is what was there: that it was written to is enough
        vm.console.write(b"reboot -f\n")
        outcome = await vm.wait(timeout=120)
    assert outcome.reason == "fault"
    assert "written to since the VM was started" in str(outcome.error)
    assert not held()["mappings"] - before  # though the error has its traceback


async def test_reset_ends_a_vm_that_does_not_reboot(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd, reboot=False) as vm:
        await vm.console.expect(READY, timeout=120)
        vm.console.write(b"reboot -f\n")
        assert await vm.wait() == avmm.Outcome("reset")


@booted_only("it never comes up")
@pytest.mark.parametrize("timeout", ["-1", "0"], ids=["panic=-1 resets", "panic=0 stays down"])
async def test_a_panic_wakes_whoever_waits(debian: Fetched, timeout: str) -> None:
    async with avmm.boot(debian.kernel, append=f"panic={timeout}") as vm:  # no initrd, no disk: no root
        with pytest.raises(avmm.GuestPanic, match="VFS: Unable to mount root fs"):
            await vm.console.expect(rb"never", timeout=120)
        outcome = await vm.wait()
        assert outcome.reason == "panic"
        assert isinstance(outcome.error, avmm.GuestPanic)


@booted_only("it panics before anything is ready")
async def test_a_panic_in_the_middle_of_a_line(debian: Fetched, with_init: Callable[[str], Path]) -> None:
    initrd = with_init("printf 'half a line'; exit 3")
    async with avmm.boot(debian.kernel, initrd, append="avmm.init=/test-init", reboot=False) as vm:
        outcome = await vm.wait(timeout=120)
    assert b"half a line[" in vm.console.output
    assert outcome.reason == "panic"
    assert "Attempted to kill init" in str(outcome.error)


@booted_only("it never comes up")
async def test_a_panic_whose_text_is_still_on_its_way(debian: Fetched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that resets at once has reset before what it printed is delivered: here, nothing is until the end."""
    monkeypatch.setattr(serial, "GATHER", 1000.0)
    async with avmm.boot(debian.kernel, append="panic=-1", reboot=False) as vm:
        outcome = await vm.wait()
    assert isinstance(outcome.error, avmm.GuestPanic)
    assert outcome.reason == "panic"


async def test_several_machines_in_one_process(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd) as one, avmm.boot(debian.kernel, debian.initrd) as two:
        for number, vm in enumerate((one, two)):
            await vm.console.expect(READY, timeout=240)
            vm.console.write(b"echo $((4%d + 0))\n" % number)
        assert await one.console.expect(rb"\n40\D", timeout=60)
        assert await two.console.expect(rb"\n41\D", timeout=60)


async def test_pause_stops_the_guest_and_resume_goes_on(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd, cpus=2) as vm:
        await vm.console.expect(READY, timeout=120)
        for _ in range(20):
            await vm.pause()
            before = vm.counters()["exits"]
            vm.console.write(b"echo $((600 + 66))\n")
            await asyncio.sleep(0)
            assert vm.counters()["exits"] == before
            await vm.resume()
            assert await vm.console.expect(rb"\n666\D", timeout=60)


@booted_only("is about a boot")
async def test_cancelling_leaves_nothing_behind(debian: Fetched) -> None:
    async def use() -> None:
        async with avmm.boot(debian.kernel, debian.initrd, cpus=2) as vm:
            await vm.console.expect(rb"Booting Linux", timeout=120)
            await vm.wait()

    task = asyncio.create_task(use())
    await asyncio.sleep(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # What is left is checked after every test here: see conftest's `nothing_left`.


async def test_without_a_block_the_vm_is_stopped_by_hand(debian: Fetched) -> None:
    vm = await avmm.boot(debian.kernel, debian.initrd)
    await vm.console.expect(rb"Booting Linux", timeout=120)
    await vm.stop()
    await vm.stop()
    assert (await vm.wait()).reason == "stopped"
    with pytest.raises(avmm.ConfigError, match="starts once"):
        await vm.start()


@booted_only("it ends by itself")
async def test_an_init_of_the_tests_own(with_init: Callable[[str], Path], debian: Fetched) -> None:
    initrd = with_init("echo BOOT-OK; poweroff -f\n")
    async with avmm.boot(debian.kernel, initrd, append="avmm.init=/test-init") as vm:
        await vm.console.expect(rb"BOOT-OK", timeout=120)
        assert (await vm.wait()).reason == "power-off"
