"""Disks and console ports in a real guest."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

import avmm
from avmm.debian import Fetched
from tests.conftest import AVMM_BOOT
from tests.guest import rootfs
from tests.guest.conftest import READY, booted_only, shell

pytestmark = pytest.mark.guest

needs_e2fsprogs = pytest.mark.skipif(shutil.which("e2fsck") is None, reason="needs e2fsprogs")
needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="checks with qemu-img (qemu-utils)")


def run(*argv: object) -> str:
    """A program of the host; its output, both streams. It must succeed."""
    done = subprocess.run([str(arg) for arg in argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


@contextlib.asynccontextmanager
async def mounted(disk: Path, debian: Fetched) -> AsyncIterator[avmm.VirtualMachine]:
    """A guest with a new ext4 on ``disk``, at ``/mnt``."""
    run("mkfs.ext4", "-q", disk)
    async with avmm.boot(debian.kernel, debian.initrd, drives=[disk]) as vm:
        await vm.console.expect(READY, timeout=120)
        code, said = await shell(vm, "mount -t ext4 /dev/vda /mnt")
        assert code == 0, said
        yield vm


@booted_only("looks at the disk's file, which a restored VM does not write to")
@needs_e2fsprogs
async def test_ext4_is_filled_and_clean(debian: Fetched, tmp_path: Path) -> None:
    disk = sparse(tmp_path / "disk.img", 64 << 20)
    async with mounted(disk, debian) as vm:
        code, said = await shell(
            vm, "dd if=/dev/urandom of=/mnt/big bs=64k count=64 2>/dev/null && cp -a /bin/busybox /mnt && "
            "for i in 1 2 3 4 5 6 7 8; do cp /mnt/busybox /mnt/$i; done; rm /mnt/3 /mnt/7; md5sum /mnt/big",
        )  # fmt: skip
        assert code == 0, said
        wanted = said.split()[0]
        code, said = await shell(vm, "umount /mnt && mount -t ext4 -o ro /dev/vda /mnt && md5sum /mnt/big; umount /mnt")
        assert code == 0, said
        assert wanted in said
        assert vm.drives[0].counters["errors"] == 0
        assert set(vm.counters()["guest_errors"].values()) == {0}
    run("e2fsck", "-fn", disk)
    run("debugfs", "-R", f"dump /big {tmp_path}/big", disk)
    assert hashlib.md5((tmp_path / "big").read_bytes()).hexdigest() == wanted


@booted_only("looks at the disk's file, which a restored VM does not write to")
@needs_qemu_img
async def test_qcow2_over_a_backing_file(debian: Fetched, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(os.urandom(16 << 20))
    image = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "raw", image, "32M")
    async with avmm.boot(debian.kernel, debian.initrd, drives=[image]) as vm:
        await vm.console.expect(READY, timeout=120)
        _, said = await shell(vm, "head -c 16777216 /dev/vda | md5sum")
        assert hashlib.md5(base.read_bytes()).hexdigest() in said
        code, said = await shell(
            vm, "dd if=/dev/urandom of=/dev/vda bs=7k seek=300 count=500 conv=fsync && dd if=/dev/zero of=/dev/vda "
            "bs=1M seek=20 count=3 && sync && echo 3 >/proc/sys/vm/drop_caches && md5sum /dev/vda",
        )  # fmt: skip
        assert code == 0, said
    assert "No errors were found" in run("qemu-img", "check", image)
    run("qemu-img", "convert", "-O", "raw", image, tmp_path / "out")
    found = re.search(r"([0-9a-f]{32})  /dev/vda", said)
    assert found is not None
    assert hashlib.md5((tmp_path / "out").read_bytes()).hexdigest() == found[1]


async def test_read_only_snapshot_and_errors(debian: Fetched, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("ro.img", "snapshot.img", "faulty.img")]
    for file in files:
        file.write_bytes(b"original" * 131072)
    drives = [f"{files[0]},ro", f"{files[1]},snapshot", f"{files[2]}"]
    async with avmm.boot(debian.kernel, debian.initrd, drives=drives) as vm:
        await vm.console.expect(READY, timeout=120)
        code, _ = await shell(vm, "echo new | dd of=/dev/vda conv=fsync")
        assert code != 0
        code, said = await shell(vm, "echo new | dd of=/dev/vdb conv=fsync && sync && head -c 3 /dev/vdb")
        assert code == 0
        assert said.endswith("new")
        vm.drives[2].fail(sector=1024, count=8, op="read")
        code, said = await shell(vm, "dd if=/dev/vdc of=/dev/null bs=4k skip=128 count=1 iflag=direct")
        assert code != 0
        assert b"I/O error, dev vdc" in vm.console.output
        vm.drives[2].heal()
        code, said = await shell(vm, "dd if=/dev/vdc of=/dev/null bs=4k skip=128 count=1 iflag=direct")
        assert code == 0, said
    for file in files:
        assert file.read_bytes() == b"original" * 131072


async def test_disks_survive_a_reboot_and_a_pause_in_mid_flight(debian: Fetched, tmp_path: Path) -> None:
    disk = sparse(tmp_path / "disk.img", 16 << 20)
    async with avmm.boot(debian.kernel, debian.initrd, drives=[disk]) as vm:
        await vm.console.expect(READY, timeout=120)
        vm.console.write(b"dd if=/dev/urandom of=/tmp/r bs=1M count=8; md5sum /tmp/r; "
                         b"dd if=/tmp/r of=/dev/vda bs=4k oflag=direct; echo WRIT''TEN; reboot -f\n")  # fmt: skip
        wanted = (await vm.console.expect(rb"([0-9a-f]{32})  /tmp/r", timeout=120))[1].decode()
        for _ in range(10):
            await vm.pause()
            before = dict(vm.drives[0].counters)
            await asyncio.sleep(0.01)
            assert vm.drives[0].counters == before
            await vm.resume()
            await asyncio.sleep(0.01)
        await vm.console.expect(b"WRITTEN", timeout=120)
        await vm.console.expect(READY, timeout=120)
        _, said = await shell(vm, "head -c 8388608 /dev/vda | md5sum")
        assert wanted in said


@needs_qemu_img
@pytest.mark.parametrize("name", ["disk.img", "disk.qcow2"])
def test_what_the_guest_flushed_survives_kill_9(
    name: str, with_init: Callable[[str], Path], debian: Fetched, tmp_path: Path
) -> None:
    disk = tmp_path / name
    run("qemu-img", "create", "-f", "qcow2" if disk.suffix == ".qcow2" else "raw", disk, "64M")
    initrd = with_init("""
i=0
while [ $i -lt 60 ]; do
    yes "block $i" | dd of=/dev/vda bs=64k count=2 seek=$((2 * i)) iflag=fullblock conv=notrunc,fsync 2>/dev/null
    echo "flushed $i"
    i=$((i + 1))
done
sleep 1000
""")
    argv = [*AVMM_BOOT, str(debian.kernel), str(initrd)]
    argv += ["-a", "avmm.init=/test-init", "-d", str(disk)]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        seen = b""
        while b"flushed 20\r" not in seen:
            piece = os.read(process.stdout.fileno(), 65536)
            assert piece, seen
            seen += piece
        process.send_signal(signal.SIGKILL)
        seen += process.stdout.read()
    flushed = max(int(number) for number in re.findall(rb"flushed (\d+)\r", seen))
    assert flushed >= 20
    if disk.suffix == ".qcow2":
        done = subprocess.run(["qemu-img", "check", disk], capture_output=True, text=True)
        assert done.returncode in (0, 3), done.stdout  # 3: nothing worse than clusters without use
    run("qemu-img", "convert", "-O", "raw", disk, tmp_path / "out")
    content = (tmp_path / "out").read_bytes()
    for number in range(flushed + 1):
        line = b"block %d\n" % number
        wanted = (line * (131072 // len(line) + 1))[:131072]
        assert content[number * 131072 :][:131072] == wanted


@contextlib.contextmanager
def small_file_system(folder: Path, size: int) -> Iterator[Path]:
    """A file system of the host's that is soon full."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("mounts a tmpfs, as only root may")
    try:
        yield folder
    finally:
        run("umount", folder)


@booted_only("fills the disk's file, which a restored VM does not write to")
@needs_qemu_img
@pytest.mark.parametrize("name", ["disk.img", "disk.qcow2"])
async def test_a_full_host_disk_is_an_error_in_the_guest(name: str, debian: Fetched, tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small", 8 << 20) as folder:
        disk = folder / name
        run("qemu-img", "create", "-q", "-f", "qcow2" if disk.suffix == ".qcow2" else "raw", disk, "32M")
        async with avmm.boot(debian.kernel, debian.initrd, drives=[disk]) as vm:
            await vm.console.expect(READY, timeout=120)
            write = "dd if=/dev/urandom of={} bs=64k count={} seek={} oflag=direct conv=notrunc"
            code, said = await shell(vm, "head -c 4194304 /dev/urandom >/tmp/kept && md5sum /tmp/kept && "
                                         "dd if=/tmp/kept of=/dev/vda bs=64k oflag=direct && sync")  # fmt: skip
            assert code == 0, said
            kept = said.split()[0]
            code, said = await shell(vm, write.format("/dev/vda", 200, 64))
            assert code != 0
            assert b"I/O error, dev vda" in vm.console.output
            assert vm.drives[0].counters["errors"] > 0
            _, said = await shell(vm, "echo 3 >/proc/sys/vm/drop_caches; head -c 4194304 /dev/vda | md5sum")
            assert kept in said
            # With room again, it goes on.
            run("mount", "-o", "remount,size=64m", folder)
            code, said = await shell(vm, write.format("/dev/vda", 200, 64))
            assert code == 0, said
            _, said = await shell(vm, "echo 3 >/proc/sys/vm/drop_caches; head -c 4194304 /dev/vda | md5sum")
            assert kept in said
            assert set(vm.counters()["guest_errors"].values()) == {0}
        if disk.suffix == ".qcow2":
            run("qemu-img", "check", disk)


@booted_only("looks at the disk's file, which a restored VM does not write to")
@needs_e2fsprogs
@pytest.mark.parametrize("seed", [None, 1, 2])
async def test_a_journal_outlives_a_power_cut(seed: int | None, debian: Fetched, tmp_path: Path) -> None:
    """What a disk with a volatile cache had flushed is there, however much of the rest arrived."""
    disk = sparse(tmp_path / "disk.img", 64 << 20)
    async with mounted(disk, debian) as vm:
        vm.drives[0].hold_writes()
        vm.console.write(
            b"i=0; while i=$((i + 1)); do yes $i | dd of=/mnt/$i bs=64k count=1 iflag=fullblock conv=fsync 2>/dev/null "
            b"|| break; echo fl''ushed $i; done; echo no po''wer\n"
        )
        await vm.console.expect(b"flushed 20\r", timeout=120)
        vm.drives[0].power_cut(seed=seed)
        await vm.console.expect(b"no power", timeout=120)
        flushed = max(int(number) for number in re.findall(rb"flushed (\d+)\r", vm.console.output))
    run("sh", "-c", f"e2fsck -fy {disk} || [ $? = 1 ]")  # 1: it has replayed the journal
    run("e2fsck", "-fn", disk)
    for number in range(1, flushed + 1):
        line = b"%d\n" % number
        run("debugfs", "-R", f"dump /{number} {tmp_path}/found", disk)
        assert (tmp_path / "found").read_bytes() == (line * 65536)[:65536]


async def test_console_ports(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd, ports=["hvc0", "agent"]) as vm:
        await vm.console.expect(READY, timeout=120)
        vm.console.write(b"setsid sh -c 'exec sh </dev/hvc0 >/dev/hvc0 2>&1' &\n")
        terminal, agent = vm.ports["hvc0"], vm.ports["agent"]

        async def hear(text: bytes) -> None:
            heard = b""
            async with asyncio.timeout(60):
                while text not in heard:
                    piece = await terminal.read(4096)
                    assert piece
                    heard += piece

        terminal.write(b"stty -echo; echo $((40 + 2))\n")
        await hear(b"42\r\n")
        vm.resize("hvc0", 132, 50)
        terminal.write(b"while [ \"$(stty size)\" != '50 132' ]; do sleep 0.1; done; echo $((70 + 7))\n")
        await hear(b"77\r\n")
        data = os.urandom(300_000)
        vm.console.write(b"name=$(grep -lx agent /sys/class/virtio-ports/*/name); port=/dev/$(basename ${name%/*})\n")
        vm.console.write(
            b"head -c 300000 $port | tee /tmp/a | md5sum; for n in 1 2 3 4 5 6 7 8; do cat /tmp/a; done >$port\n"
        )
        await asyncio.wait_for(agent.wait_open(), 60)
        agent.write(data)
        found = await vm.console.expect(rb"([0-9a-f]{32})  -", timeout=60)
        assert found[1].decode() == hashlib.md5(data).hexdigest()
        # More than the host holds, and nobody reads: the guest waits, a pause does not.
        async with asyncio.timeout(60):
            for _ in range(5):
                await vm.pause()
                await vm.resume()
        back = b""
        async with asyncio.timeout(60):
            while len(back) < 8 * len(data):
                back += await agent.read(1 << 20)
        assert back == 8 * data
    assert await agent.read(1) == b""


async def test_the_guest_has_entropy(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd) as vm:
        await vm.console.expect(READY, timeout=120)
        _, said = await shell(vm, "cat /sys/class/misc/hw_random/rng_current; head -c 64 /dev/hwrng | md5sum")
        assert "virtio_rng" in said
        assert hashlib.md5(bytes(64)).hexdigest() not in said


def test_drives_in_the_dry_run_and_in_the_device_tree(debian: Fetched, tmp_path: Path) -> None:
    disk = sparse(tmp_path / "disk.img", 1 << 20)
    argv = [sys.executable, "-m", "avmm.cli", "boot", str(debian.kernel)]
    done = subprocess.run([*argv, "--dry-run", "-d", f"{disk},ro"], capture_output=True, check=True)
    assert json.loads(done.stdout)["drives"] == [
        {"path": str(disk), "format": "raw", "bytes": 1 << 20, "read_only": True, "snapshot": False}
    ]
    tree = tmp_path / "tree.dtb"
    subprocess.run([*argv, "--dump-dtb", str(tree), "-d", str(disk), "-d", str(disk), "--net", "none"], check=True)
    assert tree.read_bytes().count(b"virtio_mmio@") == 4  # two disks, entropy, balloon
    wrong = {f"{tmp_path}/none": "No such file", f"{disk},format=vmdk": "raw or qcow2", "/dev/null": "neither a file"}
    for drive, word in wrong.items():
        refused = subprocess.run([*argv, "-d", drive], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert refused.returncode == 2
        assert word in refused.stderr
        assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("name", ["raw", "qcow2"])
async def test_fio_finds_what_it_wrote(name: str, tmp_path: Path) -> None:
    """Random writes of many sizes, many at a time, over each other's edges; each block read back with its checksum."""
    disk = tmp_path / f"disk.{name}"
    if name == "raw":
        disk.touch()
        os.truncate(disk, 32 << 20)
    else:
        run("qemu-img", "create", "-q", "-f", "qcow2", disk, "32M")
    async with rootfs.booted(rootfs.rootfs(["fio", "e2fsprogs"]), drives=[str(disk)], memory="512M") as guest:
        report = await guest.check(
            "fio --name=v --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=16 --thread --size=24m"
            " --io_size=24m --rw=randwrite --bsrange=4k-64k --verify=crc32c"
            " --do_verify=1 --verify_fatal=1 --end_fsync=1",
            timeout=240,
        )
        assert re.search(r"err= 0", report)
        assert re.search(r"READ:", report)  # it did read back
        # A file system made, used and found clean by the guest itself, with what it no longer needs given back.
        await guest.check(
            "mkfs.ext4 -q -F -E discard /dev/vdb && mount /dev/vdb /mnt && cp -a /usr/share/doc /etc /mnt && "
            "rm -r /mnt/etc && fstrim /mnt && umount /mnt && e2fsck -fn /dev/vdb && mount -o ro /dev/vdb /mnt && "
            "diff -r /usr/share/doc /mnt/doc && umount /mnt", timeout=120,
        )  # fmt: skip
    if name == "qcow2":
        run("qemu-img", "check", "-q", disk)
