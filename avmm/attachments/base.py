"""What a VM can be given besides processors and memory: one host side, one virtio device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from avmm.devices.virtio.transport import VirtioDevice
from avmm.errors import ConfigError

if TYPE_CHECKING:  # what takes time to load is loaded by who is given to a VM, when made or opened
    from avmm.snapfile import Reader, Writer


class Attachment:
    """The life of one, in order: ``open``; for each power-on or reset of the machine ``device`` and ``run``; ``gone``;
    ``close``. Subclasses do what they need of it; all but ``open`` and ``close`` happens on the event loop.
    """

    #: Under which name ``--dry-run`` shows what :meth:`describe` gives; empty for what goes without saying.
    section = ""

    def open(self) -> None:
        """Open the host's side. Blocks; on a thread. Raises HostError, and is closed then."""

    def device(self) -> VirtioDevice:
        """A device fresh from power-on, for a new board; the one before is gone."""
        raise NotImplementedError(f"a {type(self).__name__} says what its device is")

    async def run(self) -> None:
        """The host side's work while the machine is on, beside the device's; cancelled at its reset or end."""

    def gone(self) -> None:
        """The machine has ended: let nobody wait for it any more."""

    def close(self) -> None:
        """Store what is to be stored, and let go of everything; also where it was never opened. Blocks; on a thread.
        Raises HostError."""

    def fork(self) -> Attachment:
        """One for a twin of the machine, which stands still meanwhile; its device is to go on from this one's state.
        Opened or closed by the caller. Raises ConfigError where there can be none."""
        raise ConfigError(f"a VM with {self.section or type(self).__name__} cannot be forked")

    def store(self, writer: Writer, name: str) -> Any:
        """What a snapshot needs of one that :meth:`fork` gave: plain data; what is large goes into a record of
        ``writer`` named ``name``. May open it; closed by the caller. Blocks. Raises HostError."""
        return None

    def load(self, reader: Reader, stored: Any) -> None:
        """Before it is opened: go on from what :meth:`store` gave. Raises ImageError."""

    def describe(self) -> list[Any]:
        """Between ``open`` and ``close``: plain data, to be shown as part of the list named :attr:`section`."""
        return []
