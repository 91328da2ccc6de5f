"""The host's side of the agent against agents of our own making: honest, slow, dying and hostile ones."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmm.backends.port import Port
from avmm.config import VmConfig
from avmm.errors import ConfigError, GuestError, GuestGone, HostError, WaitTimeout
from avmm.guest import protocol, tree
from avmm.guest.agent import Agent, image
from avmm.guest.exec import AgentExec, CommandFailed, Commands, Completed, Exec
from avmm.guest.protocol import DATA, EXIT, HELLO, PAYLOAD_MAX, SPAWN, WINDOW, Frame, Parser, encode

AGENT = Path(__file__).parents[2] / "firmware" / "agent"


def test_the_agent_that_ships_is_what_its_source_gives(tmp_path: Path) -> None:
    digest, name = (Path(protocol.__file__).parent / "agent.sha256").read_text().split()
    assert hashlib.sha256(image()).hexdigest() == digest
    assert name == "agent.elf"
    if shutil.which("aarch64-linux-gnu-gcc") is None:
        pytest.skip("needs gcc-aarch64-linux-gnu to build the agent again")
    made_with = (Path(__file__).parents[2] / "firmware" / "images" / "TOOLCHAIN").read_text().strip()
    version = subprocess.run(["aarch64-linux-gnu-gcc", "--version"], capture_output=True, text=True, check=True).stdout
    if version.splitlines()[0] != made_with:
        pytest.skip(f"the agent was built with {made_with}")
    subprocess.run([sys.executable, AGENT / "build.py", "--output", tmp_path], check=True)
    assert (tmp_path / "agent.elf").read_bytes() == image()


class Guest(Commands):
    """An agent written in Python at the other end of a port."""

    def __init__(self) -> None:
        self.port = Port("avmm.agent", terminal=False)
        self.agent = Agent(self.port)
        self._heard = bytearray()

    @property
    def _exec(self) -> Exec:
        return AgentExec(self.agent)

    async def hear(self) -> Frame:
        """The next frame of the host, zeros skipped."""
        while True:
            while self._heard and self._heard[0] == 0:
                del self._heard[: len(self._heard) - len(self._heard.lstrip(b"\0"))]
            if len(self._heard) >= protocol.HEADER.size:
                magic, type, stream, command, length = protocol.HEADER.unpack_from(self._heard)
                assert magic == protocol.MAGIC
                whole = protocol.HEADER.size + length
                if len(self._heard) >= whole:
                    payload = bytes(self._heard[protocol.HEADER.size : whole])
                    del self._heard[:whole]
                    return Frame(type, stream, command, payload)
            self._heard += await self.port.input(65536)

    async def say(self, *frames: bytes) -> None:
        for frame in frames:
            while not self.port.output(frame):
                await self.port.room()

    async def greet(self) -> None:
        self.port.guest_opened(True)
        while (frame := await self.hear()).type != protocol.SYNC:
            pass  # to the agent before
        await self.say(hello(frame.payload[: protocol.NONCE_SIZE]))

    async def spawned(self) -> int:
        frame = await self.hear()
        assert frame.type == SPAWN
        return frame.command


def hello(nonce: bytes, version: int = protocol.VERSION) -> bytes:
    return encode(HELLO, 0, nonce + version.to_bytes(4, "little") + bytes(4))


def ended(command: int, how: int = protocol.EXITED, value: int = 0) -> bytes:
    return encode(EXIT, command, how.to_bytes(4, "little") + value.to_bytes(4, "little"))


@asynccontextmanager
async def guest(greeted: bool = True) -> AsyncIterator[Guest]:
    guest = Guest()
    working = asyncio.create_task(guest.agent.run())
    try:
        if greeted:
            await guest.greet()
        async with asyncio.timeout(20):
            yield guest
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def test_a_command() -> None:
    async with guest() as it:
        running = asyncio.create_task(it.run("a", "b", input=b"typed"))
        number = await it.spawned()
        assert (await it.hear()).payload == b"typed"
        assert (await it.hear()).payload == b""
        await it.say(encode(DATA, number, b"out", 1), encode(DATA, number, b"err", 2), ended(number, value=7))
        assert await running == Completed(("a", "b"), 7, b"out", b"err")


async def test_check_raises_what_is_the_result_too() -> None:
    async with guest() as it:
        running = asyncio.create_task(it.check("a", "b c"))
        number = await it.spawned()
        await it.say(encode(DATA, number, b"no such thing\n", 2), ended(number, protocol.KILLED, 9))
        with pytest.raises(CommandFailed, match=r"a 'b c' was killed by signal 9; it said:\nno such thing") as caught:
            await running
    assert isinstance(caught.value, Completed)
    assert caught.value.returncode == -9
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.returncode, copy.stderr, str(copy)) == (-9, b"no such thing\n", str(caught.value))


async def test_everybody_gets_the_reason_at_once() -> None:
    async with guest() as it:
        waits = [asyncio.create_task(it.run(str(n))) for n in range(10)]
        process = await it.popen("cat")
        reading = asyncio.create_task(process.stdout.read())
        await asyncio.gather(*(it.spawned() for _ in range(11)))
        it.port.guest_opened(False)
        for each in (*waits, reading, asyncio.create_task(process.wait())):
            with pytest.raises(GuestGone, match="agent"):
                await each
        with pytest.raises(GuestGone, match="agent"):  # nobody knows of another one
            await it.run("early")
        await it.greet()
        again = asyncio.create_task(it.run("again"))
        await it.say(ended(await it.spawned()))
        assert (await again).ok
        it.agent.reset()
        it.port.guest_opened(False)
        after = asyncio.create_task(it.run("after"))  # a machine that was reset starts another agent
        await it.greet()
        await it.say(ended(await it.spawned()))
        assert (await after).ok
        late = asyncio.create_task(it.run("late"))
        await it.spawned()
        it.agent.close(GuestGone("the guest powered off", "power-off"))
        with pytest.raises(GuestGone, match="powered off"):
            await late
        with pytest.raises(GuestGone, match="powered off"):
            await it.run("later")


async def test_a_timeout_kills_the_command() -> None:
    async with guest() as it:
        running = asyncio.create_task(it.run("sleep", "1000", timeout=0.05))
        await it.spawned()
        with pytest.raises(WaitTimeout, match="sleep 1000 had not ended after 0"):
            await running
        frame = await it.hear()
        assert (frame.type, frame.payload) == (protocol.SIGNAL, (9).to_bytes(4, "little"))


async def test_waits_with_a_timeout() -> None:
    async with guest() as it:
        process = await it.popen("cat")
        assert process.stdin is not None
        process.stdin.write(bytes(2 * WINDOW))
        for wait in (process.wait, process.communicate, process.stdin.drain):
            with pytest.raises(WaitTimeout):
                await wait(timeout=0.01)
    port = Port("it", terminal=False)
    port.write(b"typed")
    for each in (port.wait_open(timeout=0.01), port.read(1, timeout=0.01), port.drain(timeout=0.01)):
        with pytest.raises(WaitTimeout, match="port it"):
            await each
    port.close()
    port.write(b"of what is gone nobody waits for anything")
    for nothing in (port.wait_open(), port.wait_shut(), port.drain(), port.read(1)):
        await asyncio.wait_for(nothing, 20)


async def test_no_agent_comes() -> None:
    async with guest(greeted=False) as it:
        with pytest.raises(WaitTimeout):
            await it.run("true", timeout=0.05)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await it.run("true")


async def test_an_agent_that_takes_over() -> None:
    """What is left of another host's stream is skipped, and a nonce of old is not believed."""
    async with guest(greeted=False) as it:
        it.port.guest_opened(True)
        nonce = (await it.hear()).payload[: protocol.NONCE_SIZE]
        await it.say(os.urandom(100_000), hello(os.urandom(16)), encode(DATA, 1, b"old", 1), hello(nonce)[:20])
        await asyncio.sleep(0)
        assert not it.agent.ready
        await it.say(hello(nonce)[20:])
        running = asyncio.create_task(it.run("true"))
        await it.say(ended(await it.spawned()))
        assert (await running).ok


def _hostile(number: int) -> dict[str, list[bytes]]:
    piece = encode(DATA, number, bytes(PAYLOAD_MAX), 1)
    return {
        "more than its window": [piece] * 20,
        "garbage": [b"garbage" * 10],
        "a frame that is too long": [protocol.HEADER.pack(protocol.MAGIC, DATA, 1, number, PAYLOAD_MAX + 1)],
        "a stream that is none": [encode(DATA, number, b"x", 3)],
        "a type that is none": [encode(77, number, b"x")],
        "a message that is ours": [encode(protocol.SIGNAL, number, bytes(4))],
        "output after its end": [encode(DATA, number, b"", 1), encode(DATA, number, b"x", 1)],
        "credit for nothing": [encode(protocol.CREDIT, number, (1).to_bytes(4, "little"))],
        "credit cut short": [encode(protocol.CREDIT, number, b"x")],
        "an end cut short": [encode(EXIT, number, b"x")],
        "an end that cannot be": [ended(number, 3)],
        "a code that cannot be": [ended(number, 0, 256)],
    }


@pytest.mark.parametrize("what", _hostile(0))
async def test_a_hostile_agent_is_dropped(what: str) -> None:
    async with guest() as it:
        process = await it.popen("x")
        number = await it.spawned()
        await it.say(*_hostile(number)[what])
        with pytest.raises(GuestError, match="broke its protocol"):
            await process.wait()
        with pytest.raises(GuestError, match="broke its protocol"):
            await it.run("true")
        it.port.guest_opened(False)
        await it.greet()  # the next one is listened to
        await it.agent.wait_ready()


async def test_output_without_end_is_cut() -> None:
    async with guest() as it:
        process = await it.agent.start(["yes"], gather=1_000_000)
        number = await it.spawned()
        sent = 0
        killed = False
        granted = WINDOW
        while not killed:
            while granted >= PAYLOAD_MAX:
                await it.say(encode(DATA, number, bytes(PAYLOAD_MAX), 1))
                granted -= PAYLOAD_MAX
                sent += PAYLOAD_MAX
            frame = await it.hear()
            killed = frame.type == protocol.SIGNAL
            if frame.type == protocol.CREDIT:
                granted += protocol.number(frame)
        assert sent < 1_000_000 + 2 * WINDOW
        await it.say(ended(number, protocol.KILLED, 9))
        assert await process.wait() == -9
        assert process.overflowed


async def test_a_reader_holds_back_its_command() -> None:
    async with guest() as it:
        process = await it.popen("yes")
        number = await it.spawned()
        for _ in range(WINDOW // PAYLOAD_MAX):
            await it.say(encode(DATA, number, bytes(PAYLOAD_MAX), 1))
        granted = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                while True:
                    granted += protocol.number(await it.hear())
        assert granted < WINDOW / 2  # what one may hold unread is bounded
        await process.stdout.readexactly(WINDOW // PAYLOAD_MAX * PAYLOAD_MAX)
        while granted < WINDOW // PAYLOAD_MAX * PAYLOAD_MAX:
            granted += protocol.number(await it.hear())


async def test_input_is_sent_as_it_is_taken() -> None:
    content = random.Random(1).randbytes(3 * WINDOW + 17)
    async with guest() as it:
        process = await it.popen("cat")
        number = await it.spawned()
        assert process.stdin is not None
        process.stdin.write(content)
        process.stdin.write_eof()
        heard = bytearray()
        while True:
            frame = await it.hear()
            if not frame.payload:
                break
            heard += frame.payload
            await it.say(encode(protocol.CREDIT, number, len(frame.payload).to_bytes(4, "little")))
        assert heard == content
        await it.say(encode(DATA, number))
        with pytest.raises(BrokenPipeError):
            await process.stdin.drain()
        await it.say(ended(number))
        assert await process.wait() == 0


async def test_what_cannot_be_sent() -> None:
    async with guest() as it:
        for argv, env in (((), {}), (("a\0b",), {}), (("a",), {"A=B": "c"}), (("x" * 40_000,), {})):
            with pytest.raises(ConfigError):
                await it.run(*argv, env=env)
        with pytest.raises(ConfigError, match="begins with /"):
            await it.get("relative")


@given(st.binary(max_size=300), st.integers(1, 50))
@settings(max_examples=200, deadline=None)
def test_parser_takes_anything(garbage: bytes, step: int) -> None:
    """Any bytes at all: frames, or a GuestError; never more kept than a frame."""
    nonce = bytes(range(1, 17))
    parser = Parser(nonce)
    stream = garbage + hello(nonce) + encode(DATA, 5, b"payload", 1) + garbage
    try:
        frames = [frame for at in range(0, len(stream), step) for frame in parser.feed(stream[at : at + step])]
    except GuestError:
        assert parser.synchronised
        return
    assert frames[0] == Frame(DATA, 1, 5, b"payload")


def test_tree_there_and_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "a" / "b").mkdir(parents=True)
    (source / "a" / "b" / "big").write_bytes(random.Random(1).randbytes(700_001))
    (source / "a" / "run").write_text("#!/bin/sh\n")
    (source / "a" / "run").chmod(0o755)
    (source / "link").symlink_to("/etc/passwd")
    (source / "a" / "empty").touch()
    unpacker = tree.Unpacker(tmp_path / "copy")
    stream = b"".join(tree.pack(source))
    for at in range(0, len(stream), 1013):
        unpacker.feed(stream[at : at + 1013])
    assert unpacker.ended
    subprocess.run(["diff", "-r", "--no-dereference", source, tmp_path / "copy"], check=True)
    assert (tmp_path / "copy" / "a" / "run").stat().st_mode == (source / "a" / "run").stat().st_mode
    assert os.readlink(tmp_path / "copy" / "link") == "/etc/passwd"


def _entry(type: bytes, name: bytes, *content: bytes) -> bytes:
    head = tree._ENTRY.pack(type[0], 0o755, 0, len(name)) + name
    if type == b"d":
        return head
    return head + b"".join(len(each).to_bytes(4, "little") + each for each in (*content, b""))


TOP = _entry(b"d", b"")
HOSTILE_TREES = {
    "up": TOP + _entry(b"f", b"../x", b"y"),
    "absolute": TOP + _entry(b"f", b"/tmp/x", b"y"),
    "through a link": TOP + _entry(b"l", b"a", b"/tmp") + _entry(b"f", b"a/x", b"y"),
    "through a file": TOP + _entry(b"f", b"a", b"y") + _entry(b"f", b"a/x", b"y"),
    "twice": TOP + _entry(b"f", b"a", b"y") + _entry(b"f", b"a", b"y"),
    "a link in a file's place": TOP + _entry(b"l", b"a", b"/tmp/z") + _entry(b"f", b"a", b"y"),
    "no folder": TOP + _entry(b"f", b"a/b", b"y"),
    "no top": _entry(b"f", b"a", b"y"),
    "the top is a link": _entry(b"l", b"", b"/etc"),
    "a NUL": TOP + _entry(b"f", b"a\0b", b"y"),
    "a device": TOP + _entry(b"c", b"a", b"y"),
    "a long name": TOP + tree._ENTRY.pack(b"f"[0], 0, 0, 1 << 31),
    "a long chunk": TOP + tree._ENTRY.pack(b"f"[0], 0, 0, 1) + b"a" + (1 << 31).to_bytes(4, "little"),
    "a NUL in a link": TOP + _entry(b"l", b"a", b"x\0y"),
    "a long link": TOP + _entry(b"l", b"a", b"x" * 4096),
    "more": TOP + tree._ENTRY.pack(b"e"[0], 0, 0, 0) + b"more",
}


@given(st.binary(max_size=200), st.integers(0, 400), st.integers(1, 64))
@settings(max_examples=200, deadline=None)
def test_a_garbled_tree_ends_in_an_error_or_stays_inside(garbage: bytes, at: int, step: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "home")
        home.mkdir()
        whole = TOP + _entry(b"f", b"a", b"content") + _entry(b"d", b"b") + _entry(b"l", b"b/c", b"../../x")
        unpacker = tree.Unpacker(home / "target")
        stream = whole[:at] + garbage + whole[at:]
        with contextlib.suppress(GuestError, HostError):
            for start in range(0, len(stream), step):
                unpacker.feed(stream[start : start + step])
        unpacker.close()
        assert os.listdir(folder) == ["home"]
        assert set(os.listdir(home)) <= {"target"}


@pytest.mark.parametrize("what", HOSTILE_TREES)
def test_a_hostile_tree_writes_nothing_elsewhere(what: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    unpacker = tree.Unpacker(home / "target")
    with pytest.raises(GuestError):
        unpacker.feed(HOSTILE_TREES[what])
    unpacker.close()
    assert os.listdir(tmp_path) == ["home"]
    assert set(os.listdir(home)) <= {"target"}


@pytest.mark.parametrize(
    ("cmdline", "wanted", "first"),
    [
        ("quiet", "quiet rdinit=/.avmm/agent", "/init"),
        ("rdinit=/my quiet", "rdinit=/my quiet rdinit=/.avmm/agent", "/my"),
        ("quiet -- single rdinit=no", "quiet rdinit=/.avmm/agent -- single rdinit=no", "/init"),
        ("", "rdinit=/.avmm/agent", "/init"),
    ],
)
def test_the_command_line_starts_the_agent_first(cmdline: str, wanted: str, first: str) -> None:
    config = VmConfig.resolve("k", "i", cmdline=cmdline, agent=True)
    assert (config.cmdline, config.agent) == (wanted, first)
    for plain in (VmConfig.resolve("k", "i", cmdline=cmdline), VmConfig.resolve("k", cmdline=cmdline, agent=True)):
        assert (plain.cmdline, plain.agent) == (cmdline, None)
