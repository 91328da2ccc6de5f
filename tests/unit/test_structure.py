"""The house's laws that a machine can check: imports point down, files stay readable, the public API is what it is."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import avmm

ROOT = Path(avmm.__file__).parent

#: What each room may import, besides itself.
BELOW = {
    "errors": set(),
    "aio": {"errors"},
    "log": set(),
    "fdt": set(),
    "link": set(),
    "memory": {"errors"},
    "bus": {"errors"},
    "irq": set(),
    "clock": {"errors"},
    "faults": {"errors"},
    "ram": {"errors"},
    "snapfile": {"errors"},
    "monitor": {"errors", "log"},
    "signing": {"errors"},
    "config": {"errors", "faults", "link"},
    "hypervisor": {"errors", "faults", "irq", "memory"},
    "vcpu": {"errors", "bus", "clock", "hypervisor", "irq", "aio"},
    "devices": {"errors", "fdt", "irq", "link", "memory", "bus", "aio", "log"},
    "backends": {"errors", "link", "memory", "aio", "log"},
    "guest": {"errors", "aio"},
    "bootloader": {"errors", "fdt", "memory"},
    "debian": {"errors", "bootloader", "config"},
    "attachments": {"snapfile", "errors", "config", "backends", "devices", "bootloader", "guest", "link"},
    "equipment": {"attachments", "backends", "config", "errors"},
    "board": {"bootloader", "bus", "devices", "errors", "fdt", "irq", "memory"},
    "trace": {"bus", "errors", "hypervisor", "log", "vcpu"},
    "describe": {
        "attachments", "board", "bootloader", "config", "devices", "errors", "guest", "hypervisor", "memory", "vcpu",
    },
    "hardware": {
        "attachments", "backends", "board", "bootloader", "clock", "config", "describe", "hypervisor", "memory", "ram",
        "trace", "vcpu",
    },
    "snapshot": {
        "__version__", "attachments", "board", "bootloader", "config", "errors", "guest", "hardware", "ram", "snapfile",
        "vcpu",
    },
    # The VM knows no device and no engine: those are the board's, the hardware's and the attachments' affair.
    "vm": {
        "aio", "attachments", "backends", "clock", "config", "describe", "equipment", "errors", "faults", "guest",
        "hardware", "log", "memory", "monitor", "snapshot", "vcpu",
    },
    "doctor": {"clock", "errors", "hypervisor", "memory", "signing"},
    "testing": {"cli", "debian", "devices", "errors", "memory", "vcpu", "vm"},
    "cli": {
        "__version__", "config", "debian", "describe", "doctor", "errors", "guest", "monitor", "signing", "snapshot",
        "vm",
    },
    "__init__": {"backends", "config", "errors", "guest", "vm"},
}  # fmt: skip


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The rooms of avmm that the file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "avmm":
                names = [f"avmm.{alias.name}" for alias in node.names]
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("avmm.")}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert room in BELOW, f"{room} is new: what may it import?"
    assert imports(path) <= BELOW[room] | {room}


def test_arrows_make_no_circle() -> None:
    order = TopologicalSorter({room: below & BELOW.keys() for room, below in BELOW.items()})
    assert len(list(order.static_order())) == len(BELOW)


def test_no_device_knows_a_file() -> None:
    """What the rooms' imports do not show: the standard library's."""
    for path in (ROOT / "devices").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) (pathlib|socket|subprocess|tempfile|io)\b", text, re.MULTILINE), path
        assert not re.search(r"\bos\.(?!urandom)\w|(?<!def )(?<![.\w])open\(", text), path


def test_files_stay_readable() -> None:
    limits = {".py": 800, ".c": 1500, ".h": 1500, ".S": 800}
    top = ROOT.parent
    for path in (
        path for room in ("avmm", "tests", "bench", "firmware", "examples") for path in (top / room).rglob("*")
    ):
        if path.suffix in limits and not path.name.startswith(("_softhv", "_framework")):
            lines = len(path.read_text().splitlines())
            assert lines <= limits[path.suffix], f"{path} has {lines} lines: which boundary is missing in it?"


def test_public_api() -> None:
    assert avmm.__all__ == [
        "AvmmError", "CommandFailed", "Completed", "ConfigError", "Console", "EngineError", "FetchError", "GuestError",
        "GuestFault", "GuestGone", "GuestPanic", "HostError", "ImageError", "NetConfig", "Outcome", "Process", "Switch",
        "VirtualMachine", "VmConfig", "WaitTimeout", "boot", "restore",
    ]  # fmt: skip
    for name in avmm.__all__:
        assert getattr(avmm, name) is not None


def test_import_is_light() -> None:
    """`import avmm` loads no engine, parser, event loop or logger: that is what keeps it under 100 ms."""
    code = "import avmm, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "avmm" in loaded
    assert not {"asyncio", "cffi", "construct", "structlog", "uvloop", "avmm.vm"} & set(loaded)


def test_help_is_light() -> None:
    """So does `avmm boot --help`."""
    code = (
        "import sys, avmm.cli\n"
        "try: avmm.cli.main(['boot', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.split()
    assert not {"asyncio", "cffi", "construct", "structlog", "uvloop", "avmm.vm"} & set(loaded)


def test_a_vm_loads_what_it_is_given() -> None:
    """A VM without drives, shares and snapshots starts a tenth sooner for not loading what they take."""
    code = "import avmm.cli.attach, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"uvloop", "avmm.vm"} <= set(loaded)
    backends = {f"avmm.backends.{name}" for name in ("drive", "share", "usernet", "vsock")}
    assert not {"construct", "fractions", "html", "structlog", "avmm.snapfile", *backends} & set(loaded)
