"""Debian's Linux with pages of 64 KiB, a flavour that Debian does not have: built from its source package.

fetched = linux64k()    # some five minutes once, then from the user's cache; flex, bison and bc are needed
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from avmm.debian import Fetched, fetch_debian
from avmm.errors import FetchError
from tests.guest.rootfs import files_of, locked_cache

_SOURCE = "linux-source-6.1"

#: All else is off. 52 bits are what distributions ask for with such pages: a kernel goes on with 48 where that is all.
_CONFIG = """
LOCALVERSION="-64k"
ARM64_64K_PAGES ARM64_VA_BITS_52 ARM64_PA_BITS_52 TRANSPARENT_HUGEPAGE SWAP
ARM64_PAN ARM64_USE_LSE_ATOMICS ARM64_E0PD ARM64_CNP UNMAP_KERNEL_AT_EL0 RANDOMIZE_BASE
SMP NR_CPUS=8 HIGH_RES_TIMERS NO_HZ_IDLE ARM_ARCH_TIMER_EVTSTREAM
BLK_DEV_INITRD RD_GZIP RD_ZSTD BINFMT_ELF BINFMT_SCRIPT MULTIUSER SYSVIPC POSIX_MQUEUE
PROC_FS PROC_PAGE_MONITOR SYSFS TMPFS DEVTMPFS BLOCK EXT4_FS NET UNIX
PRINTK TTY UNIX98_PTYS SERIAL_AMBA_PL011 SERIAL_AMBA_PL011_CONSOLE RTC_CLASS RTC_HCTOSYS RTC_DRV_PL031
VIRTIO_MENU VIRTIO_MMIO BLK_DEV VIRTIO_BLK VIRTIO_CONSOLE
DEBUG_KERNEL DEBUG_VM DEBUG_LIST
"""


def linux64k() -> Fetched:
    """The kernel, and the initrd of Debian's own. Safe to call from several processes. Raises FetchError."""
    options = (word if "=" in word else f"{word}=y" for word in _CONFIG.split())
    config = "".join(f"CONFIG_{option}\n" for option in options)
    with locked_cache("linux64k.lock") as home:  # a lock of its own: files_of() takes the other
        image = home / f"{hashlib.sha256((_SOURCE + config).encode()).hexdigest()[:16]}.Image"
        if not image.exists():
            (source,) = files_of(_SOURCE, [f"usr/src/{_SOURCE}.tar.xz"])
            with tempfile.TemporaryDirectory(prefix="linux-", dir=home) as tree:
                _run(["tar", "-x", "--strip-components=1", "-f", str(source)], tree)
                Path(tree, "wanted").write_text(config)
                make = ["make", "-s", "ARCH=arm64", "CROSS_COMPILE=aarch64-linux-gnu-", "KCONFIG_ALLCONFIG=wanted"]
                _run([*make, "allnoconfig"], tree)
                _run([*make, f"-j{os.cpu_count()}", "Image"], tree)
                os.replace(Path(tree, "arch/arm64/boot/Image"), image)
            source.unlink()
    return Fetched(image, fetch_debian(progress=lambda text: None).initrd, "6.1-64k")


def _run(command: list[str], folder: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise FetchError(f"{command[0]} is missing") from None
    if done.returncode:
        raise FetchError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
