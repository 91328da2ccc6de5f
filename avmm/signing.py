"""macOS: a Python that may use the hypervisor.

Hypervisor.framework asks for the entitlement ``com.apple.security.hypervisor`` in the signature of the running
executable, which for us is the interpreter. It would be wrong to sign the one everybody uses, and not even possible
for Apple's; so we copy it beside itself, sign the copy (ad hoc: no certificate, no account) and put a launcher there.

What is to be done is a plan, a list of steps that say why; running it twice changes nothing the second time.
"""

from __future__ import annotations

import hashlib
import plistlib
import shlex
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from avmm.errors import ConfigError, HostError

ENTITLEMENT: Final = "com.apple.security.hypervisor"

#: Runs a command: its exit code and its output, stdout alone. FileNotFoundError where there is no such command.
Runner = Callable[[Sequence[str]], tuple[int, bytes]]

_MH_MAGIC_64: Final = 0xFEEDFACF  # <mach-o/loader.h>
_FAT_MAGIC: Final = 0xCAFEBABE  # <mach-o/fat.h>, big endian
_CPU_TYPE_ARM64: Final = 0x0100_000C
_LC_LOAD_DYLIB: Final = 0x0C
_LC_BUILD_VERSION: Final = 0x32
_LOAD_COMMANDS_MAX: Final = 1 << 20


def run_command(argv: Sequence[str]) -> tuple[int, bytes]:
    """The :data:`Runner` of real life."""
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False
    )
    return done.returncode, done.stdout


@dataclass(frozen=True, slots=True)
class Executable:
    """What the load commands of a Mach-O file say. ``sdk`` is what it was built with, "15.2", or None."""

    sdk: str | None
    libraries: tuple[str, ...]


def read_executable(path: Path) -> Executable:
    """The arm64 part of a Mach-O file. Raises ConfigError when it is none."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            start = _arm64_slice(head)
            file.seek(start)
            magic, _, _, _, count, size, _, _ = struct.unpack("<8I", file.read(32))
            if magic != _MH_MAGIC_64 or size > _LOAD_COMMANDS_MAX:
                raise ConfigError(f"{path} is not a 64-bit Mach-O file")
            commands = file.read(size)
    except (OSError, struct.error) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    sdk, libraries, at = None, [], 0
    for _ in range(count):
        if at + 8 > len(commands):
            break
        command, length = struct.unpack_from("<2I", commands, at)
        body = commands[at : at + length]
        if length < 8 or len(body) < length:
            break
        if command == _LC_BUILD_VERSION and length >= 20:
            (version,) = struct.unpack_from("<I", body, 16)
            sdk = f"{version >> 16}.{version >> 8 & 0xFF}" if version else None
        elif command == _LC_LOAD_DYLIB and length >= 24:
            (name,) = struct.unpack_from("<I", body, 8)
            libraries.append(body[name:].split(b"\0", 1)[0].decode(errors="replace"))
        at += length
    return Executable(sdk, tuple(libraries))


def _arm64_slice(head: bytes) -> int:
    """Where the arm64 part of a file that begins with ``head`` starts."""
    magic, count = struct.unpack_from(">2I", head)
    if magic == _FAT_MAGIC:
        for n in range(min(count, (len(head) - 8) // 20)):
            cpu, _, offset, _, _ = struct.unpack_from(">5I", head, 8 + 20 * n)
            if cpu == _CPU_TYPE_ARM64:
                return int(offset)
        raise ConfigError("this Python has no arm64 part: install one for Apple silicon")
    return 0


def entitled(path: Path, run: Runner = run_command) -> bool:
    """Whether ``path`` is signed with the entitlement."""
    try:
        code, output = run(["codesign", "--display", "--entitlements", ":-", str(path)])
        return code == 0 and bool(output) and plistlib.loads(output).get(ENTITLEMENT) is True
    except (FileNotFoundError, plistlib.InvalidFileException, ValueError):
        return False


@dataclass(frozen=True, slots=True)
class Python:
    """The interpreter that is to be copied.

    ``image`` is the file that runs (in a framework build not the one that was called: that one starts Python.app's),
    ``prefix`` and ``base_prefix`` are sys's: where they differ this is a virtual environment. ``version`` is "3.11".
    """

    image: Path
    prefix: Path
    base_prefix: Path
    version: str


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do: why, how to show it to the user, and the doing."""

    why: str
    shown: str
    do: Callable[[], None]


class Signing:
    """Where things go, and the plan. ``home`` is the user's, for an interpreter outside any virtual environment."""

    def __init__(self, python: Python, home: Path, run: Runner = run_command) -> None:
        self.python = python
        self._run = run
        self._virtual = python.prefix != python.base_prefix
        if self._virtual:
            self.root = python.prefix
        else:
            self.root = home / "Library" / "Application Support" / "avmm" / f"python-{python.version}"
        self.copy = self.root / "bin" / "avmm-python"
        self.launcher = self.root / "bin" / "avmm-hv"
        self._entitlements = self.root / "avmm-hypervisor.plist"
        self._source = self.root / "avmm-python.sha256"

    def plan(self) -> list[Step]:
        """What is left to do, in order; nothing when all is in place. Raises ConfigError."""
        if str(self.python.image).startswith(("/usr/bin/", "/System/", "/Library/Developer/", "/Applications/Xcode")):
            raise ConfigError(
                f"{self.python.image} is Apple's, and a copy of it does not run: use a Python from elsewhere"
            )
        digest = hashlib.sha256(self.python.image.read_bytes()).hexdigest()
        steps: list[Step] = []
        if not self._is_current(digest):
            steps += self._make(digest)
        if not self.launcher.exists() or self.launcher.read_text() != self._script():
            steps.append(Step("a command that runs avmm with the copy", f"write {self.launcher}", self._write_launcher))
        return steps

    def verify(self) -> None:
        """Try the copy: it makes a VM. Raises HostError."""
        code, _ = self._run([str(self.copy), "-c", _TRIAL])
        if code:
            raise HostError(f"{self.copy} is signed and still may not make a VM: run `{self.launcher} doctor`")

    def _is_current(self, digest: str) -> bool:
        made_of = self._source.read_text().strip() if self._source.exists() else ""
        return self.copy.exists() and made_of == digest and entitled(self.copy, self._run)

    def _make(self, digest: str) -> list[Step]:
        steps = [
            Step("the entitlement the framework asks for", f"write {self._entitlements}", self._write_entitlements)
        ]
        if not self._virtual:
            config = self.root / "pyvenv.cfg"
            steps.append(Step("so that the copy finds its library and packages", f"write {config}", self._write_config))
        steps.append(
            Step("a copy, so that the Python everybody uses stays as it is", f"copy {self.python.image} to {self.copy}",
                 self._copy)
        )  # fmt: skip
        for library in read_executable(self.python.image).libraries:
            if library.startswith("@executable_path/"):
                real = (self.python.image.parent / library.removeprefix("@executable_path/")).resolve()
                change = ["install_name_tool", "-change", library, str(real), str(self.copy)]
                steps.append(self._command("its library is found relative to it, from where it was", change))
        sign = [
            "codesign", "--force", "--sign", "-", "--entitlements", str(self._entitlements), str(self.copy)
        ]  # fmt: skip
        steps.append(self._command("an ad-hoc signature: no certificate and no account needed", sign))
        steps.append(
            Step("what the copy was made of, to know when Python has been updated", f"write {self._source}",
                 lambda: _write(self._source, digest + "\n"))
        )  # fmt: skip
        return steps

    def _command(self, why: str, argv: list[str]) -> Step:
        def do() -> None:
            try:
                code, _ = self._run(argv)
            except FileNotFoundError as error:
                raise HostError(f"{argv[0]} is missing: run `xcode-select --install`") from error
            if code:
                raise HostError(f"`{shlex.join(argv)}` failed with exit code {code}: run it to see why")

        return Step(why, shlex.join(argv), do)

    def _write_entitlements(self) -> None:
        _write(self._entitlements, plistlib.dumps({ENTITLEMENT: True}).decode())

    def _write_config(self) -> None:
        home = self.python.base_prefix / "bin"
        _write(self.root / "pyvenv.cfg", f"home = {home}\ninclude-system-site-packages = true\n")

    def _copy(self) -> None:
        self.copy.parent.mkdir(parents=True, exist_ok=True)
        # Into a new file: the kernel remembers the signature of one that it has run (and kills what does not match).
        self.copy.unlink(missing_ok=True)
        shutil.copyfile(self.python.image, self.copy)
        self.copy.chmod(0o755)

    def _script(self) -> str:
        return f'#!/bin/sh\n# Made by `avmm sign`.\nexec {shlex.quote(str(self.copy))} -m avmm.cli "$@"\n'

    def _write_launcher(self) -> None:
        _write(self.launcher, self._script())
        self.launcher.chmod(0o755)


_TRIAL: Final = "from avmm.hypervisor import open_hypervisor; open_hypervisor('framework').close()"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def running_image() -> Path:
    """The file of the executable that runs this process (macOS: proc_pidpath(3))."""
    import ctypes
    import os

    buffer = ctypes.create_string_buffer(4096)
    length = ctypes.CDLL(None).proc_pidpath(os.getpid(), buffer, len(buffer))
    if length <= 0:
        raise HostError("the system does not say which executable runs this Python")
    return Path(os.fsdecode(buffer.value))
