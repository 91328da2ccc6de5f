"""Forks in great number, and forks of a guest that is busy with everything at once."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import re
import threading
from pathlib import Path

import pytest

import avmm
from avmm.debian import Fetched, fetch_debian
from tests.guest.test_fork import answer, prompt

#: Fills the disk over and over with blocks that say which they are, checks each as it comes back, and tells the clock:
#: one line a round. Beside it, sleeps of all lengths on every vCPU, each of which must end.
LOAD = r"""
size=64
round() {
    yes "round $1" | dd of=/dev/vda bs=4k count=$size iflag=fullblock conv=notrunc,fsync oflag=direct 2>/dev/null
    wanted=$(yes "round $1" | dd bs=4k count=$size iflag=fullblock 2>/dev/null | md5sum)
    found=$(dd if=/dev/vda iflag=direct bs=4k count=$size 2>/dev/null | md5sum)
    [ "$wanted" = "$found" ] && echo "round $1 good at $(cut -d' ' -f1 /proc/uptime)" || echo "round $1 BAD"
}
sleeper() { while :; do usleep $((($1 * 7919 + 1) % 20000)); echo $1 >/tmp/slept.$1; rm /tmp/slept.$1; done; }
for n in 1 2 3 4; do sleeper $n & done
n=0; while :; do n=$((n + 1)); round $n; done
"""


@pytest.fixture(scope="module")
def debian() -> Fetched:
    return fetch_debian(progress=lambda text: None)


async def rounds(vm: avmm.VirtualMachine, count: int) -> list[tuple[int, float]]:
    """The next rounds of a guest under load: number and time. Each must be good, and time must not go back."""
    found = []
    for _ in range(count):
        line = await vm.console.expect(rb"round (\d+) (?:good at ([\d.]+)|BAD)", timeout=120)
        assert line[2] is not None, line[0]
        found.append((int(line[1]), float(line[2])))
    return found


async def under_load(debian: Fetched, tmp_path: Path, times: int, network: bool = True) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    net = "user" if network else "none"
    async with avmm.boot(debian.kernel, debian.initrd, cpus=4, drives=[disk], net=net) as vm:
        await prompt(vm)
        vm.console.write(b"cat >/tmp/load <<'END'\n" + LOAD.encode() + b"\nEND\n")
        vm.console.write(
            b"sh /tmp/load & "
            b"sh -c 'while ping -c 1 -W 5 10.0.2.2 >/dev/null; do :; done; echo PING $((1 + 1)) LOST' &\n"
        )
        last = (await rounds(vm, 1))[-1]
        for turn in range(times):
            async with vm.fork() as twin:
                (theirs,), (ours,) = await asyncio.gather(rounds(twin, 1), rounds(vm, 1))
                for number, when in (theirs, ours):
                    assert number == last[0] + 1, f"fork {turn}: round {last[0]} was followed by {number}"
                    assert when > last[1], f"fork {turn}: the clock went back"
                sizes = twin.counters()["guest_errors"], vm.counters()["guest_errors"]
                assert not any(sum(each.values()) for each in sizes), sizes
            last = ours
        for one in (vm,):
            assert not re.search(rb"round \d+ BAD", one.console.output)
            assert b"BUG" not in one.console.output, one.console.output[-4000:]
            assert b"stall" not in one.console.output, one.console.output[-4000:]
            if network:
                assert b"PING 2 LOST" not in one.console.output


@pytest.mark.guest
async def test_a_busy_guest_is_forked(debian: Fetched, tmp_path: Path) -> None:
    await under_load(debian, tmp_path, 5)


@pytest.mark.soak
@pytest.mark.guest
async def test_a_busy_guest_is_forked_200_times(debian: Fetched, tmp_path: Path) -> None:
    await under_load(debian, tmp_path, 200)


async def in_a_row(debian: Fetched, times: int) -> None:
    async with avmm.boot(debian.kernel, debian.initrd, memory="256M") as vm:
        await prompt(vm)
        for _ in range(5):
            async with vm.fork():
                pass
        gc.collect()
        before = held()
        for turn in range(times):
            async with vm.fork() as twin:
                if turn % 20 == 0:
                    assert await answer(twin, f"echo {turn}") == f"{turn}\n"
        gc.collect()
        assert held() == before
        assert await answer(vm, "echo alive") == "alive\n"


def held() -> tuple[int, int, int]:
    """File descriptors, threads, and mappings as large as a guest's memory."""
    sizes = [
        int(last, 16) - int(first, 16)
        for first, last in re.findall(r"(?m)^([0-9a-f]+)-([0-9a-f]+) ", Path("/proc/self/maps").read_text())
    ]
    return len(os.listdir("/proc/self/fd")), threading.active_count(), sum(size >= 64 << 20 for size in sizes)


@pytest.mark.guest
async def test_forks_in_a_row_leave_nothing(debian: Fetched) -> None:
    await in_a_row(debian, 60)


@pytest.mark.soak
@pytest.mark.guest
async def test_a_thousand_forks_leave_nothing(debian: Fetched) -> None:
    await in_a_row(debian, 1000)


@pytest.mark.soak
@pytest.mark.guest
async def test_fifty_twins_at_once(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd) as vm:
        await prompt(vm)
        twins = await asyncio.gather(*(vm.fork() for _ in range(50)))
        said = await asyncio.gather(*(answer(twin, f"echo {n} | md5sum") for n, twin in enumerate(twins)))
        sums = [hashlib.md5(b"%d\n" % n).hexdigest() for n in range(50)]
        assert said == [f"{each}  -\n" for each in sums]
        await asyncio.gather(*(twin.stop() for twin in twins))
