"""Apple's Hypervisor.framework: macOS on Apple silicon.

The kernel gives the hypervisor only to a process whose executable carries an entitlement. For Python that is the
interpreter, so a copy of it has to be signed once (an ad-hoc signature will do). Save as hv.plist::

    <?xml version="1.0" encoding="UTF-8"?>
    <!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
    <plist version="1.0"><dict><key>com.apple.security.hypervisor</key><true/></dict></plist>

and sign with the command the error message shows. Apple's own /usr/bin/python3 cannot be signed again.
"""

from __future__ import annotations

import sys

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
                HV_DENIED: "this Python may not use the hypervisor: sign it with "
                f"`codesign --sign - --entitlements hv.plist --force {sys.executable}` "
                "(hv.plist: see help('avmm.hypervisor.framework'))",
                HV_UNSUPPORTED: "this Mac has no hypervisor (`sysctl kern.hv_support` says 0): use engine='softhv'",
            }.get(error.code or 0)
            if hint is None:
                raise
            raise EngineError(hint, error.code) from error
