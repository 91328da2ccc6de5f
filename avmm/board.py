"""The board: which devices a machine has and where they are. A list; each device knows itself."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from avmm.bootloader import machine
from avmm.bus import Bus
from avmm.devices.gicv3 import Gicv3
from avmm.devices.gicv3.gic import GicState
from avmm.devices.pl011 import Batch, Pl011, Pl011State, SerialBackend
from avmm.devices.pl031 import Pl031, Pl031State
from avmm.devices.virtio.transport import VIRTIO_MMIO_SIZE, EmptySlots, VirtioDevice, VirtioMmio, VirtioState
from avmm.devices.vmgenid import VmGenId
from avmm.errors import ConfigError, GuestError
from avmm.fdt import Node
from avmm.irq import IrqChip
from avmm.memory import GRANULE, GuestMemory, Region


def id_page() -> Region:
    """The memory that the VM generation ID lies in: RAM in no memory node."""
    return Region(machine.VMGENID.base, mmap.mmap(-1, GRANULE))


@dataclass(frozen=True, slots=True)
class BoardState:
    """Every device's state; ``virtio`` in the order of the slots, each with its device's name."""

    gic: GicState
    uart: Pl011State
    rtc: Pl031State
    virtio: tuple[tuple[str, VirtioState], ...]


class Board:
    """Devices fresh from reset, on a bus, under ``lock`` (the VM's). A machine that resets gets a new one.

    ``virtio`` are the devices in the virtio slots from the first on, their queues in ``memory``;
    ``batch`` takes the UART's output, see :class:`Pl011`; ``irqchip`` is the hypervisor's, fresh from reset, else it is
    our own.
    """

    def __init__(
        self,
        lock: threading.RLock,
        cpus: int,
        serial: SerialBackend,
        memory: GuestMemory,
        virtio: Sequence[VirtioDevice],
        batch: Batch | None = None,
        irqchip: IrqChip | None = None,
    ) -> None:
        self.bus = Bus()
        self.irqchip = irqchip or self._gicv3(lock, cpus)
        self.uart = Pl011(lock, self.irqchip.spi(machine.PL011.spi), serial, batch)
        self.bus.add(machine.PL011.base, machine.PL011.size, self.uart, "PL011")
        self.rtc = Pl031(lock, self.irqchip.spi(machine.PL031.spi))
        self.bus.add(machine.PL031.base, machine.PL031.size, self.rtc, "PL031")
        self.generation = VmGenId(self.irqchip.spi(machine.VMGENID.spi), memory, machine.VMGENID.base)
        self.virtio: list[VirtioMmio] = []
        for index, device in enumerate(virtio):
            slot = machine.virtio_slot(index)
            transport = VirtioMmio(lock, self.irqchip.spi(slot.spi), memory, device)
            self.bus.add(slot.base, slot.size, transport, f"virtio-{device.name}")
            self.virtio.append(transport)
        free = machine.VIRTIO_SLOTS - len(virtio)
        if free:
            first = machine.virtio_slot(len(virtio)).base
            self.bus.add(first, free * VIRTIO_MMIO_SIZE, EmptySlots(), "empty virtio slots")

    def _gicv3(self, lock: threading.RLock, cpus: int) -> Gicv3:
        gic = Gicv3(lock, cpus)
        self.bus.add(machine.GICD_BASE, machine.GICD_SIZE, gic.distributor, "GICv3 distributor")
        self.bus.add(machine.GICR_BASE, gic.redistributors_size, gic.redistributors, "GICv3 redistributors")
        return gic

    @property
    def gic(self) -> Gicv3:
        """Our own interrupt controller, with state to be saved. Raises ConfigError where it is the hypervisor's."""
        if not isinstance(self.irqchip, Gicv3):
            raise ConfigError("the state of the hypervisor's own GIC cannot be saved: use --irqchip avmm")
        return self.irqchip

    def nodes(self) -> list[Node]:
        """The devices' own device-tree nodes."""
        slots = [transport.fdt_node(machine.virtio_slot(index)) for index, transport in enumerate(self.virtio)]
        return [
            self.uart.fdt_node(machine.PL011),
            self.rtc.fdt_node(machine.PL031),
            self.generation.fdt_node(machine.VMGENID),
            *slots,
        ]

    def coroutines(self) -> list[Coroutine[Any, Any, None]]:
        """The devices' work, to run while the machine is on."""
        return [self.uart.run(), self.rtc.run(), *(transport.run() for transport in self.virtio)]

    def guest_errors(self) -> dict[str, int]:
        """How often the guest broke a virtio device's rules, by device."""
        return {transport.device.name: transport.guest_errors for transport in self.virtio}

    async def pause(self) -> None:
        """Bring the devices' work to rest: after the vCPUs."""
        for transport in self.virtio:
            await transport.pause()

    def resume(self) -> None:
        """Let the devices work again: before the vCPUs."""
        for transport in self.virtio:
            transport.resume()

    def save(self) -> BoardState:
        """The state for a snapshot: while paused, and after the vCPUs'."""
        virtio = tuple((transport.device.name, transport.save()) for transport in self.virtio)
        return BoardState(self.gic.save(), self.uart.save(), self.rtc.save(), virtio)

    def restore(self, state: BoardState) -> None:
        """Back to a saved state: after guest memory, before the vCPUs and before :meth:`coroutines` run.

        Raises ConfigError for one of another machine.
        """
        names = [transport.device.name for transport in self.virtio]
        if [name for name, _ in state.virtio] != names:
            raise ConfigError(f"the state is of a machine with other devices than {', '.join(names) or 'none'}")
        try:
            self.gic.restore(state.gic)
            self.uart.restore(state.uart)
            self.rtc.restore(state.rtc)
            for transport, (_, saved) in zip(self.virtio, state.virtio, strict=True):
                transport.restore(saved)
        except (ValueError, GuestError) as error:
            raise ConfigError(f"the state of a device cannot be restored: {error}") from error

    def close(self) -> None:
        """Let go of guest memory: when the coroutines have ended."""
        self.uart.collect()
        for transport in self.virtio:
            transport.close()
