"""What a VM looked like when its test failed, in a folder: nothing in it needs avmm to be read, but the snapshot.

=======================  =========================================================================================
``console.txt``         everything the guest printed, printable as it stands
``console.raw``         the same, byte for byte
``screen.txt``, `.svg`  what a terminal would show (with ``avmm[screen]``)
``registers.txt``       each vCPU's, with the kernel's symbol of PC: by the System.map beside the kernel, else by what a
                        twin says (/proc/kallsyms)
``devices.json``        each device's state, counters and last error; how the VM was configured; what avmm logged last
``vm.snapshot``          the VM at that moment: ``avmm resume`` on the folder goes on from it
``*.pcap``               what its networks recorded
``tasks.txt``           where each asyncio task of the program was
=======================  =========================================================================================
"""

from __future__ import annotations

import asyncio
import bisect
import io
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

from avmm.errors import AvmmError

if TYPE_CHECKING:
    from avmm.vcpu.state import VcpuState
    from avmm.vm import VirtualMachine

#: A guest that does not come to rest by then is described without its registers.
_REST: Final = 5.0


async def write_bundle(vm: VirtualMachine, folder: Path, name: str) -> Path:
    """Describe ``vm`` in a new folder inside ``folder``; its path. What cannot be had is left out, and said so."""
    # First what is fleeting.
    tasks = _tasks()
    path = await asyncio.to_thread(_new_folder, folder, name)
    missing = []
    if vm.outcome is None:
        try:
            await vm.snapshot(path / "vm.snapshot")
        except AvmmError as error:
            missing.append(f"vm.snapshot: {error}")
    files: dict[str, str | bytes] = {
        "console.raw": vm.console.output,
        "console.txt": _printable(vm.console.output),
        "tasks.txt": tasks,
    }
    try:
        async with asyncio.timeout(_REST):
            vcpus = await vm.registers()
        files["registers.txt"] = _registers(vcpus, Symbols.beside(Path(vm.config.kernel)) or await _ask_twin(vm))
    except (AvmmError, TimeoutError) as error:
        missing.append(f"registers: {error or 'the guest does not come to rest'}")
    files["devices.json"] = json.dumps(vm.describe_state(), indent=1, default=repr)
    try:
        screen = vm.screen
        files |= {"screen.txt": screen.text + "\n", "screen.svg": screen.svg()}
    except AvmmError as error:
        missing.append(f"screen: {error}")
    if missing:
        files["missing.txt"] = "".join(f"{line}\n" for line in missing)
    await asyncio.to_thread(_write, path, files)
    for net in vm.config.nets:
        if net.pcap is not None and net.pcap.is_file():
            await asyncio.to_thread(shutil.copy, net.pcap, path)
    return path


def _new_folder(folder: Path, name: str) -> Path:
    """Named after the test, and no other's: a worker or an earlier run may have had the same name."""
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.")[-100:] or "vm"
    number = 0
    while True:
        path = folder / (plain if not number else f"{plain}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return path


def _write(path: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        if isinstance(content, bytes):
            (path / name).write_bytes(content)
        else:
            (path / name).write_text(content, encoding="utf-8")


def _printable(output: bytes) -> str:
    text = output.decode(errors="replace").replace("\r\n", "\n")
    return re.sub(r"[^\n\t\x20-\x7e\x80-\uffff]", lambda found: f"\\x{ord(found[0]):02x}", text)


def _tasks() -> str:
    out = io.StringIO()
    for task in asyncio.all_tasks():
        if task is not asyncio.current_task():
            task.print_stack(file=out)
            out.write("\n")
    return out.getvalue()


async def _ask_twin(vm: VirtualMachine) -> Symbols | None:
    """The symbols of a kernel without a System.map; None where there is no twin that could tell, and do no harm."""
    if not vm.config.agent or vm.config.initrd is None or vm.config.shares:
        return None
    try:
        async with asyncio.timeout(_REST), vm.fork() as twin:
            return Symbols((await twin.get("/proc/kallsyms")).decode(errors="replace"))
    except (AvmmError, TimeoutError):
        return None


def _registers(vcpus: list[VcpuState], symbols: Symbols | None) -> str:
    lines = []
    for index, vcpu in enumerate(vcpus):
        where = symbols.find(vcpu.pc, vcpu.sysregs.get("VBAR_EL1", 0)) if symbols is not None else ""
        lines.append(f"vCPU {index} ({vcpu.power.name.lower()})  EL{vcpu.pstate >> 2 & 3}")
        lines.append(f"  pc {vcpu.pc:016x}  {where}".rstrip())
        lines.append(f"  pstate {vcpu.pstate:08x}")
        words = [f"x{number:<2} {value:016x}" for number, value in enumerate(vcpu.x)]
        lines += ["  " + "  ".join(words[at : at + 4]) for at in range(0, 31, 4)]
        lines += [f"  {name.lower()} {value:016x}" for name, value in sorted(vcpu.sysregs.items())]
    return "".join(f"{line}\n" for line in lines)


class Symbols:
    """A kernel's System.map, or its /proc/kallsyms. Where it really is follows from VBAR_EL1: its ``vectors``."""

    def __init__(self, text: str) -> None:
        found = re.findall(r"(?m)^([0-9a-f]{16}) [tTwW] (\S+)(?:\t\[\w+\])?$", text)
        pairs = sorted((int(address, 16), name) for address, name in found)
        self._addresses = [address for address, _ in pairs]
        self._names = [name for _, name in pairs]
        self._vectors = next((address for address, name in pairs if name == "vectors"), None)

    @classmethod
    def beside(cls, kernel: Path) -> Symbols | None:
        """The System.map of a kernel file: ``System.map`` or ``System.map-VERSION`` in its folder; None without one."""
        version = kernel.name.partition("-")[2]
        for name in (f"System.map-{version}", "System.map"):
            try:
                symbols = cls((kernel.parent / name).read_text(errors="replace"))
            except OSError:
                continue
            if symbols._addresses:
                return symbols
        return None

    def find(self, address: int, vbar: int) -> str:
        """``symbol+0xoffset``, or nothing for what is not the kernel's."""
        moved = vbar - self._vectors if self._vectors is not None and vbar else 0
        if moved % 0x1000:
            moved = 0  # the vectors of a kernel that hides itself from its programs (KPTI)
        at = bisect.bisect_right(self._addresses, address - moved) - 1
        if at < 0 or address - moved - self._addresses[at] > 1 << 20:
            return ""
        return f"{self._names[at]}+{address - moved - self._addresses[at]:#x}"
