"""Fork of a booted VM to a first command's output in the twin; beside QEMU from boot and from a snapshot in a file.

python bench/fork.py [-n RUNS] [--twins 50] [--forks 1000] [-m MIB]

Per run, in turn: a fork and a restore of ours, QEMU's boot to its prompt, QEMU's -loadvm of a qcow2 and -incoming of a
migration stream. Each ends with the output of `echo` in the guest's shell. Then: memory and CPU of many idle twins,
forks in a row and what they leave behind, and what a snapshot costs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from side_by_side import QEMU, guest, headline, require_qemu

import avmm

PROMPT = rb"~ # "


async def echo(vm: avmm.VirtualMachine, number: int) -> None:
    vm.console.write(b"echo $((%d + 0))\n" % number)
    await vm.console.expect(rb"\n%d\r" % number, timeout=60)


class Qemu:
    """A QEMU with its console on a pipe and its monitor on a socket."""

    def __init__(self, folder: str, memory: int, *more: str) -> None:
        fetched = guest()
        self.monitor_path = os.path.join(folder, "monitor")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.monitor_path)
        argv = QEMU.command(fetched.kernel, fetched.initrd, memory, 1, "")
        argv += ["-monitor", f"unix:{self.monitor_path},server,nowait", *more]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.seen = b""

    def until(self, wanted: bytes) -> None:
        assert self.process.stdout is not None
        while wanted not in self.seen:
            piece = os.read(self.process.stdout.fileno(), 65536)
            if not piece:
                raise SystemExit(f"QEMU ended before {wanted!r}: {self.seen[-500:]!r}")
            self.seen += piece
        self.seen = self.seen.partition(wanted)[2]

    def type(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def echo(self, number: int) -> None:
        self.type(b"echo $((%d + 0))" % number)
        self.until(b"\n%d\r" % number)

    def command(self, text: str) -> bytes:
        """To the monitor, until it is done; what it said."""
        with socket.socket(socket.AF_UNIX) as monitor:
            while True:
                try:
                    monitor.connect(self.monitor_path)
                    break
                except (FileNotFoundError, ConnectionRefusedError):  # it has not come so far
                    if self.process.poll() is not None:
                        raise SystemExit("QEMU ended") from None
                    time.sleep(0.001)
            said = b""
            for line in ("", text):
                if line:
                    monitor.sendall(line.encode() + b"\n")
                    said = b""
                while not said.endswith(b"(qemu) "):
                    piece = monitor.recv(65536)
                    if not piece:
                        raise SystemExit(f"QEMU hung up at {text!r}: {said!r}")
                    said += piece
            return said

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def qemu(folder: str, memory: int, *more: str) -> Iterator[Qemu]:
    machine = Qemu(folder, memory, *more)
    try:
        yield machine
    finally:
        machine.close()


def prepare_qemu(folder: str, memory: int) -> tuple[list[str], list[str]]:
    """Snapshot a booted guest both ways; how to go on from each."""
    disk = os.path.join(folder, "state.qcow2")
    stream = os.path.join(folder, "stream")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "1M"], check=True)
    drive = ["-drive", f"if=none,format=qcow2,file={disk}"]
    with qemu(folder, memory, *drive) as machine:
        machine.until(b"~ # ")
        machine.command("savevm booted")
        machine.command(f'migrate "exec:cat >{stream}"')
    return [*drive, "-loadvm", "booted"], [*drive, "-incoming", f"exec:cat {stream}"]


def time_qemu(folder: str, memory: int, more: list[str], booting: bool, number: int) -> float:
    began = time.perf_counter()
    with qemu(folder, memory, *more) as machine:
        if booting:
            machine.until(b"~ # ")
        elif "-incoming" in more:  # what is typed before it is in would be lost
            while b"running" not in machine.command("info status"):
                pass
        machine.echo(number)
        return (time.perf_counter() - began) * 1e3


def held() -> tuple[int, int, int]:
    """File descriptors, threads, mappings of this process."""
    return len(os.listdir("/proc/self/fd")), threading.active_count(), Path("/proc/self/maps").read_text().count("\n")


def own_mib() -> float:
    """Memory that is this process's alone or in its unnamed files, in MiB: what one more twin adds to."""
    wanted = ("Private_Dirty:", "Private_Clean:")
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(wanted)) / 1024


def show(name: str, values: list[float]) -> None:
    print(f"{name:34s} median {statistics.median(values):8.1f} ms   min {min(values):8.1f}   max {max(values):8.1f}   "
          f"n={len(values)}", flush=True)  # fmt: skip


async def run(args: argparse.Namespace, folder: str) -> None:
    fetched = guest()
    loadvm, incoming = prepare_qemu(folder, args.memory) if args.qemu else ([], [])
    async with avmm.boot(fetched.kernel, fetched.initrd, memory=f"{args.memory}M", agent=False) as vm:
        await vm.console.expect(PROMPT, timeout=120)
        await echo(vm, 1)
        snapshot = os.path.join(folder, "snapshot")
        costs = []
        for _ in range(3):
            began = time.perf_counter()
            await vm.snapshot(snapshot)
            costs.append(time.perf_counter() - began)
        stored = os.stat(snapshot).st_blocks * 512
        times: dict[str, list[float]] = {}
        for turn in range(args.n + 1):  # the first warms up
            began = time.perf_counter()
            async with vm.fork() as twin:
                there = time.perf_counter()
                await echo(twin, 1000 + turn)
                out = time.perf_counter()
            found = {"avmm fork: twin is there": there - began, "avmm fork: its first output": out - began}
            began = time.perf_counter()
            async with avmm.restore(snapshot) as again:
                await echo(again, 2000 + turn)
                found["avmm restore: first output"] = time.perf_counter() - began
            if turn:
                for name, seconds in found.items():
                    times.setdefault(name, []).append(seconds * 1e3)
            if args.qemu and turn <= args.qemu_runs:
                for name, more, booting in (
                    ("QEMU boot: first output", [], True),
                    ("QEMU -loadvm: first output", loadvm, False),
                    ("QEMU -incoming: first output", incoming, False),
                ):
                    value = await asyncio.to_thread(time_qemu, folder, args.memory, more, booting, 3000 + turn)
                    if turn:
                        times.setdefault(name, []).append(value)
        for name, values in times.items():
            show(name, values)
        print(f"snapshot to disk: {statistics.median(costs):.2f} s; {args.memory} MiB RAM, {stored >> 20} MiB stored:"
              f" {statistics.median(costs) / args.memory * 1024:.2f} s a GiB of RAM,"
              f" {statistics.median(costs) / stored * (1 << 30):.2f} s a GiB stored", flush=True)  # fmt: skip
        await many(vm, args.twins)
        await row(vm, args.forks)


async def many(vm: avmm.VirtualMachine, count: int) -> None:
    """Memory and CPU of idle twins."""
    gc.collect()
    before = own_mib()
    async with contextlib.AsyncExitStack() as stack:
        twins = [await stack.enter_async_context(vm.fork()) for _ in range(count)]
        await asyncio.sleep(2)
        idle = own_mib()
        cpu = time.process_time()
        await asyncio.sleep(5)
        cpu = (time.process_time() - cpu) / 5 * 100
        for number, twin in enumerate(twins):
            await echo(twin, 5000 + number)
        used = own_mib()
        print(f"{count} twins at once: {(idle - before) / count:.2f} MiB each when idle,"
              f" {(used - before) / count:.2f} after a command; {cpu:.1f} % of a CPU for all", flush=True)  # fmt: skip


async def row(vm: avmm.VirtualMachine, count: int) -> None:
    """Forks one after the other, and what they leave."""
    for _ in range(10):
        async with vm.fork():
            pass
    gc.collect()
    before, memory, began = held(), own_mib(), time.perf_counter()
    for number in range(count):
        async with vm.fork() as twin:
            if number % 10 == 0:
                await echo(twin, 7000 + number)
    gc.collect()
    after = held()
    each = (time.perf_counter() - began) / count * 1e3
    names = ("file descriptors", "threads", "mappings")
    left = ", ".join(f"{name} {first} -> {last}" for name, first, last in zip(names, before, after, strict=True))
    print(f"{count} forks in a row, {each:.1f} ms each: {left}, memory {memory:.0f} -> {own_mib():.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=20, help="counted runs of each of ours")
    parser.add_argument("--qemu-runs", type=int, default=3, help="counted runs of each of QEMU's")
    parser.add_argument("-m", "--memory", type=int, default=512, help="MiB")
    parser.add_argument("--twins", type=int, default=50)
    parser.add_argument("--forks", type=int, default=1000)
    parser.add_argument("--no-qemu", dest="qemu", action="store_false")
    args = parser.parse_args()
    if args.qemu:
        require_qemu()
    headline(f"fork and restore of a booted {args.memory} MiB VM: {guest().version}, 1 vCPU")
    folder = tempfile.mkdtemp(prefix="avmm-bench-")
    try:
        asyncio.run(run(args, folder))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
