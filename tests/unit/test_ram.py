"""Guest RAM: frozen, shared, written apart; what is copied is what was written."""

from __future__ import annotations

import mmap
import os
import random
from pathlib import Path

import pytest

from avmm import ram
from avmm.errors import HostError
from avmm.ram import CAN_FREEZE, FrozenRam, Ram, RamFile

pytestmark = pytest.mark.skipif(not CAN_FREEZE, reason="needs memfd_create")

PAGE = mmap.PAGESIZE
SIZE = 64 * PAGE


def content(image: FrozenRam) -> bytes:
    data = bytearray(image.size)
    for offset, piece, length in image.spans():
        data[offset : offset + length] = piece or os.pread(image.file.fd, length, image.file.offset + offset)
    return bytes(data)


def write(one: Ram, page: int, text: bytes) -> None:
    one.buffer[page * PAGE : page * PAGE + len(text)] = text


def read(one: Ram, page: int, length: int = 4) -> bytes:
    return one.buffer[page * PAGE : page * PAGE + length]


def test_a_twin_starts_with_what_was_there_and_each_writes_its_own() -> None:
    parent = Ram(SIZE)
    view = memoryview(parent.buffer)[:4]
    write(parent, 0, b"base")
    with_image = parent.freeze()
    twin = Ram(SIZE, with_image)
    with_image.close()
    assert bytes(view) == b"base", "the parent's memory stays at its address"
    write(parent, 0, b"mine")
    write(twin, 1, b"twin")
    assert (read(parent, 0), read(parent, 1)) == (b"mine", bytes(4))
    assert (read(twin, 0), read(twin, 1)) == (b"base", b"twin")
    assert (parent.own_bytes(), twin.own_bytes()) == (PAGE, PAGE)
    view.release()
    parent.close()
    assert read(twin, 0) == b"base"
    twin.close()


def test_prepared_memory_is_as_it_was_and_is_frozen_like_any_other() -> None:
    size = 5 << 20
    one = Ram(size)
    for page in (0, 600, 1279):
        write(one, page, b"base")
    for length in (0, 1, 3 << 20, size):
        one.prepare(length)
    assert (read(one, 0), read(one, 600), read(one, 1279)) == (b"base",) * 3
    image = one.freeze()
    assert sum(content(image)) == 3 * sum(b"base")
    one.prepare(size)
    assert one.own_bytes() == 0, "what is shared stays so"
    image.close()
    one.close()


def test_frozen_again_with_others_only_what_was_written_is_copied() -> None:
    parent = Ram(SIZE)
    for page in range(64):
        write(parent, page, b"base")
    first = parent.freeze()
    write(parent, 3, b"3333")
    write(parent, 4, b"4444")
    write(parent, 9, b"9999")
    second = parent.freeze()
    assert [(offset // PAGE, len(data) // PAGE) for offset, data in second.pages] == [(3, 2), (9, 1)]
    twin = Ram(SIZE, second)
    assert (read(twin, 3), read(twin, 4), read(twin, 5), read(twin, 9)) == (b"3333", b"4444", b"base", b"9999")
    assert content(second) == bytes(parent.buffer)
    assert content(first)[3 * PAGE :][:4] == b"base"
    for each in (first, second, twin, parent):
        each.close()


def test_the_last_user_writes_back_and_has_nothing_of_its_own_then() -> None:
    parent = Ram(SIZE)
    write(parent, 0, b"base")
    parent.freeze().close()
    write(parent, 7, b"7777")
    image = parent.freeze()
    assert not image.pages
    assert parent.own_bytes() == 0
    assert content(image) == bytes(parent.buffer)
    assert read(parent, 7) == b"7777"
    image.close()
    parent.close()


def test_pages_in_a_run_cover_holes_and_what_follows_them(tmp_path: Path) -> None:
    """In a file on disk holes stay holes, whoever looks at them."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.truncate(fd, SIZE)
    for page in (1, 3, 5, 6, 9):
        os.pwrite(fd, b"base", page * PAGE)
    stored = FrozenRam(RamFile(fd, SIZE, writable=False), ())
    one = Ram(SIZE, stored)
    stored.close()
    for page in range(2, 8):
        write(one, page, b"anew")
    image = one.freeze()
    assert [offset // PAGE for offset, _ in image.pages] == [2]
    assert [span[0] // PAGE for span in image.file.written()] == [1, 3, 5, 9]
    assert content(image) == bytes(one.buffer)
    image.close()
    one.close()


@pytest.mark.parametrize("scan", [ram._scan, ram._scan_pagemap])
def test_any_history_is_seen_right(scan: object, monkeypatch: pytest.MonkeyPatch) -> None:
    if scan is ram._scan_pagemap:
        monkeypatch.setattr(ram, "_scan", _missing)
    dice = random.Random(1)
    lines: list[tuple[Ram, bytearray]] = [(Ram(SIZE), bytearray(SIZE))]
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(300):
        one, model = dice.choice(lines)
        page, text = dice.randrange(64), dice.randbytes(4)
        write(one, page, text)
        model[page * PAGE : page * PAGE + 4] = text
        if dice.random() < 0.1:
            image = one.freeze()
            assert content(image) == model
            lines.append((Ram(SIZE, image), bytearray(model)))
            image.close()
        if len(lines) > 1 and dice.random() < 0.1:
            lines.pop(dice.randrange(len(lines)))[0].close()
        assert all(one.buffer[:] == model for one, model in lines)
    for one, _ in lines:
        one.close()
    assert len(os.listdir("/proc/self/fd")) < files


def _missing(start: int, size: int) -> list[tuple[int, int]]:
    raise OSError("no such call")


def test_discarded_pages_go_back_to_the_host() -> None:
    one = Ram(SIZE)
    write(one, 5, b"text")
    before = os.fstat(one._file.fd).st_blocks if one._file else 0
    one.discard(5 * PAGE, PAGE)
    assert one._file is not None
    assert os.fstat(one._file.fd).st_blocks < before
    one.freeze().close()
    write(one, 5, b"text")
    one.discard(5 * PAGE, PAGE)
    assert one.own_bytes() == 0
    one.close()


def test_where_it_cannot_be_frozen_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "CAN_FREEZE", False)
    one = Ram(SIZE)
    write(one, 0, b"text")
    with pytest.raises(HostError, match="cannot be shared"):
        one.freeze()
    one.close()
