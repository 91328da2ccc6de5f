"""The probes of an engine: what avmm relies on, and a few things it would like to know."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from avmm.clock import host_timebase
from avmm.doctor import Finding
from avmm.doctor.guest import DATA, MMIO, VECTORS, Guest, Stuck, on_own_thread
from avmm.doctor.host import framework_library
from avmm.errors import AvmmError, EngineError
from avmm.hypervisor import ExitKind, Finish, available_engines, open_hypervisor, sysreg
from avmm.hypervisor._native import fail

#: A probe returns whether what it found is as assumed (None: nothing is assumed), and what it found.
Answer = tuple[bool | None, str]
Probe = Callable[[str], Answer]

# Instructions.
NOP, WFI, WFE = 0xD503201F, 0xD503207F, 0xD503205F
HVC, SMC, SPIN = 0xD4000002, 0xD4000003, 0x14000000
LDR_W1_X0, STR_W1_X0 = 0xB9400001, 0xB9000001
MRS_X0_CNTVCT, MRS_X0_CNTPCT, MRS_X0_CNTFRQ = 0xD53BE040, 0xD53BE020, 0xD53BE000
MRS_X3_ICC_IAR1, MSR_ICC_EOIR1_X4, MSR_ICC_SGI1R_X4 = 0xD538CC03, 0xD518CC24, 0xD518CBA4
MSR_DAIFCLR_IRQ = 0xD50342FF
STR_X2_X0_8, ADD_X2_X2_1, B_BACK_2 = 0xF9000402, 0x91000442, 0x17FFFFFE

MPIDR_EL1, ID_AA64PFR0_EL1 = sysreg(3, 0, 0, 0, 5), sysreg(3, 0, 0, 4, 0)
CNTV_CTL_EL0, CNTV_CVAL_EL0 = sysreg(3, 3, 14, 3, 1), sysreg(3, 3, 14, 3, 2)
ICC_IAR1_EL1, ICC_EOIR1_EL1, ICC_SGI1R_EL1 = (
    sysreg(3, 0, 12, 12, 0), sysreg(3, 0, 12, 12, 1), sysreg(3, 0, 12, 11, 5)
)  # fmt: skip

_U64: Final = (1 << 64) - 1

#: Where the hypervisor's own GIC goes: its redistributors take 32 MiB.
_OWN_GICD: Final = 0x0800_0000
_OWN_GICR: Final = 0x1000_0000
_MS: Final = 10**6

PROBES: dict[str, tuple[Probe, str]] = {}


def _probe(name: str, expected: str = "") -> Callable[[Callable[[Guest], Answer]], Callable[[Guest], Answer]]:
    """Register a probe that gets a guest without instructions, and closes nothing."""

    def register(function: Callable[[Guest], Answer]) -> Callable[[Guest], Answer]:
        def probe(engine: str) -> Answer:
            guest = Guest(engine)
            try:
                return function(guest)
            finally:
                guest.close()

        PROBES[name] = probe, expected
        return function

    return register


def _load(guest: Guest, *words: int) -> None:
    guest.poke(guest.region.base, *words)


def _exits(guest: Guest, word: int, kind: ExitKind, pc: int) -> Answer:
    _load(guest, word, HVC)
    found = guest.run()
    text = f"{found.name} with PC {guest.pc:+d}, syndrome {guest.vcpu.frame.syndrome:#x}"
    return (found, guest.pc) == (kind, pc), text


def _timer(guest: Guest, cval: int, ctl: int = 1) -> None:
    guest.vcpu.set_sysreg(CNTV_CVAL_EL0, cval)
    guest.vcpu.set_sysreg(CNTV_CTL_EL0, ctl)


def _guest_now(guest: Guest) -> int:
    return (host_timebase().now() - guest.vcpu.get_vtimer_offset()) & _U64


# ---- Exits -----------------------------------------------------------------------------------------------------------


@_probe("HVC exits", "HVC, PC behind it")
def _hvc(guest: Guest) -> Answer:
    return _exits(guest, HVC, ExitKind.HVC, 4)


@_probe("SMC exits", "SMC, PC at it")
def _smc(guest: Guest) -> Answer:
    return _exits(guest, SMC, ExitKind.SMC, 0)


@_probe("WFI exits", "WFI, PC at it: the hypervisor leaves sleeping to us")
def _wfi(guest: Guest) -> Answer:
    return _exits(guest, WFI, ExitKind.WFI, 0)


@_probe("WFE")
def _wfe(guest: Guest) -> Answer:
    _load(guest, WFE, HVC)
    found = guest.run()
    return None, "exits" if found is ExitKind.WFE else f"does not exit ({found.name} came next)"


@_probe("interrupt controller registers trap", "reads and writes of ICC_* exit (no hypervisor's GIC in the way)")
def _icc(guest: Guest) -> Answer:
    _load(guest, MRS_X3_ICC_IAR1, MSR_ICC_EOIR1_X4, MSR_ICC_SGI1R_X4, HVC)
    wanted = [
        (ExitKind.SYSREG_READ, ICC_IAR1_EL1, Finish.RESULT), (ExitKind.SYSREG_WRITE, ICC_EOIR1_EL1, Finish.ADVANCE),
        (ExitKind.SYSREG_WRITE, ICC_SGI1R_EL1, Finish.ADVANCE),
    ]  # fmt: skip
    finish = Finish.NONE
    for kind, encoding, then in wanted:
        found = guest.run(finish, 1023)
        if (found, guest.vcpu.frame.address) != (kind, encoding):
            return False, f"{found.name}, syndrome {guest.vcpu.frame.syndrome:#x}, instead of {kind.name} {encoding:#x}"
        finish = then
    found = guest.run(finish)
    return found is ExitKind.HVC and guest.vcpu.get_reg(3) == 1023, "ICC_IAR1_EL1, ICC_EOIR1_EL1 and ICC_SGI1R_EL1 exit"


@_probe("device accesses are decoded", "a data abort with a valid syndrome and the address accessed")
def _mmio(guest: Guest) -> Answer:
    _load(guest, LDR_W1_X0, STR_W1_X0, HVC)
    guest.vcpu.set_reg(0, MMIO + 0x18)
    frame = guest.vcpu.frame
    found = [(guest.run().name, frame.address, frame.size, frame.reg)]
    found.append((guest.run(Finish.RESULT, 0x8765_4321).name, frame.address, frame.size, frame.value))
    after = guest.run(Finish.ADVANCE)
    ok = after is ExitKind.HVC and found == [
        ("MMIO_READ", MMIO + 0x18, 4, 1), ("MMIO_WRITE", MMIO + 0x18, 4, 0x8765_4321)
    ]  # fmt: skip
    return ok, ", ".join(f"{name} of {size} bytes at {address:#x}" for name, address, size, _ in found)


# ---- Interrupts and kicks --------------------------------------------------------------------------------------------


@_probe("a pending interrupt is taken once unmasked", "the exception is taken before the next instruction")
def _irq(guest: Guest) -> Answer:
    _load(guest, NOP, MSR_DAIFCLR_IRQ, SPIN)
    guest.vcpu.frame.irq = 1
    found = guest.run()
    return (found, guest.pc) == (
        ExitKind.HVC,
        VECTORS + 0x280 + 4 - guest.region.base,
    ), f"{found.name}, PC {guest.pc:+#x}"


@_probe("the interrupt line falls when run returns", "no longer pending")
def _line(guest: Guest) -> Answer:
    _load(guest, HVC, HVC)
    guest.vcpu.frame.irq = 1
    guest.run()
    pending = guest.vcpu.irq_pending()
    return not pending, "still pending" if pending else "no longer pending"


@_probe("a kick before run sticks", "the next run returns at once, the one after it does not")
def _sticky(guest: Guest) -> Answer:
    _load(guest, HVC)
    guest.vcpu.kick()
    first, at = guest.run(), guest.pc
    second = guest.run()
    return (first, at, second) == (ExitKind.CANCELED, 0, ExitKind.HVC), f"{first.name}, then {second.name}"


@_probe("two kicks are one", "the next run returns at once, the one after it does not")
def _two_kicks(guest: Guest) -> Answer:
    _load(guest, HVC)
    guest.vcpu.kick()
    guest.vcpu.kick()
    first, second = guest.run(), guest.run()
    return (first, second) == (ExitKind.CANCELED, ExitKind.HVC), f"{first.name}, then {second.name}"


class _Kicker(threading.Thread):
    """Kicks the guest once it runs, which its counter in memory shows. ``over``: it has come out already."""

    def __init__(self, guest: Guest) -> None:
        super().__init__(daemon=True)
        self.kicked = time.monotonic_ns()
        self.over = False
        self._guest = guest

    def run(self) -> None:
        """Wait and kick."""
        seen = self._guest.peek(DATA + 8)
        while self._guest.peek(DATA + 8) == seen and not self.over:
            pass
        self.kicked = time.monotonic_ns()
        if not self.over:
            self._guest.vcpu.kick()


@_probe("a kick ends a loop without exits", "CANCELED every time")
def _kick(guest: Guest) -> Answer:
    _load(guest, STR_X2_X0_8, ADD_X2_X2_1, B_BACK_2)
    guest.vcpu.set_reg(0, DATA)
    guest.vcpu.set_reg(2, 1)
    slowest = 0
    for _ in range(50):
        kicker = _Kicker(guest)
        kicker.start()
        found = guest.run()
        returned = time.monotonic_ns()
        kicker.over = True
        kicker.join()
        if found is not ExitKind.CANCELED:
            return False, found.name
        slowest = max(slowest, returned - kicker.kicked)
    return True, f"CANCELED; the slowest of 50 took {slowest / 1000:.0f} µs"


# ---- The virtual timer -----------------------------------------------------------------------------------------------


@_probe("the virtual timer exits and masks itself", "VTIMER_ACTIVATED once, CNTV_CTL_EL0 reads as 5, the mask is set")
def _vtimer(guest: Guest) -> Answer:
    _load(guest, HVC)
    _timer(guest, 0)
    first = guest.run()
    ctl, masked = guest.vcpu.frame.vtimer_ctl & 7, guest.vcpu.vtimer_mask()
    second = guest.run()
    ok = (first, second, ctl, masked) == (ExitKind.VTIMER, ExitKind.HVC, 5, True)
    return ok, f"{first.name}, then {second.name}; CTL {ctl}, {'masked' if masked else 'not masked'}"


@_probe("the virtual timer is a level", "unmasked while its condition holds it exits again, afterwards no more")
def _level(guest: Guest) -> Answer:
    _load(guest, HVC)
    _timer(guest, 0)
    found = []
    for ctl in (1, 1, 3):  # the last with IMASK
        guest.vcpu.set_sysreg(CNTV_CTL_EL0, ctl)
        guest.vcpu.frame.unmask_vtimer = 1
        found.append(guest.run())
    ok = found == [ExitKind.VTIMER, ExitKind.VTIMER, ExitKind.HVC]
    return ok, ", ".join(kind.name for kind in found)


@_probe(
    "the virtual timer waits for run", "outside run nothing happens; the next run exits before its first instruction"
)
def _outside(guest: Guest) -> Answer:
    _load(guest, WFI, HVC)
    _timer(guest, _guest_now(guest) + host_timebase().to_ticks(2 * _MS))
    first = guest.run()
    time.sleep(0.005)
    masked = guest.vcpu.vtimer_mask()
    second, at = guest.run(Finish.ADVANCE), guest.pc
    ok = (first, masked, second, at) == (ExitKind.WFI, False, ExitKind.VTIMER, 4)
    return ok, f"{first.name}, {'masked' if masked else 'not masked'} 5 ms later, then {second.name} at PC {at:+d}"


@_probe("the virtual timer keeps its deadline", "never early")
def _deadline(guest: Guest) -> Answer:
    _load(guest, SPIN)
    late = []
    for _ in range(20):
        deadline = _guest_now(guest) + host_timebase().to_ticks(1 * _MS)
        _timer(guest, deadline)
        guest.vcpu.frame.unmask_vtimer = 1
        found = guest.run()
        late.append(host_timebase().to_ns(_guest_now(guest) - deadline))
        if found is not ExitKind.VTIMER:
            return False, found.name
    return min(late) >= 0, f"late by {min(late) / 1000:.0f} to {max(late) / 1000:.0f} µs"


@_probe("CNTVCT_EL0 is the host's counter less the offset", "between the host's readings before and after")
def _counter(guest: Guest) -> Answer:
    _load(guest, MRS_X0_CNTVCT, HVC)
    clock = host_timebase()
    offset = clock.now() - (1 << 40) & _U64
    guest.vcpu.set_vtimer_offset(offset)
    before = clock.now() - offset & _U64
    found = guest.run()
    after = clock.now() - offset & _U64
    value = guest.vcpu.get_reg(0)
    ok = found is ExitKind.HVC and before <= value <= after and guest.vcpu.get_vtimer_offset() == offset
    return ok, f"{value - before:+d} ticks from the first, {value - after:+d} from the second"


@_probe("CNTFRQ_EL0 agrees with the host's timebase", "the same frequency, or guests keep a wrong time")
def _frequency(guest: Guest) -> Answer:
    _load(guest, MRS_X0_CNTFRQ, HVC)
    guest.run()
    clock = host_timebase()
    seen, host = guest.vcpu.get_reg(0), 10**9 * clock.denom // clock.numer
    return seen == host, f"guest {seen} Hz, timebase {clock.numer}/{clock.denom} is {host} Hz"


@_probe("CNTVCT_EL0 advances at CNTFRQ_EL0", "within 1 %")
def _pace(guest: Guest) -> Answer:
    _load(guest, MRS_X0_CNTFRQ, HVC, MRS_X0_CNTVCT, HVC, MRS_X0_CNTVCT, HVC)
    guest.run()
    frequency = guest.vcpu.get_reg(0)
    readings, moments = [], []
    for _ in range(2):
        moments.append(time.monotonic_ns())
        guest.run()
        moments.append(time.monotonic_ns())
        readings.append(guest.vcpu.get_reg(0))
        time.sleep(0.1)
    ticks = (readings[1] - readings[0]) * 1e9  # each was read somewhere between two moments
    low, high = ticks / (moments[3] - moments[0]), ticks / (moments[2] - moments[1])
    return low * 0.99 <= frequency <= high * 1.01, f"between {low / 1e6:.3f} and {high / 1e6:.3f} MHz"


@_probe("CNTPCT_EL0")
def _physical(guest: Guest) -> Answer:
    _load(guest, MRS_X0_CNTPCT, HVC)
    found = guest.run()
    return (
        None,
        "reads without an exit" if found is ExitKind.HVC and guest.pc == 8 else f"{found.name} at PC {guest.pc:+#x}",
    )


@_probe("the unit of hv_vcpu_get_exec_time")
def _exec_time(guest: Guest) -> Answer:
    _load(guest, SPIN)
    clock = host_timebase()
    _timer(guest, _guest_now(guest) + clock.to_ticks(20 * _MS))
    before, began = guest.vcpu.exec_time(), clock.now()
    guest.run()
    spent, ticks = guest.vcpu.exec_time() - before, clock.now() - began
    share_ns, share_ticks = spent / clock.to_ns(ticks), spent / ticks
    unit = "nanoseconds" if abs(share_ns - 1) < abs(share_ticks - 1) else "ticks of the timebase"
    return None, f"{unit} ({spent} for {clock.to_ns(ticks)} ns, {ticks} ticks)"


@_probe("the virtual timer's mask from another thread")
def _foreign_mask(guest: Guest) -> Answer:
    answers: list[str] = []

    def ask() -> None:
        try:
            answers.append(f"answers {guest.vcpu.vtimer_mask()}")
        except EngineError as error:
            answers.append(str(error))

    other = threading.Thread(target=ask)
    other.start()
    other.join()
    return None, answers[0]


# ---- The hypervisor's own interrupt controller -----------------------------------------------------------------------


def own_gic_probe(library: Any) -> Answer:
    """Whether WFI exits with the framework's own GIC; ``library``: its dynamic library, or None where it has no GIC.

    Its functions are newer than what avmm is linked with, and nothing else needs them: hence not declared in hv.h.
    """
    if library is None:
        return None, "not offered"

    def check(call: str, *arguments: object) -> None:
        code = getattr(library, call)(*arguments)
        if code:
            fail(call, code)

    def make() -> None:
        library.hv_gic_config_create.restype = ctypes.c_void_p
        config = ctypes.c_void_p(library.hv_gic_config_create())
        try:
            check("hv_gic_config_set_distributor_base", config, ctypes.c_uint64(_OWN_GICD))
            check("hv_gic_config_set_redistributor_base", config, ctypes.c_uint64(_OWN_GICR))
            check("hv_gic_create", config)
        finally:
            library.os_release(config)

    guest = Guest("framework", WFI, HVC, prepare=make)
    kick = threading.Timer(0.2, guest.vcpu.kick)
    kick.start()
    try:
        found = guest.run()
    finally:
        kick.cancel()
        guest.close()
    if found is ExitKind.CANCELED:
        return None, "does not exit: the hypervisor sleeps by itself"
    return None, f"{found.name} at PC {guest.vcpu.frame.pc - guest.region.base:+d}"


def _own_gic(engine: str) -> Answer:
    return own_gic_probe(framework_library("hv_gic_create") if engine == "framework" else None)


PROBES["WFI with the hypervisor's own GIC"] = _own_gic, ""


# ---- Registers, memory, VMs ------------------------------------------------------------------------------------------


@_probe("ID_AA64PFR0_EL1.GIC can be set", "reads back as 1")
def _pfr0(guest: Guest) -> Answer:
    value = guest.vcpu.get_sysreg(ID_AA64PFR0_EL1)
    guest.vcpu.set_sysreg(ID_AA64PFR0_EL1, value & ~(0xF << 24) | 1 << 24)
    after = guest.vcpu.get_sysreg(ID_AA64PFR0_EL1)
    return after >> 24 & 0xF == 1, f"{value:#x}, then {after:#x}"


@_probe("MPIDR_EL1 can be set", "reads back")
def _mpidr(guest: Guest) -> Answer:
    guest.vcpu.set_sysreg(MPIDR_EL1, 0x8000_0102)
    after = guest.vcpu.get_sysreg(MPIDR_EL1)
    return after == 0x8000_0102, f"{after:#x}"


@_probe("guest physical addresses", "36 bits or more")
def _addresses(guest: Guest) -> Answer:
    bits = guest.hypervisor.capabilities.ipa_bits
    return bits >= 36, f"{bits} bits, {guest.hypervisor.max_ipa_bits} at most"


@_probe("vCPUs in a VM", "1 or more")
def _vcpus(guest: Guest) -> Answer:
    number = guest.hypervisor.capabilities.max_vcpus
    return number >= 1, str(number)


@_probe("a second VM in the process")
def _second_vm(guest: Guest) -> Answer:
    try:
        open_hypervisor(guest.hypervisor.capabilities.name).close()
    except EngineError as error:
        return None, f"refused: {error}"
    return None, "can be made"


def run(engine: str) -> list[Finding]:
    """Put ``engine`` through every probe. Raises EngineError when it cannot make a VM at all."""
    name = available_engines()[0] if engine == "auto" else engine
    open_hypervisor(name).close()
    topic = f"engine {name}"
    findings = []
    for title, (probe, expected) in PROBES.items():
        try:
            ok, found = on_own_thread(partial(probe, name))
        except Stuck as error:
            findings.append(Finding(topic, title, str(error), False, expected))
            if name == "framework":  # one VM per process, and that one is lost
                findings.append(Finding(topic, "the other probes", "not run: the stuck VM cannot be replaced", False))
                break
            continue
        except AvmmError as error:
            ok, found = False, str(error)
        findings.append(Finding(topic, title, found, ok, expected))
    return findings
