"""What POSIX promises of files, tried in the current folder as root: prints one line for each promise that is broken.

    python3 posix_files.py          # ends with "N checks, 0 broken"

A stand-alone program for a guest's Python, in the manner of pjdfstest; the same run on a host's own file system is the
witness that the expectations are right. Arguments name groups to leave out.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

checks = broken = 0


def check(what: str, good: object) -> None:
    global checks, broken
    checks += 1
    if not good:
        broken += 1
        print(f"broken: {what}", flush=True)


def fails(number: int, call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """``call`` raises OSError with this number."""
    what = f"{call.__name__}{arguments} is {errno.errorcode[number]}"
    try:
        call(*arguments, **named)
    except OSError as error:
        check(f"{what}, not {errno.errorcode.get(error.errno or 0, error.errno)}", error.errno == number)
    else:
        check(f"{what}, but it worked", False)


def touch(name: str, mode: int = 0o644, data: bytes = b"") -> None:
    fd = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode)
    os.write(fd, data)
    os.close(fd)


def mode(name: str) -> int:
    return stat.S_IMODE(os.lstat(name).st_mode)


def content(name: str) -> bytes:
    return Path(name).read_bytes()


@contextlib.contextmanager
def somebody(uid: int, gid: int) -> Iterator[None]:
    """As another user, without any privilege."""
    os.setgroups([])
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def names() -> None:
    long = "x" * 255
    touch(long)
    check("a name of 255 bytes", os.path.exists(long))
    os.unlink(long)
    for call in (os.mkdir, os.unlink, os.rmdir, os.stat, touch, os.mkfifo):
        fails(errno.ENAMETOOLONG, call, "x" * 256)
    touch("plain")
    for call in (os.stat, os.mkdir, touch, os.unlink):
        fails(errno.ENOTDIR, call, "plain/inner")
        fails(errno.ENOENT, call, "none/inner")
    os.symlink("loop2", "loop1")
    os.symlink("loop1", "loop2")
    fails(errno.ELOOP, os.stat, "loop1")
    fails(errno.ELOOP, touch, "loop1/x")
    odd = os.fsdecode(b"\xff\xfe \x01\n")
    touch(odd)
    check("any bytes in a name", odd in os.listdir("."))


def creating() -> None:
    before = os.stat(".").st_mtime_ns
    time.sleep(0.02)
    touch("file", 0o640)
    check("creating changes the directory's mtime", os.stat(".").st_mtime_ns > before)
    check("the mode asked for", mode("file") == 0o640)
    fails(errno.EEXIST, os.open, "file", os.O_CREAT | os.O_EXCL)
    os.umask(0o077)
    touch("masked", 0o666)
    os.mkdir("masked-dir", 0o777)
    os.umask(0o022)
    check("the umask counts", mode("masked") == 0o600 and mode("masked-dir") == 0o700)
    fails(errno.EISDIR, os.open, "masked-dir", os.O_WRONLY)
    os.symlink("file", "link")
    fails(errno.ELOOP, os.open, "link", os.O_RDONLY | os.O_NOFOLLOW)
    os.symlink("made-by-link", "dangling")
    touch("dangling", data=b"x")
    check("O_CREAT through a dangling link", os.path.isfile("made-by-link"))
    os.mkfifo("fifo", 0o644)
    check("a FIFO", stat.S_ISFIFO(os.lstat("fifo").st_mode))
    reader = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open("fifo", os.O_WRONLY)
    os.write(writer, b"through")
    check("a FIFO carries", os.read(reader, 10) == b"through")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("socket")
        server.listen()
        client.connect("socket")
        check("a socket", stat.S_ISSOCK(os.lstat("socket").st_mode))
    with contextlib.suppress(OSError), open("temporary", "xb") as file:
        os.unlink("temporary")
        file.write(b"still here")
        file.flush()
        check("open without a name", os.fstat(file.fileno()).st_nlink == 0 and os.fstat(file.fileno()).st_size == 10)


def removing() -> None:
    os.mkdir("d")
    touch("d/f")
    fails(errno.ENOTEMPTY, os.rmdir, "d")
    fails(errno.EISDIR, os.unlink, "d")
    fails(errno.ENOTDIR, os.rmdir, "d/f")
    fails(errno.EINVAL, os.rmdir, "d/.")
    os.unlink("d/f")
    links = os.stat(".").st_nlink
    os.rmdir("d")
    check("a directory less, a link less", os.stat(".").st_nlink in (links - 1, links))  # not on btrfs
    fails(errno.ENOENT, os.unlink, "d")
    os.mkdir("cwd")
    os.chdir("cwd")
    os.rmdir("../cwd")
    fails(errno.ENOENT, touch, "x")
    os.chdir(HERE)


def links() -> None:
    touch("one", data=b"same")
    os.link("one", "two")
    check("two links", os.stat("one").st_nlink == 2 and os.stat("one").st_ino == os.stat("two").st_ino)
    fails(errno.EEXIST, os.link, "one", "two")
    os.mkdir("dir")
    fails(errno.EPERM, os.link, "dir", "dir2")
    touch("two", data=b"changed")
    check("one file", content("one") == b"changed")
    os.unlink("one")
    check("one link left", os.stat("two").st_nlink == 1)
    os.symlink("two", "soft")
    os.link("soft", "soft2", follow_symlinks=False)
    check("a link to a symbolic link", os.readlink("soft2") == "two")
    fails(errno.EINVAL, os.readlink, "two")
    os.symlink("t" * 4000, "far")
    check("a long target", os.readlink("far") == "t" * 4000)
    check("a target's length is its size", os.lstat("soft").st_size == 3)


def renaming() -> None:
    touch("a", data=b"a")
    touch("b", data=b"b")
    ino = os.stat("a").st_ino
    os.rename("a", "b")
    check("rename replaces", os.stat("b").st_ino == ino and not os.path.exists("a"))
    os.mkdir("d1")
    os.mkdir("d2")
    touch("d2/f")
    fails(errno.ENOTEMPTY, os.rename, "d1", "d2")
    fails(errno.ENOTDIR, os.rename, "d1", "b")
    fails(errno.EISDIR, os.rename, "b", "d1")
    fails(errno.EINVAL, os.rename, "d2", "d2/inside")
    fails(errno.ENOENT, os.rename, "none", "x")
    os.link("b", "c")
    os.rename("b", "c")
    check("two names of one file stay", os.path.exists("b") and os.path.exists("c"))
    os.rename("d2", "d1")
    check("a directory over an empty one", os.path.exists("d1/f"))
    fd = os.open("d1/f", os.O_RDWR)
    os.rename("d1", "d3")
    os.rename("d3/f", "elsewhere")
    os.write(fd, b"followed")
    check("an open file follows its name", content("elsewhere") == b"followed")


def modes() -> None:
    touch("f", 0o644)
    for each in (0, 0o777, 0o4755, 0o2755, 0o1777, 0o7777):
        os.chmod("f", each)
        check(f"chmod {each:o}", mode("f") == each)
    before = os.stat("f").st_ctime_ns
    time.sleep(0.02)
    os.chmod("f", 0o600)
    check("chmod changes the ctime", os.stat("f").st_ctime_ns > before)
    os.symlink("f", "l")
    os.chmod("l", 0o640)
    check("chmod follows a link", mode("f") == 0o640)


def owners() -> None:
    os.chmod(".", 0o777)
    touch("f", 0o644, b"root's")
    os.chown("f", 10, 20)
    check("chown", os.stat("f")[4:6] == (10, 20))
    os.chmod("f", 0o6755)
    os.chown("f", 11, 21)
    check("chown takes the set-ID bits of a program", mode("f") == 0o755)
    os.symlink("f", "l")
    os.lchown("l", 30, 40)
    check("lchown", os.lstat("l")[4:6] == (30, 40) and os.stat("l")[4:6] == (11, 21))
    with somebody(65534, 65534):
        touch("mine")
        check("owner of a new file", os.stat("mine")[4:6] == (65534, 65534))
        fails(errno.EPERM, os.chmod, "f", 0o777)
        fails(errno.EPERM, os.chown, "mine", 0, 0)
        fails(errno.EACCES, os.open, "f", os.O_WRONLY)
        fails(errno.EPERM, os.utime, "f", (1, 1))
        os.mkdir("closed", 0o000)
        fails(errno.EACCES, os.listdir, "closed")
        fails(errno.EACCES, touch, "closed/x")
        check(
            "access(2)", os.access("f", os.R_OK, effective_ids=True) and not os.access("f", os.W_OK, effective_ids=True)
        )
    os.mkdir("sticky")
    os.chmod("sticky", 0o1777)
    touch("sticky/root's")
    with somebody(65534, 65534):
        fails(errno.EPERM, os.unlink, "sticky/root's")
        fails(errno.EPERM, os.rename, "sticky/root's", "mine")
    os.mkdir("group")
    os.chown("group", 0, 77)
    os.chmod("group", 0o2777)
    touch("group/f")
    os.mkdir("group/d")
    check("a set-GID directory hands on its group", os.stat("group/f").st_gid == 77 and os.stat("group/d").st_gid == 77)
    check("and itself", mode("group/d") & 0o2000)
    touch("suid", 0o777)
    os.chmod("suid", 0o6777)
    with somebody(65534, 65534):
        fd = os.open("suid", os.O_WRONLY)
        os.write(fd, b"x")
        os.close(fd)
    check("writing takes the set-ID bits", mode("suid") == 0o777)


def sizes() -> None:
    touch("f", data=b"x" * 1000)
    os.truncate("f", 500)
    check("shorter", content("f") == b"x" * 500)
    os.truncate("f", 5000)
    check("longer, with zeroes", content("f") == b"x" * 500 + bytes(4500))
    fails(errno.EINVAL, os.truncate, "f", -1)
    os.mkdir("d")
    fails(errno.EISDIR, os.truncate, "d", 0)
    fd = os.open("f", os.O_RDONLY)
    fails(errno.EINVAL, os.ftruncate, fd, 0)
    os.close(fd)
    fd = os.open("sparse", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"end", 1 << 33)
    check("beyond 4 GiB", os.fstat(fd).st_size == (1 << 33) + 3 and os.pread(fd, 3, 1 << 33) == b"end")
    check("a hole takes no room", os.fstat(fd).st_blocks < 1000)
    os.posix_fallocate(fd, 0, 100_000)
    check("fallocate", os.fstat(fd).st_blocks * 512 >= 100_000)
    os.close(fd)
    fd = os.open("f", os.O_WRONLY | os.O_APPEND)
    os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, b"tail")
    check("O_APPEND", content("f")[-4:] == b"tail" and os.path.getsize("f") == 5004)
    os.close(fd)
    touch("f")
    check("O_TRUNC", os.path.getsize("f") == 0)


def times() -> None:
    touch("f")
    os.utime("f", ns=(1_000_000_001, 2_000_000_002))
    found = os.stat("f")
    check("utimensat, nanoseconds", (found.st_atime_ns, found.st_mtime_ns) == (1_000_000_001, 2_000_000_002))
    os.utime("f", ns=(-5 * 10**9, -7 * 10**9))
    check("before 1970", os.stat("f").st_mtime_ns == -7 * 10**9)
    os.symlink("f", "l")
    os.utime("l", (5, 6), follow_symlinks=False)
    check("of a link itself", os.lstat("l").st_mtime == 6 and os.stat("l").st_mtime != 6)
    before = os.stat("f").st_mtime_ns
    os.utime("f")
    check("now", abs(os.stat("f").st_mtime - time.time()) < 30 and os.stat("f").st_mtime_ns != before)
    old = os.stat("f")
    time.sleep(0.02)
    touch("f", data=b"x")
    check(
        "writing changes mtime and ctime",
        os.stat("f").st_mtime_ns > old.st_mtime_ns and os.stat("f").st_ctime_ns > old.st_ctime_ns,
    )


def mappings() -> None:
    touch("f", data=b"a" * 10_000)
    with open("f", "r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        shared[5000:5003] = b"new"
        shared.flush()
        check("a shared mapping is written back", os.pread(file.fileno(), 3, 5000) == b"new")
        os.pwrite(file.fileno(), b"direct", 100)
        check("a write is seen in a mapping", shared[100:106] == b"direct")
    touch("program", 0o755, b"#!/bin/sh\nexit 7\n")
    check("a program runs", os.waitstatus_to_exitcode(os.system("./program")) == 7)


def locks() -> None:
    touch("f")
    with open("f", "r+b") as one, open("f", "r+b") as other:
        fcntl.flock(one, fcntl.LOCK_EX)
        fails(errno.EAGAIN, fcntl.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(one, fcntl.LOCK_EX, 10)
        if not (child := os.fork()):
            with open("f", "r+b") as file:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10)
                except OSError:
                    os._exit(0)
                os._exit(1)
        check("record locks", os.waitpid(child, 0)[1] == 0)


def listing() -> None:
    wanted = {f"{index:04}" for index in range(1500)}
    for name in wanted:
        touch(name)
    check("1,500 files are listed", set(os.listdir(".")) == wanted)
    found = {entry.name: entry.inode() for entry in os.scandir(".")}
    check("with their inode numbers", all(os.stat(name).st_ino == ino for name, ino in list(found.items())[:50]))
    for name in sorted(wanted)[::2]:
        os.unlink(name)
    check("and removed", set(os.listdir(".")) == set(sorted(wanted)[1::2]))


def attributes() -> None:
    touch("f")
    os.setxattr("f", "user.one", b"1")
    check("an attribute", os.getxattr("f", "user.one") == b"1" and os.listxattr("f") == ["user.one"])
    fails(errno.EEXIST, os.setxattr, "f", "user.one", b"2", os.XATTR_CREATE)
    fails(errno.ENODATA, os.setxattr, "f", "user.two", b"2", os.XATTR_REPLACE)
    fails(errno.ENODATA, os.getxattr, "f", "user.two")
    os.removexattr("f", "user.one")
    check("removed", os.listxattr("f") == [])


GROUPS = (names, creating, removing, links, renaming, modes, owners, sizes, times, mappings, locks, listing, attributes)
os.umask(0o022)
for group in GROUPS:
    if group.__name__ in sys.argv[1:]:
        continue
    os.mkdir(group.__name__)
    os.chdir(group.__name__)
    HERE = os.getcwd()
    try:
        group()
    except OSError as error:
        check(f"{group.__name__}: {error}", False)
    os.chdir(HERE)
    os.chdir("..")
print(f"{checks} checks, {broken} broken")
