"""The bug report's question, of a real guest: which path do its vCPUs take?"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

import avmm
from avmm.debian import Fetched

from .conftest import READY

pytestmark = pytest.mark.guest


async def test_it_says_which_path(debian: Fetched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle Linux parks, woken by its timer; a busy shell is busy in the guest."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    async def paths() -> list[str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "avmm.cli", "top", "--json", "--once", "--interval", "3", stdout=subprocess.PIPE
        )
        out, _ = await asyncio.wait_for(process.communicate(), 60)
        return [vcpu["path"] for vcpu in json.loads(out)["vcpus"]]

    async with avmm.boot(debian.kernel, debian.initrd, cpus=2, monitor=True) as vm, asyncio.timeout(240):
        await vm.console.expect(READY)
        await vm.console.expect(rb"# ")
        # A vCPU that waits for a processor of a busy host is not parked: the next look may find it so.
        while not all(path.startswith("idle: ") for path in await paths()):
            pass
        vm.console.write(b"while :; do :; done & echo lo''oping\n")
        await vm.console.expect(rb"looping")
        while "busy in the guest" not in await paths():
            pass
