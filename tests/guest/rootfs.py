"""A Debian arm64 root file system with any packages, for tests and benches; a VM on it; a shell to run commands with.

    image = rootfs(["openssl", "sqlite3"])              # an ext4 file in the user's cache, made once
    async with booted(image, memory="512M") as guest:
        done = await guest.run("openssl version")       # done.code, done.output
        await guest.check("sqlite3 :memory: 'select 1'")  # its output; it must succeed

The host's apt resolves and downloads (its dpkg is not touched), dpkg-deb unpacks, mke2fs makes the file system; no
maintainer script runs, so what those would have set up is set up here. The image is shared: boot it with ``snapshot``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import avmm
from avmm.bootloader import cpio, deb
from avmm.debian import Apt, Fetched, cache_directory, fetch_debian
from avmm.errors import FetchError

#: Goes up when the same packages would give another image.
_FORMAT = 1

#: What init below needs; everything else is asked for.
_BASE = ("busybox-static",)

#: What update-alternatives would have linked, where the target is there.
_ALTERNATIVES = {
    "usr/bin/awk": ("gawk", "mawk"),
    "usr/bin/cc": ("gcc",),
    "usr/bin/c++": ("g++",),
    "usr/bin/nc": ("nc.openbsd", "nc.traditional"),
    "usr/bin/sh": ("dash", "busybox"),
}

_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n_apt:x:100:65534::/nonexistent:/bin/false\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost\n",
    "etc/hostname": "avmm\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "etc/resolv.conf": "",
}

#: Mounts the disk and goes on there. Busybox stands in for what the packages do not bring.
_INIT = """\
#!/bin/sh
dmesg -n 1
mount -t ext4 -o noatime /dev/vda /mnt || { echo 'rootfs: /dev/vda has no file system'; poweroff -f; }
for each in dev proc sys run; do mount --move /$each /mnt/$each; done
mount -t tmpfs tmpfs /mnt/tmp
cp /etc/resolv.conf /mnt/etc/resolv.conf 2>/dev/null
mkdir /mnt/run/busybox
/bin/busybox --install -s /mnt/run/busybox
ln -s /proc/self/fd /mnt/dev/fd
ln -s fd/0 /mnt/dev/stdin
ln -s fd/1 /mnt/dev/stdout
ln -s fd/2 /mnt/dev/stderr
exec switch_root -c /dev/console /mnt /bin/busybox sh -c '
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/run/busybox
export HOME=/root LANG=C.UTF-8 TERM=dumb PS1=
cd /root
stty -echo
echo rootfs: ready
/bin/busybox sh
poweroff -f'
"""

#: The command line that makes the initrd of :func:`initrd` go on from the disk.
APPEND = "quiet avmm.init=/rootfs-init"
READY = rb"rootfs: ready\r\n"


@contextmanager
def locked_cache(lock: str = "lock") -> Iterator[Path]:
    """The folder in the user's cache for what is made here, for one process at a time of those that name ``lock``."""
    home = cache_directory() / "rootfs"
    home.mkdir(parents=True, exist_ok=True)
    with (home / lock).open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield home


def rootfs(packages: Iterable[str], *, release: str = "bookworm", free: int = 256 << 20) -> Path:
    """An ext4 image of Debian ``release`` for arm64 with ``packages`` and what they depend on, from the cache or made.

    ``free`` is the room left in it, in bytes. Safe to call from several processes. Raises FetchError.
    """
    wanted = sorted({*_BASE, *packages})
    recipe = repr((_FORMAT, release, wanted, free, _ALTERNATIVES, _FILES))
    with locked_cache() as home:
        image = home / f"{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.ext4"
        if not image.exists():
            archives = _download(wanted, release, home / release, "install")
            with tempfile.TemporaryDirectory(prefix="make-", dir=home) as scratch:
                root, made = Path(scratch) / "root", Path(scratch) / "image"
                _unpack(archives, root)
                _make_image(root, made, free)
                os.replace(made, image)
    return image


def files_of(package: str, names: Iterable[str], *, release: str = "bookworm") -> list[Path]:
    """Files ``names`` (no leading slash) out of one arm64 package, in the cache. Raises FetchError."""
    with locked_cache() as home:
        paths = [home / f"{release}-{package}" / name for name in names]
        if not all(path.exists() for path in paths):
            (archive,) = _download([package], release, home / release, "download")
            with deb.open_package(archive) as opened:
                for path, name in zip(paths, names, strict=True):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(opened.read(name))
            archive.unlink()
    return paths


def initrd(guest: Fetched) -> Path:
    """The initrd of ``guest`` with the first program that goes on from ``/dev/vda``: boot it with ``APPEND``."""
    archive = cpio.pack([cpio.file("rootfs-init", _INIT.encode(), 0o755)])
    content = cpio.append(guest.initrd.read_bytes(), archive)
    path = cache_directory() / "rootfs" / f"{hashlib.sha256(content).hexdigest()[:16]}.initrd"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as stream:
            stream.write(content)
        os.replace(stream.name, path)
    return path


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended: its exit code, and what it printed on either stream."""

    code: int
    output: str


class Shell:
    """The shell on the serial console of ``vm``. Commands run one after another."""

    def __init__(self, vm: avmm.VirtualMachine) -> None:
        self.vm = vm

    async def run(self, command: str, timeout: float = 60) -> Done:
        """Run ``command`` and wait for its end. Raises WaitTimeout, or what became of the guest."""
        # Split, so that the echo of what is typed is not taken for the answer.
        self.vm.console.write(f"echo '<'begin'>'; {command}\necho '<'end $?'>'\n".encode())
        transcript = self.vm.console.transcript
        await transcript.expect(rb"<begin>", timeout=timeout)
        output, end = await transcript.read_until(rb"<end (\d+)>", timeout=timeout)
        return Done(int(end[1]), output.decode(errors="replace").replace("\r\n", "\n").removeprefix("\n"))

    async def check(self, command: str, timeout: float = 60) -> str:
        """The output of ``command``, which must end with 0."""
        done = await self.run(command, timeout)
        assert done.code == 0, f"{command!r} ended with {done.code}:\n{done.output[-4000:]}"
        return done.output


@asynccontextmanager
async def booted(
    image: Path, *, guest: Fetched | None = None, drives: Sequence[str | Path] = (), append: str = "",
    timeout: float = 120, **options: object,
) -> AsyncIterator[Shell]:  # fmt: skip
    """A VM that runs from ``image`` (whose changes are forgotten), at its shell.

    ``guest`` is the kernel (default: Debian's cloud kernel), ``drives`` come after the root; the rest is avmm.boot's.
    """
    guest = guest or fetch_debian(progress=lambda text: None)
    disks = [f"{image},snapshot,format=raw", *drives]
    booting = avmm.boot(guest.kernel, initrd(guest), drives=disks, append=f"{APPEND} {append}", **options)  # type: ignore[arg-type]  # checked by boot
    async with booting as vm:
        await vm.console.expect(READY, timeout=timeout)
        yield Shell(vm)


# --- making one --------------------------------------------------------------------------------------------------


def _download(packages: list[str], release: str, home: Path, how: str) -> list[Path]:
    """The files of ``packages`` (``install``: and of what they depend on), their checksums proved by apt."""
    home.mkdir(exist_ok=True)
    apt = Apt(release, home, lambda text: None)
    archives = home / "cache/archives"
    asked = ["-q", "-y", "--no-install-recommends", "-t", release, how, *packages]
    # It names only what is not there yet: look where nothing is.
    printed = apt.run("apt-get", "--print-uris", "-o", f"Dir::Cache::Archives={home}/none/", *asked, cwd=home).stdout
    # 'http://…/libc6_2.36-9_arm64.deb' libc6_2.36-9_arm64.deb 2300000 SHA256:…
    names = re.findall(r"^'[^']+' (\S+\.deb) \d+ ", printed, re.MULTILINE)
    if not names:
        raise FetchError(f"apt found nothing to download for {' '.join(packages)}")
    apt.run("apt-get", "--download-only", *asked, cwd=archives)
    return [archives / name for name in names]


def _unpack(archives: list[Path], root: Path) -> None:
    """Unpack packages the way dpkg would, into a merged /usr, and do what their scripts would have done."""
    for name in ("bin", "sbin", "lib"):
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for name in ("dev", "proc", "sys", "run", "tmp", "root", "mnt", "etc", "var/tmp", "var/log", "home"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for archive in archives:
        command = ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", str(root)]
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as tree:
            done = subprocess.run(command, stdin=tree.stdout, capture_output=True, text=True)
        if tree.returncode or done.returncode:
            raise FetchError(f"cannot unpack {archive.name}: {done.stderr.strip()}")
    (root / "tmp").chmod(0o1777)
    for name, text in _FILES.items():
        (root / name).write_text(text)
    for link, targets in _ALTERNATIVES.items():
        path = root / link
        there = [target for target in targets if (path.parent / target).exists()]
        if there and not path.is_symlink() and not path.exists():
            path.symlink_to(there[0])


def _make_image(root: Path, image: Path, free: int) -> None:
    used = int(subprocess.run(["du", "-s", "-B1", root], capture_output=True, check=True, text=True).stdout.split()[0])
    size = (used + used // 4 + free + (64 << 20)) >> 20 << 20
    with image.open("wb") as file:
        file.truncate(size)
    # No journal: an image is thrown away with its VM.
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-E", "root_owner=0:0"]
    done = subprocess.run([*command, "-d", root, image], capture_output=True, text=True)
    if done.returncode:
        raise FetchError(f"mke2fs failed: {done.stderr.strip()}")
