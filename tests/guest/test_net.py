"""Networks in a real guest, checked by what others wrote: wget, curl, iperf3, git, apt, tshark, QEMU, a TAP."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import http.server
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import avmm
from avmm.debian import Fetched
from tests.guest.conftest import READY, booted_only, long_restored, shell
from tests.guest.rootfs import booted, rootfs
from tests.guest.test_drives import run

pytestmark = pytest.mark.guest

needs_tshark = pytest.mark.skipif(shutil.which("tshark") is None, reason="checks with tshark")
needs_qemu = pytest.mark.skipif(shutil.which("qemu-system-aarch64") is None, reason="needs qemu-system-arm")
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/net/tun") or shutil.which("ip") is None,
    reason="makes a network namespace: as root, with /dev/net/tun and iproute2",
)
PACKAGES = ["iperf3", "wget", "curl", "git", "ca-certificates", "apt", "apache2-utils", "socat", "iputils-ping"]


async def guest_of(vm: avmm.VirtualMachine) -> avmm.VirtualMachine:
    await vm.console.expect(READY, timeout=120)
    return vm


async def check(vm: avmm.VirtualMachine, command: str, timeout: float = 60) -> str:
    code, said = await shell(vm, command, timeout)
    assert code == 0, said
    return said


async def on_host(*argv: object) -> str:
    """A program of the host, while the event loop turns; its output. It must succeed."""
    return await asyncio.to_thread(run, *argv)


async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.0 200 OK\r\n\r\nhello from the test")
    await writer.drain()
    writer.close()


@contextlib.contextmanager
def web(folder: Path) -> Iterator[int]:
    """The files of ``folder`` over HTTP on this host's loopback; the port."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


# The user-mode network, with busybox.


@needs_tshark
async def test_wget_dns_served_and_published_ports_and_a_recording(debian: Fetched, tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    data = os.urandom(8 << 20)
    (tmp_path / "www" / "big").write_bytes(data)
    booting = avmm.boot(debian.kernel, debian.initrd, net="user", publish=["0:80"], pcap=tmp_path / "cap")
    with web(tmp_path / "www") as port:
        async with booting as vm:
            await guest_of(vm)
            said = await check(vm, f"wget -qO- http://10.0.2.2:{port}/big | md5sum")
            assert hashlib.md5(data).hexdigest() in said
            vm.net.serve(8000, hello)
            vm.net.dns["api.test"] = "10.0.2.2"
            assert "hello from the test" in await check(vm, "wget -qO- http://api.test:8000/")
            # Out of the guest through a published port, by curl.
            await check(vm, "mkdir /www && head -c 4000000 /dev/urandom >/www/file && httpd -h /www; md5sum /www/file")
            ((where, published),) = vm.net.published
            await on_host("curl", "-sS", "-o", tmp_path / "back", f"http://{where}:{published}/file")
            found = hashlib.md5((tmp_path / "back").read_bytes()).hexdigest()
            assert found in await check(vm, "md5sum /www/file")
            reader, writer = await vm.net.connect(80)
            writer.write(b"GET /none HTTP/1.0\r\n\r\n")
            assert b" 404 " in (await reader.read()).splitlines()[0]
            writer.close()
            assert vm.counters()["guest_errors"]["net0"] == 0
    options = ["-o", "tcp.check_checksum:TRUE", "-o", "ip.check_checksum:TRUE", "-T", "fields"]
    options += ["-e", "tcp.checksum.status", "-e", "ip.checksum.status", "-e", "_ws.malformed"]
    rows = await on_host("tshark", "-r", tmp_path / "cap", *options)
    found_rows = [line.split("\t") for line in rows.splitlines() if line.count("\t") == 2]
    assert len(found_rows) > 12_000_000 // 65536
    assert {row[0] for row in found_rows} == {"", "1"}
    assert {row[1] for row in found_rows} == {"", "1"}
    assert {row[2] for row in found_rows} == {""}
    said = await on_host("tshark", "-r", tmp_path / "cap", "-Y", 'http.response.code == 200 || dns.a', "-T", "fields",
                         "-e", "http.response.code", "-e", "dns.a")  # fmt: skip
    assert "10.0.2.2" in said
    assert said.count("200") >= 3


async def test_a_restricted_guest_reaches_only_the_test(debian: Fetched, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of the host")
    with web(tmp_path) as port:
        async with avmm.boot(debian.kernel, debian.initrd, net="user,restrict") as vm:
            await guest_of(vm)
            vm.net.serve(80, hello)
            assert "hello from the test" in await check(vm, "wget -qO- http://10.0.2.2/")
            code, said = await shell(vm, f"wget -qO- http://10.0.2.2:{port}/secret")
            assert code != 0
            assert "of the host" not in said


async def test_a_bad_cable_and_none_at_all(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd, net="user") as vm:
        await guest_of(vm)
        data = os.urandom(1 << 20)

        async def big(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + data)
            await writer.drain()
            writer.close()

        vm.net.serve(80, big)
        vm.net.drop(0.02, seed=1)
        vm.net.reorder(0.05, seed=2)
        vm.net.duplicate(0.05, seed=3)
        vm.net.delay(0.002, jitter=0.002, seed=4)
        said = await check(vm, "wget -qO- http://10.0.2.2/ | md5sum", timeout=120)
        assert hashlib.md5(data).hexdigest() in said
        assert vm.net.counters["in_dropped"] > 0
        vm.net.heal()
        carrier = "while [ $(cat /sys/class/net/eth0/carrier) != {} ]; do sleep 0.05; done"
        vm.net.unplug()
        await check(vm, carrier.format(0))
        vm.net.plug()
        await check(vm, carrier.format(1))
        assert hashlib.md5(data).hexdigest() in await check(vm, "wget -qO- http://10.0.2.2/ | md5sum")


async def test_the_network_is_there_again_after_a_reboot_and_in_a_twin(debian: Fetched) -> None:
    async with avmm.boot(debian.kernel, debian.initrd, net="user") as vm:
        await guest_of(vm)
        vm.net.serve(80, hello)
        vm.console.write(b"reboot -f\n")
        await guest_of(vm)
        assert "hello from the test" in await check(vm, "wget -qO- http://10.0.2.2/")
        async with vm.fork() as twin:
            assert "hello from the test" in await check(twin, "wget -qO- http://10.0.2.2/")
            assert "hello from the test" in await check(vm, "wget -qO- http://10.0.2.2/")
            assert twin.net.counters["out_frames"] > 0


async def test_what_a_twin_was_reading_is_reset(debian: Fetched, tmp_path: Path) -> None:
    """Its network has no such connection, and the twin, which only reads, would wait for ever."""
    asked = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    async with avmm.boot(debian.kernel, debian.initrd, net="user") as vm:
        await guest_of(vm)
        vm.net.serve(80, silent)
        await check(vm, "(wget -qO- http://10.0.2.2/ 2>&1; echo is over) >/tmp/said & true")
        await asked.wait()
        await vm.snapshot(tmp_path / "snapshot")
        ended = "while ! grep over /tmp/said; do sleep 0.05; done; cat /tmp/said"
        async with vm.fork() as twin, avmm.restore(tmp_path / "snapshot") as restored:
            for one in (twin, restored):
                assert "reset by peer" in await check(one, ended)
        assert "over" not in await check(vm, "cat /tmp/said")


# Several machines.


@booted_only("a snapshot does not know the switch of a program that is gone")
async def test_three_guests_on_a_switch_and_a_partition(debian: Fetched) -> None:
    switch = avmm.Switch()
    async with contextlib.AsyncExitStack() as stack:
        vms = [
            await stack.enter_async_context(
                avmm.boot(debian.kernel, debian.initrd, memory="128M", net=switch, append=f"avmm.ip=10.1.0.{n}/24")
            )
            for n in (1, 2, 3)
        ]
        a, b, c = [await guest_of(vm) for vm in vms]
        ping = "ping -c 1 -W {} 10.1.0.{}"
        for vm in (a, b, c):
            for n in (1, 2, 3):
                await check(vm, f"for i in 1 2 3; do {ping.format(3, n)} && break; done")
        switch.partition(a, [b, c])
        for vm, n, reached in ((a, 2, False), (a, 3, False), (c, 1, False), (b, 3, True), (c, 2, True)):
            code, said = await shell(vm, ping.format(1 if not reached else 5, n))
            assert (code == 0) is reached, said
        assert switch.counters()["kept_apart"] > 0
        switch.heal()
        b.console.write(b"nc -l -p 99 | md5sum; echo RECEI''VED\n")
        said = await check(
            a, "head -c 8000000 /dev/urandom >/tmp/r; until nc 10.1.0.2 99 </tmp/r; do sleep 0.1; done; md5sum /tmp/r"
        )
        found = await b.console.expect(rb"([0-9a-f]{32})  -\r\nRECEIVED", timeout=60, printk=False)
        assert found[1].decode() in said


@long_restored
@needs_qemu
async def test_qemu_at_the_other_end_of_a_socket(debian: Fetched, tmp_path: Path) -> None:
    """Two avmm guests and one of QEMU's meet at one path."""
    path = tmp_path / "net"
    async with (
        avmm.boot(debian.kernel, debian.initrd, net=f"socket={path}", append="avmm.ip=10.1.0.1/24") as a,
        avmm.boot(debian.kernel, debian.initrd, net=f"socket={path}", append="avmm.ip=10.1.0.2/24") as b,
    ):
        argv = [
            "qemu-system-aarch64", "-M", "virt,gic-version=3", "-cpu", "cortex-a57", "-nographic", "-nodefaults",
            "-serial", "stdio", "-m", "256", "-kernel", debian.kernel, "-initrd", debian.initrd,
            "-append", "console=ttyAMA0 avmm.ip=10.1.0.3/24", "-global", "virtio-mmio.force-legacy=false",
            "-netdev", f"stream,id=n,server=off,addr.type=unix,addr.path={path}",
            "-device", "virtio-net-device,netdev=n",
        ]  # fmt: skip
        await guest_of(a)
        await guest_of(b)
        pipe = asyncio.subprocess.PIPE
        qemu = await asyncio.create_subprocess_exec(*map(str, argv), stdin=pipe, stdout=pipe)
        try:
            assert qemu.stdin is not None
            assert qemu.stdout is not None
            async with asyncio.timeout(120):
                await qemu.stdout.readuntil(b" ready")
                qemu.stdin.write(
                    b"mkdir /www; head -c 3000000 /dev/urandom >/www/file; md5sum /www/file; httpd -h /www\n"
                )
                line = await qemu.stdout.readuntil(b"  /www/file\r\n")
            wanted = line.split()[-2].decode()
            for vm in (a, b):
                said = await check(
                    vm, "until wget -qO /tmp/file http://10.1.0.3/file; do sleep 0.2; done; md5sum /tmp/file"
                )
                assert wanted in said
            await check(b, "ping -c 1 -W 5 10.1.0.1")
        finally:
            qemu.kill()
            await qemu.communicate()


@booted_only("runs the command line")
@needs_root
async def test_a_tap_interface(debian: Fetched, tmp_path: Path) -> None:
    """In a network namespace of its own: files both ways, large segments with unfinished checksums on the way."""
    (tmp_path / "www").mkdir()
    data = os.urandom(8 << 20)
    (tmp_path / "www" / "big").write_bytes(data)
    space = f"avmm-{os.getpid()}"
    inside = ["ip", "netns", "exec", space]
    run("ip", "netns", "add", space)
    try:
        for command in ("ip tuntap add dev tap0 mode tap", "ip addr add 10.1.0.254/24 dev tap0", "ip link set tap0 up",
                        "ip link set lo up"):  # fmt: skip
            run(*inside, *command.split())
        argv = [*inside, sys.executable, "-m", "avmm.cli", "boot", debian.kernel, debian.initrd]
        argv += ["--net", "tap=tap0", "-a", "avmm.ip=10.1.0.1/24", "--pcap", tmp_path / "cap"]
        pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        files = [*inside, sys.executable, "-m", "http.server", "-d", tmp_path / "www", "80"]
        server = await asyncio.create_subprocess_exec(*map(str, files), stdout=null, stderr=null)
        guest = await asyncio.create_subprocess_exec(*map(str, argv), stdin=pipe, stdout=pipe)
        assert guest.stdin is not None
        assert guest.stdout is not None
        try:
            async with asyncio.timeout(120):
                await guest.stdout.readuntil(b" ready")
                guest.stdin.write(
                    b"until wget -qO /tmp/big http://10.1.0.254/big; do sleep 0.1; done; md5sum /tmp/big; mkdir /www; "
                    b"head -c 5000000 /dev/urandom >/www/file; httpd -h /www; md5sum /www/file\n"
                )
                line = await guest.stdout.readuntil(b"  /tmp/big\r\n")
                assert line.split()[-2].decode() == hashlib.md5(data).hexdigest()
                wanted = (await guest.stdout.readuntil(b"  /www/file\r\n")).split()[-2].decode()
                await on_host(*inside, "curl", "-sS", "-o", tmp_path / "back", "http://10.1.0.1/file")
                assert hashlib.md5((tmp_path / "back").read_bytes()).hexdigest() == wanted
                guest.stdin.write(b"poweroff -f\n")
                await guest.communicate()
        finally:
            server.kill()
            await server.wait()
            with contextlib.suppress(ProcessLookupError):
                guest.send_signal(signal.SIGKILL)
            await guest.wait()
    finally:
        run("ip", "netns", "del", space)
    if shutil.which("tshark"):
        sizes = run("tshark", "-r", tmp_path / "cap", "-T", "fields", "-e", "ip.src", "-e", "tcp.len")
        for sender in ("10.1.0.254", "10.1.0.1"):
            assert max(int(size) for size in re.findall(rf"^{re.escape(sender)}\t(\d+)", sizes, re.MULTILINE)) > 20000


def test_networks_that_cannot_be(debian: Fetched, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "avmm.cli", "boot", str(debian.kernel)]
    wrong = {
        ("--net", "bridge"): "choose one of user",
        ("--net", "user,mac=01:02:03:04:05:06"): "mac=52:54",
        ("--net", f"socket={tmp_path}/nowhere/net"): "No such file",
        ("--net", "none", "-p", "80:80"): "--net user",
        ("-p", "80"): "8080:80",
        ("--pcap", f"{tmp_path}/nowhere/cap"): "cannot write",
    }
    for options, word in wrong.items():
        done = subprocess.run([*argv, *options], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode in (2, 3), done
        assert word in done.stderr
        assert len(done.stderr.splitlines()) == 1


# Debian's own programs.


@pytest.fixture(scope="module")
def image() -> Path:
    return rootfs(PACKAGES)


@contextlib.asynccontextmanager
async def _program(*argv: str) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        await process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@long_restored
async def test_iperf_and_a_thousand_connections_at_once(image: Path) -> None:
    async with booted(image, net="user") as guest:
        vm = guest.vm
        if shutil.which("iperf3"):
            port = free_port()
            async with _program("iperf3", "-s", "-p", str(port), "-B", "127.0.0.1"):
                for direction in ("", "-R"):
                    said = await guest.check(
                        f"for i in 1 2 3 4 5; do iperf3 -c 10.0.2.2 -p {port} -n 64M {direction} && break; done"
                    )
                    assert "receiver" in said
        together = asyncio.Event()
        there = 0

        async def wait_for_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal there
            await reader.readuntil(b"\r\n\r\n")
            there += 1
            if there == 1001:
                together.set()
            if there > 1:  # ApacheBench tries one before it opens the others
                await together.wait()
            writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello")
            await writer.drain()
            writer.close()

        vm.net.serve(80, wait_for_all)
        said = await guest.check("ulimit -n 4096; ab -q -s 60 -n 1001 -c 1000 http://10.0.2.2/ 2>&1", timeout=90)
        assert re.search(r"Complete requests: +1001\n", said), said
        assert re.search(r"Failed requests: +0\n", said), said
        assert there == 1001
        assert vm.counters()["guest_errors"]["net0"] == 0


@long_restored
async def test_pings_and_published_ports(image: Path) -> None:
    async with booted(image, net="user", publish=["0:7000", "0:7000/udp"]) as guest:
        said = await guest.check("/bin/ping -c 3 -w 60 -i 0.2 -s 3000 10.0.2.2")
        assert " 3 received" in said
        done = await guest.run("/bin/ping -c 1 -W 30 192.0.2.1")  # of nobody's: it is refused, not waited for
        assert done.code != 0
        assert "Packet filtered" in done.output
        await guest.check(
            "for each in UDP-RECVFROM TCP-LISTEN; do socat -b 65536 $each:7000,fork PIPE </dev/null >/dev/null 2>&1 & "
            "done; until grep -q ':1B58 .* 0A ' /proc/net/tcp && grep -q ':1B58 ' /proc/net/udp; do sleep 0.1; done"
        )
        tcp, udp = guest.vm.net.published
        async with asyncio.timeout(60):
            reader, writer = await asyncio.open_connection(*tcp)
            writer.write(b"over TCP")
            assert await reader.readexactly(8) == b"over TCP"
            writer.close()
            loop = asyncio.get_running_loop()
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as caller:
                caller.setblocking(False)
                caller.connect(udp)
                for size in (1, 1472, 8000):  # the last in fragments
                    data = os.urandom(size)
                    await loop.sock_sendall(caller, data)
                    assert await loop.sock_recv(caller, 65536) == data


@long_restored
async def test_git_clone_and_apt(image: Path, tmp_path: Path) -> None:
    source = tmp_path / "repos" / "project"
    source.mkdir(parents=True)
    for number in range(40):
        (source / f"file{number}").write_bytes(os.urandom(20_000))
    identity = ["-c", "user.name=avmm", "-c", "user.email=avmm@example.org"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        run("git", "-C", source, *words)
    head = run("git", "-C", source, "rev-parse", "HEAD").strip()
    package = tmp_path / "repos" / "tree"
    (package / "DEBIAN").mkdir(parents=True)
    control = (
        "Package: avmm-hello\nVersion: 1.0\nArchitecture: all\nMaintainer: avmm <a@example.org>\nDescription: hello\n"
    )
    (package / "DEBIAN" / "control").write_text(control)
    (package / "hello").write_bytes(os.urandom(2_000_000))
    deb = tmp_path / "repos" / "avmm-hello_1.0_all.deb"
    run("dpkg-deb", "--build", "--root-owner-group", package, deb)
    content = deb.read_bytes()
    entry = f"{control}Filename: ./{deb.name}\nSize: {len(content)}\nSHA256: {hashlib.sha256(content).hexdigest()}\n"
    (tmp_path / "repos" / "Packages").write_text(entry)
    port = free_port()
    programs = run("git", "--exec-path").strip()  # as `git daemon` would be a child that outlives its parent
    daemon = (f"{programs}/git-daemon", "--reuseaddr", "--export-all", f"--base-path={tmp_path}/repos",
              "--listen=127.0.0.1", f"--port={port}")  # fmt: skip
    with web(tmp_path / "repos") as files:
        async with booted(image, net="user") as guest, _program(*daemon):
            await guest.check(
                f"cd /tmp; for i in 1 2 3 4 5; do git clone -q git://10.0.2.2:{port}/project && break; sleep 1; done"
            )
            assert head in await guest.check("git -C /tmp/project rev-parse HEAD && git -C /tmp/project fsck --strict")
            await guest.check(
                f"echo 'deb [trusted=yes] http://10.0.2.2:{files} ./' >/etc/apt/sources.list && apt-get -q update"
            )
            await guest.check("cd /tmp && apt-get -q download avmm-hello")
            assert hashlib.sha256(content).hexdigest() in await guest.check(f"sha256sum /tmp/{deb.name}")
            assert hashlib.sha256(content).hexdigest() in await guest.check(
                f"wget -qO- http://10.0.2.2:{files}/{deb.name} | sha256sum"
            )
