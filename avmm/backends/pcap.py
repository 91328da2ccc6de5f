"""A recording of frames that tshark and Wireshark read: pcap with nanoseconds (draft-ietf-opsawg-pcap)."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Final

from avmm.backends.offload import summed
from avmm.errors import ConfigError
from avmm.link import Frame
from avmm.log import log

_SNAP: Final = 1 << 18
_ETHERNET: Final = 1
_FILE_HEADER: Final = struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, _SNAP, _ETHERNET)
_RECORD: Final = struct.Struct("<IIII")  # seconds, nanoseconds, bytes kept, bytes there were


class Pcap:
    """The file ``path``, made anew; what has been recorded is in it, whatever becomes of us. Raises ConfigError.

    A segment of 64 KiB is one frame, as where the kernel of a host records what its card will cut up.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            os.write(self._fd, _FILE_HEADER)
        except OSError as error:
            self.close()
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error

    def record(self, frame: Frame) -> None:
        """Add ``frame``, now. A full disk ends the recording, not the network."""
        if self._fd < 0:
            return
        data = summed(frame)
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        record = _RECORD.pack(seconds, nanoseconds, len(data), len(data))
        try:
            written = os.writev(self._fd, (record, data))
        except OSError as error:
            log.warning("pcap.failed", path=os.fspath(self._path), error=error.strerror)
            self.close()
            return
        if written < len(record) + len(data):
            log.warning("pcap.failed", path=os.fspath(self._path), error="no room for a whole frame")
            self.close()

    def close(self) -> None:
        """No more is recorded."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
