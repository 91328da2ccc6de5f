"""A machine's state out of its parts, and into those of another."""

from __future__ import annotations

from avmm.guest.console import ConsoleState
from avmm.guest.panic import PanicWatch
from avmm.guest.transcript import Transcript
from avmm.hardware import Hardware
from avmm.snapshot.origin import MachineState


async def save_machine(hardware: Hardware, transcript: Transcript, panic: PanicWatch) -> MachineState:
    """The state of a machine that is paused, and of what its console has been seen to show."""
    _ = hardware.board.gic  # or there is none, before anything is touched
    # The vCPUs first: to save one may raise its timer's interrupt.
    vcpus = await hardware.registers()
    hardware.line.flush()
    console = ConsoleState(transcript.save(), panic.save())
    return MachineState(hardware.clock.elapsed, tuple(vcpus), hardware.board.save(), console)


async def restore_machine(hardware: Hardware, transcript: Transcript, panic: PanicWatch, state: MachineState) -> None:
    """Put ``state`` into a machine fresh from reset, whose memory is that of the state already. Raises ConfigError.

    The vCPUs exist afterwards: whoever does not run them closes them.
    """
    transcript.restore(state.console.transcript)
    panic.restore(state.console.panic)
    hardware.board.restore(state.board)
    hardware.board.generation.renew(tell=True)
    for vcpu in hardware.vcpus:
        await vcpu.start()
    hardware.clock.set_elapsed(state.elapsed)
    for vcpu, saved in zip(hardware.vcpus, state.vcpus, strict=True):
        await vcpu.restore(saved)
