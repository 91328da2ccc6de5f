"""The window ``avmm top`` looks through: one unix socket per VM, for its owner only.

A client sends a line and gets a line back, JSON both: an empty one for how the VM is now, or one that asks it to do
something. Nobody looking costs nothing, since what is shown are numbers that are counted anyway. Sockets lie in a
directory of the user's own, named PID-N.sock.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from avmm.errors import AvmmError, HostError
from avmm.log import log

#: A request longer than this is not one: the connection is closed.
_REQUEST_MAX: Final = 4096

#: How long, in seconds, a client waits for a VM: an event loop that is stuck for longer is worth being told of.
_PATIENCE: Final = 2.0

_numbers = itertools.count(1)


def directory() -> Path:
    """Where this user's sockets are; made when it is missing. Raises HostError when it is not ours alone."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(runtime, "avmm") if runtime else Path(tempfile.gettempdir(), f"avmm-{os.getuid()}")
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise HostError(f"no place for the monitor's socket: {path}: {error.strerror}; set XDG_RUNTIME_DIR") from error
    # In a shared /tmp anybody could have made it first, to watch us or to be taken for us.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise HostError(f"{path} is not a directory that only you can open: remove it, or set XDG_RUNTIME_DIR")
    return path


class Monitor:
    """Serves ``look()``, a JSON-serializable dictionary, for as long as :meth:`run` runs.

    ``actions``, by name, are what a client may ask for, each with one argument.
    """

    def __init__(
        self, look: Callable[[], dict[str, Any]], actions: Mapping[str, Callable[[str], Awaitable[None]]] | None = None
    ) -> None:
        self._actions = actions or {}
        self.id = f"{os.getpid()}-{next(_numbers)}"
        self._look = look
        self._began = time.monotonic()

    async def run(self) -> None:
        """Serve until cancelled. Where there is no place for the socket, say so and end: the VM matters more."""
        try:
            listener, path = self._listen()
        except HostError as error:
            log.warning("monitor.unavailable", error=str(error))
            return
        try:
            async with asyncio.TaskGroup() as clients:

                def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                    clients.create_task(self._serve(reader, writer))

                server = await asyncio.start_unix_server(accept, sock=listener, limit=_REQUEST_MAX)
                try:
                    await asyncio.get_running_loop().create_future()
                finally:
                    server.close()
        finally:
            listener.close()
            path.unlink(missing_ok=True)

    def _listen(self) -> tuple[socket.socket, Path]:
        path = directory() / f"{self.id}.sock"
        listener = socket.socket(socket.AF_UNIX)
        try:
            path.unlink(missing_ok=True)  # of a process that had our number and was killed
            listener.bind(os.fspath(path))
            path.chmod(0o600)
            listener.listen()
        except OSError as error:
            listener.close()
            raise HostError(f"cannot listen on {path}: {error.strerror or error}") from error
        return listener, path

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            try:
                while line := await reader.readline():
                    answer = await self._act(json.loads(line)) if line.strip() else self.snapshot()
                    writer.write(json.dumps(answer, separators=(",", ":")).encode() + b"\n")
                    await writer.drain()
            except Exception as error:  # whatever it is, it is this client's alone: the others and the VM go on
                log.debug("monitor.client_lost", error=str(error))

    async def _act(self, request: dict[str, str]) -> dict[str, str]:
        action = self._actions.get(request["do"])
        if action is None:
            return {"error": f"this VM cannot {request['do']}"}
        try:
            await action(request["with"])
        except AvmmError as error:
            return {"error": str(error)}
        return {}

    def snapshot(self) -> dict[str, Any]:
        """What a client gets. ``now_ns`` is the monotonic clock, ``uptime`` seconds."""
        return {
            "id": self.id,
            "pid": os.getpid(),
            "now_ns": time.monotonic_ns(),
            "uptime": round(time.monotonic() - self._began, 3),
            **self._look(),
        }


class Peer:
    """A client of one VM's monitor. Blocking."""

    def __init__(self, path: Path) -> None:
        self.id = path.stem
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_PATIENCE)
        try:
            self._socket.connect(os.fspath(path))
        except BaseException:
            self._socket.close()
            raise
        self._file = self._socket.makefile("rb")

    def snapshot(self) -> dict[str, Any] | None:
        """The VM now; None when it has ended. Raises HostError when it does not answer."""
        try:
            self._socket.sendall(b"\n")
            line = self._file.readline()
        except TimeoutError as error:
            raise HostError(f"VM {self.id} has not answered for {_PATIENCE:g} s: its event loop is stuck") from error
        except ConnectionError:
            return None
        return json.loads(line) if line else None

    def ask(self, action: str, argument: str) -> None:
        """Have the VM do something, however long it takes. Raises HostError when it could not."""
        self._socket.settimeout(None)
        try:
            self._socket.sendall(json.dumps({"do": action, "with": argument}).encode() + b"\n")
            line = self._file.readline()
        except ConnectionError:
            line = b""
        answer = json.loads(line) if line else {"error": f"VM {self.id} has ended meanwhile"}
        if "error" in answer:
            raise HostError(answer["error"])

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._socket.close()


def peers() -> list[Peer]:
    """A client for every VM of this user that is there to answer; what dead ones left behind is removed."""
    found = []
    for path in sorted(directory().glob("*.sock")):
        try:
            found.append(Peer(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError:  # gone since, or its queue is full
            continue
    return found
