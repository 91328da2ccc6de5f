"""The board: which devices a machine has and where they are. A list; each device knows itself."""

from __future__ import annotations

import threading
from collections.abc import Coroutine
from typing import Any

from avmm.bootloader import machine
from avmm.bus import Bus
from avmm.devices.gicv3 import Gicv3
from avmm.devices.pl011 import Pl011, SerialBackend
from avmm.devices.pl031 import Pl031
from avmm.fdt import Node


class Board:
    """Devices fresh from reset, on a bus, under ``lock`` (the VM's). A machine that resets gets a new one."""

    def __init__(self, lock: threading.RLock, cpus: int, serial: SerialBackend) -> None:
        self.bus = Bus()
        self.gic = Gicv3(lock, cpus)
        self.bus.add(machine.GICD_BASE, machine.GICD_SIZE, self.gic.distributor, "GICv3 distributor")
        self.bus.add(machine.GICR_BASE, self.gic.redistributors_size, self.gic.redistributors, "GICv3 redistributors")
        self.uart = Pl011(lock, self.gic.spi(machine.PL011.spi), serial)
        self.bus.add(machine.PL011.base, machine.PL011.size, self.uart, "PL011")
        self.rtc = Pl031(lock, self.gic.spi(machine.PL031.spi))
        self.bus.add(machine.PL031.base, machine.PL031.size, self.rtc, "PL031")

    def nodes(self) -> list[Node]:
        """The devices' own device-tree nodes."""
        return [self.uart.fdt_node(machine.PL011), self.rtc.fdt_node(machine.PL031)]

    def coroutines(self) -> list[Coroutine[Any, Any, None]]:
        """The devices' work, to run while the machine is on."""
        return [self.uart.run(), self.rtc.run()]
