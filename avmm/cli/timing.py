"""``--timing``: what took how long, and what the guest came out for."""

from __future__ import annotations

import os
import time

from avmm.cli.terminal import say
from avmm.vm import VirtualMachine


def print_timing(vm: VirtualMachine) -> None:
    """The timeline since this process started, and the exits by kind, on stderr."""
    began = _process_start()
    for name, moment in vm.timeline.items():
        say(f"{moment - began:9.3f} s  {name}")
    counters = vm.counters()
    for kind, count in sorted(counters["exits"].items(), key=lambda item: -item[1]):
        if count:
            say(f"{count:9d}    {kind} exits")
    if counters["uart_batched"]:
        say(f"{counters['uart_batched']:9d}    UART accesses without an exit")


def _process_start() -> float:
    """When this process started, on time.monotonic()'s clock."""
    try:
        with open("/proc/self/stat", "rb") as file:
            # Field 22, counted after the command's name, which may hold spaces: start time in clock ticks since boot.
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # not Linux: the moment the interpreter began to count CPU time is close enough
        age = time.process_time()
    return time.monotonic() - age
