"""The agent in the guest: a virtio console port of its own, and the host's side of what is spoken over it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from avmm.attachments.base import Attachment
from avmm.backends.port import Port
from avmm.devices.virtio.console import Console
from avmm.devices.virtio.transport import VirtioDevice
from avmm.guest.agent import PORT, Agent

if TYPE_CHECKING:  # see base.py
    from avmm.snapfile import Reader


class AgentAttachment(Attachment):
    """A console with the one port the agent looks for."""

    def __init__(self) -> None:
        self._port = Port(PORT, terminal=False)
        self.agent = Agent(self._port)

    def device(self) -> VirtioDevice:
        """See :class:`Attachment`."""
        self._port.guest_opened(False)
        self.agent.reset()
        console = Console([self._port])
        console.name = "agent"
        return console

    def fork(self) -> AgentAttachment:
        """See :class:`Attachment`: the twin's agent goes on with the commands it runs, and nobody hears of them."""
        return AgentAttachment()

    def load(self, reader: Reader, stored: Any) -> None:
        """See :class:`Attachment`."""
        self.agent.renew = True

    async def run(self) -> None:
        """See :class:`Attachment`."""
        await self.agent.run()

    def gone(self) -> None:
        """See :class:`Attachment`."""
        self._port.close()
