"""The machine a guest sees: QEMU's ``virt`` memory map (hw/arm/virt.c), so that kernels and firmware feel at home,
and its device tree.

What the machine itself has (CPUs, memory, timer, PSCI, interrupt controller, clock) is described here; devices
hand in their own nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

from avmm.fdt import CLOCK_PHANDLE, INTC_PHANDLE, LEVEL, Node, Placement, cells, encode, u64s

GICD_BASE, GICD_SIZE = 0x0800_0000, 0x1_0000
GICR_BASE, GICR_SIZE = 0x080A_0000, 0x2_0000  # the size is one vCPU's: two frames of 64 KiB
GICR_END = 0x0900_0000
PL011 = Placement(0x0900_0000, 0x1000, spi=1)
PL031 = Placement(0x0901_0000, 0x1000, spi=2)
VIRTIO_SLOTS = 32
#: RAM of 16 KiB, which no memory node names, of which 16 bytes are used.
VMGENID = Placement(0x0B01_0000, 0x10, spi=5)
RAM_BASE = 0x4000_0000

#: What `stdout-path` names: the early console.
CONSOLE = f"/pl011@{PL011.base:x}"

CLOCK_HZ = 24_000_000

#: Entropy for the guest: 64 bytes seed its random number generator, 8 its address space layout.
RNG_SEED_SIZE, KASLR_SEED_SIZE = 64, 8

_PPI = 1
_PSCI_CPU_SUSPEND, _PSCI_CPU_OFF, _PSCI_CPU_ON = 0xC400_0001, 0x8400_0002, 0xC400_0003


def virtio_slot(index: int) -> Placement:
    """Where virtio-mmio device ``index`` (0..31) is."""
    if not 0 <= index < VIRTIO_SLOTS:
        raise ValueError(f"the machine has {VIRTIO_SLOTS} virtio slots, no number {index}")
    return Placement(0x0A00_0000 + 0x200 * index, 0x200, spi=16 + index)


def build_fdt(
    *,
    ram: Sequence[tuple[int, int]],
    cpus: Sequence[int],
    bootargs: str,
    initrd: tuple[int, int] | None,
    devices: Sequence[Node],
    rng_seed: bytes,
    kaslr_seed: bytes,
) -> bytes:
    """The machine's device tree.

    ``ram`` are (GPA, bytes) pairs, ``cpus`` the vCPUs' MPIDR_EL1 values, the boot CPU first, ``initrd`` its first
    address and the one after its last. The seeds come from the caller: ``os.urandom``, or fixed ones in a test.
    """
    chosen = Node("chosen", {"bootargs": bootargs, "rng-seed": rng_seed, "kaslr-seed": kaslr_seed})
    if any(f"/{node.name}" == CONSOLE for node in devices):
        chosen["stdout-path"] = CONSOLE
    if initrd is not None:
        chosen["linux,initrd-start"], chosen["linux,initrd-end"] = u64s(initrd[0]), u64s(initrd[1])
    root = Node(
        "",
        {
            "compatible": "linux,dummy-virt",
            "model": "linux,dummy-virt",
            "#address-cells": 2,
            "#size-cells": 2,
            "interrupt-parent": INTC_PHANDLE,
        },
        [
            chosen,
            *(Node(f"memory@{base:x}", {"device_type": "memory", "reg": u64s(base, size)}) for base, size in ram),
            _cpus(cpus),
            _psci(),
            _timer(),
            _intc(len(cpus)),
            _clock(),
            *devices,
        ],
    )
    return encode(root, boot_cpu=_affinity(cpus[0]))


def _affinity(mpidr: int) -> int:
    """MPIDR_EL1's affinity fields, less the fourth: it needs two address cells, and no machine here has it."""
    return mpidr & 0xFF_FFFF


def _cpus(mpidrs: Sequence[int]) -> Node:
    nodes = [
        Node(
            f"cpu@{_affinity(mpidr):x}",
            {
                "device_type": "cpu",
                "compatible": "arm,armv8",
                "enable-method": "psci",
                "reg": _affinity(mpidr),
            },
        )
        for mpidr in mpidrs
    ]
    return Node("cpus", {"#address-cells": 1, "#size-cells": 0}, nodes)


def _psci() -> Node:
    """PSCI by HVC. The function numbers are for kernels that know PSCI 0.1 only; later versions fix them."""
    return Node(
        "psci",
        {
            "compatible": ["arm,psci-1.0", "arm,psci-0.2", "arm,psci"],
            "method": "hvc",
            "cpu_suspend": _PSCI_CPU_SUSPEND,
            "cpu_off": _PSCI_CPU_OFF,
            "cpu_on": _PSCI_CPU_ON,
        },
    )


def _timer() -> Node:
    """The architected timer: secure, non-secure, virtual and hypervisor PPIs, all level.

    ``always-on``: it ticks on while a vCPU is idle, because a parked vCPU is woken at its deadline.
    """
    interrupts = [cells(_PPI, ppi, LEVEL) for ppi in (13, 14, 11, 10)]
    return Node(
        "timer",
        {
            "compatible": ["arm,armv8-timer", "arm,armv7-timer"],
            "interrupts": b"".join(interrupts),
            "always-on": b"",
        },
    )


def _intc(cpus: int) -> Node:
    return Node(
        f"intc@{GICD_BASE:x}",
        {
            "compatible": "arm,gic-v3",
            "interrupt-controller": b"",
            "#interrupt-cells": 3,
            "#address-cells": 2,
            "#size-cells": 2,
            "#redistributor-regions": 1,
            "ranges": b"",
            "reg": u64s(GICD_BASE, GICD_SIZE, GICR_BASE, GICR_SIZE * cpus),
            "phandle": INTC_PHANDLE,
        },
    )


def _clock() -> Node:
    return Node(
        "apb-pclk",
        {
            "compatible": "fixed-clock",
            "#clock-cells": 0,
            "clock-frequency": CLOCK_HZ,
            "clock-output-names": "clk24mhz",
            "phandle": CLOCK_PHANDLE,
        },
    )
