"""Everything dies at random moments: whoever waits is told within a second, with the right reason, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import avmm
from avmm.debian import Fetched

pytestmark = pytest.mark.guest

#: How a guest or its agent dies, and what its waiters are told.
DEATHS = {
    "agent": (b"killall -9 agent\n", "agent"),
    "power-off": (b"poweroff -f\n", "powered off"),
    "panic": (b"echo c >/proc/sysrq-trigger\n", "panicked"),
    "reset": (b"reboot -f\n", "reset"),
    "stop": (b"", "stopped"),
}


@pytest.mark.parametrize("how", DEATHS)
async def test_waiters_are_told(debian: Fetched, how: str) -> None:
    typed, reason = DEATHS[how]
    dice = random.Random(how)
    async with avmm.boot(debian.kernel, debian.initrd, memory="256M", reboot=False) as template:
        await template.console.expect(rb"# ", timeout=120)
        for _ in range(4):
            async with template.fork() as vm:
                process = await vm.popen("sh", "-c", "while :; do echo line; done", timeout=30)
                waits = [
                    vm.run("sleep", "1000"), vm.run("cat", input=dice.randbytes(1_000_000)), process.wait(),
                    vm.put(None, "/tmp/x", content=bytes(50_000_000)), process.stdout.read(), vm.run("true", cwd="/proc/1"),
                ]  # fmt: skip
                if how != "agent":
                    waits.append(vm.console.expect(rb"never"))
                told = []

                async def tell(wait: object, told: list[float] = told) -> BaseException | None:
                    try:
                        await wait  # type: ignore[misc] # one of many kinds
                    except avmm.GuestError as error:
                        told.append(time.monotonic())
                        return error
                    return None  # it was done before

                tasks = [asyncio.create_task(tell(each)) for each in waits]
                await asyncio.sleep(dice.uniform(0, 0.1))
                if typed:
                    vm.console.write(typed)
                else:
                    await vm.stop()
                errors = await asyncio.wait_for(asyncio.gather(*tasks), 60)
                assert len(told) >= 3
                assert max(told) - min(told) < 1
                for error in errors:
                    assert error is None or reason in str(error), error


TEST = """
import asyncio, os, pytest

@pytest.mark.avmm(memory="256M")
@pytest.mark.parametrize("n", range(3))
async def test_it(vm, n):
    print("at work", flush=True)
    await vm.run("sleep", "1000")
"""


def children(pid: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_vmm_that_is_killed_leaves_nothing(debian: Fetched, number: int) -> None:
    """No file, process or socket of it is left; the next one starts as if nothing had been."""
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}") / "avmm"
    argv = [sys.executable, "-m", "avmm.cli", "boot", str(debian.kernel), str(debian.initrd), "--", "sleep", "1000"]
    for delay in (0.3, 1.0, 2.5):
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(delay)  # a random moment of its life, not a wait for anything
            process.send_signal(number)
            began = time.monotonic()
            code = process.wait(30)
            assert time.monotonic() - began < 5
            assert code in (-number, 128 + number)
    if number != signal.SIGKILL and runtime.is_dir():
        assert not [each for each in runtime.iterdir() if str(process.pid) in each.name]


def test_a_worker_that_is_killed(debian: Fetched, tmp_path: Path) -> None:
    """pytest-xdist says so, starts another, and the run ends."""
    (tmp_path / "test_it.py").write_text("""
import os, signal, pytest

@pytest.mark.avmm(memory="256M")
@pytest.mark.parametrize("n", range(4))
async def test_it(vm, n):
    process = await vm.popen("sleep", "1000")
    if n == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    assert (await vm.run("true")).ok
""")
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
    )
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-n", "1"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "crashed while running 'test_it.py::test_it[1]'" in done.stdout
    assert "1 failed, 3 passed" in done.stdout
