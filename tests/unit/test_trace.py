"""The timeline of a firmware guest: a well-formed Trace Event Format file that tells what the counters tell."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import avmm
from avmm.cli import main
from avmm.trace import Trace

IMAGES = Path(__file__).parents[2] / "firmware" / "images"

Event = dict[str, Any]


def events(path: Path) -> list[Event]:
    """The file's events, checked against what Perfetto's importer asks of the JSON format."""
    found: list[Event] = json.loads(path.read_text())
    last: dict[int, float] = defaultdict(float)
    depth: dict[int, int] = defaultdict(int)
    for event in found:
        assert event["ph"] in "MXBE"
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert event["args"]["name"]
            continue
        track = event["tid"]
        assert event["ts"] >= last[track] - 1e-6, "slices of a track follow each other"
        last[track] = event["ts"]
        if event["ph"] == "X":
            assert event["name"]
            assert event["dur"] >= 0
            last[track] += event["dur"]
        else:
            depth[track] += 1 if event["ph"] == "B" else -1
            assert depth[track] in (0, 1)
    assert not any(depth.values()), "each B has its E"
    return found


def tracks(found: list[Event]) -> dict[str, list[Event]]:
    """Events by the name of their track."""
    names = {event["tid"]: event["args"]["name"] for event in found if event.get("name") == "thread_name"}
    by_track: dict[str, list[Event]] = defaultdict(list)
    for event in found:
        if event["ph"] != "M":
            by_track[names[event["tid"]]].append(event)
    return by_track


async def run(guest: str, path: Path, cpus: int, cmdline: str) -> dict[str, Any]:
    async with avmm.boot(
        IMAGES / f"{guest}.bin", memory="64M", cpus=cpus, cmdline=cmdline, trace=path, engine="softhv", reboot=False
    ) as vm:
        outcome = await asyncio.wait_for(vm.wait(), 60)
        assert outcome.reason == "power-off"
        return vm.counters()


async def test_it_tells_what_the_counters_tell(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    counters = (await run("timer_wfi", path, 1, "n=50 hz=500"))["vcpus"][0]
    by_track = tracks(events(path))
    names = Counter(event.get("name") for event in by_track["vCPU 0"])
    exits = sum(count for name, count in counters.items() if name.startswith("exit_"))
    assert names["guest"] == exits
    assert names["parked"] == counters["parks"] > 0
    assert names["wfi"] + names["parked"] == counters["exit_wfi"]
    for kind in ("vtimer", "mmio_read", "mmio_write", "sysreg_read", "sysreg_write"):
        assert names[kind] == counters[f"exit_{kind}"]
    causes = Counter(event["args"]["cause"] for event in by_track["vCPU 0"] if event.get("name") == "wake")
    assert causes["timer"] == counters["wake_timer"]
    irqs = Counter(event["ph"] for event in by_track["vCPU 0 IRQ"])
    assert irqs["B"] == irqs["E"] >= 50
    devices = {event["args"]["device"] for event in by_track["vCPU 0"] if event.get("name") == "mmio_write"}
    assert {"PL011", "GICv3 distributor", "GICv3 redistributors"} <= devices
    assert {event["name"] for event in by_track["devices"]} >= {"Pl011.run", "Pl031.run"}


async def test_every_moment_of_a_vcpu_is_accounted_for(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    await run("ipi_pingpong", path, 2, "n=100")
    for name in ("vCPU 0", "vCPU 1"):
        slices = tracks(events(path))[name]
        for before, after in pairwise(slices):
            assert after["ts"] == pytest.approx(before["ts"] + before["dur"], abs=0.01)
    second = tracks(events(path))["vCPU 1"]
    assert any(event["args"]["cause"] == "irq" for event in second if event["name"] == "wake")


async def test_pause_and_resets_go_on_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    async with avmm.boot(IMAGES / "reset.bin", memory="64M", trace=path, engine="softhv") as vm:
        for _ in range(3):
            await vm.console.expect(rb"reset\r?\n", timeout=60)
    assert len([e for e in tracks(events(path))["vCPU 0"] if e["name"] == "guest"]) > 3
    async with avmm.boot(IMAGES / "exception_loop.bin", memory="64M", trace=path, engine="softhv") as vm:
        await vm.console.expect(rb"loop", timeout=60)
        while vm.counters()["exits"]["canceled"] < 3:
            await vm.pause()
            await vm.resume()
            await asyncio.sleep(0.001)  # until it is in the guest again, of which there is no event
    assert "paused" in {event["name"] for event in tracks(events(path))["vCPU 0"]}


async def test_memory_stays_bounded(tmp_path: Path) -> None:
    """Events are on their way to the file long before the end; a file cut off anywhere in between can be read."""
    path = tmp_path / "trace.json"
    async with avmm.boot(
        IMAGES / "timer_wfi.bin", memory="64M", cmdline="n=100000 hz=2000", trace=path, engine="softhv"
    ) as vm:
        while path.stat().st_size < 200_000:
            await asyncio.sleep(0.001)  # a file has no event to wait for
            assert vm.outcome is None
        cut = path.read_text()
    json.loads(cut[: cut.rindex(",\n")] + "]")


async def test_a_full_disk_ends_the_trace_not_the_vm() -> None:
    await run("timer_wfi", Path("/dev/full"), 1, "n=50 hz=500")


async def test_a_file_that_cannot_be_made_is_an_error_before_the_vm_starts(tmp_path: Path) -> None:
    with pytest.raises(avmm.ConfigError, match="cannot write the trace"):
        await run("hello", tmp_path / "none" / "trace.json", 1, "")


def test_slices_of_several_threads_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = Trace(path)

    def fill(number: int) -> None:
        track = trace.track(f"track {number}")
        for at in range(3000):
            track.slice("x", at * 1000, at * 1000 + 500, f'{{"n":{at}}}')

    for number in range(4):
        trace.track(f"track {number}")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill, range(4)))
    trace.close()
    trace.close()
    found = json.loads(path.read_text())
    assert Counter(event["tid"] for event in found if event["ph"] == "X") == dict.fromkeys(range(1, 5), 3000)


def test_command_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    code = main(["boot", str(IMAGES / "hello.bin"), "--trace", str(path), "--no-monitor", "--engine", "softhv"])
    assert code == 0
    assert "guest" in {event["name"] for event in tracks(events(path))["vCPU 0"]}
