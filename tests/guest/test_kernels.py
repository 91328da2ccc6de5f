"""Kernels old and new, with 4, 16 and 64 KiB pages, from 64 MiB to 16 GiB of memory; Debian's installer.

Debian builds no kernel with 64 KiB pages: we do, from its source (linux64k.py).
"""

from __future__ import annotations

import re
import shutil

import pytest

import avmm
from tests.guest.conftest import READY, booted_only, fetch_or_skip
from tests.guest.rootfs import Shell, booted, files_of, rootfs

pytestmark = pytest.mark.guest

#: What the kernel finds in the ID registers, by the names it gives: exactly what the engine advertises.
FEATURES = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics cpuid asimdrdm lrcpc dcpop asimddp dit flagm ssbs sb dcpodp"
)

#: Release, flavour, version, KiB in a page.
SHORT = [("bullseye", "cloud", r"5\.10\.", 4), ("trixie", "cloud", r"6\.12\.", 4)]
LONG = [
    ("bullseye", "generic", r"5\.10\.", 4),
    ("trixie", "generic", r"6\.12\.", 4),
    ("trixie", "16k", r"6\.12\.", 16),
    ("sid", "cloud", r"[7-9]\.", 4),
    ("sid", "generic", r"[7-9]\.", 4),
    ("sid", "16k", r"[7-9]\.", 16),
    ("bookworm", "64k", r"6\.1\.", 64),
]
LARGE_PAGES = [("trixie", "16k"), ("sid", "16k"), ("bookworm", "64k")]


@pytest.mark.parametrize("cpus", [1, 4])
@pytest.mark.parametrize(
    ("release", "flavour", "version", "page"),
    SHORT + [pytest.param(*kernel, marks=pytest.mark.soak) for kernel in LONG],
)
async def test_kernel(release: str, flavour: str, version: str, page: int, cpus: int) -> None:
    guest = fetch_or_skip(flavour, release)
    async with avmm.boot(guest.kernel, guest.initrd, cpus=cpus) as vm:
        await vm.console.expect(READY, timeout=120)
        shell = Shell(vm)
        vm.console.write(b"stty -echo; PS1=\n")
        assert re.match(version, await shell.check("uname -r"))
        assert await shell.check("nproc") == f"{cpus}\n"
        assert f"KernelPageSize: {page:8} kB" in await shell.check("cat /proc/self/smaps")
        features = re.findall(r"^Features\s*: (.*)$", await shell.check("cat /proc/cpuinfo"), re.MULTILINE)
        assert features == [FEATURES] * cpus
        # Each process its own pages, table by table: memory that is mapped, shared and copied on write.
        await shell.check("for i in $(seq 40); do (cat /bin/busybox | md5sum) & done | sort -u | wc -l | grep -qx 1")
        assert not re.search("WARNING:|BUG:|Oops|Call trace", await shell.check("dmesg"))
        vm.console.write(b"poweroff -f\n")
        assert await vm.wait() == avmm.Outcome("power-off")


@pytest.mark.parametrize(
    ("release", "flavour"),
    [
        ("bookworm", "cloud"),
        *(pytest.param(*each, marks=pytest.mark.soak) for each in LARGE_PAGES),
    ],
)
@pytest.mark.parametrize("memory", ["64M", "16G"])
async def test_memory(release: str, flavour: str, memory: str) -> None:
    guest = fetch_or_skip(flavour, release)
    size = {"64M": 64 << 20, "16G": 16 << 30}[memory]
    if flavour == "16k" and memory == "64M":
        memory, size = "96M", 96 << 20  # with 64 MiB Debian's 16 KiB kernels run out of it themselves
    async with avmm.boot(guest.kernel, guest.initrd, memory=memory) as vm:
        await vm.console.expect(READY, timeout=120)
        shell = Shell(vm)
        vm.console.write(b"stty -echo; PS1=\n")
        found = re.search(r"MemTotal: +(\d+) kB", await shell.check("cat /proc/meminfo"))
        assert found is not None
        assert 0.5 * size < int(found[1]) << 10 < size
        # The last of it is there: a file as large as half of what is free, or 512 MiB.
        await shell.check(
            "mount -t tmpfs -o size=90% tmpfs /mnt; "
            "free=$(awk '/MemAvailable/ { print int($2 / 2048) }' /proc/meminfo); "
            "[ $free -gt 512 ] && free=512; yes | head -c ${free}M >/mnt/file; md5sum /mnt/file >/mnt/sum; "
            "md5sum -c /mnt/sum",
            timeout=120,
        )


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="unpacks Debian packages with dpkg-deb")
@pytest.mark.parametrize(("release", "flavour"), [("bullseye", "cloud"), ("sid", "cloud"), *LARGE_PAGES])
async def test_debian_s_programs_run_on_each(release: str, flavour: str) -> None:
    guest = fetch_or_skip(flavour, release)
    async with booted(rootfs(["libpython3.11-testsuite"]), guest=guest, cpus=2, memory="1G") as shell:
        tests = "test_float test_mmap test_zlib test_thread test_fork1"
        await shell.check(f"python3.11 -m test {tests}", timeout=600)


@booted_only("it stops at its first question, which is asked anew")
@pytest.mark.soak
async def test_debian_s_installer_asks_its_first_questions() -> None:
    home = "usr/lib/debian-installer/images/12/arm64/text/debian-installer/arm64"
    kernel, initrd = files_of("debian-installer-12-netboot-arm64", [f"{home}/linux", f"{home}/initrd.gz"])
    async with avmm.boot(kernel, initrd, memory="768M", append="DEBIAN_FRONTEND=text") as vm:
        await vm.console.expect(rb"Select a language", timeout=600)
        await vm.console.expect(rb"Prompt: .*> ", timeout=300)
        vm.console.write(b"\n")
        await vm.console.expect(rb"Select your location", timeout=600)
        await vm.console.expect(rb"Prompt: .*> ", timeout=300)
        vm.console.write(b"\n")
        await vm.console.expect(rb"Configure the keyboard", timeout=600)
