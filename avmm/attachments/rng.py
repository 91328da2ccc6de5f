"""The host's entropy, which every VM gets."""

from __future__ import annotations

import os

from avmm.attachments.base import Attachment
from avmm.devices.virtio.rng import Rng
from avmm.devices.virtio.transport import VirtioDevice


class RngAttachment(Attachment):
    """``os.urandom`` behind a virtio entropy source."""

    def device(self) -> VirtioDevice:
        """See :class:`Attachment`."""
        return Rng(os.urandom)

    def fork(self) -> RngAttachment:
        """See :class:`Attachment`: fresh entropy."""
        return RngAttachment()
