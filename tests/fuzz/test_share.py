"""Random FUSE requests at a writable share: it never fails, never hangs, and nothing outside the folder changes."""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmm.backends.share import fuse
from avmm.backends.share.folder import open_folder
from avmm.backends.share.fuse import Op
from avmm.backends.share.server import Share
from tests.unit.fuse_client import Client, pieces

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="folders are shared from Linux")

# Few names, node IDs and handles, so that requests meet.
NAMES = st.sampled_from(
    [
        b"a",
        b"b",
        b"link",
        b"dir",
        b"fifo",
        b"..",
        b".",
        b"",
        b"../secret",
        b"/etc/passwd",
        b"dir/a",
        b"x" * 256,
        b"\xff\xfe",
    ]
)
NODES = st.one_of(st.integers(0, 9), st.integers(0, (1 << 64) - 1))
HANDLES = st.one_of(st.integers(0, 6), st.integers(0, (1 << 64) - 1))
SIZES = st.one_of(st.integers(0, 5000), st.integers(0, (1 << 64) - 1))
# No sync of whole file systems, which has nothing to be fuzzed; no time to be spent on terabytes.
OPS = st.sampled_from([op for op in Op if op not in (Op.SYNCFS, Op.FSYNC, Op.FSYNCDIR)])
WORDS = st.one_of(st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF))

BODIES = st.one_of(
    st.binary(max_size=120),
    st.builds(lambda *names: b"\0".join((*names, b"")), NAMES, NAMES),
    st.builds(lambda a, b, n: struct.pack("<II", a, b) + n + b"\0", WORDS, WORDS, NAMES),
    st.builds(lambda a, b, n: struct.pack("<IIII", a, b, 0, 0) + n + b"\0", WORDS, WORDS, NAMES),
    st.builds(lambda q, n, m: struct.pack("<Q", q) + n + b"\0" + m + b"\0", NODES, NAMES, NAMES),
    st.builds(lambda q, f, n, m: struct.pack("<QII", q, f, 0) + n + b"\0" + m + b"\0", NODES, WORDS, NAMES, NAMES),
    st.builds(lambda h, o, s, d: struct.pack("<QQIIQII", h, o, s, 0, 0, 0, 0) + d, HANDLES, SIZES, WORDS,
              st.binary(max_size=100)),
    st.builds(lambda *q: struct.pack("<7Q", *q), HANDLES, SIZES, NODES, HANDLES, SIZES, SIZES, SIZES),
    st.builds(lambda v, h, r: struct.pack("<IIQ", v, 0, h) + r, WORDS, HANDLES, st.binary(min_size=72, max_size=72)),
)  # fmt: skip
REQUESTS = st.lists(st.tuples(OPS, NODES, BODIES, st.integers(0, 300)), max_size=60)


def picture(root: Path, but: Path) -> str:
    """Everything about what is below ``root``, the folder ``but`` left out."""
    digest = hashlib.sha256()
    for top, dirs, files in os.walk(root):
        dirs[:] = sorted(each for each in dirs if Path(top, each) != but)
        for each in sorted(files) + dirs:
            path = os.path.join(top, each)
            s = os.lstat(path)
            digest.update(repr((path, s.st_mode, s.st_uid, s.st_size, s.st_mtime_ns, s.st_nlink)).encode())
    return digest.hexdigest()


@given(requests=REQUESTS, raw=st.lists(st.binary(max_size=100), max_size=4), read_only=st.booleans())
@settings(max_examples=300, deadline=None)
def test_requests(requests: list[tuple[int, int, bytes, int]], raw: list[bytes], read_only: bool) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = root / "shared"
        (folder / "dir").mkdir(parents=True)
        (folder / "a").write_bytes(b"a" * 3000)
        (folder / "link").symlink_to("../secret")
        os.mkfifo(folder / "fifo")
        (root / "secret").write_bytes(b"secret")
        outside = picture(root, folder)
        inside = picture(folder, Path())
        share = Share(open_folder(folder, read_only, 32), "fuzz")
        try:
            client = Client(share)
            for each in (b"a", b"dir", b"link", b"fifo"):  # nodes 2 to 5
                client.call(Op.LOOKUP, 1, each + b"\0")
            client.open(2, os.O_RDONLY if read_only else os.O_RDWR)
            client.open(3, op=Op.OPENDIR)
            for op, nodeid, body, room in requests:
                if op in (Op.FALLOCATE, Op.WRITE, Op.SETATTR, Op.READ):
                    room = 1 << 12
                answer = client.raw(op, nodeid, body, max(room, 16))
                if answer:
                    size, error, _ = fuse.OUT_HEADER.unpack_from(answer)
                    assert size == len(answer) <= max(room, 16)
                    assert -200 < error <= 0
            for data in raw:
                answer = bytearray(64)
                try:
                    done = share.serve(pieces(data, 20), [memoryview(answer)])
                except ValueError:
                    continue
                if not isinstance(done, int):
                    done()
        finally:
            share.close()
        assert picture(root, folder) == outside
        if read_only:
            assert picture(folder, Path()) == inside
        for top, dirs, _ in os.walk(folder):  # so that it can be removed
            for inner in dirs:
                os.chmod(os.path.join(top, inner), 0o755)
    assert len(os.listdir("/proc/self/fd")) == before
