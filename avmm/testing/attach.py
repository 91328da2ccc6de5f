"""The terminal of a test run on a guest's console, while the test that failed is held."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING

from avmm.cli.terminal import HELP, EscapeKey, raw_mode, read_input, say

if TYPE_CHECKING:
    from avmm.vm import VirtualMachine


async def attach(vm: VirtualMachine) -> None:
    """Until Ctrl-A x, the end of the input or of the guest. Where stdin is no terminal, nothing happens."""
    stdin, stdout = 0, sys.__stdout__
    if not os.isatty(stdin) or stdout is None:
        say("avmm: there is no terminal to attach to its console (with pytest-xdist: run it with -n 0)")
        return
    leave = asyncio.Event()
    attached = True

    def show(data: bytes) -> None:
        if attached:
            os.write(stdout.fileno(), data)

    async def type_in() -> None:
        async for data in read_input(stdin):
            vm.console.write(keys.feed(data))
            if leave.is_set():
                return

    keys = EscapeKey(leave.set, lambda: say(HELP))
    say("avmm: Ctrl-A x goes on with the tests, Ctrl-A h helps")
    show(vm.console.output[-2000:])
    vm.console.listen(show)
    with raw_mode(stdin):
        waits = [asyncio.ensure_future(each) for each in (leave.wait(), vm.wait(), type_in())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            attached = False
            for each in waits:
                each.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
