"""Kernel modules: which ones a module needs, and the index files ``modprobe`` reads.

A Debian kernel package ships no ``modules.dep`` (it is made on the machine that installs it), so dependencies
come from each module's own ``.modinfo`` section: NUL-terminated ``key=value`` strings in an ELF64 file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from avmm.bootloader import compress
from avmm.errors import ImageError

_MODULE_LIMIT = 64 << 20
_SECTION = struct.Struct("<IIQQQQ")  # name, type, flags, address, offset, size: the head of an Elf64_Shdr


@dataclass(frozen=True, slots=True)
class Module:
    """One module: ``path`` below ``/lib/modules/VERSION/``, its unpacked ELF ``image``, and what it declares."""

    name: str
    path: str
    image: bytes
    depends: tuple[str, ...]
    aliases: tuple[str, ...]


@dataclass
class ModuleTree:
    """The modules of one kernel. ``paths`` are all that exist; ``read`` gives the content of one."""

    paths: Iterable[str]
    read: Callable[[str], bytes]
    _by_name: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self._by_name = {module_name(path): path for path in self.paths}

    def closure(self, names: Iterable[str]) -> list[Module]:
        """The modules called ``names`` and all they need, each after what it depends on.

        Names the kernel has built in, or does not have, are passed over; a declared dependency never is.
        """
        done: dict[str, Module] = {}
        for name in names:
            if module_name(name) in self._by_name:
                self._add(module_name(name), done, ())
        return list(done.values())

    def _add(self, name: str, done: dict[str, Module], above: tuple[str, ...]) -> None:
        if name in done:
            return
        if name not in self._by_name or name in above:
            raise ImageError(f"the kernel module {above[-1]} needs {name}, which its package does not hold")
        path = self._by_name[name]
        image = self.read(path)
        if kind := compress.detect(image):
            image = compress.decompress(kind, image, _MODULE_LIMIT)
        info = modinfo(image)
        depends = tuple(module_name(each) for each in ",".join(info.get("depends", [])).split(",") if each)
        for each in depends:
            self._add(each, done, (*above, name))
        plain = path.removesuffix(".xz").removesuffix(".gz").removesuffix(".zst")
        done[name] = Module(name, plain, image, depends, tuple(info.get("alias", [])))


def module_name(path: str) -> str:
    """``kernel/net/foo-bar.ko.xz`` → ``foo_bar``: the kernel takes ``-`` and ``_`` for the same."""
    return PurePosixPath(path).name.split(".")[0].replace("-", "_")


def modules_dep(modules: Iterable[Module]) -> str:
    """``modules.dep``: a line per module, every module it needs directly or not, nearest first."""
    known = {module.name: module for module in modules}
    lines = []
    for module in known.values():
        needed: dict[str, None] = {}
        queue = list(module.depends)
        for name in queue:  # grows while it is walked
            needed.setdefault(known[name].path)
            queue += [each for each in known[name].depends if known[each].path not in needed]
        lines.append(f"{module.path}: {' '.join(needed)}".rstrip())
    return "\n".join(sorted(lines)) + "\n"


def modules_alias(modules: Iterable[Module]) -> str:
    """``modules.alias``: which module serves a device or a request such as ``fs-ext4``."""
    return "".join(sorted(f"alias {alias} {module.name}\n" for module in modules for alias in module.aliases))


def modinfo(image: bytes) -> dict[str, list[str]]:
    """What a module declares about itself. Raises ImageError when ``image`` is not a 64-bit little-endian ELF file."""
    try:
        if image[:6] != b"\x7fELF\x02\x01":
            raise ValueError
        (table,) = struct.unpack_from("<Q", image, 0x28)
        entry_size, count, names_index = struct.unpack_from("<HHH", image, 0x3A)
        sections = [_SECTION.unpack_from(image, table + entry_size * index) for index in range(count)]
        names = sections[names_index][4]
        for name, _type, _flags, _address, offset, size in sections:
            if image.startswith(b".modinfo\0", names + name):
                return _pairs(image[offset : offset + size])
    except (struct.error, ValueError, IndexError, OverflowError):
        raise ImageError("a kernel module is not a 64-bit ELF file") from None
    return {}


def _pairs(section: bytes) -> dict[str, list[str]]:
    pairs: dict[str, list[str]] = {}
    for item in section.split(b"\0"):
        key, equals, value = item.decode("utf-8", "replace").partition("=")
        if equals:
            pairs.setdefault(key, []).append(value)
    return pairs
