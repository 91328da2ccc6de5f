"""The bug report's question, of a real guest: which path do its vCPUs take?"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import avmm
from avmm.debian import Fetched

from .conftest import READY

pytestmark = pytest.mark.guest


async def test_it_says_which_path(debian: Fetched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle Linux parks, woken by its timer; a busy shell is busy in the guest."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    async def look() -> list[dict[str, Any]]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "avmm.cli", "top", "--json", "--once", "--interval", "3", stdout=subprocess.PIPE
        )
        out, _ = await asyncio.wait_for(process.communicate(), 60)
        vcpus: list[dict[str, Any]] = json.loads(out)["vcpus"]
        return vcpus

    async with avmm.boot(debian.kernel, debian.initrd, cpus=2, monitor=True) as vm:
        await vm.console.expect(READY, timeout=120)
        await vm.console.expect(rb"# ", timeout=30)
        vm.console.write(b"sleep 2; echo set''tled\n")
        await vm.console.expect(rb"settled", timeout=60)
        vcpus = await look()
        assert all(vcpu["path"].startswith("idle: ") for vcpu in vcpus), vcpus
        vm.console.write(b"while :; do :; done & echo lo''oping\n")
        await vm.console.expect(rb"looping", timeout=30)
        vcpus = await look()
        assert "busy in the guest" in [vcpu["path"] for vcpu in vcpus], vcpus
