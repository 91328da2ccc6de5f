"""vsock in a real guest: streams both ways, checked byte for byte by a program of the guest's."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import avmm
from avmm.debian import Fetched
from tests.guest.conftest import READY

pytestmark = pytest.mark.guest

MIB = 1 << 20


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest's side, a static arm64 program."""
    program = tmp_path_factory.mktemp("vsock") / "vsock_peer"
    source = Path(__file__).with_name("vsock_peer.c")
    compiler = ["aarch64-linux-gnu-gcc", "-O2", "-static", "-Wall", "-Werror"]
    subprocess.run([*compiler, "-o", program, source], check=True)
    return program


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what comes."""
    while data := await reader.read(1 << 18):
        writer.write(data)
        await writer.drain()
    writer.close()


@asynccontextmanager
async def booted(debian: Fetched, peer: Path, sockets: list[str] | None = None) -> AsyncIterator[avmm.VirtualMachine]:
    async with avmm.boot(debian.kernel, debian.initrd, vsock=sockets or True) as vm:
        await vm.console.expect(READY, timeout=120)
        await vm.put(peer, "/bin/vsock_peer")
        yield vm


async def said(vm: avmm.VirtualMachine, *arguments: str | int, timeout: float = 300) -> str:
    """What the guest's program prints."""
    done = await vm.run("vsock_peer", *map(str, arguments), timeout=timeout)
    return done.stdout.decode()


async def test_echo_through_a_handler_and_a_unix_socket(debian: Fetched, peer: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    server = await asyncio.start_unix_server(echo, path)
    async with server, booted(debian, peer, [f"9={path}", f"10={path}-not-there"]) as vm:
        vm.vsock.listen(7, echo)
        for port in (7, 9):
            assert (await said(vm, "echo", port, 8 * MIB + 1)).startswith(f"echo right: {8 * MIB + 1} bytes")
        both = await asyncio.gather(*(said(vm, "echo", port, MIB) for port in (7, 9) * 10))
        assert not [each for each in both if not each.startswith(f"echo right: {MIB} bytes")]
        for port in (10, 11):
            assert "Connection reset" in await said(vm, "refused", port)
        assert (await said(vm, "ping", 7, 100)).startswith("ping: p50")
        assert not any(vm.counters()["guest_errors"].values())


async def test_into_the_guest(debian: Fetched, peer: Path) -> None:
    async with booted(debian, peer) as vm, await vm.popen("vsock_peer", "serve", "5000") as server:
        assert await server.stdout.readline() == b"serving\n"
        streams = await asyncio.gather(*(vm.vsock.connect(5000, timeout=30) for _ in range(10)))
        for index, (_, writer) in enumerate(streams):
            writer.write(bytes([index]) * 100_000)
            writer.write_eof()
        for index, (reader, writer) in enumerate(streams):
            assert await reader.read(-1) == bytes([index]) * 100_000
            writer.close()
        with pytest.raises(ConnectionRefusedError, match="port 5001"):
            await vm.vsock.connect(5001, timeout=30)
        # A twin answers as its parent does; what its parent was in the midst of stays the parent's.
        (mine, write_mine) = await vm.vsock.connect(5000, timeout=30)
        async with vm.fork() as twin:
            reader, writer = await twin.vsock.connect(5000, timeout=30)
            writer.write(b"twin")
            assert await reader.readexactly(4) == b"twin"
            writer.close()
        write_mine.write(b"parent")
        assert await mine.readexactly(6) == b"parent"
        write_mine.close()
        # A connection ends with its guest, at once.
        reader, writer = await vm.vsock.connect(5000, timeout=30)
        await vm.stop()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


@pytest.mark.soak
async def test_a_gigabyte_comes_back(debian: Fetched, peer: Path) -> None:
    async with booted(debian, peer) as vm:
        vm.vsock.listen(7, echo)
        assert (await said(vm, "echo", 7, 1024 * MIB, timeout=1200)).startswith(f"echo right: {1024 * MIB} bytes")
