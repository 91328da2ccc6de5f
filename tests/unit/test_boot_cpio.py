"""The archives we write are what the `cpio` program reads, and the other way round."""

from __future__ import annotations

import contextlib
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avmm.bootloader import cpio
from avmm.errors import ImageError

ENTRIES = [
    cpio.file("usr/share/odd", b"x" * 4097),
    cpio.file("init", b"#!/bin/sh\n", 0o755),
    cpio.symlink("bin/sh", "busybox"),
    cpio.character_device("dev/console", 5, 1),
    cpio.directory("tmp", 0o1777),
    cpio.file("empty", b""),
]

needs_cpio = pytest.mark.skipif(not shutil.which("cpio"), reason="needs the cpio program")


@needs_cpio
def test_cpio_lists_what_we_packed() -> None:
    done = subprocess.run(["cpio", "-itv"], input=cpio.pack(ENTRIES), capture_output=True, check=True)
    lines = [line.split() for line in done.stdout.decode().splitlines()]
    assert [line[-1] for line in lines] == [
        "bin", "busybox", "dev", "dev/console", "empty", "init", "tmp", "usr", "usr/share", "usr/share/odd",
    ]  # fmt: skip
    by_name = {line[-1]: line for line in lines}
    assert by_name["init"][0] == "-rwxr-xr-x"
    assert by_name["tmp"][0] == "drwxrwxrwt"
    assert by_name["dev/console"][0] == "crw-------"
    assert by_name["dev/console"][4:6] == ["5,", "1"]
    assert by_name["usr/share/odd"][4] == "4097"
    assert by_name["busybox"][-3:] == ["bin/sh", "->", "busybox"]


@needs_cpio
def test_cpio_unpacks_what_we_packed(tmp_path: Path) -> None:
    archive = cpio.pack(entry for entry in ENTRIES if not stat.S_ISCHR(entry.mode))
    subprocess.run(["cpio", "-id", "--quiet"], input=archive, cwd=tmp_path, check=True)
    assert (tmp_path / "usr/share/odd").read_bytes() == b"x" * 4097
    assert (tmp_path / "bin/sh").readlink() == Path("busybox")
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755


@needs_cpio
def test_we_read_what_cpio_packs(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("folder/file")
    names = b"folder\nfolder/file\nlink\n"
    archive = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"], input=names, cwd=tmp_path, capture_output=True, check=True
    ).stdout
    found = {entry.name: entry for entry in cpio.unpack(archive)}
    assert found["folder/file"].data == b"content"
    assert found["link"].data == b"folder/file"
    assert stat.S_ISDIR(found["folder"].mode)


@needs_cpio
def test_an_appended_archive_is_read_after_the_first(tmp_path: Path) -> None:
    both = cpio.append(cpio.pack(ENTRIES), cpio.pack([cpio.file("init", b"mine", 0o755)]))
    assert [entry.data for entry in cpio.unpack(both) if entry.name == "init"] == [b"#!/bin/sh\n", b"mine"]


def test_appending_to_a_compressed_archive_aligns_the_second() -> None:
    joined = cpio.append(b"\x1f\x8b\x08\x00\x01", cpio.pack([]))
    assert joined.index(b"070701") == 8


def test_the_order_given_changes_nothing() -> None:
    assert cpio.pack(ENTRIES) == cpio.pack(reversed(ENTRIES))


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1).filter(
    lambda name: name not in (".", "..", "TRAILER!!!")
)


@given(st.dictionaries(NAMES, st.binary(max_size=64), max_size=6))
def test_what_goes_in_comes_out(files: dict[str, bytes]) -> None:
    archive = cpio.pack(cpio.file(name, data) for name, data in files.items())
    assert {entry.name: entry.data for entry in cpio.unpack(archive)} == files


@given(st.binary(max_size=300), st.integers(min_value=0, max_value=400))
def test_damage_is_an_image_error_and_no_other(junk: bytes, at: int) -> None:
    good = cpio.pack(ENTRIES[1:])
    with contextlib.suppress(ImageError):
        list(cpio.unpack(good[:at] + junk))


@pytest.mark.parametrize("name", ["", "/", "a\0b"])
def test_a_name_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        cpio.pack([cpio.file(name, b"")])
