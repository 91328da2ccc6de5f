"""Debian packages, read without Debian's tools: an ``ar`` archive holding ``data.tar``, compressed or not."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from avmm.bootloader import compress
from avmm.errors import ImageError

_LIMIT = 4 << 30  # what a package may unpack to
_SUFFIXES = {".gz": "gzip", ".xz": "xz", ".zst": "zstd", ".lzma": "lzma"}


class Package:
    """The files of one package, or of several together. Nothing is written where an archive says; members are read."""

    def __init__(self, archives: Iterable[tarfile.TarFile]) -> None:
        self.names = {
            member.name.removeprefix("./"): (archive, member)
            for archive in archives
            for member in archive
            if member.isfile()
        }

    def read(self, name: str) -> bytes:
        """The content of ``name`` (no leading slash). Raises KeyError when there is no such file."""
        archive, member = self.names[name]
        stream = archive.extractfile(member)
        if stream is None:
            raise KeyError(name)
        with stream:
            return stream.read()


@contextmanager
def open_package(*paths: Path) -> Iterator[Package]:
    """The packages at ``paths``, their data unpacked to unnamed temporary files. Raises ImageError."""
    with ExitStack() as stack:
        yield Package([stack.enter_context(_open_data(path)) for path in paths])


@contextmanager
def _open_data(path: Path) -> Iterator[tarfile.TarFile]:
    suffix, data = _data_member(path.read_bytes(), path.name)
    with tempfile.TemporaryFile() as spool:
        try:
            if suffix:
                for piece in compress.pieces(_SUFFIXES[suffix], data, _LIMIT):
                    spool.write(piece)
            else:
                spool.write(data)
            spool.seek(0)
            with tarfile.open(fileobj=spool, mode="r:") as archive:
                yield archive
        except tarfile.TarError as error:
            raise ImageError(f"{path.name}: its data.tar is damaged: {error}") from error


def _data_member(content: bytes, label: str) -> tuple[str, memoryview]:
    """The suffix and the bytes of the member ``data.tar*``."""
    if not content.startswith(b"!<arch>\n"):
        raise ImageError(f"{label}: not a Debian package")
    at = 8
    while at + 60 <= len(content):
        name = content[at : at + 16].decode("ascii", "replace").rstrip(" /")
        length = content[at + 48 : at + 58].strip()
        if not length.isdigit():
            break
        size = int(length)
        at += 60
        suffix = name.removeprefix("data.tar")
        if name.startswith("data.tar") and (not suffix or suffix in _SUFFIXES):
            if at + size > len(content):
                break
            return suffix, memoryview(content)[at : at + size]
        at += size + size % 2
    raise ImageError(f"{label}: a damaged Debian package, or one this version cannot read")
