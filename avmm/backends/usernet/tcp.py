"""One TCP connection, our half of it (RFC 9293), sans-io: segments in, segments out, ``now`` as an argument.

Nothing is ever queued that the peer's window does not allow: whoever has data asks :meth:`Connection.room` first, and
is told when there is room again. What has been sent is kept, in the very buffers it was sent from, until it is
acknowledged. Towards us the window is what the endpoint can take, so that a slow reader slows the peer and nobody else.

Losses are repaired by duplicate acknowledgements and partial ones (NewReno, RFC 6582), else by the retransmission timer
(RFC 6298); the receiver reports what it has by SACK (RFC 2018). Windows are scaled (RFC 7323); segments are as long as
a frame may be, 64 KiB, and cut by whoever needs them shorter (the MSS goes with the frame).
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import Final, Protocol

from avmm.backends.flow.endpoint import Endpoint
from avmm.backends.usernet.packet import TCP_DATA_AT, Octets, TcpHeader

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16

#: What one segment carries at most: whole MSSs of an Ethernet in what an IPv4 packet can be long.
SEGMENT_MAX: Final = 44 * 1460
_OUR_MSS: Final = 1460
_SCALE: Final = 7
#: Segments kept that came too early, and duplicate acknowledgements that mean a loss.
_EARLY_MAX: Final = 128
_DUPLICATES: Final = 3

# Seconds.
_RTO_FIRST, _RTO_MIN, _RTO_MAX = 1.0, 0.3, 60.0
_TRIES: Final = 12
_SYN_TRIES: Final = 6
_TIME_WAIT: Final = 4.0
#: How long one half may stay open for a peer when the other end is gone altogether.
_ORPHAN: Final = 30.0

_MASK: Final = 0xFFFFFFFF
_HALF: Final = 0x80000000


class State(Enum):
    """The states of RFC 9293 that differ in what is done with a segment; two flags tell the rest."""

    ASKED = auto()  # SYN received, not answered yet: accept() or refuse()
    SYN_SENT = auto()
    SYN_RECEIVED = auto()
    OPEN = auto()
    TIME_WAIT = auto()
    CLOSED = auto()


class Wire(Protocol):
    """What a connection needs of the stack around it."""

    #: Bytes that one connection may hold in each direction.
    window_limit: int

    def transmit(self, connection: Connection, buffer: bytearray, payload: int) -> None:
        """Send the frame in ``buffer``, ``payload`` bytes of which are data."""
        ...

    def acknowledge(self, connection: Connection) -> None:
        """Call :meth:`Connection.flush` once the frames at hand have been taken in."""
        ...

    def schedule(self, connection: Connection, at: float) -> None:
        """Call :meth:`Connection.expire` at ``at``, or earlier."""
        ...

    def forget(self, connection: Connection) -> None:
        """The connection is no more."""
        ...


class _Sent:
    """A segment that has not been acknowledged."""

    __slots__ = ("data", "fin", "sequence", "span")

    def __init__(self, sequence: int, data: memoryview, fin: bool) -> None:
        self.sequence = sequence
        self.data = data
        self.fin = fin
        self.span = len(data) + fin


class Connection:
    """A connection. The stack makes it, with the headers its segments begin with; ``key`` is the stack's.

    All times are seconds of any clock that only goes forward. Sequence numbers are 32 bits and wrap.
    """

    head = TCP_DATA_AT
    largest = SEGMENT_MAX

    def __init__(
        self,
        wire: Wire,
        key: bytes,
        header: TcpHeader,
        local: tuple[bytes, int],
        remote: tuple[bytes, int],
        sequence: int,
    ) -> None:
        self.key = key
        #: (address, port) on our side, and on the peer's.
        self.local = local
        self.remote = remote
        self.header = header
        self.endpoint: Endpoint | None = None
        self.state = State.CLOSED
        #: Set by whoever waits for room; :meth:`Endpoint.room` clears it.
        self.wants_room = False
        self.mss = 536
        self.due = False  # an acknowledgement, at the next flush
        self.alarm = 0.0  # when the timer is to go off; 0: never
        self.scheduled = 0.0  # when the stack will look next; 0: it will not
        self._wire = wire
        self._now = 0.0
        # Sending (SND.UNA, SND.NXT, SND.WND, SND.WL1, SND.WL2).
        self._una = self._next = sequence
        self._window = 0
        self._window_max = 0
        self._wl1 = self._wl2 = 0
        self._peer_scale = 0
        self._our_scale = 0
        self._sent: deque[_Sent] = deque()
        self._fin_sent = False
        self._orphan = False
        self._cwnd = 1 << 20
        self._ssthresh = 1 << 30
        self._duplicates = 0
        self._recover: int | None = None
        self._srtt = self._rttvar = 0.0
        self._rto = _RTO_FIRST
        self._timed: tuple[int, float] | None = None
        self._tries = 0
        # Receiving (RCV.NXT, and the right edge of the window that was offered).
        self._rcv = self._edge = 0
        self._fin_at: int | None = None
        self._fin_seen = False
        self._ended = False
        self._inbox = bytearray()
        self._total = 0  # bytes in order so far; unlike a sequence number it does not wrap
        self._early: list[tuple[int, bytes]] = []  # (where in the whole stream, bytes), in order
        self._irs = 0
        self._sack = False

    @property
    def alive(self) -> bool:
        """Whether there still is a connection."""
        return self.state is not State.CLOSED

    # Opening.

    def connect(self, endpoint: Endpoint, now: float) -> None:
        """Ask the peer for a connection."""
        self.endpoint = endpoint
        self._now = now
        self.state = State.SYN_SENT
        self._next = self._una + 1 & _MASK
        self._timed = (self._next, now)
        self._send_syn()
        self._arm()

    def asked(self, sequence: int, window: int, options: Octets) -> None:
        """The peer has asked for one: a SYN with this sequence number."""
        self.state = State.ASKED
        self._learn(sequence, window, options)

    def accept(self, endpoint: Endpoint, now: float) -> None:
        """Answer a peer that has asked, with yes."""
        if self.state is not State.ASKED:
            return
        self.endpoint = endpoint
        self._now = now
        self.state = State.SYN_RECEIVED
        self._next = self._una + 1 & _MASK
        self._timed = (self._next, now)
        self._send_syn()
        self._arm()

    def refuse(self) -> None:
        """Answer a peer that has asked, with no (or end the connection at once): RST."""
        self.abort()

    # Sending.

    def room(self) -> int:
        """Bytes that may be sent now. 0 where it would be a silly little (RFC 1122, 4.2.3.4)."""
        if self.state is not State.OPEN or self._fin_sent:
            return 0
        flight = self._next - self._una & _MASK
        room = min(self._window, self._cwnd, self._wire.window_limit) - flight
        if room <= 0 or (flight and room < min(SEGMENT_MAX, self._window_max >> 2)):
            return 0
        return room

    def send(self, buffer: bytearray, now: float) -> None:
        """Send what ``buffer`` holds behind TCP_DATA_AT bytes for the headers: 1..SEGMENT_MAX bytes, for which there is
        :meth:`room`. The buffer is ours from now on."""
        self._now = now
        length = len(buffer) - TCP_DATA_AT
        sequence = self._next
        self._sent.append(_Sent(sequence, memoryview(buffer)[TCP_DATA_AT:], False))
        self._next = sequence + length & _MASK
        if self._timed is None and self._recover is None:
            self._timed = (self._next, now)
        if not self.alarm or len(self._sent) == 1:
            self._arm()
        self._put(buffer, sequence, ACK | PSH, length)

    def shutdown(self, now: float) -> None:
        """No more will be sent: FIN."""
        self._now = now
        if self.state in (State.SYN_RECEIVED, State.OPEN) and not self._fin_sent:
            self._fin_sent = True
            self.wants_room = False
            sequence = self._next
            self._sent.append(_Sent(sequence, memoryview(b""), True))
            self._next = sequence + 1 & _MASK
            self._arm()
            self._put(bytearray(TCP_DATA_AT), sequence, ACK | FIN, 0)

    def close(self, now: float) -> None:
        """Nobody is here any more: FIN, and RST to whatever the peer still sends."""
        self.endpoint = None
        if self._inbox or self.state is not State.OPEN:
            self.abort()
            return
        self._orphan = True
        self.shutdown(now)
        if not self._sent:
            self._alarm(_ORPHAN)

    def abort(self) -> None:
        """End it at once: RST."""
        if self.state not in (State.CLOSED, State.TIME_WAIT):
            flags = RST | ACK
            if self.state is not State.SYN_SENT:
                self._put(bytearray(TCP_DATA_AT), self._next, flags, 0)
            self._finish(True)

    def want_room(self, now: float) -> None:
        """Ask for :meth:`Endpoint.room`, even if the peer forgets to say that its window has opened."""
        self._now = now
        self.wants_room = True
        if not self._sent and not self.alarm:
            self._tries = 0
            self._alarm(self._rto)

    def makes_way(self, sequence: int) -> bool:
        """Whether a SYN with this number begins a new connection where this one was (RFC 9293, 3.10.7.4)."""
        return self.state is State.TIME_WAIT and 0 < (sequence - self._rcv & _MASK) < _HALF

    def lost(self) -> None:
        """The peer is gone, and need not be told."""
        self._finish(True)

    # Receiving.

    @property
    def waiting(self) -> bytearray:
        """Bytes that the endpoint has not taken yet; say :meth:`taken` afterwards."""
        return self._inbox

    def taken(self, count: int, now: float) -> None:
        """The endpoint has taken the first ``count`` of :attr:`waiting`: opens the window."""
        self._now = now
        del self._inbox[:count]
        if not self._inbox:
            self._end_of_input()
            self._over()
        if self.state is State.OPEN and not self._fin_seen:
            edge = self._rcv + self._free() & _MASK
            gain = edge - self._edge & _MASK
            offered = self._edge - self._rcv & _MASK
            if gain < _HALF and (gain >= self._wire.window_limit >> 2 or (offered < SEGMENT_MAX and gain > offered)):
                self._send_ack()

    def segment(
        self,
        sequence: int,
        acknowledgement: int,
        flags: int,
        window: int,
        options: Octets,
        data: memoryview,
        now: float,
    ) -> None:
        """Take in a segment of the peer's (RFC 9293, 3.10.7)."""
        self._now = now
        state = self.state
        if state is State.SYN_SENT:
            self._answered(sequence, acknowledgement, flags, window, options)
            return
        if state is State.ASKED:
            if flags & RST:
                self._finish(True)
            return
        ahead = (sequence - self._rcv + _HALF & _MASK) - _HALF
        length = len(data)
        span = length + (flags & FIN)
        offered = self._edge - self._rcv & _MASK
        if flags & RST:
            # RFC 5961: only the very next number is believed.
            if ahead == 0:
                self._finish(not self._last_acknowledgement)
            elif 0 < ahead <= offered:
                self._send_ack()
            return
        if (ahead < 0 and ahead + span <= 0) or ahead > offered or (ahead == offered and length):
            # All old, or beyond the window: say where we are. (A SYN again, a probe of a window, a keep-alive.)
            if state is State.SYN_RECEIVED and flags & SYN:
                self._send_syn()
            else:
                if state is State.TIME_WAIT and span:
                    self._alarm(_TIME_WAIT)  # our last word was lost: RFC 9293, 3.10.7.4 on FIN in TIME-WAIT
                self._send_ack()
            if ahead <= offered and flags & ACK:  # which may be news even so
                self._acknowledged(sequence, acknowledgement, window, True)
            return
        if flags & SYN:
            self._send_ack()
            return
        if not flags & ACK:
            return
        if not self._acknowledged(sequence, acknowledgement, window, bool(span)):
            return
        if not span or self.state not in (State.OPEN, State.TIME_WAIT):
            return
        if self.state is State.TIME_WAIT or self._fin_seen:
            self._send_ack()
            return
        if self._orphan and length:
            self.abort()
            return
        if flags & FIN and ahead + length <= offered:
            self._fin_at = sequence + length & _MASK
        if length:
            if ahead + length > offered:
                data = data[: offered - ahead]
            if ahead > 0:
                self._keep(self._total + ahead, data)
                self._send_ack()
            else:
                self._take(data[-ahead:] if ahead else data)
                if self._early:
                    self._merge()
        if self.state is not State.OPEN:
            return
        if self._fin_at is not None:
            if self._fin_at == self._rcv:
                if self._edge == self._rcv:
                    self._edge = self._rcv + 1 & _MASK
                self._rcv = self._rcv + 1 & _MASK
                self._fin_seen = True
                self._early.clear()
                self._end_of_input()
                self._over()
            elif ahead > 0:
                self._send_ack()
        if not self.due and self.alive:
            self.due = True
            self._wire.acknowledge(self)

    def flush(self) -> None:
        """Send the acknowledgement that is due."""
        if self.due and self.state not in (State.CLOSED, State.ASKED):
            self._send_ack()
        self.due = False

    # The timer.

    def expire(self, now: float) -> None:
        """Time has passed; :attr:`alarm` says up to where."""
        self._now = now
        if not self.alarm or now < self.alarm:
            return
        self.alarm = 0.0
        if self.state is State.TIME_WAIT:
            self._finish(False)
        elif self.state in (State.SYN_SENT, State.SYN_RECEIVED):
            self._again(_SYN_TRIES, self._send_syn)
        elif self._sent:
            # Everything in flight is taken for lost; it is sent again as acknowledgements come.
            if self._tries == 0:
                self._ssthresh = max((self._next - self._una & _MASK) >> 1, 2 * SEGMENT_MAX)
            self._cwnd = SEGMENT_MAX
            self._recover = self._next
            self._duplicates = 0
            self._again(_TRIES, self._resend)
        elif self._orphan:
            self._finish(False)
        elif self.wants_room and self.state is State.OPEN:
            # A probe of the window: an old number, which must be answered (RFC 9293, 3.8.6.1). Never given up, for
            # who answers with a window of nothing is alive; who does not answer at all is not.
            self._again(_TRIES, self._probe)

    def _again(self, tries: int, what: Callable[[], None]) -> None:
        self._tries += 1
        if self._tries > tries:
            self._finish(True)
            return
        self._timed = None  # Karn
        self._alarm(min(self._rto * (1 << self._tries), _RTO_MAX))
        what()

    def _probe(self) -> None:
        self._put(bytearray(TCP_DATA_AT), self._una - 1 & _MASK, ACK, 0)

    def _alarm(self, delay: float) -> None:
        self.alarm = at = self._now + delay
        if not self.scheduled or at < self.scheduled:
            self._wire.schedule(self, at)

    def _arm(self) -> None:
        self._alarm(self._rto)

    # Segments out.

    def _put(self, buffer: bytearray, sequence: int, flags: int, payload: int, options: bytes = b"") -> None:
        """Fill in the headers and send."""
        edge = self._rcv + self._free() & _MASK
        gain = edge - self._edge & _MASK
        if gain < _HALF and gain >= _OUR_MSS:
            self._edge = edge
        window = min((self._edge - self._rcv & _MASK) >> self._our_scale, 0xFFFF)
        self.due = False
        self.header.put(buffer, sequence, self._rcv, flags, window, options)
        self._wire.transmit(self, buffer, payload)

    def _send_syn(self) -> None:
        mine = self.state is State.SYN_SENT
        options = b"\x02\x04" + _OUR_MSS.to_bytes(2, "big")
        if mine or self._our_scale:
            options += b"\x01\x03\x03" + bytes((_SCALE,))
        if mine or self._sack:
            options += b"\x01\x01\x04\x02"
        scale, self._our_scale = self._our_scale, 0  # the window of a SYN is never scaled
        flags = SYN if mine else SYN | ACK
        if not mine and self._edge == self._rcv:
            self._edge = self._rcv + min(self._free(), 0xFFFF) & _MASK
        buffer = bytearray(TCP_DATA_AT + len(options))
        window = 0xFFFF if mine else min(self._edge - self._rcv & _MASK, 0xFFFF)
        self.header.put(buffer, self._una, self._rcv, flags, window, options)
        self._wire.transmit(self, buffer, 0)
        self._our_scale = scale

    def _send_ack(self) -> None:
        options = b""
        if self._early and self._sack:
            options = self._blocks()
        self._put(bytearray(TCP_DATA_AT + len(options)), self._next, ACK, 0, options)

    def _blocks(self) -> bytes:
        """The SACK option: up to four runs of what came early."""
        runs: list[list[int]] = []
        for place, data in self._early:
            if runs and place <= runs[-1][1]:
                runs[-1][1] = max(runs[-1][1], place + len(data))
            else:
                runs.append([place, place + len(data)])
        runs = runs[:4]
        option = bytes((1, 1, 5, 2 + 8 * len(runs)))
        for run in runs:
            option += b"".join((self._irs + edge & _MASK).to_bytes(4, "big") for edge in run)
        return option

    def _resend(self) -> None:
        """Send the first segment again that is not acknowledged."""
        first = self._sent[0]
        self._timed = None
        self._put(
            bytearray(TCP_DATA_AT) + first.data,
            first.sequence,
            ACK | FIN if first.fin else ACK | PSH,
            len(first.data),
        )

    # Segments in.

    def _learn(self, sequence: int, window: int, options: Octets) -> None:
        """From a SYN of the peer's: its first number and its options (RFC 9293, 3.2)."""
        self._irs = self._rcv = self._edge = sequence + 1 & _MASK
        self._window = self._window_max = window
        self._wl1, self._wl2 = sequence, self._una
        at = 0
        while at < len(options) and options[at] != 0:
            if options[at] == 1:
                at += 1
                continue
            size = options[at + 1] if at + 1 < len(options) else 0
            if size < 2 or at + size > len(options):
                break
            kind = options[at]
            if kind == 2 and size == 4:
                self.mss = max(64, min(options[at + 2] << 8 | options[at + 3], _OUR_MSS))
            elif kind == 3 and size == 3:
                self._peer_scale = min(options[at + 2], 14)
                self._our_scale = _SCALE
            elif kind == 4 and size == 2:
                self._sack = True
            at += size

    def _answered(self, sequence: int, acknowledgement: int, flags: int, window: int, options: Octets) -> None:
        """In SYN-SENT (RFC 9293, 3.10.7.3)."""
        if flags & ACK and acknowledgement != self._next:
            if not flags & RST:  # it speaks of an older connection, which is over
                self.header.put(buffer := bytearray(TCP_DATA_AT), acknowledgement, 0, RST, 0)
                self._wire.transmit(self, buffer, 0)
            return
        if flags & RST:
            if flags & ACK:
                self._finish(True)
            return
        if not flags & SYN or not flags & ACK:
            return
        self._una = acknowledgement
        self._learn(sequence, window, options)
        self._edge = self._rcv + min(0xFFFF, self._free()) & _MASK
        self._opened()
        self._send_ack()

    def _opened(self) -> None:
        self.state = State.OPEN
        self.alarm = 0.0
        self._tries = 0
        if self._timed is not None:
            self._measure(self._now - self._timed[1])
            self._timed = None
        if self.endpoint is not None:
            self.endpoint.opened()

    def _acknowledged(self, sequence: int, acknowledgement: int, window: int, has_data: bool) -> bool:
        """The acknowledgement and window of a segment; whether the segment is good for more."""
        acked = acknowledgement - self._una & _MASK
        flight = self._next - self._una & _MASK
        if acked > flight:
            if acked < _HALF:  # of what was never sent
                if self.state is State.SYN_RECEIVED:
                    self.abort()
                else:
                    self._send_ack()
                return False
            return True  # an old one
        if self.state is State.SYN_RECEIVED:
            if not acked:
                return False
            self._una = self._una + 1 & _MASK
            acked -= 1
            self._wl1 = sequence
            self._opened()
            if not self.alive:
                return False
        window <<= self._peer_scale
        fresh = (sequence - self._wl1 & _MASK) < _HALF if sequence != self._wl1 else True
        if acked:
            self._advance(acked, acknowledgement)
        elif self._sent and not has_data and window == self._window:
            self._duplicate()
        if fresh:
            self._wl1, self._wl2 = sequence, acknowledgement
            self._window = window
            if window > self._window_max:
                self._window_max = window
            if not self._sent and self._tries:
                self._tries = 0  # an answer to a probe
        if self.wants_room and self.state is State.OPEN:
            if self.room():
                self.wants_room = False
                if self.endpoint is not None:
                    self.endpoint.room()
            elif not self._sent and not self.alarm:
                self._arm()
        self._over()
        return True

    def _advance(self, acked: int, acknowledgement: int) -> None:
        """``acked`` more numbers have been acknowledged."""
        self._una = acknowledgement
        sent = self._sent
        left = acked
        while left:
            first = sent[0]
            if first.span > left:
                first.data = first.data[left:]
                first.sequence = acknowledgement
                first.span -= left
                break
            left -= first.span
            sent.popleft()
        if self._timed is not None and (acknowledgement - self._timed[0] & _MASK) < _HALF:
            self._measure(self._now - self._timed[1])
            self._timed = None
        self._tries = 0
        self._duplicates = 0
        if self._recover is not None:
            if (acknowledgement - self._recover & _MASK) < _HALF:
                self._recover = None
                self._cwnd = max(self._cwnd, self._ssthresh)
            elif sent:
                self._resend()  # a partial acknowledgement: the next one is lost as well
                self._cwnd += acked
        elif self._cwnd < self._ssthresh:
            self._cwnd += acked
        else:
            self._cwnd += max(1, SEGMENT_MAX * acked // self._cwnd)
        if self._cwnd > 1 << 24:
            self._cwnd = 1 << 24
        if sent:
            self._arm()
        else:
            self.alarm = 0.0
            if self._orphan:
                self._alarm(_ORPHAN)

    def _duplicate(self) -> None:
        self._duplicates += 1
        # With little in flight there cannot be three (RFC 5827).
        if self._recover is None and self._duplicates >= min(_DUPLICATES, max(1, len(self._sent) - 1)):
            self._recover = self._next
            self._ssthresh = max((self._next - self._una & _MASK) >> 1, 2 * SEGMENT_MAX)
            self._cwnd = self._ssthresh
            self._resend()
            self._arm()

    def _measure(self, rtt: float) -> None:
        """RFC 6298, 2."""
        if not self._srtt:
            self._srtt, self._rttvar = rtt, rtt / 2
        else:
            self._rttvar += (abs(self._srtt - rtt) - self._rttvar) / 4
            self._srtt += (rtt - self._srtt) / 8
        self._rto = min(max(self._srtt + 4 * self._rttvar, _RTO_MIN), _RTO_MAX)

    def _take(self, data: memoryview) -> None:
        """The next bytes in order."""
        length = len(data)
        self._rcv = self._rcv + length & _MASK
        self._total += length
        if self._inbox or self.endpoint is None:
            self._inbox += data
        else:
            taken = self.endpoint.received(data)
            if taken < length:
                self._inbox += data[taken:]

    def _keep(self, place: int, data: memoryview) -> None:
        """Bytes that came too early."""
        end = place + len(data)
        held = sum(len(kept) for _, kept in self._early)  # they may overlap: a window is no bound by itself
        if (
            len(self._early) < _EARLY_MAX
            and held + len(data) <= self._wire.window_limit
            and not any(at <= place and end <= at + len(kept) for at, kept in self._early)
        ):
            insort(self._early, (place, bytes(data)))

    def _merge(self) -> None:
        """Take what came early and is next now."""
        while self._early and self.state is State.OPEN:
            place, data = self._early[0]
            if place > self._total:
                return
            del self._early[0]
            if place + len(data) > self._total:
                self._take(memoryview(data)[self._total - place :])

    def _free(self) -> int:
        return max(0, self._wire.window_limit - len(self._inbox))

    # Closing.

    def _end_of_input(self) -> None:
        if self._fin_seen and not self._inbox and not self._ended:
            self._ended = True
            if self.endpoint is not None:
                self.endpoint.ended()

    @property
    def _last_acknowledgement(self) -> bool:
        """Whether nothing is missing but the acknowledgement of our FIN (LAST-ACK)."""
        return self._ended and len(self._sent) == 1 and self._sent[0].fin

    def _over(self) -> None:
        """Both halves closed and ours acknowledged?"""
        if self._fin_sent and not self._sent and self._fin_seen and self.state is State.OPEN:
            if not self._ended:
                return
            self.state = State.TIME_WAIT
            endpoint, self.endpoint = self.endpoint, None
            self._alarm(_TIME_WAIT)
            if endpoint is not None:
                endpoint.closed(False)

    def _finish(self, reset: bool) -> None:
        self.state = State.CLOSED
        self.alarm = 0.0
        self._sent.clear()
        self._early.clear()
        self._wire.forget(self)
        endpoint, self.endpoint = self.endpoint, None
        if endpoint is not None:
            endpoint.closed(reset)
