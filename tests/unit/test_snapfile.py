"""Snapshot files: what is written is read, holes cost nothing, and what is not whole is refused by name."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from avmm.errors import AvmmError, ConfigError, HostError, ImageError
from avmm.snapfile import ALIGN, Reader, Writer


def small(path: Path) -> Path:
    with Writer(path, "1.2.3") as writer:
        writer.add("config", b"the configuration")
        ram = writer.reserve("ram", 1 << 22)
        writer.write(ram, 1 << 20, b"\0" * 4096 + b"\1" * 4096)
        writer.add("machine", b"the machine")
    return path


def test_records_come_back_and_zeroes_are_holes(tmp_path: Path) -> None:
    path = small(tmp_path / "snapshot")
    reader = Reader(path)
    assert reader.read("config") == b"the configuration"
    assert reader.read("machine") == b"the machine"
    ram = reader.record("ram")
    assert (ram.length, ram.offset % ALIGN) == (1 << 22, 0)
    wanted = bytearray(1 << 22)
    wanted[(1 << 20) + 4096 :][:4096] = b"\1" * 4096
    wanted[(1 << 20) + 4096 : (1 << 20) + 8192] = b"\1" * 4096
    assert os.pread(reader.fd, ram.length, ram.offset) == wanted
    with pytest.raises(ImageError, match="has no disk"):
        reader.record("disk")
    reader.close()
    assert path.stat().st_size > 1 << 22
    assert path.stat().st_blocks * 512 < 1 << 16
    assert path.stat().st_mode & 0o077 == 0, "a guest's memory is nobody else's to read"
    assert os.listdir(tmp_path) == ["snapshot"]


def test_each_flipped_bit_of_what_is_checked_is_found(tmp_path: Path) -> None:
    path = small(tmp_path / "snapshot")
    whole = path.read_bytes()
    dice = random.Random(1)
    places = [dice.randrange(0, 48 + 3 * 56) for _ in range(100)]
    with_data = Reader(path)
    places += [with_data.record("machine").offset + n for n in range(11)]
    with_data.close()
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ImageError, match=str(path)) as caught:
            _read_all(path)
        assert "\n" not in str(caught.value)


def test_each_truncation_is_found(tmp_path: Path) -> None:
    path = small(tmp_path / "snapshot")
    size = path.stat().st_size
    for length in (size - 1, size - ALIGN, 1 << 20, ALIGN, 60, 20, 8, 3, 0):
        os.truncate(path, length)
        with pytest.raises(ImageError, match=str(path)):
            _read_all(path)


def _read_all(path: Path) -> None:
    reader = Reader(path)
    try:
        for name in ("config", "machine"):
            reader.read(name)
        reader.record("ram")
    finally:
        reader.close()


@pytest.mark.parametrize("content", [b"", b"\0" * 100, os.urandom(4096), b"#!/bin/sh\n"])
def test_other_files_are_no_snapshots(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"other is not a snapshot made by avmm"):
        Reader(path)
    with pytest.raises(ImageError, match="No such file"):
        Reader(tmp_path / "none")
    with pytest.raises(ImageError, match="directory"):
        Reader(tmp_path)


def test_a_later_version_is_refused_and_says_whose_it_is(tmp_path: Path) -> None:
    path = small(tmp_path / "snapshot")
    data = bytearray(path.read_bytes())
    data[8] = 9
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"version 9 \(by avmm 1\.2\.3\)"):
        Reader(path)


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), Writer(path, "1") as writer:  # noqa: PT012 - the block is what is tested
        writer.add("config", b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["snapshot"]
    with pytest.raises(ConfigError, match="No such file"):
        Writer(tmp_path / "none" / "snapshot", "1")
    with pytest.raises(ConfigError, match="is a directory"):
        Writer(tmp_path, "1")


def test_a_full_disk_is_a_host_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    with pytest.raises(HostError, match="No space left"), Writer(tmp_path / "snapshot", "1") as writer:  # noqa: PT012 - the block is what is tested
        monkeypatch.setattr(os, "pwrite", full)
        writer.add("config", b"new")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []
    assert issubclass(HostError, AvmmError)
