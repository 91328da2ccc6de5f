"""A storm on vCPUs that run side by side: fork, exec, mmap, futex, signals and pipes at once, and not one wrong answer.

A minute for each number of vCPUs; half an hour with ``--soak``.
"""

from __future__ import annotations

import re
import shutil

import pytest

from tests.guest.conftest import fetch_or_skip, long_restored
from tests.guest.rootfs import booted, rootfs
from tests.guest.test_programs import PACKAGES

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="unpacks Debian packages with dpkg-deb"),
]

#: Stressors that check themselves; the names of stress-ng 0.15.
STRESSORS = "fork exec mmap mremap mprotect futex sigq sigsegv pipe switch vfork clone pthread sem madvise mutex"

#: Not the guest's: the alarm that ends the storm comes twice, and the second may find this stressor in its last write.
EXCUSED = r"stress-ng: fail: .* pipe: termination write failed, errno=4 .*\n"

#: Who dies of a fault is told of in the kernel's log: a stressor's child may do so unnoticed.
WATCH = "echo 1 >/proc/sys/kernel/print-fatal-signals && echo 1 >/proc/sys/debug/exception-trace"
TROUBLE = "BUG|Out of memory|I/O error|stall|lockup|Oops|Internal error|WARNING|fatal signal|unhandled"

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
        await shell.check(WATCH)
        await shell.check(CHECKSUMS.replace("\n", "; ").replace("do;", "do").replace("&; ", "&"))
        done = await shell.run(  # as a user: the exec stressor refuses to be root; -v: it tells who died, and of what
            "cd /tmp && start-stop-daemon -S -c nobody -x /usr/bin/stress-ng -- -v --verify --mmap-bytes 8M "
            f"--mremap-bytes 4M {stressors} --timeout {seconds} 2>&1",
            timeout=20 * seconds + 300,
        )
        sums = await shell.check("touch /tmp/stop; wait; sort /tmp/sums | uniq -c", timeout=300)
        told = await shell.check(f"dmesg | grep -E -A 40 '{TROUBLE}' || true")
        assert not told, told + done.output
        assert "right" in sums
        assert "wrong" not in sums, sums
        assert done.code == 0, done.output
        assert "successful run completed" in done.output, done.output
        assert not re.search("fail:|skipping|on signal", re.sub(EXCUSED, "", done.output)), done.output


@long_restored
@pytest.mark.parametrize("cpus", [2, 4])
async def test_nothing_is_wrong_after_a_storm(cpus: int, pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--cpus") not in (1, cpus):
        pytest.skip("a run with --cpus has the storm on as many")
    await storm(cpus, 60)


@long_restored
@pytest.mark.soak
@pytest.mark.parametrize(("cpus", "engine"), [(2, "auto"), (4, "auto"), (2, "softhv,interpreter"), (4, "softhv,turns")])
async def test_nothing_is_wrong_after_half_an_hour(cpus: int, engine: str) -> None:
    await storm(cpus, 1800 if engine == "auto" else 300, engine)
