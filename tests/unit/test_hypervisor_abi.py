"""hv.h and frame.h, as cffi read them, against Apple's ABI value by value.

The values are those of macOS's <Hypervisor/hv_base.h>, <hv_vcpu_types.h> and <hv_error.h>, written down here a second
time on purpose.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from avmm.hypervisor import ExitKind, Finish, Reg, sysreg
from avmm.hypervisor._native import MEMORY_EXEC, MEMORY_READ, MEMORY_WRITE, RETURN_CODES
from avmm.hypervisor._softhv import ffi, lib
from avmm.vcpu import sysregs

HYPERVISOR = Path(__file__).parents[2] / "avmm" / "hypervisor"
ENGINE = (HYPERVISOR / "softhv" / "engine.h").read_text()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("hv_return_t", 4),
        ("hv_vcpu_t", 8),
        ("hv_ipa_t", 8),
        ("hv_memory_flags_t", 8),
        ("hv_exception_syndrome_t", 8),
        ("hv_exception_address_t", 8),
        ("hv_exit_reason_t", 4),
        ("hv_interrupt_type_t", 4),
        ("hv_reg_t", 4),
        ("hv_simd_fp_reg_t", 4),
        ("hv_sys_reg_t", 2),
        ("hv_feature_reg_t", 4),
        ("hv_vcpu_exit_t", 32),
        ("hv_vcpu_exit_exception_t", 24),
    ],
)
def test_size_of_type(name: str, size: int) -> None:
    assert ffi.sizeof(name) == size


def test_return_codes_are_signed() -> None:
    assert int(ffi.cast("hv_return_t", 0xFAE94001)) == 0xFAE94001 - (1 << 32)


def test_exit_layout() -> None:
    assert ffi.offsetof("hv_vcpu_exit_t", "reason") == 0
    assert ffi.offsetof("hv_vcpu_exit_t", "exception") == 8
    assert ffi.offsetof("hv_vcpu_exit_t", "exception", "syndrome") == 8
    assert ffi.offsetof("hv_vcpu_exit_t", "exception", "virtual_address") == 16
    assert ffi.offsetof("hv_vcpu_exit_t", "exception", "physical_address") == 24


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HV_SUCCESS", 0),
        ("HV_ERROR", 0xFAE94001),
        ("HV_BUSY", 0xFAE94002),
        ("HV_BAD_ARGUMENT", 0xFAE94003),
        ("HV_ILLEGAL_GUEST_STATE", 0xFAE94004),
        ("HV_NO_RESOURCES", 0xFAE94005),
        ("HV_NO_DEVICE", 0xFAE94006),
        ("HV_DENIED", 0xFAE94007),
        ("HV_UNSUPPORTED", 0xFAE9400F),
    ],
)
def test_return_code_of_softhv(name: str, value: int) -> None:
    assert RETURN_CODES[value] == name
    match = re.search(rf"#define {name} (?:\(\(hv_return_t\))?(0x[0-9a-f]+|0)\b", ENGINE)
    assert match is not None
    assert int(match[1], 0) == value


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        ("HV_EXIT_REASON_", ["CANCELED", "EXCEPTION", "VTIMER_ACTIVATED", "UNKNOWN"]),
        ("HV_INTERRUPT_TYPE_", ["IRQ", "FIQ"]),
    ],
)
def test_enumeration_counts_from_zero(prefix: str, names: list[str]) -> None:
    assert f"enum {{ {', '.join(prefix + name for name in names)} }};" in ENGINE


def test_every_return_code_has_its_name() -> None:
    assert RETURN_CODES == {
        0: "HV_SUCCESS", 0xFAE94001: "HV_ERROR", 0xFAE94002: "HV_BUSY", 0xFAE94003: "HV_BAD_ARGUMENT",
        0xFAE94004: "HV_ILLEGAL_GUEST_STATE", 0xFAE94005: "HV_NO_RESOURCES", 0xFAE94006: "HV_NO_DEVICE",
        0xFAE94007: "HV_DENIED", 0xFAE94008: "HV_FAULT", 0xFAE9400F: "HV_UNSUPPORTED",
    }  # fmt: skip


def test_memory_flags() -> None:
    assert (MEMORY_READ, MEMORY_WRITE, MEMORY_EXEC) == (1, 2, 4)
    assert "enum { HV_MEMORY_READ = 1, HV_MEMORY_WRITE = 2, HV_MEMORY_EXEC = 4 };" in ENGINE


def test_registers() -> None:
    assert (Reg.PC, Reg.FPCR, Reg.FPSR, Reg.CPSR) == (31, 32, 33, 34)


@pytest.mark.parametrize(
    ("fields", "encoding"),
    [
        ((2, 0, 0, 0, 4), 0x8004),  # DBGBVR0_EL1
        ((2, 0, 0, 2, 2), 0x8012),  # MDSCR_EL1
        ((3, 0, 0, 0, 0), 0xC000),  # MIDR_EL1
        ((3, 0, 0, 0, 5), 0xC005),  # MPIDR_EL1
        ((3, 0, 0, 4, 0), 0xC020),  # ID_AA64PFR0_EL1
        ((3, 0, 1, 0, 0), 0xC080),  # SCTLR_EL1
        ((3, 0, 1, 0, 2), 0xC082),  # CPACR_EL1
        ((3, 0, 2, 0, 0), 0xC100),  # TTBR0_EL1
        ((3, 0, 4, 0, 0), 0xC200),  # SPSR_EL1
        ((3, 0, 4, 1, 0), 0xC208),  # SP_EL0
        ((3, 0, 10, 2, 0), 0xC510),  # MAIR_EL1
        ((3, 0, 12, 0, 0), 0xC600),  # VBAR_EL1
        ((3, 0, 14, 1, 0), 0xC708),  # CNTKCTL_EL1
        ((3, 2, 0, 0, 0), 0xD000),  # CSSELR_EL1
        ((3, 3, 13, 0, 2), 0xDE82),  # TPIDR_EL0
        ((3, 3, 14, 3, 1), 0xDF19),  # CNTV_CTL_EL0
        ((3, 3, 14, 3, 2), 0xDF1A),  # CNTV_CVAL_EL0
        ((3, 4, 4, 1, 0), 0xE208),  # SP_EL1
    ],
)
def test_sysreg_encoding(fields: tuple[int, int, int, int, int], encoding: int) -> None:
    assert sysreg(*fields) == encoding


#: hv_sys_reg_t, by the names of <Hypervisor/hv_vcpu_types.h> without HV_SYS_REG_.
SYSREGS = {
    "MDSCR_EL1": 0x8012, "MPIDR_EL1": 0xC005, "ID_AA64PFR0_EL1": 0xC020, "SCTLR_EL1": 0xC080, "ACTLR_EL1": 0xC081,
    "CPACR_EL1": 0xC082, "TTBR0_EL1": 0xC100, "TTBR1_EL1": 0xC101, "TCR_EL1": 0xC102, "SPSR_EL1": 0xC200,
    "ELR_EL1": 0xC201, "SP_EL0": 0xC208, "AFSR0_EL1": 0xC288, "AFSR1_EL1": 0xC289, "ESR_EL1": 0xC290,
    "FAR_EL1": 0xC300, "PAR_EL1": 0xC3A0, "MAIR_EL1": 0xC510, "AMAIR_EL1": 0xC518, "VBAR_EL1": 0xC600,
    "CONTEXTIDR_EL1": 0xC681, "TPIDR_EL1": 0xC684, "CNTKCTL_EL1": 0xC708, "CSSELR_EL1": 0xD000, "SP_EL1": 0xE208,
    "TPIDR_EL0": 0xDE82, "TPIDRRO_EL0": 0xDE83, "CNTV_CTL_EL0": 0xDF19, "CNTV_CVAL_EL0": 0xDF1A,
}  # fmt: skip


def test_every_register_we_touch_is_the_framework_s() -> None:
    ours = {name: value for name, value in vars(sysregs).items() if name.endswith(("_EL0", "_EL1")) and name[0] != "_"}
    ours |= sysregs.SAVED
    del ours["CNTFRQ_EL0"]  # asked for where an engine has it
    assert {name: hex(value) for name, value in ours.items()} == {name: hex(SYSREGS[name]) for name in ours}


#: Results and arguments, as the framework's headers declare them.
PROTOTYPES = """
hv_return_t hv_vm_create(hv_vm_config_t)
hv_return_t hv_vm_destroy(void)
hv_return_t hv_vm_get_max_vcpu_count(uint32_t *)
hv_return_t hv_vm_map(void *, hv_ipa_t, size_t, hv_memory_flags_t)
hv_return_t hv_vm_unmap(hv_ipa_t, size_t)
hv_return_t hv_vm_protect(hv_ipa_t, size_t, hv_memory_flags_t)
hv_vm_config_t hv_vm_config_create(void)
hv_return_t hv_vm_config_get_max_ipa_size(uint32_t *)
hv_return_t hv_vm_config_get_default_ipa_size(uint32_t *)
hv_return_t hv_vm_config_set_ipa_size(hv_vm_config_t, uint32_t)
hv_return_t hv_vm_config_get_ipa_size(hv_vm_config_t, uint32_t *)
hv_vcpu_config_t hv_vcpu_config_create(void)
hv_return_t hv_vcpu_config_get_feature_reg(hv_vcpu_config_t, uint32_t, uint64_t *)
hv_return_t hv_vcpu_create(uint64_t *, hv_vcpu_exit_t **, hv_vcpu_config_t)
hv_return_t hv_vcpu_destroy(uint64_t)
hv_return_t hv_vcpu_run(uint64_t)
hv_return_t hv_vcpus_exit(uint64_t *, uint32_t)
hv_return_t hv_vcpu_get_reg(uint64_t, uint32_t, uint64_t *)
hv_return_t hv_vcpu_set_reg(uint64_t, uint32_t, uint64_t)
hv_return_t hv_vcpu_get_sys_reg(uint64_t, uint16_t, uint64_t *)
hv_return_t hv_vcpu_set_sys_reg(uint64_t, uint16_t, uint64_t)
hv_return_t hv_vcpu_get_pending_interrupt(uint64_t, uint32_t, bool *)
hv_return_t hv_vcpu_set_pending_interrupt(uint64_t, uint32_t, bool)
hv_return_t hv_vcpu_get_exec_time(uint64_t, uint64_t *)
hv_return_t hv_vcpu_get_vtimer_mask(uint64_t, bool *)
hv_return_t hv_vcpu_set_vtimer_mask(uint64_t, bool)
hv_return_t hv_vcpu_get_vtimer_offset(uint64_t, uint64_t *)
hv_return_t hv_vcpu_set_vtimer_offset(uint64_t, uint64_t)
hv_return_t hv_vcpu_set_trap_debug_exceptions(uint64_t, bool)
hv_return_t hv_vcpu_set_trap_debug_reg_accesses(uint64_t, bool)
hv_gic_config_t hv_gic_config_create(void)
hv_return_t hv_gic_config_set_distributor_base(hv_gic_config_t, hv_ipa_t)
hv_return_t hv_gic_config_set_redistributor_base(hv_gic_config_t, hv_ipa_t)
hv_return_t hv_gic_create(hv_gic_config_t)
hv_return_t hv_gic_reset(void)
hv_return_t hv_gic_set_spi(uint32_t, bool)
hv_return_t hv_gic_get_spi_interrupt_range(uint32_t *, uint32_t *)
"""


@pytest.mark.parametrize("prototype", PROTOTYPES.strip().splitlines(), ids=lambda text: text.split()[1].split("(")[0])
def test_prototype(prototype: str) -> None:
    result, rest = prototype.split(" ", 1)
    name, arguments = rest.removesuffix(")").split("(")
    found = ffi.typeof(ffi.addressof(lib, name))
    expected = ffi.typeof(f"{result}(*)({arguments})")
    assert found is expected


def declared_text() -> str:
    return (HYPERVISOR / "hv.h").read_text() + (HYPERVISOR / "hv_gic.h").read_text()


def test_no_function_is_declared_that_is_not_checked() -> None:
    declared = set(re.findall(r"\b(hv_\w+)\(", declared_text()))
    assert declared == set(re.findall(r"\b(hv_\w+)\(", PROTOTYPES))


def test_simd_registers_go_by_value_in_16_bytes() -> None:
    text = (HYPERVISOR / "hv_simd.h").read_text()
    assert "typedef uint8_t hv_simd_fp_uchar16_t __attribute__((vector_size(16)));" in text
    assert "hv_vcpu_set_simd_fp_reg(hv_vcpu_t vcpu, hv_simd_fp_reg_t reg, hv_simd_fp_uchar16_t value);" in text


@pytest.mark.parametrize("kind", ExitKind)
def test_exit_kind_is_the_header_s(kind: ExitKind) -> None:
    assert getattr(lib, f"AVMM_EXIT_{kind.name}") == kind


@pytest.mark.parametrize("finish", Finish)
def test_finish_is_the_header_s(finish: Finish) -> None:
    assert getattr(lib, f"AVMM_FINISH_{finish.name}") == finish


def test_every_exit_kind_is_known() -> None:
    text = (HYPERVISOR / "frame.h").read_text()
    assert set(re.findall(r"#define AVMM_EXIT_(\w+)", text)) == {kind.name for kind in ExitKind}
