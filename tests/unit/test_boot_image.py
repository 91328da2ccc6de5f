"""Kernel files of every kind, good and bad, and where the parts go in memory."""

from __future__ import annotations

import gzip
import importlib.util
import lzma
import mmap
import os
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmm.bootloader import compress, loader, machine
from avmm.bootloader.image import Kernel, load_kernel, parse_kernel
from avmm.errors import ImageError
from avmm.fdt import decode
from avmm.memory import GuestMemory, Region

MIB = 1 << 20
MEMORY = 64 * MIB


def image(
    body: int = 0x1_0000, *, text_offset: int = 0, image_size: int = 0x2_0000, flags: int = 0xA, pe: bool = True
) -> bytes:
    """An Image as booting.rst has it; with ``pe`` one section that runs to the end of the file."""
    head = struct.pack("<4sIQQQ24x4sI", b"MZ\0\x91", 0x14000000, text_offset, image_size, flags, b"ARM\x64", 64)
    content = bytearray(head.ljust(body, b"\x5a"))
    if pe:
        struct.pack_into("<4sHHIIIHH", content, 64, b"PE\0\0", 0xAA64, 1, 0, 0, 0, 0, 0)
        struct.pack_into("<8sIIII", content, 88, b".text", body, 0, body - 0x1000, 0x1000)
    return bytes(content)


def zboot(payload: bytes, kind: bytes, declared: int | None = None) -> bytes:
    size = len(payload) if declared is None else declared
    return struct.pack("<4s4sII8x32s", b"MZ\0\0", b"zimg", 512, size, kind).ljust(512, b"\0") + payload + bytes(16)


@pytest.mark.parametrize(
    "packed",
    [
        image(),
        gzip.compress(image()),
        lzma.compress(image()),
        zboot(gzip.compress(image()), b"gzip"),
        zboot(lzma.compress(image()), b"xzkern"),
        zboot(lzma.compress(image(), lzma.FORMAT_ALONE), b"lzma"),
        gzip.compress(zboot(gzip.compress(image()), b"gzip")),
        gzip.compress(image()) + b"padding",
    ],
    ids=["plain", "gzip", "xz", "zboot-gzip", "zboot-xz", "zboot-lzma", "zboot-in-gzip", "gzip-padded"],
)
def test_every_packing_gives_the_same_kernel(packed: bytes) -> None:
    assert parse_kernel(packed, MEMORY) == Kernel(image(), 0, 0x2_0000, 0xA, 0x1000)


@pytest.mark.skipif(not shutil.which("zstd"), reason="needs the zstd program")
def test_zstd_is_unpacked_or_says_what_to_install() -> None:
    packed = subprocess.run(["zstd", "-c", "-19"], input=image(), capture_output=True, check=True).stdout
    content = zboot(packed, b"zstd22")
    if any(importlib.util.find_spec(name) for name in ("zstandard", "compression")):
        assert parse_kernel(content, MEMORY).image == image()
    else:
        with pytest.raises(ImageError, match=r"it is packed with zstd: pip install 'avmm\[zstd\]'"):
            parse_kernel(content, MEMORY)


@pytest.mark.parametrize(("flags", "size"), [(0x8, None), (0xA, 0x1000), (0xC, 0x4000), (0xE, 0x10000)])
def test_the_flags_give_the_page_size(flags: int, size: int | None) -> None:
    assert parse_kernel(image(flags=flags), MEMORY).page_size == size


def test_a_kernel_from_before_image_size_goes_to_the_old_offset() -> None:
    kernel = parse_kernel(image(image_size=0, text_offset=0x1234), MEMORY)
    assert (kernel.text_offset, kernel.image_size) == (0x8_0000, 0x1_0000)


def test_a_signature_after_the_image_is_part_of_it() -> None:
    assert parse_kernel(image(image_size=0x1000, pe=False), MEMORY).image_size == 0x1_0000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (image()[:60], "cut short"),
        (image()[:0x8000], "cut short"),
        (image()[:100], "cut short"),
        (gzip.compress(os.urandom(5000))[:3000], "damaged"),
        (gzip.compress(image())[:-4] + b"1234", "damaged"),
        (lzma.compress(image())[:-40], "damaged"),
        (gzip.compress(image()[:60]), "cut short"),
        (zboot(gzip.compress(image()), b"gzip", 1 << 30), "cut short"),
        (zboot(b"x", b"lz4"), "cannot unpack lz4"),
        (zboot(b"x", b"gzip")[:30], "cut short"),
        (image(flags=0xB), "big-endian"),
        (image(image_size=1 << 40), "more memory"),
        (image(text_offset=(1 << 64) - 1), "more memory"),
        (gzip.compress(bytes(MEMORY + 1)), "unpacks to more than 64 MiB"),
        (b"\x7fELF\x02\x01\x01".ljust(18, b"\0") + b"\xb7\0" + bytes(100), "vmlinux"),
        (b"\x7fELF\x02\x01\x01".ljust(18, b"\0") + b"\x3e\0" + bytes(100), "another kind of machine"),
        (bytes(0x202) + b"HdrS" + bytes(100), "x86"),
        (bytes(0x24) + b"\x18\x28\x6f\x01" + bytes(100), "32-bit ARM"),
        (bytes(0x38) + b"RSC\x05" + bytes(100), "RISC-V"),
        (b"070701" + bytes(200), "initrd"),
        (b"\xd0\x0d\xfe\xed" + bytes(200), "device tree"),
        (b"\x27\x05\x19\x56" + bytes(200), "uImage"),
        (b"BZh91AY" + bytes(200), "unpack it first"),
        (b"#!/bin/sh\necho this is no kernel at all, whatever it may be called\n", "no Image header"),
    ],
)
def test_what_is_no_kernel_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        load_kernel(path, MEMORY)
    message = str(caught.value)
    assert words in message
    assert message.startswith(str(path))
    assert "\n" not in message


def test_a_file_is_named_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has a word of that name in it already."""
    monkeypatch.chdir(tmp_path)
    for content in (image(flags=0xB), b"\x7fELF", image()[:-1]):
        Path("th").write_bytes(content)
        with pytest.raises(ImageError, match=r"^th: th"):
            load_kernel("th", MEMORY)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none", "no such kernel"), (tmp_path, "folder")):
        with pytest.raises(ImageError, match=words):
            load_kernel(path, MEMORY)
    (tmp_path / "empty").touch()
    with pytest.raises(ImageError, match="empty"):
        load_kernel(tmp_path / "empty", MEMORY)
    with (tmp_path / "big").open("wb") as stream:
        stream.truncate(MEMORY + 1)
    with pytest.raises(ImageError, match="larger than the guest's memory of 64 MiB"):
        load_kernel(tmp_path / "big", MEMORY)


def test_a_kernel_is_read_from_its_file_each_time(tmp_path: Path) -> None:
    """Whatever has its name by then; but what was written to is another kernel than the one looked at."""
    path = tmp_path / "vmlinuz"
    path.write_bytes(image())
    kernel = load_kernel(path, MEMORY)
    assert bytes(kernel.image) == image()
    path.rename(tmp_path / "vmlinuz.old")
    path.write_bytes(bytes(100))
    assert bytes(kernel.image) == image()
    for change in (image()[:-1], image() + b"x"):
        path.write_bytes(image())
        kernel = load_kernel(path, MEMORY)
        path.write_bytes(change)
        with pytest.raises(ImageError, match="written to since the VM was started"):
            bytes(kernel.image)
    path.write_bytes(image())
    kernel = load_kernel(path, MEMORY)
    os.utime(path, ns=(0, 0))
    with pytest.raises(ImageError, match="written to since the VM was started"):
        bytes(kernel.image)


def test_a_kernel_s_file_is_closed_with_it(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(image())
    before = len(os.listdir("/dev/fd"))
    kernel = load_kernel(path, MEMORY)
    assert len(os.listdir("/dev/fd")) == before + 1
    del kernel
    assert len(os.listdir("/dev/fd")) == before


def test_a_section_table_far_from_the_start(tmp_path: Path) -> None:
    """Of a file cut short, which it alone tells."""
    whole = bytearray(image().ljust(0x4_0000, b"\0"))
    at = 0x2_0000
    struct.pack_into("<I", whole, 60, at)
    whole[at : at + 24] = b"PE\0\0".ljust(6, b"\0") + struct.pack("<H", 1) + bytes(16)
    struct.pack_into("<II", whole, at + 24 + 16, 0x1000, 0x3_F000)
    path = tmp_path / "vmlinuz"
    path.write_bytes(whole)
    assert bytes(load_kernel(path, MEMORY).image) == whole
    path.write_bytes(whole[:-1])
    with pytest.raises(ImageError, match="cut short"):
        load_kernel(path, MEMORY)


def test_a_kernel_through_a_pipe(tmp_path: Path) -> None:
    """``avmm boot <(make-kernel)``: in many pieces, whose number nobody knows; and one that does not end."""
    path = tmp_path / "vmlinuz"
    os.mkfifo(path)
    whole = image() + bytes(3 * MIB)
    with ThreadPoolExecutor() as threads:
        wrote = threads.submit(path.write_bytes, whole)
        assert load_kernel(path, MEMORY).image == whole
        assert wrote.result() == len(whole)
    with pytest.raises(ImageError, match="larger than the guest's memory"):
        load_kernel("/dev/zero", MEMORY)


def test_a_file_one_may_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "vmlinuz").write_bytes(image())
    monkeypatch.setattr(Path, "open", refuse)  # root may read everything, so the mode alone proves nothing
    with pytest.raises(ImageError, match="cannot read this kernel: Permission denied"):
        load_kernel(tmp_path / "vmlinuz", MEMORY)


def test_a_bomb_is_not_unfolded() -> None:
    """What comes out stops at the limit, and comes in pieces: the whole is never in memory."""
    sizes: list[int] = []
    bomb = compress.pieces("gzip", gzip.compress(bytes(64 * MIB)), 16 * MIB)
    with pytest.raises(compress.TooLarge):
        sizes.extend(map(len, bomb))
    assert sum(sizes) <= 16 * MIB
    assert max(sizes) <= MIB


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_kernel_is_an_image_error_or_fits(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from([image(0x2000), gzip.compress(image(0x2000))])))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, min(len(content) - 1, 160)))] = data.draw(st.integers(0, 255))
    try:
        kernel = parse_kernel(bytes(content), MEMORY)
    except ImageError:
        return
    assert kernel.text_offset + kernel.image_size <= MEMORY
    assert len(kernel.image) <= kernel.image_size


# --- placing ---------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 1 << 30),
    st.integers(64, 1 << 30),
    st.integers(0, 1 << 30),
    st.integers(16, 4096).map(lambda count: count * MIB),
)
def test_a_layout_obeys_the_boot_protocol(text_offset: int, image_size: int, initrd: int, size: int) -> None:
    kernel = Kernel(b"", text_offset, image_size, 0, 0x1000)
    base = machine.RAM_BASE
    try:
        layout = loader.place(base, size, kernel, initrd)
    except ImageError as error:
        needed = int(str(error).split("give the guest ")[1].split()[0]) * MIB
        assert needed > size
        layout = loader.place(base, needed, kernel, initrd)  # what it says is enough, is
        size = needed
    assert (layout.kernel - text_offset) % (2 * MIB) == 0
    assert base <= layout.kernel
    assert layout.kernel + image_size <= layout.fdt
    assert layout.fdt % 8 == 0
    assert layout.fdt // (2 * MIB) == (layout.fdt + 2 * MIB - 1) // (2 * MIB)
    assert layout.fdt + 2 * MIB <= layout.initrd
    assert layout.initrd_end == layout.initrd + initrd <= base + size
    assert layout.initrd_end <= (layout.kernel >> 30 << 30) + (32 << 30)


def test_an_initrd_too_far_away_is_refused() -> None:
    with pytest.raises(ImageError, match="32 GiB"):
        loader.place(machine.RAM_BASE, 64 << 30, Kernel(b"", 0, MIB, 0, None), 33 << 30)


def guest_memory(size: int) -> GuestMemory:
    memory = GuestMemory()
    memory.add(Region(machine.RAM_BASE, mmap.mmap(-1, size)))
    return memory


def test_everything_is_written_where_the_tree_says() -> None:
    memory = guest_memory(MEMORY)
    told: list[tuple[int, int]] = []
    memory.on_host_write = lambda gpa, length: told.append((gpa, length))
    kernel = parse_kernel(image(), MEMORY)
    initrd = os.urandom(5001)
    entry = loader.load_linux(
        memory, kernel, initrd, cmdline="quiet", cpus=[0, 1], devices=[], entropy=bytes(range(loader.ENTROPY_SIZE))
    )
    assert memory.read(entry.pc, len(image())) == image()
    tree = decode(memory.read(entry.x0, 2 * MIB))
    chosen = tree.find("chosen")
    start, end = (int.from_bytes(chosen[f"linux,initrd-{edge}"], "big") for edge in ("start", "end"))
    assert memory.read(start, end - start) == initrd
    assert chosen["bootargs"] == b"quiet\0"
    assert (chosen["rng-seed"], chosen["kaslr-seed"]) == (bytes(range(64)), bytes(range(64, 72)))
    assert tree.find("memory@40000000")["reg"] == struct.pack(">QQ", machine.RAM_BASE, MEMORY)
    assert len(told) == 3
    memory.close()


def test_too_little_memory_says_how_much_would_do() -> None:
    memory = guest_memory(2 * MIB)
    with pytest.raises(ImageError, match=r"do not fit into 2 MiB: give the guest 64 MiB of memory or more"):
        loader.load_linux(
            memory, parse_kernel(image(), MEMORY), b"x", cmdline="", cpus=[0], devices=[], entropy=bytes(72)
        )
    memory.close()


def test_the_wrong_amount_of_entropy_is_a_mistake() -> None:
    memory = guest_memory(MEMORY)
    with pytest.raises(ValueError):
        loader.load_linux(memory, parse_kernel(image(), MEMORY), None, cmdline="", cpus=[0], devices=[], entropy=b"")
    memory.close()
