"""A machine goes into a file and comes out of it, as often as one likes; a file that is not whole is refused."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

import avmm
from avmm.debian import Fetched
from tests.guest.conftest import booted_only
from tests.guest.test_fork import answer, prompt

pytestmark = pytest.mark.guest


@pytest.mark.parametrize("cpus", [1, 4])
async def test_a_machine_comes_back_as_often_as_one_likes(debian: Fetched, cpus: int, tmp_path: Path) -> None:
    path = tmp_path / "vm"
    async with avmm.boot(debian.kernel, debian.initrd, cpus=cpus) as vm:
        await prompt(vm)
        await answer(vm, "echo before >/tmp/state")
        await vm.pause()
        await vm.snapshot(path)
        before = vm.console.output
        await vm.resume()
        await answer(vm, "echo after >/tmp/state")
    assert path.stat().st_blocks * 512 < 200 << 20, "what is zeroes costs nothing"
    for _ in range(2):
        async with avmm.restore(path) as again:
            assert again.console.output.startswith(before)
            assert await answer(again, "cat /tmp/state; nproc; echo changed >/tmp/state") == f"before\n{cpus}\n"
            # From a file, too, a VM can be forked, written to another file, and reset.
            await again.snapshot(tmp_path / "second")
            async with again.fork() as twin:
                assert await answer(twin, "cat /tmp/state") == "changed\n"
                twin.console.write(b"reboot -f\n")
                await prompt(twin)
                await twin.snapshot(tmp_path / "third")
    for name, state in (("second", "changed\n"), ("third", "")):
        async with avmm.restore(tmp_path / name) as again:
            assert await answer(again, "cat /tmp/state 2>/dev/null") == state


@booted_only("looks at the disk's file, which a restored VM does not write to")
async def test_disks_are_what_they_were(debian: Fetched, tmp_path: Path) -> None:
    content = os.urandom(1 << 20)
    disks = [tmp_path / name for name in ("rw.img", "snapshot.img", "ro.img")]
    for disk in disks:
        disk.write_bytes(content)
    path = tmp_path / "vm"
    write = "echo {0} | dd of=/dev/vda conv=fsync,notrunc 2>/dev/null; "
    write += "echo {0} | dd of=/dev/vdb conv=fsync,notrunc bs=512 seek=300 2>/dev/null"
    look = "for disk in a b c; do dd if=/dev/vd$disk iflag=direct bs=64k 2>/dev/null | md5sum; done"
    drives = [str(disks[0]), f"{disks[1]},snapshot", f"{disks[2]},ro"]
    async with avmm.boot(debian.kernel, debian.initrd, drives=drives) as vm:
        await prompt(vm)
        await answer(vm, write.format("first"))
        wanted = await answer(vm, look)
        await vm.snapshot(path)
        await answer(vm, write.format("later"))
    assert hashlib.md5(content).hexdigest() in wanted.split()
    assert disks[0].read_bytes().startswith(b"later\n")
    for turn in range(2):
        async with avmm.restore(path) as again:
            assert await answer(again, look) == wanted
            await answer(again, write.format(f"turn{turn}"))
            changed = await answer(again, look)
            await again.snapshot(tmp_path / "second")
            async with again.fork() as twin:
                await twin.snapshot(tmp_path / "third")
        for name in ("second", "third"):
            async with avmm.restore(tmp_path / name) as again:
                assert await answer(again, look) == changed
    assert disks[0].read_bytes().startswith(b"later\n")
    for disk in disks[1:]:
        assert disk.read_bytes() == content
    disks[1].write_bytes(content)  # what it held, but who knows
    with pytest.raises(avmm.ImageError, match=r"snapshot\.img has changed"):
        await avmm.restore(path)


async def test_what_is_not_a_whole_snapshot_is_refused(debian: Fetched, tmp_path: Path) -> None:
    path = tmp_path / "vm"
    async with avmm.boot(debian.kernel, debian.initrd, memory="256M") as vm:
        await prompt(vm)
        for bad, word in ((tmp_path, "directory"), (tmp_path / "none" / "vm", "No such file")):
            with pytest.raises(avmm.ConfigError, match=word):
                await vm.snapshot(bad)
        await vm.snapshot(path)
        assert await answer(vm, "echo alive") == "alive\n"
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(whole - 4096)
    with pytest.raises(avmm.ImageError, match="damaged"):
        await avmm.restore(path)
    with pytest.raises(avmm.ImageError, match="not a snapshot"):
        await avmm.restore(debian.kernel)
    assert sorted(os.listdir(tmp_path)) == ["vm"]


async def test_a_snapshot_called_off_leaves_nothing(debian: Fetched, tmp_path: Path) -> None:
    async with avmm.boot(debian.kernel, debian.initrd) as vm:
        await prompt(vm)
        for turns in range(8):
            task = asyncio.create_task(vm.snapshot(tmp_path / "vm"))
            for _ in range(turns * 3):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert vm.state == "running"
            assert os.listdir(tmp_path) == []
        assert await answer(vm, "echo alive") == "alive\n"
