"""What a VM starts from when it is not its kernel: another machine at one moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from avmm.attachments.base import Attachment
from avmm.board import BoardState
from avmm.bootloader.image import Images
from avmm.errors import ConfigError
from avmm.guest.console import ConsoleState
from avmm.ram import FrozenRam, LiveRam
from avmm.vcpu.state import VcpuState

VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class MachineState:
    """Everything of a machine but its memory and what its attachments hold; plain data.

    ``elapsed`` is the guest's age in ticks of the host counter, see :class:`avmm.clock.Clock`.
    """

    elapsed: int
    vcpus: tuple[VcpuState, ...]
    board: BoardState
    console: ConsoleState
    version: int = VERSION


@dataclass(slots=True)
class Origin:
    """A machine to be continued, by one VM or by several one after the other. Close it when they have started.

    ``attachments`` are not opened yet, and for one VM only. ``images``: None where they are still to be read.
    """

    state: MachineState
    ram: FrozenRam | LiveRam
    attachments: list[Attachment]
    images: Images | None = None

    def check(self, cpus: int, memory: int) -> None:
        """Raises ConfigError when it is not the state of a machine like this."""
        if self.state.version != VERSION:
            raise ConfigError(f"the state of a machine has version {self.state.version}; this avmm reads {VERSION}")
        if len(self.state.vcpus) != cpus or self.ram.size != memory:
            raise ConfigError("the state is that of a machine with other vCPUs or other memory")

    @property
    def image(self) -> FrozenRam:
        """Its memory, to be mapped. Raises ConfigError where it cannot be."""
        if not isinstance(self.ram, FrozenRam):
            raise ConfigError("this machine's memory cannot be shared")
        return self.ram

    def close(self) -> None:
        """Let go of the memory."""
        self.ram.close()
