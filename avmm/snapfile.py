"""Snapshot files: a header, a table of named records, and the records, the large ones sparse and on page boundaries.

::

    0         header: magic, version, the file's length, the table's length, a checksum of header and table
    48        the table: name, offset, length and, of the small records, a checksum
    ...       records

What is all zeroes is a hole and costs nothing. Large records (memory, disks) have no checksum, because to check one
would mean to read it, and it is to be mapped: of them it is known that they are whole, not that no bit has changed.
A file appears under its name when it is complete.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from construct import Bytes, Const, ConstructError, Int32ul, Int64ul, PaddedString, Struct

from avmm.errors import ConfigError, HostError, ImageError

MAGIC: Final = b"AVMMSNAP"
VERSION: Final = 1

#: Large records begin on a multiple of this: the largest page of any host.
ALIGN: Final = 1 << 16
#: Written and compared at once, in bytes; and what is looked at for zeroes in one that is not all zeroes.
_PIECE: Final = 1 << 20
_GRAIN: Final = 1 << 12
_ZEROES: Final = bytes(_PIECE)

_TABLE_MAX: Final = 1 << 16
_RECORD_MAX: Final = 1 << 30  # of one that is read at once

_HEADER: Final = Struct(
    "magic" / Const(MAGIC),
    "version" / Int32ul,
    "checksum" / Int32ul,  # CRC-32 of the header, with zero here, and the table
    "size" / Int64ul,  # of the file
    "table" / Int64ul,  # bytes, right after the header
    "made_by" / Bytes(16),
)
_RECORD: Final = Struct(
    "name" / PaddedString(32, "ascii"),
    "offset" / Int64ul,
    "length" / Int64ul,
    "checked" / Int32ul,
    "checksum" / Int32ul,
)
_HEADER_SIZE: Final = _HEADER.sizeof()
_RECORD_SIZE: Final = _RECORD.sizeof()


@dataclass(frozen=True, slots=True)
class Record:
    """Where something is in a file; ``checksum`` None: it has none."""

    name: str
    offset: int
    length: int
    checksum: int | None = None


class Writer:
    """Makes the file ``path``; used as a context manager, by one thread. Raises HostError when the host cannot.

    Records come in any order, large ones with :meth:`reserve` and then :meth:`write`. At the block's end the file is
    there; when the block raises, nothing is.
    """

    def __init__(self, path: Path, made_by: str) -> None:
        self._path = path
        self._made_by = made_by
        self._records: list[Record] = []
        self._end = ALIGN  # the table's room
        self._partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        if path.is_dir():
            raise ConfigError(f"{path} is a directory; give the snapshot a file's name")
        try:
            self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot write the snapshot {path}: {error.strerror}") from error

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
                os.rename(self._partial, self._path)
        except OSError as failed:
            raise self._failed(failed) from failed
        finally:
            os.close(self._fd)
            with contextlib.suppress(FileNotFoundError):
                self._partial.unlink()

    def add(self, name: str, data: bytes) -> None:
        """A small record, with a checksum."""
        record = Record(name, self._end, len(data), zlib.crc32(data))
        self._records.append(record)
        self._end += _up(len(data), ALIGN)
        self._pwrite(data, record.offset)

    def reserve(self, name: str, length: int) -> Record:
        """Room for a large record, all zeroes until written to."""
        record = Record(name, self._end, length)
        self._records.append(record)
        self._end += _up(length, ALIGN)
        return record

    def write(self, record: Record, offset: int, data: bytes | memoryview) -> None:
        """Put ``data`` into a reserved record; zeroes of whole pages stay holes."""
        for at in range(0, len(data), _PIECE):
            piece = data[at : at + _PIECE]
            if piece == _ZEROES[: len(piece)]:
                continue
            for start, length in _nonzero(piece):
                self._pwrite(piece[start : start + length], record.offset + offset + at + start)

    def _finish(self) -> None:
        table = b"".join(
            _RECORD.build({
                "name": record.name, "offset": record.offset, "length": record.length,
                "checked": int(record.checksum is not None), "checksum": record.checksum or 0,
            })
            for record in self._records
        )  # fmt: skip
        head = {
            "version": VERSION, "checksum": 0, "size": self._end, "table": len(table),
            "made_by": self._made_by.encode()[:16].ljust(16, b"\0"),
        }  # fmt: skip
        head["checksum"] = zlib.crc32(_HEADER.build(head) + table)
        os.ftruncate(self._fd, self._end)
        self._pwrite(_HEADER.build(head) + table, 0)

    def _pwrite(self, data: bytes | memoryview, offset: int) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], offset + done)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> HostError:
        return HostError(f"cannot write the snapshot {self._path}: {error.strerror}")


class Reader:
    """The file ``path``, open until closed. Raises ImageError for what is not a whole snapshot of ours."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ImageError(f"cannot open the snapshot {path}: {error.strerror}") from error
        try:
            self._records = self._read_table()
        except OSError as error:
            os.close(self.fd)
            raise ImageError(f"cannot read the snapshot {path}: {error.strerror}") from error
        except BaseException:
            os.close(self.fd)
            raise

    def _read_table(self) -> dict[str, Record]:
        path = self.path
        data = os.pread(self.fd, _HEADER_SIZE, 0)
        if data[: len(MAGIC)] != MAGIC:
            raise ImageError(f"{path} is not a snapshot made by avmm")
        try:
            head = _HEADER.parse(data)
        except ConstructError as error:
            raise ImageError(f"{path} is damaged: its header is cut short") from error
        if head.version != VERSION:
            made_by = head.made_by.rstrip(b"\0").decode("ascii", "replace")
            raise ImageError(
                f"{path} is a snapshot of version {head.version} (by avmm {made_by}); this avmm reads {VERSION}"
            )
        if head.table > _TABLE_MAX or head.table % _RECORD_SIZE:
            raise ImageError(f"{path} is damaged: its table makes no sense")
        table = os.pread(self.fd, head.table, _HEADER_SIZE)
        checksum, head.checksum = head.checksum, 0
        if zlib.crc32(_HEADER.build(head) + table) != checksum:
            raise ImageError(f"{path} is damaged: the checksum of its header is wrong")
        size = os.fstat(self.fd).st_size
        if size != head.size:
            raise ImageError(f"{path} is damaged: it has {size} bytes, not {head.size}; was a copy cut short?")
        found = {}
        for at in range(0, len(table), _RECORD_SIZE):
            each = _RECORD.parse(table[at : at + _RECORD_SIZE])
            found[each.name] = Record(each.name, each.offset, each.length, each.checksum if each.checked else None)
        return found

    def record(self, name: str) -> Record:
        """The record of this name. Raises ImageError."""
        found = self._records.get(name)
        if found is None:
            raise ImageError(f"{self.path} is damaged: it has no {name}")
        return found

    def read(self, name: str) -> bytes:
        """A small record, checked. Raises ImageError."""
        record = self.record(name)
        if record.length > _RECORD_MAX:
            raise ImageError(f"{self.path} is damaged: its {name} is too long")
        data = os.pread(self.fd, record.length, record.offset)
        if zlib.crc32(data) != record.checksum:
            raise ImageError(f"{self.path} is damaged: the checksum of its {name} is wrong")
        return data

    def close(self) -> None:
        """Close the file; what was mapped stays."""
        os.close(self.fd)


def _nonzero(piece: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is not zeroes, in whole grains."""
    start = None
    for at in range(0, len(piece), _GRAIN):
        grain = piece[at : at + _GRAIN]
        if grain == _ZEROES[: len(grain)]:
            if start is not None:
                yield start, at - start
                start = None
        elif start is None:
            start = at
    if start is not None:
        yield start, len(piece) - start


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
