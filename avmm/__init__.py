"""avmm: an asyncio-native virtual machine monitor for arm64 guests.

::

    async with avmm.boot(kernel, initrd, memory="512M", cpus=2) as vm:
        await vm.console.expect(rb"login:", timeout=30)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from avmm.backends.switch import Switch
    from avmm.config import NetConfig, VmConfig
    from avmm.errors import (
        AvmmError,
        ConfigError,
        EngineError,
        FetchError,
        GuestError,
        GuestFault,
        GuestGone,
        GuestPanic,
        HostError,
        ImageError,
        WaitTimeout,
    )
    from avmm.guest.console import Console
    from avmm.guest.exec import CommandFailed, Completed
    from avmm.guest.process import Process
    from avmm.vm import Outcome, VirtualMachine, boot, restore

__version__ = "0.1.0"

__all__ = [
    "AvmmError",
    "CommandFailed",
    "Completed",
    "ConfigError",
    "Console",
    "EngineError",
    "FetchError",
    "GuestError",
    "GuestFault",
    "GuestGone",
    "GuestPanic",
    "HostError",
    "ImageError",
    "NetConfig",
    "Outcome",
    "Process",
    "Switch",
    "VirtualMachine",
    "VmConfig",
    "WaitTimeout",
    "boot",
    "restore",
]

# Names are looked up when first used, so that `import avmm` loads no engine, parser or event loop.
_HOMES = {
    "boot": "avmm.vm",
    "restore": "avmm.vm",
    "Outcome": "avmm.vm",
    "VirtualMachine": "avmm.vm",
    "VmConfig": "avmm.config",
    "NetConfig": "avmm.config",
    "Switch": "avmm.backends.switch",
    "Console": "avmm.guest.console",
    "CommandFailed": "avmm.guest.exec",
    "Completed": "avmm.guest.exec",
    "Process": "avmm.guest.process",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'avmm' has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, "avmm.errors")), name)
    globals()[name] = value
    return value
