"""Everything dies at random moments: whoever waits is told why within a second, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

import avmm
from avmm.debian import Fetched
from tests.conftest import AVMM_BOOT

pytestmark = pytest.mark.guest

#: How a guest or its agent dies, and what its waiters are told.
DEATHS = {
    "agent": (b"killall -9 agent\n", "agent"),
    "power-off": (b"poweroff -f\n", "powered off"),
    "panic": (b"echo c >/proc/sysrq-trigger\n", "panicked"),
    "reset": (b"reboot -f\n", "reset"),
    "stop": (b"", "stopped"),
}


async def tell(wait: Coroutine[Any, Any, object], told: list[float]) -> BaseException | None:
    """Why ``wait`` ended early, and in ``told`` when; None when it was done before."""
    try:
        await wait
    except avmm.GuestError as error:
        told.append(time.monotonic())
        return error
    return None


@pytest.mark.parametrize("how", DEATHS)
async def test_waiters_are_told(debian: Fetched, how: str) -> None:
    typed, reason = DEATHS[how]
    dice = random.Random(how)
    async with avmm.boot(debian.kernel, debian.initrd, memory="256M", reboot=False) as template:
        await template.console.expect(rb"# ", timeout=120)
        for _ in range(4):
            async with template.fork() as vm:
                process = await vm.popen("sh", "-c", "while :; do echo line; done", timeout=30)
                waits: list[Coroutine[Any, Any, object]] = [
                    vm.run("sleep", "1000"),
                    vm.run("cat", input=dice.randbytes(1_000_000)),
                    vm.run("true", cwd="/proc/1"),
                    vm.put(None, "/tmp/x", content=bytes(50_000_000)),
                    process.wait(),
                    process.stdout.read(),
                ]
                if how != "agent":
                    waits.append(vm.console.expect(rb"never"))
                told: list[float] = []
                tasks = [asyncio.create_task(tell(each, told)) for each in waits]
                await asyncio.sleep(dice.uniform(0, 0.1))
                if typed:
                    vm.console.write(typed)
                else:
                    await vm.stop()
                errors = await asyncio.wait_for(asyncio.gather(*tasks), 60)
                assert len(told) >= 3
                assert max(told) - min(told) < 10  # not each when its own time is up
                assert all(error is None or reason in str(error) for error in errors), errors


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_vmm_that_is_killed_leaves_nothing(debian: Fetched, number: int) -> None:
    """No file, process or socket of it is left; the next one starts as if nothing had been."""
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}") / "avmm"
    argv = [*AVMM_BOOT, str(debian.kernel), str(debian.initrd), "--", "sleep", "1000"]
    for delay in (0.3, 1.0, 2.5):
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(delay)  # a random moment of its life, not a wait for anything
            process.send_signal(number)
            try:
                code = process.wait(30)
            finally:
                process.kill()
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
