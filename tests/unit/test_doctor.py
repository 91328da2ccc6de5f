"""``avmm doctor``: softhv is as assumed, and an engine that is not is found out."""

from __future__ import annotations

import json
import plistlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from avmm.cli import main
from avmm.clock import Timebase, host_timebase
from avmm.doctor import Finding, guest, host, probes
from avmm.errors import EngineError
from avmm.faults import Faults
from avmm.hypervisor import ExitKind, Finish, available_engines, open_hypervisor
from avmm.hypervisor._native import NativeHypervisor, NativeVcpu
from avmm.signing import ENTITLEMENT

Run = Callable[[NativeVcpu], int]


def test_this_machine_is_as_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert main(["doctor", "--output", str(report)]) == 0
    out = capsys.readouterr().out
    assert "  BAD " not in out
    findings = json.loads(report.read_text())
    names = [finding["name"] for finding in findings]
    assert set(probes.PROBES) <= set(names)
    assert [finding["ok"] for finding in findings].count(False) == 0
    for name in probes.PROBES:
        assert name in out


@pytest.mark.parametrize("engine", ["softhv", "softhv,interpreter"])
def test_every_expectation_is_judged(engine: str) -> None:
    """A probe that expects something says whether it found it; one that only tells expects nothing."""
    for finding in probes.run(engine):
        assert finding.ok is not False, finding
        assert finding.topic == f"engine {engine}"
        assert (finding.ok is None) == (finding.expected == ""), finding


@pytest.mark.skipif("framework" in available_engines(), reason="this is a Mac")
def test_an_engine_that_cannot_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--engine", "framework", "--output", str(tmp_path / "report.json")]) == 1
    assert "needs macOS on Apple silicon" in capsys.readouterr().out


def test_bad_usage(tmp_path: Path) -> None:
    assert main(["doctor", "--engine", "none"]) == 2
    assert main(["doctor", "--output", str(tmp_path / "none" / "report.json")]) == 2


def test_the_report_does_not_name_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", f"{tmp_path}/venv/bin/python")
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: tmp_path))
    monkeypatch.setattr(probes, "PROBES", {})
    assert main(["doctor", "--output", str(tmp_path / "report.json")]) == 0
    text = (tmp_path / "report.json").read_text()
    assert "at ~/venv/bin/python" in text
    assert str(tmp_path) not in text


# Engines with other manners. Each is one that somebody has claimed to have seen, or that we would not notice else.


def answer_wfi(run: Run) -> Run:
    """The hypervisor sleeps by itself, as with its own GIC."""

    def sleepless(vcpu: NativeVcpu) -> int:
        while (kind := run(vcpu)) == ExitKind.WFI:
            vcpu.frame.finish = Finish.ADVANCE
        return kind

    return sleepless


def answer_icc(run: Run) -> Run:
    """The hypervisor has an interrupt controller of its own."""

    def untrapped(vcpu: NativeVcpu) -> int:
        while (kind := run(vcpu)) in (ExitKind.SYSREG_READ, ExitKind.SYSREG_WRITE):
            vcpu.frame.finish = Finish.RESULT if kind == ExitKind.SYSREG_READ else Finish.ADVANCE
        return kind

    return untrapped


def edge_triggered_timer(run: Run) -> Run:
    """The timer exits once for a deadline, however often it is unmasked."""
    seen: set[int] = set()

    def once(vcpu: NativeVcpu) -> int:
        kind = run(vcpu)
        if kind == ExitKind.VTIMER and id(vcpu) in seen:
            kind = run(vcpu)
        elif kind == ExitKind.VTIMER:
            seen.add(id(vcpu))
        return kind

    return once


def spurious(run: Run) -> Run:
    """It comes back for nothing the first time."""
    seen: set[int] = set()

    def unknown_first(vcpu: NativeVcpu) -> int:
        if id(vcpu) not in seen:
            seen.add(id(vcpu))
            return ExitKind.UNKNOWN
        return run(vcpu)

    return unknown_first


@pytest.mark.parametrize(
    ("manners", "noticed"),
    [
        (answer_wfi, "WFI exits"),
        (answer_wfi, "the virtual timer waits for run"),
        (answer_icc, "interrupt controller registers trap"),
        (edge_triggered_timer, "the virtual timer is a level"),
        (spurious, "HVC exits"),
        (spurious, "device accesses are decoded"),
        (spurious, "a pending interrupt is taken once unmasked"),
        (spurious, "the virtual timer exits and masks itself"),
        (spurious, "a kick ends a loop without exits"),
    ],
)
def test_other_manners_of_run_are_noticed(
    manners: Callable[[Run], Run], noticed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NativeVcpu, "run", manners(NativeVcpu.run))
    monkeypatch.setattr(probes, "PROBES", {noticed: probes.PROBES[noticed]})
    (finding,) = probes.run("softhv")
    assert finding.ok is False, finding


@pytest.mark.parametrize(
    ("method", "instead", "noticed"),
    [
        ("kick", lambda vcpu: None, "a kick before run sticks"),
        ("kick", lambda vcpu: None, "two kicks are one"),
        ("irq_pending", lambda vcpu: True, "the interrupt line falls when run returns"),
        ("vtimer_mask", lambda vcpu: False, "the virtual timer exits and masks itself"),
        ("vtimer_mask", lambda vcpu: True, "the virtual timer waits for run"),
        ("set_vtimer_offset", lambda vcpu, offset: None, "CNTVCT_EL0 is the host's counter less the offset"),
    ],
)
def test_other_manners_of_calls_are_noticed(
    method: str, instead: Callable[..., object], noticed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NativeVcpu, method, instead)
    monkeypatch.setattr(probes, "PROBES", {noticed: probes.PROBES[noticed]})
    (finding,) = probes.run("softhv")
    assert finding.ok is False, finding


@pytest.mark.parametrize(
    ("spec", "noticed"),
    [
        ("spurious-wfi=0", "WFI exits"),
        ("early-wfi=0.99", "WFI exits"),
        ("sticky-kick=no", "a kick before run sticks"),
        ("lose-kick=1", "two kicks are one"),
        ("unknown=0.99", "HVC exits"),
        ("double-vtimer=1", "the virtual timer exits and masks itself"),
        ("fast-counter=yes", "CNTFRQ_EL0 agrees with the host's timebase"),
    ],
)
def test_an_engine_that_misbehaves_is_noticed(spec: str, noticed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest, "open_hypervisor", lambda name: open_hypervisor(name, Faults.parse(spec)))
    monkeypatch.setattr(guest, "_KICK_AFTER", 0.3)
    monkeypatch.setattr(probes, "PROBES", {noticed: probes.PROBES[noticed]})
    (finding,) = probes.run("softhv")
    assert finding.ok is False, finding


def test_a_counter_scaled_to_a_gigahertz_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host counts nanoseconds and the guest sees 24 MHz: the reverse of Apple's newer chips, the same mistake."""
    real = host_timebase()
    monkeypatch.setattr(probes, "host_timebase", lambda: Timebase(1, 1, lambda: real.to_ns(real.now())))
    findings = {finding.name: finding for finding in probes.run("softhv")}
    assert findings["CNTFRQ_EL0 agrees with the host's timebase"].ok is False
    assert findings["CNTVCT_EL0 is the host's counter less the offset"].ok is False
    assert findings["CNTVCT_EL0 advances at CNTFRQ_EL0"].ok is True


def test_a_probe_that_never_answers_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def stuck(engine: str) -> tuple[bool | None, str]:
        release.wait(60)
        return True, ""

    monkeypatch.setattr(guest, "_GIVE_UP_AFTER", 0.05)
    monkeypatch.setattr(
        probes, "PROBES", {"stuck": (stuck, "an answer"), "next": (lambda engine: (True, "fine"), "fine")}
    )
    first, second = probes.run("softhv")
    release.set()
    assert first.ok is False
    assert "not even when kicked" in first.found
    assert second == Finding("engine softhv", "next", "fine", True, "fine")


def test_an_engine_s_error_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(hypervisor: NativeHypervisor) -> NativeVcpu:
        return NativeVcpu(hypervisor._ffi, _Refusing())

    monkeypatch.setattr(probes, "PROBES", {"HVC exits": probes.PROBES["HVC exits"]})
    monkeypatch.setattr("avmm.hypervisor.softhv.Softhv.create_vcpu", refuse)
    (finding,) = probes.run("softhv")
    assert finding.ok is False
    assert "HV_NO_RESOURCES" in finding.found


class _Refusing:
    """An engine's library that makes no vCPU."""

    def hv_vcpu_create(self, *arguments: object) -> int:
        return 0xFAE94005 - (1 << 32)


# The hypervisor's own GIC, which softhv does not have: the calls, and what is made of what comes after.


class FakeGic:
    """The framework's functions around its GIC (macOS 15); they return what ``codes`` says, or success."""

    def __init__(self, **codes: int) -> None:
        self.calls: list[tuple[str, list[int | None]]] = []
        self._codes = codes

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append((name, [argument.value for argument in arguments]))
            return self._codes.get(name, 0)

        return call


@pytest.fixture
def softhv_for_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest, "open_hypervisor", lambda name: open_hypervisor("softhv"))


@pytest.mark.usefixtures("softhv_for_framework")
def test_own_gic_is_made_before_any_vcpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gic = FakeGic(hv_gic_config_create=0x1234)
    create = NativeHypervisor.create_vcpu

    def create_vcpu(hypervisor: NativeHypervisor) -> NativeVcpu:
        gic.calls.append(("vcpu", []))
        return create(hypervisor)

    monkeypatch.setattr("avmm.hypervisor.softhv.Softhv.create_vcpu", create_vcpu)
    assert probes.own_gic_probe(gic) == (None, "WFI at PC +0")
    assert gic.calls == [
        ("hv_gic_config_create", []),
        ("hv_gic_config_set_distributor_base", [0x1234, 0x0800_0000]),
        ("hv_gic_config_set_redistributor_base", [0x1234, 0x1000_0000]),
        ("hv_gic_create", [0x1234]),
        ("os_release", [0x1234]),
        ("vcpu", []),
    ]


def test_own_gic_that_sleeps_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest, "open_hypervisor", lambda name: open_hypervisor("softhv", Faults(spurious_wfi=0.0)))
    assert probes.own_gic_probe(FakeGic()) == (None, "does not exit: the hypervisor sleeps by itself")


@pytest.mark.usefixtures("softhv_for_framework")
def test_own_gic_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The VM is given back: on a Mac the next probe could have none otherwise."""
    closed: list[None] = []
    close = NativeHypervisor.close
    monkeypatch.setattr(NativeHypervisor, "close", lambda hypervisor: closed.append(close(hypervisor)))
    gic = FakeGic(hv_gic_create=0xFAE9400F - (1 << 32))
    with pytest.raises(EngineError, match="hv_gic_create failed: HV_UNSUPPORTED"):
        probes.own_gic_probe(gic)
    assert gic.calls[-1][0] == "os_release"
    assert closed == [None]


# A Mac, as its commands describe it.


class FakeMac:
    """sysctl and codesign of a Mac that is set up, or not."""

    def __init__(self, *, signed: bool = True, support: bytes = b"1\n") -> None:
        self._signed = signed
        self._sysctls = {
            "kern.hv_support": support, "kern.osversion": b"24A335\n", "hw.model": b"Mac16,1\n",
            "machdep.cpu.brand_string": b"Apple M4\n", "hw.tbfrequency": b"24000000\n",
        }  # fmt: skip

    def __call__(self, argv: Sequence[str]) -> tuple[int, bytes]:
        if argv[0] == "sysctl":
            return 0, self._sysctls[argv[2]]
        assert argv[0] == "codesign"
        return 0, plistlib.dumps({ENTITLEMENT: True}) if self._signed else b""


def mac(run: FakeMac, *symbols: str) -> dict[str, Finding]:
    return {finding.name: finding for finding in host.mac(run, Path("/opt/python"), lambda name: name in symbols)}


def test_a_mac_that_is_ready() -> None:
    findings = mac(FakeMac(), "hv_gic_create")
    assert not [finding for finding in findings.values() if finding.ok is False]
    assert findings["hypervisor entitlement"].ok is True
    assert findings["model"].found == "Mac16,1, Apple M4"
    assert findings["the hypervisor's own GIC (macOS 15)"].found == "there"
    assert findings["SME (macOS 15.2)"].found == "not there"


def test_a_mac_without_the_entitlement_is_told_what_to_run() -> None:
    finding = mac(FakeMac(signed=False))["hypervisor entitlement"]
    assert finding.ok is False
    assert "`avmm sign`" in finding.found


def test_a_mac_without_a_hypervisor() -> None:
    assert mac(FakeMac(support=b"0\n"))["hypervisor (kern.hv_support)"].ok is False
