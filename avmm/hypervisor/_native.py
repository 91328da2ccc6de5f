"""The engines behind Apple's ``hv_*`` interface: one set of classes over either build of it.

``ffi`` and ``lib`` come from ``avmm.hypervisor._softhv`` or ``avmm.hypervisor._framework``, which were compiled from
the same declarations, so what runs here on Linux is what runs on a Mac.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, cast

from avmm.errors import EngineError
from avmm.hypervisor.base import Capabilities, Frame
from avmm.hypervisor.gic import HypervisorGic
from avmm.memory import Region

UNSUPPORTED = 0xFAE9400F

#: ``hv_return_t`` by its unsigned value.
RETURN_CODES = {
    0x00000000: "HV_SUCCESS",
    0xFAE94001: "HV_ERROR",
    0xFAE94002: "HV_BUSY",
    0xFAE94003: "HV_BAD_ARGUMENT",
    0xFAE94004: "HV_ILLEGAL_GUEST_STATE",
    0xFAE94005: "HV_NO_RESOURCES",
    0xFAE94006: "HV_NO_DEVICE",
    0xFAE94007: "HV_DENIED",
    0xFAE94008: "HV_FAULT",
    0xFAE9400F: "HV_UNSUPPORTED",
}

MEMORY_READ, MEMORY_WRITE, MEMORY_EXEC = 1, 2, 4


def fail(call: str, code: int) -> NoReturn:
    """Raise EngineError for a failed ``call``."""
    code &= 0xFFFF_FFFF
    raise EngineError(f"{call} failed: {RETURN_CODES.get(code, 'unknown error')} ({code:#x})", code)


class NativeUartBatch:
    """See :class:`avmm.hypervisor.base.UartBatch`."""

    def __init__(self, ffi: Any, lib: Any, base: int) -> None:
        uart = lib.avmm_uart_new(base)
        if uart == ffi.NULL:
            raise EngineError("avmm_uart_new failed: the host is out of memory")
        self._ffi, self._lib = ffi, lib
        self.handle = ffi.gc(uart, lib.avmm_uart_free)

    def open(self, flags: int) -> None:
        """From now on the data register is written to, and the flag register reads as ``flags``, without exits."""
        self._lib.avmm_uart_open(self.handle, flags)

    def close(self) -> bytes:
        """No longer; what was written meanwhile, in order."""
        data = self._ffi.new("uint8_t[]", self._lib.AVMM_UART_BYTES)
        return bytes(self._ffi.buffer(data, self._lib.avmm_uart_close(self.handle, data)))

    def served(self) -> int:
        """How many accesses needed no exit, ever."""
        return cast(int, self._lib.avmm_uart_served(self.handle))


class NativeVcpu:
    """A vCPU behind the ``hv_*`` interface. Every method but :meth:`kick` only on the thread that created it."""

    def __init__(self, ffi: Any, lib: Any, uart: NativeUartBatch | None = None) -> None:
        self._ffi, self._lib = ffi, lib
        handle = ffi.new("hv_vcpu_t *")
        exits = ffi.new("hv_vcpu_exit_t **")
        code = lib.hv_vcpu_create(handle, exits, ffi.NULL)
        if code:
            fail("hv_vcpu_create", code)
        gate = lib.avmm_gate_new()
        if gate == ffi.NULL:
            lib.hv_vcpu_destroy(handle[0])
            raise EngineError("avmm_gate_new failed: the host is out of memory")
        self._gate = ffi.gc(gate, lib.avmm_gate_free)
        self._handles = handle  # also the one-element array hv_vcpus_exit asks for
        self._handle: int = handle[0]
        self._exit = exits[0]
        #: See :class:`avmm.hypervisor.base.Vcpu`; without a call in between: an interrupt is on its way.
        self.open_gate: Callable[[int], None] = partial(lib.avmm_gate_open, self._gate)
        self.stir: Callable[[], None] = partial(lib.avmm_gate_stir, self._gate)
        self._run = lib.avmm_run
        self._frame = ffi.new("avmm_frame_t *")
        self._frame.gate = self._gate
        self._uart = uart  # kept for as long as the frame refers to it
        if uart is not None:
            self._frame.uart = uart.handle
        self._cell = ffi.new("uint64_t *")
        self._closed = False
        self.frame: Frame = cast(Frame, self._frame)

    def run(self) -> int:
        """Finish the last exit, enter the guest, come back with an :class:`ExitKind` (as a plain int)."""
        frame = self._frame
        self._run(self._handle, self._exit, frame)
        return cast(int, frame.kind)

    def kick(self) -> None:
        """Make :meth:`run` return CANCELED, now or at its next call. Any thread; nothing once closed."""
        if not self._closed:
            self._lib.hv_vcpus_exit(self._handles, 1)

    def shut_gate(self) -> None:
        """Take it back that the gate was opened: the sleep had ended by itself."""
        self._lib.avmm_gate_shut(self._gate)

    def set_poll(self, most_ns: int) -> None:
        """How long at most, in nanoseconds, a sleep may begin with a busy wait. Not while it runs."""
        self._lib.avmm_gate_set_poll(self._gate, most_ns)

    def withdraw(self) -> int:
        """Take ``frame.offer`` back; what it was. Any thread."""
        return cast(int, self._lib.avmm_withdraw(self._frame))

    def get_reg(self, reg: int) -> int:
        """A general register, see :class:`~avmm.hypervisor.base.Reg`."""
        code = self._lib.hv_vcpu_get_reg(self._handle, reg, self._cell)
        if code:
            fail(f"hv_vcpu_get_reg({reg})", code)
        return cast(int, self._cell[0])

    def set_reg(self, reg: int, value: int) -> None:
        """Write a general register."""
        code = self._lib.hv_vcpu_set_reg(self._handle, reg, value)
        if code:
            fail(f"hv_vcpu_set_reg({reg})", code)

    def get_sysreg(self, encoding: int) -> int:
        """A system register; raises EngineError when the engine does not know it."""
        code = self._lib.hv_vcpu_get_sys_reg(self._handle, encoding, self._cell)
        if code:
            fail(f"hv_vcpu_get_sys_reg({encoding:#06x})", code)
        return cast(int, self._cell[0])

    def set_sysreg(self, encoding: int, value: int) -> None:
        """Write a system register."""
        code = self._lib.hv_vcpu_set_sys_reg(self._handle, encoding, value)
        if code:
            fail(f"hv_vcpu_set_sys_reg({encoding:#06x})", code)

    def get_simd(self, index: int) -> bytes:
        """Q``index``: 16 bytes, little endian."""
        value = self._ffi.new("uint8_t[16]")
        code = self._lib.avmm_get_simd_fp_reg(self._handle, index, value)
        if code:
            fail(f"hv_vcpu_get_simd_fp_reg({index})", code)
        return bytes(value)

    def set_simd(self, index: int, value: bytes) -> None:
        """Write Q``index``."""
        if len(value) != 16:
            raise ValueError(f"a SIMD register has 16 bytes, not {len(value)}")
        code = self._lib.avmm_set_simd_fp_reg(self._handle, index, value)
        if code:
            fail(f"hv_vcpu_set_simd_fp_reg({index})", code)

    def get_vtimer_offset(self) -> int:
        """CNTVOFF: guest CNTVCT = host counter - this, in counter ticks."""
        code = self._lib.hv_vcpu_get_vtimer_offset(self._handle, self._cell)
        if code:
            fail("hv_vcpu_get_vtimer_offset", code)
        return cast(int, self._cell[0])

    def set_vtimer_offset(self, offset: int) -> None:
        """Set CNTVOFF."""
        code = self._lib.hv_vcpu_set_vtimer_offset(self._handle, offset)
        if code:
            fail("hv_vcpu_set_vtimer_offset", code)

    def vtimer_mask(self) -> bool:
        """Whether the virtual timer's exits are masked."""
        masked = self._ffi.new("bool *")
        code = self._lib.hv_vcpu_get_vtimer_mask(self._handle, masked)
        if code:
            fail("hv_vcpu_get_vtimer_mask", code)
        return bool(masked[0])

    def irq_pending(self) -> bool:
        """The level that the next run starts with, of the IRQ input."""
        pending = self._ffi.new("bool *")
        code = self._lib.hv_vcpu_get_pending_interrupt(self._handle, 0, pending)
        if code:
            fail("hv_vcpu_get_pending_interrupt", code)
        return bool(pending[0])

    def exec_time(self) -> int:
        """How long the vCPU has run; Apple's header says in host ticks, Apple's documentation in nanoseconds."""
        code = self._lib.hv_vcpu_get_exec_time(self._handle, self._cell)
        if code:
            fail("hv_vcpu_get_exec_time", code)
        return cast(int, self._cell[0])

    def counters(self) -> dict[str, int]:
        """The engine's own counters, empty where it has none."""
        return {}

    def close(self) -> None:
        """Destroy the vCPU; a second call does nothing."""
        if self._closed:
            return
        code = self._lib.hv_vcpu_destroy(self._handle)
        if code:
            fail("hv_vcpu_destroy", code)
        self._closed = True


class NativeHypervisor:
    """A VM behind the ``hv_*`` interface. Engines say how it is made, entered and ended."""

    name = ""
    many_vms = False

    def __init__(self, ffi: Any, lib: Any) -> None:
        self._ffi, self._lib = ffi, lib
        self._mapped: dict[int, tuple[Region, Any]] = {}
        self._uart: NativeUartBatch | None = None
        self._gic: HypervisorGic | None = None
        self._closed = False
        self._create()
        self.capabilities = Capabilities(
            name=self.name,
            ipa_bits=self._query("hv_vm_config_get_default_ipa_size"),
            max_vcpus=self._query("hv_vm_get_max_vcpu_count"),
            many_vms=self.many_vms,
        )

    def _create(self) -> None:
        """Make the VM; raises EngineError."""
        code = self._lib.hv_vm_create(self._ffi.NULL)
        if code:
            fail("hv_vm_create", code)

    def _enter(self) -> None:
        """Called on the calling thread before every ``hv_*`` call that acts on 'the' VM."""

    def _destroy(self) -> None:
        """End the VM; raises EngineError."""
        code = self._lib.hv_vm_destroy()
        if code:
            fail("hv_vm_destroy", code)

    def _query(self, call: str) -> int:
        self._enter()
        value = self._ffi.new("uint32_t *")
        code = getattr(self._lib, call)(value)
        if code:
            fail(call, code)
        return cast(int, value[0])

    @property
    def max_ipa_bits(self) -> int:
        """The widest guest physical address space a VM can be given."""
        return self._query("hv_vm_config_get_max_ipa_size")

    def map(self, region: Region, *, read_only: bool = False) -> None:
        """Put ``region`` into the guest's physical address space; its buffer stays open until it is unmapped."""
        self._enter()
        buffer = self._ffi.from_buffer("char[]", region.buffer)
        flags = MEMORY_READ | MEMORY_EXEC | (0 if read_only else MEMORY_WRITE)
        code = self._lib.hv_vm_map(buffer, region.base, region.size, flags)
        if code:
            self._ffi.release(buffer)
            fail(f"hv_vm_map({region.base:#x}, {region.size:#x})", code)
        self._mapped[region.base] = region, buffer

    def unmap(self, region: Region) -> None:
        """Take it out again. Raises EngineError when it is not mapped."""
        self._enter()
        code = self._lib.hv_vm_unmap(region.base, region.size)
        if code:
            fail(f"hv_vm_unmap({region.base:#x}, {region.size:#x})", code)
        _, buffer = self._mapped.pop(region.base)
        self._ffi.release(buffer)

    def gic(self, distributor: int, redistributors: int) -> HypervisorGic:
        """See :class:`avmm.hypervisor.base.Hypervisor`."""
        if self._gic is None:
            self._enter()
            code = self._lib.avmm_gic_create(distributor, redistributors)
            if code and code & 0xFFFF_FFFF == UNSUPPORTED:
                raise EngineError(f"{self.name} has no GIC of its own here (macOS 15 has): use --irqchip avmm", code)
            if code:
                fail("hv_gic_create", code)
            self._gic = HypervisorGic(self)
        else:
            self._gic.reset()
        return self._gic

    def reset_gic(self) -> None:
        """The GIC as at first, but for its inputs; while no vCPU exists."""
        self._enter()
        code = self._lib.avmm_gic_reset()
        if code:
            fail("hv_gic_reset", code)

    def set_spi(self, intid: int, level: bool) -> None:
        """Drive an input of the GIC. Any thread."""
        self._enter()
        code = self._lib.avmm_gic_set_spi(intid, level)
        if code:
            fail(f"hv_gic_set_spi({intid})", code)

    def spi_range(self) -> tuple[int, int]:
        """The first INTID of the GIC's shared interrupts, and how many there are."""
        first, count = self._ffi.new("uint32_t *"), self._ffi.new("uint32_t *")
        self._enter()
        code = self._lib.avmm_gic_spi_range(first, count)
        if code:
            fail("hv_gic_get_spi_interrupt_range", code)
        return first[0], count[0]

    def host_wrote(self, gpa: int, length: int) -> None:
        """The host wrote guest RAM: drop what was derived from the old contents. Any thread."""

    def fault_counts(self) -> dict[str, int]:
        """How often each injected fault has happened; empty without faults."""
        return {}

    def batch_uart(self, base: int) -> NativeUartBatch:
        """A batch, closed, for the UART at ``base``; vCPUs that are created from now on use it. Raises EngineError."""
        self._uart = NativeUartBatch(self._ffi, self._lib, base)
        return self._uart

    def create_vcpu(self) -> NativeVcpu:
        """A vCPU owned by the calling thread."""
        self._enter()
        return NativeVcpu(self._ffi, self._lib, self._uart)

    def close(self) -> None:
        """Destroy the VM, its vCPUs being closed already; a second call does nothing."""
        if self._closed:
            return
        if self._gic is not None:
            self._gic.close()
        self._enter()
        self._destroy()
        self._closed = True
        for _, buffer in self._mapped.values():
            self._ffi.release(buffer)
        self._mapped.clear()
