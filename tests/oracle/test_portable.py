"""Ops with two implementations, the host's instructions and plain C: both give the same.

The differential tests see only the one this host takes.
"""

from __future__ import annotations

import ctypes
import random
import struct
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.oracle

SOURCES = Path(__file__).parents[2] / "avmm" / "hypervisor" / "softhv"
COUNT = 5000
V_Q = 4


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> list[ctypes.CDLL]:
    """The ops as they are built, and without this host's instruction sets."""
    files = [Path(__file__).with_name("simd_shim.c")]
    files += [SOURCES / name for name in ("exec_crypto.c", "exec_simd_fp.c", "fpu.c")]
    found = []
    for name, flags in (("host", []), ("portable", ["-DSOFTHV_PORTABLE"])):
        library = tmp_path_factory.mktemp(name) / f"{name}.so"
        command = ["cc", "-std=c11", "-O2", "-fno-strict-aliasing", "-shared", "-fPIC", f"-I{SOURCES}", *flags]
        subprocess.run([*command, *files, "-lm", "-o", library], check=True)
        found.append(ctypes.CDLL(str(library)))
    return found


def floats(rng: random.Random, double: bool) -> bytes:
    """A register of floats near one: whole registers stay on the fast path."""
    if double:
        return struct.pack("<2d", *(rng.uniform(-4, 4) for _ in range(2)))
    return struct.pack("<4f", *(rng.uniform(-4, 4) for _ in range(4)))


@pytest.mark.parametrize(
    ("op", "size"),
    [("aese", 0), ("aesd", 0), ("aesmc", 0), ("aesimc", 0), ("pmull64", 3)]
    + [(op, size) for op in ("v_fmla", "v_fmls") for size in (2, 3)],
)
def test_host_and_plain_c_agree(builds: list[ctypes.CDLL], op: str, size: int) -> None:
    rng = random.Random(f"{op} {size}")
    if op.startswith("v_f"):
        data = b"".join(floats(rng, size == 3) for _ in range(3 * COUNT))
    else:
        data = rng.randbytes(48 * COUNT)
    results = []
    for build in builds:
        out = ctypes.create_string_buffer(16 * COUNT)
        assert build.run(op.encode(), size | V_Q, ctypes.c_size_t(COUNT), data, out) & 1
        results.append(out.raw)
    assert results[0] == results[1]
