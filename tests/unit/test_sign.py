"""``avmm sign``: its plan, property list and commands, carried out on a Mac that consists of two fake commands."""

from __future__ import annotations

import plistlib
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from avmm.cli import main
from avmm.cli.sign import carry_out
from avmm.errors import ConfigError, HostError
from avmm.signing import ENTITLEMENT, Python, Signing, entitled, read_executable

CLANG = shutil.which("clang-14") or shutil.which("clang")


def mach_o(*libraries: str, sdk: int = 0x0F0200, fat: bool = False) -> bytes:
    """An arm64 executable without code: its header and load commands (<mach-o/loader.h>)."""
    commands = [struct.pack("<6I", 0x32, 24, 1, 0x0B0000, sdk, 0)]
    for library in libraries:
        name = library.encode() + b"\0"
        name += bytes(-len(name) % 8)
        commands.append(struct.pack("<6I", 0x0C, 24 + len(name), 24, 0, 0, 0) + name)
    body = b"".join(commands)
    thin = struct.pack("<8I", 0xFEEDFACF, 0x0100000C, 0, 2, len(commands), len(body), 0, 0) + body
    if not fat:
        return thin
    heads = struct.pack(">5I", 0x01000007, 3, 0x1000, 64, 12) + struct.pack(">5I", 0x0100000C, 0, 0x2000, len(thin), 12)
    return (struct.pack(">2I", 0xCAFEBABE, 2) + heads).ljust(0x2000, b"\0") + thin


class FakeMac:
    """codesign and install_name_tool; a signature belongs to a file's contents, as a real one does."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.missing: set[str] = set()
        self.failing: set[str] = set()
        self._signatures: dict[bytes, bytes] = {}

    def __call__(self, argv: Sequence[str]) -> tuple[int, bytes]:
        self.commands.append(list(argv))
        name = Path(argv[0]).name
        if name in self.missing:
            raise FileNotFoundError(name)
        if name in self.failing:
            return 1, b""
        if name == "codesign" and argv[1] == "--display":
            contents = Path(argv[-1]).read_bytes()
            return (0, self._signatures[contents]) if contents in self._signatures else (1, b"")
        if name == "codesign":
            plist = Path(argv[argv.index("--entitlements") + 1]).read_bytes()
            path = Path(argv[-1])
            path.write_bytes(path.read_bytes() + b"signature")
            self._signatures[path.read_bytes()] = plist
        return 0, b""

    def ran(self, name: str) -> list[list[str]]:
        """The commands of that name that change something, or try."""
        return [argv for argv in self.commands if Path(argv[0]).name == name and "--display" not in argv]


@pytest.fixture
def run() -> FakeMac:
    return FakeMac()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "Python.framework" / "Python.app" / "Contents" / "MacOS" / "Python"
    path.parent.mkdir(parents=True)
    path.write_bytes(mach_o("/Library/Frameworks/Python.framework/Versions/3.11/Python"))
    return path


@pytest.fixture
def venv(image: Path, tmp_path: Path) -> Python:
    return Python(image, tmp_path / "a venv", tmp_path / "base", "3.11")


def test_in_a_virtual_environment(venv: Python, run: FakeMac, tmp_path: Path) -> None:
    signing = Signing(venv, tmp_path / "home", run)
    assert carry_out(signing, dry_run=False) == 0
    assert signing.copy == tmp_path / "a venv" / "bin" / "avmm-python"
    assert entitled(signing.copy, run)
    assert not entitled(venv.image, run), "the user's Python stays as it is"
    ((_, *options, target),) = run.ran("codesign")
    assert options == ["--force", "--sign", "-", "--entitlements", str(tmp_path / "a venv" / "avmm-hypervisor.plist")]
    assert target == str(signing.copy)
    assert plistlib.loads((tmp_path / "a venv" / "avmm-hypervisor.plist").read_bytes()) == {ENTITLEMENT: True}
    assert not run.ran("install_name_tool")
    assert not (tmp_path / "a venv" / "pyvenv.cfg").exists(), "the environment's own is not ours to write"
    ((trial, option, code),) = run.ran("avmm-python")
    assert (trial, option) == (str(signing.copy), "-c")
    compile(code, "trial", "exec")


def test_outside_of_one_it_makes_its_own(image: Path, run: FakeMac, tmp_path: Path) -> None:
    base = tmp_path / "base"
    signing = Signing(Python(image, base, base, "3.12"), tmp_path / "home", run)
    assert carry_out(signing, dry_run=False) == 0
    root = tmp_path / "home" / "Library" / "Application Support" / "avmm" / "python-3.12"
    assert signing.copy == root / "bin" / "avmm-python"
    assert (root / "pyvenv.cfg").read_text() == f"home = {base}/bin\ninclude-system-site-packages = true\n"


def test_twice_changes_nothing(venv: Python, run: FakeMac, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signing = Signing(venv, tmp_path, run)
    carry_out(signing, dry_run=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a venv").rglob("*")}
    capsys.readouterr()
    assert signing.plan() == []
    assert carry_out(signing, dry_run=False) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a venv").rglob("*")} == before
    assert len(run.ran("codesign")) == 1


@pytest.mark.parametrize("what", ["python updated", "copy overwritten", "signature lost", "copy removed"])
def test_what_has_changed_since_is_made_again(what: str, venv: Python, run: FakeMac, tmp_path: Path) -> None:
    signing = Signing(venv, tmp_path, run)
    carry_out(signing, dry_run=False)
    if what == "python updated":
        venv.image.write_bytes(mach_o("/new", sdk=0x100000))
    elif what == "copy overwritten":
        signing.copy.write_bytes(venv.image.read_bytes())
    elif what == "signature lost":
        run._signatures.clear()
    else:
        signing.copy.unlink()
    assert carry_out(signing, dry_run=False) == 0
    assert len(run.ran("codesign")) == 2
    assert entitled(signing.copy, run)
    assert signing.copy.read_bytes() == venv.image.read_bytes() + b"signature"
    assert signing.plan() == []


def test_a_launcher_that_is_gone_comes_back_alone(venv: Python, run: FakeMac, tmp_path: Path) -> None:
    signing = Signing(venv, tmp_path, run)
    carry_out(signing, dry_run=False)
    signing.launcher.unlink()
    assert len(signing.plan()) == 1
    carry_out(signing, dry_run=False)
    assert len(run.ran("codesign")) == 1


def test_the_launcher_launches(venv: Python, run: FakeMac, tmp_path: Path) -> None:
    signing = Signing(venv, tmp_path, run)
    carry_out(signing, dry_run=False)
    signing.copy.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')  # its path has a space in it
    out = subprocess.run([signing.launcher, "boot", "a kernel"], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["-m", "avmm.cli", "boot", "a kernel"]


def test_a_library_beside_the_executable_is_found_from_the_copy(run: FakeMac, tmp_path: Path) -> None:
    image = tmp_path / "uv" / "bin" / "python3.11"
    image.parent.mkdir(parents=True)
    image.write_bytes(mach_o("/usr/lib/libSystem.B.dylib", "@executable_path/../lib/libpython3.11.dylib"))
    signing = Signing(Python(image, tmp_path / "venv", tmp_path / "uv", "3.11"), tmp_path, run)
    carry_out(signing, dry_run=False)
    ((_, *arguments),) = run.ran("install_name_tool")
    library = str(tmp_path / "uv" / "lib" / "libpython3.11.dylib")
    assert arguments == ["-change", "@executable_path/../lib/libpython3.11.dylib", library, str(signing.copy)]
    names = [Path(argv[0]).name for argv in run.commands]
    assert names.index("install_name_tool") < names.index("codesign", 1), "a signature covers what it changes"


def test_dry_run_only_says(venv: Python, run: FakeMac, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signing = Signing(venv, tmp_path, run)
    assert carry_out(signing, dry_run=True) == 0
    assert not (tmp_path / "a venv").exists()
    assert run.commands == []
    out = capsys.readouterr().out
    assert "codesign --force --sign -" in out
    assert "no certificate" in out


def test_apple_s_python_is_refused(run: FakeMac, tmp_path: Path) -> None:
    image = Path("/Library/Developer/CommandLineTools/Library/Frameworks/Python3.framework/Versions/3.9/bin/python3")
    with pytest.raises(ConfigError, match="Apple's"):
        Signing(Python(image, tmp_path, tmp_path, "3.9"), tmp_path, run).plan()


def test_a_missing_tool_is_named_with_where_to_get_it(venv: Python, run: FakeMac, tmp_path: Path) -> None:
    run.missing.add("codesign")
    with pytest.raises(HostError, match="codesign is missing: run `xcode-select --install`"):
        carry_out(Signing(venv, tmp_path, run), dry_run=False)


def test_a_failing_tool_is_shown(venv: Python, run: FakeMac, tmp_path: Path) -> None:
    run.failing.add("codesign")
    with pytest.raises(HostError, match=r"`codesign --force .*` failed with exit code 1"):
        carry_out(Signing(venv, tmp_path, run), dry_run=False)


def test_a_copy_that_may_not_make_a_vm_is_an_error(venv: Python, run: FakeMac, tmp_path: Path) -> None:
    run.failing.add("avmm-python")
    with pytest.raises(HostError, match="still may not make a VM"):
        carry_out(Signing(venv, tmp_path, run), dry_run=False)


def test_a_place_that_cannot_be_written_is_named(image: Path, run: FakeMac, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    signing = Signing(Python(image, tmp_path / "file" / "venv", tmp_path, "3.11"), tmp_path, run)
    with pytest.raises(HostError, match=r"could not write .*avmm-hypervisor.plist: Not a directory"):
        carry_out(signing, dry_run=False)


@pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac")
def test_elsewhere_it_says_that_nothing_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sign"]) == 2
    assert "only needed on macOS" in capsys.readouterr().err


# Mach-O.


@pytest.mark.parametrize("fat", [False, True])
def test_load_commands(tmp_path: Path, fat: bool) -> None:
    path = tmp_path / "python"
    path.write_bytes(mach_o("/usr/lib/libSystem.B.dylib", "@rpath/x.dylib", fat=fat))
    found = read_executable(path)
    assert found.sdk == "15.2"
    assert found.libraries == ("/usr/lib/libSystem.B.dylib", "@rpath/x.dylib")


@pytest.mark.skipif(CLANG is None, reason="needs clang, which makes Mach-O files everywhere")
def test_load_commands_as_clang_writes_them(tmp_path: Path) -> None:
    assert CLANG is not None
    path = tmp_path / "x.o"
    command = [CLANG, "-target", "arm64-apple-macos12.0", "-Xclang", "-target-sdk-version=14.5", "-xc", "-", "-c"]
    subprocess.run([*command, "-o", path], input=b"int x;", check=True, timeout=60)
    assert read_executable(path).sdk == "14.5"


@pytest.mark.parametrize(
    "contents",
    [b"", b"#!/bin/sh\n" * 10, mach_o()[:20], struct.pack("<8I", 0xFEEDFACF, 0, 0, 0, 1, 1 << 30, 0, 0)],
)
def test_what_is_no_executable_is_refused(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "python"
    path.write_bytes(contents)
    with pytest.raises(ConfigError):
        read_executable(path)


def test_load_commands_that_lie_about_their_length_end_the_search(tmp_path: Path) -> None:
    path = tmp_path / "python"
    good = mach_o("/a")
    for length in (0, 7, 0xFFFF_FFFF):
        path.write_bytes(good[:36] + struct.pack("<I", length) + good[40:])
        assert read_executable(path).libraries == ()
