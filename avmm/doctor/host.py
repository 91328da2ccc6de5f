"""The host: what it is, and whether it lets this process use its hypervisor."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import avmm
from avmm.clock import host_timebase
from avmm.doctor import Finding
from avmm.errors import AvmmError
from avmm.signing import Runner, entitled, read_executable, run_command, running_image

_FRAMEWORK: Final = "/System/Library/Frameworks/Hypervisor.framework/Versions/A/Hypervisor"

#: Functions that came with a later macOS than the one avmm asks for, and what they stand for.
_LATER: Final = {
    "hv_gic_create": "the hypervisor's own GIC (macOS 15)",
    "hv_vm_config_set_el2_enabled": "nested virtualization (macOS 15, M3)",
    "hv_sme_config_get_max_svl_bytes": "SME (macOS 15.2)",
    "hv_vm_config_set_ipa_granule": "4 KiB pages in stage 2 (macOS 26)",
}

_TOPIC: Final = "host"


def run() -> list[Finding]:
    """Look at this host."""
    clock = host_timebase()
    findings = [
        Finding(_TOPIC, "avmm", avmm.__version__),
        Finding(_TOPIC, "Python", f"{platform.python_version()} at {sys.executable}"),
        Finding(_TOPIC, "processors", str(os.cpu_count())),
    ]
    if sys.platform == "darwin":
        findings += mac(run_command, running_image(), lambda name: framework_library(name) is not None)
    else:
        findings += [
            Finding(_TOPIC, "system", f"{platform.system()} {platform.release()} {platform.machine()}"),
            Finding(_TOPIC, "/dev/kvm", "there" if Path("/dev/kvm").exists() else "not there"),
        ]
    same = (clock.numer, clock.denom) == (125, 3)
    text = f"{clock.numer}/{clock.denom} ns a tick"
    findings.append(Finding(_TOPIC, "timebase", text, same or None, "125/3: 24 MHz"))
    return findings


def mac(run: Runner, image: Path, offers: Callable[[str], bool]) -> list[Finding]:
    """A Mac, through its commands. ``image`` is this process's executable; ``offers(name)``: the framework has it."""

    def sysctl(name: str) -> str:
        try:
            code, output = run(["sysctl", "-n", name])
        except FileNotFoundError:
            return "not known"
        return output.decode(errors="replace").strip() if code == 0 else "not known"

    support = sysctl("kern.hv_support")
    allowed = entitled(image, run)
    try:
        sdk = read_executable(image).sdk or "not said"
    except AvmmError as error:
        sdk = str(error)
    return [
        Finding(_TOPIC, "system", f"macOS {platform.mac_ver()[0]} ({sysctl('kern.osversion')}) {platform.machine()}"),
        Finding(_TOPIC, "model", f"{sysctl('hw.model')}, {sysctl('machdep.cpu.brand_string')}"),
        Finding(_TOPIC, "hypervisor (kern.hv_support)", support, support == "1", "1"),
        Finding(_TOPIC, "executable", str(image)),
        # From 15.2 on, newer chips show a process built with it a counter of 1 GHz instead of 24 MHz.
        Finding(_TOPIC, "SDK the executable was built with", sdk),
        Finding(_TOPIC, "hypervisor entitlement", "there" if allowed else "missing: run `avmm sign`", allowed, "there"),
        Finding(_TOPIC, "counter frequency (hw.tbfrequency)", sysctl("hw.tbfrequency")),
        *(Finding(_TOPIC, what, "there" if offers(name) else "not there") for name, what in _LATER.items()),
    ]


def framework_library(name: str) -> ctypes.CDLL | None:
    """Apple's framework as a dynamic library, when it has a function of that name."""
    try:
        library = ctypes.CDLL(_FRAMEWORK)
    except OSError:
        return None
    return library if hasattr(library, name) else None
