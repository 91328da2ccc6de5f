"""How the C parts are built: one cffi module per engine, from the same declarations.

    avmm.hypervisor._softhv       hv.h, hv_gic.h, frame.h, irqchip.h, softhv/softhv.h: our own engine; everywhere
    avmm.hypervisor._framework    hv.h, frame.h, irqchip.h, compiled against Apple's headers; macOS on Apple silicon

``pip install --no-deps -e .`` rebuilds what has changed. AVMM_SANITIZE=1 in the environment adds
AddressSanitizer and UBSan (the interpreter then needs libasan preloaded).
"""

from __future__ import annotations

import fcntl
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cffi import FFI
from setuptools.command.build_ext import build_ext

HERE = "avmm/hypervisor"  # setuptools wants sources relative to the project's root
ROOT = Path(__file__).resolve().parents[2]
THIS = f"{HERE}/_build.py"

#: Hidden: what nobody else can replace is called, and inlined, as it is. A boot takes 3 % less.
FLAGS = ["-std=c11", "-O2", "-g", "-fno-strict-aliasing", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unused-parameter"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
#: On top of hv_*, in either build.
SHARED = [f"{HERE}/{name}.c" for name in ("frame", "gate", "irqchip", "uart")]
SANITIZE = os.environ.get("AVMM_SANITIZE") == "1"
COMPILE = FLAGS + SANITIZERS if SANITIZE else FLAGS
MACOS = "-mmacosx-version-min=13.0"  # the first with hv_vm_config_get_default_ipa_size
LINK = SANITIZERS if SANITIZE else []


def declarations(*names: str) -> str:
    """The text of our headers: cffi reads the same lines as the compiler."""
    return "\n".join((ROOT / HERE / name).read_text() for name in names)


def softhv() -> FFI:
    """The module around our own engine."""
    ffi = FFI()
    ffi.cdef(declarations("hv.h", "hv_gic.h", "frame.h", "irqchip.h", "softhv/softhv.h"))
    sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / HERE / "softhv").glob("*.c"))
    ffi.set_source(
        "avmm.hypervisor._softhv",
        "#include <stdbool.h>\n#include <stddef.h>\n#include <stdint.h>\n"
        '#include "hv.h"\n#include "hv_gic.h"\n#include "frame.h"\n#include "irqchip.h"\n'
        '#include "softhv/softhv.h"\n',
        sources=[*sources, *SHARED],
        include_dirs=[HERE],
        extra_compile_args=[*COMPILE, "-pthread"],
        extra_link_args=[*LINK, "-pthread"],
        libraries=["m"],
    )
    return ffi


def framework() -> FFI:
    """The module around Apple's framework. Its headers take hv.h's place, so the compiler checks our declarations."""
    ffi = FFI()
    ffi.cdef(declarations("hv.h", "frame.h", "irqchip.h"))
    ffi.set_source(
        "avmm.hypervisor._framework",
        '#include <Hypervisor/Hypervisor.h>\n#include "frame.h"\n#include "irqchip.h"\n',
        sources=SHARED,
        include_dirs=[HERE],
        extra_compile_args=[*COMPILE, MACOS],
        extra_link_args=[*LINK, MACOS, "-framework", "Hypervisor"],
    )
    return ffi


MODULES = [f"{THIS}:softhv"]
if sys.platform == "darwin" and platform.machine() == "arm64":
    MODULES.append(f"{THIS}:framework")


def stale(target: Path, flags: str) -> bool:
    """Whether an object is older than anything it was made of, or was made with other flags."""
    notes = target.with_suffix(".d")
    stamp = target.with_suffix(".flags")
    if not (target.exists() and notes.exists() and stamp.exists()) or stamp.read_text() != flags:
        return True
    made = target.stat().st_mtime
    inputs = [Path(name) for name in notes.read_text().replace("\\\n", " ").split(": ", 1)[1].split()]
    return any(not path.exists() or path.stat().st_mtime >= made for path in inputs)


class BuildExt(build_ext):  # type: ignore[misc]  # setuptools ships no types
    """build_ext that compiles a module's files side by side, and only those that changed."""

    def copy_file(self, source: str, target: str, *args: Any, **options: Any) -> tuple[str, bool]:
        """Into its place whole: a process that starts meanwhile would die of a module that is half there (SIGBUS)."""
        part = f"{target}.part"
        super().copy_file(source, part, *args, **options)
        os.replace(part, target)
        return target, True

    def build_extension(self, ext: Any) -> None:
        """Build one module; only one process at a time, since an editable install is shared."""
        compiler = self.compiler
        one_by_one = type(compiler).compile

        def compile(sources: list[str], output_dir: str, extra_postargs: list[str], **options: Any) -> list[str]:
            def one(source: str) -> str:
                (target,) = compiler.object_filenames([source], output_dir=output_dir)
                flags = repr((extra_postargs, compiler.compiler_so))
                if stale(Path(target), flags):
                    notes = ["-MMD", "-MF", str(Path(target).with_suffix(".d"))]
                    one_by_one(compiler, [source], output_dir, extra_postargs=extra_postargs + notes, **options)
                    Path(target).with_suffix(".flags").write_text(flags)
                return str(target)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(pool.map(one, sources))

        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        with Path(self.build_temp, "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            compiler.compile = compile
            self.force = True  # linking is cheap, and setuptools knows nothing of our headers
            super().build_extension(ext)
