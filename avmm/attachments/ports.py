"""The ports of a virtio console: terminals and byte channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avmm.attachments.base import Attachment
from avmm.backends.port import Port
from avmm.devices.virtio.console import Console
from avmm.devices.virtio.transport import VirtioDevice


class PortsAttachment(Attachment):
    """One console with a port for each of ``names``; one whose name begins with "hvc" is a terminal."""

    section = "ports"

    def __init__(self, names: Sequence[str]) -> None:
        self.ports = {name: Port(name, name.startswith("hvc")) for name in names}
        self._console: Console | None = None

    def device(self) -> VirtioDevice:
        """See :class:`Attachment`."""
        for port in self.ports.values():
            port.guest_opened(False)
        self._console = Console(list(self.ports.values()))
        return self._console

    def resize(self, port: str, columns: int, rows: int) -> None:
        """Tell the guest the size of the terminal at this port."""
        if self._console is not None:
            self._console.resize(list(self.ports).index(port), columns, rows)

    def fork(self) -> PortsAttachment:
        """See :class:`Attachment`: what either side has not read yet stays behind."""
        return PortsAttachment(list(self.ports))

    def gone(self) -> None:
        """See :class:`Attachment`."""
        for port in self.ports.values():
            port.close()

    def describe(self) -> list[Any]:
        """See :class:`Attachment`."""
        return list(self.ports)
