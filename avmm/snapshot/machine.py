"""A machine's state out of its parts, and into those of another."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from avmm.backends.serial import SerialLine
from avmm.board import Board
from avmm.clock import Clock
from avmm.guest.console import ConsoleState
from avmm.guest.panic import PanicWatch
from avmm.guest.transcript import Transcript
from avmm.snapshot.origin import MachineState
from avmm.vcpu.loop import VcpuLoop


@dataclass(frozen=True, slots=True)
class Parts:
    """Of one VM, between two resets of its machine."""

    vcpus: Sequence[VcpuLoop]
    board: Board
    clock: Clock
    line: SerialLine
    transcript: Transcript
    panic: PanicWatch


async def save_machine(parts: Parts) -> MachineState:
    """The state of a machine that is paused."""
    _ = parts.board.gic  # or there is none, before anything is touched
    # The vCPUs first: to save one may raise its timer's interrupt.
    vcpus = await asyncio.gather(*(vcpu.save() for vcpu in parts.vcpus))
    parts.line.flush()
    console = ConsoleState(parts.transcript.save(), parts.panic.save())
    return MachineState(parts.clock.elapsed, tuple(vcpus), parts.board.save(), console)


async def restore_machine(parts: Parts, state: MachineState) -> None:
    """Put ``state`` into a machine fresh from reset, whose memory is that of the state already. Raises ConfigError.

    The vCPUs exist afterwards: whoever does not run them closes them.
    """
    parts.transcript.restore(state.console.transcript)
    parts.panic.restore(state.console.panic)
    parts.board.restore(state.board)
    parts.board.generation.renew(tell=True)
    for vcpu in parts.vcpus:
        await vcpu.start()
    parts.clock.set_elapsed(state.elapsed)
    for vcpu, saved in zip(parts.vcpus, state.vcpus, strict=True):
        await vcpu.restore(saved)
