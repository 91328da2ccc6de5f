"""One entry for each parser: samples of what it reads, damaged at random, and nothing but the error it promises.

Whatever in avmm takes bytes apart is either here, has a fuzz test of its own elsewhere (named here), or reads what
nobody hostile writes (said here): :func:`test_every_parser_has_an_entry` finds one that is in neither.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gzip
import lzma
import os
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import avmm
from avmm.backends import tap
from avmm.backends.disk import open_disk
from avmm.backends.offload import finished
from avmm.backends.qcow2 import Qcow2
from avmm.backends.stream import Deframer
from avmm.backends.usernet import dhcp, dns
from avmm.backends.usernet.plan import Plan
from avmm.bootloader import compress, cpio, modules
from avmm.bootloader.image import parse_kernel
from avmm.errors import GuestError, HostError, ImageError
from avmm.fdt import Node, decode, encode
from avmm.guest import protocol, tree
from avmm.link import Frame
from avmm.snapfile import Reader, Writer
from avmm.snapshot import plain
from tests.unit.test_usernet_protocols import SAMPLES as FRAMES
from tests.unit.test_usernet_protocols import query

ROOT = Path(avmm.__file__).parent
TESTS = Path(__file__).parents[1]
MIB = 1 << 20


@dataclass(frozen=True)
class Parser:
    """``parse(data)`` raises ``errors`` at most; ``reads`` are the files of avmm that it is about."""

    reads: tuple[str, ...]
    samples: Callable[[], Sequence[bytes]]
    parse: Callable[[bytes], object]
    errors: tuple[type[Exception], ...] = ()


def in_a_file(use: Callable[[Path], None], data: bytes) -> None:
    """``use`` a file that holds ``data``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        use(path)


def qcow2_images() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.qcow2"
        disk = Qcow2.create(os.open(path, os.O_RDWR | os.O_CREAT), path, 4 * MIB, cluster_bits=9)
        disk.writev(0, [memoryview(b"content" * 1024)])
        disk.write_zeroes(8192, 4096, True)
        disk.close()
        return [path.read_bytes()]


def use_disk(path: Path) -> None:
    disk = open_disk(path, "qcow2")
    size = min(disk.size, MIB)
    works: list[Callable[[], object]] = [
        lambda: disk.readv(0, [memoryview(bytearray(size))]),
        lambda: disk.writev(0, [memoryview(bytearray(min(size, 1 << 14)))]),
        lambda: disk.discard(0, size),
        disk.flush,
        disk.close,
    ]
    for work in works:
        with contextlib.suppress(OSError):
            work()


def snapshots() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "snapshot"
        with Writer(path, "1.2.3") as writer:
            writer.add("config", b'{"dict": []}')
            record = writer.reserve("ram", 1 << 16)
            writer.write(record, 0, b"\1" * 4096)
        return [path.read_bytes()]


def use_snapshot(path: Path) -> None:
    reader = Reader(path)
    try:
        reader.read("config")
        record = reader.record("ram")
        assert 0 <= record.offset <= record.offset + record.length <= path.stat().st_size
    finally:
        reader.close()


def kernels() -> list[bytes]:
    head = struct.pack("<IIQQQ24x4sI", 0, 0, 0x8_0000, 0x2000, 0xA, b"ARM\x64", 0)
    image = head + bytes(0x2000 - len(head))
    return [image, gzip.compress(image), lzma.compress(image)]


def use_kernel(data: bytes) -> None:
    kernel = parse_kernel(data, 64 * MIB)
    assert len(kernel.image) <= kernel.image_size <= 64 * MIB


def elf_modules() -> list[bytes]:
    names, info = b"\0.modinfo\0", b"depends=virtio,ring\0alias=fs-x\0"
    sections = [(0, 0, 0), (1, 64, len(info)), (0, 64 + len(info), len(names))]
    table = 64 + len(info) + len(names)
    head = (b"\x7fELF\x02\x01".ljust(0x28, b"\0") + struct.pack("<Q", table)).ljust(0x3A, b"\0")
    head += struct.pack("<HHH", 64, len(sections), 2)
    body = b"".join(struct.pack("<IIQQQQ24x", name, 1, 0, 0, at, size) for name, at, size in sections)
    return [head + info + names + body]


def trees() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder) / "top"
        (top / "inner").mkdir(parents=True)
        (top / "inner" / "file").write_bytes(b"content" * 100)
        (top / "link").symlink_to("/etc/passwd")
        return [b"".join(tree.pack(top)), b"".join(tree.pack_bytes(b"content", 0o644))]


def use_tree(data: bytes) -> None:
    """Nothing appears but below the target."""
    with tempfile.TemporaryDirectory() as folder:
        unpacker = tree.Unpacker(Path(folder) / "target")
        try:
            for at in range(0, len(data), 37):
                unpacker.feed(data[at : at + 37])
        finally:
            unpacker.close()
            assert os.listdir(folder) in ([], ["target"])


def agent_frames() -> list[bytes]:
    hello = protocol.encode(protocol.HELLO, 0, struct.pack("<16sII", bytes(16), 1, 8))
    parts = [protocol.encode(protocol.EXIT, 1, struct.pack("<II", 0, 3)), protocol.credit(1, 0, 77)]
    return [hello + b"".join([*parts, *protocol.data(1, 1, b"output" * 50)])]


def use_agent(data: bytes) -> None:
    parser = protocol.Parser(bytes(16))
    for at in range(0, len(data), 23):
        for frame in parser.feed(data[at : at + 23]):
            if frame.type == protocol.CREDIT:
                protocol.number(frame)
            elif frame.type == protocol.EXIT:
                protocol.end(frame)


def use_offload(data: bytes) -> None:
    for start, offset, size in ((34, 16, 1448), (34, 6, 0), (54, 16, 8), (len(data) // 2, 16, 100)):
        for frame in finished(Frame(data, start, offset, size)):
            assert len(frame.data) <= len(data) + 60


def use_dhcp(data: bytes) -> None:
    dhcp.options(data)
    dhcp.Leases(Plan()).answer(data, bytes.fromhex("525400123456"))


def discover() -> bytes:
    mac = bytes.fromhex("525400123456")
    head = struct.pack("!BBBBIHH16x16s192x4s", 1, 1, 6, 0, 1, 0, 0, mac, b"\x63\x82\x53\x63")
    return head + bytes((53, 1, 3, 50, 4, 10, 0, 2, 15, 255))


def use_dns(data: bytes) -> None:
    dns.question(data)
    dns.answer(data, {"": "1.2.3.4"})


PARSERS = {
    "qcow2": Parser(
        ("backends/qcow2.py",), qcow2_images, functools.partial(in_a_file, use_disk), (ImageError, OSError)
    ),
    "snapshot file": Parser(("snapfile.py",), snapshots, functools.partial(in_a_file, use_snapshot), (ImageError,)),
    "snapshot records": Parser(
        ("snapshot/plain.py",),
        lambda: [plain.dumps({"a": (1, b"bytes", None), "path": Path("/x")}), plain.dumps(Node("n", {"p": b"q"}))],
        plain.loads,
        (plain.NotPlain,),
    ),
    "kernel image": Parser(("bootloader/image.py", "bootloader/compress.py"), kernels, use_kernel, (ImageError,)),
    "kernel module": Parser(("bootloader/modules.py",), elf_modules, modules.modinfo, (ImageError,)),
    "compressed": Parser(
        ("bootloader/compress.py",),
        lambda: [gzip.compress(b"content" * 99), lzma.compress(b"content" * 99)],
        lambda data: (kind := compress.detect(data)) and compress.decompress(kind, data, MIB),
        (ImageError, compress.TooLarge),
    ),
    "initrd (cpio)": Parser(
        ("bootloader/cpio.py",),
        lambda: [cpio.pack([cpio.directory("etc"), cpio.file("etc/file", b"content", 0o755)])],
        lambda data: list(cpio.unpack(data)),
        (ImageError,),
    ),
    "device tree": Parser(
        ("fdt.py",),
        lambda: [encode(Node("", {"compatible": b"a\0"}, [Node("cpu@0", {"reg": bytes(4)})]))],
        decode,
        (ValueError,),
    ),
    "frames of a stream": Parser(
        ("backends/stream.py",),
        lambda: [b"".join(struct.pack(">I", len(frame)) + frame for frame in FRAMES)],
        lambda data: Deframer().feed(data),
        (ValueError,),
    ),
    "segments": Parser(("backends/offload.py", "backends/checksum.py"), lambda: FRAMES, use_offload),
    "frames of a TAP": Parser(
        ("backends/tap.py",),
        lambda: [struct.pack("<BBHHHH", 1, 1, 54, 1448, 34, 16) + frame for frame in FRAMES],
        tap._frame,
    ),
    "DHCP": Parser(("backends/usernet/dhcp.py",), lambda: [discover()], use_dhcp),
    "DNS": Parser(("backends/usernet/dns.py",), lambda: [query("api.example.org")], use_dns),
    "agent": Parser(("guest/protocol.py",), agent_frames, use_agent, (GuestError,)),
    "trees of a guest": Parser(("guest/tree.py",), trees, use_tree, (GuestError, HostError)),
}

#: What takes more than one piece of data to get anywhere has a test of its own.
ELSEWHERE = {
    "backends/share/fuse.py": "fuzz/test_share.py::test_requests",
    "backends/share/server.py": "fuzz/test_share.py::test_requests",
    "backends/usernet/stack.py": "unit/test_usernet_protocols.py::test_fuzz",
    "backends/vsock/protocol.py": "unit/test_vsock.py::test_fuzz",
    "monitor.py": "unit/test_monitor.py::test_garbage_and_hang_ups_leave_the_vm_alone",
}

#: Nobody hostile writes what these read.
TRUSTED = {
    "backends/share/syscalls.py": "the host's kernel, of its own directories",
    "backends/usernet/plan.py": "constants",
    "config.py": "the user's own words; tests/unit/test_cli_bad_input.py",
    "debian.py": "signed lists and packages with known hashes",
    "devices/gicv3/registers.py": "a register's bytes, of the vCPU's own access; tests/contract",
    "doctor/guest.py": "its own probe's answers",
    "ram.py": "the host's kernel, of its own page tables",
    "signing.py": "this Python's own executable",
    "snapshot/store.py": "only what snapshot/plain.py and snapfile.py have read",
    "testing/queue.py": "rings of a test",
}

#: What tells a parser: calls by these names. devices/virtio is test_devices.py's.
CALLS = {"unpack", "unpack_from", "iter_unpack", "from_bytes", "loads", "decompress", "parse"}


def test_every_parser_has_an_entry() -> None:
    found = set()
    for path in ROOT.rglob("*.py"):
        name = str(path.relative_to(ROOT))
        calls = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        if calls & CALLS and not name.startswith("devices/virtio/"):
            found.add(name)
    listed = [name for parser in PARSERS.values() for name in parser.reads]
    assert found - {*listed, *ELSEWHERE, *TRUSTED} == set(), "each needs an entry in PARSERS"
    assert {*ELSEWHERE, *TRUSTED} & set(listed) == set()
    for name in [*listed, *ELSEWHERE, *TRUSTED]:
        assert (ROOT / name).exists(), name
    for test in ELSEWHERE.values():
        file, _, function = test.partition("::")
        assert f"def {function}(" in (TESTS / file).read_text(), test


CHANGES = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255)),
    max_size=6,
)


def damaged(sample: bytes, changes: list[tuple[float, int]], early: bool, cut: float, more: bytes) -> bytes:
    """``sample`` with bytes changed (``early``: among the first 128), cut off, and something behind it."""
    data = bytearray(sample)
    for where, value in changes:
        data[int(where * (min(len(data), 128) if early else len(data)))] = value
    return bytes(data[: int(len(data) * cut)]) + more


@pytest.mark.parametrize("name", PARSERS)
def test_samples_are_read(name: str) -> None:
    """What is damaged below was whole."""
    parser = PARSERS[name]
    for sample in parser.samples():
        parser.parse(sample)


@pytest.mark.parametrize("name", PARSERS)
def test_damage_ends_in_the_promised_error(name: str) -> None:
    parser = PARSERS[name]
    samples = parser.samples()
    content = st.builds(
        damaged,
        st.sampled_from(samples),
        CHANGES,
        st.booleans(),
        st.just(1.0) | st.floats(0, 1),
        st.just(b"") | st.binary(max_size=40),
    )

    @given(content | st.binary(max_size=200))
    @settings(max_examples=100)
    def attack(data: bytes) -> None:
        with contextlib.suppress(*parser.errors):
            parser.parse(data)

    attack()
