"""What a hypervisor may do when a guest executes WFI: the ways of the bug report, and ours, side by side.

The same guest (``firmware/idle``: a timer on each CPU, echo on its serial line; ``firmware/ipi_pingpong``) under each
policy, with an engine that behaves and one that does not, and under QEMU TCG. Policies other than ours exist here only.

python bench/idle_policies.py [-c 1 2 4] [--seconds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import uvloop
from side_by_side import cpu_seconds, headline, require_qemu
from wakeups import IMAGE, connect, post_from_thread

import avmm
import avmm.hardware
from avmm.vcpu.loop import VcpuLoop

PINGPONG = IMAGE.with_name("ipi_pingpong.bin")
HZ = 10  # the guest's ticks a second on each CPU: an idle Linux has about as many
TICKS_HZ = 100  # while lateness is measured
BAD = "early-wfi=0.5,lose-kick=0.2,double-kick=0.3,unknown=0.2,late-vtimer=300us,double-vtimer=0.3,sticky-kick=no"
LOST = 20.0  # seconds after which a guest counts as hung


class Spin(VcpuLoop):
    """WFI goes straight back into the guest: QEMU 11.0, which leaves with EXCP_HLT but never sets ``halted``."""

    def _park(self, deadline):
        return None


class HaltWithoutTimer(VcpuLoop):
    """Halted until an interrupt comes; that the guest's timer can only fire inside the guest is forgotten."""

    def _park(self, deadline):
        return super()._park(None)


class FixedSleep(VcpuLoop):
    """Each WFI sleeps 100 us, and nothing cuts it short."""

    def _park(self, deadline):
        self._doze(100e-6)
        return

    def _doze(self, seconds):
        self._lock.release()
        try:
            time.sleep(seconds)
        finally:
            self._lock.acquire()


class AdaptiveSleep(FixedSleep):
    """After 50 WFIs in quick succession each sleeps, longer and longer up to 5 ms; nothing cuts it short."""

    rapid = 0
    last = 0

    def _park(self, deadline):
        now = time.monotonic_ns()
        self.rapid = self.rapid + 1 if now - self.last < 10_000_000 else 0
        if self.rapid > 50:
            self._doze(min(100e-6 * 2 ** ((self.rapid - 50) // 50), 5e-3))
        self.last = time.monotonic_ns()
        return


class Threshold(VcpuLoop):
    """QEMU up to 10.2: a deadline less than 2 ms away is not slept for."""

    def _park(self, deadline):
        if deadline is not None and deadline - self._clock.now_ns() < 2_000_000:
            return None
        return super()._park(deadline)


POLICIES = {
    "spin": Spin,
    "halt without timer": HaltWithoutTimer,
    "fixed sleep": FixedSleep,
    "adaptive sleep": AdaptiveSleep,
    "2 ms threshold": Threshold,
    "ours, halt poll": VcpuLoop,
    "ours": VcpuLoop,
}


#: Whose hops take so long that a hundred say enough.
SLOW = {"spin", "fixed sleep", "adaptive sleep"}


def waking_by(policy: type[VcpuLoop]):
    """While this lasts, new VMs' vCPUs follow ``policy``."""
    return mock.patch.object(avmm.hardware, "VcpuLoop", policy)


@contextlib.asynccontextmanager
async def guest(policy: str, image: Path, cpus: int, faults: str | None, append: str):
    """A guest whose vCPUs follow ``policy``."""
    halt_poll = "200us" if policy.endswith("halt poll") else 0
    with waking_by(POLICIES[policy]):
        async with avmm.boot(
            image, memory="64M", cpus=cpus, engine="softhv", append=append, faults=faults, halt_poll=halt_poll
        ) as vm:
            yield vm


def quantiles(nanoseconds: list[int]) -> list[float]:
    """Median, 99th percentile, maximum in microseconds."""
    ordered = sorted(nanoseconds)
    return [ordered[len(ordered) // 2] / 1e3, ordered[len(ordered) * 99 // 100] / 1e3, ordered[-1] / 1e3]


async def idle_percent(policy: str, cpus: int, faults: str | None, seconds: float) -> float | None:
    async with guest(policy, IMAGE, cpus, faults, f"hz={HZ}") as vm:
        await vm.console.expect(rb"idle\r\n", timeout=LOST)
        await asyncio.sleep(0.5)
        before, began = time.process_time(), time.monotonic()
        await asyncio.sleep(seconds)
        return (time.process_time() - before) / (time.monotonic() - began) * 100


async def lateness(policy: str, cpus: int, faults: str | None, seconds: float) -> list[float] | None:
    async with guest(policy, IMAGE, cpus, faults, f"hz={TICKS_HZ}") as vm:
        await vm.console.expect(rb"idle\r\n", timeout=LOST)
        await asyncio.sleep(seconds)
        vm.console.write(b"r")
        found = await vm.console.expect(REPORT, timeout=LOST)
        ticks, hz = int(found.group(1)), 24e6
        if ticks < seconds * TICKS_HZ / 2:
            return None  # time stands still
        return [int(figure) / hz * 1e6 for figure in found.groups()[1:]]


REPORT = rb"(?s)ticks (\d+).*lateness_p50 (\d+).*_p99 (\d+).*_max (\d+).*report done"


async def device(policy: str, cpus: int, faults: str | None, number: int) -> list[float]:
    async with guest(policy, IMAGE, cpus, faults, "") as vm:
        mailbox = connect(vm)
        await vm.console.expect(rb"idle\r\n", timeout=LOST)
        return quantiles(await asyncio.wait_for(post_from_thread(mailbox, number), LOST))


async def pingpong(policy: str, cpus: int, faults: str | None) -> float:
    """Microseconds a hop, over as many hops as fit into a while."""
    async with guest(policy, PINGPONG, cpus, faults, f"n={100 if policy in SLOW else 1000}") as vm:
        await asyncio.wait_for(vm.wait(), LOST)
        output = vm.console.output
        trips, ticks = (int(re.search(rb"ring_%s (\d+)" % key, output)[1]) for key in (b"trips", b"ticks"))
        return ticks / 24 / trips / cpus


def attempt(measure):
    """The figure, or None for a guest that hangs."""
    try:
        return uvloop.run(measure)
    except (TimeoutError, avmm.AvmmError):
        return None


def ours(policy: str, cpus: int, faults: str | None, seconds: float) -> dict:
    row = {"idle": attempt(idle_percent(policy, cpus, faults, seconds)),
           "timer": attempt(lateness(policy, cpus, faults, seconds)),
           "hop": attempt(pingpong(policy, cpus, faults))}  # fmt: skip
    row["device"] = attempt(device(policy, cpus, faults, 300))
    return row


def qemu(cpus: int, seconds: float) -> dict:
    """The same guests under QEMU TCG; its serial line's round trip stands for the device interrupt."""

    def run(image: Path, append: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["qemu-system-aarch64", "-M", "virt,gic-version=3", "-cpu", "cortex-a57", "-smp", str(cpus), "-m", "64",
             "-nographic", "-nodefaults", "-serial", "stdio", "-kernel", str(image), "-append", append],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)  # fmt: skip

    def until(process: subprocess.Popen, text: bytes) -> bytes:
        seen = b""
        while text not in seen:
            seen += process.stdout.read(1)
        return seen

    result = {"device": ["-"] * 3}
    with run(IMAGE, f"hz={HZ}") as process:
        until(process, b"idle\r\n")
        time.sleep(0.5)
        before = cpu_seconds(process.pid)
        time.sleep(seconds)
        result["idle"] = (cpu_seconds(process.pid) - before) / seconds * 100
        process.kill()
    with run(IMAGE, f"hz={TICKS_HZ}") as process:
        hz = int(re.search(rb"cntfrq (\d+)", until(process, b"idle\r\n"))[1])
        time.sleep(seconds)
        process.stdin.write(b"r")
        found = re.search(REPORT, until(process, b"report done"))
        result["timer"] = [int(figure) / hz * 1e6 for figure in found.groups()[1:]]
        process.kill()
    with run(PINGPONG, "n=1000") as process:
        output = until(process, b"1..")
        trips, ticks = (int(re.search(rb"ring_%s (\d+)" % key, output)[1]) for key in (b"trips", b"ticks"))
        result["hop"] = ticks / hz * 1e6 / trips / cpus
        process.kill()
    return result


def measure(each: list[int], policies: list[str], seconds: float) -> Iterator[dict]:
    """A row for each number of vCPUs, policy and engine; QEMU's after the others of a number."""
    for cpus in each:
        for policy in policies:
            for engine, faults in (("good", None), ("bad", BAD)):
                yield {"policy": policy, "cpus": cpus, "engine": engine, **ours(policy, cpus, faults, seconds)}
        yield {"policy": "QEMU TCG", "cpus": cpus, "engine": "good", **qemu(cpus, seconds)}


def cell(value, width: int, digits: int = 1) -> str:
    return (
        f"{value:{width}.{digits}f}" if isinstance(value, float) else f"{'hangs' if value is None else value:>{width}}"
    )


def show(row: dict) -> None:
    timer, device = row["timer"] or [None] * 2, row["device"] or [None] * 3
    print(f"{row['policy']:20s} {row['cpus']:4d}  {row['engine']:5s} {cell(row['idle'], 8, 2)}  {cell(timer[0], 9)} "
          f"{cell(timer[1], 9)}  {cell(device[0], 8)} {cell(device[1], 8)} {cell(device[2], 8)}  "
          f"{cell(row['hop'], 8)}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--cpus", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--json", help="write the figures here too")
    args = parser.parse_args()
    require_qemu()
    headline(f"idle policies: {HZ} ticks a second on each CPU; lateness at {TICKS_HZ}; times in us")
    print(f"{'policy':20s} vCPU engine  idle %  timer p50       p99   irq p50      p99      max  us a hop")
    rows = []
    for row in measure(args.cpus, args.policies, args.seconds):
        rows.append(row)
        show(row)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
