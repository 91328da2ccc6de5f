"""Decompression with a limit: what is unpacked comes from outside, and a few kilobytes can unfold to gigabytes."""

from __future__ import annotations

import importlib
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import Any

from avmm.errors import ImageError

_PIECE = 1 << 20
#: What the decoder itself may take: a dictionary of this size at most (``xz -9`` needs 65 MiB).
_DECODER_MEMORY = 256 << 20

#: How each format begins.
MAGIC = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

Buffer = bytes | memoryview


class TooLarge(ImageError):
    """More comes out than there may be."""


def detect(data: Buffer) -> str | None:
    """The name of the format ``data`` is compressed with, or None."""
    head = bytes(data[:8])
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)


def decompress(kind: str, data: Buffer, limit: int) -> bytes:
    """All of ``data`` unpacked. Raises ImageError as :func:`pieces` does."""
    return b"".join(pieces(kind, data, limit))


def pieces(kind: str, data: Buffer, limit: int) -> Iterator[bytes]:
    """``data`` unpacked, piece by piece. ``kind`` is gzip, xz, lzma or zstd; bytes after the end are ignored.

    Raises TooLarge when more than ``limit`` bytes come out, ImageError when the data is damaged or cut short, or when
    this Python cannot unpack the format.
    """
    total = 0
    try:
        for piece in _decoder(kind, data):
            total += len(piece)
            if total > limit:
                raise TooLarge(f"unpacks to more than {limit >> 20} MiB")
            yield piece
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise ImageError(f"the {kind} data is damaged ({error}): get the file again") from error


def _decoder(kind: str, data: Buffer) -> Iterator[bytes]:
    if kind == "gzip":
        return _gzip(data)
    if kind in ("xz", "lzma"):
        return _stream(lzma.LZMADecompressor(memlimit=_DECODER_MEMORY), data)
    if kind == "zstd":
        return _zstd(data)
    raise ImageError(f"avmm cannot unpack {kind}: unpack it yourself first")


def _gzip(data: Buffer) -> Iterator[bytes]:
    decoder = zlib.decompressobj(wbits=31)
    while not decoder.eof:
        piece = decoder.decompress(data, _PIECE)
        data = decoder.unconsumed_tail
        if not piece and not decoder.eof:
            raise EOFError("it ends too early")
        yield piece


def _stream(decoder: Any, data: Buffer) -> Iterator[bytes]:
    while not decoder.eof:
        piece = decoder.decompress(data, _PIECE)
        if not piece and decoder.needs_input and not data:
            raise EOFError("it ends too early")
        data = b""
        yield piece


def _zstd(data: Buffer) -> Iterator[bytes]:
    for name in ("compression.zstd", "zstandard"):  # Python 3.14's own, or the package
        try:
            module: Any = importlib.import_module(name)
        except ImportError:
            continue
        error = module.ZstdError
        try:
            if name == "zstandard":
                decoder = module.ZstdDecompressor(max_window_size=_DECODER_MEMORY)
                reader = decoder.stream_reader(io.BytesIO(data))
                while piece := reader.read(_PIECE):
                    yield piece
            else:
                yield from _stream(module.ZstdDecompressor(), data)
        except error as cause:
            raise EOFError(str(cause)) from cause
        return
    raise ImageError("it is packed with zstd: pip install 'avmm[zstd]'")
