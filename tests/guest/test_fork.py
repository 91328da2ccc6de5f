"""A booted VM has twins: each goes on from the same moment and then its own way."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import pytest

import avmm
from avmm.debian import Fetched
from tests.guest.conftest import READY, booted_only, fetch_or_skip, shell

pytestmark = pytest.mark.guest


async def answer(vm: avmm.VirtualMachine, command: str, timeout: float = 60) -> str:
    """What the guest's shell prints for ``command``."""
    return (await shell(vm, command, timeout))[1]


async def prompt(vm: avmm.VirtualMachine) -> None:
    await vm.console.expect(READY, timeout=120)
    await vm.console.expect(rb"# ", timeout=60)


async def test_a_twin_goes_on_from_the_same_moment(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd) as vm:
        await prompt(vm)
        await answer(vm, "echo before >/tmp/state; mkdir /tmp/d")
        before = vm.console.output
        async with vm.fork() as twin:
            assert twin.console.output.startswith(before)
            assert await answer(twin, "cat /tmp/state; ls -d /tmp/d; echo twin >/tmp/state") == "before\n/tmp/d\n"
            assert await answer(vm, "cat /tmp/state; echo parent >/tmp/state") == "before\n"
            async with twin.fork() as grandchild:
                assert await answer(grandchild, "cat /tmp/state") == "twin\n"
            assert await answer(vm, "cat /tmp/state") == "parent\n"
            twin.console.write(b"poweroff -f\n")
            assert (await twin.wait()).reason == "power-off"
        assert await answer(vm, "cat /tmp/state") == "parent\n"


async def test_several_at_once_and_the_parent_may_go_first(debian: Fetched) -> None:
    vm = await avmm.boot(debian.kernel, debian.initrd)
    await prompt(vm)
    twins = await asyncio.gather(*(vm.fork() for _ in range(5)))
    await vm.stop()
    said = await asyncio.gather(*(answer(twin, f"echo $(({number} * 11))") for number, twin in enumerate(twins)))
    assert said == [f"{number * 11}\n" for number in range(5)]
    # The last one standing may be forked as well.
    for twin in twins[1:]:
        await twin.stop()
    async with twins[0].fork() as last:
        assert await answer(last, "echo last") == "last\n"
    await twins[0].stop()
    with pytest.raises(avmm.ConfigError, match="it is stopped"):
        await vm.fork()


async def test_four_vcpus_go_on(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd, cpus=4) as vm:
        await prompt(vm)
        async with vm.fork() as twin:
            for one in (twin, vm):
                script = "for n in 0 1 2 3; do taskset $((1 << n)) sh -c 'echo on $(nproc)' & done; wait"
                assert (await answer(one, script)).count("on 1\n") == 4


async def test_guest_time_stands_still_while_paused(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd) as vm:
        await prompt(vm)
        began = time.monotonic()
        before = float((await answer(vm, "cat /proc/uptime")).split()[0])
        await vm.pause()
        await asyncio.sleep(3)
        await vm.resume()
        async with vm.fork() as twin:
            for one in (vm, twin):
                now = float((await answer(one, "cat /proc/uptime")).split()[0])
                assert now - before < time.monotonic() - began - 2


async def test_a_timer_that_was_armed_fires_in_both(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd, cpus=2) as vm:
        await prompt(vm)
        began = time.monotonic()
        vm.console.write(b"cat /proc/uptime; sleep 1; cat /proc/uptime; echo SLE''PT\n")
        await vm.console.expect(rb"\n\d+\.\d+ ", timeout=60)
        async with vm.fork() as twin:
            for one in (twin, vm):
                await one.console.expect(b"SLEPT", timeout=60)
                first, last = (float(text) for text in re.findall(rb"\n(\d+\.\d+) \d+", one.console.output)[-2:])
                assert 1.0 <= last - first <= time.monotonic() - began + 0.1


async def test_a_twin_resets_like_any_machine(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd) as vm:
        await prompt(vm)
        async with vm.fork() as twin:
            twin.console.write(b"reboot -f\n")
            await prompt(twin)
            assert await answer(twin, "echo again") == "again\n"


async def test_the_parent_runs_on_whatever_happens_to_the_fork(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd, cpus=2, drives=[]) as vm:
        await prompt(vm)
        for turns in range(12):
            task = asyncio.create_task(_forked(vm))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert vm.state == "running"
        assert await answer(vm, "echo alive") == "alive\n"


async def _forked(vm: avmm.VirtualMachine) -> None:
    async with vm.fork():
        pass


async def test_a_paused_parent_stays_paused(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd) as vm:
        await prompt(vm)
        await vm.pause()
        async with vm.fork() as twin:
            assert await answer(twin, "echo twin") == "twin\n"
            assert vm.state == "paused"
        await vm.resume()
        assert await answer(vm, "echo parent") == "parent\n"


@booted_only("looks at the disk's file, which a restored VM does not write to")
async def test_disks_of_twins_are_their_own(debian: Fetched, tmp_path: Path) -> None:
    disk, read_only = tmp_path / "disk.img", tmp_path / "ro.img"
    for path in (disk, read_only):
        path.write_bytes(b"original" * 131072 * 8)
    async with avmm.boot(debian.kernel, debian.initrd, drives=[disk, f"{read_only},ro"]) as vm:
        await prompt(vm)
        await answer(vm, "echo before | dd of=/dev/vda conv=fsync,notrunc 2>/dev/null")
        async with vm.fork() as twin, vm.fork() as other:
            await answer(vm, "echo parent | dd of=/dev/vda conv=fsync,notrunc bs=4k seek=1 2>/dev/null")
            await answer(twin, "echo twins! | dd of=/dev/vda conv=fsync,notrunc bs=4k seek=2 2>/dev/null")
            async with twin.fork() as grandchild:
                look = "for n in 0 1 2; do dd if=/dev/vda iflag=direct bs=4k skip=$n count=1 2>/dev/null | "
                look += "head -c 6; echo; done"
                look += "; head -c 8 /dev/vdb"
                said = {}
                for name, one in (("vm", vm), ("twin", twin), ("other", other), ("grandchild", grandchild)):
                    said[name] = (await answer(one, look)).split()
            assert said["vm"] == ["before", "parent", "origin", "original"]
            assert said["twin"] == said["grandchild"] == ["before", "origin", "twins!", "original"]
            assert said["other"] == ["before", "origin", "origin", "original"]
    content = disk.read_bytes()
    assert content.startswith(b"before\n")
    assert content[4096:].startswith(b"parent\n")
    assert content[8192:].startswith(b"original")


@pytest.mark.parametrize("release", ["bookworm", "bullseye"])
async def test_twins_of_one_moment_differ_and_know_the_time(release: str) -> None:
    """Also where the kernel does not look at the VM's generation (Linux 6.1, 5.10): the agent sees to it, before the
    first command. Without that the twins of a parent that stands still draw the same numbers."""
    guest = fetch_or_skip("cloud", release)
    async with avmm.boot(guest.kernel, guest.initrd, cpus=2) as vm:
        await vm.console.expect(READY, timeout=120)
        await vm.check("date", "-s", "2001-01-01 00:00:00", timeout=60)
        await vm.pause()
        look = "for cpu in 0 1; do taskset $((1 << cpu)) head -c 16 /dev/urandom | md5sum; done; date +%s"
        drawn = set()
        for _ in range(3):
            async with vm.fork() as twin:
                *numbers, now = (await twin.check("sh", "-c", look, timeout=60)).stdout.splitlines()
                assert abs(int(now) - time.time()) < 30
                drawn |= set(numbers)
        assert len(drawn) == 6
        await vm.resume()
        assert (await vm.check("date", "+%Y", timeout=60)).stdout == b"2001\n"


async def test_a_twin_has_random_numbers_of_its_own() -> None:
    guest = fetch_or_skip("cloud", "trixie")  # Linux 6.10 and later look at the VM's generation
    async with avmm.boot(guest.kernel, guest.initrd) as vm:
        await prompt(vm)
        said = []
        for _ in range(2):
            async with vm.fork() as twin:
                said.append(await answer(twin, "head -c 16 /dev/urandom | md5sum"))
                await answer(twin, "until dmesg | grep 'crng reseeded due to virtual machine fork'; do sleep 0.1; done")
        assert said[0] != said[1]
