"""The Python side of Apple's framework, over a library with its manners: one VM, without a handle, in a process."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

import avmm
from avmm.errors import EngineError
from avmm.hypervisor import _softhv, available_engines, open_hypervisor

pytestmark = pytest.mark.skipif("framework" in available_engines(), reason="this is a Mac: the real one is there")

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "firmware" / "images"
CLANG = shutil.which("clang-14") or shutil.which("clang")
HV_BUSY, HV_DENIED, HV_UNSUPPORTED = 0xFAE94002, 0xFAE94007, 0xFAE9400F


class OneVm:
    """softhv without what Apple lacks: its calls act on the process's only VM."""

    def __init__(self) -> None:
        self.refuse = 0
        self._there = False

    def hv_vm_create(self, config: Any) -> int:
        if self._there or self.refuse:
            return (self.refuse or HV_BUSY) - (1 << 32)
        self._there = True
        return int(_softhv.lib.hv_vm_create(config))

    def hv_vm_destroy(self) -> int:
        self._there = False
        return int(_softhv.lib.hv_vm_destroy())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("softhv_"):
            raise AttributeError(f"Hypervisor.framework has no {name}")
        return getattr(_softhv.lib, name)


@pytest.fixture
def lib(monkeypatch: pytest.MonkeyPatch) -> Iterator[OneVm]:
    lib = OneVm()
    module = types.ModuleType("avmm.hypervisor._framework")
    module.ffi, module.lib = _softhv.ffi, lib  # type: ignore[attr-defined]  # what cffi's modules have
    monkeypatch.setitem(sys.modules, "avmm.hypervisor._framework", module)
    yield lib
    sys.modules.pop("avmm.hypervisor.framework", None)


async def test_guests_run_one_after_the_other(lib: OneVm) -> None:
    for guest, cpus in (("timer_wfi", 1), ("ipi_pingpong", 2)):
        async with avmm.boot(IMAGES / f"{guest}.bin", memory="64M", cpus=cpus, engine="framework") as vm:
            assert (await asyncio.wait_for(vm.wait(), 60)).reason == "power-off"
            assert b"not ok" not in vm.console.output


async def test_a_second_vm_is_told_that_there_is_one(lib: OneVm) -> None:
    async with avmm.boot(IMAGES / "timer_wfi.bin", memory="64M", cmdline="n=100000", engine="framework") as vm:
        with pytest.raises(EngineError, match="one VM per process: close the first") as caught:
            await avmm.boot(IMAGES / "hello.bin", memory="64M", engine="framework")
        assert caught.value.code == HV_BUSY
        assert vm.outcome is None, "the first goes on"
    async with avmm.boot(IMAGES / "hello.bin", memory="64M", engine="framework") as vm:
        assert (await asyncio.wait_for(vm.wait(), 60)).reason == "power-off"


def test_without_the_entitlement_it_says_what_to_run(lib: OneVm) -> None:
    lib.refuse = HV_DENIED
    with pytest.raises(EngineError, match="run `avmm sign` once") as caught:
        open_hypervisor("framework")
    assert caught.value.code == HV_DENIED


def test_without_a_hypervisor_it_says_what_else_there_is(lib: OneVm) -> None:
    lib.refuse = HV_UNSUPPORTED
    with pytest.raises(EngineError, match="engine='softhv'"):
        open_hypervisor("framework")


def test_any_other_refusal_is_shown_as_it_is(lib: OneVm) -> None:
    lib.refuse = 0xFAE94001
    with pytest.raises(EngineError, match=r"hv_vm_create failed: HV_ERROR \(0xfae94001\)"):
        open_hypervisor("framework")


# The build, against the types of Apple's headers: enumerations where ours are integers.

APPLE_TYPES = """
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
typedef int hv_return_t;
typedef uint64_t hv_vcpu_t, hv_ipa_t, hv_memory_flags_t, hv_exception_syndrome_t, hv_exception_address_t;
typedef enum : uint32_t {
    HV_EXIT_REASON_CANCELED, HV_EXIT_REASON_EXCEPTION, HV_EXIT_REASON_VTIMER_ACTIVATED, HV_EXIT_REASON_UNKNOWN
} hv_exit_reason_t;
typedef enum : uint32_t { HV_INTERRUPT_TYPE_IRQ, HV_INTERRUPT_TYPE_FIQ } hv_interrupt_type_t;
typedef enum : uint32_t { HV_REG_PC = 31, HV_REG_FPCR, HV_REG_FPSR, HV_REG_CPSR } hv_reg_t;
typedef enum : uint32_t { HV_SIMD_FP_REG_Q0 } hv_simd_fp_reg_t;
typedef enum : uint16_t { HV_SYS_REG_CNTV_CTL_EL0 = 0xdf19, HV_SYS_REG_CNTV_CVAL_EL0 = 0xdf1a } hv_sys_reg_t;
typedef enum : uint32_t { HV_FEATURE_REG_ID_AA64DFR0_EL1 } hv_feature_reg_t;
typedef struct {
    hv_exception_syndrome_t syndrome;
    hv_exception_address_t virtual_address;
    hv_ipa_t physical_address;
} hv_vcpu_exit_exception_t;
typedef struct { hv_exit_reason_t reason; hv_vcpu_exit_exception_t exception; } hv_vcpu_exit_t;
typedef struct hv_vm_config_s *hv_vm_config_t;
typedef struct hv_vcpu_config_s *hv_vcpu_config_t;
"""


#: What macOS has and Linux has not, and the other way round.
MACOS = """
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>
#define CLOCK_UPTIME_RAW 8
unsigned long long clock_gettime_nsec_np(clockid_t clock);
int pthread_cond_timedwait_relative_np(pthread_cond_t *cond, pthread_mutex_t *lock, const struct timespec *relative);
#undef MADV_HUGEPAGE
#undef __linux__
#pragma GCC poison pthread_cond_clockwait pthread_mutex_clocklock pthread_condattr_setclock clock_nanosleep
#pragma GCC poison sched_getcpu memfd_create mremap
"""


@pytest.mark.skipif(CLANG is None, reason="needs clang, which knows enumerations of a fixed size as Apple's headers do")
def test_all_files_of_the_build_compile_with_apple_s_types(tmp_path: Path) -> None:
    assert CLANG is not None
    source = ROOT / "avmm" / "hypervisor"
    functions = (source / "hv.h").read_text()
    simd = (source / "hv_simd.h").read_text()
    header = tmp_path / "Hypervisor" / "Hypervisor.h"
    header.parent.mkdir()
    header.write_text(APPLE_TYPES + functions[functions.index("hv_return_t hv_vm_create") :] + simd)
    objects = tmp_path / "os" / "object.h"
    objects.parent.mkdir()
    objects.write_text("void os_release(void *object);\n")
    macos = tmp_path / "macos.h"
    macos.write_text(MACOS)
    build = run_path(str(source / "_build.py"))
    module = tmp_path / "_framework.c"
    build["framework"]().emit_c_code(str(module))
    check: list[str | Path] = [
        CLANG, "-std=c11", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-fsyntax-only",
        "-I", tmp_path, "-I", source, "-I", sysconfig.get_path("include"),
    ]  # fmt: skip
    apple: list[str | Path] = ["-D__APPLE__", "-include", macos]
    shared = ("frame.c", "gate.c", "irqchip.c", "uart.c")
    runs: list[list[str | Path]] = [[module], *([*apple, source / name] for name in shared)]
    runs += [[*apple, path] for path in sorted((source / "softhv").glob("*.c"))]
    for options in runs:
        done = subprocess.run([*check, *options], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
