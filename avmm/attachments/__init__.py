"""Everything a VM can be given: a small module for each kind, which joins a backend and a virtio device."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from avmm.attachments.agent import AgentAttachment
from avmm.attachments.balloon import BalloonAttachment
from avmm.attachments.base import Attachment
from avmm.attachments.drive import DriveAttachment
from avmm.attachments.net import NetAttachment
from avmm.attachments.ports import PortsAttachment
from avmm.attachments.rng import RngAttachment
from avmm.attachments.share import ShareAttachment
from avmm.attachments.vsock import VsockAttachment
from avmm.bootloader.machine import VIRTIO_SLOTS
from avmm.config import VmConfig
from avmm.errors import AvmmError, ConfigError


def attachments_of(config: VmConfig) -> list[Attachment]:
    """What a VM of ``config`` is given, not opened yet, in the order of its virtio slots. Raises ConfigError."""
    given: list[Attachment] = [DriveAttachment(each, f"drive{index}") for index, each in enumerate(config.drives)]
    given += [RngAttachment(), BalloonAttachment(config.memory)]
    publish = config.publish
    for index, net in enumerate(config.nets):
        given.append(NetAttachment(net, f"net{index}", publish if net.kind == "user" else ()))
        publish = publish if net.kind != "user" else ()
    if config.ports:
        given.append(PortsAttachment(config.ports))
    tags = [share.tag for share in config.shares]
    if len(set(tags)) < len(tags):
        raise ConfigError(f"two shares have one tag: name them with DIR:TAG (they are {', '.join(tags)})")
    given += [ShareAttachment(each) for each in config.shares]
    if config.agent is not None:
        given.append(AgentAttachment())
    if config.vsock is not None:
        given.append(VsockAttachment(config.vsock))
    if len(given) > VIRTIO_SLOTS:
        raise ConfigError(f"a VM has room for {VIRTIO_SLOTS} virtio devices, not {len(given)}")
    return given


def open_all(attachments: Sequence[Attachment]) -> None:
    """Open them all; or none, and those not reached are closed, too. Blocks. Raises HostError."""
    with contextlib.ExitStack() as opened:
        for index, each in enumerate(attachments):
            try:
                each.open()
            except BaseException:
                close_all(attachments[index + 1 :])
                raise
            opened.callback(each.close)
        opened.pop_all()


def close_all(attachments: Sequence[Attachment]) -> None:
    """Close them all; the first thing that went wrong is raised then. Blocks. Raises HostError."""
    failed: AvmmError | None = None
    for each in attachments:
        try:
            each.close()
        except AvmmError as error:
            failed = failed or error
    if failed is not None:
        raise failed


def describe_all(config: VmConfig) -> dict[str, list[Any]]:
    """What ``--dry-run`` shows of a VM's attachments, by section. Raises HostError."""
    attachments = attachments_of(config)
    open_all(attachments)
    try:
        sections: dict[str, list[Any]] = {"drives": [], "nets": [], "ports": [], "shares": [], "vsock": []}
        for each in attachments:
            if each.section:
                sections.setdefault(each.section, []).extend(each.describe())
        return sections
    finally:
        close_all(attachments)
