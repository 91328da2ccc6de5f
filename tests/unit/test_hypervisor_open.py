"""Picking an engine, and what importing avmm costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from avmm.errors import ConfigError, EngineError
from avmm.hypervisor import ENGINES, available_engines, open_hypervisor
from avmm.hypervisor._native import fail


def test_auto_is_the_first_available() -> None:
    hypervisor = open_hypervisor()
    assert hypervisor.capabilities.name == available_engines()[0]
    hypervisor.close()


def test_unknown_engine_is_told_the_names() -> None:
    with pytest.raises(ConfigError, match="use auto, framework, softhv, softhv,interpreter or softhv,turns"):
        open_hypervisor("qemu")


@pytest.mark.skipif("framework" in available_engines(), reason="this is a Mac")
def test_framework_elsewhere_says_where() -> None:
    with pytest.raises(EngineError, match="needs macOS on Apple silicon"):
        open_hypervisor("framework")


def test_softhv_is_everywhere() -> None:
    assert "softhv" in available_engines()
    assert set(available_engines()) <= set(ENGINES)


def test_failure_carries_apple_s_name_and_the_unsigned_code() -> None:
    with pytest.raises(EngineError, match=r"hv_vm_map failed: HV_BAD_ARGUMENT \(0xfae94003\)") as caught:
        fail("hv_vm_map", 0xFAE94003 - (1 << 32))
    assert caught.value.code == 0xFAE94003


def test_import_loads_no_engine() -> None:
    code = (
        "import sys, avmm, avmm.hypervisor;"
        "loaded = {'cffi', '_cffi_backend', 'construct', 'structlog', 'uvloop', 'avmm.hypervisor._softhv'};"
        "print(sorted(loaded & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30).stdout
    assert output.strip() == "[]"
