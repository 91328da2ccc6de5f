"""Every error avmm raises, in two trees.

::

    AvmmError
    ├── HostError                 your call, your file, your OS; the text says what to do next
    │   ├── ConfigError           a bad argument or a bad combination of them
    │   ├── ImageError            a kernel, initrd, firmware or disk file we cannot use
    │   ├── EngineError           the hypervisor refused or failed a call
    │   ├── FetchError            a download or its checksum failed
    │   └── WaitTimeout           a wait's ``timeout=`` ran out (also a TimeoutError)
    └── GuestError                the guest broke a rule, panicked or died
        ├── GuestFault            an access outside guest RAM, or to nothing
        ├── GuestPanic            the guest kernel panicked
        ├── CommandFailed         a command in the guest did not end with 0 (avmm.guest.exec; also its result)
        └── GuestGone             the guest stopped while somebody waited for it

Host errors are raised where the call was made. Guest errors never escape from the loop's machinery:
they end the VM, and everybody who waits on it gets one. Messages are one line; the cause is chained.
"""

from __future__ import annotations


class AvmmError(Exception):
    """Root of both trees."""


class HostError(AvmmError):
    """Something on the host's side is wrong; the message says what to do."""


class ConfigError(HostError):
    """A bad argument, or arguments that do not go together."""


class ImageError(HostError):
    """A kernel, initrd, firmware or disk image that cannot be used."""


class EngineError(HostError):
    """The hypervisor refused or failed a call.

    ``code`` is the engine's own return code (Apple's ``hv_return_t``, unsigned), or None.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class FetchError(HostError):
    """A download failed or did not have the expected checksum."""


class WaitTimeout(HostError, TimeoutError):
    """A wait ran out of time. ``elapsed`` is in seconds; ``tail`` the last bytes seen, ``pattern`` what they did not
    match, if that is what was waited for."""

    def __init__(self, message: str, *, elapsed: float = 0.0, tail: bytes = b"", pattern: bytes | None = None) -> None:
        super().__init__(message)
        self.pattern = pattern
        self.elapsed = elapsed
        self.tail = tail


class GuestError(AvmmError):
    """The guest broke a rule, panicked or died."""


class GuestFault(GuestError):
    """An access outside guest RAM, or to an address where nothing is. ``address`` is a GPA."""

    def __init__(self, message: str, address: int = 0) -> None:
        super().__init__(message)
        self.address = address


class GuestPanic(GuestError):
    """The guest kernel panicked; ``reason`` is its own line."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"guest panicked: {reason}")
        self.reason = reason


class GuestGone(GuestError):
    """The guest stopped while somebody waited for it; ``reason`` says how."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason
