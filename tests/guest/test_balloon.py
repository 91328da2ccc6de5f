"""Memory that a real guest frees goes back to the host, by itself and on request."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import avmm
from avmm.debian import Fetched
from tests.guest.conftest import READY, booted_only, shell

pytestmark = pytest.mark.guest

MIB = 1 << 20


def guest_memory() -> int:
    """Bytes of this process's that are in files that nobody else has: guest RAM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssShmem:"):
            return int(line.split()[1]) << 10
    raise AssertionError


async def until_below(limit: int) -> None:
    """Reports come a while after memory has been freed (Linux: two seconds)."""
    for _ in range(1200):
        if guest_memory() <= limit:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{guest_memory() >> 20} MiB are still there")


@booted_only("counts memory that is shared with a file, which a restored VM has none of")
async def test_what_the_guest_frees_is_given_back(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd, memory="1G") as vm:
        await vm.console.expect(READY, timeout=120)
        before = guest_memory()
        code, said = await shell(vm, "dd if=/dev/zero of=/tmp/filled bs=1M count=256 && md5sum /tmp/filled", 120)
        assert code == 0, said
        filled = guest_memory()
        assert filled - before > 240 * MIB
        code, _ = await shell(vm, "rm /tmp/filled")
        await until_below(before + 64 * MIB)
        assert vm.balloon.returned_bytes > 192 * MIB
        # It is as good as before.
        code, again = await shell(
            vm, "dd if=/dev/zero of=/tmp/filled bs=1M count=256 2>/dev/null && md5sum /tmp/filled", 120
        )
        assert again.split()[0] in said
        assert set(vm.counters()["guest_errors"].values()) == {0}


async def test_resized_and_asked(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd, memory="512M") as vm:
        await vm.console.expect(READY, timeout=120)
        full = await vm.balloon.stats()
        assert 300 * MIB < full["available"] < full["total"] < 512 * MIB
        await vm.balloon.resize(256 * MIB, timeout=60)
        less = await vm.balloon.stats()
        assert 240 * MIB < full["free"] - less["free"] < 272 * MIB
        _, said = await shell(vm, "grep MemTotal /proc/meminfo")
        assert int(said.split()[1]) << 10 == less["total"]
        async with vm.fork() as twin:
            assert twin.balloon.actual == 256 * MIB
            await twin.balloon.resize(0, timeout=60)
            assert (await twin.balloon.stats())["free"] > less["free"] + 200 * MIB
        assert vm.balloon.actual == 256 * MIB
        code, said = await shell(vm, "cp /bin/busybox /tmp/copy && cmp /bin/busybox /tmp/copy")
        assert code == 0, said
        await vm.balloon.resize(0, timeout=60)
        assert (await vm.balloon.stats())["free"] > less["free"] + 200 * MIB
