"""The Python side of Apple's framework, over a library with its manners: one VM, without a handle, in a process."""

from __future__ import annotations

import asyncio
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import avmm
from avmm.errors import EngineError
from avmm.hypervisor import _softhv, available_engines, open_hypervisor

pytestmark = pytest.mark.skipif("framework" in available_engines(), reason="this is a Mac: the real one is there")

IMAGES = Path(__file__).parents[2] / "firmware" / "images"
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
