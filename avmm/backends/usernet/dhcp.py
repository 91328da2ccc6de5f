"""A DHCP server (RFC 2131), sans-io: a request in, an answer out. A MAC keeps its address."""

from __future__ import annotations

import struct
from typing import Final

from avmm.backends.usernet.packet import NOBODY
from avmm.backends.usernet.plan import Plan

SERVER_PORT, CLIENT_PORT = 67, 68

# op, htype, hlen, hops, xid, secs, flags, ciaddr, yiaddr, siaddr, giaddr, chaddr, sname+file, cookie.
_MESSAGE: Final = struct.Struct("!BBBBIHH4s4s4s4s16s192s4s")
_COOKIE: Final = b"\x63\x82\x53\x63"
_REQUEST, _REPLY = 1, 2
_DISCOVER, _OFFER, _ASK, _DECLINE, _ACK, _NAK, _RELEASE, _INFORM = 1, 2, 3, 4, 5, 6, 7, 8
_LEASE: Final = 24 * 3600
# Option codes (RFC 2132).
_MASK, _ROUTER, _DNS, _HOSTNAME, _DOMAIN, _MTU, _ADDRESS, _TIME, _TYPE, _SERVER, _END = (
    1, 3, 6, 12, 15, 26, 50, 51, 53, 54, 255,
)  # fmt: skip


def options(data: bytes) -> dict[int, bytes]:
    """The options of a message, first of each code; what is cut off is left out."""
    found: dict[int, bytes] = {}
    at = 0
    while at < len(data) and data[at] != _END:
        if data[at] == 0:
            at += 1
            continue
        size = data[at + 1] if at + 1 < len(data) else 256
        if at + 2 + size > len(data):
            break
        found.setdefault(data[at], data[at + 2 : at + 2 + size])
        at += 2 + size
    return found


class Leases:
    """Who has which address: ``first`` for the first MAC that asks, then the next ones."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._by_mac: dict[bytes, bytes] = {}

    def of(self, mac: bytes) -> bytes | None:
        """The address of ``mac``, which is given one if there is one left."""
        if mac not in self._by_mac:
            number = int.from_bytes(self._plan.guest, "big") + len(self._by_mac)
            address = number.to_bytes(4, "big")
            if not self._plan.is_guest(address):
                return None
            self._by_mac[mac] = address
        return self._by_mac[mac]

    def answer(self, message: bytes, mac: bytes) -> tuple[bytes, bytes] | None:
        """(answer, the address it offers or zeros) for the message a client has sent from ``mac``; None for none."""
        if len(message) < _MESSAGE.size:
            return None
        op, htype, hlen, _, xid, _, flags, ciaddr, _, _, giaddr, chaddr, _, cookie = _MESSAGE.unpack_from(message)
        if (op, htype, hlen, cookie) != (_REQUEST, 1, 6, _COOKIE) or chaddr[:6] != mac:
            return None
        asked = options(message[_MESSAGE.size :])
        kind = asked.get(_TYPE, b"")[:1]
        if kind not in (bytes((_DISCOVER,)), bytes((_ASK,)), bytes((_INFORM,))):
            return None
        plan = self._plan
        if asked.get(_SERVER, plan.gateway) != plan.gateway:
            return None  # the client has taken another server's offer
        address = self.of(mac)
        if address is None:
            return None
        answer = _ACK
        if kind[0] == _DISCOVER:
            answer = _OFFER
        elif kind[0] == _ASK and (asked.get(_ADDRESS, ciaddr) or ciaddr) not in (address, NOBODY):
            answer = _NAK
        reply = bytes((_TYPE, 1, answer, _SERVER, 4)) + plan.gateway
        if answer == _NAK:
            address = NOBODY
        else:
            if kind[0] != _INFORM:
                reply += bytes((_TIME, 4)) + _LEASE.to_bytes(4, "big")
            else:
                address = NOBODY
            reply += bytes((_MASK, 4)) + plan.mask
            if not plan.isolated:
                reply += bytes((_ROUTER, 4)) + plan.gateway
            reply += bytes((_DNS, 4)) + plan.dns
            if plan.hostname:
                name = plan.hostname.encode()[:63]
                reply += bytes((_HOSTNAME, len(name))) + name
        head = _MESSAGE.pack(
            _REPLY, 1, 6, 0, xid, 0, flags, ciaddr if kind[0] == _INFORM else NOBODY, address, plan.gateway, giaddr,
            chaddr, b"", _COOKIE,
        )  # fmt: skip
        return head + reply + bytes((_END,)) + bytes(16), address
