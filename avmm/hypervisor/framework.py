"""Apple's Hypervisor.framework: macOS on Apple silicon.

The kernel gives the hypervisor only to a process whose executable carries an entitlement. For Python that is the
interpreter: ``avmm sign`` makes a copy of it that is signed so (see :mod:`avmm.signing`).
"""

from __future__ import annotations

from avmm.errors import EngineError
from avmm.hypervisor._native import NativeHypervisor

try:
    from avmm.hypervisor._framework import ffi, lib
except ImportError as error:
    raise EngineError(f"Hypervisor.framework needs macOS on Apple silicon; use engine='softhv' ({error})") from error

HV_BUSY = 0xFAE94002
HV_DENIED = 0xFAE94007
HV_UNSUPPORTED = 0xFAE9400F


class Framework(NativeHypervisor):
    """The process's one VM."""

    name = "framework"
    many_vms = False

    def __init__(self) -> None:
        super().__init__(ffi, lib)

    def _create(self) -> None:
        try:
            super()._create()
        except EngineError as error:
            hint = {
                HV_BUSY: "Hypervisor.framework allows one VM per process: close the first, or use engine='softhv'",
                HV_DENIED: "this Python may not use the hypervisor: run `avmm sign` once, then `avmm-hv` like `avmm`",
                HV_UNSUPPORTED: "this Mac has no hypervisor (`sysctl kern.hv_support` says 0): use engine='softhv'",
            }.get(error.code or 0)
            if hint is None:
                raise
            raise EngineError(hint, error.code) from error
