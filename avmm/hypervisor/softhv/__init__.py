"""softhv: our own engine, a C library with the ABI and the manners of Apple's framework. Runs everywhere."""

from __future__ import annotations

from avmm.errors import EngineError
from avmm.faults import Faults
from avmm.hypervisor._native import NativeHypervisor, NativeVcpu, fail

try:
    from avmm.hypervisor._softhv import ffi, lib
except ImportError as error:  # a checkout that was never built, or a wheel for another machine
    raise EngineError(f"softhv is not built: run `pip install -e .` in the checkout ({error})") from error

UNSUPPORTED = 0xFAE9400F  # HV_UNSUPPORTED

_COUNTERS = [name for name, _ in ffi.typeof("softhv_counters_t").fields if name != "reserved"]


class SofthvVcpu(NativeVcpu):
    """A vCPU of softhv: one more than Apple's, it counts."""

    def counters(self) -> dict[str, int]:
        """softhv_counters_t of softhv.h, by field name. Any thread; a snapshot taken while it runs is racy."""
        counters = ffi.new("softhv_counters_t *")
        code = lib.softhv_vcpu_counters(self._handle, counters)
        if code:
            fail("softhv_vcpu_counters", code)
        return {name: getattr(counters, name) for name in _COUNTERS}


class Softhv(NativeHypervisor):
    """One of any number of softhv VMs in the process.

    ``compiled`` says whether it may compile guest code, ``turns`` that one vCPU runs at a time.
    """

    name = "softhv"
    many_vms = True
    #: A block of guest code is interpreted that often before it is compiled for the host, where that can be done.
    COMPILE_AFTER = 8
    #: Bytes of compiled code kept at once; 0: as many as the engine likes.
    CODE_LIMIT = 0

    def __init__(self, *, compiled: bool = True, turns: bool = False, faults: Faults | None = None) -> None:
        self._faults = faults
        self._turns = turns
        self._compile_after = self.COMPILE_AFTER if compiled else lib.SOFTHV_NO_JIT
        super().__init__(ffi, lib)

    def _create(self) -> None:
        self._vm = lib.softhv_vm_new()
        if self._vm == ffi.NULL:
            raise EngineError("softhv_vm_new failed: the host is out of memory")
        code = lib.softhv_vm_set_jit(self._vm, self._compile_after, self.CODE_LIMIT)
        if code and code & 0xFFFF_FFFF != UNSUPPORTED:
            lib.softhv_vm_free(self._vm)
            fail("softhv_vm_set_jit", code)
        lib.softhv_vm_set_turns(self._vm, self._turns)  # cannot fail: there is no vCPU yet
        self._enter()
        super()._create()
        if self._faults is not None:
            self._misbehave(self._faults)

    def _misbehave(self, faults: Faults) -> None:
        wanted = ffi.new("softhv_faults_t *")
        wanted.seed = faults.seed
        for name in ("spurious_wfi", "early_wfi", "lose_kick", "double_kick", "unknown", "double_vtimer"):
            setattr(wanted, name, getattr(faults, name))
        wanted.late_kick_ns, wanted.late_vtimer_ns = faults.late_kick, faults.late_vtimer
        wanted.sleep_for_ns, wanted.sleep_at_ns = faults.host_sleep
        wanted.forget_kicks = not faults.sticky_kick
        wanted.fast_counter = faults.fast_counter
        code = lib.softhv_vm_faults(self._vm, wanted)
        if code:
            fail("softhv_vm_faults", code)

    def fault_counts(self) -> dict[str, int]:
        """How often each fault has happened, by softhv_fault_counts_t's names; empty without faults."""
        if self._faults is None:
            return {}
        counts = ffi.new("softhv_fault_counts_t *")
        code = lib.softhv_vm_fault_counts(self._vm, counts)
        if code:
            fail("softhv_vm_fault_counts", code)
        return {name: getattr(counts, name) for name, _ in ffi.typeof("softhv_fault_counts_t").fields}

    def _enter(self) -> None:
        lib.softhv_vm_bind(self._vm)

    def _destroy(self) -> None:
        super()._destroy()
        lib.softhv_vm_bind(ffi.NULL)  # never leave this thread bound to what is gone
        code = lib.softhv_vm_free(self._vm)
        if code:
            fail("softhv_vm_free", code)

    def host_wrote(self, gpa: int, length: int) -> None:
        """Code translated from [gpa, gpa + length) is dropped before any vCPU runs on. Any thread."""
        lib.softhv_invalidate(self._vm, gpa, length)

    def create_vcpu(self) -> SofthvVcpu:
        """A vCPU owned by the calling thread."""
        self._enter()
        return SofthvVcpu(ffi, lib, self._uart)


def timebase() -> tuple[int, int]:
    """A tick of the counter in nanoseconds, as (numerator, denominator)."""
    numer, denom = ffi.new("uint32_t *"), ffi.new("uint32_t *")
    lib.softhv_timebase(numer, denom)
    return numer[0], denom[0]


def absolute_time() -> int:
    """The host counter that vtimer offsets refer to, in ticks."""
    ticks: int = lib.softhv_absolute_time()
    return ticks
