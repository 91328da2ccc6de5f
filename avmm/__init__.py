"""avmm: an asyncio-native virtual machine monitor for arm64 guests."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from avmm.hypervisor import available_engines, open_hypervisor

__all__ = ["available_engines", "open_hypervisor"]

# Names are looked up when first used, so that `import avmm` loads no engine, parser or event loop.
_HOMES = {"available_engines": "avmm.hypervisor", "open_hypervisor": "avmm.hypervisor"}


def __getattr__(name: str) -> object:
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'avmm' has no attribute {name!r}") from None
    return getattr(import_module(home), name)
