"""The exit codes of ``avmm``: promised in the README."""

from enum import IntEnum


class ExitCode(IntEnum):
    """0 when the guest powered itself off; anything else says what came in between."""

    POWER_OFF = 0
    USAGE = 2  #: bad arguments, or a kernel or initrd that cannot be booted
    HOST = 3  #: the engine or avmm itself failed
    PANIC = 4  #: the guest kernel panicked
    GUEST = 5  #: the guest did something no machine allows and cannot go on
    TIMEOUT = 124  #: --timeout ran out, as timeout(1) has it
    SIGNAL = 128  #: plus the number of the signal that ended avmm
