"""The balloon, which every VM gets: memory that the guest frees goes back to the host by itself."""

from __future__ import annotations

from avmm.attachments.base import Attachment
from avmm.backends.balloon import Balloon
from avmm.devices.virtio.balloon import Balloon as BalloonDevice
from avmm.devices.virtio.transport import VirtioDevice


class BalloonAttachment(Attachment):
    """A balloon for a guest with ``memory`` bytes."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self.balloon = Balloon(memory)

    def device(self) -> VirtioDevice:
        """See :class:`Attachment`."""
        return BalloonDevice(self.balloon)

    def fork(self) -> BalloonAttachment:
        """See :class:`Attachment`."""
        return BalloonAttachment(self._memory)
