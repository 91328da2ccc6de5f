"""A debugger in the guest: the engine's software step and BRK, through Linux's ptrace."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import avmm
from avmm.debian import Fetched
from tests.guest.conftest import READY

pytestmark = pytest.mark.guest


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The debugger, a static arm64 program."""
    program, source = tmp_path / "debugger", Path(__file__).with_name("debugger.c")
    compiler = ["aarch64-linux-gnu-gcc", "-O1", "-static", "-Wall", "-Werror"]
    subprocess.run([*compiler, "-o", program, source], check=True)
    return program


async def test_every_step_and_every_breakpoint_counts(debian: Fetched, program: Path) -> None:
    async with avmm.boot(debian.kernel, debian.initrd, cpus=2) as vm:
        await vm.console.expect(READY, timeout=120)
        await vm.put(program, "/bin/debugger")
        for _ in range(2):
            # MOV, a thousand times SUBS and B.NE, MOV, SVC; fifty calls of one function.
            assert (await vm.check("debugger", timeout=120)).stdout == b"2003 steps, 50 hits\n"
        # And in a twin, whose registers are all that it has of its parent's debugging.
        async with vm.fork() as twin:
            assert (await twin.check("debugger", timeout=120)).stdout == b"2003 steps, 50 hits\n"
