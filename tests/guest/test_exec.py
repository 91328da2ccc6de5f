"""Commands in a real guest, through the agent."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import avmm
from avmm.debian import Fetched
from avmm.errors import GuestGone, WaitTimeout
from avmm.guest.exec import CommandFailed
from tests.guest.conftest import READY, booted_only

pytestmark = pytest.mark.guest


async def test_commands(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd) as vm:
        done = await vm.run("uname", "-m", timeout=120)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"aarch64\n", b"")
        done = await vm.run(
            "sh", "-c", 'echo out; echo err >&2; echo "$HOME $A"; pwd; exit 3', env={"A": "a b"}, cwd="/tmp"
        )
        assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n/root a b\n/tmp\n", b"err\n")
        assert (await vm.run("sh", "-c", "kill -9 $$")).returncode == -9
        assert (await vm.run("nothing-of-the-kind")).returncode == 127
        assert (await vm.run("true", cwd="/nowhere")).returncode == 127
        assert (await vm.run("/proc/cmdline")).returncode == 126
        with pytest.raises(CommandFailed, match="ended with 1") as caught:
            await vm.check("ls", "/nowhere")
        assert b"nowhere" in caught.value.stderr
        content = random.Random(1).randbytes(5_000_000)
        assert (await vm.run("cat", input=content)).stdout == content
        many = await asyncio.gather(*(vm.run("sh", "-c", f"cat; echo {n}", input=b"%d " % n) for n in range(60)))
        assert [done.stdout for done in many] == [b"%d %d\n" % (n, n) for n in range(60)]
        # What a command leaves running does not hold it up, and what it does not read does not either.
        assert (
            await vm.run("sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo started", timeout=20)
        ).stdout == b"started\n"
        assert (await vm.run("true", input=content, timeout=20)).ok
        with pytest.raises(WaitTimeout):
            await vm.run("sh", "-c", "sleep 1234; true", timeout=0.2)
        await vm.check("sh", "-c", "while ps | grep 'sleep 123[4]'; do sleep 0.01; done", timeout=20)


#: Loads what the agent's port needs by hand, as one built into a kernel is there; programs and /proc follow later.
LATE = """\
/bin/busybox mkdir -p /proc /sys /dev
for pass in 1 2 3; do
    /bin/busybox find /lib/modules -name 'virtio*.ko*' -exec /bin/busybox insmod {} ';'
done 2>/dev/null
/bin/busybox sleep 0.5
/bin/busybox --install -s
[ "$1" = without ] || mount -t proc proc /proc
exec sleep 1000
"""


@pytest.mark.parametrize("proc", ["with", "without"])
@booted_only("it is about a boot")
async def test_the_agent_waits_for_an_init_to_be_under_way(
    debian: Fetched, with_init: Callable[[str], Path], proc: str
) -> None:
    async with avmm.boot(debian.kernel, with_init(LATE.replace("$1", proc)), append="rdinit=/test-init") as vm:
        assert (await vm.check("uname", "-m", timeout=120)).stdout == b"aarch64\n"
        assert (await vm.run("test", "-e", "/proc/1")).ok == (proc == "with")


async def test_streams_terminals_and_signals(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd) as vm, asyncio.timeout(120):
        async with await vm.popen("cat") as cat:
            assert cat.stdin is not None
            for line in (b"one\n", b"two\n"):
                cat.stdin.write(line)
                assert await cat.stdout.readline() == line
            cat.stdin.write_eof()
            assert await cat.wait() == 0
        async with await vm.popen(
            "sh", "-c", "trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 0.01; done"
        ) as it:
            assert await it.stdout.readline() == b"ready\n"
            it.send_signal(10)
            assert await it.stdout.read() == b"caught\n"
            assert await it.wait() == 5
        # A program that prints for ever waits for its reader.
        async with await vm.popen("yes") as yes:
            read = 0
            while read < 10_000_000:
                read += len(await yes.stdout.read(1 << 20))
        assert yes.returncode == -9
        script = "trap 'stty size' WINCH; tty; stty size; while read x; do echo got $x; done; echo end"
        async with await vm.popen("sh", "-c", script, pty=True, size=(100, 30)) as terminal:
            assert (await terminal.stdout.readline()).startswith(b"/dev/pts/")
            assert await terminal.stdout.readline() == b"30 100\r\n"
            assert terminal.stdin is not None
            assert terminal.stderr is None
            terminal.stdin.write(b"hello\n")
            assert await terminal.stdout.readline() == b"hello\r\n"  # its echo
            assert await terminal.stdout.readline() == b"got hello\r\n"
            terminal.resize(132, 43)
            terminal.stdin.write(b"\n")
            await terminal.stdout.readuntil(b"43 132\r\n")
            terminal.stdin.write_eof()
            # The signal may have ended the read before the empty line came, whose echo is the last thing then.
            assert (await terminal.stdout.read()).endswith((b"end\r\n", b"end\r\n\r\n"))
            assert await terminal.wait() == 0


async def test_files_and_trees(debian: Fetched, tmp_path: Path) -> None:
    source = tmp_path / "tree"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "big").write_bytes(random.Random(2).randbytes(3_000_000))
    (source / "run").write_text("#!/bin/sh\necho ran\n")
    (source / "run").chmod(0o755)
    (source / "link").symlink_to("deep/big")
    (source / "a name with\nnewline").write_text("x")
    async with avmm.boot(debian.kernel, debian.initrd) as vm, asyncio.timeout(120):
        await vm.put(source, "/tmp/copies/tree")
        assert (await vm.check("/tmp/copies/tree/run")).stdout == b"ran\n"
        said = (await vm.check("md5sum", "/tmp/copies/tree/link")).stdout.decode()
        assert hashlib.md5((source / "deep" / "big").read_bytes()).hexdigest() in said
        await vm.get("/tmp/copies/tree", tmp_path / "back")
        diff = await asyncio.create_subprocess_exec("diff", "-r", "--no-dereference", source, tmp_path / "back")
        assert await diff.wait() == 0
        assert (tmp_path / "back" / "run").stat().st_mtime_ns == (source / "run").stat().st_mtime_ns
        await vm.put(source / "run", "/tmp/")
        assert await vm.get("/tmp/run") == (source / "run").read_bytes()
        await vm.put(None, "/etc/made", content=b"made", mode=0o600)
        assert (await vm.check("stat", "-c", "%a %s", "/etc/made")).stdout == b"600 4\n"
        assert b"processor" in await vm.get("/proc/cpuinfo")
        with pytest.raises(CommandFailed, match="errno"):
            await vm.get("/nowhere")
        with pytest.raises(CommandFailed, match="/proc/version: cannot"):
            await vm.put(None, "/proc/version", content=b"x")
        with pytest.raises(avmm.GuestError, match="directory"):
            await vm.get("/etc")
        with pytest.raises(avmm.HostError, match="nothing-here"):
            await vm.put(tmp_path / "nothing-here", "/tmp/x")
        with pytest.raises(avmm.HostError, match="cannot write"):
            await vm.get("/etc/passwd", tmp_path / "no" / "such" / "folder")
        assert (await vm.run("true")).ok


@booted_only("is about a boot")
async def test_the_users_init_is_as_it_would_be(debian: Fetched, with_init: Callable[[str], Path]) -> None:
    """The first process is the guest's own, with its own name, arguments and file systems; after switch_root too."""
    initrd = with_init("""
mkdir /new && mount -t tmpfs none /new && mkdir /new/bin /new/proc /new/dev /new/tmp
cp /bin/busybox /new/bin && ln -s busybox /new/bin/sh && echo inside >/new/where
for each in proc dev; do mount --move /$each /new/$each; done
exec switch_root -c /dev/console /new /bin/busybox sh -c '
/bin/busybox --install -s /bin
echo SWITCHED
exec sleep 10000'
""")
    async with avmm.boot(debian.kernel, debian.initrd) as vm:
        await vm.console.expect(READY, timeout=120)
        said = await vm.check("sh", "-c", "tr '\\0' ' ' </proc/1/cmdline; ls -a / | tr '\\n' ' '; cat /proc/mounts")
        assert said.stdout.startswith(b"/bin/busybox sh /init ")
        assert b"avmm" not in said.stdout.partition(b"\n")[2]
    async with avmm.boot(debian.kernel, initrd, append="avmm.init=/test-init") as vm:
        await vm.console.expect(b"SWITCHED", timeout=120)
        assert (await vm.check("cat", "/where", timeout=20)).stdout == b"inside\n"
        assert await vm.get("/where") == b"inside\n"


async def test_who_waits_is_told_at_once(debian: Fetched) -> None:
    loop = asyncio.get_running_loop()
    async with avmm.boot(debian.kernel, debian.initrd) as vm:
        await vm.wait_ready(timeout=120)
        # The agent is killed.
        waiting = [asyncio.create_task(vm.run("sleep", "1000")) for _ in range(5)]
        assert (await vm.run("true")).ok
        await vm.console.expect(READY, timeout=120)
        vm.console.write(b"killall -9 agent\n")
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=20)
        assert done
        began = loop.time()
        for each in waiting:
            with pytest.raises(GuestGone, match="agent"):
                await asyncio.wait_for(each, 20)
        assert loop.time() - began < 1
        with pytest.raises(GuestGone, match="agent"):
            await asyncio.wait_for(vm.run("true"), 20)
    for how, reason in (("poweroff -f", "powered off"), ("echo c >/proc/sysrq-trigger", "panic"), ("", "stopped")):
        async with avmm.boot(debian.kernel, debian.initrd, reboot=False) as vm:
            await vm.wait_ready(timeout=120)
            waiting = [asyncio.create_task(vm.run("sleep", "1000")) for _ in range(3)]
            assert (await vm.run("true")).ok
            if how:
                waiting.append(asyncio.create_task(vm.run("sh", "-c", how)))
            else:
                await vm.stop()
            for each in waiting:
                with pytest.raises(avmm.GuestError, match=reason):
                    await asyncio.wait_for(each, 60)


async def test_a_twin_has_an_agent_of_its_own(debian: Fetched) -> None:
    """Forked in the middle of whatever the agent says; the twin has another random pool, and the right time."""
    async with avmm.boot(debian.kernel, debian.initrd) as vm, asyncio.timeout(120):
        await vm.wait_ready()
        await vm.check("date", "-s", "2001-01-01 00:00:00")
        content = random.Random(3).randbytes(3_000_000)
        busy = asyncio.create_task(vm.run("cat", input=content))
        seeds = set()
        for number in range(5):
            async with vm.fork() as twin:
                assert (await twin.run("echo", str(number))).stdout == b"%d\n" % number
                assert abs(int((await twin.check("date", "+%s")).stdout) - time.time()) < 30
                seeds.add(await twin.get("/proc/sys/kernel/random/uuid"))
        assert len(seeds) == 5
        assert (await busy).stdout == content
        assert (await vm.check("date", "+%Y")).stdout == b"2001\n"


async def test_a_reboot_brings_another_agent(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd) as vm, asyncio.timeout(120):
        first = await vm.get("/proc/sys/kernel/random/boot_id")
        with pytest.raises(GuestGone, match="reset"):
            await vm.run("reboot", "-f")
        assert await vm.get("/proc/sys/kernel/random/boot_id") != first


async def test_no_agent_where_none_is_wanted(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd, agent=False) as vm:
        await vm.console.expect(READY, timeout=120)
        assert "agent" not in vm.counters()["guest_errors"]
