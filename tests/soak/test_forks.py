"""Forks in great number, and forks of a guest that is busy with everything at once."""

from __future__ import annotations

import asyncio
import contextlib
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

#: Sleeps of all lengths, on the vCPU that it is started on.
SLEEPER = "n=0; while :; do usleep $((($1 * 7919 + n * 613) % 20000)); n=$((n + 1)); echo $n >/tmp/slept.$1; done"

#: Downloads, one after the other, each checked.
DOWNLOADS = """
while :; do
    wget -qO /tmp/got http://10.0.2.2/ 2>/dev/null || { echo >>/tmp/cut; usleep 1000; continue; }
    case $(md5sum </tmp/got) in $1*) echo >>/tmp/right;; *) echo >>/tmp/wrong;; esac
done
"""

#: Fills the disk over and over with blocks that say which they are, checks each as it comes back, and tells the clock
#: and the downloads: one line a round. A round ends when each vCPU's sleeper has slept once more, or never.
ROUNDS = r"""
lines() { wc -l </tmp/$1; }
n=0
while :; do
    n=$((n + 1))
    yes "round $n" | dd of=/dev/vda bs=4k count=64 iflag=fullblock conv=notrunc,fsync oflag=direct 2>/dev/null
    wanted=$(yes "round $n" | dd bs=4k count=64 iflag=fullblock 2>/dev/null | md5sum)
    found=$(dd if=/dev/vda iflag=direct bs=4k count=64 2>/dev/null | md5sum)
    for cpu in 0 1 2 3; do
        while grep -qx "$(cat /tmp/slept.$cpu)" /tmp/before.$cpu; do usleep 500; done
        cp /tmp/slept.$cpu /tmp/before.$cpu
    done
    [ "$wanted" = "$found" ] && word=good || word=BAD
    echo "round $n $word at $(cut -d' ' -f1 /proc/uptime): $(lines right) right $(lines wrong) wrong $(lines cut) cut;"
done
"""

START = """
touch /tmp/right /tmp/wrong /tmp/cut
for cpu in 0 1 2 3; do
    echo 0 | tee /tmp/slept.$cpu >/tmp/before.$cpu
    taskset $((1 << cpu)) sh /tmp/sleeper $cpu &
done
until ip -4 addr show dev eth0 | grep -q inet; do usleep 10000; done
sh /tmp/downloads {digest} &
exec sh /tmp/rounds
"""
LINE = rb"round (\d+) (\w+) at ([\d.]+): (\d+) right (\d+) wrong (\d+) cut;"


@pytest.fixture(scope="module")
def debian() -> Fetched:
    return fetch_debian(progress=lambda text: None)


class Busy:
    """A guest under load, and its last round: number, clock, downloads that were right and those that were cut."""

    def __init__(self, vm: avmm.VirtualMachine, last: tuple[int, float, int, int] = (0, 0.0, 0, 0)) -> None:
        self.vm = vm
        self.last = last

    async def catch_up(self) -> None:
        """The rounds that have been shown already."""
        with contextlib.suppress(avmm.WaitTimeout):
            while True:
                await self.round(timeout=0)

    async def round(self, timeout: float = 300) -> None:
        """The next one, which must be good: the data, the clock, the timers, the downloads."""
        line = await self.vm.console.expect(LINE, timeout=timeout)
        number, right, wrong, cut = (int(line[at]) for at in (1, 4, 5, 6))
        before, self.last = self.last, (number, float(line[3]), right, cut)
        assert line[2] == b"good", line[0]
        assert number == before[0] + 1, f"round {before[0]} was followed by {line[0]!r}"
        assert self.last[1] > before[1], f"the clock went from {before[1]} to {line[0]!r}"
        assert wrong == 0, line[0]
        assert not any(self.vm.counters()["guest_errors"].values()), self.vm.counters()["guest_errors"]

    async def download(self) -> None:
        """Rounds until one more download was right."""
        right = self.last[2]
        while self.last[2] == right:
            await self.round()


async def under_load(debian: Fetched, tmp_path: Path, times: int) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    content = os.urandom(300_000)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        await writer.drain()
        writer.close()

    async with avmm.boot(debian.kernel, debian.initrd, cpus=4, drives=[disk], net="user") as vm:
        await prompt(vm)
        vm.net.serve(80, serve)
        for name, text in (("sleeper", SLEEPER), ("downloads", DOWNLOADS), ("rounds", ROUNDS)):
            await vm.put(None, f"/tmp/{name}", content=text.encode())
        start = START.format(digest=hashlib.md5(content).hexdigest())
        await vm.put(None, "/tmp/start", content=start.encode())
        vm.console.write(b"sh /tmp/start\n")
        ours = Busy(vm)
        await ours.download()
        for _ in range(times):
            await vm.pause()  # so that what is looked at below is what came after the fork
            before = ours.last
            async with vm.fork() as twin:
                theirs = Busy(twin, before)
                await asyncio.gather(ours.catch_up(), theirs.catch_up())
                assert theirs.last == ours.last
                await vm.resume()
                # The connection that was under way is the parent's: who waits for it in the twin waits in vain.
                await twin.run("killall", "wget", timeout=300)
                await asyncio.gather(theirs.download(), ours.round())
                assert theirs.last[3] <= 2, f"{theirs.last[3]} downloads of the twin were cut"
        await ours.download()
        assert ours.last[3] == 0, "a download of the parent was cut"
        assert not re.search(rb"BUG|stall", vm.console.output), vm.console.output[-4000:]


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
