"""Misbehaviour on demand: what softhv is asked to do wrong, as text or as numbers.

``spurious-wfi=0.5,late-kick=200us,sticky-kick=no``: what is not named behaves.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from avmm.errors import ConfigError

_UNITS: Final = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ns|us|ms|s)")

#: No fault lasts longer: an engine that is late by more is one that is gone.
_LONGEST_NS: Final = 60 * 10**9


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong. Probabilities are 0..1, durations nanoseconds; the same ``seed`` gives the same dice."""

    seed: int = 1
    #: A WFI with nothing to wait for makes the run return, as on Apple's framework without its own GIC: always, unless
    #: this says less; then the engine sleeps inside itself until there is something.
    spurious_wfi: float = 1.0
    early_wfi: float = 0.0  # a WFI completes in the guest for no reason, and no exit tells of it
    lose_kick: float = 0.0
    late_kick: int = 0
    double_kick: float = 0.0
    sticky_kick: bool = True  # a kick outside the guest ends the next run
    unknown: float = 0.0  # a run returns UNKNOWN at once, as after a signal
    late_vtimer: int = 0
    double_vtimer: float = 0.0
    fast_counter: bool = False  # the guest's counter runs at 1 GHz, the host's timebase at 24 MHz
    host_sleep: tuple[int, int] = (0, 0)  # how long, and how long after the start

    @classmethod
    def parse(cls, text: str) -> Faults:
        """``NAME=VALUE,...`` Raises ConfigError, which names what there is."""
        found: dict[str, Any] = {}
        for word in filter(None, (word.strip() for word in text.split(","))):
            name, given, value = word.partition("=")
            reader = _READERS.get(name)
            if reader is None:
                raise ConfigError(f"no fault named {name!r}; there are {', '.join(_READERS)}")
            if not given:
                raise ConfigError(f"the fault {name} needs a value: {name}=…")
            key = name.replace("-", "_")
            if key in found:
                raise ConfigError(f"the fault {name} is given twice")
            found[key] = reader(name, value)
        return cls(**found)


def _probability(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} takes a probability from 0 to 1, not {text!r}")
    return value


def _below_one(name: str, text: str) -> float:
    value = _probability(name, text)
    if value > 0.99:
        raise ConfigError(f"{name} takes at most 0.99: a guest whose WFI never waits cannot be told from a busy one")
    return value


def duration(name: str, text: str) -> int:
    """Nanoseconds of text like 200us. Raises ConfigError, which calls it ``name``."""
    found = _DURATION.fullmatch(text)
    value = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if not 0 < value <= _LONGEST_NS:
        raise ConfigError(f"{name} takes a duration like 200us, 5ms or 1.5s, up to 60s, not {text!r}")
    return value


def _switch(name: str, text: str) -> bool:
    if text not in ("yes", "no"):
        raise ConfigError(f"{name} takes yes or no, not {text!r}")
    return text == "yes"


def _sleep(name: str, text: str) -> tuple[int, int]:
    length, at, start = text.partition("@")
    if not at:
        raise ConfigError(f"{name} takes LENGTH@START like 500ms@2s, not {text!r}")
    return duration(name, length), duration(name, start)


def _number(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 1 << 64:
        raise ConfigError(f"{name} takes a number below 2**64, not {text!r}")
    return int(text)


_READERS: Final[dict[str, Callable[[str, str], Any]]] = {
    "spurious-wfi": _probability,
    "early-wfi": _below_one,
    "lose-kick": _probability,
    "late-kick": duration,
    "double-kick": _probability,
    "sticky-kick": _switch,
    "unknown": _below_one,
    "late-vtimer": duration,
    "double-vtimer": _probability,
    "fast-counter": _switch,
    "host-sleep": _sleep,
    "seed": _number,
}
