"""The hardware of a virtual machine: its engine, memory, clock, board and vCPUs.

Engine and memory are there from the start to the end, board and vCPUs from one reset to the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Coroutine, Sequence
from typing import Any

from avmm.attachments.base import Attachment
from avmm.backends.serial import SerialLine
from avmm.board import Board, id_page
from avmm.bootloader.image import Kernel
from avmm.bootloader.loader import ENTROPY_SIZE, load_linux
from avmm.bootloader.machine import GICD_BASE, GICR_BASE, PL011, RAM_BASE
from avmm.clock import Clock, DeadlineTimers
from avmm.config import VmConfig
from avmm.describe import check_capabilities
from avmm.hypervisor import open_hypervisor
from avmm.hypervisor.base import ExitKind
from avmm.memory import GuestMemory, Region
from avmm.ram import FrozenRam, LiveRam, Ram
from avmm.trace import Trace
from avmm.vcpu import sysregs
from avmm.vcpu.loop import VcpuLoop, create_all
from avmm.vcpu.psci import Psci
from avmm.vcpu.state import VcpuState


class Hardware:
    """A machine fresh from reset, for one VM. Close it when none of its vCPUs runs any more.

    ``attachments`` are open; their devices are the board's. ``line`` is the serial console's end on the host,
    ``memory`` becomes the guest's. ``image`` is what RAM holds, zeroes without one. ``trace`` names a file for a
    timeline. Raises ConfigError, EngineError or HostError, and nothing is left then.
    """

    def __init__(
        self,
        config: VmConfig,
        attachments: Sequence[Attachment],
        line: SerialLine,
        memory: GuestMemory,
        timers: DeadlineTimers,
        *,
        image: FrozenRam | None = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> None:
        self.lock = threading.RLock()
        self.clock = Clock()
        self.line = line
        self.memory = memory
        self._config = config
        self._attachments = attachments
        self._timers = timers
        self._past_exits = [0] * len(ExitKind)  # of vCPUs before the last reset
        self._faults: dict[str, int] | None = None  # of an engine that is gone
        with contextlib.ExitStack() as held:
            self._trace = None if trace is None else held.enter_context(contextlib.closing(Trace(trace)))
            self._ram = held.enter_context(contextlib.closing(Ram(config.memory, image)))
            held.callback(memory.close)
            hypervisor = self._hypervisor = held.enter_context(
                contextlib.closing(open_hypervisor(config.engine, config.faults))
            )
            held.callback(self._unplug)
            self.capabilities = hypervisor.capabilities
            check_capabilities(config, hypervisor)
            # Not with a trace, which shows each exit.
            self._batch = hypervisor.batch_uart(PL011.base) if trace is None else None
            for region in (Region(RAM_BASE, self._ram.buffer), id_page()):
                memory.add(region)
                hypervisor.map(region)
            memory.on_host_write = hypervisor.host_wrote
            memory.on_discard = self._discard
            self._assemble()
            self._held = held.pop_all()

    def reset(self) -> None:
        """A new board and new vCPUs, when the old ones have come to rest. What was counted stays."""
        for vcpu in self.vcpus:
            for kind in ExitKind:
                self._past_exits[kind] += vcpu.counters.exits[kind]
        self.board.close()
        self._assemble()

    def _assemble(self) -> None:
        config = self._config
        devices = [each.device() for each in self._attachments]
        irqchip = self._hypervisor.gic(GICD_BASE, GICR_BASE) if config.irqchip == "hypervisor" else None
        board = self.board = Board(self.lock, config.cpus, self.line, self.memory, devices, self._batch, irqchip)
        self.line.collect = board.uart.collect
        self._psci = Psci(self._is_ram)
        self.vcpus = [
            VcpuLoop(
                index,
                hypervisor=self._hypervisor,
                bus=board.bus,
                irqchip=board.irqchip,
                psci=self._psci,
                clock=self.clock,
                timers=self._timers,
                lock=self.lock,
                halt_poll=config.halt_poll,
            )
            for index in range(config.cpus)
        ]
        if self._trace is not None:
            for vcpu in self.vcpus:
                self._trace.attach(vcpu, board.bus)

    async def prepare(self) -> None:
        """Make the vCPUs that must all be there before one runs."""
        if self.board.irqchip.inside:
            await create_all(self.vcpus)

    def load(self, kernel: Kernel, initrd: bytes | None) -> None:
        """What the first vCPU of a machine fresh from reset is to run. Blocks. Raises ImageError."""
        config, board = self._config, self.board
        board.generation.renew(tell=False)
        self._ram.prepare(kernel.text_offset + kernel.image_size)  # where load_linux() puts it
        entry = load_linux(
            self.memory,
            kernel,
            initrd,
            cmdline=config.bootargs,
            cpus=[sysregs.mpidr(index) for index in range(config.cpus)],
            devices=board.nodes(),
            entropy=os.urandom(ENTROPY_SIZE),
        )
        with self.lock:
            self._psci.power_on(0, entry.pc, entry.x0)

    def work(self) -> list[Coroutine[Any, Any, None]]:
        """The devices' work, to run while the machine is on."""
        coroutines = self.board.coroutines()
        return coroutines if self._trace is None else [self._trace.work(each) for each in coroutines]

    # While it runs.

    async def pause(self) -> None:
        """The vCPUs come to rest outside the guest, then the devices; the guest's time stands still."""
        await asyncio.gather(*(vcpu.pause() for vcpu in self.vcpus))
        self.clock.stop()
        await self.board.pause()

    def resume(self) -> None:
        """Go on, from any point of :meth:`pause`."""
        self.board.resume()
        stood = self.clock.start()
        for vcpu in self.vcpus:
            vcpu.resume(stood)

    @property
    def alive(self) -> bool:
        """Whether every vCPU is there, with registers to be saved."""
        return all(vcpu.exists for vcpu in self.vcpus)

    async def registers(self) -> list[VcpuState]:
        """Each vCPU's registers, while paused and :attr:`alive`."""
        return list(await asyncio.gather(*(vcpu.save() for vcpu in self.vcpus)))

    def ram(self) -> FrozenRam | LiveRam:
        """RAM as it is now, while paused. Where the engine has room for one VM it is not to be mapped by another."""
        return self._ram.freeze() if self.capabilities.many_vms else LiveRam(self._ram.buffer)

    def counters(self) -> dict[str, Any]:
        """See :meth:`avmm.VirtualMachine.counters`."""
        exits = list(self._past_exits)
        for vcpu in self.vcpus:
            for kind, count in enumerate(vcpu.counters.exits):
                exits[kind] += count
        return {
            "exits": {kind.name.lower(): exits[kind] for kind in ExitKind},
            "uart_batched": 0 if self._batch is None else self._batch.served(),
            "vcpus": [vcpu.snapshot_counters() for vcpu in self.vcpus],
            "guest_errors": self.board.guest_errors(),
            "faults": self._hypervisor.fault_counts() if self._faults is None else self._faults,
        }

    def stats(self) -> list[dict[str, Any]]:
        """What each vCPU has done, as plain data: CPU time, counters, histograms. Times are in nanoseconds."""
        return [
            {
                "mode": vcpu.mode.name.lower(),
                "cpu_ns": vcpu.cpu_ns,
                "parked_ns": vcpu.parking.stats.parked_ns,
                "counters": vcpu.snapshot_counters(),
                "wake_latency": list(vcpu.parking.stats.latency),
                "wake_latency_ns": vcpu.parking.stats.latency_ns,
                "timer_lateness": list(vcpu.parking.stats.lateness),
                "timer_lateness_ns": vcpu.parking.stats.lateness_ns,
            }
            for vcpu in self.vcpus
        ]

    # The end.

    async def abandon(self) -> None:
        """Close it when its vCPUs may have been made and none has run."""
        for vcpu in self.vcpus:
            await vcpu.close()
        self.close()

    def close(self) -> None:
        """Give everything back that it holds outside Python. What was counted can be read on."""
        self.board.close()
        self._held.close()

    def _unplug(self) -> None:
        self.memory.on_host_write = lambda gpa, length: None
        self.memory.on_discard = lambda region, offset, length: None
        self._faults = self._hypervisor.fault_counts()

    def _discard(self, region: Region, offset: int, length: int) -> None:
        if region.buffer is self._ram.buffer:
            self._ram.discard(offset, length)

    def _is_ram(self, address: int) -> bool:
        return any(region.base <= address < region.base + region.size for region in self.memory.regions)
