"""What ``avmm top`` shows: two looks at a VM's counters make rates, and those an answer to what its vCPUs do."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from avmm.errors import ConfigError, HostError
from avmm.monitor import Peer, peers

Snapshot = dict[str, Any]

#: The buckets of a drawn histogram, as exponents of two in nanoseconds: a microsecond to a second.
_DRAWN: Final = range(11, 31)
_BARS: Final = " ▁▂▃▄▅▆▇█"


#: A vCPU that is parked for this share of the time or more, in percent, idles. Its CPU time would not tell: on a
#: loaded host a busy one may get little.
_IDLE: Final = 50.0

#: So many exits of a kind in a second are what keeps a vCPU busy.
_MANY: Final = 10_000


@dataclass(frozen=True, slots=True)
class Rates:
    """One vCPU over an interval: ``per_second`` by counter's name, percent of CPU (None: not known), of time parked."""

    index: int
    mode: str
    cpu: float | None
    parked: float
    per_second: dict[str, float]
    latency: list[int]
    lateness: list[int]

    def group(self, prefix: str) -> dict[str, float]:
        """The counters of one kind that move, the fastest first, without their common ``prefix``."""
        found = {name.removeprefix(prefix): rate for name, rate in self.per_second.items() if name.startswith(prefix)}
        return dict(sorted(((name, rate) for name, rate in found.items() if rate), key=lambda item: -item[1]))


def rates(before: Snapshot, after: Snapshot) -> list[Rates]:
    """What happened between two snapshots of a VM, for each vCPU."""
    seconds = max(after["now_ns"] - before["now_ns"], 1) / 1e9
    found = []
    for index, (old, new) in enumerate(zip(before["vcpus"], after["vcpus"], strict=False)):
        counters = {name: value - old["counters"].get(name, 0) for name, value in new["counters"].items()}
        if min(counters.values()) < 0:  # reset in between: everything began anew
            old, counters = {"cpu_ns": 0, "parked_ns": 0, "wake_latency": [], "timer_lateness": []}, new["counters"]
        cpu = None
        if new["cpu_ns"] is not None:
            cpu = (new["cpu_ns"] - (old["cpu_ns"] or 0)) / seconds / 1e7
        found.append(
            Rates(
                index,
                "paused" if after["state"] == "paused" else new["mode"],
                cpu,
                (new["parked_ns"] - old["parked_ns"]) / seconds / 1e7,
                {name: value / seconds for name, value in counters.items()},
                _less(new["wake_latency"], old["wake_latency"]),
                _less(new["timer_lateness"], old["timer_lateness"]),
            )
        )
    return found


def _less(new: list[int], old: list[int]) -> list[int]:
    return [a - b for a, b in zip(new, old or [0] * len(new), strict=True)]


def quantile(buckets: Sequence[int], share: float) -> float | None:
    """The seconds that ``share`` of a histogram's durations do not exceed, to the power of two; None without any."""
    wanted = share * sum(buckets)
    seen = 0
    for bits, count in enumerate(buckets):
        seen += count
        if count and seen >= wanted:
            return float(1 << bits) / 1e9
    return None


def path(vcpu: Rates) -> str:
    """In words, which path the vCPU takes: the question when an idle guest is not idle."""
    rate = vcpu.per_second
    wfi, parks = rate.get("exit_wfi", 0.0), rate.get("parks", 0.0)
    if vcpu.mode in ("off", "stopped", "paused"):
        return vcpu.mode
    # Time decides, not numbers: just before a deadline an idle Linux goes through WFI more often than it parks in a
    # second.
    if vcpu.parked >= _IDLE:
        return (
            f"idle: parks, woken by {next(iter(vcpu.group('wake_')), 'nothing yet')}"
            if parks
            else "idle: parked throughout"
        )
    spins = vcpu.group("not_parked_")
    if wfi and sum(spins.values()) > parks:
        return f"WFI without sleep: {next(iter(spins))}"
    kind, most = next(iter(vcpu.group("exit_").items()), ("", 0.0))
    return f"busy with {kind} exits" if most > _MANY else "busy in the guest"


# Text.


@dataclass(frozen=True, slots=True)
class Table:
    """Something to show: a title, column heads, rows of text."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tables(before: Snapshot, after: Snapshot) -> list[Table]:
    """The picture of one VM."""
    seconds = max(after["now_ns"] - before["now_ns"], 1) / 1e9
    vcpus = rates(before, after)
    process = (after["cpu_ns"] - before["cpu_ns"]) / seconds / 1e7
    loop = (after["loop_cpu_ns"] - before["loop_cpu_ns"]) / seconds / 1e7
    title = (
        f"VM {after['id']}  {after['name']}  {after['state']}  {after['engine']}  {after['memory'] >> 20} MiB  "
        f"up {after['uptime']:.0f} s  process {process:.1f} % CPU, of it event loop {loop:.1f} %"
    )
    doing = Table(
        title,
        ("vCPU", "mode", "CPU %", "parked %", "path", "WFI/s", "parks/s", "not parked/s", "wakes/s"),
        [
            (
                str(vcpu.index), vcpu.mode,
                "-" if vcpu.cpu is None else f"{vcpu.cpu:.1f}", f"{vcpu.parked:.1f}", path(vcpu),
                _number(vcpu.per_second.get("exit_wfi", 0)), _number(vcpu.per_second.get("parks", 0)),
                _group(vcpu.group("not_parked_")), _group(vcpu.group("wake_")),
            )
            for vcpu in vcpus
        ],
    )  # fmt: skip
    waking = Table(
        "from the decision to wake to the guest, and behind the timer's deadline; each ≤ a power of two",
        ("vCPU", "wake p50", "p99", "max", "1 µs to 1 s", "timer late p50", "p99", "max", "1 µs to 1 s"),
        [(str(vcpu.index), *_spread(vcpu.latency), *_spread(vcpu.lateness)) for vcpu in vcpus],
    )
    exits = Table(
        "exits a second",
        ("vCPU", "all", "by kind"),
        [(str(v.index), _number(sum(v.group("exit_").values())), _group(v.group("exit_"))) for v in vcpus],
    )
    return [doing, waking, exits]


def _number(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 or not rate else f"{rate:.1f}"


def _group(group: dict[str, float]) -> str:
    return "  ".join(f"{name} {_number(rate)}" for name, rate in group.items()) or "-"


def _spread(buckets: list[int]) -> tuple[str, ...]:
    high = max(sum(buckets[: _DRAWN[0]]), *buckets[_DRAWN[0] :], 1)
    drawn = [sum(buckets[: _DRAWN[0] + 1]), *buckets[_DRAWN[0] + 1 : _DRAWN[-1]], sum(buckets[_DRAWN[-1] :])]
    bars = "".join(_BARS[min(-(-count * (len(_BARS) - 1) // high), len(_BARS) - 1)] for count in drawn)
    return *(_duration(quantile(buckets, share)) for share in (0.5, 0.99, 1.0)), bars


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def plain(shown: list[Table]) -> str:
    """Tables as lines of text."""
    lines = []
    for table in shown:
        rows = [table.heads, *table.rows]
        widths = [max(len(row[n]) for row in rows) for n in range(len(table.heads))]
        lines.append(table.title)
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines.append("")
    return "\n".join(lines)


# Looking.


class Watched:
    """The VMs that are watched, followed as they come and go."""

    def __init__(self, wanted: str | None) -> None:
        self._wanted = wanted
        self._peers: dict[str, Peer] = {}
        self._before: dict[str, Snapshot] = {}
        self._silent = False

    def look(self) -> list[Snapshot]:
        """A snapshot of every VM that is there and wanted. One that does not answer is left out, and said so."""
        for peer in peers():
            if peer.id in self._peers:
                peer.close()
            else:
                self._peers[peer.id] = peer
        found = []
        self._silent = False
        for peer in list(self._peers.values()):
            snapshot = None
            try:
                snapshot = peer.snapshot()
            except HostError as error:
                self._silent = True
                print(f"avmm: {error}", file=sys.stderr)
            if snapshot is None:
                self._peers.pop(peer.id).close()
            elif self._is_wanted(snapshot):
                found.append(snapshot)
        return found

    def pairs(self) -> list[tuple[Snapshot, Snapshot]]:
        """Look; of every VM seen before, the snapshots of then and now."""
        now = {snapshot["id"]: snapshot for snapshot in self.look()}
        before, self._before = self._before, now
        return [(before[name], snapshot) for name, snapshot in now.items() if name in before]

    def any(self) -> bool:
        """Whether a VM was there at the last look, be it one that did not answer."""
        return bool(self._before) or self._silent

    def require(self) -> None:
        """Raise ConfigError when there is nothing to look at."""
        if not self._before:
            which = "VM of yours is running" if self._wanted is None else f"running VM is called {self._wanted!r}"
            raise ConfigError(f"no {which} (only those started by `avmm boot`, or with monitor=True, are seen)")

    def close(self) -> None:
        """Hang up everywhere."""
        for peer in self._peers.values():
            peer.close()

    def one(self) -> Peer:
        """The only VM that is there and wanted. Raises ConfigError."""
        found = self.look()
        self._before = {snapshot["id"]: snapshot for snapshot in found}
        self.require()
        if len(found) > 1:
            names = ", ".join(snapshot["id"] for snapshot in found)
            raise ConfigError(f"which VM? Say one of {names}")
        return self._peers.pop(found[0]["id"])

    def _is_wanted(self, snapshot: Snapshot) -> bool:
        wanted = self._wanted
        return wanted is None or wanted in (snapshot["id"], str(snapshot["pid"])) or wanted in snapshot["name"]


def the_one(wanted: str | None) -> Peer:
    """The VM that ``wanted`` names, or the only one. Raises ConfigError."""
    with contextlib.closing(Watched(wanted)) as watched:
        return watched.one()


def _intervals(watched: Watched, interval: float, once: bool) -> Iterator[list[tuple[Snapshot, Snapshot]]]:
    with contextlib.closing(watched):
        watched.pairs()
        watched.require()
        while True:
            time.sleep(interval)
            seen = watched.pairs()
            yield seen
            if once or not watched.any():
                return


def show(wanted: str | None, interval: float, once: bool) -> None:
    """Tables on stdout: on a terminal in place, until the VMs are gone or Ctrl-C."""
    watched = Watched(wanted)
    live = sys.stdout.isatty() and not once
    with contextlib.ExitStack() as stack:
        draw = _rich(stack, live) or (_redraw if live else _print)
        for seen in _intervals(watched, interval, once):
            draw([table for pair in seen for table in tables(*pair)])


def _print(shown: list[Table]) -> None:
    print(plain(shown), flush=True)


def _redraw(shown: list[Table]) -> None:
    print("\x1b[H\x1b[2J" + plain(shown), end="", flush=True)  # home, clear


def _rich(stack: contextlib.ExitStack, live: bool) -> Any:
    """How to draw with rich; None without it, or where no terminal is."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.table import Table as RichTable
        from rich.text import Text
    except ImportError:
        return None

    def picture(shown: list[Table]) -> Group:
        drawn: list[RichTable] = []
        for table in shown:
            rich = RichTable(*table.heads, title=Text(table.title), title_justify="left", expand=False)
            for row in table.rows:
                rich.add_row(*map(Text, row))
            drawn.append(rich)
        return Group(*drawn)

    console = Console()
    if not live:
        return lambda shown: console.print(picture(shown))
    display = stack.enter_context(Live(console=console, screen=True, auto_refresh=False))
    return lambda shown: display.update(picture(shown), refresh=True)


def print_json(wanted: str | None, interval: float, once: bool) -> None:
    """One JSON object per VM and line: the snapshot, and in each vCPU ``rates`` a second, percents and ``path``."""
    for seen in _intervals(Watched(wanted), interval, once):
        for before, after in seen:
            for vcpu, found in zip(after["vcpus"], rates(before, after), strict=False):
                vcpu["cpu_percent"] = None if found.cpu is None else round(found.cpu, 2)
                vcpu["parked_percent"] = round(found.parked, 2)
                vcpu["rates"] = {name: round(rate, 2) for name, rate in found.per_second.items()}
                vcpu["path"] = path(found)
            print(json.dumps(after), flush=True)


# Prometheus.


def print_prometheus(wanted: str | None) -> None:
    """The counters of all VMs, for a scraper's text-file collector."""
    watched = Watched(wanted)
    with contextlib.closing(watched):
        print(prometheus(watched.look()), end="")


#: Counters that are one metric with a label: prefix of their names, the metric, the label.
_LABELLED: Final = (
    ("exit_", "avmm_vcpu_exits_total", "kind"),
    ("wake_", "avmm_vcpu_wakes_total", "cause"),
    ("not_parked_", "avmm_vcpu_not_parked_total", "reason"),
)


def prometheus(snapshots: list[Snapshot]) -> str:
    """The text exposition format, version 0.0.4."""
    metrics: dict[str, tuple[str, list[str]]] = {}

    def add(metric: str, kind: str, value: float, suffix: str = "", /, **labels: str) -> None:
        text = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
        metrics.setdefault(metric, (kind, []))[1].append(f"{metric}{suffix}{{{text}}} {value:.10g}")

    for vm in snapshots:
        who = {"vm": vm["id"], "name": vm["name"]}
        add("avmm_process_cpu_seconds_total", "counter", vm["cpu_ns"] / 1e9, **who)
        add("avmm_event_loop_cpu_seconds_total", "counter", vm["loop_cpu_ns"] / 1e9, **who)
        for index, vcpu in enumerate(vm["vcpus"]):
            which = {**who, "vcpu": str(index)}
            add("avmm_vcpu_mode", "gauge", 1, **which, mode=vcpu["mode"])
            if vcpu["cpu_ns"] is not None:
                add("avmm_vcpu_cpu_seconds_total", "counter", vcpu["cpu_ns"] / 1e9, **which)
            add("avmm_vcpu_parked_seconds_total", "counter", vcpu["parked_ns"] / 1e9, **which)
            for counter, value in vcpu["counters"].items():
                for prefix, metric, label in _LABELLED:
                    if counter.startswith(prefix):
                        add(metric, "counter", value, **which, **{label: counter.removeprefix(prefix)})
                        break
                else:
                    add(f"avmm_vcpu_{counter}_total", "counter", value, **which)
            for histogram in ("wake_latency", "timer_lateness"):
                seen = 0
                buckets = vcpu[histogram]
                for bits, count in enumerate(buckets):
                    seen += count
                    le = f"{(1 << bits) / 1e9:.9g}" if bits < len(buckets) - 1 else "+Inf"
                    add(f"avmm_vcpu_{histogram}_seconds", "histogram", seen, "_bucket", **which, le=le)
                total = vcpu[f"{histogram}_ns"] / 1e9
                add(f"avmm_vcpu_{histogram}_seconds", "histogram", total, "_sum", **which)
                add(f"avmm_vcpu_{histogram}_seconds", "histogram", seen, "_count", **which)
    lines = []
    for name, (kind, samples) in metrics.items():
        lines += [f"# TYPE {name} {kind}", *samples]
    return "".join(line + "\n" for line in lines)


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
