"""Every figure of docs/wfi.md, in one run on a quiet machine: about ten minutes on two processors.

The tables are printed as they are made. With --write they take the places of those in docs/wfi.md, each between its own
marks there, and the plot that of docs/figures/wfi.svg and .png (needs matplotlib). --quick is for trying this out.

python bench/wfi.py [--write] [--quick] [--only policies wakes linux boot poll density]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import boot_parking
import density
import halt_poll
import idle_policies
import uvloop
import wakeups
from idle import READY, idle
from side_by_side import QEMU, guest, headline, require_qemu

import avmm

PAGE = Path(__file__).parents[1] / "docs" / "wfi.md"
PLOT = PAGE.parent / "figures" / "wfi.svg"


def table(head: list[str], rows: Iterator[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def microseconds(value: float | None) -> str:
    """As short as it says something."""
    if value is None:
        return "hangs"
    return f"{value / 1e3:.0f} ms" if value >= 10_000 else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def quantiles(nanoseconds: list[int]) -> list[str]:
    """p50, p99, max."""
    return [microseconds(each) for each in idle_policies.quantiles(nanoseconds)]


def policies(quick: bool) -> Iterator[str]:
    """The policies, each with a good and a bad engine; and the plot."""
    found = []

    def rows() -> Iterator[list[str]]:
        for row in idle_policies.measure(
            [1] if quick else [1, 2, 4], list(idle_policies.POLICIES), 1 if quick else 2.5
        ):
            found.append(row)
            name = row["policy"]
            device = row["device"] or [None] * 3
            idle_cpu = "hangs" if row["idle"] is None else f"{row['idle']:.2f}"
            yield [
                f"**{name}**" if name == "ours" else name,
                str(row["cpus"]),
                row["engine"],
                f"**{idle_cpu}**" if name == "ours" else idle_cpu,
                *(microseconds(each) for each in (row["timer"] or [None] * 2)[:2]),
                *("" if each == "-" else microseconds(each) for each in device),
                microseconds(row["hop"]),
            ]

    head = ["policy", "vCPUs", "engine", "idle, %", "timer p50", "p99", "interrupt p50", "p99", "max", "IPI hop"]
    yield from table(head, rows())
    PLOTS.append(found)


PLOTS: list[list[dict]] = []


def wakes(quick: bool) -> Iterator[str]:
    """One vCPU's wakes against what the machine itself can do."""
    number = 300 if quick else 2000
    found = uvloop.run(wakeups.interrupts(number, 1))
    bare, ours = uvloop.run(wakeups.timers(number, 1, 500))
    floor = idle_policies.quantiles(found["floor"])

    def rows() -> Iterator[list[str]]:
        yield ["floor: a lock handed to a sleeping thread and back", *quantiles(found["floor"]), ""]
        for where, name in (("thread", "another thread"), ("loop", "the event loop")):
            taken = idle_policies.quantiles(found[where])
            against = f"{taken[0] / floor[0]:.2f}, {taken[1] / floor[1]:.2f}"
            yield [f"device interrupt from {name} → guest's handler", *quantiles(found[where]), against]
        yield ["lateness of a bare timerfd", *quantiles(bare), ""]
        late = idle_policies.quantiles(bare)
        against = f"{ours[0] / late[0]:.2f}, {ours[1] / late[1]:.2f}"
        yield ["lateness of the guest's timer, 500 Hz, never early", *(microseconds(each) for each in ours), against]

    yield from table(["", "p50", "p99", "max", "against the floor: p50, p99"], rows())


async def at_its_shell(cpus: int, faults: str | None, seconds: float) -> tuple[float, float]:
    """Percent of one CPU, and WFI exits a second, of Debian's kernel at its shell."""
    fetched = guest()
    options = {"cpus": cpus, "faults": faults, "engine": "softhv"}
    async with avmm.boot(fetched.kernel, fetched.initrd, **options) as vm:
        await vm.console.expect(READY, timeout=120)
        await asyncio.sleep(3)
        exits, cpu, began = vm.counters()["exits"]["wfi"], time.process_time(), time.monotonic()
        await asyncio.sleep(seconds)
        elapsed = time.monotonic() - began
        return (time.process_time() - cpu) / elapsed * 100, (vm.counters()["exits"]["wfi"] - exits) / elapsed


def linux(quick: bool) -> Iterator[str]:
    """Debian at its shell, ours with either engine, and QEMU."""
    seconds = 2 if quick else 8
    fetched = guest()

    def rows() -> Iterator[list[str]]:
        for cpus in (1, 4):
            for engine, faults in (("good", None), ("bad", idle_policies.BAD)):
                percent, rate = uvloop.run(at_its_shell(cpus, faults, seconds))
                yield [str(cpus), engine, f"{percent:.2f}", f"{rate:.1f}"]
            percent, _ = idle(QEMU.command(fetched.kernel, fetched.initrd, 512, cpus, ""), seconds)
            yield [str(cpus), "QEMU TCG", f"{percent:.2f}", ""]

    yield from table(["vCPUs", "engine", "idle, % of one CPU", "WFI exits a second"], rows())


def boot(quick: bool) -> Iterator[str]:
    """Boot to power-off, parking against spinning."""

    def rows() -> Iterator[list[str]]:
        for kind, parked, spun, ratio in boot_parking.summary(boot_parking.measure(2 if quick else 9, 1)):
            yield [f"{kind} time, s", f"{parked:.3f}", f"{spun:.3f}", f"{ratio:.2f}"]

    yield from table(["boot to power-off", "parking", "spinning", "median ratio of pairs"], rows())


def poll(quick: bool) -> Iterator[str]:
    """The halt poll, with the spin policy beside it."""
    found = halt_poll.measure(1 if quick else 3, [2] if quick else [2, 4])

    def rows() -> Iterator[list[str]]:
        for what in dict.fromkeys(what for what, _ in found):
            polled, slept, spun = (found.get((what, way)) for way in ("poll", "no poll", "spin"))
            show = "{:.2f}".format if what.startswith("idle") else microseconds
            spinning = "" if spun is None else microseconds(spun)
            yield [what, show(polled), show(slept), spinning, f"{polled / slept:.2f}"]

    yield from table(["", "poll", "no poll", "spin", "poll against no poll"], rows())


def crowd(number: int, seconds: float) -> dict:
    """So many idle VMs."""
    return uvloop.run(density.measure(number, seconds, linux=False))


def many(quick: bool) -> Iterator[str]:
    """Many idle VMs in one process."""

    def rows() -> Iterator[list[str]]:
        for number in [1, 10] if quick else [1, 10, 100, 500]:
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # whose memory is the VMs' alone
                row = fresh.submit(crowd, number, 1 if quick else 4).result()
            percent, wakes_p50 = row["idle"], statistics.median(row["wakes"]) / 1e3
            ticks = f"{row['WFIs'] / number * 10:.0f} %"
            yield [str(number), f"{percent:.2f}", f"{percent / number:.2f}", ticks, f"{row['MiB']:.0f}",
                   f"{microseconds(wakes_p50)} µs"]  # fmt: skip

    head = ["VMs", "idle, % of one CPU", "each", "ticks that came", "resident, MiB", "interrupt to one of them, p50"]
    yield from table(head, rows())


PARTS: dict[str, Callable[[bool], Iterator[str]]] = {
    "policies": policies, "wakes": wakes, "linux": linux, "boot": boot, "poll": poll, "density": many,
}  # fmt: skip


def replace(page: str, name: str, lines: list[str]) -> str:
    """``page`` with ``lines`` between the marks of ``name``."""
    begin, end = f"<!-- measured: {name} -->\n", f"<!-- end: {name} -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{PAGE} has no marks {begin.strip()} and {end}")
    return before + begin + "\n".join(lines) + "\n" + end + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables and the plot into docs")
    parser.add_argument("--quick", action="store_true", help="a few seconds of each: figures of no worth")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="these parts")
    args = parser.parse_args()
    require_qemu()
    if args.write:
        try:  # before ten minutes of measuring
            from plot_policies import plot
        except ImportError:
            raise SystemExit("--write draws the plot too: pip install matplotlib") from None
    headline("docs/wfi.md")
    for name in args.only:
        began = time.monotonic()
        lines = []
        print(f"\n## {name}", flush=True)
        for line in PARTS[name](args.quick):
            lines.append(line)
            print(line, flush=True)
        print(f"({time.monotonic() - began:.0f} s)", flush=True)
        if args.write:
            PAGE.write_text(replace(PAGE.read_text(), name, lines))
    if args.write and PLOTS:
        plot(PLOTS[-1], str(PLOT))


if __name__ == "__main__":
    main()
