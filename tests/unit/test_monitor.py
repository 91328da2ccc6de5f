"""The monitor's socket, and what ``avmm top`` makes of two looks through it."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

import avmm
from avmm import monitor
from avmm.cli import main, watch
from avmm.cli.watch import path, prometheus, quantile, rates
from avmm.vcpu.stats import BUCKETS, WakeStats

IMAGES = Path(__file__).parents[2] / "firmware" / "images"


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def idler(cpus: int = 1, *, monitor: bool = True) -> avmm.vm.Booting:
    """A guest that sleeps between a hundred ticks a second, for longer than any test."""
    return avmm.boot(
        IMAGES / "timer_wfi.bin", memory="64M", cpus=cpus, cmdline="n=100000 hz=100", monitor=monitor, engine="softhv"
    )


async def ticking(vm: avmm.VirtualMachine, parks: int = 20) -> None:
    """Wait until vCPU 0 has parked so often."""
    while vm.counters()["vcpus"][0]["parks"] < parks:
        await asyncio.sleep(0.001)  # a counter has no event to wait for
        assert vm.outcome is None


async def look() -> list[dict[str, Any]]:
    """Snapshots of all VMs, taken as another process would: this one's loop has to answer meanwhile."""

    def take() -> list[dict[str, Any]]:
        found = []
        for peer in monitor.peers():
            snapshot = peer.snapshot()
            peer.close()
            assert snapshot is not None
            found.append(snapshot)
        return found

    return await asyncio.to_thread(take)


async def test_a_snapshot_agrees_with_the_vm() -> None:
    async with idler(2) as vm:
        await ticking(vm)
        before = vm.counters()["vcpus"][0]
        (snapshot,) = await look()
        after = vm.counters()["vcpus"][0]
    first, second = snapshot["vcpus"]
    assert before["parks"] <= first["counters"]["parks"] <= after["parks"]
    assert snapshot["pid"] == os.getpid()
    assert snapshot["name"] == "timer_wfi.bin"
    assert snapshot["engine"] == "softhv"
    assert first["mode"] in ("parked", "running")
    assert second["mode"] == "off"
    assert 0 < first["cpu_ns"] < snapshot["cpu_ns"]
    assert 0 < first["parked_ns"] < snapshot["now_ns"]
    assert second["parked_ns"] == 0
    assert sum(first["wake_latency"]) >= first["counters"]["wake_timer"]
    assert sum(first["timer_lateness"]) <= sum(first["wake_latency"])


async def test_the_socket_is_its_owner_s_alone_and_goes_with_the_vm(runtime: Path) -> None:
    async with idler() as vm:
        await ticking(vm)
        (path,) = (runtime / "avmm").iterdir()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list((runtime / "avmm").iterdir()) == []
    assert monitor.peers() == []


async def test_no_socket_unless_asked_for(runtime: Path) -> None:
    async with idler(monitor=False) as vm:
        await ticking(vm)
        assert not (runtime / "avmm").exists()


async def test_several_vms_and_several_clients() -> None:
    async with idler() as first, idler() as second:
        await ticking(first)
        await ticking(second)
        looks = await asyncio.gather(*(look() for _ in range(5)))
    for found in looks:
        assert len({snapshot["id"] for snapshot in found}) == 2


async def test_garbage_and_hang_ups_leave_the_vm_alone(runtime: Path) -> None:
    async with idler() as vm:
        await ticking(vm)
        (path,) = (runtime / "avmm").iterdir()
        for garbage in (b"", b"x" * 100_000, b"\xff\x00\n\n\n", b"no newline"):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(garbage)
            writer.close()
            del reader
        before = vm.counters()["vcpus"][0]["parks"]
        await ticking(vm, before + 10)
        assert len(await look()) == 1


async def test_a_client_that_reads_nothing_is_no_burden(runtime: Path) -> None:
    """What it asks for stops at what its socket holds; the VM goes on and ends."""
    async with idler() as vm:
        await ticking(vm)
        (path,) = (runtime / "avmm").iterdir()
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            client.connect(str(path))
            sent = 0
            try:
                while sent < 1 << 22:
                    sent += client.send(b"\n" * 1000)
                    await asyncio.sleep(0)
            except BlockingIOError:
                pass
            assert sent < 1 << 22
            await ticking(vm, vm.counters()["vcpus"][0]["parks"] + 5)


def test_what_a_dead_process_left_is_removed(runtime: Path) -> None:
    left = monitor.directory() / "1-1.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(left))
    assert monitor.peers() == []
    assert not left.exists()


@pytest.mark.parametrize("make", [lambda path: path.mkdir(mode=0o755), lambda path: path.symlink_to("/")])
def test_a_directory_that_others_can_open_is_refused(runtime: Path, make: Any) -> None:
    make(runtime / "avmm")
    with pytest.raises(avmm.HostError, match="only you can open"):
        monitor.directory()


async def test_without_a_place_for_the_socket_the_vm_runs_all_the_same(runtime: Path) -> None:
    (runtime / "avmm").write_text("a file where the directory should be")
    async with idler() as vm:
        await ticking(vm)


# What is made of it.


def test_histogram_buckets_are_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0
    monkeypatch.setattr("avmm.vcpu.stats.time.monotonic_ns", lambda: now)
    stats = WakeStats()
    for latency, bucket in ((0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (1023, 10), (1024, 11), (1 << 60, BUCKETS - 1)):
        now = 10**6
        stats.wake(now, None)
        now += latency
        before = stats.latency[bucket]
        stats.entering()
        stats.entering()  # counts once
        assert stats.latency[bucket] == before + 1
    assert sum(stats.latency) == 8
    assert stats.latency_ns == 0 + 1 + 2 + 3 + 4 + 1023 + 1024 + (1 << 60)
    assert sum(stats.lateness) == 0
    now = 10**9
    stats.park()
    now += 7
    assert stats.parked_ns == 7
    stats.wake(now, 10**9 - 5)
    now += 1
    assert stats.parked_ns == 7
    now -= 8
    now += 10
    stats.entering()
    assert stats.lateness[4] == 1
    assert stats.lateness_ns == 15


def test_quantiles() -> None:
    buckets = [0] * BUCKETS
    assert quantile(buckets, 0.5) is None
    buckets[10], buckets[20] = 98, 2
    assert quantile(buckets, 0.5) == 1024e-9
    assert quantile(buckets, 0.98) == 1024e-9
    assert quantile(buckets, 0.99) == (1 << 20) / 1e9


def snapshot(
    at: int, state: str = "running", mode: str = "running", cpu: int = 0, parked: int = 0, **counters: int
) -> dict[str, Any]:
    names = dict.fromkeys(
        ["exit_wfi", "exit_mmio_write", "parks", "not_parked_pending", "not_parked_expired", "wake_timer", "wake_irq"],
        0,
    )
    vcpu = {
        "mode": mode, "cpu_ns": cpu, "parked_ns": parked, "counters": names | counters,
        "wake_latency_ns": 0, "timer_lateness_ns": 0,
        "wake_latency": [0] * BUCKETS, "timer_lateness": [0] * BUCKETS,
    }  # fmt: skip
    return {
        "id": "1-1", "pid": 1, "name": 'a "kernel"', "state": state, "engine": "softhv", "memory": 1 << 26,
        "now_ns": at, "uptime": 1.0, "cpu_ns": cpu, "loop_cpu_ns": 0, "vcpus": [vcpu],
    }  # fmt: skip


SECOND = 10**9


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (
            snapshot(SECOND, mode="parked", parked=SECOND - 9, exit_wfi=90, parks=90, wake_timer=90),
            "idle: parks, woken by timer",
        ),
        (  # of an idle Linux, and for a moment only
            snapshot(SECOND, parked=SECOND - 9, exit_wfi=28, parks=12, wake_timer=12, not_parked_soon=15),
            "idle: parks, woken by timer",
        ),
        (snapshot(SECOND, cpu=SECOND, exit_wfi=90000, not_parked_pending=90000), "WFI without sleep: pending"),
        (snapshot(SECOND, cpu=SECOND, exit_wfi=9, not_parked_expired=9), "WFI without sleep: expired"),
        (snapshot(SECOND, cpu=SECOND), "busy in the guest"),
        (snapshot(SECOND, cpu=SECOND // 9, parked=SECOND // 9, parks=9, exit_wfi=9), "busy in the guest"),
        (snapshot(SECOND, cpu=SECOND, exit_mmio_write=200_000), "busy with mmio_write exits"),
        (snapshot(SECOND, mode="parked", parked=SECOND), "idle: parked throughout"),
        (snapshot(SECOND, mode="off"), "off"),
        (snapshot(SECOND, state="paused", mode="parked"), "paused"),
    ],
)
def test_it_says_which_path_is_taken(after: dict[str, Any], words: str) -> None:
    (found,) = rates(snapshot(0), after)
    assert path(found) == words


def test_a_reset_in_between_makes_no_negative_rate() -> None:
    (found,) = rates(snapshot(0, cpu=50, exit_wfi=1000, parks=7), snapshot(SECOND, cpu=SECOND // 2, exit_wfi=10))
    assert found.per_second["exit_wfi"] == 10
    assert found.cpu == 50


def test_prometheus_text() -> None:
    vm = snapshot(SECOND, cpu=SECOND // 2, exit_wfi=12)
    vm["vcpus"][0]["wake_latency"][10] = 3
    vm["vcpus"][0]["wake_latency_ns"] = 3000
    text = prometheus([vm])
    sample = re.compile(r'[a-z_]+\{(?:[a-z]+="(?:[^"\\]|\\.)*",?)+\} [0-9.e+-]+')
    seen = set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            name = line.split()[2]
            assert name not in seen, "a metric's samples must stand together"
            seen.add(name)
        else:
            assert sample.fullmatch(line), line
            assert line.startswith(name)
    who = 'vm="1-1",name="a \\"kernel\\"",vcpu="0"'
    assert f'avmm_vcpu_exits_total{{{who},kind="wfi"}} 12\n' in text
    assert f"avmm_vcpu_cpu_seconds_total{{{who}}} 0.5\n" in text
    assert f'avmm_vcpu_wake_latency_seconds_bucket{{{who},le="5.12e-07"}} 0\n' in text
    assert f'avmm_vcpu_wake_latency_seconds_bucket{{{who},le="1.024e-06"}} 3\n' in text
    assert f'avmm_vcpu_wake_latency_seconds_bucket{{{who},le="+Inf"}} 3\n' in text
    assert f"avmm_vcpu_wake_latency_seconds_sum{{{who}}} 3e-06\n" in text


# The command.


async def avmm_top(*arguments: str) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "avmm.cli", "top", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, out.decode(), err.decode()


async def test_command() -> None:
    async with idler(2) as vm:
        await ticking(vm)
        code, out, err = await avmm_top("--once", "--interval", "0.3")
        assert (code, err) == (0, "")
        rows = [line.split() for line in out.splitlines()]
        assert any(row[:1] == ["0"] and "timer" in row for row in rows), out
        assert any(row[:2] == ["1", "off"] for row in rows), out
        code, out, err = await avmm_top("timer_wfi", "--once", "--json", "--interval", "0.3")
        assert (code, err) == (0, "")
        (vcpu, _) = json.loads(out)["vcpus"]
        assert vcpu["path"] == "idle: parks, woken by timer"
        assert vcpu["rates"]["parks"] > 10
        code, out, err = await avmm_top(str(os.getpid()), "--prometheus")
        assert (code, err) == (0, "")
        assert 'kind="wfi"' in out
        code, _, err = await avmm_top("another", "--once", "--interval", "0.1")
        assert code == 2
        assert "no running VM is called 'another'" in err


@pytest.mark.parametrize("rich", [True, False])
async def test_live_on_a_terminal(rich: bool) -> None:
    """Redrawn in place until Ctrl-C, which leaves the terminal as it was."""
    if rich:
        pytest.importorskip("rich")
    hide = "" if rich else "sys.modules['rich'] = sys.modules['rich.console'] = None;"
    program = f"import sys; {hide} from avmm.cli import main; sys.exit(main(['top', '--interval', '0.1']))"
    loop = asyncio.get_running_loop()
    master, slave = pty.openpty()
    seen = bytearray()
    drawn = asyncio.Event()

    def read() -> None:
        seen.extend(os.read(master, 65536))
        if seen.count(b"idle: parks") >= 3:
            drawn.set()

    async with idler() as vm:
        await ticking(vm)
        before = termios.tcgetattr(slave)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 50, 160, 0, 0))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, stdout=slave, stderr=slave, env=os.environ | {"TERM": "xterm"}
        )
        loop.add_reader(master, read)
        await asyncio.wait_for(drawn.wait(), 60)
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 60) == 128 + signal.SIGINT
        loop.remove_reader(master)
        assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)
    assert (b"\x1b[?1049h" in seen) == rich  # rich draws on the terminal's other screen
    assert b"Traceback" not in seen


def test_command_without_vms(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once"]) == 2
    assert "no VM of yours is running" in capsys.readouterr().err
    assert main(["top", "--prometheus"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["top", "--interval", "0.01"]) == 2


async def test_a_vm_whose_loop_is_stuck_is_said_to_be(runtime: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket(socket.AF_UNIX) as listener:  # accepts, and never answers
        listener.bind(str(monitor.directory() / "7-1.sock"))
        listener.listen()
        watched = watch.Watched(None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(monitor, "_PATIENCE", 0.05)
            assert watched.look() == []
            assert watched.any()  # and watched on
    assert watched.look() == []
    assert not watched.any()
    watched.close()
    assert "VM 7-1 has not answered" in capsys.readouterr().err
