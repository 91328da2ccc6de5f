"""A shared folder: a folder on the host, a virtio-fs device in the guest."""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING, Any, Final

from avmm.attachments.base import Attachment
from avmm.config import ShareConfig
from avmm.devices.virtio.fs import Fs
from avmm.devices.virtio.transport import VirtioDevice

if TYPE_CHECKING:  # see base.py
    from avmm.backends.share.server import Share

#: Files of the host that one share has open, at most, and of those this process may have.
_DESCRIPTORS_MAX: Final = 1 << 14


class ShareAttachment(Attachment):
    """The folder of ``config``."""

    section = "shares"

    def __init__(self, config: ShareConfig) -> None:
        self._config = config
        self.share: Share | None = None

    def open(self) -> None:
        """See :class:`Attachment`. Raises ConfigError."""
        from avmm.backends.share.server import open_share

        config = self._config
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if allowed == resource.RLIM_INFINITY:
            allowed = _DESCRIPTORS_MAX
        self.share = open_share(
            config.path,
            f"fs-{config.tag}",
            read_only=not config.writable,
            cache=config.cache,
            descriptors=min(allowed // 2, _DESCRIPTORS_MAX),
        )

    def device(self) -> VirtioDevice:
        """See :class:`Attachment`."""
        assert self.share is not None
        return Fs(self.share, self._config.tag)

    def fork(self) -> ShareAttachment:
        """See :class:`Attachment`: the same folder; both see what either does to it."""
        return ShareAttachment(self._config)

    def close(self) -> None:
        """See :class:`Attachment`."""
        share, self.share = self.share, None
        if share is not None:
            share.close()

    def describe(self) -> list[Any]:
        """See :class:`Attachment`."""
        config = self._config
        path = os.path.abspath(config.path)
        return [{"path": path, "tag": config.tag, "read_only": not config.writable, "cache": config.cache}]
