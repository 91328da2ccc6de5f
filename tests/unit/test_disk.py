"""Disks on the host: qcow2 against qemu-img, and what a crash, a full disk and a bad file do."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from avmm.backends.disk import Disk, open_disk
from avmm.backends.drive import open_drive
from avmm.config import DriveConfig
from avmm.errors import ConfigError, ImageError

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="compares with qemu-img (qemu-utils)")

SECTOR = 512


def qemu_img(*args: object) -> None:
    subprocess.run(["qemu-img", *map(str, args)], check=True, capture_output=True)


def check(path: Path) -> None:
    """No error and no leak."""
    done = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def content(path: Path) -> bytes:
    """What QEMU reads."""
    raw = path.with_suffix(".out")
    qemu_img("convert", "-O", "raw", path, raw)
    return raw.read_bytes()


def read(disk: Disk, offset: int, length: int) -> bytes:
    """In two pieces, because guests have more than one buffer."""
    views = [memoryview(bytearray(length // 3)), memoryview(bytearray(length - length // 3))]
    disk.readv(offset, views)
    return b"".join(views)


def write(disk: Disk, offset: int, data: bytes) -> None:
    disk.writev(offset, [memoryview(data[: len(data) // 3]), memoryview(data[len(data) // 3 :])])


def pattern(size: int) -> bytes:
    return b"".join(bytes([n % 255 + 1]) * SECTOR for n in range(size // SECTOR))


@needs_qemu_img
@pytest.mark.parametrize("behind", ["nothing", "raw", "qcow2", "a shorter one", "compressed"])
@pytest.mark.parametrize("cluster", [512, 4096, 65536])
def test_qcow2_is_what_qemu_img_says(behind: str, cluster: int, tmp_path: Path) -> None:
    chance = random.Random(f"{behind} {cluster}")
    for _ in range(3):
        size = chance.choice([1 << 20, 3 << 20, (1 << 20) + SECTOR * 7])
        image = tmp_path / "image.qcow2"
        model = _make(image, behind, size, cluster)
        disk = open_disk(image)
        assert disk.size == size
        for _ in range(40):
            offset = chance.randrange(size // SECTOR) * SECTOR
            length = min(chance.randrange(1, chance.choice([4, 40, 600])) * SECTOR, size - offset)
            what = chance.choice(["write", "write", "write", "read", "zeroes", "unmap", "discard", "flush", "again"])
            if what == "write":
                data = chance.randbytes(length)
                write(disk, offset, data)
                model[offset : offset + length] = data
            elif what in ("zeroes", "unmap"):
                disk.write_zeroes(offset, length, what == "unmap")
                model[offset : offset + length] = bytes(length)
            elif what == "discard":
                disk.discard(offset, length)
                now = read(disk, offset, length)  # the old content or zeroes, sector by sector
                for at in range(0, length, SECTOR):
                    assert now[at : at + SECTOR] in (bytes(SECTOR), model[offset + at : offset + at + SECTOR])
                model[offset : offset + length] = now
            elif what == "flush":
                disk.flush()
            elif what == "again":
                disk.close()
                disk = open_disk(image)
            assert read(disk, offset, length) == model[offset : offset + length]
        disk.close()
        check(image)
        assert content(image) == model


def _make(image: Path, behind: str, size: int, cluster: int) -> bytearray:
    model = bytearray(size)
    options = ["-o", f"cluster_size={cluster}"]
    raw, backing = image.with_name("base.raw"), image.with_name("base.qcow2")
    if behind == "nothing":
        qemu_img("create", "-f", "qcow2", *options, image, size)
        return model
    held = size // 2 // SECTOR * SECTOR if behind == "a shorter one" else size
    model[:held] = pattern(held)
    raw.write_bytes(model[:held])
    if behind == "compressed":
        qemu_img("convert", "-c", "-O", "qcow2", *options, raw, image)
    elif behind == "qcow2":
        qemu_img("convert", "-O", "qcow2", raw, backing)
        qemu_img("create", "-f", "qcow2", *options, "-b", backing.name, "-F", "qcow2", image, size)
    else:
        qemu_img("create", "-f", "qcow2", *options, "-b", raw.name, "-F", "raw", image, size)
    return model


_VICTIM = """
import sys
from pathlib import Path
from avmm.backends.disk import open_disk
disk = open_disk(Path(sys.argv[1]))
for round in range(256):
    for part in range(7):
        disk.writev((round * 7 + part) * 5120, [memoryview(bytes([round % 255 + 1]) * 5120)])
    disk.flush()
    print(round, flush=True)
"""


@needs_qemu_img
@pytest.mark.parametrize("name", ["image.raw", "image.qcow2"])
def test_what_was_flushed_survives_kill_9(name: str, tmp_path: Path) -> None:
    image = tmp_path / name
    qemu_img("create", "-f", image.suffix[1:], image, 16 << 20)
    with subprocess.Popen([sys.executable, "-c", _VICTIM, image], stdout=subprocess.PIPE) as victim:
        assert victim.stdout is not None
        for _ in range(20):
            victim.stdout.readline()
        victim.send_signal(signal.SIGKILL)
        flushed = 20 + len(victim.stdout.readlines())
    if image.suffix == ".qcow2":
        done = subprocess.run(["qemu-img", "check", image], capture_output=True, text=True)
        assert done.returncode in (0, 3), done.stdout  # 3: clusters that nothing refers to, and nothing worse
    disk = open_disk(image)
    for number in range(flushed):
        assert read(disk, number * 7 * 5120, 7 * 5120) == bytes([number % 255 + 1]) * (7 * 5120)
    disk.close()


@needs_qemu_img
def test_a_full_host_disk_is_an_error_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "image.qcow2"
    image.touch()
    from avmm.backends.qcow2 import Qcow2

    Qcow2.create(os.open(image, os.O_RDWR), image, 8 << 20).close()
    disk = open_disk(image)
    write(disk, 0, b"kept" * 256)
    real = os.pwritev

    def full(fd: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        if sum(map(len, views)) > 2:  # a count that is in its place already needs no room
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, views, offset, flags)

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match="No space"):
        write(disk, 1 << 20, b"lost" * 256)
    monkeypatch.setattr(os, "pwritev", real)
    assert read(disk, 0, 1024) == b"kept" * 256
    assert read(disk, 1 << 20, 1024) == bytes(1024)
    write(disk, 1 << 20, b"more" * 256)
    disk.close()
    disk = open_disk(image)
    assert read(disk, 1 << 20, 1024) == b"more" * 256
    disk.close()
    check(image)  # what was allocated in vain was given back


@needs_qemu_img
def test_what_takes_the_place_of_compressed_clusters_is_safe_at_any_time(tmp_path: Path) -> None:
    image, base, copy = (tmp_path / name for name in ("image.qcow2", "base", "copy.qcow2"))
    base.write_bytes(pattern(1 << 20))
    qemu_img("convert", "-c", "-O", "qcow2", base, image)
    disk = open_disk(image)
    write(disk, 0, b"new" * (1 << 18))
    shutil.copy(image, copy)  # as a crash would leave it
    assert content(copy) == pattern(1 << 20)
    done = subprocess.run(["qemu-img", "check", copy], capture_output=True, text=True)
    assert done.returncode in (0, 3), done.stdout  # 3: clusters that nothing refers to, and nothing worse
    disk.close()
    check(image)


def test_raw_files_stay_sparse(tmp_path: Path) -> None:
    image = tmp_path / "image.raw"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    disk = open_disk(image)
    write(disk, 1 << 20, b"x" * (1 << 20))
    disk.flush()
    used = image.stat().st_blocks
    assert used * 512 < 2 << 20
    disk.write_zeroes(1 << 20, 1 << 19, True)
    disk.discard((1 << 20) + (1 << 19), 1 << 19)
    assert image.stat().st_blocks < used
    assert read(disk, 0, 8 << 20) == bytes(8 << 20)
    disk.close()


def test_an_odd_end_reads_as_zeroes(tmp_path: Path) -> None:
    image = tmp_path / "odd.img"
    image.write_bytes(b"x" * 700)
    disk = open_disk(image)
    assert disk.size == 1024
    assert read(disk, 512, 512) == b"x" * 188 + bytes(324)
    disk.close()


@pytest.mark.parametrize("name", ["image.raw", "image.qcow2"])
@needs_qemu_img
def test_a_snapshot_leaves_the_file_alone(name: str, tmp_path: Path) -> None:
    image = tmp_path / name
    (tmp_path / "base").write_bytes(pattern(1 << 20))
    qemu_img("convert", "-f", "raw", "-O", image.suffix[1:], tmp_path / "base", image)
    before = image.read_bytes()
    drive = open_drive(image, None, "d", snapshot=True)
    write(drive._disk, 4096, b"new" * 4096)
    assert read(drive._disk, 0, 32768) == pattern(4096) + b"new" * 4096 + pattern(32768)[4096 + 3 * 4096 :]
    drive.close()
    assert image.read_bytes() == before


def test_one_writer_or_many_readers(tmp_path: Path) -> None:
    image = tmp_path / "image.raw"
    image.write_bytes(bytes(4096))
    writer = open_disk(image)
    with pytest.raises(ImageError, match="in use"):
        open_disk(image, read_only=True)
    writer.close()
    readers = [open_disk(image, read_only=True) for _ in range(2)]
    with pytest.raises(ImageError, match="in use"):
        open_disk(image)
    for reader in readers:
        reader.close()


@needs_qemu_img
def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-f", "qcow2", image, "1M")
    disguised = tmp_path / "disk.img"
    shutil.copy(image, disguised)
    with pytest.raises(ImageError, match="say format="):
        open_disk(disguised)
    with pytest.raises(ImageError, match="cannot open"):
        open_disk(tmp_path / "missing.img")
    with pytest.raises(ImageError, match="neither a file"):
        open_disk(Path("/dev/null"))
    (tmp_path / "text.qcow2").write_bytes(b"text")
    with pytest.raises(ImageError, match="is not a qcow2 image"):
        open_disk(tmp_path / "text.qcow2")
    qemu_img("snapshot", "-c", "one", image)
    with pytest.raises(ImageError, match="internal snapshots"):
        open_disk(image)
    open_disk(image, read_only=True).close()
    circle = tmp_path / "circle.qcow2"
    qemu_img("create", "-f", "qcow2", "-u", "-b", "circle.qcow2", "-F", "qcow2", circle, "1M")
    with pytest.raises(ImageError, match="refer to each other"):
        open_disk(circle, read_only=True)
    qemu_img("create", "-f", "qcow2", "-o", "compat=0.10", tmp_path / "old.qcow2", "1M")
    with pytest.raises(ImageError, match="amend"):
        open_disk(tmp_path / "old.qcow2")


@needs_qemu_img
def test_damaged_images_are_refused_or_give_errors(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    (tmp_path / "base").write_bytes(pattern(1 << 20))
    qemu_img("convert", "-O", "qcow2", "-c", tmp_path / "base", image)
    whole = image.read_bytes()
    chance = random.Random(1)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 4, 40])):
            at = chance.randrange(chance.choice([112, len(damaged)]))
            damaged[at] = chance.choice([0, 0xFF, chance.randrange(256)])
        image.write_bytes(damaged)
        try:
            disk = open_disk(image)
        except ImageError:
            continue
        size = min(disk.size, 1 << 20)
        with contextlib.suppress(OSError):
            disk.readv(0, [memoryview(bytearray(size))])
        with contextlib.suppress(OSError):
            disk.writev(0, [memoryview(bytearray(min(size, 1 << 17)))])
        with contextlib.suppress(OSError):
            disk.close()


@needs_qemu_img
@pytest.mark.parametrize("at", [40, 48])  # of the first table, and of that of the reference counts (qcow2's header)
def test_a_table_beyond_any_file_is_refused(at: int, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-f", "qcow2", image, "1M")
    damaged = bytearray(image.read_bytes())
    damaged[at] = 0x80
    image.write_bytes(damaged)
    with pytest.raises(ImageError, match="damaged"):
        open_disk(image)


def test_drives_on_the_command_line() -> None:
    assert DriveConfig.parse("a.img") == DriveConfig(Path("a.img"))
    assert DriveConfig.parse("a,b.img,ro") == DriveConfig(Path("a,b.img"), read_only=True)
    assert DriveConfig.parse("a,snapshot,format=qcow2") == DriveConfig(Path("a"), snapshot=True, format="qcow2")
    for wrong in ("a,format=vmdk", "a,format=raw,format=qcow2", "a,ro,snapshot", ",ro", ""):
        with pytest.raises(ConfigError):
            DriveConfig.parse(wrong)
