"""A command in the guest and its answer, files in and out: avmm's agent beside a shell on QEMU's serial line.

python bench/exec.py [-n COMMANDS] [--size 128]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import time

from side_by_side import CMDLINE, QEMU, guest, headline, require_qemu

import avmm


async def ours(commands: int, mib: int) -> tuple[list[float], float, float]:
    """Seconds of each ``true``; MB/s of a file into the guest and out of it."""
    debian = guest()
    async with avmm.boot(debian.kernel, debian.initrd, memory="1G", append="quiet") as vm:
        await vm.console.expect(rb" ready", timeout=120)
        await vm.run("true")
        times = []
        for _ in range(commands):
            began = time.perf_counter()
            await vm.check("true")
            times.append(time.perf_counter() - began)
        content = os.urandom(mib << 20)
        began = time.perf_counter()
        await vm.put(None, "/tmp/file", content=content)
        put = len(content) / (time.perf_counter() - began) / 1e6
        began = time.perf_counter()
        assert await vm.get("/tmp/file") == content
        got = len(content) / (time.perf_counter() - began) / 1e6
    return times, put, got


def theirs(commands: int) -> list[float]:
    """The same with QEMU: a marker typed at the shell on the serial console, and waited for."""
    debian = guest()
    argv = QEMU.command(debian.kernel, debian.initrd, 1024, 1, "quiet")
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        seen = b""

        def until(text: bytes) -> None:
            nonlocal seen
            while text not in seen:
                seen += os.read(process.stdout.fileno(), 65536)  # type: ignore[union-attr] # of the closure
            seen = seen.partition(text)[2]

        def ask(line: bytes) -> None:
            process.stdin.write(line)  # type: ignore[union-attr] # of the closure
            process.stdin.flush()  # type: ignore[union-attr] # of the closure

        until(b"ready")
        ask(b"stty -echo; PS1=; echo be''gin\n")
        until(b"begin")
        times = []
        for number in range(commands):
            began = time.perf_counter()
            ask(b"/bin/true; echo $? en''d%d.\n" % number)
            until(b"0 end%d." % number)
            times.append(time.perf_counter() - began)
        process.kill()
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=200, help="commands")
    parser.add_argument("--size", type=int, default=128, help="MiB of the file")
    options = parser.parse_args()
    require_qemu()
    headline(f"a command and its answer, and copies; {CMDLINE}")
    times, put, got = asyncio.run(ours(options.n, options.size))
    shell = theirs(options.n)
    for name, values in (("avmm, vm.run('true')", times), ("QEMU, serial shell, /bin/true", shell)):
        values.sort()
        print(f"{name:32s} median {statistics.median(values) * 1e3:6.2f} ms   "
              f"p99 {values[len(values) * 99 // 100] * 1e3:6.2f} ms   n={len(values)}")  # fmt: skip
    print(f"ratio avmm/QEMU: {statistics.median(times) / statistics.median(shell):.3f}")
    print(f"a file of {options.size} MiB: in {put:.0f} MB/s, out {got:.0f} MB/s")


if __name__ == "__main__":
    main()
