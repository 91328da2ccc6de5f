"""The split virtqueue, device side (virtio 1.2, 2.7): no I/O, no waiting, no interrupt.

A driver puts the heads of descriptor chains into the available ring, :meth:`Virtqueue.pop` takes them, and
:meth:`Virtqueue.push` gives them back through the used ring. Everything in guest memory is read once and believed in
nothing: a rule broken is a GuestError, every loop is bounded, every address goes through :class:`GuestMemory`.

    while (chain := queue.pop()) is not None:
        request = chain.read(16)
        if queue.push(chain, chain.write(b"answer")):
            ...  # raise the interrupt
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from avmm.errors import GuestError
from avmm.memory import GuestMemory, split

#: Descriptors in one chain, at most, whatever the queue's size (2.7.5.3.1 allows no more than the largest queue): a
#: megabyte in pages of 4 KiB, which is what Linux's file systems ask for at a time, and the headers.
CHAIN_MAX: Final = 512

_DESC: Final = struct.Struct("<QIHH")  # address, length, flags, next (2.7.5)
_USED_ELEM: Final = struct.Struct("<II")  # id, length (2.7.8)
_NEXT: Final = 1
_WRITE: Final = 2
_INDIRECT: Final = 4
_AVAIL_NO_INTERRUPT: Final = 1
_USED_NO_NOTIFY: Final = 1


class Chain:
    """One request: the buffers the driver gave, as views of guest memory, what the device reads first.

    ``readable`` and ``writable`` are lists of views in order. How a request is cut into descriptors has no meaning
    (2.7.4): use :meth:`read` and :meth:`write`, or :func:`avmm.memory.split`.
    """

    __slots__ = ("_spans", "head", "queue", "readable", "writable")

    def __init__(
        self,
        queue: Virtqueue,
        head: int,
        readable: list[memoryview],
        writable: list[memoryview],
        spans: list[tuple[int, int]],
    ) -> None:
        self.queue = queue
        self.head = head
        self.readable = readable
        self.writable = writable
        self._spans = spans  # (GPA, length) of what is writable

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where what the device may write is: (GPA, length) of each buffer."""
        return list(self._spans)

    @property
    def read_length(self) -> int:
        """Bytes the device may read."""
        return sum(map(len, self.readable))

    @property
    def write_length(self) -> int:
        """Bytes the device may write."""
        return sum(map(len, self.writable))

    def read(self, limit: int) -> bytes:
        """The first ``limit`` readable bytes, or all when there are fewer."""
        first = self.readable[0] if self.readable else b""
        if len(first) >= limit:
            return bytes(first[:limit])
        return b"".join(split(self.readable, min(limit, self.read_length))[0])

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Scatter ``data`` over the writable buffers from their beginning; how many bytes there was room for."""
        at = 0
        for view in self.writable:
            piece = data[at : at + len(view)]
            view[: len(piece)] = piece
            at += len(piece)
            if at == len(data):
                break
        return at

    def release(self) -> None:
        """Let go of guest memory; the chain is of no more use."""
        self.readable, self.writable = [], []


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the driver has put a queue: ``size`` entries (a power of two), and the GPAs of its three parts."""

    size: int
    desc: int
    avail: int
    used: int


class Virtqueue:
    """A queue that the driver has made ready. Used under ``lock``, which :meth:`pop` and :meth:`push` take.

    ``event_idx`` says that VIRTIO_F_EVENT_IDX was negotiated, ``indirect`` that VIRTIO_F_INDIRECT_DESC was.
    Raises GuestError for a layout that cannot be.
    """

    def __init__(
        self, lock: threading.RLock, memory: GuestMemory, layout: Layout, *, event_idx: bool, indirect: bool
    ) -> None:
        size = layout.size
        if not size or size & (size - 1) or size > 0x8000:
            raise GuestError(f"virtqueue size {size} is not a power of two")
        if layout.desc % 16 or layout.avail % 2 or layout.used % 4:
            raise GuestError("a part of a virtqueue is not aligned")
        self._lock: Final = lock
        self._barrier: Final = threading.Lock()
        self._memory: Final = memory
        self.layout: Final = layout
        self._size: Final = size
        self._event_idx: Final = event_idx
        self._indirect: Final = indirect
        self._desc = memory.view(layout.desc, 16 * size)
        # Rings as 16-bit words: an aligned word is read and written in one piece, as 2.7.6 and 2.7.8 ask of an index.
        self._avail = memory.view(layout.avail, 6 + 2 * size).cast("H")
        self._used = memory.view(layout.used, 4 + 8 * size)
        self._used_words = memory.view(layout.used, 6 + 8 * size).cast("H")
        self._last_avail = 0  # of what pop() has taken
        self._seen = 0  # avail.idx when last looked at
        self._used_idx = 0
        self.alive = True
        #: Chains taken and not given back.
        self.in_flight = 0

    # The two positions are all the state there is beside guest memory.

    @property
    def position(self) -> tuple[int, int]:
        """(next available entry, next used entry), each modulo 65536: the state for a snapshot."""
        return self._last_avail, self._used_idx

    @position.setter
    def position(self, value: tuple[int, int]) -> None:
        self._last_avail, self._used_idx = value
        self._seen = self._last_avail

    def close(self) -> None:
        """Let go of guest memory. Chains in flight are dropped when they are pushed."""
        with self._lock:
            if self.alive:
                self.alive = False
                for view in (self._desc, self._avail, self._used, self._used_words):
                    view.release()

    def pop(self) -> Chain | None:
        """The next chain, or None when the driver has offered no more. Raises GuestError."""
        with self._lock:
            if not self.alive or not self._more():
                return None
            entry = self._avail[2 + (self._last_avail & self._size - 1)]
            chain = self._chain(entry)
            self._last_avail = self._last_avail + 1 & 0xFFFF
            self.in_flight += 1
            return chain

    def push(self, chain: Chain, written: int) -> bool:
        """Give ``chain`` back, ``written`` bytes of it written; whether the driver wants an interrupt for it."""
        return self.push_all(((chain, written),))

    def push_all(self, done: Sequence[tuple[Chain, int]]) -> bool:
        """Give chains back, each with how many bytes of it were written: the driver sees all of them at once, or none.
        Whether it wants an interrupt for them."""
        with self._lock:
            self.in_flight -= len(done)
            for chain, written in done:
                spans, chain._spans = chain._spans, []
                chain.release()
                if written:
                    for gpa, length in spans:
                        self._memory.wrote(gpa, length)
            if not self.alive:
                return False
            old = new = self._used_idx
            for chain, written in done:
                _USED_ELEM.pack_into(self._used, 4 + 8 * (new & self._size - 1), chain.head, written)
                new = new + 1 & 0xFFFF
            self._used_idx = new
            self._fence()
            self._used_words[1] = new
            self._fence()
            if self._event_idx:
                # Has the index just gone past the entry the driver waits for? (2.7.10)
                event = self._avail[2 + self._size]
                return new - event - 1 & 0xFFFF < (new - old & 0xFFFF)
            return not self._avail[0] & _AVAIL_NO_INTERRUPT

    def unpop(self, chains: Sequence[Chain]) -> None:
        """Put the last chains that :meth:`pop` gave back where they were, as if it had not."""
        with self._lock:
            self.in_flight -= len(chains)
            for chain in chains:
                chain.release()
            self._last_avail = self._last_avail - len(chains) & 0xFFFF

    @property
    def offered(self) -> int:
        """How many chains the driver has offered since the beginning, modulo 65536."""
        with self._lock:
            return self._avail[1] if self.alive else self._seen

    def ask_for_more(self) -> bool:
        """Ask the driver to notify us of a chain beyond those there are now; False when more have just come."""
        with self._lock:
            if not self.alive:
                return True
            seen = self._avail[1]
            if self._event_idx:
                self._used_words[2 + 4 * self._size] = seen
            else:
                self._used_words[0] = 0
            self._fence()
            return self._avail[1] == seen

    def drop(self, chain: Chain) -> None:
        """Never give ``chain`` back."""
        with self._lock:
            self.in_flight -= 1
            chain.release()

    def want_notifications(self, wanted: bool) -> None:
        """Ask the driver to notify us of the next chain, or say that we look by ourselves (2.7.10).

        After asking, look once more with :meth:`has_more`: a chain may have come before the driver saw it.
        """
        with self._lock:
            if not self.alive:
                return
            if not self._event_idx:
                self._used_words[0] = 0 if wanted else _USED_NO_NOTIFY
            elif wanted:
                self._used_words[2 + 4 * self._size] = self._last_avail
            self._fence()

    def has_more(self) -> bool:
        """Whether :meth:`pop` would give a chain, or raise."""
        with self._lock:
            return self.alive and self._more()

    def _more(self) -> bool:
        if self._last_avail == self._seen:
            self._seen = self._avail[1]
            if self._last_avail == self._seen:
                return False
            if self._seen - self._last_avail & 0xFFFF > self._size:
                self._seen = self._last_avail
                raise GuestError("the available index of a virtqueue has jumped")
            self._fence()
        return True

    def _fence(self) -> None:
        """Order what is before against what is after, as the vCPUs see it, on every host.

        Releasing a lock and then taking one is a full barrier where a vCPU's stores and ours may overtake each other
        (arm64); where only a store and a later load may (x86-64), any locked instruction is. A lock of the queue's own:
        taking the VM's, which whoever is here holds, once more is no barrier.
        """
        with self._barrier:
            pass
        with self._barrier:
            pass

    def _chain(self, head: int) -> Chain:
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        table, size = self._desc, self._size
        index = head
        unpack = _DESC.unpack_from
        inside = False  # an indirect table
        for _ in range(CHAIN_MAX + 1):
            if index >= size:
                raise GuestError(f"descriptor {index} lies outside a table of {size}")
            address, length, flags, following = unpack(table, 16 * index)
            if flags & _INDIRECT:
                if inside or flags & _NEXT or not self._indirect or not length or length % 16:
                    raise GuestError("an indirect descriptor where none can be")
                table, size, index, inside = self._memory.view(address, length), length // 16, 0, True
                continue
            spans = readable
            if flags & _WRITE:
                spans = writable
            elif writable:
                raise GuestError("a readable descriptor follows a writable one")
            if spans and sum(spans[-1]) == address:
                # A page cache's pages often lie side by side: what is one buffer costs one view and one iovec.
                spans[-1] = (spans[-1][0], spans[-1][1] + length)
            else:
                spans.append((address, length))
            if not flags & _NEXT:
                view = self._memory.view
                return Chain(
                    self, head, [view(*span) for span in readable], [view(*span) for span in writable], writable
                )
            index = following
        raise GuestError(f"a descriptor chain is longer than {CHAIN_MAX}")
