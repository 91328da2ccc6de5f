"""vsock: sockets between guest and host, a virtio device in the guest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final

from avmm.attachments.base import Attachment
from avmm.config import VsockConfig
from avmm.devices.virtio.transport import VirtioDevice
from avmm.devices.virtio.vsock import Vsock

#: The guest's address: each VM has a host of its own to talk to, so that one will do for all.
GUEST_CID: Final = 3


class VsockAttachment(Attachment):
    """A vsock device; ``sockets`` are the Unix sockets that the guest can reach."""

    section = "vsock"

    def __init__(self, sockets: Sequence[VsockConfig]) -> None:
        from avmm.backends.vsock.host import VsockHost  # see base.py

        self._sockets = sockets
        self.host = VsockHost(GUEST_CID, {each.port: os.fspath(each.path) for each in sockets})

    def device(self) -> VirtioDevice:
        """See :class:`Attachment`."""
        return Vsock(self.host.core)

    async def run(self) -> None:
        """See :class:`Attachment`."""
        await self.host.run()

    def gone(self) -> None:
        """See :class:`Attachment`."""
        self.host.gone()

    def fork(self) -> VsockAttachment:
        """See :class:`Attachment`: the same sockets and handlers; the twin's guest hears that its connections are
        gone."""
        twin = VsockAttachment(self._sockets)
        twin.host.listen_as(self.host)
        return twin

    def describe(self) -> list[Any]:
        """See :class:`Attachment`."""
        return [{"port": each.port, "socket": os.fspath(each.path)} for each in self._sockets]
