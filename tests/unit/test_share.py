"""A shared folder before a guest that speaks FUSE: right answers, and nothing outside the folder."""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from avmm.attachments import attachments_of
from avmm.backends.share import fuse
from avmm.backends.share.folder import open_folder
from avmm.backends.share.fuse import ROOT_ID, Op
from avmm.backends.share.server import Share
from avmm.config import ShareConfig, VmConfig
from avmm.devices.virtio.fs import Fs
from avmm.errors import ConfigError
from avmm.testing.queue import attached
from tests.unit.fuse_client import Client, pieces

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="folders are shared from Linux")

MakeShare = Callable[..., Share]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "shared"
    (path / "sub" / "deep").mkdir(parents=True)
    (path / "hello").write_bytes(b"hello, guest\n")
    (path / "sub" / "deep" / "file").write_bytes(b"deep\n")
    (path / "up").symlink_to("../secret")
    (path / "absolute").symlink_to(tmp_path / "secret")
    (path / "outside").symlink_to("..")
    (tmp_path / "secret").write_bytes(b"the host's own\n")
    return path


@pytest.fixture
def share(folder: Path) -> Iterator[MakeShare]:
    made: list[Share] = []

    def make(read_only: bool = False, descriptors: int = 1000, cache: float = 0.0, slow: bool = False) -> Share:
        made.append(Share(open_folder(folder, read_only, descriptors), "test", cache, slow))
        return made[-1]

    before = len(os.listdir("/proc/self/fd"))
    yield make
    for each in made:
        each.close()
    assert len(os.listdir("/proc/self/fd")) == before


def refused(number: int, call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno == number, errno.errorcode.get(caught.value.errno or 0)


# The protocol.


@pytest.mark.skipif(shutil.which("gcc") is None, reason="compiles against linux/fuse.h")
def test_structures_have_the_kernels_sizes(tmp_path: Path) -> None:
    structures = {
        "in_header": fuse.IN_HEADER.size, "out_header": fuse.OUT_HEADER.size, "init_out": fuse.INIT_OUT.size,
        "forget_in": fuse.FORGET_IN.size, "batch_forget_in": fuse.BATCH_FORGET_IN.size,
        "forget_one": fuse.FORGET_ONE.size, "getattr_in": fuse.GETATTR_IN.size, "setattr_in": fuse.SETATTR_IN.size,
        "mknod_in": fuse.MKNOD_IN.size, "mkdir_in": fuse.MKDIR_IN.size, "rename_in": fuse.RENAME_IN.size,
        "rename2_in": fuse.RENAME2_IN.size, "link_in": fuse.LINK_IN.size, "open_in": fuse.OPEN_IN.size,
        "create_in": fuse.CREATE_IN.size, "release_in": fuse.RELEASE_IN.size, "read_in": fuse.READ_IN.size,
        "write_in": fuse.WRITE_IN.size, "fsync_in": fuse.FSYNC_IN.size, "getxattr_in": fuse.GETXATTR_IN.size,
        "access_in": fuse.ACCESS_IN.size, "fallocate_in": fuse.FALLOCATE_IN.size, "lseek_in": fuse.LSEEK_IN.size,
        "copy_file_range_in": fuse.COPY_IN.size, "entry_out": fuse.ENTRY_SIZE, "open_out": fuse.OPEN_OUT.size,
        "attr_out": len(fuse.attr_out(0, bytes(88))), "write_out": fuse.WRITE_OUT.size,
        "statfs_out": fuse.STATFS_OUT.size, "getxattr_out": fuse.GETXATTR_OUT.size, "lseek_out": fuse.LSEEK_OUT.size,
    }  # fmt: skip
    ops = "".join(f'_Static_assert(FUSE_{op.name} == {op.value}, "{op.name}");\n' for op in Op)
    sizes = "".join(
        f'_Static_assert(sizeof(struct fuse_{name}) == {size}, "{name}");\n' for name, size in structures.items()
    )
    source = tmp_path / "check.c"
    source.write_text(f"#include <linux/fuse.h>\n{ops}{sizes}")
    done = subprocess.run(["gcc", "-fsyntax-only", source], capture_output=True, text=True)
    if "linux/fuse.h" in done.stderr and "No such file" in done.stderr:
        pytest.skip("no linux/fuse.h here")
    assert done.returncode == 0, done.stderr


def test_before_init_nothing_is_answered(share: MakeShare) -> None:
    one = share()
    request = fuse.IN_HEADER.pack(46, Op.LOOKUP, 9, 1, 0, 0, 0, 0, 0) + b"hello\0"
    answer = bytearray(200)
    assert one.serve(pieces(request, 10), [memoryview(answer)]) == 16
    assert fuse.OUT_HEADER.unpack_from(answer) == (16, -errno.EIO, 9)


def test_a_newer_kernel_is_told_to_speak_our_version(share: MakeShare) -> None:
    client = Client(share())
    answer = client.call(Op.INIT, 0, fuse.INIT_IN.pack(8, 0, 0, 0))
    assert fuse.INIT_OUT.unpack(answer)[:2] == (7, 38)
    answer = client.call(Op.INIT, 0, fuse.INIT_IN.pack(7, 38, 1 << 17, 0))
    assert fuse.INIT_OUT.unpack(answer)[:3] == (7, 38, 1 << 20)  # who reads further ahead than it asks for may go on
    refused(errno.EPROTO, client.call, Op.INIT, 0, fuse.INIT_IN.pack(7, 30, 0, 0))


# Right answers.


@pytest.mark.parametrize("slow", [False, True])
def test_what_is_there(share: MakeShare, folder: Path, slow: bool) -> None:
    client = Client(share(slow=slow))
    for path in ("", "hello", "sub", "sub/deep", "sub/deep/file", "up"):
        found, wanted = client.getattr(client.walk(path)), os.lstat(folder / path)
        assert (found.ino, found.size, found.mode, found.nlink, found.mtime) == (
            wanted.st_ino, wanted.st_size, wanted.st_mode, wanted.st_nlink, wanted.st_mtime_ns,
        )  # fmt: skip
    handle = client.open(client.walk("hello"))
    assert client.read(handle, 7, 100) == b"guest\n"
    assert client.read(handle, 100, 10) == b""
    client.release(handle)
    refused(errno.EBADF, client.read, handle, 0, 1)
    assert client.call(Op.READLINK, client.walk("up")) == b"../secret"
    room = fuse.STATFS_OUT.unpack(client.call(Op.STATFS, ROOT_ID))
    assert room[0] == os.statvfs(folder).f_blocks


@pytest.mark.parametrize("op", [Op.READDIR, Op.READDIRPLUS])
def test_directories_in_pieces(share: MakeShare, folder: Path, op: Op) -> None:
    for index in range(300):
        (folder / "sub" / f"{index:03}{'x' * (index % 200)}").touch()
    client = Client(share())
    for size in (512 if op == Op.READDIR else 1024, 4096, 60000):
        names = client.names(client.walk("sub"), size, op)
        assert len(names) == len(set(names))
        assert set(names) == {".", "..", *os.listdir(folder / "sub")}


def test_changes(share: MakeShare, folder: Path) -> None:
    client = Client(share())
    sub = client.mkdir(ROOT_ID, "new", 0o750).nodeid
    assert stat.S_IMODE((folder / "new").stat().st_mode) == 0o750
    found, handle = client.create(sub, "file", 0o666)
    assert stat.S_IMODE(found.mode) == 0o666  # the guest has applied its own umask, the host's does not count
    data = random.Random(1).randbytes(40_000)
    assert client.write(handle, 5, data) == len(data)
    assert (folder / "new/file").read_bytes() == bytes(5) + data
    client.call(Op.FSYNC, found.nodeid, fuse.FSYNC_IN.pack(handle, 0))
    client.setattr(found.nodeid, fuse.FATTR_SIZE, size=10)
    client.setattr(found.nodeid, fuse.FATTR_MODE, mode=0o600)
    client.setattr(found.nodeid, fuse.FATTR_MTIME, mtime=1_000_000, mtime_ns=7)
    status = (folder / "new/file").stat()
    assert (status.st_size, stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (10, 0o600, 10**15 + 7)
    assert client.link(found.nodeid, ROOT_ID, "second").nlink == 2
    client.rename(sub, "file", ROOT_ID, "hello")
    assert (folder / "hello").stat().st_ino == status.st_ino
    refused(errno.EEXIST, client.rename, ROOT_ID, "up", ROOT_ID, "absolute", 1)
    client.rename(ROOT_ID, "up", ROOT_ID, "absolute", 2)
    assert os.readlink(folder / "absolute") == "../secret"
    client.symlink(sub, "link", "anything at all")
    assert os.readlink(folder / "new/link") == "anything at all"
    refused(errno.ENOTEMPTY, client.named, Op.RMDIR, ROOT_ID, "new")
    client.named(Op.UNLINK, sub, "link")
    client.named(Op.RMDIR, ROOT_ID, "new")
    assert not (folder / "new").exists()
    # Open, without a name, and still there.
    client.named(Op.UNLINK, ROOT_ID, "hello")
    client.named(Op.UNLINK, ROOT_ID, "second")
    assert client.getattr(found.nodeid).nlink == 0
    assert client.read(handle, 0, 100) == bytes(5) + data[:5]
    refused(errno.EEXIST, client.create, ROOT_ID, "sub", 0o644, os.O_RDWR | os.O_EXCL)
    refused(errno.EISDIR, client.create, ROOT_ID, "sub")


def test_data_of_many_kinds(share: MakeShare, folder: Path) -> None:
    client = Client(share())
    found, handle = client.create(ROOT_ID, "sparse")
    client.write(handle, 1 << 20, b"end")
    refused(errno.EINVAL, client.write, handle, 1 << 63, b"x")
    where = fuse.LSEEK_OUT.unpack(client.call(Op.LSEEK, 0, fuse.LSEEK_IN.pack(handle, 0, os.SEEK_DATA)))[0]
    with open(folder / "sparse", "rb") as file:
        assert where == os.lseek(file.fileno(), 0, os.SEEK_DATA)
    client.call(Op.FALLOCATE, found.nodeid, fuse.FALLOCATE_IN.pack(handle, 0, 2 << 20, 0))
    assert client.getattr(found.nodeid).size == 2 << 20
    client.call(Op.FALLOCATE, found.nodeid, fuse.FALLOCATE_IN.pack(handle, 1 << 20, 4096, 3))  # a hole
    assert client.read(handle, 1 << 20, 3) == bytes(3)
    source = client.open(client.walk("hello"))
    copied = client.call(Op.COPY_FILE_RANGE, 0, fuse.COPY_IN.pack(source, 7, 0, handle, 0, 5, 0))
    assert fuse.WRITE_OUT.unpack(copied) == (5,)
    assert client.read(handle, 0, 5) == b"guest"
    # Appending goes to the end, wherever the guest believes that to be.
    (folder / "log").write_bytes(b"one\n")
    log = client.open(client.walk("log"), os.O_WRONLY | os.O_APPEND)
    client.write(log, 0, b"two\n")
    assert (folder / "log").read_bytes() == b"one\ntwo\n"


def test_extended_attributes(share: MakeShare, folder: Path) -> None:
    client = Client(share())
    node = client.walk("hello")
    body = fuse.SETXATTR_IN.pack(5, 0) + b"user.colour\0green"
    try:
        client.call(Op.SETXATTR, node, body)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            pytest.skip("this file system has no extended attributes")
        raise
    assert os.getxattr(folder / "hello", "user.colour") == b"green"
    ask = fuse.GETXATTR_IN.pack(0) + b"user.colour\0"
    assert fuse.GETXATTR_OUT.unpack(client.call(Op.GETXATTR, node, ask)) == (5,)
    assert client.call(Op.GETXATTR, node, fuse.GETXATTR_IN.pack(100) + b"user.colour\0") == b"green"
    refused(errno.ERANGE, client.call, Op.GETXATTR, node, fuse.GETXATTR_IN.pack(2) + b"user.colour\0")
    assert client.call(Op.LISTXATTR, node, fuse.GETXATTR_IN.pack(100)) == b"user.colour\0"
    client.call(Op.REMOVEXATTR, node, b"user.colour\0")
    refused(errno.ENODATA, client.call, Op.GETXATTR, node, ask)
    for name in (b"trusted.x", b"security.capability", b"system.posix_acl_access", b"x"):
        refused(errno.EOPNOTSUPP, client.call, Op.SETXATTR, node, fuse.SETXATTR_IN.pack(1, 0) + name + b"\0x")


def test_set_user_id_is_dropped_on_request(share: MakeShare, folder: Path) -> None:
    (folder / "program").touch()
    (folder / "program").chmod(0o6755)
    client = Client(share())
    handle = client.open(client.walk("program"), os.O_RDWR)
    client.write(handle, 0, b"x", fuse.WRITE_KILL_SUIDGID)
    assert stat.S_IMODE((folder / "program").stat().st_mode) == 0o755


# Nothing leaves the folder.


def test_no_name_leads_out(share: MakeShare, folder: Path) -> None:
    client = Client(share())
    sub = client.walk("sub")
    for name in ("..", ".", "", "../secret", "/etc/passwd", "deep/file", "outside/secret"):
        refused(errno.EINVAL, client.lookup, sub, name)
        refused(errno.EINVAL, client.create, sub, name)
        refused(errno.EINVAL, client.mkdir, sub, name)
        refused(errno.EINVAL, client.named, Op.UNLINK, sub, name)
        refused(errno.EINVAL, client.rename, ROOT_ID, "hello", sub, name)
        refused(errno.EINVAL, client.rename, ROOT_ID, name, sub, "x")
        refused(errno.EINVAL, client.symlink, sub, name, "x")
        refused(errno.EINVAL, client.link, client.walk("hello"), sub, name)
    refused(errno.ENAMETOOLONG, client.lookup, ROOT_ID, "x" * 256)
    assert (folder.parent / "secret").read_bytes() == b"the host's own\n"


def test_links_are_never_followed(share: MakeShare, folder: Path) -> None:
    client = Client(share())
    before = (folder.parent / "secret").stat()
    for name in ("up", "absolute"):
        found = client.lookup(ROOT_ID, name)
        assert stat.S_ISLNK(found.mode)
        for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
            refused(errno.ENXIO, client.open, found.nodeid, flags)
        refused(errno.ENXIO, client.create, ROOT_ID, name)
        refused(errno.EINVAL, client.setattr, found.nodeid, fuse.FATTR_SIZE)
        refused(errno.EOPNOTSUPP, client.setattr, found.nodeid, fuse.FATTR_MODE)
        client.setattr(found.nodeid, fuse.FATTR_MTIME, mtime=5)
        assert os.lstat(folder / name).st_mtime == 5
    found = client.lookup(ROOT_ID, "outside")
    for call in (client.lookup, client.mkdir, client.create):
        refused(errno.ENOTDIR, call, found.nodeid, "secret")
    refused(errno.ENOTDIR, client.names, found.nodeid)
    after = (folder.parent / "secret").stat()
    assert (after.st_mtime_ns, after.st_size, after.st_mode) == (before.st_mtime_ns, before.st_size, before.st_mode)


def test_a_directory_swapped_for_a_link_behind_our_back(share: MakeShare, folder: Path) -> None:
    """Whoever works on the host's side of the folder cannot make the guest's next access go elsewhere."""
    (folder.parent / "elsewhere" / "deep").mkdir(parents=True)
    (folder.parent / "elsewhere" / "deep" / "file").write_bytes(b"not for you\n")
    client = Client(share(descriptors=0))  # so few that nothing stays open
    sub = client.walk("sub")
    deep = client.lookup(sub, "deep").nodeid
    for index in range(40):
        client.mkdir(ROOT_ID, f"many{index}")
    (folder / "sub").rename(folder.parent / "away")
    (folder / "sub").symlink_to(folder.parent / "elsewhere")
    refused(errno.ESTALE, client.lookup, deep, "file")
    assert stat.S_ISLNK(client.lookup(ROOT_ID, "sub").mode)


def test_no_device_fifo_or_socket_of_the_host_is_opened(share: MakeShare, folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    client = Client(share())
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        refused(errno.ENXIO, client.open, client.walk("fifo"), flags)
    refused(errno.ENXIO, client.create, ROOT_ID, "fifo")
    for kind in (stat.S_IFBLK, stat.S_IFCHR, stat.S_IFDIR, stat.S_IFLNK):
        body = fuse.MKNOD_IN.pack(kind | 0o600, 0x103, 0, 0) + b"node\0"
        refused(errno.EPERM, client.call, Op.MKNOD, ROOT_ID, body)
    client.entry(Op.MKNOD, ROOT_ID, fuse.MKNOD_IN.pack(stat.S_IFIFO | 0o600, 0, 0, 0) + b"pipe\0")
    assert stat.S_ISFIFO((folder / "pipe").stat().st_mode)


def test_read_only_is_read_only(share: MakeShare, folder: Path) -> None:
    def picture() -> list[tuple[str, int, int, int]]:
        return [
            (name, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
            for top, dirs, files in os.walk(folder) for name in (*dirs, *files)
            for s in [os.lstat(os.path.join(top, name))]
        ]  # fmt: skip

    before = picture()
    client = Client(share(read_only=True))
    hello = client.walk("hello")
    handle = client.open(hello)
    assert client.read(handle, 0, 5) == b"hello"
    for call, *arguments in (
        (client.write, handle, 0, b"x"), (client.open, hello, os.O_RDWR), (client.open, hello, os.O_TRUNC),
        (client.create, ROOT_ID, "new"), (client.create, ROOT_ID, "hello"), (client.mkdir, ROOT_ID, "new"),
        (client.named, Op.UNLINK, ROOT_ID, "hello"), (client.named, Op.RMDIR, ROOT_ID, "sub"),
        (client.rename, ROOT_ID, "hello", ROOT_ID, "x"), (client.symlink, ROOT_ID, "l", "x"),
        (client.link, hello, ROOT_ID, "l"), (client.setattr, hello, fuse.FATTR_MODE),
        (client.setattr, hello, fuse.FATTR_SIZE), (client.setattr, hello, fuse.FATTR_MTIME_NOW),
        (client.call, Op.MKNOD, ROOT_ID, fuse.MKNOD_IN.pack(stat.S_IFREG, 0, 0, 0) + b"n\0"),
        (client.call, Op.SETXATTR, hello, fuse.SETXATTR_IN.pack(1, 0) + b"user.x\0x"),
        (client.call, Op.REMOVEXATTR, hello, b"user.x\0"),
        (client.call, Op.FALLOCATE, hello, fuse.FALLOCATE_IN.pack(handle, 0, 100, 0)),
        (client.call, Op.COPY_FILE_RANGE, hello, fuse.COPY_IN.pack(handle, 0, 0, handle, 50, 5, 0)),
        (client.call, Op.ACCESS, hello, fuse.ACCESS_IN.pack(2)),
    ):  # fmt: skip
        refused(errno.EROFS, call, *arguments)
    assert picture() == before


# Descriptors.


def test_a_large_tree_in_few_descriptors(share: MakeShare, folder: Path) -> None:
    for index in range(400):
        path = folder / f"d{index % 20}" / f"e{index}"
        path.mkdir(parents=True)
        (path / "file").write_text(str(index))
    one = share(descriptors=40)
    client = Client(one)
    nodes = [client.walk(f"d{index % 20}/e{index}/file") for index in range(400)]
    assert one._folder.inodes.descriptors <= 12
    client.rename(ROOT_ID, "d3", ROOT_ID, "moved")  # what is below it stays what it is
    for index in random.Random(1).sample(range(400), 400):
        handle = client.open(nodes[index])
        assert client.read(handle, 0, 10) == str(index).encode()
        client.release(handle)
    (folder / "another").write_text("another")
    (folder / "another").rename(folder / "d5" / "e5" / "file")  # by the host: not the same file
    refused(errno.ESTALE, client.open, nodes[5])
    for node in nodes:
        client.forget(node)
    refused(errno.ESTALE, client.getattr, nodes[0])


def test_handles_are_bounded(share: MakeShare) -> None:
    client = Client(share(descriptors=64))
    hello = client.walk("hello")
    handles = [client.open(hello) for _ in range(32)]
    refused(errno.ENFILE, client.open, hello)
    client.release(handles[0])
    client.open(hello)


def test_files_without_a_name_are_bounded(share: MakeShare) -> None:
    """A guest that makes, removes and never forgets does not use up the host's descriptors."""
    one = share(descriptors=64)
    client = Client(one)
    for _ in range(200):
        _, handle = client.create(ROOT_ID, "temporary")
        client.release(handle)
        client.named(Op.UNLINK, ROOT_ID, "temporary")
    assert one._folder.inodes.descriptors <= 64


def test_a_new_mount_begins_anew(share: MakeShare) -> None:
    client = Client(share())
    node = client.walk("hello")
    handle = client.open(node)
    client.call(Op.DESTROY, 0)
    refused(errno.EIO, client.getattr, ROOT_ID)
    again = Client(client.share)
    refused(errno.ESTALE, again.getattr, node)
    refused(errno.EBADF, again.read, handle, 0, 1)


def test_a_snapshot_knows_what_the_guest_knew(share: MakeShare, folder: Path) -> None:
    client = Client(share())
    node = client.walk("sub/deep/file")
    handle = client.open(node, os.O_RDWR)
    directory = client.open(client.walk("sub"), op=Op.OPENDIR)
    _, lost = client.create(ROOT_ID, "lost")
    client.named(Op.UNLINK, ROOT_ID, "lost")
    state = client.share.save()
    twin = share()
    twin.restore(state)
    assert twin.save() == state
    client.share = twin
    assert client.read(handle, 0, 100) == b"deep\n"
    assert client.write(handle, 5, b"more\n") == 5
    assert client.call(Op.READDIR, 0, fuse.READ_IN.pack(directory, 0, 4096, 0, 0, 0))
    with pytest.raises(OSError):  # there is nothing to find it by
        client.read(lost, 0, 1)
    assert client.lookup(ROOT_ID, "sub").nodeid == client.walk("sub")


# Without root.

_AS_NOBODY = """
import os, sys
from pathlib import Path
from tests.unit.fuse_client import *
from avmm.backends.share.folder import open_folder
os.setgroups([]); os.setgid(65534); os.setuid(65534)
client = Client(Share(open_folder(Path(sys.argv[1]), False, 100), "test"), uid=1000, gid=1000)
mine, handle = client.create(1, "mine", 0o666)
assert (mine.uid, mine.gid) == (0, 0), mine
assert client.setattr(mine.nodeid, 6, uid=0, gid=0).uid == 0
assert client.write(handle, 0, b"data") == 4
theirs = client.lookup(1, "hello")
assert (theirs.uid, theirs.gid) == (65534, 65534), theirs
for call in (lambda: client.setattr(mine.nodeid, 2, uid=5), lambda: client.open(theirs.nodeid, os.O_RDWR)):
    try:
        call()
    except PermissionError:
        continue
    raise SystemExit("not refused")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes nobody")
def test_not_as_root() -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        (Path(name) / "hello").touch()
        done = subprocess.run([sys.executable, "-c", _AS_NOBODY, name], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (Path(name) / "mine").stat().st_uid == 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="changes owners")
def test_as_root_owners_are_what_they_are(share: MakeShare, folder: Path) -> None:
    client = Client(share(), uid=1234, gid=4321)
    found, _ = client.create(ROOT_ID, "theirs", 0o4755)
    assert (found.uid, found.gid, stat.S_IMODE(found.mode)) == (1234, 4321, 0o4755)
    assert (folder / "theirs").stat().st_uid == 1234
    (folder / "sub").chmod(0o2775)
    os.chown(folder / "sub", 0, 77)
    assert client.mkdir(client.walk("sub"), "inner", 0o755).gid == 77
    client.setattr(found.nodeid, fuse.FATTR_UID, uid=7)
    assert (folder / "theirs").stat().st_uid == 7


# Behind virtio.


async def test_over_a_queue(share: MakeShare) -> None:
    one = share()
    async with attached(Fs(one, "code")) as driver:
        driver.start()
        assert bytes(driver.config(at, 1) for at in range(36)) == b"code".ljust(36, b"\0")
        assert driver.config(36, 4) == 1
        queue = driver.queue(1)
        init = fuse.IN_HEADER.pack(56, Op.INIT, 1, 0, 0, 0, 0, 0, 0) + fuse.INIT_IN.pack(7, 31, 0, 0)
        assert (await queue.request([init[:40], init[40:]], [16, 64]))[:8] == fuse.OUT_HEADER.pack(80, 0, 1)[:8]
        lookup = fuse.IN_HEADER.pack(46, Op.LOOKUP, 2, 1, 0, 0, 0, 0, 0) + b"hello\0"
        assert fuse.OUT_HEADER.unpack_from(await queue.request([lookup], [16, 128])) == (144, 0, 2)
        forget = fuse.IN_HEADER.pack(48, Op.FORGET, 3, 2, 0, 0, 0, 0, 0) + fuse.FORGET_IN.pack(1)
        assert await driver.queue(0).request([forget], []) == b""
        assert not driver.needs_reset


@pytest.mark.parametrize(
    ("readable", "writable"),
    [
        ([], [16]),
        ([b"short"], [16]),
        ([fuse.IN_HEADER.pack(99, Op.LOOKUP, 2, 1, 0, 0, 0, 0, 0)], [160]),
        ([fuse.IN_HEADER.pack(40, Op.STATFS, 2, 1, 0, 0, 0, 0, 0)], []),
        ([fuse.IN_HEADER.pack(40, Op.STATFS, 2, 1, 0, 0, 0, 0, 0)], [15]),
    ],
)
async def test_what_is_no_request_stops_the_device(
    share: MakeShare, readable: list[bytes], writable: list[int]
) -> None:
    async with attached(Fs(share(), "code")) as driver:
        driver.start()
        driver.queue(1).add(readable, writable)
        driver.queue(1).kick()
        await driver.interrupt()
        assert driver.needs_reset
        assert driver.device.guest_errors == 1
        driver.start()
        assert not driver.needs_reset


# The configuration.


def test_shares_are_parsed() -> None:
    assert ShareConfig.parse("/srv/code") == ShareConfig(Path("/srv/code"), "code")
    assert ShareConfig.parse("/srv/a b/:rw") == ShareConfig(Path("/srv/a b/"), "a_b", True)
    assert ShareConfig.parse("/srv/x:tag:rw:cache=1.5") == ShareConfig(Path("/srv/x"), "tag", True, 1.5)
    assert ShareConfig.parse("/srv/a:b/c") == ShareConfig(Path("/srv/a:b/c"), "c")
    assert ShareConfig.parse("/").tag == "share"
    for text in ("", ":tag", "x:bad tag", f"x:{'y' * 37}", "x:cache=-1", "x:cache=soon"):
        with pytest.raises(ConfigError):
            ShareConfig.parse(text)


def test_the_guest_is_told_the_tags(tmp_path: Path) -> None:
    config = VmConfig.resolve("kernel", shares=[f"{tmp_path}:one", f"{tmp_path}:two:rw"])
    assert config.bootargs.endswith(" avmm.share=one avmm.share=two")
    with pytest.raises(ConfigError, match="one tag"):
        attachments_of(VmConfig.resolve("kernel", shares=["/a/x", "/b/x"]))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        open_folder(tmp_path / "none", True, 10)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Not a directory"):
        open_folder(tmp_path / "file", True, 10)
