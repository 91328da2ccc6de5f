"""Where a kernel, its initrd and the device tree go in memory, and putting them there.

The rules are Linux's (Documentation/arch/arm64/booting.rst): the kernel at a 2 MiB aligned base + text_offset; the
device tree at most 2 MiB long and 8-byte aligned, here alone in 2 MiB of its own; the initrd inside a window of at
most 32 GiB that starts on a multiple of 1 GiB and holds the kernel too. All of it lies at the start of RAM, in
that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from avmm.bootloader.image import Kernel, StoredImage
from avmm.bootloader.machine import KASLR_SEED_SIZE, RAM_BASE, RNG_SEED_SIZE, build_fdt
from avmm.errors import ImageError
from avmm.fdt import Node
from avmm.memory import GuestMemory

_MIB = 1 << 20
_GIB = 1 << 30
_BLOCK = 2 * _MIB
_WINDOW = 32 * _GIB
#: The largest page a kernel may use: an initrd that starts on one can be given back whole.
_PAGE_MAX = 0x1_0000

#: How many random bytes :func:`load_linux` wants.
ENTROPY_SIZE = RNG_SEED_SIZE + KASLR_SEED_SIZE


@dataclass(frozen=True, slots=True)
class Layout:
    """GPAs: where the kernel, the device tree and the initrd begin, and where the initrd ends."""

    kernel: int
    fdt: int
    initrd: int
    initrd_end: int


@dataclass(frozen=True, slots=True)
class Entry:
    """How the boot CPU starts: its PC, and the device tree's GPA for x0. x1 to x3 are zero."""

    pc: int
    x0: int


def place(base: int, size: int, kernel: Kernel, initrd_size: int) -> Layout:
    """Addresses in the RAM ``base``..+``size`` bytes. Raises ImageError when not everything fits."""
    start = _up(base, _BLOCK) + kernel.text_offset
    fdt = _up(start + kernel.image_size, _BLOCK)
    initrd = _up(fdt + _BLOCK, _PAGE_MAX)
    end = initrd + initrd_size
    if end > base + size:
        raise ImageError(
            f"the kernel ({_mib(kernel.image_size)} MiB) and the initrd ({_mib(initrd_size)} MiB) do not fit into "
            f"{size // _MIB} MiB: give the guest {_mib(_up(end - base, 64 * _MIB))} MiB of memory or more"
        )
    if end > start // _GIB * _GIB + _WINDOW:
        raise ImageError(f"the initrd ends more than {_WINDOW // _GIB} GiB after the kernel: use a smaller one")
    return Layout(start, fdt, initrd, end)


def load_linux(
    memory: GuestMemory,
    kernel: Kernel,
    initrd: bytes | memoryview | None,
    *,
    cmdline: str,
    cpus: Sequence[int],
    devices: Sequence[Node],
    entropy: bytes,
) -> Entry:
    """Write kernel, initrd and device tree into ``memory`` and say where to start. Blocks.

    ``cpus`` are the vCPUs' MPIDR_EL1 values, ``devices`` the devices' nodes, ``entropy`` ENTROPY_SIZE random
    bytes. Raises ImageError when something does not fit.
    """
    if len(entropy) != ENTROPY_SIZE:
        raise ValueError(f"load_linux wants {ENTROPY_SIZE} bytes of entropy, not {len(entropy)}")
    ram = [(region.base, region.size) for region in memory.regions if region.base >= RAM_BASE]
    base, size = ram[0]
    layout = place(base, size, kernel, len(initrd or b""))
    fdt = build_fdt(
        ram=ram,
        cpus=cpus,
        bootargs=cmdline,
        initrd=(layout.initrd, layout.initrd_end) if initrd else None,
        devices=devices,
        rng_seed=entropy[:RNG_SEED_SIZE],
        kaslr_seed=entropy[RNG_SEED_SIZE:],
    )
    if len(fdt) > _BLOCK:
        raise ImageError(f"the device tree takes {_mib(len(fdt))} MiB; a kernel reads 2 MiB")
    if isinstance(kernel.image, StoredImage):
        with memory.view(layout.kernel, len(kernel.image)) as view:  # or an error's traceback would keep RAM mapped
            kernel.image.read_into(view)
        memory.wrote(layout.kernel, len(kernel.image))
    else:
        memory.write(layout.kernel, kernel.image)
    memory.write(layout.fdt, fdt)
    if initrd:
        memory.write(layout.initrd, initrd)
    return Entry(layout.kernel, layout.fdt)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _mib(size: int) -> int:
    return -(-size // _MIB)
