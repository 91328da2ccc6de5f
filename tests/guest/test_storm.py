"""A storm on vCPUs that run side by side: fork, exec, mmap, futex, signals and pipes at once, and not one wrong answer.

Half a minute for each number of vCPUs; half an hour with ``--soak``.
"""

from __future__ import annotations

import shutil

import pytest

from tests.guest.conftest import fetch_or_skip
from tests.guest.rootfs import booted, rootfs
from tests.guest.test_programs import PACKAGES

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="unpacks Debian packages with dpkg-deb"),
]

#: Stressors that check themselves; the names of stress-ng 0.15.
STRESSORS = "fork exec mmap mremap mprotect futex sigq sigsegv pipe switch vfork clone pthread sem madvise mutex"

#: What runs beside them: data through two programs and a pipe, which must come out as it went in.
CHECKSUMS = """\
dd if=/dev/urandom of=/tmp/data bs=64k count=16 2>/dev/null; want=$(sha256sum </tmp/data)
(while [ ! -e /tmp/stop ]; do got=$(gzip -1 </tmp/data | gunzip | sha256sum)
[ "$got" = "$want" ] && echo right || echo wrong; done >/tmp/sums) &
"""


async def storm(cpus: int, seconds: int, engine: str = "auto") -> None:
    """The storm, on ``cpus`` vCPUs."""
    stressors = " ".join(f"--{name} 1" for name in STRESSORS.split())
    async with booted(rootfs(PACKAGES), guest=fetch_or_skip("cloud"), memory="1G", cpus=cpus, engine=engine) as shell:
        await shell.check(CHECKSUMS.replace("\n", "; ").replace("do;", "do").replace("&; ", "&"))
        said = await shell.check(
            f"cd /tmp && stress-ng --verify --mmap-bytes 8M --mremap-bytes 4M {stressors} --timeout {seconds} 2>&1",
            timeout=20 * seconds + 300,
        )
        assert "successful run completed" in said, said[-2000:]
        assert "fail:" not in said, said
        sums = await shell.check("touch /tmp/stop; wait; sort /tmp/sums | uniq -c", timeout=300)
        assert "right" in sums
        assert "wrong" not in sums, sums
        told = await shell.check("dmesg | grep -E 'BUG|stall|lockup|Oops|Internal error|WARNING' || true")
        assert not told, told


@pytest.mark.parametrize("cpus", [2, 4])
async def test_nothing_is_wrong_after_a_storm(cpus: int) -> None:
    await storm(cpus, 30)


@pytest.mark.soak
@pytest.mark.parametrize(("cpus", "engine"), [(2, "auto"), (4, "auto"), (2, "softhv,interpreter"), (4, "softhv,turns")])
async def test_nothing_is_wrong_after_half_an_hour(cpus: int, engine: str) -> None:
    await storm(cpus, 1800 if engine == "auto" else 300, engine)
