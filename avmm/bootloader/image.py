"""Kernel files: the arm64 ``Image``, plain or packed, and a clear word about everything else.

Format: Documentation/arch/arm64/booting.rst; an EFI zboot file is drivers/firmware/efi/libstub/zboot-header.S.
"""

from __future__ import annotations

import os
import stat
import struct
import weakref
from dataclasses import dataclass
from pathlib import Path

from avmm.bootloader import compress
from avmm.errors import ImageError

_HEADER = struct.Struct("<8x3Q24x4xI")  # code; text_offset, image_size, flags; reserved, magic; offset of the PE header
_HEADER_SIZE = _HEADER.size
_MAGIC_AT, _MAGIC = 56, b"ARM\x64"
#: Where kernels older than Linux 3.17, which leave ``image_size`` zero, want to be.
_OLD_TEXT_OFFSET = 0x8_0000
#: What does not say how long it is (a pipe, a device) is read in pieces of so many bytes: it may be endless.
_PIECE = 1 << 20

#: So much of a kernel file is looked at before it is known whether all of it has to be.
_HEAD = 1 << 16

#: A kernel file in a folder of its own can be packed twice (zboot in gzip), not more.
_NESTING = 2


class StoredImage:
    """The content of a file, which stays open and is read to where it is wanted: a copy of it would cost each boot of a
    kernel a twentieth, and memory for as long as its VM is there. Whatever takes the file's name is not this."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd
        self._was = self._state()
        weakref.finalize(self, os.close, fd)  # with the last of the VMs that are loaded with it

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._fd)
        return found.st_size, found.st_mtime_ns

    def __len__(self) -> int:
        return self._was[0]

    def __bytes__(self) -> bytes:
        content = bytearray(len(self))
        self.read_into(memoryview(content))
        return bytes(content)

    def read_into(self, view: memoryview) -> None:
        """All of it, to a view of as many bytes. Blocks. Raises ImageError when it is not what it was any more."""
        try:
            at = 0
            while at < len(view) and (count := os.preadv(self._fd, [view[at:]], at)):
                at += count
            if at == len(view) and self._state() == self._was:
                return
        except OSError as error:
            raise ImageError(f"{self._path}: cannot read this kernel: {error.strerror}") from error
        raise ImageError(f"{self._path}: this kernel was written to since the VM was started: start another with it")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel ready to be placed.

    ``image`` goes to a 2 MiB aligned base + ``text_offset``; ``image_size`` bytes from there must be RAM (never less
    than ``image`` has). ``flags`` are the header's; ``page_size`` is the kernel's own in bytes, or None if it
    does not say.
    """

    image: bytes | memoryview | StoredImage
    text_offset: int
    image_size: int
    flags: int
    page_size: int | None


def read_file(path: str | os.PathLike[str], what: str, limit: int) -> bytes:
    """The content of an image file called ``what`` in errors. Raises ImageError, also over ``limit`` bytes."""
    path = Path(path)
    try:
        with path.open("rb", buffering=0) as stream:
            # A file in one piece, as each copy of a kernel costs 1 to 2 % of its boot.
            piece_size = max(os.fstat(stream.fileno()).st_size, _PIECE)
            pieces: list[bytes] = []
            left = limit + 1
            while left and (piece := stream.read(min(left, piece_size))):
                pieces.append(piece)
                left -= len(piece)
            content = b"".join(pieces)
    except FileNotFoundError:
        raise ImageError(f"{path}: there is no such {what}; `avmm fetch debian` gets one") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: this is a folder; name the file of the {what} in it") from None
    except OSError as error:
        raise ImageError(f"{path}: cannot read this {what}: {error.strerror}") from error
    if not content:
        raise ImageError(f"{path}: this {what} is empty: get the file again")
    if len(content) > limit:
        raise ImageError(f"{path}: this {what} is larger than the guest's memory of {limit >> 20} MiB: give it more")
    return content


#: What a machine is loaded with at power-on and at each reset: its kernel and, if it has one, its initrd.
Images = tuple[Kernel, bytes | None]


def load_kernel(path: str | os.PathLike[str], memory: int) -> Kernel:
    """The kernel in the file ``path``, for a guest of ``memory`` bytes. Raises ImageError, naming the file."""
    try:
        if (kernel := _stored(Path(path), memory)) is not None:
            return kernel
    except ImageError as error:
        raise ImageError(f"{os.fspath(path)}: {error}") from error
    content = read_file(path, "kernel", memory)
    try:
        return parse_kernel(content, memory)
    except ImageError as error:
        raise ImageError(f"{os.fspath(path)}: {error}") from error


def _stored(path: Path, memory: int) -> Kernel | None:
    """The kernel in a file that has it as it is to be in memory; of any other, and of what is no file, None."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return None  # to open a pipe is to take what is in it
        with path.open("rb", buffering=0) as stream:
            image = StoredImage(path, os.dup(stream.fileno()))
            head = stream.read(_HEAD)
    except OSError:
        return None  # read_file() says why
    if compress.detect(head) or head[4:8] == b"zimg" or head[_MAGIC_AT:_HEADER_SIZE][:4] != _MAGIC:
        return None
    if len(head) < _HEADER_SIZE or len(image) > memory:
        return None
    return _image(head, image, memory)


def parse_kernel(content: bytes | memoryview, memory: int) -> Kernel:
    """The kernel in ``content``: an Image, or one packed with gzip, xz, zstd or as EFI zboot. Raises ImageError."""
    for _ in range(_NESTING):
        kind = compress.detect(content)
        if kind is not None:
            content = _unpack(kind, content, memory)
        elif bytes(content[:2]) == b"MZ" and bytes(content[4:8]) == b"zimg":
            content = _zboot(memoryview(content), memory)
    if bytes(content[_MAGIC_AT:_HEADER_SIZE][:4]) != _MAGIC:
        raise ImageError(_explain(bytes(content[:1024])))
    kernel = _image(content, content, memory)
    if kernel is None:
        raise ImageError("the kernel is cut short: get the file again")
    return kernel


def _unpack(kind: str, content: bytes | memoryview, memory: int) -> bytes:
    try:
        return compress.decompress(kind, content, memory)
    except compress.TooLarge as error:
        raise ImageError(f"the kernel {error}, the guest's memory: give it more") from error


def _zboot(content: memoryview, memory: int) -> bytes:
    from construct import Bytes, ConstructError, Int32ul, Padding, Struct

    header = Struct(
        "mz" / Bytes(4), "zimg" / Bytes(4), "offset" / Int32ul, "size" / Int32ul, Padding(8), "kind" / Bytes(32)
    )
    try:
        found = header.parse(bytes(content[:_HEADER_SIZE]))
    except ConstructError:
        raise ImageError("the EFI zboot header is cut short: get the file again") from None
    kind = found.kind.split(b"\0")[0].decode("ascii", "replace")
    payload = content[found.offset : found.offset + found.size]
    if len(payload) < found.size:
        raise ImageError("the kernel is cut short: get the file again")
    return _unpack({"xzkern": "xz", "zstd22": "zstd"}.get(kind, kind), payload, memory)


def _image(head: bytes | memoryview, image: bytes | memoryview | StoredImage, memory: int) -> Kernel | None:
    """The kernel that ``head``, the beginning of ``image`` or all of it, tells of; None when headers go on behind."""
    if len(head) < _HEADER_SIZE:
        return None
    text_offset, image_size, flags, pe_offset = _HEADER.unpack_from(head)
    if flags & 1:
        raise ImageError("this is a big-endian kernel, and avmm runs little-endian ones only")
    file_size = _file_size(head, pe_offset)
    if file_size is None or (len(head) < len(image) and len(head) < pe_offset + 4):
        return None
    if len(image) < file_size:
        raise ImageError("the kernel is cut short: get the file again")
    size = max(image_size, len(image))
    offset = text_offset if image_size else _OLD_TEXT_OFFSET
    if offset + size > memory:
        need = -(-(offset + size) // (1 << 20))
        raise ImageError(f"the kernel takes {need} MiB, and the guest has {memory >> 20} MiB: give it more memory")
    page_size = (None, 0x1000, 0x4000, 0x10000)[flags >> 1 & 3]
    return Kernel(image, offset, size, flags, page_size)


def _file_size(head: bytes | memoryview, pe_offset: int) -> int | None:
    """What the file's PE sections need it to be at least (a kernel with an EFI stub is a PE file too), else 0; None
    when ``head`` does not hold the section table.

    The kernel's own header cannot tell that a file is cut short: ``image_size`` counts memory, not bytes in the file.
    """
    try:
        if bytes(head[pe_offset : pe_offset + 4]) != b"PE\0\0":
            return 0
        (count,) = struct.unpack_from("<H", head, pe_offset + 6)
        (optional,) = struct.unpack_from("<H", head, pe_offset + 20)
        table = pe_offset + 24 + optional
        ends = (sum(struct.unpack_from("<II", head, table + 40 * index + 16)) for index in range(count))
        return max(ends, default=0)
    except struct.error:
        return None


def _explain(head: bytes) -> str:
    """What a file is that is no arm64 Image, and what to do about it."""
    if head.startswith(b"\x7fELF"):
        if head[18:20] == b"\xb7\0":
            return "this is an ELF file (vmlinux): use the Image from arch/arm64/boot instead"
        return "this is an ELF file for another kind of machine: get an arm64 Image"
    if head[0x202:0x206] == b"HdrS":
        return "this is an x86 kernel (bzImage): get one for arm64"
    if head[0x24:0x28] in (b"\x18\x28\x6f\x01", b"\x01\x6f\x28\x18"):
        return "this is a kernel for 32-bit ARM (zImage): get one for arm64"
    if head[0x38:0x3C] == b"RSC\x05":
        return "this is a RISC-V kernel: get one for arm64"
    if head.startswith(b"0707"):
        return "this is an initrd (cpio), not a kernel: the kernel comes first"
    if head.startswith(b"\xd0\x0d\xfe\xed"):
        return "this is a device tree or a FIT image, not an arm64 Image: extract the kernel with dumpimage"
    if head.startswith(b"\x27\x05\x19\x56"):
        return "this is a U-Boot uImage: extract the kernel with dumpimage"
    if head.startswith((b"\x04\x22\x4d\x18", b"\x02\x21\x4c\x18", b"BZh", b"\x89LZO")):
        return "this is packed in a way avmm cannot unpack: unpack it first"
    if len(head) < _HEADER_SIZE:
        return "the kernel is cut short: get the file again"
    return "this is not an arm64 Linux kernel (no Image header): give it an Image, Image.gz or vmlinuz"
