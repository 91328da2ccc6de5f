"""A disk's past, kept while it is written to: against a model, with threads that write, and when there is no room."""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path

import pytest

from avmm.backends import moment
from avmm.backends.disk import open_disk
from avmm.backends.drive import open_drive
from avmm.backends.moment import CHUNK, Moment, SharedDisk

SECTOR = 512
SIZE = 20 * CHUNK + 7 * SECTOR


def disk_file(path: Path, content: bytes | bytearray) -> Path:
    path.write_bytes(content)
    return path


def read(disk: SharedDisk | Moment, offset: int, length: int) -> bytes:
    views = [memoryview(bytearray(length // 3)), memoryview(bytearray(length - length // 3))]
    if not (length < CHUNK and disk.read_now(offset, views)):
        disk.readv(offset, views)
    return b"".join(views)


def test_each_moment_stays_what_it_was(tmp_path: Path) -> None:
    dice = random.Random(1)
    model = bytearray(dice.randbytes(SIZE))
    model[3 * CHUNK : 5 * CHUNK] = bytes(2 * CHUNK)
    shared = SharedDisk(open_disk(disk_file(tmp_path / "disk", model)))
    files = len(os.listdir("/proc/self/fd"))
    moments: list[tuple[Moment, bytes]] = []
    for _ in range(600):
        offset = dice.randrange(SIZE // SECTOR) * SECTOR
        length = min(dice.randrange(1, 400) * SECTOR, SIZE - offset)
        what = dice.choice(["write", "write", "read", "read", "zero", "discard", "moment", "close"])
        if what == "write":
            data = dice.randbytes(length)
            shared.writev(offset, [memoryview(data)])
            model[offset : offset + length] = data
        elif what == "zero":
            shared.write_zeroes(offset, length, dice.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        elif what == "discard":
            shared.discard(offset, length)
            model[offset : offset + length] = read(shared, offset, length)
        elif what == "moment" and len(moments) < 6:
            moments.append((shared.moment(), bytes(model)))
        elif what == "close" and moments:
            moments.pop(dice.randrange(len(moments)))[0].close()
        for past, content in moments:
            assert read(past, offset, length) == content[offset : offset + length]
        assert read(shared, offset, length) == model[offset : offset + length]
    for past, content in moments:
        assert read(past, 0, SIZE) == content
        past.close()
        past.close()
    assert len(os.listdir("/proc/self/fd")) == files
    shared.close()
    assert (tmp_path / "disk").read_bytes() == model


def test_the_disk_stays_open_for_its_moments(tmp_path: Path) -> None:
    content = os.urandom(SIZE)
    shared = SharedDisk(open_disk(disk_file(tmp_path / "disk", content)))
    past = shared.moment()
    shared.writev(0, [memoryview(bytes(CHUNK))])
    shared.close()
    assert read(past, 0, SIZE) == content
    with pytest.raises(OSError, match="does not change"):
        past.writev(0, [memoryview(bytes(SECTOR))])
    past.close()
    open_disk(tmp_path / "disk").close()  # its lock is gone


def test_a_reader_races_writers(tmp_path: Path) -> None:
    """Sectors of ones become sectors of twos under the reader's eyes: it must never see one."""
    size = 64 * CHUNK
    shared = SharedDisk(open_disk(disk_file(tmp_path / "disk", b"\1" * size)))
    past = shared.moment()

    def overwrite(first: int) -> None:
        for at in range(first * SECTOR, size, 4 * SECTOR):
            shared.writev(at, [memoryview(b"\2" * SECTOR)])

    writers = [threading.Thread(target=overwrite, args=(first,)) for first in range(4)]
    for writer in writers:
        writer.start()
    looks = 0
    while any(writer.is_alive() for writer in writers):
        assert read(past, 0, size) == b"\1" * size
        looks += 1
    for writer in writers:
        writer.join()
    assert looks
    assert read(shared, 0, size) == b"\2" * size
    assert read(past, 0, size) == b"\1" * size
    past.close()
    shared.close()


def test_without_room_the_moment_breaks_and_the_disk_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = SharedDisk(open_disk(disk_file(tmp_path / "disk", b"\1" * SIZE)))
    past = shared.moment()

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(moment, "write_all", full)
    shared.writev(0, [memoryview(b"\2" * SECTOR)])
    assert read(shared, 0, 2 * SECTOR) == b"\2" * SECTOR + b"\1" * SECTOR
    with pytest.raises(OSError, match="no room"):
        read(past, 0, SIZE)
    monkeypatch.undo()
    later = shared.moment()
    shared.writev(0, [memoryview(b"\3" * SECTOR)])
    assert read(later, 0, SECTOR) == b"\2" * SECTOR
    shared.close()
    past.close()
    later.close()


async def test_a_drive_with_a_write_cache_has_a_past_too(tmp_path: Path) -> None:
    path = disk_file(tmp_path / "disk", b"\1" * SIZE)
    drive = open_drive(path, "raw", "parent")
    drive.hold_writes()
    await drive.writev(SECTOR, [memoryview(b"\2" * SECTOR)])
    twin = drive.moment().open(path, "twin", read_only=False)
    await drive.writev(0, [memoryview(b"\3" * SECTOR)])
    await drive.flush()
    await twin.writev(2 * SECTOR, [memoryview(b"\4" * SECTOR)])
    seen = {}
    for each in (drive, twin):
        view = memoryview(bytearray(4 * SECTOR))
        await each.readv(0, [view])
        seen[each.name] = [view[n * SECTOR] for n in range(4)]
    assert seen == {"parent": [3, 2, 1, 1], "twin": [1, 2, 4, 1]}
    drive.close()
    twin.close()
    assert path.read_bytes()[: 4 * SECTOR] == b"\3" * SECTOR + b"\2" * SECTOR + b"\1" * 2 * SECTOR
