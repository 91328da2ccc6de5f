"""The host's side of the agent in the guest: starts commands there, and knows when the agent is gone.

:meth:`Agent.run` is the work, for the life of the machine: wait for the agent to open its port, say who we are, then
pass on what it says. An agent that breaks its protocol is not spoken to any more.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from avmm.aio import cancel
from avmm.errors import ConfigError, GuestError, GuestGone
from avmm.guest import protocol
from avmm.guest.process import Process
from avmm.guest.protocol import Frame, Parser, Spawn

#: The virtio console port the agent looks for (firmware/agent/agent.c).
PORT: Final = "avmm.agent"

#: Commands at once; the agent has room for as many.
COMMANDS_MAX: Final = 256

#: What a command finds in its environment, unless told otherwise.
ENVIRONMENT: Final = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}

_READ: Final = 256 * 1024


class Channel(Protocol):
    """The host's end of the port: :class:`avmm.backends.port.Port`."""

    def write(self, data: bytes) -> None:
        """Queue ``data`` for the guest."""
        ...

    async def read(self, limit: int) -> bytes:
        """What the guest has written, waiting for the first byte; nothing when the guest is gone."""
        ...

    async def wait_open(self) -> None:
        """Return when the guest has the port open, or is gone."""
        ...

    async def wait_shut(self) -> None:
        """Return when the guest does not have the port open."""
        ...


def image() -> bytes:
    """The agent itself, a static arm64 program."""
    from importlib.resources import files  # not for those who only talk to it

    return files("avmm.guest").joinpath("agent.elf").read_bytes()


class Agent:
    """Commands in the guest behind ``channel``."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._numbers = itertools.count(1)
        self._processes: dict[int, Process] = {}
        self._ready = asyncio.Event()  # an agent answers, or none ever will
        self._gone: GuestError | None = None
        self._ended: GuestError | None = None  # why the last agent is gone, when none is known to follow
        self._resets = 0
        #: The guest is a copy of another: with the first words its clock is set, and its random pool reseeded.
        self.renew = False

    @property
    def ready(self) -> bool:
        """Whether commands can be started now."""
        return self._ready.is_set() and self._gone is None and self._ended is None

    async def wait_ready(self) -> None:
        """Return when commands can be started. Raises the reason when the guest or its agent is gone."""
        await self._ready.wait()
        if reason := self._gone or self._ended:
            raise reason

    async def start(
        self,
        argv: Sequence[str | bytes | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] = "/",
        pty: bool = False,
        size: tuple[int, int] = (80, 24),
        input: bool = True,
        builtin: bool = False,
        gather: int = 0,
    ) -> Process:
        """Start a command; ``env`` is added to :data:`ENVIRONMENT`, ``size`` is its terminal's columns and rows,
        ``gather``: see :class:`avmm.guest.process.Output`. Raises ConfigError for what cannot be sent."""
        words = [os.fsencode(word) for word in argv]
        variables = {os.fsencode(name): os.fsencode(value) for name, value in {**ENVIRONMENT, **(env or {})}.items()}
        spawn = Spawn(words, variables, os.fsencode(cwd), pty=pty, builtin=builtin, input=input, size=size)
        try:
            payload = spawn.encode()
        except ValueError as error:
            raise ConfigError(f"this command cannot be sent: {error}") from None
        await self.wait_ready()
        if len(self._processes) >= COMMANDS_MAX:
            raise ConfigError(f"a guest runs up to {COMMANDS_MAX} commands at once")
        number = next(self._numbers)
        names = [os.fsdecode(word) for word in words]
        process = Process(self._channel.write, number, names, input=input, merged=pty, gather=gather)
        self._processes[number] = process
        self._channel.write(protocol.encode(protocol.SPAWN, number, payload))
        return process

    async def run(self) -> None:
        """Speak with one agent after another; until cancelled."""
        while True:
            await self._channel.wait_open()
            if self._ended is not None:
                self._ended = None
                self._ready.clear()
            resets = self._resets
            try:
                await self._speak()
            except GuestError as error:
                self._end(error, resets)
                await self._channel.wait_shut()
            else:
                self._end(GuestGone("the agent in the guest has ended", "agent"), resets)

    async def _speak(self) -> None:
        """With one agent, until it closes the port. Raises GuestError when it breaks the rules."""
        nonce = os.urandom(protocol.NONCE_SIZE)
        parser = Parser(nonce)
        clock, seed = (time.time_ns(), os.urandom(protocol.SEED_SIZE)) if self.renew else (None, None)
        self._channel.write(protocol.sync(nonce, clock, seed))
        listening = asyncio.create_task(self._listen(parser))
        shut = asyncio.create_task(self._channel.wait_shut())
        try:
            await asyncio.wait((listening, shut), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel(shut, listening)

    async def _listen(self, parser: Parser) -> None:
        while data := await self._channel.read(_READ):
            for frame in parser.feed(data):
                self._receive(frame)
            if parser.synchronised:
                self._ready.set()

    def _receive(self, frame: Frame) -> None:
        process = self._processes.get(frame.command)
        if process is None:
            return  # of a command that is forgotten
        process.receive(frame)
        if frame.type == protocol.EXIT:
            del self._processes[frame.command]

    def _end(self, reason: GuestError, resets: int) -> None:
        if resets == self._resets and self._gone is None:
            self._lose(reason)
            self._ended = reason
            self._ready.set()

    def reset(self) -> None:
        """The guest was reset: whoever waits for a command is told, and who waits for an agent waits for the next."""
        self._resets += 1
        self._ended = None
        self._lose(GuestGone("the guest was reset", "reset"))

    def _lose(self, reason: GuestError) -> None:
        if self._gone is None:
            self._ready.clear()
        processes, self._processes = self._processes, {}
        for process in processes.values():
            process.fail(reason)

    def close(self, reason: GuestError) -> None:
        """The guest is gone for good."""
        if self._gone is None:
            self._lose(reason)
            self._gone = reason
            self._ready.set()
