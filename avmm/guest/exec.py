"""Commands in the guest as a test writes them: run, check, popen, put, get.

Two ways to reach a guest have the same methods, as far as they can: :class:`AgentExec` through avmm's agent, and
:class:`avmm.guest.shell.ShellExec` through a shell on the serial console.
"""

from __future__ import annotations

import asyncio
import os
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from avmm.aio import within
from avmm.errors import ConfigError, GuestError, HostError
from avmm.guest import tree
from avmm.guest.agent import Agent
from avmm.guest.process import Process

#: What may name a word of a command.
Word = str | bytes | os.PathLike[str]

#: Bytes of output that a command run to its end may print on a stream; :func:`popen` has no bound.
OUTPUT_MAX: Final = 256 << 20

_PUT_AHEAD: Final = 1 << 20


@dataclass
class Completed:
    """A command that has ended. ``returncode`` is -N when signal N killed it."""

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes = b""
    stderr: bytes = b""

    @property
    def ok(self) -> bool:
        """Whether it ended with 0."""
        return self.returncode == 0


class CommandFailed(GuestError, Completed):
    """What :meth:`check` raises when a command has not ended with 0; it is the result, too."""

    def __init__(self, argv: tuple[str, ...], returncode: int, stdout: bytes = b"", stderr: bytes = b"") -> None:
        Completed.__init__(self, argv, returncode, stdout, stderr)
        said = (stderr or stdout).decode(errors="replace").strip()
        how = f"ended with {returncode}" if returncode >= 0 else f"was killed by signal {-returncode}"
        super().__init__(f"{shlex.join(argv)} {how}" + (f"; it said:\n{said[-2000:]}" if said else ""))

    def __reduce__(self) -> tuple[type[CommandFailed], tuple[object, ...]]:
        return type(self), (self.argv, self.returncode, self.stdout, self.stderr)


class Exec(Protocol):
    """A way to run commands in a guest."""

    async def run(
        self, argv: tuple[Word, ...], input: bytes | None, env: Mapping[str, str] | None, cwd: Word
    ) -> Completed:
        """Run a command to its end. When cancelled, it is killed."""
        ...

    async def popen(
        self, argv: tuple[Word, ...], env: Mapping[str, str] | None, cwd: Word, pty: bool, size: tuple[int, int]
    ) -> Process:
        """Start a command."""
        ...

    async def put(self, source: Word | Path, content: bytes | None, target: str, mode: int) -> None:
        """Copy a file, a tree, or ``content`` into the guest."""
        ...

    async def get(self, source: str, target: Path | None) -> bytes:
        """Copy a file or tree out of the guest to ``target``; without one, a file, whose content is returned."""
        ...


class AgentExec:
    """Through the agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def run(
        self, argv: tuple[Word, ...], input: bytes | None, env: Mapping[str, str] | None, cwd: Word
    ) -> Completed:
        """See :class:`Exec`."""
        process = await self._agent.start(argv, env=env, cwd=os.fsdecode(cwd), input=bool(input), gather=OUTPUT_MAX)
        if process.stdin is not None:
            process.stdin.write(input or b"")
            process.stdin.write_eof()
        return await self._end(process)

    async def popen(
        self, argv: tuple[Word, ...], env: Mapping[str, str] | None, cwd: Word, pty: bool, size: tuple[int, int]
    ) -> Process:
        """See :class:`Exec`."""
        return await self._agent.start(argv, env=env, cwd=os.fsdecode(cwd), pty=pty, size=size)

    async def _end(self, process: Process) -> Completed:
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            process.kill()
            raise
        if process.overflowed:
            raise GuestError(f"{shlex.join(process.argv)} printed more than {OUTPUT_MAX >> 20} MiB: use popen for that")
        return Completed(tuple(process.argv), code, *(bytes(each.gathered) for each in process.outputs.values()))

    async def put(self, source: Word | Path, content: bytes | None, target: str, mode: int) -> None:
        """See :class:`Exec`."""
        if content is None:
            path = Path(os.fsdecode(source))
            if target.endswith("/"):
                target += path.name
            pieces = tree.pack(path)
        else:
            pieces = tree.pack_bytes(content, mode)
        process = await self._agent.start(["put", target], builtin=True, gather=OUTPUT_MAX)
        assert process.stdin is not None
        try:
            while piece := await asyncio.to_thread(_gather, pieces):
                process.stdin.write(piece)
                await process.stdin.drain()
            process.stdin.write_eof()
        except BrokenPipeError:
            pass  # it has failed, and says why
        except OSError as error:
            process.kill()
            raise HostError(f"cannot read {error.filename or os.fsdecode(source)}: {error.strerror}") from error
        except BaseException:
            process.kill()
            raise
        done = await self._end(process)
        if done.returncode:
            raise CommandFailed(done.argv, done.returncode, done.stdout, done.stderr)

    async def get(self, source: str, target: Path | None) -> bytes:
        """See :class:`Exec`."""
        process = await self._agent.start(["get", source], builtin=True, input=False)
        unpacker = tree.Unpacker(target)
        try:
            while data := await process.stdout.read(_PUT_AHEAD):
                if target is None:
                    unpacker.feed(data)
                    if len(unpacker.content) > OUTPUT_MAX:
                        raise GuestError(f"{source} has more than {OUTPUT_MAX >> 20} MiB: name a target for it")
                else:
                    await asyncio.to_thread(unpacker.feed, data)
        except BaseException:
            process.kill()
            raise
        finally:
            unpacker.close()
        assert process.stderr is not None
        said = await process.stderr.read()
        code = await process.wait()
        if code or not unpacker.ended:
            raise CommandFailed(tuple(process.argv), code or 1, b"", said)
        return bytes(unpacker.content)


def _gather(pieces: Iterator[bytes]) -> bytes:
    """About a megabyte of ``pieces``: a trip to a thread pays for more than one of them. Nothing at the end."""
    out = bytearray()
    for piece in pieces:
        out += piece
        if len(out) >= _PUT_AHEAD:
            break
    return bytes(out)


def _absolute(path: Word) -> str:
    text = os.fsdecode(path)
    if not text.startswith("/") or "\0" in text:
        raise ConfigError(f"{text!r}: a path in the guest begins with /")
    return text


class Commands(ABC):
    """What a VM can be asked to do inside. ``timeout`` is in seconds; without one, :func:`asyncio.timeout` does.

    Every method raises the reason at once when the guest is gone (GuestGone, GuestPanic ...), and WaitTimeout when its
    ``timeout`` is over; what it was about is killed then, as when it is cancelled.
    """

    @property
    @abstractmethod
    def _exec(self) -> Exec:
        """The way into the guest."""

    async def run(
        self,
        *argv: Word,
        input: bytes | None = None,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Word = "/",
    ) -> Completed:
        """Run a program of the guest to its end: ``await vm.run("uname", "-r")``. No shell is involved.

        ``env`` is added to a small environment. 127: there is no such program, or no such ``cwd``.
        """
        async with within(timeout, f"{_shown(argv)} had not ended"):
            return await self._exec.run(argv, input, env, cwd)

    async def check(
        self,
        *argv: Word,
        input: bytes | None = None,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Word = "/",
    ) -> Completed:
        """As :meth:`run`; raises CommandFailed, which is the result too, when it does not end with 0."""
        done = await self.run(*argv, input=input, timeout=timeout, env=env, cwd=cwd)
        if done.returncode:
            raise CommandFailed(done.argv, done.returncode, done.stdout, done.stderr)
        return done

    async def popen(
        self,
        *argv: Word,
        env: Mapping[str, str] | None = None,
        cwd: Word = "/",
        pty: bool = False,
        size: tuple[int, int] = (80, 24),
        timeout: float | None = None,
    ) -> Process:
        """Start a program of the guest and speak with it: ``async with await vm.popen("cat") as cat: ...``

        ``pty``: on a terminal of its own of ``size`` (columns, rows). ``timeout`` is for the start.
        """
        async with within(timeout, f"{_shown(argv)} had not started"):
            return await self._exec.popen(argv, env, cwd, pty, size)

    async def put(
        self,
        source: Word | None,
        target: Word,
        *,
        content: bytes = b"",
        mode: int = 0o644,
        timeout: float | None = None,
    ) -> None:
        """Copy a file or a tree of the host to ``target`` in the guest; ``source`` None makes a file of ``content``.

        A tree is merged into a directory that is there; a ``target`` that ends with ``/`` keeps the source's name.
        Owners are root's, permissions, times and links are kept. Raises CommandFailed with what the guest said.
        """
        path = _absolute(target)
        async with within(timeout, f"the copy to {path} had not ended"):
            await self._exec.put(b"" if source is None else source, content if source is None else None, path, mode)

    async def get(
        self, source: Word, target: str | os.PathLike[str] | None = None, *, timeout: float | None = None
    ) -> bytes:
        """Copy a file or a tree of the guest to ``target`` on the host, which must not be a directory that is there.

        Without ``target``: the content of a file. Links stay links, wherever they lead; nothing is written through one.
        """
        path = _absolute(source)
        async with within(timeout, f"the copy of {path} had not ended"):
            return await self._exec.get(path, None if target is None else Path(target))


def _shown(argv: tuple[Word, ...]) -> str:
    return shlex.join(map(os.fsdecode, argv))[:200]
