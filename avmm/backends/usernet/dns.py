"""Answers to DNS queries for names of our own (RFC 1035), sans-io. Everything else is somebody else's to answer."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from avmm.backends.usernet.packet import address

PORT: Final = 53

_HEADER: Final = struct.Struct("!HHHHHH")  # id, flags, questions, answers, authorities, additional
_RESPONSE, _AUTHORITATIVE, _RECURSION_AVAILABLE = 0x8000, 0x0400, 0x0080
_RECURSION_DESIRED: Final = 0x0100
_OPCODE: Final = 0x7800
_REFUSED, _SERVFAIL = 5, 2
_A, _ANY, _IN = 1, 255, 1
_TTL: Final = 10


def question(query: bytes) -> tuple[str, int, int] | None:
    """(name in lower case, type, where the question ends) of a standard query with one question; None for others."""
    if len(query) < _HEADER.size:
        return None
    _, flags, questions, answers, _, _ = _HEADER.unpack_from(query)
    if flags & (_RESPONSE | _OPCODE) or questions != 1 or answers:
        return None
    labels = []
    at = _HEADER.size
    while at < len(query) and query[at]:
        size = query[at]
        if size > 63 or at + 1 + size > len(query) or at - _HEADER.size + size > 254:
            return None
        labels.append(query[at + 1 : at + 1 + size].decode("ascii", "replace"))
        at += 1 + size
    if at + 5 > len(query):
        return None
    kind, group = struct.unpack_from("!HH", query, at + 1)
    if group != _IN:
        return None
    return ".".join(labels).lower(), kind, at + 5


def answer(query: bytes, names: Mapping[str, str]) -> bytes | None:
    """The answer to ``query`` when ``names`` (name → address) has the name it asks for, else None."""
    asked = question(query)
    if asked is None:
        return None
    where, kind, end = asked
    value = names.get(where)
    if value is None:
        return None
    records = b""
    if kind in (_A, _ANY):
        records = b"\xc0\x0c" + struct.pack("!HHIH", _A, _IN, _TTL, 4) + address(value)
    return _reply(query, end, _AUTHORITATIVE, 1 if records else 0) + records


def refusal(query: bytes) -> bytes | None:
    """The answer that says that nobody will say: REFUSED."""
    asked = question(query)
    return None if asked is None else _reply(query, asked[2], _REFUSED, 0)


def _reply(query: bytes, end: int, flags: int, records: int) -> bytes:
    ident, asked, *_ = _HEADER.unpack_from(query)
    flags |= _RESPONSE | _RECURSION_AVAILABLE | asked & _RECURSION_DESIRED
    return _HEADER.pack(ident, flags, 1, records, 0, 0) + query[_HEADER.size : end]


class Names(dict[str, str]):
    """Names of one's own: ``names["api.test"] = "10.0.2.100"``. Case does not matter. Raises ValueError for others."""

    def __setitem__(self, name: str, value: str) -> None:
        try:
            address(value)
        except OSError:
            raise ValueError(f"{value!r} is not an IPv4 address") from None
        super().__setitem__(name.lower().rstrip("."), value)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name.lower().rstrip("."))
