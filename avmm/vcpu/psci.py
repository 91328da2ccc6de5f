"""PSCI 1.1 (Arm DEN 0022) and the part of SMCCC 1.1 (DEN 0028) it is found by: a sans-io core.

A call comes in as x0..x7 of an HVC or SMC and goes out as a value for x0, or as an :class:`Action`. Power states
live here, one per vCPU; all calls are made under the VM's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, IntEnum
from typing import Final


class Action(Enum):
    """What a call asks the vCPU loop to do instead of returning a value."""

    OFF = 1  # CPU_OFF: this vCPU sleeps until CPU_ON
    STANDBY = 2  # CPU_SUSPEND: like WFI, then SUCCESS in x0
    POWER_OFF = 3
    RESET = 4


class Power(IntEnum):
    """A vCPU's power state, as AFFINITY_INFO returns it (DEN 0022, 5.7.2)."""

    ON = 0
    OFF = 1
    ON_PENDING = 2


SUCCESS: Final = 0
NOT_SUPPORTED: Final = -1
INVALID_PARAMETERS: Final = -2
ALREADY_ON: Final = -4
ON_PENDING: Final = -5
INVALID_ADDRESS: Final = -9

_SMCCC_VERSION = 0x8000_0000
_SMCCC_ARCH_FEATURES = 0x8000_0001
_VERSION = 0x8400_0000
_CPU_SUSPEND = 0x8400_0001
_CPU_OFF = 0x8400_0002
_CPU_ON = 0x8400_0003
_AFFINITY_INFO = 0x8400_0004
_MIGRATE_INFO_TYPE = 0x8400_0006
_SYSTEM_OFF = 0x8400_0008
_SYSTEM_RESET = 0x8400_0009
_FEATURES = 0x8400_000A
_SYSTEM_RESET2 = 0x8400_0012

_SMC64 = 0x4000_0000
_U32 = 0xFFFF_FFFF

#: An affinity value: Aff3 in bits 39:32, Aff2..Aff0 below; anything else in the argument names no CPU.
_AFFINITY_MASK = 0xFF_00FF_FFFF

#: Bits of CPU_SUSPEND's power_state that must be zero in the original format (DEN 0022, 5.4.2).
_POWER_STATE_RESERVED = 0xFCFE_0000

#: Functions that exist in a 64-bit form as well.
_BOTH_WIDTHS = frozenset({_CPU_SUSPEND, _CPU_ON, _AFFINITY_INFO, _SYSTEM_RESET2})


class _Cpu:
    __slots__ = ("affinity", "context", "entry", "power", "wake")

    def __init__(self, affinity: int, wake: Callable[[], None]) -> None:
        self.affinity = affinity
        self.wake = wake
        self.power = Power.OFF
        self.entry = 0
        self.context = 0


class Psci:
    """Power states of a VM's vCPUs, and the calls that change them.

    ``is_ram(address)`` says whether a vCPU could start there.
    """

    def __init__(self, is_ram: Callable[[int], bool]) -> None:
        self._is_ram = is_ram
        self._cpus: list[_Cpu] = []
        self._functions: dict[int, Callable[[int, Sequence[int]], int | Action]] = {
            _SMCCC_VERSION: lambda index, args: 0x1_0001,
            _SMCCC_ARCH_FEATURES: self._arch_features,
            _VERSION: lambda index, args: 0x1_0001,
            _CPU_SUSPEND: self._cpu_suspend,
            _CPU_OFF: self._cpu_off,
            _CPU_ON: self._cpu_on,
            _AFFINITY_INFO: self._affinity_info,
            _MIGRATE_INFO_TYPE: lambda index, args: 2,  # no trusted OS that would have to migrate
            _SYSTEM_OFF: lambda index, args: Action.POWER_OFF,
            _SYSTEM_RESET: lambda index, args: Action.RESET,
            _FEATURES: self._features,
            _SYSTEM_RESET2: self._system_reset2,
        }

    def connect(self, mpidr: int, wake: Callable[[], None]) -> None:
        """Add the next vCPU, off. ``wake`` is called when it has been turned on."""
        self._cpus.append(_Cpu(mpidr & _AFFINITY_MASK, wake))

    def power(self, index: int) -> Power:
        """The power state of vCPU ``index``."""
        return self._cpus[index].power

    def power_on(self, index: int, entry: int, context: int) -> None:
        """Start vCPU ``index`` at ``entry`` with ``context`` in x0. It must be off."""
        cpu = self._cpus[index]
        cpu.entry = entry
        cpu.context = context
        cpu.power = Power.ON_PENDING
        cpu.wake()

    def starting(self, index: int) -> tuple[int, int] | None:
        """vCPU ``index`` is about to run: where it starts (entry, context), or None when it goes on."""
        cpu = self._cpus[index]
        if cpu.power is not Power.ON_PENDING:
            return None
        cpu.power = Power.ON
        return cpu.entry, cpu.context

    def save(self, index: int) -> tuple[Power, int, int]:
        """vCPU ``index``'s power state, and where it starts if that is still to come (entry, context)."""
        cpu = self._cpus[index]
        return cpu.power, cpu.entry, cpu.context

    def restore(self, index: int, power: Power, entry: int, context: int) -> None:
        """Put a vCPU that has not run yet into a saved power state; one that was on wakes and goes on."""
        if power is Power.ON_PENDING:
            self.power_on(index, entry, context)
        elif power is Power.ON:
            self._cpus[index].power = power
            self._cpus[index].wake()

    def call(self, index: int, args: Sequence[int]) -> int | Action:
        """The call vCPU ``index`` made with x0..x7 = ``args``: what x0 returns, signed, or something to do."""
        function = args[0] & _U32  # the identifier is w0 (DEN 0028, 2.4)
        if function & _SMC64 and function & ~_SMC64 in _BOTH_WIDTHS:
            handler = self._functions.get(function & ~_SMC64)
        else:
            handler = self._functions.get(function)
            args = [args[n] & _U32 for n in range(4)]
        return NOT_SUPPORTED if handler is None else handler(index, args)

    def _features(self, index: int, args: Sequence[int]) -> int:
        function = args[1]
        if function == _SMCCC_ARCH_FEATURES:
            return NOT_SUPPORTED  # asked of SMCCC_ARCH_FEATURES itself; here only SMCCC_VERSION is (DEN 0022, 5.16)
        if function & _SMC64 and function & ~_SMC64 not in _BOTH_WIDTHS:
            return NOT_SUPPORTED
        return SUCCESS if function & ~_SMC64 in self._functions else NOT_SUPPORTED

    def _arch_features(self, index: int, args: Sequence[int]) -> int:
        return SUCCESS if args[1] & _U32 in (_SMCCC_VERSION, _SMCCC_ARCH_FEATURES) else NOT_SUPPORTED

    def _cpu_on(self, index: int, args: Sequence[int]) -> int:
        affinity, entry, context = args[1], args[2], args[3]
        target = next((n for n, cpu in enumerate(self._cpus) if cpu.affinity == affinity), None)
        if target is None:
            return INVALID_PARAMETERS
        power = self._cpus[target].power
        if power is not Power.OFF:
            return ALREADY_ON if power is Power.ON else ON_PENDING
        if entry & 3 or not self._is_ram(entry):
            return INVALID_ADDRESS
        self.power_on(target, entry, context)
        return SUCCESS

    def _cpu_off(self, index: int, args: Sequence[int]) -> Action:
        self._cpus[index].power = Power.OFF
        return Action.OFF

    def _cpu_suspend(self, index: int, args: Sequence[int]) -> int | Action:
        # Power-down states end in standby: we keep the state that the caller was ready to lose, which the
        # specification allows for (a call that did not power down returns SUCCESS; DEN 0022, 5.4.5).
        if args[1] & _U32 & _POWER_STATE_RESERVED:
            return INVALID_PARAMETERS
        return Action.STANDBY

    def _affinity_info(self, index: int, args: Sequence[int]) -> int:
        level = args[2] & _U32
        if level > 3:
            return INVALID_PARAMETERS
        group = _AFFINITY_MASK & -1 << 8 * level
        powers = [cpu.power for cpu in self._cpus if cpu.affinity & group == args[1] & group]
        if not powers or args[1] & ~_AFFINITY_MASK:
            return INVALID_PARAMETERS
        if Power.ON in powers:
            return Power.ON
        return Power.ON_PENDING if Power.ON_PENDING in powers else Power.OFF

    def _system_reset2(self, index: int, args: Sequence[int]) -> int | Action:
        return Action.RESET if args[1] & _U32 == 0 else INVALID_PARAMETERS  # 0: SYSTEM_WARM_RESET; no other exists
