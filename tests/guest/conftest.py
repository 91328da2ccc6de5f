"""A real guest: Debian's own arm64 kernels with a busybox userland, fetched once into the user's cache."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import avmm
from avmm.bootloader import cpio
from avmm.debian import Fetched, fetch_debian
from avmm.errors import FetchError
from avmm.guest.transcript import PrintkFilter
from avmm.snapshot.store import load
from avmm.vm import Booting
from tests.guest.linux64k import linux64k

#: What the fetched initrd prints when its shell is about to start.
READY = rb"avmm: Debian \S+ ready"
#: The same, or what tests/guest/rootfs.py's prints.
UP = READY + rb"|rootfs: ready\r\n"


def _mirror() -> str | None:
    """Where the kernels of other releases come from: AVMM_DEBIAN_MIRROR, or the host's apt's first repository."""
    if named := os.environ.get("AVMM_DEBIAN_MIRROR"):
        return named
    if shutil.which("apt-get") is None:
        return None
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    known = subprocess.run(asked, capture_output=True, text=True).stdout.split()
    return known[0].rstrip("/") if known else None


def fetch_or_skip(flavour: str, release: str = "bookworm") -> Fetched:
    """A guest to boot; ``flavour`` may also be ``64k``. Where there is none the test is skipped, but not in CI."""
    mirror = None if release == "bookworm" else _mirror()  # the host's apt may know one release only
    try:
        if flavour == "64k":
            return linux64k()
        return fetch_debian(release, flavour, mirror, progress=lambda text: None)
    except FetchError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no guest to boot: {error}")


async def shell(vm: avmm.VirtualMachine, command: str, timeout: float = 40) -> tuple[int, str]:
    """Run ``command`` in the guest's shell: its exit code and what it printed."""
    # Split, so that the echo of what is typed is not taken for the answer. The kernel may speak before a line's end.
    vm.console.write(f"echo '<'begin'>'; {command}; echo '<'end $?'>'\n".encode())
    found = await vm.console.expect(rb"<begin>(?s:(.*?))<end (\d+)>", timeout=timeout)
    kernel = PrintkFilter()  # which may say that the host is busy
    said = (kernel.feed(found[1]) + kernel.end()).decode(errors="replace").replace("\r", "")
    return int(found[2]), said.removeprefix("\n")


@pytest.fixture(scope="session")
def debian() -> Fetched:
    """Debian's cloud kernel and the busybox initrd."""
    return fetch_or_skip("cloud")


@pytest.fixture(scope="session")
def debian_generic() -> Fetched:
    """The same with Debian's generic kernel."""
    return fetch_or_skip("generic")


@pytest.fixture
def with_init(debian: Fetched, tmp_path: Path) -> Callable[[str], Path]:
    """Makes an initrd whose first program is the given shell script; boot it with ``avmm.init=/test-init``."""

    def make(script: str) -> Path:
        archive = cpio.pack([cpio.file("test-init", b"#!/bin/sh\n" + script.encode(), 0o755)])
        path = tmp_path / "initrd"
        path.write_bytes(cpio.append(debian.initrd.read_bytes(), archive))
        return path

    return make


# Every test that boots a VM runs with one that was restored from a snapshot as well, but for those marked booted_only.


def booted_only(reason: str) -> pytest.MarkDecorator:
    """Marks a test for which a restored VM makes no sense, because of ``reason``."""
    return pytest.mark.booted_only(reason)


#: Marks a test that runs with a restored VM only where time does not matter (``--soak``).
long_restored = pytest.mark.long_restored


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of the command line and of the plugin, which are no coroutines, have VMs in processes of their own."""
    if "life" in metafunc.fixturenames and inspect.iscoroutinefunction(metafunc.function):
        lives: list[Any] = ["booted"]
        if not any(metafunc.definition.iter_markers("booted_only")):
            soak = [pytest.mark.soak] if any(metafunc.definition.iter_markers("long_restored")) else []
            lives.append(pytest.param("restored", marks=soak))
        metafunc.parametrize("life", lives, indirect=True)


#: Snapshots of this session of VMs that nothing but its options tells apart, by those.
_snapshots: dict[str, Path] = {}


@pytest.fixture(autouse=True)
def life(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """How a test's VMs come to be: ``booted``, or ``restored`` from a snapshot taken when they were ready."""
    if getattr(request, "param", "booted") == "booted":
        return
    boot = avmm.boot

    async def ready(*args: Any, **options: Any) -> Path:
        """A snapshot."""
        key = repr((args, sorted(options.items())))
        shared = not {"drives", "shares", "vsock", "pcap"} & set(options) and "socket=" not in key
        if not shared or key not in _snapshots:
            path = tmp_path_factory.mktemp("life") / "snapshot"
            async with boot(*args, **options) as vm:
                await vm.console.expect(UP, timeout=240)
                await vm.snapshot(path)
            if not shared:
                return path
            _snapshots[key] = path
        return _snapshots[key]

    def restored(
        *args: Any, keep_output: int | None = None, monitor: bool = False, trace: Any = None, **options: Any
    ) -> Booting:
        async def make() -> avmm.VirtualMachine:
            config, origin = load(await ready(*args, **options))
            # The test looks for what has been shown already.
            console = origin.state.console
            seen = replace(console, transcript=replace(console.transcript, cursor=0))
            origin.state = replace(origin.state, console=seen)
            return avmm.VirtualMachine(config, origin=origin, keep_output=keep_output, monitor=monitor, trace=trace)

        return Booting(make)

    monkeypatch.setattr(avmm, "boot", restored)


def held() -> dict[str, set[str]]:
    """What a process holds that a VM must give back: threads, file descriptors, mappings as large as guest RAM."""
    mappings = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if int(last, 16) - int(first, 16) >= 64 << 20 and not line.endswith("[heap]"):
            mappings.add(line.split()[0])
    return {
        "threads": {thread.name for thread in threading.enumerate() if thread.name.startswith("avmm")},
        "files": {os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in _open_files()},
        "mappings": mappings,
    }


def _open_files() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    """After each test: no thread, file descriptor, mapping or task more than before."""
    before = held()
    files = len(_open_files())
    yield
    # What a thread of the executor raised it holds for a moment longer than whoever awaited it.
    await asyncio.get_running_loop().shutdown_default_executor()
    gc.collect()
    left = {what: now - before[what] for what, now in held().items()}
    assert not left["threads"], left
    assert not left["mappings"], left
    assert len(_open_files()) <= files, left
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not [task for task in others if "avmm" in repr(task.get_coro())], others
