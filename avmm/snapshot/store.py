"""A machine into a snapshot file and out of it again.

Records: ``config``, ``machine`` (the state of vCPUs, devices and console), ``attachments`` (what each adds, in order)
as JSON; ``ram``, to be mapped; and what attachments reserve for themselves, such as a disk's content.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from avmm import __version__
from avmm.attachments import attachments_of, close_all
from avmm.config import VmConfig
from avmm.errors import ImageError
from avmm.ram import FrozenRam, RamFile
from avmm.snapfile import Reader, Writer
from avmm.snapshot import plain
from avmm.snapshot.origin import MachineState, Origin

_PIECE: Final = 1 << 20


class Stopped(Exception):
    """Writing was called off."""


async def write(origin: Origin, config: VmConfig, path: Path) -> None:
    """:func:`save` on a thread; cancelled, it returns when that has ended."""
    stop = threading.Event()
    saving = asyncio.ensure_future(asyncio.to_thread(save, origin, config, path, stop))
    try:
        await asyncio.shield(saving)
    except asyncio.CancelledError:
        stop.set()
        while not saving.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((saving,))
        saving.exception()
        raise


def save(origin: Origin, config: VmConfig, path: Path, stop: threading.Event) -> None:
    """Write ``origin``, a machine of ``config``, and close its attachments. Blocks; raises HostError.

    Set, ``stop`` ends it soon with Stopped. Either way there is a whole file at ``path``, or what was there before.
    """
    try:
        with Writer(path, __version__) as writer:
            # A network of this program's own does not go into a file.
            nets = tuple(replace(each, network=None) for each in config.nets)
            writer.add("config", plain.dumps(replace(config, nets=nets)))
            writer.add("machine", plain.dumps(origin.state))
            ram = writer.reserve("ram", origin.ram.size)
            for offset, data, length in origin.ram.spans():
                for at in range(0, length, _PIECE):
                    size = min(_PIECE, length - at)
                    piece = origin.ram.read(offset + at, size) if data is None else data[at : at + size]
                    writer.write(ram, offset + at, piece)
                    if stop.is_set():
                        raise Stopped
            added = []
            for index, each in enumerate(origin.attachments):
                added.append(each.store(writer, f"attachment{index}"))
                if stop.is_set():
                    raise Stopped
            writer.add("attachments", plain.dumps(added))
    finally:
        close_all(origin.attachments)


def load(path: Path) -> tuple[VmConfig, Origin]:
    """What is in the snapshot ``path``. Its memory is mapped, not read. Raises ImageError."""
    reader = Reader(path)
    try:
        config = _read(reader, "config", VmConfig)
        state = _read(reader, "machine", MachineState)
        added = _read(reader, "attachments", tuple)
        attachments = attachments_of(config)
        if len(added) != len(attachments):
            raise ImageError(f"{path} is of a machine with other devices than this avmm would give it")
        record = reader.record("ram")
        try:
            for each, what in zip(attachments, added, strict=True):
                each.load(reader, what)
        except BaseException:
            close_all(attachments)
            raise
        ram = RamFile(os.dup(reader.fd), record.length, record.offset, writable=False)
        return config, Origin(state, FrozenRam(ram, ()), attachments)
    finally:
        reader.close()


def _read(reader: Reader, name: str, kind: type[Any]) -> Any:
    try:
        value = plain.loads(reader.read(name))
    except plain.NotPlain as error:
        raise ImageError(f"{reader.path}: its {name} is not of this version of avmm: {error}") from error
    if not isinstance(value, kind):
        raise ImageError(f"{reader.path} is damaged: its {name} makes no sense")
    return value
