"""What is added to a VM before its start is what it could have been made with."""

from __future__ import annotations

from pathlib import Path

import pytest

import avmm
from avmm.errors import ConfigError


async def test_added_is_as_given(tmp_path: Path) -> None:
    switch = avmm.Switch()
    wanted = avmm.VmConfig.resolve(
        "Image", drives=["a.img,ro", "b.qcow2"], ports=["hvc0", "agent"], net=["user", switch],
        shares=[f"{tmp_path}:it:rw"], vsock=["9=/run/nine", "10=/run/ten"],
    )  # fmt: skip
    vm = avmm.VirtualMachine(avmm.VmConfig.resolve("Image"))
    for drive in ("a.img,ro", "b.qcow2"):
        vm.add_drive(drive)
    for port in ("hvc0", "agent"):
        vm.add_port(port)
    for net in ("user", switch):
        vm.add_net(net)
    vm.add_share(f"{tmp_path}:it:rw")
    vm.add_vsock("9=/run/nine")
    vm.add_vsock("10=/run/ten")
    assert vm.config == wanted
    assert vm.config.bootargs.endswith("avmm.share=it")
    bare = avmm.VirtualMachine(avmm.VmConfig.resolve("Image"))
    bare.add_vsock()
    assert bare.config == avmm.VmConfig.resolve("Image", vsock=True)
    with pytest.raises(ConfigError, match="different names"):
        vm.add_port("hvc0")
    with pytest.raises(ConfigError, match="one socket"):
        vm.add_vsock("9=/x")
    with pytest.raises(ConfigError, match="raw or qcow2"):
        vm.add_drive("x,format=vmdk")
    assert vm.config == wanted
