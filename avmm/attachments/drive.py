"""A disk: a file on the host, a virtio block device in the guest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avmm.attachments.base import Attachment
from avmm.config import DriveConfig
from avmm.devices.virtio.blk import Blk
from avmm.devices.virtio.transport import VirtioDevice
from avmm.errors import HostError, ImageError

if TYPE_CHECKING:  # see base.py
    from avmm.backends.drive import Drive, DriveMoment, StoredDrive
    from avmm.snapfile import Reader, Writer


class DriveAttachment(Attachment):
    """The disk of ``config``; ``name`` is what messages call it."""

    section = "drives"

    def __init__(self, config: DriveConfig, name: str) -> None:
        self._config = config
        self._name = name
        self.drive: Drive | None = None
        self._past: DriveMoment | StoredDrive | None = None  # another machine's disk, to go on from
        self._wanted: tuple[int, int] | None = None  # the file's fingerprint

    def open(self) -> None:
        """See :class:`Attachment`. Raises ImageError."""
        try:
            self.drive = self._open(self._config)
        except BaseException:
            if self._past is not None:
                self._past.close()
            raise

    def _open(self, config: DriveConfig) -> Drive:
        from avmm.backends.drive import DriveMoment, open_drive

        if self._wanted is not None and self._wanted != _fingerprint(config.path):
            raise ImageError(f"the disk {config.path} has changed since the snapshot was made: put the old one back")
        if isinstance(self._past, DriveMoment):
            return self._past.open(config.path, self._name, read_only=config.read_only)
        if self._past is not None:
            return self._past.open(config.path, config.format, self._name)
        return open_drive(config.path, config.format, self._name, read_only=config.read_only, snapshot=config.snapshot)

    def fork(self) -> DriveAttachment:
        """See :class:`Attachment`: as this one is now; what is written to it is forgotten when its machine ends."""
        assert self.drive is not None
        twin = DriveAttachment(self._config, self._name)
        twin._past = self.drive.moment()
        return twin

    def store(self, writer: Writer, name: str) -> Any:
        """See :class:`Attachment`: what there is beyond a file that nobody writes to, else all."""
        config = self._config
        if config.read_only:
            return {"file": _fingerprint(config.path)}
        self.open()
        assert self.drive is not None
        record = writer.reserve(name, self.drive.size)
        spans: list[tuple[int, int]] = []
        try:
            for offset, left, data in self.drive.contents(whole=not config.snapshot):
                writer.write(record, offset, data)
                if not spans or sum(spans[-1]) <= offset:
                    spans.append((offset, left))
        except OSError as error:
            raise HostError(f"{self._name} cannot be read for the snapshot: {error.strerror}") from error
        stored: dict[str, Any] = {"record": name, "spans": spans}
        return {**stored, "file": _fingerprint(config.path)} if config.snapshot else stored

    def load(self, reader: Reader, stored: Any) -> None:
        """See :class:`Attachment`."""
        from avmm.backends.drive import StoredDrive

        self._wanted = stored.get("file")
        if "record" in stored:
            record = reader.record(stored["record"])
            fd = os.dup(reader.fd)
            self._past = StoredDrive(fd, record.offset, record.length, stored["spans"], over=self._wanted is not None)

    def device(self) -> VirtioDevice:
        """See :class:`Attachment`."""
        assert self.drive is not None
        return Blk(self.drive, self._name)

    def close(self) -> None:
        """See :class:`Attachment`. Raises ImageError when the host could not store what the guest wrote."""
        opened = self.drive or self._past
        if opened is None:
            return
        try:
            opened.close()
        except OSError as error:
            raise ImageError(f"{self._name}: the guest's last writes are lost: {error.strerror}") from error

    def describe(self) -> list[Any]:
        """See :class:`Attachment`."""
        config, drive = self._config, self.drive
        assert drive is not None
        return [
            {
                "path": os.fspath(config.path),
                "format": config.format or ("qcow2" if config.path.suffix == ".qcow2" else "raw"),
                "bytes": drive.size,
                "read_only": config.read_only,
                "snapshot": config.snapshot,
            }
        ]


def _fingerprint(path: Path) -> tuple[int, int]:
    """What tells whether a file has changed: its length, and when it was last written to. Raises ImageError."""
    try:
        found = path.stat()
    except OSError as error:
        raise ImageError(f"cannot open the disk {path}: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns
