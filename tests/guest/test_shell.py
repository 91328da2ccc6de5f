"""Commands without the agent: through a shell on the serial console."""

from __future__ import annotations

import asyncio
import hashlib
import random
from pathlib import Path

import pytest

import avmm
from avmm.debian import Fetched
from avmm.errors import WaitTimeout
from avmm.guest.exec import CommandFailed
from tests.guest.conftest import READY

pytestmark = pytest.mark.guest


async def test_commands_through_the_console(debian: Fetched, tmp_path: Path) -> None:
    async with avmm.boot(debian.kernel, debian.initrd, agent=False) as vm, asyncio.timeout(120):
        await vm.console.expect(READY)
        # The kernel talks all the while.
        await vm.check("sh", "-c", "while :; do echo noise >/dev/kmsg; usleep 20000; done >/dev/null 2>&1 &")
        script = "cat; echo err >&2; echo \"$A\"; pwd; printf 'a\\0\\377'; exit 3"
        done = await vm.run("sh", "-c", script, input=b"typed\n", env={"A": "it's\x03\n"}, cwd="/tmp")
        assert (done.returncode, done.stdout, done.stderr) == (3, b"typed\nit's\x03\n\n/tmp\na\0\xff", b"err\n")
        assert (await vm.run("nothing-of-the-kind")).returncode == 127
        assert (await vm.run("sh", "-c", "kill -9 $$")).returncode == -9
        assert (await vm.run("true", cwd="/nowhere")).returncode == 127
        several = await asyncio.gather(*(vm.run("echo", str(n)) for n in range(4)))
        assert [done.stdout for done in several] == [b"%d\n" % n for n in range(4)]
        content = random.Random(1).randbytes(20_000)
        await vm.put(None, "/tmp/new/file", content=content, mode=0o750)
        assert await vm.get("/tmp/new/file") == content
        await vm.get("/tmp/new/file", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content
        with pytest.raises(CommandFailed):
            await vm.get("/nowhere")
        with pytest.raises(avmm.ConfigError, match="agent"):
            await vm.popen("sh")
        with pytest.raises(WaitTimeout):
            await vm.run("sleep", "1000", timeout=0.5)
        assert (await vm.run("echo", "on")).stdout == b"on\n"
        with pytest.raises(avmm.GuestError, match="powered off"):
            await vm.run("poweroff", "-f")


async def test_output_of_any_length(debian: Fetched) -> None:
    """Longer than what a console's wait looks back over, and than what is remembered of the console."""
    async with avmm.boot(debian.kernel, debian.initrd, agent=False, keep_output=10_000) as vm, asyncio.timeout(120):
        await vm.console.expect(READY)
        await vm.check("sh", "-c", "head -c 500000 /dev/urandom >/tmp/file; md5sum /tmp/file >/tmp/sum")
        content = await vm.get("/tmp/file")
        assert len(content) == 500_000
        assert hashlib.md5(content).hexdigest().encode() in await vm.get("/tmp/sum")
        done = await vm.run("sh", "-c", "cat /tmp/file >&2; echo out")
        assert (done.stdout, done.stderr) == (b"out\n", content)
