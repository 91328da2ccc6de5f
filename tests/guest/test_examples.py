"""The programs in examples/, each as it stands."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer

from avmm.bootloader.image import load_kernel
from avmm.debian import Fetched
from examples import chaos, vm_per_request
from tests.guest.conftest import booted_only

pytestmark = pytest.mark.guest

EXAMPLES = Path(__file__).parents[2] / "examples"


async def test_a_vm_for_each_request(debian: Fetched) -> None:
    async with TestClient(TestServer(vm_per_request.application())) as client:

        async def run(script: str) -> dict[str, object]:
            async with client.post("/run", data=script) as response:
                assert response.status == 200, await response.text()
                answer: dict[str, object] = await response.json()
                return answer

        answers = await asyncio.gather(*(run(f"touch /{n}; ls / | grep -c '^[0-9]'; exit {n}") for n in range(5)))
        assert answers == [{"returncode": n, "stdout": "1\n", "stderr": ""} for n in range(5)]
        async with client.post("/run", data="poweroff -f") as response:
            assert (response.status, "powered off" in await response.text()) == (422, True)
        assert (await run("echo still here >&2"))["stderr"] == "still here\n"


@booted_only("a snapshot does not know the switch of a program that is gone")
async def test_chaos(debian: Fetched, capsys: pytest.CaptureFixture[str]) -> None:
    await chaos.chaos(rounds=2, seed=1)
    assert capsys.readouterr().out.count("came back") == 2


def test_bisect_kernel(debian: Fetched, tmp_path: Path) -> None:
    image = bytes(load_kernel(debian.kernel, 1 << 30).image)
    assert image.count(b"SMP Debian") >= 1
    kernels = []
    for number in range(6):
        kernels.append(tmp_path / f"Image-{number}")
        if number == 2:
            content = b"not a kernel"
        else:
            content = image if number < 4 else image.replace(b"SMP Debian", b"SMP Broken")
        kernels[-1].write_bytes(content)
    argv = [sys.executable, str(EXAMPLES / "bisect_kernel.py"), "--initrd", str(debian.initrd)]
    command = ["--", "sh", "-c", "uname -v | grep -q Debian"]
    done = subprocess.run([*argv, *map(str, kernels), *command], capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines()[-1] == f"first bad: {kernels[4]}", done.stdout + done.stderr
    assert f"{kernels[2]}: skipped" in done.stdout
    for kernel, code in ((kernels[0], 0), (kernels[5], 1), (kernels[2], 125)):
        assert subprocess.run([*argv, str(kernel), *command], stdout=subprocess.DEVNULL, timeout=100).returncode == code
