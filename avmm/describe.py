"""What a VM of a configuration is made of, before it runs: its images read, its devices described, its engine asked."""

from __future__ import annotations

import os
import threading
from dataclasses import asdict
from typing import Any

from avmm.attachments import attachments_of, describe_all
from avmm.board import Board
from avmm.bootloader.image import Images, load_kernel, read_file
from avmm.bootloader.loader import ENTROPY_SIZE, place
from avmm.bootloader.machine import RAM_BASE, RNG_SEED_SIZE, build_fdt
from avmm.config import AGENT_PATH, VmConfig
from avmm.devices.virtio.transport import VirtioDevice
from avmm.errors import ConfigError
from avmm.hypervisor import Hypervisor, open_hypervisor
from avmm.memory import GuestMemory
from avmm.vcpu import sysregs


def describe(config: VmConfig) -> dict[str, Any]:
    """The configuration as it would run, images checked, as plain data. Raises ImageError or EngineError."""
    kernel, initrd = read_images(config)
    attachments = describe_all(config)
    hypervisor = open_hypervisor(config.engine, config.faults)  # last: from here on there is something to close
    try:
        check_capabilities(config, hypervisor)
        engine = hypervisor.capabilities.name
    finally:
        hypervisor.close()
    return {
        "kernel": {
            "path": os.fspath(config.kernel),
            "bytes": len(kernel.image),
            "image_size": kernel.image_size,
            "page_size": kernel.page_size,
        },
        "initrd": None if initrd is None else {"path": os.fspath(config.initrd or ""), "bytes": len(initrd)},
        "cmdline": config.bootargs,
        "memory": config.memory,
        "cpus": config.cpus,
        "halt_poll": config.halt_poll,
        "engine": engine,
        "irqchip": config.irqchip,
        "reboot": config.reboot,
        "agent": config.agent is not None,
        "faults": None if config.faults is None else asdict(config.faults),
        **attachments,
    }


def device_tree(config: VmConfig) -> bytes:
    """The flattened device tree the guest would get, its random seeds included. Raises ImageError."""
    kernel, initrd = read_images(config)
    layout = place(RAM_BASE, config.memory, kernel, len(initrd or b""))
    entropy = os.urandom(ENTROPY_SIZE)
    return build_fdt(
        ram=[(RAM_BASE, config.memory)],
        cpus=[sysregs.mpidr(index) for index in range(config.cpus)],
        bootargs=config.bootargs,
        initrd=(layout.initrd, layout.initrd_end) if initrd else None,
        devices=_described_board(config).nodes(),
        rng_seed=entropy[:RNG_SEED_SIZE],
        kaslr_seed=entropy[RNG_SEED_SIZE:],
    )


def _described_board(config: VmConfig) -> Board:
    """A board to be described only: its devices show what slots they are in, and nothing else is asked of them."""
    slots = [VirtioDevice() for _ in attachments_of(config)]
    return Board(threading.RLock(), config.cpus, _Unconnected(), GuestMemory(), slots)


class _Unconnected:
    """A serial line with nobody at the other end: for a board that is only described."""

    async def read(self, limit: int) -> bytes:
        return b""

    def write(self, data: bytes) -> None:
        pass


def read_images(config: VmConfig) -> Images:
    """The kernel, and the initrd with whatever we add to it. Blocks. Raises ImageError."""
    kernel = load_kernel(config.kernel, config.memory)
    initrd = None if config.initrd is None else read_file(config.initrd, "initrd", config.memory)
    if initrd is not None and config.agent is not None:
        from avmm.bootloader.initrd import with_agent  # with libraries that others need not wait for
        from avmm.guest.agent import image

        initrd = with_agent(initrd, image(), AGENT_PATH, config.agent)
    return kernel, initrd


def check_capabilities(config: VmConfig, hypervisor: Hypervisor) -> None:
    """Whether the engine can run such a VM. Raises ConfigError."""
    can = hypervisor.capabilities
    if config.cpus > can.max_vcpus:
        raise ConfigError(f"{can.name} runs at most {can.max_vcpus} vCPUs in a VM, not {config.cpus}")
    if RAM_BASE + config.memory > 1 << can.ipa_bits:
        most = ((1 << can.ipa_bits) - RAM_BASE) >> 20
        raise ConfigError(f"{can.name} addresses {can.ipa_bits} bits here: give the guest at most {most} MiB of memory")
