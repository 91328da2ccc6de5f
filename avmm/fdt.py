"""Flattened device trees: how the guest learns what it has (Devicetree Specification v0.4, chapter 5).

Devices describe themselves as a :class:`Node`, machine code joins the nodes to a tree, :func:`encode` makes the
blob (version 17) and :func:`decode` reads one.

    uart = Node("pl011@9000000", {"compatible": ["arm,pl011", "arm,primecell"], "reg": u64s(base, size)})
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

_MAGIC = 0xD00DFEED
_HEADER = struct.Struct(">10I")
_CELL = struct.Struct(">I")
_BEGIN_NODE, _END_NODE, _PROPERTY, _NOP, _END = 1, 2, 3, 4, 9
_VERSION, _COMPATIBLE_VERSION = 17, 16
_DEPTH_MAX = 64

#: What a property may be given as: one 32-bit cell, a string, several strings, raw bytes; ``b""`` for a bare name.
Value = int | str | Sequence[str] | bytes

#: The phandle of the interrupt controller, and of the 24 MHz clock behind every PrimeCell (``apb_pclk``).
INTC_PHANDLE = 1
CLOCK_PHANDLE = 2

#: Trigger types in the third cell of an interrupt (GICv3 binding).
EDGE, LEVEL = 1, 4


def cells(*values: int) -> bytes:
    """32-bit cells, each 0 ≤ value < 2³²."""
    return struct.pack(f">{len(values)}I", *values)


def u64s(*values: int) -> bytes:
    """64-bit values, two cells each: what ``reg`` holds here (two address cells, two size cells)."""
    return struct.pack(f">{len(values)}Q", *values)


@dataclass
class Node:
    """A node: its name with the unit address (``cpu@0``), properties as bytes, and children, all in order."""

    name: str
    properties: dict[str, bytes] = field(default_factory=dict)
    children: list[Node] = field(default_factory=list)

    def __init__(self, name: str, properties: Mapping[str, Value] | None = None, children: Sequence[Node] = ()) -> None:
        self.name = name
        self.properties = {}
        self.children = list(children)
        for key, value in (properties or {}).items():
            self[key] = value

    def __setitem__(self, key: str, value: Value) -> None:
        if isinstance(value, bytes):
            self.properties[key] = value
        elif isinstance(value, int):
            self.properties[key] = _CELL.pack(value)
        else:
            texts = [value] if isinstance(value, str) else value
            self.properties[key] = b"".join(text.encode() + b"\0" for text in texts)

    def __getitem__(self, key: str) -> bytes:
        return self.properties[key]

    def find(self, path: str) -> Node:
        """The node at ``path`` below this one (``cpus/cpu@0``). Raises KeyError."""
        node = self
        for name in path.strip("/").split("/"):
            found = next((child for child in node.children if child.name == name), None)
            if found is None:
                raise KeyError(path)
            node = found
        return node

    def walk(self) -> Iterator[Node]:
        """This node and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the machine has put a device: what the device needs to describe itself.

    ``base`` (GPA) and ``size`` of its window in bytes, ``spi`` its shared peripheral interrupt (0 is INTID 32).
    """

    base: int
    size: int
    spi: int

    @property
    def reg(self) -> bytes:
        """The ``reg`` property."""
        return u64s(self.base, self.size)

    def interrupts(self, trigger: int) -> bytes:
        """The ``interrupts`` property; ``trigger`` is EDGE or LEVEL."""
        return cells(0, self.spi, trigger)


def encode(root: Node, boot_cpu: int = 0) -> bytes:
    """The tree as a blob with an empty memory reservation map. ``boot_cpu`` is the boot CPU's ``reg``."""
    structure = bytearray()
    strings = bytearray()
    offsets: dict[str, int] = {}

    def put(node: Node) -> None:
        structure.extend(_CELL.pack(_BEGIN_NODE) + node.name.encode("ascii") + b"\0")
        structure.extend(bytes(-len(structure) % 4))
        for name, value in node.properties.items():
            if name not in offsets:
                offsets[name] = len(strings)
                strings.extend(name.encode("ascii") + b"\0")
            structure.extend(cells(_PROPERTY, len(value), offsets[name]) + value)
            structure.extend(bytes(-len(structure) % 4))
        for child in node.children:
            put(child)
        structure.extend(_CELL.pack(_END_NODE))

    put(root)
    structure += _CELL.pack(_END)
    reserved_at = _HEADER.size
    structure_at = reserved_at + 16  # the reservation map is its terminator alone
    strings_at = structure_at + len(structure)
    total = strings_at + len(strings)
    header = _HEADER.pack(
        _MAGIC, total, structure_at, strings_at, reserved_at, _VERSION, _COMPATIBLE_VERSION, boot_cpu,
        len(strings), len(structure),
    )  # fmt: skip
    return header + bytes(16) + bytes(structure) + bytes(strings)


def decode(blob: bytes) -> Node:
    """The tree in a blob. Raises ValueError when it is not one, or a damaged one."""
    try:
        return _decode(blob)
    except (struct.error, ValueError, IndexError) as error:
        raise ValueError(f"not a device tree, or a damaged one: {error}") from error


def _decode(blob: bytes) -> Node:
    magic, total, at, strings_at, _, version, compatible, _, strings_size, size = _HEADER.unpack_from(blob)
    if magic != _MAGIC or version < _VERSION or compatible > _VERSION:
        raise ValueError("no device tree of version 17")
    end = at + size
    strings = blob[strings_at : strings_at + strings_size]
    if total > len(blob) or end > total or len(strings) < strings_size:
        raise ValueError("it is cut short")
    root: Node | None = None
    path: list[Node] = []
    while at + 4 <= end:
        (token,) = _CELL.unpack_from(blob, at)
        at += 4
        if token == _BEGIN_NODE:
            stop = blob.index(b"\0", at, end)
            node = Node(blob[at:stop].decode("ascii"))
            at = stop + 1 + -(stop + 1) % 4
            if len(path) == _DEPTH_MAX or (not path and root is not None):
                raise ValueError("its nodes do not nest")
            if path:
                path[-1].children.append(node)
            else:
                root = node
            path.append(node)
        elif token == _END_NODE:
            path.pop()
        elif token == _PROPERTY:
            length, name_at = struct.unpack_from(">II", blob, at)
            name = strings[name_at : strings.index(b"\0", name_at)].decode("ascii")
            value = blob[at + 8 : at + 8 + length]
            at += 8 + length + -length % 4
            if at > end:
                raise ValueError(f"the property {name} is cut short")
            path[-1].properties[name] = value
        elif token == _END:
            break
        elif token != _NOP:
            raise ValueError(f"token {token}")
    if root is None or path:
        raise ValueError("its nodes do not end")
    return root
