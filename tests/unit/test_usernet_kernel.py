"""The user-mode network against Linux's own TCP/IP: a network namespace as the guest, behind a TAP interface and a
cable that breaks on request. Needs root; CI runs it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from avmm.aio import cancel
from avmm.backends.cable import Cable
from avmm.backends.tap import Tap
from avmm.backends.usernet.network import Forward, UserNetwork
from avmm.link import join

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/net/tun") or shutil.which("ip") is None,
    reason="needs root, /dev/net/tun and iproute2",
)


async def command(*argv: str) -> str:
    """Run it; its output. It must succeed."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, f"{argv}: {output.decode()}"
    return output.decode()


class Guest:
    """The namespace: the kernel's own stack at 10.0.2.15."""

    def __init__(self, name: str, network: UserNetwork, cable: Cable) -> None:
        self.name = name
        self.network = network
        self.cable = cable

    async def run(self, *argv: str) -> str:
        return await command("ip", "netns", "exec", self.name, *argv)

    async def python(self, text: str) -> str:
        """What a program of the guest's prints."""
        text = "import asyncio, hashlib, os, socket\nGATEWAY = '10.0.2.2'\n" + text
        return (await self.run(sys.executable, "-c", text)).strip()


@asynccontextmanager
async def guest(*publish: Forward, restrict: bool = False) -> AsyncIterator[Guest]:
    name = f"avmm{os.getpid()}"
    network, cable = UserNetwork(publish=publish, restrict=restrict), Cable()
    tap = Tap(name)
    join(tap.end, cable.card)
    join(cable.network, network.end)
    resolver = Path("/etc/netns") / name  # what `ip netns exec` shows as /etc/resolv.conf
    try:
        await command("ip", "netns", "add", name)
        try:
            await command("ip", "link", "set", name, "netns", name)
            resolver.mkdir(parents=True)
            (resolver / "resolv.conf").write_text("nameserver 10.0.2.3\noptions timeout:5 attempts:1\n")
            found = Guest(name, network, cable)
            await found.run("ip", "link", "set", "lo", "up")
            await found.run("ip", "address", "add", "10.0.2.15/24", "dev", name)
            await found.run("ip", "link", "set", name, "up")
            await found.run("ip", "route", "add", "default", "via", "10.0.2.2")
            work = [asyncio.create_task(tap.run()), asyncio.create_task(network.run())]
            try:
                await found.python("s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'', (GATEWAY, 9))")
                async with asyncio.timeout(120):
                    yield found
            finally:
                await cancel(*work)
        finally:
            shutil.rmtree(resolver, ignore_errors=True)
            await command("ip", "netns", "del", name)
    finally:
        cable.clear()
        tap.close()
        network.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what comes."""
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


@asynccontextmanager
async def echo_server() -> AsyncIterator[int]:
    """An echo server on the host's loopback; its port."""
    server = await asyncio.start_server(echo, "127.0.0.1", 0, backlog=1024)
    async with server:
        yield server.sockets[0].getsockname()[1]


#: A megabyte and a bit, there and back, from a thread each way; "same" when what came back is what was sent.
ECHO = """
import threading
def exchange(port, size):
    sent = os.urandom(size)
    with socket.create_connection((GATEWAY, port)) as s:
        def put():
            s.sendall(sent)
            s.shutdown(socket.SHUT_WR)
        thread = threading.Thread(target=put)
        thread.start()
        got = b""
        while piece := s.recv(1 << 20):
            got += piece
        thread.join()
    return "same" if got == sent else f"{len(got)} bytes of {len(sent)}, or others"
"""


async def test_there_and_back() -> None:
    async with guest() as one, echo_server() as port:
        one.network.serve(7, echo)
        for to in (port, 7):
            assert await one.python(f"{ECHO}\nprint(exchange({to}, 20_000_001))") == "same"
        assert one.network.stack.counters.malformed == 0
        assert one.network.dropped == 0
        # Offload at work: few frames for many bytes, each way.
        counters = one.network.stack.counters
        assert counters.frames_in < 10_000
        assert counters.frames_out < 10_000


@pytest.mark.parametrize(
    "breaks",
    [
        lambda cable: cable.drop(0.02, seed=1),
        lambda cable: cable.reorder(0.1, seed=2),
        lambda cable: cable.duplicate(0.1, seed=3),
        lambda cable: (cable.drop(0.01, seed=4), cable.delay(0.002, jitter=0.002, seed=4)),
    ],
    ids=["loss", "order", "twice", "loss and delay"],
)
async def test_over_a_cable_that_breaks(breaks: Callable[[Cable], object]) -> None:
    async with guest() as one:
        one.network.serve(7, echo)
        breaks(one.cable)
        assert await one.python(f"{ECHO}\nprint(exchange(7, 700_000))") == "same"


async def test_a_thousand_connections_at_once() -> None:
    async with guest() as one, echo_server() as port:
        one.network.serve(7, echo)
        for to in (port, 7):
            text = f"""
async def one():
    reader, writer = await asyncio.open_connection(GATEWAY, {to})
    sent = os.urandom(3000)
    writer.write(sent)
    writer.write_eof()
    got = await reader.read()
    writer.close()
    return got == sent
async def main():
    print(sum(await asyncio.gather(*(one() for _ in range(1000)))))
asyncio.run(main())
"""
            assert await one.python(text) == "1000"


async def test_a_slow_reader_slows_its_peer_only() -> None:
    """Nothing is lost and little is held when nobody reads for a while, on either side."""
    released = asyncio.Event()

    async def lazy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await released.wait()
        writer.write(str(len(await reader.read())).encode())

    async with guest() as one, echo_server() as port:
        one.network.serve(7, lazy)
        text = (
            "s = socket.create_connection((GATEWAY, 7)); s.sendall(bytes(20_000_000)); s.shutdown(1); print(s.recv(99))"
        )
        slow = asyncio.create_task(one.python(text))
        assert await one.python(f"{ECHO}\nprint(exchange({port}, 5_000_000))") == "same"
        held = sum(len(each.waiting) for each in one.network.stack._connections.values())
        assert held <= one.network.stack.window_limit
        released.set()
        assert await slow == "b'20000000'"


async def test_refused_reset_and_half_closed() -> None:
    async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.transport.abort()

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b"question"
        writer.write(b"answer")

    async with guest() as one:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            closed = unused.getsockname()[1]
        one.network.serve(7, rude)
        one.network.serve(8, late)
        text = f"""
for port in ({closed}, 7):
    try:
        s = socket.create_connection((GATEWAY, port)); s.send(b'x'); s.recv(1)
    except OSError as error:
        print(type(error).__name__)
s = socket.create_connection((GATEWAY, 8))
s.send(b'question')
s.shutdown(socket.SHUT_WR)
print(s.recv(99), s.recv(99))
"""
        said = await one.python(text)
        assert said.split("\n") == ["ConnectionRefusedError", "ConnectionResetError", "b'answer' b''"]


async def test_datagrams_of_all_sizes_and_names() -> None:
    class Mirror(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            self.transport.sendto(data, addr)

    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(Mirror, ("127.0.0.1", 0))
    with contextlib.closing(transport):
        async with guest() as one:
            port = transport.get_extra_info("sockname")[1]
            one.network.dns["api.test"] = "10.0.2.100"
            one.network.serve(80, echo, address="10.0.2.100")
            text = f"""
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u.settimeout(30)
for size in (1, 2, 1472, 1473, 9000, 60000):
    sent = os.urandom(size)
    u.sendto(sent, (GATEWAY, {port}))
    got, sender = u.recvfrom(65535)
    print(got == sent and sender == (GATEWAY, {port}), flush=True)
print(socket.gethostbyname("api.test"))
s = socket.create_connection(("api.test", 80)); s.send(b"hello"); print(s.recv(9))
"""
            said = await one.python(text)
            assert said.split("\n") == ["True"] * 6 + ["10.0.2.100", "b'hello'"]


async def test_into_the_guest() -> None:
    async with guest(Forward(0, 9000), Forward(0, 9001, udp=True)) as one:
        text = """
listener = socket.create_server(("0.0.0.0", 9000), backlog=64)
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
datagrams.bind(("0.0.0.0", 9001))
for _ in range(2):
    peer, sender = listener.accept()
    data = peer.recv(99)
    peer.sendall(data * 100_000)
    peer.close()
data, sender = datagrams.recvfrom(99)
datagrams.sendto(data * 2, sender)
print(sender[0])
"""
        server = asyncio.create_task(one.python(text))
        while True:
            try:  # until it listens
                reader, writer = await one.network.connect(9000, timeout=30)
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0.05)
        streams = [(reader, writer), await asyncio.open_connection(*one.network.published[0])]
        for reader, writer in streams:
            writer.write(b"hello")
            assert await reader.read() == b"hello" * 100_000
            writer.close()
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
            datagrams.setblocking(False)
            datagrams.connect(one.network.published[1])
            await loop.sock_sendall(datagrams, b"ping")
            assert await loop.sock_recv(datagrams, 99) == b"pingping"
        assert await server == "10.0.2.2"
        with pytest.raises(ConnectionRefusedError, match="refuses port 9000"):
            await one.network.connect(9000, timeout=30)


async def test_restricted() -> None:
    async with guest(restrict=True) as one, echo_server() as port:
        one.network.serve(7, echo)
        text = f"""
for where in ((GATEWAY, {port}), ("192.0.2.1", 80), (GATEWAY, 7)):
    try:
        socket.create_connection(where).close()
        print("reached")
    except OSError as error:
        print(type(error).__name__)
try:
    socket.gethostbyname("example.com")
except OSError as error:
    print(type(error).__name__)
"""
        said = await one.python(text)
        assert said.split("\n") == ["ConnectionRefusedError", "ConnectionRefusedError", "reached", "gaierror"]
