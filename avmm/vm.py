"""A virtual machine: owns, wires, starts, pauses and stops what the other modules make.

::

    created ──start()──► running ⇄ pause()/resume() ⇄ paused ──► stopped

All its tasks live in one TaskGroup inside one supervisor task, so that a guest that dies never cancels the program it
is embedded in; it wakes whoever waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from avmm.aio import cancel, outlast, within
from avmm.attachments import attachments_of, close_all, open_all
from avmm.attachments.agent import AgentAttachment
from avmm.attachments.base import Attachment
from avmm.attachments.net import NetAttachment
from avmm.backends.serial import SerialLine
from avmm.clock import DeadlineTimers
from avmm.config import (
    DriveLike,
    NetLike,
    PublishConfig,
    ShareLike,
    VmConfig,
    VsockConfig,
)
from avmm.describe import read_images
from avmm.equipment import Equipment
from avmm.errors import AvmmError, ConfigError, GuestError, GuestGone, GuestPanic
from avmm.faults import Faults
from avmm.guest.console import Console
from avmm.guest.exec import AgentExec, Commands, Exec
from avmm.guest.panic import PanicWatch
from avmm.guest.shell import ShellExec
from avmm.hardware import Hardware
from avmm.log import log, recent
from avmm.memory import GuestMemory
from avmm.monitor import Monitor
from avmm.snapshot.machine import restore_machine, save_machine
from avmm.snapshot.origin import Origin
from avmm.vcpu.loop import Event
from avmm.vcpu.loop import Outcome as VcpuOutcome
from avmm.vcpu.state import VcpuState

if TYPE_CHECKING:
    from avmm.guest.screen import Screen


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a VM ended.

    ``reason`` is ``"power-off"``, ``"reset"`` (only where resets are not followed), ``"panic"``, ``"fault"`` or
    ``"stopped"`` (by the host). ``error`` says more of a panic (GuestPanic) or a fault (GuestError, or EngineError).
    """

    reason: str
    error: AvmmError | None = None


class VirtualMachine(Commands, Equipment):
    """One virtual machine. Make it inside a running event loop, then ``async with`` it, or ``start`` and ``stop`` it.

    ``keep_output``: how many bytes of console output to remember at least; None remembers all. ``monitor``: let
    ``avmm top`` see this VM. ``trace``: a file for a timeline of its whole life, which Perfetto opens. ``origin``: the
    machine it continues, which it closes; without one it boots its kernel.
    """

    def __init__(
        self,
        config: VmConfig,
        *,
        origin: Origin | None = None,
        keep_output: int | None = None,
        monitor: bool = False,
        trace: str | os.PathLike[str] | None = None,
    ) -> None:
        Equipment.__init__(self, config)
        #: time.monotonic() of what has happened so far, in order.
        self.timeline: dict[str, float] = {}
        self._panic = PanicWatch(self._guest_is_dead)
        self._line = SerialLine(self._printed)
        self.console = Console(self._line, keep_output)
        self.console.listen(self._panic.feed)
        self._log = log.bind(kernel=os.fspath(config.kernel))
        self._memory = GuestMemory()
        self._hardware: Hardware | None = None
        self._origin = origin
        self._images = None if origin is None else origin.images
        self._keep_output = keep_output
        self._stilling = asyncio.Lock()  # held by whoever pauses or resumes
        self._running = asyncio.Event()  # cleared while paused
        self._running.set()
        self._monitor = Monitor(self.stats, {"snapshot": self.snapshot}) if monitor else None
        self._trace_to = trace
        self._loop = asyncio.get_running_loop()
        self._shell = ShellExec(self.console)  # where there is no agent
        self._stopping = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._outcome: Outcome | None = None

    # Life.

    async def __aenter__(self) -> VirtualMachine:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Load the images, create the machine and let it run. Raises ImageError, EngineError or ConfigError."""
        if self.state != "created":
            raise ConfigError(f"a VM starts once; this one is {self.state}")
        config, origin = self.config, self._origin
        if origin is None:
            await self._read_images()
        timers = DeadlineTimers(asyncio.get_running_loop())
        hardware = None
        try:
            attachments = attachments_of(config) if origin is None else origin.attachments
            await asyncio.to_thread(open_all, attachments)
            self._attachments = attachments
            image = None if origin is None else origin.image
            hardware = Hardware(
                config, attachments, self._line, self._memory, timers, image=image, trace=self._trace_to
            )
            self._hardware = hardware
            if origin is None:
                await self._load(hardware)
            else:
                for each in self._all(AgentAttachment):
                    each.agent.renew = True
                origin.check(config.cpus, config.memory)
                await restore_machine(hardware, self.console.transcript, self._panic, origin.state)
        except BaseException:
            if hardware is not None:
                await hardware.abandon()
            timers.close()
            await asyncio.to_thread(close_all, self._attachments)
            raise
        finally:
            self._origin = None
            if origin is not None:
                origin.close()
        self._mark("engine ready")
        self.state = "running"
        self._supervisor = asyncio.create_task(self._supervise(hardware, timers))
        self._log.info("vm.started", memory=config.memory, cpus=config.cpus, engine=hardware.capabilities.name)

    async def wait(self, *, timeout: float | None = None) -> Outcome:
        """Return when the VM has ended. Cancelling this does not stop it, nor does ``timeout``: seconds until this
        raises WaitTimeout."""
        if self._supervisor is None:
            raise ConfigError("this VM has not been started")
        async with within(timeout, "the VM was still running"):
            await asyncio.shield(self._supervisor)
        assert self._outcome is not None
        return self._outcome

    async def stop(self) -> None:
        """End the VM, whatever it is doing, and release everything it has. Does nothing a second time."""
        self._stopping.set()
        if self._supervisor is not None:
            await outlast(self._supervisor)
        self.state = "stopped"

    async def pause(self) -> None:
        """Every vCPU comes to rest outside the guest, then the devices; the guest's time stands still.

        Cancelled, it leaves the VM running.
        """
        async with self._stilling:
            await self._pause()

    async def resume(self) -> None:
        """Go on after :meth:`pause`."""
        async with self._stilling:
            self._expect_state("paused")
            self._resume()

    async def _pause(self) -> None:
        self._expect_state("running")
        self.state = "paused"
        self._running.clear()
        try:
            await self._machine.pause()
        except BaseException:
            self._resume()
            raise

    def _resume(self) -> None:
        """From any point of :meth:`_pause` on; also when the VM has ended meanwhile."""
        if self.state == "paused":
            self.state = "running"
        self._running.set()
        self._machine.resume()

    @property
    def _machine(self) -> Hardware:
        """The hardware of a VM that has been started."""
        assert self._hardware is not None
        return self._hardware

    # Twins.

    def fork(self, *, pcap: str | os.PathLike[str] | None = None) -> Booting:
        """A twin of this VM as it is now: ``async with vm.fork() as twin: ...``, or ``await vm.fork()``.

        Memory is shared until either writes to it; what the twin writes to its disks is its own and forgotten with it.
        This VM stands still for some milliseconds and then runs on, whatever happens to the twin. What was typed at its
        console and not taken yet is not typed at the twin's. ``pcap`` names a file that records its first network.
        Raises ConfigError where the engine runs one VM only, or the VM is not running or paused or has something that
        cannot be forked, and GuestGone when it ends meanwhile.
        """
        return Booting(lambda: self._twin(None if pcap is None else Path(pcap)))

    async def _twin(self, pcap: Path | None) -> VirtualMachine:
        if pcap is not None and not self.config.nets:
            raise ConfigError("a recording (pcap) takes a network, and this VM has none")
        async with self._still():
            engine = self._machine.capabilities
            if not engine.many_vms:
                raise ConfigError(f"{engine.name} runs one VM in a process: fork with --engine softhv")
            origin = await self._capture()
        config = self.config
        if config.nets:  # of which the recordings are this VM's
            first, *others = (replace(each, pcap=None) for each in config.nets)
            config = replace(config, nets=(replace(first, pcap=pcap), *others))
            networks = (each for each in origin.attachments if isinstance(each, NetAttachment))
            next(networks).record(pcap)
        return VirtualMachine(config, origin=origin, keep_output=self._keep_output)

    async def snapshot(self, path: str | os.PathLike[str]) -> None:
        """Write this VM as it is now to the file ``path``, from which :func:`restore` and ``avmm restore`` go on.

        The VM stands still for some milliseconds, on Apple's framework for as long as the writing takes. Disks that may
        be written to are in the file with all they hold, ``ro`` and ``snapshot`` ones refer to theirs, which must not
        change. The file appears when it is complete. Raises ConfigError for a path that cannot be, HostError when it
        cannot be written, and else as :meth:`fork`.
        """
        async with contextlib.AsyncExitStack() as pause:
            await pause.enter_async_context(self._still())
            origin = await self._capture()
            try:
                engine = self._machine.capabilities
                if engine.many_vms:
                    await pause.aclose()
                config = replace(self.config, engine=engine.name) if self.config.engine == "auto" else self.config
                from avmm.snapshot import store  # with a library that others need not wait for

                await store.write(origin, config, Path(path))
            finally:
                origin.close()

    @contextlib.asynccontextmanager
    async def _still(self) -> AsyncIterator[None]:
        """Paused inside the block, whether it was before or not."""
        async with self._stilling:
            if self.state == "paused":
                yield
                return
            await self._pause()
            try:
                yield
            finally:
                self._resume()

    async def _capture(self) -> Origin:
        """The machine as it is, for another VM or a file. Paused."""
        hardware = self._machine
        if self._outcome is not None or not hardware.alive:
            raise GuestGone("the guest has ended, or is about to reset: there is nothing left of it")
        state = await save_machine(hardware, self.console.transcript, self._panic)
        attachments: list[Attachment] = []
        try:
            attachments += (each.fork() for each in self._attachments)
            return Origin(state, hardware.ram(), attachments, self._images)
        except BaseException:
            close_all(attachments)
            raise

    @property
    def outcome(self) -> Outcome | None:
        """How the VM ended; None while it has not."""
        return self._outcome

    @property
    def memory(self) -> GuestMemory:
        """The guest's RAM."""
        return self._memory

    @property
    def _exec(self) -> Exec:
        """See :class:`Commands`."""
        if asyncio.get_running_loop() is not self._loop:
            raise ConfigError(
                "this VM lives on another event loop: use it where it was made; in pytest, a fixture with "
                "loop_scope='session' may use the vm fixture"
            )
        agents = self._all(AgentAttachment)
        return AgentExec(agents[0].agent) if agents else self._shell

    async def wait_ready(self, *, timeout: float | None = None) -> None:
        """Return when commands can be run in the guest; they wait for that by themselves. Raises as they do."""
        async with within(timeout, "no agent had started in the guest"):
            for each in self._all(AgentAttachment):
                await each.agent.wait_ready()

    @property
    def screen(self) -> Screen:
        """What a terminal on the serial console would show. Raises ConfigError without ``avmm[screen]``."""
        return self.console.screen

    def hold_output(self, hold: bool) -> None:
        """While held, the guest's UART says that it cannot send: for a host that is slower than the guest."""
        if self._hardware is not None:
            self._hardware.board.uart.tx_blocked = hold

    def counters(self) -> dict[str, Any]:
        """Plain numbers, none before the start: ``exits`` by kind over all vCPUs, ``uart_batched``: accesses of the
        UART that needed none, injected ``faults``, ``vcpus``: a dictionary each, and ``guest_errors``: how often since
        its last reset the guest broke a virtio device's rules, by device."""
        return {} if self._hardware is None else self._hardware.counters()

    def stats(self) -> dict[str, Any]:
        """What ``avmm top`` shows, as plain data: the configuration, CPU times, counters, histograms. On the loop."""
        hardware = self._hardware
        return {
            "name": os.path.basename(self.config.kernel),
            "state": self.state,
            "engine": None if hardware is None else hardware.capabilities.name,
            "memory": self.config.memory,
            "cpu_ns": time.process_time_ns(),
            "loop_cpu_ns": time.thread_time_ns(),
            "vcpus": [] if hardware is None else hardware.stats(),
        }

    async def registers(self) -> list[VcpuState]:
        """Each vCPU's registers now; the VM stands still for a moment. Raises GuestGone when it has ended."""
        async with self._still():
            if self._outcome is not None or not self._machine.alive:
                raise GuestGone("the VM has ended, and has no registers any more")
            return await self._machine.registers()

    def describe_state(self) -> dict[str, Any]:
        """What there is to know of the VM besides its vCPUs and memory, as plain data: for people to read."""
        return {
            "state": self.state,
            "outcome": None
            if self._outcome is None
            else {"reason": self._outcome.reason, "error": self._outcome.error},
            "config": repr(self.config),
            "timeline": self.timeline,
            "counters": self.counters(),
            "devices": [] if self._hardware is None else [each.describe() for each in self._hardware.board.virtio],
            "log": list(recent),
        }

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The vCPUs come to rest at their next exit while the block, which awaits nothing, runs. Time goes on."""
        lock = contextlib.nullcontext() if self._hardware is None else self._hardware.lock
        with lock:  # which they need for whatever they come out for: a tick, at the latest
            yield

    # The machine between power-on and reset.

    async def _read_images(self) -> None:
        if self._images is None:  # reading and unpacking take a while: not on the event loop
            self._images = await asyncio.to_thread(read_images, self.config)

    async def _load(self, hardware: Hardware) -> None:
        assert self._images is not None
        loading = asyncio.to_thread(hardware.load, *self._images)
        await outlast(asyncio.create_task(loading))  # before anybody takes the memory away

    async def _supervise(self, hardware: Hardware, timers: DeadlineTimers) -> None:
        outcome = Outcome("stopped")
        monitoring = None if self._monitor is None else asyncio.create_task(self._monitor.run())
        try:
            while True:
                outcome = self._judge(await self._run(hardware))
                if outcome.reason != "reset" or not self.config.reboot or self._stopping.is_set():
                    break
                self._log.info("vm.rebooting")
                await self._running.wait()
                await self._read_images()
                hardware.reset()
                await self._load(hardware)
        except AvmmError as error:
            outcome = Outcome("fault", error)
        finally:
            self._line.close()  # delivers the last output
            self._mark("end")
            self.state = "stopped"
            self._outcome = outcome
            self._images = None
            timers.close()
            hardware.close()
            try:
                await asyncio.to_thread(close_all, self._attachments)
            except AvmmError as error:
                outcome = self._outcome = Outcome("fault", error)
            for agent in self._all(AgentAttachment):
                agent.agent.close(_why_gone(outcome))
            for each in self._attachments:
                each.gone()
            self.console.transcript.close(_why_gone(outcome))
            if monitoring is not None:
                await cancel(monitoring)
            self._log.info("vm.ended", reason=outcome.reason, error=str(outcome.error or ""))

    async def _run(self, hardware: Hardware) -> VcpuOutcome:
        """From where the vCPUs are until one reports an end, or :meth:`stop`; leaves no task and no thread."""
        await hardware.prepare()
        async with asyncio.TaskGroup() as tasks:
            coroutines = hardware.work() + [each.run() for each in self._attachments]
            work = [tasks.create_task(coroutine) for coroutine in coroutines]
            self._mark("first instruction")
            runs = [tasks.create_task(vcpu.report()) for vcpu in hardware.vcpus]
            stopping = tasks.create_task(self._stopping.wait())
            done, _ = await asyncio.wait((*runs, stopping), return_when=asyncio.FIRST_COMPLETED)
            ended = [task.result() for task in runs if task in done]
            for vcpu in hardware.vcpus:
                await vcpu.stop()
            await asyncio.wait(runs)
            await cancel(stopping, *work)
        return ended[0] if ended else VcpuOutcome(Event.STOP, 0)

    def _judge(self, ended: VcpuOutcome) -> Outcome:
        self._line.flush()  # what it printed last may tell why, and may not have been delivered yet
        if self._panic.reason is not None:
            return Outcome("panic", GuestPanic(self._panic.reason))
        if ended.event is Event.FAULT:
            return Outcome("fault", ended.error)
        return Outcome({Event.POWER_OFF: "power-off", Event.RESET: "reset"}.get(ended.event, "stopped"))

    # Small things.

    def _printed(self, data: bytes) -> None:
        self._mark("first console byte")
        self.console.transcript.feed(data)

    def _guest_is_dead(self) -> None:
        """The kernel has panicked and stays down: nothing more will come of it."""
        self._stopping.set()

    def _mark(self, name: str) -> None:
        self.timeline.setdefault(name, time.monotonic())


class Booting:
    """What :func:`boot`, :func:`restore` and :meth:`VirtualMachine.fork` return: await it, or ``async with`` it."""

    def __init__(self, make: Callable[[], Awaitable[VirtualMachine]]) -> None:
        self._make = make
        self._vm: VirtualMachine | None = None

    def __await__(self) -> Generator[Any, None, VirtualMachine]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> VirtualMachine:
        vm = self._vm = await self._make()
        await vm.start()
        return vm

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._vm is not None
        await self._vm.stop()


def boot(
    kernel: str | os.PathLike[str],
    initrd: str | os.PathLike[str] | None = None,
    *,
    memory: str | int = "512M",
    cpus: int = 1,
    append: str = "",
    cmdline: str | None = None,
    engine: str = "auto",
    reboot: bool = True,
    drives: Sequence[DriveLike] = (),
    ports: Sequence[str] = (),
    net: NetLike | Sequence[NetLike] = "none",
    publish: Sequence[str | PublishConfig] = (),
    pcap: str | os.PathLike[str] | None = None,
    shares: Sequence[ShareLike] = (),
    vsock: bool | Sequence[str | VsockConfig] = False,
    halt_poll: str | int = 0,
    irqchip: str = "avmm",
    keep_output: int | None = None,
    monitor: bool = False,
    trace: str | os.PathLike[str] | None = None,
    faults: str | Faults | None = None,
    agent: bool = True,
) -> Booting:
    """A running virtual machine: ``async with avmm.boot(kernel, initrd, memory="512M", cpus=2) as vm: ...``

    Also ``vm = await avmm.boot(...)``, which you end yourself with ``await vm.stop()``. ``append`` is added to the
    default kernel command line, ``cmdline`` replaces it; ``reboot=False`` ends the VM when the guest resets;
    ``drives`` are disks: paths with options as for ``--drive``, or DriveConfig; they are ``vm.drives`` then.
    ``shares`` are folders of the host: paths with options as for ``--share``, or ShareConfig.
    ``vsock``: ports with their sockets, as for ``--vsock``, or True; ``vm.vsock`` then.
    ``ports`` names ports of a virtio console, ``vm.ports`` then: a terminal (``hvc0``) or any other name, a channel.
    ``net`` is a network or several: a Switch, text as for ``--net``; ``vm.nets`` then, the first is ``vm.net``.
    ``publish`` lists ports of the guest's as for ``--publish``; ``pcap`` names a file that records the first network.
    ``keep_output`` bounds how many bytes of console output are remembered; ``monitor`` lets ``avmm top`` see the VM;
    ``trace`` names a file for a timeline that Perfetto opens; ``faults`` makes softhv misbehave (:mod:`avmm.faults`).
    ``agent``: put avmm's agent into the initrd, where there is one, so that ``vm.run("uname", "-r")`` and the like work
    (:class:`avmm.guest.exec.Commands`).
    ``halt_poll``: how long at most, in nanoseconds or as ``"200us"``, a vCPU polls before it sleeps (docs/wfi.md).
    ``irqchip``: ``"hypervisor"`` for the engine's own interrupt controller (docs/wfi.md).
    Raises ConfigError at once, ImageError and EngineError when it starts.
    """
    config = VmConfig.resolve(
        kernel,
        initrd,
        memory=memory,
        cpus=cpus,
        append=append,
        cmdline=cmdline,
        engine=engine,
        reboot=reboot,
        faults=faults,
        drives=drives,
        ports=ports,
        net=net,
        publish=publish,
        pcap=pcap,
        shares=shares,
        vsock=vsock,
        agent=agent,
        halt_poll=halt_poll,
        irqchip=irqchip,
    )

    async def make() -> VirtualMachine:
        return VirtualMachine(config, keep_output=keep_output, monitor=monitor, trace=trace)

    return Booting(make)


def restore(
    path: str | os.PathLike[str],
    *,
    keep_output: int | None = None,
    monitor: bool = False,
    trace: str | os.PathLike[str] | None = None,
) -> Booting:
    """The machine in a file that :meth:`VirtualMachine.snapshot` wrote: ``async with avmm.restore(path) as vm: ...``

    It goes on from that moment, as often as you like; what it writes to its disks is forgotten when it ends. Its time
    goes on from where it stood. Memory is read when it is used: the file must not be written to meanwhile. Restore only
    what you trust as you would trust the guest, for the file names others. Raises ImageError for a file that is not
    whole, or not ours, and else as :func:`boot`.
    """

    async def make() -> VirtualMachine:
        from avmm.snapshot import store  # see above

        config, origin = store.load(Path(path))  # it is short
        return VirtualMachine(config, origin=origin, keep_output=keep_output, monitor=monitor, trace=trace)

    return Booting(make)


def _why_gone(outcome: Outcome) -> GuestError:
    if isinstance(outcome.error, GuestError):
        return outcome.error
    texts = {"power-off": "the guest powered off", "reset": "the guest reset", "stopped": "the VM was stopped"}
    return GuestGone(texts.get(outcome.reason, f"the VM failed: {outcome.error}"), outcome.reason)
