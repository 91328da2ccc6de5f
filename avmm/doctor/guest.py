"""The guest of a probe: 64 KiB of RAM, one vCPU, a few instructions at EL1 with the MMU off."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from avmm.errors import AvmmError, EngineError
from avmm.hypervisor import ExitKind, Finish, Reg, open_hypervisor, sysreg
from avmm.hypervisor._native import NativeHypervisor, NativeVcpu
from avmm.memory import GRANULE, Region

T = TypeVar("T")

RAM: Final = 0x4000_0000
VECTORS: Final = RAM + 0x4000
DATA: Final = RAM + 0x8000
MMIO: Final = 0x0900_0000

#: Seconds until a guest that does not come out by itself is kicked, and until its probe is given up.
_KICK_AFTER: Final = 5.0
_GIVE_UP_AFTER: Final = 15.0

_EL1H_MASKED: Final = 0x3C5
_HVC_1: Final = 0xD4000022
_VBAR_EL1: Final = sysreg(3, 0, 12, 0, 0)


class Stuck(AvmmError):
    """A probe that never came back; its VM is still there, so that no other can be made on some hosts."""


class Guest:
    """A VM and one vCPU on the calling thread, about to run ``words``. Exceptions lead to ``hvc #1``.

    ``prepare`` is called when there is a VM and no vCPU yet.
    """

    def __init__(self, engine: str, *words: int, prepare: Callable[[], None] = lambda: None) -> None:
        with contextlib.ExitStack() as stack:
            hypervisor = open_hypervisor(engine)
            stack.callback(hypervisor.close)
            if not isinstance(hypervisor, NativeHypervisor):
                raise EngineError(f"engine {engine} has no hv_* interface to probe")
            self.hypervisor = hypervisor
            self.region = Region(RAM, mmap.mmap(-1, 4 * GRANULE))
            self.poke(RAM, *words)
            for offset in range(0, 0x800, 0x80):
                self.poke(VECTORS + offset, _HVC_1)
            hypervisor.map(self.region)
            prepare()
            self.vcpu: NativeVcpu = hypervisor.create_vcpu()
            stack.callback(self.vcpu.close)
            self.vcpu.set_reg(Reg.PC, RAM)
            self.vcpu.set_reg(Reg.CPSR, _EL1H_MASKED)
            self.vcpu.set_sysreg(_VBAR_EL1, VECTORS)
            watchdog = threading.Timer(_KICK_AFTER, self.vcpu.kick)
            watchdog.daemon = True
            watchdog.start()
            stack.callback(watchdog.cancel)
            self._closing = stack.pop_all()

    def poke(self, gpa: int, *words: int) -> None:
        """Store instructions."""
        at = gpa - RAM
        self.region.buffer[at : at + 4 * len(words)] = b"".join(word.to_bytes(4, "little") for word in words)

    def peek(self, gpa: int) -> int:
        """Load eight bytes."""
        return int.from_bytes(self.region.buffer[gpa - RAM : gpa - RAM + 8], "little")

    def run(self, finish: Finish = Finish.NONE, result: int = 0) -> ExitKind:
        """Finish the last exit, run to the next one."""
        self.vcpu.frame.finish = finish
        self.vcpu.frame.result = result
        return ExitKind(self.vcpu.run())

    @property
    def pc(self) -> int:
        """Where it is, relative to its first instruction."""
        return self.vcpu.get_reg(Reg.PC) - RAM

    def close(self) -> None:
        """Give everything back."""
        self._closing.close()
        self.region.buffer.close()


def on_own_thread(probe: Callable[[], T]) -> T:
    """``probe()`` on a thread of its own, which vCPUs are bound to; what it raises, or Stuck."""
    results: list[T] = []
    errors: list[BaseException] = []

    def main() -> None:
        try:
            results.append(probe())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    thread.join(_GIVE_UP_AFTER)
    if errors:
        raise errors[0]
    if not results:
        raise Stuck(f"no answer for {_GIVE_UP_AFTER:g} s, not even when kicked")
    return results[0]
