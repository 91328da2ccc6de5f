"""A disk: a file on the host, a virtio block device in the guest."""

from __future__ import annotations

import os
from typing import Any

from avmm.attachments.base import Attachment
from avmm.backends.drive import Drive, DriveMoment, open_drive
from avmm.config import DriveConfig
from avmm.devices.virtio.blk import Blk
from avmm.devices.virtio.transport import VirtioDevice
from avmm.errors import ImageError


class DriveAttachment(Attachment):
    """The disk of ``config``; ``name`` is what messages call it."""

    section = "drives"

    def __init__(self, config: DriveConfig, name: str) -> None:
        self._config = config
        self._name = name
        self.drive: Drive | None = None
        self._moment: DriveMoment | None = None  # of another machine's disk, to go on from

    def open(self) -> None:
        """See :class:`Attachment`. Raises ImageError."""
        config = self._config
        if self._moment is not None:
            self.drive = self._moment.open(config.path, self._name, read_only=config.read_only)
            return
        self.drive = open_drive(
            config.path, config.format, self._name, read_only=config.read_only, snapshot=config.snapshot
        )

    def fork(self) -> DriveAttachment:
        """See :class:`Attachment`: as this one is now; what is written to it is forgotten when its machine ends."""
        assert self.drive is not None
        twin = DriveAttachment(self._config, self._name)
        twin._moment = self.drive.moment()
        return twin

    def device(self) -> VirtioDevice:
        """See :class:`Attachment`."""
        assert self.drive is not None
        return Blk(self.drive, self._name)

    def close(self) -> None:
        """See :class:`Attachment`. Raises ImageError when the host could not store what the guest wrote."""
        opened = self.drive or self._moment
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
