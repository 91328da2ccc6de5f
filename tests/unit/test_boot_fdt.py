"""Device trees: our blobs are what `dtc` reads, its blobs are what we read."""

from __future__ import annotations

import contextlib
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avmm import fdt
from avmm.bootloader import machine
from avmm.fdt import Node, decode, encode

needs_dtc = pytest.mark.skipif(not shutil.which("dtc"), reason="needs the device tree compiler")


def dtc(source: bytes, given: str, wanted: str) -> tuple[bytes, str]:
    done = subprocess.run(["dtc", "-I", given, "-O", wanted, "-"], input=source, capture_output=True, check=True)
    return done.stdout, done.stderr.decode()


def uart() -> Node:
    return Node(
        f"pl011@{machine.PL011.base:x}",
        {
            "compatible": ["arm,pl011", "arm,primecell"],
            "reg": machine.PL011.reg,
            "interrupts": machine.PL011.interrupts(fdt.LEVEL),
            "clocks": fdt.cells(fdt.CLOCK_PHANDLE, fdt.CLOCK_PHANDLE),
            "clock-names": ["uartclk", "apb_pclk"],
        },
    )


def tree(cpus: int = 4) -> bytes:
    return machine.build_fdt(
        ram=[(machine.RAM_BASE, 512 << 20), (0x1_0000_0000, 1 << 30)],
        cpus=[0x8000_0000 | index % 16 | index // 16 << 8 for index in range(cpus)],
        bootargs="console=ttyAMA0 quiet",
        initrd=(0x4800_0000, 0x4830_1234),
        devices=[uart()],
        rng_seed=bytes(range(64)),
        kaslr_seed=b"\x11\x22\x33\x44\x55\x66\x77\x88",
    )


@needs_dtc
def test_dtc_has_no_complaint_about_the_machine() -> None:
    assert dtc(tree(), "dtb", "dtb")[1] == ""
    broken = decode(tree())
    broken.find("timer")["interrupts"] = fdt.cells(1)
    assert "interrupts" in dtc(encode(broken), "dtb", "dtb")[1]  # and it does look


@needs_dtc
def test_dtc_sees_the_machine() -> None:
    source = " ".join(dtc(tree(), "dtb", "dts")[0].decode().split())
    source = source.replace(r"\0", '", "')  # how some versions write a list of strings
    for expected in (
        'bootargs = "console=ttyAMA0 quiet";',
        'stdout-path = "/pl011@9000000";',
        "linux,initrd-start = <0x00 0x48000000>; linux,initrd-end = <0x00 0x48301234>;",
        "kaslr-seed = <0x11223344 0x55667788>;",
        "memory@40000000 {",
        "reg = <0x01 0x00 0x00 0x40000000>;",
        "interrupts = <0x01 0x0d 0x04 0x01 0x0e 0x04 0x01 0x0b 0x04 0x01 0x0a 0x04>; always-on;",
        'method = "hvc";',
        "reg = <0x00 0x8000000 0x00 0x10000 0x00 0x80a0000 0x00 0x80000>;",
        "clock-frequency = <0x16e3600>;",
        'compatible = "arm,pl011", "arm,primecell";',
        "interrupts = <0x00 0x01 0x04>;",
    ):
        assert expected in source


@needs_dtc
def test_dtc_and_we_agree_on_a_round_trip() -> None:
    again = dtc(dtc(tree(), "dtb", "dts")[0], "dts", "dtb")[0]
    assert decode(again) == decode(tree())


@needs_dtc
def test_we_read_what_dtc_writes() -> None:
    source = b'/dts-v1/; / { a = "one", "two"; b = <1 2>; sub@1f { reg = <31>; empty; deep { }; }; };'
    root = decode(dtc(source, "dts", "dtb")[0])
    assert root == Node(
        "",
        {"a": ["one", "two"], "b": fdt.cells(1, 2)},
        [Node("sub@1f", {"reg": 31, "empty": b""}, [Node("deep")])],
    )


def test_seventeen_cpus_have_qemus_affinities() -> None:
    cpus = decode(tree(17)).find("cpus").children
    assert [node.name for node in cpus][14:] == ["cpu@e", "cpu@f", "cpu@100"]
    assert cpus[16]["reg"] == fdt.cells(0x100)


def test_a_machine_without_uart_names_no_console() -> None:
    blob = machine.build_fdt(
        ram=[(machine.RAM_BASE, 1 << 24)], cpus=[0], bootargs="", initrd=None, devices=[], rng_seed=b"", kaslr_seed=b""
    )
    assert set(decode(blob).find("chosen").properties) == {"bootargs", "rng-seed", "kaslr-seed"}


def test_virtio_slots_are_qemus() -> None:
    assert (machine.virtio_slot(0).base, machine.virtio_slot(0).spi) == (0x0A00_0000, 16)
    assert (machine.virtio_slot(31).base, machine.virtio_slot(31).spi) == (0x0A00_3E00, 47)
    with pytest.raises(ValueError):
        machine.virtio_slot(32)


NAMES = st.text("abcdefghij,-@0123456789", min_size=1, max_size=8)
NODES = st.recursive(
    st.builds(Node, NAMES, st.dictionaries(NAMES, st.binary(max_size=9), max_size=4)),
    lambda children: st.builds(
        Node, NAMES, st.dictionaries(NAMES, st.binary(max_size=9), max_size=4), st.lists(children, max_size=3)
    ),
    max_leaves=8,
)


@given(NODES)
def test_what_is_encoded_decodes(root: Node) -> None:
    assert decode(encode(root)) == root


@given(st.data())
def test_a_damaged_blob_is_a_value_error_and_no_other(data: st.DataObject) -> None:
    blob = bytearray(tree(1))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        decode(bytes(blob))


@pytest.mark.parametrize("length", [0, 3, 40, 100, 500])
def test_a_blob_cut_short_is_a_value_error(length: int) -> None:
    with pytest.raises(ValueError, match="device tree"):
        decode(tree()[:length])


def test_a_missing_node_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        decode(tree()).find("cpus/cpu@99")
