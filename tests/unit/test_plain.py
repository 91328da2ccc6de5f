"""Plain data as JSON and back; what is no plain data of avmm's is refused."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avmm.config import DriveConfig, VmConfig
from avmm.devices.gicv3 import Gicv3
from avmm.devices.virtio.console import ConsoleState
from avmm.snapshot.plain import NotPlain, dumps, loads
from avmm.vcpu.psci import Power

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@given(PLAIN)
def test_what_is_written_is_read(value: Any) -> None:
    assert loads(dumps(value)) == value


@pytest.mark.parametrize(
    "value",
    [
        VmConfig(kernel=Path("/k"), drives=(DriveConfig(Path("/d"), snapshot=True),), ports=("a",)),
        Gicv3(threading.RLock(), 3, 96).save(),
        ConsoleState((True, False), (b"\0\xff",), (80, 25)),
    ],
)
def test_states_and_configurations(value: Any) -> None:
    assert loads(dumps(value)) == value


def test_enumerations_are_the_same_objects() -> None:
    assert loads(dumps(Power.ON_PENDING)) is Power.ON_PENDING


def test_relative_paths_become_absolute() -> None:
    assert loads(dumps(Path("x"))) == Path.cwd() / "x"


@pytest.mark.parametrize("value", [object(), {1, 2}, threading.RLock(), Power])
def test_anything_else_is_not_written(value: Any) -> None:
    with pytest.raises(TypeError):
        dumps(value)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"\xff", b'{"a": 1, "b": 2}', b"{}", b'{"bytes": 3}', b'{"enum": 1}',
        json.dumps({"os:system": {"command": "true"}}).encode(),
        json.dumps({"avmm.vm:boot": {"kernel": "x"}}).encode(),
        json.dumps({"avmm.vm:VirtualMachine": {"config": None}}).encode(),
        json.dumps({"avmm.config:os.system": {}}).encode(),
        json.dumps({"avmm.config:DriveConfig": {"unknown": 1}}).encode(),
        json.dumps({"avmm.nothing:Nothing": {}}).encode(),
        json.dumps({"enum": ["avmm.config:DriveConfig", 1]}).encode(),
        b"[" * 100_000,
    ],
)  # fmt: skip
def test_anything_else_is_not_read(data: bytes) -> None:
    with pytest.raises(NotPlain):
        loads(data)
