"""The pytest plugin, as a project that uses it sees it: pytest runs in a folder of its own."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest

import avmm
from avmm.debian import Fetched
from avmm.testing.bundle import write_bundle
from tests.guest.conftest import READY

pytestmark = pytest.mark.guest

TEN_LINES = """
import pytest

@pytest.mark.avmm(memory="512M")
async def test_uname(vm):                       # a copy-on-write fork of a VM booted once
    r = await vm.run("uname", "-r")
    assert r.returncode == 0 and r.stdout.startswith(b"6.1")
"""


BUSY_AT_A_BREAKPOINT = """
async def test_it(vm):
    process = await vm.popen("sh", "-c", "while :; do :; done")
    assert (await vm.run("true")).ok
    breakpoint()
    assert (await vm.run("true", timeout=30)).ok
"""


def run(folder: Path, tests: str, *options: str, mode: str = "auto", code: int = 0) -> str:
    """pytest on a project with one file of ``tests``; what it printed."""
    (folder / "test_it.py").write_text("import asyncio, pytest\n" + tests)
    (folder / "pytest.ini").write_text(
        f"[pytest]\nasyncio_mode = {mode}\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", *options],
        cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_ten_lines_make_it_do(debian: Fetched, tmp_path: Path, mode: str) -> None:
    assert "1 passed" in run(tmp_path, TEN_LINES, mode=mode)


def test_twins_are_isolated_and_booted_once(debian: Fetched, tmp_path: Path) -> None:
    said = run(tmp_path, '''
@pytest.mark.parametrize("n", range(6))
async def test_isolated(vm, n):
    await vm.check("mkdir", "/mine")
    print("boot", (await vm.get("/proc/stat")).split(b"btime")[1].split()[0], vm.timeline)

@pytest.mark.avmm(cpus=2)
async def test_other(vm):
    assert (await vm.check("nproc")).stdout == b"2\\n"

async def test_any(vm_any):
    assert (await vm_any.run("true")).ok

async def test_fresh_and_many(fresh_vm, vm_factory):
    other = await vm_factory(memory="256M")
    assert (await other.check("uname", "-m")).stdout == (await fresh_vm.check("uname", "-m")).stdout
''', "-rP")  # fmt: skip
    assert "10 passed" in said


def test_what_cannot_work_is_said_clearly(debian: Fetched, tmp_path: Path) -> None:
    said = run(tmp_path, '''
@pytest.mark.asyncio(loop_scope="function")
async def test_scope(vm): ...

def test_sync(vm): ...

@pytest.mark.avmm(memry="1G")
async def test_wrong(vm): ...

@pytest.fixture
async def elsewhere(vm): return await vm.run("true")

async def test_another_loop(elsewhere): ...
''', code=1)  # fmt: skip
    for text in (
        "asks for loop_scope='function'",
        "is for `async def` tests",
        "knows no 'memry'",
        "another event loop",
    ):
        assert text in said
    assert "4 errors" in said


def test_a_failure_leaves_a_bundle(debian: Fetched, tmp_path: Path) -> None:
    said = run(tmp_path, '''
@pytest.mark.avmm(net="user")
async def test_fails(vm):
    await vm.check("ping", "-c", "1", "-W", "30", "10.0.2.2")
    vm.console.write(b"echo on the screen\\n")
    await vm.console.expect(rb"\\non the screen")
    asyncio.create_task(vm.run("sleep", "1000"), name="waiter")
    await asyncio.sleep(0)
    assert False

async def test_dies(vm):
    with pytest.raises(Exception, match="powered off"):
        await vm.run("poweroff", "-f")
    assert False
''', "--avmm-artifacts", "kept", code=1)  # fmt: skip
    bundle = tmp_path / "kept" / "test_it.py-test_fails"
    assert f"test_it.py::test_fails: kept/{bundle.name}" in said
    assert "on the screen" in (bundle / "console.txt").read_text()
    assert "on the screen" in (bundle / "screen.txt").read_text()
    assert "<svg" in (bundle / "screen.svg").read_text()
    assert re.search(r"vCPU 0 \(on\)  EL[01]\n  pc [0-9a-f]{16}", (bundle / "registers.txt").read_text())
    assert "name='waiter'" in (bundle / "tasks.txt").read_text()
    devices = json.loads((bundle / "devices.json").read_text())
    assert {"agent", "rng"} <= {device["name"] for device in devices["devices"]}
    (recording,) = bundle.glob("*.pcap")
    if shutil.which("tshark"):
        tshark = ["tshark", "-r", str(recording), "-Y", "icmp", "-T", "fields", "-e", "ip.src"]
        pings = subprocess.run(tshark, capture_output=True, text=True, check=True).stdout.split()
        assert pings == ["10.0.2.15", "10.0.2.2"], "of the twin, whatever its parent sent"
    resume = [sys.executable, "-m", "avmm.cli", "resume", str(bundle), "--timeout", "60"]
    done = subprocess.run(resume, input=b"echo it is $((40 + 2)); poweroff -f\n", capture_output=True, timeout=100)
    assert b"it is 42" in done.stdout, done.stderr
    dead = tmp_path / "kept" / "test_it.py-test_dies"
    assert "registers" in (dead / "missing.txt").read_text()
    assert json.loads((dead / "devices.json").read_text())["outcome"]["reason"] == "power-off"


def test_workers_do_not_meet(debian: Fetched, tmp_path: Path) -> None:
    said = run(tmp_path, '''
@pytest.mark.parametrize("n", range(6))
async def test_twin(vm, n):
    assert (await vm.run("true")).ok
    assert n < 5
''', "-n", "2", code=1)  # fmt: skip
    assert "5 passed" in said
    assert os.listdir(tmp_path / "avmm-failures") == ["test_it.py-test_twin-5"]


def test_breakpoint_holds_the_guest(debian: Fetched, tmp_path: Path) -> None:
    """In the debugger nothing of the guest moves; afterwards it goes on."""
    (tmp_path / "test_it.py").write_text(BUSY_AT_A_BREAKPOINT)
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    exits = "vm.counters()['exits']"
    look = f"import time; time.sleep(0.2); a = {exits}; time.sleep(0.5); print('HELD', {exits} == a)"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no"], input=f"!{look}\nc\n",
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200,
    )  # fmt: skip
    assert "HELD True" in done.stdout, done.stdout
    assert "1 passed" in done.stdout


def test_attach_gives_a_console_at_the_failing_moment(debian: Fetched, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "async def test_it(vm):\n    await vm.check('touch', '/here')\n    assert False\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "--avmm-attach"]
        os.execv(sys.executable, [*argv, "--avmm-artifacts", ""])
    seen = b""
    try:
        for text, answer in ((b"~ # ", b"ls -d /her*; echo $((40 + 2))\r"), (b"/here\r", b""), (b"42\r", b"\x01x")):
            while text not in seen:
                assert select.select([terminal], [], [], 120)[0], seen
                seen += os.read(terminal, 4096)
            os.write(terminal, answer)
        while b"1 failed" not in seen:
            assert select.select([terminal], [], [], 60)[0], seen
            seen += os.read(terminal, 4096)
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


async def test_a_bundle_names_the_kernel_s_symbol(debian: Fetched, tmp_path: Path) -> None:
    """By the System.map beside the kernel, wherever the kernel has gone to (KASLR); without one by what a twin says."""
    kernel = tmp_path / "vmlinuz-it"
    shutil.copy(debian.kernel, kernel)
    async with avmm.boot(kernel, debian.initrd) as vm, asyncio.timeout(200):
        await vm.console.expect(READY)
        text = (await vm.get("/proc/kallsyms")).decode()
        symbols = [
            (int(line.split()[0], 16), line.split()[2]) for line in text.splitlines() if line.split()[1] in "tTwW"
        ]
        for moved in (0, 0x123000):
            if moved:
                lines = (f"{address - moved:016x} T {name}\n" for address, name in symbols)
                (tmp_path / "System.map-it").write_text("".join(lines))
            while True:  # until it is caught in the kernel, where it sleeps
                bundle = await write_bundle(vm, tmp_path / "kept", "it")
                said = (bundle / "registers.txt").read_text()
                found = re.search(r"EL1\n  pc ([0-9a-f]{16})  (.*)\+0x([0-9a-f]+)\n", said)
                assert found or "EL0" in said, said
                if found:
                    break
            start = int(found[1], 16) - int(found[3], 16)
            assert start == max(address for address, _ in symbols if address <= int(found[1], 16))
            assert (start, found[2]) in symbols


def test_breakpoint_on_a_terminal(debian: Fetched, tmp_path: Path) -> None:
    """The debugger has the terminal as before the guest, which stands still meanwhile and goes on."""
    (tmp_path / "test_it.py").write_text(BUSY_AT_A_BREAKPOINT)
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "--avmm-attach"]
        os.execv(sys.executable, [*argv, "--avmm-artifacts", ""])
    before = termios.tcgetattr(terminal)
    exits = "vm.counters()['exits']"
    look = f"!import time; time.sleep(0.2); a = {exits}; time.sleep(0.5); print('HE' + 'LD', {exits} == a)\r"
    seen = b""
    try:
        for text, answer in ((b"(Pdb) ", look.encode()), (b"HELD True", b""), (b"(Pdb) ", b"c\r"), (b"1 passed", b"")):
            while text not in seen:
                assert select.select([terminal], [], [], 120)[0], seen
                seen += os.read(terminal, 4096)
            if text == b"(Pdb) ":  # where readline takes what is typed: not raw, as for a guest's console
                _, oflag, _, lflag = termios.tcgetattr(terminal)[:4]
                assert (oflag, lflag & termios.ISIG) == (before[1], termios.ISIG)
            seen = seen.partition(text)[2]
            os.write(terminal, answer)
        assert termios.tcgetattr(terminal)[:4] == before[:4]
    finally:
        os.close(terminal)
        os.waitpid(child, 0)
