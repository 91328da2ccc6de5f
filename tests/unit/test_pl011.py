"""PL011: the register file as a driver sees it, and flow in both directions."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from avmm.bootloader import machine
from avmm.devices.pl011 import Pl011
from avmm.fdt import Node, encode

DR, RSR, FR, LCR_H, CR, IFLS, IMSC, RIS, MIS, ICR = 0, 4, 0x18, 0x2C, 0x30, 0x34, 0x38, 0x3C, 0x40, 0x44
RX, TX, RT, BE, OE = 1 << 4, 1 << 5, 1 << 6, 1 << 9, 1 << 10
RXFE, TXFF, RXFF, TXFE = 1 << 4, 1 << 5, 1 << 6, 1 << 7
FEN = 1 << 4


class Line:
    level = False

    def __init__(self) -> None:
        self.rose = asyncio.Event()
        self.interrupt = threading.Event()

    def set(self, level: bool) -> None:
        self.level = level
        if level:
            self.rose.set()
            self.interrupt.set()

    def pulse(self) -> None:
        raise AssertionError("a UART's interrupt is level-sensitive")

    restore = set


class Terminal:
    """A backend: ``typed`` is what the host sends, ``b""`` at the end."""

    def __init__(self) -> None:
        self.output = bytearray()
        self.typed: asyncio.Queue[bytes] = asyncio.Queue()
        self._rest = b""

    async def read(self, limit: int) -> bytes:
        data = self._rest or await self.typed.get()
        self._rest = data[limit:]
        return data[:limit]

    def write(self, data: bytes) -> None:
        self.output += data


class Batch:
    """What the engine does with an open batch, a call at a time."""

    def __init__(self) -> None:
        self.flags: int | None = None
        self.taken = b""

    def open(self, flags: int) -> None:
        self.flags = flags

    def close(self) -> bytes:
        self.flags = None
        taken, self.taken = self.taken, b""
        return taken


class Port:
    """A UART with a FIFO and receive interrupts enabled, as a driver leaves it."""

    def __init__(self, batch: Batch | None = None) -> None:
        self.line = Line()
        self.terminal = Terminal()
        self.lock = threading.RLock()
        self.uart = Pl011(self.lock, self.line, self.terminal, batch)
        self.write(LCR_H, 0x70)
        self.write(IMSC, RX | RT)

    def read(self, offset: int) -> int:
        with self.lock:
            return self.uart.read(offset, 4)

    def write(self, offset: int, value: int) -> None:
        with self.lock:
            self.uart.write(offset, 4, value)

    def drain(self) -> bytes:
        """What an interrupt handler does: read until the FIFO is empty."""
        data = bytearray()
        while not self.read(FR) & RXFE:
            data.append(self.read(DR))
        return bytes(data)


@pytest.fixture
def port() -> Port:
    return Port()


@contextlib.asynccontextmanager
async def running(port: Port) -> AsyncIterator[None]:
    task = asyncio.create_task(port.uart.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def test_output_is_immediate_and_raises_the_transmit_interrupt(port: Port) -> None:
    for character in b"hello":
        port.write(DR, character)
    assert port.terminal.output == b"hello"
    assert port.uart.transmitted == 5
    assert port.read(RIS) == TX
    assert not port.line.level
    port.write(IMSC, TX)
    assert port.line.level
    assert port.read(MIS) == TX
    port.write(ICR, TX)
    assert not port.line.level
    assert port.read(RIS) == 0
    assert port.read(FR) & (TXFE | TXFF) == TXFE


def test_blocked_backend_shows_a_full_fifo_and_holds_the_interrupt(port: Port) -> None:
    port.write(IMSC, TX)
    port.uart.tx_blocked = True
    assert port.read(FR) & (TXFE | TXFF) == TXFF
    port.write(DR, ord("x"))
    assert port.terminal.output == b"x"
    assert not port.line.level
    state = port.uart.save()
    port.uart.tx_blocked = False
    assert port.line.level
    assert port.read(FR) & (TXFE | TXFF) == TXFE
    twin = Port()
    twin.uart.restore(state)  # what was held back is not forgotten
    assert twin.line.level


def block(port: Port) -> None:
    port.uart.tx_blocked = True


@pytest.mark.parametrize(
    "act",
    [
        lambda port: port.read(FR),
        lambda port: port.read(RIS),
        lambda port: port.write(CR, 0x301),
        lambda port: port.write(IMSC, TX),
        lambda port: port.uart.receive(b"typed"),
        lambda port: port.uart.send_break(),
        lambda port: port.uart.save(),
        lambda port: port.uart.restore(Port().uart.save()),
        lambda port: port.uart.reset(),
        lambda port: port.uart.collect(),
        block,
    ],
)
def test_whatever_happens_comes_after_what_the_batch_has_taken(act: Callable[[Port], object]) -> None:
    batch = Batch()
    port = Port(batch)
    assert batch.flags is None
    port.write(DR, ord("a"))
    assert batch.flags == port.uart._flags()
    batch.taken = b"bc"
    act(port)
    assert port.terminal.output == b"abc"
    assert port.uart.transmitted == 3
    assert batch.flags is None


def test_bytes_written_with_an_exit_come_after_the_batch() -> None:
    batch = Batch()
    port = Port(batch)
    port.write(DR, ord("a"))
    batch.taken = b"bc"
    port.write(DR, ord("d"))
    assert port.terminal.output == b"abcd"
    assert batch.flags is not None


@pytest.mark.parametrize(
    "prepare",
    [
        block,
        lambda port: port.write(IMSC, TX),
        lambda port: port.write(CR, 0x381),  # loopback
        lambda port: [port.write(CR, 0x301), port.write(ICR, RX)],  # FR is about to lie, once
    ],
)
def test_no_batch_where_a_byte_matters(prepare: Callable[[Port], object]) -> None:
    batch = Batch()
    port = Port(batch)
    prepare(port)
    port.write(DR, ord("a"))
    assert batch.flags is None


@pytest.mark.parametrize(("ifls", "trigger"), [(0, 4), (1, 8), (2, 16), (3, 24), (4, 28)])
def test_receive_interrupt_at_the_trigger_level_and_timeout_below(port: Port, ifls: int, trigger: int) -> None:
    port.write(IFLS, ifls << 3)
    assert port.uart.receive(bytes(trigger - 1)) == trigger - 1
    assert port.read(RIS) == RT
    assert port.line.level
    assert port.uart.receive(b"!") == 1
    assert port.read(RIS) == RX
    for left in range(trigger - 1, -1, -1):
        assert port.line.level
        port.read(DR)
        assert port.read(RIS) == (RT if left else 0)
    assert not port.line.level


def test_fifo_is_32_deep_or_one(port: Port) -> None:
    assert port.uart.receive(bytes(range(100))) == 32
    assert port.read(FR) & (RXFE | RXFF) == RXFF
    assert port.uart.receive(b"x") == 0
    assert port.drain() == bytes(range(32))
    assert port.read(FR) & (RXFE | RXFF) == RXFE
    port.write(LCR_H, 0x60)
    assert port.uart.receive(b"ab") == 1
    assert port.read(RIS) == RX
    assert port.read(FR) & (RXFE | RXFF) == RXFF
    assert port.drain() == b"a"
    assert port.read(DR) == 0  # empty


def test_nothing_is_delivered_to_a_guest_that_does_not_listen(port: Port) -> None:
    port.write(IMSC, 0)
    assert port.uart.receive(b"lost?") == 0
    for _ in range(40):  # Linux prints by polling FR before each character: that is not listening
        port.read(FR)
        port.write(DR, ord("."))
    assert port.uart.receive(b"lost?") == 0
    while not port.uart.receive(b"got"):  # a boot loader's getc()
        port.read(FR)
    assert port.drain() == b"got"


def test_break_comes_with_its_error_bit(port: Port) -> None:
    port.write(IMSC, RX | RT | BE)
    assert port.uart.send_break()
    assert port.uart.receive(b"t") == 1
    assert port.read(RIS) == BE | RT
    assert port.read(DR) == 1 << 10
    assert port.read(RSR) == 1 << 2
    assert port.read(DR) == ord("t")
    assert port.read(RSR) == 0
    port.write(ICR, BE)
    assert not port.line.level
    port.uart.receive(bytes(32))
    assert not port.uart.send_break()


def test_error_clear_register(port: Port) -> None:
    port.uart.send_break()
    port.read(DR)
    port.write(RSR, 0)
    assert port.read(RSR) == 0


def test_loopback_and_its_overrun(port: Port) -> None:
    port.write(CR, 0x381)
    for character in range(33):
        port.write(DR, character)
    assert port.terminal.output == b""
    assert port.read(RIS) == TX | RX | OE
    assert port.drain() == bytes(range(32))


def test_registers_hold_their_writable_bits(port: Port) -> None:
    for offset, mask in {0x20: 0xFF, 0x24: 0xFFFF, 0x28: 0x3F, LCR_H: 0xFF, CR: 0xFF87, IFLS: 0x3F, 0x48: 7}.items():
        port.write(offset, 0xFFFFFFFF)
        assert port.read(offset) == mask
    for offset in (FR, RIS, MIS, 0xFE0):
        before = port.read(offset)
        port.write(offset, 0xFFFFFFFF)
        assert port.read(offset) == before


def test_narrow_accesses(port: Port) -> None:
    """Linux uses 16-bit accesses on a PL011 without reg-io-width."""
    port.uart.write(DR, 2, ord("a"))
    port.uart.write(DR, 1, ord("b"))
    assert port.terminal.output == b"ab"
    port.uart.write(0x24, 2, 0xABCD)
    assert port.uart.read(0x24, 2) == 0xABCD
    assert port.uart.read(0x24, 1) == 0xCD


async def test_a_megabyte_arrives_whole(port: Port) -> None:
    """The guest's side runs on another thread, as it does, and starts to listen when the paste is already there."""
    paste = bytes(n * 7 & 0xFF for n in range(1 << 20))
    port.write(IMSC, 0)
    received = bytearray()

    def guest() -> None:
        port.write(IMSC, RX | RT)
        while len(received) < len(paste):
            assert port.line.interrupt.wait(30)
            port.line.interrupt.clear()
            received.extend(port.drain())

    port.terminal.typed.put_nowait(paste)
    async with running(port), asyncio.timeout(60):
        await asyncio.to_thread(guest)
    assert bytes(received) == paste
    assert port.uart.received == len(paste)


async def test_input_waits_while_receive_interrupts_are_masked(port: Port) -> None:
    port.terminal.typed.put_nowait(bytes(range(40)))
    async with running(port), asyncio.timeout(60):
        await port.line.rose.wait()
        port.write(IMSC, 0)  # Linux throttles
        assert port.drain() == bytes(range(32))
        for _ in range(10):
            await asyncio.sleep(0)
        assert port.uart.received == 32
        port.line.rose.clear()
        port.write(IMSC, RX | RT)
        await port.line.rose.wait()
        assert port.drain() == bytes(range(32, 40))


async def test_input_goes_on_after_a_restore(port: Port) -> None:
    listening = port.uart.save()
    port.write(IMSC, 0)
    port.terminal.typed.put_nowait(b"more")
    async with running(port), asyncio.timeout(60):
        for _ in range(10):
            await asyncio.sleep(0)
        assert port.uart.received == 0
        port.uart.restore(listening)
        await port.line.rose.wait()
    assert port.drain() == b"more"


async def test_run_ends_with_the_input(port: Port) -> None:
    port.terminal.typed.put_nowait(b"bye")
    port.terminal.typed.put_nowait(b"")
    async with asyncio.timeout(60):
        await port.uart.run()
    assert port.drain() == b"bye"


def test_node() -> None:
    node = Pl011.fdt_node(machine.PL011)
    assert node.name == "pl011@9000000"
    if (dtc := shutil.which("dtc")) is None:
        pytest.skip("dtc is not installed")
    blob = encode(Node("", {"#address-cells": 2, "#size-cells": 2}, [node]))
    text = subprocess.run([dtc, "-I", "dtb", "-O", "dts"], input=blob, check=True, capture_output=True, timeout=60)
    plain = text.stdout.decode().replace("\\0", '", "')  # how older versions write a list of strings
    lines = {re.sub(r"\s+", " ", line).strip() for line in plain.splitlines()}
    assert {
        'compatible = "arm,pl011", "arm,primecell";',
        "reg = <0x00 0x9000000 0x00 0x1000>;",
        "interrupts = <0x00 0x01 0x04>;",
        'clock-names = "uartclk", "apb_pclk";',
    } <= lines


def test_input_that_comes_while_linux_opens_the_port_is_kept() -> None:
    """pl011_startup() unmasks the receive interrupts, enables the UART, and only then empties the FIFO."""
    port = Port()
    port.write(ICR, 0x7F0)
    port.write(IMSC, RX | RT)
    port.write(CR, 0x301)
    assert port.uart.receive(b"early") == 5
    port.write(ICR, RX | RT)
    flushed = bytearray()
    for _ in range(64):
        if port.read(FR) & RXFE:
            break
        flushed.append(port.read(DR) & 0xFF)
    port.write(IMSC, RX | RT)
    assert not flushed
    assert port.line.level
    found = bytearray()
    while not port.read(FR) & RXFE:
        found.append(port.read(DR) & 0xFF)
    assert found == b"early"


def test_a_driver_that_acknowledges_before_it_reads_gets_its_input() -> None:
    port = Port()
    port.write(CR, 0x301)
    for letter in b"xyz":
        assert port.uart.receive(bytes((letter,))) == 1
        found = bytearray()
        while port.line.level:  # its interrupt handler, again as long as the level-sensitive interrupt holds
            port.write(ICR, port.read(MIS))
            while not port.read(FR) & RXFE:
                found.append(port.read(DR) & 0xFF)
        assert found == bytes((letter,))
