"""The one logger: structlog events with static names and typed fields.

Silent, and not even imported, unless the program has configured structlog: a library prints nothing of its own accord.
``avmm -v`` configures it; so does ``structlog.testing.capture_logs()``.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any, Final

#: What was logged last, whether anybody listens or not: (time.time(), level, event, fields). None of it comes often.
recent: Final[deque[tuple[float, str, str, dict[str, Any]]]] = deque(maxlen=256)


class Log:
    """Emits events that all carry the fields it is bound to."""

    __slots__ = ("_fields",)

    def __init__(self, **fields: Any) -> None:
        self._fields = fields

    def bind(self, **fields: Any) -> Log:
        """The same with more fields."""
        return Log(**self._fields, **fields)

    def debug(self, event: str, **fields: Any) -> None:
        """Of interest to whoever looks for a fault."""
        self._emit("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """A step in a VM's life."""
        self._emit("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Something went wrong and the VM goes on."""
        self._emit("warning", event, fields)

    def _emit(self, level: str, event: str, fields: dict[str, Any]) -> None:
        recent.append((time.time(), level, event, {**self._fields, **fields}))
        structlog = sys.modules.get("structlog")
        if structlog is not None and structlog.is_configured():
            getattr(structlog.get_logger("avmm"), level)(event, **self._fields, **fields)


log = Log()
